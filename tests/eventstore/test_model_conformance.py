"""Random programs of units against a model of a dozen rules: what a store answers and holds, the model does too."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st

from bus.envelope import Envelope, ReplyOutcome, StreamId
from eventstore.port import ANY, Append, Claim, ClaimState, Fence, Store, Unit, Verdict
from eventstore.sqlite import InlineExecutor, SqliteStore
from tests.eventstore.stores import CONSUMER, SERVICE, event, message, reply, stream, wanted, whole_log

IDS = [UUID(int=n) for n in range(1, 6)]
STREAMS = [stream(name) for name in "abc"]
KEYS = ["k", "l"]
OUTCOMES = [None, ReplyOutcome.OK, ReplyOutcome.REFUSED]


@dataclass
class Model:
    """The rules of `port.py`, as plainly as they can be said."""

    streams: dict[StreamId, list[UUID]] = field(default_factory=lambda: {one: [] for one in STREAMS})
    claims: dict[UUID, tuple[ClaimState, ReplyOutcome | None]] = field(default_factory=dict)
    log: list[UUID] = field(default_factory=list)

    def commit(self, units: Sequence[Unit]) -> list[Verdict]:
        losers: list[Unit] = []
        verdicts: list[Verdict] = []
        for unit in units:
            verdict = self.judge(unit, losers)
            verdicts.append(verdict)
            if verdict is Verdict.CONFLICT:
                losers.append(unit)
        return verdicts

    def judge(self, unit: Unit, losers: Sequence[Unit]) -> Verdict:
        claim = unit.claim
        if claim is not None and claim.message_id in self.claims:
            state, _ = self.claims[claim.message_id]
            return Verdict.CANCELLED if state is ClaimState.CANCELLED else Verdict.DUPLICATE
        if self.repeats(unit):
            return Verdict.COMMITTED
        for lost in losers:
            if touched(lost) & touched(unit) or (claim and lost.claim and claim.key == lost.claim.key):
                return Verdict.CONFLICT
        if claim is not None and claim.fences is not None and not self.fence_holds(claim):
            return Verdict.CONFLICT
        wanted = [(append.stream, append.expected) for append in unit.appends] + list(unit.asserts)
        if any(expected is not ANY and expected != len(self.streams[at]) for at, expected in wanted):
            return Verdict.CONFLICT
        self.write(unit)
        return Verdict.COMMITTED

    def repeats(self, unit: Unit) -> bool:
        return (
            unit.claim is None
            and bool(unit.appends)
            and all(
                isinstance(append.expected, int)
                and self.streams[append.stream][append.expected : append.expected + len(append.envelopes)]
                == [envelope.id for envelope in append.envelopes]
                for append in unit.appends
            )
        )

    def fence_holds(self, claim: Claim) -> bool:
        assert claim.fences is not None
        state, outcome = self.claims.get(claim.fences, (ClaimState.NEW, None))
        effect = state is ClaimState.DONE and outcome is not ReplyOutcome.REFUSED
        return effect if claim.fence is Fence.EXPECT_DONE else not effect

    def write(self, unit: Unit) -> None:
        for append in unit.appends:
            ids = [envelope.id for envelope in append.envelopes]
            self.streams[append.stream] += ids
            self.log += ids
        self.log += [envelope.id for envelope in unit.outgoing]
        if (claim := unit.claim) is not None:
            if claim.reply is not None:
                self.log.append(claim.reply.id)
            self.claims[claim.message_id] = (claim.state, claim.reply.outcome if claim.reply else None)
            if claim.fences is not None and claim.fence is Fence.CANCEL:
                known, _ = self.claims.get(claim.fences, (ClaimState.NEW, None))
                if known in (ClaimState.NEW, ClaimState.DEAD):
                    self.claims[claim.fences] = (ClaimState.CANCELLED, None)


def touched(unit: Unit) -> set[StreamId]:
    return {append.stream for append in unit.appends} | {at for at, _ in unit.asserts}


EVENTS = [event(id=UUID(int=100 + n)) for n in range(4)]


@st.composite
def units(draw: st.DrawFn) -> Unit:
    claim = None
    if draw(st.integers(0, 3)):
        id = draw(st.sampled_from(IDS))
        outcome = draw(st.sampled_from(OUTCOMES))
        fences = draw(st.none() | st.sampled_from([one for one in IDS if one != id]))
        claim = Claim(
            CONSUMER,
            id,
            draw(st.sampled_from(KEYS)),
            reply=None if outcome is None else reply(id, outcome=outcome),
            state=draw(st.sampled_from([ClaimState.DONE, ClaimState.DONE, ClaimState.DEAD])),
            fences=fences,
            fence=None if fences is None else draw(st.sampled_from(list(Fence))),
        )
    versions = st.integers(0, 4)
    # Without a claim the same few events come again and again: repeats.
    events = (
        st.lists(st.sampled_from(EVENTS), min_size=1, max_size=2, unique_by=lambda one: one.id)
        if claim is None
        else st.just(None)
    )
    appends: list[Append] = []
    for at in draw(st.lists(st.sampled_from(STREAMS), max_size=2, unique=True)):
        envelopes: list[Envelope] = draw(events) or [event() for _ in range(draw(st.integers(1, 2)))]
        appends.append(Append(at, draw(versions | st.just(ANY)), tuple(envelopes)))
    asserts = draw(st.lists(st.tuples(st.sampled_from(STREAMS), versions), max_size=1))
    outgoing = [message() for _ in range(draw(st.integers(0, 1)))]
    return Unit(claim, tuple(appends), tuple(asserts), tuple(outgoing))


PROGRAMS = st.lists(st.lists(units(), min_size=1, max_size=6), min_size=1, max_size=6)


async def follow(store: Store, program: Sequence[Sequence[Unit]]) -> None:
    model = Model()
    for call in program:
        outcomes = await store.commit(call)
        assert [outcome.verdict for outcome in outcomes] == model.commit(call)
    standings = await store.examine(CONSUMER, [(id, "") for id in IDS])
    expected = [model.claims.get(id, (ClaimState.NEW, None)) for id in IDS]
    assert [(one.state, one.reply.outcome if one.reply else None) for one in standings] == expected
    for slice in await store.load([wanted(one) for one in STREAMS]):
        assert [record.id for record in slice.records] == model.streams[slice.stream]
        assert [record.version for record in slice.records] == list(range(1, slice.version + 1))
    log = await whole_log(store)
    assert [record.id for record in log] == model.log
    assert [record.position or 0 for record in log] == sorted({record.position or 0 for record in log})


@settings(max_examples=50, deadline=None)
@given(PROGRAMS)
async def test_any_program_of_units_is_answered_and_stored_as_the_model_says(program: list[list[Unit]]) -> None:
    """On SQLite alone: a fresh PostgreSQL database per example would take minutes."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "store.sqlite"
        await SqliteStore.migrate(path, service=SERVICE)
        async with SqliteStore.open(path, service=SERVICE, executor=InlineExecutor()) as store:
            await follow(store, program)
