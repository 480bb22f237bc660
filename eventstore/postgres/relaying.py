"""Pages of records for the relay: see `eventstore/relaying.py`.

As everywhere, rows are read by a later statement than the watermark that bounds them (0001_floor_lock.sql). What is
known to be safe already is read without asking again: a relay that is behind asks once per log's end, not per page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from bus.envelope import Position
from eventstore.errors import CheckpointAhead
from eventstore.postgres.feed import Watermark
from eventstore.postgres.letters import Retried
from eventstore.records import RecordPage
from eventstore.relaying import records_of

Rows = Sequence[Any]


class PostgresRecords:
    """`retried(act, doing=…)` repeats what lost a race, and translates the driver's errors."""

    def __init__(
        self,
        connection: Callable[[], AbstractAsyncContextManager[Any]],
        retried: Retried,
        schema: str,
        watermark: Watermark,
        *,
        timeout_s: float,
    ) -> None:
        self._connection, self._retried, self._watermark, self._timeout_s = connection, retried, watermark, timeout_s
        # What has no topic is not sent along: private events can be most of a log. Its place counts.
        self._sql = f"""
            select pos, case when topic is not null then textsend(id::text) end, type, key, topic,
                   case when topic is not null then data end, category, stream, version,
                   case when topic is not null then timestamptz_send(made_at) end,
                   case when topic is not null then meta end, last_event, last_public
              from {schema}.read_log($1, $2, $3)"""

    async def read(self, *, after: Position, limit: int) -> RecordPage:
        if limit < 1:
            raise ValueError(f"limit is {limit}; wanted 1 or more")
        if self._watermark.safe > after:
            page = await self._page(after, None, limit)
            if page is not None:
                return page
        head = await self._watermark.fresh()
        if after > self._watermark.drawn:
            raise CheckpointAhead(after, drawn=self._watermark.drawn)
        page = await self._page(after, head, limit) if head > after else None
        return page or RecordPage((), (), after, head)

    async def _page(self, after: Position, upto: Position | None, limit: int) -> RecordPage | None:
        """Without `upto`, up to what is known to be safe; None if the connection cannot vouch for it."""

        async def ask() -> tuple[Rows, Position] | None:
            async with self._connection() as db:
                known = self._watermark.vouched(db) if upto is None else upto
                if known is None:
                    return None
                return await db.fetch(self._sql, after, known, limit, timeout=self._timeout_s), known

        answer = await self._retried(ask, doing="read what is to be published")
        if answer is None:
            return None
        found, known = answer
        records, positions = records_of(found)
        return RecordPage(records, positions, found[-1][0] if len(found) >= limit else known, known)


__all__ = ["PostgresRecords"]
