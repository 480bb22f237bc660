"""Batches as a hostile producer writes them: made byte by byte and sent as they are, past every producer's checks."""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections.abc import Mapping, Sequence

import cramjam
from aiokafka.client import AIOKafkaClient
from aiokafka.codec import gzip_encode, lz4_encode, snappy_encode, zstd_encode
from aiokafka.errors import NotLeaderForPartitionError
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.util import calc_crc32c

from bus.kafka.sizes import GZIP, LZ4, SNAPPY, ZSTD

Named = Sequence[tuple[bytes, bytes | None]]
ENCODE = {GZIP: gzip_encode, SNAPPY: snappy_encode, LZ4: lz4_encode, ZSTD: zstd_encode}


def record(delta: int, key: bytes | None, value: bytes | None, headers: Named = ()) -> bytes:
    """One record of a batch."""
    before, after = parts_of(delta, key, len(value or b""), headers, none=value is None)
    return before + (value or b"") + after


def parts_of(delta: int, key: bytes | None, length: int, headers: Named, *, none: bool = False) -> tuple[bytes, bytes]:
    """What stands before the value and what behind it."""
    body = b"\x00" + varint(0) + varint(delta) + sized(key) + varint(-1 if none else length)
    after = varint(len(headers)) + b"".join(sized(name) + sized(text) for name, text in headers)
    return varint(len(body) + (0 if none else length) + len(after)) + body, after


def batch(
    body: bytes, count: int, *, codec: int = 0, packed: bool = False, time_ms: int = 1_700_000_000_000, flags: int = 0
) -> bytes:
    """`count` records; `body` is packed already, or is packed here."""
    if codec and not packed:
        body = bytes(ENCODE[codec](body))
    tail = struct.pack(">hiqqqhii", codec | flags, count - 1, time_ms, time_ms, -1, -1, -1, count) + body
    head = struct.pack(">ibI", -1, 2, calc_crc32c(tail))
    return struct.pack(">qi", 0, len(head) + len(tail)) + head + tail


def bomb(codec: int, size: int, headers: Named = (), *, key: bytes = b"k") -> bytes:
    """One record whose value is `size` zeros, packed without ever having been there."""
    before, after = parts_of(0, key, size, headers)
    return batch(_PACK[codec](before, size, after), 1, codec=codec, packed=True)


def _gzip(before: bytes, size: int, after: bytes) -> bytes:
    block = bytes(1024 * 1024)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = deflate.compress(before) + deflate.flush(zlib.Z_FULL_FLUSH)
    again = deflate.compress(block) + deflate.flush(zlib.Z_FULL_FLUSH)  # what it writes for every further one
    last = deflate.compress(bytes(size % len(block)) + after) + deflate.flush(zlib.Z_FINISH)
    crc = zlib.crc32(before)
    for _ in range(size // len(block)):
        crc = zlib.crc32(block, crc)
    crc = zlib.crc32(bytes(size % len(block)) + after, crc)
    total = len(before) + size + len(after)
    trailer = struct.pack("<II", crc, total & 0xFFFFFFFF)
    return b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff" + first + again * (size // len(block)) + last + trailer


def _lz4(before: bytes, size: int, after: bytes) -> bytes:
    def block(data: bytes) -> bytes:
        packed = bytes(cramjam.lz4.compress_block(data, store_size=False))
        return struct.pack("<I", len(packed)) + packed

    head = bytes.fromhex("04224d18604082")  # independent blocks of 64 KiB, without checksums
    whole = 64 * 1024
    blocks = block(before) + block(bytes(whole)) * (size // whole) + block(bytes(size % whole) + after)
    return head + blocks + bytes(4)


def _snappy(before: bytes, size: int, after: bytes) -> bytes:
    def block(data: bytes) -> bytes:
        packed = bytes(cramjam.snappy.compress_raw(data))
        return struct.pack(">i", len(packed)) + packed

    whole = 32 * 1024
    blocks = block(before) + block(bytes(whole)) * (size // whole) + block(bytes(size % whole) + after)
    return b"\x82SNAPPY\x00\x00\x00\x00\x01\x00\x00\x00\x01" + blocks


def _zstd(before: bytes, size: int, after: bytes) -> bytes:
    def block(kind: int, length: int, data: bytes, last: int = 0) -> bytes:
        return (length << 3 | kind << 1 | last).to_bytes(3, "little") + data

    whole = 128 * 1024
    zeros = block(1, whole, b"\x00") * (size // whole) + block(1, size % whole, b"\x00")
    return b"\x28\xb5\x2f\xfd\x00\x38" + block(0, len(before), before) + zeros + block(0, len(after), after, 1)


_PACK = {GZIP: _gzip, LZ4: _lz4, SNAPPY: _snappy, ZSTD: _zstd}


async def produce(
    bootstrap: str, batches: Mapping[tuple[str, int], Sequence[bytes]]
) -> dict[tuple[str, int], list[int]]:
    """Sends each as it is, one after the other; answers their first offsets. The broker looks into them: it takes
    only what it can unpack itself."""
    client = AIOKafkaClient(bootstrap_servers=bootstrap)
    await client.bootstrap()
    try:
        node = client.get_random_node()
        found: dict[tuple[str, int], list[int]] = {}
        for (topic, partition), ones in batches.items():
            for one in ones:
                code, offset = await _sent(client, node, topic, partition, one)
                async with asyncio.timeout(20):
                    while code == NotLeaderForPartitionError.errno:  # the topic is a moment old
                        await asyncio.sleep(0.05)
                        code, offset = await _sent(client, node, topic, partition, one)
                assert code == 0, f"the broker refused a batch: error {code}"
                found.setdefault((topic, partition), []).append(offset)
        return found
    finally:
        await client.close()


async def _sent(client: AIOKafkaClient, node: int, topic: str, partition: int, made: bytes) -> tuple[int, int]:
    request = ProduceRequest(None, -1, 20_000, [(topic, [(partition, made)])])
    response = await client.send(node, request)
    ((_, ((_, code, offset, *_),)),) = response.topics
    return code, offset


def varint(value: int) -> bytes:
    value = (value << 1) ^ (value >> 63)
    out = bytearray()
    while value > 0x7F:
        out.append(0x80 | value & 0x7F)
        value >>= 7
    out.append(value)
    return bytes(out)


def sized(text: bytes | None) -> bytes:
    return varint(-1) if text is None else varint(len(text)) + text
