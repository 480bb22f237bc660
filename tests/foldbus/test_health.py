"""Alive and ready, in words: what a restart mends, what mends itself, and what waits for somebody.

The engines are real, on a scripted transport and a clock that is set by hand; the worker around them is only what
health looks at. The last tests run real workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

from bus.errors import OffsetOutOfRange, TransportUnavailable
from bus.seams import SystemClock
from bus.topics import apply
from bus.transport import Delivery, TopicSpec, TopicState
from eventstore.errors import StoreUnavailable
from eventstore.flow import Pause
from foldbus import Command, Decider, Event, Key, SagaRun, Service, saga
from foldbus.health import Health, HealthSettings, alive, ready
from foldbus.relay import Relay
from foldbus.worker import Worker, WorkerSettings
from tests.bus.fake_transport import FAST, NOW, FakeTransport, Recorder, T, make_engine, running
from tests.bus.test_early_engine import busy, fill
from tests.bus.test_early_engine import make as make_early
from tests.bus.transports import eventually
from tests.foldbus.desk import until

WELL = Health()
SETTINGS = HealthSettings(broker_s=10.0, work_max_s=300.0, group_s=180.0, standing_s=300.0, probe_s=30.0)


class ByHand(SystemClock):
    """Does not move by itself."""

    at = 1000.0

    def monotonic(self) -> float:
        return self.at


class Bus(FakeTransport):
    """A broker that may be silent, lack topics, or hide what it has."""

    silent = False
    lacks: Collection[str] = ()
    hides = False
    partitions = 4

    async def describe(self, names: Collection[str]) -> Mapping[str, TopicState]:
        if self.silent:
            raise TransportUnavailable("no broker")
        return {name: TopicState(name, self.partitions) for name in names if name not in self.lacks}

    def _read(self, max_records: int) -> list[Delivery]:
        return [] if self.hides else super()._read(max_records)


class Database:
    error: Exception | None = None
    hangs = False

    async def watermarks(self, group: str) -> Mapping[tuple[str, int], int]:
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        return {}


class Stand:
    """What health sees of a worker with one engine."""

    def __init__(self) -> None:
        self.clock, self.bus, self.database, self.processor = ByHand(), Bus(), Database(), Recorder()
        self.engine, _ = make_engine(self.bus, self.processor, FAST, clock=self.clock)
        service = SimpleNamespace(
            name="orders", topics=(TopicSpec(T, 4),), expected_topics=(), foreign_topics=("stock.events",)
        )
        self.worker: Any = SimpleNamespace(
            connection=SimpleNamespace(service=service, store=self.database, transport=self.bus, clock=self.clock),
            settings=WorkerSettings(health=SETTINGS),
            engines=[self.engine],
            ended=asyncio.get_running_loop().create_future(),
            running_now=True,
            watchdog=SimpleNamespace(blocked=None),
            gate=SimpleNamespace(paused={}),
            waiting_for_topics=set[str](),
        )

    async def alive(self) -> Sequence[str]:
        return (await alive(self.worker)).reasons

    async def ready(self) -> Sequence[str]:
        return (await ready(self.worker)).reasons


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    """At work, with partition 0."""
    stand = Stand()
    async with running(stand.engine):
        await stand.bus.assign(0)
        yield stand


async def test_a_worker_that_polls_and_has_its_partitions_is_alive_and_ready(stand: Stand) -> None:
    stand.bus.record("a")
    await eventually(lambda: stand.processor.handled == [("a", 0)], what="handled")
    assert [await alive(stand.worker), await ready(stand.worker)] == [WELL, WELL]
    assert WELL.as_json() == {"ok": True, "reasons": ()}


async def test_a_pump_that_comes_back_from_nothing_is_not_ready_soon_and_dead_after_three_times_its_bound(
    stand: Stand,
) -> None:
    go_on = asyncio.Event()
    hanging = asyncio.create_task(stand.bus._in_poll(go_on.wait))
    await eventually(lambda: stand.bus.in_step, what="hanging in a poll")
    limit_s = 3 * (FAST.poll_timeout_s + SETTINGS.broker_s)
    stand.clock.at += 6.0
    assert await stand.alive() == ()
    assert await stand.ready() == ("billing: a poll has gone on for 6.0 s",)
    stand.clock.at += limit_s
    assert await stand.alive() == (f"billing: a poll has gone on for {limit_s + 6:.1f} s, wanted at most 30.1 s",)
    go_on.set()
    await hanging
    await eventually(lambda: stand.engine.pulse.age_s == 0, what="polling again")
    assert [await stand.alive(), await stand.ready()] == [(), ()]


async def test_a_call_that_hangs_is_dead_once_it_took_longer_than_any_may(stand: Stand) -> None:
    stand.processor.gate.clear()
    stand.bus.record("a")
    await eventually(lambda: stand.processor.entered == 1, what="at work")
    stand.clock.at += 299.0
    await eventually(lambda: stand.engine.pulse.age_s == 0, what="polls go on")
    assert await stand.alive() == ()
    stand.clock.at += 2.0
    await eventually(lambda: stand.engine.pulse.age_s == 0, what="polls go on")
    assert await stand.alive() == ("billing: a batch has been at work for 301.0 s, wanted at most 300.0 s",)
    assert await stand.ready() == await stand.alive()
    stand.processor.gate.set()
    await eventually(lambda: stand.engine.oldest_at_work is None, what="handled")
    assert await stand.alive() == ()


async def test_a_dead_letter_that_hangs_counts_as_work_too(stand: Stand) -> None:
    give_up, hangs = stand.processor.give_up_raw, asyncio.Event()

    async def hanging(*given: Any) -> None:
        await hangs.wait()
        await give_up(*given)

    stand.processor.give_up_raw = hanging  # type: ignore[method-assign]
    stand.bus.record("a", b"unreadable")
    await eventually(lambda: stand.engine.oldest_at_work is not None, what="giving up")
    stand.clock.at += 301.0
    await eventually(lambda: stand.engine.pulse.age_s == 0, what="polls go on")
    assert "a batch has been at work for 301.0 s" in str(await stand.alive())
    hangs.set()
    await eventually(lambda: stand.engine.oldest_at_work is None, what="given up")


async def test_parts_that_are_being_handed_over_are_not_ready_and_their_return_is() -> None:
    stand = Stand()
    async with running(stand.engine):
        await eventually(lambda: stand.engine.waiting_since is not None, what="a member")
        assert await stand.ready() == ("billing: has no partitions yet, its group rebalances",)
        parts = await stand.bus.assign(0, 1)
        assert await stand.ready() == ()
        await stand.bus.revoke(parts[0])
        assert await stand.ready() == ()  # it still has the other one
        await stand.bus.revoke(parts[1])
        assert await stand.ready() == ("billing: has no partitions yet, its group rebalances",)
        await stand.bus.assign(1)
        assert await stand.ready() == ()


async def test_a_member_that_stands_by_is_alive_and_ready() -> None:
    stand = Stand()
    async with running(stand.engine):
        await eventually(lambda: stand.engine.waiting_since is not None, what="a member")

        async def nothing_for_you() -> None:
            assert stand.bus._listener is not None
            assert await stand.bus._listener.assigned([], {}) == {}

        await stand.bus._in_poll(nothing_for_you)
        stand.clock.at += 10 * SETTINGS.group_s
        await eventually(lambda: stand.engine.pulse.age_s == 0, what="polls go on")
        assert [await stand.alive(), await stand.ready()] == [(), ()]


async def test_a_member_that_its_group_has_forgotten_is_dead_but_not_while_the_broker_is_away() -> None:
    """T15: after a broker's restart aiokafka has been seen to wait for ever, without a word."""
    stand = Stand()
    async with running(stand.engine):
        await eventually(lambda: stand.engine.waiting_since is not None, what="a member")
        stand.clock.at += SETTINGS.group_s + 1
        await eventually(lambda: stand.engine.pulse.age_s == 0, what="polls go on")
        assert await stand.alive() == ("billing: its group has given it no answer for 181.0 s",)
        stand.bus.silent = True
        assert await stand.alive() == ()
        assert "the broker does not answer: no broker" in await stand.ready()


async def test_a_partition_that_brings_nothing_while_it_grows_is_dead_and_one_that_is_only_full_is_not(
    stand: Stand,
) -> None:
    """T15, the other half."""
    stand.bus.hides = True
    stand.bus.record("a")
    await eventually(lambda: stand.engine.lag.get((T, 0)) == 1, what="seen by its end")
    stand.clock.at += 400.0
    assert stand.engine.standing == {}  # what came before may be nothing to read; only growth tells
    stand.bus.record("b")
    await eventually(lambda: (T, 0) in stand.engine.standing, what="standing")
    await eventually(lambda: stand.engine.pulse.age_s == 0, what="polls go on")
    assert await stand.alive() == (f"billing: nothing has come of {T}[0] for 400.0 s, though it grows",)
    stand.bus.hides = False
    stand.bus.record("c")
    await eventually(lambda: stand.engine.standing == {}, what="read on")
    assert await stand.alive() == ()


async def test_what_waits_behind_a_slow_batch_of_an_at_most_once_handler_is_not_missing() -> None:
    transport, clock = FakeTransport(), ByHand()
    engine, handled, _ = make_early(transport, replace(FAST, early_batch_max=1), clock=clock)
    async with busy(engine, handled):
        await transport.assign(0)
        fill(transport, 3)
        await eventually(lambda: engine.in_flight == 3 and (T, 0) in engine.lag, what="one in hand, two behind it")
        before = engine.lag[T, 0]
        clock.at += 400.0
        fill(transport, 3)
        await eventually(lambda: engine.lag[T, 0] == before + 3, what="seen to have grown")
        assert engine.standing == {}
        handled.gate.set()
        await eventually(lambda: handled.over == 6, what="all handled")


async def test_a_broker_that_is_away_is_told_and_is_no_reason_to_restart(stand: Stand) -> None:
    stand.bus.silent = True
    await stand.bus.raise_in_poll(TransportUnavailable("connection refused"))
    reasons = await stand.ready()
    assert "billing: the broker does not answer: poll failed: connection refused" in reasons
    assert "the broker does not answer: no broker" in reasons
    stand.clock.at += 10_000.0
    await eventually(lambda: stand.engine.pulse.age_s == 0, what="tries go on")
    assert await stand.alive() == ()
    stand.bus.silent = False
    await eventually(lambda: stand.engine.unavailable is None, what="polls bring something again")
    assert await stand.ready() == ()


async def test_a_store_that_is_away_or_hangs_is_told_and_is_no_reason_to_restart(stand: Stand) -> None:
    stand.database.error = StoreUnavailable("no database")
    assert await stand.ready() == ("the store does not answer: no database",)
    stand.database.hangs = True
    stand.worker.settings = WorkerSettings(health=replace(SETTINGS, probe_s=0.5))
    assert await stand.ready() == ("the store did not answer within 0.5 s",)
    assert await stand.alive() == ()


async def test_missing_topics_are_named(stand: Stand) -> None:
    stand.bus.lacks = ("stock.events",)
    assert await stand.ready() == ("topics are missing: stock.events",)
    assert await stand.alive() == ()


async def test_a_topic_that_was_changed_under_a_running_worker_is_named(stand: Stand) -> None:
    """Partitions that somebody added move keys: the worker goes on, loudly, and does not start again."""
    stand.bus.partitions = 5
    (reason,) = await stand.ready()
    assert reason.startswith(f"topic {T!r} has 5 partitions, declared are 4; keys would move")
    assert await stand.alive() == ()


async def test_a_partition_whose_offset_is_gone_is_named(stand: Stand) -> None:
    (part,) = stand.engine.assignments
    await stand.bus.raise_in_poll(OffsetOutOfRange(part, wanted=3, first=7, end=9))
    await eventually(lambda: stand.engine.held == (part,), what="held")
    assert await stand.ready() == (f"billing: {T}[0] stands: its offset is gone from the topic",)
    assert await stand.alive() == ()


async def test_a_group_that_an_operator_paused_is_named_with_the_reason(stand: Stand) -> None:
    stand.worker.gate.paused["billing"] = Pause("billing", NOW, "kim", "stock is being counted")
    (why,) = await stand.ready()
    assert why == f"billing: paused by kim since {NOW.isoformat()}: stock is being counted"
    assert await stand.alive() == ()


async def test_a_group_behind_an_open_breaker_is_named(stand: Stand) -> None:
    stand.engine._pump.gate = lambda: 0
    assert await stand.ready() == ("billing: waits for a dependency whose circuit breaker is open",)
    stand.engine._pump.gate = lambda: 1
    assert await stand.ready() == ()
    assert await stand.alive() == ()


async def test_a_part_that_failed_for_good_is_dead(stand: Stand) -> None:
    stand.worker.ended.set_exception(ZeroDivisionError("a bug"))
    wanted = ("a part failed for good: ZeroDivisionError: a bug",)
    assert [await stand.alive(), await stand.ready()] == [wanted, wanted]
    stand.worker.running_now = False
    assert [await stand.alive(), await stand.ready()] == [wanted, wanted]


async def test_a_worker_that_drains_is_alive_and_not_ready(stand: Stand) -> None:
    stand.worker.running_now = False
    assert [await stand.alive(), await stand.ready()] == [(), ("the worker is not running, or drains",)]


async def test_a_loop_that_is_blocked_is_not_ready(stand: Stand) -> None:
    stand.worker.watchdog.blocked = SimpleNamespace(by="ship (shipping.py:7)")
    assert await stand.ready() == ("the event loop is blocked by ship (shipping.py:7)",)


@pytest.mark.parametrize("name", ["broker_s", "work_max_s", "group_s", "standing_s", "probe_s"])
def test_a_bound_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0, wanted a number above 0"):
        HealthSettings(**{name: 0})


# --- real workers -----------------------------------------------------------------------------------------------------


class Counted(Event, type="tally.counted.v1"):
    tally: Key[str]


class Count(Command[Counted], type="tally.count.v1"):
    tally: Key[str]


class Tally(BaseModel, frozen=True):
    n: int = 0


def evolve(tally: Tally, event: Counted) -> Tally:
    return Tally(n=tally.n + 1)


def count(tally: Tally, command: Count) -> list[Counted]:
    return [Counted(tally=command.tally)]


class Elsewhere(Event, type="elsewhere.happened.v1"):
    tally: Key[str]


@saga("on-elsewhere", version=1)
async def on_elsewhere(run: SagaRun, event: Elsewhere) -> None:
    return


TALLIES = Decider("tally", initial=Tally(), evolve=evolve, decide=count)


@asynccontextmanager
async def worker_in(directory: Path, service: Service) -> AsyncIterator[Worker]:
    async with service.connect(store=f"sqlite:{directory}", bus=f"embedded:{directory}", worker=True) as connection:
        assert connection.worker is not None
        yield connection.worker


async def is_ready(worker: Worker) -> None:
    async def there() -> bool:
        return (await worker.ready()).ok

    await until(there)


async def test_real_workers_are_ready_also_the_one_for_which_no_partition_is_left(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        workers: list[Worker] = []
        for _ in range(3):
            service = Service("tally", deciders=[TALLIES], partitions=2)
            workers.append(await stack.enter_async_context(worker_in(tmp_path, service)))
        for worker in workers:
            await is_ready(worker)
            assert (await worker.alive()).ok

        async def shared() -> bool:
            return sorted(len(worker.engines[0].assignments) for worker in workers) == [0, 1, 1]

        await until(shared)
        for worker in workers:
            await until(worker.engines[0].caught_up)
    assert (await workers[0].ready()).reasons == ("the worker is not running, or drains",)


async def test_a_worker_whose_foreign_topic_is_not_there_yet_is_not_ready_and_alive(tmp_path: Path) -> None:
    async with worker_in(tmp_path, Service("tally", deciders=[TALLIES], sagas=[on_elsewhere])) as worker:
        group = "tally.saga.on-elsewhere"
        await eventually(lambda: worker.waiting_for_topics == {group}, what="missed")
        why = {f"{group}: waits for its topics", "topics are missing: elsewhere.events"}

        async def only_that() -> bool:
            return set((await worker.ready()).reasons) == why

        await until(only_that)
        assert (await worker.alive()).ok
        elsewhere = Service("elsewhere", messages=[Elsewhere])
        await apply(worker.connection.transport.admin, elsewhere.topics)
        await is_ready(worker)


async def test_a_worker_with_a_dead_relay_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = asyncio.Event()

    async def run(self: Relay) -> None:
        await end.wait()
        raise ZeroDivisionError("in the relay")

    monkeypatch.setattr(Relay, "run", run)
    workers: list[Worker] = []

    async def until_it_dies() -> None:
        async with worker_in(tmp_path, Service("tally", deciders=[TALLIES])) as worker:
            workers.append(worker)
            assert await worker.alive() == WELL
            end.set()
            await asyncio.Event().wait()

    with pytest.raises(ZeroDivisionError):
        await until_it_dies()
    assert (await workers[0].alive()).reasons == ("a part failed for good: ZeroDivisionError: in the relay",)
