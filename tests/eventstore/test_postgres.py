"""What only PostgreSQL can get wrong: connections, locks, error codes, migrations, several processes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest
import pytest_asyncio
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from bus.metrics import MemoryMetrics
from bus.seams import SystemClock
from eventstore.errors import BadUnit, EventStoreError, SchemaMismatch, StoreUnavailable
from eventstore.port import ANY, Fence, Outcome, Unit, Verdict
from eventstore.postgres import PostgresStore, schema
from eventstore.postgres.pool import url
from tests.eventstore.comparing import by_rank, random_units, ranks, with_ranks
from tests.eventstore.locks import blocked, connected, nobody_blocked
from tests.eventstore.stores import (
    CONSUMER,
    IDS,
    append,
    claim,
    commit,
    event,
    message,
    one,
    reply,
    undo,
    verdicts,
    version,
    wanted,
    whole_log,
)

SERVICE = "shop"


@pytest.fixture
def metrics() -> MemoryMetrics:
    return MemoryMetrics()


@pytest_asyncio.fixture
async def store(database: str, metrics: MemoryMetrics) -> AsyncIterator[PostgresStore]:
    await PostgresStore.migrate(database, service=SERVICE)
    async with PostgresStore.open(database, service=SERVICE, metrics=metrics, pool_size=4, patience_s=60) as opened:
        yield opened


# --- several processes -----------------------------------------------------------------------------------------------


async def test_batches_with_the_same_messages_and_streams_in_opposite_order_never_deadlock(
    store: PostgresStore, database: str, metrics: MemoryMetrics
) -> None:
    """Two processes with two workers each; every batch is delivered twice (an owner and a zombie), to the other one in
    reverse. Streams are few and hot, half of them new."""
    rnd = random.Random(1)
    batches = [
        [
            (IDS.new(), f"h-{rnd.randrange(30)}" if rnd.random() < 0.5 else f"n-{n}-{rnd.randrange(9)}")
            for _ in range(20)
        ]
        for n in range(60)
    ]
    conflicts = 0

    async def work(on: PostgresStore, order: int, reverse: bool) -> None:
        nonlocal conflicts
        for batch in random.Random(order).sample(batches, len(batches)):
            todo = batch[::-1] if reverse else batch
            while todo:
                slices = await on.load([wanted(name) for _, name in todo])
                at = {one.stream.id: one.version for one in slices}
                units = []
                for id, name in todo:
                    units.append(Unit(claim=claim(id, name), appends=(append(name, at[name]),)))
                    at[name] += 1
                outcomes = await on.commit(units)
                conflicts += sum(outcome.verdict is Verdict.CONFLICT for outcome in outcomes)
                todo = [
                    message
                    for message, outcome in zip(todo, outcomes, strict=True)
                    if outcome.verdict is Verdict.CONFLICT
                ]

    async with PostgresStore.open(database, service=SERVICE, metrics=metrics, pool_size=4) as other:
        async with asyncio.TaskGroup() as tasks:
            for order in (1, 2):
                tasks.create_task(work(store, order, reverse=order == 1))
                tasks.create_task(work(other, order, reverse=order == 2))

    assert metrics.total("foldbus_store_errors_total") == 0, metrics.counters
    log = await whole_log(store)
    assert len(log) == sum(len(batch) for batch in batches), "every message has its effect once"
    versions: dict[str, int] = {}
    for one_ in log:
        assert one_.stream is not None
        assert one_.version == versions.get(one_.stream.id, 0) + 1
        versions[one_.stream.id] = one_.version
    assert conflicts > 0, "nobody raced: the test proves nothing"


@pytest.mark.parametrize("of", ["claims", "streams"])
async def test_two_calls_that_share_what_they_lock_in_opposite_order_are_forced_together_without_a_deadlock(
    store: PostgresStore, database: str, metrics: MemoryMetrics, of: str
) -> None:
    """A third transaction holds the one in the middle until both calls wait: in the order given, each would by then
    have the first of the three, and want the other's."""
    ids = [IDS.new() for _ in range(3)]

    def units(order: tuple[int, ...]) -> list[Unit]:
        if of == "claims":
            return [Unit(claim=claim(ids[n], key=str(n)), outgoing=(message(),)) for n in order]
        return [Unit(claim=claim(key=str(n)), appends=(append(f"s-{n}", 0),)) for n in order]

    async with store.transaction() as tx:
        await store.commit(units((1,)), tx=tx)
        calls = [asyncio.create_task(store.commit(units(order))) for order in ((0, 1, 2), (2, 1, 0))]
        await blocked(database, 2)
        await tx.sql.rollback()
    first, second = await asyncio.gather(*calls)
    assert metrics.total("foldbus_store_errors_total") == 0, metrics.counters
    both = sorted(verdicts([*first, *second]))
    assert both == sorted(["ok"] * 3 + ["duplicate" if of == "claims" else "conflict"] * 3)


async def test_of_two_writers_of_a_new_stream_one_waits_and_is_told(store: PostgresStore, database: str) -> None:
    async with store.transaction() as tx:
        await store.commit([Unit(appends=(append("a", 0),))], tx=tx)
        second = asyncio.create_task(store.commit([Unit(appends=(append("a", 0),))]))
        await blocked(database)
    (outcome,) = await second
    assert (outcome.verdict, outcome.expected, outcome.actual) == (Verdict.CONFLICT, 0, 1)


@pytest.mark.parametrize("others", [0, 2])
async def test_a_version_expected_of_a_stream_that_does_not_exist_makes_no_stream(
    store: PostgresStore, others: int
) -> None:
    """The statement that compares and sets also inserts: what it made by mistake must go again."""
    id = IDS.new()
    units = [Unit(claim=claim(key=str(n)), appends=(append(f"s-{n}", 0),)) for n in range(others)]
    lost = Unit(claim=claim(id), appends=(append("a", 3),))
    outcome = (await store.commit([*units, lost]))[-1]
    assert (outcome.verdict, outcome.expected, outcome.actual) == (Verdict.CONFLICT, 3, 0)
    assert await version(store, "a") == 0
    assert await commit(store, Unit(claim=claim(id), appends=(append("a", 0),))) == ["ok"]


@pytest.mark.parametrize("committed", [True, False])
async def test_an_undo_waits_for_the_step_that_is_on_its_way(
    store: PostgresStore, database: str, committed: bool
) -> None:
    """Exactly one of the two orders results, whichever the step's transaction ends in."""
    step = IDS.new()
    async with store.transaction() as tx:
        await store.commit([Unit(claim=claim(step), appends=(append("a", 0),))], tx=tx)
        undoing = asyncio.create_task(commit(store, Unit(claim=undo(step, Fence.CANCEL))))
        await blocked(database)
        if not committed:
            await tx.sql.rollback()
    assert await undoing == (["conflict"] if committed else ["ok"])
    again = await commit(store, Unit(claim=claim(step), appends=(append("a", 0),)))
    assert again == (["duplicate"] if committed else ["cancelled"])


@pytest.mark.parametrize("committed", [True, False])
async def test_a_step_waits_for_the_undo_that_is_on_its_way(
    store: PostgresStore, database: str, committed: bool
) -> None:
    step = IDS.new()
    async with store.transaction() as tx:
        await store.commit([Unit(claim=undo(step, Fence.CANCEL))], tx=tx)
        late = asyncio.create_task(commit(store, Unit(claim=claim(step), appends=(append("a", 0),))))
        await blocked(database)
        if not committed:
            await tx.sql.rollback()
    assert await late == (["cancelled"] if committed else ["ok"])
    assert await version(store, "a") == (0 if committed else 1)


async def test_a_claim_is_waited_for_and_then_a_duplicate_with_its_reply(store: PostgresStore, database: str) -> None:
    """Alone (the lean path) and among others."""
    for others in (0, 3):
        id = IDS.new()
        unit = Unit(claim=claim(id, reply=reply()), appends=(append(str(id), ANY, 2),))
        async with store.transaction() as tx:
            (first,) = await store.commit([unit], tx=tx)
            units = [
                unit,
                *(Unit(claim=claim(key=str(n)), appends=(append(str(IDS.new()), 0),)) for n in range(others)),
            ]
            again = asyncio.create_task(store.commit(units))
            await blocked(database)
        outcome = (await again)[0]
        assert outcome.verdict is Verdict.DUPLICATE
        assert outcome.reply is not None
        assert outcome.reply.token is not None
        assert outcome.reply.token.position == first.position
        assert verdicts(await again)[1:] == ["ok"] * others


# --- several callers in one flush (what both stores promise is in test_coalescer.py) ---------------------------------


@asynccontextmanager
async def flushed_together(
    store: PostgresStore, database: str, *calls: Sequence[Unit]
) -> AsyncIterator[list[asyncio.Task[Sequence[Outcome]]]]:
    """Inside the block the calls are one statement, which waits for the lock on stream `held`; one of them wants it."""
    async with store.transaction() as holder:
        await store.commit([Unit(appends=(append("held", 0),))], tx=holder)
        async with store.transaction() as first:
            names = ["first-0", "first-1"]  # one for each flusher
            await store.commit([Unit(appends=(append(name, 0),)) for name in names], tx=first)
            holding = [asyncio.create_task(commit(store, Unit(appends=(append(name, ANY),)))) for name in names]
            await blocked(database, 2)
            asked = [asyncio.create_task(store.commit(units)) for units in calls]
            await asyncio.sleep(0)  # they queue
        assert await asyncio.gather(*holding) == [["ok"], ["ok"]]
        await blocked(database)
        yield asked


async def test_a_lone_caller_goes_straight_to_the_database_by_the_lean_statement(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its own task, with nothing to wake it up, and without the arrays that several calls share."""
    call, seen = store._call, list[tuple[Any, bool]]()

    async def watched(db: Any, asked: Any) -> Any:
        seen.append((asyncio.current_task(), asked.impatient))
        return await call(db, asked)

    monkeypatch.setattr(store, "_call", watched)
    monkeypatch.setattr(store, "_commit_sql", "no such statement")
    for n in range(3):
        assert await commit(store, Unit(claim=claim(), appends=(append(f"s-{n}", 0),))) == ["ok"]
    assert seen == [(asyncio.current_task(), False)] * 3


async def test_a_caller_cancelled_during_its_flush_takes_nobody_along(
    store: PostgresStore, database: str, metrics: MemoryMetrics
) -> None:
    calls = [[Unit(claim=claim(), appends=(append(name, ANY),))] for name in ("held", "b", "c")]
    async with flushed_together(store, database, *calls) as asked:
        asked[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked[1]
    assert verdicts([*await asked[0], *await asked[2]]) == ["ok", "ok"]
    assert metrics.total("foldbus_store_batched_calls_total") == 3
    assert metrics.total("foldbus_store_connections_discarded_total") == 0, "the statement went on"
    assert await commit(store, *calls[1]) == ["duplicate"], "its outcome was unknown: it was written"


async def test_a_backend_killed_during_a_flush_makes_all_outcomes_unknown_and_repeating_safe(
    store: PostgresStore, database: str
) -> None:
    calls = [[Unit(claim=claim(reply=reply()), appends=(append(name, ANY),))] for name in ("held", "b", "c")]
    async with flushed_together(store, database, *calls) as asked:
        (pid,) = await blocked(database)
        async with connected(database) as db:
            await db.execute("select pg_terminate_backend($1)", pid)
        errors = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(error) for error in errors] == [StoreUnavailable] * 3
    assert len({id(error) for error in errors}) == 3, "each its own: one shared would gather all their tracebacks"
    for units in calls:
        assert await commit(store, *units) == ["ok"]
        assert await commit(store, *units) == ["duplicate"]


async def test_flushes_of_two_processes_with_streams_in_opposite_order_do_not_deadlock(
    store: PostgresStore, database: str, metrics: MemoryMetrics
) -> None:
    """Both are held at the stream in the middle, by when each would have its first one and want the other's."""
    names = ["s-0", "s-1", "s-2"]
    options = {"metrics": metrics, "pool_size": 4, "patience_s": 60}
    async with PostgresStore.open(database, service=SERVICE, **options) as other:
        async with store.transaction() as middle:
            await store.commit([Unit(appends=(append(names[1], 0),))], tx=middle)
            async with store.transaction() as first:
                await store.commit([Unit(appends=(append(f"first-{n}", 0),)) for n in range(2)], tx=first)
                holding = [
                    asyncio.create_task(commit(on, Unit(appends=(append(f"first-{n}", ANY),))))
                    for on in (store, other)
                    for n in range(2)
                ]
                await blocked(database, 4)
                calls = [
                    asyncio.create_task(on.commit([Unit(appends=(append(name, 0),))]))
                    for on, order in ((store, names), (other, names[::-1]))
                    for name in order
                ]
                await asyncio.sleep(0)
            assert sorted(await asyncio.gather(*holding)) == [["ok"]] * 4
            await blocked(database, 2)
            await middle.sql.rollback()
        found = [outcome for (outcome,) in await asyncio.gather(*calls)]
    assert metrics.total("foldbus_store_batched_calls_total") == 6
    assert metrics.total("foldbus_store_errors_total") == 0, metrics.counters
    assert sorted(verdicts(found)) == ["conflict"] * 3 + ["ok"] * 3
    assert [await version(store, name) for name in names] == [1] * 3


async def test_callers_that_want_no_lock_are_not_held_up_by_one_in_their_flush_that_waits_for_it(
    store: PostgresStore, database: str, metrics: MemoryMetrics
) -> None:
    """Whoever holds the lock may be waiting for them: no database sees such a deadlock."""
    store._commit_together_sql = store._commit_together_sql.replace("60000", "100")
    calls = [[Unit(claim=claim(), appends=(append(name, ANY),))] for name in ("held", "b", "c")]
    async with flushed_together(store, database, *calls) as asked:
        assert verdicts([*await asked[1], *await asked[2]]) == ["ok", "ok"]
        assert not asked[0].done()
    assert verdicts(await asked[0]) == ["ok"]
    assert metrics.total("foldbus_store_batches_held_total") == 1
    assert metrics.total("foldbus_store_errors_total") == 0
    async with store.connection() as db:
        assert await db.fetchval("show lock_timeout") == "0", "it was the statement's own"


async def test_flushers_that_wait_for_locks_lend_their_places(database: str, metrics: MemoryMetrics) -> None:
    await PostgresStore.migrate(database, service=SERVICE)
    async with PostgresStore.open(database, service=SERVICE, metrics=metrics) as store, store.transaction() as tx:
        await store.commit([Unit(appends=(append(f"held-{n}", 0),)) for n in range(2)], tx=tx)
        stuck = [asyncio.create_task(commit(store, Unit(appends=(append(f"held-{n}", ANY),)))) for n in range(2)]
        await blocked(database, 2)
        assert await commit(store, Unit(appends=(append("free", 0),))) == ["ok"], "neither was let go"
        assert not any(task.done() for task in stuck)
        assert metrics.total("foldbus_store_flushes_slow_total") > 0
        await tx.sql.rollback()
        assert await asyncio.gather(*stuck) == [["ok"]] * 2


class AheadClock(SystemClock):
    ahead_s = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead_s


async def test_a_call_that_queues_for_too_long_fails_and_has_written_nothing(database: str) -> None:
    await PostgresStore.migrate(database, service=SERVICE)
    clock = AheadClock()
    async with PostgresStore.open(database, service=SERVICE, clock=clock, pool_size=4, timeout_s=20) as store:
        async with store.transaction() as tx:
            await store.commit([Unit(appends=(append(f"held-{n}", 0),)) for n in range(2)], tx=tx)
            stuck = [asyncio.create_task(commit(store, Unit(appends=(append(f"held-{n}", ANY),)))) for n in range(2)]
            await blocked(database, 2)
            late = asyncio.create_task(commit(store, Unit(appends=(append("late", 0),))))
            await asyncio.sleep(0)
            clock.ahead_s = 21.0
            early = asyncio.create_task(commit(store, Unit(appends=(append("early", 0),))))
            await asyncio.sleep(0)
        assert await asyncio.gather(*stuck) == [["ok"]] * 2
        with pytest.raises(StoreUnavailable, match="nothing was written"):
            await late
        assert await early == ["ok"]
        assert await version(store, "late") == 0


# --- connections -----------------------------------------------------------------------------------------------------


async def test_a_cancelled_commit_leaves_no_dirty_connection(
    store: PostgresStore, database: str, metrics: MemoryMetrics
) -> None:
    unit = Unit(claim=claim(), appends=(append("a", 0),))
    async with store.transaction() as tx:
        await store.commit([Unit(appends=(append("a", 0),))], tx=tx)
        waiting = asyncio.create_task(store.commit([unit]))
        await blocked(database)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert metrics.total("foldbus_store_connections_discarded_total") == 1
        await nobody_blocked(database)
        await tx.sql.rollback()
    for _ in range(8):  # more than the pool holds
        async with store.connection() as db:
            assert not db.is_in_transaction()
            assert await db.fetchval("select 1") == 1
    assert await version(store, "a") == 0
    assert await commit(store, unit) == ["ok"]


async def test_a_commit_cancelled_within_a_transaction_takes_the_transaction_along(
    store: PostgresStore, database: str
) -> None:
    async with connected(database) as db, db.transaction():
        await db.execute("insert into foldbus_shop.streams values ('order', 'a', 1, 0)")

        async def work() -> None:
            async with store.transaction() as tx:
                await tx.sql.execute(text("create table mine (n int)"))
                await store.commit([Unit(appends=(append("a", 0),))], tx=tx)

        waiting = asyncio.create_task(work())
        await blocked(database)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        for _ in range(8):
            async with store.connection() as free:
                assert await free.fetchval("select to_regclass('mine')") is None


async def test_a_connection_left_in_a_transaction_is_closed_not_reused(
    store: PostgresStore, metrics: MemoryMetrics
) -> None:
    async with store.connection() as db:
        await db.execute("begin")
        await db.execute("create table mine (n int)")
    assert metrics.total("foldbus_store_connections_discarded_total") == 1
    async with store.connection() as db:
        assert await db.fetchval("select to_regclass('mine')") is None


async def test_a_backend_killed_in_the_middle_of_a_commit_makes_its_outcome_unknown_and_repeating_safe(
    store: PostgresStore, database: str
) -> None:
    unit = Unit(claim=claim(reply=reply()), appends=(append("a", 0),), outgoing=(message(),))
    async with store.transaction() as tx:
        await store.commit([Unit(appends=(append("a", 0),))], tx=tx)
        waiting = asyncio.create_task(store.commit([unit]))
        (pid,) = await blocked(database)
        await tx.sql.execute(text("select pg_terminate_backend(:pid)"), {"pid": pid})
        with pytest.raises(StoreUnavailable):
            await waiting
        await tx.sql.rollback()
    assert await commit(store, unit) == ["ok"]
    assert await commit(store, unit) == ["duplicate"]
    assert len(await whole_log(store)) == 3


async def test_a_database_that_is_read_only_or_gone_is_unavailable(store: PostgresStore, database: str) -> None:
    async with connected(database) as db:
        name = await db.fetchval("select current_database()")
        await db.execute(f"alter database {name} set default_transaction_read_only = on")
    async with PostgresStore.open(database, service=SERVICE) as opened:
        with pytest.raises(StoreUnavailable, match="25006"):
            await opened.commit([Unit(appends=(append("a", 0),))])
    nowhere = database.rsplit("/", 1)[0] + "/nowhere"
    with pytest.raises(StoreUnavailable, match="3D000"):
        async with PostgresStore.open(nowhere, service=SERVICE):
            pass


async def test_a_lost_race_is_tried_again(
    store: PostgresStore, metrics: MemoryMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, left = store._call, 2

    async def deadlocked(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            raise asyncpg.DeadlockDetectedError("deadlock detected")
        return await call(*arguments)

    monkeypatch.setattr(store, "_call", deadlocked)
    assert await commit(store, Unit(appends=(append("a", 0),))) == ["ok"]
    assert metrics.total("foldbus_store_retries_total") == 2
    left = 1000
    with pytest.raises(StoreUnavailable, match="40P01"):
        await commit(store, Unit(appends=(append("a", 1),)))


async def test_a_value_that_the_database_cannot_hold_hurts_only_its_own_unit(store: PostgresStore) -> None:
    """Nothing of that shows before the driver looks at it."""
    good = [Unit(claim=claim(key=str(n)), appends=(append(f"g-{n}", 0),)) for n in range(3)]
    bad = Unit(claim=claim(key="bad"), appends=(append("bad", 0, event("bad", data=["no bytes"])),))  # type: ignore[arg-type]
    with pytest.raises(BadUnit, match="unit 1 of 4"):
        await store.commit([good[0], bad, good[1], good[2]])
    assert await commit(store, *good) == ["duplicate"] * 3
    with pytest.raises(BadUnit):
        await store.commit([bad])
    assert await version(store, "bad") == 0


async def test_a_callers_own_statements_and_units_end_together(store: PostgresStore) -> None:
    async def fails() -> None:
        async with store.transaction() as tx:
            # First the units: they go past SQLAlchemy, which must have begun by then.
            assert await one_within(store, tx, Unit(claim=claim(), appends=(append("a", 0),)))
            await tx.sql.execute(text("create table mine (n int)"))
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        await fails()
    assert await version(store, "a") == 0
    async with store.connection() as db:
        assert await db.fetchval("select to_regclass('mine')") is None
    async with store.transaction() as tx:
        await tx.sql.execute(text("create table mine (n int)"))
        assert await one_within(store, tx, Unit(claim=claim(), appends=(append("a", 0),)))
    assert await version(store, "a") == 1


async def one_within(store: PostgresStore, tx: Any, unit: Unit) -> bool:
    (outcome,) = await store.commit([unit], tx=tx)
    return outcome.verdict is Verdict.COMMITTED


@asynccontextmanager
async def users_own(dsn: str) -> AsyncIterator[AsyncConnection]:
    engine = create_async_engine(url(dsn))
    try:
        async with engine.connect() as sql:
            yield sql
    finally:
        await engine.dispose()


async def test_units_in_autocommit_are_refused(store: PostgresStore, database: str) -> None:
    class Autocommit:
        def __init__(self, sql: Any) -> None:
            self.sql = sql

    async with users_own(database) as sql:
        await sql.execution_options(isolation_level="AUTOCOMMIT")
        with pytest.raises(EventStoreError, match="autocommit"):
            await store.commit([Unit(appends=(append("a", 0),))], tx=Autocommit(sql))
    assert await version(store, "a") == 0


async def test_a_fresh_connection_of_the_users_engine_begins_before_units_are_written(
    store: PostgresStore, database: str
) -> None:
    """The trap: SQLAlchemy begins when it executes something itself, a driver's statement before that would stay."""

    class Own:
        def __init__(self, sql: Any) -> None:
            self.sql = sql

    async with users_own(database) as sql:
        assert await one_within(store, Own(sql), Unit(appends=(append("a", 0),)))
        await sql.rollback()
    assert await version(store, "a") == 0


# --- schema ----------------------------------------------------------------------------------------------------------


async def test_opening_a_database_without_a_schema_says_what_to_run(database: str) -> None:
    assert await PostgresStore.upgrade_needed(database, service=SERVICE)
    with pytest.raises(SchemaMismatch, match="foldbus db upgrade"):
        async with PostgresStore.open(database, service=SERVICE):
            pass
    await asyncio.gather(*(PostgresStore.migrate(database, service=SERVICE) for _ in range(3)))
    assert await PostgresStore.current(database, service=SERVICE) == schema.HEAD
    assert not await PostgresStore.upgrade_needed(database, service=SERVICE)


async def test_opening_a_schema_of_another_migration_is_refused(store: PostgresStore, database: str) -> None:
    async with store.connection() as db:
        await db.execute("update foldbus_shop.alembic_version set version_num = '9999'")
        await db.execute("update foldbus_shop.log set oldest = '9999'")
    with pytest.raises(SchemaMismatch, match="9999"):
        async with PostgresStore.open(database, service=SERVICE):
            pass


def test_the_migration_that_the_code_wants_is_the_latest_one() -> None:
    scripts = ScriptDirectory(str(schema.MIGRATIONS), version_locations=[str(schema.MIGRATIONS / "versions")])
    assert scripts.get_current_head() == schema.HEAD


async def test_a_raised_epoch_is_stamped_on_what_is_committed_from_then_on(store: PostgresStore, database: str) -> None:
    await commit(store, Unit(appends=(append("a", 0),)))
    assert await PostgresStore.raise_epoch(database, service=SERVICE) == 1
    async with PostgresStore.open(database, service=SERVICE) as opened:
        assert opened.epoch == 1
        outcome = await one(opened, Unit(claim=claim(reply=reply()), appends=(append("a", 1),)))
        assert outcome.verdict is Verdict.COMMITTED
        assert [one_.epoch for one_ in await whole_log(opened)] == [0, 1, 1]


async def test_statements_cached_on_an_empty_table_use_the_index_when_it_has_grown(store: PostgresStore) -> None:
    """PostgreSQL keeps the plan of a prepared statement; on a table of one page that plan would be a full scan."""
    for n in range(8):
        await commit(store, Unit(claim=claim(), appends=(append(f"s-{n}", 0),)))
        await store.load([wanted("s-1")])
        await store.read_bodies(wanted("s-1").stream, after=0, upto=5)
        await store.examine(CONSUMER, [(IDS.new(), "k")])
    async with store.connection() as db:
        await db.execute("analyze")
    for n in range(8, 16):
        await commit(store, Unit(claim=claim(), appends=(append(f"s-{n}", ANY),)))
        await store.load([wanted("s-1")])
        await store.examine(CONSUMER, [(IDS.new(), "k")])
        await store.read_all(after=0, limit=5)
    async with store.connection() as db:
        before = await _scans(db)
    for n in range(16, 40):
        units = [Unit(claim=claim(key=str(i)), appends=(append(f"s-{n}-{i}", ANY),)) for i in range(3)]
        assert await commit(store, *units) == ["ok"] * 3
        assert await commit(store, units[0]) == ["duplicate"]
        await store.load([wanted("s-1")])
        await store.read_bodies(wanted("s-1").stream, after=0, upto=5)
        await store.read_all(after=5, limit=5)
    async with store.connection() as db:
        assert await _scans(db) == before


async def _scans(db: Any) -> dict[str, int]:
    await db.execute("select pg_stat_force_next_flush()")
    query = """select relname, seq_scan from pg_stat_user_tables where schemaname = 'foldbus_shop'
               and relname in ('events', 'streams', 'claims', 'replies', 'outgoing')"""
    return dict(await db.fetch(query))


# --- the same answers as the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
async def test_random_calls_are_answered_as_the_reference_answers_them(
    store: PostgresStore, tmp_path: Any, seed: int
) -> None:
    """Claims, fences, chains, repeats, stale and any versions, doubled units: both adapters, call by call. Positions
    are compared by rank, PostgreSQL may leave gaps."""
    from eventstore.sqlite import SqliteStore

    rnd = random.Random(seed)
    await SqliteStore.migrate(tmp_path / "reference.sqlite", service=SERVICE)
    async with SqliteStore.open(tmp_path / "reference.sqlite", service=SERVICE) as reference:
        versions = {f"s-{n}": 0 for n in range(5)}
        ids: list[UUID] = []
        earlier: list[Unit] = []
        seen: set[str] = set()
        for step in range(120):
            units = random_units(rnd, dict(versions), ids, earlier)
            earlier += units
            expected, found = await reference.commit(units), await store.commit(units)
            theirs, ours = await whole_log(reference), await whole_log(store)
            assert [(a.id, a.version) for a in theirs] == [(a.id, a.version) for a in ours], step
            rank, our_rank = ranks(theirs), ranks(ours)
            for unit, a, b in zip(units, expected, found, strict=True):
                assert by_rank(a, rank) == by_rank(b, our_rank), (step, unit)
                seen.add(a.verdict)
                for name, at in a.versions.items():
                    versions[name.id] = max(versions[name.id], at)
        asked = [(id, "") for id in ids]
        for a, b in zip(await reference.examine(CONSUMER, asked), await store.examine(CONSUMER, asked), strict=True):
            assert (a.state, with_ranks(a.reply, rank)) == (b.state, with_ranks(b.reply, our_rank))
        assert seen == {"committed", "duplicate", "conflict", "cancelled"}


async def test_the_servers_clock_is_not_taken_for_behind_when_its_answer_is_long_on_its_way(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is delayed from now on would be due too early."""
    clock, fetch = Clock(), store.timers._fetch

    async def an_hour(*query: Any) -> Any:
        found = await fetch(*query)
        clock.hours = 1
        return found

    monkeypatch.setattr(store.timers, "_clock", clock)
    monkeypatch.setattr(store.timers, "_fetch", an_hour)
    assert await store.timers.next_due() is None
    assert store.timers.now() >= clock.now() - timedelta(minutes=1)


class Clock(SystemClock):
    hours = 0

    def now(self) -> datetime:
        return super().now() + timedelta(hours=self.hours)
