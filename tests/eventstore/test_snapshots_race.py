"""A snapshot that is being saved while its stream is truncated, on PostgreSQL, where the two can meet. (SQLite has one
writer at a time.)"""

from __future__ import annotations

import asyncio

import pytest

from eventstore.port import Snapshot, Unit
from tests.eventstore.stores import NOON, append, commit, postgres_backend, stream


async def test_a_save_that_waits_for_a_truncation_loses_to_it(request: pytest.FixtureRequest) -> None:
    """The save has looked at the snapshot before the truncation did, and is let go on after it: of another schema, it
    would replace the only state that is left of the deleted events."""
    backend = postgres_backend(request)
    await backend.migrate()
    async with backend.open() as store, backend.open() as other:
        assert await commit(store, Unit(appends=(append("o-1", 0, 6),))) == ["ok"]
        kept = Snapshot(stream("o-1"), 5, "s1", b"all that is left", NOON)
        await store.snapshots.save([kept])
        table = f"{store.schema}.snapshots"
        async with store.connection() as db:
            async with db.transaction():
                await db.execute(f"select from {table} for update")
                late = asyncio.create_task(other.snapshots.save([Snapshot(stream("o-1"), 3, "s2", b"late", NOON)]))
                dropped = asyncio.create_task(other.snapshots.drop(keep_schema="s2"))
                for _ in range(2_000):  # until both wait for the row
                    if await db.fetchval("select count(*) from pg_locks where not granted") == 2:
                        break
                    await asyncio.sleep(0.01)
                assert not late.done()
                assert not dropped.done()
                await db.execute(f"update {table} set truncated_upto = 4")
        assert (await late, await dropped) == (0, 0)
        assert list(await store.snapshots.page()) == [kept]
