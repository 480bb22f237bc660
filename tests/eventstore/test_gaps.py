"""More ways to a gap, forced: holders that look finished or dead, and what ends them; what a broken reader would do.

`test_floor_lock.py` has the others.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from eventstore.errors import StoreUnavailable
from eventstore.port import Unit, Verdict
from eventstore.postgres import PostgresStore
from tests.eventstore.stores import IDS, SERVICE, append, claim, commit, event, whole_log
from tests.eventstore.test_standby import own_server

INSERT = """insert into foldbus_shop.events (position, category, stream, version, id, type, key, made_at, data, meta)
            values ($1, 'order', 'a', 1, $2, 'shop.order-placed.v1', 'a', now(), '{}',
            '{"kind":"event","source":"shop","correlation":"00000000000000000000000000000001"}')"""


@pytest_asyncio.fixture
async def store(database: str) -> AsyncIterator[PostgresStore]:
    await PostgresStore.migrate(database, service=SERVICE)
    async with PostgresStore.open(database, service=SERVICE) as opened:
        yield opened


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[Any]:
    db = await asyncpg.connect(dsn)
    try:
        yield db
    finally:
        db.terminate()


async def put(store: PostgresStore, name: str, version: int = 0, **options: Any) -> int:
    (outcome,) = await store.commit([Unit(appends=(append(name, version),))], **options)
    assert outcome.verdict is Verdict.COMMITTED
    return outcome.position


def names(records: Any) -> list[str]:
    return [one.stream.id for one in records]


async def test_a_gap_holder_that_a_snapshot_takes_for_finished_or_not_begun_still_holds_its_gap(
    store: PostgresStore, database: str
) -> None:
    """It has drawn its position, but its transaction id is at or above the snapshot's xmax, or not even given: a fence
    made of transaction ids declares it dead while it lives."""
    await put(store, "warm")
    async with connected(database) as holder, holder.transaction():
        await holder.execute("select foldbus_shop.lock_floor()")
        drawn = await holder.fetchval("select nextval('foldbus_shop.position')")
        await put(store, "b")
        async with connected(database) as db:
            mine = await holder.fetchval("select pg_current_xact_id_if_assigned()::text::bigint")
            xmax = await db.fetchval("select pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
            assert (
                mine is None
                or mine >= xmax
                or mine
                in [row[0] for row in await db.fetch("select pg_snapshot_xip(pg_current_snapshot())::text::bigint")]
            )
        page = await store.read_all(after=0, limit=10)
        assert (names(page.records), page.upto) == (["warm"], drawn - 1)
        await holder.execute("insert into foldbus_shop.streams values ('order', 'a', 1, 0)")
        await holder.execute(INSERT, drawn, IDS.new())
    later = await store.read_all(after=page.upto, limit=10)
    assert names(later.records) == ["a", "b"]


async def test_a_reader_waits_out_an_appender_that_is_slower_than_each_of_its_timeouts(store: PostgresStore) -> None:
    """Whatever gives up on a gap after a while loses this event."""
    after = 0
    async with store.transaction() as tx:
        await put(store, "a", tx=tx)
        await put(store, "b")
        for _ in range(10):
            await store.wait_past(after, timeout_s=0.02)
            page = await store.read_all(after=after, limit=10)
            assert (page.records, page.upto) == ([], 0)
            after = page.upto
    assert names((await store.read_all(after=after, limit=10)).records) == ["a", "b"]


async def test_an_appender_that_forgot_its_transaction_is_ended_by_the_server_and_readers_go_on(
    store: PostgresStore,
) -> None:
    async with store.connection() as db:
        assert await db.fetchval("show idle_in_transaction_session_timeout") == "1min"

    async def forget() -> None:
        async with store.transaction() as tx:
            await put(store, "a", tx=tx)
            await put(store, "b")
            assert await store.head() == 0
            await tx.sql.exec_driver_sql("set idle_in_transaction_session_timeout = '300ms'")
            async with asyncio.timeout(20):
                while await store.head() < 2:  # noqa: ASYNC110 - a backend's end tells nobody
                    await asyncio.sleep(0.02)

    with pytest.raises(StoreUnavailable):
        await forget()
    assert names((await store.read_all(after=0, limit=10)).records) == ["b"]


async def test_a_long_read_elsewhere_holds_up_no_reader_and_sees_no_newer_event(
    store: PostgresStore, database: str
) -> None:
    """A backup, say: one snapshot for an hour."""
    await put(store, "a")
    async with connected(database) as backup, backup.transaction(isolation="repeatable_read", readonly=True):
        assert await backup.fetchval("select count(*) from foldbus_shop.events") == 1
        await put(store, "b")
        assert names((await store.read_all(after=0, limit=10)).records) == ["a", "b"]
        assert await backup.fetchval("select count(*) from foldbus_shop.events") == 1


async def test_a_disk_that_is_full_is_unavailable_and_the_same_unit_goes_in_when_there_is_room(
    store: PostgresStore, database: str
) -> None:
    """The server's own answer to a full disk (53100), raised by a trigger: a small file system cannot be mounted
    everywhere."""
    sql = """create function pg_temp_full() returns trigger language plpgsql as $$ begin
             raise exception 'could not extend file' using errcode = 'disk_full'; end $$;
             create trigger full_disk after insert on foldbus_shop.events
             for each row execute function pg_temp_full()"""
    async with connected(database) as db:
        await db.execute(sql)
        for units in (
            [Unit(claim(), appends=(append("a", 0),))],
            [Unit(claim(key=k), appends=(append(k, 0, 2),)) for k in "bc"],
        ):
            with pytest.raises(StoreUnavailable, match="53100"):
                await store.commit(units)
            assert await whole_log(store) == []
            await db.execute("alter table foldbus_shop.events disable trigger full_disk")
            assert await commit(store, *units) == ["ok"] * len(units)
            await db.execute("alter table foldbus_shop.events enable trigger full_disk")
            await db.execute("delete from foldbus_shop.events")
        assert await commit(store, Unit(claim(key="reads go on"))) == ["ok"]


async def test_a_database_that_turned_read_only_is_unavailable_for_writers_and_read_on(
    store: PostgresStore, database: str
) -> None:
    """A primary that was demoted, or a disk that an operator protects."""
    await put(store, "a")
    async with connected(database) as db:
        name = await db.fetchval("select current_database()")
        await db.execute(f"alter database {name} set default_transaction_read_only = on")
    async with PostgresStore.open(database, service=SERVICE) as opened:
        unit = Unit(claim(), appends=(append("b", 0),))
        with pytest.raises(StoreUnavailable, match="25006"):
            await opened.commit([unit])
        assert names((await opened.read_all(after=0, limit=10)).records) == ["a"]
    async with connected(database) as db:
        await db.execute("set default_transaction_read_only = off")
        await db.execute(f"alter database {name} reset default_transaction_read_only")
    async with PostgresStore.open(database, service=SERVICE) as opened:
        assert await commit(opened, unit) == ["ok"]


@pytest.mark.timeout(300)
async def test_a_crash_that_takes_back_positions_which_nobody_committed_costs_no_event() -> None:
    """A sequence is as durable as the last commit: positions that a rolled back transaction drew, and that a reader has
    seen to be gone, may be drawn once more after a crash. A watermark remembered from before would let a reader pass
    the first of them while it is on its way."""
    server = await asyncio.to_thread(own_server)
    try:
        await _crash(server)
    finally:
        await asyncio.to_thread(server.close)


async def _crash(server: Any) -> None:
    dsn = server.dsn
    await PostgresStore.migrate(dsn, service=SERVICE)
    async with PostgresStore.open(dsn, service=SERVICE, timeout_s=20) as store:
        await put(store, "a")
        async with connected(dsn) as db:  # what no commit flushes, it would, a moment later
            sql = "select pid from pg_stat_activity where backend_type in ('walwriter', 'checkpointer')"
            for row in await db.fetch(sql):
                os.kill(row["pid"], signal.SIGSTOP)
        async with store.transaction() as tx:
            for n in range(4):
                await one_in(store, tx, n)
            await tx.sql.rollback()
        passed = await store.head()
        assert passed > 32
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        async with PostgresStore.open(dsn, service=SERVICE) as other:
            async with other.transaction() as tx:
                drawn = await put(other, "late", tx=tx)
                await put(other, "early")
                assert drawn < passed, "this run proves nothing: the sequence kept what nobody committed"
                seen = []
                after = 1
                for _ in range(20):
                    try:
                        page = await store.read_all(after=after, limit=1)
                    except StoreUnavailable:  # connections from before the crash
                        continue
                    seen += names(page.records)
                    after = max(after, page.upto)
            page = await store.read_all(after=after, limit=10)
            assert [*seen, *names(page.records)] == ["late", "early"]


async def test_events_far_below_the_end_do_not_wait_for_where_the_end_is(database: str) -> None:
    await PostgresStore.migrate(database, service=SERVICE)
    async with PostgresStore.open(database, service=SERVICE, pool_size=2) as store:
        for n in range(6):
            await put(store, f"e-{n}")
        inner: Any = store
        watermark, asked, answer = inner._watermark, asyncio.Event(), asyncio.Event()
        await store.head()
        async with store.connection() as first:
            await store.head()  # on the other one: each was asked once now, and can tell of a crash
        async with store.connection() as second, store.connection() as third:
            assert first in (second, third)
            assert watermark.vouched(second)
            assert watermark.vouched(third)
        query, below = watermark._query, inner._reading._query_below
        arrived: list[int] = []

        async def held() -> Any:
            asked.set()
            await answer.wait()
            return await query()

        async def noted(sql: str, after: int, limit: int) -> Any:
            found = await below(sql, after, limit)
            arrived.append(len(found))
            return found

        watermark._query, inner._reading._query_below = held, noted
        reading = asyncio.create_task(store.read_all(after=0, limit=4))
        async with asyncio.timeout(20):
            await asked.wait()
            while not arrived:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert not reading.done()
        answer.set()
        page = await reading
        assert (arrived, names(page.records)) == ([4], ["e-0", "e-1", "e-2", "e-3"])
        assert page.head == await store.head() > page.upto == page.records[-1].position


async def one_in(store: PostgresStore, tx: Any, n: int) -> None:
    unit = Unit(appends=(append(f"gone-{n}", 0, *(event(f"gone-{n}") for _ in range(30))),))
    (outcome,) = await store.commit([unit], tx=tx)
    assert outcome.verdict is Verdict.COMMITTED
