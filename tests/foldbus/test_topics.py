"""What a service says of topics: its own otherwise than by default, and what it expects of those of others."""

# Without `from __future__ import annotations`: handlers are made of classes that only exist in the tests.
from dataclasses import replace
from typing import Any

import pytest

from bus.topics import DEAD_LETTER_ROOM_BYTES, service_topics
from bus.transport import TopicSpec
from foldbus import Context, Event, Key, Service
from foldbus.topics import BadTopics

LEGACY = TopicSpec("legacy.customers", 3, compact=True)
DEFAULT = {spec.name: spec for spec in service_topics("shop")}


class Changed(Event, type="legacy.changed.v1", topic="legacy.customers"):
    customer_id: Key[str]


class Deleted(Event, type="legacy.deleted.v1", topic="legacy.customers", deletes=True):
    customer_id: Key[str]


class AlsoDeleted(Event, type="legacy.also-deleted.v1", topic="legacy.customers", deletes=True):
    customer_id: Key[str]


async def on_change(event: Changed, ctx: Context) -> None: ...


async def on_delete(event: Deleted, ctx: Context) -> None: ...


async def on_delete_too(event: AlsoDeleted, ctx: Context) -> None: ...


def shop(*topics: TopicSpec, handlers: Any = (on_change,)) -> Service:
    return Service("shop", handlers=handlers, topics=topics)


def test_a_service_that_says_nothing_has_the_default_topics() -> None:
    service = shop()
    assert service.topics == service_topics("shop")
    assert (service.expected_topics, service.rules) == ((), {})


def test_own_topics_stand_for_the_defaults_and_those_of_others_are_only_expected() -> None:
    commands, prices = TopicSpec("shop.commands", 2, retention_s=60.0), TopicSpec("shop.prices", 1, compact=True)
    service = shop(commands, prices, LEGACY)
    assert {spec.name: spec for spec in service.topics} == DEFAULT | {"shop.commands": commands, "shop.prices": prices}
    assert service.expected_topics == (LEGACY,)


def test_another_services_events_can_be_expected_too() -> None:
    class Opened(Event, type="desk.opened.v1"):
        ticket: Key[str]

    async def note(event: Opened, ctx: Context) -> None: ...

    events = TopicSpec("desk.events", 6)
    assert shop(events, handlers=[note]).expected_topics == (events,)


@pytest.mark.parametrize(
    ("topics", "told"),
    [
        ([LEGACY, LEGACY], "declares topic 'legacy.customers' twice"),
        ([replace(LEGACY, partitions=0)], "with partitions=0, .* wanted numbers above 0"),
        ([replace(LEGACY, retention_s=0.0)], "retention_s=0.0; wanted numbers above 0"),
        ([replace(LEGACY, max_bytes=0)], "max_bytes=0"),
        ([TopicSpec("shop.events", compact=True)], "drops all but the last message of a key; wanted compact=False"),
        ([TopicSpec("shop.commands", keyed=False)], "every message there has one; wanted keyed=True"),
        ([TopicSpec("legacy.costumers")], "nothing here reads; wanted one of legacy.customers, or one of its own"),
        ([TopicSpec("shop.events", max_bytes=2_000_000)], "wanted max_bytes=2065536 or more"),
        ([TopicSpec("shop.dlq")], f"wanted max_bytes={1_000_000 + DEAD_LETTER_ROOM_BYTES} or more"),
    ],
)
def test_what_cannot_work_is_refused_when_the_service_is_made(topics: list[TopicSpec], told: str) -> None:
    with pytest.raises(BadTopics, match=told):
        shop(*topics)


def test_larger_events_are_fine_where_dead_letters_have_room_for_them() -> None:
    events = TopicSpec("shop.events", max_bytes=2_000_000)
    assert shop(events, replace(DEFAULT["shop.dlq"], max_bytes=2_000_000 + DEAD_LETTER_ROOM_BYTES))


def test_deletes_want_their_topic_declared_compacted() -> None:
    for topics in ([], [replace(LEGACY, compact=False)]):
        with pytest.raises(BadTopics, match=r"wanted topics=\[TopicSpec\('legacy.customers', compact=True, …\)\]"):
            shop(*topics, handlers=[on_change, on_delete])
    rule = shop(LEGACY, handlers=[on_change, on_delete]).rules["legacy.customers"]
    assert (rule.deletes, rule.compact, rule.keyed) == (Deleted, True, True)


def test_one_event_stands_for_the_deletes_of_a_topic() -> None:
    with pytest.raises(BadTopics, match=r"legacy\.also-deleted\.v1, legacy\.deleted\.v1 all stand for the deletes"):
        shop(LEGACY, handlers=[on_delete, on_delete_too])
