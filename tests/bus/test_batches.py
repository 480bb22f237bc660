"""Batches as we compress them: what any Kafka client reads of them is what was put in."""

from __future__ import annotations

import os
from typing import Any

from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.default_records import DefaultRecordBatch

from bus.kafka.batches import Lz4Batch, appended, appender

NONE, LZ4 = 0, 3


def batch(*values: bytes) -> Lz4Batch:
    plain = BatchBuilder(1024 * 1024, 0)
    append = appender(plain)
    for number, value in enumerate(values):
        assert append(number, 1_700_000_000_000, b"k%d" % number, value, [("ce_id", b"%d" % number)]) is not None
    appended(plain, len(values))
    plain.close()
    return Lz4Batch(plain)


def sent(made: Any, *, sequence: int = 33) -> bytes:
    """As the producer does it."""
    assert made.closed()
    made._set_producer_state(7, 2, sequence)
    return bytes(made._build())


def test_it_is_compressed_and_read_back_to_the_last_header() -> None:
    values = [b'{"n":%d,"text":"%b"}' % (n, b"x" * 100) for n in range(200)]
    made = batch(*values)
    assert made.record_count() == 200
    written = sent(made)
    assert len(written) < sum(map(len, values)) / 4
    found = DefaultRecordBatch(written)
    assert found.validate_crc()
    assert (found.compression_type, found.producer_id, found.producer_epoch, found.base_sequence) == (LZ4, 7, 2, 33)
    read = [(one.offset, one.timestamp, one.key, one.value, one.headers) for one in found]
    assert read == [(n, 1_700_000_000_000, b"k%d" % n, value, [("ce_id", b"%d" % n)]) for n, value in enumerate(values)]


def test_what_does_not_become_shorter_is_sent_as_it_is() -> None:
    values = [os.urandom(500), os.urandom(500)]
    found = DefaultRecordBatch(sent(batch(*values)))
    assert found.validate_crc()
    assert found.compression_type == NONE
    assert [one.value for one in found] == values


def test_a_retry_sends_the_very_same_bytes() -> None:
    made = batch(b"a" * 1000)
    assert sent(made) == bytes(made._build())
    assert made.size() >= 0
