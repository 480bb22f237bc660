"""Effects and breakers behind real buses: what whoever asks is told, what a saga does, what waits for a dependency."""

# Without `from __future__ import annotations`: services are made per test.
import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from pydantic import BaseModel

from bus.breaker import Breaker
from foldbus import (
    Command,
    Context,
    Decider,
    Died,
    EffectContext,
    Event,
    Handler,
    Key,
    OutcomeUnknown,
    SagaRun,
    Service,
    handler,
    saga,
)
from foldbus.parking import ParkSettings
from tests.stories.pairs import QUICK, Pair, eventually, unique

AT_ONCE = replace(QUICK, parking=ParkSettings(total_s=0))
"""What has failed its attempts is given up, not parked."""


@dataclass
class World:
    """What the bank was asked, and whether it answers."""

    asked: list[str] = field(default_factory=list)
    down: bool = False

    def ask(self, what: str) -> None:
        self.asked.append(what)
        if self.down:
            raise ConnectionError("the bank does not answer")


def payments(world: World) -> tuple[Service, dict[str, Any]]:
    name = unique("pay")

    class Charge(Command[None], type=f"{name}.charge.v1"):
        order: Key[str]

    class Refund(Command[None], type=f"{name}.refund.v1"):
        order: Key[str]

    class Reject(Command[None], type=f"{name}.reject.v1"):
        order: Key[str]

    @handler(effect=True)
    async def charge(command: Charge, ctx: EffectContext) -> None:
        world.ask(f"charge {command.order}")

    @handler(effect=True)
    async def refund(command: Refund, ctx: EffectContext) -> None:
        world.asked.append(f"refund {command.order}")

    async def reject(command: Reject, ctx: Context) -> None:
        raise RuntimeError("never")

    service = Service(name, handlers=[charge, refund, reject], partitions=2)
    return service, {one.__name__: one for one in (Charge, Refund, Reject)}


async def test_whoever_asked_for_what_was_given_up_is_told_that_nobody_knows(pair: Pair) -> None:
    """And of what certainly was not done, that it died. A second question brings the same answer, and no call."""
    world = World(down=True)
    service, classes = payments(world)
    async with pair.connect(service, settings=AT_ONCE) as connection:
        with pytest.raises(
            OutcomeUnknown, match=r"given up after its handler had begun to call outside.*the bank"
        ) as told:
            await connection.request(classes["Charge"](order="o-1"), timeout_s=40)
        assert len(world.asked) == QUICK.engine.attempts_max
        world.down = False
        with pytest.raises(OutcomeUnknown):
            await connection.request(classes["Charge"](order="o-1"), id=told.value.id, timeout_s=40)
        assert len(world.asked) == QUICK.engine.attempts_max
        with pytest.raises(Died):
            await connection.request(classes["Reject"](order="o-1"), timeout_s=40)


class State(BaseModel, frozen=True):
    n: int = 0


async def test_a_saga_undoes_a_step_of_which_nobody_knows(pair: Pair) -> None:
    world = World(down=True)
    service, classes = payments(world)
    mine = unique("orders")

    class Placed(Event, type=f"{mine}.placed.v1"):
        order: Key[str]

    class Place(Command[Placed], type=f"{mine}.place.v1"):
        order: Key[str]

    def evolve(state: State, event: Placed) -> State:
        return state

    def decide(state: State, command: Place) -> list[Placed]:
        return [Placed(order=command.order)]

    @saga("pay", version=1)
    async def pay(run: SagaRun, placed: Placed) -> None:
        await run.step(classes["Charge"](order=placed.order), undo=classes["Refund"](order=placed.order))

    orders = Service(
        mine, deciders=[Decider("order", initial=State(), evolve=evolve, decide=decide)], sagas=[pay], partitions=2
    )
    async with pair.connect(service, settings=AT_ONCE), pair.connect(orders, settings=AT_ONCE) as client:
        await client.request(Place(order="o-7"), timeout_s=40)

        async def refunds() -> list[str]:
            return [one for one in world.asked if one.startswith("refund")]

        await eventually(refunds, lambda found: found == ["refund o-7"])
        assert world.asked == ["charge o-7"] * QUICK.engine.attempts_max + ["refund o-7"]


async def test_a_subscription_waits_for_its_dependency_and_the_others_go_on(pair: Pair) -> None:
    """Its bank is down for longer than all attempts would last: there is no dead letter, nothing is lost, and each
    key is in order when it is back."""
    world, source, mine = World(down=True), unique("src"), unique("sub")
    went_on: list[str] = []

    class Said(Event, type=f"{source}.said.v1"):
        who: Key[str]
        n: int

    bank = Breaker("bank", counts=(ConnectionError,), failures=2, open_s=0.3, open_max_s=0.5)

    @handler(effect=True, breakers=[bank], at_once=2)
    async def bills(event: Said, ctx: EffectContext) -> None:
        world.ask(f"{event.who} {event.n}")

    async def counts(event: Said, ctx: Context) -> None:
        went_on.append(f"{event.who} {event.n}")

    speaker = Service(source, messages=[Said], partitions=2)
    listener = Service(mine, handlers=[bills, Handler(counts)], partitions=2)
    said = [(f"k{n % 7}", n) for n in range(70)]
    async with pair.connect(speaker) as speaking, pair.connect(listener, settings=AT_ONCE) as listening:
        async with speaking.unit() as unit:
            for who, n in said:
                unit.publish(Said(who=who, n=n))
        metrics: Any = listening.metrics

        async def probes() -> int:
            return int(metrics.total("foldbus_breaker_opened_total", breaker="bank"))

        async def others() -> int:
            return len(went_on)

        await eventually(others, lambda n: n == 70)
        opened = await eventually(probes, lambda n: n >= 5)
        # Before it opened it was asked by two at once and by who took the turn of the first; then by one at a time.
        assert len(world.asked) <= opened + 3, "it is asked for a probe now and then, not for each message"
        assert await listening.store.dead_letters() == []
        world.asked.clear()
        world.down = False

        async def asked() -> int:
            return len(world.asked)

        await eventually(asked, lambda n: n >= 70)
        assert sorted(world.asked) == sorted(f"{who} {n}" for who, n in said)
        for key in {who for who, _ in said}:
            mine_in_order = [int(one.split()[1]) for one in world.asked if one.startswith(f"{key} ")]
            assert mine_in_order == sorted(mine_in_order)
        assert metrics.total("foldbus_dead_letters_total") == 0
        assert metrics.total("foldbus_retried_total") <= 2, "attempts were counted while it was down"


async def test_a_slow_effect_holds_up_no_other_command(pair: Pair) -> None:
    """It is in its call until the others, which came behind it, are answered: with one lane nobody ever would be."""
    name, go_on = unique("slow"), asyncio.Event()

    class Wait(Command[None], type=f"{name}.wait.v1"):
        who: Key[str]

    class Quick(Command[None], type=f"{name}.quick.v1"):
        who: Key[str]

    inside = asyncio.Event()

    @handler(effect=True)
    async def wait(command: Wait, ctx: EffectContext) -> None:
        inside.set()
        await go_on.wait()

    async def quick(command: Quick, ctx: Context) -> None: ...

    service = Service(name, handlers=[wait, quick], partitions=2)
    async with pair.connect(service) as connection:
        slow = asyncio.create_task(connection.request(Wait(who="a"), timeout_s=60))
        await asyncio.wait_for(inside.wait(), 40)
        for who in "bcdefg":
            await connection.request(Quick(who=who), timeout_s=40)
        assert not slow.done()
        go_on.set()
        await slow
