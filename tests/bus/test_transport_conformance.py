"""Each promise of `bus/transport.py`, on every transport."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from bus.errors import Fenced, MissingTopics, OffsetOutOfRange
from bus.partitioner import partition_of
from bus.transport import Ack, Assignment, Failed, Outgoing, TopicSpec, TopicState, Transport
from tests.bus.transports import (
    Child,
    Recorder,
    Rig,
    all_partitions,
    eventually,
    member,
    new_topic,
    put,
    take,
    unique,
    values,
)

# --- publish ---------------------------------------------------------------------------------------------------------


async def test_acks_come_in_the_order_of_the_batch_with_offsets_rising_by_one(transport: Transport) -> None:
    topic = await new_topic(transport, partitions=3)
    batch = [Outgoing(topic, b"k", str(n).encode(), partition=n % 3) for n in range(30)]

    first = await transport.publish(batch)
    second = await transport.publish(batch)

    assert first == [Ack(n % 3, n // 3) for n in range(30)]
    assert second == [Ack(n % 3, 10 + n // 3) for n in range(30)]


async def test_an_empty_batch_is_answered_with_nothing(transport: Transport) -> None:
    assert list(await transport.publish([])) == []


async def test_records_of_one_partition_are_read_in_the_order_of_calls_and_of_batches(transport: Transport) -> None:
    topic = await new_topic(transport, partitions=2)
    async with transport.tail(topic, start="begin") as reader:
        for call in range(10):
            await put(transport, topic, *(f"{call}.{n}" for n in range(50)), partition=call % 2)
        records = await take(reader, 500)
    for partition in range(2):
        of_it = [r for r in records if r.partition == partition]
        assert [r.offset for r in of_it] == list(range(250))
        assert values(of_it) == [f"{call}.{n}" for call in range(partition, 10, 2) for n in range(50)]


@pytest.mark.parametrize("kind", ["member", "tail"])
async def test_a_poll_that_waits_returns_when_it_is_woken_and_loses_nothing(transport: Transport, kind: str) -> None:
    topic = await new_topic(transport, partitions=1)
    reading = (
        transport.tail(topic, start="begin")
        if kind == "tail"
        else transport.consume(unique("group"), [topic], listener=Recorder())
    )
    async with reading as consumer:
        await put(transport, topic, "first")
        await take(consumer, 1)
        for turn in range(3):
            waiting = asyncio.create_task(consumer.poll(max_records=1, timeout_s=600.0))
            await asyncio.sleep(0.05 * turn)  # told before it waits, and while it does
            consumer.wake()
            async with asyncio.timeout(40):
                assert list(await waiting) == []
        consumer.wake()
        async with asyncio.timeout(40):
            assert list(await consumer.poll(max_records=1, timeout_s=600.0)) == []
        await put(transport, topic, "second")
        assert values(await take(consumer, 1)) == ["second"]


async def test_publishes_at_once_lose_nothing_and_keep_the_order_within_each(transport: Transport) -> None:
    topic = await new_topic(transport, partitions=1)
    async with transport.tail(topic, start="begin") as reader:
        await asyncio.gather(*(put(transport, topic, *(f"{call}.{n}" for n in range(20))) for call in range(30)))
        read = values(await take(reader, 600))
    for call in range(30):
        assert [v for v in read if v.startswith(f"{call}.")] == [f"{call}.{n}" for n in range(20)]


async def test_a_key_goes_to_the_partition_that_javas_partitioner_gives_it(transport: Transport) -> None:
    topic = await new_topic(transport, partitions=7)
    keys = [f"order-{n}".encode() for n in range(100)]
    answers = await transport.publish([Outgoing(topic, key, b"") for key in keys])
    assert [a.partition for a in answers if isinstance(a, Ack)] == [partition_of(key, 7) for key in keys]


async def test_a_record_without_a_key_goes_to_some_partition(transport: Transport) -> None:
    topic = await new_topic(transport, partitions=3)
    answers = await transport.publish([Outgoing(topic, None, b"v") for _ in range(6)])
    assert all(isinstance(a, Ack) and a.partition in range(3) for a in answers)


async def test_what_is_read_is_what_was_published_to_the_byte(transport: Transport) -> None:
    topic = await new_topic(transport, partitions=1)
    headers = (
        ("ce_type", b"orders.order-placed.v1"),
        ("twice", b"1"),
        ("", b"without a name"),
        ("twice", b"2"),
        ("empty", b""),
        ("naïve €", bytes(range(256))),
    )
    batch = [
        Outgoing(topic, b"k", b"value", headers, 0),
        Outgoing(topic, b"k", None, headers[:1], 0),  # a tombstone
        Outgoing(topic, b"k", b"", (), 0),  # not a tombstone
        Outgoing(topic, None, bytes(range(256)) * 40, (), 0),
        Outgoing(topic, b"", b"empty key", (), 0),
    ]
    before = datetime.now(UTC)
    await transport.publish(batch)
    async with transport.tail(topic, start="begin") as reader:
        records = await take(reader, len(batch))

    assert [(r.key, r.value, tuple(r.headers)) for r in records] == [(o.key, o.value, o.headers) for o in batch]
    assert all(before - timedelta(seconds=2) < r.time < datetime.now(UTC) + timedelta(seconds=2) for r in records)
    assert records[0].assignment == Assignment(topic, 0, 0)


@pytest.mark.parametrize("size", [20_000, 30_000])  # with its key one byte too many, and far too many
async def test_a_record_too_large_for_its_topic_fails_alone(transport: Transport, size: int) -> None:
    topic = await new_topic(transport, partitions=1, max_bytes=20_000)
    answers = await transport.publish(
        [
            Outgoing(topic, b"k", b"before", partition=0),
            Outgoing(topic, b"k", os.urandom(size), partition=0),
            Outgoing(topic, b"k", b"after", partition=0),
        ]
    )
    assert isinstance(answers[0], Ack)
    assert isinstance(answers[1], Failed)
    async with transport.tail(topic, start="begin") as reader:
        # The last one was either truly written after the first, or is not acknowledged and may be sent again.
        written = [n for n, answer in enumerate(answers) if isinstance(answer, Ack)]
        assert values(await take(reader, len(written))) == [["before", "", "after"][n] for n in written]
        if 2 not in written:
            await put(transport, topic, "after")
            assert values(await take(reader, 1)) == ["after"]


async def test_an_unknown_topic_fails_its_records_and_no_others(transport: Transport) -> None:
    topic = await new_topic(transport)
    missing = unique("missing")
    answers = await transport.publish(
        [Outgoing(topic, b"a", b""), Outgoing(missing, b"a", b""), Outgoing(topic, b"b", b"")]
    )
    assert isinstance(answers[0], Ack)
    assert isinstance(answers[2], Ack)
    assert isinstance(answers[1], Failed)
    assert isinstance(answers[1].error, MissingTopics)
    assert answers[1].error.names == (missing,)


async def test_a_partition_that_the_topic_does_not_have_fails_its_record_and_no_others(transport: Transport) -> None:
    topic = await new_topic(transport, partitions=2)
    answers = await transport.publish(
        [Outgoing(topic, b"a", b"", partition=2), Outgoing(topic, b"a", b"", partition=1)]
    )
    assert isinstance(answers[0], Failed)
    assert answers[1] == Ack(1, 0)


# --- groups ----------------------------------------------------------------------------------------------------------


async def test_one_groups_partitions_are_shared_out_and_each_has_one_owner(transport: Transport, rig: Rig) -> None:
    topic, group = await new_topic(transport, partitions=6), unique("group")
    async with rig.open() as other, member(transport, group, topic) as a, member(other, group, topic) as b:
        await eventually(
            lambda: all_partitions([a, b]) == [0, 1, 2, 3, 4, 5] and len(a.listener.held) == len(b.listener.held) == 3,
            what="3 partitions each",
        )
        for partition in range(6):
            await put(transport, topic, f"for {partition}", partition=partition)
        await eventually(lambda: len(a.records) + len(b.records) == 6, what="every record, once")
        for one in (a, b):
            assert {r.partition for r in one.records} == one.listener.partitions
            assert {r.assignment for r in one.records} == one.listener.held


async def test_the_old_owner_drains_and_commits_before_the_new_one_starts(transport: Transport, rig: Rig) -> None:
    """The first member is slow to let go: it works on inside `revoked`, then commits there. The second must not be
    assigned those partitions before, and starts at that commit."""
    topic, group = await new_topic(transport, partitions=4), unique("group")
    for partition in range(4):
        await put(transport, topic, *(f"{partition}.{n}" for n in range(10)), partition=partition)
    journal: list[str] = []

    async def drain(parts: Sequence[Assignment], lost: bool) -> None:
        assert not lost
        journal.extend(f"a drains {part.partition}" for part in parts)
        await asyncio.sleep(0.4)
        await a.consumer.commit(dict.fromkeys(parts, 7))

    async with member(transport, group, topic, Recorder(journal=journal, drain=drain)) as a:
        await eventually(lambda: len(a.records) == 40, what="the first member reads all")
        async with rig.open() as other, member(other, group, topic, Recorder(journal=journal, name="b")) as b:
            await eventually(lambda: len(b.listener.held) == 2, what="the second member has its half")
            await eventually(lambda: all_partitions([a, b]) == [0, 1, 2, 3], what="all in hand")
            await eventually(lambda: len(b.records) == 6, what="what the first one left")
            a.listener.drain = None
            for part in b.listener.held:
                handed_over = [entry for entry in journal if entry.endswith(f" {part.partition}")]
                assert handed_over[1:4] == [
                    f"{'a drains'} {part.partition}",
                    f"a - {part.partition}",
                    f"b + {part.partition}",
                ]
                assert b.listener.committed[part] == 7
                assert [r.offset for r in b.records if r.assignment == part] == [7, 8, 9]


async def test_a_member_for_whom_nothing_is_left_is_told_so_and_takes_over_when_there_is(
    transport: Transport, rig: Rig
) -> None:
    topic, group = await new_topic(transport, partitions=1), unique("group")
    async with rig.open() as other, member(other, group, topic, Recorder(name="b")) as second:
        async with member(transport, group, topic) as first:
            both = (first, second)
            await eventually(
                lambda: (
                    all_partitions(both) == [0]
                    and [m.listener.stood_by > 0 for m in both if not m.listener.held] == [True]
                ),
                what="one has it, the other knows that it stands by",
            )
        await eventually(lambda: second.listener.partitions == {0}, what="the one that stays has it")


async def test_the_epoch_of_a_partition_rises_with_each_owner(transport: Transport, rig: Rig) -> None:
    topic, group = await new_topic(transport, partitions=1), unique("group")
    epochs: list[int] = []
    for _ in range(3):
        async with rig.open() as each, member(each, group, topic) as owner:
            await eventually(lambda owner=owner: owner.listener.partitions == {0}, what="the partition")
            epochs.append(owner.part(0).epoch)
    assert epochs[0] < epochs[1] < epochs[2]


async def test_a_clean_leave_revokes_takes_a_last_commit_and_hands_over_at_once(transport: Transport, rig: Rig) -> None:
    topic, group = await new_topic(transport, partitions=4), unique("group")
    for partition in range(4):
        await put(transport, topic, "0", "1", "2", partition=partition)
    async with rig.open() as other, member(other, group, topic, Recorder(name="b")) as b:
        async with member(transport, group, topic) as a:
            await eventually(lambda: len(a.listener.held) == len(b.listener.held) == 2, what="2 partitions each")

            async def drain(parts: Sequence[Assignment], lost: bool) -> None:
                assert not lost
                await a.consumer.commit(dict.fromkeys(parts, 3))

            had = sorted(a.listener.partitions)
            a.listener.drain = drain
        left = time.monotonic()
        assert a.listener.held == set()
        assert {part.partition for part in a.listener.revoked_parts} >= set(had)
        assert a.listener.lost_parts == []
        await eventually(lambda: len(b.listener.held) == 4, what="the one that stays has all")
        assert time.monotonic() - left < rig.settings.session_timeout_s, "no lease had to run out"
        assert {p: b.listener.committed[b.part(p)] for p in had} == dict.fromkeys(had, 3)


async def test_two_groups_each_read_everything(transport: Transport) -> None:
    topic = await new_topic(transport, partitions=2)
    await put(transport, topic, "x", "y", partition=1)
    async with member(transport, unique("group"), topic) as a, member(transport, unique("group"), topic) as b:
        await eventually(lambda: values(a.records) == values(b.records) == ["x", "y"], what="both groups have all")


async def test_a_commit_under_an_older_epoch_is_fenced_and_stores_nothing(transport: Transport, rig: Rig) -> None:
    """One stale part among good ones: none of them is stored."""
    topic, group = await new_topic(transport, partitions=2), unique("group")
    await put(transport, topic, "x", "y", partition=0)
    await put(transport, topic, "x", "y", partition=1)
    async with member(transport, group, topic) as a:
        await eventually(lambda: len(a.listener.held) == 2, what="all partitions")
        await a.consumer.commit(dict.fromkeys(a.listener.held, 1))
        stale = Assignment(topic, 0, a.part(0).epoch - 1)
        with pytest.raises(Fenced):
            await a.consumer.commit({stale: 2, a.part(1): 2})
        assert await transport.admin.committed(group, [topic]) == {(topic, 0): 1, (topic, 1): 1}


async def test_a_member_that_handed_a_partition_over_can_no_longer_commit_it(transport: Transport, rig: Rig) -> None:
    topic, group = await new_topic(transport, partitions=2), unique("group")
    for partition in range(2):
        await put(transport, topic, "0", "1", partition=partition)
    async with member(transport, group, topic) as a:
        await eventually(lambda: len(a.listener.held) == 2, what="all partitions")
        old = set(a.listener.held)
        await a.consumer.commit(dict.fromkeys(old, 1))
        async with rig.open() as other, member(other, group, topic) as b:
            await eventually(lambda: len(a.listener.held) == len(b.listener.held) == 1, what="one partition each")
            (theirs,) = b.listener.held
            with pytest.raises(Fenced):
                await a.consumer.commit({part: 2 for part in old if part.partition == theirs.partition})
            assert (await transport.admin.committed(group, [topic]))[topic, theirs.partition] == 1


async def test_the_answer_of_assigned_decides_where_reading_starts(transport: Transport) -> None:
    topic, group = await new_topic(transport, partitions=3), unique("group")
    for partition in range(3):
        await put(transport, topic, "0", "1", "2", "3", partition=partition)
    async with member(transport, group, topic) as first:
        await eventually(lambda: len(first.listener.held) == 3, what="all partitions")
        assert set(first.listener.committed.values()) == {None}
        await first.consumer.commit({first.part(0): 2, first.part(1): 2})

    answers: Mapping[int, int | None] = {0: 1, 1: None, 2: None}
    async with member(transport, group, topic, Recorder(start=lambda part: answers[part.partition])) as second:
        await eventually(lambda: len(second.records) == 9, what="9 records")
        assert {part.partition: offset for part, offset in second.listener.committed.items()} == {0: 2, 1: 2, 2: None}
        starts = {p: min(r.offset for r in second.records if r.partition == p) for p in range(3)}
        assert starts == {0: 1, 1: 2, 2: 0}, "the answer; what is committed; the beginning"


async def test_committed_offsets_and_records_survive_reopening(rig: Rig) -> None:
    group = unique("group")
    async with rig.open() as transport:
        topic = await new_topic(transport, partitions=1)
        await put(transport, topic, "0", "1", "2")
        async with member(transport, group, topic) as first:
            await eventually(lambda: len(first.records) == 3, what="3 records")
            await first.consumer.commit({first.part(0): 2})
    async with rig.open() as again:
        assert await again.admin.committed(group, [topic]) == {(topic, 0): 2}
        async with member(again, group, topic) as second:
            await eventually(lambda: values(second.records) == ["2"], what="the rest")
            assert await put(again, topic, "3") == [3]
            await eventually(lambda: values(second.records) == ["2", "3"], what="what is new")


async def test_pause_holds_back_and_resume_goes_on_without_loss_or_inversion(transport: Transport) -> None:
    topic, group = await new_topic(transport, partitions=2), unique("group")
    async with member(transport, group, topic) as a:
        await eventually(lambda: len(a.listener.held) == 2, what="all partitions")
        paused, running = a.part(0), a.part(1)
        for n in range(20):
            await put(transport, topic, str(n), partition=0)
            if n == 10:
                await eventually(lambda: len(a.records) == 11, what="all so far")
                a.consumer.pause([paused, Assignment(topic, 1, running.epoch - 1), Assignment("other", 0, 1)])
        await put(transport, topic, "the other goes on", partition=1)
        await eventually(lambda: len(a.records) == 12, what="the other partition's record")
        assert [r.offset for r in a.records if r.partition == 0] == list(range(11)), "nothing came while paused"
        a.consumer.resume([Assignment(topic, 0, paused.epoch - 1)])
        await put(transport, topic, "and on", partition=1)
        await eventually(lambda: len(a.records) == 13, what="the other partition's next record")
        assert len([r for r in a.records if r.partition == 0]) == 11, "a stale resume is ignored"
        a.consumer.resume([paused])
        await eventually(lambda: len(a.records) == 22, what="what was held back")
        assert [r.offset for r in a.records if r.partition == 0] == list(range(20))


async def test_a_paused_member_that_polls_on_keeps_its_partitions(transport: Transport, mortal: Rig) -> None:
    topic, group = await new_topic(transport, partitions=2), unique("group")
    async with mortal.open() as its, member(its, group, topic) as a:
        await eventually(lambda: len(a.listener.held) == 2, what="all partitions")
        held = set(a.listener.held)
        a.consumer.pause(held)
        until = time.monotonic() + mortal.settings.session_timeout_s * 1.5
        await eventually(lambda: time.monotonic() > until, what="the time to pass")
        await a.consumer.commit(dict.fromkeys(held, 0))
        assert a.listener.held == held
        assert a.listener.lost_parts == []


async def test_a_member_between_two_polls_keeps_its_partitions_past_the_session_timeout(
    transport: Transport, mortal: Rig
) -> None:
    """Handlers may take longer than a session: heartbeats do not hang on `poll`."""
    topic, group = await new_topic(transport, partitions=1), unique("group")
    listener = Recorder()
    async with mortal.open() as its, its.consume(group, [topic], listener=listener) as consumer:
        while not listener.held:
            await consumer.poll(max_records=10, timeout_s=0.1)
        (part,) = listener.held
        await asyncio.sleep(mortal.settings.session_timeout_s * 1.5)
        await consumer.commit({part: 0})
        await put(transport, topic, "x")
        assert [r.assignment for r in await take(consumer, 1)] == [part]


async def test_poll_gives_no_more_than_asked_and_comes_back_empty_in_time(transport: Transport) -> None:
    topic = await new_topic(transport, partitions=3)
    for partition in range(3):
        await put(transport, topic, *map(str, range(10)), partition=partition)
    async with transport.tail(topic, start="begin") as reader:
        seen: list[tuple[int, int]] = []
        while len(seen) < 30:
            records = await reader.poll(max_records=7, timeout_s=1)
            assert len(records) <= 7
            seen += [(r.partition, r.offset) for r in records]
        assert sorted(seen) == [(p, o) for p in range(3) for o in range(10)]
        began = time.monotonic()
        assert list(await reader.poll(max_records=7, timeout_s=0.3)) == []
        assert time.monotonic() - began < 20.0


async def test_end_offsets_tell_what_will_be_written_next(transport: Transport) -> None:
    topic, group = await new_topic(transport, partitions=2), unique("group")
    await put(transport, topic, "x", "y", partition=1)
    async with member(transport, group, topic) as a:
        await eventually(lambda: len(a.listener.held) == 2, what="all partitions")
        assert await a.consumer.end_offsets() == {a.part(0): 0, a.part(1): 2}
        await put(transport, topic, "z", partition=0)
        assert await a.consumer.end_offsets() == {a.part(0): 1, a.part(1): 2}


async def test_a_position_that_retention_took_is_an_error_not_a_silent_skip(transport: Transport, rig: Rig) -> None:
    topic = await new_topic(transport, partitions=1)
    await put(transport, topic, *map(str, range(10)))
    await rig.forget_before(transport, topic, 0, 6)
    assert await transport.admin.offsets(topic) == {0: (6, 10)}
    async with transport.tail(topic, start={0: 3}) as reader:
        with pytest.raises(OffsetOutOfRange) as caught:
            await take(reader, 1)
        assert (caught.value.wanted, caught.value.first) == (3, 6)
        assert caught.value.assignment == Assignment(topic, 0)
        with pytest.raises(OffsetOutOfRange):
            await take(reader, 1)
    async with transport.tail(topic, start="begin") as reader:
        assert values(await take(reader, 4)) == ["6", "7", "8", "9"]


async def test_a_group_whose_committed_offset_is_gone_is_told(transport: Transport, rig: Rig) -> None:
    topic, group = await new_topic(transport, partitions=1), unique("group")
    await put(transport, topic, *map(str, range(10)))
    async with member(transport, group, topic) as a:
        await eventually(lambda: len(a.records) == 10, what="10 records")
        await a.consumer.commit({a.part(0): 2})
    await rig.forget_before(transport, topic, 0, 6)
    async with transport.consume(group, [topic], listener=Recorder()) as consumer:
        with pytest.raises(OffsetOutOfRange):
            await take(consumer, 1)


# --- tails -----------------------------------------------------------------------------------------------------------


async def test_a_tail_from_the_end_reads_what_is_published_once_it_is_entered(transport: Transport, rig: Rig) -> None:
    topic = await new_topic(transport, partitions=3)
    await put(transport, topic, "old", partition=0)
    async with rig.open() as other, transport.tail(topic, start="end") as reader:
        await put(other, topic, "new 0", partition=0)
        await put(other, topic, "new 2", partition=2)
        assert sorted(values(await take(reader, 2))) == ["new 0", "new 2"]
        await put(other, topic, "later", partition=1)
        assert values(await take(reader, 1)) == ["later"]
        assert await reader.end_offsets() == {
            Assignment(topic, 0): 2,
            Assignment(topic, 1): 1,
            Assignment(topic, 2): 1,
        }


async def test_a_tail_from_given_offsets_starts_there_and_elsewhere_at_the_beginning(transport: Transport) -> None:
    topic = await new_topic(transport, partitions=2)
    for partition in range(2):
        await put(transport, topic, "0", "1", "2", partition=partition)
    async with transport.tail(topic, start={1: 2}) as reader:
        records = await take(reader, 4)
    assert sorted((r.partition, r.offset) for r in records) == [(0, 0), (0, 1), (0, 2), (1, 2)]


async def test_several_tails_read_all_partitions_each(transport: Transport) -> None:
    topic = await new_topic(transport, partitions=2)
    async with transport.tail(topic, start="end") as a, transport.tail(topic, start="begin") as b:
        await put(transport, topic, "x", partition=0)
        await put(transport, topic, "y", partition=1)
        assert sorted(values(await take(a, 2))) == sorted(values(await take(b, 2))) == ["x", "y"]


async def test_a_tails_partitions_can_be_paused(transport: Transport) -> None:
    topic = await new_topic(transport, partitions=2)
    async with transport.tail(topic, start="begin") as reader:
        reader.pause([Assignment(topic, 0)])
        await put(transport, topic, "held back", partition=0)
        await put(transport, topic, "read", partition=1)
        assert values(await take(reader, 1)) == ["read"]
        assert list(await reader.poll(max_records=10, timeout_s=0.2)) == []
        reader.resume([Assignment(topic, 0)])
        assert values(await take(reader, 1)) == ["held back"]


# --- admin -----------------------------------------------------------------------------------------------------------


async def test_topics_are_described_as_they_were_declared(transport: Transport) -> None:
    kept, limited, compacted, missing = (unique(n) for n in ("kept", "limited", "compacted", "missing"))
    await transport.admin.create(
        [
            TopicSpec(kept, partitions=3),
            TopicSpec(limited, partitions=1, retention_s=3600.0, max_bytes=50_000),
            TopicSpec(compacted, partitions=2, compact=True),
        ]
    )
    found = await transport.admin.describe([kept, limited, compacted, missing])
    assert all(state.lingers_s >= 0 for state in found.values())  # for how long is the broker's business
    assert {name: replace(state, lingers_s=0.0) for name, state in found.items()} == {
        kept: TopicState(kept, 3),
        limited: TopicState(limited, 1, retention_s=3600.0, max_bytes=50_000),
        compacted: TopicState(compacted, 2, compact=True),
    }
    assert await transport.admin.offsets(kept) == {0: (0, 0), 1: (0, 0), 2: (0, 0)}


async def test_creating_a_topic_twice_at_once_harms_nothing(transport: Transport, rig: Rig) -> None:
    topic = unique("topic")
    async with rig.open() as other:
        await asyncio.gather(
            *(each.admin.create([TopicSpec(topic, partitions=3)]) for each in (transport, other) for _ in range(4))
        )
        await put(transport, topic, "x", partition=2)
        await other.admin.create([TopicSpec(topic, partitions=5, retention_s=1.0)])
        found = await other.admin.describe([topic])
        assert replace(found[topic], lingers_s=0.0) == TopicState(topic, 3)
        assert (await other.admin.offsets(topic))[2] == (0, 1)


async def test_offsets_committed_are_told_also_when_the_group_has_no_members(transport: Transport) -> None:
    topic, group = await new_topic(transport, partitions=3), unique("group")
    await put(transport, topic, "x", "y", partition=1)
    assert await transport.admin.committed(group, [topic]) == {}
    async with member(transport, group, topic) as a:
        await eventually(lambda: len(a.listener.held) == 3, what="all partitions")
        await a.consumer.commit({a.part(1): 2})
    assert await transport.admin.committed(group, [topic]) == {(topic, 1): 2}
    assert await transport.admin.committed(unique("group"), [topic]) == {}


async def test_missing_topics_are_named(transport: Transport) -> None:
    topic, gone, lost = await new_topic(transport), unique("gone"), unique("lost")
    with pytest.raises(MissingTopics) as caught:
        async with transport.consume(unique("group"), [topic, gone, lost], listener=Recorder()):
            pass
    assert caught.value.names == tuple(sorted([gone, lost]))
    with pytest.raises(MissingTopics) as caught:
        await transport.admin.offsets(gone)
    assert caught.value.names == (gone,)
    with pytest.raises(MissingTopics):
        async with transport.tail(gone, start="begin"):
            pass


# --- members that die ------------------------------------------------------------------------------------------------


async def test_the_partitions_of_a_killed_process_are_taken_over_within_the_session_timeout(
    transport: Transport, mortal: Rig
) -> None:
    """Not by anything else: every other limit is longer than what it may take."""
    topic, group = await new_topic(transport, partitions=4), unique("group")
    async with Child.start(mortal, group=group, topic=topic) as child, member(transport, group, topic) as a:
        await eventually(lambda: len(child.partitions()) == len(a.listener.held) == 2, what="2 partitions each")
        theirs = child.partitions()
        for partition in theirs:
            await put(transport, topic, "x", partition=partition)
        await eventually(lambda: len(child.events["record"]) >= 2, what="the process reads")
        await eventually(lambda: len(child.events["committed"]) > 2, what="the process commits")

        child.process.send_signal(signal.SIGKILL)
        await eventually(lambda: len(a.listener.held) == 4, what="all partitions", within_s=20)
        assert {a.listener.committed[a.part(p)] for p in theirs} == {1}


async def test_a_process_that_stood_still_past_its_session_is_fenced_and_joins_again(
    transport: Transport, mortal: Rig
) -> None:
    topic, group = await new_topic(transport, partitions=2), unique("group")
    for partition in range(2):
        await put(transport, topic, "0", "1", "2", partition=partition)
    async with Child.start(mortal, group=group, topic=topic) as child:
        await eventually(lambda: len(child.events["record"]) >= 6, what="the process reads all")
        await eventually(lambda: len(child.events["committed"]) > 1, what="the process commits")
        await stop_between_transactions(child, transport, topic)
        async with member(transport, group, topic) as a:
            await eventually(lambda: len(a.listener.held) == 2, what="the stopped one's partitions")
            await a.consumer.commit(dict.fromkeys(a.listener.held, 1))
            child.process.send_signal(signal.SIGCONT)
            await eventually(lambda: len(child.events["fenced"]) > 0, what="the old owner is fenced")
            await eventually(lambda: len(child.events["assigned"]) > 1, what="it joins again")
            await eventually(lambda: len(child.partitions()) == len(a.listener.held) == 1, what="one each")
            assert (await transport.admin.committed(group, [topic]))[topic, min(a.listener.partitions)] == 1
            lost = [event for event in child.events["revoked"] if event["lost"]]
            assert sorted(p for event in lost for p in event["partitions"]) == [0, 1]  # type: ignore[attr-defined]


async def stop_between_transactions(child: Child, transport: Transport, topic: str) -> None:
    """A process that is stopped while it holds a lock on a shared file would hold up everybody: another moment then."""
    for _ in range(50):
        child.process.send_signal(signal.SIGSTOP)
        try:
            async with asyncio.timeout(2.0):
                await transport.admin.create([TopicSpec(unique("probe"), partitions=1)])
            return
        except TimeoutError:
            child.process.send_signal(signal.SIGCONT)
    raise AssertionError("never stopped outside of a transaction")
