"""The states that a processor decides on: from its cache, or from a snapshot and the events after it.

A state is taken out while a batch works on it, and put back when its commit won: nothing half-done is ever seen. One
that lost to another writer goes back as it was, to be brought up to date by the events it lacks, unless somebody might
have changed it in place: then it is forgotten, and loaded.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from bus.envelope import Envelope, StreamId, Version
from bus.metrics import Metrics
from bus.seams import Clock
from eventstore.behaviour import Behaviour, FoldsBodies
from eventstore.errors import EventStoreError
from eventstore.loading import Folded, load_folded
from eventstore.port import Bodies, Slice, Store, Wanted
from eventstore.snapshots import UnreadableSnapshot
from foldbus.snapshotting import Snapshotter

log = logging.getLogger("foldbus.runtime")

EVENTS_OF_ONE_MAX = 1_000
"""A stream weighs as many events as it has, at most so many: the state of a long one is rarely as long."""

Known = tuple[Version, Any]


@dataclass(frozen=True, slots=True)
class Cached:
    """`stale`: somebody else is known to have appended since."""

    version: Version
    state: Any
    stale: bool = False

    @property
    def weight(self) -> int:
        return 1 + min(self.version, EVENTS_OF_ONE_MAX)


class StateCache:
    """Folded states of the streams touched last, bounded by their count and by the events that they hold."""

    def __init__(self, size: int, *, events: int = 2_000_000) -> None:
        self._size, self._events_max = size, events
        self._events = 0
        self._states: OrderedDict[StreamId, Cached] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def take(self, stream: StreamId) -> Cached | None:
        found = self._states.pop(stream, None)
        if found is not None:
            self._events -= found.weight
        return found

    def put(self, stream: StreamId, version: Version, state: Any, *, stale: bool = False) -> None:
        """Does nothing when a later version is there already: another batch of this process was quicker."""
        there = self._states.get(stream)
        if there is not None and there.version > version:
            return
        self.take(stream)
        cached = Cached(version, state, stale)
        self._states[stream] = cached
        self._events += cached.weight
        while len(self._states) > self._size or self._events > self._events_max:
            _, gone = self._states.popitem(last=False)
            self._events -= gone.weight

    def clear(self) -> None:
        self._states.clear()
        self._events = 0


class _Anew(EventStoreError):
    """What is cached is ahead of the stream: the database is an older one."""


class States:
    """Of one processor; any number of its batches at once. Without `snapshots` streams are folded from their first
    event."""

    def __init__(
        self,
        behaviour: Behaviour[Any],
        store: Store,
        *,
        clock: Clock,
        metrics: Metrics,
        cache_size: int,
        snapshots: Snapshotter | None = None,
    ) -> None:
        self._behaviour, self._store, self._clock, self._metrics = behaviour, store, clock, metrics
        self._cache = StateCache(cache_size)
        self._snapshots = snapshots

    async def load(self, wanted: Mapping[StreamId, bool]) -> dict[StreamId, Known | Exception]:
        """Version and state of each, or what keeps it from being folded. True: somebody else may have appended, so the
        database is asked even if the state is at hand."""
        answers: dict[StreamId, Known | Exception] = {}
        asked: list[Wanted] = []
        cached: dict[StreamId, Cached] = {}
        for stream, moved in wanted.items():
            known = self._cache.take(stream)
            if known is None:
                asked.append(
                    Wanted(stream, snapshot_schema=self._snapshots.schema(stream) if self._snapshots else None)
                )
            elif moved or known.stale:
                cached[stream] = known
                asked.append(Wanted(stream, after=known.version))
            else:
                answers[stream] = (known.version, known.state)
        if asked:
            found = await self._fold(asked, cached)
            anew: list[Wanted] = []
            for stream, one in found.items():
                if isinstance(one, (UnreadableSnapshot, _Anew)):
                    self._metrics.count("foldbus_states_anew_total", why=type(one).__name__.strip("_"))
                    log.warning("%s is folded from its first event: %s", stream, one)
                    anew.append(Wanted(stream))
            if anew:
                found.update(await self._fold(anew, {}))
            for stream, one in found.items():
                answers[stream] = (one.version, one.state) if isinstance(one, Folded) else one
        return answers

    async def _fold(
        self, asked: Sequence[Wanted], cached: Mapping[StreamId, Cached]
    ) -> dict[StreamId, Folded[Any] | Exception]:
        behaviour, snapshots, clock = self._behaviour, self._snapshots, self._clock
        spent: dict[StreamId, float] = {}

        def begin(part: Slice) -> Any:
            known = cached.get(part.stream)
            if known is not None:
                if part.version < known.version:
                    raise _Anew(f"{part.stream} is at version {part.version}, {known.version} is cached")
                self._metrics.count("foldbus_states_refreshed_total")
                return known.state
            if part.snapshot is not None and snapshots is not None:
                return snapshots.revive(part.snapshot)
            return behaviour.initial(part.stream)

        def fold(state: Any, records: Sequence[Envelope]) -> Any:
            began = clock.monotonic()
            folded = behaviour.fold(state, records)
            stream = records[0].stream
            if stream is not None:
                spent[stream] = spent.get(stream, 0.0) + clock.monotonic() - began
            return folded

        def fold_bodies(state: Any, bodies: Bodies) -> Any:
            began = clock.monotonic()
            assert lean is not None
            folded = lean(state, bodies)
            spent[bodies.stream] = spent.get(bodies.stream, 0.0) + clock.monotonic() - began
            return folded

        lean: Callable[[Any, Bodies], Any] | None = None
        if isinstance(behaviour, FoldsBodies):
            lean = cast("FoldsBodies[Any]", behaviour).fold_bodies
        found = await load_folded(
            self._store, asked, begin=begin, fold=fold, fold_bodies=None if lean is None else fold_bodies
        )
        if snapshots is not None:
            for stream, one in found.items():
                if isinstance(one, Folded) and stream not in cached:
                    snapshots.loaded(one, spent.get(stream, 0.0))
        return found

    def won(self, stream: StreamId, version: Version, state: Any) -> None:
        """Everything that led to this state is committed."""
        if self._snapshots is not None:
            self._snapshots.offer(stream, version, state)
        self._cache.put(stream, version, state)

    def lost(self, stream: StreamId, before: Known | None) -> None:
        """A commit did not win. `before` is what `load` gave: still true, if nobody can have changed it in place."""
        if before is not None and self._snapshots is not None and not self._snapshots.can_change(before[1]):
            self._cache.put(stream, *before, stale=True)

    def forget(self) -> None:
        self._cache.clear()


__all__ = ["Cached", "StateCache", "States"]
