"""Folding long streams page by page: the same states as in one go, never more than a page at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from bus.envelope import Envelope, StreamId
from eventstore.loading import FIRST_PAGE, PAGE, Folded, load_folded
from eventstore.port import Slice, Snapshot, Store, Unit, Wanted
from tests.eventstore.stores import NOON, append, event, one, stream

State = tuple[int, ...]


class Counting:
    """A store whose calls are written down."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.sizes: list[int] = []
        self.between: Any = None

    async def load(self, wanted: Sequence[Wanted]) -> Sequence[Slice]:
        found: Sequence[Slice] = await self._store.load(wanted)
        self.sizes.append(sum(len(part.records) for part in found))
        if self.between is not None:
            await self.between()
        return found


def nothing(_: Slice) -> State:
    return ()


def versions(state: State, records: Sequence[Envelope]) -> State:
    return state + tuple(record.version or 0 for record in records)


async def folded(store: Any, *wanted: Wanted, page: int = 5_000) -> dict[StreamId, Any]:
    return await load_folded(store, wanted, begin=nothing, fold=versions, page=page)


@pytest.mark.parametrize("page", [1, 3, 4, 1000])
async def test_streams_of_all_lengths_are_folded_whole_in_pages(store: Store, page: int) -> None:
    await store.commit([Unit(appends=(append("long", 0, 11), append("short", 0, 2), append("even", 0, 8)))])
    counting = Counting(store)
    found = await folded(counting, *(Wanted(stream(name)) for name in ("long", "none", "short", "even")), page=page)
    assert {at.id: (one.version, one.state, one.events) for at, one in found.items()} == {
        "long": (11, tuple(range(1, 12)), 11),
        "none": (0, (), 0),
        "short": (2, (1, 2), 2),
        "even": (8, tuple(range(1, 9)), 8),
    }
    assert max(counting.sizes) <= 3 * page
    assert len(counting.sizes) == -(-11 // page)


async def test_a_long_stream_comes_in_pages_whoever_asks_the_first_one_short(store: Store) -> None:
    """The first page is of whole envelopes, and nothing is read beside it: what follows costs less."""
    length = FIRST_PAGE + PAGE + 1
    await store.commit([Unit(appends=(append("a", 0, length),))])
    counting = Counting(store)
    found = await load_folded(counting, [Wanted(stream("a"))], begin=nothing, fold=versions)
    assert found[stream("a")] == Folded(stream("a"), length, tuple(range(1, length + 1)), length)
    assert counting.sizes == [FIRST_PAGE, PAGE, 1]


async def test_many_streams_share_what_one_call_may_bring(store: Store) -> None:
    names = [f"s-{n}" for n in range(300)]
    await store.commit([Unit(appends=tuple(append(name, 0, 100) for name in names))])
    counting = Counting(store)
    found = await folded(counting, *(Wanted(stream(name)) for name in names))
    assert all(one.version == one.events == 100 for one in found.values())
    assert counting.sizes == [15_000, 15_000]


async def test_what_is_appended_meanwhile_is_not_folded(store: Store, twin: Store) -> None:
    """Otherwise a stream that somebody keeps appending to would be folded without end."""
    await store.commit([Unit(appends=(append("a", 0, 5),))])
    counting, at = Counting(store), 5

    async def grow() -> None:
        nonlocal at
        await one(twin, Unit(appends=(append("a", at, 3),)))
        at += 3

    counting.between = grow
    found = await asyncio.wait_for(folded(counting, Wanted(stream("a")), page=2), 10)
    assert found[stream("a")] == Folded(stream("a"), 5, (1, 2, 3, 4, 5), 5)


async def test_after_and_limit_bound_the_whole(store: Store) -> None:
    await store.commit([Unit(appends=(append("a", 0, 9), append("b", 0, 9), append("c", 0, 9)))])
    found = await folded(
        store,
        Wanted(stream("a"), after=2, limit=5),
        Wanted(stream("b"), after=9),
        Wanted(stream("c"), limit=0),
        page=2,
    )
    assert [(one.version, one.state) for one in found.values()] == [(7, (3, 4, 5, 6, 7)), (9, ()), (0, ())]


async def test_one_that_cannot_be_folded_fails_alone_and_is_not_read_on(store: Store) -> None:
    await store.commit([Unit(appends=(append("bad", 0, 10), append("good", 0, 4)))])

    def fold(state: State, records: Sequence[Envelope]) -> State:
        if records[0].stream == stream("bad"):
            raise ValueError("no such sku")
        return versions(state, records)

    counting = Counting(store)
    found = await load_folded(
        counting, [Wanted(stream("bad")), Wanted(stream("good"))], begin=nothing, fold=fold, page=2
    )
    assert isinstance(found[stream("bad")], ValueError)
    assert found[stream("good")] == Folded(stream("good"), 4, (1, 2, 3, 4), 4)
    assert counting.sizes == [4, 2]


class Canned:
    """Answers what it was given, one after the other."""

    def __init__(self, *slices: Slice) -> None:
        self._slices = list(slices)
        self.asked: list[Wanted] = []

    async def load(self, wanted: Sequence[Wanted]) -> Sequence[Slice]:
        self.asked += wanted
        return [self._slices.pop(0)]


def records(first: int, last: int) -> list[Envelope]:
    return [replace(event(), stream=stream("a"), version=n) for n in range(first, last + 1)]


async def test_folding_begins_at_the_snapshot_and_asks_for_it_once() -> None:
    kept = Snapshot(stream("a"), 100, "s1", b"state", NOON)
    canned = Canned(
        Slice(stream("a"), 105, records(101, 103), kept),
        Slice(stream("a"), 105, records(104, 105)),
    )
    begun: list[Slice] = []

    def begin(part: Slice) -> State:
        begun.append(part)
        return (-1,)

    found = await load_folded(canned, [Wanted(stream("a"), snapshot_schema="s1")], begin=begin, fold=versions, page=3)
    assert found == {stream("a"): Folded(stream("a"), 105, (-1, 101, 102, 103, 104, 105), 5, 100)}
    assert [part.snapshot for part in begun] == [kept]
    assert canned.asked == [
        Wanted(stream("a"), limit=3, snapshot_schema="s1"),
        Wanted(stream("a"), after=103, limit=2),
    ]


async def test_a_stream_that_is_truncated_in_the_middle_is_no_state() -> None:
    canned = Canned(Slice(stream("a"), 5, records(1, 3)), Slice(stream("a"), 5, []))
    found = await load_folded(canned, [Wanted(stream("a"))], begin=nothing, fold=versions, page=3)
    assert "nothing after 3" in str(found[stream("a")])
    canned = Canned(Slice(stream("a"), 5, records(1, 3)), Slice(stream("a"), 5, records(5, 5)))
    found = await load_folded(canned, [Wanted(stream("a"))], begin=nothing, fold=versions, page=3)
    assert "found version 5 after 3" in str(found[stream("a")])
