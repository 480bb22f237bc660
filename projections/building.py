"""Moving one generation on, page by page: read, fold, dead letters, save. Shared by the runner and by rebuilds."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol

from bus.codec import Codec
from bus.metrics import MemoryMetrics, Metrics
from bus.seams import Clock, Failpoint, NoFailpoints, SystemClock
from eventstore.errors import StoreUnavailable
from eventstore.port import Leases
from projections.definition import Projection
from projections.errors import RebuildStopped
from projections.folding import Folder, Unfolded
from projections.letters import Committing, Letters
from projections.port import LOG, Checkpoint, Feed, FeedFactory, FeedPage, Place, Row, Rows

log = logging.getLogger("foldbus.projections")


@dataclass(frozen=True, slots=True)
class ProjectionSettings:
    """`page` events per read and save, per source. `attempts` per event before it is given up. `hold_s` bounds how long
    the serving generation stands still for a swap; `poll_s` how long a read waits when there is nothing."""

    page: int = 500
    attempts: int = 3
    cache_rows: int = 20_000
    poll_s: float = 1.0
    hold_s: float = 5.0
    lease_ttl_s: float = 10.0
    backoff_s: float = 0.1
    backoff_max_s: float = 5.0


class Home(Committing, Protocol):
    """What a projection needs of its service's store, beside the feed's part."""

    @property
    def leases(self) -> Leases: ...


@dataclass(frozen=True)
class Workshop(Generic[Row]):
    """Everything that it takes to run, rebuild and verify one projection; put together once by the composition root.

    `open_feed` gives each reader a feed of its own (see `feeds.open_feed`).
    """

    projection: Projection[Row]
    store: Home
    rows: Rows[Row]
    open_feed: FeedFactory
    codec: Codec
    clock: Clock = field(default_factory=SystemClock)
    metrics: Metrics = field(default_factory=MemoryMetrics)
    failpoint: Failpoint = field(default_factory=NoFailpoints)
    settings: ProjectionSettings = field(default_factory=ProjectionSettings)

    def lease(self, generation: int) -> str:
        """One leader per generation (and shard of rows, of which there is one)."""
        return f"projection:{self.projection.name}:{generation}:0"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a build is: `done` of `total` in positions and offsets, `rate` per second since this run began, `eta_s`
    None when it cannot be told yet. `swapped` on the last one of a rebuild."""

    generation: int
    done: int
    total: int
    rate: float
    eta_s: float | None
    swapped: bool = False


class Builder(Generic[Row]):
    """Moves one generation. Not for concurrent use; two builders of one generation fence each other."""

    def __init__(self, shop: Workshop[Row], generation: int, feed: Feed, *, stop_on_bugs: bool) -> None:
        self.generation, self.feed = generation, feed
        self.checkpoint = Checkpoint()
        self.behind = 0
        self._shop, self._stop = shop, stop_on_bugs
        self._folder = Folder(
            shop.projection, shop.codec, attempts=shop.settings.attempts, cache_rows=shop.settings.cache_rows
        )
        self._letters = Letters(
            shop.store, shop.projection.name, generation=generation, clock=shop.clock, metrics=shop.metrics
        )

    async def reload(self) -> None:
        """Forget everything, start from what is stored. Raises Fenced when the generation is gone."""
        self._folder.forget()
        self.checkpoint = await self._shop.rows.checkpoint(self.generation)

    async def step(self, *, timeout_s: float) -> FeedPage:
        """One page. Raises Fenced when another one saved, RebuildStopped, and what feed and rows raise; after any error
        the next call must be to `reload`."""
        shop, old = self._shop, self.checkpoint
        page = await self.feed.read(old, limit=shop.settings.page, timeout_s=timeout_s)
        self.behind = page.behind
        if page.checkpoint.places == old.places:
            return page
        folded = await self._folder.fold(page, self._load)
        self._count("foldbus_projection_retries_total", folded.retries)
        self._count("foldbus_projection_skipped_total", folded.keyless, reason="no-row")
        self._count("foldbus_projection_skipped_total", folded.dropped, reason="dropped")
        self._count("foldbus_projection_skipped_total", folded.parts_skipped, reason="part")
        for bad in page.bad:
            await self._letters.bad(bad)
        for failed in folded.failures:
            if failed.bug and self._stop:
                raise self._stopped(failed) from failed.error
            await self._letters.unfolded(failed)
        shop.failpoint.hit("before-projection-save")
        await shop.rows.save(self.generation, folded.rows, old=old, new=page.checkpoint)
        self.checkpoint = Checkpoint(page.checkpoint.places, old.revision + 1)
        self._folder.keep(folded.rows)
        shop.failpoint.hit("after-projection-save")
        self._count("foldbus_projection_events_total", folded.events)
        shop.metrics.gauge(
            "foldbus_projection_behind", page.behind,
            projection=shop.projection.name, generation=str(self.generation),
        )  # fmt: skip
        return page

    async def settle_letters(self) -> None:
        """For the generation that serves: dead letters of events that it folded are settled, see `Letters.settle`. What
        cannot be settled now is when the generation is next followed."""
        try:
            await self._letters.settle(self.checkpoint)
        except StoreUnavailable as error:
            log.warning("%s: dead letters are settled later: %s", self._shop.projection.name, error)

    def done(self) -> int:
        return sum(place.offset for place in self.checkpoint.places.values())

    async def _load(self, keys: Collection[str]) -> Mapping[str, Row]:
        return await self._shop.rows.load(self.generation, keys)

    def _stopped(self, failed: Unfolded) -> RebuildStopped:
        envelope, delivery = failed.record.envelope, failed.record.delivery
        where = (
            f"{LOG} position {envelope.position}"
            if delivery is None
            else f"{delivery.topic}[{delivery.partition}] offset {delivery.offset}"
        )
        event = f"{envelope.type} {envelope.id} (key {envelope.key!r}, {where})"
        why = f"{type(failed.error).__qualname__}: {failed.error}"
        return RebuildStopped(self._shop.projection.name, self.generation, event, why)

    def _count(self, name: str, n: int, **labels: str) -> None:
        if n:
            self._shop.metrics.count(name, n, projection=self._shop.projection.name, **labels)


def reached(checkpoint: Checkpoint, target: Checkpoint, feed: Feed) -> bool:
    """Has `checkpoint` seen all that `target` has, as far as `feed` can tell?"""
    return all(
        checkpoint.places.get(where, Place()).reached(place)
        for where, place in target.places.items()
        if where[0] in feed.sources
    )


__all__ = ["Builder", "Home", "Progress", "ProjectionSettings", "Workshop", "reached"]
