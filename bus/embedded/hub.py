"""What changed in the file, told to the consumers of one transport that wait for it.

Own writes are told at once. Those of other processes are noticed through `PRAGMA data_version`, asked every few
milliseconds while somebody waits; one timer serves all consumers. It runs on the event loop: a thread of its own would
make the loop give up Python's global lock a few hundred times a second, and while the loop is busy nobody waits.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from bus.embedded.writer import connect, is_busy
from bus.envelope import Offset
from bus.errors import TransportUnavailable
from bus.seams import Clock
from bus.ticks import Pace

T = TypeVar("T")


class Waiting(Protocol):
    def concerns(self, lanes: set[int], groups: set[int]) -> bool:
        """Is a change of any of these worth waking up for?"""
        ...


class Hub:
    """Reads on the loop: a reader never waits for a writer, and the file's pages are in memory."""

    def __init__(self, path: Path, *, clock: Clock, rng: random.Random, deadline_s: float) -> None:
        self.path = path
        self.conn = connect(path)
        self.conn.execute("PRAGMA query_only = ON")
        self.ends: dict[int, Offset] = {}
        """Per lane the next offset to be written, as last seen; a lane without records is absent."""
        self.groups: dict[int, int] = {}
        """Per group a number that rises whenever something about its members or their shares changes."""
        self._clock, self._rng, self._deadline_s = clock, rng, deadline_s
        self._loop = asyncio.get_running_loop()
        self._seen = 0
        self._data_version = -1
        self._waiting: dict[Waiting, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._pace = Pace(self._loop.time())

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for future in self._waiting.values():
            if not future.done():
                future.set_result(None)
        self.conn.close()

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Raises TransportUnavailable when the file cannot be read within the deadline."""
        give_up_at = self._clock.monotonic() + self._deadline_s
        while True:
            try:
                return work(self.conn)
            except sqlite3.Error as error:
                if not is_busy(error) or self._clock.monotonic() > give_up_at:
                    raise TransportUnavailable(f"{self.path}: {error}") from error
            await asyncio.sleep(self._rng.uniform(0.0005, 0.0015))

    def refresh(self) -> None:
        """Looks at what changed and wakes whom it concerns. While the file is locked it does nothing and is asked
        again."""
        try:
            # Asked before the changes, so that what comes in between is noticed the next time.
            data_version = self.conn.execute("PRAGMA data_version").fetchone()[0]
            changes: list[tuple[int, int, int, int]] = self.conn.execute(
                "SELECT 0, id, next_offset, touched FROM lanes WHERE touched > ?1"
                " UNION ALL SELECT 1, id, touched, touched FROM consumer_groups WHERE touched > ?1",
                (self._seen,),
            ).fetchall()
        except sqlite3.Error as error:
            if not is_busy(error):
                self._wake_all()  # their own reads tell what is wrong
            return
        self._data_version = data_version
        if not changes:
            return
        lanes: set[int] = set()
        groups: set[int] = set()
        for is_group, number, value, touched in changes:
            if is_group:
                self.groups[number] = value
                groups.add(number)
            else:
                self.ends[number] = value
                lanes.add(number)
            if touched > self._seen:
                self._seen = touched
        self._pace.changed(self._loop.time())
        for who, future in self._waiting.items():
            if not future.done() and who.concerns(lanes, groups):
                future.set_result(None)

    async def wait(self, who: Waiting, *, timeout_s: float) -> None:
        """Returns when something that concerns `who` changed, it was woken, or the time is over."""
        future = self._waiting[who] = self._loop.create_future()
        limit = self._loop.call_later(timeout_s, self.wake, who)
        if self._timer is None:
            self._timer = self._loop.call_at(self._pace.next_look(self._loop.time()), self._look)
        try:
            await future
        finally:
            limit.cancel()
            del self._waiting[who]

    def wake(self, who: Waiting) -> None:
        future = self._waiting.get(who)
        if future is not None and not future.done():
            future.set_result(None)

    def _wake_all(self) -> None:
        for who in self._waiting:
            self.wake(who)

    def _look(self) -> None:
        self._timer = None
        try:
            changed = self.conn.execute("PRAGMA data_version").fetchone()[0] != self._data_version
        except sqlite3.Error:
            changed = True  # `refresh` knows what to make of it
        if changed:
            self.refresh()
        if self._waiting:
            self._timer = self._loop.call_at(self._pace.next_look(self._loop.time()), self._look)
