"""A database is lost, and comes back from a backup that is older than what others have seen of it.

Goal: what docs/operations.md tells to do is enough. Method: a service is backed up in the middle of its work (by
pg_dump, or by SQLite's own backup), works on, loses its store, is restored, and its epoch is raised; the bus stays. The
service then asks for the messages that the backup does not know (watermarks), and a read model elsewhere takes what it
publishes although the positions are ones it has seen, but not once more what the backup knows.
"""

# Without `from __future__ import annotations`: the services are made per test, of classes that only exist in there.
import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from pydantic import BaseModel

from foldbus import Command, Connection, Decider, Event, Key, Service, projection
from foldbus.backends import raise_epoch
from foldbus.verifying import verify_store
from tests.servers.clients import run_client
from tests.stories.pairs import Pair, eventually, unique

Restore = Callable[[], Awaitable[None]]


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
        self.decider: Any = Decider("counter", initial=Row(), evolve=evolve, decide=decide)
        self.counters = Service(
            name,
            deciders=[self.decider],
            projections=[own],
            partitions=2,
        )
        self.watcher = Service(unique("watcher"), projections=[foreign])


async def work(pair: Pair, story: Story, ns: Iterable[int], *, own: list[int], foreign: list[int]) -> None:
    """Adds these and waits until both read models show what they should."""
    async with pair.connect(story.counters) as counters, pair.connect(story.watcher) as watcher:
        for n in ns:
            await counters.send(story.add(counter="a", n=n))
        await shown(story, counters, watcher, own=own, foreign=foreign)


async def work_while(pair: Pair, story: Story, backing_up: Coroutine[Any, Any, Restore]) -> tuple[Restore, list[int]]:
    """Adds one after the other for as long as the backup takes, and some that it cannot know; answers them."""
    ns: list[int] = []
    async with pair.connect(story.counters) as counters, pair.connect(story.watcher) as watcher:
        backup = asyncio.create_task(backing_up)
        after = 0
        while after < 5:
            after += backup.done()
            ns.append(5 + len(ns))
            await counters.send(story.add(counter="a", n=ns[-1]))
        both = [*range(5), *ns]
        await shown(story, counters, watcher, own=both, foreign=both)
    return backup.result(), ns


async def shown(story: Story, counters: Connection, watcher: Connection, *, own: list[int], foreign: list[int]) -> None:
    async def look() -> tuple[list[int], list[int]]:
        return await seen(counters, story.own), await seen(watcher, story.foreign)

    await eventually(look, lambda found: found == (own, foreign))
    assert await counters.store.dead_letters() == []
    assert await watcher.store.dead_letters() == []


async def seen(connection: Connection, of: Any) -> list[int]:
    row: Any = await connection.view(of).get("a")
    return row.ns if row else []


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
    """All of it, with pg_dump, and back into a new database of that name."""
    name, file = urlsplit(store).path.removeprefix("/"), to / "backup.dump"
    dumped = await asyncio.to_thread(run_client, "pg_dump", "--format=custom", dsn=store)
    file.write_bytes(dumped)

    async def restore() -> None:
        db: Any = await asyncpg.connect(urlunsplit(urlsplit(store)._replace(path="/postgres")))
        await db.execute(f'drop database "{name}" with (force)')
        await db.execute(f'create database "{name}" template template0')
        await db.close()
        await asyncio.to_thread(
            run_client, "pg_restore", "--exit-on-error", "--single-transaction", dsn=store, given=file.read_bytes()
        )

    return restore


BACK_UP = {"embedded": back_up_files, "servers": back_up_database}


@pytest.mark.timeout(180)
async def test_a_service_whose_database_was_restored_goes_on_and_so_do_its_readers(pair: Pair, tmp_path: Path) -> None:
    story = Story()
    first = list(range(5))
    await work(pair, story, first, own=first, foreign=first)
    elsewhere = Elsewhere(pair, story)
    backing_up = BACK_UP[pair.name](pair.store, story.counters.name, tmp_path)
    restore, ns = await work_while(pair, story, backing_up)
    before = [*first, *ns]
    await elsewhere.keep()
    await restore()
    await elsewhere.bring_back()
    assert await raise_epoch(pair.store, story.counters.name) == 1
    known = await added(pair, story)
    assert known == before[: len(known)]
    assert len(first) <= len(known) <= len(before) - 4  # the last ones were sent when the backup was done
    lost = before[len(known) :]
    # The commands that the backup does not know are asked for again; what they lead to is new to who reads it.
    await work(pair, story, [], own=before, foreign=before + lost)
    await work(pair, story, [1000], own=[*before, 1000], foreign=[*before, *lost, 1000])
    verified = await verify_store(pair.store, story.counters.name, service=story.counters, full=True)
    assert verified.damages == ()


async def added(pair: Pair, story: Story) -> list[int]:
    """What the log holds, without a worker."""
    async with pair.connect(story.counters, worker=False) as counters:
        found = await counters.load(story.decider, "a")
        return list(found.state.ns)


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
