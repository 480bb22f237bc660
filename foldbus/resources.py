"""What a service's handlers need of the world: opened once per worker, before its first message, closed after its last.

    @asynccontextmanager
    async def resources(connection: Connection) -> AsyncGenerator[Resources]:
        async with httpx.AsyncClient() as client:
            yield Resources(Bank(client))

    Service("payments", handlers=[take_payment], lifespan=resources)

A lifespan runs in a task of its own, so that it is left in the task that entered it, as task groups in it demand.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any

from bus.errors import FoldbusError
from bus.tasks import ended

if TYPE_CHECKING:
    from foldbus.connection import Connection

log = logging.getLogger("foldbus.worker")

CLOSE_TIMEOUT_S = 30.0
Lifespan = Callable[["Connection"], AbstractAsyncContextManager[Any]]


class LifespanFailed(FoldbusError):
    """A service's lifespan could not be entered, gave something else than its handlers want, or ended while the worker
    runs."""


class Resources:
    """Of one connection. `deps` is what the lifespan gave; None without one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._deps: Any = None
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._opening = asyncio.Lock()

    @property
    def deps(self) -> Any:
        """Raises LifespanFailed when there is a lifespan that nobody has entered."""
        if self._task is None and self._connection.service.lifespan is not None:
            raise LifespanFailed(
                f"service {self._connection.service.name!r} has a lifespan, and it was not entered; nothing was handled"
            )
        return self._deps

    @asynccontextmanager
    async def in_use(self, report: Callable[[asyncio.Task[None]], None]) -> AsyncGenerator[None]:
        """Entered while the context lasts. `report` hears of its task when it ends by itself. Raises LifespanFailed."""
        await self.open()
        task = self._task
        if task is not None:
            task.add_done_callback(report)
        try:
            yield
        finally:
            if task is not None:
                task.remove_done_callback(report)
            await self.close()

    async def open(self) -> None:
        """Enters the lifespan, unless somebody has. Raises LifespanFailed."""
        lifespan = self._connection.service.lifespan
        async with self._opening:
            if lifespan is None or self._task is not None:
                return
            ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self._closing.clear()
            task = asyncio.create_task(self._live(lifespan, ready), name="lifespan")
            try:
                await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
                if not ready.done():
                    self._explain(task)
                self._check(ready.result())
            except BaseException:
                await self._end(task)
                raise
            self._deps, self._task = ready.result(), task

    async def close(self) -> None:
        """Leaves it; an error of leaving comes out. A second call changes nothing."""
        task, self._task, self._deps = self._task, None, None
        if task is not None:
            await self._end(task)
            if not task.cancelled():
                task.result()

    async def _live(self, lifespan: Lifespan, ready: asyncio.Future[Any]) -> None:
        async with lifespan(self._connection) as deps:
            if not ready.done():
                ready.set_result(deps)
            await self._closing.wait()

    async def _end(self, task: asyncio.Task[None]) -> None:
        self._closing.set()
        try:
            _, late = await asyncio.wait({task}, timeout=CLOSE_TIMEOUT_S)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if late:
            log.error("the lifespan did not end in %s s, cancelled", CLOSE_TIMEOUT_S)
            await ended(task)

    def _explain(self, task: asyncio.Task[None]) -> None:
        name = self._connection.service.name
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        found = "it ended without giving anything" if error is None else f"{type(error).__name__}: {error}"
        raise LifespanFailed(
            f"the lifespan of service {name!r} could not be entered, {found}; nothing was consumed"
        ) from error

    def _check(self, deps: Any) -> None:
        for handler in self._connection.service.handlers:
            wanted = handler.deps
            if wanted is None or getattr(wanted, "_is_protocol", False):
                continue
            if not isinstance(deps, wanted):
                raise LifespanFailed(
                    f"the lifespan of service {self._connection.service.name!r} gives {type(deps).__name__}, but "
                    f"{handler!r} wants {wanted.__name__}; nothing was consumed"
                )


__all__ = ["Lifespan", "LifespanFailed", "Resources"]
