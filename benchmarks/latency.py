"""From a command to the read model: how long until its row is committed, at a steady rate of commands.

Open loop: a command has its time, whether those before it are through or not, and its latency begins at that time.
Client and services share one process and one core. The first part of each run is dropped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from uuid import uuid4

import asyncpg

from benchmarks import byhand
from benchmarks.harness import Row, Setting, compare, quantile
from benchmarks.workload import world
from bus.cloudevents import to_record
from bus.metrics import MemoryMetrics
from bus.seams import SystemClock
from bus.transport import TopicSpec
from foldbus.backends import open_transport

WARM_UP_S = 1.5
RATES = (100, 500)


class Stamps:
    """A failpoint as a clock: what a read model has folded is visible when `after-projection-save` is hit."""

    def __init__(self, folded: list[str], saved: dict[str, float]) -> None:
        self._folded, self._saved = folded, saved

    def hit(self, name: str) -> None:
        if name == "after-projection-save":
            now = time.perf_counter()
            for key in self._folded:
                self._saved.setdefault(key, now)
            self._folded.clear()


async def run(setting: Setting) -> list[Row]:
    rows: list[Row] = []
    for rate in (setting.quick and (50,)) or RATES:
        rows += await _at(setting, rate)
    return rows


async def _at(setting: Setting, rate: int) -> list[Row]:
    async def servers(_: int) -> Mapping[str, float]:
        async with setting.database() as dsn:
            return await _foldbus(setting, rate, dsn, setting.bus)

    async def embedded(_: int) -> Mapping[str, float]:
        directory = setting.fresh()
        return await _foldbus(setting, rate, f"sqlite:{directory}", f"embedded:{directory}")

    async def by_hand(_: int) -> Mapping[str, float]:
        return await _by_hand(setting, rate)

    return await compare(
        f"command to committed row, {rate} commands/s, one process",
        {
            "Kafka + PostgreSQL, one loop by hand": by_hand,
            "PostgreSQL + Kafka": servers,
            "SQLite + embedded bus": embedded,
        },
        floor="Kafka + PostgreSQL, one loop by hand",
        rounds=setting.fewer(3),
    )


async def _foldbus(setting: Setting, rate: int, store: str, bus: str) -> Mapping[str, float]:
    here = world()
    own: dict[str, float] = {}
    other: dict[str, float] = {}
    async with (
        here.desk.connect(
            store=store, bus=bus, worker=True, migrate=True, apply_topics=True,
            failpoint=Stamps(here.folded["desk"], own),
        ) as desk,
        here.board.connect(
            store=store, bus=bus, worker=True, migrate=True, apply_topics=True,
            failpoint=Stamps(here.folded["board"], other),
        ),
    ):  # fmt: skip
        due = await open_loop(setting, rate, lambda n: desk.send(here.command(f"note-{n}", n)))
        await all_there(due, own, other)
    return {**figures("own row", due, own), **figures("other service's row", due, other)}


async def _by_hand(setting: Setting, rate: int) -> Mapping[str, float]:
    """No store of events, no outbox: the command's own row, from the batch loop."""
    here = world()
    saved: dict[str, float] = {}

    def done(keys: Sequence[str]) -> None:
        now = time.perf_counter()
        for key in keys:
            saved.setdefault(key, now)

    topic = f"{here.name}.commands"
    async with setting.database() as dsn, _topic(setting, topic), byhand.producing(setting.kafka) as producer:
        db = await asyncpg.connect(dsn)
        try:
            await db.execute(byhand.SCHEMA)
            async with byhand.looping(
                setting.kafka, db, topic, name=f"by-hand-{uuid4().hex[:8]}", taken=lambda: None, done=done
            ):

                async def send(n: int) -> object:
                    record = to_record(here.command_envelope(f"note-{n}", n))
                    return await producer.send_and_wait(
                        topic, key=record.key, value=record.value, headers=list(record.headers)
                    )

                due = await open_loop(setting, rate, send)
                await all_there(due, saved)
        finally:
            await db.close()
    return figures("own row", due, saved)


@asynccontextmanager
async def _topic(setting: Setting, name: str) -> AsyncIterator[None]:
    async with open_transport(setting.bus, clock=SystemClock(), metrics=MemoryMetrics()) as transport:
        await transport.admin.create([TopicSpec(name)])
    yield


async def open_loop(setting: Setting, rate: int, send: Callable[[int], Awaitable[object]]) -> dict[str, float]:
    """Sends at the given rate; answers when each key was due. What is due in the warm-up is left out of the answer."""
    seconds, warm_up = setting.pick(6.0, 0.4), setting.pick(WARM_UP_S, 0.1)
    due: dict[str, float] = {}
    async with asyncio.TaskGroup() as group:
        begin = time.perf_counter() + 0.1
        for n in range(int(rate * (seconds + warm_up))):
            at = begin + n / rate
            if (early := at - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            group.create_task(_sent(send, n))
            if at - begin >= warm_up:
                due[f"note-{n}"] = at
    return due


async def _sent(send: Callable[[int], Awaitable[object]], n: int) -> None:
    await send(n)


async def all_there(due: Mapping[str, float], *saved: Mapping[str, float]) -> None:
    async with asyncio.timeout(60):
        while not all(due.keys() <= one.keys() for one in saved):  # noqa: ASYNC110 - polled, to cost nothing
            await asyncio.sleep(0.02)


def figures(what: str, due: Mapping[str, float], saved: Mapping[str, float]) -> dict[str, float]:
    took = [(saved[key] - at) * 1000 for key, at in due.items()]
    return {f"ms p50, {what}": quantile(took, 0.5), f"ms p99, {what}": quantile(took, 0.99)}
