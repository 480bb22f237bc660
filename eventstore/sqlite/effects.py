"""Claims of effects in the store's file. See `Effects` in `eventstore/parking.py`."""

from __future__ import annotations

import sqlite3
from uuid import UUID

from bus.seams import Clock
from eventstore import queued, rows
from eventstore.checks import check_units
from eventstore.parking import Parked
from eventstore.port import ClaimState, Outcome, Standing, Unit, Verdict
from eventstore.queued import Lost
from eventstore.sqlite import reading
from eventstore.sqlite.database import SqliteDatabase
from eventstore.sqlite.parking import Commits, Undoably, has_turn
from eventstore.sqlite.session import DriverSession, Session
from eventstore.sqlite.units import Written

_CLAIM = "INSERT INTO foldbus_claims (consumer, message_id, key, state, claimed_at) VALUES (?,?,?,'started',?)"
_BEGIN = (
    "INSERT INTO foldbus_effects (consumer, message_id, token, lease_until) VALUES (?,?,1,?) "
    "ON CONFLICT (consumer, message_id) DO UPDATE SET token=token+1, lease_until=excluded.lease_until"
)
_TOKEN = "SELECT token FROM foldbus_effects WHERE consumer=? AND message_id=?"
_RELEASE = "UPDATE foldbus_effects SET lease_until=min(lease_until, ?) WHERE consumer=? AND message_id=? AND token=?"
_DELETE = "DELETE FROM {} WHERE consumer=? AND message_id=?"


class SqliteEffects:
    def __init__(self, database: SqliteDatabase, clock: Clock, commit: Commits, undoably: Undoably) -> None:
        self._database, self._clock, self._commit, self._undoably = database, clock, commit, undoably

    async def begin(
        self, consumer: str, message_id: UUID, key: str, *, lease_s: float, parked: Parked | None = None
    ) -> Standing:
        queued.check_effect(consumer, message_id, key, parked)
        now = rows.micros(self._clock.now())

        def begin(connection: sqlite3.Connection) -> Standing:
            session = DriverSession(connection)
            (standing,) = reading.examine(session, consumer, [(message_id, key)])
            state = standing.state
            if state not in (ClaimState.NEW, ClaimState.STARTED, ClaimState.PARKED):
                return standing
            if state is ClaimState.PARKED and (parked is None or not has_turn(session, parked)):
                return standing
            if state is not ClaimState.NEW and not reading.lease_is_over(session, consumer, message_id, now):
                return Standing(ClaimState.STARTED, started=True)
            if state is ClaimState.STARTED and reading.is_parked(session, consumer, key):
                return Standing(ClaimState.KEY_PARKED, started=True)
            if state is ClaimState.NEW:
                session.run(_CLAIM, [(consumer, message_id.bytes, key, now)])
            session.run(_BEGIN, [(consumer, message_id.bytes, now + round(lease_s * 1_000_000))])
            ((token,),) = session.rows(_TOKEN, (consumer, message_id.bytes))
            return Standing(ClaimState.NEW, started=standing.started, token=token)

        return await self._database.write(begin, together=True)

    async def release(self, consumer: str, message_id: UUID, token: int) -> None:
        now = rows.micros(self._clock.now())
        await self._database.write(
            lambda connection: connection.execute(_RELEASE, (now, consumer, message_id.bytes, token)), together=True
        )

    async def commit(self, token: int, unit: Unit) -> Outcome:
        claim = queued.check_claim(unit)
        check_units([unit])
        name = (claim.consumer, claim.message_id.bytes)

        def commit(session: Session) -> Written:
            (standing,) = reading.examine(session, claim.consumer, [(claim.message_id, None)])
            if standing.state in (ClaimState.NEW, ClaimState.STARTED):
                mine = [tuple(row) for row in session.rows(_TOKEN, name)] == [(token,)]
                if standing.state is ClaimState.NEW or not mine:
                    raise Lost(Outcome(Verdict.STARTED))
                session.run(_DELETE.format("foldbus_claims"), [name])
            # It was begun before its key was parked, if that is: what has happened outside is not put off.
            written = self._commit(session, unit, passing=[(claim.consumer, claim.key)])
            queued.whole(written.outcomes[0])
            if claim.state is ClaimState.DONE:
                session.run(_DELETE.format("foldbus_effects"), [name])
            return written

        return await self._undoably(commit)


__all__ = ["SqliteEffects"]
