"""For how long claims are kept: what is refused, and what is forgotten."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from bus.metrics import MemoryMetrics
from bus.seams import SystemClock
from bus.transport import TopicSpec, TopicState
from eventstore.port import ClaimState
from foldbus import AT_LEAST_ONCE, Context, Event, Handler, Key, Service
from foldbus.retention import ClaimsTooShort, Forgetting, Keep, RetentionSettings, keep_of, refusals
from tests.eventstore.stores import CONSUMER, Backend
from tests.eventstore.test_inbox_conformance import HOUR, Aged, handled

READ = {"shop": ("shop.commands",), "shop.handler.mail": ("shop.events", "legacy.customers")}
WEEK = 7 * 86_400.0


def found(**retentions: float | None) -> dict[str, TopicState]:
    names = {"commands": "shop.commands", "events": "shop.events", "legacy": "legacy.customers"}
    return {names[name]: TopicState(names[name], 1, retention_s=kept) for name, kept in retentions.items()}


def test_claims_that_are_kept_for_ever_are_never_too_short() -> None:
    assert refusals(Keep({}), READ, found(commands=None, events=1e9)) == []


def test_a_topic_that_keeps_longer_than_claims_is_told_with_what_to_do() -> None:
    (line,) = refusals(Keep({"shop": 3600.0}), READ, found(commands=WEEK, events=None))
    assert line == (
        "group 'shop' forgets claims after 3600 s, but topic 'shop.commands' keeps messages for 604800 s: wanted "
        "keep_claims_s of at least 604800, or a shorter retention of the topic"
    )
    assert refusals(Keep({"shop": WEEK}), READ, found(commands=WEEK)) == []
    assert len(refusals(Keep({"shop": WEEK - 1}), READ, found(commands=WEEK))) == 1


def test_a_topic_that_keeps_for_ever_is_told_with_what_to_do() -> None:
    (line,) = refusals(Keep({"shop": 1e9}), READ, found(commands=None))
    assert "topic 'shop.commands' keeps messages for ever" in line
    assert "give the topic a retention, or leave the group out of keep_claims_s" in line


def test_every_topic_of_a_group_counts_and_those_that_are_not_there_do_not() -> None:
    keep = Keep({"shop.handler.mail": WEEK})
    assert len(refusals(keep, READ, found(events=WEEK + 1, legacy=None))) == 2
    assert refusals(keep, READ, found(events=WEEK)) == []
    assert refusals(keep, READ, {"shop.events": TopicSpec("shop.events", retention_s=WEEK)}) == []


def test_what_lingers_after_its_time_counts_too() -> None:
    state = TopicState("shop.commands", 1, retention_s=WEEK, lingers_s=3600.0)
    (line,) = refusals(Keep({"shop": WEEK}), READ, {"shop.commands": state})
    assert "and up to 3600 s longer: wanted keep_claims_s of at least 608400," in line
    assert refusals(Keep({"shop": WEEK + 3600}), READ, {"shop.commands": state}) == []


def test_one_number_is_for_all_groups_and_a_table_names_some() -> None:
    groups = tuple(READ)
    assert keep_of(None, None, groups, "shop") == Keep({})
    assert keep_of(60.0, 90.0, groups, "shop") == Keep({"shop": 60.0, "shop.handler.mail": 60.0}, 90.0)
    assert keep_of({"shop": 60.0}, None, groups, "shop") == Keep({"shop": 60.0})


@pytest.mark.parametrize(
    ("keep", "steps_s", "told"),
    [
        (
            {"shop.handler.fax": 60.0},
            None,
            "keeps claims of shop.handler.fax; its consumer groups that make any are shop, ",
        ),
        (0.0, None, "wanted a number above 0"),
        ({"shop": -1.0}, None, "shop is kept for -1.0 s"),
        (60.0, float("nan"), "keep_steps_s is kept for nan s"),
        (None, 60.0, "says nothing without keep_claims_s"),
    ],
)
def test_what_can_never_be_meant_is_refused_when_the_service_is_made(keep: Any, steps_s: Any, told: str) -> None:
    with pytest.raises(ClaimsTooShort, match=told):
        keep_of(keep, steps_s, tuple(READ), "shop")


def test_a_service_keeps_all_claims_unless_it_says_otherwise() -> None:
    class Done(Event, type="shop.done.v1"):
        thing: Key[str]

    async def mail(event: Done, ctx: Any) -> None: ...

    mail.__annotations__ = {"event": Done, "ctx": Context, "return": None}
    assert Service("shop", handlers=[mail]).keep.groups == {}
    assert Service("shop", handlers=[mail], keep_claims_s=60).keep.groups == {"shop.handler.mail": 60}


def test_a_handler_that_makes_no_claims_has_none_to_keep() -> None:
    class Seen(Event, type="shop.seen.v1"):
        thing: Key[str]

    async def watch(event: Seen, ctx: Context) -> None: ...

    watch.__annotations__ = {"event": Seen, "ctx": Context, "return": None}
    watching = Handler(watch, delivery=AT_LEAST_ONCE)
    assert Service("shop", handlers=[watching], keep_claims_s=60).keep.groups == {}
    with pytest.raises(ClaimsTooShort, match="its consumer groups that make any are none"):
        Service("shop", handlers=[watching], keep_claims_s={"shop.handler.watch": 60})


# --- forgetting ------------------------------------------------------------------------------------------------------


class Topics:
    """What the broker has, as a test says."""

    def __init__(self, *states: TopicState) -> None:
        self.states = {state.name: state for state in states}

    async def describe(self, names: Collection[str]) -> Mapping[str, TopicState]:
        return {name: self.states[name] for name in names if name in self.states}


def forgetting(store: Any, topics: Topics, *, metrics: MemoryMetrics | None = None, **keep: Any) -> Forgetting:
    admin: Any = topics
    return Forgetting(
        store,
        admin,
        Keep({CONSUMER: HOUR}, **keep),
        {CONSUMER: ("shop.commands",)},
        clock=SystemClock(),
        metrics=metrics or MemoryMetrics(),
        settings=RetentionSettings(batch=3, pause_s=0.0, settle_s=0.0, every_s=0.05, lease_ttl_s=60.0),
    )


HALF = TopicState("shop.commands", 1, retention_s=HOUR / 2)


async def test_a_pass_forgets_what_is_old_enough_in_pieces(store: Any, backend: Backend) -> None:
    aged, metrics = Aged(store, backend), MemoryMetrics()
    kept = [await handled(store, to="orders.replies") for _ in range(4)]  # more than a piece, and before all others
    old = [await handled(store) for _ in range(10)]
    await aged.pass_by(HOUR * 2)
    young = await handled(store)
    async with asyncio.timeout(20):
        assert await forgetting(store, Topics(HALF), metrics=metrics).once() == 10
    assert [await aged.state(id) for id in (old[0], old[-1], young, kept[0], kept[-1])] == [
        ClaimState.NEW, ClaimState.NEW, ClaimState.DONE, ClaimState.DONE, ClaimState.DONE,
    ]  # fmt: skip
    assert metrics.total("foldbus_claims_forgotten_total", consumer=CONSUMER) == 10
    assert await forgetting(store, Topics(HALF)).once() == 0


async def test_retention_that_was_raised_while_the_worker_runs_stops_the_forgetting_loudly(
    store: Any, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    aged, metrics, topics = Aged(store, backend), MemoryMetrics(), Topics(HALF)
    its = forgetting(store, topics, metrics=metrics)
    id = await handled(store)
    await aged.pass_by(HOUR * 2)
    topics.states[HALF.name] = TopicState(HALF.name, 1, retention_s=None)
    with caplog.at_level(logging.ERROR):
        assert await its.once() == 0
    assert await aged.state(id) is ClaimState.DONE
    assert "claims of shop.commands are not forgotten: group 'shop.commands' forgets claims after 3600 s" in caplog.text
    assert metrics.total("foldbus_claims_kept_total") == 1
    topics.states[HALF.name] = HALF
    assert await its.once() == 1


async def test_one_worker_at_a_time_forgets_and_another_follows(store: Any, twin: Any, backend: Backend) -> None:
    aged = Aged(store, backend)
    first, second = forgetting(store, Topics(HALF)), forgetting(twin, Topics(HALF))
    running = asyncio.create_task(first.run())
    id = await handled(store)
    await aged.pass_by(HOUR * 2)
    async with asyncio.timeout(45):
        while await aged.state(id) is not ClaimState.NEW:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        follower = asyncio.create_task(second.run())
        assert set(await store.leases.held()) == {"inbox"}
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        again = await handled(store)
        await aged.pass_by(HOUR * 2)
        while await aged.state(again) is not ClaimState.NEW:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    follower.cancel()
    await asyncio.gather(follower, return_exceptions=True)


async def test_a_pass_ends_when_its_lease_is_lost(store: Any, backend: Backend) -> None:
    aged = Aged(store, backend)
    await handled(store)
    await aged.pass_by(HOUR * 2)
    leadership: Any = SimpleNamespace(lost=True)
    assert await forgetting(store, Topics(HALF)).once(leadership) == 0
