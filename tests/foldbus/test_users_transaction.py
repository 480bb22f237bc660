"""`unit(tx=…)`: events and messages written in the transaction of an application with an SQLAlchemy session."""

# Without `from __future__ import annotations`: services are made per test, of classes that only exist in there.
import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
import pytest_asyncio
from pydantic import BaseModel
from sqlalchemy import Column, Integer, MetaData, String, Table, event, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from bus.envelope import Kind, StreamId
from foldbus import Command, Connection, Decider, Event, Key, Service, WrongExpectedVersion
from foldbus.transactions import BadTransaction
from tests.eventstore.stores import whole_log
from tests.stories.pairs import Pair, eventually, unique

tables = MetaData()
customers = Table("customers", tables, Column("id", String, primary_key=True), Column("visits", Integer))


class Town(BaseModel, frozen=True):
    name: str = ""


class App:
    """An application that had a database before it had events."""

    def __init__(self) -> None:
        name = unique("app")

        class Moved(Event, type=f"{name}.moved.v1"):
            customer: Key[str]
            town: str

        class Told(Event, type=f"{name}.told.v1"):
            customer: Key[str]

        class Tell(Command[None], type=f"{name}.tell.v1"):
            customer: Key[str]

        def evolve(town: Town, event: Moved) -> Town:
            return Town(name=event.town)

        def decide(town: Town, command: Tell) -> list[Moved]:
            return [Moved(customer=command.customer, town="told")]

        self.moved: Any = Moved
        self.told: Any = Told
        self.tell: Any = Tell
        self.customers = Decider("customer", initial=Town(), evolve=evolve, decide=decide)
        self.service = Service(name, deciders=[self.customers], messages=[Told], partitions=1)


@pytest.fixture
def app() -> App:
    return App()


@pytest_asyncio.fixture
async def connection(pair: Pair, app: App) -> AsyncIterator[Connection]:
    async with pair.connect(app.service, worker=False) as connection:
        yield connection


@pytest_asyncio.fixture
async def engine(pair: Pair, app: App, connection: Connection) -> AsyncIterator[AsyncEngine]:
    """The application's own, on the same database; on SQLite with the usual recipe against the driver's late BEGIN."""
    if pair.name == "embedded":
        path = f"{pair.store.removeprefix('sqlite:')}/{app.service.name}.db"
        engine = create_async_engine(f"sqlite+aiosqlite:///{path}", connect_args={"timeout": 10})
        event.listen(engine.sync_engine, "connect", lambda driver, _: setattr(driver, "isolation_level", None))
        event.listen(engine.sync_engine, "begin", lambda sql: sql.exec_driver_sql("BEGIN IMMEDIATE"))
    else:
        engine = create_async_engine(pair.store.replace("postgresql://", "postgresql+asyncpg://"))
    async with engine.begin() as sql:
        await sql.run_sync(tables.create_all)
    yield engine
    await engine.dispose()


async def rows(engine: AsyncEngine) -> list[tuple[str, int]]:
    async with engine.connect() as sql:
        return [tuple(row) for row in await sql.execute(select(customers).order_by(customers.c.id))]


async def log(connection: Connection) -> list[str]:
    return [f"{one.kind}:{one.key}" for one in await whole_log(connection.store)]


async def visit(connection: Connection, app: App, session: AsyncSession, expected: int = 0) -> None:
    await session.execute(insert(customers).values(id="c", visits=1))
    async with connection.unit(tx=session) as unit:
        unit.append(app.customers, app.moved(customer="c", town="Ulm"), expected=expected)
        unit.publish(app.told(customer="d"))
        unit.send(app.tell(customer="e"))


async def test_a_session_commits_its_rows_with_events_and_messages(
    connection: Connection, app: App, engine: AsyncEngine
) -> None:
    async with AsyncSession(engine) as session:
        await visit(connection, app, session)
        assert await log(connection) == [], "it has not been committed yet"
        await session.commit()
    assert await rows(engine) == [("c", 1)]
    found = await whole_log(connection.store)
    assert [(one.kind, one.key, one.stream) for one in found] == [
        (Kind.EVENT, "c", StreamId("customer", "c")),
        (Kind.EVENT, "d", None),
        (Kind.COMMAND, "e", None),
    ]
    assert found[0].version == 1


async def test_a_rollback_takes_all_of_it_back(connection: Connection, app: App, engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        await visit(connection, app, session)
        await session.rollback()
    assert await rows(engine) == []
    assert await log(connection) == []


async def test_a_stale_version_raises_and_writes_nothing_of_the_unit(
    connection: Connection, app: App, engine: AsyncEngine
) -> None:
    async with connection.unit() as unit:
        unit.append(app.customers, app.moved(customer="c", town="Bonn"), expected=0)
    async with AsyncSession(engine) as session:
        with pytest.raises(WrongExpectedVersion, match="at version 1, not the expected 0"):
            await visit(connection, app, session)
        await session.commit()
    assert await rows(engine) == [("c", 1)], "the session is the application's: what it does then is up to it"
    assert await log(connection) == ["event:c"]


async def test_an_error_within_the_unit_stages_nothing(connection: Connection, app: App, engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        with suppress(ZeroDivisionError):
            async with connection.unit(tx=session) as unit:
                unit.publish(app.told(customer=str(1 // 0)))
        await session.commit()
    assert await log(connection) == []


async def test_a_savepoint_that_is_rolled_back_takes_its_unit_along(
    connection: Connection, app: App, engine: AsyncEngine
) -> None:
    async with AsyncSession(engine) as session:
        async with connection.unit(tx=session) as unit:
            unit.publish(app.told(customer="kept"))
        nested = await session.begin_nested()
        async with connection.unit(tx=session) as unit:
            unit.publish(app.told(customer="lost"))
        await nested.rollback()
        await session.commit()
    assert await log(connection) == ["event:kept"]


async def test_a_connection_does_as_well(connection: Connection, app: App, engine: AsyncEngine) -> None:
    async with engine.begin() as sql:
        await sql.execute(insert(customers).values(id="c", visits=2))
        async with connection.unit(tx=sql) as unit:
            unit.publish(app.told(customer="d"))
    assert await rows(engine) == [("c", 2)]
    assert await log(connection) == ["event:d"]


async def test_what_is_no_transaction_is_refused(connection: Connection, app: App) -> None:
    nothing: Any = object()
    with pytest.raises(BadTransaction, match="wanted an SQLAlchemy AsyncSession or AsyncConnection"):
        async with connection.unit(tx=nothing) as unit:
            unit.publish(app.told(customer="d"))
    assert await log(connection) == []


async def test_a_reader_in_the_same_process_is_woken_by_the_sessions_commit(
    connection: Connection, app: App, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its being told the reader would look after the poll's pause, which is made longer than the test."""
    monkeypatch.setattr("eventstore.postgres.feed._POLL_S", 60.0)
    monkeypatch.setattr("eventstore.postgres.feed._POLL_LISTENING_S", 60.0)
    monkeypatch.setattr("bus.ticks.Pace.next_look", lambda _, now: now + 60.0)
    async with AsyncSession(engine) as session:
        reader = asyncio.create_task(connection.store.wait_past(0, timeout_s=60))
        await asyncio.sleep(0)
        await visit(connection, app, session)
        await session.commit()
    async with asyncio.timeout(20):
        await reader
    assert await connection.store.head() > 0


async def test_what_was_staged_is_published_by_a_worker(pair: Pair, app: App, engine: AsyncEngine) -> None:
    async with pair.connect(app.service) as working:
        async with AsyncSession(engine) as session:
            await visit(working, app, session)
            await session.commit()
        (topic,) = [spec.name for spec in app.service.topics if spec.name.endswith(".events")]
        async with pair.transport() as transport, transport.tail(topic, start={0: 0}) as consumer:
            seen: list[str] = []

            async def look() -> list[str]:
                seen.extend(
                    str(one.key, "utf-8") for one in await consumer.poll(max_records=10, timeout_s=0.2) if one.key
                )
                return seen

            await eventually(look, lambda keys: set(keys) >= {"c", "d", "e"})
