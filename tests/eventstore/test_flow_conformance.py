"""Pauses and placed watermarks on every store: durable, seen by other processes, told in the log of acts."""

from __future__ import annotations

from typing import Any

import pytest

from eventstore.port import Store, Watermark
from tests.eventstore.stores import Backend

GROUP, OTHER = "shop", "shop.handler.mail"


async def whats(store: Store) -> list[tuple[str, str, str, str]]:
    return [(act.group, act.what, act.by, act.reason) for act in await store.flow.acts()]


async def test_a_pause_lasts_until_it_is_resumed_and_other_processes_see_it(store: Store, twin: Store) -> None:
    assert await store.flow.paused() == {}
    assert await store.flow.pause(GROUP, by="ann", reason="the mail server moves")
    (pause,) = (await twin.flow.paused()).values()
    assert (pause.group, pause.by, pause.reason) == (GROUP, "ann", "the mail server moves")
    assert await twin.flow.resume(GROUP, by="bob")
    assert await store.flow.paused() == {}


async def test_a_pause_outlives_the_process_that_made_it(backend: Backend) -> None:
    async with backend.open() as first:
        await first.flow.pause(GROUP, by="ann")
    async with backend.open() as second:
        assert set(await second.flow.paused()) == {GROUP}


async def test_a_second_pause_keeps_the_first_ones_reason_and_tells_nothing(store: Store) -> None:
    await store.flow.pause(GROUP, by="ann", reason="one")
    assert not await store.flow.pause(GROUP, by="bob", reason="two")
    assert (await store.flow.paused())[GROUP].reason == "one"
    assert await store.flow.resume(GROUP, by="bob", reason="over")
    assert not await store.flow.resume(GROUP, by="eve")
    assert await whats(store) == [(GROUP, "resumed", "bob", "over"), (GROUP, "paused", "ann", "one")]


async def test_groups_are_paused_one_by_one(store: Store) -> None:
    await store.flow.pause(GROUP, by="ann")
    await store.flow.pause(OTHER, by="ann")
    await store.flow.resume(GROUP, by="ann")
    assert set(await store.flow.paused()) == {OTHER}


async def test_a_watermark_is_placed_forward_and_backward_and_goes_on_from_there(store: Store) -> None:
    await store.commit([], watermarks=[Watermark(GROUP, "t", 0, 50), Watermark(GROUP, "t", 1, 7)])
    await store.flow.place([Watermark(GROUP, "t", 0, 10), Watermark(GROUP, "u", 3, 99)], by="ann", reason="again")
    assert await store.watermarks(GROUP) == {("t", 0): 10, ("t", 1): 7, ("u", 3): 99}
    await store.commit([], watermarks=[Watermark(GROUP, "t", 0, 11), Watermark(GROUP, "u", 3, 98)])
    assert await store.watermarks(GROUP) == {("t", 0): 11, ("t", 1): 7, ("u", 3): 99}
    await store.flow.place([Watermark(GROUP, "t", 0, 60)], by="ann")
    assert (await store.watermarks(GROUP))["t", 0] == 60
    assert await store.watermarks(OTHER) == {}


async def test_placing_tells_each_partition(store: Store) -> None:
    await store.flow.place([Watermark(GROUP, "t", 0, 10), Watermark(GROUP, "t", 1, 20)], by="ann", reason="again")
    assert sorted(await whats(store)) == [
        (GROUP, "placed t[0] at 10", "ann", "again"),
        (GROUP, "placed t[1] at 20", "ann", "again"),
    ]
    await store.flow.place([], by="ann")
    assert len(await whats(store)) == 2


async def test_acts_come_youngest_first_and_no_more_than_asked_for(store: Store) -> None:
    for n in range(5):
        await store.flow.pause(f"g{n}", by="ann")
    acts = await store.flow.acts(limit=2)
    assert [act.group for act in acts] == ["g4", "g3"]
    assert acts[0].number > acts[1].number
    with pytest.raises(ValueError, match="limit is 0"):
        await store.flow.acts(limit=0)


async def test_one_of_two_who_pause_at_the_same_time_is_told_that_it_did(store: Any, twin: Any) -> None:
    import asyncio

    answers = await asyncio.gather(*(each.flow.pause(GROUP, by="ann") for each in (store, twin) for _ in range(5)))
    assert sorted(answers) == [False] * 9 + [True]
    assert len(await whats(store)) == 1
