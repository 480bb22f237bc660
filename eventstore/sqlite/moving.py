"""A SQLite store as the rows of an export, and an empty one filled from them. See `eventstore/export.py`.

Reading is one read transaction from beginning to end: one state of the file, whatever is written meanwhile (the
write-ahead log grows for as long). A store that is being filled has the table `foldbus_import`, and cannot be opened.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from bus.seams import Clock, SystemClock
from eventstore import documents, rows
from eventstore.export import BATCH_BYTES, BATCH_ROWS, SECTIONS, Filled, Header, NotEmpty, Row, Section, in_use
from eventstore.sqlite import migrations
from eventstore.sqlite.database import connect
from eventstore.sqlite.faults import translated
from eventstore.sqlite.migrations import IMPORT

T = TypeVar("T")

_MESSAGE = "{of}.id, {of}.type, {of}.key, {of}.topic, {of}.time, {of}.data, {of}.meta"
_EVENTS = (
    f"SELECT e.position, s.category, s.id, e.version, {_MESSAGE.format(of='e')} "
    "FROM {table} e CROSS JOIN foldbus_streams s ON s.number=e.stream WHERE e.position>? ORDER BY e.position"
)
_SELECT: Mapping[str, str] = {
    "event": _EVENTS.format(table="foldbus_events"),
    "archived": _EVENTS.format(table="foldbus_archived"),
    "outgoing": f"SELECT o.position, {_MESSAGE.format(of='o')} FROM foldbus_outgoing o "
    "WHERE o.position>? ORDER BY o.position",
    "stream": "SELECT category, id, abs(version), archived_at FROM foldbus_streams "
    "WHERE (category, id)>(?, ?) ORDER BY category, id",
    "claim": "SELECT consumer, message_id, key, state, claimed_at, reply, reply_data FROM foldbus_claims "
    "WHERE (consumer, message_id)>(?, ?) ORDER BY consumer, message_id",
    "settled_letter": "SELECT number, consumer, id, failed_at, key, value, details, settled_at, settled_as, settled_by"
    ", reason FROM foldbus_settled_letters WHERE number>? ORDER BY number",
    "snapshot": "SELECT category, id, version, schema, state, made_at, truncated_upto FROM foldbus_snapshots "
    "WHERE (category, id)>(?, ?) ORDER BY category, id",
    "timer": "SELECT consumer, id, key, due_at, shown_at, envelope, data FROM foldbus_timers "
    "WHERE (consumer, id)>(?, ?) ORDER BY consumer, id",
    "dead_letter": "SELECT consumer, id, failed_at, key, value, details FROM foldbus_dead_letters "
    "WHERE (consumer, id)>(?, ?) ORDER BY consumer, id",
    "watermark": "SELECT consumer_group, topic, partition, next_offset FROM foldbus_watermarks "
    "WHERE (consumer_group, topic, partition)>(?, ?, ?) ORDER BY consumer_group, topic, partition",
    "lease": "SELECT name, token, position FROM foldbus_leases WHERE name>? ORDER BY name",
    "parked_key": "SELECT consumer, key, since, due_at, token FROM foldbus_parked_keys "
    "WHERE (consumer, key)>(?, ?) ORDER BY consumer, key",
    "parked": "SELECT number, consumer, key, message_id, parked_at, envelope, data, details, record_key, record_value"
    ", failure FROM foldbus_parked WHERE number>? ORDER BY number",
    "effect": "SELECT consumer, message_id, token, lease_until FROM foldbus_effects "
    "WHERE (consumer, message_id)>(?, ?) ORDER BY consumer, message_id",
    "pause": "SELECT consumer_group, at, made_by, reason FROM foldbus_pauses WHERE consumer_group>? "
    "ORDER BY consumer_group",
}
TABLES: Mapping[str, str] = {
    "event": "foldbus_events",
    "archived": "foldbus_archived",
    "outgoing": "foldbus_outgoing",
    "stream": "foldbus_streams",
    "claim": "foldbus_claims",
    "settled_letter": "foldbus_settled_letters",
    "snapshot": "foldbus_snapshots",
    "timer": "foldbus_timers",
    "dead_letter": "foldbus_dead_letters",
    "watermark": "foldbus_watermarks",
    "lease": "foldbus_leases",
    "parked_key": "foldbus_parked_keys",
    "parked": "foldbus_parked",
    "effect": "foldbus_effects",
    "pause": "foldbus_pauses",
}
# Below the first of everything. (An empty text is no name.)
_BEGIN: Mapping[str, Row] = {
    "event": (-1,),
    "archived": (-1,),
    "outgoing": (-1,),
    "settled_letter": (-1,),
    "parked": (-1,),
    "watermark": ("", "", -(2**63)),
    "lease": ("",),
    "pause": ("",),
}
_IDS: Mapping[str, int] = {
    "event": 4,
    "archived": 4,
    "outgoing": 1,
    "claim": 1,
    "settled_letter": 2,
    "timer": 1,
    "dead_letter": 1,
    "parked": 3,
    "effect": 1,
}
"""Which column is an id: bytes here, hexadecimal outside."""

# A stream's number is the position of its first event, as far as that is still there; see 0001_store.sql.
_NEW_STREAM = "INSERT OR IGNORE INTO foldbus_streams (number, category, id, version) VALUES (?, ?, ?, 0)"
_INSERT_EVENT = (
    "INSERT INTO {table} (position, stream, version, id, type, key, topic, time, data, meta) "
    "VALUES (?, (SELECT number FROM foldbus_streams WHERE category=? AND id=?), ?, ?, ?, ?, ?, ?, ?, ?)"
)
_INSERT: Mapping[str, str] = {
    "event": _INSERT_EVENT.format(table="foldbus_events"),
    "archived": _INSERT_EVENT.format(table="foldbus_archived"),
    "outgoing": "INSERT INTO foldbus_outgoing (position, id, type, key, topic, time, data, meta) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
    "stream": "INSERT INTO foldbus_streams (category, id, version, archived_at, number) "
    "VALUES (?, ?, ?, ?, (SELECT min(0, coalesce(min(number), 0)) - 1 FROM foldbus_streams)) "
    "ON CONFLICT (category, id) DO UPDATE SET version=excluded.version, archived_at=excluded.archived_at",
    "claim": "INSERT INTO foldbus_claims (consumer, message_id, key, state, claimed_at, reply, reply_data, outcome) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
    "settled_letter": "INSERT INTO foldbus_settled_letters (number, consumer, id, failed_at, key, value, details, "
    "settled_at, settled_as, settled_by, reason) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    "snapshot": "INSERT INTO foldbus_snapshots (category, id, version, schema, state, made_at, truncated_upto) "
    "VALUES (?, ?, ?, ?, ?, ?, ?)",
    "timer": "INSERT INTO foldbus_timers (consumer, id, key, due_at, shown_at, envelope, data) "
    "VALUES (?, ?, ?, ?, ?, ?, ?)",
    "dead_letter": "INSERT INTO foldbus_dead_letters (consumer, id, failed_at, key, value, details) "
    "VALUES (?, ?, ?, ?, ?, ?)",
    "watermark": "INSERT INTO foldbus_watermarks (consumer_group, topic, partition, next_offset) VALUES (?, ?, ?, ?)",
    "lease": "INSERT INTO foldbus_leases (name, token, position, until) VALUES (?, ?, ?, 0)",
    "parked_key": "INSERT INTO foldbus_parked_keys (consumer, key, since, due_at, token, shown_at) "
    "VALUES (?1, ?2, ?3, ?4, ?5, ?4)",
    "parked": "INSERT INTO foldbus_parked (number, consumer, key, message_id, parked_at, envelope, data, details, "
    "record_key, record_value, failure) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    "effect": "INSERT INTO foldbus_effects (consumer, message_id, token, lease_until) VALUES (?, ?, ?, ?)",
    "pause": "INSERT INTO foldbus_pauses (consumer_group, at, made_by, reason) VALUES (?, ?, ?, ?)",
}


_ODD_REPLY = """
    case when (reply is null) <> (reply_data is null) then ' (half a reply)'
         when reply is not null and outcome is not null and instr(reply, '"outcome":"' || outcome || '"') = 0
              then ' (another outcome)' else '' end"""
RELATIONS: Mapping[str, str] = {
    "ev": "select s.category, s.id, e.version, e.position "
    "from foldbus_events e left join foldbus_streams s on s.number = e.stream",
    "ar": "select s.category, s.id, e.version, e.position "
    "from foldbus_archived e left join foldbus_streams s on s.number = e.stream",
    "st": "select category, id, version, archived_at is not null as archived from foldbus_streams",
    "sn": "select category, id, version, truncated_upto as truncated from foldbus_snapshots",
    "ou": "select position from foldbus_outgoing",
    "le": "select name, token, position from foldbus_leases",
    "cl": f"select consumer, lower(hex(message_id)) as message, state || {_ODD_REPLY} as state, null as effect, "
    "reply is not null as reply from foldbus_claims",
    "re": "select consumer, lower(hex(message_id)) as message, 1 as claimed, "
    "coalesce(json_extract(reply, '$.token[3]'), 0) as last_event, "
    "coalesce(json_extract(reply, '$.token[4]'), 0) as last_public "
    "from foldbus_claims where reply is not null and json_valid(reply)",
    "dl": "select consumer, lower(hex(id)) as id, failed_at from foldbus_dead_letters",
    "se": "select number, consumer, lower(hex(id)) as id, failed_at, settled_as from foldbus_settled_letters",
    "wm": 'select consumer_group as of_group, topic, partition as part, next_offset as "next" from foldbus_watermarks',
    "lg": "select epoch, head from foldbus_log",
    "pk": "select consumer, key, token, due_at is null as held, shown_at is null as hidden from foldbus_parked_keys",
    "pa": "select number, consumer, key, lower(hex(message_id)) as message from foldbus_parked",
    "ef": "select consumer, lower(hex(message_id)) as message, token from foldbus_effects",
}
"""See `eventstore/verify.py`."""
_WITH = "with " + ", ".join(f"{name} as ({sql})" for name, sql in RELATIONS.items())


class _Thread:
    """One connection that never leaves its thread's queue."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="foldbus-sqlite-moving")
        self.connection = connect(path)

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Raises what the store raises. A cancelled caller waits: the connection is not closed under the thread."""
        running = asyncio.get_running_loop().run_in_executor(self._threads, work, self.connection)
        try:
            return await asyncio.shield(running)
        except sqlite3.Error as error:
            clean = translated(error, str(self.path))
            if clean is error:
                raise
            raise clean from error
        except asyncio.CancelledError:
            self.connection.interrupt()
            await asyncio.wait([running])
            running.exception()
            raise

    def close(self) -> None:
        self.connection.close()
        self._threads.shutdown(wait=False)


class SqliteSource:
    """Made by `open_source`."""

    def __init__(self, thread: _Thread, service: str) -> None:
        self._thread, self._service = thread, service

    async def header(self) -> Header:
        def look(connection: sqlite3.Connection) -> Header:
            epoch, head = connection.execute("SELECT epoch, head FROM foldbus_log").fetchone()
            numbers = connection.execute("SELECT seq FROM sqlite_sequence WHERE name='foldbus_parked'").fetchone()
            return Header(self._service, epoch, head, _counts(connection), numbers[0] if numbers else 0)

        return await self._thread.run(look)

    async def rows(self, section: Section, *, after: Row | None) -> AsyncIterator[Sequence[Row]]:
        name = section.name
        at = _IDS.get(name)
        if after is None:
            after = _BEGIN.get(name, ("", "") if at is None else ("", b""))
        elif at is not None and at < len(after):
            after = (*after[:at], bytes.fromhex(after[at]), *after[at + 1 :])
        found = await self._thread.run(lambda connection: connection.execute(_SELECT[name], after))
        while batch := await self._thread.run(lambda _: _fetch(found)):
            if at is not None:
                batch = [(*row[:at], row[at].hex(), *row[at + 1 :]) for row in batch]
            yield batch

    async def ask(self, sql: str, *, limit: int) -> tuple[int, Sequence[str]]:
        def look(connection: sqlite3.Connection) -> tuple[int, Sequence[str]]:
            count = 0
            found: list[str] = []
            for (text,) in connection.execute(f"{_WITH} {sql}"):
                count += 1
                if len(found) < limit:
                    found.append(text)
            return count, found

        return await self._thread.run(look)


@asynccontextmanager
async def open_source(
    path: Path, *, service: str, online: bool = False, clock: Clock | None = None
) -> AsyncGenerator[SqliteSource]:
    """Raises SchemaMismatch, and StoreInUse when somebody leads, unless `online`."""
    thread = _Thread(path)
    try:
        now = rows.micros((clock or SystemClock()).now())

        def begin(connection: sqlite3.Connection) -> None:
            connection.execute("PRAGMA query_only=ON")
            connection.execute("BEGIN")
            migrations.check(connection, path, service=service)
            led = connection.execute("SELECT name, until FROM foldbus_leases WHERE until>?", (now,)).fetchall()
            if led and not online:
                raise in_use(service, [(name, f"until {rows.instant(until).isoformat()}") for name, until in led])

        await thread.run(begin)
        yield SqliteSource(thread, service)
    finally:
        thread.close()


class SqliteTarget:
    """Made by `open_target`."""

    def __init__(self, thread: _Thread) -> None:
        self._thread = thread

    async def begin(self, header: Header, filled: Filled) -> Filled:
        return await self._write(lambda connection: _begin(connection, self._thread.path, header, filled))

    async def write(self, section: Section, rows: Sequence[Row], filled: Filled) -> None:
        given = [_as_stored(section, row) for row in rows]
        streams = [(row[0], row[1], row[2]) for row in rows] if section.name in ("event", "archived") else []

        def work(connection: sqlite3.Connection) -> None:
            connection.executemany(_NEW_STREAM, streams)
            connection.executemany(_INSERT[section.name], given)
            connection.execute(f"UPDATE {IMPORT} SET lines=?, digest=?", (filled.lines, filled.digest))

        await self._write(work)

    async def counts(self) -> Mapping[str, int]:
        return await self._thread.run(_counts)

    async def finish(self) -> None:
        await self._write(lambda connection: connection.execute(f"DROP TABLE {IMPORT}"))

    async def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def all_or_nothing(connection: sqlite3.Connection) -> T:
            migrations.patiently(lambda: connection.execute("BEGIN IMMEDIATE"), self._thread.path)
            try:
                result = work(connection)
                connection.execute("COMMIT")
                return result
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

        return await self._thread.run(all_or_nothing)


@asynccontextmanager
async def open_target(path: Path, *, service: str) -> AsyncGenerator[SqliteTarget]:
    """Creates the file when there is none. Raises SchemaMismatch."""
    await asyncio.to_thread(migrations.migrate, path, service=service)
    thread = _Thread(path)
    try:
        yield SqliteTarget(thread)
    finally:
        thread.close()


def _begin(connection: sqlite3.Connection, path: Path, header: Header, filled: Filled) -> Filled:
    if migrations.has_table(connection, IMPORT):
        return Filled(*connection.execute(f"SELECT lines, digest FROM {IMPORT}").fetchone())
    found = {name: count for name, count in _counts(connection).items() if count}
    if found:
        raise NotEmpty(f"{path} holds {found}; wanted an empty store, nothing was written")
    connection.execute(f"CREATE TABLE {IMPORT} (lines INTEGER NOT NULL, digest TEXT NOT NULL)")
    connection.execute(f"INSERT INTO {IMPORT} VALUES (?, ?)", (filled.lines, filled.digest))
    # At once: whatever is written beside this draws behind what is to come, and is found in the end.
    connection.execute("UPDATE foldbus_log SET epoch=?, head=?", (header.epoch, header.head))
    connection.execute("DELETE FROM sqlite_sequence WHERE name='foldbus_parked'")
    connection.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('foldbus_parked', ?)", (header.number,))
    return filled


def _as_stored(section: Section, row: Row) -> Row:
    at = _IDS.get(section.name)
    if at is not None:
        row = (*row[:at], bytes.fromhex(row[at]), *row[at + 1 :])
    if section.name == "stream" and row[3] is not None:
        row = (*row[:2], -row[2], row[3])
    if section.name == "claim":
        row = (*row, documents.outcome_in(row[5]))
    return row


def _counts(connection: sqlite3.Connection) -> dict[str, int]:
    return {
        section.name: connection.execute(f"SELECT count(*) FROM {TABLES[section.name]}").fetchone()[0]
        for section in SECTIONS
    }


def _fetch(found: sqlite3.Cursor) -> list[Any]:
    batch: list[Any] = []
    size = 0
    while len(batch) < BATCH_ROWS and size < BATCH_BYTES and (row := found.fetchone()) is not None:
        batch.append(row)
        size += sum(len(value) for value in row if isinstance(value, (bytes, str)))
    return batch


__all__ = ["SqliteSource", "SqliteTarget", "open_source", "open_target"]
