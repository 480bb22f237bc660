"""At most once: events from Kafka to a handler without a database, against aiokafka's `getmany` alone and, where it is
installed (`make bench-peers`), FastStream with ACK_FIRST.

`getmany` counts records, and nothing is parsed or committed there; the handler is given a validated event whose offset
is committed. All begin with the first record in hand.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from aiokafka import AIOKafkaConsumer

from benchmarks import byhand
from benchmarks.harness import Row, Setting, Variant, compare
from benchmarks.peers.faststream import faststream_rate
from benchmarks.peers.install import BUS, missing
from benchmarks.relaying import send_grouped
from benchmarks.workload import World, world
from bus.cloudevents import to_record
from bus.metrics import MemoryMetrics
from bus.seams import SystemClock
from bus.transport import TopicSpec
from foldbus import AT_MOST_ONCE, BareContext, Handler, Service
from foldbus.backends import open_transport

KEYS = 2000
BATCH = 500


class Count:
    def __init__(self, total: int) -> None:
        self._total = self._left = total
        self._began = 0.0
        self.over: asyncio.Future[Mapping[str, float]] = asyncio.get_running_loop().create_future()

    def taken(self, count: int) -> None:
        if not self._began:
            self._began, self._cpu = time.perf_counter(), time.process_time()
        self._left -= count
        if self._left <= 0 and not self.over.done():
            seconds, cpu = time.perf_counter() - self._began, time.process_time() - self._cpu
            self.over.set_result(
                {"messages/s": self._total / seconds, "µs of Python's CPU each": cpu / self._total * 1e6}
            )


async def run(setting: Setting) -> list[Row]:
    total = setting.count(100_000, 500)
    here = world()
    topic = f"{here.name}.events"
    await _fill(setting, here, topic, total)

    async def getmany(number: int) -> Mapping[str, float]:
        count = Count(total)
        consumer = AIOKafkaConsumer(
            topic, bootstrap_servers=setting.kafka, group_id=f"{here.name}-getmany-{number}", enable_auto_commit=False,
            auto_offset_reset="earliest",
        )  # fmt: skip
        await consumer.start()
        try:
            while not count.over.done():
                found = await consumer.getmany(max_records=BATCH, timeout_ms=200)
                count.taken(sum(map(len, found.values())))
        finally:
            await consumer.stop()
        return await count.over

    async def foldbus(number: int) -> Mapping[str, float]:
        count = Count(total)
        noted = here.noted

        async def notice(event: noted, ctx: BareContext[None]) -> None:  # type: ignore[valid-type]
            count.taken(1)

        notice.__annotations__.update(event=noted, ctx=BareContext[None])  # the class is made at run time
        watching = Service(
            f"{here.name}-watch", handlers=[Handler(notice, name=f"notice-{number + 1}", delivery=AT_MOST_ONCE)]
        )
        store = f"sqlite:{setting.fresh()}"
        async with watching.connect(store=store, bus=setting.bus, worker=True, migrate=True, apply_topics=True):
            async with asyncio.timeout(180):
                return await count.over

    async def faststream(number: int) -> Mapping[str, float]:
        few = setting.count(10_000, 200)
        return {
            "messages/s": await faststream_rate(
                setting, topic, f"{here.name}-fs-{number}", total=few, workers=1, first=True
            )
        }

    variants: dict[str, Variant] = {"aiokafka getmany(500)": getmany, "Handler, AT_MOST_ONCE": foldbus}
    why = missing(BUS)
    if why is None:
        variants["FastStream, ACK_FIRST"] = faststream
    rows = await compare(
        f"at most once, {total} events from Kafka, no database",
        variants,
        floor="aiokafka getmany(500)",
        rounds=setting.rounds,
        warm_up=True,
    )
    return rows if why is None else [*rows, Row(rows[0].case, "FastStream", "", (), note=f"not installed: {why}")]


async def _fill(setting: Setting, here: World, topic: str, total: int) -> None:
    async with (
        open_transport(setting.bus, clock=SystemClock(), metrics=MemoryMetrics()) as transport,
        byhand.producing(setting.kafka) as producer,
    ):
        await transport.admin.create([TopicSpec(topic)])
        for start in range(0, total, 10_000):
            page = range(start, min(total, start + 10_000))
            records = [to_record(here.event(f"note-{n % KEYS}", topic=topic)) for n in page]
            await send_grouped(producer, records, here.desk.partitions)
