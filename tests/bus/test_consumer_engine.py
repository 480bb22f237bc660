"""The consumer engine against a scripted transport and a processor in memory: what may happen, made to happen.

The numbers in names' docstrings are those of the interleavings in the design research that break naive consumers.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

import pytest

from bus.consumer import BrokenProcessor, GivenUp
from bus.embedded import EmbeddedTransport
from bus.errors import Fenced, MissingTopics, OffsetOutOfRange, TransportUnavailable, Undecodable
from bus.processing import Again, Done, Failed, Item, Result, Watermarks
from bus.seams import SystemClock
from bus.transport import Ack, Assignment, Delivery, Outgoing, PollSettings, TopicSpec
from tests.bus.fake_transport import FAST, NOW, FakeTransport, Recorder, T, envelope, make_engine, offset_of, running
from tests.bus.transports import eventually

SLOW_COMMIT = replace(FAST, commit_interval_s=3600.0)


def fail_key(key: str, *, error: type[Exception] = RuntimeError):
    return lambda item: Failed(error("no")) if item.envelope.key == key else Done()


def patient(**changes: object):
    """A failing key stays in retry for as long as the test lasts."""
    return replace(FAST, attempts_max=10_000, retry_total_s=600.0, **changes)


# -- a gate -----------------------------------------------------------------------------------------------------------


async def test_a_shut_gate_lets_nothing_go_to_work_and_pauses_reading_and_opens_one_by_one() -> None:
    """What a circuit breaker asks for: shut, one at a time, open."""
    transport, processor = FakeTransport(), Recorder()
    free: list[int | None] = [0]
    for number in range(20):
        transport.record(f"k{number}")
    engine, metrics = make_engine(transport, processor, gate=lambda: free[0])
    async with running(engine):
        (part,) = await transport.assign(0)
        await eventually(lambda: part in transport.paused, what="a pause")
        polls = transport.polls
        await eventually(lambda: transport.polls > polls + 5, what="polling on")
        assert (processor.entered, engine.in_flight <= 20) == (0, True)
        processor.gate.clear()
        free[0] = 1
        await eventually(lambda: processor.entered == 1, what="one")
        free[0] = 0
        processor.gate.set()
        await eventually(lambda: len(processor.handled) == 1, what="it is handled")
        assert [len(batch) for batch in processor.batches] == [1]
        free[0] = None
        await eventually(lambda: len(processor.handled) == 20, what="all")
        assert part not in transport.paused
    assert metrics.total("foldbus_again_total") == 0, "nobody was sent back for it"


# -- commits and watermarks -------------------------------------------------------------------------------------------


async def test_an_offset_is_not_committed_past_an_earlier_one_that_is_not_done() -> None:
    """(1), (10): a later success never commits over an earlier failure; a crash there loses nothing."""
    transport, processor = FakeTransport(), Recorder(fail_key("stuck"))
    for key in ("a", "b", "stuck", "c", "d"):
        transport.record(key)
    engine, _ = make_engine(transport, processor, patient())
    async with running(engine):
        await transport.assign(0)
        await eventually(
            lambda: len(processor.handled) == 4 and transport.committed.get((T, 0)) == 2, what="commit of 2"
        )
        transport.record("e")
        await eventually(lambda: ("e", 5) in processor.handled, what="later messages")
        processor.answer = lambda item: Done()
        await eventually(lambda: transport.committed.get((T, 0)) == 6, what="commit of all")
    assert [commit[T, 0] for commit in transport.commits] == sorted(commit[T, 0] for commit in transport.commits)
    assert 2 in [commit[T, 0] for commit in transport.commits]
    assert not {3, 4, 5} & {commit[T, 0] for commit in transport.commits}


async def test_what_was_only_polled_is_not_committed() -> None:
    """(2)"""
    transport, processor = FakeTransport(), Recorder()
    processor.gate.clear()
    transport.record("a")
    engine, _ = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: processor.entered == 1, what="a batch at work")
        polls = transport.polls
        await eventually(lambda: transport.polls > polls + 5, what="more polls")
        assert transport.commits == []
        processor.gate.set()
        await eventually(lambda: transport.committed.get((T, 0)) == 1, what="commit")


async def test_gaps_of_compaction_hold_no_commit_up() -> None:
    """(16)"""
    transport, processor = FakeTransport(), Recorder()
    for offset in (3, 4, 9, 40):
        transport.record("a", offset=offset)
    engine, _ = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: transport.committed.get((T, 0)) == 41, what="commit past the gaps")
        assert await engine.caught_up()
    assert processor.offsets("a") == [3, 4, 9, 40]


async def test_a_failed_offset_commit_is_repeated_and_handles_nothing_twice() -> None:
    """(6): the database has committed, the broker does not answer."""
    transport, processor = FakeTransport(), Recorder()
    transport.commit_errors.extend(TransportUnavailable("away") for _ in range(3))
    transport.record("a")
    engine, metrics = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: transport.committed.get((T, 0)) == 1, what="commit in the end")
    assert processor.handled == [("a", 0)]
    assert metrics.total("foldbus_offset_commits_failed_total") == 3


async def test_the_group_is_never_ahead_of_the_database() -> None:
    """(6), the other way round: watermarks that are not stored are not committed either."""
    transport, processor = FakeTransport(), Recorder()
    processor.store_errors.extend(RuntimeError("store away") for _ in range(5))
    transport.record("a")
    for _ in range(3):
        transport.record("a", type="other")
    seen: list[tuple[int, int]] = []
    commit = transport.commit

    async def watched(offsets):
        await commit(offsets)
        seen.extend((offset, processor.stored[part.topic, part.partition]) for part, offset in offsets.items())

    transport.commit = watched  # type: ignore[method-assign]
    engine, metrics = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: metrics.total("foldbus_offset_commits_failed_total") >= 2, what="failed stores")
        assert transport.commits == [] or len(processor.store_errors) == 0
        await eventually(lambda: transport.committed.get((T, 0)) == 4, what="commit")
    assert seen
    assert all(offset <= stored for offset, stored in seen)


async def test_skipped_records_move_the_commit_and_are_counted() -> None:
    transport, processor = FakeTransport(), Recorder()
    for _ in range(10):
        transport.record("a", type="other")
    engine, metrics = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: transport.committed.get((T, 0)) == 10, what="commit")
    assert processor.entered == 0
    assert processor.stored == {(T, 0): 10}
    assert metrics.total("foldbus_skipped_total", type="other") == 10


async def test_a_topic_of_which_all_is_skipped_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    transport, processor = FakeTransport(), Recorder()
    for _ in range(150):
        transport.record("a", type="other")
    engine, _ = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: transport.committed.get((T, 0)) == 150, what="commit")
        for _ in range(150):
            transport.record("a", type="other")
        await eventually(lambda: transport.committed.get((T, 0)) == 300, what="commit")
    (line,) = [one for one in caplog.messages if "misspelt" in one]
    assert f"records of {T} are all of types that it does not name: other (" in line


async def test_a_topic_of_which_something_is_handled_is_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    transport, processor = FakeTransport(), Recorder()
    transport.record("a")
    for _ in range(300):
        transport.record("a", type="other")
    engine, _ = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: transport.committed.get((T, 0)) == 301, what="commit")
    assert not [one for one in caplog.messages if "misspelt" in one]


async def test_the_watermark_given_along_is_what_was_handled_before_that_call() -> None:
    transport, processor = FakeTransport(), Recorder()
    transport.committed[T, 0] = processor.stored[T, 0] = 5
    for offset in range(5, 25):
        transport.record(f"k{offset % 3}", offset=offset)
    engine, _ = make_engine(transport, processor, replace(SLOW_COMMIT, batch_size_max=4, poll_records_max=7))
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: len(processor.handled) == 20, what="all handled")
    handled: set[int] = set()
    for batch, marks in zip(processor.batches, processor.marks, strict=True):
        if (T, 0) in marks:
            assert marks[T, 0] == max([5, *(o + 1 for o in handled if set(range(5, o + 1)) <= handled)])
        handled |= {offset_of(item) for item in batch}
    assert sum((T, 0) in marks for marks in processor.marks) > 2


async def test_a_watermark_is_stored_once_and_with_the_units_where_that_is_possible() -> None:
    transport, processor = FakeTransport(), Recorder(fail_key("stuck"))
    engine, _ = make_engine(transport, processor, patient(commit_interval_s=3600.0))
    async with running(engine):
        (part, _) = await transport.assign(0, 1)
        transport.record("a")
        await eventually(lambda: processor.handled == [("a", 0)], what="the first")
        transport.record("stuck")
        await eventually(lambda: len(processor.marks) >= 4, what="retries of the second")
        assert processor.marks[:2] == [{(T, 0): 0, (T, 1): 0}, {(T, 0): 1}]
        assert not any(processor.marks[2:])
        await transport.revoke(part)
        assert transport.committed == {(T, 0): 1}
    assert processor.stored_alone == []


async def test_failpoints_stand_before_and_after_the_offset_commit() -> None:
    transport, processor = FakeTransport(), Recorder()
    hits: list[tuple[str, int]] = []

    class Spy:
        def hit(self, name: str) -> None:
            hits.append((name, len(transport.commits)))

    transport.record("a")
    engine, _ = make_engine(transport, processor, failpoint=Spy())
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: len(hits) == 2, what="both failpoints")
    assert hits == [("before-offset-commit", 0), ("after-offset-commit", 1)]


@pytest.mark.parametrize("when", ["before-offset-commit", "after-offset-commit"])
async def test_a_crash_around_the_offset_commit_loses_nothing(when: str) -> None:
    """A second engine takes over from what broker and database kept; the claim of the id makes the rest harmless."""

    class Crash(Exception):
        pass

    class Once:
        def hit(self, name: str) -> None:
            if name == when:
                raise Crash

    transport, processor = FakeTransport(), Recorder()
    for _ in range(10):
        transport.record("a")
    engine, _ = make_engine(transport, processor, failpoint=Once())
    run = asyncio.create_task(engine.run())
    await transport.assign(0)
    with pytest.raises(Crash):
        await run
    transport.record("a")
    engine, _ = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: transport.committed.get((T, 0)) == 11, what="commit")
    assert set(processor.offsets("a")) == set(range(11))


# -- where reading starts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_group", "in_store", "first", "start"),
    [
        (None, None, 0, 0),
        (None, None, 4, 4),
        (7, 7, 0, 7),
        (7, 5, 0, 5),  # restored database: its messages again
        (5, 7, 0, 5),
        (7, None, 0, 0),  # a database that knows nothing
        (7, None, 4, 4),
        (None, 7, 0, 0),  # the group's offsets expired, or the topic is a new one
    ],
)
async def test_reading_starts_at_the_lower_of_group_and_database(in_group, in_store, first, start) -> None:
    transport, processor = FakeTransport(), Recorder()
    for offset in range(first, 10):
        transport.record("a", offset=offset)
    transport.first[T, 0] = first
    if in_group is not None:
        transport.committed[T, 0] = in_group
    if in_store is not None:
        processor.stored[T, 0] = in_store
    engine, metrics = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: len(processor.handled) == 10 - start, what="the rest")
    assert processor.offsets("a") == list(range(start, 10))
    assert metrics.total("foldbus_rewound_total") == (in_group is not None and start < in_group)


async def test_what_retention_took_before_it_was_handled_is_not_skipped_silently() -> None:
    """(17): the group stands below what the topic holds; the start stays there, for the broker to refuse loudly."""
    transport, processor = FakeTransport(), Recorder()
    transport.committed[T, 0], transport.first[T, 0] = 3, 8
    engine, _ = make_engine(transport, processor)
    async with running(engine):
        (part,) = await transport.assign(0)
        assert transport.positions[part] == 3


async def test_a_database_that_does_not_answer_delays_the_assignment() -> None:
    transport, processor = FakeTransport(), Recorder()
    transport.committed[T, 0], processor.stored[T, 0] = 1, 1
    transport.record("a")
    transport.record("a")
    processor.read_errors.extend(RuntimeError("store away") for _ in range(3))
    engine, metrics = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: processor.handled == [("a", 1)], what="the second record alone")
    assert metrics.total("foldbus_store_unavailable_total") == 3


async def test_stop_is_heard_while_the_database_does_not_answer() -> None:
    transport, processor = FakeTransport(), Recorder()
    processor.read_errors.extend(RuntimeError("store away") for _ in range(100_000))
    transport.record("a")
    engine, metrics = make_engine(transport, processor)
    async with running(engine):
        assigning = asyncio.create_task(transport.assign(0))
        await eventually(lambda: metrics.total("foldbus_store_unavailable_total") > 1, what="a refused read")
        engine.stop()
    await assigning
    assert processor.handled == []


# -- rebalances -------------------------------------------------------------------------------------------------------


async def test_a_completion_of_an_earlier_epoch_says_nothing_to_the_next() -> None:
    """(3): revoked past the drain limit, assigned again, and only then the old batch ends."""
    transport, processor = FakeTransport(), Recorder()
    transport.record("a")
    processor.gate.clear()
    engine, metrics = make_engine(transport, processor, replace(FAST, drain_timeout_s=0.05))
    async with running(engine):
        (old,) = await transport.assign(0)
        await eventually(lambda: processor.entered == 1, what="the old batch at work")
        await transport.revoke(old)
        assert metrics.total("foldbus_drain_timeouts_total") == 1
        transport.record("b")
        await transport.assign(0)
        await eventually(lambda: engine.in_flight == 3, what="both records again, and the old one")
        processor.answer = lambda item: (
            Done() if item.delivery is not None and item.delivery.assignment == old else Again(60.0)
        )
        processor.gate.set()
        await eventually(lambda: ("a", 0) in processor.handled and processor.entered >= 2, what="the old one's end")
        await asyncio.sleep(0.05)  # several commit intervals, in which nothing may be committed
        assert transport.commits == []
        assert engine.in_flight == 2


async def test_what_is_queued_when_a_part_is_revoked_is_left_to_the_new_owner() -> None:
    """(4)"""
    transport, processor = FakeTransport(), Recorder()
    processor.gate.clear()
    transport.record("a")
    transport.record("x", partition=1)
    engine, _ = make_engine(transport, processor)
    async with running(engine):
        part, other = await transport.assign(0, 1)
        await eventually(lambda: processor.entered == 1, what="a batch at work")
        for key in ("a", "b", "c"):
            transport.record(key)
        transport.record("y", partition=1)
        await eventually(lambda: engine.in_flight == 6, what="more queued")
        revoking = asyncio.create_task(transport.revoke(part))
        await eventually(lambda: engine.in_flight == 3, what="the queued ones dropped")
        assert not revoking.done()
        processor.gate.set()
        await revoking
        assert transport.committed[T, 0] == 1  # what was at work is drained and committed
        assert (T, 0) in processor.forgotten
        await eventually(lambda: ("y", 1) in processor.handled, what="the other part goes on")
        assert engine.assignments == (other,)
    assert [one for one in processor.handled if one[0] in "abc"] == [("a", 0)]


async def test_a_retry_of_a_part_that_is_being_revoked_is_left_to_the_new_owner() -> None:
    transport, processor = FakeTransport(), Recorder(fail_key("a"))
    processor.gate.clear()
    transport.record("a")
    transport.record("b")
    engine, _ = make_engine(transport, processor)
    async with running(engine):
        (part,) = await transport.assign(0)
        await eventually(lambda: processor.entered == 1, what="a batch at work")
        revoking = asyncio.create_task(transport.revoke(part))
        await eventually(lambda: transport.in_step, what="the revocation under way")
        processor.gate.set()
        await revoking
        assert engine.idle
        assert transport.commits == []  # "b" is done, but "a" before it is not
    assert processor.entered == 1


async def test_a_lost_part_is_not_committed_nor_waited_for() -> None:
    transport, processor = FakeTransport(), Recorder(fail_key("a"))
    processor.gate.clear()
    transport.record("a")
    engine, _ = make_engine(transport, processor, replace(FAST, drain_timeout_s=60.0))
    async with running(engine):
        (part,) = await transport.assign(0)
        await eventually(lambda: processor.entered == 1, what="a batch at work")
        async with asyncio.timeout(30):  # half of what a drain may take
            await transport.revoke(part, lost=True)
        processor.gate.set()
        await eventually(lambda: engine.idle, what="the batch's end")
    assert transport.commits == []
    assert processor.entered == 1


async def test_a_fenced_part_is_discarded_and_the_others_are_committed() -> None:
    """(5): the member was away for long enough, and hears of it when it commits."""
    transport, processor = FakeTransport(), Recorder()
    engine, metrics = make_engine(transport, processor)
    async with running(engine):
        gone, mine = await transport.assign(0, 1)
        transport.record("a")
        await eventually(lambda: transport.committed.get((T, 0)) == 1, what="a first commit")
        transport.record("a", type="held")
        processor.gate.clear()
        await eventually(lambda: engine.in_flight == 1, what="one at work")
        transport.take_away(gone)
        transport.record("b", partition=1)
        processor.gate.set()
        await eventually(lambda: transport.committed.get((T, 1)) == 1, what="the other part's commit")
        await eventually(lambda: engine.assignments == (mine,), what="the part to be discarded")
        assert transport.committed[T, 0] == 1
        transport.inject(Delivery(gone, 2, b"a", b"", (("type", b"e"),), NOW))
        await eventually(lambda: metrics.total("foldbus_stale_records_total") == 1, what="a stale record")
    assert ("a", 2) not in processor.handled
    assert metrics.total("foldbus_fenced_total") == 1


async def test_order_per_key_holds_across_epochs_while_an_old_batch_is_still_at_work() -> None:
    transport, processor = FakeTransport(), Recorder()
    for _ in range(3):
        transport.record("a")
    processor.gate.clear()
    engine, _ = make_engine(transport, processor, replace(FAST, drain_timeout_s=0.02, batch_size_max=1, lanes=3))
    async with running(engine):
        (old,) = await transport.assign(0)
        await eventually(lambda: processor.entered == 1, what="the head at work")
        await transport.revoke(old)
        await transport.assign(0)
        await eventually(lambda: engine.in_flight == 4, what="all again behind the old one")
        assert processor.entered == 1  # two lanes are free, and the key is at work
        processor.gate.set()
        await eventually(lambda: transport.committed.get((T, 0)) == 3, what="commit")
    assert processor.offsets("a") == [0, 0, 1, 2]


# -- back-pressure ----------------------------------------------------------------------------------------------------


async def test_polling_goes_on_and_reading_pauses_at_high_water_until_half_is_done() -> None:
    """(11), with hysteresis: a pump that stops polling is expelled, one that does not pause has no bound."""
    transport = FakeTransport()
    allowed = 0

    def answer(item: Item) -> Result:
        return Done() if offset_of(item) < allowed else Again(0.005)

    processor = Recorder(answer)
    for n in range(300):
        transport.record(f"k{n}")
    engine, _ = make_engine(transport, processor, replace(FAST, in_flight_max=100, poll_records_max=30))
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: engine.in_flight == 100 and bool(transport.paused), what="high water")
        polls = transport.polls
        await eventually(lambda: transport.polls > polls + 3, what="polls while paused")
        allowed = 49
        await eventually(lambda: engine.in_flight == 51, what="nearly half done")
        polls = transport.polls
        await eventually(lambda: transport.polls > polls + 3, what="polls while paused")
        assert transport.resumes == 0
        assert engine.in_flight == 51
        allowed = 51
        await eventually(lambda: transport.resumes == 1 and engine.in_flight == 100, what="reading again")
        allowed = 1000
        await eventually(lambda: len(processor.handled) == 300, what="all")
        assert max(transport.polled_max) <= 30


async def test_lanes_that_keep_up_are_waited_for_at_high_water_and_nothing_is_paused() -> None:
    transport = FakeTransport()

    class WhenFull(Recorder):
        async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Result]:
            while engine.in_flight < 100 and len(self.handled) + engine.in_flight < 300:  # noqa: ASYNC110 - the pump's turn
                await asyncio.sleep(0)
            return await super().process(batch, watermarks)

    processor = WhenFull()
    for n in range(300):
        transport.record(f"k{n}")
    settings = replace(FAST, in_flight_max=100, poll_records_max=30, poll_timeout_s=5.0)
    engine, _ = make_engine(transport, processor, settings)
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: len(processor.handled) == 300, what="all")
    assert (transport.paused, transport.resumes) == (set(), 0)
    assert max(transport.polled_max) == 30


async def test_bytes_in_flight_are_bounded_too() -> None:
    transport, processor = FakeTransport(), Recorder()
    processor.gate.clear()
    for n in range(100):
        transport.record(f"k{n}", b"x" * 10_000)
    engine, _ = make_engine(
        transport, processor, replace(FAST, in_flight_bytes_max=200_000, poll_records_max=5, batch_size_max=1)
    )
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: bool(transport.paused), what="high water")
        assert 200_000 <= engine.in_flight_bytes <= 260_000
        processor.gate.set()
        await eventually(lambda: len(processor.handled) == 100, what="all")
        assert engine.in_flight_bytes == 0


async def test_a_key_that_piles_up_pauses_its_partition_alone() -> None:
    transport, processor = FakeTransport(), Recorder(fail_key("hot"))
    for _ in range(200):
        transport.record("hot")
    engine, _ = make_engine(transport, processor, patient(per_key_max=50, poll_records_max=10, in_flight_max=500))
    async with running(engine):
        await transport.assign(0, 1)
        await eventually(lambda: len(transport.paused) == 1, what="the hot partition paused")
        assert engine.in_flight < 80
        for n in range(50):
            transport.record(f"k{n}", partition=1)
        await eventually(lambda: len(processor.handled) == 50, what="the other partition")
        assert {part.partition for part in transport.paused} == {0}
        processor.answer = lambda item: Done()
        await eventually(lambda: len(processor.handled) == 250, what="all")
    assert processor.offsets("hot") == list(range(200))


async def test_a_partition_does_not_run_ahead_of_its_watermark_without_bound() -> None:
    transport, processor = FakeTransport(), Recorder(fail_key("stuck"))
    transport.record("stuck")
    for n in range(300):
        transport.record(f"k{n}")
    engine, _ = make_engine(transport, processor, patient(spread_max=100, poll_records_max=10))
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: len(transport.paused) == 1 and engine.in_flight == 1, what="the pause")
        assert 99 <= len(processor.handled) <= 110
        processor.answer = lambda item: Done()
        await eventually(lambda: len(processor.handled) == 301, what="all")


# -- order and fairness -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
async def test_messages_of_a_key_are_handled_in_order_whatever_fails(seed: int) -> None:
    """Thousands of messages under random failures, lost races, calls without answer and rebalances: per key, first
    handlings are in order and complete, repeated ones a replayed suffix."""
    rng = Random(seed)
    transport = FakeTransport()
    total = 3000

    def answer(item: Item) -> Result:
        roll = rng.random()
        return (
            Failed(ValueError("unlucky")) if roll < 0.03 else Again(rng.choice([0.0, 0.001])) if roll < 0.08 else Done()
        )

    processor = Recorder(answer)
    sent: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for _ in range(total):
        key = f"k{min(rng.randrange(60), rng.randrange(60))}"
        partition = hash_of(key) % 3
        sent[key].append((partition, transport.record(key, partition=partition)))
    settings = replace(
        patient(retry_base_s=0.001, retry_max_s=0.002, poll_records_max=100),
        lanes=rng.choice([1, 3]),
        batch_size_max=rng.choice([7, 50, 500]),
        in_flight_max=rng.choice([150, 1000]),
    )
    engine, metrics = make_engine(transport, processor, settings)
    async with running(engine):
        parts = await transport.assign(0, 1, 2)
        for _ in range(6):
            seen = len(processor.handled)
            if rng.random() < 0.5:
                processor.process_errors.append(ConnectionError("store away"))
            await eventually(lambda seen=seen: len(processor.handled) >= min(seen + 200, total), what="some progress")
            part = parts.pop(rng.randrange(3))
            await transport.revoke(part, lost=rng.random() < 0.4)
            parts += await transport.assign(part.partition)
        ends = {(T, p): len(transport.logs[T, p]) for p in range(3)}
        await eventually(lambda: transport.committed == ends, what="everything committed")
        assert await engine.caught_up()
    assert metrics.total("foldbus_given_up_total") == 0
    for key, records in sent.items():
        offsets = processor.offsets(key)
        firsts = list(dict.fromkeys(offsets))
        assert firsts == [offset for _, offset in records]
        for before, after in pairwise(offsets):
            assert firsts.index(after) <= firsts.index(before) + 1  # never a hole, also in what is repeated


def hash_of(key: str) -> int:
    return sum(key.encode())


async def test_one_slow_key_holds_up_nobody_else() -> None:
    transport, processor = FakeTransport(), Recorder(fail_key("slow"))
    for n in range(500):
        transport.record("slow" if n % 10 == 0 else f"k{n % 40}")
    engine, _ = make_engine(transport, processor, patient(batch_size_max=20))
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: len(processor.handled) == 450, what="all the others")
        assert processor.offsets("slow") == []
        processor.answer = lambda item: Done()
        await eventually(lambda: len(processor.handled) == 500, what="the slow ones")
    assert processor.offsets("slow") == list(range(0, 500, 10))


async def test_a_hot_key_gets_what_the_others_leave() -> None:
    transport, processor = FakeTransport(), Recorder()
    processor.gate.clear()
    transport.record("first")
    engine, _ = make_engine(transport, processor, replace(FAST, batch_size_max=10, lanes=1))
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: processor.entered == 1, what="a first batch, at the gate")
        for _ in range(40):
            transport.record("hot")
        for n in range(12):
            transport.record(f"k{n}")
        await eventually(lambda: engine.in_flight == 53, what="all queued")
        processor.gate.set()
        await eventually(lambda: len(processor.handled) == 53, what="all")
    shares = [Counter("hot" if item.envelope.key == "hot" else "other" for item in b) for b in processor.batches[1:]]
    assert shares[0] == {"hot": 1, "other": 9}  # heads first
    assert shares[1] == {"hot": 7, "other": 3}  # then the rest is its
    assert processor.offsets("hot") == sorted(processor.offsets("hot"))


async def test_two_lanes_work_at_once_and_never_on_one_key() -> None:
    transport = FakeTransport()
    at_work: set[str] = set()
    widest = 0

    class Lanes(Recorder):
        async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Result]:
            nonlocal widest
            keys = {item.envelope.key for item in batch}
            assert not keys & at_work
            at_work.update(keys)
            widest = max(widest, len(at_work))
            await asyncio.sleep(0.001)
            results = await super().process(batch, watermarks)
            at_work.difference_update(keys)
            return results

    processor = Lanes()
    for n in range(400):
        transport.record(f"k{n % 7}")
    engine, _ = make_engine(transport, processor, replace(FAST, lanes=2, batch_size_max=3))
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: len(processor.handled) == 400, what="all")
    assert widest > 3
    for n in range(7):
        assert processor.offsets(f"k{n}") == list(range(n, 400, 7))


async def test_a_second_batch_goes_to_work_beside_the_first_only_while_a_full_one_waits() -> None:
    transport = FakeTransport()
    go_on = asyncio.Event()
    sizes: list[int] = []

    class Slow(Recorder):
        async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Result]:
            sizes.append(len(batch))
            await go_on.wait()
            return await super().process(batch, watermarks)

    processor = Slow()
    engine, _ = make_engine(transport, processor, replace(FAST, lanes=3, batch_size_max=3))
    async with running(engine):
        await transport.assign(0)
        for n in range(5):
            transport.record(f"k{n}")
        await eventually(lambda: engine.in_flight == 5, what="five in hand")
        assert sum(sizes) == 3  # whoever came first went to work, and what is left is no full batch
        transport.record("k5")
        await eventually(lambda: sum(sizes) == 6, what="the second batch")
        transport.record("k6")
        await eventually(lambda: engine.in_flight == 7, what="seven in hand")
        assert sum(sizes) == 6
        go_on.set()
        await eventually(lambda: len(processor.handled) == 7, what="all")


async def test_what_is_due_again_goes_to_work_side_by_side_too_although_nothing_new_comes() -> None:
    transport = FakeTransport()
    go_on = asyncio.Event()
    began: list[int] = []

    class OnceMore(Recorder):
        async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Result]:
            began.append(len(batch))
            if sum(began) > 6:
                await go_on.wait()
            return await super().process(batch, watermarks)

    processor = OnceMore(lambda item: Done() if go_on.is_set() else Again(0.05))
    for n in range(6):
        transport.record(f"k{n}")
    engine, _ = make_engine(transport, processor, replace(FAST, lanes=2, batch_size_max=3))
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: sum(began) == 12, what="all six, a second time, in two lanes at once")
        go_on.set()
        await eventually(lambda: len(processor.handled) == 6, what="all")


async def test_a_processor_that_overtakes_its_own_failure_stops_the_engine() -> None:
    class Overtaking(Recorder):
        async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Result]:
            return [Failed(ValueError()) if offset_of(item) == 0 else Done() for item in batch]

    transport = FakeTransport()
    transport.record("a")
    transport.record("a")
    processor = Overtaking()
    engine, _ = make_engine(transport, processor, replace(SLOW_COMMIT, drain_timeout_s=60.0))
    run = asyncio.create_task(engine.run())
    await transport.assign(0)
    with pytest.raises(BrokenProcessor, match="offset 1 of key 'a' before offset 0"):
        async with asyncio.timeout(30):  # what is at work has no end to wait for
            await run
    assert transport.commits == []
    assert processor.stored_alone == []


async def test_a_processor_that_answers_too_little_stops_the_engine() -> None:
    class Terse(Recorder):
        async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Result]:
            return []

    transport = FakeTransport()
    transport.record("a")
    engine, _ = make_engine(transport, Terse())
    run = asyncio.create_task(engine.run())
    await transport.assign(0)
    with pytest.raises(BrokenProcessor, match="0 results for 1 items"):
        await run


# -- failures ---------------------------------------------------------------------------------------------------------


async def test_bad_input_is_given_up_at_once_and_stops_nobody() -> None:
    transport = FakeTransport()
    processor = Recorder(fail_key("bad", error=Undecodable))
    transport.record("a")
    transport.record("a", b"unreadable")
    transport.record("bad")
    transport.record("a", type="unknown")
    transport.record("p", b"parser bug")
    transport.record("a")
    engine, metrics = make_engine(transport, processor, code_version="v7")
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: transport.committed.get((T, 0)) == 6, what="commit past all of them")
    assert processor.offsets("a") == [0, 5]
    assert sorted((d.offset, f.error) for d, f in processor.raw) == [
        (1, "bus.errors.Undecodable"),
        (4, "ZeroDivisionError"),
    ]
    assert sorted((offset_of(item), f.error) for item, f in processor.dead) == [
        (2, "bus.errors.Undecodable"),
        (3, "bus.errors.UnknownType"),
    ]
    assert {f.attempts for _, f in [*processor.dead, *processor.raw]} == {1}
    assert {f.code_version for _, f in [*processor.dead, *processor.raw]} == {"v7"}
    assert metrics.total("foldbus_given_up_total") == 4


async def test_a_failing_message_is_tried_a_bounded_number_of_times_then_given_up_in_its_place() -> None:
    def answer(item: Item) -> Result:
        if offset_of(item) != 1:
            return Done()
        try:
            raise ValueError("no \x00 luck " + "x" * 50_000)
        except ValueError as error:
            return Failed(error)

    transport, processor = FakeTransport(), Recorder(answer)
    for _ in range(3):
        transport.record("a")
    engine, metrics = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: transport.committed.get((T, 0)) == 3, what="commit")
    ((item, failure),) = processor.dead
    assert offset_of(item) == 1
    assert failure.attempts == item.attempts == FAST.attempts_max
    assert failure.error == "ValueError"
    assert failure.message.startswith("no \N{REPLACEMENT CHARACTER} luck")
    assert "\x00" not in failure.stack
    assert len(failure.message.encode()) <= 4096
    assert len(failure.stack.encode()) <= 16 * 1024
    assert failure.first_failed_at < failure.failed_at
    assert metrics.total("foldbus_retried_total") == FAST.attempts_max - 1
    assert processor.offsets("a") == [0, 2]


class AheadClock(SystemClock):
    """Real time, put ahead at will."""

    ahead_s = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead_s


async def test_retries_end_when_their_time_is_up() -> None:
    clock, failed = AheadClock(), 0

    def answer(item: Item) -> Result:
        nonlocal failed
        failed += 1
        if failed == 4:
            clock.ahead_s = 3600.0
        return Failed(RuntimeError("no"))

    transport, processor = FakeTransport(), Recorder(answer)
    transport.record("a")
    settings = replace(FAST, attempts_max=100_000, retry_total_s=3600.0)
    engine, _ = make_engine(transport, processor, settings, clock=clock)
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: len(processor.dead) == 1, what="the dead letter")
    assert processor.dead[0][1].attempts == 4


async def test_a_dead_letter_that_cannot_be_written_keeps_its_record_uncommitted_and_stops_nobody() -> None:
    """(14)"""
    transport, processor = FakeTransport(), Recorder(fail_key("bad"))
    processor.give_up_errors.extend(ConnectionError("store away") for _ in range(100_000))
    transport.record("a")
    transport.record("bad")
    transport.record("z", b"unreadable")
    engine, metrics = make_engine(transport, processor, replace(FAST, attempts_max=1))
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: metrics.total("foldbus_give_up_failed_total") > 4, what="refused dead letters")
        transport.record("b")
        transport.record("bad")
        await eventually(lambda: ("b", 3) in processor.handled, what="the others")
        await eventually(lambda: transport.committed.get((T, 0)) == 1, what="commit of what is before it")
        assert all(len(b) == 1 or offset_of(b[-1]) < 4 for b in processor.batches)
        processor.give_up_errors.clear()
        await eventually(lambda: transport.committed.get((T, 0)) == 5, what="commit of all")
    assert [offset_of(item) for item, _ in processor.dead] == [1, 4]
    assert [delivery.offset for delivery, _ in processor.raw] == [2]


async def test_a_message_taken_by_somebody_else_when_it_is_given_up_is_examined_again() -> None:
    transport, processor = FakeTransport(), Recorder(fail_key("a"))
    processor.give_up_answers.append(Again())
    transport.record("a")
    engine, _ = make_engine(transport, processor, replace(FAST, attempts_max=1))
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: len(processor.batches) == 2, what="another try")
    assert processor.batches[1][0].examine


async def test_a_call_without_answer_gives_the_same_items_again_and_counts_no_attempt() -> None:
    transport, processor = FakeTransport(), Recorder()
    processor.process_errors.extend(ConnectionError("store away") for _ in range(8))
    for n in range(6):
        transport.record(f"k{n % 2}")
    engine, metrics = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: transport.committed.get((T, 0)) == 6, what="commit")
    assert processor.dead == []
    assert all(item.attempts == 0 for batch in processor.batches for item in batch)
    assert processor.offsets("k0") == [0, 2, 4]
    assert processor.offsets("k1") == [1, 3, 5]
    assert metrics.total("foldbus_process_failed_total") == 8


async def test_a_message_that_upsets_every_call_it_is_in_does_not_stop_the_others() -> None:
    class Upset(Recorder):
        async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Result]:
            if any(item.envelope.key == "curse" for item in batch):
                raise OverflowError
            return await super().process(batch, watermarks)

    transport, processor = FakeTransport(), Upset()
    for n in range(200):
        transport.record("curse" if n == 5 else f"k{n}")
    engine, _ = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: len(processor.handled) == 199, what="all the others")
        await eventually(lambda: transport.committed.get((T, 0)) == 5, what="commit before it")


async def test_lost_races_go_to_the_front_and_are_examined() -> None:
    lost: Counter[int] = Counter()

    def answer(item: Item) -> Result:
        lost[offset_of(item)] += 1
        return Again() if lost[offset_of(item)] <= 6 else Done()

    transport, processor = FakeTransport(), Recorder(answer)
    for _ in range(3):
        transport.record("a")
    engine, metrics = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: len(processor.handled) == 3, what="all")
    assert processor.offsets("a") == [0, 1, 2]
    assert not processor.batches[0][0].attempts
    assert all(batch[0].examine for batch in processor.batches[1:6])
    assert metrics.total("foldbus_again_total") == 18


async def test_an_answer_that_asks_for_time_lets_its_key_wait_and_no_other() -> None:
    transport = FakeTransport()
    answers = iter([Again(0.2)])
    processor = Recorder(lambda item: next(answers, Done()) if item.envelope.key == "a" else Done())
    transport.record("a")
    transport.record("b")
    engine, _ = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: processor.handled == [("b", 1)], what="the other")
        began = asyncio.get_running_loop().time()
        await eventually(lambda: len(processor.handled) == 2, what="the waiting one")
        assert asyncio.get_running_loop().time() - began > 0.1


# -- timers' messages -------------------------------------------------------------------------------------------------


def timer(key: str, n: int = 0) -> Item:
    return Item(envelope(key, id=UUID(int=1 << 100 | n)), None)


async def test_a_timers_message_waits_its_turn_in_its_keys_queue_and_tells_how_it_ended() -> None:
    transport, processor = FakeTransport(), Recorder()
    processor.gate.clear()
    transport.record("a")
    engine, _ = make_engine(transport, processor)
    assert engine.offer(timer("a")) is None  # it does not run yet
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: processor.entered == 1, what="a batch at work")
        offered = engine.offer(timer("a"))
        assert offered is not None
        assert not engine.idle
        transport.record("a")
        await eventually(lambda: engine.in_flight == 2, what="one behind it")
        processor.gate.set()
        assert await offered == Done()
        await eventually(lambda: transport.committed.get((T, 0)) == 2, what="commit")
    assert processor.offsets("a") == [0, -1, 1]


async def test_a_timers_message_that_is_given_up_says_so() -> None:
    transport, processor = FakeTransport(), Recorder(fail_key("a"))
    engine, _ = make_engine(transport, processor, replace(FAST, attempts_max=2))
    async with running(engine):
        await eventually(lambda: transport.polls > 0, what="the engine's start")
        offered = engine.offer(timer("a"))
        assert offered is not None
        result = await offered
    assert isinstance(result, Failed)
    assert isinstance(result.error, GivenUp)
    assert len(processor.dead) == 1


async def test_offers_have_a_bound_of_their_own_and_are_cancelled_at_the_end() -> None:
    transport, processor = FakeTransport(), Recorder()
    processor.gate.clear()
    engine, _ = make_engine(transport, processor, replace(FAST, offers_max=3, in_flight_max=1, drain_timeout_s=0.05))
    async with running(engine):
        await transport.assign(0)
        transport.record("a")
        await eventually(lambda: engine.in_flight == 1, what="a full engine")
        offers = [engine.offer(timer(f"t{n}", n)) for n in range(4)]
        assert [offer is not None for offer in offers] == [True, True, True, False]
    assert all(offer is None or offer.cancelled() for offer in offers)


# -- start, stop, outages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before it joined", "while it polls"])
async def test_a_stop_does_not_wait_for_a_poll_that_brings_nothing(when: str) -> None:
    transport, processor = FakeTransport(), Recorder()
    engine, _ = make_engine(transport, processor, replace(FAST, poll_timeout_s=600.0))
    async with asyncio.timeout(40), running(engine):
        if when == "while it polls":
            await eventually(lambda: transport.polls > 0, what="a poll")


async def test_stop_drains_what_is_at_work_commits_it_and_leaves_the_rest() -> None:
    transport, processor = FakeTransport(), Recorder()
    processor.gate.clear()
    for _ in range(5):
        transport.record("a")
    engine, _ = make_engine(transport, processor, replace(SLOW_COMMIT, batch_size_max=2))
    run = asyncio.create_task(engine.run())
    await transport.assign(0)
    await eventually(lambda: processor.entered == 1, what="a batch at work")
    engine.stop()
    engine.stop()
    await asyncio.sleep(0.05)
    assert not run.done()
    processor.gate.set()
    await run
    assert processor.offsets("a") == [0, 1]
    assert transport.committed == {(T, 0): 2}
    assert engine.assignments == ()
    assert not transport.poll_cancelled
    await engine.run()  # asked to stop for good: returns at once
    assert transport.joins == 1


async def test_a_handler_cancelled_at_shutdown_leaves_its_offset_uncommitted() -> None:
    """(9)"""
    transport, processor = FakeTransport(), Recorder()
    processor.gate.clear()
    transport.record("a")
    engine, metrics = make_engine(transport, processor, replace(FAST, drain_timeout_s=0.05))
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: processor.entered == 1, what="a batch at work")
    assert processor.cancelled == 1
    assert transport.commits == []
    assert metrics.total("foldbus_drain_timeouts_total") == 1


async def test_cancelling_run_drains_too_and_never_cancels_a_poll() -> None:
    transport, processor = FakeTransport(), Recorder()
    processor.gate.clear()
    transport.record("a")
    engine, _ = make_engine(transport, processor, SLOW_COMMIT)
    run = asyncio.create_task(engine.run())
    await transport.assign(0)
    await eventually(lambda: processor.entered == 1, what="a batch at work")
    run.cancel()
    await asyncio.sleep(0.03)
    processor.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert transport.committed == {(T, 0): 1}
    assert not transport.poll_cancelled


async def test_missing_topics_are_raised_and_the_engine_may_be_run_again() -> None:
    transport, processor = FakeTransport(), Recorder()
    transport.join_errors.append(MissingTopics(["orders.events"]))
    transport.record("a")
    engine, _ = make_engine(transport, processor)
    with pytest.raises(MissingTopics):
        await engine.run()
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: transport.committed.get((T, 0)) == 1, what="commit")
        with pytest.raises(RuntimeError, match="runs already"):
            await engine.run()


async def test_a_broker_that_is_away_is_waited_for_at_start_and_later() -> None:
    transport, processor = FakeTransport(), Recorder()
    transport.join_errors.extend(TransportUnavailable("away") for _ in range(3))
    engine, metrics = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0)
        assert transport.joins == 4
        transport.record("a")
        for _ in range(3):
            await transport.raise_in_poll(TransportUnavailable("away"))
        transport.record("a")
        await eventually(lambda: transport.committed.get((T, 0)) == 2, what="commit")
    assert metrics.total("foldbus_transport_unavailable_total") == 6
    assert transport.joins == 4


async def test_a_position_out_of_range_stops_its_partition_and_no_other() -> None:
    """(17)"""
    transport, processor = FakeTransport(), Recorder()
    engine, metrics = make_engine(transport, processor)
    async with running(engine):
        bad, _ = await transport.assign(0, 1)
        await transport.raise_in_poll(OffsetOutOfRange(bad, wanted=3, first=8, end=9))
        await eventually(lambda: transport.paused == {bad}, what="the pause")
        assert engine.held == (bad,)
        transport.record("a", partition=1)
        await eventually(lambda: processor.handled == [("a", 0)], what="the other partition")
    assert metrics.total("foldbus_offset_out_of_range_total") == 1


async def test_an_error_nobody_expected_comes_out_of_run() -> None:
    transport, processor = FakeTransport(), Recorder()
    engine, _ = make_engine(transport, processor)
    run = asyncio.create_task(engine.run())
    await transport.raise_in_poll(LookupError("a bug"))
    with pytest.raises(LookupError):
        await run


async def test_caught_up_means_handled_up_to_the_end_of_all_parts() -> None:
    transport, processor = FakeTransport(), Recorder()
    engine, metrics = make_engine(transport, processor)
    assert not await engine.caught_up()
    async with running(engine):
        await transport.assign(0, 1)
        await eventually(lambda: engine.last_poll is not None, what="a poll")
        assert await engine.caught_up()  # empty topics
        processor.gate.clear()
        transport.record("a")
        assert not await engine.caught_up()  # not read yet
        await eventually(lambda: engine.in_flight == 1, what="one at work")
        assert not await engine.caught_up()
        await eventually(lambda: engine.lag == {(T, 0): 1, (T, 1): 0}, what="lag")
        processor.gate.set()
        await eventually(lambda: engine.idle, what="the end of it")
        assert await engine.caught_up()
        await eventually(lambda: engine.lag == {(T, 0): 0, (T, 1): 0}, what="no lag")
        assert metrics.gauges["foldbus_lag", (("group", "billing"), ("partition", "0"), ("topic", T))] == 0


async def test_who_is_idle_asks_for_ends_seldom_and_sees_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a request to the broker; what comes is counted every interval again."""
    transport, processor = FakeTransport(), Recorder()
    engine, _ = make_engine(transport, processor)
    intervals, asked = [0], [0]
    commit, ends = engine._partitions.commit, transport.end_offsets

    async def counted_commit(*parts: Any) -> None:
        intervals[0] += 1
        await commit(*parts)

    async def counted_ends() -> Any:
        asked[0] += 1
        return await ends()

    monkeypatch.setattr(engine._partitions, "commit", counted_commit)
    monkeypatch.setattr(transport, "end_offsets", counted_ends)
    async with running(engine):
        await transport.assign(0)
        transport.record("a")
        await eventually(lambda: engine.lag == {(T, 0): 0} and engine.idle, what="idle")
        intervals[0] = asked[0] = 0
        await eventually(lambda: intervals[0] >= 50, what="many intervals")
        assert intervals[0] / 5 - 2 <= asked[0] <= intervals[0] / 5 + 2
        processor.gate.clear()
        transport.record("a")
        transport.record("a")
        await eventually(lambda: engine.lag == {(T, 0): 2}, what="what came")
        intervals[0] = asked[0] = 0
        await eventually(lambda: intervals[0] >= 10, what="some intervals more")
        assert asked[0] >= intervals[0] - 1
        processor.gate.set()


async def test_a_fence_of_everything_leaves_nothing_behind() -> None:
    transport, processor = FakeTransport(), Recorder()
    transport.commit_errors.extend(Fenced("generation") for _ in range(3))
    transport.record("a")
    transport.record("b", partition=1)
    engine, _ = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0, 1)
        await eventually(lambda: engine.assignments == (), what="both discarded")
        assert engine.idle
        await transport.assign(0, 1)
        await eventually(lambda: transport.committed == {(T, 0): 1, (T, 1): 1}, what="a new start")
    assert isinstance(engine.assignments, tuple)
    assert Assignment(T, 0, 1) not in transport.positions


# -- on a real transport ----------------------------------------------------------------------------------------------


async def test_two_members_share_an_embedded_topic_and_a_third_takes_over_what_they_leave(tmp_path: Path) -> None:
    """Join, rebalance and leave for real, under way: per key in order, nothing missing, all of it committed."""
    settings = PollSettings(session_timeout_s=30.0, heartbeat_s=0.05, rebalance_timeout_s=30.0)
    processor = Recorder()  # one database behind all members
    sent: dict[str, int] = defaultdict(int)

    async with EmbeddedTransport.open(tmp_path / "bus.db", settings=settings) as transport:
        await transport.admin.create([TopicSpec(T, partitions=4)])

        async def publish(n: int) -> None:
            batch = []
            for _ in range(n):
                key = f"k{sum(sent.values()) % 23}"
                batch.append(Outgoing(T, key.encode(), b"%d" % sent[key], (("type", b"e"),)))
                sent[key] += 1
            assert all(isinstance(answer, Ack) for answer in await transport.publish(batch))

        def handled_once() -> dict[str, list[int]]:
            values: dict[str, list[int]] = defaultdict(list)
            for batch in processor.batches:
                for item in batch:
                    values[item.envelope.key].append(int(item.envelope.data))
            return {key: list(dict.fromkeys(found)) for key, found in values.items()}

        def all_handled() -> bool:
            return handled_once() == {key: list(range(n)) for key, n in sent.items()}

        engines = [make_engine(transport, processor)[0] for _ in range(3)]
        await publish(500)
        async with running(engines[0]):
            await eventually(all_handled, what="the first member alone")
            async with running(engines[1]):
                await publish(500)
                await eventually(lambda: all(len(e.assignments) == 2 for e in engines[:2]), what="two halves")
                await publish(500)
                await eventually(all_handled, what="both")
            await publish(500)
        async with running(engines[2]):
            await publish(100)
            await eventually(lambda: len(engines[2].assignments) == 4, what="the take-over")
            await eventually(all_handled, what="the third")
            async with asyncio.timeout(30):
                while not await engines[2].caught_up():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        ends = {(T, p): end for p, (_, end) in (await transport.admin.offsets(T)).items() if end}
        assert await transport.admin.committed("billing", [T]) == ends
    assert processor.stored == ends
