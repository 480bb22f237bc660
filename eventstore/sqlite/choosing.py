"""Chosen events of the log, parts of streams, the list of streams; as functions over an open read transaction."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from bus.envelope import Envelope, Position, StreamId, Version
from eventstore import rows, selecting
from eventstore.port import Bodies, Page, Slice, StreamInfo, Where
from eventstore.sqlite.reading import head

_END = 2**63 - 1
_COLUMNS = "e.id, e.type, e.key, e.topic, e.data, e.time, e.meta, e.version, e.position"


def page(connection: sqlite3.Connection, where: Where, *, after: Position, limit: int) -> Page:
    """Events of which all that `where` says holds. Looks at each of a span (see `eventstore/selecting.py`)."""
    span = selecting.span(where, after=after, head=head(connection))
    if where.stream is not None:
        return span.page_of_stream(_after(connection, where.stream, after, limit), limit, where)
    conditions, values = ["e.position > ?", "e.position <= ?"], [span.after, span.upto]
    for condition, value in _conditions(where):
        conditions.append(condition)
        values += [value] * condition.count("?")
    found = connection.execute(
        f"SELECT s.category, s.id, {_COLUMNS} "
        "FROM foldbus_events e CROSS JOIN foldbus_streams s ON s.number = e.stream "
        f"WHERE {' AND '.join(conditions)} ORDER BY e.position LIMIT ?",
        (*values, limit),
    )
    return span.page([_envelope(StreamId(category, id), *row) for category, id, *row in found], limit)


def bodies(connection: sqlite3.Connection, stream: StreamId, after: Version, upto: Version) -> Bodies:
    found = connection.execute(
        "SELECT e.type, e.data FROM foldbus_streams s CROSS JOIN foldbus_events e ON e.stream = s.number "
        "WHERE s.category = ? AND s.id = ? AND e.version > ? AND e.version <= ? ORDER BY e.version",
        (stream.category, stream.id, after, upto),
    ).fetchall()
    return Bodies(stream, [row[0] for row in found], [row[1] for row in found])


def _conditions(where: Where) -> list[tuple[str, Any]]:
    """SQL, and the value of all its parameters."""
    found: list[tuple[str, Any]] = []
    if where.types is not None:
        condition = "e.type IN (SELECT value FROM json_each(?))"
        if selecting.asks_for_any_version(where):
            condition = f"({condition} OR rtrim(e.type, '0123456789') || '*' IN (SELECT value FROM json_each(?)))"
        found.append((condition, json.dumps(sorted(where.types))))
    if where.since is not None:
        found.append(("e.time >= ?", rows.micros(where.since)))
    if where.until is not None:
        found.append(("e.time < ?", rows.micros(where.until)))
    if where.categories is not None:
        found.append(("s.category IN (SELECT value FROM json_each(?))", json.dumps(sorted(where.categories))))
    if where.correlation_id is not None:
        # Most rows are told apart without parsing them.
        condition = "instr(e.meta, ?) > 0 AND json_extract(e.meta, '$.correlation') = ?"
        found.append((condition, where.correlation_id.hex))
    return found


def _after(connection: sqlite3.Connection, stream: StreamId, after: Position, limit: int) -> list[Envelope]:
    """The first `limit` events of one stream above a position. Positions rise with versions, so the version to begin
    at is found by halving, in the index alone; versions may be missing at the beginning of a stream only."""
    number, _ = _number_and_version(connection, stream)
    low = high = 0  # versions up to `low` are not above `after`, those above `high` are
    if after > 0:
        newest = "SELECT version FROM foldbus_events WHERE stream = ? ORDER BY version DESC LIMIT 1"
        high = (connection.execute(newest, (number,)).fetchone() or (0,))[0]
    while low < high:
        middle = (low + high + 1) // 2
        version, position = connection.execute(
            "SELECT version, position FROM foldbus_events WHERE stream = ? AND version >= ? ORDER BY version LIMIT 1",
            (number, middle),
        ).fetchone()
        if position <= after:
            low = version
        else:
            high = middle - 1
    found = connection.execute(
        f"SELECT {_COLUMNS} FROM foldbus_events e WHERE stream = ? AND version > ? ORDER BY version LIMIT ?",
        (number, low, limit),
    )
    return [_envelope(stream, *row) for row in found]


def read_stream(
    connection: sqlite3.Connection,
    stream: StreamId,
    *,
    after: Version,
    upto: Version | None,
    backward: bool,
    limit: int | None,
) -> Slice:
    number, version = _number_and_version(connection, stream)
    selecting.check_version(stream, version)
    found = connection.execute(
        f"SELECT {_COLUMNS} FROM foldbus_events e WHERE stream = ? AND version > ? AND version <= ? "
        f"ORDER BY version {'DESC' if backward else 'ASC'} LIMIT ?",
        (number, after, _END if upto is None else upto, -1 if limit is None else limit),
    )
    return Slice(stream, version, [_envelope(stream, *row) for row in found])


def streams(
    connection: sqlite3.Connection, *, category: str | None, after: StreamId | None, limit: int
) -> Sequence[StreamInfo]:
    conditions, values = ["s.version <> 0"], list[Any]()
    if category is not None:
        conditions.append("s.category = ?")
        values.append(category)
    if after is not None:
        conditions.append("(s.category, s.id) > (?, ?)")
        values += [after.category, after.id]
    found = connection.execute(
        "SELECT s.category, s.id, abs(s.version), coalesce(p.truncated_upto, 0) + 1, s.archived_at "
        "FROM foldbus_streams s LEFT JOIN foldbus_snapshots p ON p.category = s.category AND p.id = s.id "
        f"WHERE {' AND '.join(conditions)} ORDER BY s.category, s.id LIMIT ?",
        (*values, limit),
    )
    return [
        StreamInfo(StreamId(category, id), version, kept_from, None if at is None else rows.instant(at))
        for category, id, version, kept_from, at in found
    ]


def _number_and_version(connection: sqlite3.Connection, stream: StreamId) -> tuple[int, Version]:
    found = connection.execute(
        "SELECT number, version FROM foldbus_streams WHERE category = ? AND id = ?", (stream.category, stream.id)
    ).fetchone()
    return (0, 0) if found is None else (found[0], found[1])


def _envelope(
    stream: StreamId,
    id: bytes,
    type: str,
    key: str,
    topic: str | None,
    data: bytes,
    time: int,
    meta: str,
    version: Version,
    position: Position,
) -> Envelope:
    return rows.envelope(UUID(bytes=id), type, key, topic, data, rows.instant(time), meta, stream, version, position)


__all__ = ["page", "read_stream", "streams"]
