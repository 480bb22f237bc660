"""What one would write without a framework: aiokafka, asyncpg and a loop. The floor of what Foldbus does durably.

It claims message ids and writes its effects in one transaction per batch, then commits the offsets. It has no stream
versions, no retries, no dead letters, no order over a rebalance, no replies and nothing to publish.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

SCHEMA = """
create table inbox (consumer text not null, message_id uuid not null, primary key (consumer, message_id));
create table effects (
    position bigint generated always as identity primary key, id uuid not null, key text not null,
    n int not null, data bytea not null);
create index on effects (key);
create table shown (key text primary key, count int not null);
"""
CLAIM = """insert into inbox select $1, id from unnest($2::uuid[]) as id
           on conflict do nothing returning message_id"""
EFFECTS = (
    """insert into effects (id, key, n, data) select * from unnest($1::uuid[], $2::text[], $3::int[], $4::bytea[])"""
)
SHOWN = """insert into shown select key, count(*) from unnest($1::text[]) as key group by key
           on conflict (key) do update set count = shown.count + excluded.count"""

ONE_EFFECT = "insert into effects (id, key, n, data) values ($1, $2, $3, $4)"
ONE_SHOWN = "insert into shown values ($1, 1) on conflict (key) do update set count = shown.count + 1"

BATCH = 500
AT_ONCE = 16
"""Keys that are handled side by side where each message has a transaction of its own."""


async def batch_loop(
    consumer: AIOKafkaConsumer, db: Any, *, name: str, taken: Callable[[], None], done: Callable[[Sequence[str]], None]
) -> None:
    """Until cancelled. `taken` is called when records came, `done` with the keys of what is committed."""
    while True:
        found = await consumer.getmany(max_records=BATCH, timeout_ms=200)
        records = [record for part in found.values() for record in part]
        if not records:
            continue
        taken()
        rows: dict[UUID, tuple[UUID, str, int, bytes]] = {}
        for record in records:
            id = UUID(dict(record.headers)["ce_id"].decode())
            rows[id] = (id, record.key.decode(), json.loads(record.value)["n"], record.value)
        async with db.transaction():
            new = await db.fetch(CLAIM, name, list(rows))
            mine = [rows[row["message_id"]] for row in new]
            if mine:
                await db.execute(EFFECTS, *(list(column) for column in zip(*mine, strict=True)))
                await db.execute(SHOWN, [row[1] for row in mine])
        await consumer.commit()
        done([row[1] for row in mine])


async def message_loop(
    consumer: AIOKafkaConsumer, db: Any, *, name: str, taken: Callable[[], None], done: Callable[[Sequence[str]], None]
) -> None:
    """The same with a transaction per message, `AT_ONCE` keys side by side, each in order. `db` is a pool. The offsets
    are committed when all that was fetched together is done."""

    async def lane(records: Sequence[Any]) -> None:
        async with db.acquire() as connection:
            for record in records:
                id = UUID(dict(record.headers)["ce_id"].decode())
                async with connection.transaction():
                    if await connection.fetchrow(CLAIM, name, [id]) is not None:
                        key = record.key.decode()
                        n: int = json.loads(record.value)["n"]
                        await connection.execute(ONE_EFFECT, id, key, n, record.value)
                        await connection.execute(ONE_SHOWN, key)
                done([record.key.decode()])

    while True:
        found = await consumer.getmany(max_records=BATCH, timeout_ms=200)
        lanes: list[list[Any]] = [[] for _ in range(AT_ONCE)]
        for part in found.values():
            for record in part:
                lanes[hash(record.key) % AT_ONCE].append(record)
        if any(lanes):
            taken()
            await asyncio.gather(*(lane(records) for records in lanes if records))
            await consumer.commit()


Loop = Callable[..., Coroutine[Any, Any, None]]


@asynccontextmanager
async def looping(
    bootstrap: str,
    db: Any,
    topic: str,
    *,
    name: str,
    taken: Callable[[], None],
    done: Callable[[Sequence[str]], None],
    loop: Loop = batch_loop,
) -> AsyncIterator[None]:
    """The loop runs while the context lasts; it reads the topic from its beginning."""
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=bootstrap,
        group_id=name,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    await consumer.start()
    task = asyncio.create_task(loop(consumer, db, name=name, taken=taken, done=done))
    try:
        yield
    finally:
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass
        finally:
            await consumer.stop()


@asynccontextmanager
async def producing(bootstrap: str) -> AsyncIterator[Any]:
    """An idempotent producer with batches as large as the relay's."""
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap, acks="all", enable_idempotence=True, linger_ms=0, max_batch_size=512 * 1024
    )
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()
