"""The rules of `port.py` as plainly as they can be said: what a store holds, and what it answers to a call."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from uuid import UUID

from bus.envelope import ReplyOutcome, StreamId
from eventstore.port import ANY, CancelTimer, Claim, ClaimState, ExpectedVersion, Fence, Unit, Verdict, Watermark


@dataclass(frozen=True)
class Answer:
    """What can be said of an outcome without knowing positions."""

    verdict: Verdict
    versions: tuple[tuple[StreamId, int], ...] = ()
    reply: UUID | None = None
    misfit: tuple[StreamId, ExpectedVersion, int] | None = None


@dataclass
class Model:
    streams: dict[StreamId, list[UUID]] = field(default_factory=dict)
    claims: dict[UUID, tuple[ClaimState, ReplyOutcome | None, UUID | None]] = field(default_factory=dict)
    log: list[UUID] = field(default_factory=list)
    timers: set[UUID] = field(default_factory=set)
    letters: set[UUID] = field(default_factory=set)
    watermarks: dict[tuple[str, int], int] = field(default_factory=dict)
    queues: dict[str, list[UUID]] = field(default_factory=dict[str, list[UUID]])
    """Of parked keys; an empty one is none."""
    begun: dict[UUID, bool] = field(default_factory=dict[UUID, bool])
    """Effects, and whether somebody is at it."""
    passing: frozenset[str] = frozenset()

    def copy(self) -> Model:
        return deepcopy(self)

    def commit(self, units: Sequence[Unit], watermarks: Sequence[Watermark] = ()) -> list[Answer]:
        losers: list[Unit] = []
        answers: list[Answer] = []
        for unit in units:
            answers.append(self.judge(unit, losers))
            if answers[-1].verdict in (Verdict.CONFLICT, Verdict.PARKED, Verdict.STARTED):
                losers.append(unit)
        for mark in watermarks:
            where = (mark.topic, mark.partition)
            self.watermarks[where] = max(mark.offset, self.watermarks.get(where, 0))
        return answers

    def judge(self, unit: Unit, losers: Sequence[Unit]) -> Answer:
        claim = unit.claim
        if claim is not None and claim.message_id in self.claims:
            state, _, reply = self.claims[claim.message_id]
            if state in (ClaimState.CANCELLED, ClaimState.PARKED, ClaimState.STARTED):
                return Answer(Verdict(state.value))
            return Answer(Verdict.DUPLICATE, reply=reply)
        if claim is not None and claim.key in self.queues and claim.key not in self.passing:
            return Answer(Verdict.PARKED)
        if self.repeats(unit):
            versions = [(each.stream, int(each.expected) + len(each.envelopes)) for each in unit.appends]
            return Answer(Verdict.COMMITTED, tuple(versions))
        for lost in losers:
            if touched(lost) & touched(unit) or (claim and lost.claim and claim.key == lost.claim.key):
                return Answer(Verdict.CONFLICT)
        if claim is not None and claim.fences is not None and not self.fence_holds(claim):
            return Answer(Verdict.CONFLICT)
        wanted = [(append.stream, append.expected) for append in unit.appends] + list(unit.asserts)
        for at, expected in wanted:
            if expected is not ANY and expected != (actual := self.version(at)):
                return Answer(Verdict.CONFLICT, misfit=(at, expected, actual))
        return self.write(unit)

    def version(self, of: StreamId) -> int:
        return len(self.streams.get(of, ()))

    def repeats(self, unit: Unit) -> bool:
        return (
            unit.claim is None
            and bool(unit.appends)
            and all(
                isinstance(append.expected, int)
                and self.streams.get(append.stream, [])[append.expected : append.expected + len(append.envelopes)]
                == [envelope.id for envelope in append.envelopes]
                for append in unit.appends
            )
        )

    def fence_holds(self, claim: Claim) -> bool:
        assert claim.fences is not None
        state, outcome, _ = self.claims.get(claim.fences, (ClaimState.NEW, None, None))
        effect = state is ClaimState.DONE and outcome is not ReplyOutcome.REFUSED
        waits = state in (ClaimState.PARKED, ClaimState.STARTED)
        return effect if claim.fence is Fence.EXPECT_DONE else not effect and not waits

    def write(self, unit: Unit) -> Answer:
        versions: list[tuple[StreamId, int]] = []
        for append in unit.appends:
            ids = [envelope.id for envelope in append.envelopes]
            self.streams.setdefault(append.stream, []).extend(ids)
            self.log += ids
            versions.append((append.stream, self.version(append.stream)))
        self.log += [envelope.id for envelope in unit.outgoing]
        if (claim := unit.claim) is not None:
            self.take(claim)
        for timer in unit.timers:
            self.timers.discard(timer.id) if isinstance(timer, CancelTimer) else self.timers.add(timer.id)
        if unit.dead_letter is not None:
            self.letters.add(unit.dead_letter.id)
        return Answer(Verdict.COMMITTED, tuple(versions))

    def take(self, claim: Claim) -> None:
        reply = claim.reply
        if reply is not None and reply.topic is not None:
            self.log.append(reply.id)
        self.claims[claim.message_id] = (claim.state, reply and reply.outcome, reply and reply.id)
        if claim.fences is not None and claim.fence is Fence.CANCEL:
            known, _, _ = self.claims.get(claim.fences, (ClaimState.NEW, None, None))
            if known in (ClaimState.NEW, ClaimState.DEAD):
                self.claims[claim.fences] = (ClaimState.CANCELLED, None, None)
            if known is ClaimState.DEAD:  # nobody shall redrive it
                self.letters.discard(claim.fences)

    # --- parked keys and effects -------------------------------------------------------------------------------------

    def state(self, id: UUID) -> ClaimState:
        return self.claims.get(id, (ClaimState.NEW, None, None))[0]

    def standing(self, id: UUID) -> tuple[ClaimState, bool]:
        return self.state(id), id in self.begun

    def park(self, id: UUID, key: str, *, timed: bool) -> tuple[ClaimState, bool]:
        if self.state(id) in (ClaimState.NEW, ClaimState.STARTED):
            self.join(id, key, timed=timed)
            if id in self.begun:
                self.begun[id] = False
        return self.standing(id)

    def follow(self, id: UUID, key: str, *, timed: bool) -> tuple[ClaimState, bool]:
        left = self.state(id) is ClaimState.STARTED and not self.begun[id]
        if key in self.queues and (self.state(id) is ClaimState.NEW or left):
            self.join(id, key, timed=timed)
        return self.standing(id)

    def join(self, id: UUID, key: str, *, timed: bool) -> None:
        self.claims[id] = (ClaimState.PARKED, None, None)
        self.queues.setdefault(key, []).append(id)
        if timed:
            self.timers.discard(id)

    def leave(self, id: UUID) -> set[str]:
        """The key of the queue that it left."""
        found = {key for key, queue in self.queues.items() if id in queue}
        for key in found:
            self.queues[key].remove(id)
            if not self.queues[key]:
                del self.queues[key]
            del self.claims[id]
        return found

    def write_passing(self, unit: Unit, keys: set[str]) -> Answer:
        """As the only unit of a call, past the queues of these keys."""
        self.passing = frozenset(keys)
        (answer,) = self.commit([unit])
        self.passing = frozenset()
        claim = unit.claim
        if answer.verdict is Verdict.COMMITTED and claim is not None and claim.state is ClaimState.DONE:
            self.begun.pop(claim.message_id, None)
        return answer

    def turn(self, unit: Unit) -> Answer:
        """Of the head that the unit claims."""
        assert unit.claim is not None
        return self.write_passing(unit, self.leave(unit.claim.message_id))

    def cancel(self, unit: Unit) -> Answer:
        claim = unit.claim
        assert claim is not None
        assert claim.fences is not None
        if self.state(claim.message_id) in (ClaimState.NEW, ClaimState.PARKED):
            if self.state(claim.fences) is not ClaimState.PARKED:
                return Answer(Verdict.CONFLICT)
            return self.write_passing(unit, {claim.key, *self.leave(claim.fences), *self.leave(claim.message_id)})
        return self.write_passing(unit, set())

    def begin(self, id: UUID, key: str, *, lasts: bool) -> tuple[ClaimState, bool]:
        state, begun = self.standing(id)
        if state is ClaimState.STARTED and self.begun[id]:
            return state, begun
        if state in (ClaimState.NEW, ClaimState.STARTED):
            if key in self.queues:
                return ClaimState.KEY_PARKED, begun
            self.claims[id] = (ClaimState.STARTED, None, None)
            self.begun[id] = lasts
            return ClaimState.NEW, begun
        return state, begun

    def end(self, unit: Unit, *, mine: bool) -> Answer:
        """Of the effect that the unit claims."""
        assert unit.claim is not None
        state = self.state(unit.claim.message_id)
        if state is ClaimState.NEW or (state is ClaimState.STARTED and not mine):
            return Answer(Verdict.STARTED)
        if state is ClaimState.STARTED:
            del self.claims[unit.claim.message_id]
        return self.write_passing(unit, {unit.claim.key})


def touched(unit: Unit) -> set[StreamId]:
    return {append.stream for append in unit.appends} | {at for at, _ in unit.asserts}
