"""Dead letters in the store's file, open and settled. See `Letters` in the port."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from eventstore import rows, settling
from eventstore.port import ClaimState, DeadLetter, Letter, LetterWhere, Settled, Settlement, Settling, Unit
from eventstore.sqlite.database import SqliteDatabase

_COLUMNS = "consumer, id, failed_at, key, value"
_OPEN = f"SELECT {_COLUMNS}, details FROM foldbus_dead_letters {{}} ORDER BY failed_at, id, consumer LIMIT ?"
_SETTLED = (
    f"SELECT {_COLUMNS}, details, number, settled_at, settled_as, settled_by, reason FROM foldbus_settled_letters {{}} "
    "ORDER BY number LIMIT ?"
)
_ONE = "WHERE consumer=? AND id=? AND failed_at=?"
_KEEP = (
    f"INSERT INTO foldbus_settled_letters ({_COLUMNS}, details, settled_at, settled_as, settled_by, reason) "
    f"SELECT {_COLUMNS}, details, ?, ?, ?, ? FROM foldbus_dead_letters {_ONE}"
)


class SqliteLetters:
    """`commit(connection, unit)` writes a unit within a transaction of the file's writer, `committed()` wakes who waits
    for the log."""

    def __init__(
        self,
        database: SqliteDatabase,
        commit: Callable[[sqlite3.Connection, Unit], object],
        committed: Callable[[], None],
    ) -> None:
        self._database, self._commit, self._committed = database, commit, committed

    async def page(
        self, where: LetterWhere, *, settled: bool = False, after: Letter | None = None, limit: int = 100
    ) -> Sequence[Letter]:
        settling.check(where, limit)

        async def read(after: Letter | None, limit: int) -> Sequence[Letter]:
            sql, values = settling.conditions(where, settled=settled, after=after)
            sql = (_SETTLED if settled else _OPEN).format(sql.replace("{}", "?"))
            found = await self._database.read(
                lambda connection: connection.execute(sql, [*map(_bound, values), limit]).fetchall()
            )
            return [settling.letter_of(row, rows.instant, lambda id: UUID(bytes=id)) for row in found]

        return await settling.chosen(read, where, after=after, limit=limit)

    async def settle(self, letter: DeadLetter, settlement: Settlement, *, unit: Unit | None = None) -> Settling:
        settling.check_unit(settlement, unit)
        verdict = await self._database.write(lambda connection: self._settle(connection, letter, settlement, unit))
        self._committed()
        return verdict

    def _settle(
        self, connection: sqlite3.Connection, letter: DeadLetter, settlement: Settlement, unit: Unit | None
    ) -> Settling:
        name = (letter.consumer, letter.id.bytes)
        which = (*name, rows.micros(letter.failure.failed_at))
        claimed = connection.execute(
            "SELECT state FROM foldbus_claims WHERE consumer=? AND message_id=?", name
        ).fetchone()
        claim = ClaimState(claimed[0]) if claimed else ClaimState.NEW
        verdict = settling.judged(settlement, claim)
        if connection.execute(f"SELECT 1 FROM foldbus_dead_letters {_ONE}", which).fetchone() is None:
            return verdict if verdict is Settling.CANCELLED else Settling.GONE
        if verdict is Settling.CANCELLED:
            return verdict
        how = Settled.HANDLED if verdict is Settling.HANDLED else settlement.how
        if how is Settled.REDRIVEN:
            connection.execute("DELETE FROM foldbus_claims WHERE consumer=? AND message_id=?", name)
        if how in settling.GOES_ON and unit is not None:
            self._commit(connection, unit)
        connection.execute(_KEEP, (rows.micros(settlement.at), how.value, settlement.by, settlement.reason, *which))
        connection.execute(f"DELETE FROM foldbus_dead_letters {_ONE}", which)
        return verdict


def _bound(value: Any) -> Any:
    if isinstance(value, UUID):
        return value.bytes
    return rows.micros(value) if isinstance(value, datetime) else value
