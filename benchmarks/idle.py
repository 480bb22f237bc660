"""python -m benchmarks.idle [--seconds N] [--json]: what a worker costs that has nothing to do.

Each process of the pipeline (`parts.py`) runs idle on Kafka and PostgreSQL; so do the shop demo's services, with
deciders, sagas and read models. CPU time of each process between two looks at it, as a share of one core. The promise
is under 2 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil

from benchmarks import pipeline
from benchmarks.harness import Setting
from shop.demo import SERVICES
from tests.servers import MissingServer, both

ROOT = Path(__file__).parents[1]
LIMIT = 0.02
WARM_UP_S = 15.0
"""For starting, four at a time."""


async def shares(setting: Setting, seconds: float) -> dict[str, float]:
    found: dict[str, float] = {}
    async with pipeline.foldbus(setting) as running:
        named = dict(zip(("desk: commands, relay", "board: one read model of a topic"), running.processes, strict=True))
        found |= await _watched({name: process.pid for name, process in named.items()}, seconds)
        await running.stop()
    for store, bus in (("sqlite", "embedded"), ("postgresql", "kafka")):
        async with _shop(setting, store) as pids:
            found |= await _watched({f"shop {name} on {store} and {bus}": pid for name, pid in pids.items()}, seconds)
    return found


async def _watched(pids: dict[str, int], seconds: float) -> dict[str, float]:
    await asyncio.sleep(WARM_UP_S)
    processes = {name: psutil.Process(pid) for name, pid in pids.items()}
    before = {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
    await asyncio.sleep(seconds)
    return {name: (sum(process.cpu_times()[:2]) - before[name]) / seconds for name, process in processes.items()}


@asynccontextmanager
async def _shop(setting: Setting, store: str) -> AsyncGenerator[dict[str, int]]:
    """The shop's services as `foldbus run`, one process each."""
    directory = setting.fresh()
    async with setting.database() as dsn:
        where = (dsn, setting.bus) if store == "postgresql" else (f"sqlite:{directory}", f"embedded:{directory}")
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FOLDBUS_")},
            "FOLDBUS_STORE": where[0],
            "FOLDBUS_BUS": where[1],
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")]),
        }
        for service in SERVICES:
            async with service.connect(store=where[0], bus=where[1], migrate=True, apply_topics=True):
                pass
        started: dict[str, asyncio.subprocess.Process] = {}
        try:
            for service in SERVICES:
                started[service.name] = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "foldbus", "run", f"shop.{service.name}:app", "--quiet"),
                    env=environment,
                    stdin=asyncio.subprocess.DEVNULL,
                )
            yield {name: process.pid for name, process in started.items()}
        finally:
            for process in started.values():
                if process.returncode is None:
                    process.kill()
                await process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.idle", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    try:
        with both() as (kafka, postgres), tempfile.TemporaryDirectory(prefix="foldbus-idle-") as directory:
            found = asyncio.run(shares(Setting(kafka.bootstrap, postgres.dsn, Path(directory)), chosen.seconds))
    except MissingServer as missing:
        print(missing, file=sys.stderr)
        return 1
    if chosen.json:
        print(json.dumps(found))
    else:
        print(f"CPU of one core while idle, over {chosen.seconds:g} s, load {os.getloadavg()[0]:.2f}")
        for name, share in found.items():
            print(f"  {share:6.2%}  {name}{'' if share < LIMIT else f'  over {LIMIT:.0%}'}")
    return 0 if max(found.values()) < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
