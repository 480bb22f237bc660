"""Committing what many messages changed in one call, as a worker does, against a row by hand per message and against
the same rows by hand in one statement each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.appends import INSERT, TABLE, raw_pool, raw_row
from benchmarks.harness import Row, Setting, compare, per_second
from benchmarks.workload import World, world
from eventstore.port import Unit, Verdict
from eventstore.postgres import PostgresStore

CLAIMS = """create table raw_claims (
    consumer text not null, message_id uuid not null, key text not null, primary key (consumer, message_id))"""
OUTGOING = """create table raw_outgoing (
    position bigint generated always as identity primary key, id uuid not null, type text not null, key text not null,
    topic text not null, made_at timestamptz not null, data bytea not null, meta text not null)"""

BATCH = """
with claimed as (
    insert into raw_claims select * from unnest($1::text[], $2::uuid[], $3::text[]) on conflict do nothing
), appended as (
    insert into raw (stream, version, id, type, made_at, data, meta)
    select * from unnest($4::text[], $5::bigint[], $6::uuid[], $7::text[], $8::timestamptz[], $9::bytea[], $10::text[])
)
insert into raw_outgoing (id, type, key, topic, made_at, data, meta)
select * from unnest($11::uuid[], $12::text[], $13::text[], $14::text[], $15::timestamptz[], $16::bytea[], $17::text[])
"""


def columns(units: list[Unit]) -> list[list[Any]]:
    claims = [(unit.claim.consumer, unit.claim.message_id, unit.claim.key) for unit in units if unit.claim]
    events = [raw_row(append.envelopes[0]) for unit in units for append in unit.appends]
    sent = [(o.id, o.type, o.key, o.topic, o.time, o.data, "{}") for unit in units for o in unit.outgoing]
    return [list(column) for rows in (claims, events, sent) for column in zip(*rows, strict=True)]


async def run(setting: Setting) -> list[Row]:
    rows: list[Row] = []
    async with setting.database() as dsn:
        here = world()
        await PostgresStore.migrate(dsn, service=here.name)
        async with PostgresStore.open(dsn, service=here.name) as store, raw_pool(dsn, size=1) as pool:
            for statement in (TABLE, CLAIMS, OUTGOING):
                await pool.execute(statement)
            for size in (setting.quick and (20,)) or (100, 500):
                rows += await _of(setting, here, store, pool, size)
    return rows


async def _of(setting: Setting, here: World, store: PostgresStore, pool: Any, size: int) -> list[Row]:
    seconds = setting.pick(1.0, 0.05)

    async def foldbus(_: int) -> Mapping[str, float]:
        async def commit() -> None:
            outcomes = await store.commit([here.handled() for _ in range(size)])
            assert all(outcome.verdict is Verdict.COMMITTED for outcome in outcomes)

        return {"messages/s": await per_second(commit, callers=1, seconds=seconds, each=size)}

    async def one_by_one(_: int) -> Mapping[str, float]:
        async def insert() -> None:
            await pool.execute(INSERT, *raw_row(here.event(str(here.ids.new()), topic=None)))

        return {"messages/s": await per_second(insert, callers=1, seconds=seconds)}

    async def by_hand(_: int) -> Mapping[str, float]:
        async def insert() -> None:
            await pool.execute(BATCH, *columns([here.handled() for _ in range(size)]))

        return {"messages/s": await per_second(insert, callers=1, seconds=seconds, each=size)}

    return await compare(
        f"commit {size} units of claim, event and outgoing message in one call, one caller",
        {
            "asyncpg INSERT per message (event only)": one_by_one,
            "asyncpg, unnest of the same rows": by_hand,
            "PostgresStore.commit": foldbus,
        },
        floor="asyncpg INSERT per message (event only)",
        rounds=setting.rounds,
        warm_up=True,
    )
