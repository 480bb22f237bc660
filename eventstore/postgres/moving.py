"""A PostgreSQL store as the rows of an export, and an empty one filled from them. See `eventstore/export.py`.

Reading is one REPEATABLE READ transaction. What open appenders have drawn is not in it and not below any checkpoint in
it: a checkpoint only moves to the log's watermark, below which nothing is under way. A store that is being filled has
the table `import`, and cannot be opened.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import TypeAlias
from uuid import UUID

import asyncpg

from bus.envelope import ReplyOutcome
from eventstore import documents, rows
from eventstore.export import (
    BATCH_BYTES,
    BATCH_ROWS,
    SECTIONS,
    Filled,
    Header,
    NotEmpty,
    Row,
    Section,
    in_use,
)
from eventstore.port import ClaimState
from eventstore.postgres import schema
from eventstore.postgres.errors import DRIVER_ERRORS, translated
from eventstore.postgres.pool import driver_dsn
from eventstore.postgres.units import STATES

Driver: TypeAlias = "asyncpg.Connection[asyncpg.Record]"  # generic in its type stubs only

_STATE_NUMBERS = {str(state): number for number, state in STATES.items()}
_CONNECT_S = 30.0

_MESSAGE = "{of}.id, {of}.type, {of}.key, {of}.topic, {of}.made_at, {of}.data, {of}.meta"
_EVENTS = (
    f"select e.position, e.category, e.stream, e.version, {_MESSAGE.format(of='e')} "
    "from {schema}.{table} e where e.position > $1 order by e.position"
)
# Text is compared as bytes, whatever the database's collation is.
_NAMED = 'where (category collate "C", id collate "C") > ($1, $2) order by category collate "C", id collate "C"'
_CONSUMED = 'where (consumer collate "C", {id}) > ($1, $2) order by consumer collate "C", {id}'
_SELECT: Mapping[str, str] = {
    "event": _EVENTS.replace("{table}", "events"),
    "archived": _EVENTS.replace("{table}", "archived"),
    "outgoing": f"select o.position, {_MESSAGE.format(of='o')}, o.last_event, o.last_public "
    "from {schema}.outgoing o where o.position > $1 order by o.position",
    "stream": "select category, id, abs(version), archived_at from {schema}.streams " + _NAMED,
    "claim": "select c.consumer, c.message_id, c.key, c.state, c.taken_at, r.document, r.data, r.last_event, "
    "r.last_public from {schema}.claims c left join {schema}.replies r using (consumer, message_id) "
    'where (c.consumer collate "C", c.message_id) > ($1, $2) order by c.consumer collate "C", c.message_id',
    "settled_letter": "select number, consumer, id, failed_at, key, value, document, settled_at, settled_as, settled_by"
    ", reason from {schema}.settled_letters where number > $1 order by number",
    "snapshot": "select category, id, version, schema, state, made_at, truncated_upto from {schema}.snapshots "
    + _NAMED,
    "timer": "select consumer, id, key, due_at, show_at, document, data from {schema}.timers "
    + _CONSUMED.replace("{id}", "id"),
    "dead_letter": "select consumer, id, failed_at, key, value, document from {schema}.dead_letters "
    + _CONSUMED.replace("{id}", "id"),
    "watermark": 'select "group", topic, partition, "offset" from {schema}.watermarks '
    'where ("group" collate "C", topic collate "C", partition) > ($1, $2, $3) '
    'order by "group" collate "C", topic collate "C", partition',
    "lease": 'select name, token, position from {schema}.leases where name collate "C" > $1 order by name collate "C"',
    "parked_key": "select consumer, key, since, due_at, token from {schema}.parked_keys "
    "where (consumer, key) > ($1, $2) order by consumer, key",
    "parked": "select p.number, p.consumer, k.key, p.message_id, p.parked_at, p.document, p.data, p.details, "
    "p.record_key, p.record_value, p.failure from {schema}.parked p left join {schema}.parked_keys k "
    "using (consumer, digest) where p.number > $1 order by p.number",
    "effect": "select consumer, message_id, token, lease_until from {schema}.effects "
    + _CONSUMED.replace("{id}", "message_id"),
    "pause": 'select "group", made_at, made_by, reason from {schema}.pauses where "group" collate "C" > $1 '
    'order by "group" collate "C"',
}
TABLES: Mapping[str, str] = {
    "event": "events",
    "archived": "archived",
    "outgoing": "outgoing",
    "stream": "streams",
    "claim": "claims",
    "settled_letter": "settled_letters",
    "snapshot": "snapshots",
    "timer": "timers",
    "dead_letter": "dead_letters",
    "watermark": "watermarks",
    "lease": "leases",
    "parked_key": "parked_keys",
    "parked": "parked",
    "effect": "effects",
    "pause": "pauses",
}
_NO_ID = UUID(int=0)
_BEGIN: Mapping[str, Row] = {
    "event": (-1,),
    "archived": (-1,),
    "outgoing": (-1,),
    "settled_letter": (-1,),
    "parked": (-1,),
    "parked_key": ("", ""),
    "stream": ("", ""),
    "snapshot": ("", ""),
    "watermark": ("", "", -(2**31)),
    "lease": ("",),
    "pause": ("",),
}
_COPY: Mapping[str, tuple[str, ...]] = {
    "event": ("position", "category", "stream", "version", "id", "type", "key", "topic", "made_at", "data", "meta"),
    "archived": ("position", "category", "stream", "version", "id", "type", "key", "topic", "made_at", "data", "meta"),
    "outgoing": ("position", "id", "type", "key", "topic", "made_at", "data", "meta"),
    "stream": ("category", "id", "version", "archived_at", "previous"),
    "claim": ("consumer", "message_id", "key", "state", "taken_at", "effect"),
    "settled_letter": (
        "number", "consumer", "id", "failed_at", "key", "value", "document", "settled_at", "settled_as", "settled_by",
        "reason",
    ),
    "snapshot": ("category", "id", "version", "schema", "state", "made_at", "truncated_upto"),
    "timer": ("consumer", "id", "key", "due_at", "show_at", "document", "data"),
    "dead_letter": ("consumer", "id", "failed_at", "key", "value", "document"),
    "watermark": ("group", "topic", "partition", "offset"),
    "lease": ("name", "token", "position", "until"),
    "parked_key": ("consumer", "key", "since", "due_at", "token", "digest", "show_at"),
    "parked": (
        "number", "consumer", "digest", "message_id", "parked_at", "document", "data", "details", "record_key",
        "record_value", "failure",
    ),
    "effect": ("consumer", "message_id", "token", "lease_until"),
    "pause": ("group", "made_at", "made_by", "reason"),
}  # fmt: skip
_REPLIES = ("consumer", "message_id", "document", "data", "last_event", "last_public")

_OK = """(c.state = 1 and (r.document is null or position('"outcome":"' in r.document) = 0
            or position('"outcome":"ok"' in r.document) > 0))"""
RELATIONS: Mapping[str, str] = {
    "ev": "select category, stream as id, version, position from {schema}.events",
    "ar": "select category, stream as id, version, position from {schema}.archived",
    "st": "select category, id, version, (archived_at is not null)::int as archived from {schema}.streams",
    "sn": "select category, id, version, truncated_upto as truncated from {schema}.snapshots",
    "ou": "select position from {schema}.outgoing",
    "le": "select name, token, position from {schema}.leases",
    "cl": f"""select c.consumer, c.message_id::text as message,
        case c.state when 1 then 'done' when 2 then 'dead' when 3 then 'cancelled' when 4 then 'parked'
            when 5 then 'started' else 'in state ' || c.state end
        || case when c.effect <> {_OK} then ' (another effect)' else '' end as state,
        c.effect::int as effect, (r.document is not null)::int as reply
        from {{schema}}.claims c left join {{schema}}.replies r using (consumer, message_id)""",
    "re": """select r.consumer, r.message_id::text as message, (c.state is not null)::int as claimed,
        r.last_event, r.last_public
        from {schema}.replies r left join {schema}.claims c using (consumer, message_id)""",
    "dl": "select consumer, id::text as id, failed_at from {schema}.dead_letters",
    "se": "select number, consumer, id::text as id, failed_at, settled_as from {schema}.settled_letters",
    "wm": 'select "group" as of_group, topic, partition as part, "offset" as next from {schema}.watermarks',
    "lg": "select l.epoch, (select last_value from {schema}.position) as head from {schema}.log l",
    "pk": "select consumer, key, token, (due_at is null)::int as held, (show_at is null)::int as hidden "
    "from {schema}.parked_keys where digest = sha256(convert_to(key, 'UTF8'))",
    "pa": """select p.number, p.consumer, coalesce(k.key, encode(p.digest, 'hex')) as key, p.message_id::text as message
        from {schema}.parked p left join {schema}.parked_keys k using (consumer, digest)""",
    "ef": "select consumer, message_id::text as message, token from {schema}.effects",
}
"""See `eventstore/verify.py`."""
_WITH = "with " + ", ".join(f"{name} as ({sql})" for name, sql in RELATIONS.items())

Convert = Callable[[Row], Row]


class PostgresSource:
    """Made by `open_source`."""

    def __init__(self, db: Driver, service: str) -> None:
        self._db, self._service, self._schema = db, service, schema.schema_of(service)

    async def header(self) -> Header:
        counts = await _counts(self._db, self._schema)
        epoch = await self._db.fetchval(f"select epoch from {self._schema}.log")
        # Not of the transaction's moment, but never below anything in it.
        head = await self._db.fetchval(f"select last_value from {self._schema}.position")
        number = await self._db.fetchval(
            f"select case when is_called then last_value else 0 end from {self._schema}.parked_number_seq"
        )
        return Header(self._service, epoch, head, counts, number)

    async def rows(self, section: Section, *, after: Row | None) -> AsyncIterator[Sequence[Row]]:
        name = section.name
        key = _BEGIN.get(name, ("", None)) if after is None else after
        sql = _SELECT[name].replace("{schema}", self._schema)
        if name in ("claim", "timer", "dead_letter", "effect"):
            if after is None:  # no id is below the first
                sql, key = sql.replace("> ($1, $2)", ">= ($1, $2)"), ("", _NO_ID)
            else:
                key = (after[0], UUID(after[1]))
        convert = _AS_EXPORTED[name]
        batch: list[Row] = []
        size = 0
        async for found in self._db.cursor(sql, *key, prefetch=BATCH_ROWS):
            row = convert(tuple(found))
            batch.append(row)
            size += sum(len(value) for value in row if isinstance(value, (bytes, str)))
            if len(batch) >= BATCH_ROWS or size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    async def ask(self, sql: str, *, limit: int) -> tuple[int, Sequence[str]]:
        count = 0
        found: list[str] = []
        async for (text,) in self._db.cursor(f"{_WITH} {sql}".replace("{schema}", self._schema), prefetch=BATCH_ROWS):
            count += 1
            if len(found) < limit:
                found.append(text)
        return count, found


@asynccontextmanager
async def open_source(dsn: str, *, service: str, online: bool = False) -> AsyncGenerator[PostgresSource]:
    """Raises SchemaMismatch, and StoreInUse when somebody leads or is in the middle of writing, unless `online`."""
    name = schema.schema_of(service)
    async with _connected(dsn, f"export {service}") as db:
        async with db.transaction(isolation="repeatable_read", readonly=True):
            await schema.check(db, service=service)
            led = await db.fetch(f"select name, until from {name}.leases where until > clock_timestamp()")
            found = [(one["name"], f"until {one['until'].isoformat()}") for one in led]
            writers = await db.fetch(
                f"""select pid from pg_locks where locktype = 'advisory' and objsubid = 1 and mode = 'ShareLock'
                       and granted and (classid::bigint >> 16) = {name}.log_number()
                       and database = (select oid from pg_database where datname = current_database())"""
            )
            found += [("a transaction that writes", f"server process {one['pid']}") for one in writers]
            if found and not online:
                raise in_use(service, found)
            yield PostgresSource(db, service)


class PostgresTarget:
    """Made by `open_target`."""

    def __init__(self, db: Driver, service: str) -> None:
        self._db, self._schema = db, schema.schema_of(service)

    async def begin(self, header: Header, filled: Filled) -> Filled:
        name = self._schema
        async with self._db.transaction():
            if await self._db.fetchval("select to_regclass($1)", f"{name}.import") is not None:
                # Whoever was killed may have sent a commit that the database is still at: this waits for it.
                (there,) = await self._db.fetch(f"select lines, digest from {name}.import for update")
                return Filled(there["lines"], there["digest"])
            found = {of: count for of, count in (await self.counts()).items() if count}
            if found:
                raise NotEmpty(f"{name} holds {found}; wanted an empty store, nothing was written")
            await self._db.execute(f"create table {name}.import (lines bigint not null, digest text not null)")
            await self._db.execute(f"insert into {name}.import values ($1, $2)", *_pair(filled))
            await self._db.execute(f"update {name}.log set epoch = $1", header.epoch)
            # At once: whatever is written beside this draws behind what is to come, and is found in the end.
            await self._db.execute("select setval($1::regclass, $2)", f"{name}.position", header.head)
            # Of nothing drawn yet, the first to be drawn is 1.
            numbers = (f"{name}.parked_number_seq", max(header.number, 1), header.number > 0)
            await self._db.execute("select setval($1::regclass, $2, $3)", *numbers)
        return filled

    async def write(self, section: Section, rows: Sequence[Row], filled: Filled) -> None:
        async with self._db.transaction():
            if section.name == "claim":
                await self._copy("replies", _REPLIES, [_reply(row) for row in rows if row[5] is not None])
            convert = _AS_STORED[section.name]
            await self._copy(TABLES[section.name], _COPY[section.name], [convert(row) for row in rows])
            if section.name == "settled_letter":  # what is settled from now on comes after them
                letters = f"{self._schema}.settled_letters"
                await self._db.execute("select setval(pg_get_serial_sequence($1, 'number'), $2)", letters, rows[-1][0])
            await self._db.execute(f"update {self._schema}.import set lines = $1, digest = $2", *_pair(filled))

    async def _copy(self, table: str, columns: Sequence[str], records: Sequence[Row]) -> None:
        if records:
            await self._db.copy_records_to_table(
                table, records=records, columns=list(columns), schema_name=self._schema
            )

    async def counts(self) -> Mapping[str, int]:
        return await _counts(self._db, self._schema)

    async def finish(self) -> None:
        await self._db.execute(f"drop table {self._schema}.import")
        await self._db.execute(f"analyze {', '.join(f'{self._schema}.{table}' for table in TABLES.values())}")


@asynccontextmanager
async def open_target(dsn: str, *, service: str) -> AsyncGenerator[PostgresTarget]:
    """Creates the schema when there is none. Raises SchemaMismatch."""
    await schema.migrate(dsn, service=service)
    async with _connected(dsn, f"import {service}") as db:
        yield PostgresTarget(db, service)


@asynccontextmanager
async def _connected(dsn: str, doing: str) -> AsyncGenerator[Driver]:
    try:
        db = await asyncpg.connect(driver_dsn(dsn), timeout=_CONNECT_S, server_settings={"application_name": doing})
        try:
            yield db
        finally:
            await db.close()
    except DRIVER_ERRORS as error:
        raise translated(error, doing=doing) from error


async def _counts(db: Driver, name: str) -> dict[str, int]:
    return {
        section.name: await db.fetchval(f"select count(*) from {name}.{TABLES[section.name]}") for section in SECTIONS
    }


def _pair(filled: Filled) -> tuple[int, str]:
    return filled.lines, filled.digest


# --- rows, out -------------------------------------------------------------------------------------------------------


def _event(row: Row) -> Row:
    *place, id, type, key, topic, made_at, data, meta = row
    return (*place, id.hex, type, key, topic, rows.micros(made_at), data, meta)


def _sent(row: Row) -> Row:
    *found, meta, last_event, last_public = _event_of_sent(row)
    return (*found, meta if last_event is None else documents.with_positions(meta, last_event, last_public or 0))


def _event_of_sent(row: Row) -> Row:
    *message, last_event, last_public = row
    return (*_event(tuple(message)), last_event, last_public)


def _claim(row: Row) -> Row:
    consumer, id, key, state, taken_at, document, data, last_event, last_public = row
    if document is not None:
        document = documents.with_positions(document, last_event, last_public)
    return (consumer, id.hex, key, str(STATES.get(state, f"in state {state}")), rows.micros(taken_at), document, data)


def _instants_at(*places: int) -> Convert:
    def convert(row: Row) -> Row:
        found = list(row)
        for place in places:
            if found[place] is not None:
                found[place] = rows.micros(found[place])
        return tuple(found)

    return convert


def _with_id(convert: Convert, at: int = 1) -> Convert:
    def with_id(row: Row) -> Row:
        found = convert(row)
        return (*found[:at], found[at].hex, *found[at + 1 :])

    return with_id


def _as_it_is(row: Row) -> Row:
    return row


_AS_EXPORTED: Mapping[str, Convert] = {
    "event": _event,
    "archived": _event,
    "outgoing": _sent,
    "stream": _instants_at(3),
    "claim": _claim,
    "settled_letter": _with_id(_instants_at(3, 7), at=2),
    "snapshot": _instants_at(5),
    "timer": _with_id(_instants_at(3, 4)),
    "dead_letter": _with_id(_instants_at(2)),
    "watermark": _as_it_is,
    "lease": _as_it_is,
    "parked_key": _instants_at(2, 3),
    "parked": _with_id(_instants_at(4), at=3),
    "effect": _with_id(_instants_at(3)),
    "pause": _instants_at(1),
}


# --- and in ----------------------------------------------------------------------------------------------------------


def _stored_event(row: Row) -> Row:
    *place, id, type, key, topic, at, data, meta = row
    return (*place, UUID(id), type, key, topic, rows.instant(at), data, meta)


def _stored_stream(row: Row) -> Row:
    category, id, version, archived_at = row
    stored = version if archived_at is None else -version
    return (category, id, stored, None if archived_at is None else rows.instant(archived_at), stored)


def _stored_claim(row: Row) -> Row:
    consumer, id, key, state, claimed_at, document, _ = row
    effect = state == ClaimState.DONE and documents.outcome_in(document) in (None, ReplyOutcome.OK)
    return (consumer, UUID(id), key, _STATE_NUMBERS[state], rows.instant(claimed_at), effect)


def _reply(row: Row) -> Row:
    consumer, id, _, _, _, document, data = row
    return (consumer, UUID(id), document, data, *documents.positions_in(document))


def _stored_instants(*places: int) -> Convert:
    def convert(row: Row) -> Row:
        found = list(row)
        for place in places:
            if found[place] is not None:
                found[place] = rows.instant(found[place])
        return tuple(found)

    return convert


def _stored_with_id(convert: Convert, at: int = 1) -> Convert:
    def with_id(row: Row) -> Row:
        return convert((*row[:at], UUID(row[at]), *row[at + 1 :]))

    return with_id


def _stored_lease(row: Row) -> Row:
    return (*row, rows.instant(0))


def _stored_parked_key(row: Row) -> Row:
    found = _stored_instants(2, 3)(row)
    return (*found, sha256(row[1].encode()).digest(), found[3])


def _stored_parked(row: Row) -> Row:
    number, consumer, key, *rest = _stored_with_id(_stored_instants(4), at=3)(row)
    return (number, consumer, sha256(key.encode()).digest(), *rest)


_AS_STORED: Mapping[str, Convert] = {
    "event": _stored_event,
    "archived": _stored_event,
    "outgoing": _stored_event,
    "stream": _stored_stream,
    "claim": _stored_claim,
    "settled_letter": _stored_with_id(_stored_instants(3, 7), at=2),
    "snapshot": _stored_instants(5),
    "timer": _stored_with_id(_stored_instants(3, 4)),
    "dead_letter": _stored_with_id(_stored_instants(2)),
    "watermark": _as_it_is,
    "lease": _stored_lease,
    "parked_key": _stored_parked_key,
    "parked": _stored_parked,
    "effect": _stored_with_id(_stored_instants(3)),
    "pause": _stored_instants(1),
}


__all__ = ["PostgresSource", "PostgresTarget", "open_source", "open_target"]
