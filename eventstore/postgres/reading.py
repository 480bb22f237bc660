"""Reading streams and the log. `load` and everything that is no reading of events is in `store.py`.

Rows are always read by a later statement than the watermark, and so in a later snapshot: see 0001_floor_lock.sql.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import UUID

from bus.envelope import Envelope, Position, StreamId, Version
from eventstore import rows, selecting
from eventstore.ahead import Ahead
from eventstore.errors import CheckpointAhead
from eventstore.port import Bodies, Page, Slice, StreamInfo, Where
from eventstore.postgres import feed

Query = Callable[..., Awaitable[Sequence[Any]]]
QueryBelow = Callable[[str, Position, int], Awaitable[Sequence[Any]]]
_END = 2**63 - 1

_LEAN = """pos, type, key, topic, data, category, stream, version,
    uuid_send(id) as id, timestamptz_send(made_at) as made_at, meta"""
"""Id and time as they are on the wire: the driver's own values of both cost a reader more than all other columns, and
most readers look at neither."""


class PostgresReading:
    """`query(sql, *arguments)` runs one statement in autocommit and answers its rows. `query_below(sql, after, limit)`
    runs it with (after, known, limit), where `known` is safe; no rows if nothing so far above `after` is known to be.
    """

    def __init__(self, query: Query, query_below: QueryBelow, schema: str, watermark: feed.Watermark) -> None:
        self._query, self._query_below, self._watermark = query, query_below, watermark
        self._events = f"select {_LEAN} from {schema}.read_events($1, $2, $3)"
        self._log = f"select * from {schema}.read_log($1, $2, $3)"
        self._chosen = f"select {_LEAN} from {schema}.read_chosen($1, $2, $3, $4, $5, $6, $7, $8)"
        self._of_stream = f"select {_LEAN} from {schema}.read_stream_after($1, $2, $3, $4, $5)"
        self._stream = f"select * from {schema}.read_stream($1, $2, $3, $4, $5, $6)"
        self._bodies = f"select type, data from {schema}.read_bodies($1, $2, $3, $4)"
        self._streams = f"select * from {schema}.list_streams($1, $2, $3, $4)"

    async def read_all(self, *, after: Position, limit: int, outgoing: bool, where: Where | None) -> Page:
        if limit < 1:
            raise ValueError(f"limit is {limit}; wanted 1 or more")
        if where is not None:
            selecting.check_where(where, outgoing=outgoing)
        if where is None and not outgoing and self._watermark.safe - after >= limit:
            page = await self._read_far_below(after, limit)
            if page is not None:
                return page
        head = await self._watermark.fresh()
        if after > self._watermark.drawn:
            raise CheckpointAhead(after, drawn=self._watermark.drawn)
        if head <= after:
            return Page([], after, head)
        if where is not None:
            return await self._read_chosen(after, head, limit, where)
        if outgoing:
            found = await self._query(self._log, after, head, limit)
            records = [_logged(*row) for row in found]
        else:
            records = rows.lean_envelopes(await self._query(self._events, after, head, limit))
        upto = records[-1].position or head if len(records) >= limit else head
        return Page(records, upto, head)

    async def _read_far_below(self, after: Position, limit: int) -> Page | None:
        """Events far below the end are read beside the question where that is, not after it. None: not here."""
        asking: Ahead[Position] = Ahead()
        asking.begin(self._watermark.fresh())
        try:
            records = rows.lean_envelopes(await self._query_below(self._events, after, limit))
            head = await asking.take()
        finally:
            await asking.close()
        return Page(records, records[-1].position or after, head) if len(records) == limit else None

    async def _read_chosen(self, after: Position, head: Position, limit: int, where: Where) -> Page:
        span = selecting.span(where, after=after, head=head)
        if (stream := where.stream) is not None:
            found = await self._query(self._of_stream, stream.category, stream.id, after, span.upto, limit)
            return span.page_of_stream(rows.lean_envelopes(found), limit, where)
        found = await self._query(
            self._chosen,
            after,
            span.upto,
            limit,
            None if where.types is None else sorted(where.types),
            None if where.categories is None else sorted(where.categories),
            None if where.correlation_id is None else where.correlation_id.hex,
            where.since,
            where.until,
        )
        return span.page(rows.lean_envelopes(found), limit)

    async def read_stream(
        self, stream: StreamId, *, after: Version, upto: Version | None, backward: bool, limit: int | None
    ) -> Slice:
        found = await self._query(
            self._stream,
            stream.category,
            stream.id,
            after,
            _END if upto is None else upto,
            backward,
            limit,
        )
        version: Version = found[0]["stream_version"]
        selecting.check_version(stream, version)
        records = [
            rows.envelope(id, type, key, topic, data, time, meta, stream, at, position)
            for _, id, type, key, topic, time, data, meta, at, position in found
            if id is not None
        ]
        return Slice(stream, version, records)

    async def read_bodies(self, stream: StreamId, *, after: Version, upto: Version) -> Bodies:
        found = await self._query(self._bodies, stream.category, stream.id, after, upto)
        return Bodies(stream, [row[0] for row in found], [row[1] for row in found])

    async def streams(self, *, category: str | None, after: StreamId | None, limit: int) -> Sequence[StreamInfo]:
        beyond = (None, None) if after is None else (after.category, after.id)
        found = await self._query(self._streams, category, *beyond, limit)
        return [
            StreamInfo(StreamId(category, id), version, kept_from, archived_at)
            for category, id, version, kept_from, archived_at in found
        ]


def with_token(reply: Envelope, last_event: Position, last_public: Position) -> Envelope:
    """A stored reply, with the positions that were drawn after its document was made."""
    if reply.token is None:
        return reply
    return replace(reply, token=replace(reply.token, position=last_event, public=last_public))


def _logged(
    position: int,
    id: UUID,
    type: str,
    key: str,
    topic: str | None,
    time: datetime,
    data: bytes,
    meta: str,
    category: str | None,
    stream: str | None,
    version: int | None,
    last_event: int | None,
    last_public: int | None,
) -> Envelope:
    where = None if category is None or stream is None else StreamId(category, stream)
    found = rows.envelope(id, type, key, topic, data, time, meta, where, version, position)
    return found if last_event is None else with_token(found, last_event, last_public or 0)


__all__ = ["PostgresReading", "with_token"]
