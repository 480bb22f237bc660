"""A handler that takes long is waited for by its key, and by nobody else."""

# Without `from __future__ import annotations`: services are made per test, of classes that only exist in there.
import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic import BaseModel

from bus.envelope import Origin
from bus.metrics import MemoryMetrics
from bus.processing import Answer, Done, Item, Later
from bus.seams import NoFailpoints, SystemClock, Uuid7Ids
from eventstore.port import Store
from foldbus import (
    Command,
    Connection,
    Context,
    Decider,
    EffectContext,
    Event,
    Handler,
    Key,
    Service,
    handling,
)
from foldbus.worker import command_processor
from tests.eventstore.stores import NOON
from tests.stories.pairs import Pair, eventually, unique

ids = Uuid7Ids()


class Call(Command[None], type="shop.call.v1"):
    who: Key[str]
    n: int = 0


class Count(Command[None], type="shop.count.v1"):
    who: Key[str]


class Counted(Event, type="shop.counted.v1"):
    who: Key[str]


class Total(BaseModel, frozen=True):
    n: int = 0


def evolve(total: Total, event: Counted) -> Total:
    return Total(n=total.n + 1)


def decide(total: Total, command: Count) -> list[Counted]:
    return [Counted(who=command.who)]


totals = Decider("total", initial=Total(), decide=decide, evolve=evolve)


@dataclass
class World:
    """What was called. Calls for `slow` go on when the test lets them."""

    called: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    slow: int | None = None
    """A batch's moment begins when no more than so many of its keys are still at work; None: at once."""

    async def call(self, who: str, n: int) -> None:
        self.called.append((who, n))
        if who == "slow":
            await self.go_on.wait()
            if self.error is not None:
                raise self.error

    def processor(self, store: Store, *, moment_s: float | None = 0.1, **options: Any) -> Any:
        async def call(command: Call, ctx: EffectContext) -> None:
            await self.call(command.who, command.n)

        service = Service("shop", deciders=[totals], handlers=[Handler(call, effect=True, **options)])
        broker: Any = type("_Broker", (), {"max_bytes": 1_000_000})()
        connection = Connection(
            service, store=store, transport=broker, clock=SystemClock(), ids=ids, metrics=MemoryMetrics(),
            failpoint=NoFailpoints(),
        )  # fmt: skip
        self.codec = service.codec
        made: Any = command_processor(connection, moment_s=moment_s)
        wait = made._wait

        async def patient(tasks: Collection[asyncio.Task[Any]]) -> None:
            async with asyncio.timeout(30):
                while self.slow is not None and sum(not task.done() for task in tasks) > self.slow:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            await wait(tasks)

        made._wait = patient
        return made

    def item(self, message: Any) -> Item:
        return Item(
            self.codec.encode(message, Origin("front", ids.new(), NOON, ids.new()), topic="shop.commands"), None
        )


def kinds(answers: Any) -> list[str]:
    return [type(answer).__name__ for answer in answers]


async def over(answer: Answer) -> str:
    assert isinstance(answer, Later)
    async with asyncio.timeout(30):
        return type(await answer.result).__name__


async def test_the_rest_of_the_batch_is_answered_and_what_is_behind_it_is_not_tried(store: Store) -> None:
    world = World(slow=1)
    processor = world.processor(store)
    batch = [
        world.item(one)
        for one in (Call(who="slow"), Call(who="a"), Count(who="b"), Call(who="slow", n=1), Count(who="slow"))
    ]
    first, *others = await processor.process(batch, {("shop.commands", 0): 7})
    assert kinds(others) == ["Done", "Done", "Again", "Again"]
    assert await store.watermarks("shop") == {("shop.commands", 0): 7}
    world.go_on.set()
    assert await over(first) == "Done"
    assert sorted(world.called) == [("a", 0), ("slow", 0)]
    world.slow = 0
    assert kinds(await processor.process(batch[3:], {})) == ["Done", "Done"]


async def test_a_late_failure_is_that_messages_own(store: Store) -> None:
    world = World(error=RuntimeError("no"), slow=1)
    processor = world.processor(store)
    first, second = await processor.process([world.item(Call(who=who)) for who in ("slow", "a")], {})
    world.go_on.set()
    assert (await over(first), type(second).__name__) == ("Failed", "Done")


async def test_whoever_executes_waits_for_it(store: Store) -> None:
    world = World()
    processor = world.processor(store, moment_s=None)
    waiting = asyncio.create_task(processor.process([world.item(Call(who="slow"))], {}))
    done, _ = await asyncio.wait({waiting}, timeout=0.2)
    assert not done
    world.go_on.set()
    assert kinds(await waiting) == ["Done"]


class Held:
    taking = True


async def test_what_waits_for_its_turn_when_its_partition_goes_is_not_begun(store: Store) -> None:
    world, held = World(), Held()
    processor = world.processor(store, at_once=1)
    batch = [world.item(Call(who=who)) for who in ("slow", "a")]
    batch[1].held = held
    first, second = await processor.process(batch, {})
    held.taking = False
    world.go_on.set()
    assert [await over(first), await over(second)] == ["Done", "Again"]
    assert world.called == [("slow", 0)]


async def test_no_more_is_taken_up_than_soon_gets_its_turn(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handling, "AHEAD", 2)
    world = World()
    processor = world.processor(store, at_once=1)
    first, second = await processor.process([world.item(Call(who=who)) for who in ("slow", "a")], {})
    assert kinds([first, second]) == ["Later", "Later"]
    third = asyncio.create_task(processor.process([world.item(Call(who="b"))], {}))
    done, _ = await asyncio.wait({third}, timeout=1.0)
    assert not done, "two wait already"
    world.go_on.set()
    (last,) = await third
    assert [await over(first), await over(second)] == ["Done", "Done"]
    assert isinstance(last, Done) or await over(last) == "Done"


async def test_who_is_cancelled_with_a_batch_in_hand_calls_nobody_any_more(store: Store) -> None:
    world = World()
    processor = world.processor(store, moment_s=None, at_once=1)
    batch = [world.item(Call(who=who)) for who in ("slow", "a")]
    working = asyncio.create_task(processor.process(batch, {}))
    async with asyncio.timeout(30):
        while not world.called:  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    world.go_on.set()
    assert world.called == [("slow", 0)]
    assert isinstance((await processor.process(batch[1:], {}))[0], Done)


@pytest.mark.parametrize("delivery", ["exactly-once", "at-least-once"])
async def test_in_a_service_that_runs_one_slow_key_holds_up_nobody(pair: Pair, delivery: str) -> None:
    """Three hundred others go by, in several batches, and the slow one's successors come after it, in order."""
    name = unique("slow")
    seen: list[tuple[str, int]] = []
    go_on = asyncio.Event()

    class Said(Event, type=f"{name}.said.v1"):
        who: Key[str]
        n: int

    async def note(event: Said, ctx: Context) -> None:
        if event.who == "slow" and event.n == 0:
            await go_on.wait()
        await ctx.sql()
        seen.append((event.who, event.n))

    service = Service(name, handlers=[Handler(note, delivery=delivery)], partitions=2)  # type: ignore[arg-type]
    async with pair.connect(service) as connection:
        for n in range(3):
            async with connection.unit() as unit:
                unit.publish(Said(who="slow", n=n))
                for k in range(100):
                    unit.publish(Said(who=f"k{k}", n=n))
        await eventually(lambda: asyncio.sleep(0, len(seen)), lambda found: found == 300)
        assert "slow" not in dict(seen)
        go_on.set()
        await eventually(lambda: asyncio.sleep(0, len(seen)), lambda found: found == 303)
    for who in ("slow", *(f"k{k}" for k in range(100))):
        assert [n for one, n in seen if one == who] == [0, 1, 2]
