"""`foldbus run`: a worker, until SIGTERM or SIGINT; then it drains and ends."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from contextlib import AsyncExitStack
from typing import Annotated

import typer

from bus.metrics import MemoryMetrics
from bus.seams import KillAt, NoFailpoints
from foldbus.cli.loading import AppArgument, BadSettings, BusOption, StoreOption, load_service, settings
from foldbus.cli.logs import hear_drivers, log_to_stderr
from foldbus.cli.running import WRONG, end_at_once
from foldbus.health_server import HealthServer
from foldbus.process import giving_memory_back, tune
from foldbus.service import Service
from foldbus.settings import Settings
from foldbus.worker import Worker

log = logging.getLogger("foldbus.cli")


def add_to(app: typer.Typer) -> None:
    app.command("run")(run)


def run(
    service: AppArgument,
    store: StoreOption = None,
    bus: BusOption = None,
    health_port: Annotated[
        int | None,
        typer.Option("--health-port", help="Answer /live, /ready and /metrics there (FOLDBUS_HEALTH_PORT)"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only warnings and worse")] = False,
) -> None:
    """Runs a service: its handlers, its sagas, its relay and its projections, until SIGTERM or SIGINT. Then it finishes
    what it has in hand and exits 0; a second signal ends it at once. Exits 1 when a part failed for good."""
    log_to_stderr(quiet=quiet)
    tune()
    chosen = settings(store, bus)
    if health_port is not None:
        chosen = chosen.model_copy(update={"health_port": health_port})
    failure = asyncio.run(_run(load_service(service), chosen))
    if failure is not None:
        print(f"foldbus: a part of the worker failed for good: {type(failure).__name__}: {failure}", file=sys.stderr)
        raise SystemExit(WRONG)


async def _run(service: Service, chosen: Settings) -> BaseException | None:
    """What made a part fail for good; None when it was asked to stop."""
    stopping = asyncio.Event()
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    ready, asked = False, False

    def stop(number: int) -> None:
        nonlocal asked
        if asked:
            log.warning("ends %s without waiting for what is in hand: it is handled after the next start", service.name)
            end_at_once(number)
        asked = True
        if ready:
            stopping.set()
        else:  # nothing is in hand yet
            task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    worker: Worker | None = None
    metrics = MemoryMetrics()
    try:
        async with AsyncExitStack() as stack:
            health = _health(service, chosen, metrics)
            if health is not None:
                stack.enter_context(health)
                log.info("health of %s: http://%s:%d/ready", service.name, chosen.health_host, health.port)
            connection = await stack.enter_async_context(
                service.connect(
                    store=chosen.store,
                    bus=chosen.bus,
                    worker=True,
                    apply_topics=True if chosen.topics == "apply" else None,
                    failpoint=_failpoint(chosen),
                    metrics=metrics,
                    poll=chosen.poll(),
                    settings=chosen.worker(),
                )
            )
            await stack.enter_async_context(giving_memory_back())
            worker = connection.worker
            if health is not None:
                health.worker = worker
            ready = True
            hear_drivers()
            log.info("ready: %s reads %s", service.name, ", ".join(sorted(_topics(service))) or "its own log")
            await stopping.wait()
            log.info("stopping %s", service.name)
    except asyncio.CancelledError:
        if not asked:
            raise
        log.warning("stopped %s before it was ready", service.name)
    except Exception as error:
        if worker is None or not worker.ended.done() or worker.ended.exception() is not error:
            raise
        return error
    return None


def _topics(service: Service) -> set[str]:
    return {topic for topics in service.groups.values() for topic in topics} | set(service.foreign_topics)


def _health(service: Service, chosen: Settings, metrics: MemoryMetrics) -> HealthServer | None:
    if chosen.health_port is None:
        return None
    return HealthServer(
        service.name,
        host=chosen.health_host,
        port=chosen.health_port,
        metrics=metrics,
        settings=chosen.worker().health,
    )


def _failpoint(chosen: Settings) -> KillAt | NoFailpoints:
    try:
        return KillAt(chosen.failpoint) if chosen.failpoint else NoFailpoints()
    except ValueError as error:
        raise BadSettings(f"FOLDBUS_FAILPOINT: {error}") from error
