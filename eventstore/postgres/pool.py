"""Connections: SQLAlchemy's engine and pool, and the driver's own connection for the hot path.

A raw connection is in autocommit, so giving it back costs no round trip. One that was left in the middle of something
(cancelled, timed out, inside a transaction) is closed, never given to the next caller.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import cast

import asyncpg
from sqlalchemy import URL, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.util.concurrency import greenlet_spawn

from bus.metrics import Metrics

log = logging.getLogger("foldbus.eventstore")

_IDLE_IN_TRANSACTION_MS = 60_000
"""An appender that forgot its transaction holds up every reader: the server ends it."""

_CLOSE_S = 5.0


def url(dsn: str) -> URL:
    """`postgresql://…` for SQLAlchemy with asyncpg."""
    return make_url(dsn).set(drivername="postgresql+asyncpg")


def driver_dsn(dsn: str) -> str:
    """The same for asyncpg itself."""
    return make_url(dsn).set(drivername="postgresql").render_as_string(hide_password=False)


def make_engine(dsn: str, *, service: str, pool_size: int, timeout_s: float) -> AsyncEngine:
    return create_async_engine(
        url(dsn),
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=timeout_s,
        # The level belongs to the reader's reasoning (0001_floor_lock.sql), whatever the server's default is.
        isolation_level="READ COMMITTED",
        connect_args={
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
    """The driver's connections from an engine's pool."""

    def __init__(self, engine: AsyncEngine, metrics: Metrics) -> None:
        self._engine, self._metrics = engine, metrics
        self._closing: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[asyncpg.Connection[asyncpg.Record], None]:
        pooled = await self._engine.raw_connection()
        driver = cast("asyncpg.Connection[asyncpg.Record]", pooled.driver_connection)
        clean = False
        try:
            yield driver
            clean = True
        except (asyncpg.PostgresError, asyncpg.DataError):
            clean = True  # answered and over: in autocommit the statement is rolled back
            raise
        finally:
            if clean and not driver.is_closed() and not driver.is_in_transaction():
                await greenlet_spawn(pooled.close)
            else:
                pooled.detach()
                self._discard(driver)

    def _discard(self, driver: asyncpg.Connection[asyncpg.Record]) -> None:
        """Out of the pool at once; closed aside, since a statement that still runs is cancelled on the server first:
        otherwise it would wait on there for its locks, and hold those it has."""
        self._metrics.count("foldbus_store_connections_discarded_total")
        log.warning("a connection was left in the middle of something and is closed")
        task = asyncio.create_task(_close(driver))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        if self._closing:
            await asyncio.wait(self._closing)
        await self._engine.dispose()


async def _close(driver: asyncpg.Connection[asyncpg.Record]) -> None:
    try:
        await driver.close(timeout=_CLOSE_S)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
        driver.terminate()
