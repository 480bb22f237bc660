"""Batches that unpack to what no memory holds, header names that are no text: dead letters, not a dead worker.

The batches are made byte by byte (`raw_batches.py`), and a real broker takes them.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import random
import sys
from datetime import UTC, datetime
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.codec import gzip_encode
from aiokafka.consumer.fetcher import Fetcher
from aiokafka.record.memory_records import MemoryRecords

from bus.cloudevents import from_record
from bus.errors import BusError, Undecodable
from bus.kafka import KafkaTransport
from bus.kafka.sizes import CODECS, GZIP, LZ4, SNAPPY, ZSTD, Unreadable, unpacked_size
from bus.kafka.unpacking import UNPACKED_BYTES_MAX, Unpacking
from bus.metrics import MemoryMetrics
from bus.records import RecordReader, TopicRule
from bus.transport import Assignment, Delivery, PollSettings
from tests.bus.raw_batches import ENCODE, batch, bomb, produce, record
from tests.bus.transports import ROOT, Recorder, new_topic, take, unique

MIB = 1024 * 1024
PART = TopicPartition("orders.commands", 3)


def contents() -> list[bytes]:
    rng = random.Random(7)
    words = [rng.randbytes(9) for _ in range(50)]
    return [
        b"x",
        bytes(5 * MIB),
        rng.randbytes(70_000),
        rng.randbytes(300_000),
        b"".join(rng.choice(words) for _ in range(60_000)),
        b'{"till": "till 1", "n": 17, "note": "as ever"}' * 20_000,
    ]


@pytest.mark.parametrize("codec", CODECS, ids=CODECS.get)
def test_what_fits_is_never_refused_and_what_does_not_never_passes(codec: int) -> None:
    for data in contents():
        packed = bytes(ENCODE[codec](data))
        block = 64 * 1024 if codec == LZ4 else 0  # of the last block lz4 says only how large it may be
        assert len(data) <= unpacked_size(codec, packed, enough=len(data) + block) <= len(data) + block
        assert unpacked_size(codec, packed, enough=len(data) - 1) >= len(data)
        assert unpacked_size(codec, packed, enough=40 * MIB) >= len(data)


def test_gzip_of_several_members_is_counted_to_the_last_one() -> None:
    packed = gzip_encode(b"a" * 40_000) + gzip_encode(bytes(random.Random(1).randbytes(40_000)))
    assert unpacked_size(GZIP, packed, enough=100_000) == 80_000


@pytest.mark.parametrize("codec", CODECS, ids=CODECS.get)
def test_what_is_no_frame_is_told_as_such_whatever_it_is(codec: int) -> None:
    """Also what begins as one: each good one is cut, and changed byte by byte."""
    rng = random.Random(codec)
    good = bytes(ENCODE[codec](b"".join(rng.randbytes(30) * 3 for _ in range(2_000))))
    told = 0
    for n in range(400):
        damaged = bytearray(good[: rng.randrange(len(good))] if n % 2 else good)
        for _ in range(n % 5):
            if damaged:
                damaged[rng.randrange(min(len(damaged), 40))] = rng.randrange(256)
        try:
            unpacked_size(codec, bytes(damaged), enough=150_000)
        except Unreadable:
            told += 1
    assert told > 20
    with pytest.raises(Unreadable, match="compression codec 7 is unknown"):
        unpacked_size(7, good, enough=1)


SIZES = {GZIP: 500_000_000, ZSTD: 500_000_000, LZ4: 120_000_000}
"""As much as 500 KB can stand for; snappy's best is twenty times its size."""


@pytest.mark.parametrize("codec", SIZES, ids=CODECS.get)
def test_a_bomb_is_told_from_its_frames(codec: int) -> None:
    made = bomb(codec, SIZES[codec])
    assert len(made) < 500_000
    assert unpacked_size(codec, made[61:], enough=UNPACKED_BYTES_MAX) > UNPACKED_BYTES_MAX


# --- what takes their place ------------------------------------------------------------------------------------------


def looked(fetched: bytes, *, bytes_max: int = MIB, **options: Any) -> tuple[bytes, Unpacking, MemoryMetrics]:
    metrics = MemoryMetrics()
    unpacking = Unpacking(bytes_max=bytes_max, metrics=metrics)
    unpacking.closely |= options.get("closely", set())
    ((_, seen),) = unpacking.look([(PART, fetched)])
    return seen, unpacking, metrics


def at(offset: int, made: bytes) -> bytes:
    """As the broker keeps it."""
    return offset.to_bytes(8, "big") + made[8:]


def records_of(fetched: bytes) -> list[Any]:
    found: list[Any] = []
    records = MemoryRecords(fetched)
    while records.has_next():
        one: Any = records.next_batch()
        assert one.validate_crc()
        found += list(one)
    return found


def test_what_is_as_it_should_be_passes_as_the_same_object() -> None:
    body = record(0, b"k", b"v" * 1000) + record(1, b"k", None, [(b"a", b"b")])
    fetched = b"".join(at(n * 2, batch(body, 2, codec=codec)) for n, codec in enumerate((0, GZIP, SNAPPY, LZ4, ZSTD)))
    for cut in (fetched, fetched[:-20], b"", fetched[:30]):
        seen, unpacking, metrics = looked(cut)
        assert seen is cut
        assert not unpacking.marked
        assert not metrics.counters


@pytest.mark.parametrize("codec", SIZES, ids=CODECS.get)
def test_a_bomb_is_replaced_at_its_last_offset_and_its_neighbours_stay(codec: int) -> None:
    """At the last one: who begins to read in the middle of the batch must not pass it unawares."""
    good = [at(40, batch(record(0, b"a", b"1"), 1)), at(47, batch(record(0, b"a", b"2"), 1, codec=LZ4))]
    body = record(0, b"k", b"v") + record(1, b"k", bytes(40 * MIB)) + record(2, b"k", b"v")
    bad = at(41, batch(body, 6, codec=codec))
    seen, unpacking, metrics = looked(good[0] + bad + good[1], bytes_max=32 * MIB)
    first, flawed, last = records_of(seen)
    assert (first.offset, first.value) == (40, b"1")
    assert (last.offset, last.value) == (47, b"2")
    assert (flawed.offset, flawed.key, flawed.value) == (46, None, bad)
    ((name, text),) = flawed.headers
    assert name == unpacking.mark
    assert text.decode() == (
        f"a batch of 6 records at offsets 41 to 46 ({CODECS[codec]}, {len(bad) - 61} bytes) unpacks to more than "
        "33554432 bytes; wanted at most that (decompressed_bytes_max); nothing of it was unpacked"
    )
    assert metrics.total("foldbus_unpacking_refused_total", topic=PART.topic) == 1


def test_a_batch_that_nobody_can_unpack_is_replaced_as_well() -> None:
    """Its checksum is right: so it was written."""
    seen, unpacking, _ = looked(at(5, batch(b"no zstd", 1, codec=ZSTD, packed=True)))
    (flawed,) = records_of(seen)
    assert flawed.headers[0][0] == unpacking.mark
    assert b"cannot be unpacked safely: zstd frame begins with" in flawed.headers[0][1]


def test_a_damaged_bomb_is_left_to_stand() -> None:
    """A wrong checksum is the broker's disk: nothing of it is given up."""
    made = bytearray(at(5, bomb(ZSTD, 40 * MIB)))
    made[-1] ^= 1
    seen, unpacking, metrics = looked(bytes(made))
    assert seen == bytes(made)
    assert not unpacking.marked
    assert not metrics.counters


def test_what_belongs_to_a_transaction_still_does() -> None:
    """Or the records of one that was aborted would come out."""
    seen, _, _ = looked(at(5, batch(bytes(1), 1, codec=ZSTD, packed=True, flags=0x10)))
    records = MemoryRecords(seen)
    one: Any = records.next_batch()
    assert one.is_transactional
    assert one.base_offset == 5


def test_aiokafka_still_fetches_where_it_is_looked_at() -> None:
    """`Unpacking.watch` stands between the consumer's client and its fetcher."""
    assert "self._client = AIOKafkaClient(" in inspect.getsource(AIOKafkaConsumer)
    fetching = inspect.getsource(Fetcher)
    for piece in ("await self._client.send(node_id, request)", "in response.topics:", "MemoryRecords(part_data[-1])"):
        assert piece in fetching


def test_nobody_outside_can_mark_a_record() -> None:
    first, second = looked(b"")[1], looked(b"")[1]
    assert first.mark != second.mark
    assert len(first.mark) > 16


def test_large_records_come_a_little_at_a_time_and_small_ones_do_not_wait() -> None:
    heavy = at(0, batch(b"".join(record(n, b"k", bytes(MIB // 4)) for n in range(3)), 3, codec=LZ4))
    light = at(0, batch(b"".join(record(n, b"k", bytes(500)) for n in range(3000)), 3000, codec=LZ4))
    metrics = MemoryMetrics()
    unpacking = Unpacking(bytes_max=2 * MIB, metrics=metrics)
    parts = [TopicPartition("t", n) for n in range(4)]
    seen = unpacking.look(
        [(parts[0], heavy * 10), (parts[1], heavy), (parts[2], light * 3), (parts[3], at(0, batch(bytes(1), 1)))]
    )
    assert [len(records) for _, records in seen] == [2 * len(heavy), 0, 3 * len(light), 62]
    # The first one comes whatever it takes, or nobody would ever get past it.
    one = at(0, batch(record(0, b"k", bytes(5 * MIB)), 1))
    assert unpacking.look([(parts[0], one * 2)]) == [(parts[0], one)]


def test_a_header_name_that_is_no_text_is_written_so_that_it_can_be_read() -> None:
    body = (
        record(0, b"a", b"1", [(b"fine", b"\xff")])
        + record(1, b"b", b"2", [(b"first", b"x"), (b"na\xff\xfeme", None)])
        + record(2, None, None)
    )
    for codec in (0, GZIP, SNAPPY, LZ4, ZSTD):
        made = at(10, batch(body, 3, codec=codec))
        assert looked(made)[0] is made  # not before somebody has come upon it: looking at every name would cost
        seen, unpacking, metrics = looked(made, closely={PART})
        first, second, third = records_of(seen)
        assert (first.offset, first.key, first.value, first.headers) == (10, b"a", b"1", [("fine", b"\xff")])
        assert (second.offset, second.key, second.value) == (11, b"b", b"2")
        assert second.headers == [
            (unpacking.mark, b"header name b'na\\xff\\xfeme' is no text; wanted UTF-8"),
            ("first", b"x"),
            ("na\\xff\\xfeme", None),
        ]
        assert (third.offset, third.key, third.value, third.headers) == (12, None, None, [])
        assert metrics.total("foldbus_unreadable_header_names_total", topic=PART.topic) == 1


# --- on a real broker ------------------------------------------------------------------------------------------------


async def read_apart(bootstrap: str, topic: str, **extra: str) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.bus.reading", bootstrap, topic, json.dumps(extra),
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},
    )  # fmt: skip
    said, complained = await process.communicate()
    assert process.returncode == 0, complained.decode()[-3000:]
    found: dict[str, Any] = json.loads(said)
    return found


@pytest.mark.parametrize("codec", SIZES, ids=CODECS.get)
async def test_a_bomb_between_good_records_costs_no_memory_and_nobody_waits(kafka: str, codec: int) -> None:
    """The issue's: 500 KB that unpack to 500 MB. What the reading process ever had tells."""
    async with KafkaTransport.open(kafka) as transport:
        topic = await new_topic(transport, partitions=2)
    good = batch(record(0, b"k", b"good"), 1, codec=codec)
    await produce(kafka, {(topic, 0): [good, bomb(codec, SIZES[codec]), good], (topic, 1): [good]})
    seen = await read_apart(kafka, topic)
    assert sorted((part, offset, flaw[:38]) for part, offset, _, flaw in seen["found"]) == [
        (0, 0, ""),
        (0, 1, "a batch of 1 records at offsets 1 to 1"),
        (0, 2, ""),
        (1, 0, ""),
    ]
    assert seen["most_kb"] - seen["before_kb"] < 30_000, seen


async def test_many_small_bombs_at_once_are_bounded_together(kafka: str) -> None:
    """Each is within the bound: 28 records of a megabyte in a few kilobytes, hundreds of them in what is fetched at
    once. A thousand records of them would be a gigabyte."""
    async with KafkaTransport.open(kafka) as transport:
        topic = await new_topic(transport, partitions=4)
    made = batch(b"".join(record(n, b"k", bytes(MIB)) for n in range(28)), 28, codec=ZSTD)
    assert len(made) < 10_000
    await produce(kafka, {(topic, part): [made] * 15 for part in range(4)})
    seen = await read_apart(kafka, topic)
    assert sorted((part, offset) for part, offset, *_ in seen["found"]) == [
        (part, offset) for part in range(4) for offset in range(15 * 28)
    ]
    assert seen["most_kb"] - seen["before_kb"] < 250_000, (seen["before_kb"], seen["most_kb"])


async def test_a_group_that_stands_in_the_middle_of_a_refused_batch_is_told_of_it(kafka: str) -> None:
    async with KafkaTransport.open(
        kafka, settings=PollSettings(extra={"decompressed_bytes_max": str(MIB)})
    ) as transport:
        topic = await new_topic(transport, partitions=1)
        body = record(0, b"k", b"1") + record(1, b"k", b"2") + record(2, b"k", bytes(2 * MIB))
        await produce(kafka, {(topic, 0): [batch(body, 3, codec=LZ4), batch(record(0, b"k", b"4"), 1)]})
        async with transport.tail(topic, start={0: 1}) as consumer:
            flawed, good = await take(consumer, 2)
    assert (flawed.offset, flawed.headers) == (2, ())
    assert "records at offsets 0 to 2" in flawed.flaw
    assert (good.offset, good.value, good.flaw) == (3, b"4", "")
    with pytest.raises(Undecodable, match=r"\[0\] offset 2: a batch of 3 records .* nothing of it was unpacked"):
        from_record(flawed)


async def test_a_header_name_that_is_no_text_holds_up_nobody(kafka: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """aiokafka gives its whole partition up, and what it had taken out of others in that call: here out of partition 0,
    which comes first."""
    monkeypatch.setattr("aiokafka.consumer.fetcher.random.shuffle", list.sort)
    metrics = MemoryMetrics()
    async with KafkaTransport.open(kafka, metrics=metrics) as transport:
        topic = await new_topic(transport, partitions=2)
        bad = record(0, b"k", b"1") + record(1, b"k", b"2", [(b"\xff", b"x")]) + record(2, b"k", b"3")
        good = batch(record(0, b"k", b"0"), 1)
        await produce(
            kafka, {(topic, 1): [good, batch(bad, 3, codec=LZ4), batch(bad, 3), good], (topic, 0): [good] * 9}
        )
        async with transport.consume(unique("group"), [topic], listener=Recorder()) as consumer:
            found = await take(consumer, 17)
    assert [(one.offset, one.value, bool(one.flaw)) for one in found if one.partition == 1] == [
        (0, b"0", False), (1, b"1", False), (2, b"2", True), (3, b"3", False),
        (4, b"1", False), (5, b"2", True), (6, b"3", False), (7, b"0", False),
    ]  # fmt: skip
    assert [one.offset for one in found if one.partition == 0] == list(range(9))
    (first, _) = [one for one in found if one.flaw]
    assert first.headers == (("\\xff", b"x"),)
    assert first.flaw == "header name b'\\xff' is no text; wanted UTF-8"
    assert metrics.total("foldbus_unreadable_partitions_total", topic=topic) == 0


async def test_such_names_in_several_partitions_at_once_hold_up_nobody(kafka: str) -> None:
    """They come in one fetch: going back for one of them must not undo what was done about the others."""
    metrics = MemoryMetrics()
    async with KafkaTransport.open(kafka, metrics=metrics) as transport:
        topic = await new_topic(transport, partitions=4)
        good, bad = batch(record(0, b"k", b"0"), 1), batch(record(0, b"k", b"1", [(b"\xff", b"x")]), 1)
        await produce(kafka, {(topic, part): [bad, good, bad, bad, good] for part in range(4)})
        async with transport.consume(unique("group"), [topic], listener=Recorder()) as consumer:
            found = await take(consumer, 20)
    for part in range(4):
        mine = [(one.offset, bool(one.flaw)) for one in found if one.partition == part]
        assert mine == [(0, True), (1, False), (2, True), (3, True), (4, False)]
    assert metrics.total("foldbus_unreadable_partitions_total", topic=topic) == 0


async def test_the_bound_is_a_setting_and_nonsense_is_refused(kafka: str) -> None:
    async with KafkaTransport.open(kafka) as transport:
        topic = await new_topic(transport, partitions=1)
    await produce(kafka, {(topic, 0): [batch(record(0, b"k", bytes(3 * MIB)), 1, codec=ZSTD)]})
    for bound, flawed in ((str(2 * MIB), True), (str(4 * MIB), False)):
        settings = PollSettings(extra={"decompressed_bytes_max": bound})
        async with KafkaTransport.open(kafka, settings=settings) as transport:
            async with transport.tail(topic, start="begin") as consumer:
                (one,) = await take(consumer, 1)
        assert bool(one.flaw) is flawed
    for nonsense in ("0", "-1", "many", "9" * 40, "1e9", "٤٠٠٠٠٠٠"):
        with pytest.raises(BusError, match=r"decompressed_bytes_max is .*; wanted a number from 1048576 on"):
            async with KafkaTransport.open(kafka, settings=PollSettings(extra={"decompressed_bytes_max": nonsense})):
                pass


@pytest.mark.parametrize("value", [b"{}", None, bytes(5000)], ids=["small", "none", "large"])
def test_a_flaw_is_what_the_dead_letter_says(value: bytes | None) -> None:
    """Also of what would be a delete, or too large, by itself."""
    found = Delivery(Assignment("t", 0), 7, b"k", value, (), datetime.now(UTC), "half of it is missing")
    for read in (from_record, RecordReader(1000, {"t": TopicRule(compact=True)})):
        with pytest.raises(Undecodable, match=r"^t\[0\] offset 7: half of it is missing$"):
            read(found)
