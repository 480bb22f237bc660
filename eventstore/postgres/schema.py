"""The schema of one service: its name, its migrations, and whether what is there fits this code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import asyncpg
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from eventstore.errors import EventStoreError, SchemaMismatch
from eventstore.postgres.errors import DRIVER_ERRORS, Trouble, kind, translated
from eventstore.postgres.pool import url

HEAD = "0006"
"""The migration that this code works with."""

MIGRATIONS = Path(__file__).with_name("migrations")
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


async def migrate(dsn: str, *, service: str) -> None:
    """Brings the service's schema up to date, in one transaction; does nothing when it is. Several may run at once."""
    schema = schema_of(service)
    engine = create_async_engine(url(dsn), poolclass=NullPool)
    try:
        async with engine.begin() as db:
            await db.execute(text("select pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
            number = await _allocate(db, service, schema)
            await db.run_sync(_upgrade, schema, {"schema": schema, "log": str(number), "service": service})
    except DRIVER_ERRORS as error:
        raise translated(error, doing=f"migrate {schema}") from error
    finally:
        await engine.dispose()


async def current(dsn: str, *, service: str) -> str | None:
    """The migration that the service's schema is at; None: it has none."""
    try:
        db = await asyncpg.connect(url(dsn).set(drivername="postgresql").render_as_string(hide_password=False))
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
        db = await asyncpg.connect(url(dsn).set(drivername="postgresql").render_as_string(hide_password=False))
        try:
            return int(await db.fetchval(f"update {schema}.log set epoch = epoch + 1 returning epoch"))
        finally:
            await db.close()
    except DRIVER_ERRORS as error:
        raise translated(error, doing=f"raise the epoch of {service}") from error


async def check(db: asyncpg.Connection[asyncpg.Record], *, service: str) -> Found:
    """Refuses a database on which the promises would not hold. Raises SchemaMismatch saying what is wrong with it."""
    schema = schema_of(service)
    version = await _version(db, schema)
    if version != HEAD:
        found = "no schema" if version is None else f"migration {version}"
        raise SchemaMismatch(f"{schema}: found {found}, wanted {HEAD}; run `foldbus db upgrade`")
    row = await db.fetchrow(
        f"""select s.seqcache, s.seqincrement, s.seqcycle, l.service, l.epoch, pg_is_in_recovery() as standby,
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
    return Found(epoch=row["epoch"])


async def _version(db: asyncpg.Connection[asyncpg.Record], schema: str) -> str | None:
    try:
        found: str | None = await db.fetchval(f"select version_num from {schema}.alembic_version")
    except asyncpg.PostgresError as error:
        if kind(error) is Trouble.SCHEMA:
            return None
        raise
    return found


async def _allocate(db: AsyncConnection, service: str, schema: str) -> int:
    await db.execute(text("create schema if not exists foldbus"))
    await db.execute(
        text("create table if not exists foldbus.logs (number int primary key, schema text not null unique)")
    )
    await db.execute(text(f"create schema if not exists {schema}"))
    number = (await db.execute(text("select number from foldbus.logs where schema = :s"), {"s": schema})).scalar()
    if number is None:
        # Never one that was used before: a forgotten transaction of a dropped schema may still hold its locks.
        query = "insert into foldbus.logs select coalesce(max(number), 0) + 1, :s from foldbus.logs returning number"
        number = (await db.execute(text(query), {"s": schema})).scalar_one()
    if number > LOG_NUMBER_MAX:
        raise SchemaMismatch(f"log number {number} of {schema} is above {LOG_NUMBER_MAX}")
    return int(number)


def _upgrade(db: Connection, schema: str, names: Mapping[str, str]) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes.update(connection=db, schema=schema, names=names)
    command.upgrade(config, "head")


__all__ = ["HEAD", "Found", "check", "current", "migrate", "raise_epoch", "schema_of"]
