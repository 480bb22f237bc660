"""Looking at PostgreSQL's locks from outside, to force an interleaving."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[Any]:
    db = await asyncpg.connect(dsn)
    try:
        yield db
    finally:
        db.terminate()


async def blocked(dsn: str, count: int = 1) -> list[int]:
    """Waits until `count` backends of this database wait for a lock; answers their pids."""
    query = "select pid from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    async with connected(dsn) as db, asyncio.timeout(30):
        while len(found := [row[0] for row in await db.fetch(query)]) < count:  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0.01)
        return found


async def nobody_blocked(dsn: str) -> None:
    """Waits until a cancelled statement has ended on the server too."""
    async with connected(dsn) as db, asyncio.timeout(30):
        query = "select 1 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        while await db.fetchval(query):  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0.01)
