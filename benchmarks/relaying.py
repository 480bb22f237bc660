"""The relay: events from the store to their topic, against `send_batch` and `send` of the same records from memory."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import byhand
from benchmarks.harness import Row, Setting, compare
from benchmarks.workload import world
from bus.cloudevents import to_record
from bus.metrics import MemoryMetrics
from bus.partitioner import hashes_of
from bus.seams import NoFailpoints, SystemClock
from bus.transport import Ack, Outgoing
from eventstore.port import Store
from foldbus.relay import Relay

PAGE = 2000


class Awaited(MemoryMetrics):
    """Tells when so many records are relayed."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self._left, self.relayed = total, asyncio.Event()

    def count(self, name: str, n: int = 1, **labels: str) -> None:
        super().count(name, n, **labels)
        if name == "foldbus_relayed_total":
            self._left -= n
            if self._left <= 0:
                self.relayed.set()


async def run(setting: Setting) -> list[Row]:
    total = setting.count(20_000, 200)
    here = world()
    async with (
        setting.database() as dsn,
        here.desk.connect(store=dsn, bus=setting.bus, migrate=True, apply_topics=True) as connection,
        byhand.producing(setting.kafka) as producer,
    ):
        store, transport = connection.store, connection.transport
        records: list[Outgoing] = []

        async def relay(_: int) -> Mapping[str, float]:
            await _fill(store, here.append, total)
            metrics = Awaited(total)
            running = asyncio.create_task(
                Relay(
                    store, transport, clock=SystemClock(), metrics=metrics, failpoint=NoFailpoints(),
                    rng=random.Random(1),
                ).run()
            )  # fmt: skip
            began = time.perf_counter()
            try:
                async with asyncio.timeout(120):
                    await metrics.relayed.wait()
                return {"records/s": total / (time.perf_counter() - began)}
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

        async def publish(_: int) -> Mapping[str, float]:
            began = time.perf_counter()
            for start in range(0, total, PAGE):
                answers = await transport.publish(records[start : start + PAGE])
                assert all(isinstance(answer, Ack) for answer in answers)
            return {"records/s": total / (time.perf_counter() - began)}

        async def send_batch(_: int) -> Mapping[str, float]:
            began = time.perf_counter()
            await send_grouped(producer, records, here.desk.partitions)
            return {"records/s": total / (time.perf_counter() - began)}

        async def send(_: int) -> Mapping[str, float]:
            began = time.perf_counter()
            sent = [
                await producer.send(one.topic, key=one.key, value=one.value, headers=list(one.headers))
                for one in records
            ]
            await asyncio.gather(*sent)
            return {"records/s": total / (time.perf_counter() - began)}

        records += [to_record(here.append().appends[0].envelopes[0]) for _ in range(total)]
        return await compare(
            f"relay, {total} events from PostgreSQL to Kafka",
            {
                "aiokafka send_batch, records from memory": send_batch,
                "KafkaTransport.publish, records from memory": publish,
                "Relay: read, publish, mark": relay,
                "aiokafka send, gathered, records from memory": send,
            },
            floor="aiokafka send_batch, records from memory",
            rounds=setting.rounds,
            warm_up=True,
        )


async def _fill(store: Store, unit: Any, total: int) -> None:
    for start in range(0, total, 500):
        await store.commit([unit() for _ in range(min(500, total - start))])


async def send_grouped(producer: Any, records: Sequence[Outgoing], partitions: int) -> None:
    """Grouped by partition, in batches as large as they may be, all under way at once."""
    lanes: dict[int, list[Outgoing]] = {}
    for record, hashed in zip(records, hashes_of([record.key or b"" for record in records]), strict=True):
        lanes.setdefault(hashed % partitions, []).append(record)
    pending: list[Any] = []
    for partition, lane in lanes.items():
        builder = producer.create_batch()
        for record in lane:
            headers = list(record.headers)
            if builder.append(timestamp=None, key=record.key, value=record.value, headers=headers) is None:
                pending.append(await producer.send_batch(builder, record.topic, partition=partition))
                builder = producer.create_batch()
                builder.append(timestamp=None, key=record.key, value=record.value, headers=headers)
        pending.append(await producer.send_batch(builder, lane[0].topic, partition=partition))
    await asyncio.gather(*pending)
