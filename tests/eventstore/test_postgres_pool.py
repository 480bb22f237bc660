"""PostgreSQL connections that somebody stops waiting for: none is lost, and nothing is said of what is ordinary."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from bus.metrics import MemoryMetrics
from eventstore.errors import SchemaMismatch, StoreUnavailable
from eventstore.postgres.pool import Pool, make_engine
from tests.eventstore.locks import blocked, connected


@asynccontextmanager
async def pool_on(dsn: str, *, size: int = 1) -> AsyncGenerator[tuple[Pool, MemoryMetrics]]:
    metrics = MemoryMetrics()
    pool = Pool(make_engine(dsn, service="test", pool_size=size, timeout_s=10), metrics)
    try:
        yield pool, metrics
    finally:
        await pool.close()


async def test_whoever_is_cancelled_while_a_connection_is_made_leaves_nothing_behind(database: str) -> None:
    """Cancelled later and later, from before the first byte to after the last one."""
    said: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))

    async def use(pool: Pool) -> None:
        async with pool.connection() as db:
            await db.fetchval("select 1")

    for step in range(40):
        async with pool_on(database, size=4) as (pool, _):
            using = [asyncio.create_task(use(pool)) for _ in range(6)]
            await asyncio.sleep(step * 0.0005)
            for each in using:
                each.cancel()
            await asyncio.gather(*using, return_exceptions=True)
            await asyncio.gather(*(use(pool) for _ in range(6)))  # all of the pool's connections are there again
    gc.collect()
    await asyncio.sleep(0)
    assert said == []


async def test_a_connection_is_kept_when_our_own_refusal_ends_its_use(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with pool_on(database) as (pool, metrics):
        async with pool.connection() as db:
            kept = db.get_server_pid()
        with pytest.raises(SchemaMismatch):
            async with pool.connection():
                raise SchemaMismatch("wanted another one")
        async with pool.connection() as db:
            assert db.get_server_pid() == kept
        assert metrics.total("foldbus_store_connections_discarded_total") == 0
        assert not caplog.records

        with pytest.raises(StoreUnavailable):
            async with pool.connection():
                raise StoreUnavailable("no answer") from TimeoutError()
        async with pool.connection() as db:
            assert db.get_server_pid() != kept
        assert metrics.total("foldbus_store_connections_discarded_total") == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_a_statement_that_is_cancelled_costs_its_connection_and_no_warning(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with pool_on(database) as (pool, metrics):
        begun: asyncio.Future[asyncpg.Connection[Any]] = asyncio.get_running_loop().create_future()

        async def wait() -> None:
            async with pool.connection() as db:
                begun.set_result(db)
                await db.fetchval("select pg_sleep(60)")

        waiting = asyncio.create_task(wait())
        await begun
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert metrics.total("foldbus_store_connections_discarded_total") == 1
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_what_is_written_after_somebody_left_a_transaction_open_is_kept(database: str) -> None:
    """A handler ends while a statement of another task or thread is under way: the rollback fails, and SQLAlchemy gives
    the connection back as if it had worked. What the next one wrote there was acknowledged, and gone."""
    statements: list[asyncio.Task[Any]] = []
    async with connected(database) as other, pool_on(database) as (pool, metrics):
        engine = pool._engine  # pyright: ignore[reportPrivateUsage]

        async def leave_it_running() -> None:
            async with engine.connect() as sql, sql.begin():
                await sql.exec_driver_sql("create table undone ()")
                statements.append(asyncio.create_task(sql.exec_driver_sql("select pg_advisory_lock(7)")))
                await blocked(database)
                raise RuntimeError("a bug")

        await other.execute("select pg_advisory_lock(7)")
        with pytest.raises(Exception):  # noqa: B017 - the driver's own, about the other statement
            await leave_it_running()
        await other.execute("select pg_advisory_unlock(7)")
        await asyncio.gather(*statements, return_exceptions=True)
        async with pool.connection() as db:
            await db.execute("create table kept ()")
        assert await other.fetchval("select to_regclass('kept') is not null and to_regclass('undone') is null")
        assert metrics.total("foldbus_store_connections_discarded_total") == 1
