"""python -m benchmarks.parts ROLE {"kafka": …, "dsn": …, "world": …}: one process of a pipeline.

A pipeline takes commands from a topic, decides, stores an event, relays it to another topic and counts it in a read
model there. By hand that is `handler`, `relay` and `projector`; with Foldbus it is `desk` (which has a relay) and
`board`. It says `ready` on its standard output, runs until its standard input is closed, and then the process with the
read model prints when each key was committed there (CLOCK_MONOTONIC, which is the machine's), and all print the CPU
seconds that they used since they were ready.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg
from aiokafka import AIOKafkaConsumer

from benchmarks import byhand
from benchmarks.workload import world
from bus.partitioner import partition_of
from foldbus.process import giving_memory_back, tune

BATCH = 100
POLL_S = 0.002

SCHEMA = """
create table inbox (consumer text not null, message_id uuid not null, primary key (consumer, message_id));
create table streams (key text primary key, version bigint not null);
create table events (
    position bigint generated always as identity primary key, tx xid8 not null default pg_current_xact_id(),
    key text not null, version bigint not null, id uuid not null, data bytea not null, unique (key, version));
create table relayed (one boolean primary key default true, position bigint not null);
insert into relayed values (true, 0);
create table places (topic text, partition int, "offset" bigint not null, primary key (topic, partition));
create table shown (key text primary key, count int not null);
"""
CLAIM = """insert into inbox select $1, id from unnest($2::uuid[]) as id
           on conflict do nothing returning message_id"""
VERSIONS = "select key, version from streams where key = any($1) order by key for update"
EVENTS = """insert into events (key, version, id, data)
            select * from unnest($1::text[], $2::bigint[], $3::uuid[], $4::bytea[])"""
STREAMS = """insert into streams select * from unnest($1::text[], $2::bigint[])
             on conflict (key) do update set version = excluded.version"""
DUE = """select position, key, id, data from events
          where position > $1 and tx < pg_snapshot_xmin(pg_current_snapshot()) order by position limit 1000"""
PLACES = """insert into places select $1, * from unnest($2::int[], $3::bigint[])
            on conflict (topic, partition) do update set "offset" = excluded."offset" """


async def handler(kafka: str, dsn: str, name: str) -> None:
    """A batch is a transaction: claims, versions, events. Then the offsets are committed."""
    db = await asyncpg.connect(dsn)
    consumer = AIOKafkaConsumer(
        f"{name}.commands", bootstrap_servers=kafka, group_id=name, enable_auto_commit=False,
        auto_offset_reset="earliest",
    )  # fmt: skip
    await consumer.start()
    try:
        await _handle(consumer, db, name)
    finally:
        await consumer.stop()


async def _handle(consumer: Any, db: Any, name: str) -> None:
    ready()
    while True:
        found = await consumer.getmany(max_records=BATCH, timeout_ms=200)
        records = {
            UUID(dict(record.headers)["ce_id"].decode()): (record.key.decode(), record.value)
            for part in found.values()
            for record in part
        }
        if not records:
            continue
        async with db.transaction():
            new = [row["message_id"] for row in await db.fetch(CLAIM, name, list(records))]
            versions: dict[str, int] = dict(await db.fetch(VERSIONS, list({records[id][0] for id in new})))
            events: list[tuple[str, int, UUID, bytes]] = []
            for id in records:  # in their order
                if id in new:
                    key, value = records[id]
                    decided = json.loads(value)
                    versions[key] = versions.get(key, 0) + 1
                    events.append((key, versions[key], id, json.dumps(decided).encode()))
            if events:
                await db.execute(EVENTS, *(list(column) for column in zip(*events, strict=True)))
                await db.execute(STREAMS, list(versions), list(versions.values()))
        await consumer.commit()


async def relay(kafka: str, dsn: str, name: str) -> None:
    """Polls for what no open transaction can precede, publishes by partition, marks."""
    db = await asyncpg.connect(dsn)
    topic = f"{name}.events"
    async with byhand.producing(kafka) as producer:
        partitions = len(await producer.partitions_for(topic))
        at = await db.fetchval("select position from relayed")
        ready()
        while True:
            found = await db.fetch(DUE, at)
            if not found:
                await asyncio.sleep(POLL_S)
                continue
            lanes: dict[int, Any] = {}
            for _, key, id, data in found:
                partition = partition_of(key.encode(), partitions)
                lane = lanes.get(partition)
                if lane is None:
                    lane = lanes[partition] = producer.create_batch()
                lane.append(timestamp=None, key=key.encode(), value=data, headers=[("ce_id", str(id).encode())])
            sent = [await producer.send_batch(lane, topic, partition=part) for part, lane in lanes.items()]
            await asyncio.gather(*sent)
            at = found[-1]["position"]
            await db.execute("update relayed set position = $1", at)


async def projector(kafka: str, dsn: str, name: str) -> Mapping[str, float]:
    """All partitions without a group; rows and places in one transaction."""
    db = await asyncpg.connect(dsn)
    topic = f"{name}.events"
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=kafka, group_id=None, auto_offset_reset="earliest")
    await consumer.start()
    ready()
    saved: dict[str, float] = {}

    async def run() -> None:
        while True:
            found = await consumer.getmany(max_records=BATCH, timeout_ms=200)
            keys = [record.key.decode() for part in found.values() for record in part if json.loads(record.value)]
            if not keys:
                continue
            ends = {part.partition: records[-1].offset + 1 for part, records in found.items() if records}
            async with db.transaction():
                await db.execute(byhand.SHOWN, sorted(keys))
                await db.execute(PLACES, topic, list(ends), list(ends.values()))
            now = time.monotonic()
            for key in keys:
                saved.setdefault(key, now)

    try:
        await until_told(run())
    finally:
        await consumer.stop()
    return saved


class Stamps:
    """As in `latency.py`: a failpoint as a clock."""

    def __init__(self, folded: list[str]) -> None:
        self._folded = folded
        self.saved: dict[str, float] = {}

    def hit(self, name: str) -> None:
        if name == "after-projection-save":
            now = time.monotonic()
            for key in self._folded:
                self.saved.setdefault(key, now)
            self._folded.clear()


@asynccontextmanager
async def working(role: str, kafka: str, dsn: str, name: str) -> AsyncIterator[Stamps]:
    here = world(name)
    stamps = Stamps(here.folded[role])
    service = here.desk_without_rows if role == "desk" else here.board
    connecting = service.connect(store=dsn, bus=f"kafka://{kafka}", worker=True, failpoint=stamps)
    async with connecting, giving_memory_back():  # as `foldbus run` does
        yield stamps


async def until_told(work: Any = None) -> None:
    """Until the standard input is closed."""
    told = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    task = asyncio.ensure_future(work) if work is not None else None
    await asyncio.wait({told, task} if task is not None else {told}, return_when=asyncio.FIRST_COMPLETED)
    if task is not None:
        if task.done():
            task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


_spent = 0.0


def ready() -> None:
    global _spent
    _spent = time.process_time()
    print("ready", flush=True)


async def main(role: str, kafka: str, dsn: str, name: str) -> Mapping[str, float]:
    if role in ("desk", "board"):
        async with working(role, kafka, dsn, name) as stamps:
            ready()
            await until_told()
        return stamps.saved
    if role == "projector":
        return await projector(kafka, dsn, name)
    await until_told({"handler": handler, "relay": relay}[role](kafka, dsn, name))
    return {}


if __name__ == "__main__":
    tune()  # as `foldbus run` does; the parts by hand have it, too
    logging.basicConfig(level=logging.ERROR)
    order: dict[str, Any] = json.loads(sys.argv[2])
    saved = asyncio.run(main(sys.argv[1], order["kafka"], order["dsn"], order["world"]))
    print(json.dumps({"cpu_s": time.process_time() - _spent, "saved": saved}), flush=True)
