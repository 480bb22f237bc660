"""The floor lock: a reader of the whole log loses nothing, inverts nothing, and is not held up by strangers.

Each interleaving here lost an event, or froze a reader, in some other design. They are forced, not left to luck; the
last test adds sixteen writers at random, and a naive reader that must lose events: a test that it does not fail proves
nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from bus.envelope import Envelope
from eventstore.errors import SchemaMismatch
from eventstore.port import ANY, Unit, Verdict
from eventstore.postgres import PostgresStore
from tests.eventstore.stores import IDS, append, claim, event, message, stream, whole_log

SERVICE = "shop"
INSERT = """insert into foldbus_shop.events (category, stream, version, id, type, key, made_at, data, meta)
            values ('order', $1, $2, $3, 'shop.order-placed.v1', $1, now(), '{}', '{"kind":"event","source":"shop",
            "correlation":"00000000000000000000000000000001"}') returning position"""


@pytest_asyncio.fixture
async def store(database: str) -> AsyncIterator[PostgresStore]:
    await PostgresStore.migrate(database, service=SERVICE)
    async with PostgresStore.open(database, service=SERVICE, pool_size=20) as opened:
        yield opened


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[Any]:
    db = await asyncpg.connect(dsn)
    try:
        yield db
    finally:
        db.terminate()


async def put(store: PostgresStore, name: str, version: int = 0, *, tx: Any = None) -> int:
    """Appends one event; answers its position."""
    (outcome,) = await store.commit([Unit(appends=(append(name, version),))], tx=tx)
    assert outcome.verdict is Verdict.COMMITTED
    return outcome.position


async def naive(db: Any, after: int) -> list[int]:
    """What everybody writes first."""
    found = await db.fetch("select position from foldbus_shop.events where position > $1 order by position", after)
    return [row[0] for row in found]


def names(records: Any) -> list[str]:
    return [f"{one.stream.id}:{one.version}" for one in records]


@pytest.mark.parametrize("others", [0, 1], ids=["alone", "in a batch"])
async def test_an_event_that_commits_after_a_later_one_is_delivered_and_a_naive_reader_loses_it(
    store: PostgresStore, database: str, others: int
) -> None:
    async with connected(database) as db:
        async with store.transaction() as tx:
            units = [Unit(appends=(append("a", version),)) for version in range(1 + others)]
            first = (await store.commit(units, tx=tx))[0].position
            second = await put(store, "b")
            assert second > first

            page = await store.read_all(after=0, limit=10)
            assert (page.records, page.upto) == ([], first - 1)
            seen = await naive(db, 0)
            assert seen == [second]
        later = await store.read_all(after=page.upto, limit=10)
        assert names(later.records) == [*(f"a:{n + 1}" for n in range(1 + others)), "b:1"]
        assert seen + await naive(db, seen[-1]) == [second], "the naive reader must lose the first event"


@pytest.mark.parametrize("others", [0, 1], ids=["alone", "in a batch"])
async def test_units_of_a_transaction_that_turned_triggers_off_are_not_skipped(
    store: PostgresStore, others: int
) -> None:
    async with store.transaction() as tx:
        await tx.sql.exec_driver_sql("set local session_replication_role = replica")
        await store.commit([Unit(appends=(append("a", version),)) for version in range(1 + others)], tx=tx)
        await put(store, "b")
        page = await store.read_all(after=0, limit=10)
        assert (page.records, page.upto) == ([], 0)
    later = await store.read_all(after=page.upto, limit=10)
    assert names(later.records) == [*(f"a:{n + 1}" for n in range(1 + others)), "b:1"]


async def test_transaction_ids_in_the_other_order_than_positions_change_nothing(store: PostgresStore) -> None:
    async with store.transaction() as older:
        await older.sql.exec_driver_sql("select pg_current_xact_id()")
        async with store.transaction() as younger:
            low = await put(store, "b", tx=younger)
            high = await put(store, "a", tx=older)
            assert low < high
            await older.sql.commit()
            page = await store.read_all(after=0, limit=10)
            assert not page.records
        later = await store.read_all(after=page.upto, limit=10)
        assert names(later.records) == ["b:1", "a:1"]


async def test_a_transaction_that_began_earlier_appends_the_later_version_and_it_is_read_later(
    store: PostgresStore,
) -> None:
    async with store.transaction() as tx:
        await tx.sql.exec_driver_sql("create table elsewhere (n int)")
        await put(store, "s", 0)
        await put(store, "s", 1, tx=tx)
    assert names((await store.read_all(after=0, limit=10)).records) == ["s:1", "s:2"]


async def test_a_commit_between_the_watermark_and_the_rows_is_not_skipped(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader has its watermark; then the appender commits, and another one with it; then the reader reads rows."""
    fresh = store._watermark.fresh
    async with store.transaction() as tx:
        await put(store, "a", tx=tx)
        await put(store, "b")

        async def then_commit() -> int:
            head = await fresh()
            await tx.sql.commit()
            await put(store, "c")
            return head

        monkeypatch.setattr(store._watermark, "fresh", then_commit)
        page = await store.read_all(after=0, limit=10)
        monkeypatch.undo()
        later = await store.read_all(after=page.upto, limit=10)
    assert names([*page.records, *later.records]) == ["a:1", "b:1", "c:1"]


async def test_the_watermark_refuses_to_be_read_in_one_long_snapshot(store: PostgresStore, database: str) -> None:
    async with connected(database) as db:
        async with db.transaction(isolation="repeatable_read"):
            with pytest.raises(asyncpg.ActiveSQLTransactionError, match="READ COMMITTED"):
                await db.fetch("select * from foldbus_shop.watermark()")


async def test_the_store_reads_committed_whatever_the_databases_default_is(store: PostgresStore, database: str) -> None:
    async with connected(database) as db:
        name = await db.fetchval("select current_database()")
        await db.execute(f"alter database {name} set default_transaction_isolation = 'serializable'")
    async with PostgresStore.open(database, service=SERVICE) as opened:
        await put(opened, "a")
        assert names((await opened.read_all(after=0, limit=10)).records) == ["a:1"]


async def test_the_very_first_event_is_not_skipped_while_it_is_uncommitted(store: PostgresStore) -> None:
    async with store.transaction() as tx:
        first = await put(store, "a", tx=tx)
        page = await store.read_all(after=0, limit=10)
        assert (first, page.upto, await store.head()) == (1, 0, 0)
    assert names((await store.read_all(after=page.upto, limit=10)).records) == ["a:1"]


@pytest.mark.parametrize(
    "breaking",
    [
        "alter sequence foldbus_shop.position cache 20",
        "alter table foldbus_shop.events disable trigger floor_lock",
        "drop trigger floor_lock on foldbus_shop.outgoing",
        "update foldbus.logs set number = number + 1",
    ],
)
async def test_a_database_in_which_the_lock_would_not_hold_is_refused(
    store: PostgresStore, database: str, breaking: str
) -> None:
    async with connected(database) as db:
        await db.execute(breaking)
    with pytest.raises(SchemaMismatch):
        async with PostgresStore.open(database, service=SERVICE):
            pass


async def test_transactions_that_have_nothing_to_do_with_the_log_hold_up_nobody(
    store: PostgresStore, database: str, postgres: str
) -> None:
    """Long writers in this database and in another one, somebody's own advisory lock, and an open appender of another
    service's log in this database."""
    await PostgresStore.migrate(database, service="stock")
    await put(store, "a", 0)
    async with connected(database) as here, connected(postgres) as elsewhere, store.transaction() as tx:
        await tx.sql.exec_driver_sql("create table mine (n int)")
        async with here.transaction(), elsewhere.transaction():
            await here.execute("create table other (n int)")
            await here.execute("select pg_advisory_xact_lock((1::bigint << 48) | 0)")
            await elsewhere.execute("select pg_current_xact_id()")
            async with PostgresStore.open(database, service="stock") as stock, stock.transaction() as theirs:
                await put(stock, "x", tx=theirs)
                for version in (1, 2):
                    await put(store, "a", version)
                page = await store.read_all(after=0, limit=10)
                assert names(page.records) == ["a:1", "a:2", "a:3"]
                assert page.upto == page.head == 3


async def test_each_service_has_a_log_number_of_its_own(store: PostgresStore, database: str) -> None:
    await asyncio.gather(*(PostgresStore.migrate(database, service=name) for name in ("stock", "stock", "pay", "shop")))
    async with connected(database) as db:
        found = await db.fetch("select number, schema from foldbus.logs order by number")
        assert sorted(row["schema"] for row in found) == ["foldbus_pay", "foldbus_shop", "foldbus_stock"]
        assert [row["number"] for row in found] == [1, 2, 3]
        for row in found:
            assert await db.fetchval(f"select {row['schema']}.log_number()") == row["number"]


async def test_a_direct_insert_takes_the_lock_too(store: PostgresStore, database: str) -> None:
    async with connected(database) as db:
        async with db.transaction():
            await db.execute(
                "insert into foldbus_shop.streams (category, id, version, previous) values ('order', 'd', 1, 0)"
            )
            drawn = await db.fetchval(INSERT, "d", 1, IDS.new())
            await put(store, "a")
            page = await store.read_all(after=0, limit=10)
            assert (page.records, page.upto) == ([], drawn - 1)
        assert names((await store.read_all(after=0, limit=10)).records) == ["d:1", "a:1"]


async def test_a_copy_into_the_log_takes_the_lock_too(store: PostgresStore, database: str) -> None:
    columns = ["id", "type", "key", "topic", "made_at", "data", "meta"]
    sent = message("k")
    row = (
        sent.id,
        sent.type,
        "k",
        sent.topic,
        sent.time,
        b"{}",
        '{"kind":"command","source":"shop","correlation":"1"}',
    )
    async with connected(database) as db:
        async with db.transaction():
            await db.copy_records_to_table("outgoing", schema_name="foldbus_shop", columns=columns, records=[row])
            await put(store, "a")
            assert await store.head() == 0
        assert await store.head() == 2


async def test_a_rolled_back_savepoint_and_a_rolled_back_transaction_free_the_readers(
    store: PostgresStore,
) -> None:
    async with store.transaction() as tx:
        savepoint = await tx.sql.begin_nested()
        await put(store, "a", tx=tx)
        await put(store, "b")
        assert await store.head() == 0
        await savepoint.rollback()
        assert await store.head() == 2
        assert names((await store.read_all(after=0, limit=10)).records) == ["b:1"]
        await put(store, "a", tx=tx)
        await put(store, "b", 1)
        assert await store.head() == 2
        await tx.sql.rollback()
        assert await store.head() == 4
    assert names((await store.read_all(after=0, limit=10)).records) == ["b:1", "b:2"]


async def test_a_prepared_transaction_keeps_the_lock_until_it_is_decided(store: PostgresStore, database: str) -> None:
    async with connected(database) as db:
        if int(await db.fetchval("show max_prepared_transactions")) == 0:
            pytest.fail("the test server must allow prepared transactions: max_prepared_transactions = 2")
        await db.execute("begin")
        await db.execute(INSERT.replace("$1", "'p'").replace("$2", "1").replace("$3", f"'{IDS.new()}'"))
        await db.execute("prepare transaction 'p'")
    await put(store, "a")
    page = await store.read_all(after=0, limit=10)
    assert (page.records, page.upto) == ([], 0)
    async with connected(database) as db:
        await db.execute("commit prepared 'p'")
    assert names((await store.read_all(after=0, limit=10)).records) == ["p:1", "a:1"]


async def test_a_killed_appender_holds_up_nobody(store: PostgresStore, database: str) -> None:
    async with connected(database) as victim, connected(database) as db:
        await victim.execute("begin")
        await victim.execute("insert into foldbus_shop.streams values ('order', 'v', 1, 0)")
        await victim.fetchval(INSERT, "v", 1, IDS.new())
        await put(store, "a")
        assert await store.head() == 0
        await db.execute("select pg_terminate_backend($1)", victim.get_server_pid())
        await asyncio.wait_for(_head_is(store, 2), 30)
    assert names((await store.read_all(after=0, limit=10)).records) == ["a:1"]


async def _head_is(store: PostgresStore, wanted: int) -> None:
    while await store.head() < wanted:  # noqa: ASYNC110 - a backend's end tells nobody
        await asyncio.sleep(0.01)


async def test_the_watermark_never_goes_back_within_a_process(store: PostgresStore, database: str) -> None:
    """An appender read the sequence, slept, and locks only now: its floor is low, what it draws is not."""
    for version in range(3):
        await put(store, "a", version)
    assert await store.head() == 3
    async with connected(database) as db, db.transaction():
        await db.execute("select pg_advisory_xact_lock_shared((1::bigint << 48) | 1)")
        assert await db.fetchval("select safe from foldbus_shop.watermark()") == 1
        assert await store.head() == 3
        page = await store.read_all(after=1, limit=10)
        assert (names(page.records), page.upto, page.head) == (["a:2", "a:3"], 3, 3)


async def test_readers_that_ask_together_share_one_watermark(store: PostgresStore) -> None:
    asked = 0
    query = store._watermark._query

    async def counted() -> tuple[int, int]:
        nonlocal asked
        asked += 1
        return await query()

    store._watermark._query = counted
    await put(store, "a")
    heads = await asyncio.gather(*(store.head() for _ in range(50)))
    assert set(heads) == {1}
    assert asked <= 2


async def test_a_waiting_reader_is_not_woken_into_a_busy_loop_by_an_open_appender(store: PostgresStore) -> None:
    async with store.transaction() as tx:
        await put(store, "a", tx=tx)
        await put(store, "b")
        waiting = asyncio.create_task(store.wait_past(0, timeout_s=30))
        done, _ = await asyncio.wait([waiting], timeout=0.3)
        assert not done, "nothing can be read yet"
    await asyncio.wait_for(waiting, 30)
    assert len((await store.read_all(after=0, limit=10)).records) == 2


async def test_another_process_is_woken_by_a_notification(store: PostgresStore, database: str) -> None:
    """The poll is taken away, so only the notification can wake it."""
    async with PostgresStore.open(database, service=SERVICE) as other:
        await asyncio.wait_for(_listening(database, 2), 30)
        woken = other._wakeups.woken()
        await put(store, "a")
        await asyncio.wait_for(woken.wait(), 30)
        assert await other.head() == 1


async def _listening(dsn: str, count: int) -> None:
    async with connected(dsn) as db:
        query = "select count(*) from pg_stat_activity where datname = current_database() and query ilike 'listen%'"
        while await db.fetchval(query) < count:  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0.01)


# --- at random -------------------------------------------------------------------------------------------------------

WRITERS = 16
SECONDS = 8.0


async def _writer(store: PostgresStore, dsn: str, number: int, until: float) -> None:
    """One of three kinds: plain commits; commits within transactions that stay open; direct inserts. Several events
    each, some rolled back, some that wrote elsewhere before."""
    rnd, version, loop = random.Random(number), 0, asyncio.get_running_loop()
    async with connected(dsn) as db:
        while loop.time() < until:
            count = rnd.choice((1, 1, 3, 10))
            name = f"s-{number}"
            units = [
                Unit(
                    claim=claim(key=name),
                    appends=(append(name, version, *(event(name) for _ in range(count))),),
                    outgoing=(message(name),),
                )
            ]
            undone = rnd.random() < 0.1
            match number % 3:
                case 0:
                    (outcome,) = await store.commit(units)
                    assert outcome.verdict is Verdict.COMMITTED
                    undone = False
                case 1:
                    async with store.transaction() as tx:
                        if rnd.random() < 0.3:
                            await tx.sql.exec_driver_sql("select pg_current_xact_id()")
                        (outcome,) = await store.commit(units, tx=tx)
                        assert outcome.verdict is Verdict.COMMITTED
                        await _held(rnd)
                        if undone:
                            await tx.sql.rollback()
                case _:
                    transaction = db.transaction()
                    await transaction.start()
                    for nth in range(count):
                        await db.fetchval(INSERT, name, version + nth + 1, IDS.new())
                    await _held(rnd)
                    await (transaction.rollback() if undone else transaction.commit())
            version += 0 if undone else count


async def _held(rnd: random.Random) -> None:
    if rnd.random() < 0.4:
        await asyncio.sleep(rnd.random() * 0.03)


async def _reader(store: PostgresStore, done: asyncio.Event, seen: list[Envelope]) -> None:
    after = 0
    while True:
        last_round = done.is_set()
        page = await store.read_all(after=after, limit=500, outgoing=True)
        assert all(one.position is not None and after < one.position <= page.upto <= page.head for one in page.records)
        seen += page.records
        if page.upto == after:
            if last_round:
                return
            await store.wait_past(after, timeout_s=0.2)
        after = page.upto


async def _naive_reader(dsn: str, done: asyncio.Event, seen: list[int]) -> None:
    async with connected(dsn) as db:
        while True:
            last_round = done.is_set()
            found = await naive(db, seen[-1] if seen else 0)
            seen += found
            if not found:
                if last_round:
                    return
                await asyncio.sleep(0.002)


async def test_sixteen_writers_with_open_transactions_and_rollbacks_lose_a_reader_nothing(
    store: PostgresStore, database: str
) -> None:
    done = asyncio.Event()
    seen: list[Envelope] = []
    naively: list[int] = []
    until = asyncio.get_running_loop().time() + SECONDS
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_reader(store, done, seen))
        tasks.create_task(_naive_reader(database, done, naively))
        async with asyncio.TaskGroup() as writers:
            for number in range(WRITERS):
                writers.create_task(_writer(store, database, number, until))
        done.set()

    async with connected(database) as db:
        query = "select position from foldbus_shop.events union all select position from foldbus_shop.outgoing"
        committed = sorted(row[0] for row in await db.fetch(query))
        events = {row[0] for row in await db.fetch("select position from foldbus_shop.events")}
    got = [one.position for one in seen]
    assert got == committed, f"missed {len(set(committed) - set(got))}, twice {len(got) - len(set(got))}"
    versions: dict[str, int] = {}
    for one in seen:
        if one.stream is not None:
            assert one.version == versions.get(one.stream.id, 0) + 1
            versions[one.stream.id] = one.version
    assert len(versions) == WRITERS
    assert events - set(naively), "the naive reader lost nothing: this run proves nothing"
    print(f"\n{len(committed)} rows committed, 0 missed; the naive reader missed {len(events - set(naively))} events")


async def test_positions_of_units_are_in_their_order_also_when_appended_to_any_version(store: PostgresStore) -> None:
    outcomes = await store.commit([Unit(appends=(append("a", ANY, 2),)) for _ in range(5)])
    assert [outcome.position for outcome in outcomes] == [2, 4, 6, 8, 10]
    assert [outcome.versions[stream("a")] for outcome in outcomes] == [2, 4, 6, 8, 10]
    assert len(await whole_log(store)) == 10
