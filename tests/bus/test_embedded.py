"""What the embedded transport promises beyond the port: see `test_transport_conformance.py` for the port."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.embedded import EmbeddedTransport, groups, log
from bus.embedded import consumer as consumer_module
from bus.embedded.writer import Writer, connect
from bus.errors import Fenced, OffsetOutOfRange, TransportUnavailable
from bus.metrics import MemoryMetrics
from bus.transport import Ack, Assignment, Consumer, Outgoing, PollSettings, TopicSpec, Unknown
from tests.bus.transports import (
    ROOT,
    Child,
    Recorder,
    Rig,
    all_partitions,
    eventually,
    member,
    new_topic,
    put,
    take,
    values,
)

PATIENT = PollSettings(session_timeout_s=30.0, heartbeat_s=0.1, rebalance_timeout_s=30.0, publish_deadline_s=30.0)
"""Whoever stands still for some seconds, as a busy machine makes one, loses nothing by it."""
MORTAL = replace(PATIENT, session_timeout_s=3.0)
"""For a test that waits until a session has ended."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bus.db"


@pytest.fixture
async def transport(path: Path) -> AsyncIterator[EmbeddedTransport]:
    async with EmbeddedTransport.open(path, settings=PATIENT) as transport:
        yield transport


class ShiftedClock:
    """Real time, with the wall clock put ahead at will."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def now(self) -> datetime:
        return datetime.now(UTC) + self.ahead

    def monotonic(self) -> float:
        return time.monotonic()


async def locked(path: Path) -> sqlite3.Connection:
    """A connection that holds the file's write lock; a heartbeat may be at it just now."""
    conn = connect(path)
    for _ in range(2_000):
        try:
            conn.execute("BEGIN IMMEDIATE")
            return conn
        except sqlite3.OperationalError:
            await asyncio.sleep(0.001)
    raise AssertionError("the file never came free")


# --- several processes -----------------------------------------------------------------------------------------------


async def publishers(path: Path, topic: str, *names: str) -> dict[str, asyncio.subprocess.Process]:
    return {
        name: await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.bus.publisher", str(path), topic, name),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        for name in names
    }


async def test_processes_that_publish_at_once_and_are_killed_lose_nothing_acknowledged(
    transport: EmbeddedTransport, path: Path
) -> None:
    """Three processes publish until each is killed in the middle of it; every record that one of them saw acknowledged
    is there, at the offset it was told, and no offset was given twice."""
    topic = await new_topic(transport, partitions=4)
    processes = await publishers(path, topic, "a", "b", "c")
    told: list[str] = []

    async def listen(process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        lines = 0
        async for line in process.stdout:
            if line.endswith(b"\n"):  # the last one may be cut off
                told.append(line.decode().strip())
            lines += 1
            if lines == 1_000:
                process.kill()
        assert lines >= 1_000, "it was killed while it published"
        await process.wait()

    await asyncio.gather(*(listen(process) for process in processes.values()))

    acknowledged = [line.split() for line in told]
    async with transport.tail(topic, start="begin") as reader:
        ends = await reader.end_offsets()
        records = await take(reader, sum(ends.values()))
    there = {(r.partition, r.offset): r.value.decode() for r in records if r.value is not None}
    assert len(there) == len(records)
    for partition, offset, value in acknowledged:
        assert there[int(partition), int(offset)] == value
    assert len({(p, o) for p, o, _ in acknowledged}) == len(acknowledged) >= 3_000
    assert max(Counter(there.values()).values()) == 1
    for partition in range(4):
        for name in "abc":
            order = [
                tuple(map(int, there[p, o].split(".")[1:]))
                for p, o in sorted(there)
                if p == partition and there[p, o].startswith(name)
            ]
            assert order == sorted(order), "each publisher's order"


async def test_partitions_survive_members_that_are_killed_again_and_again(
    transport: EmbeddedTransport, path: Path
) -> None:
    """Four processes share a group, the eldest is killed and replaced three times while records come in. Every record
    is read by somebody, and no two processes ever had the same partition at the same epoch."""
    topic, group = await new_topic(transport, partitions=6), "group"
    rig = Rig("embedded", str(path), MORTAL)
    async with AsyncExitStack() as stack:
        children = [await stack.enter_async_context(Child.start(rig, group=group, topic=topic)) for _ in range(4)]
        living = list(children)
        sent: set[tuple[int, int]] = set()
        for kill in range(4):
            await eventually(
                lambda: sorted(p for c in living for p in c.partitions()) == list(range(6)), what="all shared out"
            )
            for partition in range(6):
                offsets = await put(transport, topic, *(f"{kill}.{n}" for n in range(20)), partition=partition)
                sent |= {(partition, offset) for offset in offsets}
            if kill < 3:
                eldest = living.pop(0)
                eldest.process.kill()
                children.append(await stack.enter_async_context(Child.start(rig, group=group, topic=topic)))
                living.append(children[-1])

        def read() -> set[tuple[object, object]]:
            return {(r["partition"], r["offset"]) for c in children for r in c.events["record"]}

        await eventually(lambda: read() >= sent, what="every record was read")
    holders: dict[tuple[int, int], int] = {}
    for number, child in enumerate(children):
        for event in child.events["assigned"]:
            partitions, epochs = event["partitions"], event["epochs"]
            assert isinstance(partitions, list)
            assert isinstance(epochs, list)
            for held in zip(partitions, epochs, strict=True):
                assert holders.setdefault(held, number) == number, "one owner per epoch"


async def test_what_another_connection_publishes_wakes_a_waiting_poll_at_once(path: Path) -> None:
    # Heartbeats look at the file as well: not in here.
    settings = PollSettings(session_timeout_s=60, heartbeat_s=30, publish_deadline_s=10)
    async with (
        EmbeddedTransport.open(path, settings=settings) as transport,
        EmbeddedTransport.open(path, settings=settings) as other,
    ):
        topic = await new_topic(transport, partitions=2)
        await wakes_at_once(transport, other, topic)


async def wakes_at_once(transport: EmbeddedTransport, other: EmbeddedTransport, topic: str) -> None:
    async with transport.tail(topic, start="end") as reader:
        took: list[float] = []
        for _ in range(15):
            poll = asyncio.create_task(reader.poll(max_records=10, timeout_s=10))
            await asyncio.sleep(0.01)
            began = time.monotonic()
            await put(other, topic, "x")
            assert len(await poll) == 1
            took.append(time.monotonic() - began)
    assert sorted(took)[7] < 2.0, took  # a poll that nobody wakes takes its ten seconds


def slowness() -> float:
    """How many times slower this machine is than the one on which a share of a core was chosen; at least 1."""

    def spent_s() -> float:
        began = time.process_time()
        sum(n * n for n in range(200_000))
        return time.process_time() - began

    return max(1.0, min(spent_s() for _ in range(5)) / 0.015)


async def test_twenty_waiting_consumers_cost_next_to_nothing(transport: EmbeddedTransport) -> None:
    topic = await new_topic(transport, partitions=12)
    listeners = [Recorder() for _ in range(20)]
    stop = False

    async def pump(consumer: Consumer) -> None:
        while not stop:
            await consumer.poll(max_records=500, timeout_s=0.5)

    async with AsyncExitStack() as stack:
        pumps = [
            asyncio.create_task(
                pump(await stack.enter_async_context(transport.consume(f"group-{n}", [topic], listener=listener)))
            )
            for n, listener in enumerate(listeners)
        ]
        await eventually(lambda: sum(len(listener.held) for listener in listeners) == 240, what="all settled")
        loads: list[float] = []  # of the whole process, where what other tests left may have its turn, too
        most = 0.04 * slowness()
        while len(loads) < 8 and min(loads, default=1.0) >= most:
            spent, began = time.process_time(), time.monotonic()
            await asyncio.sleep(1)
            loads.append((time.process_time() - spent) / (time.monotonic() - began))
        stop = True
        await asyncio.gather(*pumps)
    assert min(loads) < most, f"{min(loads):.1%} of a core, in the quietest of {len(loads)} seconds"


# --- durability and locks --------------------------------------------------------------------------------------------


async def test_publishes_and_commits_are_synced_to_the_disk(
    transport: EmbeddedTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut cannot be tried here; what stands against it is `synchronous=FULL` (2) at the moment of writing."""
    seen: list[tuple[str, int]] = []

    def spied(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def spy(conn: sqlite3.Connection, *args: object, **rest: object) -> object:
            seen.append((name, conn.execute("PRAGMA synchronous").fetchone()[0]))
            return real(conn, *args, **rest)

        return spy

    for module, name in ((log, "append"), (log, "create"), (groups, "commit")):
        monkeypatch.setattr(module, name, spied(name, getattr(module, name)))
    topic = await new_topic(transport)
    await put(transport, topic, "x")
    async with member(transport, "group", topic) as a:
        await eventually(lambda: len(a.records) == 1, what="the record")
        await a.consumer.commit({a.part(0): 1})
    assert seen == [("create", 2), ("append", 2), ("commit", 2)]


async def test_publishes_under_way_at_once_share_a_transaction(
    transport: EmbeddedTransport, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = await new_topic(transport)
    sizes: list[int] = []
    real = Writer._transact

    def counting(self: Writer, conn: sqlite3.Connection, works: Sequence[object], *, durable: bool) -> Sequence[object]:
        if durable:
            sizes.append(len(works))
        return real(self, conn, works, durable=durable)  # type: ignore[arg-type]

    monkeypatch.setattr(Writer, "_transact", counting)
    locker = await locked(path)
    under_way = [asyncio.create_task(put(transport, topic, str(n))) for n in range(50)]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in under_way), "the lock is held"
    locker.execute("ROLLBACK")
    locker.close()
    offsets = await asyncio.gather(*under_way)
    assert sorted(offset for (offset,) in offsets) == list(range(50))
    assert sum(sizes) == 50
    assert len(sizes) <= 3, sizes


async def test_a_file_locked_beyond_the_deadline_makes_the_outcome_unknown_then_works_again(path: Path) -> None:
    settings = PollSettings(session_timeout_s=30, heartbeat_s=0.5, publish_deadline_s=1.5)
    metrics = MemoryMetrics()
    async with EmbeddedTransport.open(path, settings=settings, metrics=metrics) as transport:
        topic = await new_topic(transport, partitions=1)
        locker = await locked(path)
        (answer,) = await transport.publish([Outgoing(topic, b"k", b"x")])
        assert isinstance(answer, Unknown)
        assert isinstance(answer.error, TransportUnavailable)
        assert metrics.total("foldbus_publish_unknown_total") == 1
        with pytest.raises(TransportUnavailable):
            await transport.admin.create([TopicSpec("other")])
        locker.execute("ROLLBACK")
        locker.close()
        assert await put(transport, topic, "y") == [0]


async def test_a_record_that_cannot_be_stored_does_not_fail_those_it_shares_a_transaction_with(
    transport: EmbeddedTransport, path: Path
) -> None:
    topic = await new_topic(transport, partitions=1)
    locker = await locked(path)
    bad = asyncio.create_task(transport.publish([Outgoing(topic, b"k", [1])]))  # type: ignore[arg-type]
    good = asyncio.create_task(put(transport, topic, "x"))
    await asyncio.sleep(0.05)
    locker.execute("ROLLBACK")
    locker.close()
    assert await good == [0]
    with pytest.raises(sqlite3.Error):
        await bad


async def test_a_file_of_a_newer_version_is_refused(path: Path) -> None:
    async with EmbeddedTransport.open(path):
        pass
    conn = connect(path)
    conn.execute("PRAGMA user_version = 99")
    conn.close()
    with pytest.raises(TransportUnavailable, match="schema 99"):
        async with EmbeddedTransport.open(path):
            pass


async def test_a_closed_transport_answers_unknown(path: Path) -> None:
    async with EmbeddedTransport.open(path) as transport:
        topic = await new_topic(transport)
        await put(transport, topic, "x")
    (answer,) = await transport.publish([Outgoing(topic, b"k", b"x")])
    assert isinstance(answer, Unknown)


# --- members ---------------------------------------------------------------------------------------------------------


async def test_a_member_that_nobody_polls_is_taken_for_dead_and_joins_again_when_polled(
    transport: EmbeddedTransport, path: Path
) -> None:
    topic = await new_topic(transport, partitions=2)
    listener = Recorder(name="idle")
    impatient = replace(MORTAL, rebalance_timeout_s=1.0)
    async with (
        EmbeddedTransport.open(path, settings=impatient) as its,
        its.consume("group", [topic], listener=listener) as idle,
    ):
        async with asyncio.timeout(30):
            while len(listener.held) < 2:
                await idle.poll(max_records=1, timeout_s=0.05)
        old = set(listener.held)
        async with member(transport, "group", topic) as a:
            await eventually(lambda: len(a.listener.held) == 2, what="the idle one's partitions")
            with pytest.raises(Fenced):
                await idle.commit(dict.fromkeys(old, 0))
            async with asyncio.timeout(40):
                while len(listener.held) != 1 or listener.held & old:
                    await idle.poll(max_records=1, timeout_s=0.05)
            assert set(listener.lost_parts) == old


async def test_a_lease_that_ran_out_fences_also_when_nobody_took_over(transport: EmbeddedTransport, path: Path) -> None:
    topic = await new_topic(transport, partitions=1)
    async with EmbeddedTransport.open(path, settings=MORTAL) as its, member(its, "group", topic) as a:
        await eventually(lambda: len(a.listener.held) == 1, what="the partition")
        old = a.part(0)
        writer = await locked(path)  # no heartbeat gets through meanwhile
        committing = asyncio.create_task(a.consumer.commit({old: 0}))
        await asyncio.sleep(MORTAL.session_timeout_s * 1.2)
        writer.execute("ROLLBACK")
        writer.close()
        with pytest.raises(Fenced):
            await committing
        await eventually(lambda: a.listener.held != {old} and len(a.listener.held) == 1, what="it joins again")
        assert a.listener.lost_parts == [old]
        assert a.part(0).epoch > old.epoch
        assert await transport.admin.committed("group", [topic]) == {}


async def test_a_member_that_does_not_let_go_in_time_loses_what_it_was_asked_for(
    transport: EmbeddedTransport, path: Path
) -> None:
    metrics = MemoryMetrics()
    topic = await new_topic(transport, partitions=2)
    let_go = asyncio.Event()
    fenced: list[Fenced] = []

    async def drain(parts: Sequence[Assignment], lost: bool) -> None:
        await let_go.wait()
        try:
            await a.consumer.commit(dict.fromkeys(parts, 0))
        except Fenced as error:
            fenced.append(error)

    impatient = replace(PATIENT, rebalance_timeout_s=1.0)
    async with (
        EmbeddedTransport.open(path, settings=impatient) as its,
        EmbeddedTransport.open(path, settings=impatient, metrics=metrics) as other,
    ):
        async with member(its, "group", topic, Recorder(drain=drain)) as a:
            await eventually(lambda: len(a.listener.held) == 2, what="all partitions")
            async with member(other, "group", topic) as b:
                await eventually(lambda: len(b.listener.held) == 1, what="the other has its share all the same")
                assert fenced == []
                let_go.set()
                await eventually(lambda: len(fenced) == 1, what="a commit that came too late")
                a.listener.drain = None
                await eventually(lambda: all_partitions([a, b]) == [0, 1], what="one each")


async def test_a_partition_taken_away_and_not_yet_taken_over_is_fenced_too(path: Path) -> None:
    """By hand, on the connection: the first member is alive and beats, but did not let go; nobody has it yet."""
    settings = PollSettings(session_timeout_s=1.0, heartbeat_s=0.1, rebalance_timeout_s=1.0)
    async with EmbeddedTransport.open(path) as transport:
        topic = await new_topic(transport, partitions=2)
    conn = connect(path)
    known = log.find_topic(conn, topic)
    assert known is not None
    a = groups.join(conn, "group", [known.id], now=100.0, settings=settings)
    taken = {one.lane: one.epoch for one in groups.take(conn, a, known.lanes)}
    b = groups.join(conn, "group", [known.id], now=100.1, settings=settings)
    meant = [share.lane for share in groups.shares(conn, b) or () if share.meant]
    assert len(meant) == 1
    assert groups.take(conn, b, meant) == [], "not before the owner let go"
    groups.commit(conn, a, {lane: (epoch, 1) for lane, epoch in taken.items()}, now=100.5)
    for now in (100.9, 101.2):
        taken_away = groups.beat(conn, [a.member_id, b.member_id], now=now)
    assert taken_away == (0, 1)
    with pytest.raises(Fenced):
        groups.commit(conn, a, {meant[0]: (taken[meant[0]], 2)}, now=101.2)
    assert groups.committed(conn, "group") == dict.fromkeys(taken, 1)
    ((lane, epoch, committed),) = [(t.lane, t.epoch, t.committed) for t in groups.take(conn, b, meant)]
    assert (lane, committed) == (meant[0], 1)
    assert epoch > taken[lane]
    conn.close()


async def test_when_a_listener_raises_the_partitions_are_assigned_again_at_a_higher_epoch(
    transport: EmbeddedTransport,
) -> None:
    topic = await new_topic(transport, partitions=1)
    await put(transport, topic, "x")
    epochs: list[int] = []

    class Failing(Recorder):
        async def assigned(
            self, parts: Sequence[Assignment], committed: Mapping[Assignment, int | None]
        ) -> Mapping[Assignment, int]:
            epochs.append(parts[0].epoch)
            if len(epochs) == 1:
                raise RuntimeError("the store does not answer")
            return await super().assigned(parts, committed)

    async with transport.consume("group", [topic], listener=Failing()) as consumer:
        with pytest.raises(RuntimeError):
            await consumer.poll(max_records=1, timeout_s=0.1)
        assert values(await take(consumer, 1)) == ["x"]
    assert epochs[0] < epochs[1]


async def test_resume_wakes_a_poll_that_is_waiting(transport: EmbeddedTransport) -> None:
    topic = await new_topic(transport, partitions=1)
    listener = Recorder()
    async with transport.consume("group", [topic], listener=listener) as consumer:
        while not listener.held:
            await consumer.poll(max_records=10, timeout_s=0.1)
        consumer.pause(listener.held)
        await put(transport, topic, "x")
        assert list(await consumer.poll(max_records=10, timeout_s=0.2)) == []
        began = time.monotonic()
        asyncio.get_running_loop().call_later(0.2, consumer.resume, set(listener.held))
        assert values(await consumer.poll(max_records=10, timeout_s=50)) == ["x"]
        assert time.monotonic() - began < 25.0


async def test_only_what_must_move_moves_when_a_member_comes(transport: EmbeddedTransport, path: Path) -> None:
    topic = await new_topic(transport, partitions=6)
    async with member(transport, "group", topic) as a:
        await eventually(lambda: len(a.listener.held) == 6, what="all partitions")
        before = set(a.listener.held)
        async with EmbeddedTransport.open(path) as other, member(other, "group", topic) as b:
            await eventually(lambda: len(b.listener.held) == 3, what="half of them")
            assert len(a.listener.revoked_parts) == 3
            assert a.listener.held < before, "what stayed kept its epoch"


@given(
    lanes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    members=st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=6),
    gone=st.sets(st.integers(0, 5)),
)
def test_a_plan_is_even_complete_stable_and_moves_little(
    lanes: list[int], members: list[set[int]], gone: set[int]
) -> None:
    by_topic = {topic: [topic * 100 + n for n in range(count)] for topic, count in enumerate(lanes)}
    all_of = dict(enumerate(members))
    first = groups.plan(by_topic, all_of, {})
    staying = {number: topics for number, topics in all_of.items() if number not in gone}
    second = groups.plan(by_topic, staying, first)
    for subscriptions, planned in ((all_of, first), (staying, second)):
        wanted = {
            lane
            for topic, of_it in by_topic.items()
            if any(topic in t for t in subscriptions.values())
            for lane in of_it
        }
        assert set(planned) == wanted, "every lane that somebody subscribes to"
        assert all(lane // 100 in subscriptions[owner] for lane, owner in planned.items())
        for topic, of_it in by_topic.items():
            shares = Counter({m: 0 for m, topics in subscriptions.items() if topic in topics})
            shares.update(planned[lane] for lane in of_it if lane in planned)
            assert not shares or max(shares.values()) - min(shares.values()) <= 1
        assert groups.plan(by_topic, subscriptions, planned) == planned, "planning again moves nothing"
    assert not set(second.values()) & gone
    for of_it in by_topic.values():
        for number in staying:
            had = [lane for lane in of_it if first.get(lane) == number]
            has = [lane for lane in of_it if second.get(lane) == number]
            assert len(set(had) & set(has)) == min(len(had), len(has)), "nothing leaves a member to make room"


def test_topics_of_one_partition_are_spread_over_the_members() -> None:
    first = groups.plan({1: [10], 2: [20]}, {7: {1, 2}}, {})
    assert first == {10: 7, 20: 7}
    assert groups.plan({1: [10], 2: [20]}, {7: {1, 2}, 8: {1, 2}}, first) == {10: 7, 20: 8}


# --- reading ---------------------------------------------------------------------------------------------------------


async def test_a_long_backlog_in_one_partition_does_not_starve_the_others(transport: EmbeddedTransport) -> None:
    topic = await new_topic(transport, partitions=4)
    await put(transport, topic, *map(str, range(5_000)), partition=0)
    async with transport.tail(topic, start="begin") as reader:
        for partition in (1, 2, 3):
            await put(transport, topic, "x", "y", partition=partition)
        first = Counter(r.partition for r in await reader.poll(max_records=100, timeout_s=1))
        assert first == {0: 94, 1: 2, 2: 2, 3: 2}
        for partition in (1, 2, 3):
            await put(transport, topic, *map(str, range(10)), partition=partition)
        await put(transport, topic, *map(str, range(5_000)), partition=1)
        second = Counter(r.partition for r in await reader.poll(max_records=100, timeout_s=1))
        assert second == {0: 40, 1: 40, 2: 10, 3: 10}, "who has little gives it all, the others share the rest"
        for partition in (2, 3):
            await put(transport, topic, *map(str, range(10)), partition=partition)
        seen: set[int] = set()
        for _ in range(4):
            seen |= {r.partition for r in await reader.poll(max_records=1, timeout_s=1)}
        assert seen == {0, 1, 2, 3}, "with one record per poll, all have their turn"


async def test_a_poll_stops_short_of_too_many_bytes_and_goes_on_in_the_next(
    transport: EmbeddedTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_module, "POLL_BYTES", 1_000)
    topic = await new_topic(transport, partitions=1)
    await put(transport, topic, *("x" * 400 for _ in range(10)))
    async with transport.tail(topic, start="begin") as reader:
        offsets: list[int] = []
        for _ in range(4):
            records = await reader.poll(max_records=100, timeout_s=1)
            assert 1 <= len(records) <= 3
            offsets += [r.offset for r in records]
    assert offsets == list(range(10))


async def test_a_position_beyond_the_end_is_out_of_range(transport: EmbeddedTransport) -> None:
    topic = await new_topic(transport, partitions=1)
    await put(transport, topic, "x")
    async with transport.tail(topic, start={0: 5}) as reader:
        with pytest.raises(OffsetOutOfRange) as caught:
            await reader.poll(max_records=1, timeout_s=0.1)
    assert (caught.value.first, caught.value.end) == (0, 1)


# --- retention -------------------------------------------------------------------------------------------------------


async def test_retention_drops_what_is_older_and_keeps_the_rest_for_ever(path: Path) -> None:
    clock, metrics = ShiftedClock(), MemoryMetrics()
    async with EmbeddedTransport.open(
        path, settings=PATIENT, clock=clock, metrics=metrics, trim_every_s=0.0
    ) as transport:
        await transport.admin.create(
            [TopicSpec("limited", partitions=1, retention_s=3600.0), TopicSpec("kept", partitions=1)]
        )
        for topic in ("limited", "kept"):
            await put(transport, topic, "old 0", "old 1")
        clock.ahead = timedelta(seconds=3000)
        for topic in ("limited", "kept"):
            await put(transport, topic, "young")
        clock.ahead = timedelta(seconds=4000)
        await eventually(lambda: metrics.total("foldbus_records_trimmed_total") == 2, what="two records trimmed")
        assert await transport.admin.offsets("limited") == {0: (2, 3)}
        assert await transport.admin.offsets("kept") == {0: (0, 3)}
        clock.ahead = timedelta(seconds=400_000)
        await eventually(lambda: metrics.total("foldbus_records_trimmed_total") == 3, what="the last one trimmed")
        assert await transport.admin.offsets("limited") == {0: (3, 3)}
        assert await put(transport, "limited", "next") == [3], "offsets are never used again"
        async with transport.tail("kept", start="begin") as reader:
            assert values(await take(reader, 3)) == ["old 0", "old 1", "young"]


async def test_compaction_keeps_the_latest_of_each_key_and_the_offsets(path: Path) -> None:
    metrics = MemoryMetrics()
    async with EmbeddedTransport.open(path, settings=PATIENT, metrics=metrics, trim_every_s=0.0) as transport:
        await transport.admin.create([TopicSpec("compacted", partitions=1, compact=True)])
        async with transport.tail("compacted", start="begin") as behind:
            await transport.publish(
                [
                    Outgoing("compacted", key, value)
                    for key, value in [(b"a", b"1"), (b"b", b"1"), (b"a", b"2"), (None, b"-")]
                ]
            )
            await transport.publish([Outgoing("compacted", b"b", b"2")])
            await eventually(lambda: metrics.total("foldbus_records_trimmed_total") == 2, what="two records gone")
            records = await take(behind, 3)
        assert [(r.offset, r.key, r.value) for r in records] == [(2, b"a", b"2"), (3, None, b"-"), (4, b"b", b"2")]
        assert await transport.admin.offsets("compacted") == {0: (0, 5)}


async def test_trimming_goes_in_bounded_steps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "TRIMMED_AT_ONCE", 10)
    conn = connect(path)
    async with EmbeddedTransport.open(path, settings=PATIENT, trim_every_s=1e9) as transport:
        await transport.admin.create([TopicSpec("limited", partitions=1, retention_s=1.0)])
        await put(transport, "limited", *map(str, range(25)))
    later = int(time.time() * 1_000_000) + 5_000_000
    assert [log.trim(conn, now_us=later) for _ in range(4)] == [10, 10, 5, 0]
    conn.close()


@given(
    st.lists(st.tuples(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.binary(max_size=50)), max_size=8)
)
def test_packed_headers_come_back_as_they_were(headers: list[tuple[str, bytes]]) -> None:
    assert log.unpack_headers(log.pack_headers(tuple(headers))) == tuple(headers)


async def test_acks_are_given_for_batches_larger_than_a_statement(transport: EmbeddedTransport) -> None:
    topic = await new_topic(transport, partitions=3)
    count = log.ROWS_PER_STATEMENT * 2 + 7
    answers = await transport.publish([Outgoing(topic, b"k", str(n).encode(), partition=n % 3) for n in range(count)])
    assert answers == [Ack(n % 3, n // 3) for n in range(count)]
    async with transport.tail(topic, start="begin") as reader:
        records = await take(reader, count)
    assert {(r.partition, r.offset, r.value) for r in records} == {
        (n % 3, n // 3, str(n).encode()) for n in range(count)
    }
