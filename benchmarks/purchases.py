"""Purchases per second end to end: the shop demo, its four services in this process, on both pairs of backends.

A purchase is a saga of three steps in three services: 1 command from outside, 4 or more commands and replies between
services, 5 or more events, and two read models. It counts when its order has ended and its customer's row has it.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Mapping

from aiokafka.admin import AIOKafkaAdminClient

from benchmarks.harness import Row, Setting, compare
from foldbus.progress import Progress
from shop.demo import SERVICES, Options
from shop.demo import run as run_demo


async def run(setting: Setting) -> list[Row]:
    limit = setting.count(1000, 20)

    async def embedded(_: int) -> Mapping[str, float]:
        return await figures(Options(limit=limit, directory=setting.fresh()))

    async def servers(_: int) -> Mapping[str, float]:
        async with setting.database() as dsn:
            try:
                return await figures(Options(limit=limit, store=dsn, bus=setting.bus))
            finally:
                await forget_topics(setting.kafka)

    return await compare(
        f"{limit} purchases end to end, four services in one process",
        {"SQLite + embedded bus": embedded, "PostgreSQL + Kafka": servers},
        rounds=setting.fewer(3),
    )


async def figures(options: Options) -> Mapping[str, float]:
    cpu = time.process_time()
    report = await run_demo(options, Progress(stream=io.StringIO(), interactive=False))
    cpu = time.process_time() - cpu
    assert report.ok, f"the shop's figures differ: {report.differing} {report.differing_rebuilt}"
    return {"purchases/s": report.per_second, "ms of Python's CPU each": cpu / report.expected.placed * 1e3}


async def forget_topics(bootstrap: str) -> None:
    """Takes the demo's topics away, with what groups committed in them, so that it can be run again."""
    names = [spec.name for service in SERVICES for spec in service.topics]
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.delete_topics([name for name in await admin.list_topics() if name in names])
        async with asyncio.timeout(30):
            while set(names) & set(await admin.list_topics()):  # noqa: ASYNC110 - the broker has no event
                await asyncio.sleep(0.05)
    finally:
        await admin.close()
