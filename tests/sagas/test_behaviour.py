"""Sagas as the handler runtime sees them: envelopes in, decisions out; races are forced with two workers."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4, uuid5

import pytest

from bus.envelope import Envelope, Kind, ReplyOutcome, ReplyTo, StreamId
from bus.errors import BadInput, Undecodable, UnknownType
from bus.messages import Command
from eventstore.port import CancelTimer, Timer
from sagas import BadSaga, CancelSaga, RetrySaga, SagaBehaviour, SagaRun, Status, StepFailed, saga, saga_id
from sagas.testing import Cancelled, Died, VirtualClock
from tests.sagas.stories import (
    PLACED,
    CardDeclined,
    Note,
    OrderPlaced,
    Paid,
    Pay,
    Refund,
    Release,
    Reserve,
    Reserved,
    Ship,
    fulfil_order,
)
from tests.sagas.world import World


def paying() -> World:
    """Waits for the payment, which has a timeout."""
    world = World(fulfil_order)
    world.start(PLACED)
    world.answer(Reserved())
    assert world.names() == ["Reserve", "Pay"]
    return world


# --- what is decided --------------------------------------------------------------------------------------------------


def test_a_start_event_begins_the_history_and_sends_the_first_command() -> None:
    world = World(fulfil_order)
    start = world.start_of(PLACED, traceparent="00-abc", custom="x")
    decision = world.starter.handle(start)
    instance = saga_id("fulfil-order", start.id)
    assert world.streams.keys() == {StreamId("saga.fulfil-order", str(instance))}
    assert world.types() == ["saga-started", "saga-step-scheduled"]
    (command,) = decision.outgoing
    assert command == Envelope(
        id=uuid5(instance, "1"),
        kind=Kind.COMMAND,
        type="stock.reserve.v1",
        source="orders",
        key="o-1",
        data=b'{"order_id":"o-1"}',
        time=world.clock.now(),
        correlation_id=start.correlation_id,
        causation_id=start.id,
        reply_to=ReplyTo("orders.replies", str(instance), "fulfil-order"),
        tenant="acme",
        actor="ann",
        topic="stock.commands",
        headers={"traceparent": "00-abc"},
    )
    for record in world.history:
        assert (record.topic, record.key, record.correlation_id) == (None, str(instance), start.correlation_id)
    assert len({record.id for record in world.history}) == 2


def test_the_start_event_is_kept_whole() -> None:
    world = World(fulfil_order)
    start = world.start_of(PLACED, custom="x")
    world.starter.handle(start)
    stored = json.loads(world.history[0].data)["start"]
    assert UUID(stored["id"]) == start.id
    assert stored["data"].encode() == start.data
    assert stored["headers"] == {"custom": "x"}
    assert (stored["tenant"], stored["actor"], stored["source"]) == ("acme", "ann", "orders")


def test_a_later_command_is_caused_by_the_reply_and_belongs_to_the_story_of_the_start() -> None:
    world = World(fulfil_order)
    world.start(PLACED)
    reply = replace(world.reply(Reserved()), headers={"traceparent": "00-def"}, tenant=None)
    world.replier.handle(reply)
    pay = world.sent[-1]
    assert (pay.causation_id, pay.correlation_id) == (reply.id, world.sent[0].correlation_id)
    assert (pay.tenant, pay.headers) == ("acme", {"traceparent": "00-def"})


def test_a_timeout_is_a_timer_for_the_replies_consumer_cancelled_by_the_reply() -> None:
    world = World(fulfil_order)
    world.start(PLACED)
    decision = world.answer(Reserved())
    (timer,) = decision.timers
    assert isinstance(timer, Timer)
    assert timer.id == timer.envelope.id == uuid5(UUID(world.saga_id), "timeout:3")
    assert (timer.consumer, timer.key) == ("orders.replies", world.saga_id)
    assert timer.due_at == world.clock.now() + timedelta(seconds=30)
    assert timer.envelope.reply_to == ReplyTo("orders.replies", world.saga_id, "fulfil-order")
    assert world.answer(Paid()).timers == (CancelTimer("orders.replies", timer.id),)


def test_an_undo_names_the_command_that_it_undoes() -> None:
    world = paying()
    world.answer(CardDeclined("no funds"))
    world.answer(None)
    release, reserve = world.sent[-1], world.sent[0]
    assert (release.type, release.undoes) == ("stock.release.v1", reserve.id)
    assert release.id == uuid5(UUID(world.saga_id), "undo:1")
    assert all(command.undoes is None for command in world.sent[:-1])


def test_the_shop_story_when_the_card_is_declined() -> None:
    world = paying()
    world.answer(CardDeclined("no funds"))
    world.answer(None)
    world.answer(None)
    assert world.names() == ["Reserve", "Pay", "CancelOrder", "Release"]
    assert world.types()[-2:] == ["saga-step-replied", "saga-compensated"]
    assert world.types().count("saga-compensating") == 1
    assert json.loads(world.history[-1].data)["why"].startswith("payments.pay.v1: payments.card-declined")


@pytest.mark.parametrize("answer", [Died("disk"), Cancelled()])
def test_died_and_cancelled_are_certain_so_the_step_itself_is_not_undone(answer: Any) -> None:
    world = paying()
    world.answer(answer)
    world.answer(None)
    world.answer(None)
    assert world.names() == ["Reserve", "Pay", "CancelOrder", "Release"]


def test_a_refusal_arrives_as_its_own_class() -> None:
    caught: list[StepFailed] = []

    @saga("pays")
    async def pays(run: SagaRun, placed: OrderPlaced) -> None:
        try:
            await run.step(Pay(payment_id="p"))
        except StepFailed as failed:
            caught.append(failed)
            raise

    world = World(pays)
    world.start(PLACED)
    world.answer(CardDeclined("no funds", left=3))
    (failed,) = caught
    assert getattr(failed, "refusal", None) == CardDeclined("no funds", left=3)
    assert (failed.path, failed.command_type) == ("1", "payments.pay.v1")


# --- races ------------------------------------------------------------------------------------------------------------


def test_a_doubled_start_event_is_one_saga() -> None:
    world = World(fulfil_order)
    start = world.start_of(PLACED)
    world.starter.handle(start)
    again = world.worker(starts="fulfil-order").handle(start)
    assert (again.events, again.outgoing, again.timers) == ((), (), ())
    assert world.metrics.total("foldbus_saga_late_total", what="start") == 1


def test_two_workers_start_the_same_saga_one_wins_and_both_would_have_sent_the_same() -> None:
    world = World(fulfil_order)
    start = world.start_of(PLACED)
    first = world.worker(starts="fulfil-order").decide(start)
    other = world.worker(starts="fulfil-order")
    second = other.decide(start)
    assert first[2].outgoing == second[2].outgoing
    assert world.starter.commit(first)
    assert not other.commit(second)
    assert other.handle(start).events == ()


def test_two_workers_with_the_same_history_decide_the_same_commands_with_the_same_ids() -> None:
    world = paying()
    reply = world.reply(Paid())
    (_, _, one), (_, _, two) = world.worker().decide(reply), world.replier.decide(reply)
    assert one.outgoing == two.outgoing != ()
    assert one.timers == two.timers
    assert [(e.type, e.data) for e in one.events] == [(e.type, e.data) for e in two.events]


@pytest.mark.parametrize("first", ["reply", "timeout"])
def test_of_a_reply_and_a_timeout_the_first_wins_and_the_second_decides_nothing(first: str) -> None:
    """Both workers decide on the same version before either commits: the loser reloads and decides again."""
    world = paying()
    (timer,) = world.timers.values()
    messages = {"reply": world.reply(Paid()), "timeout": timer.envelope}
    early, late = messages.pop(first), messages.popitem()[1]
    one, two = world.worker(), world.worker()
    winning, losing = one.decide(early), two.decide(late)
    assert winning[2].events
    assert losing[2].events
    assert one.commit(winning)
    assert not two.commit(losing)
    again = two.handle(late)
    assert (again.events, again.outgoing) == ((), ())
    assert world.timers == {}
    assert world.names()[-1] == ("Ship" if first == "reply" else "CancelOrder")


def test_the_unit_that_handles_a_timeout_takes_its_timer_away_also_when_it_is_late() -> None:
    world = paying()
    (timer,) = world.timers.values()
    taken = CancelTimer("orders.replies", timer.id)
    assert world.replier.handle(timer.envelope).timers == (taken,)
    assert world.replier.handle(timer.envelope).timers == (taken,)


def test_a_step_that_timed_out_is_undone_and_its_late_reply_changes_nothing() -> None:
    world = paying()
    pay = world.sent[-1]
    (timer,) = world.timers.values()
    world.replier.handle(timer.envelope)
    late = world.answer(Paid(), to=pay)
    assert (late.events, late.outgoing, late.timers) == ((), (), ())
    world.answer(None)  # CancelOrder
    assert world.names()[-1] == "Refund"
    world.answer(None)
    world.answer(None)
    assert world.names() == ["Reserve", "Pay", "CancelOrder", "Refund", "Release"]
    assert world.types()[-1] == "saga-compensated"
    assert world.answer(Paid(), to=pay).events == ()
    assert world.metrics.total("foldbus_saga_late_total", what="reply") == 2


def test_an_end_is_final_for_every_message() -> None:
    world = paying()
    (timer,) = world.timers.values()
    sent = list(world.sent)
    world.answer(Paid())
    world.answer(None)
    assert world.types()[-1] == "saga-completed"
    before = list(world.history)
    for message in (*(world.reply(None, to=command) for command in sent), timer.envelope):
        assert world.worker().handle(message).outgoing == ()
    assert world.history == before


def test_a_reply_to_nobody_is_counted_and_decides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    world = paying()
    stray = replace(world.reply(Paid()), key=str(uuid4()))
    with caplog.at_level(logging.WARNING, "foldbus.sagas"):
        decision = world.replier.handle(stray)
    assert (decision.events, decision.outgoing, decision.timers) == ((), (), ())
    assert world.metrics.total("foldbus_saga_unknown_total", saga="fulfil-order", what="reply") == 1
    assert "has no history" in caplog.text
    unknown_step = replace(world.reply(Paid()), causation_id=uuid4())
    assert world.replier.handle(unknown_step).events == ()


@pytest.mark.parametrize(
    "spoil",
    [
        {"key": "no-uuid"},
        {"reply_to": None},
        {"reply_to": ReplyTo("orders.replies", "k", "")},
        {"outcome": None},
        {"type": "payments.refund.reply.v1"},
    ],
    ids=str,
)
def test_a_malformed_reply_is_a_dead_letter_and_the_saga_waits_on(spoil: dict[str, Any]) -> None:
    world = paying()
    with pytest.raises(Undecodable):
        world.replier.decide(replace(world.reply(Paid()), **spoil))
    world.answer(Paid())
    assert world.names()[-1] == "Ship"


def test_an_event_that_starts_nothing_here_and_one_that_cannot_be_read_are_dead_letters() -> None:
    world = World(fulfil_order)
    start = world.start_of(PLACED)
    with pytest.raises(UnknownType, match="starts no saga here"):
        world.replier.decide(start)
    with pytest.raises(BadInput):
        world.starter.decide(replace(start, data=b'{"order_id": 3'))
    assert world.streams == {}


# --- crashes and lost commits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pay", ["paid", "refused", "timeout"])
def test_a_crash_before_every_message_changes_nothing(pay: str) -> None:
    """Method: the same answers to a worker that lives on, and to a new one for each message."""

    def play(*, crash: bool) -> tuple[list[Envelope], list[str], list[bytes]]:
        world = World(fulfil_order)
        start = replace(world.start_of(PLACED), id=UUID(int=1), correlation_id=UUID(int=1))
        world.starter.handle(start)
        while not world.worker().state(StreamId("saga.fulfil-order", world.saga_id)).status.ended:  # type: ignore[union-attr]
            command = world.sent[-1]
            answers = {"stock.reserve.v1": Reserved(), "payments.pay.v1": Paid() if pay == "paid" else CardDeclined()}
            message = world.reply(answers.get(command.type), to=command)
            if command.type == "payments.pay.v1" and pay == "timeout":
                (timer,) = world.timers.values()
                message = timer.envelope
            world.clock.time += timedelta(seconds=1)
            # the reply's id is its own; all else must agree
            message = replace(message, id=message.id if message.kind is Kind.EVENT else uuid5(command.id, "reply"))
            if crash:
                world.worker().decide(message)  # decided, and lost before its commit
                world.replier = world.worker()
            world.replier.handle(message)
        return world.sent, world.types(), [record.data for record in world.history]

    assert play(crash=True) == play(crash=False)


def test_a_state_whose_decision_failed_is_rebuilt_from_its_history(monkeypatch: pytest.MonkeyPatch) -> None:
    world = paying()
    stream = StreamId("saga.fulfil-order", world.saga_id)
    state = world.replier.states[stream][1]
    reply = world.reply(Paid())

    def fails(self: object) -> None:
        raise RuntimeError("out of ids")

    with monkeypatch.context() as patch:
        patch.setattr("sagas.turn.Turn.decision", fails)
        with pytest.raises(RuntimeError):
            world.replier.behaviour.decide(state, reply)
    assert state.instance is None
    decision = world.replier.behaviour.decide(state, reply)
    assert [command.type for command in decision.outgoing] == ["shipping.ship.v1"]


def test_a_live_state_catches_up_with_what_somebody_else_stored() -> None:
    world = paying()
    stream = StreamId("saga.fulfil-order", world.saga_id)
    state, behind = world.replier.states[stream][1], len(world.history)
    behaviour = world.replier.behaviour
    world.worker().handle(world.reply(Paid()))
    state = behaviour.fold(state, world.history[behind:])
    decision = behaviour.decide(state, world.reply(None))
    assert [event.type for event in decision.events][-1] == "foldbus.saga-completed.v1"


def test_living_on_runs_user_code_once_per_event_and_folding_runs_none_of_it() -> None:
    ran: list[str] = []

    @saga("counted")
    async def counted(run: SagaRun, placed: OrderPlaced) -> None:
        ran.append("start")
        for text in "abc":
            await run.step(Note(text=text))
            ran.append(text)

    world = World(counted)
    world.start(PLACED)
    world.replier = world.starter
    world.replier.behaviour = world.worker(starts="counted").behaviour
    world.answer(None)
    world.answer(None)
    assert ran == ["start", "a", "b"]
    fresh = world.worker()
    fresh.state(StreamId("saga.counted", world.saga_id))
    fresh.handle(replace(world.reply(None), causation_id=uuid4()))  # late: nothing to run either
    assert ran == ["start", "a", "b"]


# --- parked -----------------------------------------------------------------------------------------------------------


@saga("story", version=1)
async def buggy(run: SagaRun, placed: OrderPlaced) -> None:
    await run.step(Reserve(order_id="o"), undo=Release(order_id="o"))
    raise KeyError("x")


@saga("story", version=1)
async def mended(run: SagaRun, placed: OrderPlaced) -> None:
    reserved = await run.step(Reserve(order_id="o"), undo=Release(order_id="o"))
    await run.step(Note(text=f"shelf {reserved.shelf}"))
    await run.step(Note(text="end"))


def test_a_bug_parks_with_its_reason_on_display_and_fixed_code_resumes(caplog: pytest.LogCaptureFixture) -> None:
    world = World(buggy)
    world.start(PLACED)
    decision = world.answer(Reserved())
    assert world.types()[-2:] == ["saga-step-replied", "saga-parked"]
    assert decision.outgoing == ()
    assert "KeyError: 'x'" in caplog.text
    assert world.metrics.total("foldbus_saga_parked_total", saga="story") == 1

    world.deploy(mended)
    decision = world.retry()
    assert world.types()[-2:] == ["saga-retried", "saga-step-scheduled"]
    assert world.commands()[-1] == Note(text="shelf A1")
    world.replier = world.worker()
    world.answer(None)
    world.replier = world.worker()
    world.answer(None)
    assert world.types()[-1] == "saga-completed"
    assert world.names() == ["Reserve", "Note", "Note"]


def test_a_retry_on_the_same_bug_parks_again_and_may_be_tried_again() -> None:
    world = World(buggy)
    world.start(PLACED)
    world.answer(Reserved())
    world.retry()
    assert world.types()[-2:] == ["saga-retried", "saga-parked"]
    world.deploy(mended)
    world.retry()
    assert world.names()[-1] == "Note"


def test_a_bug_before_the_first_step_parks_with_a_history() -> None:
    @saga("story", version=1)
    async def stillborn(run: SagaRun, placed: OrderPlaced) -> None:
        raise ValueError("no")

    world = World(stillborn)
    world.start(PLACED)
    assert world.types() == ["saga-started", "saga-parked"]
    world.deploy(mended)
    world.retry()
    assert world.names() == ["Reserve"]


def test_an_answer_that_comes_while_parked_is_kept_for_the_retry() -> None:
    def story(*, bug: bool) -> Any:
        @saga("story", version=1)
        async def branches(run: SagaRun, placed: OrderPlaced) -> None:
            async def one() -> None:
                await run.step(Note(text="a1"))
                if bug:
                    raise KeyError("x")
                await run.step(Note(text="a2"))

            await run.all(one(), run.step(Pay(payment_id="p"), timeout_s=5))
            await run.step(Note(text="end"))

        return branches

    world = World(story(bug=True))
    world.start(PLACED)
    note, pay = world.sent
    world.answer(None, to=note)
    assert world.types()[-1] == "saga-parked"
    kept = world.answer(Paid(), to=pay)
    assert [event.type for event in kept.events] == ["foldbus.saga-step-replied.v1"]
    assert world.timers == {}
    world.deploy(story(bug=False))
    world.retry()
    assert world.commands()[-1] == Note(text="a2")
    world.answer(None)
    assert world.commands()[-1] == Note(text="end")


def test_an_undo_that_fails_parks_and_each_retry_is_a_new_command() -> None:
    world = paying()
    world.answer(CardDeclined())
    world.answer(None)
    world.answer(Died("no such shelf"))
    assert world.types()[-1] == "saga-parked"
    world.retry()
    first, second = world.sent[-2:]
    assert first.type == second.type == "stock.release.v1"
    assert first.undoes == second.undoes == world.sent[0].id
    assert first.id != second.id
    assert world.answer(None, to=first).events == ()
    world.replier = world.worker()
    world.answer(None)
    assert world.types()[-1] == "saga-compensated"


def test_a_fixed_undo_is_what_a_retry_sends() -> None:
    def story(undo: Command[Any]) -> Any:
        @saga("story", version=1)
        async def undoing(run: SagaRun, placed: OrderPlaced) -> None:
            await run.step(Reserve(order_id="o"), undo=undo)
            raise StepFailed("enough")

        return undoing

    world = World(story(Reserve(order_id="o")))  # reserves once more
    world.start(PLACED)
    world.answer(Reserved())
    world.answer(Died("no such order"))
    world.deploy(story(Release(order_id="o")))
    world.retry()
    assert world.commands()[-1] == Release(order_id="o")
    world.answer(None)
    assert world.types()[-1] == "saga-compensated"


def test_history_that_does_not_fit_the_code_parks_that_instance_with_the_reply_kept() -> None:
    @saga("story", version=1)
    async def other(run: SagaRun, placed: OrderPlaced) -> None:
        await run.step(Note(text="first"))

    world = World(mended)
    world.start(PLACED)
    world.deploy(other)
    world.answer(Reserved())
    assert world.types()[-2:] == ["saga-step-replied", "saga-parked"]
    reason = json.loads(world.history[-1].data)["reason"]
    assert "step 1: history has stock.reserve.v1 for 'o', the code schedules notes.note.v1 for 'first'" in reason
    world.retry()
    assert world.types()[-2:] == ["saga-retried", "saga-parked"]
    world.deploy(mended)
    world.retry()
    assert world.commands()[-1] == Note(text="shelf A1")


def test_a_command_that_cannot_be_encoded_parks_and_sends_nothing_of_its_event() -> None:
    def story(key: str) -> Any:
        @saga("story", version=1)
        async def two(run: SagaRun, placed: OrderPlaced) -> None:
            await run.all(run.step(Note(text="a"), timeout_s=5), run.step(Note(text=key)))

        return two

    world = World(story(""))
    decision = world.start(PLACED)
    assert world.types() == ["saga-started", "saga-parked"]
    assert (decision.outgoing, decision.timers) == ((), ())
    assert "step 2 cannot be sent: Undecodable" in json.loads(world.history[-1].data)["reason"]
    world.deploy(story("b"))
    world.retry()
    assert [command.key for command in world.sent] == ["a", "b"]


def test_a_reply_that_the_saga_cannot_read_is_kept_and_parks() -> None:
    world = paying()
    torn = replace(world.reply(Paid()), data=b'{"receipt": 7}')
    world.replier.handle(torn)
    assert world.types()[-2:] == ["saga-step-replied", "saga-parked"]
    assert "answer to step 3 cannot be read" in json.loads(world.history[-1].data)["reason"]


def test_history_of_a_newer_program_parks_instead_of_being_guessed_at() -> None:
    world = paying()
    (stream,) = world.streams
    world.history.append(replace(world.history[-1], type="foldbus.saga-dreamt.v1", version=len(world.history) + 1))
    world.replier = world.worker()
    world.answer(Paid(), to=world.sent[-1])
    assert world.types()[-1] == "saga-parked"
    assert "saga-dreamt" in json.loads(world.history[-1].data)["reason"]
    assert stream in world.streams


def test_what_an_undo_answers_need_not_be_readable() -> None:
    @saga("story", version=1)
    async def undoing(run: SagaRun, placed: OrderPlaced) -> None:
        await run.step(Release(order_id="o"), undo=Reserve(order_id="o"))
        raise StepFailed("enough")

    world = World(undoing)
    world.start(PLACED)
    world.answer(None)
    world.replier.handle(replace(world.reply(Reserved()), data=b'{"shelf": 7}'))
    assert world.types()[-1] == "saga-compensated"


# --- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [RetrySaga, CancelSaga])
def test_a_verb_that_fits_nothing_is_refused_and_changes_nothing(verb: Any) -> None:
    world = paying()
    if verb is CancelSaga:
        world.answer(CardDeclined())
        world.answer(None)
    message = replace(world.verb(verb), reply_to=ReplyTo("orders.inbox", "me", "here"))
    decision = world.replier.handle(message)
    assert decision.events == ()
    assert decision.reply is not None
    assert decision.reply.outcome is ReplyOutcome.REFUSED
    assert decision.reply.causation_id == message.id


def test_an_operator_cancels_what_is_under_way_its_timer_goes_too() -> None:
    world = paying()
    message = replace(world.verb(CancelSaga), reply_to=ReplyTo("orders.inbox", "me", "here"))
    decision = world.replier.handle(message)
    assert decision.reply is not None
    assert decision.reply.outcome is ReplyOutcome.OK
    assert world.timers == {}
    assert world.answer(Paid(), to=world.sent[1]).events == ()
    world.replier = world.worker()
    world.answer(None, to=world.sent[2])
    assert world.names() == ["Reserve", "Pay", "CancelOrder", "Refund"]
    assert world.commands()[2].model_dump()["reason"] == "the saga was cancelled"


def test_retry_and_reply_race_on_the_version() -> None:
    world = World(buggy)
    world.start(PLACED)
    world.answer(Reserved())
    world.deploy(mended)
    one, two = world.worker(), world.worker()
    first, second = one.decide(world.verb(RetrySaga)), two.decide(world.verb(RetrySaga))
    assert first[2].outgoing == tuple(replace(e, causation_id=first[2].outgoing[0].causation_id)
                                      for e in second[2].outgoing)  # fmt: skip
    assert one.commit(first)
    assert not two.commit(second)
    assert two.handle(world.verb(RetrySaga)).events == ()


# --- versions ---------------------------------------------------------------------------------------------------------


@saga("story", version=2)
async def second_version(run: SagaRun, placed: OrderPlaced) -> None:
    await run.step(Note(text="check"))


def test_an_instance_stays_on_the_version_it_began_with_and_new_ones_take_the_newest() -> None:
    world = World(mended)
    world.start(PLACED)
    world.deploy(second_version, mended)
    world.answer(Reserved())
    assert world.commands()[-1] == Note(text="shelf A1")
    world.streams.clear()
    world.start(PLACED)
    assert world.commands()[-1] == Note(text="check")
    assert json.loads(world.history[0].data)["version"] == 2


def test_a_version_that_is_not_deployed_parks_and_says_so() -> None:
    world = World(mended)
    world.start(PLACED)
    world.deploy(second_version)
    world.answer(Reserved())
    assert "began on story v1, which is not deployed here (deployed: v2)" in world.history[-1].data.decode()
    world.deploy(second_version, mended)
    world.retry()
    assert world.commands()[-1] == Note(text="shelf A1")


def test_two_definitions_of_one_name_and_version_are_refused() -> None:
    world = World(mended)
    with pytest.raises(BadSaga, match="two sagas are called 'story'"):
        world.worker(mended, buggy)
    with pytest.raises(BadSaga, match="no saga 'other'"):
        world.worker(starts="other")


def test_topics_and_consumer_can_be_named() -> None:
    world = World(fulfil_order)
    behaviour = SagaBehaviour(
        [fulfil_order],
        service="orders",
        codec=world.codec,
        ids=world.worker().behaviour._place.ids,
        clock=VirtualClock(),
        starts="fulfil-order",
        replies_topic="r.topic",
        replies_consumer="r.consumer",
        commands_topic=lambda command: f"x.{command.__name__}",
    )
    start = world.start_of(PLACED)
    decision = behaviour.decide(behaviour.initial(behaviour.stream_of(start)), start)
    assert decision.outgoing[0].topic == "x.Reserve"
    reply = replace(world.reply(Reserved(), to=decision.outgoing[0]))
    assert reply.topic == "r.topic"
    (timer,) = behaviour.decide(decision.state, reply).timers
    assert timer.consumer == "r.consumer"


def test_a_saga_in_the_making_keeps_no_instance_once_it_stands_still() -> None:
    world = paying()
    stream = StreamId("saga.fulfil-order", world.saga_id)
    assert world.replier.states[stream][1].instance is not None
    world.answer(Paid())
    world.answer(None)
    state = world.replier.states[stream][1]
    assert (state.status, state.instance) == (Status.COMPLETED, None)


__all__ = ["Refund", "Ship"]
