"""A user's own SQLAlchemy transaction as the store's `Tx`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from bus.errors import FoldbusError
from eventstore.port import Store, Tx

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession


_TOLD = "foldbus.stores"


class BadTransaction(FoldbusError):
    """What was given as `tx` is no transaction that a store can write in. Nothing was written."""


@dataclass(frozen=True, slots=True)
class UsersTx:
    """See `Tx`. It ends when its owner says so."""

    sql: AsyncConnection


async def in_transaction(given: Tx | AsyncSession | AsyncConnection, store: Store) -> Tx:
    """`given` as a `Tx`; a session without a transaction begins one, and tells the store of its commits, so that
    readers in this process wake at once. Raises BadTransaction."""
    from sqlalchemy import event
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
    from sqlalchemy.orm import Session

    if isinstance(given, AsyncSession):
        sql = await given.connection()
        if store not in given.info.setdefault(_TOLD, []):
            given.info[_TOLD].append(store)

            # For as long as the session lives: a hint at every commit costs nothing.
            def told(session: Session) -> None:
                del session
                store.committed()

            event.listen(given.sync_session, "after_commit", told)
        return UsersTx(sql)
    if isinstance(given, AsyncConnection):
        return UsersTx(given)
    if isinstance(cast("object", given), Tx):
        return given
    raise BadTransaction(
        f"tx is {type(given).__module__}.{type(given).__qualname__}; wanted an SQLAlchemy AsyncSession or "
        "AsyncConnection, or what `store.transaction()` gave; nothing was written"
    )
