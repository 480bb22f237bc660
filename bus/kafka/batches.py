"""Batches for aiokafka's producer, written and compressed at a fraction of what its own way costs.

Like `internals.py` this reaches beyond aiokafka's public interface, and `tests/bus/test_kafka.py` looks after it.

- The public `append` puts two calls with keywords and a look at serializers before each record.
- aiokafka compresses lz4 at level 9, which takes ten times as long as level 1 and makes our batches 3 % smaller: it was
  the largest cost of publishing.
"""

from __future__ import annotations

import struct
from typing import Any

import cramjam
from aiokafka.record.util import calc_crc32c

_LEVEL = 1
_LZ4 = 3
_HEADER_BYTES, _LENGTH_AT, _CRC_AT, _ATTRIBUTES_AT = 61, 8, 17, 21
"""Of a record batch, format 2: https://kafka.apache.org/documentation/#recordbatch. The length counts what is behind
it, the checksum covers what is behind itself."""


class Lz4Batch:
    """`plain` is a batch from a producer that does not compress. What it holds is compressed when it is sent."""

    def __init__(self, plain: Any) -> None:
        self._plain = plain
        self._packed: bytearray | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def _build(self) -> bytearray:
        """Asked for by the producer: once the sequence number is known, and again for every retry."""
        if self._packed is None:
            self._packed = packed(self._plain._build())
        return self._packed


def packed(batch: bytearray) -> bytearray:
    """The same batch with its records compressed, unless that makes it longer."""
    # Kafka wants blocks that do not refer to each other (KIP-57).
    compressor: Any = cramjam.lz4.Compressor(level=_LEVEL, content_checksum=False, block_linked=False)
    compressor.compress(bytes(memoryview(batch)[_HEADER_BYTES:]))
    records = bytes(compressor.finish())
    if _HEADER_BYTES + len(records) >= len(batch):
        return batch
    made = bytearray(batch[:_HEADER_BYTES])
    made += records
    struct.pack_into(">i", made, _LENGTH_AT, len(made) - _LENGTH_AT - 4)
    (attributes,) = struct.unpack_from(">h", made, _ATTRIBUTES_AT)
    struct.pack_into(">h", made, _ATTRIBUTES_AT, attributes | _LZ4)
    struct.pack_into(">I", made, _CRC_AT, calc_crc32c(bytes(memoryview(made)[_ATTRIBUTES_AT:])))
    return made


def appender(batch: Any) -> Any:
    """Appends (number, timestamp, key, value, list of headers); answers what it wrote, None when the batch is full."""
    return batch._builder.append


def appended(batch: Any, count: int) -> None:
    """How many records the appender of this batch has written."""
    batch._relative_offset = count


__all__ = ["Lz4Batch", "appended", "appender", "packed"]
