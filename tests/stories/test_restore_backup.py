"""A database is lost, and comes back from a backup that is older than what others have seen of it.

Goal: what docs/operations.md tells to do is enough. Method: a service works, is backed up, works on, loses its store,
is restored, and its epoch is raised; the bus stays. The service then asks for the messages that the backup does not
know (watermarks), and a read model elsewhere takes what it publishes although the positions are ones it has seen.
"""

# Without `from __future__ import annotations`: the services are made per test, of classes that only exist in there.
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from pydantic import BaseModel
from sqlalchemy import make_url

from foldbus import Command, Connection, Decider, Event, Key, Service, projection
from foldbus.backends import raise_epoch
from foldbus.verifying import verify_store
from tests.stories.pairs import Pair, eventually, unique


class Row(BaseModel, frozen=True):
    ns: list[int] = []


class Story:
    def __init__(self) -> None:
        name = unique("counter")

        class Added(Event, type=f"{name}.added.v1"):
            counter: Key[str]
            n: int

        class Add(Command[Added], type=f"{name}.add.v1"):
            counter: Key[str]
            n: int

        def evolve(seen: Row, event: Added) -> Row:
            return Row(ns=[*seen.ns, event.n])

        def decide(seen: Row, command: Add) -> list[Added]:
            return [Added(counter=command.counter, n=command.n)]

        @projection("own", version=1)
        def own(row: Row | None, event: Added) -> Row | None:
            return Row(ns=[*(row.ns if row else []), event.n])

        @projection("foreign", version=1)
        def foreign(row: Row | None, event: Added) -> Row | None:
            return Row(ns=[*(row.ns if row else []), event.n])

        self.add: Any = Add
        self.own, self.foreign = own, foreign
        self.counters = Service(
            name,
            deciders=[Decider("counter", initial=Row(), evolve=evolve, decide=decide)],
            projections=[own],
            partitions=2,
        )
        self.watcher = Service(unique("watcher"), projections=[foreign])


async def work(pair: Pair, story: Story, ns: range, *, own: list[int], foreign: list[int]) -> None:
    """Adds these and waits until both read models show what they should."""
    async with pair.connect(story.counters) as counters, pair.connect(story.watcher) as watcher:
        for n in ns:
            await counters.send(story.add(counter="a", n=n))

        async def shown() -> tuple[list[int], list[int]]:
            return await seen(counters, story.own), await seen(watcher, story.foreign)

        await eventually(shown, lambda found: found == (own, foreign), timeout_s=40)
        assert await counters.store.dead_letters() == []
        assert await watcher.store.dead_letters() == []


async def seen(connection: Connection, of: Any) -> list[int]:
    row: Any = await connection.view(of).get("a")
    return row.ns if row else []


Restore = Callable[[], Awaitable[None]]


async def back_up_files(store: str, service: str, to: Path) -> Restore:
    file = Path(store.removeprefix("sqlite:")) / f"{service}.db"
    copy = to / "backup.db"
    with closing(sqlite3.connect(file)) as live, closing(sqlite3.connect(copy)) as backup:
        live.backup(backup)

    async def restore() -> None:
        for extra in ("-wal", "-shm"):
            Path(f"{file}{extra}").unlink(missing_ok=True)
        file.write_bytes(copy.read_bytes())

    return restore


async def back_up_database(store: str, service: str, to: Path) -> Restore:
    """The server's own copy of a whole database, as pg_dump and pg_restore make one."""
    url = make_url(store)
    name, copy = url.database, f"{url.database}_backup"
    admin = url.set(drivername="postgresql", database="postgres").render_as_string(hide_password=False)

    async def run(*statements: str) -> None:
        db: Any = await asyncpg.connect(admin)
        for statement in statements:
            await db.execute(statement)
        await db.close()

    await run(f'create database "{copy}" template "{name}"')

    async def restore() -> None:
        await run(f'drop database "{name}" with (force)', f'alter database "{copy}" rename to "{name}"')

    return restore


BACK_UP = {"embedded": back_up_files, "servers": back_up_database}


@pytest.mark.timeout(180)
async def test_a_service_whose_database_was_restored_goes_on_and_so_do_its_readers(pair: Pair, tmp_path: Path) -> None:
    story = Story()
    first, second = list(range(5)), list(range(5, 10))
    await work(pair, story, range(5), own=first, foreign=first)
    elsewhere = Elsewhere(pair, story)
    restore = await BACK_UP[pair.name](pair.store, story.counters.name, tmp_path)
    await work(pair, story, range(5, 10), own=first + second, foreign=first + second)
    await elsewhere.keep()
    await restore()
    await elsewhere.bring_back()
    assert await raise_epoch(pair.store, story.counters.name) == 1
    # The commands that the backup does not know are asked for again; what they lead to is new to who reads it.
    await work(pair, story, range(0), own=first + second, foreign=first + second + second)
    await work(pair, story, range(10, 11), own=[*first, *second, 10], foreign=[*first, *second, *second, 10])
    verified = await verify_store(pair.store, story.counters.name, service=story.counters, full=True)
    assert verified.damages == ()


class Elsewhere:
    """The watcher's read model is not lost. On the servers it shares a database with what is: it is put back."""

    def __init__(self, pair: Pair, story: Story) -> None:
        self._pair, self._service = pair, story.watcher.name
        self._rows: dict[str, list[Any]] = {}

    async def keep(self) -> None:
        if self._pair.name == "servers":
            db: Any = await asyncpg.connect(self._pair.store)
            schema = f"foldbus_{self._service.replace('-', '_')}"
            for table in ("projection_foreign_g1", "projection_checkpoints"):
                self._rows[table] = await db.fetch(f"select * from {schema}.{table}")
            await db.close()

    async def bring_back(self) -> None:
        if self._pair.name == "servers":
            db: Any = await asyncpg.connect(self._pair.store)
            schema = f"foldbus_{self._service.replace('-', '_')}"
            for table, rows in self._rows.items():
                await db.execute(f"delete from {schema}.{table}")
                await db.copy_records_to_table(table, records=[tuple(row) for row in rows], schema_name=schema)
            await db.close()
