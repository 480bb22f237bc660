"""One SQLite file: a single writer, a few readers, and how they wait for other processes.

Everything that writes goes through one connection, one transaction at a time, each begun with BEGIN IMMEDIATE: a
deferred transaction that reads and then writes fails at once with BUSY_SNAPSHOT, whatever its timeout. While one
transaction is on its way to the disk, callers queue; those that agreed to share (`together`) make up the next one,
each behind a savepoint. That is what lets `synchronous=FULL` cost next to nothing.

A file locked by another process is tried again every 0.5 to 1.5 ms: SQLite's own busy handler backs off so far that
it starved a writer for seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import sqlite3
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, TypeVar

from bus.metrics import Metrics
from bus.seams import Clock
from eventstore.errors import EventStoreError, SchemaMismatch
from eventstore.sqlite.faults import code, is_busy, translated

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

log = logging.getLogger("foldbus.eventstore")

TOGETHER_MAX = 256
"""Calls that share one transaction, at most."""
_RETRY_S = (0.0005, 0.0015)
_OPENING_S = 5.0  # the first look at a file may find it locked by whoever migrates or recovers it


class InlineExecutor(Executor):
    """Runs everything at once, in the caller's thread: for simulations that must be repeatable."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


class Mergeable(ABC):
    """A work that runs with others of its class, in one go, cheaper than one by one."""

    @abstractmethod
    def __call__(self, connection: sqlite3.Connection) -> Any: ...

    @staticmethod
    @abstractmethod
    def merged(works: Sequence[Any], connection: sqlite3.Connection) -> Sequence[Any]:
        """What each of `works` would have answered, run in this order. If it raises, they are run one by one."""
        ...


@dataclass(slots=True, eq=False)
class _Job(Generic[T]):
    work: Work[T]
    done: asyncio.Future[T]
    together: bool


class _Locked(Exception):
    """BEGIN IMMEDIATE found the file locked; nothing was run."""


class SqliteDatabase:
    """Made by `open`. `write` and `read` may be called by any number of tasks of one event loop."""

    _write_connection: sqlite3.Connection

    def __init__(
        self, path: Path, *, metrics: Metrics, clock: Clock, busy_s: float, readers: int, executor: Executor | None
    ) -> None:
        self.path = path
        self.busy_s = busy_s
        self._metrics, self._clock = metrics, clock
        self._readers_max = readers
        self._own_executor = executor is None
        self._writer_threads = executor or ThreadPoolExecutor(1, thread_name_prefix="foldbus-sqlite-writer")
        self._reader_threads = executor or ThreadPoolExecutor(readers, thread_name_prefix="foldbus-sqlite-reader")
        self._random = random.Random()
        self._jobs: deque[_Job[Any]] = deque()
        self._wake = asyncio.Event()
        self._closing = False
        self._connections: list[sqlite3.Connection] = []
        self._idle_readers: asyncio.LifoQueue[sqlite3.Connection] = asyncio.LifoQueue()

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        path: Path,
        *,
        metrics: Metrics,
        clock: Clock,
        busy_s: float = 10.0,
        readers: int = 2,
        executor: Executor | None = None,
    ) -> AsyncGenerator[SqliteDatabase]:
        """Opens a file that exists; creates and changes nothing. Raises SchemaMismatch when there is none.

        Leaving waits for what was already asked for. `busy_s` bounds how long a locked file is tried for.
        """
        self = cls(path, metrics=metrics, clock=clock, busy_s=busy_s, readers=readers, executor=executor)
        try:
            self._write_connection = self.connect()
            for _ in range(readers):
                self._idle_readers.put_nowait(self.connect(query_only=True))
            writing = asyncio.create_task(self._write_on(), name=f"sqlite-writer-{path.name}")
            try:
                yield self
            finally:
                self._closing = True
                self._wake.set()
                await _finish(writing)
                for _ in range(readers):  # a reader that is still at work is waited for
                    await _finish(asyncio.ensure_future(self._idle_readers.get()))
        finally:
            self._closing = True
            for connection in self._connections:
                connection.close()
            if self._own_executor:
                self._writer_threads.shutdown(wait=False)
                self._reader_threads.shutdown(wait=False)

    def connect(self, *, query_only: bool = False) -> sqlite3.Connection:
        """One more connection, closed with the database; for whoever keeps to one thread at a time."""
        connection = connect(self.path)
        self._connections.append(connection)
        if query_only:
            connection.execute("PRAGMA query_only=ON")
        return connection

    # --- writing -----------------------------------------------------------------------------------------------------

    async def write(self, work: Work[T], *, together: bool = False) -> T:
        """Runs `work` in a transaction on the one writer connection and answers what it returned, once committed.

        An exception rolls back and is raised here. `work` runs at most once per call, in another thread, and neither
        begins nor commits. `together` lets it share the transaction (and the wait for the disk) with others', each
        behind a savepoint: another's failure does not touch it.

        Raises StoreUnavailable when the file stays locked, or for a fault of the disk: whether anything was written is
        then unknown. A cancelled caller does not know either; the connection stays clean.
        """
        if self._closing:
            raise EventStoreError(f"{self.path} was closed; nothing was written")
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._jobs.append(_Job(work, done, together))
        self._wake.set()
        return await done

    async def _write_on(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while batch := self._next_batch():
                await self._flush(batch)
            if self._closing:
                return

    def _next_batch(self) -> list[_Job[Any]]:
        batch: list[_Job[Any]] = []
        while self._jobs and len(batch) < TOGETHER_MAX:
            if batch and not (batch[-1].together and self._jobs[0].together):
                break
            job = self._jobs.popleft()
            if not job.done.cancelled():  # given up while it waited: certainly not written
                batch.append(job)
        return batch

    async def _flush(self, batch: list[_Job[Any]]) -> None:
        loop = asyncio.get_running_loop()
        give_up_at = self._clock.monotonic() + self.busy_s
        works = [job.work for job in batch]
        results: Sequence[tuple[Any, BaseException | None]]
        while True:
            try:
                results = await loop.run_in_executor(self._writer_threads, self._transact, works)
                break
            except _Locked as locked:
                if self._clock.monotonic() >= give_up_at:
                    log.warning("%s stayed locked for %s s; %d calls fail", self.path, self.busy_s, len(batch))
                    results = [(None, translated(locked.__cause__ or locked, str(self.path)))] * len(batch)
                    break
                self._metrics.count("foldbus_store_busy_retries_total", store="sqlite")
                await asyncio.sleep(self._random.uniform(*_RETRY_S))
            except asyncio.CancelledError:  # the event loop ends: nobody is left to be told
                for job in batch:
                    job.done.cancel()
                raise
            except BaseException as error:  # the transaction as a whole failed, and with it everybody in it
                log.warning("a transaction of %d calls on %s failed: %r", len(batch), self.path, error)
                results = [(None, error)] * len(batch)
                break
        self._metrics.count("foldbus_store_transactions_total", store="sqlite")
        if len(batch) > 1:
            self._metrics.count("foldbus_store_batches_total", store="sqlite")
            self._metrics.count("foldbus_store_batched_calls_total", len(batch), store="sqlite")
        for job, (value, failed) in zip(batch, results, strict=True):
            if job.done.cancelled():
                continue
            if failed is not None:
                job.done.set_exception(failed)
            else:
                job.done.set_result(value)

    def _transact(self, works: Sequence[Work[Any]]) -> Sequence[tuple[Any, BaseException | None]]:
        """One transaction. Raises _Locked before anything was run; any other error means that all of it is undone,
        or that nobody knows."""
        connection = self._write_connection
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            if is_busy(error):
                raise _Locked from error
            raise translated(error, str(self.path)) from error
        try:
            results = self._run_all(connection, works)
            if len(works) == 1 and results[0][1] is not None:
                connection.execute("ROLLBACK")
            else:
                connection.execute("COMMIT")
            return results
        except sqlite3.Error as error:
            _roll_back(connection)
            raise translated(error, str(self.path)) from error
        except BaseException:
            _roll_back(connection)
            raise

    def _run_all(
        self, connection: sqlite3.Connection, works: Sequence[Work[Any]]
    ) -> list[tuple[Any, BaseException | None]]:
        if len(works) == 1:
            return [self._run(connection, works[0], alone=True)]
        results: list[tuple[Any, BaseException | None]] = []
        for merged, run in groupby(works, key=_merged):
            group = list(run)
            if merged is not None and len(group) > 1:
                answers, failed = self._run(connection, partial(merged, group), alone=False)
                if failed is None:
                    results += [(answer, None) for answer in answers]
                    continue
                # One of them is at fault, and only that one shall hear of it.
            results += [self._run(connection, work, alone=False) for work in group]
        return results

    def _run(self, connection: sqlite3.Connection, work: Work[Any], *, alone: bool) -> tuple[Any, BaseException | None]:
        if not alone:
            connection.execute("SAVEPOINT foldbus_call")
        value: Any = None
        failed: BaseException | None = None
        try:
            value = work(connection)
        except Exception as error:
            failed = error
        if not connection.in_transaction:
            # A full disk undoes the whole transaction by itself, and a work that committed has broken it for all.
            if isinstance(failed, sqlite3.Error):
                raise failed
            raise EventStoreError(
                f"{self.path}: a transaction was ended from within; what shared it may be lost"
            ) from failed
        if failed is not None:
            if not alone:
                connection.execute("ROLLBACK TO foldbus_call")
            clean = translated(failed, str(self.path))
            if clean is not failed:
                clean.__cause__ = failed
            failed = clean
        if not alone:
            connection.execute("RELEASE foldbus_call")
        return value, failed

    # --- reading -----------------------------------------------------------------------------------------------------

    async def read(self, work: Work[T]) -> T:
        """Runs `work` in a read transaction (one state of the file throughout) on a reader connection, beside any
        writer. `work` may run again when the file was locked for recovery. Raises StoreUnavailable."""
        if self._closing:
            raise EventStoreError(f"{self.path} was closed; nothing was read")
        loop = asyncio.get_running_loop()
        give_up_at = self._clock.monotonic() + self.busy_s
        while True:
            connection = await self._idle_readers.get()
            reading = loop.run_in_executor(self._reader_threads, self._look, connection, work)
            # Given back when the thread is through with it, also when the caller was cancelled meanwhile.
            reading.add_done_callback(partial(self._give_back, connection))
            try:
                return await asyncio.shield(reading)
            except sqlite3.Error as error:
                if not is_busy(error) or self._clock.monotonic() >= give_up_at:
                    clean = translated(error, str(self.path))
                    if clean is error:
                        raise
                    raise clean from error
                self._metrics.count("foldbus_store_busy_retries_total", store="sqlite")
                await asyncio.sleep(self._random.uniform(*_RETRY_S))
            except asyncio.CancelledError:
                reading.add_done_callback(_unheard)
                raise

    def _give_back(self, connection: sqlite3.Connection, _: asyncio.Future[Any]) -> None:
        self._idle_readers.put_nowait(connection)

    @staticmethod
    def _look(connection: sqlite3.Connection, work: Work[T]) -> T:
        connection.execute("BEGIN")
        try:
            return work(connection)
        finally:
            _roll_back(connection)


def connect(path: Path, *, create: bool = False) -> sqlite3.Connection:
    """A connection in autocommit, so that transactions are begun by hand, and that does not wait for locks.

    Raises SchemaMismatch when there is no file (unless `create`)."""
    uri = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
    connection: sqlite3.Connection | None = None
    try:
        connection = sqlite3.connect(
            uri, uri=True, timeout=_OPENING_S, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        # Acknowledged means on the disk: with NORMAL a power cut takes the last transactions back.
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA cache_size=-16000")
        connection.execute("PRAGMA busy_timeout=0")
    except sqlite3.Error as error:
        if connection is not None:
            connection.close()
        if code(error) == sqlite3.SQLITE_CANTOPEN and not path.exists():
            raise SchemaMismatch(
                f"there is no store at {path}: no worker of this service ran there yet; the first one makes it, or "
                "`foldbus db upgrade MODULE:NAME`"
            ) from error
        raise translated(error, str(path)) from error
    return connection


def _merged(work: Work[Any]) -> Callable[[Sequence[Any], sqlite3.Connection], Sequence[Any]] | None:
    return work.merged if isinstance(work, Mergeable) else None


def _roll_back(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:
        with contextlib.suppress(sqlite3.Error):  # the error that led here is the one to tell
            connection.execute("ROLLBACK")


async def _finish(task: asyncio.Future[Any]) -> None:
    """Waits for `task` even while being cancelled: threads must be through before their connections close."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()


def _unheard(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


__all__ = ["InlineExecutor", "Mergeable", "SqliteDatabase", "connect"]
