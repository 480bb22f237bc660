"""Cancelled in the middle: at every single place where a call waits, one after the other.

Afterwards the unit is whole or absent, calling again tells which, the next caller finds clean connections, and none is
missing from the pool.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Generic, TypeVar

import pytest
from sqlalchemy import text

from eventstore.port import ANY, Store, Unit, Watermark
from tests.eventstore.stores import (
    Backend,
    append,
    claim,
    commit,
    dead_letter,
    message,
    reply,
    stream,
    version,
    wanted,
    whole_log,
)

T = TypeVar("T")
PLACES_MAX = 400


class CancelledAt(Generic[T]):
    """Awaits `work`; at its `place`-th wait the task is cancelled, as by a caller who has had enough."""

    def __init__(self, work: Awaitable[T], place: int) -> None:
        self._work, self._place = work, place
        self.waits = 0

    def __await__(self) -> Generator[Any, None, T]:
        steps = self._work.__await__()
        while True:
            try:
                future = steps.send(None)
            except StopIteration as ended:
                return ended.value  # type: ignore[no-any-return]
            while True:
                self.waits += 1
                if self.waits == self._place:
                    task = asyncio.current_task()
                    assert task is not None
                    asyncio.get_running_loop().call_soon(task.cancel)
                try:
                    yield future
                except BaseException as error:
                    try:
                        future = steps.throw(error)
                    except StopIteration as ended:
                        return ended.value  # type: ignore[no-any-return]
                    continue
                break


async def cancelled(work: Callable[[], Awaitable[Any]], place: int) -> str:
    """How that ended: "cancelled", or "done" (it was too late, or never waited that often)."""

    async def run() -> str:
        waiting = CancelledAt(work(), place)
        try:
            await waiting
        except asyncio.CancelledError:
            return "cancelled"
        return "done" if waiting.waits < place else "late"

    task = asyncio.create_task(run())
    (found,) = await asyncio.gather(task, return_exceptions=True)
    if isinstance(found, asyncio.CancelledError):
        return "late"  # the cancellation arrived when all was over
    if isinstance(found, BaseException):
        raise found
    return found


async def everything_is_clean(store: Any) -> None:
    """As many at once as there are connections, and then some; none is in a transaction."""
    await asyncio.wait_for(asyncio.gather(*(store.load([wanted("x")]) for _ in range(8))), 20)
    if hasattr(store, "connection"):
        async with store.connection() as db:
            assert not db.is_in_transaction()
            others = (
                "select count(*) from pg_stat_activity where datname = current_database() and state like 'idle in%'"
            )
            async with asyncio.timeout(20):
                while await db.fetchval(others):  # noqa: ASYNC110 - the server ends them a moment later
                    await asyncio.sleep(0.01)
    async with asyncio.timeout(20), store.transaction() as tx:
        assert (await tx.sql.execute(text("select 1"))).scalar_one() == 1


UNITS: dict[str, Callable[[str], list[Unit]]] = {
    "lean": lambda key: [Unit(claim(key=key, reply=reply()), appends=(append(key, 0),), outgoing=(message(),))],
    "several": lambda key: [
        Unit(claim(key=key, reply=reply()), appends=(append(key, 0, 2),)),
        Unit(claim(key=key), appends=(append(key, 2),), dead_letter=dead_letter()),
        Unit(claim(key="other"), appends=(append("any", ANY),)),
    ],
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("what", list(UNITS))
async def test_a_commit_cancelled_at_any_of_its_waits_is_whole_or_absent_and_leaves_nothing_behind(
    backend: Backend, what: str
) -> None:
    options: dict[str, Any] = {"pool_size": 2} if backend.name == "postgres" else {}
    async with backend.open(**options) as store:
        ended = ""
        place = 0
        while ended != "done":
            place += 1
            assert place < PLACES_MAX
            units = UNITS[what](f"k-{place}")
            mark = Watermark(f"g-{place}", "t", 0, place)
            before = len(await whole_log(store))
            ended = await cancelled(lambda units=units, mark=mark: store.commit(units, watermarks=[mark]), place)
            if ended == "cancelled":
                # What the server was told last may still be on its way: a repeat waits for it.
                answers = await asyncio.wait_for(commit(store, *units), 20)
                assert answers in (["ok"] * len(units), ["duplicate"] * len(units)), place
            await store.commit([], watermarks=[mark])
            expected = sum(
                len(unit.outgoing)
                + (unit.claim is not None and unit.claim.reply is not None)
                + sum(len(each.envelopes) for each in unit.appends)
                for unit in units
            )
            assert len(await whole_log(store)) - before == expected, place
            await everything_is_clean(store)
        assert place > 1, "it never waited: nothing was cancelled"


@pytest.mark.timeout(300)
async def test_a_transaction_cancelled_at_any_of_its_waits_is_whole_or_absent(backend: Backend) -> None:
    """The user's row and the unit share their fate, and the row tells which it was."""
    options: dict[str, Any] = {"pool_size": 2} if backend.name == "postgres" else {}
    async with backend.open(**options) as store:
        async with store.transaction() as tx:
            await tx.sql.execute(text("create table mine (n int)"))
        ended, place = "", 0

        async def work(unit: Unit, n: int) -> None:
            async with store.transaction() as tx:
                await tx.sql.execute(text("insert into mine values (:n)"), {"n": n})
                await store.commit([unit], tx=tx)

        while ended != "done":
            place += 1
            assert place < PLACES_MAX
            unit = Unit(claim(reply=reply()), appends=(append(f"k-{place}", 0, 2),))
            ended = await cancelled(lambda unit=unit, place=place: work(unit, place), place)
            await everything_is_clean(store)
            async with store.transaction() as tx:
                rows = (await tx.sql.execute(text("select count(*) from mine where n = :n"), {"n": place})).scalar_one()
            assert await version(store, f"k-{place}") == 2 * rows, place
            assert await commit(store, unit) == (["duplicate"] if rows else ["ok"]), place
        assert place > 3


@pytest.mark.timeout(300)
async def test_a_read_cancelled_at_any_of_its_waits_leaves_the_next_reader_alone(backend: Backend) -> None:
    options: dict[str, Any] = {"pool_size": 2} if backend.name == "postgres" else {}
    async with backend.open(**options) as store:
        await commit(store, Unit(appends=(append("a", 0, 3),)))
        for read in (_page, _slices, _due):
            ended, place = "", 0
            while ended != "done":
                place += 1
                assert place < PLACES_MAX
                ended = await cancelled(lambda read=read: read(store), place)
                await everything_is_clean(store)
                assert len((await store.read_all(after=0, limit=10)).records) == 3
            assert place > 1


async def _page(store: Store) -> Any:
    return await store.read_all(after=0, limit=10, outgoing=True)


async def _slices(store: Store) -> Any:
    return await store.load([wanted(stream("a")), wanted("b")])


async def _due(store: Store) -> Any:
    return await store.timers.due(limit=10)
