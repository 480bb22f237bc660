"""Rebuilds beside a running service, on both stores: swaps, kills, undo, versions."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from bus.metrics import MemoryMetrics
from bus.transport import TopicSpec, Transport
from eventstore.port import LetterWhere, Settled
from projections import (
    Doing,
    ProjectionRunner,
    RebuildStopped,
    Status,
    rebuild,
    rows_for,
    swap_back,
    verify,
)
from tests.projections import world
from tests.projections.test_runner import Crash, Once, caught_up, orders
from tests.projections.world import (
    SETTINGS,
    Moved,
    Placed,
    all_rows,
    append,
    append_many,
    both,
    customers,
    customers_v2,
    eventually,
    publish,
    running,
    workshop,
)


async def rebuilt(shop: Any, **options: Any) -> list[Any]:
    return [progress async for progress in rebuild(shop, **options)]


async def statuses(shop: Any) -> list[Status]:
    return [one.status for one in await shop.rows.generations()]


async def test_a_swap_under_live_appends_equals_a_fold_from_scratch(store: Any, twin: Any) -> None:
    """A writer that never pauses, a reader that never sees less, a runner that moves over, three rebuilds."""
    await append_many(store, orders(300))
    live, building = workshop(store), workshop(twin)
    stop = asyncio.Event()
    written = 0

    async def write() -> None:
        nonlocal written
        while not stop.is_set():
            await append(store, Placed(order_id=f"live{written}", customer_id=f"c{written % 7}"))
            written += 1

    async def read() -> int:
        most = 0
        while not stop.is_set():
            row = await live.rows.get("c0")
            seen = 0 if row is None else row.placed
            assert seen >= most, "a reader saw an earlier state than before"
            most = seen
            await asyncio.sleep(0)
        return most

    async with running(ProjectionRunner(live)):
        await caught_up(live, await store.head())
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(write())
            tasks.create_task(read())
            for generation in (2, 3, 4):
                progress = await rebuilt(building)
                assert progress[-1].swapped
                assert progress[-1].generation == generation
                before = written
                await eventually(lambda before=before: _true(written > before + 3))
            stop.set()
        await caught_up(live, await store.head())
    assert (await live.rows.serving()).number == 4
    found = await verify(live)
    assert found.ok, found.differences
    assert sum(row.placed for row in (await all_rows(live.rows)).values()) == 300 + written
    assert await statuses(live) == [Status.DROPPED, Status.DROPPED, Status.RETIRED, Status.SERVING]


async def _true(found: bool) -> bool:
    return found


async def test_progress_grows_to_its_total(store: Any) -> None:
    await append_many(store, orders(330))
    shop = workshop(store)
    progress = await rebuilt(shop)
    assert [one.done for one in progress] == sorted(one.done for one in progress)
    assert len({one.total for one in progress}) == 1
    assert progress[-1].done == progress[-1].total
    assert any(one.rate > 0 and one.eta_s is not None for one in progress[:-1])


async def test_a_rebuild_that_was_killed_goes_on_where_it_was(store: Any) -> None:
    await append_many(store, orders(330))
    shop = workshop(store, failpoint=Once("after-projection-save", 3))
    with pytest.raises(Crash):
        await rebuilt(shop)
    metrics = MemoryMetrics()
    again = workshop(store, metrics=metrics)
    assert await statuses(again) == [Status.SERVING, Status.BUILDING]
    await rebuilt(again)
    assert metrics.total("foldbus_projection_events_total") == 330 - 3 * SETTINGS.page
    assert await statuses(again) == [Status.RETIRED, Status.SERVING]
    assert (await verify(again)).ok


@pytest.mark.parametrize(("where", "after"), [("before-swap", Status.BUILDING), ("after-swap", Status.SERVING)])
async def test_a_kill_around_the_swap_leaves_one_serving_generation(store: Any, where: str, after: Status) -> None:
    await append_many(store, orders(60))
    with pytest.raises(Crash):
        await rebuilt(workshop(store, failpoint=Once(where), settings=replace(SETTINGS, hold_s=2.0)))
    shop = workshop(store)
    assert (await statuses(shop))[1] is after
    async with running(ProjectionRunner(shop)):  # a hold that nobody ends lapses
        last = await append(store, Placed(order_id="later", customer_id="c0"))
        await caught_up(shop, last)
    if after is Status.BUILDING:
        await rebuilt(shop)
    assert (await shop.rows.serving()).number == 2


async def test_a_swap_waits_until_the_build_has_passed_what_serves(store: Any) -> None:
    """The serving generation moves between the build's last page and the swap."""
    await append_many(store, orders(60))
    live, building = workshop(store), workshop(store)
    async with running(ProjectionRunner(live)):
        await caught_up(live, await store.head())
        steps = rebuild(building)
        await anext(steps)
        last = await append(store, *orders(5))
        await caught_up(live, last)
        async for _ in steps:
            pass
        await caught_up(live, last)
    assert (await live.rows.serving()).number == 2
    assert (await verify(live)).ok


async def test_a_fold_that_fails_stops_a_rebuild_and_the_old_generation_serves_on(store: Any) -> None:
    await append(store, Placed(order_id="1", customer_id="a"), Placed(order_id="2", customer_id="a", cents=666))
    shop = workshop(store)
    async with running(ProjectionRunner(shop)):
        await caught_up(shop, await store.head())
    with pytest.raises(RebuildStopped, match="poison"):
        await rebuilt(shop)
    assert (await shop.rows.serving()).number == 1
    assert (await all_rows(shop.rows))["a"].trail == ("1",)
    await rebuilt(shop, skip_failures=True)
    assert (await shop.rows.serving()).number == 2
    assert (await all_rows(shop.rows))["a"].trail == ("1",)


async def test_swapping_back_serves_the_old_rows_and_catches_up(store: Any) -> None:
    await append_many(store, orders(20))
    shop = workshop(store)
    async with running(ProjectionRunner(shop)):
        await caught_up(shop, await store.head())
        await rebuilt(shop)
        last = await append(store, Placed(order_id="x", customer_id="c0"))
        await caught_up(shop, last)
        assert (await swap_back(shop)).number == 1
        last = await append(store, Placed(order_id="y", customer_id="c0"))
        await caught_up(shop, last)
        assert (await shop.rows.serving()).number == 1
    assert (await verify(shop)).ok
    assert (await all_rows(shop.rows))["c0"].trail[-2:] == ("x", "y")


async def test_new_code_builds_its_version_beside_the_old_and_old_code_stands_by(store: Any, twin: Any) -> None:
    old, new = workshop(store), workshop(twin, customers_v2)
    await append_many(store, orders(130))
    old_runner, new_runner = ProjectionRunner(old), ProjectionRunner(new)
    async with running(old_runner):
        await caught_up(old, await store.head())
        before = (await all_rows(old.rows))["c1"].cents
        async with running(new_runner):
            await eventually(lambda: _true(old_runner.state.doing is Doing.STANDING_BY))
            last = await append(store, Placed(order_id="x", customer_id="c1", cents=1))
            await caught_up(new, last)
            assert new_runner.state.doing is Doing.FOLLOWING
            again = ProjectionRunner(old)  # an old worker that restarts does not build its version once more
            async with running(again):
                await eventually(lambda: _true(again.state.doing is Doing.STANDING_BY))
    assert (await all_rows(new.rows))["c1"].cents == (before + 1) * 100
    assert [(one.version, one.status) for one in await new.rows.generations()] == [
        (1, Status.RETIRED),
        (2, Status.SERVING),
    ]
    assert (await verify(new)).ok


async def test_two_processes_that_rebuild_at_once_build_one_generation(store: Any, twin: Any) -> None:
    await append_many(store, orders(150))
    shops = [workshop(store), workshop(twin)]
    await shops[0].rows.serving()
    v2 = [replace(shop, projection=customers_v2, rows=rows_for(shop.store, customers_v2)) for shop in shops]
    first, second = await asyncio.gather(*(rebuilt(shop) for shop in v2))
    assert {first[-1].generation, second[-1].generation} == {2}
    assert first[-1].swapped
    assert second[-1].swapped
    assert customers.version == 1


async def test_a_rebuild_reads_topics_from_their_beginning(store: Any, embedded: Transport) -> None:
    await embedded.admin.create([TopicSpec("stock.events", partitions=4)])
    shop = workshop(store, both, transport=embedded)
    position = 0
    async with running(ProjectionRunner(shop)):
        for n in range(120):
            position += 1
            await publish(embedded, "stock.events", Moved(sku=f"s{n}", customer_id=f"c{n % 3}"), position=position)
        last = await append(store, *orders(40))
        await caught_up(shop, last)
        await rebuilt(shop)
        await publish(embedded, "stock.events", Moved(sku="s0", customer_id="late"), position=position + 1)

        async def late() -> bool:
            return await shop.rows.get("late") is not None

        await eventually(late)
    assert sum(row.placed for row in (await all_rows(shop.rows)).values()) == 161
    assert (await verify(shop)).ok


async def test_verify_names_the_keys_that_differ(store: Any) -> None:
    await append_many(store, orders(30))
    shop = workshop(store)
    async with running(ProjectionRunner(shop)):
        await caught_up(shop, await store.head())
    at = await shop.rows.checkpoint(1)
    rows = await all_rows(shop.rows)
    spoilt = {"c1": rows["c1"].model_copy(update={"cents": -1}), "c2": None, "c99": rows["c1"]}
    await shop.rows.save(1, spoilt, old=at, new=at)
    found = await verify(shop)
    assert [one.key for one in found.differences] == ["c1", "c2", "c99"]
    assert found.different == 3


POISON = Placed(order_id="2", customer_id="a", cents=666)


@pytest.mark.parametrize("killed", [False, True])
async def test_a_letter_is_settled_once_a_newer_generation_folded_its_event(
    store: Any, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """Also when the swap was all that was done: whoever follows the generation settles it."""
    await append(store, Placed(order_id="1", customer_id="a"))
    await append(store, POISON)
    at = await append(store, Placed(order_id="3", customer_id="b"))
    async with running(ProjectionRunner(workshop(store))):
        await caught_up(workshop(store), at)
    (letter,) = await store.dead_letters()

    monkeypatch.setattr(world, "POISON_CENTS", -1)  # the code is mended
    shop = workshop(store, failpoint=Once("after-swap" if killed else "nowhere"))
    if killed:
        with pytest.raises(Crash):
            await rebuilt(shop)
        assert [one.id for one in await store.dead_letters()] == [letter.id]
    else:
        await rebuilt(shop)
        assert await store.dead_letters() == []
    async with running(ProjectionRunner(workshop(store))):
        await eventually(lambda: _no_letters(store))
    (kept,) = await store.letters.page(LetterWhere(), settled=True)
    assert (kept.letter, kept.settled.how) == (letter, Settled.FOLDED)
    assert "generation 2" in kept.settled.reason
    assert (await all_rows(shop.rows))["a"].trail == ("1", "2")


async def test_a_letter_stays_open_when_the_newer_generation_gave_its_event_up_as_well(store: Any) -> None:
    await append(store, POISON)
    at = await append(store, Placed(order_id="3", customer_id="b"))
    async with running(ProjectionRunner(workshop(store))):
        await caught_up(workshop(store), at)
    await rebuilt(workshop(store), skip_failures=True)
    again = await append(store, Placed(order_id="4", customer_id="b"))
    async with running(ProjectionRunner(workshop(store))):
        await caught_up(workshop(store), again)
    assert len(await store.dead_letters()) == 1
    assert await store.letters.page(LetterWhere(), settled=True) == []


async def _no_letters(store: Any) -> bool:
    return not await store.dead_letters()
