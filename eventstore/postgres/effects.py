"""Claims of effects in the service's schema. See `Effects` in `eventstore/parking.py`."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

from eventstore import queued
from eventstore.checks import check_units
from eventstore.parking import Parked
from eventstore.port import ClaimState, Outcome, Standing, Unit, Verdict
from eventstore.postgres.parking import Commit, Driver, Examine, Query, Undoably
from eventstore.postgres.units import STATES
from eventstore.queued import Lost

_SOMEBODY_ELSES = 5
"""What `take_effect` answers."""


class PostgresEffects:
    """As `PostgresParking`."""

    def __init__(self, fetch: Query, examine: Examine, commit: Commit, undoably: Undoably, schema: str) -> None:
        self._fetch, self._examine, self._commit, self._undoably = fetch, examine, commit, undoably
        self._begin = f"select * from {schema}.begin_effect($1, $2, $3, $4, $5, $6)"
        self._take = f"select {schema}.take_effect($1, $2, $3, $4, $5)"
        self._release = f"""
            update {schema}.effects set lease_until = least(lease_until, clock_timestamp())
             where consumer = $1 and message_id = $2 and token = $3"""

    async def begin(
        self, consumer: str, message_id: UUID, key: str, *, lease_s: float, parked: Parked | None = None
    ) -> Standing:
        queued.check_effect(consumer, message_id, key, parked)
        turn = (None, None) if parked is None else (parked.number, parked.token)
        found = await self._fetch(self._begin, consumer, message_id, key, lease_s, *turn)
        ((state, started, token),) = found
        standing = Standing(STATES[state], started=started, token=token)
        if standing.state in (ClaimState.DONE, ClaimState.DEAD):
            (ended,) = await self._examine(consumer, [(message_id, None)])
            standing = replace(standing, reply=ended.reply)
        return standing

    async def release(self, consumer: str, message_id: UUID, token: int) -> None:
        await self._fetch(self._release, consumer, message_id, token)

    async def commit(self, token: int, unit: Unit) -> Outcome:
        claim = queued.check_claim(unit)
        check_units([unit])
        name = (claim.consumer, claim.message_id, claim.key)

        async def commit(db: Driver) -> Outcome:
            if await db.fetchval(self._take, *name, token, claim.state is ClaimState.DONE) == _SOMEBODY_ELSES:
                raise Lost(Outcome(Verdict.STARTED))
            return queued.whole(await self._commit(db, unit))

        return await self._undoably(commit, doing="commit an effect")


__all__ = ["PostgresEffects"]
