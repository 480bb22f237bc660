"""The schema of one service: its name, its migrations, and whether what is there fits this code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import TypeAlias, cast

import asyncpg
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from eventstore import upgrading
from eventstore.errors import EventStoreError, SchemaMismatch
from eventstore.postgres.errors import DRIVER_ERRORS, translated
from eventstore.postgres.pool import driver_arguments, driver_dsn, url
from eventstore.upgrading import Look, Migration, State

Driver: TypeAlias = "asyncpg.Connection[asyncpg.Record]"  # generic in its type stubs only

HEAD = "0013"
"""The migration that this code works with."""

MIGRATIONS = Path(__file__).with_name("migrations")
OLDEST_SINCE = 3
"""The first migration that says which code still works with the schema."""
_MIGRATION = re.compile(r"\d{4}_[a-z0-9_]+\.py")
LOG_NUMBER_MAX = 2**15 - 1
_MIGRATION_LOCK = 0x666F6C64  # "fold"; two processes that start at once migrate one after the other
_SERVICE = re.compile(r"[a-z][a-z0-9-]{0,50}")


def schema_of(service: str) -> str:
    """`foldbus_<service>`, with _ for -. Raises EventStoreError for a name that cannot be one."""
    if _SERVICE.fullmatch(service) is None:
        raise EventStoreError(f"{service!r} is no service name; wanted lower case letters, digits and -, at most 51")
    return f"foldbus_{service.replace('-', '_')}"


@dataclass(frozen=True, slots=True)
class Found:
    """What `open` needs to know of the database."""

    epoch: int
    epoch_since: datetime | None


def known() -> list[Migration]:
    """By their files' names: Alembic is not needed to open a store."""
    return [
        Migration(int(file.name[:4]), file.name)
        for file in MIGRATIONS.joinpath("versions").iterdir()
        if _MIGRATION.fullmatch(file.name)
    ]


async def look(dsn: str, *, service: str) -> Look:
    """The service's schema beside this code."""
    try:
        db = await asyncpg.connect(driver_dsn(dsn))
        try:
            return await _look(db, schema_of(service))
        finally:
            await db.close()
    except DRIVER_ERRORS as error:
        raise translated(error, doing=f"look at the schema of {service}") from error


async def sql(dsn: str, *, service: str, contract: bool = False) -> str:
    """What `migrate` would run, for psql: one transaction. Changes nothing; "" when there is nothing to do."""
    schema = schema_of(service)
    seen = await look(dsn, service=service)
    chosen = upgrading.plan(known(), found=seen.found, contract=contract)
    if not chosen:
        return ""
    engine = create_async_engine(url(dsn), poolclass=NullPool, connect_args=driver_arguments(dsn))
    try:
        async with engine.connect() as db:
            there = (await db.execute(text("select to_regclass('foldbus.logs')"))).scalar() is not None
            number = await _number_of(db, schema) if there else None
            free = "select coalesce(max(number), 0) + 1 from foldbus.logs"
            log = number or (int((await db.execute(text(free))).scalar_one()) if there else 1)
    except DRIVER_ERRORS as error:
        raise translated(error, doing=f"look at {schema}") from error
    finally:
        await engine.dispose()
    lines = ["begin;", f"select pg_advisory_xact_lock({_MIGRATION_LOCK});", *_prepare(schema)]
    if number is None:
        lines.append(f"insert into foldbus.logs values ({log}, '{schema}');")
    out = StringIO()
    _alembic(
        None, schema, {"schema": schema, "log": str(log), "service": service},
        f"{seen.found:04}:{chosen[-1].number:04}" if seen.found else f"{chosen[-1].number:04}", out=out,
    )  # fmt: skip
    lines += [out.getvalue().strip(), *_closing(schema, chosen), "commit;", ""]
    return "\n".join(lines)


async def migrate(dsn: str, *, service: str, contract: bool = False) -> None:
    """Brings the service's schema up to date, in one transaction; does nothing when it is. Several may run at once.
    Newer code's schema that this code works with is left alone. `contract`: see `eventstore/upgrading.py`."""
    schema = schema_of(service)
    engine = create_async_engine(url(dsn), poolclass=NullPool, connect_args=driver_arguments(dsn))
    try:
        async with engine.begin() as db:
            await db.execute(text("select pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
            number = await _allocate(db, schema)
            raw = await db.get_raw_connection()
            seen = await _look(cast("Driver", raw.driver_connection), schema)
            if seen.state is State.TOO_NEW:
                upgrading.check(seen, where=schema)
            if seen.state is State.NEWER:
                return
            chosen = upgrading.plan(known(), found=seen.found, contract=contract)
            if chosen:
                names = {"schema": schema, "log": str(number), "service": service}
                await db.run_sync(_alembic, schema, names, f"{chosen[-1].number:04}")
                for statement in _closing(schema, chosen):
                    await db.execute(text(statement))
    except DRIVER_ERRORS as error:
        raise translated(error, doing=f"migrate {schema}") from error
    finally:
        await engine.dispose()


async def current(dsn: str, *, service: str) -> str | None:
    """The migration that the service's schema is at; None: it has none."""
    try:
        db = await asyncpg.connect(driver_dsn(dsn))
        try:
            return await _version(db, schema_of(service))
        finally:
            await db.close()
    except DRIVER_ERRORS as error:
        raise translated(error, doing=f"look at the schema of {service}") from error


async def raise_epoch(dsn: str, *, service: str) -> int:
    """To be called once after the database was restored from a backup: the log begins a new epoch. Answers it.

    Running processes must be started anew: they read the epoch when they open the store.
    """
    schema = schema_of(service)
    try:
        db = await asyncpg.connect(driver_dsn(dsn))
        try:
            return int(
                await db.fetchval(
                    f"update {schema}.log set epoch = epoch + 1, epoch_since = clock_timestamp() returning epoch"
                )
            )
        finally:
            await db.close()
    except DRIVER_ERRORS as error:
        raise translated(error, doing=f"raise the epoch of {service}") from error


async def check(db: Driver, *, service: str) -> Found:
    """Refuses a database on which the promises would not hold. Raises SchemaMismatch saying what is wrong with it."""
    schema = schema_of(service)
    upgrading.check(await _look(db, schema), where=schema)
    row = await db.fetchrow(
        f"""select s.seqcache, s.seqincrement, s.seqcycle, l.service, l.epoch, l.epoch_since,
                   pg_is_in_recovery() as standby,
                   {schema}.log_number() as number,
                   (select number from foldbus.logs where schema = $2) as allocated,
                   (select count(*) from pg_trigger t where t.tgname = 'floor_lock' and t.tgenabled in ('O', 'A')
                       and t.tgrelid in (to_regclass($3), to_regclass($4))) as triggers,
                   to_regclass($5) is not null as importing
              from pg_sequence s, {schema}.log l where s.seqrelid = to_regclass($1)""",
        f"{schema}.position",
        schema,
        f"{schema}.events",
        f"{schema}.outgoing",
        f"{schema}.import",
    )
    if row is None:
        raise SchemaMismatch(f"{schema}: the sequence or the log's row is missing; restore the schema")
    if row["seqcache"] != 1 or row["seqincrement"] != 1 or row["seqcycle"]:
        raise SchemaMismatch(
            f"{schema}.position has CACHE {row['seqcache']}, INCREMENT {row['seqincrement']}, CYCLE {row['seqcycle']}; "
            "wanted CACHE 1 INCREMENT 1 NO CYCLE, readers would lose events otherwise"
        )
    if row["triggers"] != 2:
        raise SchemaMismatch(f"{schema}: the floor_lock triggers on events and outgoing are missing or disabled")
    if row["number"] != row["allocated"]:
        raise SchemaMismatch(
            f"{schema} was made for log number {row['number']}, foldbus.logs says {row['allocated']}: two logs of one "
            "number hold up each other's readers; move the schema by dump and restore of the whole database"
        )
    if row["service"] != service:
        raise SchemaMismatch(f"{schema} belongs to service {row['service']!r}, not to {service!r}")
    if row["importing"]:
        raise SchemaMismatch(
            f"an import into {schema} was begun and is not finished: run `foldbus store import` with the same file "
            f"again, or drop schema {schema}"
        )
    if row["standby"]:
        raise SchemaMismatch(f"{schema}: this server is a standby; locks are only seen on the primary")
    return Found(epoch=row["epoch"], epoch_since=row["epoch_since"])


async def _look(db: Driver, schema: str) -> Look:
    version = await _version(db, schema)
    found = oldest = 0 if version is None else int(version)
    if found >= OLDEST_SINCE:
        oldest = int(await db.fetchval(f"select oldest from {schema}.log"))
    return upgrading.look(known(), found=found, oldest=oldest)


async def _version(db: Driver, schema: str) -> str | None:
    if await db.fetchval("select to_regclass($1)", f"{schema}.alembic_version") is None:
        return None
    found: str | None = await db.fetchval(f"select version_num from {schema}.alembic_version")
    return found


def _prepare(schema: str) -> list[str]:
    return [
        "create schema if not exists foldbus;",
        "create table if not exists foldbus.logs (number int primary key, schema text not null unique);",
        f"create schema if not exists {schema};",
    ]


def _closing(schema: str, ran: Sequence[Migration]) -> list[str]:
    oldest = upgrading.oldest_after(ran)
    return [] if oldest is None else [f"update {schema}.log set oldest = greatest(oldest, '{oldest:04}');"]


async def _number_of(db: AsyncConnection, schema: str) -> int | None:
    found = (await db.execute(text("select number from foldbus.logs where schema = :s"), {"s": schema})).scalar()
    return None if found is None else int(found)


async def _allocate(db: AsyncConnection, schema: str) -> int:
    for statement in _prepare(schema):
        await db.execute(text(statement))
    number = await _number_of(db, schema)
    if number is None:
        # Never one that was used before: a forgotten transaction of a dropped schema may still hold its locks.
        query = "insert into foldbus.logs select coalesce(max(number), 0) + 1, :s from foldbus.logs returning number"
        number = int((await db.execute(text(query), {"s": schema})).scalar_one())
    if number > LOG_NUMBER_MAX:
        raise SchemaMismatch(f"log number {number} of {schema} is above {LOG_NUMBER_MAX}")
    return number


def _alembic(
    db: Connection | None, schema: str, names: Mapping[str, str], to: str, out: StringIO | None = None
) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes.update(connection=db, schema=schema, names=names, out=out)
    command.upgrade(config, to, sql=out is not None)


__all__ = ["HEAD", "Found", "check", "current", "known", "look", "migrate", "raise_epoch", "schema_of", "sql"]
