"""Rows in the service's SQLite file: every save, swap and start is one transaction of the store's single writer."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from bus.errors import Fenced
from bus.seams import Clock
from projections.definition import Projection
from projections.errors import NameTaken
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

_CONTROL = (
    f"""CREATE TABLE IF NOT EXISTS {GENERATIONS} (
        projection TEXT NOT NULL, generation INTEGER NOT NULL, version INTEGER NOT NULL, shape TEXT NOT NULL,
        status TEXT NOT NULL, created_at TEXT NOT NULL, swapped_at TEXT, held_until TEXT,
        PRIMARY KEY (projection, generation)) STRICT, WITHOUT ROWID""",
    f"""CREATE TABLE IF NOT EXISTS {CHECKPOINTS} (
        projection TEXT NOT NULL, generation INTEGER NOT NULL, shard INTEGER NOT NULL, revision INTEGER NOT NULL,
        places TEXT NOT NULL, PRIMARY KEY (projection, generation, shard)) STRICT, WITHOUT ROWID""",
)


class SqliteDb(Protocol):
    """What is needed of `eventstore.sqlite.SqliteDatabase`."""

    def write(self, work: Callable[[sqlite3.Connection], T]) -> Awaitable[T]: ...

    def read(self, work: Callable[[sqlite3.Connection], T]) -> Awaitable[T]: ...


@runtime_checkable
class SqliteHost(Protocol):
    @property
    def database(self) -> SqliteDb: ...


class SqliteRows(Generic[Row]):
    """See `projections.port.Rows`."""

    def __init__(self, host: SqliteHost, projection: Projection[Row], *, clock: Clock) -> None:
        self.projection = projection
        self.columns = Columns(projection.name, projection.row)
        self._db, self._clock = host.database, clock
        self._view = projection.view
        self._started = False
        self._names = ", ".join(quoted(name) for name in ("key", *self.columns.names))
        marks = ", ".join("?" * (1 + len(self.columns.names)))
        sets = ", ".join(f"{quoted(name)} = excluded.{quoted(name)}" for name in self.columns.names)
        self._upsert = (
            f"INSERT INTO {{table}} ({self._names}) VALUES ({marks}) "
            f"ON CONFLICT (key) DO {'UPDATE SET ' + sets if sets else 'NOTHING'}"
        )

    # --- generations -------------------------------------------------------------------------------------------------

    async def serving(self) -> Generation:
        found = await self.generations()
        for one in found:
            if one.status is Status.SERVING:
                return one
        return await self._db.write(self._create_first)

    async def generations(self) -> Sequence[Generation]:
        return await self._db.read(lambda connection: self._generations(connection))

    async def build(self) -> Generation:
        return await self._db.write(self._build)

    async def hold(self, generation: int, seconds: float) -> Checkpoint:
        until = self._clock.now() + timedelta(seconds=seconds)

        def work(connection: sqlite3.Connection) -> Checkpoint:
            connection.execute(
                f"UPDATE {GENERATIONS} SET held_until = ? WHERE projection = ? AND generation = ?",
                (_text(until), self.projection.name, generation),
            )
            return self._bump(connection, generation)

        return await self._db.write(work)

    async def swap(self, to: int, *, sources: Collection[str]) -> None:
        def work(connection: sqlite3.Connection) -> None:
            serving = check_swappable(self._generations(connection), to)
            there, here = self._checkpoint(connection, serving.number), self._checkpoint(connection, to)
            check_caught_up(there.places, here.places, sources=sources)
            self._serve(connection, serving.number, to)

        await self._db.write(work)

    async def swap_back(self) -> Generation:
        def work(connection: sqlite3.Connection) -> int:
            serving, back = check_swappable_back(self.projection.name, self._generations(connection))
            self._serve(connection, serving.number, back.number)
            return back.number

        number = await self._db.write(work)
        return next(one for one in await self.generations() if one.number == number)

    # --- rows and checkpoint -----------------------------------------------------------------------------------------

    async def checkpoint(self, generation: int) -> Checkpoint:
        return await self._db.read(lambda connection: self._checkpoint(connection, generation))

    async def load(self, generation: int, keys: Collection[str]) -> Mapping[str, Row]:
        if not keys:
            return {}
        sql = (
            f"SELECT {self._names} FROM {quoted(table_of(self._view, generation))} "
            "WHERE key IN (SELECT value FROM json_each(?))"
        )
        wanted = json.dumps(list(keys))

        def work(connection: sqlite3.Connection) -> list[Any]:
            if self._status(connection, generation) is None:
                raise Fenced(f"projection {self.projection.name!r} has no generation {generation} any more")
            return connection.execute(sql, (wanted,)).fetchall()

        found = await self._db.read(work)
        return {values[0]: self._decode(values) for values in found}

    async def save(self, generation: int, rows: Mapping[str, Row | None], *, old: Checkpoint, new: Checkpoint) -> None:
        table = quoted(table_of(self._view, generation))
        columns = self.columns
        kept = [(key, *columns.to_sqlite(columns.encode(row))) for key, row in rows.items() if row is not None]
        gone = [(key,) for key, row in rows.items() if row is None]
        places = places_to_text(new.places)
        now = _text(self._clock.now())

        def work(connection: sqlite3.Connection) -> None:
            moved = connection.execute(
                f"""UPDATE {CHECKPOINTS} SET revision = revision + 1, places = ?
                    WHERE projection = ? AND generation = ? AND shard = 0 AND revision = ?
                      AND EXISTS (SELECT 1 FROM {GENERATIONS} g
                                  WHERE g.projection = ? AND g.generation = ? AND g.status IN ('serving', 'building')
                                    AND (g.held_until IS NULL OR g.held_until <= ?))""",
                (places, self.projection.name, generation, old.revision, self.projection.name, generation, now),
            )
            if moved.rowcount != 1:
                raise fenced(self.projection.name, generation, old)
            connection.executemany(self._upsert.format(table=table), kept)
            connection.executemany(f"DELETE FROM {table} WHERE key = ?", gone)

        await self._db.write(work)

    # --- reading through the view ------------------------------------------------------------------------------------

    async def get(self, key: str) -> Row | None:
        found = await self._select("WHERE key = ?", (key,))
        return found[0][1] if found else None

    async def page(self, *, after: str | None, limit: int) -> Sequence[tuple[str, Row]]:
        where = "" if after is None else "WHERE key > ?"
        return await self._select(f"{where} ORDER BY key LIMIT ?", (limit,) if after is None else (after, limit))

    async def count(self, *, where: Mapping[str, str] | None = None) -> int:
        await self._ready()
        condition = " AND ".join(f"{quoted(self.columns.named(name))} = ?" for name in where or {}) or "1"
        sql, values = f"SELECT count(*) FROM {quoted(self._view)} WHERE {condition}", tuple((where or {}).values())
        found: int = await self._db.read(lambda connection: connection.execute(sql, values).fetchone()[0])
        return found

    async def snapshot(self) -> Snapshot[Row]:
        def work(connection: sqlite3.Connection) -> tuple[int, Checkpoint, list[str], list[Any]]:
            serving = next(one for one in self._generations(connection) if one.status is Status.SERVING)
            found = connection.execute(f"SELECT * FROM {quoted(table_of(self._view, serving.number))}")
            names = [column[0] for column in found.description]
            return serving.number, self._checkpoint(connection, serving.number), names, found.fetchall()

        await self._ready()
        number, checkpoint, names, found = await self._db.read(work)
        return Snapshot(number, checkpoint, dict(self._pair(names, values) for values in found))

    async def _ready(self) -> None:
        """A reader may come before the first runner."""
        if not self._started:
            await self.serving()
            self._started = True

    async def _select(self, rest: str, parameters: tuple[Any, ...]) -> list[tuple[str, Row]]:
        await self._ready()
        sql = f"SELECT * FROM {quoted(self._view)} {rest}"

        def work(connection: sqlite3.Connection) -> tuple[list[str], list[Any]]:
            found = connection.execute(sql, parameters)
            return [column[0] for column in found.description], found.fetchall()

        names, found = await self._db.read(work)
        return [self._pair(names, values) for values in found]

    def _pair(self, names: list[str], values: tuple[Any, ...]) -> tuple[str, Row]:
        fields = dict(zip(names, values, strict=True))
        key = fields.pop("key")
        return key, self.columns.from_sqlite(key, fields)

    def _decode(self, values: tuple[Any, ...]) -> Row:
        return self.columns.from_sqlite(values[0], dict(zip(self.columns.names, values[1:], strict=True)))

    # --- within a transaction ----------------------------------------------------------------------------------------

    def _create_first(self, connection: sqlite3.Connection) -> Generation:
        for statement in _CONTROL:
            connection.execute(statement)
        for one in self._generations(connection):
            if one.status is Status.SERVING:  # somebody else was first
                return one
        taken = connection.execute(
            "SELECT 1 FROM sqlite_schema WHERE name = ? COLLATE NOCASE", (self._view,)
        ).fetchone()
        if taken is not None:
            raise NameTaken(self.projection.name, found=self._view)
        first = self._create(connection, 1, Status.SERVING)
        self._point_view(connection, 1)
        return first

    def _build(self, connection: sqlite3.Connection) -> Generation:
        found = self._generations(connection)
        go_on, drop = to_build(found, version=self.projection.version, shape=self.columns.shape)
        for one in drop:
            connection.execute(f"DROP TABLE IF EXISTS {quoted(table_of(self._view, one.number))}")
            connection.execute(
                f"DELETE FROM {CHECKPOINTS} WHERE projection = ? AND generation = ?", (self.projection.name, one.number)
            )
            self._set_status(connection, one.number, Status.DROPPED)
        return go_on or self._create(connection, max(one.number for one in found) + 1, Status.BUILDING)

    def _create(self, connection: sqlite3.Connection, number: int, status: Status) -> Generation:
        columns = "".join(f", {quoted(column.name)} {column.sqlite}" for column in self.columns.columns)
        connection.execute(
            f"CREATE TABLE {quoted(table_of(self._view, number))} "
            f"(key TEXT NOT NULL PRIMARY KEY{columns}) WITHOUT ROWID"
        )
        now = self._clock.now()
        serves_since = now if status is Status.SERVING else None
        made = Generation(number, self.projection.version, self.columns.shape, status, now, serves_since)
        connection.execute(
            f"INSERT INTO {GENERATIONS} (projection, generation, version, shape, status, created_at, swapped_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                self.projection.name,
                number,
                made.version,
                made.shape,
                status.value,
                _text(now),
                None if serves_since is None else _text(serves_since),
            ),
        )
        connection.execute(f"INSERT INTO {CHECKPOINTS} VALUES (?, ?, 0, 0, '[]')", (self.projection.name, number))
        return made

    def _serve(self, connection: sqlite3.Connection, old: int, new: int) -> None:
        """The view and the status in one transaction; the bumped revision fences whoever is about to save to `old`."""
        self._set_status(connection, old, Status.RETIRED)
        self._set_status(connection, new, Status.SERVING)
        self._bump(connection, old)
        self._point_view(connection, new)

    def _set_status(self, connection: sqlite3.Connection, number: int, status: Status) -> None:
        swapped_at = _text(self._clock.now()) if status is Status.SERVING else None
        connection.execute(
            f"""UPDATE {GENERATIONS} SET status = ?, held_until = NULL, swapped_at = coalesce(?, swapped_at)
                WHERE projection = ? AND generation = ?""",
            (status.value, swapped_at, self.projection.name, number),
        )

    def _point_view(self, connection: sqlite3.Connection, number: int) -> None:
        connection.execute(f"DROP VIEW IF EXISTS {quoted(self._view)}")
        connection.execute(f"CREATE VIEW {quoted(self._view)} AS SELECT * FROM {quoted(table_of(self._view, number))}")

    def _bump(self, connection: sqlite3.Connection, number: int) -> Checkpoint:
        connection.execute(
            f"UPDATE {CHECKPOINTS} SET revision = revision + 1 WHERE projection = ? AND generation = ?",
            (self.projection.name, number),
        )
        return self._checkpoint(connection, number)

    def _checkpoint(self, connection: sqlite3.Connection, number: int) -> Checkpoint:
        found = connection.execute(
            f"SELECT places, revision FROM {CHECKPOINTS} WHERE projection = ? AND generation = ? AND shard = 0",
            (self.projection.name, number),
        ).fetchone()
        if found is None:
            raise Fenced(f"projection {self.projection.name!r} has no generation {number} any more")
        return Checkpoint(places_from_text(found[0]), found[1])

    def _status(self, connection: sqlite3.Connection, number: int) -> Status | None:
        """None for one that has no table (any more)."""
        found = connection.execute(
            f"SELECT status FROM {GENERATIONS} WHERE projection = ? AND generation = ? AND status <> 'dropped'",
            (self.projection.name, number),
        ).fetchone()
        return None if found is None else Status(found[0])

    def _generations(self, connection: sqlite3.Connection) -> list[Generation]:
        # Before the first start there is no control table; its absence is no error.
        if connection.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", (GENERATIONS,)).fetchone() is None:
            return []
        now = _text(self._clock.now())
        found = connection.execute(
            f"""SELECT generation, version, shape, status, created_at, swapped_at, coalesce(held_until > ?, 0)
                FROM {GENERATIONS} WHERE projection = ? ORDER BY generation""",
            (now, self.projection.name),
        ).fetchall()
        return [
            Generation(
                number, version, shape, Status(status), datetime.fromisoformat(created_at),
                None if swapped_at is None else datetime.fromisoformat(swapped_at), bool(held),
            )
            for number, version, shape, status, created_at, swapped_at, held in found
        ]  # fmt: skip


def _text(at: datetime) -> str:
    return at.isoformat(timespec="microseconds")
