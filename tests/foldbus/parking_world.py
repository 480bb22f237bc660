"""A service whose messages fail when a test says so, and ledgers of what it did: rows without a unique key, so that
doubles and inversions show."""

# Without `from __future__ import annotations`: services are made per test, of classes that only exist in there.
from collections.abc import AsyncGenerator, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from pydantic import BaseModel
from sqlalchemy import BigInteger, Column, Integer, MetaData, String, Table, insert, select

from bus.metrics import MemoryMetrics
from bus.seams import SystemClock, Uuid7Ids
from eventstore.parking import ParkedKey
from eventstore.port import DeadLetter, LetterWhere, Store, Unit
from foldbus import Command, Connection, Context, Decider, Event, Handler, Key, SagaRun, Service, saga
from foldbus.parking import ParkSettings
from tests.eventstore.stores import whole_log
from tests.stories.pairs import QUICK, Pair, eventually, unique

ids = Uuid7Ids()
tables = MetaData()
booked = Table(
    "booked",
    tables,
    Column("at", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("name", String, nullable=False),
    Column("n", Integer, nullable=False),
)

PATIENT = replace(QUICK, parking=ParkSettings(base_s=0.05, max_s=0.2, total_s=3600.0, lease_s=2.0))
"""Parks whatever fails for as long as the test lasts."""
BRIEF = replace(QUICK, parking=ParkSettings(base_s=0.02, max_s=0.1, total_s=3.0, lease_s=2.0))
"""What was parked has had its time soon."""
LIMITED = replace(QUICK, parking=ParkSettings(base_s=0.02, max_s=0.1, total_s=30.0, lease_s=2.0))
"""What was parked has had its time when a test says so: its clock goes ahead by `total_s`."""


class AheadClock(SystemClock):
    """The system's, so many seconds ahead."""

    ahead_s = 0.0

    def now(self) -> datetime:
        return super().now() + timedelta(seconds=self.ahead_s)


Fails = Callable[[str, int], bool]


@dataclass
class Faults:
    """Which (name, n) fail: when decided, when booked, when a saga is fed."""

    decide: Fails = lambda name, n: False
    book: Fails = lambda name, n: False
    feed: Fails = lambda name, n: False
    tried: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    """Every call of `book`, the failed ones too."""

    def clear(self) -> None:
        self.decide = self.book = self.feed = lambda name, n: False


@dataclass
class World:
    service: Service
    faults: Faults
    classes: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.classes[name]

    @property
    def booker(self) -> str:
        return f"{self.service.name}.handler.book"


def world(*, hold: Collection[str] = (), sagas: bool = False, booking: bool = True, book_s: float = 50.0) -> World:
    """`note` decides, `book` is a subscription to what was decided, and may take `book_s`. `hold` names of: commands,
    book, replies."""
    name = unique("desk")
    faults = Faults()

    class Noted(Event, type=f"{name}.noted.v1"):
        name: Key[str]
        n: int

    class Erased(Event, type=f"{name}.erased.v1"):
        name: Key[str]
        n: int

    class Note(Command[Noted], type=f"{name}.note.v1"):
        name: Key[str]
        n: int

    class Erase(Command[Erased], type=f"{name}.erase.v1"):
        name: Key[str]
        n: int

    class Elsewhere(Command[None], type=f"{name}-other.do.v1"):
        name: Key[str]

    class Notes(BaseModel, frozen=True):
        many: int = 0

    def evolve(notes: Notes, event: Noted | Erased) -> Notes:
        return Notes(many=notes.many + 1)

    def decide(notes: Notes, command: Note | Erase) -> list[Noted | Erased]:
        if faults.decide(command.name, command.n):
            raise RuntimeError(f"cannot note {command.name} {command.n}")
        if isinstance(command, Note):
            return [Noted(name=command.name, n=command.n)]
        return [Erased(name=command.name, n=command.n)]

    async def book(event: Noted, ctx: Context) -> None:
        faults.tried.append((event.name, event.n))
        sql = await ctx.sql()
        await sql.execute(insert(booked).values(name=event.name, n=event.n))
        if faults.book(event.name, event.n):
            raise RuntimeError(f"cannot book {event.name} {event.n}")

    @saga("ask", version=1)
    async def ask(run: SagaRun, noted: Noted) -> None:
        if noted.n < 0:
            await run.step(Elsewhere(name=noted.name), timeout_s=0.2)

    notes = Decider("notes", initial=Notes(), evolve=evolve, decide=decide)
    its: Any = {"book": book, "commands": "commands", "replies": "replies"}
    service = Service(
        name,
        deciders=[notes],
        handlers=[Handler(book, timeout_s=book_s)] if booking else [],
        sagas=[ask] if sagas else [],
        hold=[its[one] for one in hold],
        partitions=4,
    )
    classes = {one.__name__: one for one in (Noted, Erased, Note, Erase, Elsewhere)}
    return World(service, faults, {**classes, "notes": notes})


@asynccontextmanager
async def running(pair: Pair, its: World, settings: Any = PATIENT, **options: Any) -> AsyncGenerator[Connection]:
    async with pair.connect(its.service, worker=False) as made:
        async with made.store.transaction() as tx:
            await tx.sql.run_sync(tables.create_all)
    async with pair.connect(its.service, settings=settings, **options) as connection:
        yield connection


async def send(connection: Connection, its: World, pairs: Iterable[tuple[str, int]]) -> None:
    """Through the outbox, in this order."""
    async with connection.unit() as unit:
        for name, n in pairs:
            unit.send(its.Note(name=name, n=n))


async def told(connection: Connection, its: World, pairs: Iterable[tuple[str, int]]) -> None:
    """Events for the booking alone, in this order."""
    async with connection.unit() as unit:
        for name, n in pairs:
            unit.publish(its.Noted(name=name, n=n))


async def ledger(connection: Connection) -> dict[str, list[int]]:
    """What was booked, per name in the order of booking."""
    async with connection.store.transaction() as tx:
        rows = await tx.sql.execute(select(booked.c.name, booked.c.n).order_by(booked.c.at))
    found: dict[str, list[int]] = {}
    for name, n in rows:
        found.setdefault(name, []).append(n)
    return found


async def decided(connection: Connection, its: World) -> dict[str, list[int]]:
    """What was noted, per name in the order of its stream."""
    found: dict[str, list[int]] = {}
    for record in await whole_log(connection.store, outgoing=False):
        if record.type == str(its.Noted.type_name) and record.stream is not None:
            event: Any = its.service.codec.decode(record)
            found.setdefault(event.key, []).append(event.n)
    return found


async def parked(store: Store, n: int, **where: Any) -> list[ParkedKey]:
    """Once `n` keys are."""

    async def look() -> list[ParkedKey]:
        return list(await store.parking.keys(limit=1000, **where))

    return await eventually(look, lambda found: len(found) == n)


async def tried(store: Store, n: int) -> None:
    """Once the head of the only parked key has been tried `n` times."""

    async def look() -> list[int]:
        return [one.head.failure.attempts for one in await store.parking.keys() if one.head.failure is not None]

    await eventually(look, lambda found: len(found) == 1 and found[0] >= n)


async def waiting(store: Store, n: int) -> list[ParkedKey]:
    """Once `n` messages wait, of all keys."""

    async def look() -> list[ParkedKey]:
        return list(await store.parking.keys(limit=1000))

    return await eventually(look, lambda found: sum(one.waiting for one in found) == n)


async def letters(store: Store, n: int) -> list[DeadLetter]:
    """Once there are `n` open ones."""

    async def look() -> list[DeadLetter]:
        return [one.letter for one in await store.letters.page(LetterWhere())]

    return await eventually(look, lambda found: len(found) == n)


async def committed(connection: Connection) -> None:
    """What this worker has handled or set aside is committed to its groups."""
    worker = connection.worker
    assert worker is not None

    async def look() -> bool:
        return all([await engine.caught_up() for engine in worker.engines])

    await eventually(look, bool)


def metrics_of(connection: Connection) -> MemoryMetrics:
    assert isinstance(connection.metrics, MemoryMetrics)
    return connection.metrics


__all__ = [
    "BRIEF",
    "LIMITED",
    "PATIENT",
    "AheadClock",
    "Faults",
    "Unit",
    "World",
    "committed",
    "decided",
    "ids",
    "ledger",
    "letters",
    "metrics_of",
    "parked",
    "running",
    "send",
    "told",
    "tried",
    "waiting",
    "world",
]
