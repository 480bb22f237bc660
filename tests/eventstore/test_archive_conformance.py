"""Archiving, restoring and truncating: what readers and writers then see, the same on both databases."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bus.envelope import StreamId
from eventstore.errors import (
    NoSuchStream,
    NotSeen,
    NotTruncated,
    StreamArchived,
    StreamTruncated,
    WrongExpectedVersion,
)
from eventstore.loading import load_folded
from eventstore.port import ANY, Snapshot, Unit, Verdict, Wanted
from eventstore.verify import verify
from tests.eventstore.moving import Place, live, sqlite_place
from tests.eventstore.stores import NOON, Backend, append, claim, one, stream, verdicts, wanted, whole_log
from tests.eventstore.test_export import place

__all__ = ["place"]
O1 = stream("o-1")


async def grown(store: Any, events: int = 3, name: str = "o-1") -> int:
    """A stream beside others; answers the log's head."""
    await store.commit([Unit(appends=(append("before", 0, 2),))])
    await store.commit([Unit(appends=(append(name, 0, events),))])
    await store.commit([Unit(appends=(append("after", 0, 2),))])
    head: int = await store.head()
    return head


async def archived(store: Any) -> int:
    head = await grown(store)
    await store.archive.archive(O1, expected=3, seen=head)
    return head


async def snapshot(store: Any, version: int, *, schema: str = "v1") -> int:
    return int(await store.snapshots.save([Snapshot(O1, version, schema, b'{"n":3}', NOON)]))


class TestArchive:
    async def test_takes_the_events_out_of_the_log_and_gives_them_apart(self, store: Any) -> None:
        head = await grown(store)
        (before,) = await store.load([wanted("o-1")])
        info = await store.archive.archive(O1, expected=3, seen=head)
        assert (info.stream, info.version, info.kept_from) == (O1, 3, 1)
        assert info.archived_at is not None
        assert [record.key for record in await whole_log(store)] == ["before"] * 2 + ["after"] * 2
        assert await store.head() == head
        found = await store.archive.read(O1)
        assert (found.version, list(found.records)) == (3, list(before.records))
        assert [record.version for record in (await store.archive.read(O1, after=1, limit=1)).records] == [2]
        assert info in await store.streams()

    async def test_is_said_by_load_and_read_stream(self, store: Any) -> None:
        await archived(store)
        with pytest.raises(StreamArchived, match="archived at version 3"):
            await store.load([wanted("after"), wanted("o-1")])
        with pytest.raises(StreamArchived):
            await store.read_stream(O1)
        folded = await load_folded(
            store, [wanted("after"), wanted("o-1")], begin=lambda _: 0, fold=lambda n, records: n + len(records)
        )
        after, gone = folded[stream("after")], folded[O1]
        assert not isinstance(after, Exception)
        assert after.state == 2
        assert isinstance(gone, StreamArchived)

    @pytest.mark.parametrize("expected", [0, 3, ANY, 4])
    async def test_closes_the_stream_for_every_writer(self, store: Any, expected: Any) -> None:
        head = await archived(store)
        alone = await one(store, Unit(claim=claim(key="o-1"), appends=(append("o-1", expected),)))
        assert (alone.verdict, alone.stream) == (Verdict.CONFLICT, O1)
        assert (alone.expected, alone.actual) == (expected, -3)  # not a version that a writer could expect
        found = await store.commit(
            [
                Unit(claim=claim(key="x"), appends=(append("x", 0),)),
                Unit(claim=claim(key="o-1"), appends=(append("o-1", expected), append("y", 0))),
                Unit(claim=claim(key="o-1"), appends=(append("z", 0),)),
            ]
        )
        assert verdicts(found) == ["ok", "conflict", "conflict"]
        assert [record.key for record in await whole_log(store)] == ["before"] * 2 + ["after"] * 2 + ["x"]
        assert (await store.archive.read(O1)).version == 3
        assert await store.head() == head + 1

    async def test_fails_who_asserts_the_version_that_the_stream_had(self, store: Any) -> None:
        await archived(store)
        for expected in (0, 3):
            found = await one(store, Unit(claim=claim(key="o-1"), asserts=((O1, expected),)))
            assert (found.verdict, found.stream) == (Verdict.CONFLICT, O1)
            assert (found.expected, found.actual) == (expected, -3)

    async def test_closes_a_stream_of_one_event_too(self, store: Any) -> None:
        """Its version is stored as -1, which elsewhere means any."""
        head = await grown(store, 1)
        await store.archive.archive(O1, expected=1, seen=head)
        for expected in (ANY, 0, 1):
            found = await one(store, Unit(appends=(append("o-1", expected),)))
            assert (found.verdict, found.expected, found.actual) == (Verdict.CONFLICT, expected, -1)
        assert await store.head() == head

    async def test_is_refused_to_who_knows_another_version(self, store: Any) -> None:
        head = await grown(store)
        with pytest.raises(WrongExpectedVersion):
            await store.archive.archive(O1, expected=2, seen=head)
        with pytest.raises(NoSuchStream):
            await store.archive.archive(stream("nobody"), expected=0, seen=head)
        assert len(await whole_log(store)) == 7

    async def test_is_refused_while_an_event_is_not_read_by_everybody(self, store: Any) -> None:
        await grown(store)
        (found,) = await store.load([wanted("o-1")])
        last = found.records[-1].position
        with pytest.raises(NotSeen, match=f"position {last}"):
            await store.archive.archive(O1, expected=3, seen=last - 1)
        assert len(await whole_log(store)) == 7
        await store.archive.archive(O1, expected=3, seen=last)

    async def test_a_second_time_changes_nothing(self, store: Any) -> None:
        head = await archived(store)
        first = (await store.streams(category="order"))[-1]
        assert await store.archive.archive(O1, expected=3, seen=head) == first
        assert (await store.archive.read(O1)).version == 3

    async def test_and_an_append_at_once_leave_one_winner(self, backend: Backend, store: Any) -> None:
        """Either the event is in the log and the stream is open, or the stream is closed and the event nowhere."""
        for n in range(8):
            name = f"race-{n}"
            await store.commit([Unit(appends=(append(name, 0, 2),))])
            head = await store.head()
            async with backend.open() as other:
                closing = asyncio.ensure_future(other.archive.archive(stream(name), expected=2, seen=head))
                appended = await one(store, Unit(appends=(append(name, ANY),)))
                await asyncio.wait([closing])
            refusal = closing.exception()
            assert refusal is None or isinstance(refusal, WrongExpectedVersion)
            assert (refusal is None) is (appended.verdict is Verdict.CONFLICT)


class TestRestore:
    async def test_gives_everything_back_where_it_was(self, store: Any) -> None:
        await grown(store)
        before = await whole_log(store)
        await store.archive.archive(O1, expected=3, seen=await store.head())
        info = await store.archive.restore(O1)
        assert (info.version, info.archived_at) == (3, None)
        assert await whole_log(store) == before
        assert (await store.archive.read(O1)).records == []
        assert verdicts(await store.commit([Unit(appends=(append("o-1", 3),))])) == ["ok"]
        assert await store.archive.restore(O1) == (await store.streams(category="order"))[-1]

    async def test_of_nothing_is_an_error(self, store: Any) -> None:
        with pytest.raises(NoSuchStream):
            await store.archive.restore(O1)


class TestTruncate:
    async def test_deletes_events_behind_a_snapshot(self, store: Any) -> None:
        head = await grown(store, 5)
        assert await snapshot(store, 4) == 1
        info = await store.archive.truncate(O1, upto=3, seen=head)
        assert (info.version, info.kept_from) == (5, 4)
        assert info in await store.streams()
        (found,) = await store.load([Wanted(O1, snapshot_schema="v1")])
        assert (found.version, found.snapshot.version, [record.version for record in found.records]) == (5, 4, [5])
        assert [record.version for record in await whole_log(store) if record.stream == O1] == [4, 5]
        assert verdicts(await store.commit([Unit(appends=(append("o-1", 5),))])) == ["ok"]
        assert await store.archive.truncate(O1, upto=2, seen=head) == (await store.streams(category="order"))[-1]

    async def test_leaves_a_stream_that_loads_from_its_snapshot_and_no_other_way(self, store: Any) -> None:
        head = await grown(store, 5)
        await snapshot(store, 5)
        await store.archive.truncate(O1, upto=5, seen=head)

        def begin(part: Any) -> int:
            return 100 if part.snapshot is not None else 0

        def fold(n: int, records: Any) -> int:
            return n + len(records)

        async def folded(asked: Wanted) -> Any:
            return (await load_folded(store, [asked], begin=begin, fold=fold))[O1]

        assert (await folded(Wanted(O1, snapshot_schema="v1"))).state == 100
        assert isinstance(await folded(Wanted(O1)), StreamTruncated)
        assert isinstance(await folded(Wanted(O1, snapshot_schema="v2")), StreamTruncated)

    async def test_is_refused_without_a_snapshot_that_holds_it(self, store: Any) -> None:
        head = await grown(store, 5)
        with pytest.raises(NotTruncated, match="no snapshot"):
            await store.archive.truncate(O1, upto=3, seen=head)
        await snapshot(store, 2)
        with pytest.raises(NotTruncated, match="of version 2"):
            await store.archive.truncate(O1, upto=3, seen=head)
        with pytest.raises(NotTruncated, match="other code"):
            await store.archive.truncate(O1, upto=2, seen=head, schema="v2")
        with pytest.raises(NotSeen):
            await store.archive.truncate(O1, upto=2, seen=3)
        with pytest.raises(NoSuchStream):
            await store.archive.truncate(stream("nobody"), upto=1, seen=head)
        assert len(await whole_log(store)) == 9

    async def test_keeps_the_snapshot_from_being_lost(self, store: Any) -> None:
        head = await grown(store, 5)
        await snapshot(store, 4)
        await store.archive.truncate(O1, upto=3, seen=head)
        assert await store.snapshots.drop() == 0
        assert await snapshot(store, 2) == 0
        assert await snapshot(store, 5) == 1
        (found,) = await store.load([Wanted(O1, snapshot_schema="v1")])
        assert found.snapshot.version == 5

    async def test_of_an_archived_stream_is_refused(self, store: Any) -> None:
        head = await archived(store)
        with pytest.raises(StreamArchived):
            await store.archive.truncate(O1, upto=1, seen=head)


async def test_a_truncated_stream_can_be_archived_and_comes_back_truncated(store: Any) -> None:
    head = await grown(store, 5)
    await snapshot(store, 4)
    await store.archive.truncate(O1, upto=3, seen=head)
    before = await whole_log(store)
    info = await store.archive.archive(O1, expected=5, seen=head)
    assert (info.version, info.kept_from) == (5, 4)
    assert (await store.archive.restore(O1)).kept_from == 4
    assert await whole_log(store) == before


async def test_verify_and_export_know_what_was_archived_and_truncated(place: Place, tmp_path: Any) -> None:
    await place.migrate()
    async with place.store() as store:
        await live(store)
        head = await store.head()
        await store.commit([Unit(appends=(append("gone", 0, 4),))])
        await store.snapshots.save([Snapshot(stream("gone"), 4, "v1", b"{}", NOON)])
        await store.archive.truncate(stream("gone"), upto=4, seen=head + 4)
        await store.archive.archive(stream("o-2"), expected=3, seen=head)
        await store.archive.truncate(O1, upto=2, seen=head)
    async with place.source() as source:
        assert await verify(source, documents=True) == []
    exported = await place.export()
    there = sqlite_place(tmp_path / "there.db")
    await there.fill(exported)
    assert await there.export() == exported
    async with there.source() as source:
        assert await verify(source, documents=True) == []
    async with there.store() as moved:
        assert [record.version for record in (await moved.archive.read(stream("o-2"))).records] == [1, 2, 3]
        assert verdicts(await moved.commit([Unit(appends=(append("o-2", ANY),))])) == ["conflict"]
        assert verdicts(await moved.commit([Unit(appends=(append("gone", 4),))])) == ["ok"]
        assert {one.stream: one.kept_from for one in await moved.streams()}[StreamId("order", "gone")] == 5
