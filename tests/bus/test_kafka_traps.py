"""Traps of Kafka and aiokafka that `test_kafka.py` does not have: T1, T3, T9, T11, T13, T16 and what follows from
markers, later partitions and commits that a dying broker interrupts. `docs/kafka-traps.md` has the list."""

from __future__ import annotations

import asyncio
import gc
import re
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions
from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import NotLeaderForPartitionError
from aiokafka.protocol.group import JoinGroupRequest

import bus.kafka.publisher
from bus.consumer import EngineSettings
from bus.errors import Fenced, TransportUnavailable
from bus.kafka import KafkaTransport
from bus.transport import Ack, Assignment, Outgoing, PollSettings
from tests.bus.fake_transport import Recorder as Processor
from tests.bus.fake_transport import envelope, make_engine, running
from tests.bus.test_kafka import IMPATIENT, kinds, opened, publish_all, read_all, to
from tests.bus.transports import Recorder, eventually, member, new_topic, put, take, unique, values
from tests.servers import Kafka

ROOT = Path(__file__).parents[2]


# --- publishing -------------------------------------------------------------------------------------------------------


async def test_nothing_is_acknowledged_but_by_the_answer_to_its_own_batch(
    kafka: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T1: a send that failed, and whose future nobody looked at, fails no transaction: the commit goes through without
    it. Here is no transaction, and each record's answer is its own batch's."""
    async with opened(kafka) as transport:
        topic = await new_topic(transport, partitions=3)
        await put(transport, topic, "warm")
        send, failing = AIOKafkaProducer.send_batch, True

        async def send_batch(self: Any, builder: Any, to_topic: str, *, partition: int) -> Any:
            if partition == 1 and failing:
                lost = asyncio.get_running_loop().create_future()
                lost.set_exception(NotLeaderForPartitionError())
                return lost
            return await send(self, builder, to_topic, partition=partition)

        monkeypatch.setattr(AIOKafkaProducer, "send_batch", send_batch)
        batch = [Outgoing(topic, b"k", str(n).encode(), (), n % 3) for n in range(6)]
        assert kinds(await transport.publish(batch)) == ["Ack", "Unknown", "Ack", "Ack", "Unknown", "Ack"]
        producer = transport._publisher._producer
        failing = False
        await publish_all(transport, [one for one in batch if one.partition == 1])
        assert producer is None or producer.raw._txn_manager.transactional_id is None
        async with transport.tail(topic, start="begin") as tail:
            found = await take(tail, 7)
        assert sorted(values(found)) == ["0", "1", "2", "3", "4", "5", "warm"]


async def test_calls_side_by_side_that_fill_batches_again_and_again_keep_their_order(
    kafka: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T3: concurrent `send()` of aiokafka reorders a partition as soon as batches fill."""
    monkeypatch.setattr(bus.kafka.publisher, "BATCH_BYTES", 2048)
    async with opened(kafka, PollSettings(publish_deadline_s=30, extra={"compression_type": "none"})) as transport:
        topic = await new_topic(transport, partitions=1)
        await put(transport, topic, "0")
        calls = [
            transport.publish(to(topic, *(f"{call * 20 + n + 1:05}" + "x" * 300 for n in range(20))))
            for call in range(40)
        ]
        answers = [answer for call in await asyncio.gather(*calls) for answer in call]
        offsets = [answer.offset for answer in answers if isinstance(answer, Ack)]
        assert len(offsets) == 800
        assert [pair for pair in pairwise(offsets) if pair[0] >= pair[1]] == []
        numbers = [int(text[:5]) for text in await read_all(transport, topic)]
        assert numbers == list(range(801))


# --- groups -----------------------------------------------------------------------------------------------------------


async def test_a_member_joins_with_one_assignor_and_says_how_long_a_drain_may_take(
    kafka: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T9: with two assignors aiokafka joins once for each, and waits in between. T11: the rebalance timeout."""
    asked: list[Any] = []
    send = AIOKafkaConnection.send

    def spy(self: Any, request: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(request, JoinGroupRequest):
            asked.append(request)
        return send(self, request, *arguments, **options)

    monkeypatch.setattr(AIOKafkaConnection, "send", spy)
    settings = PollSettings(session_timeout_s=29.0, heartbeat_s=0.2, rebalance_timeout_s=17.0)
    async with opened(kafka, settings) as transport:
        topic = await new_topic(transport, partitions=2)
        async with member(transport, unique("group"), topic) as one:
            await eventually(lambda: len(one.listener.held) == 2, what="joined")
    assert {tuple(name for name, _ in request._group_protocols) for request in asked} == {("roundrobin",)}
    assert {(request._session_timeout, request._rebalance_timeout) for request in asked} == {(29_000, 17_000)}
    # The second one brings the id that the broker gave it. (A broker that is not ready yet is asked the same again.)
    assert len({request._member_id for request in asked}) <= 2


async def test_a_drain_longer_than_the_session_is_waited_for_and_its_commit_taken(kafka: str) -> None:
    """T11: aiokafka takes the session timeout for the rebalance timeout unless told; a longer drain is expelled."""
    settings = PollSettings(session_timeout_s=4.0, heartbeat_s=0.1, rebalance_timeout_s=40.0)
    async with opened(kafka, settings) as transport, opened(kafka, settings) as other:
        topic, group = await new_topic(transport, partitions=2), unique("group")
        for partition in range(2):
            await put(transport, topic, "0", "1", partition=partition)

        async def drain(parts: Sequence[Assignment], lost: bool) -> None:
            assert not lost
            await asyncio.sleep(1.5 * settings.session_timeout_s)
            await first.consumer.commit(dict.fromkeys(parts, 1))

        async with member(transport, group, topic) as first:
            await eventually(lambda: len(first.listener.held) == 2, what="all partitions")
            first.listener.drain = drain
            async with member(other, group, topic, Recorder(name="b")) as second:
                await eventually(lambda: len(second.listener.held) == 1, what="its half")
                first.listener.drain = None
                assert first.listener.lost_parts == []
                assert list(second.listener.committed.values())[-1] == 1


async def test_a_partition_that_is_paused_with_records_in_hand_starves_no_other(kafka: str) -> None:
    """T13: aiokafka fetches nothing more from a broker for as long as one partition's records lie undrained."""
    async with opened(kafka) as transport:
        topic = await new_topic(transport, partitions=3)
        for _ in range(5):
            await put(transport, topic, *("x" * 100_000 for _ in range(4)), partition=0)
        async with member(transport, unique("group"), topic) as one:
            await eventually(lambda: any(r.partition == 0 for r in one.records), what="the first of partition 0")
            one.consumer.pause([one.part(0)])
            for n in range(20):
                await put(transport, topic, str(n), partition=1 + n % 2)
                await eventually(
                    lambda n=n: sum(r.partition > 0 for r in one.records) == n + 1, what=f"record {n} of the others"
                )
            one.consumer.resume([one.part(0)])
            await eventually(lambda: len(one.records) == 40, what="everything, once")


async def test_three_members_that_start_at_once_share_the_partitions_and_each_record_has_one_reader(kafka: str) -> None:
    """(20): the broker is asked by all three before any of them is a member."""
    async with opened(kafka) as a, opened(kafka) as b, opened(kafka) as c:
        topic, group = await new_topic(a, partitions=6), unique("group")
        for partition in range(6):
            await put(a, topic, str(partition), partition=partition)
        enter = asyncio.Barrier(3)
        ready, leave = asyncio.Event(), asyncio.Event()
        found: list[Any] = []

        async def one(transport: KafkaTransport) -> None:
            await enter.wait()
            async with member(transport, group, topic) as this:
                found.append(this)
                if len(found) == 3:
                    ready.set()
                await leave.wait()

        async with asyncio.TaskGroup() as tasks:
            for transport in (a, b, c):
                tasks.create_task(one(transport))
            await ready.wait()
            try:
                await eventually(
                    lambda: (
                        sorted(len(m.listener.held) for m in found) == [2, 2, 2]
                        and sorted(p for m in found for p in m.listener.partitions) == list(range(6))
                    ),
                    what="two partitions each, none twice",
                )
                for partition in range(6):
                    await put(a, topic, f"later {partition}", partition=partition)
                later = [f"later {partition}" for partition in range(6)]
                await eventually(
                    lambda: sorted(v for m in found for v in values(m.records) if v.startswith("later")) == later,
                    what="each later record, once",
                )
            finally:
                leave.set()


async def test_a_partition_that_comes_later_is_read_from_its_beginning(kafka: str) -> None:
    """(18), the half that a consumer can do: a partition that somebody adds to a topic has records before the group
    hears of it, and a reset to the end would skip them. (A service refuses to start on another partition count than it
    declared.)"""
    async with opened(kafka) as transport:
        topic = await new_topic(transport, partitions=1)
        async with member(transport, unique("group"), topic) as one:
            await eventually(lambda: one.listener.partitions == {0}, what="the only partition")
            admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
            await admin.start()
            try:
                await admin.create_partitions({topic: NewPartitions(2)})
            finally:
                await admin.close()
            producer = AIOKafkaProducer(bootstrap_servers=kafka)
            await producer.start()
            try:
                async with asyncio.timeout(20):
                    while len(await producer.partitions_for(topic)) < 2:
                        await producer.client.force_metadata_update()
                await producer.send_and_wait(topic, b"before the group knows", partition=1)
            finally:
                await producer.stop()
            raw = one.consumer._reader.raw  # type: ignore[attr-defined]
            await raw._client.force_metadata_update()  # it asks by itself every five minutes
            await eventually(lambda: one.listener.partitions == {0, 1}, what="both partitions")
            await eventually(lambda: values(one.records) == ["before the group knows"], what="what came before")


# --- what is in a topic besides records -------------------------------------------------------------------------------


async def test_markers_of_others_transactions_hold_up_no_commit_and_what_they_took_back_is_not_read(kafka: str) -> None:
    """(16): a transaction ends with a marker, which takes an offset and is never delivered. Offsets are committed up to
    the last record that was, so what looks unread at the end are markers only; nothing is read twice."""
    async with opened(kafka) as transport:
        topic, group = await new_topic(transport, partitions=1), unique("group")
        producer = AIOKafkaProducer(bootstrap_servers=kafka, transactional_id=unique("foreign"))
        await producer.start()
        processor = Processor()
        processor.group = group
        number = iter(range(1, 100))

        def parse(delivery: Any) -> Any:
            return envelope((delivery.value or b"").decode(), id=UUID(int=next(number)))

        engine, _ = make_engine(
            transport, processor, EngineSettings(commit_interval_s=0.05), topics=[topic], parse=parse
        )
        try:
            async with running(engine):
                for turn in range(3):
                    async with producer.transaction():
                        await producer.send_and_wait(topic, b"kept", partition=0)
                    await producer.begin_transaction()
                    await producer.send_and_wait(topic, b"taken back", partition=0)
                    await producer.abort_transaction()
                    await put(transport, topic, "plain")
                    handled = 2 * turn + 2
                    await eventually(lambda handled=handled: len(processor.handled) >= handled, what="both are handled")
        finally:
            await producer.stop()
        assert [key for key, _ in processor.handled] == ["kept", "plain"] * 3
        # The broker answers an end of a transaction before its marker is written: the last one may follow the record.
        last, (_, end) = processor.handled[-1][1], (await transport.admin.offsets(topic))[0]
        assert last in (end - 1, end - 2)
        assert list((await transport.admin.committed(group, [topic])).values()) == [last + 1]
        async with member(transport, group, topic) as again:
            await eventually(lambda: len(again.listener.held) == 1, what="joined again")
            await put(transport, topic, "last")
            await eventually(lambda: values(again.records) == ["last"], what="only what is new")


@pytest.mark.parametrize("codec", ["none", "gzip", "snappy", "lz4", "zstd"])
async def test_every_codec_is_there_without_the_extra_that_wants_kerberos(kafka: str, codec: str) -> None:
    """T16: `aiokafka[all]` needs Kerberos headers to build."""
    async with opened(kafka, PollSettings(extra={"compression_type": codec})) as transport:
        topic = await new_topic(transport, partitions=1)
        await put(transport, topic, *("x" * 1000 for _ in range(20)))
        assert await read_all(transport, topic) == ["x" * 1000] * 20


def test_the_dependency_on_aiokafka_names_the_codecs_and_not_all_extras() -> None:
    """T16."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = [one for one in project["dependencies"] if one.startswith("aiokafka")]
    assert re.split(r"[\[\],]", wanted)[1:4] == ["lz4", "snappy", "zstd"]


def test_no_transaction_of_kafka_is_ever_begun() -> None:
    """T1, and the promise that none is offered: nothing of ours names one."""
    named = re.compile(r"transactional_id|begin_transaction|send_offsets_to_transaction|\.transaction\(\)")
    sources = sorted((ROOT / "bus" / "kafka").glob("*.py"))
    assert len(sources) > 5
    assert [path.name for path in sources if named.search(path.read_text())] == []


# --- a broker that is away --------------------------------------------------------------------------------------------


async def test_records_given_up_while_the_broker_is_away_leave_no_error_behind(fresh_kafka: Kafka) -> None:
    """aiokafka's accumulator keeps books on what is under way. A producer that is abandoned with batches that were sent
    once already upset them: an error in the event loop for every batch of an outage."""
    errors: list[Mapping[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
    async with opened(fresh_kafka.bootstrap, IMPATIENT) as transport:
        topic = await new_topic(transport, partitions=4)
        await publish_all(transport, to(topic, "1"))
        sending = asyncio.create_task(
            transport.publish([one for n in range(4) for one in to(topic, str(n), partition=n)])
        )
        await eventually(lambda: bool(transport._publisher._sending), what="sending")
        await asyncio.to_thread(fresh_kafka.kill)
        assert set(kinds(await sending)) <= {"Ack", "Unknown"}
        for _ in range(2):
            answers = await transport.publish([one for n in range(4) for one in to(topic, str(n), partition=n)])
            assert kinds(answers) == ["Unknown"] * 4
    gc.collect()
    await asyncio.sleep(0)
    assert [str(one.get("exception") or one.get("message")) for one in errors] == []


# --- a broker that dies in the middle ---------------------------------------------------------------------------------


@pytest.mark.timeout(120)
async def test_a_commit_that_was_acknowledged_survives_a_broker_killed_in_the_middle_of_the_next(
    fresh_kafka: Kafka,
) -> None:
    """(20): commits go on while the broker is killed and comes back. Each is acknowledged, fenced, or unknown; the
    group's offset is never below one that was acknowledged, and never above one that was asked for."""
    settings = PollSettings(session_timeout_s=6, heartbeat_s=0.5, rebalance_timeout_s=10, request_timeout_s=5.0)
    async with opened(fresh_kafka.bootstrap, settings) as transport:
        topic, group = await new_topic(transport, partitions=1), unique("group")
        asked = acknowledged = 0
        unknown = 0
        stop = False
        async with transport.consume(group, [topic], listener=(listener := Recorder())) as consumer:

            async def poll() -> None:
                while not stop:
                    with suppress(TransportUnavailable):
                        await consumer.poll(max_records=10, timeout_s=0.05)

            async def commit() -> None:
                nonlocal asked, acknowledged, unknown
                while not stop:
                    parts = list(listener.held)
                    if parts:
                        asked += 1
                        try:
                            await consumer.commit(dict.fromkeys(parts, asked))
                            acknowledged = asked
                        except Fenced:
                            await asyncio.sleep(0.01)
                        except TransportUnavailable:
                            unknown += 1
                    await asyncio.sleep(0.001)

            tasks = [asyncio.create_task(work()) for work in (poll, commit)]
            try:
                await eventually(lambda: acknowledged >= 20, what="commits")
                await asyncio.to_thread(fresh_kafka.kill)
                await eventually(lambda: unknown >= 1, what="a commit whose outcome is unknown")
                before = acknowledged
                await asyncio.to_thread(fresh_kafka.start)
                await eventually(lambda: acknowledged >= before + 20, what="commits again", within_s=60)
            finally:
                stop = True
                await asyncio.gather(*tasks)
            found = (await transport.admin.committed(group, [topic]))[topic, 0]
            assert acknowledged <= found <= asked
