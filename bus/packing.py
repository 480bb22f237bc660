"""Headers as they stand in a Kafka record: https://kafka.apache.org/documentation/#recordheader.

A record has a dozen headers, most of them the same as its neighbour's. As pairs they are a dozen tuples for every
record, made, walked by the garbage collector and written once; as bytes they are one. So whoever makes records by the
ten thousand may write their headers in this form at once, and everybody else still reads them as pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import overload

_SHORT_MAX = 4096


def _varint(number: int) -> bytes:
    zigzag = number << 1 if number >= 0 else (-number << 1) - 1
    made = bytearray()
    while zigzag > 0x7F:
        made.append(zigzag & 0x7F | 0x80)
        zigzag >>= 7
    made.append(zigzag)
    return bytes(made)


VARINTS = [_varint(number) for number in range(_SHORT_MAX)]
"""Of the numbers that lengths are made of."""


def varint(number: int) -> bytes:
    """A signed number of variable length, zigzag, as in protocol buffers."""
    return VARINTS[number] if 0 <= number < _SHORT_MAX else _varint(number)


@lru_cache(maxsize=1024)
def _name(name: str) -> bytes:
    text = name.encode()
    return varint(len(text)) + text


def packed_header(name: str, value: bytes) -> bytes:
    """One header. Raises UnicodeEncodeError for a name that UTF-8 cannot carry."""
    return b"".join((_name(name), varint(len(value)), value))


def packed(headers: Iterable[tuple[str, bytes]]) -> bytes:
    """Their count and all of them. Raises TypeError for what is no text and bytes, UnicodeEncodeError as above."""
    parts = [b""]
    for name, value in headers:
        size = len(value)
        parts += (_name(name), VARINTS[size] if size < _SHORT_MAX else _varint(size), value)
    parts[0] = varint(len(parts) // 3)
    return b"".join(parts)


class PackedHeaders(Sequence[tuple[str, bytes]]):
    """A sequence of pairs that holds them packed, as `wire`. Equal to the tuple of its pairs, and hashed like it."""

    __slots__ = ("wire",)

    def __init__(self, wire: bytes) -> None:
        self.wire = wire

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        return iter(_unpacked(self.wire))

    def __len__(self) -> int:
        return _number(self.wire, 0)[0]

    @overload
    def __getitem__(self, index: int) -> tuple[str, bytes]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[str, bytes]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, bytes] | Sequence[tuple[str, bytes]]:
        return _unpacked(self.wire)[index]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PackedHeaders):
            return self.wire == other.wire
        return _unpacked(self.wire) == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(_unpacked(self.wire))

    def __repr__(self) -> str:
        return repr(_unpacked(self.wire))


def _unpacked(wire: bytes) -> tuple[tuple[str, bytes], ...]:
    count, at = _number(wire, 0)
    headers: list[tuple[str, bytes]] = []
    for _ in range(count):
        size, at = _number(wire, at)
        name, at = wire[at : at + size].decode(), at + size
        size, at = _number(wire, at)
        headers.append((name, wire[at : at + size]))
        at += size
    return tuple(headers)


def _number(wire: bytes, at: int) -> tuple[int, int]:
    """The length that stands there, and where it ends."""
    byte = wire[at]
    if byte < 0x80:
        return byte >> 1, at + 1
    number, shift = byte & 0x7F, 7
    while True:
        at += 1
        byte = wire[at]
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number >> 1, at + 1
        shift += 7


__all__ = ["VARINTS", "PackedHeaders", "packed", "packed_header", "varint"]
