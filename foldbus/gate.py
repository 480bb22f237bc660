"""Before each engine: it runs while nobody has paused its group. What operators do is in `flow.py`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any

from bus.metrics import Metrics
from eventstore.flow import Pause
from eventstore.port import Store

log = logging.getLogger("foldbus.flow")


class Gate:
    """Which groups of this worker are paused, as of the last `look`. Until the first one none may begin."""

    def __init__(self, store: Store, groups: Collection[str], *, metrics: Metrics) -> None:
        self._store, self._groups, self._metrics = store, frozenset(groups), metrics
        self.paused: Mapping[str, Pause] = {}
        self._known = self._closed = False
        self._changed = asyncio.Event()

    async def look(self) -> None:
        """Raises StoreUnavailable; then all stays as it was."""
        found = {group: one for group, one in (await self._store.flow.paused()).items() if group in self._groups}
        if self._known and found == self.paused:
            return
        for group in found.keys() - self.paused.keys():
            pause = found[group]
            log.warning("%s is paused (by %s, %s): %s", group, pause.by, pause.at.isoformat(), pause.reason or "-")
        for group in self.paused.keys() - found.keys():
            log.warning("%s is resumed", group)
        self.paused, self._known = found, True
        for group in self._groups:
            self._metrics.gauge("foldbus_group_paused", float(group in found), group=group)
        self._tell()

    def close(self) -> None:
        """The worker ends: nobody waits any longer."""
        self._closed = True
        self._tell()

    async def run(self, group: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs `work` whenever `group` is not paused, until it returns by itself or the gate is closed. `work` is
        cancelled for a pause, and must finish what it has in hand then."""
        while True:
            await self._until(lambda: self._known and group not in self.paused)
            if self._is_closed():
                return
            working = asyncio.create_task(work())
            pausing = asyncio.create_task(self._until(lambda: group in self.paused))
            try:
                await asyncio.wait({working, pausing}, return_when=asyncio.FIRST_COMPLETED)
                if self._is_closed() or working.done():
                    await working
                    return
                working.cancel()
                await asyncio.wait({working})
                if not working.cancelled():
                    working.result()
                self._metrics.count("foldbus_groups_left_total", group=group)
                log.info("%s stands still", group)
            finally:  # also when we are cancelled: the work is ours to end
                pausing.cancel()
                if not working.done():
                    working.cancel()
                await asyncio.gather(working, pausing, return_exceptions=True)

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not (self._is_closed() or holds()):
            await self._changed.wait()

    def _is_closed(self) -> bool:
        return self._closed

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


__all__ = ["Gate"]
