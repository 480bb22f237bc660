"""Batches as they were fetched, looked at before aiokafka unpacks them.

aiokafka unpacks a batch whole, however large it becomes, and gives up a partition for a header name that is no UTF-8.
Both are a hostile producer's to send, so what is fetched passes through here first:

- A batch that would unpack to more than `bytes_max` is replaced by one record at its last offset, whose value is the
  batch as it came. It is delivered with `flaw` and ends in the dead letters; nothing of it is unpacked. One for all of
  them: who wrote one record of a batch wrote them all, and a megabyte may claim to hold millions.
- A batch with such names, once it was come upon, is written anew with names that can be read; the records that had
  them are delivered with `flaw`.
- Of batches with large records no more is let through per answer than `bytes_max`: a thousand records are taken out at
  a time, and a batch of a few kilobytes may hold dozens of a megabyte each. The rest is fetched again.

Formats before Kafka 0.11 (magic 0 and 1) pass as they are: brokers write what they are sent in today's format.
"""

from __future__ import annotations

import logging
import secrets
import struct
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from aiokafka import TopicPartition
from aiokafka.codec import gzip_decode, lz4_decode, snappy_decode, zstd_decode
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c

from bus.kafka.sizes import CODECS, GZIP, LZ4, SNAPPY, ZSTD, Unreadable, unpacked_size
from bus.metrics import Metrics

log = logging.getLogger("foldbus.bus")

UNPACKED_BYTES_MAX = 32 * 1024 * 1024
"""What a batch may unpack to, unless set otherwise: with the broker's limit of 1 MB, thirty times its size."""

Fetched: TypeAlias = list[tuple[TopicPartition, bytes]]
"""What one broker answered: the batches of each partition."""

_LARGE = 32 * 1024
"""A record from which on it counts how many are taken out at a time: a thousand of these are `bytes_max`."""
_HEADER = struct.Struct(">qiibIhiqqqhii")
_BEFORE_LENGTH, _MAGIC_AT, _CRC_AT, _ATTRIBUTES_AT = 12, 16, 17, 21
_CODEC, _LOG_APPEND_TIME, _TRANSACTIONAL, _CONTROL = 0x07, 0x08, 0x10, 0x20
_DECODE: Mapping[int, Any] = {GZIP: gzip_decode, SNAPPY: snappy_decode, LZ4: lz4_decode, ZSTD: zstd_decode}


class Unpacking:
    """Of one consumer, from `watch` on."""

    def __init__(self, *, bytes_max: int, metrics: Metrics) -> None:
        self.bytes_max = bytes_max
        self.mark = f"flaw {secrets.token_hex(8)}"
        """The name of the header, always the first, that tells what is wrong with a record: nobody else knows it."""
        self.marked = False
        """Was there ever such a record? Until then nobody has to look for one."""
        self.closely: set[TopicPartition] = set()
        """Where a header name was come upon that is no UTF-8."""
        self._metrics = metrics

    def watch(self, raw: Any) -> None:
        """What a broker sends passes through `look` before this consumer of aiokafka sees it. To be called once, before
        it starts. (Inside aiokafka as what `internals.py` lists: there is no public place to stand.)"""
        client = raw._client
        send = client.send

        async def sent(node_id: Any, request: Any, **options: Any) -> Any:
            response = await send(node_id, request, **options)
            if isinstance(request, FetchRequest):
                seen = iter(
                    self.look(
                        [
                            (TopicPartition(topic, part[0]), part[-1] or b"")
                            for topic, parts in response.topics
                            for part in parts
                        ]
                    )
                )
                response.topics = [
                    (topic, [(*part[:-1], next(seen)[1]) for part in parts]) for topic, parts in response.topics
                ]
            return response

        client.send = sent

    def look(self, fetched: Fetched) -> Fetched:
        """The same records of each partition, or others in the place of those that cannot be given on. Never raises:
        what this cannot read, aiokafka is to judge."""
        room = self.bytes_max
        seen: Fetched = []
        for partition, records in fetched:
            try:
                passed, room = self._looked(partition, records, room)
            except Exception:
                self._metrics.count("foldbus_unpacking_failures_total", topic=partition.topic)
                log.exception("%s[%s]: fetched records could not be looked at", partition.topic, partition.partition)
                passed = records
            seen.append((partition, passed))
        return seen

    def _looked(self, partition: TopicPartition, fetched: bytes, room: int) -> tuple[bytes, int]:
        """What is let through, and how much room is left for large records."""
        closely = partition in self.closely
        whole = memoryview(fetched)
        parts: list[bytes | memoryview] = []
        at = kept = 0
        while len(fetched) - at >= _HEADER.size:
            end = at + _BEFORE_LENGTH + int.from_bytes(whole[at + 8 : at + _BEFORE_LENGTH], "big", signed=True)
            if not at + _HEADER.size <= end <= len(fetched):
                break  # the last one is cut off, and fetched again
            if fetched[at + _MAGIC_AT] >= 2:
                batch = whole[at:end]
                facts = _HEADER.unpack_from(batch)
                size, instead = self._batch(partition, batch, facts)
                if size > facts[12] * _LARGE:
                    if size > room < self.bytes_max:
                        whole = whole[:at]
                        break
                    room = max(0, room - size)
                readable = self._readable(partition, batch, facts) if closely and instead is None else None
                if instead is not None or readable is not None:
                    parts += (whole[kept:at], instead or readable or b"")
                    kept = end
                if readable is not None:
                    whole = whole[:end]  # one at a time: it is there unpacked
                    break
            at = end
        if parts or len(whole) < len(fetched):
            return b"".join((*parts, whole[kept:])), room
        return fetched, room

    def _batch(self, partition: TopicPartition, batch: memoryview, facts: tuple[Any, ...]) -> tuple[int, bytes | None]:
        """How much it unpacks to, and what takes its place."""
        codec = facts[5] & _CODEC
        if not codec:
            return len(batch), None
        packed = batch[_HEADER.size :]
        try:
            size = unpacked_size(codec, packed, enough=self.bytes_max)
            if size <= self.bytes_max:
                return size, None
            why = f"unpacks to more than {self.bytes_max} bytes; wanted at most that (decompressed_bytes_max)"
        except Unreadable as error:
            why = f"cannot be unpacked safely: {error}"
        if not _intact(batch, facts):
            return 0, None  # the broker's disk, not its author: aiokafka finds that, too, and the partition stands
        flaw = (
            f"a batch of {facts[12]} records at offsets {facts[0]} to {facts[0] + facts[6]} "
            f"({CODECS.get(codec, codec)}, {len(packed)} bytes) {why}; nothing of it was unpacked"
        )
        self._metrics.count("foldbus_unpacking_refused_total", topic=partition.topic)
        log.error("%s[%s]: %s", partition.topic, partition.partition, flaw)
        builder = _builder(facts)
        # At the last offset: whoever has read up to the middle of the batch gets this, too.
        builder.append(offset=facts[6], timestamp=facts[8], key=None, value=bytes(batch), headers=[self._flaw(flaw)])
        return len(batch), _built(builder, facts)

    def _flaw(self, text: str) -> tuple[str, bytes]:
        self.marked = True
        return self.mark, text.encode()

    def _readable(self, partition: TopicPartition, batch: memoryview, facts: tuple[Any, ...]) -> bytes | None:
        """The batch with header names that can be read; None when they all can, or when it is damaged."""
        if facts[5] & _CONTROL or not _intact(batch, facts):
            return None
        codec = facts[5] & _CODEC
        body: bytes = bytes(batch[_HEADER.size :])
        if codec:
            body = _DECODE[codec](body)
        builder, flaws = _builder(facts), 0
        for delta, time, key, value, headers in _records(body, facts[12]):
            names: list[tuple[str, bytes | None]] = []
            bad: bytes | None = None
            for name, text in headers:
                try:
                    names.append((name.decode(), text))
                except UnicodeDecodeError:
                    names.append((name.decode(errors="backslashreplace"), text))
                    bad = bad or name
            if bad is not None:
                flaws += 1
                names.insert(0, self._flaw(f"header name {bad[:80]!r} is no text; wanted UTF-8"))
            at = facts[8] if facts[5] & _LOG_APPEND_TIME else facts[7] + time
            builder.append(offset=delta, timestamp=at, key=key, value=value, headers=names)
        if not flaws:
            return None
        self._metrics.count("foldbus_unreadable_header_names_total", flaws, topic=partition.topic)
        return _built(builder, facts)


def _intact(batch: memoryview, facts: tuple[Any, ...]) -> bool:
    return bool(calc_crc32c(bytes(batch[_ATTRIBUTES_AT:])) == facts[4])


def _builder(facts: tuple[Any, ...]) -> Any:
    transactional = int(bool(facts[5] & _TRANSACTIONAL))
    return DefaultRecordBatchBuilder(2, 0, transactional, facts[9], facts[10], facts[11], 2**31 - 1)


def _built(builder: Any, facts: tuple[Any, ...]) -> bytes:
    batch = bytearray(builder.build())
    batch[:8] = int(facts[0]).to_bytes(8, "big", signed=True)
    return bytes(batch)


def _records(body: bytes, count: int) -> Iterator[tuple[int, int, Any, Any, list[tuple[bytes, bytes | None]]]]:
    """Offset delta, time delta, key, value and headers of each."""
    at = 0
    for _ in range(count):
        _, at = _signed(body, at)  # its length
        time, at = _signed(body, at + 1)
        delta, at = _signed(body, at)
        key, at = _bytes(body, at)
        value, at = _bytes(body, at)
        left, at = _signed(body, at)
        headers: list[tuple[bytes, bytes | None]] = []
        for _ in range(left):
            name, at = _bytes(body, at)
            text, at = _bytes(body, at)
            headers.append((name or b"", text))
        yield delta, time, key, value, headers


def _bytes(body: bytes, at: int) -> tuple[bytes | None, int]:
    length, at = _signed(body, at)
    return (None, at) if length < 0 else (body[at : at + length], at + length)


def _signed(body: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = body[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (value >> 1) ^ -(value & 1), at
        shift += 7
