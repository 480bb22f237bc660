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

    def copy(self) -> Model:
        return deepcopy(self)

    def commit(self, units: Sequence[Unit], watermarks: Sequence[Watermark] = ()) -> list[Answer]:
        losers: list[Unit] = []
        answers: list[Answer] = []
        for unit in units:
            answers.append(self.judge(unit, losers))
            if answers[-1].verdict is Verdict.CONFLICT:
                losers.append(unit)
        for mark in watermarks:
            where = (mark.topic, mark.partition)
            self.watermarks[where] = max(mark.offset, self.watermarks.get(where, 0))
        return answers

    def judge(self, unit: Unit, losers: Sequence[Unit]) -> Answer:
        claim = unit.claim
        if claim is not None and claim.message_id in self.claims:
            state, _, reply = self.claims[claim.message_id]
            return (
                Answer(Verdict.CANCELLED) if state is ClaimState.CANCELLED else Answer(Verdict.DUPLICATE, reply=reply)
            )
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
        return effect if claim.fence is Fence.EXPECT_DONE else not effect

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


def touched(unit: Unit) -> set[StreamId]:
    return {append.stream for append in unit.appends} | {at for at, _ in unit.asserts}
