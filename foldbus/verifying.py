"""`verify` of a service's store: what the store can say of itself, and what only the service's code can tell."""

from __future__ import annotations

import heapq
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bus.metrics import MemoryMetrics
from bus.seams import Clock, SystemClock, Uuid7Ids
from eventstore import verify as stored
from eventstore.decider import Decider
from eventstore.errors import NoSuchVersion, StreamArchived, StreamTruncated
from eventstore.port import Snapshot, Store
from eventstore.repository import compare_snapshot
from eventstore.verify import SHOWN_MAX, Damage
from foldbus.backends import open_store
from foldbus.moving import open_source
from foldbus.service import Service
from foldbus.views import all_projections
from projections import LOG, Status, rows_for

SNAPSHOTS = "snapshots equal full folds"
CHECKPOINTS = "projections are not ahead"
SAMPLE = 100
_PAGE = 500


@dataclass(frozen=True, slots=True)
class Verified:
    """`damages` is empty when nothing is wrong. `compared`: how many snapshots were folded anew, of `snapshots`."""

    service: str
    head: int
    counts: dict[str, int]
    checks: tuple[str, ...]
    damages: tuple[Damage, ...]
    snapshots: int = 0
    compared: int = 0


@dataclass(slots=True)
class _Found:
    totals: Counter[str] = field(default_factory=Counter[str])
    shown: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def add(self, check: str, what: str) -> None:
        self.totals[check] += 1
        shown = self.shown.setdefault(check, [])
        if len(shown) < SHOWN_MAX:
            shown.append(what)

    def damages(self) -> list[Damage]:
        return [Damage(check, self.totals[check], tuple(texts)) for check, texts in self.shown.items()]


async def verify_store(
    url: str,
    name: str,
    *,
    service: Service | None = None,
    full: bool = False,
    clock: Clock | None = None,
    told: Callable[[int, int], None] | None = None,
) -> Verified:
    """Changes nothing, and may run beside workers: each part is read in an order in which it can only be right.

    With `service` snapshots are compared with full folds (`full`: all, otherwise at most SAMPLE of them), and the
    checkpoints of its projections over its own log with the log. `full` also reads every stored document.
    """
    found = _Found()
    checks = [*stored.CHECKS, *([stored.DOCUMENTS] if full else [])]
    snapshots = compared = 0
    clock = clock or SystemClock()
    if service is not None:
        checks += [CHECKPOINTS, SNAPSHOTS]
        async with open_store(url, name, clock=clock, ids=Uuid7Ids(), metrics=MemoryMetrics(), migrate=False) as store:
            await _checkpoints(store, service, clock, found)
            snapshots, compared = await _snapshots(store, service, found, full=full)
    async with open_source(url, name, online=True) as source:
        damages = await stored.verify(source, documents=full, told=told)
        header = await source.header()
    return Verified(
        name, header.head, dict(header.counts), tuple(checks), (*damages, *found.damages()), snapshots, compared
    )


async def _checkpoints(store: Store, service: Service, clock: Clock, found: _Found) -> None:
    """A checkpoint first, the head after it: both only grow."""
    for projection in all_projections(service):
        rows = rows_for(store, projection, clock=clock)
        for generation in await rows.generations():
            if generation.status is Status.DROPPED:
                continue
            places = (await rows.checkpoint(generation.number)).places
            head = await store.head()
            for (source, _), place in places.items():
                if source == LOG and max(place.offset, place.position) > head:
                    found.add(
                        CHECKPOINTS,
                        f"{projection.name}, generation {generation.number}: at {place.offset} of the log, which ends "
                        f"at {head}",
                    )


async def _snapshots(store: Store, service: Service, found: _Found, *, full: bool) -> tuple[int, int]:
    """How many there are, and how many were compared. A snapshot first, its stream after it: that only grows."""
    deciders = {decider.category: decider for decider in service.deciders}
    sample: list[tuple[int, int, Snapshot]] = []
    seen = compared = 0
    after = None
    while page := await store.snapshots.page(after=after, limit=_PAGE):
        after = page[-1].stream
        for snapshot in page:
            if snapshot.stream.category not in deciders:
                continue
            seen += 1
            if full:
                compared += await _compare(store, service, deciders[snapshot.stream.category], snapshot, found)
            else:
                # Chosen by name: spread evenly, and the same ones each time, so that a finding can be found again.
                rank = -zlib.crc32(f"{snapshot.stream.category} {snapshot.stream.id}".encode())
                (heapq.heappush if len(sample) < SAMPLE else heapq.heappushpop)(sample, (rank, seen, snapshot))
    for _, _, snapshot in sample:
        compared += await _compare(store, service, deciders[snapshot.stream.category], snapshot, found)
    return seen, compared


async def _compare(
    store: Store, service: Service, decider: Decider[Any, Any, Any], snapshot: Snapshot, found: _Found
) -> bool:
    try:
        difference = await compare_snapshot(store, decider, service.codec, snapshot)
    except (StreamTruncated, StreamArchived):
        return False  # its events are gone: it is all that there is
    except NoSuchVersion as error:
        found.add(SNAPSHOTS, f"{snapshot.stream}: {error}")
        return True
    if difference is not None:
        found.add(SNAPSHOTS, f"{snapshot.stream} at version {snapshot.version}: {difference.why}")
    return True


__all__ = ["CHECKPOINTS", "SAMPLE", "SNAPSHOTS", "Verified", "verify_store"]
