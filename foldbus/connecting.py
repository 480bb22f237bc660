"""Opening a service's store and bus, making or checking its topics, and closing all of it in order."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from bus.metrics import MemoryMetrics, Metrics
from bus.seams import Clock, Failpoint, Ids, NoFailpoints, SystemClock, Uuid7Ids
from bus.topics import apply, validate
from bus.transport import PollSettings
from foldbus.backends import BusUrl, StoreUrl, open_store, open_transport, refuse_plaintext
from foldbus.connection import Connection
from foldbus.retention import check as check_claims

if TYPE_CHECKING:
    from foldbus.service import Service


@asynccontextmanager
async def connect(
    service: Service,
    *,
    store: str,
    bus: str,
    worker: bool = False,
    migrate: bool | None = None,
    apply_topics: bool | None = None,
    clock: Clock | None = None,
    ids: Ids | None = None,
    metrics: Metrics | None = None,
    failpoint: Failpoint | None = None,
    strict: bool = False,
    **options: Any,
) -> AsyncGenerator[Connection]:
    """See `Service.connect`."""
    from foldbus.worker import Worker

    at, through = StoreUrl.parse(store), BusUrl.parse(bus)  # before the bus makes its file
    poll: PollSettings | None = options.pop("poll", None)
    if strict:
        refuse_plaintext(at, through, poll.extra if poll else {})
    clock, ids, metrics = clock or SystemClock(), ids or Uuid7Ids(), metrics or MemoryMetrics()
    async with AsyncExitStack() as stack:
        transport = await stack.enter_async_context(
            open_transport(
                bus,
                clock=clock,
                metrics=metrics,
                settings=poll,
                client_id=f"foldbus-{service.name}",
            )
        )
        if apply_topics or (apply_topics is None and through.embedded):
            await apply(transport.admin, service.topics, service.expected_topics)
        else:
            await validate(transport.admin, service.topics, service.expected_topics)
        if worker:
            await check_claims(service, transport.admin)
        opened = await stack.enter_async_context(
            open_store(store, service.name, clock=clock, ids=ids, metrics=metrics, migrate=migrate)
        )
        connection = Connection(
            service, store=opened, transport=transport, clock=clock, ids=ids, metrics=metrics,
            failpoint=failpoint or NoFailpoints(), bus=through.shown,
        )  # fmt: skip
        stack.push_async_callback(connection.publisher.close)
        stack.push_async_callback(connection.inbox.close)
        stack.push_async_callback(connection.close_snapshots)
        stack.push_async_callback(connection.resources.close)
        if worker:
            connection.worker = Worker(connection, **options)
            await stack.enter_async_context(connection.worker.running())
        yield connection


__all__ = ["connect"]
