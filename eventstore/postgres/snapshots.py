"""Snapshots in the service's schema. See `Snapshots` in the port; 0002_snapshots.sql says what protects them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from bus.envelope import StreamId
from eventstore.port import Snapshot
from eventstore.snapshots import check_snapshots

Query = Callable[..., Awaitable[Any]]


class PostgresSnapshots:
    """`fetch(sql, *arguments)` runs one statement in autocommit and answers its rows."""

    def __init__(self, fetch: Query, schema: str) -> None:
        self._fetch = fetch
        self._save = f"select {schema}.save_snapshots($1, $2, $3, $4, $5, $6)"
        columns = f"select category, id, version, schema, state, made_at from {schema}.snapshots"
        self._page = f"{columns} where (category, id) > ($1, $2) order by category, id limit $3"
        self._drop = f"""
            with gone as (
                delete from {schema}.snapshots where truncated_upto = 0
                   and ($1::text is null or category = $1) and ($2::text is null or schema <> $2) returning 1
            )
            select count(*) from gone"""

    async def save(self, snapshots: Sequence[Snapshot]) -> int:
        found = check_snapshots(snapshots)
        if not found:
            return 0
        (row,) = await self._fetch(
            self._save,
            [one.stream.category for one in found],
            [one.stream.id for one in found],
            [one.version for one in found],
            [one.schema for one in found],
            [one.state for one in found],
            [one.made_at for one in found],
        )
        return int(row[0])

    async def page(self, *, after: StreamId | None = None, limit: int = 1000) -> Sequence[Snapshot]:
        if limit < 1:
            raise ValueError(f"limit is {limit}; wanted 1 or more")
        # No stream has an empty category, so nothing is passed over.
        category, id = (after.category, after.id) if after is not None else ("", "")
        return [
            Snapshot(StreamId(category, id), version, schema, state, made_at)
            for category, id, version, schema, state, made_at in await self._fetch(self._page, category, id, limit)
        ]

    async def drop(self, *, category: str | None = None, keep_schema: str | None = None) -> int:
        (row,) = await self._fetch(self._drop, category, keep_schema)
        return int(row[0])
