"""Parked keys and their queues in the store's file. See `eventstore/parking.py`.

The file has one writer at a time, so every change here is alone with what it looks at, from its first statement on.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

from bus.envelope import Failure
from bus.seams import Clock
from eventstore import queued, rows
from eventstore.checks import check_units
from eventstore.parking import Parked, ParkedKey, Waiting
from eventstore.port import Claim, ClaimState, Outcome, Standing, Tx, Unit, Verdict
from eventstore.queued import Lost
from eventstore.sqlite import reading
from eventstore.sqlite.database import SqliteDatabase
from eventstore.sqlite.session import DriverSession, Session
from eventstore.sqlite.units import ParkedKey as Name
from eventstore.sqlite.units import Written

_MESSAGE = "number, message_id, parked_at, envelope, data, details, record_key, record_value, failure"
_QUEUE = f"SELECT {_MESSAGE} FROM foldbus_parked WHERE consumer=? AND key=? AND number>? ORDER BY number LIMIT ?"
_JOIN = (
    "INSERT INTO foldbus_parked (number, consumer, key, message_id, parked_at, envelope, data, details, record_key, "
    "record_value, failure) VALUES (?,?,?,?,?,?,?,?,?,?,?)"
)
_BEGIN = "INSERT INTO foldbus_parked_keys (consumer, key, since, due_at, shown_at, token) VALUES (?,?,?,?,?,0)"
_CLAIM = (
    "INSERT INTO foldbus_claims (consumer, message_id, key, state, claimed_at) VALUES (?,?,?,'parked',?) "
    "ON CONFLICT (consumer, message_id) DO UPDATE SET state=excluded.state, key=excluded.key"
)
_END_LEASE = "UPDATE foldbus_effects SET lease_until=min(lease_until, ?) WHERE consumer=? AND message_id=?"
_TURN = "UPDATE foldbus_parked_keys SET due_at=?, shown_at=?, token=token+1 WHERE consumer=? AND key=?"
_ONE_CLAIM = "DELETE FROM foldbus_claims WHERE consumer=? AND message_id=?"
_KEYS = (
    "SELECT consumer, key, since, due_at, "
    "(SELECT count(*) FROM foldbus_parked p WHERE p.consumer=k.consumer AND p.key=k.key) "
    "FROM foldbus_parked_keys k WHERE {} (consumer, key)>(?, ?) ORDER BY consumer, key LIMIT ?"
)


class Commits(Protocol):
    """Writes a unit within a transaction, as if the keys that are `passing` were not parked."""

    def __call__(self, session: Session, unit: Unit, *, passing: Collection[Name]) -> Written: ...


class Undoably(Protocol):
    """Runs work that writes one unit, in a transaction of its own or within `tx`: undone, and answered, when it raises
    Lost."""

    def __call__(self, work: Callable[[Session], Written], *, tx: Tx | None = None) -> Awaitable[Outcome]: ...


class SqliteParking:
    def __init__(self, database: SqliteDatabase, clock: Clock, commit: Commits, undoably: Undoably) -> None:
        self._database, self._clock, self._commit, self._undoably = database, clock, commit, undoably

    # --- joining a queue ---------------------------------------------------------------------------------------------

    async def park(self, consumer: str, message: Waiting, why: Failure, *, due_at: datetime | None) -> Standing:
        queued.check_message(consumer, message)
        queued.check_failure(why)
        due, now = _micros(due_at), self._now()

        def park(connection: sqlite3.Connection) -> Standing:
            session = DriverSession(connection)
            (standing,) = reading.examine(session, consumer, [(message.envelope.id, None)])
            if standing.state in (ClaimState.NEW, ClaimState.STARTED):
                key = message.envelope.key
                if not session.rows("SELECT 1 FROM foldbus_parked_keys WHERE consumer=? AND key=?", (consumer, key)):
                    session.run(_BEGIN, [(consumer, key, now, due, due)])
                _join(session, consumer, message, why, now)
                session.run(_END_LEASE, [(now, consumer, message.envelope.id.bytes)])
                return Standing(ClaimState.PARKED, started=standing.started)
            return standing

        return await self._database.write(park, together=True)

    async def follow(self, consumer: str, messages: Sequence[Waiting]) -> Sequence[Standing]:
        for message in messages:
            queued.check_message(consumer, message)
        now = self._now()

        def follow(connection: sqlite3.Connection) -> list[Standing]:
            return [_follow(DriverSession(connection), consumer, message, now) for message in messages]

        return await self._database.write(follow, together=True) if messages else []

    # --- from the head -----------------------------------------------------------------------------------------------

    async def due(self, *, consumers: Collection[str], limit: int, lease_s: float) -> Sequence[Parked]:
        queued.check_limit(limit)
        now, names = self._now(), sorted(set(consumers))
        # A read first: most of the time nothing is due, and a write would queue with the commits to find that out.
        if not await self._database.read(lambda connection: _due(DriverSession(connection), names, now, 1)):
            return []

        def give(connection: sqlite3.Connection) -> list[Parked]:
            session = DriverSession(connection)
            heads: list[Parked] = []
            for consumer, key, due_at, token in _due(session, names, now, limit):
                session.run(_TURN, [(due_at, now + round(lease_s * 1_000_000), consumer, key)])
                heads += _queue(session, consumer, key, after=0, limit=1, token=token + 1)
            return heads

        return await self._database.write(give, together=True)

    async def next_due(self, *, consumers: Collection[str] | None = None) -> datetime | None:
        names = None if consumers is None else sorted(set(consumers))
        among = "" if names is None else f" WHERE consumer IN ({','.join('?' * len(names))})"

        def earliest(connection: sqlite3.Connection) -> int | None:
            sql = f"SELECT min(shown_at) FROM foldbus_parked_keys{among}"
            found: int | None = connection.execute(sql, names or ()).fetchone()[0]
            return found

        found = await self._database.read(earliest)
        return None if found is None else rows.instant(found)

    async def seize(self, consumer: str, key: str, *, lease_s: float) -> Parked | None:
        until = self._now() + round(lease_s * 1_000_000)

        def seize(connection: sqlite3.Connection) -> Parked | None:
            session = DriverSession(connection)
            found = session.rows(
                "UPDATE foldbus_parked_keys SET shown_at=max(due_at, ?), token=token+1 WHERE consumer=? AND key=? "
                "RETURNING token",  # of a null there is no maximum: held stays held
                (until, consumer, key),
            )
            for (token,) in found:
                (head,) = _queue(session, consumer, key, after=0, limit=1, token=token)
                return head
            return None

        return await self._database.write(seize, together=True)

    async def commit(
        self, parked: Parked, unit: Unit, *, tx: Tx | None = None, instead: Waiting | None = None
    ) -> Outcome:
        claim = queued.check_head(parked, unit)
        if instead is not None:
            queued.check_instead(parked, instead)
        check_units([unit])

        def commit(session: Session) -> Written:
            (standing,) = reading.examine(session, claim.consumer, [(claim.message_id, None)])
            if standing.state is ClaimState.PARKED or standing.state is ClaimState.NEW:
                if not has_turn(session, parked):
                    raise Lost(Outcome(Verdict.PARKED))
                _take_out(session, claim.consumer, claim.message_id)
                if instead is not None:
                    _put_instead(session, parked, instead, self._now())
            written = self._commit(session, unit, passing=[(parked.consumer, parked.key)])
            queued.whole(written.outcomes[0])
            _go_on(session, parked.consumer, parked.key, self._now())
            _forget_effect(session, claim)
            return written

        return await self._undoably(commit, tx=tx)

    async def postpone(self, parked: Parked, why: Failure, *, due_at: datetime | None) -> bool:
        queued.check_failure(why)
        due = _micros(due_at)

        def postpone(connection: sqlite3.Connection) -> bool:
            session = DriverSession(connection)
            if not has_turn(session, parked):
                return False
            document = queued.failure_document(why)
            session.run("UPDATE foldbus_parked SET failure=? WHERE number=?", [(document, parked.number)])
            session.run(_TURN, [(due, due, parked.consumer, parked.key)])
            return True

        return await self._database.write(postpone, together=True)

    async def cancel(self, consumer: str, step: UUID, unit: Unit, *, tx: Tx | None = None) -> Outcome:
        claim = queued.check_cancel(consumer, step, unit)
        check_units([unit])

        def cancel(session: Session) -> Written:
            own, of_step = reading.examine(session, consumer, [(claim.message_id, None), (step, None)])
            if own.state in (ClaimState.NEW, ClaimState.PARKED):
                if of_step.state is not ClaimState.PARKED:
                    raise Lost(Outcome(Verdict.CONFLICT))
                left = _take_out(session, consumer, step)
                for name, was_head in _take_out(session, consumer, claim.message_id).items():
                    left[name] = was_head or left.get(name, False)
                written = self._commit(session, unit, passing=[*left, (consumer, claim.key)])
            else:
                left = {}
                written = self._commit(session, unit, passing=())
            queued.whole(written.outcomes[0])
            for (_, key), was_head in left.items():
                _go_on(session, consumer, key, self._now(), next=was_head)
            _forget_effect(session, claim)
            return written

        return await self._undoably(cancel, tx=tx)

    # --- looking at them ---------------------------------------------------------------------------------------------

    async def keys(
        self, *, consumer: str | None = None, after: tuple[str, str] | None = None, limit: int = 100
    ) -> Sequence[ParkedKey]:
        queued.check_limit(limit)
        of = () if consumer is None else (consumer,)
        sql = _KEYS.format("" if consumer is None else "consumer=? AND")

        def find(connection: sqlite3.Connection) -> list[ParkedKey]:
            session = DriverSession(connection)
            found: list[ParkedKey] = []
            for who, key, since, due_at, waiting in session.rows(sql, (*of, *(after or ("", "")), limit)):
                (head,) = _queue(session, who, key, after=0, limit=1)
                due = None if due_at is None else rows.instant(due_at)
                found.append(ParkedKey(who, key, rows.instant(since), due, waiting, head))
            return found

        return await self._database.read(find)

    async def queue(self, consumer: str, key: str, *, after: int = 0, limit: int = 100) -> Sequence[Parked]:
        queued.check_limit(limit)
        return await self._database.read(
            lambda connection: _queue(DriverSession(connection), consumer, key, after=after, limit=limit)
        )

    async def wake(self, consumer: str, key: str) -> bool:
        now = self._now()

        def wake(connection: sqlite3.Connection) -> bool:
            return connection.execute(_TURN, (now, now, consumer, key)).rowcount > 0

        return await self._database.write(wake, together=True)

    def _now(self) -> int:
        return rows.micros(self._clock.now())


# --- steps of a transaction ------------------------------------------------------------------------------------------


def _follow(session: Session, consumer: str, message: Waiting, now: int) -> Standing:
    envelope = message.envelope
    (standing,) = reading.examine(session, consumer, [(envelope.id, envelope.key)])
    state = standing.state
    if (
        state is ClaimState.STARTED
        and reading.is_parked(session, consumer, envelope.key)
        and reading.lease_is_over(session, consumer, envelope.id, now)
    ):
        state = ClaimState.KEY_PARKED
    if state is not ClaimState.KEY_PARKED:
        return standing
    _join(session, consumer, message, None, now)
    return Standing(ClaimState.PARKED, started=standing.started)


def _join(
    session: Session, consumer: str, message: Waiting, why: Failure | None, now: int, *, number: int | None = None
) -> None:
    """To the end of the queue of its key, which is parked; or to the place of `number`, which is free."""
    id, key = message.envelope.id.bytes, message.envelope.key
    session.run(_CLAIM, [(consumer, id, key, now)])
    failure = queued.failure_document(why)
    session.run(_JOIN, [(number, consumer, key, id, now, *queued.columns(message), failure)])
    if message.delivery is None:  # the queue has it now: it shall not come up again at the end of every lease
        session.run("DELETE FROM foldbus_timers WHERE consumer=? AND id=?", [(consumer, id)])


def has_turn(session: Session, parked: Parked) -> bool:
    name = (parked.consumer, parked.key)
    found = session.rows(
        "SELECT token, (SELECT min(number) FROM foldbus_parked p WHERE p.consumer=k.consumer AND p.key=k.key) "
        "FROM foldbus_parked_keys k WHERE consumer=? AND key=?",
        name,
    )
    return [tuple(row) for row in found] == [(parked.token, parked.number)]


def _take_out(session: Session, consumer: str, id: UUID) -> dict[Name, bool]:
    """Takes a message out of its queue, and its claim away; answers the key, and whether it was the head. Empty when it
    was in none."""
    name = (consumer, id.bytes)
    found = session.rows("SELECT key, number FROM foldbus_parked WHERE consumer=? AND message_id=?", name)
    left: dict[Name, bool] = {}
    for key, number in found:
        before = "SELECT 1 FROM foldbus_parked WHERE consumer=? AND key=? AND number<? LIMIT 1"
        left[consumer, key] = not session.rows(before, (consumer, key, number))
        session.run("DELETE FROM foldbus_parked WHERE number=?", [(number,)])
        session.run(_ONE_CLAIM, [name])
    return left


def _put_instead(session: Session, parked: Parked, instead: Waiting, now: int) -> None:
    id = instead.envelope.id
    (found,) = reading.examine(session, parked.consumer, [(id, None)])
    if found.state is not ClaimState.NEW or id == parked.message.envelope.id:
        raise Lost(Outcome(Verdict.CONFLICT))
    _join(session, parked.consumer, instead, None, now, number=parked.number)


def _go_on(session: Session, consumer: str, key: str, now: int, *, next: bool = True) -> None:
    """Somebody left the queue: the `next` one is due now; an empty queue is none."""
    if not session.rows("SELECT 1 FROM foldbus_parked WHERE consumer=? AND key=? LIMIT 1", (consumer, key)):
        session.run("DELETE FROM foldbus_parked_keys WHERE consumer=? AND key=?", [(consumer, key)])
    elif next:
        session.run(_TURN, [(now, now, consumer, key)])


def _forget_effect(session: Session, claim: Claim) -> None:
    if claim.state is ClaimState.DONE:
        name = (claim.consumer, claim.message_id.bytes)
        session.run("DELETE FROM foldbus_effects WHERE consumer=? AND message_id=?", [name])


def _due(session: Session, consumers: Sequence[str], now: int, limit: int) -> list[Any]:
    return session.rows(
        "SELECT consumer, key, due_at, token FROM foldbus_parked_keys "
        f"WHERE shown_at<=? AND consumer IN ({','.join('?' * len(consumers))}) ORDER BY due_at, consumer, key LIMIT ?",
        (now, *consumers, limit),
    )


def _queue(session: Session, consumer: str, key: str, *, after: int, limit: int, token: int = 0) -> list[Parked]:
    return [
        Parked(
            consumer=consumer,
            key=key,
            number=number,
            message=queued.message(*message),
            parked_at=rows.instant(parked_at),
            failure=queued.failure(failure),
            token=token,
        )
        for number, _, parked_at, *message, failure in session.rows(_QUEUE, (consumer, key, after, limit))
    ]


def _micros(due_at: datetime | None) -> int | None:
    queued.check_due(due_at)
    return None if due_at is None else rows.micros(due_at)


__all__ = ["Commits", "SqliteParking", "Undoably", "has_turn"]
