"""Dead letters of a projection: committed through the store before the checkpoint moves past them.

The claim makes a second one of the same message do nothing, so a crash between the two repeats it harmlessly; the copy
for the `.dlq` topic goes with the first one only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Protocol
from uuid import NAMESPACE_URL, uuid5

from bus.cloudevents import to_record
from bus.envelope import Envelope, Failure, Kind
from bus.metrics import Metrics
from bus.seams import Clock
from eventstore.errors import StoreUnavailable
from eventstore.port import Claim, ClaimState, DeadLetter, Outcome, Unit, Verdict
from projections.folding import Unfolded
from projections.port import LOG, BadRecord

log = logging.getLogger("foldbus.projections")

_TEXT_MAX = 4_000
_COPY_MAX = 900_000


class Committing(Protocol):
    """What is needed of the store."""

    @property
    def service(self) -> str: ...

    async def commit(self, units: Sequence[Unit]) -> Sequence[Outcome]: ...


class Letters:
    """`consumer` is `<service>.projection.<name>`."""

    def __init__(self, store: Committing, projection: str, *, clock: Clock, metrics: Metrics) -> None:
        self.consumer = f"{store.service}.projection.{projection}"
        self._store, self._clock, self._metrics = store, clock, metrics

    async def unfolded(self, failed: Unfolded) -> None:
        envelope, delivery = failed.record.envelope, failed.record.delivery
        stored = to_record(replace(envelope, topic=envelope.topic or LOG)) if delivery is None else delivery
        letter = DeadLetter(
            consumer=self.consumer,
            id=envelope.id,
            topic=delivery.topic if delivery else LOG,
            partition=delivery.partition if delivery else 0,
            offset=delivery.offset if delivery else envelope.position or 0,
            key=stored.key,
            value=stored.value,
            headers=stored.headers,
            failure=self._failure(failed.error, failed.attempts, failed.stack),
            type=envelope.type,
        )
        await self._commit(letter, envelope.key, replace(envelope, data=envelope.data[:_COPY_MAX]))

    async def bad(self, found: BadRecord) -> None:
        delivery = found.delivery
        place = f"{delivery.topic}/{delivery.partition}/{delivery.offset}"
        letter = DeadLetter(
            consumer=self.consumer,
            id=uuid5(NAMESPACE_URL, f"foldbus:{place}"),
            topic=delivery.topic,
            partition=delivery.partition,
            offset=delivery.offset,
            key=delivery.key,
            value=delivery.value,
            headers=delivery.headers,
            failure=self._failure(found.error, 1, ""),
        )
        copy = Envelope(
            id=letter.id,
            kind=Kind.EVENT,
            type=f"{self._store.service}.undecodable.v1",
            source=self._store.service,
            key=place,
            data=(delivery.value or b"")[:_COPY_MAX],
            time=self._clock.now(),
            correlation_id=letter.id,
        )
        await self._commit(letter, place, copy)

    async def _commit(self, letter: DeadLetter, key: str, what: Envelope) -> None:
        failure = letter.failure
        facts = {
            "topic": letter.topic,
            "partition": str(letter.partition),
            "offset": str(letter.offset),
            "consumer": letter.consumer,
            "attempts": str(failure.attempts),
            "error": failure.error,
            "message": failure.message,
            "failed-at": failure.failed_at.isoformat(),
        }
        copy = replace(
            what,
            id=uuid5(letter.id, f"dead-letter:{self.consumer}"),
            topic=f"{self._store.service}.dlq",
            stream=None,
            version=None,
            position=None,
            reply_to=None,
            causation_id=letter.id,
            headers={**what.headers, **{f"x-dlq-{name}": value for name, value in facts.items()}},
        )
        claim = Claim(self.consumer, letter.id, key, state=ClaimState.DEAD)
        (outcome,) = await self._store.commit([Unit(claim=claim, outgoing=(copy,), dead_letter=letter)])
        if outcome.verdict is Verdict.COMMITTED:
            self._metrics.count("foldbus_dead_letters_total", consumer=self.consumer, error=failure.error)
            log.error(
                "%s: dead letter %s from %s[%s]@%s: %s: %s",
                self.consumer, letter.id, letter.topic, letter.partition, letter.offset, failure.error, failure.message,
            )  # fmt: skip
        elif outcome.verdict is not Verdict.DUPLICATE:
            raise StoreUnavailable(f"{self.consumer}: dead letter {letter.id} was answered {outcome.verdict.value}")

    def _failure(self, error: Exception, attempts: int, stack: str) -> Failure:
        now: datetime = self._clock.now()
        return Failure(type(error).__qualname__, _clean(str(error)), _clean(stack), attempts, now, now)


def _clean(text: str) -> str:
    """Bounded, without what databases and headers cannot hold; of a long stack the end tells most."""
    short = text if len(text) <= _TEXT_MAX else "…" + text[-_TEXT_MAX:]
    return short.replace("\x00", "\N{SYMBOL FOR NULL}").encode(errors="replace").decode()
