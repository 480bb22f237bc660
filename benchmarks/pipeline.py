"""Command → decide → append → relay → topic → read model, each part a process of its own, all on the same cores.

By hand in batches of 100 (`parts.py`), and with Foldbus. *Drain*: so many commands at once, until the read model has
them all. *Steady*: commands at a rate, each when it is due; its latency ends when its row is committed. At one command
per second a part that polls instead of being woken would show itself by its interval.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from benchmarks import byhand, parts
from benchmarks.harness import Row, Setting, compare, quantile
from benchmarks.relaying import send_grouped
from benchmarks.workload import World, world
from bus.cloudevents import to_record
from bus.metrics import MemoryMetrics
from bus.seams import SystemClock
from bus.transport import TopicSpec
from eventstore.postgres.schema import schema_of
from foldbus.backends import open_transport

ROOT = Path(__file__).parents[1]
KEYS = 2000
SETTLE_S = 1.5
"""For joining groups, which is not what is measured."""

BY_HAND = "by hand, batches of 100"
FOLDBUS = "Foldbus"


@dataclass
class Pipeline:
    """`shown` is the SQL that tells how many events the read model has counted."""

    here: World
    topic: str
    dsn: str
    shown: str
    send: Callable[[int], Awaitable[object]]
    """Sends one command and waits for the acknowledgement."""
    processes: list[asyncio.subprocess.Process]

    async def stop(self) -> Mapping[str, float]:
        """Ends all parts; answers when each key was in the read model, and what CPU the parts used."""
        saved: dict[str, float] = {}
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            out, _ = await asyncio.wait_for(process.communicate(), 30)
            said = json.loads(out)
            saved.update(said["saved"])
            self.cpu_s += said["cpu_s"]
        self.processes.clear()
        return saved

    cpu_s: float = 0.0


async def run(setting: Setting) -> list[Row]:
    return await _drain(setting) + await _steady(setting, 100, setting.pick(6.0, 1.5))


async def run_slowly(setting: Setting) -> list[Row]:
    """One command per second."""
    return await _steady(setting, 1, setting.pick(60.0, 2.0))


async def _drain(setting: Setting) -> list[Row]:
    total = setting.count(20_000, 200)

    def variant(running: Any) -> Any:
        async def one(_: int) -> Mapping[str, float]:
            async with running(setting) as pipeline, byhand.producing(setting.kafka) as producer:
                here = pipeline.here
                records = [to_record(here.command_envelope(f"note-{n % KEYS}", n)) for n in range(total)]
                db = await asyncpg.connect(pipeline.dsn)
                try:
                    began = time.perf_counter()
                    await send_grouped(producer, records, here.desk.partitions)
                    async with asyncio.timeout(120):
                        while await db.fetchval(pipeline.shown) < total:  # noqa: ASYNC110 - asked, to cost little
                            await asyncio.sleep(0.02)
                    seconds = time.perf_counter() - began
                    assert await db.fetchval(pipeline.shown) == total
                finally:
                    await db.close()
                await pipeline.stop()
                return {"commands/s": total / seconds, "µs of Python's CPU each": pipeline.cpu_s / total * 1e6}

        return one

    return await compare(
        f"pipeline, {total} commands of {min(total, KEYS)} keys, one process per part",
        {BY_HAND: variant(by_hand), FOLDBUS: variant(foldbus)},
        floor=BY_HAND,
        rounds=setting.rounds,
    )


async def _steady(setting: Setting, rate: int, seconds: float) -> list[Row]:
    def variant(running: Any) -> Any:
        async def one(_: int) -> Mapping[str, float]:
            async with running(setting) as pipeline:
                due = await _open_loop(rate, seconds, pipeline.send)
                await asyncio.sleep(1.0)
                saved = await pipeline.stop()
            late = [key for key in due if key not in saved]
            assert not late, f"{len(late)} of {len(due)} never came"
            took = [(saved[key] - at) * 1000 for key, at in due.items()]
            return {f"ms p{share}": quantile(took, share / 100) for share in (50, 90, 99)} | {"ms max": max(took)}

        return one

    return await compare(
        f"pipeline, {rate} commands/s, command to committed row, one process per part",
        {BY_HAND: variant(by_hand), FOLDBUS: variant(foldbus)},
        floor=BY_HAND,
        rounds=setting.rounds if rate > 1 else setting.fewer(3),
    )


async def _open_loop(rate: int, seconds: float, send: Callable[[int], Awaitable[object]]) -> dict[str, float]:
    """When each key was due; the first part is a warm-up and left out."""
    warm_up = max(2, round(rate * 1.5))
    due: dict[str, float] = {}
    async with asyncio.TaskGroup() as group:
        begin = time.monotonic() + 0.1
        for n in range(warm_up + round(rate * seconds)):
            at = begin + n / rate
            if (early := at - time.monotonic()) > 0:
                await asyncio.sleep(early)
            group.create_task(_sent(send, n))
            if n >= warm_up:
                due[f"note-{n}"] = at
    return due


async def _sent(send: Callable[[int], Awaitable[object]], n: int) -> None:
    await send(n)


@asynccontextmanager
async def by_hand(setting: Setting) -> AsyncIterator[Pipeline]:
    here = world()
    topic = f"{here.name}.commands"
    async with setting.database() as dsn, byhand.producing(setting.kafka) as producer:
        db = await asyncpg.connect(dsn)
        await db.execute(parts.SCHEMA)
        await db.close()
        async with open_transport(setting.bus, clock=SystemClock(), metrics=MemoryMetrics()) as transport:
            await transport.admin.create([TopicSpec(name) for name in (topic, f"{here.name}.events")])

        async def send(n: int) -> object:
            record = to_record(here.command_envelope(f"note-{n}", n))
            return await producer.send_and_wait(topic, key=record.key, value=record.value, headers=list(record.headers))

        async with _processes(("handler", "relay", "projector"), setting, dsn, here) as processes:
            yield Pipeline(here, topic, dsn, "select coalesce(sum(count), 0) from shown", send, processes)


@asynccontextmanager
async def foldbus(setting: Setting) -> AsyncIterator[Pipeline]:
    here = world()
    desk, board = here.desk_without_rows, here.board
    async with (
        setting.database() as dsn,
        board.connect(store=dsn, bus=setting.bus, migrate=True, apply_topics=True),
        desk.connect(store=dsn, bus=setting.bus, migrate=True, apply_topics=True) as client,
        _processes(("desk", "board"), setting, dsn, here) as processes,
    ):
        shown = f"select coalesce(sum(count), 0) from {schema_of(board.name)}.shown"
        yield Pipeline(
            here, f"{here.name}.commands", dsn, shown, lambda n: client.send(here.command(f"note-{n}", n)), processes
        )


@asynccontextmanager
async def _processes(
    roles: Sequence[str], setting: Setting, dsn: str, here: World
) -> AsyncIterator[list[asyncio.subprocess.Process]]:
    order = json.dumps({"kafka": setting.kafka, "dsn": dsn, "world": here.name})
    async with AsyncExitStack() as stack:
        started: list[asyncio.subprocess.Process] = []
        for role in roles:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "benchmarks.parts", role, order),
                cwd=ROOT,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=16 * 1024 * 1024,
            )
            stack.push_async_callback(_gone, process)
            started.append(process)
        for process in started:
            assert process.stdout is not None
            async with asyncio.timeout(60):
                said = await process.stdout.readline()
            assert said == b"ready\n", f"a part did not start: {said!r}"
        await asyncio.sleep(SETTLE_S)
        yield started


async def _gone(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()
