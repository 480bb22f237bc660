"""python -m benchmarks.memory --store sqlite:DIRECTORY | postgresql://… [--events 1000000 ...]

How much memory a process needs to read a log, and to rebuild an aggregate, of so many events: all in one stream,
written a thousand to a unit. For each number, in rising order, prints a JSON line: the process's highest resident size
after the log was read, decoded, and after the aggregate was loaded to decide one command, in MiB. It counts from the
process's start, so a second line that says the same as the first shows that size does not matter. Makes the schema of
a service called `memory`, which must not be there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import resource
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from bus.envelope import Origin, StreamId
from eventstore.port import Append, Unit, Verdict
from foldbus import Command, Connection, Decider, Event, Key, Service

_AT_ONCE = 1_000
_PAGE = 1_000


class Metered(Event, type="memory.metered.v1", public=False):
    meter_id: Key[str]
    reading: int
    note: str


class Read(Event, type="memory.read.v1", public=False):
    meter_id: Key[str]
    readings: int
    total: int


class ReadMeter(Command[Read], type="memory.read-meter.v1"):
    meter_id: Key[str]


class Meter(BaseModel, frozen=True):
    readings: int = 0
    total: int = 0


def evolve(meter: Meter, event: Metered | Read) -> Meter:
    if isinstance(event, Read):
        return meter
    return Meter.model_construct(readings=meter.readings + 1, total=meter.total + event.reading)


def decide(meter: Meter, command: ReadMeter) -> list[Read]:
    return [Read(meter_id=command.meter_id, readings=meter.readings, total=meter.total)]


METER = "m-1"
meters = Decider("meter", initial=Meter(), evolve=evolve, decide=decide, snapshots=None)
app = Service("memory", deciders=[meters])


@dataclass(frozen=True)
class Grown:
    """MiB are the process's highest until then; seconds are for orientation."""

    store: str
    events: int
    begun_mib: float
    log_mib: float
    aggregate_mib: float
    write_s: float
    log_s: float
    aggregate_s: float


async def measure(store: str, sizes: list[int]) -> AsyncIterator[Grown]:
    name, version, readings = store.partition(":")[0], 0, 0
    for events in sorted(sizes):
        async with _connected(store) as connection:  # anew: the last one has the state at hand
            begun, started = peak_mib(), time.perf_counter()
            await _write(connection, version, events - readings)
            version, readings = version + events - readings, events
            written = time.perf_counter()
            seen = await _read_log(connection)
            log, read = peak_mib(), time.perf_counter()
            assert seen == version, f"the log gave {seen} events, wanted {version}"
            # Through the runtime, as a command finds it: the state is loaded, decided on and committed.
            answer = await connection.execute(ReadMeter(meter_id=METER))
            version += 1
            assert answer.readings == events, f"the aggregate has {answer.readings} readings, wanted {events}"
            aggregate, rebuilt = peak_mib(), time.perf_counter()
            yield Grown(name, events, begun, log, aggregate, written - started, read - written, rebuilt - read)


@asynccontextmanager
async def _connected(store: str) -> AsyncIterator[Connection]:
    with tempfile.TemporaryDirectory(prefix="foldbus-memory-") as bus:
        async with app.connect(store=store, bus=f"embedded:{bus}", migrate=True) as connection:
            yield connection


async def _write(connection: Connection, version: int, events: int) -> None:
    codec, stream = app.codec, StreamId(meters.category, METER)
    for first in range(0, events, _AT_ONCE):
        made = tuple(
            codec.encode(
                Metered(meter_id=METER, reading=n % 7, note="n" * 120),
                Origin(app.name, connection.ids.new(), connection.clock.now(), connection.ids.new()),
            )
            for n in range(first, min(first + _AT_ONCE, events))
        )
        (outcome,) = await connection.store.commit([Unit(appends=(Append(stream, version + first, made),))])
        assert outcome.verdict is Verdict.COMMITTED


async def _read_log(connection: Connection) -> int:
    after = seen = 0
    while True:
        page = await connection.store.read_all(after=after, limit=_PAGE)
        seen += len([app.codec.decode(record) for record in page.records])
        if page.upto >= page.head:
            return seen
        after = page.upto


def peak_mib() -> float:
    """The most that this program ever held. (`getrusage` also counts what the process was before it became this.)"""
    status = Path("/proc/self/status")
    if status.exists():
        (held,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        return round(int(held) / 2**10, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


async def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--store", required=True)
    parser.add_argument("--events", type=int, nargs="+", default=[50_000, 1_000_000])
    chosen = parser.parse_args()
    async for grown in measure(chosen.store, chosen.events):
        print(json.dumps(grown.__dict__), flush=True)


if __name__ == "__main__":
    asyncio.run(_main())
