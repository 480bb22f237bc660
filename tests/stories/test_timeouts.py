"""A step against a service that does not answer: it times out, is undone, and whenever that service comes, nothing of
it stays. Timers are in the database: several workers share them, and each fires once."""

# Without `from __future__ import annotations`: the services are made per test, of classes that only exist in there.
import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel

from bus.envelope import ReplyOutcome, StreamId
from bus.metrics import MemoryMetrics
from bus.transport import Ack
from eventstore.port import ClaimState, Wanted
from foldbus import Command, Connection, Decider, Event, Key, SagaRun, Service, StepFailed, Worker, saga
from sagas import saga_id, saga_stream
from sagas.events import StepScheduled
from tests.stories.pairs import QUICK, Pair, eventually, unique

pytestmark = pytest.mark.timeout(240)


class Seen(BaseModel, frozen=True):
    ns: tuple[str, ...] = ()


class World:
    """A shop whose saga needs a bank; the bank takes and gives back."""

    def __init__(self, timeout_s: float) -> None:
        shop, bank = unique("shop"), unique("bank")

        class Placed(Event, type=f"{shop}.placed.v1"):
            order: Key[str]

        class Failed(Event, type=f"{shop}.failed.v1"):
            order: Key[str]
            why: str

        class Place(Command[Placed], type=f"{shop}.place.v1"):
            order: Key[str]

        class Fail(Command[Failed], type=f"{shop}.fail.v1"):
            order: Key[str]
            why: str

        class Taken(Event, type=f"{bank}.taken.v1"):
            order: Key[str]

        class GivenBack(Event, type=f"{bank}.given-back.v1"):
            order: Key[str]

        class Take(Command[Taken], type=f"{bank}.take.v1"):
            order: Key[str]

        class GiveBack(Command[GivenBack], type=f"{bank}.give-back.v1"):
            order: Key[str]

        def in_shop(seen: Seen, event: Placed | Failed) -> Seen:
            return Seen(ns=(*seen.ns, type(event).__name__))

        def shop_decides(seen: Seen, command: Place | Fail) -> list[Placed | Failed]:
            match command:
                case Place():
                    return [Placed(order=command.order)]
                case Fail():
                    return [Failed(order=command.order, why=command.why)]

        def in_bank(seen: Seen, event: Taken | GivenBack) -> Seen:
            return Seen(ns=(*seen.ns, type(event).__name__))

        def bank_decides(seen: Seen, command: Take | GiveBack) -> list[Taken | GivenBack]:
            return [Taken(order=command.order) if isinstance(command, Take) else GivenBack(order=command.order)]

        @saga("pay", version=1)
        async def pay(run: SagaRun, placed: Placed) -> None:
            try:
                await run.step(Take(order=placed.order), undo=GiveBack(order=placed.order), timeout_s=timeout_s)
            except StepFailed as failed:
                await run.step(Fail(order=placed.order, why=failed.reason))
                raise

        self.place: Any = Place
        orders = Decider("order", initial=Seen(), evolve=in_shop, decide=shop_decides)
        accounts = Decider("account", initial=Seen(), evolve=in_bank, decide=bank_decides)
        self.shop = Service(shop, deciders=[orders], sagas=[pay], partitions=2)
        self.bank = Service(bank, deciders=[accounts], partitions=2)


async def types(connection: Connection, stream: StreamId) -> list[str]:
    """The stream's events: `saga-started`, …"""
    (found,) = await connection.store.load([Wanted(stream)])
    return [record.type.split(".")[1] for record in found.records]


async def saga_of(connection: Connection, order: str) -> StreamId:
    """The stream of the saga that the order's first event started."""
    (found,) = await connection.store.load([Wanted(StreamId("order", order))])
    return saga_stream("pay", saga_id("pay", found.records[0].id))


async def commands_of(connection: Connection, stream: StreamId) -> dict[str, UUID]:
    """What the saga sent, by type, from its history: outgoing rows are deleted once they are published."""
    (found,) = await connection.store.load([Wanted(stream)])
    sent = [record.data for record in found.records if record.type == "foldbus.saga-step-scheduled.v1"]
    steps = [StepScheduled.model_validate_json(data) for data in sent]
    return {step.type.split(".")[1]: step.id for step in steps}


async def test_a_step_at_a_service_that_is_not_there_times_out_and_leaves_no_trace_when_it_comes(pair: Pair) -> None:
    world, metrics, at_bank = World(timeout_s=0.3), MemoryMetrics(), MemoryMetrics()
    async with pair.connect(world.bank, worker=False):
        pass  # its topics exist; it does not run
    async with pair.connect(world.shop, metrics=metrics) as shop:
        await shop.request(world.place(order="o-1"), timeout_s=60)
        stream = await saga_of(shop, "o-1")
        until_the_undo = [
            "saga-started",
            "saga-step-scheduled",  # take
            "saga-step-timed-out",
            "saga-step-scheduled",  # fail the order
            "saga-step-replied",
            "saga-compensating",
            "saga-step-scheduled",  # give back: nobody knows whether it was taken
        ]
        await eventually(lambda: types(shop, stream), lambda found: found == until_the_undo)
        assert await types(shop, StreamId("order", "o-1")) == ["placed", "failed"]
        assert metrics.total("foldbus_saga_step_timed_out_total") == 1
        assert metrics.total("foldbus_timers_fired_total") == 1
        assert await shop.store.timers.next_due() is None
        sent = await commands_of(shop, stream)

        async with pair.connect(world.bank, metrics=at_bank) as bank:
            await eventually(
                lambda: types(shop, stream),
                lambda found: found == [*until_the_undo, "saga-step-replied", "saga-compensated"],
            )
            # The step came before its undo, so it was done and then given back; never one without the other.
            assert await types(bank, StreamId("account", "o-1")) == ["taken", "given-back"]
            take, undo = await bank.status(sent["take"]), await bank.status(sent["give-back"])
            assert (take.state, undo.state) == (ClaimState.DONE, ClaimState.DONE)
    assert metrics.total("foldbus_saga_late_total") == 1, "the step's late answer"


async def test_an_undo_that_comes_before_its_step_is_answered_nothing_to_undo_and_the_step_is_dropped(
    pair: Pair,
) -> None:
    """The step's command is held back on its way, as by a broker's hiccup, until the undo was handled."""
    world, at_bank = World(timeout_s=0.3), MemoryMetrics()
    async with pair.connect(world.bank, metrics=at_bank) as bank, AsyncExitStack() as stack:
        transport = _Holding(None, world.bank.name, "take")
        shop = await stack.enter_async_context(pair.connect(world.shop, worker=False))
        transport.inner = shop.transport
        shop.transport = transport
        worker = Worker(shop, QUICK)
        async with worker.running():
            await shop.execute(world.place(order="o-1"))
            stream = await saga_of(shop, "o-1")
            ended = await eventually(lambda: types(shop, stream), lambda found: found[-1:] == ["saga-compensated"])
            assert ended.count("saga-step-replied") == 2  # the order was failed, the undo answered
            assert await types(bank, StreamId("account", "o-1")) == []
            sent = await commands_of(shop, stream)
            undone = await bank.status(sent["give-back"])
            assert undone.reply is not None
            assert (undone.state, undone.reply.outcome, undone.reply.data) == (
                ClaimState.DONE,
                ReplyOutcome.OK,
                b"null",
            )
            assert (await bank.status(sent["take"])).state is ClaimState.CANCELLED

            assert len(transport.held) == 1
            await transport.inner.publish(transport.held)

            async def dropped() -> int:
                return at_bank.total("foldbus_duplicates_total", state="cancelled")

            await eventually(dropped, lambda found: found == 1)
            assert await types(bank, StreamId("account", "o-1")) == []
            assert await types(shop, stream) == ended
            worker.check()


class _Holding:
    """A transport that keeps the records of one type to itself, and says that they are published."""

    def __init__(self, inner: Any, service: str, name: str) -> None:
        self.inner, self._type = inner, f"{service}.{name}.v1".encode()
        self.held: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def publish(self, batch: Any) -> Any:
        kept = [dict(record.headers).get("ce_type") == self._type for record in batch]
        self.held += [record for record, keep in zip(batch, kept, strict=True) if keep]
        answers = iter(await self.inner.publish([record for record, keep in zip(batch, kept, strict=True) if not keep]))
        return [Ack(0, 0) if keep else next(answers) for keep in kept]


async def test_two_workers_share_the_timers_and_each_fires_once(pair: Pair) -> None:
    world = World(timeout_s=0.5)
    one, two = MemoryMetrics(), MemoryMetrics()
    orders = [f"o-{n}" for n in range(30)]
    async with pair.connect(world.bank, worker=False):
        pass
    async with pair.connect(world.shop, metrics=one) as shop, pair.connect(world.shop, metrics=two) as again:
        async with asyncio.TaskGroup() as group:
            for order in orders:
                group.create_task(shop.request(world.place(order=order), timeout_s=60))
        streams = [await saga_of(shop, order) for order in orders]

        async def histories() -> list[list[str]]:
            return [await types(again, stream) for stream in streams]

        def undoing(found: list[list[str]]) -> bool:
            return all(history[-2:] == ["saga-compensating", "saga-step-scheduled"] for history in found)

        for history in await eventually(histories, undoing):
            count = Counter(history)
            assert (count["saga-step-timed-out"], count["saga-step-scheduled"]) == (1, 3)
        assert await shop.store.timers.next_due() is None
        expired = [each.total("foldbus_saga_step_timed_out_total") for each in (one, two)]
        fired = [each.total("foldbus_timers_fired_total") for each in (one, two)]
        assert sum(fired) == len(orders)
        assert sum(expired) >= len(orders)  # a lost race decides twice and commits once
