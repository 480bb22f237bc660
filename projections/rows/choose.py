"""From a store to the rows that live beside it."""

from __future__ import annotations

from bus.seams import Clock, SystemClock
from projections.definition import Projection
from projections.port import Row, Rows
from projections.rows.postgres import PostgresHost, PostgresRows
from projections.rows.sqlite import SqliteHost, SqliteRows


def rows_for(store: object, projection: Projection[Row], *, clock: Clock | None = None) -> Rows[Row]:
    """The rows of `projection` in the database of `store`. Raises BadProjection when the row model cannot be columns,
    TypeError for a store that is neither adapter."""
    if isinstance(store, PostgresHost):
        return PostgresRows(store, projection)
    if isinstance(store, SqliteHost):
        return SqliteRows(store, projection, clock=clock or SystemClock())
    raise TypeError(f"{type(store).__qualname__} offers neither `database` (SQLite) nor `connection` (PostgreSQL)")
