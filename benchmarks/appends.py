"""Appending events, against raw inserts of the same bytes into a table with two indexes.

The floor is what one writes without a framework: no stream version that a second writer would lose against, no order
for readers, one statement. On both sides as many connections to PostgreSQL (16) are there to be used.

All of it twice: on the disk as it is, and with a flush that takes 1 ms longer, as on disks that do not lie. PostgreSQL
is told to wait before each flush (`commit_delay`), in every session of the one database.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiosqlite
import asyncpg

from benchmarks.harness import Row, Setting, compare, per_second
from benchmarks.workload import World, world
from bus.envelope import Envelope
from eventstore.port import Append, Unit, Verdict
from eventstore.postgres import PostgresStore
from eventstore.sqlite import SqliteStore

CONNECTIONS = 16
SLOW_FLUSH_US = 1000

TABLE = """create table raw (
    position bigint generated always as identity primary key, stream text not null, version bigint not null,
    id uuid not null, type text not null, made_at timestamptz not null, data bytea not null, meta text not null,
    unique (stream, version))"""
INSERT = "insert into raw (stream, version, id, type, made_at, data, meta) values ($1, $2, $3, $4, $5, $6, $7)"
UNNEST = """insert into raw (stream, version, id, type, made_at, data, meta)
    select *
      from unnest($1::text[], $2::bigint[], $3::uuid[], $4::text[], $5::timestamptz[], $6::bytea[], $7::text[])"""


def raw_row(envelope: Envelope, version: int = 1) -> tuple[Any, ...]:
    return envelope.key, version, envelope.id, envelope.type, envelope.time, envelope.data, "{}"


async def no_reset(_: Any) -> None:
    """Given to asyncpg's pool: its own reset costs a round trip per call, and nothing here needs it."""


@asynccontextmanager
async def raw_pool(dsn: str, *, size: int = CONNECTIONS) -> AsyncIterator[Any]:
    async with asyncpg.create_pool(dsn, min_size=size, max_size=size, reset=no_reset) as pool:
        yield pool


async def run(setting: Setting) -> list[Row]:
    rows = await _postgres(setting, "PostgreSQL")
    rows += await _postgres(setting, "PostgreSQL, a flush of 1 ms", flush_us=SLOW_FLUSH_US)
    rows += await _sqlite(setting)
    return rows


async def _postgres(setting: Setting, where: str, *, flush_us: int = 0) -> list[Row]:
    rows: list[Row] = []
    async with setting.database() as dsn:
        if flush_us:
            await slow_flushes(dsn, flush_us)
        here = world()
        await PostgresStore.migrate(dsn, service=here.name)
        async with PostgresStore.open(dsn, service=here.name, pool_size=CONNECTIONS) as store, raw_pool(dsn) as pool:
            await pool.execute(TABLE)
            for callers in (1, 64):
                rows += await _single(setting, here, store, pool, callers, where)
            rows += await _many(setting, here, store, pool, where)
    return rows


async def slow_flushes(dsn: str, flush_us: int) -> None:
    """Each commit on this database waits so long before it flushes, from the next connection on."""
    db = await asyncpg.connect(dsn)
    try:
        name = await db.fetchval("select current_database()")
        await db.execute(f"alter database {name} set commit_delay = {flush_us}")
        await db.execute(f"alter database {name} set commit_siblings = 0")
    finally:
        await db.close()


async def _single(
    setting: Setting, here: World, store: PostgresStore, pool: Any, callers: int, where: str
) -> list[Row]:
    seconds = setting.pick(1.0, 0.05)

    async def foldbus(_: int) -> Mapping[str, float]:
        async def append() -> None:
            (outcome,) = await store.commit([here.append()])
            assert outcome.verdict is Verdict.COMMITTED

        return {"events/s": await per_second(append, callers=callers, seconds=seconds)}

    async def raw(_: int) -> Mapping[str, float]:
        async def insert() -> None:
            await pool.execute(INSERT, *raw_row(here.event(str(here.ids.new()), topic=None)))

        return {"events/s": await per_second(insert, callers=callers, seconds=seconds)}

    return await compare(
        f"append one event, {callers} caller{'s' * (callers > 1)}, {where}",
        {"asyncpg INSERT": raw, "PostgresStore.commit": foldbus},
        floor="asyncpg INSERT",
        rounds=setting.rounds,
        warm_up=True,
    )


async def _many(setting: Setting, here: World, store: PostgresStore, pool: Any, where: str) -> list[Row]:
    seconds, many = setting.pick(1.0, 0.05), setting.count(1000, 50)

    async def foldbus(_: int) -> Mapping[str, float]:
        async def append() -> None:
            key = str(here.ids.new())
            events = tuple(here.event(key, topic=f"{here.name}.events") for _ in range(many))
            (outcome,) = await store.commit([Unit(appends=(Append(here.stream(key), 0, events),))])
            assert outcome.verdict is Verdict.COMMITTED

        return {"events/s": await per_second(append, callers=1, seconds=seconds, each=many)}

    async def raw(_: int) -> Mapping[str, float]:
        async def insert() -> None:
            key = str(here.ids.new())
            made = [raw_row(here.event(key, topic=None), version) for version in range(1, many + 1)]
            await pool.execute(UNNEST, *(list(column) for column in zip(*made, strict=True)))

        return {"events/s": await per_second(insert, callers=1, seconds=seconds, each=many)}

    return await compare(
        f"append {many} events in one unit, {where}",
        {"asyncpg INSERT … unnest": raw, "PostgresStore.commit": foldbus},
        floor="asyncpg INSERT … unnest",
        rounds=setting.rounds,
        warm_up=True,
    )


async def _sqlite(setting: Setting) -> list[Row]:
    """64 callers, each waiting for its own event to be on disk (`synchronous=FULL` on both sides)."""
    seconds, here, directory = setting.pick(1.0, 0.05), world(), setting.fresh()
    await SqliteStore.migrate(directory / "store.db", service=here.name)
    async with (
        SqliteStore.open(directory / "store.db", service=here.name) as store,
        aiosqlite.connect(directory / "raw.db", isolation_level=None) as db,
    ):
        for statement in ("pragma journal_mode = wal", "pragma synchronous = full"):
            await db.execute(statement)
        await db.execute(
            """create table raw (position integer primary key, stream text not null, version integer not null,
               id blob not null, type text not null, made_at text not null, data blob not null, meta text not null,
               unique (stream, version))"""
        )

        async def foldbus(_: int) -> Mapping[str, float]:
            async def append() -> None:
                (outcome,) = await store.commit([here.append()])
                assert outcome.verdict is Verdict.COMMITTED

            return {"events/s": await per_second(append, callers=64, seconds=seconds)}

        async def raw(_: int) -> Mapping[str, float]:
            async def insert() -> None:
                stream, version, id, type, made_at, data, meta = raw_row(here.event(str(here.ids.new()), topic=None))
                await db.execute(
                    "insert into raw (stream, version, id, type, made_at, data, meta) values (?, ?, ?, ?, ?, ?, ?)",
                    (stream, version, id.bytes, type, made_at.isoformat(), data, meta),
                )

            return {"events/s": await per_second(insert, callers=64, seconds=seconds)}

        return await compare(
            "append one event, 64 callers, SQLite",
            {"aiosqlite INSERT, one by one": raw, "SqliteStore.commit": foldbus},
            floor="aiosqlite INSERT, one by one",
            rounds=setting.rounds,
            warm_up=True,
        )
