"""Waking those who wait for the log: at once for commits of this process, by a cheap poll for others'.

`PRAGMA data_version` changes when another connection has written to the file. It reads shared memory, a few
microseconds, and so is asked on the event loop itself, every 2 to 20 ms, and only while somebody waits.
"""

from __future__ import annotations

import asyncio
import sqlite3

from bus.envelope import Position
from bus.seams import Clock
from bus.tasks import ended

_POLL_S = (0.002, 0.02)


class Watch:
    def __init__(self, connection: sqlite3.Connection, clock: Clock) -> None:
        self._connection, self._clock = connection, clock
        self._seen_version = -1
        self._head: Position = 0
        self._waiting: set[asyncio.Future[None]] = set()
        self._polling: asyncio.Task[None] | None = None

    def saw(self, head: Position) -> None:
        """This process committed, or read, up to `head`."""
        if head > self._head:
            self._head = head
            for future in self._waiting:
                if not future.done():
                    future.set_result(None)

    def look(self) -> None:
        """Has another process written?"""
        try:
            (version,) = self._connection.execute("PRAGMA data_version").fetchone()
            if version != self._seen_version:
                (head,) = self._connection.execute("SELECT head FROM foldbus_log").fetchone()
                self._seen_version = version
                self.saw(head)
        except sqlite3.Error:
            # Locked for recovery or out of reach: looked at again, and whoever reads is told what is wrong.
            return

    async def past(self, position: Position, *, timeout_s: float) -> None:
        give_up_at = self._clock.monotonic() + timeout_s
        self.look()
        while self._head <= position:
            left = give_up_at - self._clock.monotonic()
            if left <= 0:
                return
            future = asyncio.get_running_loop().create_future()
            self._waiting.add(future)
            if self._polling is None or self._polling.done():
                self._polling = asyncio.create_task(self._poll(), name="sqlite-watch")
            try:
                await asyncio.wait({future}, timeout=left)
            finally:
                self._waiting.discard(future)

    async def _poll(self) -> None:
        pause, longest = _POLL_S
        while self._waiting:
            await asyncio.sleep(pause)
            before = self._seen_version
            self.look()
            pause = _POLL_S[0] if self._seen_version != before else min(pause * 1.3, longest)

    async def close(self) -> None:
        if self._polling is not None:
            await ended(self._polling)
