"""Everything that is read, as functions over an open read transaction: one state of the file throughout."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from bus.envelope import Envelope, Offset, Position, StreamId
from eventstore import rows, selecting
from eventstore.loading import whole
from eventstore.port import ClaimState, DeadLetter, Page, Slice, Standing, Wanted
from eventstore.sqlite import snapshots
from eventstore.sqlite.session import DriverSession, Session, chunks
from eventstore.sqlite.units import claim_rows, parked_keys, stream_rows

_STREAM = (
    "SELECT id, type, key, topic, data, time, meta, version, position FROM foldbus_events "
    "WHERE stream=? AND version>? ORDER BY version LIMIT ?"
)
_EVENTS = (
    "SELECT e.id, e.type, e.key, e.topic, e.data, e.time, e.meta, s.category, s.id, e.version, e.position "
    "FROM foldbus_events e CROSS JOIN foldbus_streams s ON s.number=e.stream "
    "WHERE e.position>? ORDER BY e.position LIMIT ?"
)
_OUTGOING = (
    "SELECT id, type, key, topic, data, time, meta, position FROM foldbus_outgoing "
    "WHERE position>? ORDER BY position LIMIT ?"
)


def head(connection: sqlite3.Connection) -> Position:
    return int(connection.execute("SELECT head FROM foldbus_log").fetchone()[0])


def load(connection: sqlite3.Connection, wanted: Sequence[Wanted]) -> list[Slice]:
    streams = dict.fromkeys(one.stream for one in wanted)
    known = {stream: (number, version) for stream, number, version in stream_rows(DriverSession(connection), streams)}
    slices: list[Slice] = []
    for one in wanted:
        number, version = known.get(one.stream, (0, 0))
        selecting.check_version(one.stream, version)
        records: list[Envelope] = []
        after, snapshot = one.after, None
        if one.snapshot_schema is not None and version > after:
            snapshot = snapshots.find(connection, one.stream, one.snapshot_schema, after)
            after = after if snapshot is None else snapshot.version
        if version > after and one.limit != 0:
            limit = -1 if one.limit is None else one.limit
            records = [
                rows.envelope(
                    UUID(bytes=id), type, key, topic, data, rows.instant(time), meta, one.stream, at, position
                )
                for id, type, key, topic, data, time, meta, at, position in connection.execute(
                    _STREAM, (number, after, limit)
                )
            ]
        slices.append(whole(one, Slice(one.stream, version, records, snapshot)))
    return slices


def examine(session: Session, consumer: str, ids: Sequence[tuple[UUID, str | None]]) -> list[Standing]:
    """Without a key it is not asked whether that is parked."""
    wanted = sorted({id.bytes for id, _ in ids})
    started = {id for id, _, _ in effect_rows(session, consumer, wanted)}
    known = {
        id: Standing(state, None if reply is None else rows.from_document(reply, data or b""), id in started)
        for id, state, _, reply, data in claim_rows(session, consumer, wanted)
    }
    parked = parked_keys(session, [(consumer, key) for id, key in ids if key is not None and id not in known])
    found: list[Standing] = []
    for id, key in ids:
        state = ClaimState.KEY_PARKED if (consumer, key) in parked else ClaimState.NEW
        found.append(known.get(id) or Standing(state, started=id in started))
    return found


def effect_rows(session: Session, consumer: str, ids: Sequence[bytes]) -> list[tuple[UUID, int, int]]:
    """Id, token and end of the lease of those that were begun."""
    ((some,),) = session.rows("SELECT EXISTS (SELECT 1 FROM foldbus_effects)")
    return [
        (UUID(bytes=id), token, until)
        for marks, part in (chunks(ids) if some else ())
        for id, token, until in session.rows(
            f"SELECT message_id, token, lease_until FROM foldbus_effects WHERE consumer=? AND message_id IN ({marks})",
            (consumer, *part),
        )
    ]


def lease_is_over(session: Session, consumer: str, id: UUID, now: int) -> bool:
    """Of an effect that was begun: nobody is at it any more."""
    return all(until <= now for _, _, until in effect_rows(session, consumer, [id.bytes]))


def is_parked(session: Session, consumer: str, key: str) -> bool:
    return bool(parked_keys(session, [(consumer, key)]))


def page(connection: sqlite3.Connection, *, after: Position, limit: int, outgoing: bool) -> Page:
    found = [_event(row) for row in connection.execute(_EVENTS, (after, limit))]
    if outgoing:
        # Both are in order, and sorting two runs is one merge.
        found += [_sent(row) for row in connection.execute(_OUTGOING, (after, limit))]
        found.sort(key=lambda envelope: envelope.position or 0)
        del found[limit:]
    last = head(connection)
    upto = max(after, last)
    if len(found) == limit:
        upto = found[-1].position or upto
    return Page(found, upto, last)


def _event(row: tuple[Any, ...]) -> Envelope:
    id, type, key, topic, data, time, meta, category, name, version, position = row
    return rows.envelope(
        UUID(bytes=id), type, key, topic, data, rows.instant(time), meta, StreamId(category, name), version, position
    )


def _sent(row: tuple[Any, ...]) -> Envelope:
    id, type, key, topic, data, time, meta, position = row
    return rows.envelope(UUID(bytes=id), type, key, topic, data, rows.instant(time), meta, None, None, position)


def watermarks(connection: sqlite3.Connection, group: str) -> Mapping[tuple[str, int], Offset]:
    return {
        (topic, partition): offset
        for topic, partition, offset in connection.execute(
            "SELECT topic, partition, next_offset FROM foldbus_watermarks WHERE consumer_group=?", (group,)
        )
    }


def dead_letters(
    connection: sqlite3.Connection, *, after: tuple[datetime, UUID] | None, limit: int
) -> Sequence[DeadLetter]:
    failed_at, id = (rows.micros(after[0]), after[1].bytes) if after is not None else (-(2**63), b"")
    found = connection.execute(
        "SELECT consumer, id, key, value, failed_at, details FROM foldbus_dead_letters "
        "WHERE (failed_at, id) > (?, ?) ORDER BY failed_at, id, consumer LIMIT ?",
        (failed_at, id, limit),
    ).fetchall()
    if len(found) == limit and limit > 0:
        # The same message, given up by several consumers at once, is not parted by a page's end: `after` names no
        # consumer, and the rest would never be seen.
        consumer, id, _, _, failed_at, _ = found[-1]
        found += connection.execute(
            "SELECT consumer, id, key, value, failed_at, details FROM foldbus_dead_letters "
            "WHERE failed_at=? AND id=? AND consumer>? ORDER BY consumer",
            (failed_at, id, consumer),
        ).fetchall()
    return [
        rows.dead_letter(consumer, UUID(bytes=id), key, value, rows.instant(at), details)
        for consumer, id, key, value, at, details in found
    ]
