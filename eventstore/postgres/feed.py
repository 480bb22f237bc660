"""Who reads the log waits here: the watermark, taken once for all readers of a process, and what wakes them.

Within a process a commit wakes at once. Other processes are told by NOTIFY on a connection of its own, at most
`_NOTIFY_INTERVAL_S` apart and never inside an append's transaction: there it takes a lock of the whole server until the
commit is on disk, which costs up to nine tenths of the appends. Polling is the safety net under both; it is wider while
that connection stands.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from collections.abc import Awaitable, Callable

import asyncpg

from bus.envelope import Position
from bus.metrics import Metrics
from eventstore.postgres.errors import DRIVER_ERRORS

log = logging.getLogger("foldbus.eventstore")

_NOTIFY_INTERVAL_S = 0.01
_POLL_S, _POLL_LISTENING_S = 0.25, 1.0
"""The wider one is for a process that was killed between its commit and telling it."""
_FLOOR_POLL_S = 0.005
_RECONNECT_S = 0.5


class Watermark:
    """The highest position that is safe to read, shared: callers that come while one query is under way share the
    next. It does not go back while the server lives. What was safe once stays safe, although the lowest lock may go
    back: an appender that read the sequence early and locked late holds a low floor, but draws above everything drawn
    before.

    A crash of the server is another matter: a sequence is as durable as the last commit, so positions that were drawn
    and rolled back, and that were passed here, may be drawn once more. A connection that was used for an earlier query
    proves that there was no crash since; the answer of one that is new is taken as it is.

    `query` answers safe, drawn, and the connection that it asked.
    """

    def __init__(
        self, query: Callable[[], Awaitable[tuple[Position, Position, object]]], wakeups: Wakeups | None = None
    ) -> None:
        self._query, self._wakeups = query, wakeups
        self._as_of = -1
        self._turn = asyncio.Lock()
        self._asked = self._answered = 0
        self._witnesses: weakref.WeakSet[object] = weakref.WeakSet()
        self.safe: Position = 0
        self.drawn: Position = 0

    async def fresh(self) -> Position:
        """Of a query that began after this call did: what the caller committed before is at or below it."""
        self._asked += 1
        mine = self._asked
        async with self._turn:
            if self._answered < mine:
                covers = self._asked  # everybody who asked until now
                wakes = 0 if self._wakeups is None else self._wakeups.count
                safe, drawn, witness = await self._query()
                if witness in self._witnesses:
                    safe, drawn = max(self.safe, safe), max(self.drawn, drawn)
                else:
                    self._witnesses.add(witness)
                self.safe, self.drawn = safe, drawn
                self._answered, self._as_of = covers, wakes
        return self.safe

    @property
    def current(self) -> bool:
        """Has nobody told of a commit since the last query began? False while nobody would be heard."""
        wakeups = self._wakeups
        return wakeups is not None and wakeups.listening and wakeups.count == self._as_of

    def vouched(self, connection: object) -> Position | None:
        """What is known to be safe, for a statement on this connection. None: it was not asked before, so if the server
        has crashed since, this connection cannot tell."""
        return self.safe if connection in self._witnesses else None


class Wakeups:
    """`run` is to be kept running as a task; without it, waiting is polling."""

    def __init__(self, dsn: str, channel: str, metrics: Metrics) -> None:
        self._dsn, self._channel, self._metrics = dsn, channel, metrics
        self._event = asyncio.Event()
        self._tell = asyncio.Event()
        self.listening = False
        self.count = 0
        """Of wake-ups."""

    def woken(self) -> asyncio.Event:
        """Set at the next wake-up. Take it before looking, wait for it after finding nothing."""
        return self._event

    def committed(self) -> None:
        """This process committed something: wakes its readers at once, and others' soon."""
        self._wake()
        self._tell.set()

    def _wake(self) -> None:
        self.count += 1
        self._event.set()
        self._event = asyncio.Event()

    async def run(self) -> None:
        while True:
            try:
                await self._converse()
            except DRIVER_ERRORS as error:
                self._metrics.count("foldbus_store_listener_failures_total")
                log.warning("listening for other processes' commits failed (%r); polling meanwhile", error)
            self._wake()  # whatever was missed
            await asyncio.sleep(_RECONNECT_S)

    async def _converse(self) -> None:
        # NOTIFY takes a transaction number, so each would wait for the disk, and a lone appender beside it.
        db = await asyncpg.connect(self._dsn, timeout=10, server_settings={"synchronous_commit": "off"})
        closed = asyncio.Event()
        try:
            own = db.get_server_pid()

            def told(_: object, pid: int, *__: object) -> None:
                if pid != own:
                    self._wake()

            def ended(_: object) -> None:
                closed.set()
                self._tell.set()

            db.add_termination_listener(ended)
            await db.add_listener(self._channel, told)
            self.listening = True
            self._wake()
            while True:
                await self._tell.wait()
                if closed.is_set():
                    raise ConnectionResetError("the listening connection was closed")
                self._tell.clear()
                await db.execute(f"notify {self._channel}", timeout=10)
                await asyncio.sleep(_NOTIFY_INTERVAL_S)
        finally:
            self.listening = False
            db.terminate()


async def wait_past(watermark: Watermark, wakeups: Wakeups, position: Position, *, timeout_s: float) -> None:
    """See the port. While positions are drawn but held by an open appender, looks more often than when all is quiet;
    what the caller saw a moment ago is not asked for again."""
    loop = asyncio.get_running_loop()
    until = loop.time() + timeout_s
    pause = _FLOOR_POLL_S
    overdue = False
    while True:
        woken = wakeups.woken()
        if overdue or not watermark.current:
            await watermark.fresh()
        left = until - loop.time()
        if watermark.safe > position or left <= 0:
            return
        quiet_s = _POLL_LISTENING_S if wakeups.listening else _POLL_S
        pause = min(pause * 2, _POLL_S) if watermark.drawn > position else quiet_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(pause, left)):
                await woken.wait()
        overdue = not woken.is_set()
        if not overdue:
            pause = _FLOOR_POLL_S
        elif loop.time() >= until:
            return  # whoever reads now asks


__all__ = ["Wakeups", "Watermark", "wait_past"]
