"""Timers: rows that come up when the clock given to the store says so."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from bus.seams import Clock
from eventstore import rows
from eventstore.port import Timer
from eventstore.sqlite.database import SqliteDatabase


class SqliteTimers:
    def __init__(self, database: SqliteDatabase, clock: Clock) -> None:
        self._database, self._clock = database, clock

    def now(self) -> datetime:
        return self._clock.now()

    async def due(self, *, limit: int, lease_s: float = 30.0) -> Sequence[Timer]:
        now = rows.micros(self._clock.now())
        # A read first: most of the time nothing is due, and a write would queue with the commits to find that out.
        if not await self._database.read(lambda connection: _due(connection, now, 1)):
            return []

        def hide(connection: sqlite3.Connection) -> list[Any]:
            found = _due(connection, now, limit)
            connection.executemany(
                "UPDATE foldbus_timers SET shown_at=? WHERE number=?",
                [(now + round(lease_s * 1_000_000), number) for number, *_ in found],
            )
            return found

        found = await self._database.write(hide, together=True)
        return [
            Timer(consumer, UUID(bytes=id), key, rows.instant(due_at), rows.from_document(envelope, data))
            for _, consumer, id, key, due_at, envelope, data in found
        ]

    async def next_due(self) -> datetime | None:
        def earliest(connection: sqlite3.Connection) -> int | None:
            found: int | None = connection.execute("SELECT min(shown_at) FROM foldbus_timers").fetchone()[0]
            return found

        found = await self._database.read(earliest)
        return None if found is None else rows.instant(found)

    async def release(self, timer: Timer, *, delay_s: float) -> None:
        shown_at = rows.micros(self._clock.now()) + round(delay_s * 1_000_000)

        def show(connection: sqlite3.Connection) -> None:
            connection.execute(
                "UPDATE foldbus_timers SET shown_at=max(due_at, ?) WHERE consumer=? AND id=?",
                (shown_at, timer.consumer, timer.id.bytes),
            )

        await self._database.write(show, together=True)


def _due(connection: sqlite3.Connection, now: int, limit: int) -> list[Any]:
    """In the order of their due times. Hidden ones are passed over: as many as workers have in hand."""
    return connection.execute(
        "SELECT number, consumer, id, key, due_at, envelope, data FROM foldbus_timers "
        "WHERE due_at<=? AND shown_at<=? ORDER BY due_at, number LIMIT ?",
        (now, now, limit),
    ).fetchall()
