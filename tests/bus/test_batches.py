"""Batches as we write and compress them: what any Kafka client reads of them is what was put in."""

from __future__ import annotations

import os
from typing import Any

import pytest
from aiokafka.record.default_records import DefaultRecordBatch
from hypothesis import given
from hypothesis import strategies as st

from bus.kafka.batches import Batch, Writer, written
from bus.packing import PackedHeaders, packed
from bus.transport import Headers, Outgoing

NONE, GZIP, SNAPPY, LZ4, ZSTD = range(5)
MADE_AT = 1_700_000_000_000

names = st.text(st.characters(codec="utf-8"), max_size=80)
pairs = st.lists(st.tuples(names, st.binary(max_size=80)), max_size=20).map(tuple)


def records(*values: bytes) -> list[Outgoing]:
    return [Outgoing("t", b"k%d" % n, value, (("ce_id", b"%d" % n),)) for n, value in enumerate(values)]


def sent(made: Batch, *, sequence: int = 33) -> bytes:
    """As the producer does it."""
    assert made.closed()
    made._set_producer_state(7, 2, sequence)
    return bytes(made._build())


def read(batch: Batch) -> list[tuple[Any, ...]]:
    found = DefaultRecordBatch(sent(batch))
    assert found.validate_crc()
    return [(one.offset, one.timestamp, one.key, one.value, tuple(one.headers)) for one in found]


@pytest.mark.parametrize(("compression", "codec"), [("lz4", LZ4), ("gzip", GZIP), ("snappy", SNAPPY), ("zstd", ZSTD)])
def test_it_is_compressed_and_read_back_to_the_last_header(compression: str, codec: int) -> None:
    values = [b'{"n":%d,"text":"%b"}' % (n, b"x" * 100) for n in range(200)]
    made = written(records(*values), timestamp=MADE_AT, compression=compression)
    assert made.record_count() == 200
    assert made.size() > sum(map(len, values))
    bytes_of = sent(made)
    assert made.size() == len(bytes_of) < sum(map(len, values)) / 4
    found = DefaultRecordBatch(bytes_of)
    assert found.validate_crc()
    assert (found.compression_type, found.producer_id, found.producer_epoch, found.base_sequence) == (codec, 7, 2, 33)
    assert (found.magic, found.base_offset, found.next_offset) == (2, 0, 200)
    assert (found.first_timestamp, found.max_timestamp, found.is_transactional) == (MADE_AT, MADE_AT, False)
    assert [(one.offset, one.timestamp, one.key, one.value, one.headers) for one in found] == [
        (n, MADE_AT, b"k%d" % n, value, [("ce_id", b"%d" % n)]) for n, value in enumerate(values)
    ]


@given(
    st.lists(
        st.tuples(st.none() | st.binary(max_size=70), st.none() | st.binary(max_size=200), pairs, st.booleans()),
        min_size=1,
        max_size=20,
    )
)
def test_any_record_is_read_back_be_its_headers_packed_or_not(made: list[tuple[Any, Any, Headers, bool]]) -> None:
    outgoing = [
        Outgoing("t", key, value, PackedHeaders(packed(headers)) if pack else headers)
        for key, value, headers, pack in made
    ]
    batch = written(outgoing, timestamp=MADE_AT)
    assert read(batch) == [(n, MADE_AT, key, value, headers) for n, (key, value, headers, _) in enumerate(made)]


def test_lengths_of_all_sizes_are_read_back() -> None:
    """A varint takes another byte from 64, 8,192 and 1,048,576 on; numbers of records, too."""
    sizes = (63, 64, 4095, 4096, 8191, 8192, 1_048_575, 1_048_576)
    outgoing = [
        Outgoing("t", b"k" * size, b"v" * size, ((f"{size}" * 10, b"h" * size), ("n" * size, b""))) for size in sizes
    ]
    outgoing += [Outgoing("t", None, b"") for _ in range(10_000)]
    assert read(written(outgoing, timestamp=0)) == [
        (n, 0, one.key, one.value, one.headers) for n, one in enumerate(outgoing)
    ]
    for one in outgoing:
        assert PackedHeaders(packed(one.headers)) == one.headers


@given(pairs)
def test_packed_headers_are_the_sequence_of_their_pairs(headers: Headers) -> None:
    made = PackedHeaders(packed(headers))
    assert (tuple(made), len(made), list(reversed(made))) == (headers, len(headers), list(reversed(headers)))
    assert made == headers
    assert headers == made
    assert made == PackedHeaders(packed(headers))
    assert (hash(made), repr(made)) == (hash(headers), repr(headers))
    assert made[:3] == headers[:3]
    assert made != (*headers, ("x", b""))
    assert made != PackedHeaders(packed((*headers, ("x", b""))))
    assert Outgoing("t", b"k", b"v", made) == Outgoing("t", b"k", b"v", headers)


def test_what_does_not_become_shorter_is_sent_as_it_is() -> None:
    values = [os.urandom(500), os.urandom(500)]
    found = DefaultRecordBatch(sent(written(records(*values), timestamp=MADE_AT, compression="lz4")))
    assert found.validate_crc()
    assert found.compression_type == NONE
    assert [one.value for one in found] == values


def test_a_retry_sends_the_very_same_bytes() -> None:
    made = written(records(b"a" * 1000), timestamp=MADE_AT, compression="lz4")
    assert sent(made) == bytes(made._build())
    assert made.size() == len(made._build())


def test_a_full_batch_takes_no_more_but_the_first_record_always_fits() -> None:
    small, large = records(b"v" * 100)[0], records(b"v" * 5000)[0]
    writer = Writer(MADE_AT, 1000)
    assert writer.add(large) > 5000
    assert writer.add(small) == 0
    assert writer.count == 1
    writer = Writer(MADE_AT, 1000)
    while writer.add(small):
        pass
    batch = writer.batch(None)
    assert len(sent(batch)) == writer.size <= 1000 < writer.size + 120
    assert writer.count == batch.record_count() == len(read(batch)) == 7


@pytest.mark.parametrize(
    "bad",
    [
        Outgoing("t", "text", b"v"),  # type: ignore[arg-type]
        Outgoing("t", b"k", 5),  # type: ignore[arg-type]
        Outgoing("t", b"k", b"v", (("x", "text"),)),  # type: ignore[arg-type]
        Outgoing("t", b"k", b"v", ((b"x", b"v"),)),  # type: ignore[arg-type]
        Outgoing("t", b"k", b"v", (("\ud800", b"v"),)),
        Outgoing("t", b"k", b"v", (("x", b"v", 3),)),  # type: ignore[arg-type]
    ],
)
def test_nothing_is_written_of_a_record_that_has_no_form(bad: Outgoing) -> None:
    good = records(b"a", b"b")
    writer = Writer(MADE_AT, 1000)
    assert writer.add(good[0])
    with pytest.raises((TypeError, ValueError, AttributeError)):
        writer.add(bad)
    assert writer.add(good[1])
    assert [one[3] for one in read(writer.batch(None))] == [b"a", b"b"]
