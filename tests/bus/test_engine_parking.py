"""The consumer engine and messages that are set aside: their offsets, their turns, what a processor is told of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from uuid import UUID

from bus.consumer import GivenUp
from bus.envelope import Failure
from bus.errors import Undecodable
from bus.processing import Aside, Done, Failed, Item, Result
from tests.bus.fake_transport import FAST, NOW, FakeTransport, Recorder, T, envelope, make_engine, running
from tests.bus.transports import eventually


@dataclass(frozen=True)
class Parked:
    """All that the engine asks of a parked message."""

    failure: Failure | None = None


def failed(attempts: int) -> Failure:
    return Failure("ValueError", "no", "", attempts, NOW - timedelta(hours=1), NOW - timedelta(minutes=1))


def parked(key: str, n: int, failure: Failure | None = None) -> Item:
    attempts = failure.attempts if failure is not None else 0
    return Item(envelope(key, id=UUID(int=n)), None, attempts, parked=Parked(failure))


def fails(key: str, error: type[Exception] = RuntimeError) -> Callable[[Item], Result]:
    return lambda item: Failed(error("no")) if item.envelope.key == key else Done()


class Parking(Recorder):
    """Parks whatever is given up."""

    async def give_up(self, item: Item, failure: Failure) -> Result:
        await asyncio.sleep(0)
        self.dead.append((item, failure))
        return Aside()


async def test_a_message_set_aside_completes_its_offset_and_is_no_dead_letter() -> None:
    transport, processor = FakeTransport(), Parking(fails("bad"))
    for key in ("bad", "a", "bad", "b"):
        transport.record(key)
    engine, metrics = make_engine(transport, processor, replace(FAST, attempts_max=2))
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: transport.committed.get((T, 0)) == 4, what="commit past what is set aside")
    assert [(item.delivery.offset, failure.attempts) for item, failure in processor.dead if item.delivery] == [
        (0, 2),
        (2, 2),
    ]
    assert metrics.total("foldbus_given_up_total") == 0


async def test_followers_may_be_set_aside_by_process_itself() -> None:
    transport, processor = FakeTransport(), Parking(lambda item: Aside() if item.envelope.key == "bad" else Done())
    for key in ("bad", "bad", "a"):
        transport.record(key)
    engine, _ = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: transport.committed.get((T, 0)) == 3, what="commit")
    assert processor.dead == []


async def test_a_parked_message_is_tried_once_and_goes_on_counting_where_it_was() -> None:
    transport, processor = FakeTransport(), Parking(fails("k"))
    engine, metrics = make_engine(transport, processor, replace(FAST, attempts_max=5))
    async with running(engine):
        await transport.assign(0)
        earlier = failed(7)
        ended = engine.offer(parked("k", 1, earlier))
        assert ended is not None
        assert isinstance(await ended, Aside)
    ((item, failure),) = processor.dead
    assert (failure.attempts, failure.first_failed_at) == (8, earlier.first_failed_at)
    assert failure.failed_at > earlier.failed_at
    assert (item.unreadable, metrics.total("foldbus_retried_total")) == (False, 0)


async def test_one_that_was_never_tried_begins_its_own_history() -> None:
    transport, processor = FakeTransport(), Parking(fails("k"))
    engine, _ = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0)
        ended = engine.offer(parked("k", 1))
        assert ended is not None
        await ended
    ((_, failure),) = processor.dead
    assert failure.attempts == 1
    assert failure.first_failed_at > NOW


async def test_a_parked_message_that_dies_or_is_handled_tells_who_offered_it() -> None:
    transport, processor = FakeTransport(), Recorder(fails("k"))
    engine, _ = make_engine(transport, processor)
    async with running(engine):
        await transport.assign(0)
        ended = [engine.offer(parked("k", 1)), engine.offer(parked("fine", 2))]
        results = [await one for one in ended if one is not None]
    assert isinstance(results[0], Failed)
    assert isinstance(results[0].error, GivenUp)
    assert results[1] == Done()


async def test_the_processor_is_told_what_cannot_be_read() -> None:
    transport, processor = FakeTransport(), Parking(fails("raises", Undecodable))
    transport.record("raises")
    transport.record("unnamed", type="unknown")
    transport.record("fails")
    processor.answer = lambda item: (
        Done() if item.envelope.key == "fine"
        else Failed((Undecodable if item.envelope.key == "raises" else RuntimeError)("no"))
    )  # fmt: skip
    engine, _ = make_engine(transport, processor, replace(FAST, attempts_max=2))
    async with running(engine):
        await transport.assign(0)
        await eventually(lambda: len(processor.dead) == 3, what="all given up")
    assert {item.envelope.key: (item.unreadable, failure.attempts) for item, failure in processor.dead} == {
        "raises": (True, 1),
        "unnamed": (True, 1),
        "fails": (False, 2),
    }


async def test_room_is_what_may_be_offered_and_none_while_it_does_not_run() -> None:

    transport, processor = FakeTransport(), Recorder()
    processor.gate.clear()
    engine, _ = make_engine(transport, processor, replace(FAST, offers_max=2))
    assert (engine.room, engine.offer(parked("k", 1))) == (0, None)
    async with running(engine):
        await eventually(lambda: engine.room == 2, what="room")
        ended = [engine.offer(parked("k", n)) for n in range(3)]
        assert [one is None for one in ended] == [False, False, True]
        assert engine.room == 0
        processor.gate.set()
        for one in ended:
            if one is not None:
                await one
        assert engine.room == 2
    assert engine.room == 0
