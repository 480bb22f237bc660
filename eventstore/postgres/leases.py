"""Leadership by a row: who holds it, until when by the database's clock, with a token that rises with every leader.

`mark` is the fence: its UPDATE names token and old position, so a leader that was paused for longer than its time to
live changes nothing when it comes back.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

from bus.envelope import Position
from bus.errors import Fenced
from bus.metrics import Metrics
from bus.seams import Clock
from bus.tasks import ended
from eventstore.errors import EventStoreError, StoreUnavailable
from eventstore.port import Lease

log = logging.getLogger("foldbus.eventstore")

Query = Callable[..., Awaitable[Any]]

_RETRY_MAX_S = 0.25


class PostgresLeadership:
    def __init__(self, lease: Lease, clock: Clock, *, ttl_s: float, since: float) -> None:
        self.lease = lease
        self._clock, self._ttl_s = clock, ttl_s
        self.renewed_at = since
        """When the last renewal that worked was *sent*: the database's time to live began later."""
        self.taken = False

    @property
    def lost(self) -> bool:
        return self.taken or self._clock.monotonic() - self.renewed_at >= self._ttl_s


class PostgresLeases:
    """`row(sql, *arguments)` runs one statement in autocommit and answers its first row."""

    def __init__(self, row: Query, schema: str, clock: Clock, metrics: Metrics) -> None:
        self._row, self._clock, self._metrics = row, clock, metrics
        self._take = f"""
            insert into {schema}.leases as l (name, token, until)
            values ($1, 1, clock_timestamp() + make_interval(secs => $2))
            on conflict (name) do update set token = l.token + 1, until = excluded.until
                where l.until <= clock_timestamp()
            returning token, position"""
        self._renew = f"""
            update {schema}.leases set until = clock_timestamp() + make_interval(secs => $3)
             where name = $1 and token = $2 returning token"""
        self._give_up = f"update {schema}.leases set until = '-infinity' where name = $1 and token = $2 returning token"
        self._mark = f"""
            update {schema}.leases set position = $4 where name = $1 and token = $2 and position = $3
            returning token"""
        self._held = f"""
            select json_object_agg(name, extract(epoch from until - clock_timestamp()))::text as held
              from {schema}.leases where until > clock_timestamp()"""
        self._found = f"select token, position from {schema}.leases where name = $1"

    @asynccontextmanager
    async def lead(self, name: str, *, ttl_s: float = 10.0) -> AsyncGenerator[PostgresLeadership, None]:
        since = self._clock.monotonic()
        while (taken := await self._row(self._take, name, ttl_s)) is None:
            await asyncio.sleep(min(ttl_s / 4, _RETRY_MAX_S))
            since = self._clock.monotonic()
        lease = Lease(name, taken["token"], taken["position"])
        leadership = PostgresLeadership(lease, self._clock, ttl_s=ttl_s, since=since)
        self._metrics.count("foldbus_leases_taken_total", lease=name)
        log.info("leading %s with token %d from position %d", name, lease.token, lease.position)
        renewing = asyncio.create_task(self._keep(leadership, ttl_s), name=f"renew {name}")
        try:
            yield leadership
        finally:
            try:
                await ended(renewing)
            finally:
                # Also when cancelled: the next leader need not wait for the lease to run out.
                await asyncio.shield(asyncio.ensure_future(self._release(lease)))

    async def _keep(self, leadership: PostgresLeadership, ttl_s: float) -> None:
        lease = leadership.lease
        while True:
            await asyncio.sleep(ttl_s / 3)
            at = self._clock.monotonic()
            try:
                kept = await self._row(self._renew, lease.name, lease.token, ttl_s)
            except EventStoreError as error:
                self._metrics.count("foldbus_lease_renewals_failed_total", lease=lease.name)
                log.warning("could not renew the lease of %s: %s", lease.name, error)
                continue
            if kept is None:
                leadership.taken = True
                self._metrics.count("foldbus_leases_lost_total", lease=lease.name)
                log.warning("%s was taken over: token %d is not the latest any more", lease.name, lease.token)
                return
            leadership.renewed_at = at

    async def _release(self, lease: Lease) -> None:
        try:
            await self._row(self._give_up, lease.name, lease.token)
        except StoreUnavailable as error:
            log.warning("could not give up the lease of %s, it runs out by itself: %s", lease.name, error)

    async def mark(self, lease: Lease, *, old: Position, new: Position) -> None:
        if await self._row(self._mark, lease.name, lease.token, old, new) is None:
            found = await self._row(self._found, lease.name)
            self._metrics.count("foldbus_fenced_total", what="lease")
            log.warning("a mark of %s from %d to %d was fenced", lease.name, old, new)
            stored = "no lease" if found is None else f"token {found['token']} at position {found['position']}"
            raise Fenced(
                f"mark of {lease.name} from {old} to {new} with token {lease.token}: found {stored}; nothing changed"
            )

    async def held(self) -> Mapping[str, float]:
        found = await self._row(self._held)
        held = None if found is None else found["held"]
        return {} if held is None else cast("dict[str, float]", json.loads(held))

    async def position(self, name: str) -> Position:
        found = await self._row(self._found, name)
        return 0 if found is None else int(found["position"])
