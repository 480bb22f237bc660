"""What only PostgreSQL can get wrong: connections, locks, error codes, migrations, several processes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from uuid import UUID

import asyncpg
import pytest
import pytest_asyncio
from alembic.script import ScriptDirectory
from sqlalchemy import text

from bus.envelope import ReplyOutcome
from bus.metrics import MemoryMetrics
from eventstore.errors import BadUnit, EventStoreError, SchemaMismatch, StoreUnavailable
from eventstore.port import ANY, Claim, Fence, Outcome, Unit, Verdict
from eventstore.postgres import PostgresStore, schema
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
    stream,
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
    async with PostgresStore.open(database, service=SERVICE, metrics=metrics, pool_size=4) as opened:
        yield opened


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[Any]:
    db = await asyncpg.connect(dsn)
    try:
        yield db
    finally:
        db.terminate()


async def blocked(dsn: str, count: int = 1) -> list[int]:
    """Waits until `count` backends of this database wait for a lock; answers their pids."""
    query = "select pid from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    async with connected(dsn) as db, asyncio.timeout(10):
        while len(found := [row[0] for row in await db.fetch(query)]) < count:  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0.01)
        return found


async def nobody_blocked(dsn: str) -> None:
    """Waits until a cancelled statement has ended on the server too."""
    async with connected(dsn) as db, asyncio.timeout(10):
        query = "select 1 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        while await db.fetchval(query):  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0.01)


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


async def test_units_in_autocommit_are_refused(store: PostgresStore) -> None:
    class Autocommit:
        def __init__(self, sql: Any) -> None:
            self.sql = sql

    async with store.engine.connect() as sql:
        await sql.execution_options(isolation_level="AUTOCOMMIT")
        with pytest.raises(EventStoreError, match="autocommit"):
            await store.commit([Unit(appends=(append("a", 0),))], tx=Autocommit(sql))
    assert await version(store, "a") == 0


async def test_a_fresh_connection_of_the_users_engine_begins_before_units_are_written(store: PostgresStore) -> None:
    """The trap: SQLAlchemy begins when it executes something itself, a driver's statement before that would stay."""

    class Own:
        def __init__(self, sql: Any) -> None:
            self.sql = sql

    async with store.engine.connect() as sql:
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
        await store.read_all(after=5, limit=5)
    await store.engine.dispose()  # a backend reports its statistics when it ends
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
            units = _random_units(rnd, dict(versions), ids, earlier)
            earlier += units
            expected, found = await reference.commit(units), await store.commit(units)
            theirs, ours = await whole_log(reference), await whole_log(store)
            assert [(a.id, a.version) for a in theirs] == [(a.id, a.version) for a in ours], step
            rank, our_rank = _ranks(theirs), _ranks(ours)
            for unit, a, b in zip(units, expected, found, strict=True):
                assert _plain(a, rank) == _plain(b, our_rank), (step, unit)
                seen.add(a.verdict)
                for name, at in a.versions.items():
                    versions[name.id] = max(versions[name.id], at)
        asked = [(id, "") for id in ids]
        for a, b in zip(await reference.examine(CONSUMER, asked), await store.examine(CONSUMER, asked), strict=True):
            assert (a.state, _reply(a.reply, rank)) == (b.state, _reply(b.reply, our_rank))
        assert seen == {"committed", "duplicate", "conflict", "cancelled"}


def _random_units(rnd: random.Random, at: dict[str, int], ids: list[UUID], earlier: list[Unit]) -> list[Unit]:
    units: list[Unit] = []
    for _ in range(rnd.choice((1, 1, 2, 4, 6))):
        if earlier and rnd.random() < 0.15:
            units.append(rnd.choice(earlier + units))
            continue
        appends = []
        for name in rnd.sample(sorted(at), rnd.choice((0, 1, 1, 2))):
            wanted_ = rnd.choice([at[name]] * 8 + [ANY, at[name] + 1, 0])
            events = [event(name, public=rnd.random() < 0.6) for _ in range(rnd.choice((1, 2)))]
            appends.append(append(name, wanted_, *events))
            at[name] += len(events) if wanted_ in (ANY, at[name]) else 0
        asserts = [(stream(name), at[name]) for name in rnd.sample(sorted(at), rnd.choice((0, 0, 1)))]
        units.append(
            Unit(
                claim=_random_claim(rnd, ids) if rnd.random() < 0.8 else None,
                appends=tuple(appends),
                asserts=tuple(asserts),
                outgoing=tuple(message() for _ in range(rnd.choice((0, 1)))),
            )
        )
    return units


def _random_claim(rnd: random.Random, ids: list[UUID]) -> Claim:
    id = rnd.choice(ids) if ids and rnd.random() < 0.25 else IDS.new()
    step = rnd.choice([*ids, IDS.new()])
    ids += [id, step]
    answer = rnd.choice((None, reply(), reply(outcome=ReplyOutcome.REFUSED), reply(topic=None)))
    if rnd.random() < 0.3 and step != id:
        made = undo(step, rnd.choice(list(Fence)), id, key=rnd.choice("abc"), reply=answer)
    else:
        made = claim(id, rnd.choice("abc"), reply=answer)
    return replace(made, state=rnd.choice([made.state] * 5 + [type(made.state).DEAD]))


def _ranks(log: Sequence[Any]) -> dict[int, int]:
    return {0: 0} | {one_.position: place for place, one_ in enumerate(log, 1)}


def _reply(found: Any, rank: dict[int, int]) -> Any:
    if found is None or found.token is None:
        return found
    return replace(
        found, token=replace(found.token, position=rank[found.token.position], public=rank[found.token.public])
    )


def _plain(outcome: Outcome, rank: dict[int, int]) -> Outcome:
    return replace(
        outcome,
        position=rank[outcome.position],
        public=rank[outcome.public],
        versions=dict(outcome.versions),
        reply=_reply(outcome.reply, rank),
    )
