"""Batches for aiokafka's producer, written and compressed at a fraction of what its own way costs.

Like `internals.py` this reaches beyond aiokafka's public interface, and `tests/bus/test_kafka.py` looks after it.

- aiokafka's builder takes headers as a list of pairs, one record at a time. Here records are written as they are
  (format 2: https://kafka.apache.org/documentation/#recordbatch), headers packed already (`packing.py`) or not.
- aiokafka compresses lz4 at level 9, which takes ten times as long as level 1 and makes our batches 3 % smaller: it was
  the largest cost of publishing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cramjam
from aiokafka.codec import gzip_encode, snappy_encode, zstd_encode
from aiokafka.record.util import calc_crc32c

from bus.kafka.sizes import CODECS, GZIP, LZ4, SNAPPY, ZSTD
from bus.packing import VARINTS, PackedHeaders, packed, varint
from bus.transport import Outgoing

_LZ4_LEVEL = 1
_MAGIC = 2
_HEAD = struct.Struct(">qiibI")
"""Base offset (the broker's to fill in), length of what is behind it, leader epoch, magic, checksum of what follows."""
_BODY = struct.Struct(">hiqqqhii")
"""Attributes, last offset, first and largest timestamp, producer's id and epoch, first sequence number, count."""
HEADER_BYTES = _HEAD.size + _BODY.size
_BEFORE_LENGTH_ENDS = 12
_SHORT_MAX = len(VARINTS)

Compress = Callable[[bytes], bytes]


def _lz4(records: bytes) -> bytes:
    # Kafka wants blocks that do not refer to each other (KIP-57).
    compressor: Any = cramjam.lz4.Compressor(level=_LZ4_LEVEL, content_checksum=False, block_linked=False)
    compressor.compress(records)
    return bytes(compressor.finish())


_COMPRESS: Mapping[int, Compress] = {GZIP: gzip_encode, SNAPPY: snappy_encode, LZ4: _lz4, ZSTD: zstd_encode}
_NUMBERS = {name: number for number, name in CODECS.items()}


class Writer:
    """Records of one timestamp, one after the other, until `bytes_max` are written."""

    def __init__(self, timestamp: int, bytes_max: int) -> None:
        self.count, self.size = 0, HEADER_BYTES
        self._timestamp, self._bytes_max = timestamp, bytes_max
        self._parts: list[bytes] = []

    def add(self, record: Outgoing) -> int:
        """Writes it and answers its bytes; 0 if it does not fit, which the first one always does. Raises TypeError or
        ValueError for a record that has no form on the wire, and has written nothing of it then."""
        key, value, headers = record.key, record.value, record.headers
        number, table = self.count, VARINTS
        wire = headers.wire if isinstance(headers, PackedHeaders) else packed(headers)
        # No attributes, and the batch's own timestamp.
        body = b"".join((
            b"\0\0", table[number] if number < _SHORT_MAX else varint(number),
            _NULL if key is None else varint(len(key)), key or b"",
            _NULL if value is None else varint(len(value)), value or b"", wire,
        ))  # fmt: skip
        length = len(body)
        prefix = table[length] if length < _SHORT_MAX else varint(length)
        written = length + len(prefix)
        if number and self.size + written > self._bytes_max:
            return 0
        self._parts += (prefix, body)
        self.count = number + 1
        self.size += written
        return written

    def batch(self, compression: str | None) -> Batch:
        return Batch(b"".join(self._parts), self.count, self._timestamp, _NUMBERS[compression] if compression else 0)


_NULL = varint(-1)


class Batch:
    """What aiokafka's producer takes for a `BatchBuilder` that is closed. Compressed when it is sent, unless that makes
    it longer."""

    def __init__(self, records: bytes, count: int, timestamp: int, codec: int) -> None:
        self._records, self._count, self._timestamp, self._codec = records, count, timestamp, codec
        self._producer = (-1, -1, 0)
        self._built: bytearray | None = None

    def record_count(self) -> int:
        return self._count

    def size(self) -> int:
        return HEADER_BYTES + len(self._records) if self._built is None else len(self._built)

    def close(self) -> None:
        pass

    def closed(self) -> bool:
        return True

    def _set_producer_state(self, producer_id: int, producer_epoch: int, base_sequence: int) -> None:
        self._producer = (producer_id, producer_epoch, base_sequence)

    def _build(self) -> bytearray:
        """Asked for by the producer: once the sequence number is known, and again for every retry."""
        if self._built is None:
            records, codec = self._records, self._codec
            if codec:
                shorter = _COMPRESS[codec](records)
                if len(shorter) < len(records):
                    records = shorter
                else:
                    codec = 0
            self._records = b""
            body = _BODY.pack(codec, self._count - 1, self._timestamp, self._timestamp, *self._producer, self._count)
            behind = HEADER_BYTES - _BEFORE_LENGTH_ENDS + len(records)
            rest = body + records
            self._built = bytearray(_HEAD.pack(0, behind, -1, _MAGIC, calc_crc32c(rest)))
            self._built += rest
        return self._built


def written(records: Sequence[Outgoing], *, timestamp: int, compression: str | None = None) -> Batch:
    """All of them in one batch."""
    writer = Writer(timestamp, 2**31)
    for record in records:
        writer.add(record)
    return writer.batch(compression)


__all__ = ["HEADER_BYTES", "Batch", "Writer", "written"]
