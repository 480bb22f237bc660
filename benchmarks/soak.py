"""python -m benchmarks.soak [--seconds S | --runs N] [--pair embedded|servers] [--purchases N] [--seed N]

The shop's crash demo again and again, on both pairs of backends in turn: workers as processes, killed at moments and of
services that a seed decides, real purchases meanwhile. After each run every figure must equal the plain pass over the
purchases and every invariant of `shop.verify` must hold. One JSON line per run. Ends with 1 at the first difference,
whose line has the seed and the command that runs it again.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import io
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foldbus import FoldbusError
from foldbus.progress import Progress
from shop import demo
from tests.servers import MissingServer, start_kafka, start_postgres
from tests.servers.postgres import new_database

PAIRS = ("embedded", "servers")


@contextmanager
def backends(pair: str, directory: Path) -> Iterator[tuple[str, str]]:
    """Store and bus of one run alone: the demo wants both empty."""
    if pair == "embedded":
        yield f"sqlite:{directory}", f"embedded:{directory}"
    else:
        with start_kafka(own=True) as kafka, start_postgres() as postgres, new_database(postgres.dsn) as database:
            yield database, f"kafka://{kafka.bootstrap}"


def crash_run(pair: str, seed: int, purchases: int) -> dict[str, Any]:
    """One demo under kills, and what came of it."""
    facts: dict[str, Any] = {"pair": pair, "seed": seed, "purchases": purchases}
    with tempfile.TemporaryDirectory(prefix="foldbus-soak-") as name, backends(pair, Path(name)) as (store, bus):
        options = demo.Options(
            limit=purchases, store=store, bus=bus, directory=Path(name), crash=True, seed=seed,
            journal=Path(name) / "journal", verify=True,
        )  # fmt: skip
        try:
            report = asyncio.run(demo.run(options, Progress(stream=io.StringIO())))
        except (FoldbusError, RuntimeError) as error:
            return facts | {"ok": False, "error": f"{type(error).__qualname__}: {error}"}
    facts |= {"ok": report.ok, "kills": report.kills, "seconds": round(report.seconds, 2)}
    if not report.ok:
        facts |= {
            "shop": dataclasses.asdict(report.shop),
            "expected": dataclasses.asdict(report.expected),
            "differing": report.differing[:20],
            "differing_rebuilt": report.differing_rebuilt[:20],
            "findings": report.findings,
        }
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--seconds", type=float, default=60.0, help="no run begins after that")
    parser.add_argument("--runs", type=int, help="so many runs on each pair, however long they take")
    parser.add_argument("--pair", choices=PAIRS, help="on this one only")
    parser.add_argument("--purchases", type=int, default=1000)
    parser.add_argument("--seed", type=int, help="of the first run; the next ones follow from it")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    pairs = (chosen.pair,) if chosen.pair else PAIRS
    seed = random.SystemRandom().randrange(2**32) if chosen.seed is None else chosen.seed
    until = time.monotonic() + chosen.seconds
    done = 0
    try:
        while done < chosen.runs * len(pairs) if chosen.runs else time.monotonic() < until:
            pair = pairs[done % len(pairs)]
            result = crash_run(pair, seed, chosen.purchases)
            if not result["ok"]:
                words = f"--runs 1 --pair {pair} --seed {seed} --purchases {chosen.purchases}"
                result["again"] = f"python -m benchmarks.soak {words}"
            print(json.dumps(result), flush=True)
            if not result["ok"]:
                return 1
            done += 1
            seed = random.Random(seed).randrange(2**32)
    except MissingServer as missing:
        print(missing, file=sys.stderr)
        return 1
    print(json.dumps({"runs": done, "ok": True}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
