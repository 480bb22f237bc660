"""What an operator asks of a transport, on every transport: placing a group's offsets, its members, offsets by time."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from bus.errors import BusError, GroupInUse, MissingTopics
from bus.transport import Assignment, Delivery, PollSettings, TopicSpec, Transport
from tests.bus.transports import (
    Child,
    Recorder,
    Rig,
    eventually,
    member,
    new_topic,
    open_transport,
    put,
    unique,
    values,
)


async def test_placed_offsets_are_where_a_group_reads_on(transport: Transport) -> None:
    topic, group = await new_topic(transport, partitions=2), unique("group")
    await put(transport, topic, "a", "b", "c", partition=0)
    await put(transport, topic, "x", "y", partition=1)
    await transport.admin.place(group, {(topic, 0): 2, (topic, 1): 1})
    assert await transport.admin.committed(group, [topic]) == {(topic, 0): 2, (topic, 1): 1}
    async with member(transport, group, topic) as this:
        await eventually(lambda: len(this.records) == 2, what="what is above the placed offsets")
        assert sorted(values(this.records)) == ["c", "y"]


async def test_a_group_is_placed_backwards_too(transport: Transport) -> None:
    topic, group = await new_topic(transport, partitions=1), unique("group")
    await put(transport, topic, "a", "b", "c")
    async with member(transport, group, topic) as this:
        await eventually(lambda: len(this.records) == 3, what="everything")
        await this.consumer.commit({this.part(0): 3})
    await transport.admin.place(group, {(topic, 0): 1})
    async with member(transport, group, topic) as again:
        await eventually(lambda: len(again.records) == 2, what="the last two once more")
        assert values(again.records) == ["b", "c"]


async def test_a_group_with_a_member_is_not_placed_and_keeps_its_offsets(transport: Transport) -> None:
    topic, group = await new_topic(transport, partitions=1), unique("group")
    await put(transport, topic, "a", "b")
    async with member(transport, group, topic) as this:
        await eventually(lambda: len(this.records) == 2, what="everything")
        await this.consumer.commit({this.part(0): 2})
        with pytest.raises(GroupInUse, match=group):
            await transport.admin.place(group, {(topic, 0): 0})
        assert await transport.admin.members(group) == 1
        assert await transport.admin.committed(group, [topic]) == {(topic, 0): 2}
        await this.consumer.commit({this.part(0): 2})  # not disturbed either
    assert await transport.admin.members(group) == 0
    await transport.admin.place(group, {(topic, 0): 0})
    assert await transport.admin.committed(group, [topic]) == {(topic, 0): 0}


async def test_only_the_partitions_named_are_placed(transport: Transport) -> None:
    topic, group = await new_topic(transport, partitions=3), unique("group")
    await transport.admin.place(group, {(topic, 0): 0, (topic, 2): 0})
    await put(transport, topic, "a", partition=2)
    await transport.admin.place(group, {(topic, 2): 1})
    assert await transport.admin.committed(group, [topic]) == {(topic, 0): 0, (topic, 2): 1}
    await transport.admin.place(group, {})
    assert await transport.admin.members(group) == 0


async def test_a_place_in_a_topic_or_partition_that_is_not_there_is_refused(transport: Transport) -> None:
    topic, group = await new_topic(transport, partitions=1), unique("group")
    with pytest.raises(MissingTopics):
        await transport.admin.place(group, {("no-such-topic", 0): 1})
    with pytest.raises(BusError, match="no number 1"):
        await transport.admin.place(group, {(topic, 0): 0, (topic, 1): 0})
    assert await transport.admin.committed(group, [topic]) == {}


async def test_a_killed_member_counts_until_its_session_ends(mortal: Rig, transport: Transport) -> None:
    topic, group = await new_topic(transport, partitions=1), unique("group")
    async with Child.start(mortal, group=group, topic=topic) as child:
        await eventually(lambda: child.partitions() == {0}, what="the child has the partition")
        child.process.kill()
        await child.process.wait()
        async with asyncio.timeout(40):
            while True:
                try:
                    await transport.admin.place(group, {(topic, 0): 0})
                    break
                except GroupInUse:
                    await asyncio.sleep(0.1)
    assert await transport.admin.members(group) == 0


async def test_offsets_by_time_are_the_first_that_are_not_older(transport: Transport) -> None:
    topic = await new_topic(transport, partitions=2)
    before = datetime.now(UTC) - timedelta(seconds=5)
    await put(transport, topic, "a", "b", partition=0)
    async with transport.tail(topic, start="begin") as tail:
        found: list[Delivery] = []
        while len(found) < 2:
            found += await tail.poll(max_records=10, timeout_s=0.2)
    while datetime.now(UTC) <= found[-1].time + timedelta(milliseconds=5):  # noqa: ASYNC110 - it is the clock
        await asyncio.sleep(0.002)
    later = datetime.now(UTC)
    await put(transport, topic, "c", partition=0)
    assert await transport.admin.offsets_at(topic, before) == {0: 0, 1: 0}
    assert await transport.admin.offsets_at(topic, found[0].time) == {0: 0, 1: 0}
    assert await transport.admin.offsets_at(topic, later) == {0: 2, 1: 0}
    assert await transport.admin.offsets_at(topic, later + timedelta(hours=1)) == {0: 3, 1: 0}
    with pytest.raises(MissingTopics):
        await transport.admin.offsets_at("no-such-topic", later)


async def test_offsets_by_time_begin_where_the_topic_does(rig: Rig, transport: Transport) -> None:
    topic = await new_topic(transport, partitions=1)
    await put(transport, topic, "a", "b", "c")
    await rig.forget_before(transport, topic, 0, 2)
    assert await transport.admin.offsets_at(topic, datetime(2020, 1, 1, tzinfo=UTC)) == {0: 2}


async def test_a_group_that_there_is_not_has_no_members(transport: Transport) -> None:
    assert await transport.admin.members(unique("nobody")) == 0


async def test_what_is_declared_of_age_and_compaction_is_what_is_described(transport: Transport) -> None:
    week = 7 * 86_400.0
    specs = [
        TopicSpec(unique("kept"), 1),
        TopicSpec(unique("week"), 2, retention_s=week, max_bytes=5000),
        TopicSpec(unique("compact"), 1, compact=True),
        TopicSpec(unique("both"), 1, retention_s=week, compact=True),
    ]
    await transport.admin.create(specs)
    found = await transport.admin.describe([spec.name for spec in specs])
    assert [(one.retention_s, one.compact) for one in (found[spec.name] for spec in specs)] == [
        (None, False),
        (week, False),
        (None, True),
        (week, True),
    ]
    assert found[specs[1].name].partitions == 2
    assert found[specs[1].name].max_bytes == 5000
    # Old messages go a segment at a time, and a segment lasts but a part of the retention.
    assert 0 < found[specs[1].name].lingers_s < week / 2


async def test_a_member_that_reads_elsewhere_hears_nothing_of_it(transport: Transport) -> None:
    one, other = await new_topic(transport, partitions=1), await new_topic(transport, partitions=1)
    groups = unique("a"), unique("b")
    listener = Recorder()
    async with member(transport, groups[0], one, listener) as this:
        await eventually(lambda: this.listener.partitions == {0}, what="its partition")
        await transport.admin.place(groups[1], {(other, 0): 0})
        await put(transport, one, "a")
        await eventually(lambda: len(this.records) == 1, what="its record")
    assert [part for part in listener.assigned_parts if part.topic != one] == []
    assert {Assignment(part.topic, part.partition) for part in listener.assigned_parts} == {Assignment(one, 0)}


async def test_a_topic_that_is_only_compacted_keeps_its_messages_whatever_its_retention_says(kafka: str) -> None:
    """As others make them: a broker gives every topic a retention, and applies it only where it deletes."""
    from aiokafka.admin import AIOKafkaAdminClient, NewTopic

    name = unique("theirs")
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, 1, 1, topic_configs={"cleanup.policy": "compact"})])
    finally:
        await admin.close()
    async with open_transport("kafka", kafka, PollSettings()) as transport:
        await transport.admin.create([TopicSpec(name, 1)])  # is there, and can be used now
        state = (await transport.admin.describe([name]))[name]
    assert (state.retention_s, state.compact) == (None, True)
