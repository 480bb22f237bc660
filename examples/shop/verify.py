"""Checks the shop from outside: logs, topics and read models against each other, after whatever was done to it.

    python -m shop.verify --store URL --bus URL [--journal FILE] [--wait SECONDS] [--json]

A program of its own that shares nothing with what it checks but the ports' reading calls: records are decoded as plain
JSON and judged in `accounts.py`. It ends with 1 when something is wrong and says what, by invariant:

    I1  nothing lost           what was acknowledged is in the log; what is in the log is on its topic; no dead letters
    I2  one effect             of every command, and of every order in every service
    I3  order                  stream versions without hole; first deliveries in the log's order
    I4  sagas end              completed, compensated or parked; compensations are the done steps, reversed, once each
    I5  read model             every row equals the fold of the topic up to the row's checkpoint
    I6  nothing runs ahead     no checkpoint, watermark or offset beyond what is there, no offset beyond its watermark
    I7  rest                   within `--wait` seconds the outboxes are empty and every group is at its topic's end
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

from bus.envelope import Envelope
from bus.metrics import MemoryMetrics
from bus.seams import SystemClock, Uuid7Ids
from bus.transport import Delivery, Transport
from eventstore.port import Store
from foldbus.backends import open_store, open_transport
from projections import Snapshot, rows_for
from shop import insights
from shop.accounts import Account, Findings
from shop.journal import read_journal

SERVICES = ("orders", "payments", "warehouse", "insights")
GROUPS = (
    ("orders", "orders", "orders.commands"),
    ("payments", "payments", "payments.commands"),
    ("warehouse", "warehouse", "warehouse.commands"),
    ("orders", "orders.saga.fulfil-order", "orders.events"),
    ("orders", "orders.replies", "orders.replies"),
)
"""Service, consumer group, topic."""
TOPICS = (
    "orders.events", "payments.events", "warehouse.events",
    "orders.commands", "payments.commands", "warehouse.commands",
    "orders.replies",
)  # fmt: skip
"""The events' topics first."""
PAGE = 1000
STALLED_S = 10.0
"""How long a topic may give nothing before its end was reached."""


class Shop:
    """The four stores and the bus, opened to be read."""

    def __init__(self, stores: Mapping[str, Store], transport: Transport) -> None:
        self.stores, self.transport = stores, transport

    async def ends(self, topic: str) -> dict[int, int]:
        return {part: end for part, (_, end) in (await self.transport.admin.offsets(topic)).items()}

    async def places(self) -> list[int]:
        """Grows whenever anything happens anywhere."""
        heads = [await store.head() for store in self.stores.values()]
        return heads + [sum((await self.ends(topic)).values()) for topic in TOPICS]

    async def snapshot(self) -> Snapshot[insights.Customer]:
        rows = rows_for(self.stores["insights"], insights.customers, clock=SystemClock())
        await rows.serving()
        return await rows.snapshot()


async def verify(store: str, bus: str, *, journal: Path | None, wait_s: float) -> Account:
    """Reads everything. The shop may be running, but nobody may be buying."""
    clock, metrics = SystemClock(), MemoryMetrics()
    async with AsyncExitStack() as stack:
        transport = await stack.enter_async_context(open_transport(bus, clock=clock, metrics=metrics))
        stores = {
            name: await stack.enter_async_context(
                open_store(store, name, clock=clock, ids=Uuid7Ids(), metrics=metrics, migrate=False)
            )
            for name in SERVICES
        }
        shop = Shop(stores, transport)
        account = Account()
        for problem in await _rest(shop, wait_s):
            account.findings.add("I7", problem)
        await _nothing_ahead(shop, account.findings)
        snapshot = await shop.snapshot()
        for name in ("payments", "warehouse", "orders", "insights"):
            async for record in _log(stores[name]):
                account.logged(name, record)
            for letter in await stores[name].dead_letters(limit=100):
                why = f"{letter.failure.error}: {letter.failure.message}"
                account.findings.add("I1", f"{name} has a dead letter of {letter.consumer}: {letter.id}, {why:.300}")
            if any((await shop.ends(f"{name}.dlq")).values()):
                account.findings.add("I1", f"topic {name}.dlq holds dead letters")
        await asyncio.gather(*(_topic(shop, topic, account.delivered, account.findings) for topic in TOPICS[3:]))
        account.read_model_at({place: at.offset for place, at in snapshot.checkpoint.places.items()})
        await asyncio.gather(*(_topic(shop, topic, account.published, account.findings) for topic in TOPICS[:3]))
        account.read_model(
            {key: (row.placed, row.completed, row.cancelled, row.cds, row.cents) for key, row in snapshot.rows.items()}
        )
        if journal is not None:
            account.journal(read_journal(journal))
        account.close()
        return account


async def _log(store: Store) -> AsyncIterator[Envelope]:
    after = 0
    while True:
        page = await store.read_all(after=after, limit=PAGE)
        for record in page.records:
            yield record
        if page.upto == after:
            return
        after = page.upto


async def _topic(shop: Shop, topic: str, take: Callable[[Delivery], None], findings: Findings) -> None:
    """Every record up to the end that the topic has now, in order per partition."""
    missing = {part: end for part, end in (await shop.ends(topic)).items() if end > 0}
    if not missing:
        return
    async with shop.transport.tail(topic, start="begin") as consumer:
        moved = time.monotonic()
        while missing:
            for delivery in await consumer.poll(max_records=5 * PAGE, timeout_s=0.2):
                moved = time.monotonic()
                if delivery.offset < missing.get(delivery.partition, 0):
                    take(delivery)
                    if delivery.offset + 1 == missing[delivery.partition]:
                        del missing[delivery.partition]
            if time.monotonic() - moved > STALLED_S:
                findings.add("I1", f"{topic} gave nothing for {STALLED_S} s, short of {missing}")
                return


async def _rest(shop: Shop, wait_s: float) -> list[str]:
    """What is still under way when the time is up; nothing when the shop came to rest."""
    until = time.monotonic() + wait_s
    while True:
        before = await shop.places()
        left = await _under_way(shop)
        if not left and before == await shop.places():  # nothing slipped from where it was not looked at yet
            return []
        if time.monotonic() >= until:
            return left or ["records keep coming"]
        await asyncio.sleep(0.1)


async def _under_way(shop: Shop) -> list[str]:
    left: list[str] = []
    for name, store in shop.stores.items():
        relayed = await store.leases.position("relay")
        after = min(relayed, await store.head())  # one beyond its log is found elsewhere
        due = (await store.read_all(after=after, limit=PAGE, outgoing=True)).records
        unpublished = sum(record.topic is not None for record in due)
        if unpublished:
            left.append(f"the relay of {name} is at {relayed}: {unpublished} messages are not published")
    for service, group, topic in GROUPS:
        committed = await shop.transport.admin.committed(group, [topic])
        stored = await shop.stores[service].watermarks(group)
        for part, end in (await shop.ends(topic)).items():
            at = max(committed.get((topic, part), 0), stored.get((topic, part), 0))
            if at < end:
                left.append(f"group {group} is at {at} of {end} in {topic}[{part}]")
    checkpoint = (await shop.snapshot()).checkpoint
    for part, end in (await shop.ends("orders.events")).items():
        place = checkpoint.places.get(("orders.events", part))
        if (place.offset if place else 0) < end:
            left.append(f"the insights are at {place.offset if place else 0} of {end} in orders.events[{part}]")
    return left


async def _nothing_ahead(shop: Shop, findings: Findings) -> None:
    """What follows is read first, what it follows second: both only grow."""
    for service, group, topic in GROUPS:
        committed = await shop.transport.admin.committed(group, [topic])
        stored = await shop.stores[service].watermarks(group)
        ends = await shop.ends(topic)
        for (name, part), offset in committed.items():
            if offset > stored.get((name, part), 0):
                at = stored.get((name, part), 0)
                findings.add("I6", f"group {group} committed {offset} of {name}[{part}], its store knows of {at}")
        for (name, part), offset in stored.items():
            if offset > ends.get(part, 0):
                findings.add("I6", f"group {group} stored {offset} of {name}[{part}], which ends at {ends.get(part)}")
    for name, store in shop.stores.items():
        relayed, head = await store.leases.position("relay"), await store.head()
        if relayed > head:
            findings.add("I6", f"the relay of {name} is at {relayed}, its log ends at {head}")
    checkpoint, ends = (await shop.snapshot()).checkpoint, await shop.ends("orders.events")
    head = await shop.stores["orders"].head()
    for (topic, part), place in checkpoint.places.items():
        if place.offset > ends.get(part, 0) or place.position > head:
            end = ends.get(part)
            findings.add(
                "I6", f"the insights are at {place} of {topic}[{part}], which ends at {end}, the log at {head}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(prog="shop.verify", description="Checks the shop's logs, topics and read models.")
    parser.add_argument("--store", required=True)
    parser.add_argument("--bus", required=True)
    parser.add_argument("--journal", type=Path, help="what the buyers wrote down")
    parser.add_argument("--wait", type=float, default=10.0, metavar="SECONDS", help="until the shop must be at rest")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    started = time.perf_counter()
    account = asyncio.run(verify(chosen.store, chosen.bus, journal=chosen.journal, wait_s=chosen.wait))
    findings = account.findings
    if chosen.json:
        figures = dataclasses.asdict(account.figures())
        report = {"ok": findings.ok, "findings": findings.found, "figures": figures, "counts": account.counts()}
        print(json.dumps(report | {"seconds": round(time.perf_counter() - started, 3)}))
    else:
        print(", ".join(f"{n} {what}" for what, n in account.counts().items()))
        for rule, texts in sorted(findings.found.items()):
            for text in texts:
                print(f"{rule}: {text}")
            if findings.total[rule] > len(texts):
                print(f"{rule}: and {findings.total[rule] - len(texts)} more")
        print("all invariants hold" if findings.ok else f"{findings.total.total()} findings")
    return 0 if findings.ok else 1


if __name__ == "__main__":
    sys.exit(main())
