"""The reference: asyncpg and orjson by hand, into a table with two indexes. No stream version that a second writer
would lose against, no order for readers, no types: a loaded event is a dict, its state two numbers."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from benchmarks.peers.serving import PAGE, POOL, TEXT, serve

try:
    from orjson import dumps, loads
except ImportError:  # benchmarks/store.py says so in the row
    import json

    def dumps(value: Any) -> bytes:
        return json.dumps(value).encode()

    loads = json.loads

TABLE = """create table if not exists raw (
    position bigint generated always as identity primary key, stream text not null, version bigint not null,
    id uuid not null, type text not null, made_at timestamptz not null, data bytea not null, meta text not null,
    unique (stream, version))"""
COLUMNS = ("stream", "version", "id", "type", "made_at", "data", "meta")
INSERT = f"insert into raw ({', '.join(COLUMNS)}) values ($1, $2, $3, $4, $5, $6, $7)"
UNNEST = f"""insert into raw ({", ".join(COLUMNS)})
    select *
      from unnest($1::text[], $2::bigint[], $3::uuid[], $4::text[], $5::timestamptz[], $6::bytea[], $7::text[])"""
STREAM = "select version, type, data from raw where stream = $1 order by version"
LOG = "select position, stream, version, type, data from raw where position > $1 order by position limit $2"


class Raw:
    def __init__(self, pool: Any, *, copy: bool) -> None:
        self._pool, self._copy = pool, copy

    def _row(self, key: str, version: int) -> tuple[Any, ...]:
        data = dumps({"note_id": key, "n": 0, "text": TEXT})
        return key, version, uuid4(), "bench.noted.v1", datetime.now(UTC), data, "{}"

    async def append(self, key: UUID) -> None:
        await self._pool.execute(INSERT, *self._row(str(key), 1))

    async def append_many(self, key: UUID, after: int, count: int) -> None:
        rows = [self._row(str(key), version) for version in range(after + 1, after + count + 1)]
        if self._copy:
            async with self._pool.acquire() as db:
                await db.copy_records_to_table("raw", records=rows, columns=COLUMNS)
        else:
            await self._pool.execute(UNNEST, *(list(column) for column in zip(*rows, strict=True)))

    async def load(self, key: UUID) -> int:
        count = total = 0
        for _, _, data in await self._pool.fetch(STREAM, str(key)):
            total += loads(data)["n"]
            count += 1
        return count + total

    async def read_all(self) -> int:
        after = found = 0
        while rows := await self._pool.fetch(LOG, after, PAGE):
            for _, _, _, _, data in rows:
                found += 1 + loads(data)["n"]
            after = rows[-1][0]
        return found


async def _no_reset(_: Any) -> None:
    """asyncpg's own reset costs a round trip per call, and nothing here needs it."""


@asynccontextmanager
async def opening(dsn: str) -> AsyncIterator[Raw]:
    async with asyncpg.create_pool(dsn, min_size=1, max_size=POOL, reset=_no_reset) as pool:
        await pool.execute(TABLE)
        yield Raw(pool, copy="FOLDBUS_BENCH_COPY" in os.environ)


if __name__ == "__main__":
    serve(opening)
