"""`DueParked` and engines that take what a test lets them take, on both stores: turns in hand, put back, given anew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import pytest

from bus.metrics import MemoryMetrics
from bus.processing import Aside, Done, Failed, Item, Result
from bus.tasks import ended
from eventstore.parking import Parked, Waiting
from eventstore.port import Claim, Store, Unit, Verdict
from foldbus.parking import ParkSettings
from foldbus.timing import DueParked
from tests.eventstore.stores import NOON, failure, message
from tests.stories.pairs import eventually

CONSUMER = "shop"


class Engine:
    """Takes what there is `room` for."""

    def __init__(self, room: int = 10) -> None:
        self.room = room
        self.taken: list[tuple[Item, asyncio.Future[Result]]] = []

    def offer(self, item: Item) -> asyncio.Future[Result] | None:
        if self.room <= 0:
            return None
        self.room -= 1
        ended: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.taken.append((item, ended))
        return ended

    @property
    def keys(self) -> list[str]:
        return [item.envelope.key for item, _ in self.taken]


async def park(store: Store, key: str, *, behind: int = 0) -> None:
    await store.parking.park(CONSUMER, Waiting(message(key)), failure(), due_at=NOON)
    await store.parking.follow(CONSUMER, [Waiting(message(key)) for _ in range(behind)])


@asynccontextmanager
async def handing(
    store: Store, engine: Engine, *, poll_s: float = 0.02, **settings: Any
) -> AsyncGenerator[tuple[DueParked, MemoryMetrics]]:
    metrics = MemoryMetrics()
    due = DueParked(
        store, cast("Any", {CONSUMER: engine}), metrics=metrics, settings=ParkSettings(**settings), poll_s=poll_s
    )
    task = asyncio.create_task(due.run())
    try:
        yield due, metrics
    finally:
        await ended(task)


async def taken(engine: Engine, n: int) -> list[Item]:
    async def look() -> int:
        return len(engine.taken)

    await eventually(look, lambda found: found >= n)
    assert len(engine.taken) == n
    return [item for item, _ in engine.taken]


async def handled(store: Store, item: Item) -> None:
    parked = cast("Parked", item.parked)
    outcome = await store.parking.commit(parked, Unit(Claim(CONSUMER, item.envelope.id, item.envelope.key)))
    assert outcome.verdict is Verdict.COMMITTED


async def test_each_head_is_handed_out_once_with_what_it_has_been_through(store: Store) -> None:
    for key in "abc":
        await park(store, key, behind=2)
    engine = Engine()
    async with handing(store, engine) as (_, metrics):
        items = await taken(engine, 3)
        assert {item.envelope.key: item.attempts for item in items} == dict.fromkeys("abc", 3)
        assert all(item.parked is not None for item in items)
        assert metrics.total("foldbus_turns_total") == 3


async def test_the_next_of_a_key_comes_as_soon_as_one_has_left(store: Store) -> None:
    """Nothing is waited for: the poll is an hour away."""
    await park(store, "a", behind=3)
    engine = Engine()
    async with handing(store, engine, poll_s=3600.0) as (_, metrics):
        for n in range(1, 5):
            (*_, item) = await taken(engine, n)
            await handled(store, item)
            result: Result = Done() if n % 2 else Failed(RuntimeError("it died"))
            engine.taken[-1][1].set_result(result)

        async def freed() -> int:
            return metrics.total("foldbus_keys_freed_total")

        await eventually(freed, lambda n: n == 1)
        assert await store.parking.keys() == []


async def test_what_is_in_hand_is_not_handed_out_again_but_has_the_turn_anew(store: Store) -> None:
    """An engine that is slower than the lease: the token that it commits with is the last one given."""
    await park(store, "a")
    engine = Engine()
    async with handing(store, engine, lease_s=0.05):
        (item,) = await taken(engine, 1)
        first = cast("Parked", item.parked).token

        async def token() -> int:
            return cast("Parked", item.parked).token

        await eventually(token, lambda found: found >= first + 2)
        assert len(engine.taken) == 1
        while True:
            parked = cast("Parked", item.parked)
            unit = Unit(Claim(CONSUMER, item.envelope.id, item.envelope.key))
            if (await store.parking.commit(parked, unit)).verdict is Verdict.COMMITTED:
                break
    assert await store.parking.keys() == []


async def test_nothing_is_taken_for_an_engine_without_room(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn that it cannot take would keep others from the key."""
    await park(store, "a")
    asked: list[list[str]] = []
    due = store.parking.due

    async def watched(*, consumers: list[str], limit: int, lease_s: float) -> Sequence[Parked]:
        asked.append(consumers)
        return await due(consumers=consumers, limit=limit, lease_s=lease_s)

    monkeypatch.setattr(store.parking, "due", watched)
    full, free = Engine(room=0), Engine()
    handler = DueParked(
        store,
        cast("Any", {CONSUMER: full, "shop.other": free}),
        metrics=MemoryMetrics(),
        settings=ParkSettings(),
        poll_s=0.02,
    )
    task = asyncio.create_task(handler.run())

    async def often() -> int:
        return len(asked)

    await eventually(often, lambda n: n >= 3)
    assert asked == [["shop.other"]] * len(asked)
    full.room = 1
    await taken(full, 1)
    await ended(task)


async def test_so_many_are_in_hand_and_no_more(store: Store) -> None:
    for n in range(10):
        await park(store, f"k{n}")
    engine = Engine(room=100)
    async with handing(store, engine, at_once_max=4) as (due, _):
        await taken(engine, 4)
        for item, future in engine.taken[:3]:
            await handled(store, item)
            future.set_result(Done())
        await taken(engine, 7)
        assert len(due._hands) == 4


async def test_what_an_engine_drops_is_another_workers_turn_at_once(store: Store, twin: Store) -> None:
    """Its lease would last for an hour."""
    await park(store, "a")
    mine, others = Engine(room=1), Engine()
    async with handing(store, mine, lease_s=3600.0):
        await taken(mine, 1)
        mine.taken[0][1].cancel()
        async with handing(twin, others, lease_s=3600.0):
            (item,) = await taken(others, 1)
    assert item.envelope.key == "a"


async def test_a_worker_that_stops_puts_back_what_it_has_in_hand(store: Store, twin: Store) -> None:
    for key in "ab":
        await park(store, key)
    mine, others = Engine(), Engine()
    async with handing(store, mine, lease_s=3600.0) as (due, _):
        await taken(mine, 2)
        mine.room = 0  # an engine that has ended
        await due.put_back()
    async with handing(twin, others, lease_s=3600.0):
        assert sorted(item.envelope.key for item in await taken(others, 2)) == ["a", "b"]


async def test_one_that_is_due_again_before_its_end_was_heard_has_a_turn_of_its_own(store: Store) -> None:
    """Not the one that is over: nobody would have the key until the lease ends."""
    await park(store, "a")
    engine = Engine()
    async with handing(store, engine, lease_s=60.0) as (_, metrics):
        (item,) = await taken(engine, 1)
        await store.parking.postpone(cast("Parked", item.parked), replace(failure(), attempts=4), due_at=NOON)
        _, again = await taken(engine, 2)
        assert (item.envelope.id, again.attempts) == (again.envelope.id, 4)
        engine.taken[0][1].set_result(Aside())
        await handled(store, again)
        engine.taken[1][1].set_result(Done())

        async def freed() -> int:
            return metrics.total("foldbus_keys_freed_total")

        await eventually(freed, lambda n: n == 1)
        assert len(engine.taken) == 2


async def test_one_that_was_postponed_is_not_asked_for_before_its_time(store: Store) -> None:
    await park(store, "a")
    engine = Engine()
    async with handing(store, engine, poll_s=3600.0) as (due, _):
        (item,) = await taken(engine, 1)
        await store.parking.postpone(cast("Parked", item.parked), failure(), due_at=None)
        engine.taken[0][1].set_result(Aside())

        async def in_hand() -> int:
            return len(due._hands)

        await eventually(in_hand, lambda n: n == 0)
        assert not due._news.is_set()
    assert await store.parking.next_due() is None
