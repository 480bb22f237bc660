"""`eventsource-py`: its PostgreSQLEventStore over SQLAlchemy and asyncpg, and a DeciderAggregate."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from eventsource import (
    AggregateRepository,
    DeciderAggregate,
    DomainEvent,
    EventRegistry,
    ExpectedVersion,
    FeedReadOptions,
    PostgreSQLEventStore,
    StreamId,
    create_async_engine,
)
from pydantic import BaseModel

from benchmarks.peers.serving import PAGE, POOL, TEXT, serve


class Noted(DomainEvent):
    aggregate_type: str = "Notes"
    note_id: str
    n: int
    text: str


class State(BaseModel, frozen=True):
    count: int = 0
    total: int = 0


class Notes(DeciderAggregate[State]):
    aggregate_type = "Notes"

    @staticmethod
    def initial_state() -> State:
        return State()

    @staticmethod
    def decide(command: Any, state: State) -> list[DomainEvent]:
        return []

    @staticmethod
    def evolve(state: State, event: DomainEvent) -> State:
        assert isinstance(event, Noted)
        return State(count=state.count + 1, total=state.total + event.n)


class EventsourcePy:
    def __init__(self, store: PostgreSQLEventStore) -> None:
        self._store = store
        self._notes = AggregateRepository(store, Notes)

    async def append(self, key: UUID) -> None:
        await self.append_many(key, 0, 1)

    async def append_many(self, key: UUID, after: int, count: int) -> None:
        events = [
            Noted(aggregate_id=key, aggregate_version=version, note_id=str(key), n=0, text=TEXT)
            for version in range(after + 1, after + count + 1)
        ]
        await self._store.append(StreamId(key, "Notes"), events, ExpectedVersion.exact(after))

    async def load(self, key: UUID) -> int:
        state = (await self._notes.load(key)).state
        return state.count + state.total

    async def read_all(self) -> int:
        after, found = None, 0
        while True:
            last = after
            async for one in self._store.read_all(after, FeedReadOptions(limit=PAGE)):
                assert isinstance(one.event, Noted)
                found += 1 + one.event.n
                last = one.position
            if last is after:
                return found
            after = last


@asynccontextmanager
async def opening(dsn: str) -> AsyncIterator[EventsourcePy]:
    url = dsn.replace("postgresql://", "postgresql+asyncpg://")
    engine = create_async_engine(url, pool_size=POOL, max_overflow=0, pool_timeout=120)
    store = PostgreSQLEventStore(engine, EventRegistry([Noted]), create_schema=True, owns_engine=True)
    async with store:
        await store.current_position()  # makes the schema
        yield EventsourcePy(store)


if __name__ == "__main__":
    serve(opening)
