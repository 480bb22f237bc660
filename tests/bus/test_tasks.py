"""Ending a task: its cancellation is its own affair, the caller's is not."""

from __future__ import annotations

import asyncio

import pytest

from bus import tasks
from bus.tasks import all_ended, ended


async def test_waits_for_the_task_and_keeps_quiet_about_its_cancellation() -> None:
    over: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            over.append("over")

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    await ended(task)
    assert (over, task.cancelled()) == (["over"], True)


async def test_raises_what_the_task_raised() -> None:
    async def work() -> None:
        raise ValueError("its own")

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="its own"):
        await ended(task)


async def test_lets_the_callers_cancellation_through() -> None:
    """The caller is cancelled at the very moment when it waits for the task: swallowed, it would go on for ever."""
    ending = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ending.set()
            await asyncio.sleep(0.01)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    caller = asyncio.create_task(ended(task))
    await ending.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await asyncio.wait({task})


async def test_whoever_swallows_his_cancellation_is_cancelled_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As `asyncio.wait_for` of Python 3.11 does now and then. The others' errors are theirs."""
    monkeypatch.setattr(tasks, "AGAIN_S", 0.01)
    swallowed: list[int] = []

    async def deaf() -> None:
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed.append(1)
                if len(swallowed) == 3:
                    raise

    async def broken() -> None:
        raise ValueError("its own")

    going = [asyncio.create_task(deaf(), name="the deaf one"), asyncio.create_task(broken())]
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await all_ended(going)
    assert all(task.done() for task in going)
    assert len(swallowed) == 3
    assert "the deaf one goes on though it was cancelled" in caplog.text
