"""A small shop for the projections' tests: events, folds, rows, and how to put a workshop together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from pydantic import BaseModel

from bus.cloudevents import to_record
from bus.codec import JsonCodec
from bus.envelope import Envelope, Origin, StreamId
from bus.messages import Event, Key
from bus.metrics import MemoryMetrics
from bus.registry import Registry
from bus.seams import SystemClock, Uuid7Ids
from bus.transport import Ack, Outgoing, Transport
from eventstore.port import ANY, Append, Unit, Verdict
from projections import Feed, Projection, ProjectionSettings, Rows, Workshop, open_feed, projection, rows_for

SERVICE = "shop"
IDS = Uuid7Ids()
CLOCK = SystemClock()
SETTINGS = ProjectionSettings(page=50, poll_s=0.2, hold_s=20.0, lease_ttl_s=30.0, backoff_s=0.02, backoff_max_s=0.2)
"""Whoever stands still for some seconds loses neither lease nor hold by it."""


class Placed(Event, type="shop.placed.v1"):
    order_id: Key[str]
    customer_id: str
    cents: int = 1


class Closed(Event, type="shop.closed.v1"):
    order_id: Key[str]
    customer_id: str


class Unrelated(Event, type="shop.unrelated.v1"):
    order_id: Key[str]


class Moved(Event, type="stock.moved.v1"):
    sku: Key[str]
    customer_id: str
    amount: int = 1


class LegacySeen(Event, type="legacy.seen.v1", topic="legacy.customers"):
    customer_id: Key[str]


class Customer(BaseModel, frozen=True):
    customer_id: str
    placed: int = 0
    cents: int = 0
    trail: tuple[str, ...] = ()
    """Every event folded, in order: what was folded twice, or never, shows."""


def by_customer(event: Any) -> str:
    return str(event.customer_id)


def _added(row: Customer | None, event: Any, cents: int, mark: str) -> Customer:
    row = row or Customer(customer_id=event.customer_id)
    return row.model_copy(update={"placed": row.placed + 1, "cents": row.cents + cents, "trail": (*row.trail, mark)})


def _sorted(row: Customer) -> Customer:
    """Partitions have no order among them: a fold of several must not depend on one."""
    return row.model_copy(update={"trail": tuple(sorted(row.trail))})


POISON_CENTS = 666
"""The fold of an event with so many raises; a test that mends the code patches this."""


@projection("customers", version=1, key=by_customer)
def customers(row: Customer | None, event: Placed | Closed) -> Customer | None:
    match event:
        case Placed(cents=cents):
            if cents == POISON_CENTS:
                raise ValueError("this event is poison")
            return _added(row, event, cents, event.order_id)
        case Closed():
            return None


@projection("customers", version=2, key=by_customer)
def customers_v2(row: Customer | None, event: Placed) -> Customer | None:
    return _added(row, event, event.cents * 100, event.order_id)


@projection("stock-moves", version=1, key=by_customer)
def stock_moves(row: Customer | None, event: Moved) -> Customer | None:
    return _sorted(_added(row, event, event.amount, f"{event.sku}/{event.amount}"))


@projection("both", version=1, key=by_customer)
def both(row: Customer | None, event: Placed | Moved) -> Customer | None:
    return _sorted(_added(row, event, 1, event.key))


REGISTRY = Registry([Placed, Closed, Unrelated, Moved, LegacySeen])
CODEC = JsonCodec(REGISTRY)


def envelope(event: Event, *, source: str = SERVICE, **changes: Any) -> Envelope:
    id = IDS.new()
    return replace(CODEC.encode(event, Origin(source, id, CLOCK.now(), id)), **changes)


async def append(store: Any, *events: Event) -> int:
    """To the own log, one unit; answers its last position."""
    appends = tuple(Append(StreamId("order", event.key), ANY, (envelope(event),)) for event in events)
    position = 0
    for one in appends:
        (outcome,) = await store.commit([Unit(appends=(one,))])
        assert outcome.verdict is Verdict.COMMITTED
        position = outcome.position
    return position


async def append_many(store: Any, events: list[Event]) -> None:
    """In few large units: one stream per key, in order."""
    for start in range(0, len(events), 500):
        streams: dict[str, list[Envelope]] = {}
        for event in events[start : start + 500]:
            streams.setdefault(event.key, []).append(envelope(event))
        appends = tuple(Append(StreamId("order", key), ANY, tuple(found)) for key, found in streams.items())
        (outcome,) = await store.commit([Unit(appends=appends)])
        assert outcome.verdict is Verdict.COMMITTED


async def publish(
    transport: Transport, topic: str, event: Event, *, partition: int | None = None, **changes: Any
) -> Ack:
    record = to_record(envelope(event, source="stock", topic=topic, **changes))
    return await publish_raw(transport, replace(record, partition=partition))


async def publish_raw(transport: Transport, record: Outgoing) -> Ack:
    (answer,) = await transport.publish([record])
    assert isinstance(answer, Ack), answer
    return answer


def workshop(
    store: Any,
    of: Projection[Customer] = customers,
    *,
    transport: Transport | None = None,
    metrics: MemoryMetrics | None = None,
    settings: ProjectionSettings = SETTINGS,
    rows: Rows[Customer] | None = None,
    **more: Any,
) -> Workshop[Customer]:
    found = metrics or MemoryMetrics()

    @asynccontextmanager
    async def feed() -> AsyncIterator[Feed]:
        async with open_feed(
            of, service=SERVICE, store=store, transport=transport, registry=REGISTRY, clock=CLOCK, metrics=found
        ) as opened:
            yield opened

    return Workshop(
        projection=of,
        store=store,
        rows=rows or rows_for(store, of),
        open_feed=feed,
        codec=CODEC,
        metrics=found,
        settings=settings,
        **more,
    )


async def eventually(what: Callable[[], Awaitable[bool]], *, within_s: float = 40.0) -> None:
    until = CLOCK.monotonic() + within_s
    while not await what():
        assert CLOCK.monotonic() < until, "it never came true"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def running(*runners: Any) -> AsyncIterator[None]:
    """The runners as tasks; one that ends by itself fails the test."""
    tasks = [asyncio.create_task(runner.run()) for runner in runners]
    try:
        yield
        for task in tasks:
            assert not task.done(), task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def all_rows(rows: Rows[Customer]) -> dict[str, Customer]:
    return dict((await rows.snapshot()).rows)
