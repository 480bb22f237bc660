"""Making dead letters: the unit that gives a message up, the same for handlers, sagas and projections.

A dead letter is a row with the bytes as they came, committed with the claim, and a copy in the service's `.dlq` topic
whose headers `x-dlq-…` tell its history. The claim makes a second giving-up do nothing, so it may be repeated.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from uuid import NAMESPACE_URL, UUID, uuid5

from bus.cloudevents import to_record
from bus.codec import HEADROOM_BYTES
from bus.envelope import Envelope, Failure, Kind
from bus.metrics import Metrics
from bus.seams import Clock
from bus.topics import DEAD_LETTER_ROOM_BYTES
from bus.transport import Delivery
from eventstore.port import CancelTimer, Claim, ClaimState, DeadLetter, Outcome, Unit, Verdict

log = logging.getLogger("foldbus.eventstore")

_HEADER_MAX = 4096


class DeadLetters:
    """Of one consumer of one service. `max_bytes` is what a record of the service's topics may hold; the `.dlq` has
    64 KiB more room, and a copy that is larger still is cut: the row has all of it."""

    def __init__(self, service: str, consumer: str, *, clock: Clock, metrics: Metrics, max_bytes: int) -> None:
        self._service, self._consumer, self._max_bytes = service, consumer, max_bytes
        self._clock, self._metrics = clock, metrics

    def of_message(
        self,
        envelope: Envelope,
        failure: Failure,
        *,
        delivery: Delivery | None = None,
        source: str = "",
        reply: Envelope | None = None,
    ) -> Unit:
        """Gives up a message that was read. Without a `delivery` it came from a timer (which is taken away, or it would
        be due again at the end of every lease; its headers are those it would have on a topic, so that it can be
        redriven) or, with `source`, from the own log."""
        headers = delivery.headers if delivery else ()
        if delivery is None and not source:
            headers = tuple(to_record(replace(envelope, topic=envelope.topic or "-")).headers)
        letter = DeadLetter(
            consumer=self._consumer,
            id=envelope.id,
            topic=delivery.topic if delivery else source,
            partition=delivery.partition if delivery else -1,
            offset=delivery.offset if delivery else envelope.position or -1,
            key=delivery.key if delivery else envelope.key.encode(),
            value=delivery.value if delivery else envelope.data,
            headers=headers,
            failure=failure,
            type=envelope.type,
        )
        timer = () if delivery or source else (CancelTimer(self._consumer, envelope.id),)
        return self._unit(letter, envelope.key, envelope, reply, timer)

    def of_record(self, delivery: Delivery, failure: Failure) -> Unit:
        """Gives up a record that never became a message; its id is made of its place."""
        place = f"{delivery.topic}/{delivery.partition}/{delivery.offset}"
        letter = DeadLetter(
            consumer=self._consumer,
            id=uuid5(NAMESPACE_URL, f"foldbus:{place}"),
            topic=delivery.topic,
            partition=delivery.partition,
            offset=delivery.offset,
            key=delivery.key,
            value=delivery.value,
            headers=delivery.headers,
            failure=failure,
        )
        copy = Envelope(
            id=letter.id,
            kind=Kind.EVENT,
            type="foldbus.dead-letter.v1",
            source=self._service,
            key=place,
            data=delivery.value or b"",
            time=self._clock.now(),
            correlation_id=letter.id,
        )
        return self._unit(letter, place, copy, None, ())

    def report(self, unit: Unit, outcome: Outcome) -> None:
        """Counts and logs a dead letter that was written; one that was there already was reported then."""
        letter = unit.dead_letter
        if letter is None or outcome.verdict is not Verdict.COMMITTED:
            return
        self._metrics.count("foldbus_dead_letters_total", consumer=self._consumer, error=letter.failure.error)
        log.error(
            "%s: dead letter %s from %s[%s]@%s after %s attempts: %s: %s",
            self._consumer, letter.id, letter.topic, letter.partition, letter.offset,
            letter.failure.attempts, letter.failure.error, letter.failure.message,
        )  # fmt: skip

    def _unit(
        self,
        letter: DeadLetter,
        key: str,
        what: Envelope,
        reply: Envelope | None,
        timers: tuple[CancelTimer, ...],
    ) -> Unit:
        headers = {**what.headers, **_history(letter)}
        taken = HEADROOM_BYTES + sum(len(name) + len(value.encode()) for name, value in headers.items())
        copy = replace(
            what,
            id=copy_id(letter.id, self._consumer),
            data=what.data[: self._max_bytes + DEAD_LETTER_ROOM_BYTES - taken],
            topic=f"{self._service}.dlq",
            stream=None,
            version=None,
            position=None,
            reply_to=None,
            causation_id=letter.id,
            headers=headers,
        )
        claim = Claim(self._consumer, letter.id, key, reply=reply, state=ClaimState.DEAD)
        return Unit(claim=claim, outgoing=(copy,), timers=timers, dead_letter=letter)


def copy_id(letter: UUID, consumer: str) -> UUID:
    """The id of the copy in the `.dlq` topic: the same however often it is made."""
    return uuid5(letter, f"dead-letter:{consumer}")


def _history(letter: DeadLetter) -> Mapping[str, str]:
    """What became of it, as headers; bounded, so that a copy always fits."""
    failure = letter.failure
    facts = {
        "topic": letter.topic,
        "partition": str(letter.partition),
        "offset": str(letter.offset),
        "consumer": letter.consumer,
        "attempts": str(failure.attempts),
        "error": failure.error,
        "message": failure.message,
        "stack": failure.stack,
        "first-failed-at": failure.first_failed_at.isoformat(),
        "failed-at": failure.failed_at.isoformat(),
        "code-version": failure.code_version,
    }
    return {f"x-dlq-{name}": _bounded(value) for name, value in facts.items() if value}


def _bounded(text: str) -> str:
    return text.replace("\x00", "\N{SYMBOL FOR NULL}").encode(errors="replace")[:_HEADER_MAX].decode(errors="ignore")
