"""Dead letters of a projection: committed through the store before the checkpoint moves past them.

The claim makes a second one of the same message do nothing, so a crash between the two repeats it harmlessly; the copy
for the `.dlq` topic goes with the first one only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Protocol

from bus.envelope import Failure
from bus.metrics import Metrics
from bus.seams import Clock
from bus.transport import TopicSpec
from eventstore.errors import StoreUnavailable
from eventstore.letters import DeadLetters
from eventstore.port import Outcome, Unit, Verdict
from projections.folding import Unfolded
from projections.port import LOG, BadRecord

_TEXT_MAX = 4_000


class Committing(Protocol):
    """What is needed of the store."""

    @property
    def service(self) -> str: ...

    async def commit(self, units: Sequence[Unit]) -> Sequence[Outcome]: ...


class Letters:
    """`consumer` is `<service>.projection.<name>`."""

    def __init__(self, store: Committing, projection: str, *, clock: Clock, metrics: Metrics) -> None:
        self.consumer = f"{store.service}.projection.{projection}"
        self._store, self._clock = store, clock
        self._letters = DeadLetters(
            store.service, self.consumer, clock=clock, metrics=metrics, max_bytes=TopicSpec("").max_bytes
        )

    async def unfolded(self, failed: Unfolded) -> None:
        failure = self._failure(failed.error, failed.attempts, failed.stack)
        record = failed.record
        envelope = record.envelope if record.stored is None else replace(record.stored, id=record.envelope.id)
        await self._commit(self._letters.of_message(envelope, failure, delivery=record.delivery, source=LOG))

    async def bad(self, found: BadRecord) -> None:
        await self._commit(self._letters.of_record(found.delivery, self._failure(found.error, 1, "")))

    async def _commit(self, unit: Unit) -> None:
        (outcome,) = await self._store.commit([unit])
        self._letters.report(unit, outcome)
        if outcome.verdict not in (Verdict.COMMITTED, Verdict.DUPLICATE):
            raise StoreUnavailable(f"{self.consumer}: a dead letter was answered {outcome.verdict.value}")

    def _failure(self, error: Exception, attempts: int, stack: str) -> Failure:
        now: datetime = self._clock.now()
        return Failure(type(error).__qualname__, _clean(str(error)), _clean(stack), attempts, now, now)


def _clean(text: str) -> str:
    """Bounded, without what databases and headers cannot hold; of a long stack the end tells most."""
    short = text if len(text) <= _TEXT_MAX else "…" + text[-_TEXT_MAX:]
    return short.replace("\x00", "\N{SYMBOL FOR NULL}").encode(errors="replace").decode()
