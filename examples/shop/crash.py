"""How the demo's services run: all in this process, or each in one of its own that is killed again and again."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Protocol

from foldbus import Connection, Metrics, Service

_FUTILE_KILLS = 8
_HERE = Path(__file__).resolve().parent.parent


class Workers(Protocol):
    kills: int

    def running(self) -> AbstractAsyncContextManager[None]:
        """The services run while the context lasts."""
        ...

    def moved(self) -> None:
        """Something went through to its end."""
        ...

    def calm(self) -> None:
        """No more kills from now on."""
        ...

    def check(self) -> None:
        """Raises what made a worker fail, if one failed by itself."""
        ...


class SteadyWorkers:
    """All services in this process."""

    kills = 0

    def __init__(self, services: Sequence[Service], store: str, bus: str, metrics: Metrics) -> None:
        self._services, self._store, self._bus, self._metrics = services, store, bus, metrics
        self._connections: list[Connection] = []

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        async with AsyncExitStack() as stack:
            for service in self._services:
                connection = await stack.enter_async_context(
                    service.connect(store=self._store, bus=self._bus, worker=True, metrics=self._metrics)
                )
                self._connections.append(connection)
            yield

    def moved(self) -> None:
        return None

    def calm(self) -> None:
        return None

    def check(self) -> None:
        for connection in self._connections:
            if connection.worker is not None:
                connection.worker.check()


class Crashes:
    """Each service in a process of its own, started again whenever it ends. One of them is killed with SIGKILL every
    0.5 to 4 seconds, at a moment and of a service that the seed decides, until `calm`.

    A busy machine may need longer to start a worker than it is let live. So after every eight kills in a row without
    anything going through the pauses are doubled, until something does."""

    def __init__(
        self,
        services: Sequence[Service],
        store: str,
        bus: str,
        rng: random.Random,
        *,
        every_s: tuple[float, float] = (0.5, 4.0),
        session_timeout_s: float = 3.0,
    ) -> None:
        self._names = [service.name for service in services]
        self._store, self._bus, self._rng, self._every_s = store, bus, rng, every_s
        self._session_timeout_s = session_timeout_s
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._killed: set[int] = set()
        self._errors: list[str] = []
        self._calm = False
        self._ending = False
        self.kills = 0
        self._futile = 0

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        keepers = [asyncio.create_task(self._keep(name)) for name in self._names]
        killer = asyncio.create_task(self._kill())
        try:
            yield
        finally:
            self._ending = True
            killer.cancel()
            for process in self._running.values():
                if _alive(process):
                    process.terminate()
            await asyncio.wait(keepers, timeout=30)
            for process in self._running.values():
                if _alive(process):
                    process.kill()
            await asyncio.gather(killer, *keepers, return_exceptions=True)

    def moved(self) -> None:
        self._futile = 0

    def calm(self) -> None:
        self._calm = True

    def check(self) -> None:
        if self._errors:
            raise RuntimeError(self._errors[0])

    async def _keep(self, name: str) -> None:
        environment = {
            **os.environ,
            "FOLDBUS_STORE": self._store,
            "FOLDBUS_BUS": self._bus,
            "FOLDBUS_SESSION_TIMEOUT_S": str(self._session_timeout_s),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_HERE), os.environ.get("PYTHONPATH", "")])),
        }
        while not self._stopping():
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "foldbus", "run", f"shop.{name}:app", "--quiet",
                env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
            self._running[name] = process
            code = await process.wait()
            if not self._stopping() and code != -signal.SIGKILL:
                self._errors.append(f"the worker of {name} ended by itself with exit code {code}")
                return

    async def _kill(self) -> None:
        while self._killing():
            await asyncio.sleep(self._rng.uniform(*self._every_s) * 2 ** min(self._futile // _FUTILE_KILLS, 4))
            name = self._rng.choice(self._names)
            process = self._running.get(name)
            if process is not None and _alive(process) and self._killing():
                process.kill()
                self.kills += 1
                self._futile += 1

    def _killing(self) -> bool:
        return not self._calm

    def _stopping(self) -> bool:
        return self._ending


def _alive(process: asyncio.subprocess.Process) -> bool:
    return process.returncode is None
