"""`foldbus run`: a worker, until SIGTERM or SIGINT; then it drains and ends."""

from __future__ import annotations

import asyncio
import signal
from typing import Annotated

import typer

from bus.seams import KillAt, NoFailpoints
from foldbus.cli.loading import AppArgument, BusOption, StoreOption, load_service, log_to_stderr, settings
from foldbus.process import tune
from foldbus.service import Service
from foldbus.settings import Settings


def add_to(app: typer.Typer) -> None:
    app.command("run")(run)


def run(
    service: AppArgument,
    store: StoreOption = None,
    bus: BusOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only warnings and worse")] = False,
) -> None:
    """Runs a service: its handlers, its sagas, its relay and its projections."""
    log_to_stderr(quiet=quiet)
    tune()
    asyncio.run(_run(load_service(service), settings(store, bus)))


async def _run(service: Service, chosen: Settings) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    async with service.connect(
        store=chosen.store,
        bus=chosen.bus,
        worker=True,
        apply_topics=True if chosen.topics == "apply" else None,
        failpoint=KillAt(chosen.failpoint) if chosen.failpoint else NoFailpoints(),
        poll=chosen.poll(),
    ) as connection:
        assert connection.worker is not None
        connection.worker.ended.add_done_callback(lambda _: stopping.set())
        await stopping.wait()
