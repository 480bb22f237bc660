"""The commit of many units in one transaction: read what they depend on, judge one after the other, write once.

The rules, the same for every adapter (`tests/eventstore/test_store_conformance.py` has each as a test). Of each unit,
in this order:

1. Its claim is known, stored or from an earlier unit of the call: done or dead answers DUPLICATE with the stored
   reply, cancelled answers CANCELLED. Such a unit drags nobody along: whether what follows it still fits is a matter of
   versions. Parked answers PARKED, started STARTED, and it is a loser.
2. Its claim is new and its key is parked: PARKED, a loser.
3. It follows a loser: an earlier unit of the call was one and has the same claim's key (within its consumer) or touches
   a stream (appends or asserts) that this one touches. It answers CONFLICT, and is a loser itself.
4. Its fence does not hold: CONFLICT, a loser.
5. A version, first of `appends`, then of `asserts`, is not the expected one: CONFLICT, a loser. Versions are those
   before the unit, after all earlier units that were written.
6. Otherwise it is written.

Where 3 or 5 would lose a unit without a claim whose events are all stored already (same ids, at the explicit expected
versions), it is COMMITTED with its first result and writes nothing.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from uuid import UUID

from bus.envelope import Envelope, Position, ReplyOutcome, StreamId, Token, Version
from eventstore import rows
from eventstore.errors import BadUnit
from eventstore.port import (
    ANY,
    Append,
    CancelTimer,
    Claim,
    ClaimState,
    DeadLetter,
    ExpectedVersion,
    Fence,
    Outcome,
    Timer,
    Unit,
    Verdict,
    Watermark,
)
from eventstore.sqlite.session import Session, chunks

ClaimKey = tuple[str, UUID]
ParkedKey = tuple[str, str]
"""Consumer and key."""

_CLAIM = "INSERT INTO foldbus_claims VALUES (?,?,?,?,?,?,?,?)"
_CANCEL_CLAIM = (
    "UPDATE foldbus_claims SET state='cancelled', outcome=NULL, reply=NULL, reply_data=NULL "
    "WHERE consumer=? AND message_id=?"
)
_STREAM = "INSERT INTO foldbus_streams (version, number, category, id) VALUES (?,?,?,?)"
_STREAM_VERSION = "UPDATE foldbus_streams SET version=? WHERE number=?"
_EVENT = "INSERT INTO foldbus_events VALUES (?,?,?,?,?,?,?,?,?,?)"
_OUTGOING = "INSERT INTO foldbus_outgoing VALUES (?,?,?,?,?,?,?,?)"
_TIMER = (
    "INSERT INTO foldbus_timers (consumer, id, key, due_at, shown_at, envelope, data) VALUES (?,?,?,?,?,?,?) "
    "ON CONFLICT (consumer, id) DO NOTHING"
)
_CANCEL_TIMER = "DELETE FROM foldbus_timers WHERE consumer=? AND id=?"
_DEAD_LETTER = "INSERT INTO foldbus_dead_letters VALUES (?,?,?,?,?,?) ON CONFLICT (consumer, id) DO NOTHING"
_FORGET_DEAD_LETTER = "DELETE FROM foldbus_dead_letters WHERE consumer=? AND id=?"
_WATERMARK = (
    "INSERT INTO foldbus_watermarks VALUES (?,?,?,?) ON CONFLICT (consumer_group, topic, partition) "
    "DO UPDATE SET next_offset=excluded.next_offset WHERE excluded.next_offset > next_offset"
)


@dataclass(slots=True)
class _Taken:
    """A claim as it stands, with what a duplicate is answered. `stored`: a row of it exists."""

    state: ClaimState
    outcome: ReplyOutcome | None
    document: tuple[str, bytes] | None
    stored: bool

    @property
    def with_effect(self) -> bool:
        return self.state is ClaimState.DONE and self.outcome in (None, ReplyOutcome.OK)

    def answer(self) -> Envelope | None:
        return None if self.document is None else rows.from_document(*self.document)


@dataclass(slots=True)
class _Stream:
    """`number` 0: it has no row yet. `before` is its version when the transaction began."""

    number: int
    version: Version
    before: Version


@dataclass(frozen=True, slots=True)
class Written:
    outcomes: Sequence[Outcome]
    head: Position


@dataclass(frozen=True, slots=True)
class Call:
    """One caller's commit."""

    units: Sequence[Unit]
    watermarks: Sequence[Watermark]


def commit_calls(
    session: Session,
    calls: Sequence[Call],
    *,
    service: str,
    epoch: int,
    now: int,
    passing: Collection[ParkedKey] = (),
) -> list[Written]:
    """Each call as if it came alone, one after the other, for the price of one. Within a transaction that holds the
    file's write lock. Units are checked; `now` is in microseconds; keys that are `passing` count as not parked. An
    exception leaves the transaction to be undone."""
    units = calls[0].units if len(calls) == 1 else [unit for call in calls for unit in call.units]
    commit = _Commit(session, units, service=service, epoch=epoch, now=now, passing=passing)
    outcomes: list[list[Outcome]] = []
    for call in calls:
        commit.forget_losers()
        outcomes.append([commit.judge(unit) for unit in call.units])
    try:
        commit.write([mark for call in calls for mark in call.watermarks])
    except (OverflowError, sqlite3.ProgrammingError, sqlite3.InterfaceError) as error:  # it cannot be bound
        raise BadUnit(f"the database cannot hold a value of these units: {error}; nothing was written") from error
    return [Written(judged, commit.head) for judged in outcomes]


class _Commit:
    def __init__(
        self,
        session: Session,
        units: Sequence[Unit],
        *,
        service: str,
        epoch: int,
        now: int,
        passing: Collection[ParkedKey],
    ) -> None:
        self._session = session
        self._service, self._epoch, self._now = service, epoch, now
        self._claims = _known_claims(session, units)
        claims = [unit.claim for unit in units if unit.claim is not None]
        self._parked = parked_keys(session, [(claim.consumer, claim.key) for claim in claims]).difference(passing)
        self._streams = _known_streams(session, units)
        ((self._head_before,),) = session.rows("SELECT head FROM foldbus_log")
        self.head: Position = self._head_before
        self._lost_keys: set[tuple[str, str]] = set()
        self._lost_streams: set[StreamId] = set()
        # What is to be written, in order.
        self._new_claims: dict[ClaimKey, tuple[Any, ...]] = {}
        self._cancelled: list[tuple[str, bytes]] = []
        self._events: list[tuple[Any, ...]] = []
        self._appended: dict[tuple[int, Version], tuple[UUID, Position, bool]] = {}
        self._outgoing: list[tuple[Any, ...]] = []
        self._timers: list[tuple[str, tuple[Any, ...]]] = []
        self._dead_letters: list[tuple[str, tuple[Any, ...]]] = []

    # --- judging -----------------------------------------------------------------------------------------------------

    def forget_losers(self) -> None:
        """Another call begins: a loser drags along nobody but followers in its own."""
        self._lost_keys.clear()
        self._lost_streams.clear()

    def judge(self, unit: Unit) -> Outcome:
        claim = unit.claim
        if claim is not None:
            taken = self._claims.get((claim.consumer, claim.message_id))
            if taken is not None:
                return self._lose(unit, _WAITS[taken.state]) if taken.state in _WAITS else _answer(taken)
            if self._parked and (claim.consumer, claim.key) in self._parked:
                return self._lose(unit, Verdict.PARKED)
        if (self._lost_keys or self._lost_streams) and self._follows_a_loser(unit):
            return self._repeated(unit) or self._lose(unit)
        if claim is not None and claim.fences is not None and not self._fence_holds(claim, claim.fences):
            return self._lose(unit)
        for append in unit.appends:
            actual = self._streams[append.stream].version
            # An archived stream's version is negative: none fits it, ANY neither.
            if append.expected != actual and (append.expected is not ANY or actual < 0):
                return self._repeated(unit) or self._lose(
                    unit, stream=append.stream, expected=append.expected, actual=actual
                )
        for stream, expected in unit.asserts:
            actual = self._streams[stream].version
            if expected != actual:
                return self._repeated(unit) or self._lose(unit, stream=stream, expected=expected, actual=actual)
        return self._take(unit)

    def _follows_a_loser(self, unit: Unit) -> bool:
        claim = unit.claim
        if claim is not None and (claim.consumer, claim.key) in self._lost_keys:
            return True
        return not self._lost_streams.isdisjoint(_touched(unit))

    def _lose(
        self,
        unit: Unit,
        verdict: Verdict = Verdict.CONFLICT,
        *,
        stream: StreamId | None = None,
        expected: ExpectedVersion | None = None,
        actual: Version | None = None,
    ) -> Outcome:
        if unit.claim is not None:
            self._lost_keys.add((unit.claim.consumer, unit.claim.key))
        self._lost_streams.update(_touched(unit))
        return Outcome(verdict, stream=stream, expected=expected, actual=actual)

    def _fence_holds(self, claim: Claim, step: UUID) -> bool:
        taken = self._claims.get((claim.consumer, step))
        if claim.fence is Fence.EXPECT_DONE:
            return taken is not None and taken.with_effect
        if taken is None or taken.state in (ClaimState.CANCELLED, ClaimState.DEAD):
            return True
        return taken.state is ClaimState.DONE and not taken.with_effect

    def _repeated(self, unit: Unit) -> Outcome | None:
        """The first result of a unit without a claim whose very events are stored where it wants them."""
        if unit.claim is not None or not unit.appends:
            return None
        position = public = 0
        versions: dict[StreamId, Version] = {}
        for append in unit.appends:
            if append.expected is ANY:
                return None
            assert isinstance(append.expected, int)
            found = self._stored(append.stream, append.expected, len(append.envelopes))
            if [id for id, _, _ in found] != [envelope.id for envelope in append.envelopes]:
                return None
            for _, at, is_public in found:
                position = max(position, at)
                public = max(public, at) if is_public else public
            versions[append.stream] = append.expected + len(append.envelopes)
        return Outcome(Verdict.COMMITTED, position=position, public=public, versions=versions)

    def _stored(self, stream: StreamId, after: Version, count: int) -> list[tuple[UUID, Position, bool]]:
        known = self._streams[stream]
        if after + count > known.version:
            return []
        stored = [
            (UUID(bytes=id), position, bool(public))
            for id, position, public in self._session.rows(
                "SELECT id, position, topic IS NOT NULL FROM foldbus_events "
                "WHERE stream=? AND version>? AND version<=? ORDER BY version",
                (known.number, after, after + count),
            )
        ]
        fresh = range(max(after, known.before) + 1, after + count + 1)
        return stored + [self._appended[known.number, version] for version in fresh]

    # --- taking ------------------------------------------------------------------------------------------------------

    def _take(self, unit: Unit) -> Outcome:
        position = public = 0
        versions: dict[StreamId, Version] = {}
        for append in unit.appends:
            position, last_public = self._append(append)
            public = last_public or public
            versions[append.stream] = self._streams[append.stream].version
        for envelope in unit.outgoing:
            self._send(envelope)
        if unit.claim is not None:
            self._take_claim(unit.claim, position, public)
        for timer in unit.timers:
            self._timers.append(_timer_row(timer))
        if unit.dead_letter is not None:
            self._dead_letters.append((_DEAD_LETTER, _dead_letter_row(unit.dead_letter)))
        return Outcome(Verdict.COMMITTED, position=position, public=public, versions=versions)

    def _append(self, append: Append) -> tuple[Position, Position]:
        """Position of the last event, and of the last public one (0: none)."""
        stream = self._streams[append.stream]
        if not stream.number:
            stream.number = self.head + 1
        number, version, head, public = stream.number, stream.version, self.head, 0
        for envelope in append.envelopes:
            version += 1
            head += 1
            if envelope.topic is not None:
                public = head
            self._appended[number, version] = (envelope.id, head, envelope.topic is not None)
            self._events.append(
                (
                    head,
                    number,
                    version,
                    envelope.id.bytes,
                    envelope.type,
                    envelope.key,
                    envelope.topic,
                    envelope.data,
                    rows.micros(envelope.time),
                    rows.meta(envelope, epoch=self._epoch_of(envelope)),
                )
            )
        stream.version, self.head = version, head
        return head, public

    def _send(self, envelope: Envelope, token: Token | None = None) -> None:
        self.head += 1
        self._outgoing.append(
            (
                self.head,
                envelope.id.bytes,
                envelope.type,
                envelope.key,
                envelope.topic,
                envelope.data,
                rows.micros(envelope.time),
                rows.meta(envelope, epoch=self._epoch_of(envelope), token=token),
            )
        )

    def _take_claim(self, claim: Claim, position: Position, public: Position) -> None:
        reply, outcome, document = claim.reply, None, None
        if reply is not None:
            token = Token(self._service, self._epoch, claim.key, position, public)
            outcome = reply.outcome
            document = (rows.document(reply, epoch=self._epoch_of(reply), token=token), reply.data)
            if reply.topic is not None:
                self._send(reply, token)
        id = (claim.consumer, claim.message_id)
        self._claims[id] = _Taken(claim.state, outcome, document, stored=False)
        self._new_claims[id] = self._claim_row(*id, claim.key, claim.state, outcome, document)
        if claim.fence is Fence.CANCEL and claim.fences is not None:
            self._cancel(claim.consumer, claim.fences, claim.key)

    def _cancel(self, consumer: str, step: UUID, key: str) -> None:
        taken = self._claims.get((consumer, step))
        if taken is not None and taken.state is not ClaimState.DEAD:
            return  # refused: it stays as it is; cancelled already
        if taken is not None and taken.stored:
            self._cancelled.append((consumer, step.bytes))
        else:
            self._new_claims[consumer, step] = self._claim_row(consumer, step, key, ClaimState.CANCELLED, None, None)
        self._claims[consumer, step] = _Taken(ClaimState.CANCELLED, None, None, stored=False)
        if taken is not None:  # nobody shall redrive it any more
            self._dead_letters.append((_FORGET_DEAD_LETTER, (consumer, step.bytes)))

    def _claim_row(
        self,
        consumer: str,
        id: UUID,
        key: str,
        state: ClaimState,
        outcome: ReplyOutcome | None,
        document: tuple[str, bytes] | None,
    ) -> tuple[Any, ...]:
        reply, data = document or (None, None)
        return (consumer, id.bytes, key, state, outcome, reply, data, self._now)

    def _epoch_of(self, envelope: Envelope) -> int:
        return rows.log_epoch(envelope, service=self._service, epoch=self._epoch)

    # --- writing -----------------------------------------------------------------------------------------------------

    def write(self, watermarks: Sequence[Watermark]) -> None:
        """Everything that was taken, a statement per table."""
        run = self._session.run
        if self._new_claims:
            run(_CLAIM, list(self._new_claims.values()))
        if self._cancelled:
            run(_CANCEL_CLAIM, self._cancelled)
        if self._events:
            new: list[tuple[Any, ...]] = []
            grown: list[tuple[Any, ...]] = []
            for stream, known in self._streams.items():
                if known.version > known.before:
                    if known.before:
                        grown.append((known.version, known.number))
                    else:
                        new.append((known.version, known.number, stream.category, stream.id))
            if new:
                run(_STREAM, new)
            if grown:
                run(_STREAM_VERSION, grown)
            run(_EVENT, self._events)
        if self._outgoing:
            run(_OUTGOING, self._outgoing)
        for ordered in (self._timers, self._dead_letters):  # one may insert what the next one deletes
            for sql, group in groupby(ordered, key=lambda step: step[0]):
                run(sql, [row for _, row in group])
        if watermarks:
            run(_WATERMARK, [(mark.group, mark.topic, mark.partition, mark.offset) for mark in watermarks])
        if self.head != self._head_before:
            run("UPDATE foldbus_log SET head=?", [(self.head,)])


_WAITS = {ClaimState.PARKED: Verdict.PARKED, ClaimState.STARTED: Verdict.STARTED}


def _answer(taken: _Taken) -> Outcome:
    if taken.state is ClaimState.CANCELLED:
        return Outcome(Verdict.CANCELLED)
    return Outcome(Verdict.DUPLICATE, reply=taken.answer())


def _touched(unit: Unit) -> Iterable[StreamId]:
    yield from (append.stream for append in unit.appends)
    yield from (stream for stream, _ in unit.asserts)


def _known_claims(session: Session, units: Sequence[Unit]) -> dict[ClaimKey, _Taken]:
    asked: dict[str, set[bytes]] = {}
    for unit in units:
        if (claim := unit.claim) is not None:
            ids = asked.setdefault(claim.consumer, set())
            ids.add(claim.message_id.bytes)
            if claim.fences is not None:
                ids.add(claim.fences.bytes)
    return {
        (consumer, id): _Taken(state, outcome, None if reply is None else (reply, data or b""), stored=True)
        for consumer, ids in asked.items()
        for id, state, outcome, reply, data in claim_rows(session, consumer, sorted(ids))
    }


def claim_rows(
    session: Session, consumer: str, ids: Sequence[bytes]
) -> Iterable[tuple[UUID, ClaimState, ReplyOutcome | None, str | None, bytes | None]]:
    """Those of `ids` that are known."""
    for marks, part in chunks(ids):
        for id, state, outcome, reply, data in session.rows(
            "SELECT message_id, state, outcome, reply, reply_data FROM foldbus_claims "
            f"WHERE consumer=? AND message_id IN ({marks})",
            (consumer, *part),
        ):
            yield UUID(bytes=id), ClaimState(state), None if outcome is None else ReplyOutcome(outcome), reply, data


def parked_keys(session: Session, keys: Iterable[ParkedKey]) -> set[ParkedKey]:
    """Those of `keys` that are parked."""
    ((some,),) = session.rows("SELECT EXISTS (SELECT 1 FROM foldbus_parked_keys)")
    asked: dict[str, set[str]] = {}
    for consumer, key in keys if some else ():
        asked.setdefault(consumer, set()).add(key)
    return {
        (consumer, key)
        for consumer, names in asked.items()
        for marks, part in chunks(sorted(names))
        for (key,) in session.rows(
            f"SELECT key FROM foldbus_parked_keys WHERE consumer=? AND key IN ({marks})", (consumer, *part)
        )
    }


def _known_streams(session: Session, units: Sequence[Unit]) -> dict[StreamId, _Stream]:
    streams: dict[StreamId, _Stream] = {}
    for unit in units:
        for append in unit.appends:
            if append.stream not in streams:
                streams[append.stream] = _Stream(0, 0, 0)
        for stream, _ in unit.asserts:
            if stream not in streams:
                streams[stream] = _Stream(0, 0, 0)
    for stream, number, version in stream_rows(session, streams):
        streams[stream] = _Stream(number, version, version)
    return streams


def stream_rows(session: Session, streams: Iterable[StreamId]) -> Iterable[tuple[StreamId, int, Version]]:
    """Number and version of those of `streams` that exist."""
    asked: dict[str, list[str]] = {}
    for stream in streams:
        asked.setdefault(stream.category, []).append(stream.id)
    for category, ids in asked.items():
        for marks, part in chunks(sorted(ids)):
            for id, number, version in session.rows(
                f"SELECT id, number, version FROM foldbus_streams WHERE category=? AND id IN ({marks})",
                (category, *part),
            ):
                yield StreamId(category, id), number, version


def _timer_row(timer: Timer | CancelTimer) -> tuple[str, tuple[Any, ...]]:
    if isinstance(timer, CancelTimer):
        return _CANCEL_TIMER, (timer.consumer, timer.id.bytes)
    due_at = rows.micros(timer.due_at)
    envelope = timer.envelope
    document = rows.document(envelope, epoch=envelope.epoch)
    return _TIMER, (timer.consumer, timer.id.bytes, timer.key, due_at, due_at, document, envelope.data)


def _dead_letter_row(letter: DeadLetter) -> tuple[Any, ...]:
    return (
        letter.consumer,
        letter.id.bytes,
        rows.micros(letter.failure.failed_at),
        letter.key,
        letter.value,
        rows.dead_letter_document(letter),
    )
