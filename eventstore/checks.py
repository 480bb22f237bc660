"""Is a unit well formed? Asked by both adapters before anything else, so that they refuse the same ones.

A mistake found here is one in the code that staged the unit: `BadUnit`, nothing is written, for the whole call.
"""

from __future__ import annotations

from collections.abc import Sequence

from bus.envelope import Envelope, StreamId
from eventstore.errors import BadUnit
from eventstore.port import ANY, CancelTimer, Claim, ClaimState, DeadLetter, Timer, Unit, Watermark

_NUMBER_MAX = 2**63 - 1


def check_units(units: Sequence[Unit], watermarks: Sequence[Watermark] = ()) -> None:
    """Raises BadUnit, naming the unit by its place in the call and saying what is wrong with it."""
    for index, unit in enumerate(units):
        fault = _fault(unit)
        if fault is not None:
            raise BadUnit(f"unit {index} of {len(units)}: {fault}; nothing was written")
    for mark in watermarks:
        fault = _unfit(mark.group, mark.topic)
        if fault is None and not 0 <= mark.offset <= _NUMBER_MAX:
            fault = f"offset {mark.offset!r} is none"
        if fault is not None:
            raise BadUnit(f"watermark of {mark.topic!r}[{mark.partition}]: {fault}; nothing was written")


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
    if not claim.consumer:
        return "a claim without a consumer"
    if claim.state is not ClaimState.DONE and claim.state is not ClaimState.DEAD:
        return f"a claim is made as done or dead, not as {claim.state}"
    if (claim.fences is None) is not (claim.fence is None):
        return "a claim that fences names both the command (fences) and the demand (fence), or neither"
    if claim.fences is not None and claim.fences == claim.message_id:
        return f"{claim.message_id} fences itself"
    if (fault := _unfit(claim.consumer, claim.key)) is not None:
        return f"a claim's consumer or key: {fault}"
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
    if not stream.category or not stream.id:
        return f"stream {stream!r} has no category or no id"
    if (fault := _unfit(stream.category, stream.id)) is not None:
        return f"a stream's name: {fault}"
    return None


def _envelope_fault(envelope: Envelope) -> str | None:
    deadline, to, token, headers = envelope.deadline, envelope.reply_to, envelope.token, envelope.headers
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
    if (fault := _unfit(timer.consumer)) is not None:
        return f"a timer's consumer: {fault}"
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
    if (fault := _unfit(letter.consumer)) is not None:
        return f"a dead letter's consumer: {fault}"
    return None


def _unfit(*texts: str) -> str | None:
    """What no database column holds: a NUL (PostgreSQL), half a surrogate pair (both)."""
    together = "".join(texts)
    if "\x00" in together:
        return f"a NUL in {together[:80]!r}"
    if not together.isascii():
        try:
            together.encode()
        except UnicodeEncodeError:
            return f"half a surrogate pair in {together[:80]!r}"
    return None
