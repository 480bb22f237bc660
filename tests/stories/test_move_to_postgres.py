"""The shop moves from SQLite to PostgreSQL in the middle of its business, and sells on as if nothing had happened.

Goal: everything that a store holds is moved, whatever it is for: sagas half done, timers, commands not published yet,
answers to be given again. Method: the shop is stopped with orders under way, each service's store is exported and
imported by the commands that docs/operations.md shows, the bus stays. What the shop sold in the end equals a plain pass
over the purchases, and its own verifier finds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

import pytest

from bus.metrics import MemoryMetrics
from foldbus import Service
from foldbus.backends import migrate_store
from foldbus.moving import export_store, import_store
from shop import orders, warehouse
from shop.crash import SteadyWorkers
from shop.demo import SERVICES
from shop.messages import PlaceOrder
from shop.outcome import compare_insights, count_shop
from shop.purchases import FILE, Purchase, plain_pass, read_purchases
from shop.verify import verify
from tests.stories.pairs import eventually

PURCHASES = 240


async def sell(
    store: str,
    bus: str,
    purchases: list[Purchase],
    *,
    ended: int = 0,
    placed: int = 0,
    services: Sequence[Service] = SERVICES,
) -> None:
    """Places these orders, and stops the shop once so many are placed and so many over, whatever is under way."""
    workers = SteadyWorkers(services, store, bus, MemoryMetrics())
    async with workers.running(), orders.app.connect(store=store, bus=bus) as client:
        for one in purchases:
            command = PlaceOrder(
                order_id=one.purchase_id, customer_id=one.customer_id, quantity=one.quantity, cents=one.cents
            )
            await client.send(command, id=uuid5(NAMESPACE_URL, one.purchase_id))

        async def far() -> bool:
            workers.check()
            found = await count_shop(store, bus)
            return found.placed >= placed and found.completed + found.cancelled >= ended

        await eventually(far, lambda reached: reached, timeout_s=120)
        if ended == PURCHASES:
            account = await verify(store, bus, journal=None, wait_s=90)
            assert account.findings.found == {}


@pytest.mark.timeout(400)
async def test_the_shop_moves_to_postgresql_and_back_with_orders_under_way(tmp_path: Path, database: str) -> None:
    purchases = [one for one in read_purchases(FILE, limit=PURCHASES) if isinstance(one, Purchase)]
    assert len(purchases) == PURCHASES
    sqlite, bus = f"sqlite:{tmp_path}/shop", f"embedded:{tmp_path}/shop"
    for service in SERVICES:
        await migrate_store(sqlite, service.name)
    await sell(sqlite, bus, purchases[:100], ended=20)
    closed = [service for service in SERVICES if service is not warehouse.app]
    await sell(sqlite, bus, purchases[100:120], placed=120, services=closed)  # the last ones wait for the warehouse
    under_way = (await count_shop(sqlite, bus)).placed
    before = await count_shop(sqlite, bus)
    assert before.completed + before.cancelled < under_way, "nothing was under way when the shop was stopped"
    for service in SERVICES:
        file = tmp_path / f"{service.name}.jsonl"
        await export_store(sqlite, service.name, file)
        await import_store(database, service.name, file)
        again = tmp_path / f"{service.name}-again.jsonl"
        await export_store(database, service.name, again)
        assert again.read_bytes() == file.read_bytes()
    await sell(database, bus, purchases[120:200], ended=140)
    back = f"sqlite:{tmp_path}/back"
    for service in SERVICES:
        file = tmp_path / f"{service.name}-back.jsonl"
        await export_store(database, service.name, file)
        await import_store(back, service.name, file)
    await sell(back, bus, purchases[200:], ended=PURCHASES)
    expected, customers = plain_pass(iter(purchases))
    shop = await count_shop(back, bus)
    assert shop == expected
    assert await compare_insights(back, bus, customers, shop) == []
