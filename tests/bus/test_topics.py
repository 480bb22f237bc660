"""What a service declares against what the broker has: created when missing, refused when different, never changed."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields, replace
from datetime import datetime

import pytest

from bus.errors import MissingTopics, TopicMismatch
from bus.topics import DEAD_LETTER_ROOM_BYTES, Plan, apply, plan, service_topics, validate
from bus.transport import TopicAdmin, TopicSpec, TopicState, Transport
from tests.bus.transports import unique

EVENTS = TopicSpec("orders.events", partitions=12)


def as_declared(*specs: TopicSpec) -> dict[str, TopicState]:
    known = {field.name for field in fields(TopicState)}
    return {
        spec.name: TopicState(**{name: value for name, value in asdict(spec).items() if name in known})
        for spec in specs
    }


class MemoryAdmin:
    """Topics in a dictionary; `first` is what somebody else creates a moment before us."""

    def __init__(self, *topics: TopicState, first: Sequence[TopicState] = ()) -> None:
        self.topics = {topic.name: topic for topic in topics}
        self.created: list[str] = []
        self._first = first

    async def describe(self, names: Collection[str]) -> Mapping[str, TopicState]:
        return {name: self.topics[name] for name in names if name in self.topics}

    async def create(self, specs: Sequence[TopicSpec]) -> None:
        self.topics |= {topic.name: topic for topic in self._first}
        for spec in specs:
            if spec.name not in self.topics:
                self.created.append(spec.name)
                self.topics |= as_declared(spec)

    async def offsets(self, topic: str) -> Mapping[int, tuple[int, int]]:
        raise NotImplementedError

    async def offsets_at(self, topic: str, time: datetime) -> Mapping[int, int]:
        raise NotImplementedError

    async def committed(self, group: str, topics: Sequence[str]) -> Mapping[tuple[str, int], int]:
        raise NotImplementedError

    async def members(self, group: str) -> int:
        raise NotImplementedError

    async def place(self, group: str, offsets: Mapping[tuple[str, int], int]) -> None:
        raise NotImplementedError


def test_the_plan_creates_what_is_missing_and_leaves_alone_what_is_there() -> None:
    replies = TopicSpec("orders.replies")
    others = as_declared(TopicSpec("somebody.elses", partitions=1))
    assert plan([EVENTS, replies], as_declared(EVENTS) | others) == Plan(create=(replies,))
    assert plan([EVENTS, EVENTS], {}) == Plan(create=(EVENTS,))
    assert plan([], others) == Plan()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"partitions": 6}, "has 6 partitions, declared are 12; keys would move, so nothing was changed: declare part"),
        ({"partitions": 24}, "has 24 partitions, declared are 12"),
        ({"compact": True}, "is compacted, which drops .* set cleanup.policy=delete"),
        ({"retention_s": 3600.0}, "keeps messages for 3600 s, declared is for ever: raise retention.ms"),
        ({"max_bytes": 500}, "up to 500 bytes, declared are 1000000: raise max.message.bytes"),
    ],
)
def test_a_topic_that_is_not_as_declared_is_told_with_what_to_do(change: Mapping[str, int], told: str) -> None:
    state = replace(as_declared(EVENTS)[EVENTS.name], **change)  # type: ignore[arg-type]
    made = plan([EVENTS], {EVENTS.name: state})
    assert made.create == ()
    (line,) = made.mismatches
    assert line.startswith("topic 'orders.events' ")
    assert re.search(told, line)


def test_keeping_longer_and_taking_more_than_declared_is_no_mismatch() -> None:
    inbox = TopicSpec("orders.inbox", retention_s=60.0, max_bytes=1000)
    for change in ({"retention_s": None}, {"retention_s": 61.0}, {"max_bytes": 1001}):
        state = replace(as_declared(inbox)[inbox.name], **change)
        assert plan([inbox], {inbox.name: state}) == Plan()
    assert plan([inbox], {inbox.name: replace(as_declared(inbox)[inbox.name], retention_s=59.0)}).mismatches


def test_one_name_declared_in_two_ways_is_refused() -> None:
    with pytest.raises(TopicMismatch, match="declared twice and differently"):
        plan([EVENTS, replace(EVENTS, partitions=3)], {})


async def test_apply_creates_once() -> None:
    admin: TopicAdmin = MemoryAdmin()
    assert (await apply(admin, [EVENTS])).create == (EVENTS,)
    assert (await apply(admin, [EVENTS])) == Plan()
    await validate(admin, [EVENTS])


async def test_apply_creates_nothing_when_anything_mismatches() -> None:
    admin = MemoryAdmin(TopicState("orders.events", partitions=6))
    with pytest.raises(TopicMismatch, match="has 6 partitions"):
        await apply(admin, [TopicSpec("orders.replies"), EVENTS])
    assert admin.created == []


async def test_apply_sees_that_somebody_else_was_first_with_another_declaration() -> None:
    admin = MemoryAdmin(first=[TopicState("orders.events", partitions=6)])
    with pytest.raises(TopicMismatch, match="has 6 partitions"):
        await apply(admin, [EVENTS])


async def test_validate_names_what_is_missing_and_creates_nothing() -> None:
    admin = MemoryAdmin()
    with pytest.raises(MissingTopics) as caught:
        await validate(admin, service_topics("orders"))
    assert caught.value.names == (
        "orders.commands",
        "orders.dlq",
        "orders.events",
        "orders.inbox",
        "orders.replies",
    )
    assert admin.created == []


async def test_validate_refuses_another_partition_count() -> None:
    with pytest.raises(TopicMismatch, match="has 6 partitions, declared are 12"):
        await validate(MemoryAdmin(TopicState("orders.events", partitions=6)), [EVENTS])


def test_a_services_topics_keep_everything_but_the_inbox() -> None:
    topics = {spec.name.removeprefix("orders."): spec for spec in service_topics("orders", partitions=8)}
    assert topics.keys() == {"commands", "events", "replies", "inbox", "dlq"}
    assert {name for name, spec in topics.items() if spec.retention_s is not None} == {"inbox"}
    assert {name: spec.partitions for name, spec in topics.items()} == {
        "commands": 8,
        "events": 8,
        "replies": 8,
        "inbox": 3,
        "dlq": 8,
    }
    assert topics["dlq"].max_bytes == topics["events"].max_bytes + DEAD_LETTER_ROOM_BYTES
    assert not any(spec.compact for spec in topics.values())
    assert {spec.partitions for spec in service_topics("orders", partitions=2)} == {2}


async def test_a_services_topics_are_applied_and_then_valid_on_every_transport(transport: Transport) -> None:
    topics = service_topics(unique("orders"), partitions=2)
    assert len((await apply(transport.admin, topics)).create) == 5
    await validate(transport.admin, topics)
    assert await apply(transport.admin, topics) == Plan()
    with pytest.raises(TopicMismatch, match="has 2 partitions, declared are 3"):
        await validate(transport.admin, [replace(topics[0], partitions=3)])


# --- topics of others, and overrides ---------------------------------------------------------------------------------

LEGACY = TopicSpec("legacy.customers", partitions=3, compact=True)


def test_topics_of_others_are_compared_and_never_created() -> None:
    assert plan([EVENTS], as_declared(EVENTS), foreign=[LEGACY]) == Plan(absent=("legacy.customers",))
    assert plan([EVENTS], as_declared(EVENTS, LEGACY), foreign=[LEGACY]) == Plan()
    grown = as_declared(EVENTS, replace(LEGACY, partitions=4))
    (line,) = plan([EVENTS], grown, foreign=[LEGACY]).mismatches
    assert line.startswith("topic 'legacy.customers' has 4 partitions, declared are 3")


def test_what_its_owner_declares_is_created_whoever_else_declares_it() -> None:
    assert plan([LEGACY], {}, foreign=[LEGACY]) == Plan(create=(LEGACY,))
    with pytest.raises(TopicMismatch, match="declared twice and differently"):
        plan([LEGACY], {}, foreign=[replace(LEGACY, partitions=4)])
    assert plan([LEGACY], {}, foreign=[replace(LEGACY, keyed=False)]) == Plan(create=(LEGACY,))


@pytest.mark.parametrize(("retention_s", "policy"), [(None, "compact"), (60.0, "compact,delete")])
def test_a_topic_that_should_be_compacted_and_is_not_is_told(retention_s: float | None, policy: str) -> None:
    spec = replace(LEGACY, retention_s=retention_s)
    (line,) = plan([], as_declared(replace(spec, compact=False)), foreign=[spec]).mismatches
    assert f"is not compacted, declared is one that is: set cleanup.policy={policy}," in line


async def test_a_service_starts_without_a_topic_of_others_and_not_with_another_one() -> None:
    admin = MemoryAdmin(*as_declared(EVENTS).values())
    await validate(admin, [EVENTS], [LEGACY])
    assert (await apply(admin, [EVENTS], [LEGACY])).absent == ("legacy.customers",)
    assert admin.created == []
    admin.topics |= as_declared(replace(LEGACY, partitions=4))
    for check in (validate, apply):
        with pytest.raises(TopicMismatch, match=r"'legacy\.customers' has 4 partitions, declared are 3"):
            await check(admin, [EVENTS], [LEGACY])


def test_a_declared_topic_stands_for_the_default_of_its_name_or_is_one_more() -> None:
    commands, more = TopicSpec("orders.commands", 2, retention_s=60.0), TopicSpec("orders.prices", 1, compact=True)
    topics = service_topics("orders", instead=[commands, more])
    assert [spec.name.removeprefix("orders.") for spec in topics] == [
        "commands", "events", "replies", "inbox", "dlq", "prices",
    ]  # fmt: skip
    assert (topics[0], topics[-1]) == (commands, more)
    assert topics[1] == TopicSpec("orders.events")
