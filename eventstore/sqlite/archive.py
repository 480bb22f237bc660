"""Taking events out of the log, in the store's file. See `Archive` in the port."""

from __future__ import annotations

import sqlite3
from uuid import UUID

from bus.envelope import Position, StreamId, Version
from bus.seams import Clock
from eventstore import archiving, rows
from eventstore.port import Slice, StreamInfo
from eventstore.sqlite.database import SqliteDatabase

_COLUMNS = "position, stream, version, id, type, key, topic, data, time, meta"
_FOUND = (
    "SELECT s.number, s.version, s.archived_at, coalesce(p.truncated_upto, 0), p.version, p.schema "
    "FROM foldbus_streams s LEFT JOIN foldbus_snapshots p ON p.category=s.category AND p.id=s.id "
    "WHERE s.category=? AND s.id=?"
)


class SqliteArchive:
    def __init__(self, database: SqliteDatabase, clock: Clock) -> None:
        self._database, self._clock = database, clock

    async def archive(self, stream: StreamId, *, expected: Version, seen: Position) -> StreamInfo:
        def work(connection: sqlite3.Connection) -> StreamInfo:
            number, found = _find(connection, stream)
            if archiving.is_archived(found, expected=expected):
                return found.info
            _check_seen(connection, number, found, upto=found.info.version, seen=seen)
            _move(connection, number, "foldbus_events", "foldbus_archived")
            at = rows.micros(self._clock.now())
            connection.execute(
                "UPDATE foldbus_streams SET version=-version, archived_at=? WHERE number=?", (at, number)
            )
            return _find(connection, stream)[1].info

        return await self._database.write(work)

    async def restore(self, stream: StreamId) -> StreamInfo:
        def work(connection: sqlite3.Connection) -> StreamInfo:
            number, found = _find(connection, stream)
            if found.info.archived_at is not None:
                _move(connection, number, "foldbus_archived", "foldbus_events")
                connection.execute(
                    "UPDATE foldbus_streams SET version=-version, archived_at=NULL WHERE number=?", (number,)
                )
            return _find(connection, stream)[1].info

        return await self._database.write(work)

    async def truncate(
        self, stream: StreamId, *, upto: Version, seen: Position, schema: str | None = None
    ) -> StreamInfo:
        def work(connection: sqlite3.Connection) -> StreamInfo:
            number, found = _find(connection, stream)
            if archiving.is_truncated(found, upto=upto, schema=schema):
                return found.info
            _check_seen(connection, number, found, upto=upto, seen=seen)
            connection.execute("DELETE FROM foldbus_events WHERE stream=? AND version<=?", (number, upto))
            connection.execute(
                "UPDATE foldbus_snapshots SET truncated_upto=? WHERE category=? AND id=?",
                (upto, stream.category, stream.id),
            )
            return _find(connection, stream)[1].info

        return await self._database.write(work)

    async def read(self, stream: StreamId, *, after: Version = 0, limit: int = 1000) -> Slice:
        def work(connection: sqlite3.Connection) -> Slice:
            number, found = _find(connection, stream)
            records = [
                rows.envelope(
                    UUID(bytes=id), type, key, topic, data, rows.instant(time), meta, stream, version, position
                )
                for id, type, key, topic, data, time, meta, version, position in connection.execute(
                    "SELECT id, type, key, topic, data, time, meta, version, position FROM foldbus_archived "
                    "WHERE stream=? AND version>? ORDER BY version LIMIT ?",
                    (number, after, limit),
                )
            ]
            return Slice(stream, found.info.version, records)

        archiving.check_limit(limit)
        return await self._database.read(work)


def _find(connection: sqlite3.Connection, stream: StreamId) -> tuple[int, archiving.Found]:
    row = connection.execute(_FOUND, (stream.category, stream.id)).fetchone()
    if row is None:
        raise archiving.no_stream(stream)
    number, version, at, truncated, snapshot, schema = row
    archived_at = None if at is None else rows.instant(at)
    return number, archiving.Found(StreamInfo(stream, abs(version), truncated + 1, archived_at), snapshot, schema)


def _check_seen(
    connection: sqlite3.Connection, number: int, found: archiving.Found, *, upto: Version, seen: Position
) -> None:
    (last,) = connection.execute(
        "SELECT max(position) FROM foldbus_events WHERE stream=? AND version<=?", (number, upto)
    ).fetchone()
    archiving.check_seen(found, last, seen=seen)


def _move(connection: sqlite3.Connection, number: int, out_of: str, into: str) -> None:
    connection.execute(f"INSERT INTO {into} ({_COLUMNS}) SELECT {_COLUMNS} FROM {out_of} WHERE stream=?", (number,))
    connection.execute(f"DELETE FROM {out_of} WHERE stream=?", (number,))
