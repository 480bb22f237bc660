"""Ours, as a user has it: pydantic events, a decider's fold over a frozen dataclass, the store with its defaults."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import UUID

from benchmarks.peers.serving import POOL, TEXT, serve
from bus.envelope import Envelope, Origin
from bus.seams import SystemClock, Uuid7Ids
from eventstore.following import read_log
from eventstore.port import Append, Unit, Verdict
from eventstore.postgres import PostgresStore
from eventstore.repository import Repository
from foldbus import Command, Decider, Event, Key, Service


class Noted(Event, type="bench.noted.v1"):
    note_id: Key[str]
    n: int
    text: str


class Note(Command[Noted], type="bench.note.v1"):
    note_id: Key[str]
    n: int
    text: str


@dataclass(frozen=True, slots=True)
class Notes:
    count: int = 0
    total: int = 0


def evolve(notes: Notes, event: Noted) -> Notes:
    return Notes(notes.count + 1, notes.total + event.n)


def decide(notes: Notes, command: Note) -> Sequence[Noted]:
    return [Noted(note_id=command.note_id, n=command.n, text=command.text)]


notes = Decider("note", initial=Notes(), evolve=evolve, decide=decide)


class Foldbus:
    def __init__(self, store: PostgresStore) -> None:
        self._store = store
        self._clock, self._ids = SystemClock(), Uuid7Ids()
        self._codec = Service("bench", deciders=[notes]).codec
        self._repository = Repository(notes, store=store, codec=self._codec)

    def _event(self, key: str) -> Envelope:
        id = self._ids.new()
        event = Noted(note_id=key, n=0, text=TEXT)
        return self._codec.encode(event, Origin("bench", id, self._clock.now(), id), topic="bench.events")

    async def append(self, key: UUID) -> None:
        await self.append_many(key, 0, 1)

    async def append_many(self, key: UUID, after: int, count: int) -> None:
        events = tuple(self._event(str(key)) for _ in range(count))
        (outcome,) = await self._store.commit([Unit(appends=(Append(notes.stream(key), after, events),))])
        assert outcome.verdict is Verdict.COMMITTED

    async def load(self, key: UUID) -> int:
        state = (await self._repository.load(key)).state
        return state.count + state.total

    async def read_all(self) -> int:
        found, decode = 0, self._codec.decode
        async for record in read_log(self._store, upto=await self._store.head()):
            event = decode(record)
            assert type(event) is Noted
            found += 1 + event.n
        return found


@asynccontextmanager
async def opening(dsn: str) -> AsyncIterator[Foldbus]:
    await PostgresStore.migrate(dsn, service="bench")
    async with PostgresStore.open(dsn, service="bench", pool_size=POOL) as store:
        yield Foldbus(store)


if __name__ == "__main__":
    serve(opening)
