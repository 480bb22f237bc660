"""How much a compressed batch takes once it is unpacked, told from its frames without unpacking it.

A few bytes of zstd stand for 128 KiB, and no setting of Kafka bounds what a batch unpacks to: its limits are on the
compressed size. So the frames are walked first: snappy names its sizes, lz4 and zstd bound each block, and gzip, which
says nothing that can be believed, is unpacked piece by piece into nowhere. Where zstd's bound, which may be several
times too large, is too much, it is unpacked into just so much room, to see whether it fits.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Callable

import cramjam

GZIP, SNAPPY, LZ4, ZSTD = 1, 2, 3, 4
CODECS = {GZIP: "gzip", SNAPPY: "snappy", LZ4: "lz4", ZSTD: "zstd"}

_GZIP_RATIO_MAX = 1032
_GZIP_PIECE = 64 * 1024
_XERIAL = b"\x82SNAPPY\x00"
_LZ4_MAGIC, _ZSTD_MAGIC = 0x184D2204, 0xFD2FB528
_LZ4_BLOCKS = {4: 64 * 1024, 5: 256 * 1024, 6: 1024 * 1024, 7: 4 * 1024 * 1024}
_LZ4_RATIO_MAX = 255
_ZSTD_BLOCK = 128 * 1024
_END_OF_FRAME = 0


class Unreadable(ValueError):
    """These are no frames of that codec."""


def unpacked_size(codec: int, packed: bytes | memoryview, *, enough: int) -> int:
    """At most so many bytes come out; more than `enough` only when truly more come out, and then it stops counting.

    Raises Unreadable when that cannot be told.
    """
    measure = _MEASURES.get(codec)
    if measure is None:
        raise Unreadable(f"compression codec {codec} is unknown")
    try:
        return measure(memoryview(packed), enough)
    except (IndexError, zlib.error) as error:
        raise Unreadable(f"no {CODECS[codec]} that can be read: {error}") from error


def _gzip(packed: memoryview, enough: int) -> int:
    if len(packed) * _GZIP_RATIO_MAX <= enough:
        return len(packed) * _GZIP_RATIO_MAX
    size = 0
    rest: bytes | memoryview = packed
    while rest and size <= enough:  # one member after the other
        member = zlib.decompressobj(wbits=31)
        while not member.eof and size <= enough:
            piece = member.decompress(rest, _GZIP_PIECE)
            size += len(piece)
            rest = member.unconsumed_tail
            if not piece and not rest and not member.eof:
                raise Unreadable("gzip ends in the middle")
        rest = member.unused_data.lstrip(b"\x00")
    return size


def _snappy(packed: memoryview, enough: int) -> int:
    if bytes(packed[:8]) != _XERIAL or len(packed) <= 16:
        return _varint(packed, 0)
    size, at = 0, 16
    while at < len(packed) and size <= enough:
        block = int.from_bytes(_exactly(packed, at, 4), "big")
        size += _varint(_exactly(packed, at + 4, block), 0)
        at += 4 + block
    return size


def _lz4(packed: memoryview, enough: int) -> int:
    size = at = 0
    while at < len(packed) and size <= enough:
        magic = _little(packed, at, 4)
        if _is_skippable(magic):
            at += 8 + _little(packed, at + 4, 4)
            continue
        if magic != _LZ4_MAGIC:
            raise Unreadable(f"lz4 frame begins with {magic:#x}")
        flags, descriptor = packed[at + 4], packed[at + 5]
        largest = _LZ4_BLOCKS.get(descriptor >> 4 & 7)
        if largest is None:
            raise Unreadable("lz4 frame without a block size")
        at += 7 + (8 if flags & 8 else 0) + (4 if flags & 1 else 0)
        while size <= enough:
            block = _little(packed, at, 4)
            at += 4
            if block == _END_OF_FRAME:
                at += 4 if flags & 4 else 0
                break
            length = block & 0x7FFFFFFF
            size += length if block >> 31 else min(largest, length * _LZ4_RATIO_MAX)
            at += length + (4 if flags & 16 else 0)
    return size


def _zstd(packed: memoryview, enough: int) -> int:
    size = at = sure = 0
    while at < len(packed) and sure <= enough:
        magic = _little(packed, at, 4)
        if _is_skippable(magic):
            at += 8 + _little(packed, at + 4, 4)
            continue
        if magic != _ZSTD_MAGIC:
            raise Unreadable(f"zstd frame begins with {magic:#x}")
        facts = packed[at + 4]
        single = facts >> 5 & 1
        dictionary = (0, 1, 2, 4)[facts & 3]
        content = (single, 2, 4, 8)[facts >> 6]
        at += 5 + (1 - single) + dictionary + content
        last = 0
        while not last and sure <= enough:
            block = _little(packed, at, 3)
            last, kind, length = block & 1, block >> 1 & 3, block >> 3
            at += 3
            if kind == 3:
                raise Unreadable("zstd block of a reserved kind")
            size += _ZSTD_BLOCK if kind == 2 else length
            sure += 0 if kind == 2 else length
            at += 1 if kind == 1 else length
        if last:
            at += 4 if facts & 4 else 0
    return size if size <= enough or sure > enough else _tried(packed, enough)


def _tried(packed: memoryview, enough: int) -> int:
    """Unpacked into a room that takes memory only as it fills, and is given back."""
    with mmap.mmap(-1, enough) as room, memoryview(room) as inside:
        try:
            return int(cramjam.zstd.decompress_into(packed, inside))
        except cramjam.DecompressionError:  # full; or no zstd, which is as little to be unpacked
            return enough + 1


_MEASURES: dict[int, Callable[[memoryview, int], int]] = {GZIP: _gzip, SNAPPY: _snappy, LZ4: _lz4, ZSTD: _zstd}


def _is_skippable(magic: int) -> bool:
    return magic & 0xFFFFFFF0 == 0x184D2A50


def _exactly(packed: memoryview, at: int, count: int) -> memoryview:
    found = packed[at : at + count]
    if len(found) < count:
        raise Unreadable("it ends in the middle")
    return found


def _little(packed: memoryview, at: int, count: int) -> int:
    return int.from_bytes(_exactly(packed, at, count), "little")


def _varint(packed: memoryview, at: int) -> int:
    value = shift = 0
    while shift < 35:
        byte = packed[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
        at, shift = at + 1, shift + 7
    raise Unreadable("a length without an end")
