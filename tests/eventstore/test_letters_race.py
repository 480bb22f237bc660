"""A dead letter that is redriven while its message, or its undo, is being committed: PostgreSQL, where they can meet.
(SQLite has one writer at a time.)"""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest

from eventstore.port import ANY, ClaimState, Fence, Settling, Unit
from tests.eventstore.locks import blocked
from tests.eventstore.stores import append, claim, commit, postgres_backend, undo, verdicts, version
from tests.eventstore.test_letters_conformance import REDRIVEN, again, died, standing


async def test_an_undo_that_waits_for_a_redrive_fences_the_redriven_message(request: pytest.FixtureRequest) -> None:
    """The undo has seen the dead claim and is let go on when it is given back: it must leave one of its own."""
    backend = postgres_backend(request)
    await backend.migrate()
    async with backend.open() as store, backend.open() as other:
        letter = await died(store)
        async with other.connection() as db, db.transaction():
            of = "consumer = $1 and message_id = $2"
            await db.execute(f"select from {other.schema}.claims where {of} for update", letter.consumer, letter.id)
            undoing = asyncio.create_task(commit(store, Unit(undo(letter.id, Fence.CANCEL))))
            await blocked(backend.where)
            assert await other.letters._settle(db, letter, REDRIVEN, again(letter)) is Settling.SETTLED
        assert await undoing == ["ok"]
        assert await standing(store, letter) is ClaimState.CANCELLED
        assert await commit(store, Unit(claim(letter.id), appends=(append("a", 0),))) == ["cancelled"]


async def test_a_message_that_comes_again_while_it_is_redriven_has_one_effect(request: pytest.FixtureRequest) -> None:
    """It found its dead claim, waited for another one, and went on when its own was given back."""
    backend = postgres_backend(request)
    await backend.migrate()
    async with backend.open() as store, backend.open() as other:
        letter = await died(store, UUID(int=1))
        held = UUID(int=2)
        async with other.transaction() as tx:
            await other.commit([Unit(claim(held))], tx=tx)
            units = [Unit(claim(letter.id), appends=(append("a", 0),)), Unit(claim(held, key="another"))]
            coming = asyncio.create_task(store.commit(units))
            await blocked(backend.where)
            assert await other.letters.settle(letter, REDRIVEN, unit=again(letter)) is Settling.SETTLED
        assert verdicts(await coming) == ["ok", "duplicate"]
        assert await standing(store, letter) is ClaimState.DONE
        assert await commit(store, Unit(claim(letter.id), appends=(append("a", ANY),))) == ["duplicate"]
        assert await version(store, "a") == 1
