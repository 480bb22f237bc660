"""Dead letters in the service's schema, open and settled. See `Letters` in the port.

A letter's claim is locked before the letter, in the order in which a commit takes them: an undo that cancels the dead
message waits for whoever redrives it, and the other way round.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import count
from typing import Any, Protocol, TypeAlias, TypeVar

import asyncpg

from eventstore import settling
from eventstore.port import ClaimState, DeadLetter, Letter, LetterWhere, Settled, Settlement, Settling, Unit
from eventstore.postgres.units import STATES

T = TypeVar("T")
Driver: TypeAlias = "asyncpg.Connection[asyncpg.Record]"  # generic in its type stubs only
Connect = Callable[[], AbstractAsyncContextManager[Driver]]
Query = Callable[..., Awaitable[Any]]

_COLUMNS = "consumer, id, failed_at, key, value, document"
_ONE = "consumer = $1 and id = $2 and failed_at = $3"
_CLAIM = "consumer = $1 and message_id = $2"


class Retried(Protocol):
    async def __call__(self, act: Callable[[], Awaitable[T]], *, doing: str) -> T: ...


class PostgresLetters:
    """`fetch(sql, *arguments)` runs one statement in autocommit, `commit(db, unit)` writes a unit within a transaction;
    `retried(act, doing=…)` acts again after a lost race; `committed()` wakes who waits for the log."""

    def __init__(
        self,
        fetch: Query,
        connect: Connect,
        commit: Callable[[Driver, Unit], Awaitable[object]],
        retried: Retried,
        committed: Callable[[], None],
        schema: str,
    ) -> None:
        self._fetch, self._connect, self._commit, self._retried = fetch, connect, commit, retried
        self._committed, self._schema = committed, schema
        self._open = f"select {_COLUMNS} from {schema}.dead_letters %s order by failed_at, id, consumer"
        self._settled = f"""select {_COLUMNS}, number, settled_at, settled_as, settled_by, reason
                              from {schema}.settled_letters %s order by number"""

    async def page(
        self, where: LetterWhere, *, settled: bool = False, after: Letter | None = None, limit: int = 100
    ) -> Sequence[Letter]:
        settling.check(where, limit)

        async def read(after: Letter | None, limit: int) -> Sequence[Letter]:
            sql, values = settling.conditions(where, settled=settled, after=after)
            places = count(1)
            while "{}" in sql:
                sql = sql.replace("{}", f"${next(places)}", 1)
            sql = (self._settled if settled else self._open) % sql + f" limit ${next(places)}"
            found = await self._fetch(sql, *values, limit)
            return [settling.letter_of(tuple(row), lambda at: at, lambda id: id) for row in found]

        return await settling.chosen(read, where, after=after, limit=limit)

    async def settle(self, letter: DeadLetter, settlement: Settlement, *, unit: Unit | None = None) -> Settling:
        settling.check_unit(settlement, unit)

        async def act() -> Settling:
            async with self._connect() as db, db.transaction():
                return await self._settle(db, letter, settlement, unit)

        verdict = await self._retried(act, doing="settle a dead letter")
        self._committed()
        return verdict

    async def _settle(self, db: Driver, letter: DeadLetter, settlement: Settlement, unit: Unit | None) -> Settling:
        schema, name = self._schema, (letter.consumer, letter.id)
        which = (*name, letter.failure.failed_at)
        state: int | None = await db.fetchval(f"select state from {schema}.claims where {_CLAIM} for update", *name)
        verdict = settling.judged(settlement, ClaimState.NEW if state is None else STATES[state])
        found = await db.fetchval(f"select 1 from {schema}.dead_letters where {_ONE} for update", *which)
        if found is None:
            return verdict if verdict is Settling.CANCELLED else Settling.GONE
        if verdict is Settling.CANCELLED:
            return verdict
        how = Settled.HANDLED if verdict is Settling.HANDLED else settlement.how
        if how is Settled.REDRIVEN:
            await db.execute(f"delete from {schema}.replies where {_CLAIM}", *name)
            await db.execute(f"delete from {schema}.claims where {_CLAIM}", *name)
        await db.execute(
            f"""with gone as (delete from {schema}.dead_letters where {_ONE} returning {_COLUMNS})
                insert into {schema}.settled_letters ({_COLUMNS}, settled_at, settled_as, settled_by, reason)
                select {_COLUMNS}, $4, $5, $6, $7 from gone""",
            *which,
            settlement.at,
            how.value,
            settlement.by,
            settlement.reason,
        )
        if how in settling.GOES_ON and unit is not None:
            await self._commit(db, unit)  # last: what is appended holds up readers until the transaction ends
        return verdict
