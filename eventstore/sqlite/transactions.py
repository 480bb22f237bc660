"""Transactions of users on a SQLite file: SQLAlchemy's engines, one that writes and one that reads."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import aiosqlite
from sqlalchemy import Connection, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.util import await_only

from bus.metrics import Metrics
from bus.seams import Clock
from eventstore.errors import StoreUnavailable
from eventstore.sqlite.database import SqliteDatabase
from eventstore.sqlite.faults import is_busy, translated


class SqliteTx:
    """A transaction of this store: it holds the file's write lock from its first moment."""

    def __init__(self, sql: AsyncConnection) -> None:
        self._sql = sql

    @property
    def sql(self) -> AsyncConnection:
        return self._sql


class SqliteTransactions:
    """The engines are made when they are first needed."""

    def __init__(self, database: SqliteDatabase, clock: Clock, metrics: Metrics) -> None:
        self._database, self._clock, self._metrics = database, clock, metrics
        self._writing: AsyncEngine | None = None
        self._reading: AsyncEngine | None = None
        self._turn = asyncio.Lock()
        self._random = random.Random()

    @asynccontextmanager
    async def begin(self) -> AsyncGenerator[SqliteTx]:
        """Commits at the end, or rolls back."""
        if self._writing is None:
            self._writing = self._writing_engine()
        path = self._database.path
        async with self._taking_turns(), self._writing.connect() as connection:
            try:
                await connection.begin()
            except (sqlite3.Error, DBAPIError) as error:
                raise fault_of(error, path) from error
            try:
                yield SqliteTx(connection)
            except BaseException:
                await connection.rollback()
                raise
            try:
                await connection.commit()
            except DBAPIError as error:
                raise fault_of(error, path) from error

    @asynccontextmanager
    async def reading(self) -> AsyncGenerator[SqliteTx]:
        """One snapshot; waits for nobody and writes nothing."""
        if self._reading is None:
            self._reading = self._reading_engine()
        async with self._reading.connect() as connection:
            try:
                yield SqliteTx(connection)
            finally:
                await connection.rollback()

    async def dispose(self) -> None:
        for engine in (self._writing, self._reading):
            if engine is not None:
                await engine.dispose()

    @asynccontextmanager
    async def _taking_turns(self) -> AsyncGenerator[None]:
        """Those of one process queue up here, in order: asking for the file's lock side by side, each again every
        millisecond, they would be a third as fast."""
        busy_s = self._database.busy_s
        try:
            async with asyncio.timeout(busy_s):
                await self._turn.acquire()
        except TimeoutError:
            raise StoreUnavailable(
                f"{self._database.path}: other transactions of this process went on for {busy_s:g} s; none was begun"
            ) from None
        try:
            yield
        finally:
            self._turn.release()

    def _writing_engine(self) -> AsyncEngine:
        # The driver waits for no lock: it would do so in its thread, where nobody can cancel it.
        engine = self._engine("PRAGMA synchronous=FULL", timeout_s=0)

        @event.listens_for(engine.sync_engine, "begin")
        def on_begin(connection: Connection) -> None:
            give_up_at = self._clock.monotonic() + self._database.busy_s
            while True:
                cursor = connection.connection.cursor()
                try:
                    cursor.execute("BEGIN IMMEDIATE")
                    return
                except sqlite3.Error as error:
                    if not is_busy(error) or self._clock.monotonic() >= give_up_at:
                        raise
                    self._metrics.count("foldbus_store_busy_retries_total", store="sqlite")
                    await_only(asyncio.sleep(self._random.uniform(0.0005, 0.0015)))
                finally:
                    cursor.close()

        _ = on_begin
        return engine

    def _reading_engine(self) -> AsyncEngine:
        engine = self._engine("PRAGMA query_only=ON", timeout_s=self._database.busy_s)

        @event.listens_for(engine.sync_engine, "begin")
        def on_begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN")  # its snapshot is that of its first statement

        _ = on_begin
        return engine

    def _engine(self, pragma: str, *, timeout_s: float) -> AsyncEngine:
        engine = create_async_engine(
            f"sqlite+aiosqlite:///{self._database.path.absolute()}",
            connect_args={"timeout": timeout_s, "factory": _Connection},
        )

        @event.listens_for(engine.sync_engine, "connect")
        def on_connect(connection: DBAPIConnection, _: object) -> None:
            # The driver shall not begin by itself: it would do so late, and deferred.
            connection.isolation_level = None
            cursor = connection.cursor()
            cursor.execute(pragma)
            cursor.close()

        @event.listens_for(engine.sync_engine, "invalidate")
        def on_invalidate(connection: Any, _record: object, _error: object) -> None:
            # Its statement was cancelled, and the pool closes it next, which waits in its thread for the statement.
            with contextlib.suppress(ValueError):  # closed already
                connection.run_async(_interrupt)

        _ = on_connect, on_invalidate
        return engine


async def _interrupt(driver: aiosqlite.Connection) -> None:
    await driver.interrupt()


def fault_of(error: sqlite3.Error | DBAPIError, path: Path) -> BaseException:
    """The store's own error for what the driver raised, or that itself."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return error if cause is None else translated(cause, str(path))


class _Connection(sqlite3.Connection):
    """Closed, it has given its locks back. With a statement left that somebody still refers to (a traceback does),
    SQLite would keep both the connection and its locks until the garbage collector comes by."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._cursors: WeakSet[sqlite3.Cursor] = WeakSet()

    def cursor(self, factory: Any = sqlite3.Cursor) -> Any:
        cursor: sqlite3.Cursor = super().cursor(factory)
        self._cursors.add(cursor)
        return cursor

    def close(self) -> None:
        for cursor in tuple(self._cursors):
            cursor.close()
        super().close()
