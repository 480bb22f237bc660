"""Taking events out of the log, in the service's schema. See `Archive` in the port.

A stream's row is locked first, as an append does it: who is in the middle of one is waited for, and waits.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeAlias

import asyncpg

from bus.envelope import Position, StreamId, Version
from eventstore import archiving, rows
from eventstore.errors import EventStoreError
from eventstore.port import Slice, StreamInfo
from eventstore.postgres.errors import DRIVER_ERRORS, translated

Driver: TypeAlias = "asyncpg.Connection[asyncpg.Record]"  # generic in its type stubs only
Connect = Callable[[], AbstractAsyncContextManager[Driver]]

_COLUMNS = "position, category, stream, version, id, type, key, topic, made_at, data, meta"


class PostgresArchive:
    def __init__(self, connect: Connect, schema: str) -> None:
        self._connect, self._schema = connect, schema

    async def archive(self, stream: StreamId, *, expected: Version, seen: Position) -> StreamInfo:
        async with self._transaction("archive a stream") as db:
            found = await self._find(db, stream)
            if archiving.is_archived(found, expected=expected):
                return found.info
            await self._check_seen(db, found, upto=found.info.version, seen=seen)
            await self._move(db, stream, "events", "archived")
            await db.execute(
                f"""update {self._schema}.streams
                       set version = -version, previous = -version, archived_at = clock_timestamp()
                     where category = $1 and id = $2""",
                *_name(stream),
            )
            return (await self._find(db, stream)).info

    async def restore(self, stream: StreamId) -> StreamInfo:
        async with self._transaction("restore a stream") as db:
            found = await self._find(db, stream)
            if found.info.archived_at is not None:
                await self._move(db, stream, "archived", "events")
                await db.execute(
                    f"""update {self._schema}.streams set version = -version, previous = -version, archived_at = null
                         where category = $1 and id = $2""",
                    *_name(stream),
                )
            return (await self._find(db, stream)).info

    async def truncate(
        self, stream: StreamId, *, upto: Version, seen: Position, schema: str | None = None
    ) -> StreamInfo:
        async with self._transaction("truncate a stream") as db:
            # Its row as well: whoever replaces it meanwhile looks again, at what is set here.
            await db.execute(
                f"select from {self._schema}.snapshots where category = $1 and id = $2 for update", *_name(stream)
            )
            found = await self._find(db, stream)
            if archiving.is_truncated(found, upto=upto, schema=schema):
                return found.info
            await self._check_seen(db, found, upto=upto, seen=seen)
            await db.execute(
                f"delete from {self._schema}.events where category = $1 and stream = $2 and version <= $3",
                *_name(stream),
                upto,
            )
            await db.execute(
                f"update {self._schema}.snapshots set truncated_upto = $3 where category = $1 and id = $2",
                *_name(stream),
                upto,
            )
            return (await self._find(db, stream)).info

    async def read(self, stream: StreamId, *, after: Version = 0, limit: int = 1000) -> Slice:
        archiving.check_limit(limit)
        async with self._transaction("read an archived stream") as db:
            found = await self._find(db, stream)
            records = await db.fetch(
                f"""select id, type, key, topic, data, made_at, meta, version, position from {self._schema}.archived
                     where category = $1 and stream = $2 and version > $3 order by version limit $4""",
                *_name(stream),
                after,
                limit,
            )
        return Slice(
            stream,
            found.info.version,
            [
                rows.envelope(id, type, key, topic, data, made_at, meta, stream, version, position)
                for id, type, key, topic, data, made_at, meta, version, position in records
            ],
        )

    async def _find(self, db: Driver, stream: StreamId) -> archiving.Found:
        row = await db.fetchrow(
            f"select version, archived_at from {self._schema}.streams where category = $1 and id = $2 for update",
            *_name(stream),
        )
        if row is None:
            raise archiving.no_stream(stream)
        # A later statement: the snapshot as it is now that the stream's row is held.
        snapshot = await db.fetchrow(
            f"select version, schema, truncated_upto from {self._schema}.snapshots where category = $1 and id = $2",
            *_name(stream),
        )
        truncated = 0 if snapshot is None else snapshot["truncated_upto"]
        info = StreamInfo(stream, abs(row["version"]), truncated + 1, row["archived_at"])
        return archiving.Found(
            info, None if snapshot is None else snapshot["version"], None if snapshot is None else snapshot["schema"]
        )

    async def _check_seen(self, db: Driver, found: archiving.Found, *, upto: Version, seen: Position) -> None:
        last = await db.fetchval(
            f"select max(position) from {self._schema}.events where category = $1 and stream = $2 and version <= $3",
            *_name(found.info.stream),
            upto,
        )
        archiving.check_seen(found, last, seen=seen)

    async def _move(self, db: Driver, stream: StreamId, out_of: str, into: str) -> None:
        await db.execute(
            f"""with gone as (delete from {self._schema}.{out_of} where category = $1 and stream = $2 returning *)
                insert into {self._schema}.{into} ({_COLUMNS}) select {_COLUMNS} from gone order by position""",
            *_name(stream),
        )

    @asynccontextmanager
    async def _transaction(self, doing: str) -> AsyncGenerator[Driver]:
        refused: EventStoreError | None = None
        try:
            async with self._connect() as db:
                try:
                    async with db.transaction():
                        yield db
                except EventStoreError as error:  # rolled back: the connection is as good as before
                    refused = error
        except DRIVER_ERRORS as error:
            raise translated(error, doing=doing) from error
        if refused is not None:
            raise refused


def _name(stream: StreamId) -> tuple[str, str]:
    return stream.category, stream.id
