"""At most once, against a scripted transport: offsets first, whatever happens in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random
from typing import Any
from uuid import uuid4

import pytest

from bus.engine.early import EarlyEngine
from bus.engine.settings import EngineSettings
from bus.errors import MissingTopics, TransportUnavailable
from bus.metrics import MemoryMetrics
from bus.processing import Item
from bus.seams import NoFailpoints, SystemClock
from bus.transport import Delivery
from tests.bus.fake_transport import FAST, FakeTransport, T, envelope, running
from tests.bus.transports import eventually


class Handled:
    """Takes everything. `gate` shut, `handle` waits in there; `free_now` is what it says it would take."""

    group = "tracking"

    def __init__(self, transport: FakeTransport) -> None:
        self.transport = transport
        self.gate = asyncio.Event()
        self.gate.set()
        self.free_now: int | None = None
        self.batches: list[list[tuple[int, int]]] = []
        self.uncommitted: list[tuple[int, int]] = []
        self.error: Exception | None = None
        self.over = 0
        self.when_in_hand: Callable[[], None] = lambda: None

    def free(self) -> int | None:
        return self.free_now

    async def handle(self, records: Sequence[Delivery]) -> None:
        self.batches.append([(record.partition, record.offset) for record in records])
        committed = self.transport.committed
        self.uncommitted += [
            (record.partition, record.offset)
            for record in records
            if committed.get((record.topic, record.partition), 0) <= record.offset
        ]
        self.when_in_hand()
        await self.gate.wait()
        self.over += 1
        if self.error is not None:
            raise self.error

    @property
    def all(self) -> list[tuple[int, int]]:
        return [record for batch in self.batches for record in batch]


def make(
    transport: FakeTransport, settings: EngineSettings = FAST, **options: Any
) -> tuple[EarlyEngine, Handled, MemoryMetrics]:
    metrics, handled = MemoryMetrics(), Handled(transport)
    options = {"clock": SystemClock(), "failpoint": NoFailpoints(), "rng": Random(7)} | options
    transport_: Any = transport
    engine = EarlyEngine(transport_, [T], handled, settings=settings, metrics=metrics, **options)
    return engine, handled, metrics


def fill(transport: FakeTransport, n: int, *, partition: int = 0) -> None:
    for number in range(n):
        transport.record(f"k{number % 7}", partition=partition)


@asynccontextmanager
async def busy(engine: EarlyEngine, handled: Handled) -> AsyncIterator[None]:
    """The first batch is in hand, and stays there until the test lets go."""
    handled.gate.clear()
    async with running(engine):
        yield


@pytest.mark.parametrize("free", [None, 1000])
async def test_offsets_are_committed_before_their_records_are_handled(free: int | None) -> None:
    transport = FakeTransport()
    fill(transport, 50)
    engine, handled, _metrics = make(transport, replace(FAST, early_batch_max=20))
    handled.free_now = free
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: len(handled.all) == 50, what="all handled")
        assert await engine.caught_up()
    assert handled.uncommitted == []
    assert handled.all == [(0, offset) for offset in range(50)]
    assert max(map(len, handled.batches)) <= 20
    assert (engine.in_flight, engine.in_flight_bytes) == (0, 0)


async def test_what_waits_behind_the_next_batch_is_not_committed() -> None:
    """A crash now costs the batch in hand and the next, ten in all, and not what was read beyond them."""
    transport = FakeTransport()
    fill(transport, 50)
    engine, handled, _ = make(transport, replace(FAST, early_batch_max=10))
    async with busy(engine, handled):
        await transport.assign(0)
        await eventually(lambda: handled.batches != [], what="a batch in hand")
        polls = transport.polls
        await eventually(lambda: transport.polls > polls + 5, what="polling on beside it")
        assert transport.committed == {(T, 0): 10}
        handled.gate.set()
        await eventually(lambda: len(handled.all) == 50, what="the rest")


async def test_a_crash_after_the_commit_loses_what_was_in_hand_and_repeats_nothing() -> None:
    class Crash(Exception):
        pass

    class At:
        def hit(self, name: str) -> None:
            if name == "after-offset-commit" and len(transport.commits) == 3:
                raise Crash

    transport = FakeTransport()
    fill(transport, 50)
    settings = replace(FAST, early_batch_max=10, commit_interval_s=3600.0)  # only the batches' own commits
    first, before, _ = make(transport, settings, failpoint=At())
    task = asyncio.create_task(first.run())
    await transport.assign(0)
    with pytest.raises(Crash):
        await task
    transport.positions.clear()
    second, after, _ = make(transport, settings)
    async with running(second):
        await transport.assign(0)
        await eventually(lambda: transport.committed[T, 0] == 50, what="the end")
        await eventually(lambda: second.idle, what="all handled")
    handled = before.all + after.all
    assert len(set(handled)) == len(handled), "handled twice"
    lost = {(0, offset) for offset in range(50)} - set(handled)
    assert {(0, offset) for offset in range(10, 15)} <= lost <= {(0, offset) for offset in range(5, 15)}


async def test_a_commit_of_which_nobody_knows_is_repeated_until_it_is_known() -> None:
    transport = FakeTransport()
    transport.commit_errors.extend(TransportUnavailable("away") for _ in range(4))
    fill(transport, 5)
    engine, handled, metrics = make(transport)
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: len(handled.all) == 5, what="handled in the end")
    assert handled.uncommitted == []
    assert metrics.total("foldbus_offset_commits_failed_total") == 4


async def test_what_could_not_be_committed_goes_to_whoever_has_the_partition_next() -> None:
    """Revoked between two tries to commit; the broker answers again after the second: the last commit of all must not
    cover what nobody has handled."""
    transport = FakeTransport()
    transport.commit_errors.extend(TransportUnavailable("away") for _ in range(2))
    fill(transport, 5)
    slow = replace(FAST, retry_base_s=5.0, retry_max_s=5.0, commit_interval_s=3600)
    engine, handled, metrics = make(transport, slow)
    async with running(engine):
        (part,) = await transport.assign(0)
        await eventually(lambda: metrics.total("foldbus_offset_commits_failed_total") == 1, what="the first try")
        await transport.revoke(part)
        assert (handled.all, transport.committed) == ([], {})
        await eventually(lambda: engine.idle, what="nothing left in hand")
        await transport.assign(0)
        await eventually(lambda: len(handled.all) == 5, what="handled by the next")
    assert handled.uncommitted == []


async def test_a_partition_that_was_taken_away_unnoticed_is_fenced_and_its_records_are_not_handled() -> None:
    transport = FakeTransport()
    fill(transport, 5)
    fill(transport, 3, partition=1)
    engine, handled, metrics = make(transport)
    async with busy(engine, handled):
        (part, _) = await transport.assign(0, 1)
        await eventually(lambda: handled.batches != [], what="the first batch")
        transport.record("late")
        await eventually(lambda: engine.in_flight > sum(map(len, handled.batches)), what="read beyond it")
        transport.take_away(part)
        handled.gate.set()
        await eventually(lambda: metrics.total("foldbus_fenced_total") == 1, what="the fence")
        await eventually(lambda: engine.idle, what="rest")
    assert (0, 5) not in handled.all
    assert transport.committed == {(T, 0): 5, (T, 1): 3}


async def test_a_revoke_waits_for_the_batch_in_hand_and_gives_back_what_is_behind_it() -> None:
    transport = FakeTransport()
    fill(transport, 30)
    engine, handled, _ = make(transport, replace(FAST, early_batch_max=10))
    async with busy(engine, handled):
        (part,) = await transport.assign(0)
        await eventually(lambda: handled.batches != [], what="a batch in hand")
        revoking = asyncio.create_task(transport.revoke(part))
        done, _ = await asyncio.wait({revoking}, timeout=0.1)
        assert not done, "given back while its records are being handled"
        handled.gate.set()
        await revoking
        assert (len(handled.all), transport.committed) == (10, {(T, 0): 10})
        await eventually(lambda: engine.idle, what="nothing left in hand")
        await transport.assign(0)
        await eventually(lambda: len(handled.all) == 30, what="the rest, by the next")
    assert len(set(handled.all)) == 30


async def test_a_stop_ends_the_batches_in_hand_and_loses_nothing() -> None:
    transport = FakeTransport()
    fill(transport, 30)
    engine, handled, _ = make(transport, replace(FAST, early_batch_max=10))
    async with busy(engine, handled):
        await transport.assign(0)
        await eventually(lambda: handled.batches != [], what="a batch in hand")
        engine.stop()
        handled.gate.set()
    assert (handled.over, len(handled.all), transport.committed) == (2, 10, {(T, 0): 10})


async def test_what_the_processor_raises_costs_the_batch_and_is_told() -> None:
    transport = FakeTransport()
    fill(transport, 5)
    engine, handled, metrics = make(transport)
    handled.error = RuntimeError("a bug")
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: handled.over == 1, what="the first")
        handled.error = None
        transport.record("a")
        await eventually(lambda: handled.over == 2, what="the next")
    assert metrics.total("foldbus_early_batches_lost_total") == 1


async def test_no_more_is_committed_than_the_processor_takes() -> None:
    """Its dependency is down: nothing is committed, reading pauses; then one record is tried, then the rest."""
    transport = FakeTransport()
    fill(transport, 30)
    engine, handled, _ = make(transport)
    handled.free_now = 0
    async with running(engine):
        (part,) = await transport.assign(0)
        await eventually(lambda: part in transport.paused, what="a pause")
        assert (handled.all, transport.commits) == ([], [])
        handled.free_now = 1
        handled.when_in_hand = lambda: setattr(handled, "free_now", 0)
        await eventually(lambda: len(handled.all) == 1, what="a probe")
        assert transport.committed == {(T, 0): 1}
        handled.free_now, handled.when_in_hand = None, lambda: None
        await eventually(lambda: len(handled.all) == 30, what="the rest")
    assert handled.uncommitted == []
    assert handled.all == [(0, offset) for offset in range(30)]


async def test_reading_pauses_at_high_water_while_a_batch_takes_its_time() -> None:
    transport = FakeTransport()
    fill(transport, 500)
    engine, handled, _ = make(transport, replace(FAST, in_flight_max=100, poll_records_max=40, early_batch_max=10))
    async with busy(engine, handled):
        (part,) = await transport.assign(0)
        await eventually(lambda: part in transport.paused, what="a pause")
        assert engine.in_flight <= 140
        handled.gate.set()
        await eventually(lambda: len(handled.all) == 500, what="all")


async def test_records_of_an_ended_epoch_are_ignored() -> None:
    transport = FakeTransport()
    fill(transport, 3)
    engine, handled, metrics = make(transport)
    async with running(engine):
        (old,) = await transport.assign(0)
        await eventually(lambda: len(handled.all) == 3, what="all")
        await transport.revoke(old)
        (new,) = await transport.assign(0)
        late = transport.logs[T, 0][0]
        transport.inject(Delivery(old, 1, late.key, late.value, late.headers, late.time))
        transport.inject(Delivery(new, 1, late.key, late.value, late.headers, late.time))
        await eventually(lambda: metrics.total("foldbus_stale_records_total") == 2, what="both ignored")
    assert len(handled.all) == 3


async def test_a_group_without_an_offset_begins_where_the_topic_does_and_one_with_an_offset_there() -> None:
    transport = FakeTransport()
    for offset in range(7, 12):
        transport.record("a", offset=offset)
    transport.first[T, 0] = 7
    for _ in range(2):
        engine, handled, metrics = make(transport)
        async with running(engine):
            await transport.assign(0)
            await eventually(lambda: transport.committed.get((T, 0)) == 12, what="the end")
            await eventually(lambda: engine.idle, what="rest")  # noqa: B023
        assert len(handled.all) in (5, 0)
        assert metrics.total("foldbus_rewound_total") == 0
    assert handled.all == [], "what was committed came again"


async def test_timers_have_nothing_to_offer_here() -> None:
    transport = FakeTransport()
    engine, handled, _ = make(transport)
    async with running(engine):
        await transport.assign(0)
        assert engine.offer(Item(envelope("a", id=uuid4()), None)) is None
        assert engine.room == 0
    assert handled.all == []


async def test_a_missing_topic_is_told() -> None:
    transport = FakeTransport()
    transport.join_errors.append(MissingTopics(["t"]))
    engine, _, _ = make(transport)
    with pytest.raises(MissingTopics):
        await engine.run()


async def test_it_may_be_cancelled_and_run_again() -> None:
    """As an operator's pause does it: what is in hand is finished, and the next run goes on behind it."""
    transport = FakeTransport()
    fill(transport, 30)
    engine, handled, _ = make(transport, replace(FAST, early_batch_max=10))
    handled.gate.clear()
    task = asyncio.create_task(engine.run())
    await transport.assign(0)
    await eventually(lambda: handled.batches != [], what="a batch in hand")
    task.cancel()
    handled.gate.set()
    await asyncio.wait({task})
    assert (len(handled.all), transport.committed) == (10, {(T, 0): 10})
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: len(handled.all) == 30, what="the rest")
    assert len(set(handled.all)) == 30
