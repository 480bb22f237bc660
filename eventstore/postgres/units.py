"""Units as the rows of `commit_calls` (migrations/sql/0005_commit_calls.sql explains each), and its answer as outcomes.

Everything that can be decided from the units alone is decided here: what is distinct, what is sorted how, whether
expected versions chain within the statement.
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

ARGUMENTS, LEAN_ARGUMENTS = 14, 32
"""How many `commit_calls` and `commit_one` take."""
STATES = {
    0: ClaimState.NEW,
    1: ClaimState.DONE,
    2: ClaimState.DEAD,
    3: ClaimState.CANCELLED,
    4: ClaimState.PARKED,
    5: ClaimState.STARTED,
    6: ClaimState.KEY_PARKED,
}
_STATE_NUMBERS = {state: number for number, state in STATES.items()}
_FENCES = {None: 0, Fence.EXPECT_DONE: 1, Fence.CANCEL: 2}
_NO_ROW = (None,) * 7


class Call:
    """The rows of one statement. `lengths`: how many units each of the calls has that share it (None: one call, which
    waits for locks as long as it takes; calls that share are `impatient`)."""

    def __init__(
        self,
        units: Sequence[Unit],
        watermarks: Sequence[Watermark] = (),
        *,
        service: str,
        epoch: int,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.units, self.watermarks = units, watermarks
        self._service, self._epoch = service, epoch
        self._lengths = (len(units),) if lengths is None else lengths
        self.impatient = lengths is not None
        self._plain = True
        self._ids: dict[tuple[str, int], tuple[str, UUID, str, int, bool]] = {}
        self._streams: dict[tuple[str, str], tuple[int, int]] = {}  # version before the first, after the last
        self._keys: dict[tuple[str, str], int] = {}
        # Of units, and of what they touch: unit, stream, expected version, how many events.
        self._last_event: list[int] = []
        self._last_public: list[int] = []
        self._touches: list[tuple[int, tuple[str, str], int, int]] = []
        # One entry per log row: its unit.
        self._row_units: list[int] = []
        self._events: list[tuple[Any, ...]] = []
        self._outgoing: list[tuple[Any, ...]] = []
        self._replies: list[tuple[Any, ...]] = []
        self._timers: list[tuple[int, Timer | CancelTimer]] = []
        self._letters: list[tuple[int, DeadLetter]] = []
        for number, unit in enumerate(units, 1):
            self._add(number, unit)

    def _add(self, number: int, unit: Unit) -> None:
        last_event = last_public = 0
        for append in unit.appends:
            last_event, public = self._append(number, append)
            last_public = public or last_public
        for stream, version in unit.asserts:
            self._touch(number, (stream.category, stream.id), version, 0)
        for append in unit.appends:  # only now: a unit's asserts are about the version before it
            name = (append.stream.category, append.stream.id)
            first, version = self._streams[name]
            self._streams[name] = (first, version + len(append.envelopes))
        for envelope in unit.outgoing:
            self._row_units.append(number)
            self._outgoing.append((len(self._row_units), None, None, *self._row(envelope)))
        if unit.claim is not None:
            self._claim(number, unit.claim, last_event, last_public)
        for timer in unit.timers:
            self._timers.append((number, timer))
        if unit.dead_letter is not None:
            self._letters.append((number, unit.dead_letter))
        self._last_event.append(last_event)
        self._last_public.append(last_public)

    def _append(self, unit: int, append: Append) -> tuple[int, int]:
        """The places of its last event and of its last public one (0: none)."""
        category, id = append.stream.category, append.stream.id
        expected = _ANY if append.expected is ANY else int(append.expected)
        self._touch(unit, (category, id), expected, len(append.envelopes))
        touch, at, last_public = len(self._touches), len(self._row_units), 0
        for nth, envelope in enumerate(append.envelopes, 1):
            at += 1
            if envelope.topic is not None:
                last_public = at
            self._events.append((at, touch, nth, category, id, expected + nth, *self._row(envelope)))
        self._row_units += [unit] * len(append.envelopes)
        return at, last_public

    def _touch(self, unit: int, stream: tuple[str, str], expected: int, count: int) -> None:
        self._touches.append((unit, stream, expected, count))
        known = self._streams.get(stream)
        if known is None:
            self._streams[stream] = (expected, expected)
            self._plain = self._plain and expected >= 0
        elif known[1] != expected:
            self._plain = False

    def _claim(self, unit: int, claim: Claim, last_event: int, last_public: int) -> None:
        consumer, message_id, key = claim.consumer, claim.message_id, claim.key
        id = (consumer, message_id.int)
        if id in self._ids:
            self._plain = False
            # Put there by a fence, under the undo's key: whether a key is parked is asked of the message's own.
            _, _, _, state, effect = self._ids[id]
            self._ids[id] = (consumer, message_id, key, state, effect)
        else:
            self._ids[id] = (consumer, message_id, key, _STATE_NUMBERS[claim.state], has_effect(claim))
        if claim.fences is not None:
            self._plain = False
            # Goes in as cancelled, so that a step on its way waits for this undo or this undo for the step.
            self._ids.setdefault((consumer, claim.fences.int), (consumer, claim.fences, key, 3, False))
        if (reply := claim.reply) is not None:
            epoch = rows.log_epoch(reply, service=self._service, epoch=self._epoch)
            # Its positions are only known to the database, which keeps them beside the document: see `with_token`.
            token = Token(self._service, self._epoch, key, 0, 0)
            document = rows.document(reply, epoch=epoch, token=token)
            self._replies.append((unit, last_event, last_public, consumer, message_id, document, reply.data))
            if reply.topic is not None:
                self._row_units.append(unit)
                self._outgoing.append((len(self._row_units), last_event, last_public, *self._row(reply, token)))

    def _row(self, envelope: Envelope, token: Token | None = None) -> tuple[Any, ...]:
        epoch = self._epoch if envelope.source == self._service else envelope.epoch  # as `rows.log_epoch`
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
        """For `commit_calls`, in its order."""
        ids = sorted(self._ids.items())
        streams = sorted(self._streams.items())
        timers = sorted(self._timers, key=lambda one: (one[1].consumer, one[1].id.int))
        letters = sorted(self._letters, key=lambda one: (one[1].consumer, one[1].id.int))
        return [
            self._plain,
            len({event[6] for event in self._events}) < len(self._events),
            len(self.units),
            len(self._row_units),
            self._numbers([id for id, _ in ids], [stream for stream, _ in streams]),
            [row for _, row in ids],
            [(*stream, *versions) for stream, versions in streams],
            self._events,
            self._outgoing,
            self._replies,
            [_timer_row(unit, timer) for unit, timer in timers],
            any(isinstance(timer, CancelTimer) for _, timer in timers),
            [_letter_row(unit, letter) for unit, letter in letters],
            _highest(self.watermarks),
        ]

    def _numbers(self, ids: Sequence[tuple[str, int]], streams: Sequence[tuple[str, str]]) -> list[str]:
        id_places = {id: place for place, id in enumerate(ids, 1)}
        stream_places = {stream: place for place, stream in enumerate(streams, 1)}
        claimed = [
            _NO_CLAIM if unit.claim is None else self._claim_numbers(unit.claim, id_places) for unit in self.units
        ]
        calls = (number for number, length in enumerate(self._lengths, 1) for _ in range(length))
        columns: Sequence[Iterable[int]] = [
            calls,
            *_columns(claimed, 6),
            (unit for unit, _, _, _ in self._touches),
            (stream_places[stream] for _, stream, _, _ in self._touches),
            (expected for _, _, expected, _ in self._touches),
            (count for _, _, _, count in self._touches),
            self._row_units,
        ]
        return ["{" + ",".join(map(str, column)) + "}" for column in columns]

    def _claim_numbers(self, claim: Claim, places: dict[tuple[str, int], int]) -> tuple[int, ...]:
        consumer, fences = claim.consumer, claim.fences
        return (
            places[consumer, claim.message_id.int],
            self._keys.setdefault((consumer, claim.key), len(self._keys) + 1),
            _STATE_NUMBERS[claim.state],
            1 if has_effect(claim) else 0,
            0 if fences is None else places[consumer, fences.int],
            _FENCES[claim.fence],
        )

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
            or self.watermarks
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
            _, (category, id), expected, count = self._touches[0]
            arguments += [category, id, expected, expected + count]
        else:
            arguments += [None] * 4
        arguments += self._events[0][6:] if self._events else _NO_ROW
        sent = [row[3:] for row in self._outgoing if row[1] is None]
        answered = [row[3:] for row in self._outgoing if row[1] is not None]
        arguments += sent[0] if sent else _NO_ROW
        arguments += answered[0] if answered else _NO_ROW
        arguments += self._replies[0][5:] if self._replies else (None, None)
        return arguments

    def lean_outcome(self, at: int) -> Outcome:
        """What `commit_one` has written; its event is at `at`."""
        return Outcome(Verdict.COMMITTED, at, at if self._last_public[0] else 0, _made(self.units[0]))

    def outcomes(self, answer: asyncpg.Record) -> list[Outcome]:
        """Of all calls, one after the other. Those of duplicates still lack the stored reply."""
        positions: Sequence[int | None] = answer["positions"] or ()
        verdicts: Sequence[int] | None = answer["verdicts"]
        if verdicts is None:
            return [
                Outcome(
                    Verdict.COMMITTED,
                    (positions[last_event - 1] or 0) if last_event else 0,
                    (positions[last_public - 1] or 0) if last_public else 0,
                    _made(unit),
                )
                for unit, last_event, last_public in zip(self.units, self._last_event, self._last_public, strict=True)
            ]
        touches: list[list[int]] = [[] for _ in self.units]
        for place, (unit_number, _, _, _) in enumerate(self._touches):
            touches[unit_number - 1].append(place)
        found: list[Outcome] = []
        for nth, unit in enumerate(self.units):
            match verdicts[nth]:
                case 1:
                    began = [answer["began"][place] for place in touches[nth]]
                    versions = {
                        append.stream: version + len(append.envelopes)
                        for append, version in zip(unit.appends, began, strict=False)  # asserted streams come after
                    }
                    last_event, last_public = self._last_event[nth], self._last_public[nth]
                    found.append(
                        Outcome(Verdict.COMMITTED, _at(positions, last_event), _at(positions, last_public), versions)
                    )
                case 2:
                    found.append(Outcome(Verdict.DUPLICATE))
                case 4:
                    found.append(Outcome(Verdict.CANCELLED))
                case 6:
                    found.append(Outcome(Verdict.PARKED))
                case 7:
                    found.append(Outcome(Verdict.STARTED))
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
        return Outcome(Verdict.CONFLICT, stream=StreamId(*stream), expected=wanted, actual=answer["actual"][nth])

    def _repeated(self, nth: int, answer: asyncpg.Record, positions: Sequence[int | None]) -> Outcome:
        """Its events were stored by an earlier call, or by earlier units of this one."""
        position: int = answer["repeated"][nth] or 0
        public: int = answer["repeated_public"][nth] or 0
        ids = {envelope.id for append in self.units[nth].appends for envelope in append.envelopes}
        for at, _, _, _, _, _, id, _, _, topic, *_ in self._events:
            if id in ids and (written := _at(positions, at)):
                position = max(position, written)
                public = max(public, written) if topic is not None else public
        return Outcome(Verdict.COMMITTED, position, public, _made(self.units[nth]))


_NO_CLAIM = (0,) * 6
_ANY = -(2**63)
"""As `commit_calls` is told. Not -1: so says the row of an archived stream of one event, and it would fit."""


def has_effect(claim: Claim) -> bool:
    """Done, and there is something that an undo would have to undo."""
    return claim.state is ClaimState.DONE and (claim.reply is None or claim.reply.outcome in (None, ReplyOutcome.OK))


def _made(unit: Unit) -> dict[StreamId, int]:
    """The versions that its appends make, if all are at the expected ones."""
    return {
        append.stream: append.expected + len(append.envelopes)
        for append in unit.appends
        if isinstance(append.expected, int)
    }


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
