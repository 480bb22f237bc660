"""What every store promises of snapshots."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from bus.envelope import StreamId
from eventstore.errors import StreamArchived, StreamTruncated
from eventstore.port import Slice, Snapshot, Unit, Wanted
from eventstore.snapshots import BadSnapshot
from tests.eventstore.stores import NOON, append, commit, stream


def snapshot(version: int, *, of: StreamId | str = "o-1", schema: str = "s1", state: bytes | None = None) -> Snapshot:
    target = stream(of) if isinstance(of, str) else of
    return Snapshot(target, version, schema, state or f"at {version}".encode(), NOON)


async def grown(store: Any, events: int, of: str = "o-1") -> None:
    assert await commit(store, Unit(appends=(append(of, 0, events),))) == ["ok"]


async def load(store: Any, *, of: str = "o-1", **options: Any) -> Slice:
    found: Slice
    (found,) = await store.load([Wanted(stream(of), **{"snapshot_schema": "s1", **options})])
    return found


def versions(found: Slice) -> list[int | None]:
    return [one.version for one in found.records]


async def kept(store: Any, of: StreamId | str = "o-1") -> tuple[int, str] | None:
    target = stream(of) if isinstance(of, str) else of
    return next(((one.version, one.schema) for one in await store.snapshots.page() if one.stream == target), None)


async def test_a_load_brings_the_snapshot_and_the_events_after_it(store: Any) -> None:
    await grown(store, 5)
    saved = snapshot(3, state=b'{"\x00": "\xff"}')
    assert await store.snapshots.save([saved]) == 1

    found = await load(store)

    assert found.snapshot == saved
    assert (found.version, versions(found)) == (5, [4, 5])
    plain = await load(store, snapshot_schema=None)
    assert (plain.snapshot, versions(plain)) == (None, [1, 2, 3, 4, 5])


async def test_streams_with_and_without_snapshots_load_in_one_call(store: Any) -> None:
    await grown(store, 3)
    await grown(store, 2, of="o-2")
    await store.snapshots.save([snapshot(2), snapshot(2, of="o-2")])

    asked = [
        Wanted(stream("o-2")),
        Wanted(stream("o-1"), snapshot_schema="s1"),
        Wanted(stream("absent"), snapshot_schema="s1"),
        Wanted(stream("o-2"), snapshot_schema="s1"),
    ]
    found = await store.load(asked)

    assert [(one.snapshot and one.snapshot.version, one.version, versions(one)) for one in found] == [
        (None, 2, [1, 2]), (2, 3, [3]), (None, 0, []), (2, 2, []),
    ]  # fmt: skip


async def test_a_snapshot_of_another_schema_is_as_good_as_none(store: Any) -> None:
    await grown(store, 3)
    await store.snapshots.save([snapshot(2, schema="s1")])

    found = await load(store, snapshot_schema="s2")

    assert (found.snapshot, versions(found)) == (None, [1, 2, 3])


async def test_a_snapshot_at_or_below_after_does_not_come_along(store: Any) -> None:
    await grown(store, 5)
    await store.snapshots.save([snapshot(3)])

    assert (await load(store, after=2)).snapshot == snapshot(3)
    for after in (3, 4):
        found = await load(store, after=after)
        assert (found.snapshot, versions(found)) == (None, list(range(after + 1, 6)))


async def test_a_limit_counts_events_and_not_the_snapshot(store: Any) -> None:
    await grown(store, 5)
    await store.snapshots.save([snapshot(2)])

    found = await load(store, limit=2)
    assert (found.snapshot, found.version, versions(found)) == (snapshot(2), 5, [3, 4])
    found = await load(store, limit=0)
    assert (found.snapshot, found.version, versions(found)) == (snapshot(2), 5, [])


async def test_a_save_that_comes_late_does_not_replace_a_newer_one(store: Any, twin: Any) -> None:
    await grown(store, 5)

    assert await store.snapshots.save([snapshot(4)]) == 1
    assert await twin.snapshots.save([snapshot(3)]) == 0
    assert await kept(store) == (4, "s1")
    assert await twin.snapshots.save([snapshot(5)]) == 1
    assert await kept(store) == (5, "s1")


async def test_a_snapshot_of_the_same_version_is_made_anew(store: Any) -> None:
    """Whoever finds that one lies can put it right."""
    await grown(store, 3)
    await store.snapshots.save([snapshot(3, state=b"a lie")])

    right = replace(snapshot(3), made_at=NOON + timedelta(days=1))
    assert await store.snapshots.save([right]) == 1

    assert (await load(store)).snapshot == right


async def test_a_snapshot_of_another_schema_is_replaced_also_by_an_older_one(store: Any) -> None:
    await grown(store, 5)
    await store.snapshots.save([snapshot(4, schema="s1")])

    assert await store.snapshots.save([snapshot(3, schema="s2")]) == 1

    assert await kept(store) == (3, "s2")


async def test_no_snapshot_is_ahead_of_its_stream(store: Any) -> None:
    await grown(store, 3)

    assert await store.snapshots.save([snapshot(4), snapshot(1, of="absent")]) == 0

    assert await store.snapshots.page() == []


async def test_each_of_a_call_is_saved_or_not_for_itself(store: Any) -> None:
    for name in ("o-1", "o-2", "o-3"):
        await grown(store, 3, of=name)
    await store.snapshots.save([snapshot(3, of="o-2")])

    saved = await store.snapshots.save([snapshot(2, of="o-3"), snapshot(2, of="o-2"), snapshot(2, of="o-1")])

    assert saved == 2
    assert [(one.stream.id, one.version) for one in await store.snapshots.page()] == [
        ("o-1", 2),
        ("o-2", 3),
        ("o-3", 2),
    ]
    assert await store.snapshots.save([]) == 0


async def test_pages_go_by_category_and_id_in_the_order_of_their_characters(store: Any) -> None:
    names = ["a", "B", "_", "ä", "b", "Z", "a-1", "a1"]
    targets = [StreamId(category, id) for category in ("stock", "order") for id in names]
    for target in targets:
        await commit(store, Unit(appends=(append(target, 0),)))
    await store.snapshots.save([snapshot(1, of=target) for target in targets])

    found: list[StreamId] = []
    after = None
    while page := await store.snapshots.page(after=after, limit=3):
        assert len(page) <= 3
        found += [one.stream for one in page]
        after = page[-1].stream

    assert found == sorted(targets)
    with pytest.raises(ValueError, match="wanted 1 or more"):
        await store.snapshots.page(limit=0)


async def test_drop_takes_a_category_and_spares_a_schema(store: Any) -> None:
    for name, category in (("o-1", "order"), ("o-2", "order"), ("s-1", "stock")):
        await commit(store, Unit(appends=(append(StreamId(category, name), 0, 2),)))
    await store.snapshots.save(
        [
            snapshot(1, of="o-1", schema="old"),
            snapshot(1, of="o-2", schema="new"),
            snapshot(1, of=StreamId("stock", "s-1"), schema="old"),
        ]
    )

    assert await store.snapshots.drop(category="order", keep_schema="new") == 1
    assert [one.stream.id for one in await store.snapshots.page()] == ["o-2", "s-1"]
    assert await store.snapshots.drop(category="order") == 1
    assert await store.snapshots.drop(keep_schema="old") == 0
    assert await store.snapshots.drop() == 1
    assert await store.snapshots.drop() == 0
    assert await store.snapshots.page() == []


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (snapshot(0), "wanted 1 or above"),
        (replace(snapshot(1), made_at=NOON.replace(tzinfo=None)), "wanted a time zone"),
        (replace(snapshot(1), schema=""), "wanted a name"),
        (snapshot(2, of="o-2"), "comes twice"),
    ],
)
async def test_what_is_no_snapshot_is_refused_with_its_whole_call(store: Any, bad: Snapshot, why: str) -> None:
    await grown(store, 3, of="o-2")
    await grown(store, 3)

    with pytest.raises(BadSnapshot, match=why):
        await store.snapshots.save([snapshot(1, of="o-2"), bad])

    assert await store.snapshots.page() == []


# --- truncated and archived streams ----------------------------------------------------------------------------------


async def test_what_a_truncated_stream_hangs_on_is_neither_dropped_nor_replaced_by_an_older_one(
    store: Any, twin: Any
) -> None:
    """A save that was on its way when the stream was truncated comes too late, whatever code made it."""
    await grown(store, 6)
    await store.snapshots.save([snapshot(5)])
    await store.archive.truncate(stream("o-1"), upto=4, seen=await store.head())

    assert await twin.snapshots.save([snapshot(3)]) == 0
    assert await twin.snapshots.save([snapshot(3, schema="s2")]) == 0
    assert await twin.snapshots.drop() == 0
    assert await twin.snapshots.drop(category="order", keep_schema="s2") == 0

    found = await load(twin)
    assert (found.snapshot, versions(found)) == (snapshot(5), [6])
    assert await twin.snapshots.save([snapshot(6)]) == 1
    found = await load(store)
    assert (found.snapshot, versions(found)) == (snapshot(6), [])


async def test_a_truncated_stream_loads_from_its_snapshot_and_from_nowhere_before_it(store: Any) -> None:
    await grown(store, 6)
    await store.snapshots.save([snapshot(5)])
    await store.archive.truncate(stream("o-1"), upto=4, seen=await store.head())

    asked: list[dict[str, Any]] = [{}, {"snapshot_schema": "s2"}, {"after": 3}]
    for options in asked:
        with pytest.raises(StreamTruncated, match="stream order-o-1 is at version 6"):
            await load(store, **{"snapshot_schema": None, **options})
    assert versions(await load(store, snapshot_schema=None, after=4)) == [5, 6]
    assert versions(await load(store, after=5)) == [6]
    assert (await load(store, snapshot_schema=None, limit=0)).version == 6


async def test_an_archived_stream_is_not_loaded_and_gets_no_snapshot(store: Any) -> None:
    await grown(store, 3)
    await store.snapshots.save([snapshot(2)])
    await store.archive.archive(stream("o-1"), expected=3, seen=await store.head())

    asked: list[dict[str, Any]] = [{}, {"after": 3}, {"limit": 0}]
    for options in asked:
        with pytest.raises(StreamArchived):
            await load(store, **options)
    assert await store.snapshots.save([snapshot(3)]) == 0
