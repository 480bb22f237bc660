"""Parts of streams, the list of streams, and the log read by type, category, stream, story and time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta, timezone
from typing import Any
from uuid import UUID

import pytest

from bus.envelope import Envelope, StreamId
from eventstore import selecting
from eventstore.port import Append, Page, Store, StreamInfo, Unit, Wanted, Where
from tests.eventstore.stores import IDS, NOON, append, event, message, one, stream, whole_log

STORY = UUID("01890000-0000-7000-8000-00000000abcd")
TYPES = ("shop.order-placed.v1", "shop.order-placed.v10", "shop.order-paid.v1", "shop.sold_.v1", "saga.started.v1")
STREAMS = (stream("a"), stream("b"), stream("a", "sale"), stream("order-a", "s"))


def some(kind: int, *, hours: int = 0, story: UUID | None = None, note: str = "") -> Envelope:
    made = replace(event(), type=TYPES[kind], time=NOON + timedelta(hours=hours), correlation_id=story or IDS.new())
    return replace(made, headers={"note": note}) if note else made


def wanted(where: Where, record: Envelope) -> bool:
    """The promise in plain words: all that is given holds."""
    at = record.stream
    assert at is not None
    name, _, number = record.type.rpartition(".v")
    versioned = f"{name}.v*" if number.isdigit() else record.type
    checks = [
        where.types is None or record.type in where.types or versioned in where.types,
        where.categories is None or at.category in where.categories,
        where.stream is None or at == where.stream,
        where.correlation_id is None or record.correlation_id == where.correlation_id,
        where.since is None or record.time >= where.since,
        where.until is None or record.time < where.until,
    ]
    return all(checks)


async def read(store: Store, where: Where, *, limit: int = 1000, after: int = 0) -> list[Envelope]:
    """Everything that matches, page by page, to the head that the last page saw."""
    found: list[Envelope] = []
    while True:
        page = await store.read_all(after=after, limit=limit, where=where)
        assert_page(page, after, limit)
        found += page.records
        if page.upto >= page.head:
            return found
        assert page.upto > after, "a reader that is not at the head gets on"
        after = page.upto


def assert_page(page: Page, after: int, limit: int) -> None:
    positions = [record.position or 0 for record in page.records]
    assert positions == sorted(set(positions))
    assert len(positions) <= limit
    assert all(after < at <= page.upto for at in positions)
    assert page.upto <= page.head


async def write_all_sorts(store: Store) -> list[Envelope]:
    rng = random.Random(7)
    versions = dict.fromkeys(STREAMS, 0)
    for n in range(30):
        at = rng.choice(STREAMS)
        made = tuple(
            some(
                rng.randrange(len(TYPES)),
                hours=rng.randrange(-3, 4),
                story=STORY if rng.random() < 0.2 else None,
                note=f'"correlation":"{STORY.hex}"' if rng.random() < 0.2 else "",
            )
            for _ in range(rng.randrange(1, 4))
        )
        outgoing = (message(),) if n % 5 == 0 else ()
        await one(store, Unit(appends=(Append(at, versions[at], made),), outgoing=outgoing))
        versions[at] += len(made)
    return await whole_log(store, outgoing=False)


WHERES = {
    "nothing given": Where(),
    "a type": Where(types=frozenset([TYPES[0]])),
    "types": Where(types=frozenset([TYPES[1], TYPES[4], "no.such.v1"])),
    "a type with a joker": Where(types=frozenset(["shop.order%", "shop.sold%.v1"])),
    "any version of a type": Where(types=frozenset(["shop.order-placed.v*"])),
    "any version of some, one of another": Where(types=frozenset(["shop.order-paid.v*", "no.v*", TYPES[1]])),
    "any version of what begins like it": Where(types=frozenset(["shop.order.v*", "shop.v*", "shop.order-placed*"])),
    "no types": Where(types=frozenset()),
    "a category": Where(categories=frozenset(["order"])),
    "categories": Where(categories=frozenset(["sale", "s", "o"])),
    "no categories": Where(categories=frozenset()),
    "a stream": Where(stream=STREAMS[0]),
    "a stream that reads like another": Where(stream=STREAMS[3]),
    "a stream that is not": Where(stream=stream("zz")),
    "a stream's types": Where(stream=STREAMS[1], types=frozenset([TYPES[0], TYPES[2]])),
    "a stream of another category": Where(stream=STREAMS[1], categories=frozenset(["sale"])),
    "a story": Where(correlation_id=STORY),
    "a story that is not": Where(correlation_id=UUID(int=1)),
    "since": Where(since=NOON + timedelta(hours=1)),
    "until": Where(until=NOON + timedelta(hours=1)),
    "between, elsewhere": Where(
        since=NOON.astimezone(timezone(timedelta(hours=5, minutes=30))),
        until=(NOON + timedelta(hours=2)).astimezone(timezone(timedelta(hours=-7))),
    ),
    "from and to the same moment": Where(since=NOON, until=NOON),
    "all of it": Where(frozenset(TYPES[:3]), frozenset(["order", "sale"]), STREAMS[0], STORY, NOON, None),
    "all but a stream": Where(frozenset(TYPES), frozenset(["order"]), None, STORY, None, NOON + timedelta(hours=3)),
}


@pytest.mark.parametrize("span", [3, selecting.SPAN])
async def test_a_filtered_reading_is_what_the_filter_leaves_of_the_whole(
    store: Store, span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = await write_all_sorts(store)
    monkeypatch.setattr(selecting, "SPAN", span)
    matched = 0
    for name, where in WHERES.items():
        expected = [record for record in everything if wanted(where, record)]
        matched += bool(expected)
        for limit in (1, 3, 1000):
            assert await read(store, where, limit=limit) == expected, (name, limit)
        for record in everything:
            assert selecting.matches(where, record) == wanted(where, record), name
    assert matched >= len(WHERES) - 9, "nearly all of them find something"


async def test_reading_on_from_any_position_gives_the_rest(store: Store) -> None:
    """Also from between a stream's events, where its version has to be found."""
    everything = await write_all_sorts(store)
    for where in (Where(stream=STREAMS[0]), Where(stream=STREAMS[2]), Where(types=frozenset(TYPES[:2]))):
        for after in range(await store.head() + 1):
            expected = [record for record in everything if wanted(where, record) and (record.position or 0) > after]
            assert await read(store, where, after=after) == expected


async def test_a_call_looks_through_a_bounded_span_and_says_how_far_it_came(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filter that matches nothing would read the whole log in one statement."""
    await store.commit([Unit(appends=(append("a", 0, 40), append("b", 0, event(), replace(event(), type="rare.v1"))))])
    monkeypatch.setattr(selecting, "SPAN", 10)
    head, after, pages = await store.head(), 0, list[Page]()
    while after < head:
        page = await store.read_all(after=after, limit=5, where=Where(types=frozenset(["rare.v1"])))
        assert after < page.upto <= after + 10
        pages.append(page)
        after = page.upto
    assert [len(page.records) for page in pages] == [0, 0, 0, 0, 1]
    assert {page.head for page in pages} == {head}


async def test_a_streams_own_events_are_found_wherever_they_are(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one call: nothing between them is looked through."""
    await store.commit([Unit(appends=(append("a", 0, 1), append("b", 0, 40)))])
    await store.commit([Unit(appends=(append("a", 1, 1),))])
    monkeypatch.setattr(selecting, "SPAN", 10)
    page = await store.read_all(after=0, limit=5, where=Where(stream=stream("a")))
    assert [record.version for record in page.records] == [1, 2]
    assert page.upto == page.head


async def test_outgoing_messages_are_not_chosen(store: Store) -> None:
    with pytest.raises(ValueError, match="outgoing"):
        await store.read_all(after=0, limit=1, outgoing=True, where=Where())


@pytest.mark.parametrize(
    ("where", "why"),
    [
        (Where(since=NOON.replace(tzinfo=None)), "no time zone"),
        (Where(until=NOON.replace(tzinfo=None)), "no time zone"),
        (Where(types=frozenset(["a\0"])), "NUL"),
        (Where(categories=frozenset(["a\0"])), "NUL"),
        (Where(stream=StreamId("a", "\0")), "NUL"),
    ],
)
async def test_what_cannot_be_asked_is_refused_and_says_why(store: Store, where: Where, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        await store.read_all(after=0, limit=1, where=where)


# --- beside writers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [Where(types=frozenset([TYPES[0]])), Where(stream=stream("slow")), Where(since=NOON)])
async def test_a_filtered_reader_does_not_pass_an_open_transaction(store: Store, twin: Store, where: Where) -> None:
    """Two that draw positions at once: the later one commits first. What it then finds at the earlier one's position
    is nothing, yet."""
    after = await store.head()
    async with twin.transaction() as tx:
        await twin.commit([Unit(appends=(append("slow", 0, some(0)),))], tx=tx)
        quick = asyncio.create_task(one(store, Unit(appends=(append("quick", 0, some(0)),))))
        await asyncio.wait({quick}, timeout=0.3)  # where there is one writer only, it waits for the transaction
        page = await store.read_all(after=after, limit=10, where=where)
        assert list(page.records) == []
        assert page.upto == after
    await quick
    found = await read(store, where, after=page.upto)
    assert [record.stream for record in found if record.stream == stream("slow")] == [stream("slow")]
    assert found == [record for record in await whole_log(store, outgoing=False) if wanted(where, record)]


async def test_filtered_readers_beside_writers_find_what_the_whole_log_has(
    store: Store, twin: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of random sizes, spans shorter than a burst, transactions that stay open and some that are undone."""
    monkeypatch.setattr(selecting, "SPAN", 17)
    rng = random.Random(11)
    writing = True

    async def writes(on: Store, name: str) -> None:
        for n in range(25):
            unit = Unit(appends=(Append(stream(f"{name}-{n}", rng.choice(["order", "sale"])), 0, burst()),))
            if n % 3 == 0:
                await hold(on, unit, undo=n % 2 == 0)
            else:
                await on.commit([unit])

    def burst() -> tuple[Envelope, ...]:
        return tuple(
            some(rng.randrange(len(TYPES)), hours=rng.randrange(3), story=rng.choice([STORY, None])) for _ in range(3)
        )

    async def hold(on: Store, unit: Unit, *, undo: bool) -> None:
        try:
            async with on.transaction() as tx:
                await on.commit([unit], tx=tx)
                await asyncio.sleep(rng.random() * 0.01)
                if undo:
                    raise Undone
        except Undone:
            pass

    wheres = [WHERES[name] for name in ("a type", "types", "categories", "a story", "since", "nothing given")]
    found: dict[int, list[Envelope]] = {n: [] for n in range(len(wheres))}

    async def follows(n: int) -> None:
        after, last = 0, False
        while True:
            page = await store.read_all(after=after, limit=(limit := rng.randrange(1, 9)), where=wheres[n])
            assert_page(page, after, limit)
            found[n] += page.records
            after = page.upto
            if after >= page.head:
                if last:
                    return
                last = not writing
                await asyncio.sleep(0)

    reading = asyncio.gather(*(follows(n) for n in found))
    await asyncio.gather(writes(store, "here"), writes(twin, "there"))
    writing = False
    await asyncio.wait_for(reading, 60)
    everything = await whole_log(store, outgoing=False)
    assert len(everything) > 100
    for n, where in enumerate(wheres):
        assert found[n] == [record for record in everything if wanted(where, record)]


class Undone(Exception):
    pass


# --- streams ---------------------------------------------------------------------------------------------------------

PARTS: list[tuple[dict[str, Any], list[int]]] = [
    ({}, [1, 2, 3, 4, 5, 6, 7]),
    ({"after": 3}, [4, 5, 6, 7]),
    ({"after": 3, "upto": 5}, [4, 5]),
    ({"upto": 2}, [1, 2]),
    ({"upto": 0}, []),
    ({"after": 7}, []),
    ({"after": 5, "upto": 4}, []),
    ({"limit": 2}, [1, 2]),
    ({"after": 2, "limit": 2}, [3, 4]),
    ({"limit": 0}, []),
    ({"backward": True}, [7, 6, 5, 4, 3, 2, 1]),
    ({"backward": True, "limit": 3}, [7, 6, 5]),
    ({"backward": True, "upto": 5, "limit": 2}, [5, 4]),
    ({"backward": True, "after": 4}, [7, 6, 5]),
    ({"backward": True, "after": 2, "upto": 4, "limit": 9}, [4, 3]),
    ({"upto": 99}, [1, 2, 3, 4, 5, 6, 7]),
]


async def test_any_part_of_a_stream_is_read_forward_and_backward(store: Store) -> None:
    await store.commit([Unit(appends=(append("before", 0, 2), append("a", 0, 7), append("z", 0, 2)))])
    (whole,) = await store.load([Wanted(stream("a"))])
    for asked, expected in PARTS:
        found = await store.read_stream(stream("a"), **asked)
        assert [record.version for record in found.records] == expected, asked
        assert list(found.records) == [whole.records[version - 1] for version in expected], asked
        assert (found.stream, found.version, found.snapshot) == (stream("a"), 7, None)


async def test_a_stream_that_does_not_exist_is_empty_whichever_way_it_is_read(store: Store) -> None:
    for backward in (False, True):
        found = await store.read_stream(stream("no"), backward=backward)
        assert (found.stream, found.version, list(found.records)) == (stream("no"), 0, [])


async def listed(store: Store, limit: int, category: str | None = None) -> list[StreamInfo]:
    found: list[StreamInfo] = []
    while page := await store.streams(category=category, after=found[-1].stream if found else None, limit=limit):
        assert len(page) <= limit
        found += page
    return found


@pytest.mark.parametrize("limit", [1, 2, 1000])
async def test_streams_are_listed_by_the_bytes_of_their_names(store: Store, limit: int) -> None:
    names = [("order", "a"), ("order", "Z"), ("order", "a-b"), ("order", "ab"), ("order", "é"), ("order", "e")]
    names += [("order-x", "x"), ("order_x", "a"), ("or", "zz"), ("order", "10"), ("order", "9"), ("order", "😀")]
    for n, (category, id) in enumerate(names):
        await one(store, Unit(appends=(append(StreamId(category, id), 0, 1 + n),)))
    in_order = sorted(names, key=lambda name: (name[0].encode(), name[1].encode()))
    expected = [StreamInfo(StreamId(*name), 1 + names.index(name)) for name in in_order]
    assert await listed(store, limit) == expected
    assert await listed(store, limit, "order") == [info for info in expected if info.stream.category == "order"]
    assert await listed(store, limit, "none") == []


async def test_a_stream_that_was_only_asserted_or_lost_is_not_listed(store: Store) -> None:
    await store.commit([Unit(asserts=((stream("asserted"), 0),)), Unit(appends=(append("lost", 3),))])
    assert await store.streams() == []


def in_turn(records: Sequence[Envelope]) -> list[int]:
    return [record.position or 0 for record in records]


async def test_a_stream_whose_events_lie_apart_is_read_in_pages_from_the_log(store: Store) -> None:
    for n in range(20):
        await store.commit([Unit(appends=(append("a", n, 1), append("b", n, 1)))])
    found = await read(store, Where(stream=stream("a")), limit=3)
    assert [record.version for record in found] == list(range(1, 21))
    assert in_turn(found) == sorted(in_turn(found))
