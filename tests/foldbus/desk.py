"""A small service for the command line's tests: tickets, and a saga whose fate the ticket's number decides."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from typer.testing import CliRunner

from foldbus import Connection, Service
from foldbus.cli import app as program
from tests.stories.pairs import QUICK

T = TypeVar("T")

SOURCE = Path(__file__).with_name("desk_service.txt").read_text()


@dataclass
class Cli:
    """What one call printed. `data` is standard output as JSON."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


@dataclass
class Desk:
    """A service of a name of its own, loadable as `app`, on these backends."""

    name: str
    store: str
    bus: str
    module: ModuleType = field(init=False)

    def __post_init__(self) -> None:
        self.module = ModuleType(self.module_name)
        sys.modules[self.module_name] = self.module
        exec(compile(self.source, "desk_service.txt", "exec"), self.module.__dict__)

    @property
    def source(self) -> str:
        return SOURCE.replace("NAME", self.name)

    @property
    def module_name(self) -> str:
        return f"module_of_{self.name.replace('-', '_')}"

    @property
    def app(self) -> str:
        return f"{self.module_name}:app"

    @property
    def service(self) -> Service:
        service: Service = self.module.app
        return service

    def cli(self, command: str, *args: str, env: Mapping[str, str] | None = None, input: str | None = None) -> Cli:
        """`cli("saga list", …)`, on this service and its backends."""
        return cli(*command.split(), self.app, *args, "--store", self.store, "--bus", self.bus, env=env, input=input)

    def do(self, work: Callable[[Connection], Awaitable[T]], *, worker: bool = True) -> T:
        async def run() -> T:
            options: dict[str, Any] = {"settings": QUICK} if worker else {}
            async with self.service.connect(store=self.store, bus=self.bus, worker=worker, **options) as connection:
                return await work(connection)

        return asyncio.run(run())

    def open(self, *numbers: int) -> None:
        """Opens tickets t<n>, and waits until the relay has published it all."""

        async def work(connection: Connection) -> None:
            for number in numbers:
                await connection.request(self.module.Open(ticket_id=f"t{number}", number=number), timeout_s=20)
            await published(connection)

        self.do(work)

    @contextmanager
    def working(self) -> Iterator[None]:
        """A worker in a thread of its own, while commands are called."""
        begun: Future[None] = Future()
        ending: list[Callable[[], Any]] = []

        async def run() -> None:
            end = asyncio.Event()
            ending.append(lambda: loop.call_soon_threadsafe(end.set))
            loop = asyncio.get_running_loop()
            async with self.service.connect(store=self.store, bus=self.bus, worker=True, settings=QUICK):
                begun.set_result(None)
                await end.wait()

        def thread() -> None:
            try:
                asyncio.run(run())
            except BaseException as error:
                if not begun.done():
                    begun.set_exception(error)
                raise

        running = threading.Thread(target=thread)
        running.start()
        try:
            begun.result(timeout=45)
            yield
        finally:
            for end in ending:
                end()
            running.join(timeout=40)


def cli(*args: str, env: Mapping[str, str] | None = None, input: str | None = None) -> Cli:
    result = CliRunner().invoke(program, list(args), env=env, input=input)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Cli(result.exit_code, result.stdout, result.stderr)


async def published(connection: Connection) -> None:
    async def done() -> bool:
        return await connection.store.leases.position("relay") >= await connection.store.head()

    await until(done)


async def settled(connection: Connection) -> None:
    """Everything is published, and this connection's worker has handled what that gave rise to."""
    worker = connection.worker
    assert worker is not None

    async def done() -> bool:
        head = await connection.store.head()
        idle = [await engine.caught_up() for engine in worker.engines]
        return (
            all(idle)
            and await connection.store.leases.position("relay") >= head
            and await connection.store.head() == head
        )

    await until(done)
    await until(done)  # what the relay put into a topic between the two looks above is handled as well


async def until(there: Callable[[], Awaitable[bool]], *, within_s: float = 45) -> None:
    async with asyncio.timeout(within_s):
        while True:
            if await there():
                return
            await asyncio.sleep(0.02)


async def dead_letters(connection: Connection, n: int) -> None:
    async def there() -> bool:
        return len(await connection.store.dead_letters()) >= n

    await until(there)
