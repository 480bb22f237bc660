"""Snapshots of a service's aggregates: read with the events after them, and saved aside, after the commit.

A save never holds up a message and never fails one: it goes on in one task of its own, bounded in streams and bytes.
What is lost on the way (a full queue, a database that does not answer, the end of the process) costs a slower load.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from bus.envelope import StreamId, Version
from bus.metrics import Metrics
from bus.seams import Clock
from eventstore.decider import Aggregate, Decider
from eventstore.loading import Folded
from eventstore.port import Snapshot, Store
from eventstore.snapshots import UnfitState, is_value

log = logging.getLogger("foldbus.runtime")

PENDING_MAX, PENDING_BYTES_MAX = 256, 32 * 2**20
"""So many streams wait to be saved, at most, and so many bytes."""
STATE_BYTES_MAX = 8 * 2**20
_TOGETHER = 64
_STREAMS_KNOWN = 20_000


class Snapshotter:
    """Of all deciders of one connection. Those whose state cannot be stored are named in the log once, here."""

    def __init__(
        self, deciders: Sequence[Decider[Any, Any, Any]], store: Store, *, clock: Clock, metrics: Metrics
    ) -> None:
        self._store, self._clock, self._metrics = store, clock, metrics
        self._deciders: dict[str, Decider[Any, Any, Any]] = {}
        self._since: OrderedDict[StreamId, tuple[Version, float]] = OrderedDict()
        """Of streams loaded here: the version of the last snapshot, and how long it took to fold what came after it."""
        self._pending: OrderedDict[StreamId, Snapshot] = OrderedDict()
        self._pending_bytes = 0
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        for decider in deciders:
            if decider.snapshots is not None:
                self._deciders[decider.category] = decider
                try:
                    decider.state_codec()
                except UnfitState as error:
                    self._switch_off(decider, error)

    # --- loading ----------------------------------------------------------------------------------------------------

    def schema(self, stream: StreamId) -> str | None:
        """Of the snapshots to load with `stream`; None: load none."""
        decider = self._deciders.get(stream.category)
        return None if decider is None else decider.state_codec().schema

    def revive(self, snapshot: Snapshot) -> Aggregate:
        """Raises UnreadableSnapshot."""
        decider = self._deciders[snapshot.stream.category]
        return Aggregate(decider, decider.state_codec().load(snapshot.state))

    def loaded(self, folded: Folded[Any], load_s: float) -> None:
        """A stream was loaded from its snapshot or from its beginning; folding took `load_s`."""
        if folded.stream.category in self._deciders:
            self._remember(folded.stream, folded.snapshot_version or 0, load_s)

    def can_change(self, state: Any) -> bool:
        """Might deciding or folding have changed it in place?"""
        return not (isinstance(state, Aggregate) and is_value(state.state))

    # --- saving -----------------------------------------------------------------------------------------------------

    def offer(self, stream: StreamId, version: Version, state: Any) -> None:
        """This is what the stream folds to at `version`, all of it committed. Serialised at once if a snapshot is due:
        later, somebody may change the state in place. Stored aside."""
        decider = self._deciders.get(stream.category)
        known = self._since.get(stream)
        if decider is None or decider.snapshots is None or known is None or self._closed:
            return
        at, load_s = known
        if not decider.snapshots.due(events=version - at, load_s=load_s):
            return
        self._remember(stream, version, 0.0)  # also when it is not stored: then after as many events again
        try:
            data = decider.state_codec().dump(state.state)
        except UnfitState as error:
            self._switch_off(decider, error)
            return
        waiting = self._pending.get(stream)
        self._pending_bytes += len(data) - (0 if waiting is None else len(waiting.state))
        full = waiting is None and len(self._pending) >= PENDING_MAX
        if full or len(data) > STATE_BYTES_MAX or self._pending_bytes > PENDING_BYTES_MAX:
            self._pending_bytes -= len(data) - (0 if waiting is None else len(waiting.state))
            self._metrics.count("foldbus_snapshots_skipped_total", category=decider.category)
            log.warning("no snapshot of %s at version %d: %d bytes are too many now", stream, version, len(data))
            return
        schema = decider.state_codec().schema
        self._pending[stream] = Snapshot(stream, version, schema, data, self._clock.now())
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._save_all(), name="snapshots")

    async def saved(self) -> None:
        """Returns when nothing waits to be saved. (What could not be saved does not wait.)"""
        while self._task is not None and not self._task.done():
            await asyncio.wait({self._task})

    async def close(self, *, timeout_s: float = 5.0) -> None:
        """Nothing is taken any more; what waits is saved, or dropped after `timeout_s`."""
        self._closed = True
        task = self._task
        if task is None:
            return
        try:
            await asyncio.wait({task}, timeout=timeout_s)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
                self._metrics.count("foldbus_snapshots_dropped_total")
                log.warning("snapshots were not saved within %s s, the rest is dropped", timeout_s)

    async def _save_all(self) -> None:
        """One call at a time: no stream is on its way twice."""
        while self._pending:
            batch = [self._pending.popitem(last=False)[1] for _ in range(min(_TOGETHER, len(self._pending)))]
            self._pending_bytes -= sum(len(one.state) for one in batch)
            try:
                stored = await self._store.snapshots.save(batch)
            except Exception as error:  # never anybody's failure: streams load without
                self._metrics.count("foldbus_snapshot_saves_failed_total")
                log.warning("%d snapshots were not saved: %s", len(batch), error)
                continue
            if stored:
                self._metrics.count("foldbus_snapshots_saved_total", stored)
                log.debug("%d snapshots saved", stored)
            if stored < len(batch):  # somebody else saved a newer one
                self._metrics.count("foldbus_snapshots_outdated_total", len(batch) - stored)
                log.debug("%d snapshots were outdated", len(batch) - stored)

    def _remember(self, stream: StreamId, version: Version, load_s: float) -> None:
        self._since[stream] = (version, load_s)
        self._since.move_to_end(stream)
        if len(self._since) > _STREAMS_KNOWN:
            self._since.popitem(last=False)

    def _switch_off(self, decider: Decider[Any, Any, Any], error: UnfitState) -> None:
        del self._deciders[decider.category]
        self._metrics.count("foldbus_snapshots_off_total", category=decider.category)
        log.warning("no snapshots of %r: %s (snapshots=None says so on purpose)", decider, error)


__all__ = ["Snapshotter"]
