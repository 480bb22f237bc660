"""Ending tasks that work beside another."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import Any

log = logging.getLogger("foldbus.bus")

AGAIN_S = 1.0


async def ended(task: asyncio.Task[Any]) -> None:
    """Cancels the task and waits until it has ended. Raises what it raised, not that it was cancelled; a cancellation
    of the caller passes through, which `suppress(CancelledError): await task` would swallow."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.result()


async def all_ended(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancels them and waits until all have ended, however they did.

    Once is not always enough: `asyncio.wait_for` of Python 3.11 forgets a cancellation that arrives with its result
    (python/cpython#86296), and drivers call it. Whoever goes on is cancelled again every `AGAIN_S`, and named in the
    log.
    """
    going = {task for task in tasks if not task.done()}
    while going:
        for task in going:
            task.cancel()
        _, going = await asyncio.wait(going, timeout=AGAIN_S)
        for task in going:
            log.warning("%s goes on though it was cancelled; once more", task.get_name())
    for task in tasks:
        if not task.cancelled():
            task.exception()  # seen
