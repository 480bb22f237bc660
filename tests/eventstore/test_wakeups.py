"""Waiting for the log to grow, on PostgreSQL: what is asked, and that who is cancelled stays cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from bus.metrics import MemoryMetrics
from eventstore.postgres.feed import Wakeups, Watermark, wait_past


class Still:
    """A watermark that nothing moves."""

    safe = drawn = 0
    current = False

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def fresh(self) -> int:
        self.asked.set()
        return 0


@pytest.mark.parametrize("turns", range(6))
async def test_a_reader_that_is_cancelled_as_it_is_woken_ends(turns: int) -> None:
    """A worker that is told to stop right after its first commit would otherwise never end."""
    watermark: Any = Still()
    wakeups = Wakeups("", "", MemoryMetrics())
    reader = asyncio.create_task(wait_past(watermark, wakeups, 0, timeout_s=60))
    await watermark.asked.wait()
    await asyncio.sleep(0)  # now it waits
    wakeups.committed()
    for _ in range(turns):
        await asyncio.sleep(0)
    reader.cancel()
    done, _ = await asyncio.wait({reader}, timeout=5)
    assert done
    assert reader.cancelled()


async def test_a_reader_asks_again_what_it_just_saw_only_when_somebody_has_told() -> None:
    """An idle worker's readers come once a second each."""
    asked = end = 0
    wakeups = Wakeups("", "", MemoryMetrics())

    async def query() -> tuple[int, int, object]:
        nonlocal asked
        asked += 1
        return end, end, wakeups

    watermark = Watermark(query, wakeups)
    wakeups.listening = True
    await watermark.fresh()
    await wait_past(watermark, wakeups, 0, timeout_s=0.0)
    assert asked == 1
    reader = asyncio.create_task(wait_past(watermark, wakeups, 0, timeout_s=600))
    await asyncio.sleep(0)
    end = 1
    wakeups.committed()
    async with asyncio.timeout(40):
        await reader
    assert (asked, watermark.safe) == (2, 1)
    wakeups.listening = False
    await wait_past(watermark, wakeups, 1, timeout_s=0.0)
    assert asked == 3


async def finds_one(query: Callable[[], Awaitable[tuple[int, int, object]]], wakeups: Wakeups) -> None:
    """Who has just asked, and been told of nothing, comes to know of position 1."""
    watermark = Watermark(query, wakeups)
    await watermark.fresh()
    async with asyncio.timeout(40):
        await wait_past(watermark, wakeups, 0, timeout_s=600)
    assert watermark.safe == 1


async def test_a_commit_during_a_question_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was told after the question began may not be in its answer. The poll that would find it is an hour away."""
    monkeypatch.setattr("eventstore.postgres.feed._POLL_LISTENING_S", 3600.0)
    wakeups = Wakeups("", "", MemoryMetrics())
    wakeups.listening = True
    answers = iter([0, 1])

    async def query() -> tuple[int, int, object]:
        found = next(answers)
        wakeups.committed()
        return found, found, wakeups

    await finds_one(query, wakeups)


async def test_a_commit_that_nobody_told_of_is_found_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process was killed between the commit and telling."""
    monkeypatch.setattr("eventstore.postgres.feed._POLL_LISTENING_S", 0.01)
    wakeups = Wakeups("", "", MemoryMetrics())
    wakeups.listening = True
    answers = iter([0, 0, 0, 1])

    async def query() -> tuple[int, int, object]:
        found = next(answers)
        return found, found, wakeups

    await finds_one(query, wakeups)
