"""What means harm, or is only strange: dead letters for the one, and the other handled, with bounded memory.

Most of it stands in `test_bad_input.py`, whose story this takes on. Here is what needs a broker of the real kind (the
embedded bus has no batches to pack, and its header names are text), and what looks wrong and is not.
"""

# Without `from __future__ import annotations`: the services are made per test, of classes that only exist in there.
import asyncio
import os
import signal
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from bus.kafka.sizes import GZIP, ZSTD
from bus.metrics import MemoryMetrics
from bus.transport import Ack, TopicSpec
from foldbus import Service
from tests.bus.raw_batches import batch, bomb, produce, record
from tests.stories.pairs import Pair, eventually, unique
from tests.stories.test_bad_input import (
    KEYS,
    PARTITIONS,
    Bad,
    Strangers,
    a_world,
    all_letters,
    changed,
    check_letters,
    clock,
    copies,
    folded,
    record_of,
)

ROOT = Path(__file__).parents[2]
HUGE = 20_000_000


@pytest.mark.timeout(240)
async def test_what_only_looks_wrong_is_handled_and_the_same_on_every_store(pair: Pair) -> None:
    """Clocks an hour off, a NUL in a text that the database's own text type refuses, a name twice in one JSON object
    (the last one counts), a position that nobody has reached."""
    world = a_world()
    async with pair.transport() as outside, pair.connect(world.till) as till, pair.connect(world.office) as office:
        good = record_of(world.till, world.sell(till=KEYS[0], n=0), world.commands)
        hour = timedelta(hours=1)
        strange = [
            changed(good, ce_time=(clock.now() - hour).isoformat().encode()),
            changed(good, ce_time=(clock.now() + hour).isoformat().encode()),
            changed(good, ce_time=b"0001-01-01T00:00:00+00:00"),
            replace(good, value=b'{"till": "%s", "n": 0, "note": "a\\u0000b"}' % KEYS[0].encode()),
            replace(good, value=b'{"till": "x", "n": "many", "till": "%s", "n": 0}' % KEYS[0].encode()),
            replace(good, key=b"k" * 500_000),  # the message's key is its subject
            replace(good, headers=(*good.headers, ("x" * 100, b"\xc3\xa9"), ("x", b""), ("x", b"again"))),
        ]
        for n, one in enumerate(strange, start=1):
            value = (one.value or b"").replace(b'"n": 0', b'"n": %d' % n).replace(b'"n":0', b'"n":%d' % n)
            sent = changed(replace(one, value=value), ce_id=str(till.ids.new()).encode())
            (ack,) = await outside.publish([replace(sent, partition=0)])
            assert isinstance(ack, Ack), ack
        expected = list(range(1, len(strange) + 1))
        seen = await eventually(lambda: folded(till), lambda found: len(found[KEYS[0]]) >= len(expected))
        assert seen[KEYS[0]] == expected
        view = office.view(world.takings)
        row = await eventually(lambda: view.get(KEYS[0]), lambda row: row is not None and len(row.ns) >= len(expected))
        assert row is not None
        assert sorted(row.ns) == expected
        assert await all_letters(till.store) == []
        assert await all_letters(office.store) == []


@pytest.mark.timeout(240)
async def test_twenty_megabytes_where_one_is_the_limit_are_a_dead_letter_with_all_of_them(pair: Pair) -> None:
    world = a_world()
    async with pair.transport() as outside:
        await outside.admin.create([TopicSpec(world.commands, PARTITIONS, max_bytes=HUGE + 1_000_000)])
        async with pair.connect(world.till) as till:
            good = record_of(world.till, world.sell(till=KEYS[0], n=-1), world.commands)
            assert good.value is not None
            value = good.value[:-1] + b', "note": "' + b"x" * HUGE + b'"}'
            strangers = Strangers(
                outside, [Bad(replace(good, value=value), ("a record of 2000", "wanted at most 1000000"))]
            )
            await till.request(world.sell(till=KEYS[0], n=1), timeout_s=60)
            await strangers.one()
            await till.request(world.sell(till=KEYS[0], n=2), timeout_s=60)
            letters = await eventually(lambda: all_letters(till.store), lambda found: len(found) == 1)
            check_letters(letters, world.till.name, strangers.places)
            (copy,) = await copies(outside, f"{world.till.name}.dlq", 1)
            assert copy.value is not None
            assert 900_000 < len(copy.value) < 1_100_000


@pytest.mark.timeout(240)
async def test_bombs_and_names_that_are_no_text_become_dead_letters_on_every_consumer(
    kafka: str, database: str
) -> None:
    """Of a command topic (a handler), and of an event topic (a saga and a projection)."""
    world = a_world()
    pair = Pair("servers", database, f"kafka://{kafka}")
    metrics = MemoryMetrics()
    async with (
        pair.connect(world.till, metrics=metrics) as till,
        pair.connect(world.office, metrics=metrics) as office,
    ):
        await till.request(world.sell(till=KEYS[0], n=1), timeout_s=60)
        packed, small = bomb(GZIP, 500_000_000), bomb(ZSTD, 100_000_000)
        named = batch(record(0, b"k", b"{}", [(b"\xff\xfe", b"x")]), 1)
        sent = {
            (topic, part): [packed, named, small]
            for topic in (world.commands, world.events)
            for part in range(PARTITIONS)
        }
        at = await produce(kafka, sent)
        for n, key in enumerate(KEYS):
            await till.request(world.sell(till=key, n=2 + n), timeout_s=60)
        view = office.view(world.takings)
        for n, key in enumerate(KEYS):
            row = await eventually(lambda key=key: view.get(key), lambda row, n=n: row is not None and 2 + n in row.ns)  # type: ignore[misc]
            assert row is not None
        events = {"saga.book-sale": world.events, "projection.takings": world.events}
        consumers = {world.till.name: (till, world.commands)}
        consumers |= {f"{world.office.name}.{name}": (office, topic) for name, topic in events.items()}
        for consumer, (connection, topic) in consumers.items():
            letters = await eventually(
                lambda c=connection: all_letters(c.store),  # type: ignore[misc]
                lambda found, consumer=consumer: sum(one.consumer == consumer for one in found) >= 3 * PARTITIONS,  # type: ignore[misc]
            )
            mine = {(one.partition, one.offset): one for one in letters if one.consumer == consumer}
            assert mine.keys() == {(part, offset) for part in range(PARTITIONS) for offset in at[topic, part]}
            for part in range(PARTITIONS):
                first, second, third = (mine[part, offset] for offset in at[topic, part])
                assert "(gzip, " in first.failure.message
                assert "unpacks to more than 33554432 bytes" in first.failure.message
                assert (first.value or b"")[8:12] == packed[8:12]  # the batch as it came
                assert (first.value or b"")[61:] == packed[61:]
                assert (second.value, second.headers) == (b"{}", (("\\xff\\xfe", b"x"),))
                assert "header name b'\\xff\\xfe' is no text; wanted UTF-8" in second.failure.message
                assert "(zstd, " in third.failure.message


@pytest.mark.timeout(240)
async def test_records_whose_own_time_is_an_hour_off_are_handled(kafka: str, database: str) -> None:
    """Not the message's time but the record's, which a producer sets. (More than an hour ahead the broker refuses.)"""
    world = a_world()
    pair = Pair("servers", database, f"kafka://{kafka}")
    async with pair.connect(world.till) as till:
        sent: list[bytes] = []
        for n, minutes in enumerate((-60, 59, -60 * 24 * 365), start=1):
            one = record_of(world.till, world.sell(till=KEYS[0], n=n), world.commands)
            one = changed(one, ce_time=None)  # then the record's time is the message's
            at = clock.now() + timedelta(minutes=minutes)
            headers = [(name.encode(), value) for name, value in one.headers]
            sent.append(batch(record(0, one.key, one.value, headers), 1, time_ms=int(at.timestamp() * 1000)))
        await produce(kafka, {(world.commands, 0): sent})
        await eventually(lambda: folded(till), lambda found: found[KEYS[0]] == [1, 2, 3])
        assert await all_letters(till.store) == []


SERVICE = """
from foldbus import Command, Decider, Event, Key, Service
from pydantic import BaseModel


class Done(Event, type="NAME.done.v1"):
    job: Key[str]
    n: int


class Do(Command[Done], type="NAME.do.v1"):
    job: Key[str]
    n: int


class Job(BaseModel, frozen=True):
    n: int = 0


def evolve(job: Job, done: Done) -> Job:
    return Job(n=done.n)


def decide(job: Job, do: Do) -> list[Done]:
    return [Done(job=do.job, n=do.n)]


app = Service("NAME", partitions=3, deciders=[Decider("job", initial=Job(), evolve=evolve, decide=decide)])
"""


def most_kb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


@pytest.mark.timeout(240)
async def test_a_worker_that_is_sent_gigabytes_in_bombs_never_has_more_memory_than_before(
    kafka: str, database: str, tmp_path: Path
) -> None:
    """The most that the process ever had, as the kernel tells it."""
    name = unique("jobs")
    (tmp_path / "jobs_service.py").write_text(SERVICE.replace("NAME", name))
    here: dict[str, Any] = {}
    exec(SERVICE.replace("NAME", name), here)
    service: Service = here["app"]
    pair = Pair("servers", database, f"kafka://{kafka}")
    async with pair.connect(service, worker=False) as client:
        with (tmp_path / "said").open("wb") as said:
            worker = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "foldbus", "run", "jobs_service:app", "--quiet"),
                *("--store", database, "--bus", f"kafka://{kafka}"),
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
                stderr=said,
            )
        try:
            for n in range(200):
                await client.request(here["Do"](job=f"job {n % 20}", n=n), timeout_s=60)
            before = most_kb(worker.pid)
            bombs = [bomb(GZIP, 500_000_000), bomb(ZSTD, 500_000_000)]
            await produce(kafka, {(f"{name}.commands", part): bombs for part in range(3)})
            for n in range(200):
                await client.request(here["Do"](job=f"job {n % 20}", n=n), timeout_s=60)
            letters = await eventually(lambda: all_letters(client.store), lambda found: len(found) >= 6)
            assert len(letters) == 6
            assert most_kb(worker.pid) - before < 40_000, (before, most_kb(worker.pid))
        finally:
            if worker.returncode is None:
                worker.send_signal(signal.SIGTERM)
            assert await worker.wait() == 0, (tmp_path / "said").read_text()[-3000:]
