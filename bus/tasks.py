"""Ending a task that works beside another."""

from __future__ import annotations

import asyncio
from typing import Any


async def ended(task: asyncio.Task[Any]) -> None:
    """Cancels the task and waits until it has ended. Raises what it raised, not that it was cancelled; a cancellation
    of the caller passes through, which `suppress(CancelledError): await task` would swallow."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.result()
