"""python -m benchmarks.bus_memory [--messages N] [--json]: memory of a worker over many messages.

A million commands go through the pipeline (`pipeline.py`): one process decides and relays, another keeps a read model
of the topic. Their resident memory is noted all the while; the promise is that from the first tenth on it stays within
10 %. The keys are few, so that what a database holds per key does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import psutil

from benchmarks import byhand, pipeline
from benchmarks.harness import Setting
from benchmarks.relaying import send_grouped
from bus.cloudevents import to_record
from tests.servers import MissingServer, both

GROWTH_MAX = 0.10
CHUNK = 10_000
AHEAD_MAX = 20_000
"""So many commands may wait in the topic."""


@dataclass(frozen=True, slots=True)
class Sample:
    done: int
    mib: dict[str, float]


async def measured(setting: Setting, messages: int) -> tuple[list[Sample], float]:
    samples: list[Sample] = []
    async with pipeline.foldbus(setting) as running, byhand.producing(setting.kafka) as producer:
        here = running.here
        names = dict(zip(("desk", "board"), running.processes, strict=True))
        watched = {name: psutil.Process(process.pid) for name, process in names.items()}
        db = await asyncpg.connect(running.dsn)
        sent = done = 0
        began = time.perf_counter()
        try:
            while done < messages:
                if sent < messages and sent - done <= AHEAD_MAX:
                    records = [
                        to_record(here.command_envelope(f"note-{n % pipeline.KEYS}", n))
                        for n in range(sent, min(messages, sent + CHUNK))
                    ]
                    await send_grouped(producer, records, here.desk.partitions)
                    sent += len(records)
                else:
                    await asyncio.sleep(0.1)
                done = int(await db.fetchval(running.shown))
                if not samples or done >= samples[-1].done + messages // 50 or done >= messages:
                    mib = {name: process.memory_info().rss / 2**20 for name, process in watched.items()}
                    samples.append(Sample(done, mib))
        finally:
            await db.close()
        seconds = time.perf_counter() - began
        await running.stop()
    return samples, seconds


def growth(samples: Sequence[Sample], messages: int) -> dict[str, float]:
    """Of each process: the most from the first tenth on, above what it had there."""
    later = [sample for sample in samples if sample.done >= messages / 10]
    return {name: max(sample.mib[name] for sample in later) / later[0].mib[name] - 1 for name in later[0].mib}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bus_memory", description=(__doc__ or "").partition("\n\n")[2]
    )
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    try:
        with both() as (kafka, postgres), tempfile.TemporaryDirectory(prefix="foldbus-memory-") as directory:
            setting = Setting(kafka.bootstrap, postgres.dsn, Path(directory))
            samples, seconds = asyncio.run(measured(setting, chosen.messages))
    except MissingServer as missing:
        print(missing, file=sys.stderr)
        return 1
    grown = growth(samples, chosen.messages)
    if chosen.json:
        print(json.dumps({"growth": grown, "samples": [(sample.done, sample.mib) for sample in samples]}))
    else:
        rate = chosen.messages / seconds
        print(f"{chosen.messages} messages in {seconds:.0f} s ({rate:.0f}/s), load {os.getloadavg()[0]:.2f}")
        for sample in samples:
            print(f"  {sample.done:>9}  " + "  ".join(f"{name} {mib:.1f} MiB" for name, mib in sample.mib.items()))
        for name, share in grown.items():
            print(f"  {name}: {share:+.1%} from the first tenth on")
    return 0 if max(grown.values()) <= GROWTH_MAX else 1


if __name__ == "__main__":
    sys.exit(main())
