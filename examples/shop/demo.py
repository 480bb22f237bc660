"""The demo: real purchases through all four services, then every figure beside what a plain pass over the file says.

`foldbus demo` calls `run`. The services run in one process by default; with `crash=True` each is a process of its own
that is killed with SIGKILL again and again, and the figures must be the same.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from uuid import NAMESPACE_URL, UUID, uuid5

from bus.cloudevents import from_record
from bus.seams import SystemClock
from bus.topics import apply
from eventstore.port import Where
from foldbus import Connection, FoldbusError, MemoryMetrics, OutcomeUnknown, Service, TransportUnavailable
from foldbus.backends import directory_of, migrate_store, open_transport, without_password
from foldbus.progress import Progress
from sagas.events import SagaCompensated, SagaCompleted
from shop import insights, orders, payments, warehouse
from shop.crash import Crashes, SteadyWorkers, Workers
from shop.journal import Journal, What
from shop.messages import OrderCancelled, OrderCompleted, PlaceOrder
from shop.outcome import compare_insights, count_shop, rebuild_insights, undone_order
from shop.purchases import FILE, BadRow, Figures, Purchase, plain_pass, read_purchases
from shop.verify import verify

SERVICES: tuple[Service, ...] = (orders.app, payments.app, warehouse.app, insights.app)
_ORDERS = uuid5(NAMESPACE_URL, "foldbus:shop:orders")
_MARK = "made-by-foldbus-demo"
_SAGA_ENDS = Where(types=frozenset((SagaCompleted.type_name, SagaCompensated.type_name)))
_ENDINGS = frozenset((str(OrderCompleted.type_name), str(OrderCancelled.type_name)))


@dataclass(frozen=True, slots=True)
class Options:
    purchases: Path = FILE
    limit: int | None = 1000
    store: str | None = None
    bus: str | None = None
    directory: Path = Path(".foldbus/demo")
    open_max: int = 500
    crash: bool = False
    seed: int | None = None
    patience_s: float = 120.0
    """How long nothing may move before the demo gives up."""
    journal: Path | None = None
    """Where the buyers write down what they know, for `verify`."""
    verify: bool = False
    """Check every invariant once all is sold, while the workers still run."""


@dataclass(slots=True)
class Report:
    """What happened. `ok`: the shop's figures, the insights and the rebuilt insights all equal the plain pass, and no
    invariant that was checked is broken."""

    shop: Figures
    expected: Figures
    bad_rows: list[BadRow]
    seconds: float
    differing: list[str] = field(default_factory=list[str])
    differing_rebuilt: list[str] = field(default_factory=list[str])
    findings: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    undone: list[str] = field(default_factory=list[str])
    store: str = ""
    bus: str = ""
    """Where it was sold, without passwords."""
    kills: int = 0
    seed: int | None = None
    counters: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def ok(self) -> bool:
        return self.shop == self.expected and not self.differing and not self.differing_rebuilt and not self.findings

    @property
    def per_second(self) -> float:
        return self.expected.placed / self.seconds if self.seconds else 0.0


class DemoFailed(FoldbusError):
    """The demo could not be run to its end; the message says what was found."""


async def run(options: Options, progress: Progress) -> Report:
    """The whole demo. Raises DemoFailed when nothing moves any more, or when the backends hold something already."""
    bad_rows: list[BadRow] = []
    purchases: list[Purchase] = []
    for row in read_purchases(options.purchases, limit=options.limit):
        if isinstance(row, BadRow):
            bad_rows.append(row)
            progress.note(f"{options.purchases.name} line {row.line}: {row.reason}; skipped")
        else:
            purchases.append(row)
    expected, customers = plain_pass(iter(purchases))
    store, bus = _backends(options)
    await _prepare(store, bus)
    report = Report(Figures(), expected, bad_rows, 0.0, store=without_password(store), bus=without_password(bus))
    metrics = MemoryMetrics()
    async with AsyncExitStack() as stack:
        workers: Workers
        if options.crash:
            report.seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
            workers = Crashes(SERVICES, store, bus, random.Random(report.seed))
        else:
            workers = SteadyWorkers(SERVICES, store, bus, metrics)
        await stack.enter_async_context(workers.running())
        client = await stack.enter_async_context(orders.app.connect(store=store, bus=bus, metrics=metrics))
        started = time.perf_counter()
        journal = stack.enter_context(Journal(options.journal)) if options.journal is not None else None
        await _Till(client, workers, options, progress, journal).sell(purchases)
        workers.calm()
        await _wait_for_insights(store, bus, expected.placed, workers, options, progress)
        await _wait_for_sagas(store, bus, expected.placed, workers, options, progress)
        report.seconds = time.perf_counter() - started
        report.kills = workers.kills
        if options.verify:
            account = await verify(store, bus, journal=options.journal, wait_s=options.patience_s)
            report.findings = account.findings.found
        report.shop = await count_shop(store, bus)
        report.differing = await compare_insights(store, bus, customers, report.shop)
        report.undone = await undone_order(store, bus)
        await rebuild_insights(store, bus, progress)
        report.differing_rebuilt = await compare_insights(store, bus, customers, report.shop)
    report.counters = {name: metrics.total(name) for name in sorted({name for name, _ in metrics.counters})}
    return report


class _Till:
    """Places orders, with a bound on how many are open at once; an order is over when the orders' topic says so."""

    def __init__(
        self, client: Connection, workers: Workers, options: Options, progress: Progress, journal: Journal | None
    ) -> None:
        self._journal = journal
        self._client, self._workers, self._options, self._progress = client, workers, options, progress
        self._open: set[str] = set()
        self._ended: set[str] = set()
        self._room = asyncio.Semaphore(options.open_max)
        self._moved = time.monotonic()

    async def sell(self, purchases: Sequence[Purchase]) -> None:
        with self._progress.task("orders", len(purchases)):
            try:
                async with asyncio.TaskGroup() as group:
                    watch = group.create_task(self._watch(len(purchases)))
                    for purchase in purchases:
                        await self._room.acquire()
                        group.create_task(self._place(purchase))
                    await watch
            except* FoldbusError as errors:
                raise errors.exceptions[0] from None

    async def _place(self, purchase: Purchase) -> None:
        """The same id until it is known to be in the topic: a doubt costs a duplicate, never a second order."""
        self._open.add(purchase.purchase_id)
        command = PlaceOrder(
            order_id=purchase.purchase_id,
            customer_id=purchase.customer_id,
            quantity=purchase.quantity,
            cents=purchase.cents,
        )
        message_id: UUID = uuid5(_ORDERS, purchase.purchase_id)
        self._note("intent", message_id, purchase)
        while True:
            try:
                await self._client.send(command, id=message_id)
                return self._note("ack", message_id, purchase)
            except (OutcomeUnknown, TransportUnavailable) as error:
                self._note("unknown", message_id, purchase)
                self._progress.note(f"{purchase.purchase_id}: {error}; sent again")
                await asyncio.sleep(0.2)

    def _note(self, what: What, message_id: UUID, purchase: Purchase) -> None:
        if self._journal is not None:
            self._journal.write(what, message_id, purchase.purchase_id)

    async def _watch(self, total: int) -> None:
        async with self._client.transport.tail("orders.events", start="begin") as consumer:
            while len(self._ended) < total:
                self._workers.check()
                for delivery in await consumer.poll(max_records=1000, timeout_s=0.2):
                    envelope = from_record(delivery)
                    if envelope.type in _ENDINGS and envelope.key not in self._ended:
                        self._ended.add(envelope.key)
                        self._open.discard(envelope.key)
                        self._room.release()
                        self._moved = time.monotonic()
                        self._workers.moved()
                self._progress.at(len(self._ended), open=len(self._open), kills=self._workers.kills)
                if time.monotonic() - self._moved > self._options.patience_s:
                    raise DemoFailed(
                        f"nothing moved for {self._options.patience_s} s: {len(self._ended)} of {total} orders ended, "
                        f"open are {', '.join(sorted(self._open)[:5])}…"
                    )


def _backends(options: Options) -> tuple[str, str]:
    """The embedded ones begin empty: what an earlier demo made there is removed, and nothing else ever is."""
    directory = options.directory.absolute()
    if _lives_in(directory, options.store) or _lives_in(directory, options.bus):
        directory.mkdir(parents=True, exist_ok=True)
        _clear(directory)
        (directory / _MARK).touch()
    return options.store or f"sqlite:{directory}", options.bus or f"embedded:{directory}"


def _lives_in(directory: Path, url: str | None) -> bool:
    if url is None:
        return True
    return url.partition(":")[0] in ("sqlite", "embedded") and directory_of(url).absolute() == directory


def _clear(directory: Path) -> None:
    """Raises DemoFailed, removing nothing, when the directory is not a demo's or holds somebody's database."""
    if any(directory.iterdir()) and not (directory / _MARK).exists():
        raise DemoFailed(f"{directory} holds something that no demo made; wanted an empty directory")
    made = {"bus.db", *(f"{service.name}.db" for service in SERVICES)}
    others = sorted(path.name for path in directory.glob("*.db") if path.name not in made)
    if others:
        raise DemoFailed(
            f"{directory} holds {', '.join(others)}, which no demo made, and the demo begins on an empty bus; nothing "
            "was removed: move them elsewhere, or give the demo another directory with --directory"
        )
    for name in made:
        for part in (name, f"{name}-wal", f"{name}-shm"):
            (directory / part).unlink(missing_ok=True)


async def _prepare(store: str, bus: str) -> None:
    """Makes stores and topics, and makes sure that they are empty: the figures are of this run alone."""
    for service in SERVICES:
        await migrate_store(store, service.name)
    async with open_transport(bus, clock=SystemClock(), metrics=MemoryMetrics()) as transport:
        for service in SERVICES:
            await apply(transport.admin, service.topics)
            for spec in service.topics:
                offsets = await transport.admin.offsets(spec.name)
                if any(end > 0 for _, end in offsets.values()):
                    raise DemoFailed(f"topic {spec.name} holds records already; the demo wants a bus of its own")
    for service in SERVICES:
        async with service.connect(store=store, bus=bus) as connection:
            if await connection.store.head():
                raise DemoFailed(f"the store of {service.name} holds events already; the demo wants one of its own")


async def _wait_for_insights(
    store: str, bus: str, placed: int, workers: Workers, options: Options, progress: Progress
) -> None:
    """Until the read model has counted every order's beginning and end."""
    async with insights.app.connect(store=store, bus=bus) as connection:
        view = connection.view(insights.customers)

        async def counted() -> int:
            found = 0
            async for _, row in view.rows():
                found += row.placed + row.completed + sum(row.cancelled.values())
            return found

        with progress.task("insights", 2 * placed):
            await _wait_for(2 * placed, counted, "insights", workers, options, progress)


async def _wait_for_sagas(
    store: str, bus: str, placed: int, workers: Workers, options: Options, progress: Progress
) -> None:
    """Until every order's saga has ended: one that fails cancels its order first, and then undoes its steps."""
    async with orders.app.connect(store=store, bus=bus) as connection:
        after, ended = 0, 0

        async def counted() -> int:
            nonlocal after, ended
            while True:
                page = await connection.store.read_all(after=after, limit=1000, where=_SAGA_ENDS)
                ended += len(page.records)
                if page.upto == after:
                    return ended
                after = page.upto

        with progress.task("sagas", placed):
            await _wait_for(placed, counted, "sagas", workers, options, progress)


async def _wait_for(
    total: int, count: Callable[[], Awaitable[int]], what: str, workers: Workers, options: Options, progress: Progress
) -> None:
    moved, seen = time.monotonic(), -1
    while True:
        workers.check()
        counted = await count()
        progress.at(counted)
        if counted == total:
            return
        if counted != seen:
            moved, seen = time.monotonic(), counted
        if time.monotonic() - moved > options.patience_s:
            raise DemoFailed(f"the {what} stand still at {counted} of {total}")
        await asyncio.sleep(0.05)
