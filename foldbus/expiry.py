"""Requests that nobody waits for any more are not begun (docs/decisions/0013).

A request names until when somebody waits for its answer. Read from its topic after that, it is skipped: nothing is
recorded of it, so that the same id sent again, with a later deadline, is handled. What was begun or answered before is
not judged here: it goes the way of any repeat.

A deadline is set by one machine's clock and read by another's. They are taken to agree within `tolerance_s`: a request
is expired when its deadline is further back than that. A clock that is further off than that is named to the one who
asks, in the answer that says "expired".
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta

from bus.codec import expired_reply
from bus.envelope import Envelope, Failure, Origin
from bus.errors import BusError
from bus.metrics import Metrics
from bus.processing import Again, Answer, Done, Item, Processor, Result, Watermarks
from bus.seams import Clock, Ids
from bus.summing import Summed
from bus.transport import Delivery
from eventstore.port import ClaimState, Store
from foldbus.outbox import Publisher

log = logging.getLogger("foldbus.worker")

TOLERANCE_S = 5.0
_TELL_S = 2.0
"""Saying "expired" holds up nothing for longer: it is a courtesy."""


def how_late(envelope: Envelope, now: datetime, *, tolerance_s: float) -> float | None:
    """By how much a request has expired, in seconds; None: somebody may still wait for it."""
    if envelope.deadline is None:
        return None
    late_s = (now - envelope.deadline).total_seconds()
    return late_s if late_s > tolerance_s else None


class ExpiringProcessor:
    """Implements `bus.processing.Processor` around the processor of a service's commands."""

    def __init__(
        self,
        inner: Processor,
        *,
        service: str,
        store: Store,
        publisher: Publisher,
        clock: Clock,
        ids: Ids,
        metrics: Metrics,
        tolerance_s: float,
    ) -> None:
        self.inner, self.group = inner, inner.group
        self._service, self._store, self._publisher, self._ids = service, store, publisher, ids
        self._clock, self._metrics, self._tolerance_s = clock, metrics, tolerance_s
        self._summed = Summed(clock)

    def wants(self, type_name: str) -> bool:
        return self.inner.wants(type_name)

    async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Answer]:
        late = self._late(batch)
        skipped = await self._unknown(late) if late else []
        if not skipped:
            return await self.inner.process(batch, watermarks)
        skip = set(map(id, skipped))
        rest = [item for item in batch if id(item) not in skip]
        answers = iter(await self.inner.process(rest, watermarks))
        results: list[Answer] = []
        waiting: set[str] = set()
        for item in batch:
            if id(item) in skip:  # nothing is done behind what is not done: then it is skipped the next time
                result: Answer = Again() if item.envelope.key in waiting else Done()
            else:
                result = next(answers)
            if not isinstance(result, Done):
                waiting.add(item.envelope.key)
            results.append(result)
        answered = zip(batch, results, strict=True)
        await self._tell([item for item, result in answered if id(item) in skip and isinstance(result, Done)])
        return results

    def _late(self, batch: Sequence[Item]) -> list[Item]:
        """Expired requests as they come from their topic. What comes from a queue in the database or by a redrive was
        taken up once, and what has failed goes where failures go."""
        now = self._clock.now()
        return [
            item
            for item in batch
            if item.envelope.deadline is not None
            and item.envelope.undoes is None
            and item.attempts == 0
            and item.parked is None
            and item.delivery is not None
            and item.delivery.partition >= 0
            and how_late(item.envelope, now, tolerance_s=self._tolerance_s) is not None
            and not self._perhaps_answered(item.envelope)
        ]

    def _perhaps_answered(self, envelope: Envelope) -> bool:
        """Was it sent before this database came back from a backup? Then it may have been handled and answered by what
        is lost, and is handled again: an answer is a promise."""
        since = self._store.epoch_since
        return since is not None and envelope.time <= since + timedelta(seconds=self._tolerance_s)

    async def _unknown(self, late: Sequence[Item]) -> list[Item]:
        """Those of which nothing is known. One of a key that is parked would only wait there for nobody."""
        asked = [(item.envelope.id, item.envelope.key) for item in late]
        standings = await self._store.examine(self.group, asked)
        unknown = (ClaimState.NEW, ClaimState.KEY_PARKED)
        return [item for item, standing in zip(late, standings, strict=True) if standing.state in unknown]

    async def _tell(self, skipped: Sequence[Item]) -> None:
        if not skipped:
            return
        now = self._clock.now()
        replies: list[Envelope] = []
        self._metrics.count("foldbus_expired_requests_total", len(skipped), consumer=self.group)
        for item in skipped:
            envelope = item.envelope
            late_s = how_late(envelope, now, tolerance_s=self._tolerance_s) or 0.0
            log.debug("%s: %s %s is skipped, it expired %.3f s ago", self.group, envelope.type, envelope.id, late_s)
            self._summed.add("requests")
            if envelope.reply_to is not None:
                why = (
                    f"{self.group!r} skipped it: it had expired {late_s:.3f} s before, by the clock there; is the "
                    "service behind, or are the clocks apart?"
                )
                origin = Origin(
                    self._service, self._ids.new(), now, envelope.correlation_id, envelope.id, envelope.tenant
                )
                replies.append(expired_reply(envelope, why, origin))
        for kind, n in self._summed.due().items():
            log.warning("%s: skipped %d %s that had expired", self.group, n, kind)
        try:
            async with asyncio.timeout(_TELL_S):
                told = await asyncio.gather(*map(self._publisher.publish, replies), return_exceptions=True)
        except TimeoutError:
            told = [TimeoutError()]
        for error in {type(one): one for one in told if isinstance(one, BaseException)}.values():
            if not isinstance(error, (BusError, TimeoutError)):
                raise error
            log.info("%s: those who asked are not told: %s: %s", self.group, type(error).__name__, error)

    # --- the rest of a processor ------------------------------------------------------------------------------------

    async def give_up(self, item: Item, failure: Failure) -> Result:
        return await self.inner.give_up(item, failure)

    async def give_up_raw(self, delivery: Delivery, failure: Failure) -> None:
        await self.inner.give_up_raw(delivery, failure)

    async def stored_watermarks(self) -> Watermarks:
        return await self.inner.stored_watermarks()

    async def store_watermarks(self, watermarks: Watermarks) -> None:
        await self.inner.store_watermarks(watermarks)

    def forget(self, topics: Collection[tuple[str, int]]) -> None:
        self.inner.forget(topics)


__all__ = ["TOLERANCE_S", "ExpiringProcessor", "how_late"]
