"""Units as the arrays of `commit_units` (migrations/sql/0001_commit.sql explains each), and its answer as outcomes.

Everything that can be decided from the units alone is decided here: what is distinct, what is sorted how, whether
expected versions chain within the call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

import asyncpg

from bus.envelope import Envelope, ReplyOutcome, StreamId, Token
from eventstore import rows
from eventstore.port import (
    ANY,
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

ARGUMENTS, LEAN_ARGUMENTS = 65, 32
"""How many `commit_units` and `commit_one` take."""
STATES = {0: ClaimState.NEW, 1: ClaimState.DONE, 2: ClaimState.DEAD, 3: ClaimState.CANCELLED}
_STATE_NUMBERS = {state: number for number, state in STATES.items()}
_FENCES = {Fence.EXPECT_DONE: 1, Fence.CANCEL: 2}
_NO_ROW = (None,) * 7


class Call:
    """One call's arrays. Places count from 1; 0 is none."""

    def __init__(self, units: Sequence[Unit], watermarks: Sequence[Watermark], *, service: str, epoch: int) -> None:
        self.units = units
        self._service, self._epoch = service, epoch
        self._plain = True
        self._ids: dict[tuple[str, int], tuple[UUID, str, int, bool]] = {}
        self._streams: dict[StreamId, tuple[int, int]] = {}  # version before the first, after the last
        self._keys: dict[tuple[str, str], int] = {}
        # Columns of what has one row per unit, touch and so on, in the order of the function's parameters.
        self._u_keys: list[int] = []
        self._last_event: list[int] = []
        self._last_public: list[int] = []
        self._touches: list[tuple[int, StreamId, int, int]] = []
        self._row_units: list[int] = []
        self._events: list[tuple[Any, ...]] = []
        self._outgoing: list[tuple[Any, ...]] = []
        self._replies: list[tuple[int, str, bytes]] = []
        self._timers: list[tuple[int, Timer | CancelTimer]] = []
        self._letters: list[tuple[int, DeadLetter]] = []
        for number, unit in enumerate(units, 1):
            self._add(number, unit)
        self._watermarks = _highest(watermarks)

    def _add(self, number: int, unit: Unit) -> None:
        last_event = last_public = 0
        for append in unit.appends:
            expected = -1 if append.expected is ANY else int(append.expected)
            self._touch(number, append.stream, expected, len(append.envelopes))
            touch = len(self._touches)
            for nth, envelope in enumerate(append.envelopes, 1):
                self._row_units.append(number)
                last_event = len(self._row_units)
                if envelope.topic is not None:
                    last_public = last_event
                self._events.append((last_event, touch, nth, *self._row(envelope)))
        for stream, version in unit.asserts:
            self._touch(number, stream, version, 0)
        for append in unit.appends:  # only now: a unit's asserts are about the version before it
            first, version = self._streams[append.stream]
            self._streams[append.stream] = (first, version + len(append.envelopes))
        for envelope in unit.outgoing:
            self._row_units.append(number)
            self._outgoing.append((len(self._row_units), False, *self._row(envelope)))
        if (claim := unit.claim) is not None:
            self._claim(number, claim)
        else:
            self._u_keys.append(0)
        for timer in unit.timers:
            self._timers.append((number, timer))
        if unit.dead_letter is not None:
            self._letters.append((number, unit.dead_letter))
        self._last_event.append(last_event)
        self._last_public.append(last_public)

    def _touch(self, unit: int, stream: StreamId, expected: int, count: int) -> None:
        self._touches.append((unit, stream, expected, count))
        known = self._streams.get(stream)
        if known is None:
            self._streams[stream] = (expected, expected)
            self._plain = self._plain and expected >= 0
        elif known[1] != expected:
            self._plain = False

    def _claim(self, unit: int, claim: Claim) -> None:
        self._u_keys.append(self._keys.setdefault((claim.consumer, claim.key), len(self._keys) + 1))
        id = (claim.consumer, claim.message_id.int)
        if id in self._ids:
            self._plain = False
        else:
            self._ids[id] = (claim.message_id, claim.key, _STATE_NUMBERS[claim.state], has_effect(claim))
        if claim.fences is not None:
            self._plain = False
            # Goes in as cancelled, so that a step on its way waits for this undo or this undo for the step.
            self._ids.setdefault((claim.consumer, claim.fences.int), (claim.fences, claim.key, 3, False))
        if (reply := claim.reply) is not None:
            epoch = rows.log_epoch(reply, service=self._service, epoch=self._epoch)
            # Its positions are only known to the database, which keeps them beside the document: see `with_token`.
            token = Token(self._service, self._epoch, claim.key, 0, 0)
            self._replies.append((unit, rows.document(reply, epoch=epoch, token=token), reply.data))
            if reply.topic is not None:
                self._row_units.append(unit)
                self._outgoing.append((len(self._row_units), True, *self._row(reply, token)))

    def _row(self, envelope: Envelope, token: Token | None = None) -> tuple[Any, ...]:
        epoch = rows.log_epoch(envelope, service=self._service, epoch=self._epoch)
        return (
            envelope.id,
            envelope.type,
            envelope.key,
            envelope.topic,
            envelope.time,
            envelope.data,
            rows.meta(envelope, epoch=epoch, token=token),
        )

    def arguments(self) -> list[Any]:
        """For `commit_units`, in its order."""
        ids = sorted(self._ids)
        id_places = {id: place for place, id in enumerate(ids, 1)}
        id_rows = [self._ids[id] for id in ids]
        streams = sorted((stream.category, stream.id, stream) for stream in self._streams)
        stream_places = {stream: place for place, (_, _, stream) in enumerate(streams, 1)}
        versions = [self._streams[stream] for _, _, stream in streams]
        claims = [unit.claim for unit in self.units]
        timers = sorted(self._timers, key=lambda one: (one[1].consumer, one[1].id.int))
        letters = sorted(self._letters, key=lambda one: (one[1].consumer, one[1].id.int))
        return [
            [consumer for consumer, _ in ids],
            *_columns(id_rows, 4),
            [category for category, _, _ in streams],
            [id for _, id, _ in streams],
            *_columns(versions, 2),
            self._plain,
            len(self.units),
            [0 if claim is None else id_places[claim.consumer, claim.message_id.int] for claim in claims],
            self._u_keys,
            [0 if claim is None else _STATE_NUMBERS[claim.state] for claim in claims],
            [claim is not None and has_effect(claim) for claim in claims],
            [
                0 if claim is None or claim.fences is None else id_places[claim.consumer, claim.fences.int]
                for claim in claims
            ],
            [0 if claim is None or claim.fence is None else _FENCES[claim.fence] for claim in claims],
            self._last_event,
            self._last_public,
            [unit for unit, _, _, _ in self._touches],
            [stream_places[stream] for _, stream, _, _ in self._touches],
            [expected for _, _, expected, _ in self._touches],
            [count for _, _, _, count in self._touches],
            self._row_units,
            *_columns(self._events, 10),
            *_columns(self._outgoing, 9),
            *_columns(self._replies, 3),
            *_columns([_timer_row(unit, timer) for unit, timer in timers], 7),
            any(isinstance(timer, CancelTimer) for _, timer in timers),
            *_columns([_letter_row(unit, letter) for unit, letter in letters], 7),
            *_columns(self._watermarks, 4),
        ]

    def lean_arguments(self) -> list[Any] | None:
        """For `commit_one`; None when this call is not as simple as that."""
        if (
            len(self.units) != 1
            or not self._plain
            or len(self._touches) > 1
            or len(self._events) > 1
            or len(self.units[0].outgoing) > 1
            or self._timers
            or self._letters
            or self._watermarks
        ):
            return None
        arguments: list[Any] = []
        claim = self.units[0].claim
        if claim is None:
            arguments += [None] * 5
        else:
            state = _STATE_NUMBERS[claim.state]
            arguments += [claim.consumer, claim.message_id, claim.key, state, has_effect(claim)]
        if self._touches:
            _, stream, expected, count = self._touches[0]
            arguments += [stream.category, stream.id, expected, expected + count]
        else:
            arguments += [None] * 4
        arguments += self._events[0][3:] if self._events else _NO_ROW
        sent = [row[2:] for row in self._outgoing if not row[1]]
        answered = [row[2:] for row in self._outgoing if row[1]]
        arguments += sent[0] if sent else _NO_ROW
        arguments += answered[0] if answered else _NO_ROW
        arguments += self._replies[0][1:] if self._replies else (None, None)
        return arguments

    def lean_outcome(self, at: int) -> Outcome:
        """What `commit_one` has written; its event is at `at`."""
        public = at if self._last_public[0] else 0
        versions = {stream: expected + count for _, stream, expected, count in self._touches if count}
        return Outcome(Verdict.COMMITTED, at, public, versions)

    def outcomes(self, answer: asyncpg.Record) -> list[Outcome]:
        """Those of duplicates still lack the stored reply."""
        positions: Sequence[int | None] = answer["positions"] or ()
        verdicts: Sequence[int] | None = answer["verdicts"]
        began: Sequence[int] | None = answer["began"]
        touches: list[list[int]] = [[] for _ in self.units]
        for place, (unit, _, _, count) in enumerate(self._touches):
            if count:
                touches[unit - 1].append(place)
        found: list[Outcome] = []
        for nth in range(len(self.units)):
            match 1 if verdicts is None else verdicts[nth]:
                case 1:
                    versions = {
                        stream: (expected if began is None else began[place]) + count
                        for place in touches[nth]
                        for _, stream, expected, count in (self._touches[place],)
                    }
                    found.append(
                        Outcome(
                            Verdict.COMMITTED,
                            _at(positions, self._last_event[nth]),
                            _at(positions, self._last_public[nth]),
                            versions,
                        )
                    )
                case 2:
                    found.append(Outcome(Verdict.DUPLICATE))
                case 4:
                    found.append(Outcome(Verdict.CANCELLED))
                case 5:
                    found.append(self._repeated(nth, answer, positions))
                case _:
                    found.append(self._conflict(nth, answer))
        return found

    def _conflict(self, nth: int, answer: asyncpg.Record) -> Outcome:
        misfit: int | None = answer["misfit"][nth]
        if misfit is None:
            return Outcome(Verdict.CONFLICT)
        _, stream, expected, _ = self._touches[misfit - 1]
        wanted: ExpectedVersion = ANY if expected < 0 else expected
        return Outcome(Verdict.CONFLICT, stream=stream, expected=wanted, actual=answer["actual"][nth])

    def _repeated(self, nth: int, answer: asyncpg.Record, positions: Sequence[int | None]) -> Outcome:
        """Its events were stored by an earlier call, or by earlier units of this one."""
        position: int = answer["repeated"][nth] or 0
        public: int = answer["repeated_public"][nth] or 0
        ids = {envelope.id for append in self.units[nth].appends for envelope in append.envelopes}
        for at, _, _, id, _, _, topic, *_ in self._events:
            if id in ids and (written := _at(positions, at)):
                position = max(position, written)
                public = max(public, written) if topic is not None else public
        versions = {
            append.stream: append.expected + len(append.envelopes)
            for append in self.units[nth].appends
            if isinstance(append.expected, int)
        }
        return Outcome(Verdict.COMMITTED, position, public, versions)


def has_effect(claim: Claim) -> bool:
    """Done, and there is something that an undo would have to undo."""
    return claim.state is ClaimState.DONE and (claim.reply is None or claim.reply.outcome in (None, ReplyOutcome.OK))


def _at(positions: Sequence[int | None], place: int) -> int:
    return (positions[place - 1] or 0) if 0 < place <= len(positions) else 0


def _columns(table: Sequence[tuple[Any, ...]], width: int) -> Iterable[Sequence[Any]]:
    return zip(*table, strict=True) if table else ((),) * width


def _timer_row(unit: int, timer: Timer | CancelTimer) -> tuple[Any, ...]:
    if isinstance(timer, CancelTimer):
        return unit, timer.consumer, timer.id, None, None, None, None
    envelope = timer.envelope
    document = rows.document(envelope, epoch=envelope.epoch)
    return unit, timer.consumer, timer.id, timer.key, timer.due_at, document, envelope.data


def _letter_row(unit: int, letter: DeadLetter) -> tuple[Any, ...]:
    document = rows.dead_letter_document(letter)
    failed_at = letter.failure.failed_at
    return unit, letter.consumer, letter.id, failed_at, letter.key, letter.value, document


def _highest(watermarks: Sequence[Watermark]) -> list[tuple[str, str, int, int]]:
    highest: dict[tuple[str, str, int], int] = {}
    for mark in watermarks:
        place = (mark.group, mark.topic, mark.partition)
        highest[place] = max(mark.offset, highest.get(place, mark.offset))
    return sorted((*place, offset) for place, offset in highest.items())
