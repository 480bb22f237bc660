"""`Store.reading`: one snapshot, no writing, nobody held up; on every store."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from eventstore.port import Store, Tx, Unit
from tests.eventstore.stores import append, commit


async def events(tx: Tx, table: str) -> int:
    return int((await tx.sql.execute(text(f"select count(*) from {table}"))).scalar_one())


@pytest.fixture
def table(backend: Any) -> str:
    """Of the stored events."""
    return {"sqlite": "foldbus_events", "postgres": "foldbus_shop.events"}[backend.name]


async def test_it_sees_one_snapshot_and_holds_up_no_writer(store: Store, table: str) -> None:
    await commit(store, Unit(appends=(append("o-1", 0, 2),)))
    async with store.reading() as tx:
        assert await events(tx, table) == 2
        async with asyncio.timeout(20):
            assert await commit(store, Unit(appends=(append("o-1", 2, 3),))) == ["ok"]
        assert await events(tx, table) == 2
    async with store.reading() as tx, store.reading() as another:
        assert await events(tx, table) == await events(another, table) == 5


async def test_what_writes_in_it_fails_and_the_next_one_reads_on(store: Store, table: str) -> None:
    await commit(store, Unit(appends=(append("o-1", 0, 1),)))

    async def scribble() -> None:
        async with store.reading() as tx:
            await tx.sql.execute(text(f"delete from {table}"))

    for _ in range(2):
        with pytest.raises(DBAPIError):
            await scribble()
    async with store.reading() as tx:
        assert await events(tx, table) == 1


async def test_a_statement_that_is_wrong_raises_what_the_driver_says(store: Store) -> None:
    async def ask() -> None:
        async with store.reading() as tx:
            await tx.sql.execute(text("select no_such_column"))

    with pytest.raises(DBAPIError):
        await ask()


async def test_one_that_is_cancelled_leaves_the_store_as_it_was(store: Store, table: str) -> None:
    entered = asyncio.Event()

    async def read() -> None:
        async with store.reading() as tx:
            await events(tx, table)
            entered.set()
            await asyncio.Event().wait()

    reader = asyncio.create_task(read())
    async with asyncio.timeout(20):
        await entered.wait()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert await commit(store, Unit(appends=(append("o-1", 0, 1),))) == ["ok"]
    async with store.reading() as tx:
        assert await events(tx, table) == 1
