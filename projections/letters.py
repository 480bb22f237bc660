"""Dead letters of a projection: committed through the store before the checkpoint moves past them.

The claim makes a second one of the same message do nothing, so a crash between the two repeats it harmlessly. Each
generation has claims of its own: they tell which events it could not fold. A letter is settled once a generation serves
that went past its event without giving it up.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Protocol
from uuid import UUID

from bus.envelope import Failure
from bus.metrics import Metrics
from bus.seams import Clock
from bus.transport import TopicSpec
from eventstore.errors import StoreUnavailable
from eventstore.letters import DeadLetters
from eventstore.port import (
    ClaimState,
    DeadLetter,
    LetterWhere,
    Outcome,
    Settled,
    Settlement,
    Settling,
    Standing,
    Unit,
    Verdict,
)
from eventstore.port import Letters as StoredLetters
from projections.folding import Unfolded
from projections.port import LOG, BadRecord, Checkpoint, Place

log = logging.getLogger("foldbus.projections")

_TEXT_MAX = 4_000


class Committing(Protocol):
    """What is needed of the store."""

    @property
    def service(self) -> str: ...

    @property
    def letters(self) -> StoredLetters: ...

    async def commit(self, units: Sequence[Unit]) -> Sequence[Outcome]: ...

    async def examine(self, consumer: str, ids: Sequence[tuple[UUID, str]]) -> Sequence[Standing]: ...


class Letters:
    """`consumer` is `<service>.projection.<name>`; the claims of later generations than the first add their number."""

    def __init__(
        self, store: Committing, projection: str, *, generation: int = 1, clock: Clock, metrics: Metrics
    ) -> None:
        self.consumer = f"{store.service}.projection.{projection}"
        self._claims = self.consumer if generation == 1 else f"{self.consumer}#{generation}"
        self._generation = generation
        self._store, self._clock, self._metrics = store, clock, metrics
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

    async def settle(self, checkpoint: Checkpoint) -> int:
        """Settles letters whose events this generation, which serves, went past without giving them up itself. May be
        repeated, and by two at once."""
        settled, after = 0, None
        while page := await self._store.letters.page(LetterWhere(consumer=self.consumer), after=after):
            standings = await self._store.examine(self._claims, [(one.letter.id, "") for one in page])
            for one, standing in zip(page, standings, strict=True):
                if standing.state is ClaimState.NEW and _passed(one.letter, checkpoint):
                    reason = f"generation {self._generation} folded it"
                    settlement = Settlement(Settled.FOLDED, self._clock.now(), self.consumer, reason)
                    if await self._store.letters.settle(one.letter, settlement) is Settling.SETTLED:
                        settled += 1
                        log.info("%s: the dead letter %s is settled: %s", self.consumer, one.letter.id, reason)
            after = page[-1]
        if settled:
            self._metrics.count("foldbus_letters_folded_total", settled, consumer=self.consumer)
        return settled

    async def _commit(self, unit: Unit) -> None:
        assert unit.claim is not None
        unit = replace(unit, claim=replace(unit.claim, consumer=self._claims))
        (outcome,) = await self._store.commit([unit])
        self._letters.report(unit, outcome)
        if outcome.verdict not in (Verdict.COMMITTED, Verdict.DUPLICATE):
            raise StoreUnavailable(f"{self.consumer}: a dead letter was answered {outcome.verdict.value}")

    def _failure(self, error: Exception, attempts: int, stack: str) -> Failure:
        now: datetime = self._clock.now()
        return Failure(type(error).__qualname__, _clean(str(error)), _clean(stack), attempts, now, now)


def _passed(letter: DeadLetter, checkpoint: Checkpoint) -> bool:
    """A place in the log is the last position seen, one in a topic the next offset to read."""
    if letter.topic == LOG:
        return letter.offset <= checkpoint.places.get((LOG, 0), Place()).offset
    return letter.offset < checkpoint.places.get((letter.topic, letter.partition), Place()).offset


def _clean(text: str) -> str:
    """Bounded, without what databases and headers cannot hold; of a long stack the end tells most."""
    short = text if len(text) <= _TEXT_MAX else "…" + text[-_TEXT_MAX:]
    return short.replace("\x00", "\N{SYMBOL FOR NULL}").encode(errors="replace").decode()
