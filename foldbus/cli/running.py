"""Running a command's coroutine: errors become one line and an exit code, signals end it in an orderly way."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, TypeVar

import typer.core

from bus.errors import FoldbusError
from bus.metrics import MemoryMetrics
from bus.seams import NoFailpoints, SystemClock, Uuid7Ids
from bus.transport import Transport
from eventstore.port import Store
from foldbus.backends import BusUrl, open_store, open_transport
from foldbus.cli.logs import keep_libraries_quiet
from foldbus.connection import Connection
from foldbus.service import Service
from foldbus.settings import Settings

T = TypeVar("T")

WRONG, UNUSABLE = 1, 2
"""Exit codes: the command found something wrong, or was stopped; wrong usage or surroundings."""


class Interrupted(FoldbusError):
    """SIGINT or SIGTERM ended the command before it was done."""


class Commands(typer.core.TyperGroup):
    """The root of all commands: an error of ours is one line on standard error, not a stack."""

    def invoke(self, ctx: Any) -> Any:
        keep_libraries_quiet()
        try:
            return super().invoke(ctx)
        except FoldbusError as error:
            print(f"foldbus: {error}", file=sys.stderr)
            raise SystemExit(WRONG if isinstance(error, Interrupted) else UNUSABLE) from None


def end_at_once(number: int) -> None:
    """As the signal would have ended a process that knows nothing of it. Nothing is waited for, and nothing needs to
    be: what is unfinished is what a crash leaves."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def finish(work: Coroutine[Any, Any, T], *, hint: str = "") -> T:
    """Runs a command to its end. The first SIGINT or SIGTERM cancels it: what it opened is closed, what it wrote stays,
    and Interrupted says `hint`. A second one kills."""

    async def run() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        interrupted = False

        def interrupt(number: int) -> None:
            nonlocal interrupted
            if interrupted:
                end_at_once(number)
            interrupted = True
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt, number)
        try:
            return await work
        except asyncio.CancelledError:
            if interrupted:
                raise Interrupted("interrupted" + (f"; {hint}" if hint else "")) from None
            raise
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    return asyncio.run(run())


@asynccontextmanager
async def store_of(service: Service, chosen: Settings) -> AsyncGenerator[Store]:
    """The service's store as it is: nothing is created or upgraded. Raises SchemaMismatch."""
    async with open_store(
        chosen.store, service.name, clock=SystemClock(), ids=Uuid7Ids(), metrics=MemoryMetrics(), migrate=False
    ) as store:
        yield store


@asynccontextmanager
async def transport_of(chosen: Settings) -> AsyncGenerator[Transport]:
    async with open_transport(
        chosen.bus, clock=SystemClock(), metrics=MemoryMetrics(), settings=chosen.poll(), client_id="foldbus-cli"
    ) as transport:
        yield transport


@asynccontextmanager
async def attached(service: Service, chosen: Settings) -> AsyncGenerator[Connection]:
    """Store and bus as they are, also when topics are missing or otherwise than declared."""
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(store_of(service, chosen))
        transport = await stack.enter_async_context(transport_of(chosen))
        connection = Connection(
            service, store=store, transport=transport, clock=SystemClock(), ids=Uuid7Ids(), metrics=MemoryMetrics(),
            failpoint=NoFailpoints(), bus=BusUrl.parse(chosen.bus).shown,
        )  # fmt: skip
        stack.push_async_callback(connection.publisher.close)
        stack.push_async_callback(connection.inbox.close)
        stack.push_async_callback(connection.close_snapshots)
        yield connection
