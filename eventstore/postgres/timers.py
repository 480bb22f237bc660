"""Timers, due by the database's clock. `due` hides what it gives, in one statement that skips what others take."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

from bus.seams import Clock
from eventstore import rows
from eventstore.port import Timer

Query = Callable[..., Awaitable[Any]]


class PostgresTimers:
    """`fetch(sql, *arguments)` runs one statement in autocommit and answers its rows."""

    def __init__(self, fetch: Query, schema: str, clock: Clock) -> None:
        self._fetch, self._clock = fetch, clock
        self._ahead = timedelta()
        """By how much the database's clock is ahead of ours, at most, as last seen."""
        # statement_timestamp, not clock_timestamp: a volatile function would keep the index from being used.
        self._due = f"""
            with due as materialized (
                select ctid from {schema}.timers where show_at <= statement_timestamp()
                 order by show_at limit $1 for update skip locked
            ), taken as (
                update {schema}.timers set show_at = statement_timestamp() + make_interval(secs => $2)
                 where ctid = any(array(select ctid from due))
                returning consumer, id, key, due_at, document, data
            )
            select * from taken order by due_at, id"""
        self._next = f"select min(show_at) as at, clock_timestamp() as now from {schema}.timers"
        self._release = f"""
            update {schema}.timers set show_at = statement_timestamp() + make_interval(secs => $3)
             where consumer = $1 and id = $2"""

    async def due(self, *, limit: int, lease_s: float = 30.0) -> Sequence[Timer]:
        return [
            Timer(
                row["consumer"], row["id"], row["key"], row["due_at"], rows.from_document(row["document"], row["data"])
            )
            for row in await self._fetch(self._due, limit, lease_s)
        ]

    async def next_due(self) -> datetime | None:
        asked_at = self._clock.now()
        (row,) = await self._fetch(self._next)
        # Not when the answer came: had it been long on its way, delays counted from it would end too early.
        self._ahead = row["now"] - asked_at
        at: datetime | None = row["at"]
        return at

    async def release(self, timer: Timer, *, delay_s: float) -> None:
        await self._fetch(self._release, timer.consumer, timer.id, delay_s)

    def now(self) -> datetime:
        return self._clock.now() + self._ahead
