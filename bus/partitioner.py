"""Which partition a key belongs to: murmur2, as Kafka's Java clients compute it.

Every adapter uses this one function, so that a key stays where it is when a service moves from the embedded bus to
Kafka, and so that foreign Java producers agree with us.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from struct import unpack, unpack_from
from typing import cast

_SEED = 0x9747B28C
_M = 0x5BD1E995
_MASK = 0xFFFFFFFF
_POSITIVE = 0x7FFFFFFF

_KNOWN_MAX = 8_192
_KNOWN_KEY_MAX = 256
_TOGETHER_MIN = 16
"""Fewer keys of one length are hashed one by one: there the big numbers do not pay."""

_known: dict[bytes, int] = {}
"""Hot keys are remembered: their positive hashes."""


def murmur2(data: bytes) -> int:
    """MurmurHash2, 32 bits, unsigned, with the seed of `org.apache.kafka.common.utils.Utils.murmur2`."""
    length = len(data)
    h = _SEED ^ length
    for k in unpack_from(f"<{length // 4}I", data):
        k = k * _M & _MASK
        k ^= k >> 24
        h = (h * _M & _MASK) ^ (k * _M & _MASK)
    if rest := data[length & ~3 :]:
        h = (h ^ int.from_bytes(rest, "little")) * _M & _MASK
    h = (h ^ h >> 13) * _M & _MASK
    return h ^ h >> 15


def murmur2_of(keys: Sequence[bytes]) -> list[int]:
    """The same of many keys of one length, all at once and at an eighth of the price.

    A hash stands in 64 bits of one huge number per key, so that a multiplication by 32 bits stays within them: one
    operation on the huge number is one on all hashes.
    """
    count, length = len(keys), len(keys[0])
    blocks = length // 4
    padded = b"".join(keys) if length % 4 == 0 else b"".join([key + bytes(4 - length % 4) for key in keys])
    width = len(padded) // count
    ones = int.from_bytes(b"\1\0\0\0\0\0\0\0" * count, "little")
    mask = _MASK * ones
    h = (_SEED ^ length) * ones
    for block in range(blocks):
        k = _words(padded, 4 * block, width) * _M & mask
        k = (k ^ k >> 24) & mask  # what the neighbour above has shifted in lies above the 32 bits
        h = (h * _M & mask) ^ (k * _M & mask)
    if length % 4:
        h = (h ^ _words(padded, 4 * blocks, width)) * _M & mask
    h = (h ^ h >> 13 & mask) * _M & mask
    h = (h ^ h >> 15) & mask
    return list(unpack(f"<{count}Q", h.to_bytes(8 * count, "little")))


def _words(padded: bytes, at: int, width: int) -> int:
    """The four bytes at `at` of every key, as its number, in 64 bits each."""
    lanes = bytearray(8 * (len(padded) // width))
    for byte in range(4):
        lanes[byte::8] = padded[at + byte :: width]
    return int.from_bytes(lanes, "little")


def partition_of(key: bytes, partitions: int) -> int:
    """The partition of `key` among `partitions`: the positive murmur2 modulo the count. Hot keys are remembered."""
    found = _known.get(key)
    if found is None:
        found = murmur2(key) & _POSITIVE
        if len(key) <= _KNOWN_KEY_MAX:
            _remember({key: found})
    return found % partitions


def hashes_of(keys: Sequence[bytes]) -> Sequence[int]:
    """Of each key what `partition_of` takes modulo the count; for many at once."""
    hashes = [*map(_known.get, keys)]
    if None not in hashes:
        return cast("list[int]", hashes)
    # Each once, in some order; those of one length together.
    fresh = dict.fromkeys([key for key, found in zip(keys, hashes, strict=True) if found is None], 0)
    lengths = set(map(len, fresh))
    for length in lengths:
        together = list(fresh) if len(lengths) == 1 else [key for key in fresh if len(key) == length]
        if len(together) >= _TOGETHER_MIN and 0 < length <= _KNOWN_KEY_MAX:
            found = murmur2_of(together)
        else:
            found = [murmur2(key) for key in together]
        fresh.update(zip(together, [one & _POSITIVE for one in found], strict=True))
    made = [*map(fresh.get, keys)]
    if None in made:
        made = [new if found is None else found for new, found in zip(made, hashes, strict=True)]
    if max(lengths) <= _KNOWN_KEY_MAX:
        _remember(fresh)
    else:
        _remember({key: one for key, one in fresh.items() if len(key) <= _KNOWN_KEY_MAX})
    return cast("list[int]", made)


def _remember(fresh: Mapping[bytes, int]) -> None:
    if len(_known) + len(fresh) > _KNOWN_MAX:
        _known.clear()
    if len(fresh) <= _KNOWN_MAX:
        _known.update(fresh)
