"""Reading one page ahead: while a page is folded or decoded here, the database is at work on the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """At most one call that runs before its answer is wanted. For one task at a time.

    What the call raises is raised where its answer is taken. Whoever takes no answer any more closes this, and the call
    is cancelled; dropped without that, it is cancelled all the same.
    """

    __slots__ = ("_task",)

    def __init__(self) -> None:
        self._task: asyncio.Task[T] | None = None

    def __bool__(self) -> bool:
        """Was a call started whose answer nobody has taken?"""
        return self._task is not None

    def begin(self, call: Coroutine[Any, Any, T]) -> None:
        """It runs as soon as the caller waits for something."""
        assert self._task is None
        self._task = asyncio.create_task(call, name="foldbus-read-ahead")
        self._task.add_done_callback(_retrieve)

    async def start(self, call: Coroutine[Any, Any, T]) -> None:
        """It runs now, up to where it waits for the database, and so does a call that it begins."""
        self.begin(call)
        for _ in range(2):
            await asyncio.sleep(0)

    async def take(self) -> T:
        """Its answer. Cancelled here, it is cancelled, too."""
        assert self._task is not None
        task, self._task = self._task, None
        return await task

    async def close(self) -> None:
        """Returns when it has ended. A second call does nothing."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def __del__(self) -> None:
        if self._task is not None and not self._task.get_loop().is_closed():
            self._task.cancel()


def _retrieve(task: asyncio.Task[Any]) -> None:
    """An error whose place nobody reached is nobody's."""
    if not task.cancelled():
        task.exception()


__all__ = ["Ahead"]
