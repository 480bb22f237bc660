"""What a program that is all Foldbus does to its own process; a library does not, so only entry points call this."""

from __future__ import annotations

import ctypes
import gc
import sys

_YOUNG_MAX = 50_000
_MMAP_THRESHOLD, _MAPPED_FROM_BYTES = -3, 128 * 1024
"""`M_MMAP_THRESHOLD` of glibc's malloc.h, and glibc's own first choice of it."""


def tune() -> None:
    """Lets the garbage collector look less often, and keeps large buffers off the heap.

    Batches make many objects that all die together without the collector; the default of 700 walks them over and over,
    which cost a quarter of a worker's processor time.

    glibc gives a block above a threshold back to the system when it is freed, but lifts the threshold (up to 32 MiB)
    to the size of any such block: from then on what is fetched and unpacked lies among small objects that live longer,
    and the heap grows round them. Told a threshold, it keeps to that (mallopt(3)). Other allocators do neither.
    """
    gc.freeze()
    gc.set_threshold(_YOUNG_MAX, 10, 10)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)
