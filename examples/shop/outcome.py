"""What came out of a run of the shop: counted from the services' own logs and read models, not from what was sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping

from bus.envelope import Envelope
from eventstore.port import Store, Wanted
from foldbus import Connection
from foldbus.progress import Progress
from sagas import describe, saga_id, saga_stream, timeline
from shop import insights, orders, payments, warehouse
from shop.messages import (
    OrderCancelled,
    OrderCompleted,
    OrderPlaced,
    PaymentRefunded,
    PaymentTaken,
    StockReleased,
    StockReserved,
)
from shop.purchases import CustomerFigures, Figures

PAGE = 1000


async def log_of(store: Store) -> AsyncIterator[Envelope]:
    """Every event of a service, in order, a page in memory at a time."""
    after = 0
    while True:
        page = await store.read_all(after=after, limit=PAGE)
        for record in page.records:
            yield record
        if page.upto == after:
            return
        after = page.upto


async def count_shop(store: str, bus: str) -> Figures:
    """The shop's figures, from the logs of orders, payments and warehouse."""
    out = Figures()
    customers: set[str] = set()
    reasons: Counter[str] = Counter()
    async with orders.app.connect(store=store, bus=bus) as connection:
        async for record in log_of(connection.store):
            if not record.type.startswith("orders."):
                continue
            match orders.app.codec.decode(record):
                case OrderPlaced(customer_id=customer_id):
                    out.placed += 1
                    customers.add(customer_id)
                case OrderCompleted(quantity=quantity, cents=cents):
                    out.completed += 1
                    out.completed_cds += quantity
                    out.completed_cents += cents
                case OrderCancelled(reason=reason):
                    reasons[reason] += 1
                case _:
                    pass
    out.customers = len(customers)
    out.declined = reasons.pop("payments.card-declined", 0)
    out.too_large = reasons.pop("warehouse.parcel-too-large", 0)
    out.out_of_stock = reasons.pop("warehouse.out-of-stock", 0)
    out.other_reasons = sum(reasons.values())
    async with payments.app.connect(store=store, bus=bus) as connection:
        async for record in log_of(connection.store):
            match payments.app.codec.decode(record):
                case PaymentTaken(cents=cents):
                    out.taken_cents += cents
                case PaymentRefunded(cents=cents):
                    out.refunded_cents += cents
                case _:
                    pass
    async with warehouse.app.connect(store=store, bus=bus) as connection:
        async for record in log_of(connection.store):
            match warehouse.app.codec.decode(record):
                case StockReserved(quantity=quantity):
                    out.cds_left -= quantity
                case StockReleased(quantity=quantity):
                    out.cds_left += quantity
                case _:
                    pass
    return out


async def compare_insights(store: str, bus: str, expected: Mapping[str, CustomerFigures], shop: Figures) -> list[str]:
    """Customers whose row differs from the plain pass, and sums that differ from the shop's; empty when all agree."""
    differing: list[str] = []
    sums: Counter[str] = Counter()
    seen = 0
    async with insights.app.connect(store=store, bus=bus) as connection:
        async for key, row in connection.view(insights.customers).rows():
            seen += 1
            wanted = expected.get(key)
            found = (row.placed, row.completed, row.cancelled, row.cds, row.cents)
            if wanted is None or found != (
                wanted.placed, wanted.completed, dict(wanted.cancelled), wanted.cds, wanted.cents,
            ):  # fmt: skip
                differing.append(f"customer {key}: the insights have {found}, the plain pass {wanted}")
            sums.update(placed=row.placed, completed=row.completed, cds=row.cds, cents=row.cents)
            sums.update(cancelled=sum(row.cancelled.values()))
    if seen != len(expected):
        differing.append(f"the insights have {seen} customers, the plain pass {len(expected)}")
    for name, total in (
        ("placed", shop.placed),
        ("completed", shop.completed),
        ("cds", shop.completed_cds),
        ("cents", shop.completed_cents),
        ("cancelled", shop.cancelled),
    ):
        if sums[name] != total:
            differing.append(f"{name}: the insights sum up to {sums[name]}, the shop's logs to {total}")
    return differing


async def undone_order(store: str, bus: str) -> list[str]:
    """The timeline of one order that was undone (one that was paid first, if there is one); empty when none was."""
    async with orders.app.connect(store=store, bus=bus) as connection:
        found: OrderCancelled | None = None
        async for record in log_of(connection.store):
            if record.type == str(OrderCancelled.type_name):
                cancelled = orders.app.codec.decode(record)
                assert isinstance(cancelled, OrderCancelled)
                found = found or cancelled
                if cancelled.reason == "warehouse.parcel-too-large":
                    found = cancelled
                    break
        return [] if found is None else await _timeline(connection, found.order_id)


async def _timeline(connection: Connection, order_id: str) -> list[str]:
    (order,) = await connection.store.load([Wanted(orders.orders.stream(order_id))])
    name = orders.fulfil_order.name
    (saga,) = await connection.store.load([Wanted(saga_stream(name, saga_id(name, order.records[0].id)))])
    return timeline(describe(saga.records))


async def rebuild_insights(store: str, bus: str, progress: Progress) -> None:
    """Builds the customers anew, beside the rows that serve, and swaps."""
    async with insights.app.connect(store=store, bus=bus) as connection:
        with progress.task("rebuild", 0):
            async for step in connection.view(insights.customers).rebuild():
                progress.at(step.done, total=step.total)
