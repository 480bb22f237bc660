"""Schemas: upgraded by one of two at once, by hand, in pairs, and beside a user's own migrations.

Later migrations are made up here: an expansion, which the code before it must work on, and a contraction.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.ext.asyncio import create_async_engine

from eventstore import upgrading
from eventstore.errors import SchemaMismatch
from eventstore.port import Unit
from eventstore.postgres import PostgresStore, schema
from eventstore.sqlite import SqliteStore, migrations
from eventstore.upgrading import Migration, State
from tests.eventstore.stores import SERVICE, Backend, append, commit, whole_log
from tests.servers.clients import run_client
from tests.servers.postgres import new_database

EXPAND, CONTRACT, AFTER = "later_column", "no_more_column_contract", "again_later"


class Later:
    """Code that knows more migrations than today's; leaving it is deploying the old code again."""

    def __init__(self, backend: Backend, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._backend, self._directory, self._monkeypatch = backend, directory, monkeypatch
        self.first = max(one.number for one in self.known()) + 1

    def known(self) -> Sequence[Migration]:
        return migrations.known() if self._backend.name == "sqlite" else schema.known()

    def knows(self, *names: str) -> None:
        bodies = {
            EXPAND: "alter table {p}leases add column later bigint;",
            CONTRACT: "alter table {p}leases drop column later;",
            AFTER: "alter table {p}leases add column again bigint;",
        }
        if self._backend.name == "sqlite":
            plain = migrations.migrations()
            more = [
                (self.first + n, f"{self.first + n:04}_{name}.sql", bodies[name].format(p="foldbus_"))
                for n, name in enumerate(names)
            ]
            self._monkeypatch.setattr(migrations, "migrations", lambda: [*plain, *more])
            return
        directory = self._directory / "migrations"
        copied(schema.MIGRATIONS, directory)
        for n, name in enumerate(names):
            number = self.first + n
            directory.joinpath("versions", f"{number:04}_{name}.py").write_text(
                f"from alembic import context, op\nrevision = '{number:04}'\ndown_revision = '{number - 1:04}'\n"
                "def upgrade():\n"
                f"    op.execute({bodies[name].format(p='foldbus_shop.')!r})\n"
            )
        self._monkeypatch.setattr(schema, "MIGRATIONS", directory)

    def forgets(self) -> None:
        self._monkeypatch.undo()

    async def upgrade(self, *, contract: bool = False) -> None:
        if self._backend.name == "sqlite":
            await asyncio.to_thread(migrations.migrate, Path(self._backend.where), service=SERVICE, contract=contract)
        else:
            await schema.migrate(self._backend.where, service=SERVICE, contract=contract)

    async def look(self) -> upgrading.Look:
        if self._backend.name == "sqlite":
            return migrations.look(Path(self._backend.where))
        return await schema.look(self._backend.where, service=SERVICE)


def copied(source: Path, to: Path) -> None:
    for file in source.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            target = to / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(file.read_text())


@pytest.fixture
def later(backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Later:
    return Later(backend, tmp_path, monkeypatch)


# --- expand and contract ---------------------------------------------------------------------------------------------


async def test_code_works_on_after_the_next_code_has_expanded_the_schema(backend: Backend, later: Later) -> None:
    async with backend.open() as old:
        later.knows(EXPAND)
        await later.upgrade()
        later.forgets()
        assert await commit(old, Unit(appends=(append("o-1", 0),))) == ["ok"]  # it was open all along
    assert (await later.look()).state is State.NEWER
    async with backend.open() as started_anew:
        assert len(await whole_log(started_anew)) == 1
    await later.upgrade()  # by old code: leaves it alone
    assert (await later.look()).found == later.first


async def test_code_refuses_a_schema_that_was_contracted_behind_it(backend: Backend, later: Later) -> None:
    later.knows(EXPAND, CONTRACT)
    await later.upgrade()
    seen = await later.look()
    assert (seen.found, seen.state) == (later.first, State.UP_TO_DATE)
    assert [name.rpartition(".")[0][5:] for name in seen.contractions] == [CONTRACT]
    async with backend.open():
        pass  # it works before the contraction and after it
    await later.upgrade(contract=True)
    assert (await later.look()).found == later.first + 1
    async with backend.open():
        pass
    later.forgets()
    with pytest.raises(SchemaMismatch, match="run newer code"):
        async with backend.open():
            pass
    with pytest.raises(SchemaMismatch, match="run newer code"):
        await later.upgrade()
    assert (await later.look()).state is State.TOO_NEW


async def test_an_expansion_behind_a_contraction_waits_for_it(later: Later) -> None:
    later.knows(EXPAND, CONTRACT, AFTER)
    with pytest.raises(SchemaMismatch, match=f"{AFTER}.*after.*{CONTRACT}.*--contract"):
        await later.upgrade()
    assert (await later.look()).found == later.first - 1
    await later.upgrade(contract=True)
    assert (await later.look()).found == later.first + 2


async def test_an_old_schema_is_refused_and_never_upgraded_by_opening(backend: Backend, later: Later) -> None:
    later.knows(EXPAND)
    with pytest.raises(SchemaMismatch, match="foldbus db upgrade"):
        async with backend.open():
            pass
    seen = await later.look()
    assert (seen.found, seen.state) == (later.first - 1, State.BEHIND)


def test_the_migrations_of_both_databases_are_numbered_without_holes() -> None:
    for known in (migrations.known(), schema.known()):
        assert [one.number for one in sorted(known)] == list(range(1, len(known) + 1))
    assert max(schema.known()).number == int(schema.HEAD)


# --- two at once -----------------------------------------------------------------------------------------------------


async def test_two_that_upgrade_a_file_at_once_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second comes while the first is in the middle: it waits, and finds everything done."""
    path = tmp_path / "store.db"
    in_the_middle, go_on = threading.Event(), threading.Event()
    plain: Callable[..., Any] = migrations._closing  # pyright: ignore[reportPrivateUsage]
    ran: list[int] = []

    def closing(service: str, chosen: Any) -> Any:
        ran.append(len(chosen))
        if len(ran) == 1:
            in_the_middle.set()
            assert go_on.wait(20)
        return plain(service, chosen)

    monkeypatch.setattr(migrations, "_closing", closing)
    first = asyncio.create_task(SqliteStore.migrate(path, service=SERVICE))
    await asyncio.to_thread(in_the_middle.wait, 20)
    second = asyncio.create_task(SqliteStore.migrate(path, service=SERVICE))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(second), 0.2)
    go_on.set()
    await asyncio.gather(first, second)
    assert ran == [len(migrations.known()), 0]
    async with SqliteStore.open(path, service=SERVICE) as store:
        assert await store.head() == 0


async def test_two_that_upgrade_a_database_at_once_do_no_harm(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_middle, go_on = asyncio.Event(), asyncio.Event()
    plain: Callable[..., Any] = schema._allocate  # pyright: ignore[reportPrivateUsage]
    came = 0

    async def allocate(*args: Any) -> Any:
        nonlocal came
        came += 1
        number = await plain(*args)
        if came == 1:
            in_the_middle.set()
            await go_on.wait()
        return number

    monkeypatch.setattr(schema, "_allocate", allocate)
    first = asyncio.create_task(PostgresStore.migrate(database, service=SERVICE))
    await in_the_middle.wait()
    second = asyncio.create_task(PostgresStore.migrate(database, service=SERVICE))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(second), 0.3)
    assert came == 1, "the second did not wait for the first"
    go_on.set()
    await asyncio.gather(first, second)
    async with PostgresStore.open(database, service=SERVICE) as store:
        assert await store.head() == 0


# --- by hand ---------------------------------------------------------------------------------------------------------

_CATALOG = """
    select 'table ' || c.relname || ' ' || c.relkind::text || ' ' || coalesce(c.reloptions::text, '') as what
      from pg_class c where c.relnamespace = $1::regnamespace
    union all
    select 'column ' || c.relname || ' ' || a.attname || ' ' || format_type(a.atttypid, a.atttypmod)
           || a.attnotnull::text || coalesce(a.attcollation::regcollation::text, '')
           || coalesce(pg_get_expr(d.adbin, d.adrelid), '')
      from pg_attribute a join pg_class c on c.oid = a.attrelid
      left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
     where c.relnamespace = $1::regnamespace and a.attnum > 0 and not a.attisdropped
    union all
    select 'function ' || pg_get_functiondef(p.oid) from pg_proc p where p.pronamespace = $1::regnamespace
    union all
    select 'constraint ' || pg_get_constraintdef(o.oid) from pg_constraint o where o.connamespace = $1::regnamespace
    union all
    select 'index ' || pg_get_indexdef(i.indexrelid) from pg_index i join pg_class c on c.oid = i.indexrelid
     where c.relnamespace = $1::regnamespace
    union all
    select 'trigger ' || pg_get_triggerdef(t.oid) from pg_trigger t join pg_class c on c.oid = t.tgrelid
     where c.relnamespace = $1::regnamespace
    union all
    select 'type ' || t.typname from pg_type t where t.typnamespace = $1::regnamespace
    order by 1"""


async def catalog(dsn: str) -> list[str]:
    db: Any = await asyncpg.connect(dsn)
    found = [row["what"] for row in await db.fetch(_CATALOG, "foldbus_shop")]
    found += [str(dict(row)) for row in await db.fetch("select * from foldbus_shop.log")]
    found += [str(dict(row)) for row in await db.fetch("select * from foldbus_shop.alembic_version")]
    found += [str(dict(row)) for row in await db.fetch("select * from foldbus.logs")]
    await db.close()
    return found


@pytest.mark.parametrize("begin", [None, "0001", "0003"])
async def test_the_sql_of_an_upgrade_makes_what_an_upgrade_makes(
    database: str, postgres: str, begin: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By psql itself, as docs/operations.md tells: a file may hold what a driver takes and psql reads otherwise."""
    migrations_of_today = schema.known()
    with new_database(postgres) as other:
        for dsn in (database, other):
            if begin is not None:
                with monkeypatch.context() as patched:
                    first = [one for one in migrations_of_today if one.number <= int(begin)]
                    patched.setattr(schema, "known", partial(list[Migration], first))
                    await schema.migrate(dsn, service=SERVICE)
        script = await schema.sql(database, service=SERVICE)
        run_client("psql", "--no-psqlrc", "--set=ON_ERROR_STOP=1", dsn=database, given=script.encode())
        await schema.migrate(other, service=SERVICE)
        assert await catalog(database) == await catalog(other)
    assert await schema.sql(database, service=SERVICE) == ""
    async with PostgresStore.open(database, service=SERVICE) as store:
        assert await commit(store, Unit(appends=(append("o-1", 0),))) == ["ok"]


async def test_the_sql_of_a_files_upgrade_makes_what_an_upgrade_makes(tmp_path: Path) -> None:
    by_hand, upgraded = tmp_path / "by_hand.db", tmp_path / "upgraded.db"
    connection = sqlite3.connect(by_hand)
    connection.executescript(migrations.sql(by_hand, service="it's"))
    connection.close()
    migrations.migrate(upgraded, service="it's")

    def schema_of(path: Path) -> list[Any]:
        connection = sqlite3.connect(path)
        found = connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY type, name").fetchall()
        found += connection.execute("SELECT number, name FROM foldbus_schema").fetchall()
        found += connection.execute("SELECT * FROM foldbus_log").fetchall()
        found += connection.execute("PRAGMA journal_mode").fetchall()
        connection.close()
        return [tuple(" ".join(str(one).split()) for one in row) for row in found]

    assert schema_of(by_hand) == schema_of(upgraded)
    assert migrations.sql(by_hand, service="it's") == ""


# --- beside a user's own ---------------------------------------------------------------------------------------------


async def test_a_users_own_alembic_leaves_the_stores_tables_alone(database: str) -> None:
    """With autogenerate over all schemas and `include_name` as docs/operations.md shows it; without, it would drop."""
    await PostgresStore.migrate(database, service=SERVICE)
    metadata = sa.MetaData()
    sa.Table("customers", metadata, sa.Column("id", sa.BigInteger, primary_key=True))

    def include_name(name: str | None, type_: str, parent_names: object) -> bool:
        return not (type_ == "schema" and name is not None and (name == "foldbus" or name.startswith("foldbus_")))

    def own(connection: sa.Connection) -> tuple[list[str], list[str]]:
        def differences(**options: Any) -> list[str]:
            context = MigrationContext.configure(connection, opts={"include_schemas": True, **options})
            found: Any = compare_metadata(context, metadata)
            return sorted(f"{one[0]} {one[1].schema or 'public'}.{one[1].name}" for one in found if "table" in one[0])

        before = differences(include_name=include_name), differences()
        metadata.create_all(connection)
        MigrationContext.configure(connection).stamp(ScriptDirectory(str(schema.MIGRATIONS)), "0001")  # their own table
        return before

    engine = create_async_engine(sa.make_url(database).set(drivername="postgresql+asyncpg"))
    async with engine.begin() as db:
        filtered, unfiltered = await db.run_sync(own)
        versions = (await db.execute(sa.text("select version_num from public.alembic_version"))).scalars().all()
    await engine.dispose()
    assert filtered == ["add_table public.customers"]
    assert "remove_table foldbus_shop.events" in unfiltered
    assert versions == ["0001"]
    async with PostgresStore.open(database, service=SERVICE) as store:
        assert await store.head() == 0
    await PostgresStore.migrate(database, service=SERVICE)  # its own version is as it was
    assert await schema.current(database, service=SERVICE) == schema.HEAD
