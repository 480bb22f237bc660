"""Pages of records for the relay: see `eventstore/relaying.py`."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from operator import itemgetter
from typing import Any

from bus.envelope import Position
from eventstore.errors import CheckpointAhead
from eventstore.records import RecordPage
from eventstore.relaying import records_of
from eventstore.sqlite.database import SqliteDatabase
from eventstore.sqlite.reading import head

# What has no topic is not read: private events can be most of a log. Its place counts.
_EVENTS = (
    "SELECT e.position, e.id, e.type, e.key, e.topic, CASE WHEN e.topic IS NOT NULL THEN e.data END, "
    "s.category, s.id, e.version, e.time, e.meta, NULL, NULL "
    "FROM foldbus_events e CROSS JOIN foldbus_streams s ON s.number=e.stream "
    "WHERE e.position>? ORDER BY e.position LIMIT ?"
)
_OUTGOING = (
    "SELECT position, id, type, key, topic, data, NULL, NULL, NULL, time, meta, NULL, NULL FROM foldbus_outgoing "
    "WHERE position>? ORDER BY position LIMIT ?"
)


class SqliteRecords:
    """`saw` is told the head that was read."""

    def __init__(self, database: SqliteDatabase, saw: Callable[[Position], None]) -> None:
        self._database, self._saw = database, saw

    async def read(self, *, after: Position, limit: int) -> RecordPage:
        if limit < 1:
            raise ValueError(f"limit is {limit}; wanted at least 1")
        page = await self._database.read(lambda connection: _page(connection, after, limit))
        self._saw(page.head)
        if after > page.head:
            raise CheckpointAhead(after, drawn=page.head)
        return page


def _page(connection: sqlite3.Connection, after: Position, limit: int) -> RecordPage:
    found: list[tuple[Any, ...]] = connection.execute(_EVENTS, (after, limit)).fetchall()
    sent = connection.execute(_OUTGOING, (after, limit)).fetchall()
    if sent:
        found += sent
        found.sort(key=itemgetter(0))  # both are in order, and sorting two runs is one merge
        del found[limit:]
    last = head(connection)
    records, positions = records_of(found)
    return RecordPage(records, positions, found[-1][0] if len(found) == limit else max(after, last), last)


__all__ = ["SqliteRecords"]
