"""Who holds, as a service says it; and split events behind a parked part."""

# Without `from __future__ import annotations`: services are made per test, of classes that only exist in there.
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from bus.seams import Uuid7Ids
from eventstore.port import ClaimState
from foldbus import BadService, Connection, Context, Event, Handler, Key, SagaRun, Service, saga, split_event
from foldbus.cli.describe import document
from foldbus.delivery import AT_LEAST_ONCE
from foldbus.parking import ParkSettings
from foldbus.redriving import Became, Redriver
from foldbus.settings import Settings
from tests.foldbus.parking_world import BRIEF, PATIENT, booked, ledger, letters, parked, tables, waiting
from tests.foldbus.test_handlers import notes, pay
from tests.stories.pairs import Pair, eventually, unique


class Seen(Event, type="elsewhere.seen.v1"):
    name: Key[str]


async def look(event: Seen, ctx: Context) -> None: ...


async def look_often(event: Seen, ctx: Context) -> None: ...


async def unlisted(event: Seen, ctx: Context) -> None: ...


@saga("follow", version=1)
async def follow(run: SagaRun, seen: Seen) -> None: ...


@saga("stray", version=1)
async def stray(run: SagaRun, seen: Seen) -> None: ...


def service(*hold: Any) -> Service:
    return Service(
        "shop",
        deciders=[notes],
        handlers=[pay, look, Handler(look_often, delivery=AT_LEAST_ONCE)],
        sagas=[follow],
        hold=hold,
    )


def test_everything_skips_unless_the_service_says_so() -> None:
    plain = service()
    assert {group: plain.policy(group) for group in plain.groups} == dict.fromkeys(plain.groups, "skip")
    held = service("commands", look, follow, "replies")
    assert {group for group in held.groups if held.policy(group) == "hold"} == {
        "shop",
        "shop.handler.look",
        "shop.saga.follow",
        "shop.replies",
    }
    (described,) = [one for one in document(held)["groups"] if one["name"] == "shop.handler.look"]
    assert described["policy"] == "hold"


@pytest.mark.parametrize(
    ("one", "why"),
    [(pay, "share the queues"), (unlisted, "wanted one of"), (stray, "wanted one of"), ("answers", "wanted one of"),
     (look_often, "have no claims")],
)  # fmt: skip
def test_what_cannot_hold_is_refused_at_start_up(one: Any, why: str) -> None:
    with pytest.raises(BadService, match=why):
        service(one)


def test_a_service_without_commands_or_sagas_holds_none() -> None:
    for word in ("commands", "replies"):
        with pytest.raises(BadService, match="cannot hold"):
            Service("shop", handlers=[look], hold=[word])


@pytest.mark.parametrize("bad", [{"base_s": 0.0}, {"max_s": -1.0}, {"total_s": -0.1}, {"lease_s": float("inf")}])
def test_times_without_bounds_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="wanted a number"):
        ParkSettings(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("session", [{}, {"session_timeout_s": 3.0}])
def test_the_times_of_the_environment_reach_the_worker(session: dict[str, float]) -> None:
    given = Settings(park_base_s=2.0, park_max_s=30.0, park_total_s=0.0, **session)  # type: ignore[arg-type]
    assert given.worker().parking == ParkSettings(base_s=2.0, max_s=30.0, total_s=0.0)
    assert Settings(**session).worker().parking == ParkSettings()  # type: ignore[arg-type]


async def test_a_turn_lasts_longer_than_the_slowest_handler(pair: Pair) -> None:
    """Or its message would be given to a second worker while the first one is at it."""
    name = unique("shop")

    class Slow(Event, type=f"{name}.slow.v1"):
        name: Key[str]

    async def take_long(event: Slow, ctx: Context) -> None: ...

    slow = Service(name, handlers=[Handler(take_long, timeout_s=300.0)], partitions=1)
    async with pair.connect(slow, settings=PATIENT) as connection:
        assert connection.worker is not None
        assert connection.worker._parked._settings.lease_s > 300.0


def split_world(faults: list[str]) -> tuple[Service, Service, type[Event]]:
    """Who books the two parts of what somebody else closes; those named in `faults` fail, of type `paid`."""
    mine, theirs = unique("desk"), unique("shop")

    class Closed(Event, type=f"{theirs}.closed.v1"):
        name: Key[str]
        n: int

    class Paid(Event, type=f"{theirs}.paid.v1"):
        name: Key[str]
        n: int

    class Shipped(Event, type=f"{theirs}.shipped.v1"):
        name: Key[str]
        n: int

    async def book(event: Paid | Shipped, ctx: Context) -> None:
        if event.name in faults and isinstance(event, Paid):
            raise RuntimeError("a bug")
        await (await ctx.sql()).execute(booked.insert().values(name=event.name, n=event.n))

    def split(data: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        n = data["n"] * 2
        return [(f"{theirs}.paid.v1", {**data, "n": n}), (f"{theirs}.shipped.v1", {**data, "n": n + 1})]

    desk = Service(
        mine,
        handlers=[book],
        upcasters=[split_event(f"{theirs}.closed.v1", to=[f"{theirs}.paid.v1", f"{theirs}.shipped.v1"], by=split)],
        partitions=1,
    )
    return desk, Service(theirs, messages=[Closed], partitions=1), Closed


@asynccontextmanager
async def booking(pair: Pair, settings: Any, faults: list[str]) -> AsyncGenerator[tuple[Connection, Connection, Any]]:
    desk, shop, closed = split_world(faults)
    async with pair.connect(shop) as selling, pair.connect(desk, settings=settings) as its:
        async with its.store.transaction() as tx:
            await tx.sql.run_sync(tables.create_all)
        yield selling, its, closed


async def test_parts_of_a_split_event_keep_their_order_behind_one_that_is_parked(pair: Pair) -> None:
    """The first part fails and is parked; the second one, and the parts of the next event, wait behind it."""
    faults = ["a"]
    async with booking(pair, PATIENT, faults) as (selling, its, closed):
        async with selling.unit() as unit:
            for n in range(3):
                for name in "ab":
                    unit.publish(closed(name=name, n=n))
        (key,) = await waiting(its.store, 6)
        queue = await its.store.parking.queue(key.consumer, "a")
        assert [one.message.envelope.type.split(".")[1] for one in queue] == ["paid", "shipped"] * 3
        assert [one.failure is None for one in queue] == [False] + [True] * 5
        faults.clear()
        await parked(its.store, 0)
        wanted = {"a": list(range(6)), "b": list(range(6))}
        await eventually(lambda: ledger(its), lambda found: found == wanted)
        (standing,) = await its.store.examine(key.consumer, [(queue[0].message.envelope.id, "a")])
        assert standing.state is ClaimState.DONE


async def test_the_letter_of_a_part_that_was_parked_shows_the_record_that_came(pair: Pair) -> None:
    faults = ["a"]
    async with booking(pair, BRIEF, faults) as (selling, its, closed):
        async with selling.unit() as unit:
            unit.publish(closed(name="a", n=4))
        (letter,) = await letters(its.store, 1)
        assert (letter.type, letter.value) == (str(closed.type_name), b'{"name":"a","n":4}')
        await eventually(lambda: ledger(its), lambda found: found == {"a": [9]})  # the second part went on
        await parked(its.store, 0)
        faults.clear()
        redriver = Redriver(its.service, its.store, clock=its.clock, ids=Uuid7Ids(), metrics=its.metrics)
        assert (await redriver.redrive(redriver.plan(letter))).became is Became.REDRIVEN
        await eventually(lambda: ledger(its), lambda found: found == {"a": [9, 8]})
