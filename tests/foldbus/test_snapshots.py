"""Snapshots and the cache behind the handler runtime, on both stores."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import pytest_asyncio
from pydantic import BaseModel

from bus.codec import JsonCodec
from bus.envelope import Origin, StreamId
from bus.messages import Command, Event, Key
from bus.metrics import MemoryMetrics
from bus.processing import Again, Done, Failed, Item, Result
from bus.registry import Registry
from bus.seams import NoFailpoints, SystemClock, Uuid7Ids
from eventstore.decider import Decider, DeciderBehaviour
from eventstore.errors import StoreUnavailable, StreamArchived, StreamTruncated
from eventstore.port import Outcome, Slice, Snapshot, Store, Unit, Wanted
from eventstore.snapshots import Snapshots
from foldbus.runtime import UnitProcessor, any_of
from foldbus.snapshotting import Snapshotter
from foldbus.states import StateCache
from tests.eventstore.stores import NOON, Backend


class Added(Event, type="shop.added.v1"):
    id: Key[str]
    n: int


class Add(Command[None], type="shop.add.v1"):
    id: Key[str]
    n: int = 1
    times: int = 1
    bug: bool = False


class Total(BaseModel, frozen=True):
    n: int = 0
    seen: tuple[int, ...] = ()


def evolve(total: Total, event: Added) -> Total:
    return Total(n=total.n + event.n, seen=(*total.seen, event.n)[-3:])


def decide(total: Total, command: Add) -> list[Added]:
    if command.bug:
        raise RuntimeError("a bug")
    return [Added(id=command.id, n=command.n)] * command.times


class Loose(BaseModel, frozen=True):
    n: Any = 0


def to_set(state: Loose, event: Added) -> Loose:
    return Loose(n=frozenset([event.n]))


def add_one(state: Loose, command: Add) -> list[Added]:
    return [Added(id=command.id, n=1)]


class Opaque:
    pass


def same(state: Opaque, event: Added) -> Opaque:
    return state


def nothing(state: Opaque, command: Add) -> list[Added]:
    return [Added(id=command.id, n=1)]


STREAM = StreamId("total", "t")
codec = JsonCodec(Registry([Added, Add]))
ids = Uuid7Ids()


def decider(version: int = 1, snapshots: Snapshots | None = None) -> Decider[Total, Add, Added]:
    policy = snapshots or Snapshots(every=5, load_ms=None)
    return Decider("total", initial=Total(), evolve=evolve, decide=decide, version=version, snapshots=policy)


@dataclass
class Watched:
    """A store that tells what was loaded; `before_save` and `before_commit` run at their moments."""

    inner: Any
    loads: list[Wanted] = field(default_factory=list[Wanted])
    slices: list[Slice] = field(default_factory=list[Slice])
    saves: list[Sequence[Snapshot]] = field(default_factory=list[Sequence[Snapshot]])
    before_save: Any = None
    before_commit: Any = None

    async def load(self, wanted: Sequence[Wanted]) -> Sequence[Slice]:
        self.loads += wanted
        found: Sequence[Slice] = await self.inner.load(wanted)
        self.slices += found
        return found

    async def commit(self, units: Sequence[Unit], **options: Any) -> Sequence[Outcome]:
        if self.before_commit is not None:
            act, self.before_commit = self.before_commit, None
            await act()
        outcomes: Sequence[Outcome] = await self.inner.commit(units, **options)
        return outcomes

    @property
    def snapshots(self) -> Any:
        return self

    async def save(self, snapshots: Sequence[Snapshot]) -> int:
        self.saves.append(snapshots)
        if self.before_save is not None:
            await self.before_save()
        stored: int = await self.inner.snapshots.save(snapshots)
        return stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass
class Process:
    """What one process has: a cache, snapshots, metrics."""

    store: Watched
    processor: UnitProcessor
    snapshots: Snapshotter
    metrics: MemoryMetrics

    async def add(self, n: int = 1, *, key: str = "t", **options: Any) -> Result:
        command = Add(id=key, n=n, **options)
        item = Item(codec.encode(command, Origin("front", ids.new(), SystemClock().now(), ids.new())), None)
        result: Result = Again()
        for _ in range(5):
            (result,) = await self.processor.process([item], {})
            if not isinstance(result, Again):
                break
        return result

    async def batch(self, *keys: str) -> Sequence[Result]:
        """A command for each key, all in one batch."""
        origins = [Origin("front", ids.new(), SystemClock().now(), ids.new()) for _ in keys]
        commands = [codec.encode(Add(id=key), origin) for key, origin in zip(keys, origins, strict=True)]
        return await self.processor.process([Item(envelope, None) for envelope in commands], {})

    async def saved(self) -> Snapshot | None:
        await self.snapshots.saved()
        return next((one for one in await self.store.inner.snapshots.page() if one.stream == STREAM), None)


OPENED: list[Snapshotter] = []


async def close_all() -> None:
    while OPENED:
        await OPENED.pop().close(timeout_s=1)


@pytest_asyncio.fixture
async def store(backend: Backend) -> AsyncIterator[Any]:
    """Closed after what still saves to it, as a connection does."""
    async with backend.open() as opened:
        yield opened
        await close_all()


@pytest_asyncio.fixture
async def twin(backend: Backend, store: Any) -> AsyncIterator[Any]:
    async with backend.open() as opened:
        yield opened
        await close_all()


def process(store: Store, of: Decider[Any, Any, Any] | None = None, **options: Any) -> Process:
    of = of or decider()
    metrics = MemoryMetrics()
    watched: Any = Watched(store)
    snapshots = Snapshotter([of], watched, clock=SystemClock(), metrics=metrics)
    OPENED.append(snapshots)
    processor = UnitProcessor(
        group="shop",
        consumer="shop",
        service="shop",
        behaviour=DeciderBehaviour([of], service="shop", codec=codec, ids=ids, clock=SystemClock()),
        store=watched,
        wants=any_of(["shop.add.v1"]),
        ids=ids,
        clock=SystemClock(),
        metrics=metrics,
        failpoint=NoFailpoints(),
        max_bytes=1_000_000,
        snapshots=snapshots,
        **options,
    )
    return Process(watched, processor, snapshots, metrics)


async def total(store: Any) -> Total:
    (part,) = await store.load([Wanted(STREAM)])
    state = Total()
    for record in part.records:
        event = codec.decode(record)
        assert isinstance(event, Added)
        state = evolve(state, event)
    return state


@pytest.fixture
def one(store: Any) -> Process:
    return process(store)


async def test_a_snapshot_is_saved_after_so_many_events_and_again_after_as_many(store: Any, one: Process) -> None:
    found: list[int] = []
    for _ in range(11):
        await one.add(2)
        saved = await one.saved()
        found.append(saved.version if saved else 0)

    assert found == [0, 0, 0, 0, 5, 5, 5, 5, 5, 10, 10]
    assert one.metrics.total("foldbus_snapshots_saved_total") == 2
    (part,) = await store.load([Wanted(STREAM, snapshot_schema=decider().state_codec().schema)])
    assert decider().state_codec().load(part.snapshot.state) == Total(n=20, seen=(2, 2, 2))


async def test_another_process_loads_the_snapshot_and_what_came_after_it(store: Any, one: Process) -> None:
    for n in range(7):
        await one.add(n)
    await one.saved()

    other = process(store)
    assert await other.add(100) == Done()

    (part,) = other.store.slices
    assert part.snapshot is not None
    assert (part.snapshot.version, [record.version for record in part.records]) == (5, [6, 7])
    assert await total(store) == Total(n=121, seen=(5, 6, 100))
    for n in range(2):  # its own is due five events after the one it found
        await other.add(n)
    assert (await other.saved() or part.snapshot).version == 10


async def test_a_raised_version_ignores_the_old_snapshot_and_replaces_it(store: Any, one: Process) -> None:
    for _ in range(6):
        await one.add(1)
    old = await one.saved()
    assert old is not None

    newer = process(store, decider(version=2))
    assert await newer.add(1) == Done()

    assert [(part.snapshot, len(part.records)) for part in newer.store.slices] == [(None, 6)]
    replaced = await newer.saved()
    assert replaced is not None
    assert (replaced.version, replaced.schema) == (7, decider(version=2).state_codec().schema)
    assert replaced.schema != old.schema


async def test_a_lost_commit_leaves_no_changed_state_in_the_cache(store: Any, one: Process, twin: Any) -> None:
    """Another process writes between load and commit: the loser's state is as if it had never decided."""
    rival = process(twin)
    await one.add(1)

    async def interfere() -> None:
        await rival.add(10)

    one.store.before_commit = interfere
    assert await one.add(100) == Done()
    await one.add(1000)

    assert await total(store) == Total(n=1111, seen=(10, 100, 1000))
    assert one.metrics.total("foldbus_conflicts_total") == 1


async def test_who_lost_reads_only_the_events_that_it_lacks(store: Any, one: Process, twin: Any) -> None:
    rival = process(twin, decider(snapshots=Snapshots(every=None, load_ms=None)))
    for _ in range(20):
        await one.add(1)
    await rival.add(1, times=3)
    one.store.loads.clear()

    assert await one.add(5) == Done()

    assert [(wanted.after, wanted.snapshot_schema) for wanted in one.store.loads] == [(20, None)]
    assert [record.version for record in one.store.slices[-1].records] == [21, 22, 23]
    assert one.metrics.total("foldbus_states_refreshed_total") == 1
    assert (await total(store)).n == 28


async def test_a_state_that_can_change_in_place_is_loaded_anew_after_a_lost_commit(store: Any, twin: Any) -> None:
    """Its `evolve` changes a dict in place: what the lost decision did to it must not be seen, nor the initial one."""

    def evolve_in_place(counts: dict[str, int], event: Added) -> dict[str, int]:
        counts["n"] = counts.get("n", 0) + event.n
        return counts

    seen: list[int] = []

    def look(counts: dict[str, int], command: Add) -> list[Added]:
        seen.append(counts.get("n", 0))
        return [Added(id=command.id, n=command.n)]

    mutable = Decider("total", initial=dict[str, int](), evolve=evolve_in_place, decide=look)
    ours, rival = process(store, mutable), process(twin)
    await ours.add(1)

    async def interfere() -> None:
        await rival.add(10)

    ours.store.before_commit = interfere
    await ours.add(100)
    await ours.add(1000)
    await ours.add(5, key="another")

    assert seen == [0, 1, 11, 111, 0]
    assert mutable.initial == {}
    assert ours.metrics.total("foldbus_states_refreshed_total") == 0


async def test_no_snapshot_is_made_of_a_state_whose_commit_was_lost(store: Any, one: Process, twin: Any) -> None:
    rival = process(twin, decider(snapshots=Snapshots(every=None, load_ms=None)))
    await one.add(1, times=4)

    async def interfere() -> None:
        await rival.add(7)
        one.store.before_commit = stop  # and the second attempt does not get through either

    async def stop() -> None:
        raise StoreUnavailable("the database is gone")

    one.store.before_commit = interfere
    with pytest.raises(StoreUnavailable):
        await one.add(100)

    assert await one.saved() is None
    assert one.store.saves == []


async def test_a_save_that_fails_fails_no_message_and_is_counted(
    store: Any, one: Process, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise StoreUnavailable("no answer")

    one.store.before_save = fail
    for _ in range(12):
        assert await one.add(1) == Done()
    assert await one.saved() is None
    assert one.metrics.total("foldbus_snapshot_saves_failed_total") == 2  # at 5 and 10, not at every event since
    assert "were not saved: no answer" in caplog.text

    one.store.before_save = None
    for _ in range(3):
        await one.add(1)
    saved = await one.saved()
    assert saved is not None
    assert saved.version == 15


async def test_what_waits_behind_a_save_that_fails_is_saved(store: Any, one: Process) -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def hang_then_fail() -> None:
        begun.set()
        await go.wait()
        one.store.before_save = None
        raise StoreUnavailable("no answer")

    one.store.before_save = hang_then_fail
    await one.add(1, times=5, key="first")
    await begun.wait()
    await one.add(1, times=5)
    go.set()

    saved = await one.saved()
    assert saved is not None
    assert [batch[0].stream.id for batch in one.store.saves] == ["first", "t"]


async def test_messages_go_on_while_a_save_hangs_and_only_the_newest_state_is_saved_after(
    store: Any, one: Process
) -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def hang() -> None:
        begun.set()
        await go.wait()

    one.store.before_save = hang
    for _ in range(5):
        await one.add(1)
    await begun.wait()
    for _ in range(10):
        assert await one.add(1) == Done()
    assert [[snapshot.version for snapshot in batch] for batch in one.store.saves] == [[5]]

    go.set()
    saved = await one.saved()

    assert [[snapshot.version for snapshot in batch] for batch in one.store.saves] == [[5], [15]]
    assert saved is not None
    assert saved.version == 15


async def test_a_save_that_lost_to_a_newer_one_of_another_process_changes_nothing(
    store: Any, one: Process, twin: Any
) -> None:
    rival = process(twin)

    async def overtake() -> None:
        for _ in range(5):
            await rival.add(1)
        await rival.saved()

    for _ in range(4):
        await one.add(1)
    one.store.before_save = overtake
    await one.add(1)

    saved = await one.saved()
    assert saved is not None
    assert saved.version == 6
    assert one.metrics.total("foldbus_snapshots_outdated_total") == 1


async def test_closing_waits_for_what_is_being_saved(store: Any) -> None:
    ours = process(store)
    for _ in range(5):
        await ours.add(1)

    await ours.snapshots.close()

    saved = await ours.saved()
    assert saved is not None
    await ours.add(1, times=5)
    await ours.snapshots.close()
    assert len(ours.store.saves) == 1  # nothing is taken any more


async def test_closing_does_not_wait_for_ever(store: Any, caplog: pytest.LogCaptureFixture) -> None:
    ours = process(store)

    async def hang() -> None:
        await asyncio.Event().wait()

    ours.store.before_save = hang
    for _ in range(5):
        await ours.add(1)

    async with asyncio.timeout(40):
        await ours.snapshots.close(timeout_s=0.01)

    assert ours.metrics.total("foldbus_snapshots_dropped_total") == 1
    assert "the rest is dropped" in caplog.text
    assert await ours.saved() is None


async def test_a_snapshot_that_cannot_be_read_costs_a_full_fold_and_a_line(
    store: Any, one: Process, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(5):
        await one.add(n)
    saved = await one.saved()
    assert saved is not None
    await store.snapshots.save([replace(saved, state=b'{"n": "many"}')])

    other = process(store)
    assert await other.add(1) == Done()

    assert await total(store) == Total(n=11, seen=(3, 4, 1))
    assert other.metrics.total("foldbus_states_anew_total") == 1
    assert "is folded from its first event" in caplog.text


async def test_a_state_that_does_not_come_back_as_it_was_switches_snapshots_off_with_a_line(
    store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Found only at the fifth event: JSON has no set, and the annotation does not say that there is one."""
    loose = Decider("total", initial=Loose(), evolve=to_set, decide=add_one, snapshots=Snapshots(every=5))
    ours = process(store, loose)
    for _ in range(12):
        assert await ours.add(1) == Done()

    assert await ours.saved() is None
    assert ours.metrics.total("foldbus_snapshots_off_total") == 1
    assert caplog.text.count("no snapshots of Decider('total')") == 1


async def test_by_default_a_state_that_cannot_be_stored_is_named_once_at_start_up(
    store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        ours = process(store, Decider("total", initial=Opaque(), evolve=same, decide=nothing))

    assert "no snapshots of Decider('total')" in caplog.text
    assert await ours.add(1) == Done()
    assert [wanted.snapshot_schema for wanted in ours.store.loads] == [None]


async def test_archived_and_truncated_streams_fail_their_own_messages_and_nobody_elses(store: Any) -> None:
    ours = process(store)
    for key in ("archived", "gone", "kept", "good"):
        await ours.add(1, times=6, key=key)
    await ours.snapshots.saved()
    for key in ("gone", "kept"):
        await store.archive.truncate(StreamId("total", key), upto=4, seen=await store.head())
    await store.archive.archive(StreamId("total", "archived"), expected=6, seen=await store.head())
    kept = decider(version=2).state_codec()
    assert await store.snapshots.save(
        [Snapshot(StreamId("total", "kept"), 6, kept.schema, kept.dump(Total(n=6, seen=(1, 1, 1))), NOON)]
    )

    later = process(store, decider(version=2))  # for which the snapshot of `gone` is of another code
    results = await later.batch("archived", "gone", "kept", "good")

    assert [type(one.error) if isinstance(one, Failed) else one for one in results] == [
        StreamArchived, StreamTruncated, Done(), Done(),
    ]  # fmt: skip


async def test_a_stream_that_cannot_be_loaded_fails_nobody_else(store: Any, one: Process) -> None:
    """An archived or truncated stream is its own sender's problem."""
    await one.add(1)
    await one.add(1, key="good")
    one.processor.forget([])

    load = one.store.load

    async def load_without(wanted: Sequence[Wanted]) -> Sequence[Slice]:
        """The first event of `t` is gone, as after a truncation whose snapshot is of another schema."""
        found = await load(wanted)
        return [replace(part, records=part.records[1:]) if part.stream == STREAM else part for part in found]

    one.store.load = load_without  # type: ignore[method-assign]
    bad, good = await one.batch("t", "good")

    assert isinstance(bad, Failed)
    assert isinstance(bad.error, StreamTruncated)
    assert good == Done()


async def test_a_cached_state_ahead_of_a_restored_database_is_forgotten(store: Any, one: Process) -> None:
    await one.add(1, times=3)
    load = one.store.load

    async def load_older(wanted: Sequence[Wanted]) -> Sequence[Slice]:
        """As if the database had been put back to when this stream had one event."""
        found = await load([replace(each, limit=1) for each in wanted])
        return [
            replace(part, version=1, records=part.records if each.after == 0 else ())
            for each, part in zip(wanted, found, strict=True)
        ]

    one.store.load = load_older  # type: ignore[method-assign]
    states = one.processor.states
    answers = await states.load({STREAM: True})

    found = answers[STREAM]
    assert isinstance(found, tuple)
    assert (found[0], found[1].state) == (1, Total(n=1, seen=(1,)))
    assert one.metrics.total("foldbus_states_anew_total") == 1


def test_the_cache_is_bounded_by_count_and_by_the_events_it_holds() -> None:
    cache = StateCache(3, events=50)
    streams = [StreamId("total", str(n)) for n in range(6)]
    for stream in streams[:4]:
        cache.put(stream, 1, "small")
    assert [cache.take(stream) is not None for stream in streams[:4]] == [False, True, True, True]

    cache.put(streams[0], 20, "a")
    cache.put(streams[1], 20, "b")
    cache.put(streams[2], 20, "c")  # 63 events: the oldest goes
    assert len(cache) == 2
    assert cache.take(streams[0]) is None
    cache.put(streams[3], 1_000_000, "huge")  # does not fit, and is not kept at the cost of everything for ever
    assert len(cache) == 0
    cache.put(streams[4], 20, "d")
    assert cache.take(streams[4]) is not None


def test_the_cache_keeps_the_later_version_of_two_batches() -> None:
    cache = StateCache(3)
    cache.put(STREAM, 5, "newer")
    cache.put(STREAM, 4, "older", stale=True)

    kept = cache.take(STREAM)
    assert kept is not None
    assert (kept.version, kept.state, kept.stale) == (5, "newer", False)
