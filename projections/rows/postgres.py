"""Rows in the service's PostgreSQL schema: a save is one statement, a swap one transaction.

What fences a save is the checkpoint's revision, and only that: `hold` and the swaps raise the revision of the
generation they stop. A save that began before and waits for the checkpoint's row checks its condition again on the new
row version and finds another revision; a condition on the generations table alone would be judged by the old snapshot.

Control transactions are serialised per projection by an advisory lock of the two-number form, which is a space apart
from the one-number locks of the store's log. Swaps wait for readers of the view no longer than `lock_timeout`:
whoever queues for the view behind a waiting swap would wait as well. A reader in a REPEATABLE READ
transaction that began before the new generation was filled, and first looks at the view after the swap, sees the new
table as it was when it began.
"""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, runtime_checkable

import asyncpg

from bus.errors import Fenced, FoldbusError
from eventstore.errors import StoreUnavailable
from projections.definition import Projection
from projections.errors import NameTaken, ProjectionError, SwapBlocked
from projections.port import Checkpoint, Generation, Row, Snapshot, Status
from projections.rows.columns import Columns
from projections.rows.control import (
    CHECKPOINTS,
    GENERATIONS,
    check_caught_up,
    check_swappable,
    check_swappable_back,
    fenced,
    places_from_text,
    places_to_text,
    quoted,
    table_of,
    to_build,
)

T = TypeVar("T")
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"  # generic in its type stubs only
_LOCK_SPACE = 0x666F6C64
_LOCK_TIMEOUT_MS = 1_000
_LOCK_NOT_AVAILABLE = "55P03"
_UNDEFINED_TABLE = "42P01"
_DEPENDENT_OBJECTS = "2BP01"
_VIEW_DIFFERS = "42P16"


@runtime_checkable
class PostgresHost(Protocol):
    """What is needed of `eventstore.postgres.PostgresStore`."""

    @property
    def schema(self) -> str: ...

    def connection(self) -> AbstractAsyncContextManager[Connection]: ...


class PostgresRows(Generic[Row]):
    """See `projections.port.Rows`."""

    def __init__(self, host: PostgresHost, projection: Projection[Row]) -> None:
        self.projection = projection
        self.columns = Columns(projection.name, projection.row)
        self._host = host
        self._schema = quoted(host.schema)
        self._generations_table = f"{self._schema}.{GENERATIONS}"
        self._checkpoints_table = f"{self._schema}.{CHECKPOINTS}"
        self._view = f"{self._schema}.{quoted(projection.view)}"
        self._lock = zlib.crc32(f"{host.schema}/{projection.name}".encode()) - 2**31
        self._schema_lock = zlib.crc32(host.schema.encode()) - 2**31
        self._names = ", ".join(quoted(name) for name in ("key", *self.columns.names))
        self._started = False
        self._saves: dict[int, str] = {}

    # --- generations -------------------------------------------------------------------------------------------------

    async def serving(self) -> Generation:
        for one in await self.generations():
            if one.status is Status.SERVING:
                return one
        return await self._control(self._create_first, create=True)

    async def generations(self) -> Sequence[Generation]:
        async with self._connection() as connection:
            try:
                return await self._read_generations(connection)
            except asyncpg.PostgresError as error:
                if error.sqlstate != _UNDEFINED_TABLE:
                    raise
                return []  # before the first start

    async def build(self) -> Generation:
        made, drop = await self._control(self._build)
        for number in drop:
            # After the commit that fenced its writers: in one transaction with it, a save that holds the table and
            # waits for the checkpoint would be a deadlock.
            async with self._connection() as connection:
                await connection.execute(f"DROP TABLE IF EXISTS {self._table(number)}")
        return made

    async def hold(self, generation: int, seconds: float) -> Checkpoint:
        async def work(connection: Connection) -> Checkpoint:
            await connection.execute(
                f"""UPDATE {self._generations_table} SET held_until = clock_timestamp() + $3 * interval '1 second'
                    WHERE projection = $1 AND generation = $2""",
                self.projection.name, generation, float(seconds),
            )  # fmt: skip
            return await self._bump(connection, generation)

        return await self._control(work)

    async def swap(self, to: int, *, sources: Collection[str]) -> None:
        async def work(connection: Connection) -> None:
            serving = check_swappable(await self._read_generations(connection), to)
            there = await self._bump(connection, serving.number)  # locks the row: nobody is in the middle of saving
            here = await self._read_checkpoint(connection, to)
            check_caught_up(there.places, here.places, sources=sources)
            await self._serve(connection, serving.number, to)

        await self._control(work)

    async def swap_back(self) -> Generation:
        async def work(connection: Connection) -> int:
            serving, back = check_swappable_back(self.projection.name, await self._read_generations(connection))
            await self._bump(connection, serving.number)
            await self._serve(connection, serving.number, back.number)
            return back.number

        number = await self._control(work)
        return next(one for one in await self.generations() if one.number == number)

    # --- rows and checkpoint -----------------------------------------------------------------------------------------

    async def checkpoint(self, generation: int) -> Checkpoint:
        async with self._connection() as connection:
            found = await connection.fetchrow(self._checkpoint_sql, self.projection.name, generation)
        return self._as_checkpoint(found, generation)

    async def load(self, generation: int, keys: Collection[str]) -> Mapping[str, Row]:
        if not keys:
            return {}
        sql = f"SELECT {self._names} FROM {self._table(generation)} WHERE key = ANY($1::text[])"
        found: Sequence[asyncpg.Record] | None
        async with self._connection() as connection:
            try:
                found = await connection.fetch(sql, list(keys))
            except asyncpg.PostgresError as error:
                if error.sqlstate != _UNDEFINED_TABLE:
                    raise
                found = None
        if found is None:
            raise Fenced(f"projection {self.projection.name!r} has no generation {generation} any more")
        return dict(self._pair(record) for record in found)

    async def save(self, generation: int, rows: Mapping[str, Row | None], *, old: Checkpoint, new: Checkpoint) -> None:
        kept = [(key, *self.columns.encode(row)) for key, row in rows.items() if row is not None]
        columns = [list(column) for column in zip(*kept, strict=True)] or [
            [] for _ in range(len(self.columns.names) + 1)
        ]
        gone = [key for key, row in rows.items() if row is None]
        sql = self._saves.get(generation)
        if sql is None:
            sql = self._saves[generation] = self._save_sql(generation)
        saved = False
        async with self._connection() as connection:
            try:
                saved = await connection.fetchval(
                    sql, self.projection.name, generation, old.revision, places_to_text(new.places), gone, *columns
                )
            except asyncpg.PostgresError as error:
                if error.sqlstate != _UNDEFINED_TABLE:
                    raise
        if not saved:
            raise fenced(self.projection.name, generation, old)

    def _save_sql(self, generation: int) -> str:
        table = self._table(generation)
        arrays = ", ".join(
            f"${number}::{kind}[]"
            for number, kind in enumerate(("text", *(column.postgres for column in self.columns.columns)), start=6)
        )
        sets = ", ".join(f"{quoted(name)} = excluded.{quoted(name)}" for name in self.columns.names)
        return f"""
            WITH moved AS (
                UPDATE {self._checkpoints_table} c SET revision = c.revision + 1, places = $4
                FROM {self._generations_table} g
                WHERE c.projection = $1 AND c.generation = $2 AND c.shard = 0 AND c.revision = $3
                  AND g.projection = $1 AND g.generation = $2 AND g.status IN ('serving', 'building')
                  AND (g.held_until IS NULL OR g.held_until <= clock_timestamp())
                RETURNING true AS done
            ), kept AS (
                INSERT INTO {table} ({self._names})
                SELECT found.* FROM unnest({arrays}) AS found WHERE EXISTS (SELECT 1 FROM moved)
                ON CONFLICT (key) DO {"UPDATE SET " + sets if sets else "NOTHING"}
            ), gone AS (
                DELETE FROM {table} WHERE key = ANY($5::text[]) AND EXISTS (SELECT 1 FROM moved)
            )
            SELECT coalesce((SELECT done FROM moved), false)"""

    # --- reading through the view ------------------------------------------------------------------------------------

    async def get(self, key: str) -> Row | None:
        await self._ready()
        async with self._connection() as connection:
            found = await connection.fetchrow(f"SELECT * FROM {self._view} WHERE key = $1", key)
        return None if found is None else self._pair(found)[1]

    async def page(self, *, after: str | None, limit: int) -> Sequence[tuple[str, Row]]:
        await self._ready()
        where = "" if after is None else "WHERE key > $2"
        parameters = (limit,) if after is None else (limit, after)
        async with self._connection() as connection:
            found = await connection.fetch(f"SELECT * FROM {self._view} {where} ORDER BY key LIMIT $1", *parameters)
        return [self._pair(record) for record in found]

    async def count(self, *, where: Mapping[str, str] | None = None) -> int:
        await self._ready()
        names = [quoted(self.columns.named(name)) for name in where or {}]
        condition = " AND ".join(f"{name} = ${nth}" for nth, name in enumerate(names, start=1)) or "true"
        async with self._connection() as connection:
            found: int = await connection.fetchval(
                f"SELECT count(*) FROM {self._view} WHERE {condition}", *(where or {}).values()
            )
        return found

    async def snapshot(self) -> Snapshot[Row]:
        await self._ready()
        async with self._connection() as connection:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                serving = next(one for one in await self._read_generations(connection) if one.status is Status.SERVING)
                at = await connection.fetchrow(self._checkpoint_sql, self.projection.name, serving.number)
                found = await connection.fetch(f"SELECT * FROM {self._table(serving.number)}")
        checkpoint = self._as_checkpoint(at, serving.number)
        return Snapshot(serving.number, checkpoint, dict(self._pair(record) for record in found))

    async def _ready(self) -> None:
        """A reader may come before the first runner."""
        if not self._started:
            await self.serving()
            self._started = True

    def _pair(self, record: asyncpg.Record) -> tuple[str, Row]:
        fields = dict(record.items())
        key: str = fields.pop("key")
        return key, self.columns.decode(key, fields)

    # --- within a transaction ----------------------------------------------------------------------------------------

    def _connection(self) -> AbstractAsyncContextManager[Connection]:
        return _Answering(self._host.connection())

    def _table(self, generation: int) -> str:
        return f"{self._schema}.{quoted(table_of(self.projection.view, generation))}"

    async def _control(self, work: Callable[[Connection], Awaitable[T]], *, create: bool = False) -> T:
        """One transaction, serialised with all others of this projection. What `work` raises of ours rolls back and is
        raised once the connection is given back: it is not the connection's fault."""
        refused: FoldbusError | None = None
        async with self._connection() as connection:
            transaction = connection.transaction()
            await transaction.start()
            try:
                await connection.execute(f"SET LOCAL lock_timeout = {_LOCK_TIMEOUT_MS * 10}")
                if create:
                    await connection.execute("SELECT pg_advisory_xact_lock($1, $2)", _LOCK_SPACE, self._schema_lock)
                await connection.execute("SELECT pg_advisory_xact_lock($1, $2)", _LOCK_SPACE, self._lock)
                await connection.execute(f"SET LOCAL lock_timeout = {_LOCK_TIMEOUT_MS}")
                done = await work(connection)
            except FoldbusError as error:
                await transaction.rollback()
                refused = error
            except asyncpg.PostgresError as error:
                await transaction.rollback()
                if error.sqlstate == _LOCK_NOT_AVAILABLE:
                    raise SwapBlocked(
                        f"projection {self.projection.name!r}: somebody held a lock for longer than "
                        f"{_LOCK_TIMEOUT_MS} ms; nothing was changed"
                    ) from error
                if error.sqlstate == _DEPENDENT_OBJECTS:
                    raise ProjectionError(
                        f"projection {self.projection.name!r} has other columns now, but something was built on its "
                        f"view and keeps it: {error}; drop that first, nothing was changed"
                    ) from error
                raise
            else:
                await transaction.commit()
                return done
        raise refused

    async def _create_first(self, connection: Connection) -> Generation:
        await connection.execute(
            f"""CREATE TABLE IF NOT EXISTS {self._generations_table} (
                    projection text NOT NULL, generation bigint NOT NULL, version bigint NOT NULL, shape text NOT NULL,
                    status text NOT NULL, created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
                    swapped_at timestamptz, held_until timestamptz, PRIMARY KEY (projection, generation));
                CREATE TABLE IF NOT EXISTS {self._checkpoints_table} (
                    projection text NOT NULL, generation bigint NOT NULL, shard bigint NOT NULL,
                    revision bigint NOT NULL, places text NOT NULL,
                    PRIMARY KEY (projection, generation, shard)) WITH (fillfactor = 50)"""
        )
        for one in await self._read_generations(connection):
            if one.status is Status.SERVING:  # somebody else was first
                return one
        if await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", self._view):
            raise NameTaken(self.projection.name, found=self.projection.view)
        await self._create(connection, 1, Status.SERVING)
        await self._point_view(connection, 1)
        return (await self._read_generations(connection))[0]

    async def _build(self, connection: Connection) -> tuple[Generation, list[int]]:
        found = await self._read_generations(connection)
        go_on, drop = to_build(found, version=self.projection.version, shape=self.columns.shape)
        for one in drop:
            await connection.execute(
                f"DELETE FROM {self._checkpoints_table} WHERE projection = $1 AND generation = $2",
                self.projection.name, one.number,
            )  # fmt: skip
            await self._set_status(connection, one.number, Status.DROPPED)
        # A process that died between the two steps left its tables behind.
        dropped = [one.number for one in found if one.status is Status.DROPPED][-5:] + [one.number for one in drop]
        if go_on is None:
            number = max(one.number for one in found) + 1
            await self._create(connection, number, Status.BUILDING)
            go_on = next(one for one in await self._read_generations(connection) if one.number == number)
        return go_on, dropped

    async def _create(self, connection: Connection, number: int, status: Status) -> None:
        columns = "".join(f", {quoted(column.name)} {column.postgres}" for column in self.columns.columns)
        # "C": keys in the order of their bytes, as in SQLite, whatever the database's collation is.
        await connection.execute(
            f'CREATE TABLE {self._table(number)} (key text COLLATE "C" NOT NULL PRIMARY KEY{columns})'
        )
        await connection.execute(
            f"""INSERT INTO {self._generations_table} (projection, generation, version, shape, status, swapped_at)
                VALUES ($1, $2, $3, $4, $5::text, CASE WHEN $5::text = 'serving' THEN clock_timestamp() END)""",
            self.projection.name, number, self.projection.version, self.columns.shape, status.value,
        )  # fmt: skip
        await connection.execute(
            f"INSERT INTO {self._checkpoints_table} VALUES ($1, $2, 0, 0, '[]')", self.projection.name, number
        )

    async def _serve(self, connection: Connection, old: int, new: int) -> None:
        await self._set_status(connection, old, Status.RETIRED)
        await self._set_status(connection, new, Status.SERVING)
        await self._point_view(connection, new)

    async def _set_status(self, connection: Connection, number: int, status: Status) -> None:
        await connection.execute(
            f"""UPDATE {self._generations_table} SET status = $3::text, held_until = NULL,
                    swapped_at = CASE WHEN $3::text = 'serving' THEN clock_timestamp() ELSE swapped_at END
                WHERE projection = $1 AND generation = $2""",
            self.projection.name, number, status.value,
        )  # fmt: skip

    async def _point_view(self, connection: Connection, number: int) -> None:
        """Replaced in place where the columns allow it, which keeps grants and what others built on the view."""
        select = f"AS SELECT * FROM {self._table(number)}"
        try:
            async with connection.transaction():
                await connection.execute(f"CREATE OR REPLACE VIEW {self._view} {select}")
        except asyncpg.PostgresError as error:
            if error.sqlstate != _VIEW_DIFFERS:
                raise
            await connection.execute(f"DROP VIEW {self._view}")
            await connection.execute(f"CREATE VIEW {self._view} {select}")

    async def _bump(self, connection: Connection, number: int) -> Checkpoint:
        found = await connection.fetchrow(
            f"""UPDATE {self._checkpoints_table} SET revision = revision + 1
                WHERE projection = $1 AND generation = $2 AND shard = 0 RETURNING places, revision""",
            self.projection.name, number,
        )  # fmt: skip
        return self._as_checkpoint(found, number)

    @property
    def _checkpoint_sql(self) -> str:
        return (
            f"SELECT places, revision FROM {self._checkpoints_table} "
            "WHERE projection = $1 AND generation = $2 AND shard = 0"
        )

    async def _read_checkpoint(self, connection: Connection, number: int) -> Checkpoint:
        return self._as_checkpoint(
            await connection.fetchrow(self._checkpoint_sql, self.projection.name, number), number
        )

    def _as_checkpoint(self, found: asyncpg.Record | None, number: int) -> Checkpoint:
        if found is None:
            raise Fenced(f"projection {self.projection.name!r} has no generation {number} any more")
        return Checkpoint(places_from_text(found["places"]), found["revision"])

    async def _read_generations(self, connection: Connection) -> list[Generation]:
        found = await connection.fetch(
            f"""SELECT generation, version, shape, status, created_at, swapped_at,
                       coalesce(held_until > clock_timestamp(), false) AS held
                FROM {self._generations_table} WHERE projection = $1 ORDER BY generation""",
            self.projection.name,
        )
        return [
            Generation(
                one["generation"], one["version"], one["shape"], Status(one["status"]), one["created_at"],
                one["swapped_at"], one["held"],
            )
            for one in found
        ]  # fmt: skip


class _Answering:
    """A connection of the store's; a broken one is StoreUnavailable, as from the store itself."""

    def __init__(self, inner: AbstractAsyncContextManager[Connection]) -> None:
        self._inner = inner

    async def __aenter__(self) -> Connection:
        try:
            return await self._inner.__aenter__()
        except (OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError) as error:
            raise StoreUnavailable(f"no connection to PostgreSQL: {error}") from error

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool | None:
        swallowed = await self._inner.__aexit__(kind, error, trace)
        if isinstance(error, (OSError, asyncpg.PostgresConnectionError)) or (
            isinstance(error, asyncpg.InterfaceError) and not isinstance(error, asyncpg.DataError)
        ):
            raise StoreUnavailable(f"PostgreSQL did not answer; whether it was done is unknown: {error}") from error
        return swallowed


__all__ = ["PostgresHost", "PostgresRows"]
