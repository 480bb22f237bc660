"""What `pg_dump` takes along and `pg_restore` brings back, and the ways in which a store comes back wrong."""

from __future__ import annotations

from collections.abc import Iterator
from subprocess import CalledProcessError

import pytest

from eventstore.errors import SchemaMismatch
from eventstore.port import Unit
from eventstore.postgres import PostgresStore, schema
from eventstore.verify import verify
from tests.eventstore.moving import live, postgres_place
from tests.eventstore.stores import append, commit
from tests.eventstore.test_migrations import catalog
from tests.servers.clients import run_client
from tests.servers.postgres import new_database

RESTORE = ("--exit-on-error", "--single-transaction")


@pytest.fixture
def other(postgres: str) -> Iterator[str]:
    with new_database(postgres) as dsn:
        yield dsn


async def filled(dsn: str) -> None:
    """Its log is the second one of the database."""
    await PostgresStore.migrate(dsn, service="before")
    await PostgresStore.migrate(dsn, service="shop")
    async with PostgresStore.open(dsn, service="shop") as store:
        await live(store)


async def test_a_dump_brings_back_the_same_store(database: str, other: str) -> None:
    await filled(database)
    run_client("pg_restore", *RESTORE, dsn=other, given=run_client("pg_dump", "--format=custom", dsn=database))
    assert await catalog(other) == await catalog(database)
    there = postgres_place(other)
    assert await there.export() == await postgres_place(database).export()
    async with there.source() as source:
        assert await verify(source, documents=True) == []
    async with there.store() as store:
        head = await store.head()
        assert await commit(store, Unit(appends=(append("after", 0),))) == ["ok"]
        assert await store.head() == head + 1


async def test_a_dump_is_not_restored_over_another_log(database: str, other: str) -> None:
    """Both have a number 1: one transaction, so nothing of the dump stays."""
    await filled(database)
    await PostgresStore.migrate(other, service="taken")
    dumped = run_client("pg_dump", "--format=custom", dsn=database)
    with pytest.raises(CalledProcessError, match="pg_restore") as failed:
        run_client("pg_restore", *RESTORE, dsn=other, given=dumped)
    assert b"already exists" in failed.value.stderr
    assert await schema.current(other, service="shop") is None
    async with PostgresStore.open(other, service="taken") as store:
        assert await commit(store, Unit(appends=(append("o-1", 0),))) == ["ok"]


@pytest.mark.parametrize(
    ("taken", "said"),
    [
        ((), r'relation "foldbus\.logs" does not exist'),
        (("taken",), r"log number 2, foldbus\.logs says None.*dump and restore of the whole database"),
        (("taken", "taken-too", "shop"), r"log number 2, foldbus\.logs says 3.*dump and restore of the whole database"),
    ],
    ids=["nobody", "others", "itself"],
)
async def test_a_schema_that_was_dumped_alone_is_refused(
    database: str, other: str, taken: tuple[str, ...], said: str
) -> None:
    """foldbus.logs, which gives out the numbers of logs, did not come along; or knows the schema by another number."""
    await filled(database)
    for service in taken:
        await PostgresStore.migrate(other, service=service)
    run_client("psql", "--command", "drop schema if exists foldbus_shop cascade", dsn=other)
    dumped = run_client("pg_dump", "--format=custom", "--schema=foldbus_shop", dsn=database)
    run_client("pg_restore", *RESTORE, dsn=other, given=dumped)
    with pytest.raises(SchemaMismatch, match=said):
        async with PostgresStore.open(other, service="shop"):
            pass
