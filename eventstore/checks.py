"""Is a unit well formed? Asked by both adapters before anything else, so that they refuse the same ones.

A mistake found here is one in the code that staged the unit: `BadUnit`, nothing is written, for the whole call.

What a name may be, the same on every database:

- a stream's category: lower case letters, digits, `.`, `_` and `-`, a letter first, at most 128;
- a stream's id, a consumer, a group, a topic: any text without NUL and lone surrogates, of 1 to `NAME_BYTES_MAX` bytes
  in UTF-8. They stand in indexes, and PostgreSQL's take rows of some 2,700 bytes;
- keys, headers and every other text: the same without the small bound; all texts of a message together hold at most
  `TEXT_MAX` characters. A foreign record's key may be as large as the record, and it must fit into its dead letter.

`data` is bytes, of any form: how deep a JSON text may nest is for the codec to say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from bus.envelope import Envelope, StreamId
from eventstore.errors import BadUnit
from eventstore.port import ANY, CancelTimer, Claim, ClaimState, DeadLetter, Timer, Unit, Watermark

NAME_BYTES_MAX = 1024
"""Two of them, and a category's 128 bytes, fit into one row of an index."""
TEXT_MAX = 2 * 1024 * 1024
DATA_MAX = 16 * 1024 * 1024
"""Bytes of one message."""
UNIT_MAX = 50_000
"""Messages, asserts and timers of one unit."""
UNITS_MAX = 50_000
"""Units of one call."""
CALL_DATA_MAX = 256 * 1024 * 1024
"""Bytes of all messages of one call: PostgreSQL takes a statement of less than 1 GiB, and holds it in memory."""

_NUMBER_MAX = 2**63 - 1
_PARTITION_MAX = 2**31 - 1
_CATEGORY = re.compile(r"[a-z][a-z0-9._-]{0,127}")


def check_units(units: Sequence[Unit], watermarks: Sequence[Watermark] = ()) -> None:
    """Raises BadUnit, naming the unit by its place in the call and saying what is wrong with it."""
    if len(units) > UNITS_MAX:
        raise BadUnit(f"a call of {len(units)} units, wanted at most {UNITS_MAX}; nothing was written")
    many = 0
    for index, unit in enumerate(units):
        count = len(unit.outgoing) + len(unit.timers) + len(unit.asserts) + 1
        for append in unit.appends:
            count += len(append.envelopes)
        many += count
        fault = _fault(unit) if count <= UNIT_MAX else f"{count} messages, timers and asserts; at most {UNIT_MAX}"
        if fault is not None:
            raise BadUnit(f"unit {index} of {len(units)}: {fault}; nothing was written")
    if many * DATA_MAX > CALL_DATA_MAX and (size := _size(units)) > CALL_DATA_MAX:
        raise BadUnit(f"a call with {size} bytes of messages, wanted at most {CALL_DATA_MAX}; nothing was written")
    for mark in watermarks:
        fault = _name_fault("group", mark.group) or _name_fault("topic", mark.topic)
        if fault is None and not 0 <= mark.offset <= _NUMBER_MAX:
            fault = f"offset {mark.offset!r} is none"
        if fault is None and not -1 <= mark.partition <= _PARTITION_MAX:
            fault = f"partition {mark.partition!r} is none"
        if fault is not None:
            raise BadUnit(f"watermark of {mark.topic!r}[{mark.partition}]: {fault}; nothing was written")


def check_name(what: str, name: str) -> None:
    """Raises BadUnit."""
    if (fault := _name_fault(what, name)) is not None:
        raise BadUnit(f"{fault}; nothing was written")


def check_text(what: str, text: str) -> None:
    """Raises BadUnit."""
    if (fault := _unfit(text)) is not None:
        raise BadUnit(f"{what}: {fault}; nothing was written")


def check_envelope(envelope: Envelope) -> None:
    """Raises BadUnit."""
    if (fault := _envelope_fault(envelope)) is not None:
        raise BadUnit(f"{fault}; nothing was written")


def _size(units: Sequence[Unit]) -> int:
    size = 0
    for unit in units:
        for append in unit.appends:
            for envelope in append.envelopes:
                size += len(envelope.data)
        for envelope in unit.outgoing:
            size += len(envelope.data)
        for timer in unit.timers:
            if isinstance(timer, Timer):
                size += len(timer.envelope.data)
        if unit.claim is not None and unit.claim.reply is not None:
            size += len(unit.claim.reply.data)
        if unit.dead_letter is not None:
            size += len(unit.dead_letter.value or b"") + len(unit.dead_letter.key or b"")
    return size


def _fault(unit: Unit) -> str | None:
    if unit.claim is not None and (fault := _claim_fault(unit.claim)) is not None:
        return fault
    if unit.appends and (fault := _append_fault(unit)) is not None:
        return fault
    for stream, version in unit.asserts:
        if (fault := _stream_fault(stream)) is not None:
            return fault
        if not 0 <= version <= _NUMBER_MAX:
            return f"asserts version {version!r} of {stream}; wanted 0 or above"
    for envelope in unit.outgoing:
        if envelope.topic is None:
            return f"outgoing {envelope.type} {envelope.id} has no topic to go to"
        if (fault := _envelope_fault(envelope)) is not None:
            return fault
    for timer in unit.timers:
        if (fault := _timer_fault(timer)) is not None:
            return fault
    if unit.dead_letter is not None:
        return _dead_letter_fault(unit.dead_letter)
    return None


def _claim_fault(claim: Claim) -> str | None:
    if (fault := _name_fault("a claim's consumer", claim.consumer)) is not None:
        return fault
    if claim.state is not ClaimState.DONE and claim.state is not ClaimState.DEAD:
        return f"a claim is made as done or dead, not as {claim.state}"
    if (claim.fences is None) is not (claim.fence is None):
        return "a claim that fences names both the command (fences) and the demand (fence), or neither"
    if claim.fences is not None and claim.fences == claim.message_id:
        return f"{claim.message_id} fences itself"
    if (fault := _unfit(claim.key)) is not None:
        return f"a claim's key: {fault}"
    return None if claim.reply is None else _envelope_fault(claim.reply)


def _append_fault(unit: Unit) -> str | None:
    if len(unit.appends) > 1:
        seen: set[StreamId] = set()
        for append in unit.appends:
            if append.stream in seen:
                return f"appends to {append.stream} twice; wanted one append with all its events"
            seen.add(append.stream)
    for append in unit.appends:
        if (fault := _stream_fault(append.stream)) is not None:
            return fault
        if append.expected is not ANY and not 0 <= append.expected <= _NUMBER_MAX:
            return f"expects version {append.expected!r} of {append.stream}; wanted 0 or above, or ANY"
        if not append.envelopes:
            return f"an append to {append.stream} without events"
        for envelope in append.envelopes:
            if (fault := _envelope_fault(envelope)) is not None:
                return fault
    return None


def _stream_fault(stream: StreamId) -> str | None:
    return _category_fault(stream.category) or _name_fault("a stream's id", stream.id)


@lru_cache(maxsize=1024)  # a service has a handful
def _category_fault(category: str) -> str | None:
    if _CATEGORY.fullmatch(category) is None:
        return (
            f"{category[:80]!r} is no category of a stream; wanted lower case letters, digits, '.', '_' and '-', a "
            "letter first, at most 128"
        )
    return None


def _name_fault(what: str, name: str) -> str | None:
    if not name:
        return f"{what} is empty"
    if (fault := _unfit(name)) is not None:
        return f"{what}: {fault}"
    if len(name) * 4 > NAME_BYTES_MAX and (size := len(name.encode())) > NAME_BYTES_MAX:
        return f"{what} is {size} bytes long, {name[:80]!r}…; wanted at most {NAME_BYTES_MAX}"
    return None


def _envelope_fault(envelope: Envelope) -> str | None:
    deadline, to, token, headers = envelope.deadline, envelope.reply_to, envelope.token, envelope.headers
    if len(envelope.data) > DATA_MAX:
        return f"{envelope.type} {envelope.id} has {len(envelope.data)} bytes of data; wanted at most {DATA_MAX}"
    if envelope.time.tzinfo is None or (deadline is not None and deadline.tzinfo is None):
        return f"{envelope.type} {envelope.id} has a time without a time zone"
    fault = _unfit(
        envelope.type, envelope.key, envelope.source, envelope.topic or "", envelope.tenant or "", envelope.actor or ""
    )
    if fault is None and to is not None:
        fault = _unfit(to.topic, to.key, to.instance)
    if fault is None and token is not None:
        fault = _unfit(token.source, token.key)
    if fault is None and headers:
        fault = _unfit(*headers, *headers.values())
    return None if fault is None else f"a field of {envelope.type!r} {envelope.id}: {fault}"


def _timer_fault(timer: Timer | CancelTimer) -> str | None:
    if (fault := _name_fault("a timer's consumer", timer.consumer)) is not None:
        return fault
    if isinstance(timer, CancelTimer):
        return None
    if timer.due_at.tzinfo is None:
        return f"timer {timer.id} is due at a time without a time zone"
    if (fault := _unfit(timer.key)) is not None:
        return f"the key of timer {timer.id}: {fault}"
    return _envelope_fault(timer.envelope)


def _dead_letter_fault(letter: DeadLetter) -> str | None:
    if letter.failure.failed_at.tzinfo is None or letter.failure.first_failed_at.tzinfo is None:
        return f"dead letter {letter.id} failed at a time without a time zone"
    # Its error texts are whatever a handler raised: they are stored escaped, a NUL in them is no fault.
    return _name_fault("a dead letter's consumer", letter.consumer)


def _unfit(*texts: str) -> str | None:
    """What no database column holds: a NUL (PostgreSQL), half a surrogate pair (both), endless text."""
    together = "".join(texts)
    if len(together) > TEXT_MAX:
        return f"{len(together)} characters of text, wanted at most {TEXT_MAX}"
    if "\x00" in together:
        return f"a NUL in {together[:80]!r}"
    if not together.isascii():
        try:
            together.encode()
        except UnicodeEncodeError:
            return f"half a surrogate pair in {together[:80]!r}"
    return None
