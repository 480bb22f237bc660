"""Waiting for the log to grow, on PostgreSQL: who is cancelled while he is woken stays cancelled."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bus.metrics import MemoryMetrics
from eventstore.postgres.feed import Wakeups, wait_past


class Still:
    """A watermark that nothing moves."""

    drawn = 0

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
