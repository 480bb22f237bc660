"""What a filtered reading on PostgreSQL owes to the floor lock, and to the collation of names."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from eventstore.port import Unit, Where
from eventstore.postgres import PostgresStore
from tests.eventstore.stores import SERVICE, append, event, one, stream

WHERES = [Where(types=frozenset([event().type])), Where(stream=stream("slow")), Where(categories=frozenset(["order"]))]


@pytest.mark.parametrize("where", WHERES, ids=["type", "stream", "category"])
async def test_what_commits_before_the_watermark_is_taken_is_among_the_rows(
    database: str, where: Where, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forced: an appender that was first to draw a position commits after a reader has begun, and just before it takes
    the watermark. Were the rows read first, or in the watermark's own snapshot, its event would be passed for good."""
    await PostgresStore.migrate(database, service=SERVICE)
    async with (
        PostgresStore.open(database, service=SERVICE) as store,
        PostgresStore.open(database, service=SERVICE) as other,
    ):
        watermark: Any = store._watermark
        taken = watermark.fresh
        slow = other.transaction()
        tx = await slow.__aenter__()
        await other.commit([Unit(appends=(append("slow", 0),))], tx=tx)
        await one(store, Unit(appends=(append("quick", 0),)))

        async def commit_first() -> int:
            await slow.__aexit__(None, None, None)
            monkeypatch.setattr(watermark, "fresh", taken)
            safe: int = await taken()
            return safe

        monkeypatch.setattr(watermark, "fresh", commit_first)
        page = await store.read_all(after=0, limit=10, where=where)
        assert page.records[0].stream == stream("slow")
        assert page.upto == page.head == await store.head()


@pytest.mark.parametrize("where", WHERES, ids=["type", "stream", "category"])
async def test_what_commits_after_the_watermark_was_taken_is_left_for_the_next_page(
    database: str, where: Where, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forced: two draw positions and the later one commits between watermark and rows. Given away, it would take the
    checkpoint past the earlier one."""
    await PostgresStore.migrate(database, service=SERVICE)
    async with (
        PostgresStore.open(database, service=SERVICE) as store,
        PostgresStore.open(database, service=SERVICE) as other,
    ):
        await one(other, Unit(appends=(append("slow", 0),)))
        watermark: Any = store._watermark
        taken = watermark.fresh

        async def commit_afterwards() -> int:
            safe: int = await taken()
            await one(other, Unit(appends=(append("slow", 1),)))
            return safe

        monkeypatch.setattr(watermark, "fresh", commit_afterwards)
        page = await store.read_all(after=0, limit=10, where=where)
        assert [record.version for record in page.records] == [1]
        assert page.upto == page.head
        monkeypatch.setattr(watermark, "fresh", taken)
        page = await store.read_all(after=page.upto, limit=10, where=where)
        assert [record.version for record in page.records] == [2]


async def test_names_compare_by_their_bytes_whatever_the_servers_locale_is(database: str) -> None:
    """The list of streams comes in the order of the primary key, on every server the same."""
    await PostgresStore.migrate(database, service=SERVICE)
    db = await asyncpg.connect(database)
    try:
        found = await db.fetch(
            """select c.relname, a.attname, l.collname
                 from pg_attribute a join pg_class c on c.oid = a.attrelid join pg_collation l on l.oid = a.attcollation
                where c.relnamespace = $1::regnamespace and c.relkind = 'r'
                  and (c.relname, a.attname) in (('streams', 'category'), ('streams', 'id'), ('events', 'category'),
                                                 ('events', 'stream'), ('archived', 'category'), ('archived', 'stream'),
                                                 ('snapshots', 'category'), ('snapshots', 'id'))""",
            f"foldbus_{SERVICE}",
        )
    finally:
        await db.close()
    assert len(found) == 8
    assert {row["collname"] for row in found} == {"C"}
