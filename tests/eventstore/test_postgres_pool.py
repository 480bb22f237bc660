"""PostgreSQL connections: none is lost, none is handed on broken, and nobody waits for one that is not in use."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from bus.metrics import MemoryMetrics
from eventstore.errors import SchemaMismatch, StoreUnavailable
from eventstore.postgres.pool import Pool, make_engine
from tests.eventstore.locks import blocked, connected


@asynccontextmanager
async def pool_on(dsn: str, *, size: int = 1, timeout_s: float = 10) -> AsyncGenerator[tuple[Pool, MemoryMetrics]]:
    metrics = MemoryMetrics()
    pool = Pool(make_engine(dsn, service="test", pool_size=size, timeout_s=timeout_s), metrics, timeout_s=timeout_s)
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

        async def leave_it_running() -> None:
            async with pool.sql() as sql, sql.begin():
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


async def backend(db: AsyncConnection) -> int:
    return int((await db.exec_driver_sql("select pg_backend_pid()")).scalar_one())


async def test_a_connection_that_is_not_in_use_goes_to_whoever_wants_one_of_either_kind(database: str) -> None:
    async with pool_on(database) as (pool, _), asyncio.timeout(20):
        for _round in range(3):
            async with pool.connection() as db:
                pid = db.get_server_pid()
            async with pool.connection() as db:
                assert db.get_server_pid() == pid
            async with pool.sql() as sql:
                assert await backend(sql) == pid


async def test_who_waits_for_a_connection_has_it_before_those_that_come_later(database: str) -> None:
    """Of either kind, and in the order in which they came, although the holder would take it again at once."""
    order: list[str] = []
    async with pool_on(database) as (pool, _), asyncio.timeout(20):

        async def driver() -> None:
            async with pool.connection():
                order.append("driver")

        async def sql() -> None:
            async with pool.sql():
                order.append("sql")

        async with pool.connection():
            waiting: list[asyncio.Task[None]] = []
            for work in (sql, driver, sql):
                waiting.append(asyncio.create_task(work()))
                for _turn in range(20):  # each gets as far as the queue before the next one comes
                    await asyncio.sleep(0)
        async with pool.connection():
            order.append("holder")
        await asyncio.gather(*waiting)
    assert order == ["sql", "driver", "sql", "holder"]


async def test_who_waits_too_long_is_told_so_and_takes_nothing_away(database: str) -> None:
    async with pool_on(database, timeout_s=0.2) as (pool, _), asyncio.timeout(20):
        async with pool.sql():
            with pytest.raises(TimeoutError, match=r"no connection was free for 0\.2 s"):
                async with pool.connection():
                    pass
        async with pool.connection() as db:
            assert await db.fetchval("select 1") == 1


async def test_a_connection_that_the_server_ended_meanwhile_is_not_handed_out(database: str) -> None:
    async with connected(database) as other, pool_on(database) as (pool, metrics):
        async with pool.connection() as db:
            ended = db.get_server_pid()
        closed = asyncio.Event()
        db.add_termination_listener(lambda _: closed.set())
        await other.execute("select pg_terminate_backend($1)", ended)
        async with asyncio.timeout(20):
            await closed.wait()
            async with pool.connection() as db:
                assert await db.fetchval("select pg_backend_pid()") != ended
        assert metrics.total("foldbus_store_connections_discarded_total") == 0


async def test_both_kinds_together_are_no_more_than_the_pools_size_and_closing_ends_them_all(database: str) -> None:
    count = (
        "select count(*) from pg_stat_activity where datname = current_database() and application_name like 'foldbus%'"
    )
    most = 0
    async with connected(database) as other:
        async with pool_on(database, size=3) as (pool, _), asyncio.timeout(30):

            async def driver() -> None:
                async with pool.connection() as db:
                    await db.fetchval("select pg_sleep(0.001)")

            async def sql() -> None:
                async with pool.sql() as connection:
                    await connection.exec_driver_sql("select pg_sleep(0.001)")

            for _round in range(5):
                await asyncio.gather(*(work() for _ in range(8) for work in (driver, sql)))
                most = max(most, await other.fetchval(count))
        assert most == 3
        async with asyncio.timeout(20):
            while await other.fetchval(count):  # noqa: ASYNC110 - the server tells nobody
                await asyncio.sleep(0.01)
