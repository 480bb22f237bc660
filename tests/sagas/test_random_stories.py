"""Random sagas with random answers: whatever happens, history decides, and every saga ends as promised.

A story is drawn as a tree (steps, branches, caught failures), then played against drawn answers. The invariants are
checked at every prefix of the history.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID, uuid5

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bus.envelope import Envelope, StreamId
from eventstore.behaviour import Decision
from sagas import SagaDefinition, SagaRun, SagaState, Status, StepFailed, saga
from sagas.testing import NO_ANSWER, Cancelled, Died, NoAnswer
from tests.sagas.stories import PLACED, CardDeclined, Erase, Note, OrderPlaced
from tests.sagas.world import World


@dataclass(frozen=True)
class OneStep:
    undo: bool
    timeout: bool


@dataclass(frozen=True)
class Seq:
    parts: tuple[Any, ...]


@dataclass(frozen=True)
class Par:
    parts: tuple[Any, ...]


@dataclass(frozen=True)
class Caught:
    part: Any
    reraise: bool


STEP = st.builds(OneStep, undo=st.booleans(), timeout=st.booleans())
STORY = st.recursive(
    STEP,
    lambda inner: st.one_of(
        st.builds(Seq, st.lists(inner, min_size=1, max_size=3).map(tuple)),
        st.builds(Par, st.lists(inner, max_size=3).map(tuple)),
        st.builds(Caught, inner, st.booleans()),
    ),
    max_leaves=7,
)
ANSWER = st.sampled_from([None, None, None, CardDeclined("no"), Died("x"), Cancelled(), NO_ANSWER])


def story_of(tree: Any) -> SagaDefinition[OrderPlaced]:
    @saga("random", version=1)
    async def random_story(run: SagaRun, placed: OrderPlaced) -> None:
        log: list[str] = []  # shared by the branches, so that the order of answers shows in what is sent

        async def play(part: Any) -> None:
            match part:
                case OneStep(undo=undo, timeout=timeout):
                    text = f"{run.uuid().hex[:8]} after {len(log)}"
                    try:
                        await run.step(
                            Note(text=text), undo=Erase(text=text) if undo else None, timeout_s=9 if timeout else None
                        )
                    finally:
                        log.append(text)
                case Seq(parts=parts):
                    for one in parts:
                        await play(one)
                case Par(parts=parts):
                    await run.all(*[play(one) for one in parts])
                case Caught(part=one, reraise=reraise):
                    try:
                        await play(one)
                    except StepFailed as failed:
                        log.append(failed.reason)
                        await run.step(Note(text=f"{run.uuid().hex[:8]} caught"))
                        if reraise:
                            raise

        await play(tree)

    return random_story


def content(decision: Decision[SagaState]) -> object:
    return [(e.type, e.data) for e in decision.events], decision.outgoing, decision.timers


def play(tree: Any, data: st.DataObject, *, retries: int = 2) -> tuple[World, dict[UUID, Any]]:
    """Each message is decided by a worker that lives on and by a new one; they must agree."""
    world = World(story_of(tree))
    start = replace(world.start_of(PLACED), id=UUID(int=1), correlation_id=UUID(int=1))
    world.replier = world.starter
    world.starter.handle(start)
    answered: dict[UUID, Any] = {}
    for _ in range(200):
        (stream,) = world.streams
        state = world.worker().state(stream)
        if state.status is None or state.status.ended:
            break
        if state.status is Status.PARKED:
            assert retries > 0, "only a failed undo parks these sagas"
            retries -= 1
            world.retry()
            continue
        pending = [command for command in world.sent if command.id in state.under_way]
        command = data.draw(st.sampled_from(pending), label="answers next")
        undo = command.undoes is not None
        answer = None if undo and not retries else data.draw(ANSWER, label="answer")
        timers = [timer for timer in world.timers.values() if timer.envelope.causation_id == command.id]
        if isinstance(answer, NoAnswer) and (undo or not timers):
            answer = None
        if undo and answer is not None:
            retries -= 1
        message = timers[0].envelope if isinstance(answer, NoAnswer) else world.reply(answer, to=command)
        answered[command.id] = answer
        if not isinstance(answer, NoAnswer):
            message = replace(message, id=uuid5(command.id, "reply"))
        lived, fresh = world.replier.decide(message), world.worker().decide(message)
        assert content(lived[2]) == content(fresh[2])
        world.replier.commit(data.draw(st.sampled_from([lived, fresh]), label="survivor"))
        again = world.replier.handle(message)  # delivered twice
        assert (again.events, again.outgoing) == ((), ())
    return world, answered


def undone(world: World, answered: dict[UUID, Any]) -> list[UUID]:
    return [command.undoes for command in world.sent if command.undoes and answered[command.id] is None]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(tree=STORY, data=st.data())
def test_every_random_saga_ends_and_undoes_what_it_must_in_reverse_and_once(tree: Any, data: st.DataObject) -> None:
    world, answered = play(tree, data)
    steps = [command for command in world.sent if command.undoes is None]
    state = world.worker().state(StreamId("saga.random", world.saga_id))
    assert state.status in (Status.COMPLETED, Status.COMPENSATED)
    assert len({command.id for command in world.sent}) == len(world.sent)

    undos = {event.id for event in state.history if getattr(event, "undo_type", None)}  # type: ignore[attr-defined]
    unknown = {id_ for id_, answer in answered.items() if isinstance(answer, NoAnswer)}
    done = {id_ for id_, answer in answered.items() if answer is None}
    owed = (unknown | done) if state.status is Status.COMPENSATED else unknown
    assert undone(world, answered) == [step.id for step in reversed(steps) if step.id in undos & owed]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(tree=STORY, data=st.data())
def test_every_prefix_of_a_history_replays_to_the_same_commands(tree: Any, data: st.DataObject) -> None:
    """Method: a strict replay of each prefix parks nothing and lacks nothing, so it sends nothing."""
    world, _ = play(tree, data, retries=0)
    replayer = world.replier.behaviour._replayer
    for length in range(1, len(world.history) + 1):
        prefix = world.history[:length]
        if length < len(world.history) and not _is_cut(world.history[length]):
            continue  # written by one unit with what follows
        state = SagaState(StreamId("saga.random", world.saga_id))
        state.fold(prefix)
        instance, plans = replayer.replay(state.id, state.history)
        assert (instance.parked, plans) == (None, [])
        assert set(instance.waiting) == {step.label for step in state.under_way.values()}


def _is_cut(following: Envelope) -> bool:
    return following.type in ("foldbus.saga-step-replied.v1", "foldbus.saga-step-timed-out.v1")
