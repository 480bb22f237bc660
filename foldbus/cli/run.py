"""`foldbus run`: a worker, until SIGTERM or SIGINT; then it drains and ends."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from typing import Annotated

import typer

from bus.seams import KillAt, NoFailpoints
from foldbus.cli.loading import AppArgument, BadSettings, BusOption, StoreOption, load_service, settings
from foldbus.cli.logs import hear_drivers, log_to_stderr
from foldbus.cli.running import WRONG
from foldbus.process import tune
from foldbus.service import Service
from foldbus.settings import Settings

log = logging.getLogger("foldbus.cli")


def add_to(app: typer.Typer) -> None:
    app.command("run")(run)


def run(
    service: AppArgument,
    store: StoreOption = None,
    bus: BusOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only warnings and worse")] = False,
) -> None:
    """Runs a service: its handlers, its sagas, its relay and its projections, until SIGTERM or SIGINT. Then it finishes
    what it has in hand and exits 0; a second signal cuts that short. Exits 1 when a part failed for good."""
    log_to_stderr(quiet=quiet)
    tune()
    failure = asyncio.run(_run(load_service(service), settings(store, bus)))
    if failure is not None:
        print(f"foldbus: a part of the worker failed for good: {type(failure).__name__}: {failure}", file=sys.stderr)
        raise SystemExit(WRONG)


async def _run(service: Service, chosen: Settings) -> BaseException | None:
    """What made a part fail for good; None when it was asked to stop."""
    stopping = asyncio.Event()
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    ready, asked = False, False

    def stop() -> None:
        nonlocal asked
        if ready and not asked:
            stopping.set()
        else:  # nothing is in hand yet, or it takes too long
            task.cancel()
        asked = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    failed: BaseException | None = None
    try:
        async with service.connect(
            store=chosen.store,
            bus=chosen.bus,
            worker=True,
            apply_topics=True if chosen.topics == "apply" else None,
            failpoint=_failpoint(chosen),
            poll=chosen.poll(),
            settings=chosen.worker(),
        ) as connection:
            worker = connection.worker
            assert worker is not None
            worker.ended.add_done_callback(lambda _: stopping.set())
            ready = True
            hear_drivers()
            log.info("ready: %s reads %s", service.name, ", ".join(sorted(_topics(service))) or "its own log")
            await stopping.wait()
            if worker.ended.done():
                failed = worker.ended.exception()
            else:
                log.info("stopping %s", service.name)
    except asyncio.CancelledError:
        if not asked:
            raise
        log.warning("stopped %s without waiting for what was in hand", service.name)
    except Exception as error:
        if failed is None or error is not failed:
            raise
    return failed


def _topics(service: Service) -> set[str]:
    return {topic for topics in service.groups.values() for topic in topics} | set(service.foreign_topics)


def _failpoint(chosen: Settings) -> KillAt | NoFailpoints:
    try:
        return KillAt(chosen.failpoint) if chosen.failpoint else NoFailpoints()
    except ValueError as error:
        raise BadSettings(f"FOLDBUS_FAILPOINT: {error}") from error
