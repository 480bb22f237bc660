"""How far the relay came, written down beside the publishing.

A mark is a transaction, and so is pruning: page by page they would cost as much as the publishing. So one of them at a
time runs beside it, every `mark_s` at most, and says how far everything is published by then. Who dies loses nothing
but the knowledge: its successor publishes what came after the last mark once more.
"""

from __future__ import annotations

import asyncio
import logging

from bus.envelope import Position
from bus.errors import FoldbusError
from bus.seams import Clock, Failpoint
from eventstore.port import Lease, Store

log = logging.getLogger("foldbus.relay")

LAST_S = 2.0
"""How long a relay that is stopped may take for its last mark."""


class Marks:
    """Of one leadership. For one task."""

    def __init__(
        self,
        store: Store,
        lease: Lease,
        *,
        clock: Clock,
        failpoint: Failpoint,
        mark_s: float,
        unmarked_max: int,
        prune_every: int,
        prune_s: float,
    ) -> None:
        self.marked = lease.position
        self._store, self._lease, self._clock, self._failpoint = store, lease, clock, failpoint
        self._mark_s, self._unmarked_max, self._prune_every, self._prune_s = mark_s, unmarked_max, prune_every, prune_s
        self._reached = lease.position
        self._above = 0  # records published and not marked
        self._began = self._looked = clock.monotonic() - max(mark_s, prune_s)
        self._pruned: Position = 0
        self._job: asyncio.Task[None] | None = None

    def reached(self, position: Position, records: int) -> None:
        """Everything at or below is published for certain; `records` more than before went out."""
        self._reached = max(self._reached, position)
        self._above += records

    def due_in_s(self) -> float:
        """When `turn` wants to be called again, at the latest."""
        if self._reached > self.marked:
            return max(0.0, self._began + self._mark_s - self._clock.monotonic())
        if self.marked > self._pruned:
            return max(0.0, self._looked + self._prune_s - self._clock.monotonic())
        return float("inf")

    async def turn(self) -> None:
        """Begins a mark if one is due, and does not wait for it unless too much is published above the last one.
        Raises what a mark raised: Fenced, StoreUnavailable."""
        if self._job is not None and (self._job.done() or self._full):
            await self._ended()
        if self._job is None and self._reached > self.marked and (self._full or self.due_in_s() <= 0):
            self._begin()
            if self._full:
                await self._ended()

    async def idle(self) -> None:
        """There is nothing to publish: time to wait for what is under way, and to prune."""
        await self._ended()
        if self.marked > self._pruned and self._clock.monotonic() - self._looked >= self._prune_s:
            await self._prune(self.marked)

    async def last(self) -> None:
        """When the relay is stopped: marks what is published, unless that takes long. Raises nothing of it."""
        try:
            async with asyncio.timeout(LAST_S):
                await self._ended()
                if self._reached > self.marked:
                    await self._write(self.marked, self._reached, self._above)
        except (FoldbusError, TimeoutError) as error:
            log.warning("relay: the last mark failed, its successor publishes some records again: %s", error)

    async def close(self) -> None:
        job, self._job = self._job, None
        if job is not None:
            job.cancel()
            await asyncio.gather(job, return_exceptions=True)

    @property
    def _full(self) -> bool:
        return self._above >= self._unmarked_max

    def _begin(self) -> None:
        self._began = self._clock.monotonic()
        self._job = asyncio.create_task(self._write(self.marked, self._reached, self._above), name="relay mark")

    async def _ended(self) -> None:
        job = self._job
        if job is not None:
            try:
                await asyncio.shield(job)
            finally:
                if job.done():
                    self._job = None

    async def _write(self, old: Position, new: Position, records: int) -> None:
        self._failpoint.hit("before-mark")
        await self._store.leases.mark(self._lease, old=old, new=new)
        self._failpoint.hit("after-mark")
        self.marked = new
        self._above -= records
        if new - self._pruned >= self._prune_every:
            await self._prune(new)

    async def _prune(self, upto: Position) -> None:
        self._looked, self._pruned = self._clock.monotonic(), upto
        await self._store.forget_outgoing(upto=upto)
