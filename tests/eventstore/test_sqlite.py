"""What is SQLite's own: one file, several processes, one writer, coalescing, faults of the file."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from bus.errors import Fenced
from bus.metrics import MemoryMetrics
from eventstore.errors import BadUnit, EventStoreError, SchemaMismatch, StoreUnavailable
from eventstore.port import Store, Unit, Verdict
from eventstore.sqlite import InlineExecutor, SqliteStore
from tests.eventstore.stores import (
    NOON,
    SERVICE,
    append,
    claim,
    commit,
    event,
    message,
    one,
    reply,
    timer,
    verdicts,
    version,
    wanted,
    whole_log,
)


@pytest_asyncio.fixture
async def path(tmp_path: Path) -> Path:
    where = tmp_path / "deep" / "store.sqlite"
    await SqliteStore.migrate(where, service=SERVICE)
    return where


@pytest_asyncio.fixture
async def store(path: Path) -> AsyncIterator[SqliteStore]:
    async with SqliteStore.open(path, service=SERVICE) as opened:
        yield opened


def unit(key: str, at: int = 0) -> Unit:
    return Unit(claim(key=key, reply=reply()), appends=(append(key, at),), outgoing=(message(key),))


async def run_python(code: str, *arguments: object) -> tuple[int, str]:
    """Another process, from the project's root."""
    root = Path(__file__).parents[2]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        *map(str, arguments),
        cwd=root,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await asyncio.wait_for(process.communicate(), 50)
    assert process.returncode is not None
    return process.returncode, out.decode()


# --- processes -------------------------------------------------------------------------------------------------------

WRITE = """
import asyncio, sys
from eventstore.port import Unit
from eventstore.sqlite import SqliteStore
from tests.eventstore.stores import SERVICE, append, claim, one, version, wanted

async def main(path, name):
    async with SqliteStore.open(path, service=SERVICE) as store:
        async def writer(n):
            for k in range(30):
                # read, then write: what a deferred transaction would be refused for
                while True:
                    at = await version(store, "shared")
                    outcome = await one(store, Unit(
                        claim(key=f"{name}-{n}"), appends=(append("shared", at), append(f"{name}-{n}", k))))
                    if outcome.verdict == "committed":
                        break
                    assert outcome.verdict == "conflict", outcome
        await asyncio.gather(*(writer(n) for n in range(4)))

asyncio.run(main(*sys.argv[1:]))
"""


async def test_two_processes_that_read_and_write_at_once_lose_nothing(path: Path, store: SqliteStore) -> None:
    answers = await asyncio.gather(run_python(WRITE, path, "a"), run_python(WRITE, path, "b"))
    assert [code for code, _ in answers] == [0, 0], answers
    assert await version(store, "shared") == 2 * 4 * 30
    assert [await version(store, f"{name}-{n}") for name in "ab" for n in range(4)] == [30] * 8
    positions = [record.position or 0 for record in await whole_log(store)]
    assert positions == list(range(1, 2 * 2 * 4 * 30 + 1))  # nothing was drawn in vain either


COMMIT_ONE = """
import asyncio, sys
from eventstore.port import Unit
from eventstore.sqlite import SqliteStore
from tests.eventstore.stores import SERVICE, append, one

async def main(path):
    async with SqliteStore.open(path, service=SERVICE) as store:
        await one(store, Unit(appends=(append("from-afar", 0),)))

asyncio.run(main(sys.argv[1]))
"""


async def test_a_commit_of_another_process_wakes_those_who_wait(path: Path, store: SqliteStore) -> None:
    waiting = asyncio.create_task(store.wait_past(0, timeout_s=60))
    code, said = await run_python(COMMIT_ONE, path)
    assert code == 0, said
    await asyncio.wait_for(waiting, 30)
    assert await store.head() == 1


async def test_a_commit_of_this_process_wakes_without_any_poll(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bus.ticks.Pace.next_look", lambda _, now: now + 3600.0)
    waiting = asyncio.create_task(store.wait_past(0, timeout_s=3600))
    await asyncio.sleep(0.01)
    await commit(store, unit("a"))
    await asyncio.wait_for(waiting, 30)


async def test_waking_across_stores_takes_milliseconds(path: Path, store: SqliteStore) -> None:
    async with SqliteStore.open(path, service=SERVICE) as other:
        took: list[float] = []
        for n in range(10):
            waiting = asyncio.create_task(store.wait_past(n, timeout_s=60))
            await asyncio.sleep(0.03)
            before = time.monotonic()
            await one(other, Unit(appends=(append("a", n),)))
            await waiting
            took.append(time.monotonic() - before)
    assert sorted(took)[5] < 1  # 20 ms of polling, and a busy machine
    assert max(took) < 30  # and one that stands still


HOLD = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=10)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.readline()
connection.execute("ROLLBACK")
print("free", flush=True)
"""


async def test_a_file_locked_by_another_process_is_waited_for_and_the_retries_are_counted(path: Path) -> None:
    metrics = MemoryMetrics()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLD, str(path), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert await process.stdout.readline() == b"held\n"
    async with SqliteStore.open(path, service=SERVICE, metrics=metrics) as store:
        writing = [asyncio.create_task(one(store, unit(str(n)))) for n in range(3)]
        while metrics.total("foldbus_store_busy_retries_total") < 5:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert not any(task.done() for task in writing)
        assert (await store.read_all(after=0, limit=10)).records == []  # readers are not held up
        process.stdin.write(b"\n")
        assert verdicts(await asyncio.wait_for(asyncio.gather(*writing), 30)) == ["ok"] * 3
    await process.wait()


async def test_a_file_that_stays_locked_is_unavailable_in_bounded_time_and_works_again_afterwards(path: Path) -> None:
    holder = sqlite3.connect(path, isolation_level=None)
    async with SqliteStore.open(path, service=SERVICE, busy_s=0.2) as store:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="lock"):
            await asyncio.wait_for(one(store, unit("a")), 10)
        with pytest.raises(StoreUnavailable, match="lock"):
            async with store.transaction():
                pass
        holder.execute("ROLLBACK")
        assert await commit(store, unit("a")) == ["ok"]
        async with store.transaction() as tx:
            assert verdicts(await store.commit([unit("b")], tx=tx)) == ["ok"]
    holder.close()


# --- coalescing ------------------------------------------------------------------------------------------------------


async def test_sixty_four_callers_share_few_transactions(path: Path) -> None:
    metrics = MemoryMetrics()
    async with SqliteStore.open(path, service=SERVICE, metrics=metrics) as store:
        answers = await asyncio.gather(*(store.commit([unit(str(n))]) for n in range(64)))
        assert {verdict for answer in answers for verdict in verdicts(answer)} == {"ok"}
        assert metrics.total("foldbus_store_transactions_total") <= 4
    assert metrics.total("foldbus_units_total", verdict="committed") == 64


async def test_callers_who_share_a_transaction_conflict_alone(path: Path) -> None:
    """Each call is judged by itself: a loser of one call takes nobody of another along."""
    metrics = MemoryMetrics()
    async with SqliteStore.open(path, service=SERVICE, metrics=metrics) as store:
        lost = Unit(claim(key="k"), appends=(append("s", 9),))
        calls = [store.commit([lost]), store.commit([Unit(claim(key="k"), appends=(append("s", 0),))])]
        calls += [store.commit([Unit(claim(key="k"), appends=(append("s", 1),)), lost])]
        answers = [verdicts(answer) for answer in await asyncio.gather(*calls)]
        assert metrics.total("foldbus_store_transactions_total") == 1
        assert answers == [["conflict"], ["ok"], ["ok", "conflict"]]


async def test_a_caller_whose_values_the_database_refuses_fails_alone(path: Path) -> None:
    metrics = MemoryMetrics()
    async with SqliteStore.open(path, service=SERVICE, metrics=metrics) as store:
        poisoned = Unit(claim(key="p"), appends=(append("p", 0, event(data=["no bytes"]), event()),))  # type: ignore[arg-type]
        units = [poisoned if n == 5 else unit(str(n)) for n in range(12)]
        answers = await asyncio.gather(*(store.commit([one]) for one in units), return_exceptions=True)
        assert metrics.total("foldbus_store_transactions_total") <= 2
        assert isinstance(answers[5], BadUnit)
        assert [verdicts(answer) for n, answer in enumerate(answers) if n != 5] == [["ok"]] * 11
        assert await version(store, "p") == 0
        positions = [record.position or 0 for record in await whole_log(store)]
        assert positions == list(range(1, 34))


async def test_a_call_given_up_while_it_waits_is_not_written(path: Path) -> None:
    async with SqliteStore.open(path, service=SERVICE) as store:
        started, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def slow(connection: sqlite3.Connection) -> None:
            loop.call_soon_threadsafe(started.set)
            assert go_on.wait(30)

        first = asyncio.create_task(store.database.write(slow))
        await started.wait()
        second = asyncio.create_task(store.commit([unit("given-up")]))
        third = asyncio.create_task(store.commit([unit("kept")]))
        await asyncio.sleep(0.01)
        second.cancel()
        go_on.set()
        await asyncio.gather(first, third)
        assert second.cancelled() or (await asyncio.gather(second, return_exceptions=True))
        assert await version(store, "given-up") == 0
        assert await version(store, "kept") == 1


# --- the database, for tables beside the store's ---------------------------------------------------------------------


async def test_a_work_that_fails_is_undone_alone_and_its_error_is_its_callers(store: SqliteStore) -> None:
    await store.database.write(lambda connection: connection.execute("CREATE TABLE mine (a INTEGER PRIMARY KEY)"))

    def twice(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO mine VALUES (1)")
        connection.execute("INSERT INTO mine VALUES (1)")

    works = [store.database.write(twice), store.commit([unit("a")]), store.database.write(twice)]
    failed, committed, again = await asyncio.gather(*works, return_exceptions=True)
    assert isinstance(failed, sqlite3.IntegrityError)
    assert isinstance(again, sqlite3.IntegrityError)
    assert isinstance(committed, list)
    count = await store.database.read(lambda connection: connection.execute("SELECT count(*) FROM mine").fetchone())
    assert count == (0,)


async def test_a_work_that_ends_the_transaction_itself_is_told_and_the_next_one_works(store: SqliteStore) -> None:
    with pytest.raises(EventStoreError, match="ended from within"):
        await store.database.write(lambda connection: connection.execute("COMMIT"))
    assert await commit(store, unit("a")) == ["ok"]


async def test_a_reader_sees_one_state_and_cannot_write(store: SqliteStore) -> None:
    await commit(store, unit("a"))

    def look(connection: sqlite3.Connection) -> list[int]:
        seen = [connection.execute("SELECT head FROM foldbus_log").fetchone()[0]]
        beside = sqlite3.connect(store.database.path, isolation_level=None)
        beside.execute("UPDATE foldbus_log SET head = 1000")
        beside.close()
        return [*seen, connection.execute("SELECT head FROM foldbus_log").fetchone()[0]]

    assert await store.database.read(look) == [3, 3]
    assert await store.head() == 1000
    with pytest.raises((sqlite3.Error, StoreUnavailable)):
        await store.database.read(lambda connection: connection.execute("DELETE FROM foldbus_events"))


async def test_a_cancelled_reader_gives_its_connection_back(store: SqliteStore) -> None:
    for _ in range(6):
        reading = asyncio.create_task(store.database.read(lambda connection: time.sleep(0.02)))
        await asyncio.sleep(0.001)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    assert await asyncio.wait_for(store.head(), 30) == 0


async def test_a_closed_store_says_so(path: Path) -> None:
    async with SqliteStore.open(path, service=SERVICE) as store:
        await commit(store, unit("a"))
    with pytest.raises(EventStoreError, match="closed"):
        await commit(store, unit("b"))
    with pytest.raises(EventStoreError, match="closed"):
        await store.head()


async def test_leaving_waits_for_what_was_asked_for(path: Path) -> None:
    async with SqliteStore.open(path, service=SERVICE) as store:
        tasks = [asyncio.create_task(store.commit([unit(str(n))])) for n in range(20)]
        await asyncio.sleep(0)
    assert all(task.done() for task in tasks) or await asyncio.gather(*tasks)
    async with SqliteStore.open(path, service=SERVICE) as store:
        assert len(await whole_log(store)) == 60


async def test_everything_runs_inline_for_a_simulation(path: Path) -> None:
    async with SqliteStore.open(path, service=SERVICE, executor=InlineExecutor()) as store:
        assert await commit(store, unit("a"), unit("b")) == ["ok", "ok"]
        assert len(await whole_log(store)) == 6
        with pytest.raises(ZeroDivisionError):
            await store.database.write(lambda connection: 1 // 0)
        assert await commit(store, unit("c")) == ["ok"]


# --- the file --------------------------------------------------------------------------------------------------------


async def test_opening_creates_nothing_and_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SchemaMismatch, match="db upgrade"):
        async with SqliteStore.open(tmp_path / "none.sqlite", service=SERVICE):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["empty", "behind", "ahead", "another service", "no database"])
async def test_opening_refuses_a_schema_that_is_not_its_own_and_changes_nothing(
    path: Path, tmp_path: Path, what: str
) -> None:
    service = SERVICE
    match what:
        case "empty":
            path = tmp_path / "empty.sqlite"
            path.touch()
        case "behind":
            _execute(path, "DELETE FROM foldbus_schema")
        case "ahead":
            _execute(path, "INSERT INTO foldbus_schema (number, name) VALUES (9999, 'later')")
            _execute(path, "UPDATE foldbus_log SET oldest=9999")
        case "another service":
            service = "other"
        case _:
            path = tmp_path / "text.sqlite"
            path.write_bytes(b"no database at all " * 100)
    before = path.read_bytes()
    with pytest.raises(EventStoreError if what == "no database" else SchemaMismatch, match=path.name):
        async with SqliteStore.open(path, service=service):
            pass
    assert path.read_bytes() == before
    if what in ("ahead", "another service"):
        with pytest.raises(SchemaMismatch):
            await SqliteStore.migrate(path, service=service)


def _execute(path: Path, sql: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(sql)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


async def test_a_restored_file_gets_a_new_epoch_old_records_keep_theirs(path: Path) -> None:
    async with SqliteStore.open(path, service=SERVICE) as store:
        first = store.epoch
        await commit(store, unit("a"))
    assert await SqliteStore.restored(path, service=SERVICE) == first + 1
    async with SqliteStore.open(path, service=SERVICE) as store:
        assert store.epoch == first + 1
        made = claim(key="b", reply=reply())
        await commit(store, Unit(made, appends=(append("b", 0),)))
        again = await one(store, Unit(made))
        assert again.reply is not None
        assert again.reply.token is not None
        assert again.reply.token.epoch == first + 1
        assert [record.epoch for record in await whole_log(store)] == [first] * 3 + [first + 1] * 2


async def test_acknowledged_means_synced_to_the_disk_in_the_write_ahead_log(store: SqliteStore) -> None:
    def settings(connection: sqlite3.Connection) -> list[Any]:
        return [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]

    full = 2
    assert await store.database.write(settings) == ["wal", full]
    async with store.transaction() as tx:
        assert (await tx.sql.execute(text("PRAGMA synchronous"))).scalar() == full


async def test_a_full_disk_is_unavailable_and_undoes_everything_of_the_transaction(path: Path) -> None:
    async with SqliteStore.open(path, service=SERVICE) as store:
        await commit(store, unit("before"))

        def shrink(connection: sqlite3.Connection) -> None:
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            connection.execute(f"PRAGMA max_page_count={pages}")

        await store.database.write(shrink)
        big = Unit(appends=(append("big", 0, event(data=b"x" * 300_000)),))
        answers = await asyncio.gather(store.commit([unit("a")]), store.commit([big]), return_exceptions=True)
        assert isinstance(answers[1], StoreUnavailable)
        await store.database.write(lambda connection: connection.execute("PRAGMA max_page_count=1000000"))
        assert verdicts(await store.commit([big])) == ["ok"]
        retried = await one(store, unit("a")) if isinstance(answers[0], StoreUnavailable) else answers[0][0]
        assert retried.verdict is Verdict.COMMITTED
        assert await version(store, "a") == 1
        positions = [record.position or 0 for record in await whole_log(store)]
        assert positions == list(range(1, 8))


async def test_a_file_that_cannot_be_written_is_unavailable_and_names_itself(store: SqliteStore) -> None:
    await store.database.write(lambda connection: connection.execute("PRAGMA query_only=ON"))
    with pytest.raises(StoreUnavailable, match=r"store\.sqlite: the file cannot be written to"):
        await commit(store, unit("a"))


# --- a user's own session --------------------------------------------------------------------------------------------


class _Foreign:
    """What the front makes of a session that is not the store's."""

    def __init__(self, sql: AsyncConnection) -> None:
        self.sql = sql


@pytest.mark.parametrize("ending", ["commit", "rollback"])
@pytest.mark.parametrize("first", ["unit", "read", "row"])
async def test_a_users_own_sqlalchemy_transaction_can_carry_units(
    path: Path, store: SqliteStore, ending: str, first: str
) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
    async with engine.begin() as sql:
        await sql.execute(text("CREATE TABLE customers (id text)"))
    async with engine.connect() as sql:
        if first == "read":
            await sql.execute(text("SELECT * FROM customers"))
        if first == "row":
            await sql.execute(text("INSERT INTO customers VALUES ('anna')"))
        assert verdicts(await store.commit([unit("a")], tx=_Foreign(sql))) == ["ok"]
        if first != "row":
            await sql.execute(text("INSERT INTO customers VALUES ('anna')"))
        assert await version(store, "a") == 0
        await (sql.commit() if ending == "commit" else sql.rollback())
    async with engine.connect() as sql:
        rows = list((await sql.execute(text("SELECT id FROM customers"))).scalars())
    await engine.dispose()
    assert rows == (["anna"] if ending == "commit" else [])
    assert await version(store, "a") == len(rows)
    assert len(await whole_log(store)) == 3 * len(rows)


async def test_a_transaction_on_another_file_is_refused(tmp_path: Path, store: SqliteStore) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'other.sqlite'}")
    async with engine.connect() as sql:
        with pytest.raises(EventStoreError, match=r"other\.sqlite, wanted one on"):
            await store.commit([unit("a")], tx=_Foreign(sql))
    await engine.dispose()


# --- time ------------------------------------------------------------------------------------------------------------


class Hands:
    """A clock moved by hand."""

    def __init__(self) -> None:
        self.moved = 0.0

    def now(self) -> Any:
        from datetime import timedelta

        return NOON + timedelta(seconds=self.moved)

    def monotonic(self) -> float:
        return self.moved


async def test_the_clock_given_decides_what_is_due_and_who_leads(path: Path) -> None:
    hands = Hands()
    async with (
        SqliteStore.open(path, service=SERVICE, clock=hands) as store,
        SqliteStore.open(path, service=SERVICE, clock=hands) as other,
    ):
        await commit(store, Unit(timers=(due := timer(hands.now()), later := timer(NOON.replace(day=1, month=3)))))
        assert list(await store.timers.due(limit=10, lease_s=3600)) == [due]
        hands.moved = 3600
        assert list(await store.timers.due(limit=10)) == [due]
        hands.moved = 24 * 3600
        assert {one.id for one in await store.timers.due(limit=10)} == {due.id, later.id}

        async with store.leases.lead("relay", ttl_s=10) as zombie:
            await store.leases.mark(zombie.lease, old=0, new=1)
            assert not zombie.lost
            hands.moved += 11
            assert zombie.lost
            async with asyncio.timeout(30), other.leases.lead("relay", ttl_s=10) as leader:
                assert leader.lease.position == 1
                with pytest.raises(Fenced):
                    await store.leases.mark(zombie.lease, old=1, new=2)
                await other.leases.mark(leader.lease, old=1, new=3)


async def test_the_store_is_a_store(store: SqliteStore) -> None:
    port: Store = store
    assert (await port.load([wanted("a")]))[0].version == 0


async def test_transactions_of_one_process_wait_in_order_and_do_not_ask_for_the_file_side_by_side(path: Path) -> None:
    metrics, order = MemoryMetrics(), list[int]()

    async def one(store: SqliteStore, number: int) -> None:
        async with store.transaction() as tx:
            await tx.sql.execute(text("select 1"))
            order.append(number)
            await asyncio.sleep(0.01)

    async with SqliteStore.open(path, service=SERVICE, metrics=metrics) as store:
        await asyncio.gather(*(one(store, number) for number in range(8)))
        assert order == list(range(8))
        assert metrics.total("foldbus_store_busy_retries_total") == 0


async def test_a_transaction_that_waits_for_another_of_its_process_too_long_says_so(path: Path) -> None:
    async with SqliteStore.open(path, service=SERVICE, busy_s=0.05) as store, store.transaction():
        with pytest.raises(StoreUnavailable, match="other transactions of this process went on for"):
            async with store.transaction():
                raise AssertionError("begun")


@pytest.mark.parametrize("kind", ["transaction", "reading"])
async def test_a_statement_that_is_cancelled_ends_and_gives_the_files_lock_back(path: Path, kind: str) -> None:
    """Though a traceback still refers to the statement, and nothing collects it."""
    minutes = (
        "with recursive n(x) as (select 1 union all select x + 1 from n where x < 300000000) select count(*) from n"
    )
    other = sqlite3.connect(path, timeout=20, isolation_level=None, check_same_thread=False)
    async with SqliteStore.open(path, service=SERVICE) as store:
        at_work, driver, half_read = asyncio.Event(), list[Any](), list[Any]()

        async def work() -> None:
            async with getattr(store, kind)() as tx:
                driver.append((await tx.sql.get_raw_connection()).driver_connection)
                half_read.append(await tx.sql.stream(text("select * from sqlite_schema")))
                await half_read[0].fetchone()
                loop = asyncio.get_running_loop()
                await driver[0].set_progress_handler(lambda: loop.call_soon_threadsafe(at_work.set) and None, 10_000)
                await tx.sql.execute(text(minutes))

        gc.disable()
        try:
            task = asyncio.create_task(work())
            await asyncio.wait_for(at_work.wait(), 30)
            task.cancel()
            assert (await asyncio.wait({task}, timeout=20))[0], "who cancels waits for the statement"
            with pytest.raises(asyncio.CancelledError) as kept:
                await task
            await asyncio.to_thread(other.execute, "BEGIN IMMEDIATE")
            await asyncio.to_thread(driver[0]._thread.join, 20)
            assert not driver[0]._thread.is_alive(), "the statement goes on"
            assert kept.tb is not None
        finally:
            gc.enable()
            other.close()
        async with getattr(store, kind)() as tx:
            assert (await tx.sql.execute(text("select 1"))).scalar_one() == 1
