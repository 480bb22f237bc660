"""Pauses, places and forgotten claims in the store's file. See `eventstore/flow.py`."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

from bus.seams import Clock
from eventstore import rows
from eventstore.flow import REPLIES, Act, Forgotten, Pause, check_limit, placed
from eventstore.port import ClaimState, Watermark
from eventstore.sqlite.database import SqliteDatabase

_LOG = "INSERT INTO foldbus_flow_log (at, consumer_group, what, made_by, reason) VALUES (?, ?, ?, ?, ?)"
_PLACE = (
    "INSERT INTO foldbus_watermarks (consumer_group, topic, partition, next_offset) VALUES (?, ?, ?, ?) "
    "ON CONFLICT (consumer_group, topic, partition) DO UPDATE SET next_offset=excluded.next_offset"
)
_PAGE = (
    "SELECT message_id, state, claimed_at, json_extract(reply, '$.reply_to[0]'), state='dead' AND EXISTS "
    "(SELECT 1 FROM foldbus_dead_letters d WHERE d.consumer=c.consumer AND d.id=c.message_id) "
    "FROM foldbus_claims c WHERE consumer=? AND message_id>? ORDER BY message_id LIMIT ?"
)
_FORGET = "DELETE FROM foldbus_claims WHERE consumer=? AND message_id=? AND state=? AND claimed_at=?"
_FORGET_EFFECT = "DELETE FROM foldbus_effects WHERE consumer=? AND message_id=?"
_ENDED = (ClaimState.DONE, ClaimState.DEAD, ClaimState.CANCELLED)


class SqliteFlow:
    def __init__(self, database: SqliteDatabase, clock: Clock) -> None:
        self._database, self._clock = database, clock

    async def pause(self, group: str, *, by: str, reason: str = "") -> bool:
        at = self._now()
        sql = (
            "INSERT INTO foldbus_pauses (consumer_group, at, made_by, reason) VALUES (?, ?, ?, ?) "
            "ON CONFLICT DO NOTHING"
        )
        return await self._database.write(self._told(sql, (group, at, by, reason), (at, group, "paused", by, reason)))

    async def resume(self, group: str, *, by: str, reason: str = "") -> bool:
        sql = "DELETE FROM foldbus_pauses WHERE consumer_group=?"
        return await self._database.write(self._told(sql, (group,), (self._now(), group, "resumed", by, reason)))

    async def paused(self) -> Mapping[str, Pause]:
        def read(connection: sqlite3.Connection) -> dict[str, Pause]:
            found = connection.execute("SELECT consumer_group, at, made_by, reason FROM foldbus_pauses")
            return {group: Pause(group, rows.instant(at), by, reason) for group, at, by, reason in found}

        return await self._database.read(read)

    async def place(self, marks: Sequence[Watermark], *, by: str, reason: str = "") -> None:
        at = self._now()
        last = {(mark.group, mark.topic, mark.partition): mark for mark in marks}
        found = sorted(last.values(), key=lambda mark: (mark.group, mark.topic, mark.partition))

        def write(connection: sqlite3.Connection) -> None:
            for mark in found:
                connection.execute(_PLACE, (mark.group, mark.topic, mark.partition, mark.offset))
                connection.execute(_LOG, (at, mark.group, placed(mark), by, reason))

        await self._database.write(write)

    async def acts(self, *, limit: int = 100) -> Sequence[Act]:
        check_limit(limit)

        def read(connection: sqlite3.Connection) -> list[Act]:
            found = connection.execute(
                "SELECT number, at, consumer_group, what, made_by, reason FROM foldbus_flow_log "
                "ORDER BY number DESC LIMIT ?",
                (limit,),
            )
            return [Act(number, rows.instant(at), *rest) for number, at, *rest in found]

        return await self._database.read(read)

    def _now(self) -> int:
        return rows.micros(self._clock.now())

    @staticmethod
    def _told(sql: str, values: Sequence[Any], act: Sequence[Any]) -> Callable[[sqlite3.Connection], bool]:
        """What `sql` changes, if it does, and the line that tells it."""

        def write(connection: sqlite3.Connection) -> bool:
            changed = connection.execute(sql, values).rowcount > 0
            if changed:
                connection.execute(_LOG, act)
            return changed

        return write


class SqliteInbox:
    """There is no index over ages: claims are walked by their primary key, a piece at a time."""

    def __init__(self, database: SqliteDatabase, clock: Clock) -> None:
        self._database, self._clock = database, clock

    async def forget(
        self,
        consumer: str,
        *,
        older_than_s: float,
        steps_older_than_s: float | None = None,
        after: UUID | None = None,
        limit: int = 2000,
    ) -> Forgotten:
        check_limit(limit)
        now = rows.micros(self._clock.now())
        before = now - int(older_than_s * 1_000_000)
        steps_before = None if steps_older_than_s is None else now - int(steps_older_than_s * 1_000_000)
        # Looked at beside the writers; only what is to go takes their lock.
        page = await self._database.read(
            lambda connection: connection.execute(_PAGE, (consumer, after.bytes if after else b"", limit)).fetchall()
        )
        aged: list[tuple[str, bytes, str, int]] = []
        for id, state, claimed_at, answered, open_letter in page:
            step = state == ClaimState.CANCELLED or (answered or "").endswith(REPLIES)
            old = claimed_at < before and not (step and (steps_before is None or claimed_at >= steps_before))
            if old and state in _ENDED and not open_letter:
                aged.append((consumer, id, state, claimed_at))

        def forget(connection: sqlite3.Connection) -> int:
            gone = 0
            for one in aged:
                if connection.execute(_FORGET, one).rowcount:
                    connection.execute(_FORGET_EFFECT, one[:2])
                    gone += 1
            return gone

        gone = await self._database.write(forget, together=True) if aged else 0
        return Forgotten(len(page), gone, UUID(bytes=page[-1][0]) if len(page) == limit else None)


__all__ = ["SqliteFlow", "SqliteInbox"]
