"""Waking those who wait for the log: at once for commits of this process, by a cheap poll for others'.

`PRAGMA data_version` changes when another connection has written to the file. It reads shared memory, a few
microseconds, and so is asked on the event loop itself (how often: `bus/ticks.py`), and only while somebody waits.
"""

from __future__ import annotations

import asyncio
import sqlite3

from bus.envelope import Position
from bus.seams import Clock
from bus.ticks import Pace


class Watch:
    def __init__(self, connection: sqlite3.Connection, clock: Clock) -> None:
        self._connection, self._clock = connection, clock
        self._seen_version = -1
        self._head: Position = 0
        self._waiting: set[asyncio.Future[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._pace = Pace(self._loop.time())

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
                if head > self._head:  # and no more than a lease renewed
                    self._pace.changed(self._loop.time())
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
            future = self._loop.create_future()
            self._waiting.add(future)
            if self._timer is None:
                self._look_again()
            try:
                await asyncio.wait({future}, timeout=left)
            finally:
                self._waiting.discard(future)

    def _look_again(self) -> None:
        self._timer = self._loop.call_at(self._pace.next_look(self._loop.time()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        if self._waiting:
            self.look()
            self._look_again()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
