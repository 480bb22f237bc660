"""What a program that is all Foldbus does to its own process; a library does not, so only entry points call this."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

log = logging.getLogger("foldbus.process")

_YOUNG_MAX = 50_000
TRIM_S = 30.0
TRIM_SHARE = 0.05


def tune() -> None:
    """Lets the garbage collector look less often. Batches make many objects that all die together without it; the
    default of 700 walks them over and over, which cost a quarter of a worker's processor time."""
    gc.freeze()
    gc.set_threshold(_YOUNG_MAX, 10, 10)


@asynccontextmanager
async def giving_memory_back(*, every_s: float = TRIM_S, share: float = TRIM_SHARE) -> AsyncGenerator[None]:
    """Meanwhile, what the heap has free goes back to the system, every `every_s` at most: when the process has more by
    `share` than after the last time. Of itself glibc gives back only what lies at the heap's very end, and batches of
    messages of all sizes leave holes (benchmarks/README.md).

    Trimming takes milliseconds to tens of them, in a thread; whoever asks glibc for memory meanwhile waits. Elsewhere
    than on glibc nothing happens.
    """
    trim = _malloc_trim()
    if trim is None:
        yield
        return
    task = asyncio.create_task(_trim(trim, every_s, share), name="giving memory back")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _trim(trim: Callable[[int], int], every_s: float, share: float) -> None:
    held = 0
    while True:
        now = resident()
        if now > held * (1 + share):
            await asyncio.to_thread(trim, 0)
            held = resident()
            log.debug("%d KiB of memory given back, %d KiB held", (now - held) // 1024, held // 1024)
        await asyncio.sleep(every_s)


def resident() -> int:
    """Bytes of memory that this process holds. On Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _malloc_trim() -> Callable[[int], int] | None:
    try:
        resident()
        found = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return None
    found.argtypes, found.restype = [ctypes.c_size_t], ctypes.c_int
    return found
