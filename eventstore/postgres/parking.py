"""Parked keys and their queues in the service's schema. See `eventstore/parking.py`; the functions that this calls are
explained in `migrations/sql/0011_parking.sql`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Protocol, TypeAlias
from uuid import UUID

import asyncpg

from bus.envelope import Failure
from eventstore import queued
from eventstore.checks import check_units
from eventstore.parking import Parked, ParkedKey, Waiting
from eventstore.port import ClaimState, Outcome, Standing, Tx, Unit, Verdict
from eventstore.postgres.units import STATES
from eventstore.queued import Lost

Driver: TypeAlias = "asyncpg.Connection[asyncpg.Record]"  # generic in its type stubs only
Query = Callable[..., Awaitable[Any]]
Commit = Callable[[Driver, Unit], Awaitable[Outcome]]
"""Writes a unit within a transaction."""

DEALT_WITH, TAKEN, NOT_PARKED, OTHERS_TURN = 0, 1, 3, 6
"""What `take_head` and `take_step` answer."""


class Undoably(Protocol):
    """Runs work that writes one unit, in a transaction of its own or within `tx`: undone, and answered, when it raises
    Lost."""

    def __call__(
        self, work: Callable[[Driver], Awaitable[Outcome]], *, doing: str, tx: Tx | None = None
    ) -> Awaitable[Outcome]: ...


class Examine(Protocol):
    def __call__(self, consumer: str, ids: Sequence[tuple[UUID, str | None]]) -> Awaitable[Sequence[Standing]]: ...


class PostgresParking:
    """`fetch(sql, *arguments)` runs one statement in autocommit."""

    def __init__(self, fetch: Query, examine: Examine, commit: Commit, undoably: Undoably, schema: str) -> None:
        self._fetch, self._examine, self._commit, self._undoably = fetch, examine, commit, undoably
        self._park = f"select * from {schema}.park({_places(11)})"
        self._follow = f"select * from {schema}.park_behind({_places(9)})"
        self._due = f"select * from {schema}.due_heads($1, $2, $3)"
        self._next = f"select min(show_at) from {schema}.parked_keys"
        self._seize = f"select * from {schema}.seize_head($1, $2, $3)"
        self._take_head = f"select {schema}.take_head({_places(7)})"
        self._put_instead = f"select {schema}.put_instead({_places(9)})"
        self._take_step = f"select {schema}.take_step({_places(5)})"
        key = "k.consumer = $1 and k.digest = sha256(convert_to($2, 'UTF8'))"
        # Every change of hands raises the token, and only then is another one the head.
        self._postpone = f"""
            with mine as (
                update {schema}.parked_keys k set due_at = $5, show_at = $5, token = k.token + 1
                 where {key} and k.token = $3 and $4 = (select min(p.number) from {schema}.parked p
                     where p.consumer = k.consumer and p.digest = k.digest)
                returning 1
            )
            update {schema}.parked p set failure = $6 where p.number = $4 and exists (select from mine) returning 1"""
        self._wake = f"""
            update {schema}.parked_keys k set due_at = now(), show_at = now(), token = k.token + 1
             where {key} returning 1"""
        message = (
            "p.number, p.parked_at, p.document, p.data, p.details, p.record_key, p.record_value, p.failure, "
            "0::bigint as token"
        )
        self._keys = f"""
            select k.consumer, k.key, {message}, k.since, k.due_at,
                   (select count(*) from {schema}.parked c where c.consumer = k.consumer and c.digest = k.digest)
              from {schema}.parked_keys k
              join lateral (select t.* from {schema}.parked t
                  where t.consumer = k.consumer and t.digest = k.digest order by t.number limit 1) p on true
             where ($1::text is null or k.consumer = $1) and (k.consumer, k.key) > ($2, $3)
             order by k.consumer, k.key limit $4"""
        self._queue = f"""
            select k.consumer, k.key, {message}
              from {schema}.parked_keys k
              join {schema}.parked p on p.consumer = k.consumer and p.digest = k.digest
             where {key} and p.number > $3 order by p.number limit $4"""

    # --- joining a queue ---------------------------------------------------------------------------------------------

    async def park(self, consumer: str, message: Waiting, why: Failure, *, due_at: datetime | None) -> Standing:
        queued.check_message(consumer, message)
        queued.check_failure(why)
        queued.check_due(due_at)
        id, key = message.envelope.id, message.envelope.key
        columns, failure = queued.columns(message), queued.failure_document(why)
        timed = message.delivery is None
        ((state, started),) = await self._fetch(self._park, consumer, id, key, due_at, timed, *columns, failure)
        (standing,) = await self._standings(consumer, [id], [state], [started])
        return standing

    async def follow(self, consumer: str, messages: Sequence[Waiting]) -> Sequence[Standing]:
        for message in messages:
            queued.check_message(consumer, message)
        if not messages:
            return []
        ids = [message.envelope.id for message in messages]
        keys = [message.envelope.key for message in messages]
        columns = [list(column) for column in zip(*map(queued.columns, messages), strict=True)]
        timed = [message.delivery is None for message in messages]
        ((states, started),) = await self._fetch(self._follow, consumer, ids, keys, timed, *columns)
        return await self._standings(consumer, ids, states, started)

    async def _standings(
        self, consumer: str, ids: Sequence[UUID], states: Sequence[int], started: Sequence[bool]
    ) -> list[Standing]:
        """With the stored replies of those that were dealt with: claims that do not change any more."""
        found = [Standing(STATES[state], started=begun) for state, begun in zip(states, started, strict=True)]
        ended = [nth for nth, one in enumerate(found) if one.state in (ClaimState.DONE, ClaimState.DEAD)]
        if ended:
            replies = await self._examine(consumer, [(ids[nth], None) for nth in ended])
            for nth, standing in zip(ended, replies, strict=True):
                found[nth] = replace(found[nth], reply=standing.reply)
        return found

    # --- from the head -----------------------------------------------------------------------------------------------

    async def due(self, *, consumers: Collection[str], limit: int, lease_s: float) -> Sequence[Parked]:
        queued.check_limit(limit)
        return [_parked(row) for row in await self._fetch(self._due, sorted(set(consumers)), limit, lease_s)]

    async def next_due(self, *, consumers: Collection[str] | None = None) -> datetime | None:
        if consumers is None:
            ((at,),) = await self._fetch(self._next)
        else:
            ((at,),) = await self._fetch(f"{self._next} where consumer = any($1)", sorted(set(consumers)))
        found: datetime | None = at
        return found

    async def seize(self, consumer: str, key: str, *, lease_s: float) -> Parked | None:
        found = await self._fetch(self._seize, consumer, key, lease_s)
        return _parked(found[0]) if found else None

    async def commit(
        self, parked: Parked, unit: Unit, *, tx: Tx | None = None, instead: Waiting | None = None
    ) -> Outcome:
        claim = queued.check_head(parked, unit)
        if instead is not None:
            queued.check_instead(parked, instead)
        check_units([unit])
        done = claim.state is ClaimState.DONE
        head = (claim.consumer, claim.message_id, parked.key, parked.number, parked.token, done, instead is not None)

        async def commit(db: Driver) -> Outcome:
            taken = await db.fetchval(self._take_head, *head)
            if taken == OTHERS_TURN:
                raise Lost(Outcome(Verdict.PARKED))
            if taken == TAKEN and instead is not None:
                place = (claim.consumer, instead.envelope.id, parked.key, parked.number)
                if instead.envelope.id == claim.message_id or not await db.fetchval(
                    self._put_instead, *place, *queued.columns(instead)
                ):
                    raise Lost(Outcome(Verdict.CONFLICT))
            return queued.whole(await self._commit(db, unit))

        return await self._undoably(commit, doing="commit a parked message", tx=tx)

    async def postpone(self, parked: Parked, why: Failure, *, due_at: datetime | None) -> bool:
        queued.check_failure(why)
        queued.check_due(due_at)
        turn = (parked.consumer, parked.key, parked.token, parked.number)
        return bool(await self._fetch(self._postpone, *turn, due_at, queued.failure_document(why)))

    async def cancel(self, consumer: str, step: UUID, unit: Unit, *, tx: Tx | None = None) -> Outcome:
        claim = queued.check_cancel(consumer, step, unit)
        check_units([unit])
        done = claim.state is ClaimState.DONE

        async def cancel(db: Driver) -> Outcome:
            taken = await db.fetchval(self._take_step, consumer, step, claim.message_id, claim.key, done)
            if taken == NOT_PARKED:
                raise Lost(Outcome(Verdict.CONFLICT))
            return queued.whole(await self._commit(db, unit))

        return await self._undoably(cancel, doing="cancel a parked message", tx=tx)

    # --- looking at them ---------------------------------------------------------------------------------------------

    async def keys(
        self, *, consumer: str | None = None, after: tuple[str, str] | None = None, limit: int = 100
    ) -> Sequence[ParkedKey]:
        queued.check_limit(limit)
        found = await self._fetch(self._keys, consumer, *(after or ("", "")), limit)
        return [
            ParkedKey(row[0], row[1], since, due_at, waiting, _parked(row)) for *row, since, due_at, waiting in found
        ]

    async def queue(self, consumer: str, key: str, *, after: int = 0, limit: int = 100) -> Sequence[Parked]:
        queued.check_limit(limit)
        return [_parked(row) for row in await self._fetch(self._queue, consumer, key, after, limit)]

    async def wake(self, consumer: str, key: str) -> bool:
        return bool(await self._fetch(self._wake, consumer, key))


def _parked(row: Sequence[Any]) -> Parked:
    consumer, key, number, parked_at, *message, failure, token = row
    return Parked(
        consumer=consumer,
        key=key,
        number=number,
        message=queued.message(*message),
        parked_at=parked_at,
        failure=queued.failure(failure),
        token=token,
    )


def _places(count: int) -> str:
    return ", ".join(f"${n}" for n in range(1, count + 1))


__all__ = ["PostgresParking"]
