"""Keys go to the partitions that Java's default partitioner gives them."""

from __future__ import annotations

import random

import pytest
from aiokafka.partitioner import murmur2 as reference  # pyright: ignore[reportUnknownVariableType]

from bus.partitioner import murmur2, partition_of


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
