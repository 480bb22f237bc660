"""Leadership by lease: a row with a token that rises, a time to live by the store's clock, and a checkpoint."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from bus.envelope import Position
from bus.errors import Fenced
from bus.metrics import Metrics
from bus.seams import Clock
from bus.tasks import ended
from eventstore import rows
from eventstore.errors import EventStoreError, StoreUnavailable
from eventstore.port import Leadership, Lease
from eventstore.sqlite.database import SqliteDatabase

log = logging.getLogger("foldbus.eventstore")

_POLL_S = 0.03


class SqliteLeadership:
    def __init__(self, lease: Lease, ttl_s: float, clock: Clock) -> None:
        self.lease = lease
        self._ttl_s, self._clock = ttl_s, clock
        self._renewed_at = clock.monotonic()
        self._taken = False

    @property
    def lost(self) -> bool:
        return self._taken or self._clock.monotonic() - self._renewed_at > self._ttl_s

    def renewed(self, *, asked_at: float) -> None:
        """From when it was asked for: the row's time may have begun then."""
        self._renewed_at = asked_at

    def taken(self) -> None:
        """Somebody else leads."""
        self._taken = True


class SqliteLeases:
    def __init__(self, database: SqliteDatabase, clock: Clock, metrics: Metrics) -> None:
        self._database, self._clock, self._metrics = database, clock, metrics

    def lead(self, name: str, *, ttl_s: float = 10.0) -> AbstractAsyncContextManager[Leadership]:
        return self._lead(name, ttl_s)

    @asynccontextmanager
    async def _lead(self, name: str, ttl_s: float) -> AsyncGenerator[Leadership]:
        # Before it is asked for: the lease in the file may last a little longer than this process believes.
        asked_at = self._clock.monotonic()
        while (lease := await self._try(name, ttl_s)) is None:
            await asyncio.sleep(min(_POLL_S, ttl_s / 4))
            asked_at = self._clock.monotonic()
        leadership = SqliteLeadership(lease, ttl_s, self._clock)
        leadership.renewed(asked_at=asked_at)
        log.info("leads %s with token %d, from position %d", name, lease.token, lease.position)
        renewing = asyncio.create_task(self._renew(leadership, ttl_s), name=f"lease-{name}")
        try:
            yield leadership
        finally:
            try:
                await ended(renewing)
            finally:
                with contextlib.suppress(EventStoreError):  # it runs out by itself then
                    await self._give_up(lease)

    async def _try(self, name: str, ttl_s: float) -> Lease | None:
        def until(connection: sqlite3.Connection) -> int:
            found = connection.execute("SELECT until FROM foldbus_leases WHERE name=?", (name,)).fetchone()
            return found[0] if found else 0

        if await self._database.read(until) > rows.micros(self._clock.now()):
            return None

        def take(connection: sqlite3.Connection) -> Lease | None:
            now = rows.micros(self._clock.now())
            if until(connection) > now:
                return None
            ends = now + round(ttl_s * 1_000_000)
            connection.execute(
                "INSERT INTO foldbus_leases (name, token, until, position) VALUES (?, 1, ?, 0) "
                "ON CONFLICT (name) DO UPDATE SET token=token+1, until=excluded.until",
                (name, ends),
            )
            token, position = connection.execute(
                "SELECT token, position FROM foldbus_leases WHERE name=?", (name,)
            ).fetchone()
            return Lease(name, token, position)

        return await self._database.write(take, together=True)

    async def _renew(self, leadership: SqliteLeadership, ttl_s: float) -> None:
        lease = leadership.lease

        def renew(connection: sqlite3.Connection) -> bool:
            ends = rows.micros(self._clock.now()) + round(ttl_s * 1_000_000)
            changed = connection.execute(
                "UPDATE foldbus_leases SET until=? WHERE name=? AND token=?", (ends, lease.name, lease.token)
            )
            return changed.rowcount == 1

        while True:
            await asyncio.sleep(ttl_s / 3)
            asked_at = self._clock.monotonic()
            try:
                if await self._database.write(renew, together=True):
                    leadership.renewed(asked_at=asked_at)
                    continue
            except StoreUnavailable as error:
                self._metrics.count("foldbus_lease_renewals_failed_total", store="sqlite")
                log.warning("lease %s was not renewed, trying again: %s", lease.name, error)
                continue
            leadership.taken()
            self._metrics.count("foldbus_leases_lost_total", store="sqlite")
            log.warning("lease %s with token %d was taken over", lease.name, lease.token)
            return

    async def _give_up(self, lease: Lease) -> None:
        def leave(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE foldbus_leases SET until=0 WHERE name=? AND token=?", (lease.name, lease.token))

        await self._database.write(leave, together=True)

    async def mark(self, lease: Lease, *, old: Position, new: Position) -> None:
        def move(connection: sqlite3.Connection) -> tuple[int, Position] | None:
            changed = connection.execute(
                "UPDATE foldbus_leases SET position=? WHERE name=? AND token=? AND position=?",
                (new, lease.name, lease.token, old),
            )
            if changed.rowcount == 1:
                return None
            found = connection.execute(
                "SELECT token, position FROM foldbus_leases WHERE name=?", (lease.name,)
            ).fetchone()
            return found or (0, 0)

        found = await self._database.write(move, together=True)
        if found is not None:
            self._metrics.count("foldbus_fenced_total", what="lease", store="sqlite")
            log.warning("lease %s: mark with token %d was fenced", lease.name, lease.token)
            raise Fenced(
                f"lease {lease.name}: found token {found[0]} at position {found[1]}, wanted token {lease.token} at "
                f"position {old}; nothing was marked"
            )

    async def held(self) -> Mapping[str, float]:
        now = rows.micros(self._clock.now())

        def look(connection: sqlite3.Connection) -> dict[str, float]:
            found = connection.execute("SELECT name, until FROM foldbus_leases WHERE until > ? ORDER BY name", (now,))
            return {name: (until - now) / 1_000_000 for name, until in found}

        return await self._database.read(look)

    async def position(self, name: str) -> Position:
        def look(connection: sqlite3.Connection) -> Position:
            found = connection.execute("SELECT position FROM foldbus_leases WHERE name=?", (name,)).fetchone()
            return found[0] if found else 0

        return await self._database.read(look)
