"""Folding from type and data alone: the same states as from whole envelopes, and a page ahead of the fold."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bus.codec import JsonCodec
from bus.envelope import Envelope, StreamId, Version
from bus.errors import Undecodable
from bus.messages import Command, Event, Key
from bus.registry import Registry
from bus.seams import SystemClock, Uuid7Ids
from bus.upcasting import drop_event, split_event, upcast
from eventstore.decider import Aggregate, Decider, DeciderBehaviour
from eventstore.errors import StreamArchived
from eventstore.loading import Folded, load_folded
from eventstore.port import Append, Bodies, Slice, Unit, Wanted
from tests.eventstore.stores import event, one

IDS = Uuid7Ids()
A = StreamId("tally", "a")


class Counted(Event, type="shop.counted.v2"):
    id: Key[str]
    n: int


class Named(Event, type="shop.named.v1"):
    id: Key[str]
    name: str


class Count(Command[None], type="shop.count.v1"):
    id: Key[str]


@dataclass(frozen=True)
class Tally:
    seen: tuple[int | str, ...] = ()


def evolve(tally: Tally, event: Counted | Named) -> Tally:
    return Tally((*tally.seen, event.n if isinstance(event, Counted) else event.name))


def decide(tally: Tally, command: Count) -> list[Counted | Named]:
    return []


tallies = Decider("tally", initial=Tally(), evolve=evolve, decide=decide)
UPCASTERS = [
    upcast("shop.counted.v1", to="shop.counted.v2", by=lambda data: {"id": data["id"], "n": -data["n"]}),
    split_event(
        "shop.pair.v1",
        to=["shop.counted.v2", "shop.named.v1"],
        by=lambda data: [
            ("shop.counted.v2", {"id": data["id"], "n": data["n"]}),
            ("shop.named.v1", {"id": data["id"], "name": "pair"}),
        ],
    ),
    drop_event("shop.noise.v1"),
]
OLDER = ["shop.counted.v1", "shop.pair.v1", "shop.noise.v1"]


def behaviour(codec: type[JsonCodec] = JsonCodec) -> DeciderBehaviour:
    registry = Registry([Count, Counted, Named], upcasters=UPCASTERS)
    return DeciderBehaviour([tallies], service="shop", codec=codec(registry), ids=IDS, clock=SystemClock())


def stored(type: str, n: int) -> Envelope:
    data = b'{"id":"a","name":"%d"}' % n if type == "shop.named.v1" else b'{"id":"a","n":%d}' % n
    return replace(event("a", data=data), type=type)


async def appended(store: Any, types: Sequence[str], stream: StreamId = A) -> None:
    events = tuple(stored(type, n) for n, type in enumerate(types, 1))
    await store.commit([Unit(appends=(Append(stream, 0, events),))])


class Watching:
    """A store that says what was asked of it, and lets a test in between."""

    def __init__(self, store: Any) -> None:
        self._store, self.asked = store, list[str]()

    async def load(self, wanted: Sequence[Wanted]) -> Sequence[Slice]:
        self.asked += [f"load after {one.after}" for one in wanted]
        found: Sequence[Slice] = await self._store.load(wanted)
        return found

    async def read_bodies(self, stream: StreamId, *, after: Version, upto: Version) -> Bodies:
        self.asked.append(f"bodies {after + 1}-{upto}")
        found: Bodies = await self._store.read_bodies(stream, after=after, upto=upto)
        return found


async def folded(
    store: Any, *wanted: Wanted, page: int, lean: bool = True, by: DeciderBehaviour | None = None
) -> dict[StreamId, Any]:
    by = by or behaviour()
    return await load_folded(
        store,
        wanted or [Wanted(A)],
        begin=lambda part: by.initial(part.stream),
        fold=by.fold,
        fold_bodies=by.fold_bodies if lean else None,
        page=page,
    )


def reading_ahead() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name() == "foldbus-read-ahead"]


def seen(found: Any) -> tuple[int | str, ...]:
    assert isinstance(found, Folded), found
    aggregate = cast("Folded[Aggregate]", found).state
    state: Tally = aggregate.state
    return state.seen


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    types=st.lists(st.sampled_from(["shop.counted.v2"] * 4 + ["shop.named.v1"] * 2 + OLDER), min_size=1, max_size=14),
    page=st.integers(1, 6),
    after=st.integers(0, 4),
    limit=st.none() | st.integers(0, 12),
)
async def test_folding_bodies_gives_what_folding_envelopes_gives(
    store: Any, types: list[str], page: int, after: int, limit: int | None
) -> None:
    stream = StreamId("tally", IDS.new().hex)
    await appended(store, types, stream)
    (whole,) = await store.load([Wanted(stream)])
    for upto in {after, after + page, len(types), len(types) + 3}:
        part = [one for one in whole.records if after < (one.version or 0) <= upto]
        bodies = await store.read_bodies(stream, after=after, upto=upto)
        assert bodies == Bodies(stream, [one.type for one in part], [one.data for one in part])
    wanted = Wanted(stream, after=min(after, len(types)), limit=limit)
    lean = await folded(store, wanted, page=page)
    assert lean == await folded(store, wanted, page=page, lean=False)
    assert isinstance(lean[stream], Folded)


async def test_all_but_the_first_page_of_a_long_stream_comes_as_bodies(store: Any) -> None:
    await appended(store, ["shop.counted.v2", "shop.named.v1"] * 5)
    watching = Watching(store)
    found = await folded(watching, page=4)
    assert seen(found[A]) == (1, "2", 3, "4", 5, "6", 7, "8", 9, "10")
    assert (found[A].version, found[A].events) == (10, 10)
    assert watching.asked == ["load after 0", "bodies 5-8", "bodies 9-10"]


async def test_a_page_with_an_older_event_comes_again_as_envelopes_and_so_does_the_rest(store: Any) -> None:
    await appended(store, ["shop.counted.v2"] * 7 + ["shop.pair.v1"] + ["shop.counted.v2"] * 3)
    watching = Watching(store)
    found = await folded(watching, page=3)
    assert seen(found[A]) == (1, 2, 3, 4, 5, 6, 7, 8, "pair", 9, 10, 11)
    assert watching.asked == [
        "load after 0", "bodies 4-6", "bodies 7-9", "bodies 10-11", "load after 6", "load after 9"
    ]  # fmt: skip


async def test_the_next_page_is_asked_for_before_this_one_is_folded(store: Any) -> None:
    await appended(store, ["shop.counted.v2"] * 9)
    watching, by = Watching(store), behaviour()

    class Telling(DeciderBehaviour):
        def fold_bodies(self, state: Aggregate, bodies: Bodies) -> Aggregate | None:
            watching.asked.append(f"folded {len(bodies.data)}")
            return by.fold_bodies(state, bodies)

    telling = Telling([tallies], service="shop", codec=JsonCodec(Registry()), ids=IDS, clock=SystemClock())
    telling.fold = by.fold  # type: ignore[method-assign]
    await folded(watching, page=3, by=telling)
    assert watching.asked == ["load after 0", "bodies 4-6", "bodies 7-9", "folded 3", "folded 3"]


async def test_an_event_that_cannot_be_decoded_fails_the_stream_and_stops_what_was_read_ahead(store: Any) -> None:
    """With the very words that a whole envelope has."""
    bad = replace(stored("shop.counted.v2", 5), data=b'{"id":"a","n":"x"}')
    events = [*(stored("shop.counted.v2", n) for n in range(1, 5)), bad, *(stored("shop.named.v1", n) for n in (6, 7))]
    await one(store, Unit(appends=(Append(A, 0, tuple(events)),)))
    lean = await folded(store, page=2)
    assert reading_ahead() == []
    whole = await folded(store, page=2, lean=False)
    assert isinstance(lean[A], Undecodable)
    assert "n: " in str(lean[A])
    assert str(lean[A]) == str(whole[A])
    assert reading_ahead() == []


async def test_a_codec_of_ones_own_is_given_envelopes(store: Any) -> None:
    class Louder(JsonCodec):
        def decode(self, envelope: Envelope) -> Any:
            assert envelope.correlation_id is not None
            event = super().decode(envelope)
            return event.model_copy(update={"n": event.n + 100}) if isinstance(event, Counted) else event

    await appended(store, ["shop.counted.v2"] * 5)
    found = await folded(store, page=2, by=behaviour(Louder))
    assert seen(found[A]) == (101, 102, 103, 104, 105)


async def test_a_stream_that_is_archived_between_two_pages_says_so(store: Any) -> None:
    await appended(store, ["shop.counted.v2"] * 9)
    head = await store.head()

    class Archiving(Watching):
        async def read_bodies(self, stream: StreamId, *, after: Version, upto: Version) -> Bodies:
            found = await super().read_bodies(stream, after=after, upto=upto)
            if after == 3:
                await store.archive.archive(A, expected=9, seen=head)
            return found

    found = await folded(Archiving(store), page=3)
    assert isinstance(found[A], StreamArchived)


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_load_that_is_cancelled_leaves_nothing_running(store: Any, at_once: bool) -> None:
    """While it waits for what was read ahead; or just when that is sent off."""
    await appended(store, ["shop.counted.v2"] * 9)
    reading = asyncio.Event()

    class Stuck(Watching):
        async def read_bodies(self, stream: StreamId, *, after: Version, upto: Version) -> Bodies:
            if after > 3:
                reading.set()
                if at_once:
                    loading.cancel()
                await asyncio.Event().wait()
            return await super().read_bodies(stream, after=after, upto=upto)

    loading = asyncio.create_task(folded(Stuck(store), page=3))
    await asyncio.wait_for(reading.wait(), 10)
    if not at_once:
        assert len(reading_ahead()) == 1
        loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert reading_ahead() == []
