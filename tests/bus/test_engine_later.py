"""The consumer engine and answers that come later: one key waits for them, with its order, and nobody else does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from bus.consumer import BrokenProcessor
from bus.processing import Again, Answer, Done, Failed, Item, Later, Result, Watermarks
from tests.bus.fake_transport import FAST, FakeTransport, Recorder, T, make_engine, running
from tests.bus.transports import eventually


class Slow(Recorder):
    """Answers for `slow` later: when the test says what."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.given: list[Item] = []
        self.late: list[asyncio.Future[Result]] = []

    def _answer(self, item: Item) -> Answer:
        if item.envelope.key != "slow":
            return Done()
        self.given.append(item)
        self.late.append(asyncio.get_running_loop().create_future())
        return Later(self.late[-1])

    @property
    def offsets_given(self) -> list[int]:
        return [item.delivery.offset for item in self.given if item.delivery is not None]


async def test_its_key_waits_in_order_and_all_others_go_on() -> None:
    transport, processor = FakeTransport(), Slow()
    for n in range(400):
        transport.record("slow" if n % 10 == 0 else f"k{n % 40}")
    engine, _ = make_engine(transport, processor, replace(FAST, batch_size_max=20))
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: len(processor.handled) == 360, what="all the others")
        assert processor.offsets_given == [0]
        assert transport.committed.get((T, 0), 0) == 0
        for n in range(40):
            await eventually(lambda n=n: len(processor.late) > n, what="the next of the slow key")
            processor.late[n].set_result(Done())
        await eventually(lambda: transport.committed.get((T, 0)) == 400, what="the end")
    assert processor.offsets_given == list(range(0, 400, 10))


async def test_a_late_failure_counts_as_an_attempt_and_ends_in_the_dead_letters() -> None:
    transport, processor = FakeTransport(), Slow()
    transport.record("slow")
    transport.record("slow")
    engine, _ = make_engine(transport, processor, replace(FAST, attempts_max=2))
    async with running(engine):
        await transport.assign(0)
        for n in range(2):
            await eventually(lambda n=n: len(processor.late) > n, what="an attempt")
            processor.late[n].set_result(Failed(RuntimeError("no")))
        await eventually(lambda: len(processor.late) == 3, what="the one behind it")
        processor.late[2].set_result(Done())
        await eventually(lambda: transport.committed.get((T, 0)) == 2, what="the end")
    ((item, failure),) = processor.dead
    assert (item, failure.attempts, failure.message) == (processor.given[0], 2, "no")
    assert processor.offsets_given == [0, 0, 1]


@pytest.mark.parametrize("how", ["raises", "is cancelled"])
async def test_what_ends_without_an_answer_is_given_again_and_counts_no_attempt(how: str) -> None:
    transport, processor = FakeTransport(), Slow()
    for key in ("slow", "slow", "a"):
        transport.record(key)
    engine, metrics = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: len(processor.late) == 1, what="the first attempt")
        if how == "raises":
            processor.late[0].set_exception(ConnectionError("the database went away"))
        else:
            processor.late[0].cancel()
        for n in (1, 2):
            await eventually(lambda n=n: len(processor.late) > n, what="the next attempt")
            processor.late[n].set_result(Done())
        await eventually(lambda: transport.committed.get((T, 0)) == 3, what="the end")
    assert processor.offsets_given == [0, 0, 1]
    assert {item.attempts for item in processor.given} == {0}
    assert metrics.total("foldbus_process_failed_total") == 1


async def test_a_part_that_is_handed_over_waits_for_it_and_withdraws_what_has_not_begun() -> None:
    transport, processor = FakeTransport(), Slow()
    for key in ("slow", "slow", "a"):
        transport.record(key)
    engine, _ = make_engine(transport, processor)
    async with running(engine):
        (part,) = await transport.assign(0)
        await eventually(lambda: processor.handled == [("a", 2)], what="the other key")
        assert not processor.given[0].withdrawn
        revoking = asyncio.create_task(transport.revoke(part))
        await eventually(lambda: processor.given[0].withdrawn, what="the hand-over")
        assert not revoking.done()
        processor.late[0].set_result(Done())
        await revoking
        assert transport.committed[T, 0] == 1
    assert processor.offsets_given == [0], "the second one is the next owner's"


async def test_what_outlasts_the_drain_is_cancelled_and_stays_uncommitted() -> None:
    transport, processor = FakeTransport(), Slow()
    transport.record("slow")
    engine, metrics = make_engine(transport, processor, replace(FAST, drain_timeout_s=0.05))
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: len(processor.late) == 1, what="an attempt")
    assert processor.late[0].cancelled()
    assert transport.commits == []
    assert metrics.total("foldbus_drain_timeouts_total") == 1


async def test_a_probe_sees_since_when_it_has_been_at_work() -> None:
    transport, processor = FakeTransport(), Slow()
    transport.record("slow")
    engine, _ = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: len(processor.late) == 1, what="an attempt")
        transport.record("a")
        await eventually(lambda: len(processor.handled) == 1, what="the next batch")
        assert engine.oldest_at_work is not None
        processor.late[0].set_result(Done())
        await eventually(lambda: engine.oldest_at_work is None, what="the answer")


async def test_a_processor_that_begins_what_stands_behind_it_stops_the_engine() -> None:
    class Overtaking(Slow):
        async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Answer]:
            return [Again(), Later(asyncio.get_running_loop().create_future())]

    transport = FakeTransport()
    for _ in range(2):
        transport.record("slow")
    engine, _ = make_engine(transport, Overtaking())
    run = asyncio.create_task(engine.run())
    await transport.assign(0)
    with pytest.raises(BrokenProcessor, match="took up offset 1 of key 'slow' before offset 0"):
        await run


async def test_what_no_handler_may_raise_ends_the_engine_also_when_it_comes_late() -> None:
    class Kill(BaseException): ...

    transport, processor = FakeTransport(), Slow()
    transport.record("slow")
    engine, _ = make_engine(transport, processor)
    run = asyncio.create_task(engine.run())
    await transport.assign(0)
    await eventually(lambda: len(processor.late) == 1, what="an attempt")
    processor.late[0].set_exception(Kill())
    with pytest.raises(Kill):
        await run
    assert transport.commits == []
