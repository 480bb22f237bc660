"""Random programs on both stores, against a model of a dozen rules: what a store answers and holds, the model does too.

A program is a list of steps: calls, several calls at once, transactions that commit or roll back with calls in them,
keys parked, followed and drained, effects begun and ended, reads in pages, chosen reads, streams from either end. Every
answer is compared, and in the end everything stored. All examples of a test share one database, each under names of its
own.

Room for more: a step is a class with `run(world)`; list it in `STEPS`. (Snapshots have a suite of their own.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from itertools import count, permutations
from typing import Any
from uuid import UUID

from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from bus.envelope import Envelope, ReplyOutcome, StreamId
from eventstore.parking import Waiting
from eventstore.port import ANY, Append, CancelTimer, Claim, ClaimState, Fence, Outcome, Unit, Verdict, Watermark, Where
from tests.eventstore.model import Answer, Model
from tests.eventstore.parked import WHY, waiting
from tests.eventstore.stores import (
    CONSUMER,
    NOON,
    Backend,
    dead_letter,
    event,
    message,
    reply,
    stream,
    timer,
    wanted,
)

IDS = [UUID(int=n) for n in range(1, 6)]
STREAMS = [stream(name, category) for name, category in (("a", "order"), ("b", "order"), ("c", "stock"))]
KEYS = ["k", "l"]
EVENTS = [event(id=UUID(int=100 + n), public=n % 2 == 0) for n in range(4)]
EXAMPLES = count()


@dataclass
class World:
    """One example: its store, its model, and names that no other example has."""

    store: Any
    model: Model
    number: int
    base: int
    committed: list[tuple[Unit, Outcome]] = field(default_factory=list)
    tokens: dict[UUID, int] = field(default_factory=dict[UUID, int])
    """Of effects, the youngest."""

    def id(self, id: UUID) -> UUID:
        return UUID(int=id.int | self.number << 64) if id.int < 1000 else id

    def stream(self, of: StreamId) -> StreamId:
        return StreamId(f"{of.category}-{self.number}", of.id)

    def consumer(self) -> str:
        return f"{CONSUMER}-{self.number}"

    def envelope(self, one: Envelope) -> Envelope:
        return replace(one, id=self.id(one.id))

    def unit(self, made: Unit) -> Unit:
        """The same unit under this example's names."""
        claim = made.claim
        if claim is not None:
            fences = None if claim.fences is None else self.id(claim.fences)
            claim = replace(claim, consumer=self.consumer(), message_id=self.id(claim.message_id), fences=fences)
        letter = made.dead_letter
        if letter is not None:
            at = self.failed_at()
            why = replace(letter.failure, first_failed_at=at, failed_at=at)
            letter = replace(letter, consumer=self.consumer(), id=self.id(letter.id), failure=why)
        return replace(
            made,
            claim=claim,
            appends=tuple(
                Append(self.stream(one.stream), one.expected, tuple(map(self.envelope, one.envelopes)))
                for one in made.appends
            ),
            asserts=tuple((self.stream(at), version) for at, version in made.asserts),
            timers=tuple(replace(one, consumer=self.consumer(), id=self.id(one.id)) for one in made.timers),
            dead_letter=letter,
        )

    def waiting(self, id: UUID, key: str, timed: bool) -> Waiting:
        made = replace(waiting(key), envelope=replace(message(key), id=self.id(id)))
        return replace(made, delivery=None) if timed else made

    def tried(self, unit: Unit, outcome: Outcome, judged: Callable[[Model, Unit], Answer], ends: str) -> None:
        """A unit that was no ordinary call: what the model says of it, and what is so afterwards."""
        after = self.model.copy()
        assert plain(outcome) == judged(after, unit)
        if outcome.verdict is Verdict.COMMITTED and ends != "rollback":
            self.model = after
            self.committed.append((unit, outcome))

    def failed_at(self) -> Any:
        return NOON + timedelta(hours=self.number)

    def call(self, units: Sequence[Unit], marks: Sequence[Watermark]) -> tuple[list[Unit], list[Watermark]]:
        return [self.unit(one) for one in units], [replace(one, group=f"g-{self.number}") for one in marks]

    async def log(self, *, outgoing: bool = True, limit: int = 1000, where: Where | None = None) -> list[Envelope]:
        """From where this example began, page by page."""
        found: list[Envelope] = []
        after = self.base
        while True:
            page = await self.store.read_all(after=after, limit=limit, outgoing=outgoing, where=where)
            assert len(page.records) <= limit
            assert page.upto <= page.head
            found += page.records
            if page.upto >= page.head:
                return found
            assert page.upto > after
            after = page.upto


def plain(outcome: Outcome) -> Answer:
    misfit = None
    if outcome.stream is not None:
        assert outcome.expected is not None
        assert outcome.actual is not None
        misfit = (outcome.stream, outcome.expected, outcome.actual)
    versions = tuple(outcome.versions.items())
    return Answer(outcome.verdict, versions, None if outcome.reply is None else outcome.reply.id, misfit)


# --- steps -----------------------------------------------------------------------------------------------------------

CallOf = tuple[list[Unit], list[Watermark]]


@dataclass(frozen=True)
class Commit:
    call: CallOf

    async def run(self, world: World) -> None:
        units, marks = world.call(*self.call)
        outcomes = await world.store.commit(units, watermarks=marks)
        assert [plain(one) for one in outcomes] == world.model.commit(units, marks)
        world.committed += zip(units, outcomes, strict=True)


@dataclass(frozen=True)
class Together:
    """Calls at once: they were answered as in some order of them, each in one piece."""

    calls: list[CallOf]

    async def run(self, world: World) -> None:
        calls = [world.call(*call) for call in self.calls]
        answers = await asyncio.gather(*(world.store.commit(units, watermarks=marks) for units, marks in calls))
        log = [record.id for record in await world.log()]
        loaded = await world.store.load([wanted(world.stream(one)) for one in STREAMS])
        streams = {one.stream: [record.id for record in one.records] for one in loaded}
        for order in permutations(range(len(calls))):
            after = world.model.copy()
            expected = {nth: after.commit(*calls[nth]) for nth in order}
            fits = all([plain(one) for one in answers[nth]] == expected[nth] for nth in range(len(calls)))
            if fits and all(streams[at] == after.streams.get(at, []) for at in streams):
                assert sorted(log) == sorted(after.log)
                after.log = log  # positions of calls at once may be mixed
                world.model = after
                for (units, _), outcomes in zip(calls, answers, strict=True):
                    world.committed += zip(units, outcomes, strict=True)
                return
        raise AssertionError(f"no order of the calls explains {answers}")


@dataclass(frozen=True)
class Transaction:
    calls: list[CallOf]
    ends: str

    async def run(self, world: World) -> None:
        inside = world.model.copy()
        done: list[tuple[Unit, Outcome]] = []
        async with world.store.transaction() as tx:
            for call in self.calls:
                units, marks = world.call(*call)
                outcomes = await world.store.commit(units, watermarks=marks, tx=tx)
                assert [plain(one) for one in outcomes] == inside.commit(units, marks)
                done += zip(units, outcomes, strict=True)
            assert [record.id for record in await world.log()] == world.model.log, "not before it ends"
            if self.ends == "rollback":
                await tx.sql.rollback()
        if self.ends == "commit":
            world.model = inside
            world.committed += done


@dataclass(frozen=True)
class ReadLog:
    limit: int
    outgoing: bool

    async def run(self, world: World) -> None:
        found = [record.id for record in await world.log(outgoing=self.outgoing, limit=self.limit)]
        events = {id for ids in world.model.streams.values() for id in ids}
        assert found == [id for id in world.model.log if self.outgoing or id in events]


@dataclass(frozen=True)
class ReadChosen:
    """A filter shows what a reader of everything would have kept."""

    limit: int
    categories: list[str] | None
    of: StreamId | None

    async def run(self, world: World) -> None:
        categories = None if self.categories is None else {f"{one}-{world.number}" for one in self.categories}
        where = Where(
            categories=None if categories is None else frozenset(categories),
            stream=None if self.of is None else world.stream(self.of),
        )
        everything = await world.log(outgoing=False)
        kept = [
            one
            for one in everything
            if (categories is None or (one.stream and one.stream.category in categories))
            and (where.stream is None or one.stream == where.stream)
        ]
        assert await world.log(outgoing=False, limit=self.limit, where=where) == kept


@dataclass(frozen=True)
class ReadStream:
    of: StreamId
    after: int
    upto: int | None
    backward: bool
    limit: int | None

    async def run(self, world: World) -> None:
        at = world.stream(self.of)
        found = await world.store.read_stream(
            at, after=self.after, upto=self.upto, backward=self.backward, limit=self.limit
        )
        ids = world.model.streams.get(at, [])
        wanted_ = list(enumerate(ids, 1))[self.after : self.upto]
        if self.backward:
            wanted_.reverse()
        assert found.version == len(ids)
        assert [(one.version, one.id) for one in found.records] == wanted_[: self.limit]


@dataclass(frozen=True)
class Park:
    of: tuple[UUID, str, bool]

    async def run(self, world: World) -> None:
        id, key, timed = self.of
        found = await world.store.parking.park(world.consumer(), world.waiting(*self.of), WHY, due_at=NOON)
        assert (found.state, found.started) == world.model.park(world.id(id), key, timed=timed)


@dataclass(frozen=True)
class Follow:
    messages: list[tuple[UUID, str, bool]]

    async def run(self, world: World) -> None:
        waits = [world.waiting(*one) for one in self.messages]
        found = await world.store.parking.follow(world.consumer(), waits)
        expected = [world.model.follow(world.id(id), key, timed=timed) for id, key, timed in self.messages]
        if len({id for id, _, _ in self.messages}) == len(self.messages):  # else the last answer is everybody's
            assert [(one.state, one.started) for one in found] == expected


@dataclass(frozen=True)
class Turn:
    """Whose turn it is commits, alone or within a transaction; whose it is not changes nothing."""

    key: str
    unit: Unit
    ends: str

    async def run(self, world: World) -> None:
        parking = world.store.parking
        turns = await parking.due(consumers=[world.consumer()], limit=10, lease_s=0)
        assert {turn.key: turn.message.envelope.id for turn in turns} == {
            key: queue[0] for key, queue in world.model.queues.items()
        }
        for turn in turns:
            if turn.key != self.key:
                continue
            unit = world.unit(self.unit)
            made = Claim(world.consumer(), turn.message.envelope.id, self.key)
            if unit.claim is not None and unit.claim.fences != made.message_id:
                made = replace(unit.claim, message_id=made.message_id, key=self.key)
            unit = replace(unit, claim=made, dead_letter=None)
            stale = replace(turn, token=turn.token - 1)
            assert (await parking.commit(stale, unit)).verdict is Verdict.PARKED
            if self.ends == "alone":
                outcome = await parking.commit(turn, unit)
            else:
                async with world.store.transaction() as tx:
                    outcome = await parking.commit(turn, unit, tx=tx)
                    if self.ends == "rollback":
                        await tx.sql.rollback()
            world.tried(unit, outcome, Model.turn, self.ends)


@dataclass(frozen=True)
class Cancel:
    unit: Unit

    async def run(self, world: World) -> None:
        unit = world.unit(self.unit)
        assert unit.claim is not None
        outcome = await world.store.parking.cancel(world.consumer(), unit.claim.fences, unit)
        world.tried(unit, outcome, Model.cancel, "commit")


@dataclass(frozen=True)
class Begin:
    id: UUID
    key: str
    lasts: bool

    async def run(self, world: World) -> None:
        id = world.id(self.id)
        found = await world.store.effects.begin(world.consumer(), id, self.key, lease_s=600 if self.lasts else 0)
        assert (found.state, found.started) == world.model.begin(id, self.key, lasts=self.lasts)
        if found.state is ClaimState.NEW:
            assert found.token > world.tokens.get(id, 0)
            world.tokens[id] = found.token


@dataclass(frozen=True)
class End:
    unit: Unit
    mine: bool

    async def run(self, world: World) -> None:
        unit = world.unit(self.unit)
        assert unit.claim is not None
        token = world.tokens.get(unit.claim.message_id, 1) - (not self.mine)
        outcome = await world.store.effects.commit(token, unit)
        world.tried(unit, outcome, partial(Model.end, mine=self.mine), "commit")


# --- drawing them ----------------------------------------------------------------------------------------------------


def key_of(id: UUID) -> str:
    """A message has one key, wherever it turns up."""
    return KEYS[id.int % 2]


@st.composite
def claims(draw: st.DrawFn) -> Claim:
    id = draw(st.sampled_from(IDS))
    outcome = draw(st.sampled_from([None, ReplyOutcome.OK, ReplyOutcome.REFUSED]))
    fences = draw(st.none() | st.sampled_from([one for one in IDS if one != id]))
    topic = draw(st.sampled_from(["front.inbox", None]))
    return Claim(
        CONSUMER,
        id,
        key_of(id),
        reply=None if outcome is None else reply(id, outcome=outcome, topic=topic),
        state=draw(st.sampled_from([ClaimState.DONE, ClaimState.DONE, ClaimState.DEAD])),
        fences=fences,
        fence=None if fences is None else draw(st.sampled_from(list(Fence))),
    )


@st.composite
def units(draw: st.DrawFn) -> Unit:
    claim = draw(claims()) if draw(st.integers(0, 3)) else None
    versions = st.integers(0, 4)
    appends: list[Append] = []
    for at in draw(st.lists(st.sampled_from(STREAMS), max_size=2, unique=True)):
        if claim is None:  # the same few events come again and again: repeats
            made = draw(st.lists(st.sampled_from(EVENTS), min_size=1, max_size=2, unique_by=lambda one: one.id))
        else:
            made = [event(public=draw(st.booleans())) for _ in range(draw(st.integers(1, 2)))]
        appends.append(Append(at, draw(versions | st.just(ANY)), tuple(made)))
    asserts = draw(st.lists(st.tuples(st.sampled_from(STREAMS), versions), max_size=1))
    outgoing = [message() for _ in range(draw(st.integers(0, 1)))]
    timers = [
        timer(NOON, id) if draw(st.booleans()) else CancelTimer(CONSUMER, id)
        for id in draw(st.lists(st.sampled_from(IDS), max_size=2))
    ]
    letter = None
    if claim is not None and claim.state is ClaimState.DEAD:
        letter = dead_letter(claim.message_id)
    return Unit(claim, tuple(appends), tuple(asserts), tuple(outgoing), tuple(timers), letter)


CALLS = st.tuples(
    st.lists(units(), min_size=1, max_size=5),
    st.lists(
        st.builds(Watermark, st.just("g"), st.sampled_from("tu"), st.integers(0, 1), st.integers(0, 9)), max_size=2
    ),
)
COMMITS = st.builds(Commit, CALLS)
WAITING = st.builds(lambda id, timed: (id, key_of(id), timed), st.sampled_from(IDS), st.booleans())
CLAIMED = units().filter(lambda unit: unit.claim is not None)


@st.composite
def fencing(draw: st.DrawFn) -> Unit:
    unit = draw(CLAIMED)
    assert unit.claim is not None
    step = draw(st.sampled_from([one for one in IDS if one != unit.claim.message_id]))
    claim = replace(unit.claim, fences=step, fence=Fence.CANCEL, state=ClaimState.DONE)
    return replace(unit, claim=claim, dead_letter=None)


PARKING = st.one_of(
    st.builds(Park, WAITING),
    st.builds(Follow, st.lists(WAITING, min_size=1, max_size=3)),
    st.builds(Turn, st.sampled_from(KEYS), units(), st.sampled_from(["alone", "alone", "commit", "rollback"])),
    st.builds(Cancel, fencing()),
    st.builds(lambda id, lasts: Begin(id, key_of(id), lasts), st.sampled_from(IDS), st.booleans()),
    st.builds(End, CLAIMED, st.booleans()),
)
STEPS = st.one_of(
    COMMITS,
    COMMITS,
    COMMITS,
    PARKING,
    PARKING,
    PARKING,
    st.builds(Together, st.lists(CALLS, min_size=2, max_size=3)),
    st.builds(Transaction, st.lists(CALLS, min_size=1, max_size=2), st.sampled_from(["commit", "rollback"])),
    st.builds(ReadLog, st.integers(1, 4), st.booleans()),
    st.builds(
        ReadChosen,
        st.integers(1, 4),
        st.none() | st.lists(st.sampled_from(["order", "stock", "none"]), max_size=2),
        st.none() | st.sampled_from(STREAMS),
    ),
    st.builds(
        ReadStream,
        st.sampled_from(STREAMS),
        st.integers(0, 3),
        st.none() | st.integers(1, 5),
        st.booleans(),
        st.none() | st.integers(1, 3),
    ),
)


class Program(list[Any]):
    """Short of words: a whole one in full is a hundred kilobytes. A falsified example notes its steps."""

    def __repr__(self) -> str:
        return f"<a program of {len(self)} steps>"


PROGRAMS = st.lists(STEPS, min_size=1, max_size=10).map(Program)


def told(step: Any) -> str:
    """A step in short, for whoever reads a falsified example."""
    if isinstance(step, (Turn, Cancel, End)):
        return f"{replace(step, unit=None)}: {_unit(step.unit)}"  # type: ignore[arg-type]
    calls = [step.call] if isinstance(step, Commit) else getattr(step, "calls", None)
    if calls is None:
        return repr(step)
    return f"{type(step).__name__} {getattr(step, 'ends', '')}: " + " | ".join(
        "; ".join(_unit(unit) for unit in units) for units, _ in calls
    )


def _unit(unit: Unit) -> str:
    claim = unit.claim
    claimed = "no claim" if claim is None else f"claim {claim.message_id.int} {claim.key} {claim.state}"
    if claim is not None:
        claimed += f" fences {claim.fences.int} {claim.fence}" if claim.fences else ""
        claimed += f" reply {claim.reply.outcome} on {claim.reply.topic}" if claim.reply else ""
    appends = [f"{one.stream}@{one.expected}+{len(one.envelopes)}" for one in unit.appends]
    asserts = [f"{at}={version}" for at, version in unit.asserts]
    timers = [f"{type(one).__name__} {one.id.int}" for one in unit.timers]
    return " ".join([claimed, *appends, *asserts, *timers, f"sends {len(unit.outgoing)}"])


async def compare(world: World) -> None:
    """Everything stored, with what the model holds."""
    store, model = world.store, world.model
    ids = [world.id(id) for id in IDS]
    found = await store.examine(world.consumer(), [(id, "") for id in ids])
    expected = [model.claims.get(id, (ClaimState.NEW, None, None)) for id in ids]
    assert [(one.state, one.reply and one.reply.outcome, one.reply and one.reply.id) for one in found] == expected
    assert [one.started for one in found] == [id in model.begun for id in ids]
    parked = await store.parking.keys(consumer=world.consumer())
    assert {one.key: one.waiting for one in parked} == {key: len(queue) for key, queue in model.queues.items()}
    for key, queue in model.queues.items():
        waits = await store.parking.queue(world.consumer(), key)
        assert [one.message.envelope.id for one in waits] == queue
    places: dict[tuple[StreamId, int], Envelope] = {}
    for each in await store.load([wanted(world.stream(one)) for one in STREAMS]):
        assert [record.id for record in each.records] == model.streams.get(each.stream, [])
        assert [record.version for record in each.records] == list(range(1, each.version + 1))
        places |= {(each.stream, record.version or 0): record for record in each.records}
    log = await world.log()
    assert [record.id for record in log] == model.log
    positions = [record.position or 0 for record in log]
    assert positions == sorted(set(positions))
    assert await store.watermarks(f"g-{world.number}") == model.watermarks
    letters = await store.dead_letters(after=(world.failed_at() - timedelta(seconds=1), UUID(int=0)), limit=1000)
    assert {one.id for one in letters if one.consumer == world.consumer()} == model.letters
    due = [one for one in await store.timers.due(limit=10_000) if one.consumer == world.consumer()]
    assert sorted(one.id for one in due) == sorted(model.timers)
    for unit, outcome in world.committed:
        if outcome.verdict is Verdict.COMMITTED:
            rows = [
                places[one.stream, outcome.versions[one.stream] - back]
                for one in unit.appends
                for back in range(len(one.envelopes))
            ]
            assert outcome.position == max((row.position or 0 for row in rows), default=0)
            assert outcome.public == max((row.position or 0 for row in rows if row.topic), default=0)
    if due:
        await store.commit([Unit(timers=tuple(CancelTimer(one.consumer, one.id) for one in due))])


@settings(
    max_examples=60,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a database's pace is not for shrinking: steps are noted
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(program=PROGRAMS)
async def test_any_program_is_answered_and_stored_as_the_model_says(store: Any, program: Program) -> None:
    world = World(store, Model(), next(EXAMPLES), await store.head())
    for step in program:
        note(told(step))
        await step.run(world)
    await compare(world)


async def test_what_a_program_left_is_there_when_another_process_looks(backend: Backend) -> None:
    """The same comparison, by a store that was opened afterwards."""
    async with backend.open() as first:
        world = World(first, Model(), next(EXAMPLES), await first.head())
        for id in IDS[:3]:
            unit = Unit(
                Claim(CONSUMER, id, "k", reply=reply(id)),
                (Append(STREAMS[0], ANY, (event(), event(public=False))),),
                timers=(timer(NOON, id),),
                dead_letter=dead_letter(id),
            )
            await Commit(([unit], [Watermark("g", "t", 0, 7)])).run(world)
    async with backend.open() as second:
        world.store = second
        await compare(world)
