"""Connections: SQLAlchemy's engine and pool, and the driver's own connection for the hot path.

A raw connection is in autocommit, so giving it back costs no round trip. One that was left in the middle of something
(cancelled, timed out, inside a transaction) is closed, never given to the next caller.

Both kinds come from the engine's pool, so its size bounds them together; whoever comes first is served first. Going
through the engine takes two greenlets, a tenth of a lone append: what is given back in order is kept at hand.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, cast

import asyncpg
from sqlalchemy import URL, PoolProxiedConnection, QueuePool, event, make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util.concurrency import greenlet_spawn

from bus.errors import FoldbusError
from bus.metrics import Metrics

log = logging.getLogger("foldbus.eventstore")

_IDLE_IN_TRANSACTION_MS = 60_000
"""An appender that forgot its transaction holds up every reader: the server ends it."""

_CLOSE_S = 5.0


_FOR_SQLALCHEMY = ("prepared_statement_cache_size", "prepared_statement_name_func")


def url(dsn: str) -> URL:
    """`postgresql://…` for SQLAlchemy with asyncpg: without what the driver alone understands (`sslmode` and the like),
    which goes to it by `driver_arguments`."""
    whole = make_url(dsn).set(drivername="postgresql+asyncpg")
    return whole.difference_update_query([name for name in whole.query if name not in _FOR_SQLALCHEMY])


def driver_dsn(dsn: str) -> str:
    """The same for asyncpg itself, which reads `sslmode`, `sslrootcert` and so on as libpq does."""
    whole = make_url(dsn).set(drivername="postgresql").difference_update_query(_FOR_SQLALCHEMY)
    return whole.render_as_string(hide_password=False)


def driver_arguments(dsn: str) -> dict[str, Any]:
    """What SQLAlchemy is to hand on to the driver, so that both see the same URL."""
    return {"dsn": driver_dsn(dsn)}


def make_engine(dsn: str, *, service: str, pool_size: int, timeout_s: float) -> AsyncEngine:
    return create_async_engine(
        url(dsn),
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=timeout_s,
        # The level belongs to the reader's reasoning (0001_floor_lock.sql), whatever the server's default is.
        isolation_level="READ COMMITTED",
        connect_args={
            **driver_arguments(dsn),
            "timeout": timeout_s,
            "server_settings": {
                "application_name": f"foldbus {service}",
                "default_transaction_isolation": "read committed",
                "idle_in_transaction_session_timeout": str(_IDLE_IN_TRANSACTION_MS),
                "jit": "off",
            },
        },
    )


class Pool:
    """An engine's connections: the driver's own (`connection`), and SQLAlchemy's (`sql`). Both raise TimeoutError when
    none became free within `timeout_s`."""

    def __init__(self, engine: AsyncEngine, metrics: Metrics, *, timeout_s: float) -> None:
        self._engine, self._metrics, self._timeout_s = engine, metrics, timeout_s
        self._turns = asyncio.Semaphore(cast("QueuePool", engine.pool).size())
        self._kept: list[PoolProxiedConnection] = []
        self._closing: set[asyncio.Task[None]] = set()
        event.listen(engine.sync_engine, "checkin", self._returned)

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[asyncpg.Connection[asyncpg.Record], None]:
        """The driver's, in autocommit."""
        await self._turn()
        try:
            pooled = self._at_hand() or await self._acquire()
            driver = _driver(pooled)
            clean = cancelled = False
            try:
                yield driver
                clean = True
            except (asyncpg.PostgresError, asyncpg.DataError):
                clean = True  # answered and over: in autocommit the statement is rolled back
                raise
            except FoldbusError as error:
                clean = error.__cause__ is None  # said between statements, not of one that got no answer
                raise
            except asyncio.CancelledError:
                cancelled = True
                raise
            finally:
                if clean and not driver.is_closed() and not driver.is_in_transaction():
                    self._kept.append(pooled)
                else:
                    pooled.detach()
                    self._discard(driver, cancelled=cancelled)
        finally:
            self._turns.release()

    @asynccontextmanager
    async def sql(self) -> AsyncGenerator[AsyncConnection, None]:
        """SQLAlchemy's, which begins a transaction when something is executed."""
        await self._turn()
        try:
            pool = cast("QueuePool", self._engine.pool)
            if pool.checkedin() == 0 and pool.checkedout() >= pool.size() and (pooled := self._at_hand()) is not None:
                await greenlet_spawn(pooled.close)
            async with self._engine.connect() as connection:
                yield connection
        finally:
            self._turns.release()

    async def _turn(self) -> None:
        """Who has one finds a connection: at hand, in the engine's pool, or still to be made."""
        if not self._turns.locked():
            await self._turns.acquire()  # at once
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._turns.acquire()
        except TimeoutError:
            raise TimeoutError(f"no connection was free for {self._timeout_s} s; nothing was asked") from None

    def _at_hand(self) -> PoolProxiedConnection | None:
        """The one that was used last."""
        while self._kept:
            pooled = self._kept.pop()
            if not _driver(pooled).is_closed():
                return pooled
            pooled.detach()  # the server ended it meanwhile
        return None

    def _returned(self, _: object, record: ConnectionPoolEntry) -> None:
        """SQLAlchemy gives back a connection whose rollback failed, for one because another task's statement still runs
        on it, as if it had worked. Whoever had it next would commit within that transaction, and lose it all."""
        driver = cast("asyncpg.Connection[asyncpg.Record] | None", record.driver_connection)
        if driver is not None and not driver.is_closed() and driver.is_in_transaction():
            self._metrics.count("foldbus_store_connections_discarded_total")
            log.warning("a connection was given back in the middle of a transaction and is closed")
            record.invalidate()

    async def _acquire(self) -> PoolProxiedConnection:
        """A connection that must be made is made aside: cancelled in the middle of it, asyncpg leaves an exception that
        nobody retrieves. Whoever does not wait for it any more leaves it to the pool."""
        if cast("QueuePool", self._engine.pool).checkedin() > 0:
            return await self._engine.raw_connection()
        making = asyncio.ensure_future(self._engine.raw_connection())
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            self._aside(_give_back(making))
            raise

    def _aside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _discard(self, driver: asyncpg.Connection[asyncpg.Record], *, cancelled: bool) -> None:
        """Out of the pool at once; closed aside, since a statement that still runs is cancelled on the server first:
        otherwise it would wait on there for its locks, and hold those it has."""
        self._metrics.count("foldbus_store_connections_discarded_total")
        level = logging.DEBUG if cancelled else logging.WARNING  # a worker that stops cancels what waits, every time
        log.log(level, "a connection was left in the middle of something and is closed")
        self._aside(_close(driver))

    async def close(self) -> None:
        if self._closing:
            await asyncio.wait(self._closing)
        while (pooled := self._at_hand()) is not None:
            await greenlet_spawn(pooled.close)
        await self._engine.dispose()


def _driver(pooled: PoolProxiedConnection) -> asyncpg.Connection[asyncpg.Record]:
    return cast("asyncpg.Connection[asyncpg.Record]", pooled.driver_connection)


async def _give_back(making: asyncio.Future[PoolProxiedConnection]) -> None:
    try:
        pooled = await making
    except Exception as error:
        log.debug("a connection that nobody waited for any more was not made: %r", error)
    else:
        await greenlet_spawn(pooled.close)


async def _close(driver: asyncpg.Connection[asyncpg.Record]) -> None:
    try:
        await driver.close(timeout=_CLOSE_S)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
        driver.terminate()
