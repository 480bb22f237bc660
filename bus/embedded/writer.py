"""The one thread of a transport that writes. Jobs that arrive meanwhile share its next transaction, and so its fsync.

SQLite lets one process write at a time. Its busy handler backs off for ever longer and starves writers under load, so
it is off: a locked file is tried again every 0.5 to 1.5 ms, by everybody alike, until a deadline.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bus.errors import BusError, TransportUnavailable
from bus.seams import Clock

log = logging.getLogger("foldbus.bus")
T = TypeVar("T")

Work = Callable[[sqlite3.Connection], T]
"""Runs inside a transaction that it shares with others; may be run again. It raises a BusError only before it has
written anything: that fails it alone."""

ROWS_PER_TRANSACTION = 20_000
WAL_PAGES = 4_000
"""Pages in the log before SQLite moves them into the file: 16 MB."""


def connect(path: Path) -> sqlite3.Connection:
    """A connection that begins transactions only when told to and never waits for a lock by itself."""
    return sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False, cached_statements=256)


def is_busy(error: sqlite3.Error) -> bool:
    """Somebody else has the lock for the moment (or recovers the file after a crash): try again."""
    code: int = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)


@dataclass(frozen=True, slots=True)
class Raised:
    error: Exception


@dataclass(frozen=True, slots=True)
class _Job:
    work: Work[Any]
    future: asyncio.Future[Any]
    durable: bool
    rows: int


class Writer:
    """Started by `start`, which returns when the file is ready; `close` writes what was handed in, then ends."""

    def __init__(
        self,
        path: Path,
        *,
        prepare: Callable[[sqlite3.Connection], None],
        tick: Work[Any],
        ticked: Callable[[Any], None],
        tick_every_s: float,
        deadline_s: float,
        committed: Callable[[], None],
        clock: Clock,
        rng: random.Random,
    ) -> None:
        """`prepare` makes the file ready, in the thread. `tick` runs in a transaction every `tick_every_s`, whatever
        the event loop does; `ticked` is given its result on the loop. `committed` is called there after each
        transaction."""
        self._path, self._prepare, self._tick, self._tick_every_s = path, prepare, tick, tick_every_s
        self._ticked = ticked
        self._deadline_s, self._committed, self._clock, self._rng = deadline_s, committed, clock, rng
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._jobs: deque[_Job] = deque()
        self._wanted = threading.Condition()
        self._closing = False
        self._tick_at = 0.0
        self._thread = threading.Thread(target=self._serve, name=f"bus-writer {path.name}", daemon=True)

    async def start(self) -> None:
        """Raises TransportUnavailable when the file cannot be opened or made ready within the deadline."""
        self._thread.start()
        await self._ready

    async def close(self) -> None:
        with self._wanted:
            self._closing = True
            self._wanted.notify()
        await asyncio.shield(self._ended)
        self._thread.join()

    async def run(self, work: Work[T], *, durable: bool = False, rows: int = 1) -> T:
        """The result of `work` once its transaction is committed; `durable` ones are synced to the disk by then.

        Raises what `work` raised, or TransportUnavailable: nothing was written, or (a disk that failed) that is
        unknown. Whoever cancels the wait does not cancel the work.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        with self._wanted:
            if self._closing:
                raise TransportUnavailable(f"{self._path} is closed")
            self._jobs.append(_Job(work, future, durable, rows))
            self._wanted.notify()
        return await future

    # --- in the thread ---------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            conn = connect(self._path)
        except sqlite3.Error as error:
            self._tell(self._fail_start, _unavailable(self._path, error))
            return
        try:
            failure = self._made_ready(conn)
            if failure is not None:
                self._tell(self._fail_start, failure)
                return
            self._tell(self._ready.set_result, None)
            while (jobs := self._next_jobs()) is not None:
                self._work_off(conn, jobs)
        finally:
            conn.close()
            self._tell(self._ended.set_result, None)

    def _made_ready(self, conn: sqlite3.Connection) -> Exception | None:
        give_up_at = self._clock.monotonic() + self._deadline_s
        while True:
            try:
                self._prepare(conn)
                return None
            except sqlite3.Error as error:
                if conn.in_transaction:
                    conn.execute("ROLLBACK")
                if not is_busy(error) or self._clock.monotonic() > give_up_at:
                    return _unavailable(self._path, error)
                self._pause()
            except Exception as error:
                return error

    def _next_jobs(self) -> Sequence[_Job] | None:
        """Waits for jobs or for the next tick (no jobs then); None: closed and all done."""
        with self._wanted:
            while not self._jobs:
                if self._closing:
                    return None
                left_s = self._tick_at - self._clock.monotonic()
                if left_s <= 0:
                    return ()
                self._wanted.wait(left_s)
            jobs: list[_Job] = []
            rows = 0
            while self._jobs and (not jobs or rows + self._jobs[0].rows <= ROWS_PER_TRANSACTION):
                jobs.append(self._jobs.popleft())
                rows += jobs[-1].rows
            return jobs

    def _work_off(self, conn: sqlite3.Connection, jobs: Sequence[_Job]) -> None:
        if self._clock.monotonic() >= self._tick_at:
            (outcome,) = self._transact(conn, [self._tick], durable=False)
            if isinstance(outcome, Raised):
                log.error("heartbeat of the embedded bus failed: %s", outcome.error)
            else:
                self._tell(self._ticked, outcome)
            self._tick_at = self._clock.monotonic() + self._tick_every_s * self._rng.uniform(0.9, 1.1)
        durable = any(job.durable for job in jobs)
        outcomes = self._transact(conn, [job.work for job in jobs], durable=durable) if jobs else ()
        self._tell(self._deliver, jobs, outcomes)

    def _transact(self, conn: sqlite3.Connection, works: Sequence[Work[Any]], *, durable: bool) -> Sequence[Any]:
        """One transaction for all; answers results or `Raised`, one each."""
        give_up_at = self._clock.monotonic() + self._deadline_s
        while True:
            outcomes: list[Any] = []
            try:
                # Groups and leases may forget the last moment before a machine crash: nobody outlives it.
                conn.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                conn.execute("BEGIN IMMEDIATE")
                for work in works:
                    try:
                        outcomes.append(work(conn))
                    except BusError as error:
                        outcomes.append(Raised(error))
                conn.execute("COMMIT")
                return outcomes
            except Exception as error:
                if conn.in_transaction:
                    conn.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error) and is_busy(error):
                    if self._clock.monotonic() < give_up_at:
                        self._pause()
                        continue
                    return [Raised(_unavailable(self._path, error))] * len(works)
                if len(works) > 1:  # one of them is at fault: each by itself then
                    return [self._transact(conn, [work], durable=durable)[0] for work in works]
                outside = isinstance(error, sqlite3.OperationalError)
                return [Raised(_unavailable(self._path, error) if outside else error)]

    def _pause(self) -> None:
        time.sleep(self._rng.uniform(0.0005, 0.0015))

    def _tell(self, call: Callable[..., object], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:  # the loop was closed under us: nobody is left to be told
            pass

    # --- on the loop -----------------------------------------------------------------------------------------------

    def _deliver(self, jobs: Sequence[_Job], outcomes: Sequence[Any]) -> None:
        self._committed()
        for job, outcome in zip(jobs, outcomes, strict=True):
            if job.future.done():
                continue
            if isinstance(outcome, Raised):
                job.future.set_exception(outcome.error)
            else:
                job.future.set_result(outcome)

    def _fail_start(self, error: Exception) -> None:
        if not self._ready.done():
            self._ready.set_exception(error)


def _unavailable(path: Path, error: Exception) -> TransportUnavailable:
    unavailable = TransportUnavailable(f"{path}: {error}")
    unavailable.__cause__ = error
    return unavailable
