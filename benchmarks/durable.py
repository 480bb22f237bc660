"""Durable consumption: commands from Kafka into PostgreSQL, each with one effect, against hand-written loops and, where
it is installed (`make bench-peers`), FastStream with a session per message."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import asyncpg

from benchmarks import byhand
from benchmarks.harness import Row, Setting, Variant, compare
from benchmarks.peers.faststream import faststream_rate
from benchmarks.peers.install import BUS, missing
from benchmarks.workload import World, world
from bus.cloudevents import from_record, to_record
from bus.consumer import ConsumerEngine, EngineSettings
from bus.processing import Done, Item, Processor, Result, Watermarks
from bus.seams import NoFailpoints
from bus.transport import Ack
from foldbus.worker import command_processor

KEYS = 2000


class Stopwatch:
    """From the first record in hand until `total` are committed: joining the group is not what is measured."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._began = self._ended = 0.0
        self._over = asyncio.Event()

    def taken(self) -> None:
        if not self._began:
            self._began, self._cpu = time.perf_counter(), time.process_time()

    def done(self, count: int) -> None:
        self._done += count
        if self._done >= self._total:
            self._ended, self._cpu = time.perf_counter(), time.process_time() - self._cpu
            self._over.set()

    async def figures(self) -> Mapping[str, float]:
        async with asyncio.timeout(120):
            await self._over.wait()
        assert self._done == self._total, f"{self._done} effects of {self._total} messages"
        seconds = self._ended - self._began
        return {"messages/s": self._total / seconds, "µs of Python's CPU each": self._cpu / self._total * 1e6}


class Timed:
    """A processor that tells the stopwatch."""

    def __init__(self, inner: Processor, watch: Stopwatch) -> None:
        self._inner, self._watch = inner, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Result]:
        self._watch.taken()
        results = await self._inner.process(batch, watermarks)
        self._watch.done(sum(isinstance(result, Done) for result in results))
        return results


async def run(setting: Setting) -> list[Row]:
    total = setting.count(20_000, 300)
    here = world()
    await _fill(setting, here, total)

    async def foldbus(number: int) -> Mapping[str, float]:
        watch = Stopwatch(total)
        async with (
            setting.database() as dsn,
            here.desk.connect(store=dsn, bus=setting.bus, migrate=True, apply_topics=True) as connection,
        ):
            processor = command_processor(connection)
            processor.group = f"{here.name}-{number}"
            engine = ConsumerEngine(
                connection.transport,
                [f"{here.name}.commands"],
                Timed(processor, watch),
                parse=from_record,
                settings=EngineSettings(),
                clock=connection.clock,
                metrics=connection.metrics,
                failpoint=NoFailpoints(),
            )
            running = asyncio.create_task(engine.run())
            try:
                return await watch.figures()
            finally:
                engine.stop()
                await running

    async def by_hand(number: int) -> Mapping[str, float]:
        async with setting.database() as dsn:
            db = await asyncpg.connect(dsn)
            try:
                return await looped(number, db, byhand.batch_loop, "batches")
            finally:
                await db.close()

    async def message_by_message(number: int) -> Mapping[str, float]:
        async with setting.database() as dsn, asyncpg.create_pool(dsn, min_size=16, max_size=16) as pool:
            return await looped(number, pool, byhand.message_loop, "messages")

    async def looped(number: int, db: Any, loop: byhand.Loop, what: str) -> Mapping[str, float]:
        watch = Stopwatch(total)
        await db.execute(byhand.SCHEMA)
        async with byhand.looping(
            setting.kafka,
            db,
            f"{here.name}.commands",
            name=f"{here.name}-{what}-{number}",
            taken=watch.taken,
            done=lambda keys: watch.done(len(keys)),
            loop=loop,
        ):
            return await watch.figures()

    async def faststream(number: int) -> Mapping[str, float]:
        async with setting.database() as dsn:
            db = await asyncpg.connect(dsn)
            try:
                await db.execute(byhand.SCHEMA)
                few = setting.count(1000, 50)
                rate = await faststream_rate(
                    setting, f"{here.name}.commands", f"{here.name}-fs-{number}", total=few, dsn=dsn, workers=12
                )
                effects = await db.fetchval("select sum(count) from shown")
                assert effects >= few, f"{effects} effects of {few} messages"
            finally:
                await db.close()
        return {"messages/s": rate}

    variants: dict[str, Variant] = {
        "aiokafka + asyncpg, batches of 500, by hand": by_hand,
        "ConsumerEngine + PostgresStore": foldbus,
        "the same by hand, a transaction per message, 16 keys at once": message_by_message,
    }
    why = missing(BUS)
    if why is None:
        variants["FastStream, 12 workers, an SQLAlchemy session per message"] = faststream
    rows = await compare(
        f"durable consumption, {total} commands of {min(total, KEYS)} keys from Kafka into PostgreSQL",
        variants,
        floor="aiokafka + asyncpg, batches of 500, by hand",
        rounds=setting.rounds,
        warm_up=True,
    )
    return rows if why is None else [*rows, Row(rows[0].case, "FastStream", "", (), note=f"not installed: {why}")]


async def _fill(setting: Setting, here: World, total: int) -> None:
    async with (
        setting.database() as dsn,
        here.desk.connect(store=dsn, bus=setting.bus, migrate=True, apply_topics=True) as connection,
    ):
        for start in range(0, total, 1000):
            page = range(start, min(total, start + 1000))
            records = [to_record(here.command_envelope(f"note-{n % KEYS}", n)) for n in page]
            assert all(isinstance(one, Ack) for one in await connection.transport.publish(records))
