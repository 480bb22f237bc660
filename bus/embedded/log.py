"""Records in their lanes: packing, appending, reading on, trimming. Plain functions over a connection."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from struct import Struct

from bus.envelope import Offset
from bus.transport import Headers, TopicSpec, TopicState

LANE_BITS = 40
"""Offsets take the lower bits of a record's id: 10^12 of them per lane, and 8 million lanes."""

ROWS_PER_STATEMENT = 128
TRIMMED_AT_ONCE = 5_000
"""Rows that one transaction trims from one lane: it must not hold up the writers."""

Row = tuple[bytes | None, bytes | None, bytes | None]
"""key, value, packed headers"""


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as every process remembers it; `lanes` by partition."""

    id: int
    name: str
    retention_s: float | None
    compact: bool
    max_bytes: int
    lanes: tuple[int, ...]

    def state(self, *, lingers_s: float) -> TopicState:
        return TopicState(self.name, len(self.lanes), self.retention_s, self.compact, self.max_bytes, lingers_s)


# --- headers ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _lengths(count: int) -> Struct:
    return Struct(f"<{2 * count}I")


_count = Struct("<I")


def pack_headers(headers: Collection[tuple[str, bytes]]) -> bytes | None:
    """Their count, the length of each name and value, then all names and values. None for no headers."""
    if not headers:
        return None
    parts: list[bytes] = []
    for name, value in headers:
        parts += (name.encode(), value)
    count = len(headers)
    return _count.pack(count) + _lengths(count).pack(*map(len, parts)) + b"".join(parts)


def unpack_headers(packed: bytes | None) -> Headers:
    if packed is None:
        return ()
    count = _count.unpack_from(packed)[0]
    lengths = _lengths(count)
    at = 4 + lengths.size
    headers: list[tuple[str, bytes]] = []
    sizes = iter(lengths.unpack_from(packed, 4))
    for name_size, value_size in zip(sizes, sizes, strict=True):
        middle = at + name_size
        end = middle + value_size
        headers.append((packed[at:middle].decode(), packed[middle:end]))
        at = end
    return tuple(headers)


# --- topics ----------------------------------------------------------------------------------------------------------


def create(conn: sqlite3.Connection, specs: Sequence[TopicSpec]) -> None:
    for spec in specs:
        for (topic_id,) in conn.execute(
            "INSERT INTO topics (name, partitions, retention_s, compact, max_bytes) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT (name) DO NOTHING RETURNING id",
            (spec.name, spec.partitions, spec.retention_s, spec.compact, spec.max_bytes),
        ).fetchall():
            conn.executemany(
                "INSERT INTO lanes (topic_id, partition) VALUES (?, ?)",
                [(topic_id, partition) for partition in range(spec.partitions)],
            )


def find_topic(conn: sqlite3.Connection, name: str) -> Topic | None:
    rows = conn.execute(
        "SELECT t.id, t.retention_s, t.compact, t.max_bytes, l.id FROM topics t JOIN lanes l ON l.topic_id = t.id"
        " WHERE t.name = ? ORDER BY l.partition",
        (name,),
    ).fetchall()
    if not rows:
        return None
    topic_id, retention_s, compact, max_bytes, _ = rows[0]
    return Topic(topic_id, name, retention_s, bool(compact), max_bytes, tuple(row[4] for row in rows))


def bounds(conn: sqlite3.Connection, lanes: Sequence[int]) -> Mapping[int, tuple[Offset, Offset]]:
    """The first offset held and the next one to be written."""
    rows = conn.execute(
        "SELECT id, first_offset, next_offset FROM lanes WHERE id IN (SELECT value FROM json_each(?))",
        (json.dumps(lanes),),
    )
    return {lane: (first, end) for lane, first, end in rows.fetchall()}


def first_at(conn: sqlite3.Connection, lanes: Sequence[int], time_us: int) -> Mapping[int, Offset]:
    """The first offset held whose record is not older than that, else the next one to be written. Reads the lanes."""
    found: dict[int, Offset] = {}
    for lane, (_, end) in bounds(conn, lanes).items():
        base = lane << LANE_BITS
        ((first,),) = conn.execute(
            "SELECT min(id) FROM records WHERE id >= ? AND id < ? AND time_us >= ?", (base, base + end, time_us)
        ).fetchall()
        found[lane] = end if first is None else first - base
    return found


# --- append and read -------------------------------------------------------------------------------------------------


def tick_clock(conn: sqlite3.Connection) -> int:
    value: int
    ((value,),) = conn.execute("UPDATE clock SET value = value + 1 RETURNING value").fetchall()
    return value


@lru_cache(maxsize=ROWS_PER_STATEMENT)
def _insert(rows: int) -> str:
    return "INSERT INTO records (id, time_us, key, value, headers) VALUES " + ", ".join(["(?, ?, ?, ?, ?)"] * rows)


def append(conn: sqlite3.Connection, lanes: Sequence[int], rows: Sequence[Row], *, time_us: int) -> list[Offset]:
    """Writes `rows`, each into the lane at its place in `lanes`; answers their offsets.

    Many rows go into one statement: between two steps of a statement Python gives up its global lock and, under a busy
    event loop, may wait milliseconds to have it back.
    """
    counts: dict[int, int] = {}
    for lane in lanes:
        counts[lane] = counts.get(lane, 0) + 1
    ends = conn.execute(
        "UPDATE lanes SET next_offset = next_offset + wanted.value, touched = ?"
        " FROM json_each(?) AS wanted WHERE lanes.id = CAST(wanted.key AS INTEGER) RETURNING lanes.id, next_offset",
        (tick_clock(conn), json.dumps(counts)),
    ).fetchall()
    upcoming = {lane: end - counts[lane] for lane, end in ends}
    offsets: list[Offset] = []
    for start in range(0, len(rows), ROWS_PER_STATEMENT):
        chunk = rows[start : start + ROWS_PER_STATEMENT]
        parameters: list[object] = []
        for lane, row in zip(lanes[start : start + len(chunk)], chunk, strict=True):
            offset = upcoming[lane]
            upcoming[lane] = offset + 1
            offsets.append(offset)
            parameters += ((lane << LANE_BITS) + offset, time_us, *row)
        conn.execute(_insert(len(chunk)), parameters)
    return offsets


Stored = tuple[int, int, bytes | None, bytes | None, bytes | None]
"""id, time_us, key, value, packed headers"""


def read(
    conn: sqlite3.Connection, lane: int, *, start: Offset, end: Offset, limit: int, max_bytes: int
) -> tuple[list[Stored], int]:
    """Records from `start` to before `end`, at most `limit`, and their bytes; it stops when those exceed `max_bytes`,
    after at least one record."""
    base = lane << LANE_BITS
    cursor = conn.execute(
        "SELECT id, time_us, key, value, headers FROM records WHERE id >= ? AND id < ? ORDER BY id LIMIT ?",
        (base + start, base + end, limit),
    )
    rows: list[Stored] = []
    size = 0
    try:
        for row in cursor:
            rows.append(row)
            size += len(row[3] or b"") + len(row[4] or b"")
            if size > max_bytes:
                break
    finally:
        cursor.close()  # an open one would pin the log
    return rows, size


# --- forget ----------------------------------------------------------------------------------------------------------


def forget_before(conn: sqlite3.Connection, lane: int, offset: Offset, *, limit: int | None = None) -> int:
    """Drops what is below `offset`, at most `limit` records; answers how many."""
    base = lane << LANE_BITS
    if limit is not None:
        for (beyond,) in conn.execute(
            "SELECT id FROM records WHERE id >= ? AND id < ? ORDER BY id LIMIT 1 OFFSET ?",
            (base, base + offset, limit),
        ).fetchall():
            offset = beyond - base
    dropped = conn.execute("DELETE FROM records WHERE id >= ? AND id < ?", (base, base + offset)).rowcount
    conn.execute(
        "UPDATE lanes SET first_offset = min(?, next_offset) WHERE id = ? AND first_offset < ?", (offset, lane, offset)
    )
    return dropped


def trim(conn: sqlite3.Connection, *, now_us: int) -> int:
    """Drops what retention and compaction allow, a bounded number per lane; answers how many records went."""
    dropped = 0
    for lane, retention_s, compact, end in conn.execute(
        "SELECT l.id, t.retention_s, t.compact, l.next_offset FROM lanes l JOIN topics t ON t.id = l.topic_id"
        " WHERE t.retention_s IS NOT NULL OR t.compact"
    ).fetchall():
        base = lane << LANE_BITS
        if retention_s is not None:
            young = conn.execute(
                "SELECT id FROM (SELECT id, time_us FROM records WHERE id >= ? AND id < ? ORDER BY id LIMIT ?)"
                " WHERE time_us >= ? ORDER BY id LIMIT 1",
                (base, base + end, TRIMMED_AT_ONCE, now_us - int(retention_s * 1_000_000)),
            ).fetchall()
            keep_from = young[0][0] - base if young else end
            dropped += forget_before(conn, lane, keep_from, limit=TRIMMED_AT_ONCE)
        if compact:
            dropped += conn.execute(
                "DELETE FROM records WHERE id IN (SELECT id FROM (SELECT id, max(id) OVER (PARTITION BY key) AS latest"
                " FROM records WHERE id >= ? AND id < ? AND key IS NOT NULL) WHERE id < latest LIMIT ?)",
                (base, base + end, TRIMMED_AT_ONCE),
            ).rowcount
    return dropped
