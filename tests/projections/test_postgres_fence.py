"""PostgreSQL alone: what fences a save whose statement began before the hold and waits for the checkpoint's row."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bus.errors import Fenced
from projections import Checkpoint, Place, PostgresRows
from tests.eventstore.stores import STORES
from tests.projections.world import Customer, customers, eventually


async def test_a_save_that_waits_behind_a_hold_is_fenced(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its snapshot still says "not held"; only the revision on the row it waits for tells it."""
    backend = STORES["postgres"](request)
    await backend.migrate()
    async with backend.open() as store, backend.open() as twin:
        rows, saver = PostgresRows(store, customers), PostgresRows(twin, customers)
        await rows.serving()
        old = await rows.checkpoint(1)
        bump = rows._bump  # pyright: ignore[reportPrivateUsage]
        saving: list[asyncio.Task[None]] = []

        async def waits_for_a_lock() -> bool:
            async with twin.connection() as connection:
                return bool(await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

        async def bump_with_a_save_behind_it(connection: Any, number: int) -> Checkpoint:
            held = await bump(connection, number)
            new = Checkpoint({("log", 0): Place(5, 0, 5)})
            saving.append(asyncio.create_task(saver.save(1, {"a": Customer(customer_id="a")}, old=old, new=new)))
            await eventually(waits_for_a_lock)
            return held

        monkeypatch.setattr(rows, "_bump", bump_with_a_save_behind_it)
        held = await rows.hold(1, 5.0)
        with pytest.raises(Fenced):
            await saving[0]
        assert await rows.checkpoint(1) == held
        assert await rows.count() == 0
