"""Is a unit well formed? Asked by both adapters before anything else, so that they refuse the same ones.

A mistake found here is one in the code that staged the unit: `BadUnit`, nothing is written, for the whole call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from bus.envelope import Envelope, StreamId
from eventstore.errors import BadUnit
from eventstore.port import ANY, CancelTimer, Claim, ClaimState, DeadLetter, Timer, Unit, Watermark

_NUMBER_MAX = 2**63 - 1


def check_units(units: Sequence[Unit], watermarks: Sequence[Watermark] = ()) -> None:
    """Raises BadUnit, naming the unit by its place in the call and saying what is wrong with it."""
    for index, unit in enumerate(units):
        for wrong in _faults(unit):
            raise BadUnit(f"unit {index} of {len(units)}: {wrong}; nothing was written")
    for mark in watermarks:
        if not 0 <= mark.offset <= _NUMBER_MAX:
            raise BadUnit(f"watermark of {mark.topic}[{mark.partition}]: offset {mark.offset} is none")
        for wrong in _unfit((mark.group, mark.topic), "a watermark's name"):
            raise BadUnit(f"{wrong}; nothing was written")


def _faults(unit: Unit) -> Iterator[str]:
    if unit.claim is not None:
        yield from _claim_faults(unit.claim)
    if unit.appends:
        yield from _append_faults(unit)
    for stream, version in unit.asserts:
        yield from _stream_faults(stream)
        if not 0 <= version <= _NUMBER_MAX:
            yield f"asserts version {version!r} of {stream}; wanted 0 or above"
    for envelope in unit.outgoing:
        if envelope.topic is None:
            yield f"outgoing {envelope.type} {envelope.id} has no topic to go to"
        yield from _envelope_faults(envelope)
    for timer in unit.timers:
        yield from _timer_faults(timer)
    if unit.dead_letter is not None:
        yield from _dead_letter_faults(unit.dead_letter)


def _claim_faults(claim: Claim) -> Iterator[str]:
    if not claim.consumer:
        yield "a claim without a consumer"
    if claim.state is not ClaimState.DONE and claim.state is not ClaimState.DEAD:
        yield f"a claim is made as done or dead, not as {claim.state}"
    if (claim.fences is None) is not (claim.fence is None):
        yield "a claim that fences names both the command (fences) and the demand (fence), or neither"
    if claim.fences is not None and claim.fences == claim.message_id:
        yield f"{claim.message_id} fences itself"
    yield from _unfit((claim.consumer, claim.key), "a claim's consumer or key")
    if claim.reply is not None:
        yield from _envelope_faults(claim.reply)


def _append_faults(unit: Unit) -> Iterator[str]:
    if len(unit.appends) > 1:
        seen: set[StreamId] = set()
        for append in unit.appends:
            if append.stream in seen:
                yield f"appends to {append.stream} twice; wanted one append with all its events"
            seen.add(append.stream)
    for append in unit.appends:
        yield from _stream_faults(append.stream)
        if append.expected is not ANY and not 0 <= append.expected <= _NUMBER_MAX:
            yield f"expects version {append.expected!r} of {append.stream}; wanted 0 or above, or ANY"
        if not append.envelopes:
            yield f"an append to {append.stream} without events"
        for envelope in append.envelopes:
            yield from _envelope_faults(envelope)


def _stream_faults(stream: StreamId) -> Iterator[str]:
    if not stream.category or not stream.id:
        yield f"stream {stream!r} has no category or no id"
    yield from _unfit((stream.category, stream.id), "a stream's name")


def _envelope_faults(envelope: Envelope) -> Iterator[str]:
    if envelope.time.tzinfo is None or (envelope.deadline is not None and envelope.deadline.tzinfo is None):
        yield f"{envelope.type} {envelope.id} has a time without a time zone"
    yield from _unfit((envelope.type, envelope.key, envelope.source), f"a name of {envelope.type!r} {envelope.id}")
    if envelope.topic is not None or envelope.tenant is not None or envelope.actor is not None:
        yield from _unfit((envelope.topic, envelope.tenant, envelope.actor), f"a name of {envelope.id}")
    if (to := envelope.reply_to) is not None:
        yield from _unfit((to.topic, to.key, to.instance), f"reply_to of {envelope.id}")
    if (token := envelope.token) is not None:
        yield from _unfit((token.source, token.key), f"the token of {envelope.id}")
    if envelope.headers:
        yield from _unfit(envelope.headers, f"a header's name of {envelope.id}")
        yield from _unfit(envelope.headers.values(), f"a header of {envelope.id}")


def _timer_faults(timer: Timer | CancelTimer) -> Iterator[str]:
    yield from _unfit((timer.consumer,), "a timer's consumer")
    if isinstance(timer, Timer):
        if timer.due_at.tzinfo is None:
            yield f"timer {timer.id} is due at a time without a time zone"
        yield from _unfit((timer.key,), f"the key of timer {timer.id}")
        yield from _envelope_faults(timer.envelope)


def _dead_letter_faults(letter: DeadLetter) -> Iterator[str]:
    if letter.failure.failed_at.tzinfo is None or letter.failure.first_failed_at.tzinfo is None:
        yield f"dead letter {letter.id} failed at a time without a time zone"
    # Its error texts are whatever a handler raised: adapters store them escaped, a NUL in them is no fault.
    yield from _unfit((letter.consumer,), "a dead letter's consumer")


def _unfit(texts: Iterable[str | None], what: str) -> Iterator[str]:
    """No database column holds these: a NUL (PostgreSQL), half a surrogate pair (both)."""
    for text in texts:
        if text is None:
            continue
        if "\x00" in text:
            yield f"{what} holds a NUL: {text[:80]!r}"
        elif not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                yield f"{what} is no text that can be encoded: {text[:80]!r}"
