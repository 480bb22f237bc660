"""Snapshots in the store's file. See `Snapshots` in the port; 0002_snapshots.sql says what protects them."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from bus.envelope import StreamId, Version
from eventstore import rows
from eventstore.port import Snapshot
from eventstore.snapshots import check_snapshots
from eventstore.sqlite.database import SqliteDatabase

_SAVE = (
    "INSERT INTO foldbus_snapshots AS s (category, id, version, schema, state, made_at) "
    "SELECT ?1, ?2, ?3, ?4, ?5, ?6 "
    "WHERE EXISTS (SELECT 1 FROM foldbus_streams WHERE category=?1 AND id=?2 AND version>=?3) "
    "ON CONFLICT (category, id) DO UPDATE SET version=excluded.version, schema=excluded.schema, state=excluded.state, "
    "made_at=excluded.made_at "
    "WHERE (s.schema<>excluded.schema OR s.version<=excluded.version) AND excluded.version>=s.truncated_upto"
)
_ONE = (
    "SELECT category, id, version, schema, state, made_at FROM foldbus_snapshots "
    "WHERE category=? AND id=? AND schema=? AND version>?"
)
_PAGE = (
    "SELECT category, id, version, schema, state, made_at FROM foldbus_snapshots "
    "WHERE (category, id)>(?, ?) ORDER BY category, id LIMIT ?"
)
_DROP = (
    "DELETE FROM foldbus_snapshots WHERE truncated_upto=0 "
    "AND (?1 IS NULL OR category=?1) AND (?2 IS NULL OR schema<>?2)"
)


class SqliteSnapshots:
    def __init__(self, database: SqliteDatabase) -> None:
        self._database = database

    async def save(self, snapshots: Sequence[Snapshot]) -> int:
        found = check_snapshots(snapshots)
        if not found:
            return 0
        return await self._database.write(lambda connection: _save(connection, found), together=True)

    async def page(self, *, after: StreamId | None = None, limit: int = 1000) -> Sequence[Snapshot]:
        if limit < 1:
            raise ValueError(f"limit is {limit}; wanted 1 or more")
        # No stream has an empty category, so nothing is passed over.
        category, id = (after.category, after.id) if after is not None else ("", "")

        def read(connection: sqlite3.Connection) -> list[Snapshot]:
            return [_snapshot(*row) for row in connection.execute(_PAGE, (category, id, limit))]

        return await self._database.read(read)

    async def drop(self, *, category: str | None = None, keep_schema: str | None = None) -> int:
        return await self._database.write(
            lambda connection: connection.execute(_DROP, (category, keep_schema)).rowcount, together=True
        )


def _save(connection: sqlite3.Connection, snapshots: Sequence[Snapshot]) -> int:
    return sum(
        connection.execute(
            _SAVE, (one.stream.category, one.stream.id, one.version, one.schema, one.state, rows.micros(one.made_at))
        ).rowcount
        for one in snapshots
    )


def find(connection: sqlite3.Connection, stream: StreamId, schema: str, after: Version) -> Snapshot | None:
    """The stream's snapshot, if it is of this schema and above `after`; within a reader's transaction."""
    row = connection.execute(_ONE, (stream.category, stream.id, schema, after)).fetchone()
    return None if row is None else _snapshot(*row)


def _snapshot(category: str, id: str, version: int, schema: str, state: bytes, made_at: int) -> Snapshot:
    return Snapshot(StreamId(category, id), version, schema, state, rows.instant(made_at))
