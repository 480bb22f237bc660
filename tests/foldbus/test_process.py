"""What `foldbus run` does to its own process."""

from __future__ import annotations

import asyncio

import pytest

from foldbus import process
from foldbus.process import giving_memory_back, resident
from tests.stories.pairs import eventually

MIB = 2**20


def holes(mib: int) -> list[bytes]:
    """So much memory in pieces that malloc takes from its heap, every second of which is free again."""
    size = 64 * 1024
    pieces = [b"x" * size for _ in range(2 * mib * MIB // size)]
    del pieces[::2]
    return pieces


async def held() -> int:
    return resident()


async def test_what_the_heap_has_free_goes_back_to_the_system() -> None:
    async with giving_memory_back(every_s=0.02, share=0.05):
        kept = holes(40)
        full = resident()
        await eventually(held, lambda now: now <= full - 30 * MIB)
        assert len(kept) == 640


async def test_memory_that_did_not_grow_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, trimmed = [1000, 900, 940, 945, 950, 920], list[int]()
    asked = 0

    def size() -> int:
        nonlocal asked
        asked += 1
        return sizes[min(asked, len(sizes)) - 1]

    def trim(pad: int) -> int:
        trimmed.append(asked)
        return 1

    monkeypatch.setattr(process, "resident", size)
    monkeypatch.setattr(process, "_malloc_trim", lambda: trim)

    async def looks() -> int:
        return asked

    async with giving_memory_back(every_s=0.001, share=0.05):
        await eventually(looks, lambda n: n >= 12)
    assert trimmed == [1, 5]  # at first, and at 950: more than a twentieth above 900


async def test_where_there_is_no_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_malloc_trim", lambda: None)
    tasks = asyncio.all_tasks()
    async with giving_memory_back(every_s=0.001):
        assert asyncio.all_tasks() == tasks
