"""python -m benchmarks [--quick] [--json] [--only NAME ...]

Starts a Kafka and a PostgreSQL of its own (or takes FOLDBUS_TEST_KAFKA and FOLDBUS_TEST_POSTGRES), runs the benchmarks
and prints a line per variant: median [min–max] of the rounds, × the ratio to the case's floor [min–max by round].
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from benchmarks import (
    appends,
    arrays,
    at_most_once,
    durable,
    failing,
    latency,
    pipeline,
    purchases,
    relaying,
    snapshots,
    store,
)
from benchmarks.harness import Row, Setting, table
from foldbus.process import tune
from tests.servers import MissingServer, both

BENCHMARKS: Mapping[str, Callable[[Setting], Coroutine[Any, Any, list[Row]]]] = {
    "appends": appends.run,
    "arrays": arrays.run,
    "durable": durable.run,
    "at-most-once": at_most_once.run,
    "relay": relaying.run,
    "pipeline": pipeline.run,
    "wakeups": pipeline.run_slowly,
    "purchases": purchases.run,
    "latency": latency.run,
    "failing": failing.run,
    "store": store.run,
    "snapshots": snapshots.run,
}

LONG = frozenset({"wakeups"})
"""Only when they are asked for."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--quick", action="store_true", help="a fraction of a second each; figures mean nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object per row instead of the tables")
    parser.add_argument("--only", action="append", choices=list(BENCHMARKS), help="this one; may be repeated")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    tune()  # as `foldbus run` does; who stands beside it in this process has it, too
    logging.basicConfig(level=logging.ERROR)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # says much about topics that were made a moment ago
    try:
        with both() as (kafka, postgres), tempfile.TemporaryDirectory(prefix="foldbus-bench-") as directory:
            setting = Setting(
                kafka.bootstrap,
                postgres.dsn,
                Path(directory),
                rounds=1 if chosen.quick else chosen.rounds,
                quick=chosen.quick,
            )
            _say(
                chosen.json,
                f"Python {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}",
            )
            for name in chosen.only or [name for name in BENCHMARKS if name not in LONG]:
                began = time.perf_counter()
                rows = asyncio.run(BENCHMARKS[name](setting))
                if chosen.json:
                    for row in rows:
                        print(json.dumps(row.as_json(), ensure_ascii=False), flush=True)
                else:
                    print(table(rows), flush=True)
                _say(chosen.json, f"  ({name}: {time.perf_counter() - began:.0f} s, load {os.getloadavg()[0]:.2f})")
    except MissingServer as missing:
        print(missing, file=sys.stderr)
        return 1
    return 0


def _say(as_json: bool, text: str) -> None:
    print(text, file=sys.stderr if as_json else sys.stdout, flush=True)


if __name__ == "__main__":
    sys.exit(main())
