"""Keys go to the partitions that Java's default partitioner gives them."""

from __future__ import annotations

import random

import pytest
from aiokafka.partitioner import murmur2 as reference  # pyright: ignore[reportUnknownVariableType]
from hypothesis import given
from hypothesis import strategies as st

from bus.partitioner import hashes_of, murmur2, partition_of


@pytest.mark.parametrize(
    ("key", "expected"),
    # From Kafka's own UtilsTest.testMurmur2, as signed 32-bit numbers.
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_murmur2_gives_the_numbers_of_kafkas_own_test(key: bytes, expected: int) -> None:
    assert murmur2(key) == expected & 0xFFFFFFFF


def test_murmur2_agrees_with_aiokafka_for_keys_of_every_length() -> None:
    rng = random.Random(7)
    for length in range(70):
        for _ in range(20):
            key = rng.randbytes(length)
            assert murmur2(key) == reference(key), key


def test_the_partition_is_the_positive_hash_modulo_the_count() -> None:
    assert {partition_of(b"21", n) for n in (12,)} == {(-973932308 & 0x7FFFFFFF) % 12}
    assert {partition_of(str(i).encode(), 12) for i in range(500)} == set(range(12))


@given(st.lists(st.binary(max_size=40), max_size=60), st.integers(1, 40), st.integers(0, 60))
def test_many_at_once_are_hashed_as_one_by_one(keys: list[bytes], length: int, count: int) -> None:
    """Also a crowd of one length, new keys between known ones, and one key several times."""
    keys = keys + [n.to_bytes(2, "big") * length for n in range(count)] + keys[:3]
    assert [found % 2**31 for found in hashes_of(keys)] == [murmur2(key) & 0x7FFFFFFF for key in keys]
    assert [found % 12 for found in hashes_of(keys)] == [partition_of(key, 12) for key in keys]


def test_so_many_are_remembered_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[bytes, int] = {}
    monkeypatch.setattr("bus.partitioner._known", known)
    monkeypatch.setattr("bus.partitioner._KNOWN_MAX", 50)
    keys = [b"key-%04d" % n for n in range(400)]
    for start in range(0, 400, 20):
        some = keys[start : start + 20]
        assert [found % 7 for found in hashes_of(some)] == [(murmur2(key) & 0x7FFFFFFF) % 7 for key in some]
        assert len(known) <= 50
    partition_of(b"k" * 100_000, 3)
    hashes_of([b"k" * 100_000, b"key-1000"])
    assert max(map(len, known)) == len(keys[0])
