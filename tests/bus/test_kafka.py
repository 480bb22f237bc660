"""The Kafka adapter where Kafka and aiokafka have traps of their own: each was somebody's lost or doubled data.

What every transport promises is pinned by `test_transport_conformance.py`.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.client import AIOKafkaClient
from aiokafka.conn import AIOKafkaConnection
from aiokafka.consumer.fetcher import Fetcher
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.consumer.subscription_state import SubscriptionState
from aiokafka.errors import CorruptRecordException, InvalidReplicationFactorError, OutOfOrderSequenceNumber
from aiokafka.producer.message_accumulator import BatchBuilder, MessageAccumulator, MessageBatch
from aiokafka.producer.sender import Sender
from aiokafka.protocol.metadata import MetadataRequest

import bus.kafka.publisher
import bus.kafka.reader
from bus.errors import BusError, Fenced, MessageTooLarge, MissingTopics, OffsetOutOfRange, TransportUnavailable
from bus.kafka import KafkaTransport, UnreadablePartition
from bus.kafka.batches import Batch
from bus.kafka.options import warn_when_slow
from bus.metrics import MemoryMetrics
from bus.transport import Ack, Assignment, Failed, Outgoing, PollSettings, Published, TopicSpec, Unknown
from tests.bus.transports import Recorder, eventually, new_topic, put, take, unique, values
from tests.servers import Kafka

PATIENT = PollSettings(
    session_timeout_s=30.0,
    heartbeat_s=0.2,
    rebalance_timeout_s=30.0,
    request_timeout_s=20.0,
    publish_deadline_s=20.0,
)
"""Whoever stands still for some seconds, as a busy machine makes one, loses nothing by it."""
IMPATIENT = replace(PATIENT, publish_deadline_s=2.0)
"""For a test that waits until a record is given up. What is to arrive is published by `publish_all`."""


@asynccontextmanager
async def opened(
    bootstrap: str, settings: PollSettings = PATIENT, metrics: MemoryMetrics | None = None
) -> AsyncIterator[KafkaTransport]:
    async with KafkaTransport.open(
        bootstrap, settings=settings, client_id=unique("test"), metrics=metrics or MemoryMetrics()
    ) as transport:
        yield transport


def to(topic: str, *texts: str, partition: int = 0) -> list[Outgoing]:
    return [Outgoing(topic, b"k", text.encode(), (), partition) for text in texts]


def kinds(answers: Sequence[Published]) -> list[str]:
    return [type(answer).__name__ for answer in answers]


async def read_all(transport: KafkaTransport, topic: str) -> list[str]:
    """Every value of partition 0, by a reader that is not ours."""
    raw = AIOKafkaConsumer(bootstrap_servers=transport._options["bootstrap_servers"], group_id=None)
    await raw.start()
    try:
        part = TopicPartition(topic, 0)
        raw.assign([part])
        await raw.seek_to_beginning(part)
        end = (await raw.end_offsets([part]))[part]
        found: list[str] = []
        while await raw.position(part) < end:
            found += [record.value.decode() for record in (await raw.getmany(timeout_ms=500)).get(part, [])]
        return found
    finally:
        await raw.stop()


# --- what we use of aiokafka's inside ---------------------------------------------------------------------------------


def test_aiokafka_still_has_inside_what_the_adapter_uses() -> None:
    """`internals.py` reaches into aiokafka; a version that moved these must not be used until it was looked at."""
    used: Mapping[type, Sequence[str]] = {
        AIOKafkaProducer: ["self._closed =", "self._sender =", "self._message_accumulator =", "self.client ="],
        Sender: ["def sender_task", "self._sender_task = create_task(self._sender_routine())"],
        MessageAccumulator: [
            "self._batches = collections.defaultdict(collections.deque)",
            "self._pending_batches = set()",
            "self._pending_batches.remove(batch)",
        ],
        AIOKafkaConsumer: [
            "self._coordinator = GroupCoordinator",
            "self._subscription =",
            "self._client =",
            "self._fetcher =",
        ],
        GroupCoordinator: [
            "self.generation = OffsetCommitRequest.DEFAULT_GENERATION_ID",
            "async def fetch_committed_offsets(self, partitions)",
            "def check_errors(self)",
            "self._coordination_task =",
            "self._heartbeat_task =",
            "self._commit_refresh_task =",
        ],
        SubscriptionState: ["self._fetch_count += 1", "if self._fetch_count == 0:"],
        Fetcher: ["async def close(self)", "for tp in list(self._records.keys()):"],
        AIOKafkaAdminClient: ["async def _send_request("],
        AIOKafkaClient: ["async def close(self)"],
        AIOKafkaConnection: [
            "self._reader = self._writer = self._protocol = None",
            "self._reader, self._writer, self._protocol = reader, writer, protocol",
            "return self._closed_fut",
        ],
    }
    for owner, pieces in used.items():
        source = inspect.getsource(owner)
        assert [piece for piece in pieces if piece not in source] == [], owner.__name__


def test_a_batch_of_ours_has_all_that_aiokafka_asks_of_one() -> None:
    asked = {
        name
        for part in (MessageBatch, MessageAccumulator)
        for name in re.findall(r"_builder\.(\w+)", inspect.getsource(part))
    } - {"append"}  # of a batch that is not closed
    assert {"_build", "_set_producer_state", "record_count"} <= asked
    for name in asked:
        ours, theirs = (list(inspect.signature(getattr(of, name)).parameters) for of in (Batch, BatchBuilder))
        assert ours == theirs, name
    assert "batch" in inspect.signature(AIOKafkaProducer.send_batch).parameters


def test_a_missing_compiled_codec_is_a_warning_and_a_metric(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = MemoryMetrics()
    warn_when_slow(metrics)
    assert metrics.gauges["foldbus_kafka_compiled_codec", ()] == 1.0
    assert caplog.messages == []

    class Slow:
        pass

    monkeypatch.setattr("bus.kafka.options.DefaultRecordBatchBuilder", Slow)
    warn_when_slow(metrics)
    assert metrics.gauges["foldbus_kafka_compiled_codec", ()] == 0.0
    assert "compiled record codec" in caplog.text


async def test_settings_that_nobody_reads_are_refused() -> None:
    with pytest.raises(BusError, match="sasl_password are unknown; known are security_protocol"):
        async with opened("127.0.0.1:1", PollSettings(extra={"sasl_password": "x"})):
            pass


async def test_opening_without_a_broker_fails_in_time() -> None:
    async with asyncio.timeout(50):
        with pytest.raises(TransportUnavailable):
            async with opened("127.0.0.1:1", replace(PATIENT, request_timeout_s=5.0)):
                pass


# --- publishing -------------------------------------------------------------------------------------------------------


async def set_max_bytes(bootstrap: str, topic: str, limit: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        resource = ConfigResource(ConfigResourceType.TOPIC, topic, configs={"max.message.bytes": str(limit)})
        (response,) = await admin.alter_configs([resource])
        assert [code for code, *_ in response.resources] == [0]
    finally:
        await admin.close()


async def test_a_refused_record_fails_alone_and_the_partition_takes_the_next_ones(kafka: str) -> None:
    """T2: after a refused batch the broker answers every further batch of that producer and partition with
    OutOfOrderSequenceNumber. The topic's limit is lowered behind the transport's back: only the broker knows it."""
    metrics = MemoryMetrics()
    async with opened(
        kafka, PollSettings(publish_deadline_s=20, extra={"compression_type": "none"}), metrics
    ) as transport:
        topic = await new_topic(transport, partitions=2)
        await put(transport, topic, "before")
        await set_max_bytes(kafka, topic, 3000)
        large = "x" * 5000
        answers = await transport.publish(
            [*to(topic, "a", "b", large, "c"), *to(topic, "elsewhere", partition=1), *to(topic, large, "d")]
        )
        assert kinds(answers) == ["Ack", "Ack", "Failed", "Ack", "Ack", "Failed", "Ack"]
        failed = answers[2]
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, MessageTooLarge)
        assert await put(transport, topic, "after")
        assert await read_all(transport, topic) == ["before", "a", "b", "c", "d", "after"]
    assert metrics.total("foldbus_producers_replaced_total") >= 1


async def test_a_producer_out_of_sequence_is_unknown_and_replaced(kafka: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(kafka) as transport:
        topic = await new_topic(transport)
        await put(transport, topic, "1")
        real, broken = AIOKafkaProducer.send_batch, transport._publisher._producer
        assert broken is not None

        async def send_batch(self: Any, *arguments: Any, **options: Any) -> Any:
            if self is broken.raw:
                raise OutOfOrderSequenceNumber
            return await real(self, *arguments, **options)

        monkeypatch.setattr(AIOKafkaProducer, "send_batch", send_batch)
        assert kinds(await transport.publish(to(topic, "2", "3"))) == ["Unknown", "Unknown"]
        await put(transport, topic, "2", "3")
        assert await read_all(transport, topic) == ["1", "2", "3"]


async def test_without_an_answer_in_time_records_are_unknown_and_later_ones_arrive(fresh_kafka: Kafka) -> None:
    """T5, and the deadline that an idempotent aiokafka producer does not have: the broker is frozen, not gone."""
    metrics = MemoryMetrics()
    async with opened(fresh_kafka.bootstrap, IMPATIENT, metrics) as transport:
        topic = await new_topic(transport)
        await publish_all(transport, to(topic, "1"))
        await asyncio.to_thread(fresh_kafka.pause)
        loop = asyncio.get_running_loop()
        started = loop.time()
        answers = await transport.publish([*to(topic, "2", "3"), *to(topic, "4", partition=1)])
        took = loop.time() - started
        await asyncio.to_thread(fresh_kafka.resume)
        assert kinds(answers) == ["Unknown"] * 3
        assert all(isinstance(a, Unknown) and isinstance(a.error, TransportUnavailable) for a in answers)
        assert IMPATIENT.publish_deadline_s <= took < IMPATIENT.request_timeout_s  # by our deadline, not the request's
        answers = await publish_all(transport, to(topic, "2", "3", "5"))
        found = await read_all(transport, topic)
        assert [text for place, text in enumerate(found) if text not in found[:place]] == ["1", "2", "3", "5"]
    assert metrics.total("foldbus_publish_unknown_total", topic=topic) >= 3


@pytest.mark.timeout(150)
async def test_leaving_is_bounded_while_the_broker_is_down(fresh_kafka: Kafka) -> None:
    """T4: aiokafka's `stop()` waits for ever for a record that is not acknowledged."""
    settings = PollSettings(request_timeout_s=5.0, publish_deadline_s=3600.0)
    async with asyncio.timeout(120):
        async with opened(fresh_kafka.bootstrap, settings) as transport:
            topic = await new_topic(transport)
            await put(transport, topic, "1")
            await asyncio.to_thread(fresh_kafka.kill)
            publishing = asyncio.create_task(transport.publish(to(topic, "2")))
            await eventually(lambda: bool(transport._publisher._sending), what="sending")
            leaving = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - leaving < 60
        assert kinds(await publishing) == ["Unknown"]


async def test_a_cancelled_publish_goes_on_and_keeps_its_place(kafka: str) -> None:
    async with opened(kafka) as transport:
        topic = await new_topic(transport)
        await put(transport, topic, "1")
        first = asyncio.create_task(transport.publish(to(topic, "2")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        second = asyncio.create_task(transport.publish(to(topic, "3")))
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert kinds(await second) == ["Ack"]
        assert await read_all(transport, topic) == ["1", "2", "3"]


async def publish_all(transport: KafkaTransport, batch: Sequence[Outgoing], *, within_s: float = 45) -> None:
    """As a relay does: again from the first record that is not acknowledged."""
    async with asyncio.timeout(within_s):
        while batch:
            answers = await transport.publish(batch)
            batch = batch[next((i for i, a in enumerate(answers) if not isinstance(a, Ack)), len(batch)) :]


@pytest.mark.timeout(150)
async def test_a_broker_killed_while_publishing_loses_nothing_and_reorders_nothing(fresh_kafka: Kafka) -> None:
    settings = PollSettings(request_timeout_s=5.0, publish_deadline_s=3.0)
    async with opened(fresh_kafka.bootstrap, settings) as transport:
        topic = await new_topic(transport, partitions=1)
        sent, stop = 0, False

        async def relay() -> None:
            nonlocal sent
            while not stop:
                await publish_all(transport, to(topic, *(str(sent + i) for i in range(50))), within_s=90)
                sent += 50

        async with asyncio.TaskGroup() as group:
            group.create_task(relay())
            await eventually(lambda: sent >= 500, what="records before the kill")
            await asyncio.to_thread(fresh_kafka.kill)
            await asyncio.to_thread(fresh_kafka.start)
            restarted = sent
            await eventually(lambda: sent >= restarted + 500, what="records after the restart", within_s=60)
            stop = True
        found = [int(text) for text in await read_all(transport, topic)]
        first_seen = list(dict.fromkeys(found))
        assert first_seen == list(range(sent)), "lost, or first seen out of order"
        # What comes twice is a replayed suffix: from one step back it rises again, record by record.
        assert all(later <= earlier + 1 for earlier, later in pairwise(found))


# --- reading ----------------------------------------------------------------------------------------------------------


async def test_a_cancelled_poll_leaves_the_fetch_alone(kafka: str) -> None:
    """T6: a cancelled `getmany` never counts as ended, and a dead engine would keep its partitions for ever."""
    async with opened(kafka) as transport:
        topic = await new_topic(transport, partitions=1)
        async with transport.consume(unique("group"), [topic], listener=(listener := Recorder())) as consumer:
            while not listener.held:
                await consumer.poll(max_records=10, timeout_s=0.1)
            for _ in range(5):
                polling = asyncio.create_task(consumer.poll(max_records=10, timeout_s=5))
                await asyncio.sleep(0.01)
                polling.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await polling
            raw = consumer._reader.raw  # type: ignore[attr-defined]
            await eventually(lambda: raw._subscription._fetch_count == 0, what="the fetch has ended by itself")
            await put(transport, topic, "1", "2")
            assert values(await take(consumer, 2)) == ["1", "2"]


async def test_an_error_while_fetching_leaves_the_idle_time_running(
    kafka: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T6, second half: an error inside `getmany` leaks the same count."""
    async with opened(kafka) as transport:
        topic = await new_topic(transport, partitions=1)
        async with transport.tail(topic, start={0: 99}) as consumer:
            with pytest.raises(OffsetOutOfRange, match="holds offsets 0 to 0, wanted 99"):
                await take(consumer, 1)
            assert consumer._reader.raw._subscription._fetch_count == 0  # type: ignore[attr-defined]


async def test_a_fenced_member_hears_that_its_partitions_are_lost(kafka: str) -> None:
    """T7: aiokafka has no `on_partitions_lost`. The member is thrown out of its group by name, as a session timeout
    would; its commit is fenced, nothing is stored, and it joins again under a higher epoch."""
    async with opened(kafka) as transport:
        topic, group = await new_topic(transport, partitions=2), unique("group")
        await put(transport, topic, "1", "2")
        fenced: list[BusError] = []

        async def drain(parts: Sequence[Assignment], lost: bool) -> None:
            try:
                await consumer.commit(dict.fromkeys(parts, 2))
            except Fenced as error:
                fenced.append(error)

        async with transport.consume(group, [topic], listener=(listener := Recorder(drain=drain))) as consumer:
            while not listener.held:
                await consumer.poll(max_records=10, timeout_s=0.1)
            before = set(listener.held)
            await expel(consumer)
            async with asyncio.timeout(20):
                while not listener.lost_parts or not listener.held:
                    await consumer.poll(max_records=10, timeout_s=0.1)
            assert set(listener.lost_parts) == before
            assert listener.revoked_parts == []
            assert fenced
            assert await transport.admin.committed(group, [topic]) == {}
            assert min(part.epoch for part in listener.held) > max(part.epoch for part in before)


async def expel(consumer: Any) -> None:
    from aiokafka.protocol.group import LeaveGroupRequest

    coordinator = consumer._reader.raw._coordinator
    response = await coordinator._send_req(LeaveGroupRequest(coordinator.group_id, coordinator.member_id))
    assert response.error_code == 0


async def test_a_fenced_commit_stops_deliveries_until_the_next_assignment(kafka: str) -> None:
    async with opened(kafka, PollSettings(session_timeout_s=10, heartbeat_s=3.0)) as transport:
        topic, group = await new_topic(transport, partitions=1), unique("group")
        async with transport.consume(group, [topic], listener=(listener := Recorder())) as consumer:
            while not listener.held:
                await consumer.poll(max_records=10, timeout_s=0.1)
            (part,) = listener.held
            await expel(consumer)
            with pytest.raises(Fenced, match="is no longer this member's"):
                await consumer.commit({part: 0})
            await put(transport, topic, "1")
            records = await take(consumer, 1)
            assert listener.lost_parts == [part]
            assert records[0].assignment.epoch > part.epoch


async def test_leaving_revokes_by_ourselves_while_commits_are_still_taken(kafka: str) -> None:
    """T8: aiokafka's `stop()` calls nobody."""
    async with opened(kafka) as transport:
        topic, group = await new_topic(transport, partitions=2), unique("group")

        async def drain(parts: Sequence[Assignment], lost: bool) -> None:
            await consumer.commit(dict.fromkeys(parts, 7))

        async with transport.consume(group, [topic], listener=(listener := Recorder(drain=drain))) as consumer:
            while not listener.held:
                await consumer.poll(max_records=10, timeout_s=0.1)
        assert len(listener.revoked_parts) == 2
        assert await transport.admin.committed(group, [topic]) == {(topic, 0): 7, (topic, 1): 7}


async def test_an_engine_that_does_not_poll_does_not_hold_up_the_group_and_hears_of_its_loss(kafka: str) -> None:
    settings = PollSettings(session_timeout_s=3, heartbeat_s=0.2, rebalance_timeout_s=1.0, request_timeout_s=5)
    async with opened(kafka, settings) as transport:
        topic, group = await new_topic(transport, partitions=2), unique("group")
        async with transport.consume(group, [topic], listener=(idle := Recorder())) as sleeper:
            while not idle.held:
                await sleeper.poll(max_records=10, timeout_s=0.1)
            old = set(idle.held)
            async with transport.consume(group, [topic], listener=(other := Recorder())) as consumer:
                async with asyncio.timeout(20):
                    while not other.held:
                        await consumer.poll(max_records=10, timeout_s=0.1)
                with pytest.raises(Fenced):
                    await sleeper.commit(dict.fromkeys(old, 1))
                async with asyncio.timeout(20):
                    while not idle.lost_parts:
                        await sleeper.poll(max_records=10, timeout_s=0.1)
                assert set(idle.lost_parts) == old


async def test_what_is_given_back_while_the_listener_is_asked_is_revoked_unread(kafka: str) -> None:
    """A rebalance may begin while `assigned` reads watermarks from a database."""
    async with opened(kafka) as transport:
        topic, group = await new_topic(transport, partitions=2), unique("group")
        await put(transport, topic, "1")
        asked, go_on = asyncio.Event(), asyncio.Event()

        class Slow(Recorder):
            async def assigned(
                self, parts: Sequence[Assignment], committed: Mapping[Assignment, int | None]
            ) -> Mapping[Assignment, int]:
                answer = await super().assigned(parts, committed)
                if not asked.is_set():
                    asked.set()
                    await go_on.wait()
                return answer

        async with transport.consume(group, [topic], listener=(slow := Slow())) as first:
            polling = asyncio.create_task(first.poll(max_records=10, timeout_s=1))
            await asked.wait()
            async with transport.consume(group, [topic], listener=(other := Recorder())) as second:
                await eventually(lambda: first._revocation is not None, what="the second one asks")  # type: ignore[attr-defined]
                go_on.set()
                records = list(await polling)
                async with asyncio.timeout(20):
                    while not (slow.held and other.held):
                        one, two = await asyncio.gather(
                            first.poll(max_records=10, timeout_s=0.1), second.poll(max_records=10, timeout_s=0.1)
                        )
                        records += [*one, *two]
                assert len(slow.revoked_parts) == 2
                old = {part.epoch for part in slow.revoked_parts}
                assert not [record for record in records if record.assignment.epoch in old]


async def test_a_listener_that_fails_is_asked_again(kafka: str) -> None:
    async with opened(kafka) as transport:
        topic = await new_topic(transport, partitions=1)
        await put(transport, topic, "1", "2", "3")
        tries = 0

        def start(part: Assignment) -> int:
            nonlocal tries
            tries += 1
            if tries == 1:
                raise ConnectionError("no database")
            return 1

        async with transport.consume(unique("group"), [topic], listener=Recorder(start=start)) as consumer:
            with pytest.raises(ConnectionError):
                await take(consumer, 1)
            assert values(await take(consumer, 2)) == ["2", "3"]


async def test_a_damaged_partition_is_named_and_stands_and_the_others_go_on(
    kafka: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T10: `getmany` raises at the same place for ever and does not say where. The checksum of partition 1 is made
    wrong where aiokafka looks at it."""
    metrics = MemoryMetrics()
    async with opened(kafka, metrics=metrics) as transport:
        topic = await new_topic(transport, partitions=3)
        for partition in range(3):
            await transport.publish(to(topic, f"{partition}a", f"{partition}b", partition=partition))
        from aiokafka.consumer.fetcher import PartitionRecords

        unpack, damaged = PartitionRecords._unpack_records, True

        def broken(self: Any) -> Any:
            for record in unpack(self):
                if damaged and (record.topic, record.partition, record.offset) == (topic, 1, 1):
                    raise CorruptRecordException("Invalid CRC")
                yield record

        monkeypatch.setattr(PartitionRecords, "_unpack_records", broken)
        # In order, so that partition 0 is drained, and its position moved, in the very call that fails at partition 1.
        monkeypatch.setattr("aiokafka.consumer.fetcher.random.shuffle", list.sort)
        monkeypatch.setattr(bus.kafka.reader, "UNREADABLE_RETRY_S", 0.5)
        found: list[str] = []
        async with transport.consume(unique("group"), [topic], listener=Recorder()) as consumer:

            async def poll_until(count: int) -> None:
                async with asyncio.timeout(20):
                    while len(found) < count:
                        found.extend(values(await consumer.poll(max_records=10, timeout_s=0.2)))

            with pytest.raises(UnreadablePartition, match=r"\[1\] cannot be read from offset 0 on") as caught:
                await poll_until(99)
            assert caught.value.assignment.partition == 1
            while len(found) < 4:
                try:
                    await poll_until(4)
                except UnreadablePartition:
                    continue
            assert sorted(found) == ["0a", "0b", "2a", "2b"]
            with pytest.raises(UnreadablePartition):  # said again, not once and for all
                await poll_until(5)
            damaged = False
            await poll_until(6)
            assert found[4:] == ["1a", "1b"]
    assert metrics.total("foldbus_unreadable_partitions_total", topic=topic) >= 2


async def test_a_commit_without_an_answer_is_bounded(fresh_kafka: Kafka) -> None:
    """T12: aiokafka repeats a commit without a limit."""
    settings = PollSettings(session_timeout_s=20, heartbeat_s=0.5, request_timeout_s=5.0)
    async with opened(fresh_kafka.bootstrap, settings) as transport:
        topic = await new_topic(transport, partitions=1)
        async with transport.consume(unique("group"), [topic], listener=(listener := Recorder())) as consumer:
            while not listener.held:
                await consumer.poll(max_records=10, timeout_s=0.1)
            await asyncio.to_thread(fresh_kafka.pause)
            try:
                async with asyncio.timeout(30):
                    with pytest.raises(TransportUnavailable, match="committing offsets"):
                        await consumer.commit(dict.fromkeys(listener.held, 1))
            finally:
                await asyncio.to_thread(fresh_kafka.resume)


async def test_a_header_without_a_value_is_delivered_as_an_empty_one(kafka: str) -> None:
    async with opened(kafka) as transport:
        topic = await new_topic(transport, partitions=1)
        producer = AIOKafkaProducer(bootstrap_servers=kafka)
        await producer.start()
        try:
            await producer.send_and_wait(topic, b"1", partition=0, headers=[("a", None), ("b", b"")])
        finally:
            await producer.stop()
        async with transport.tail(topic, start="begin") as consumer:
            (record,) = await take(consumer, 1)
        assert record.headers == (("a", b""), ("b", b""))


def test_a_timestamp_that_no_datetime_can_hold_is_held_within_what_one_can() -> None:
    """Older brokers take any number from a producer."""
    assert bus.kafka.reader._time(1_700_000_000_123) == datetime(2023, 11, 14, 22, 13, 20, 123000, tzinfo=UTC)
    assert bus.kafka.reader._time(-1) == datetime(1970, 1, 1, tzinfo=UTC)
    assert bus.kafka.reader._time(2**62).year == 9999


async def test_asking_about_a_topic_never_creates_it(kafka: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many brokers create a topic that is asked about, with a partition count nobody declared, unless told not to."""
    asked: list[tuple[str, bool | None]] = []
    send = AIOKafkaConnection.send

    def spy(self: Any, request: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(request, MetadataRequest):
            asked.extend((topic, request._allow_auto_topic_creation) for topic in request._topics or [])
        return send(self, request, *arguments, **options)

    monkeypatch.setattr(AIOKafkaConnection, "send", spy)
    async with opened(kafka) as transport:
        ghost = unique("ghost")
        assert await transport.admin.describe([ghost]) == {}
        assert kinds(await transport.publish(to(ghost, "1"))) == ["Failed"]
        with pytest.raises(MissingTopics):
            async with transport.consume(unique("group"), [ghost], listener=Recorder()):
                pass
        with pytest.raises(MissingTopics):
            async with transport.tail(ghost, start="end"):
                pass
        assert len(asked) >= 4
        assert set(asked) == {(ghost, False)}


@pytest.mark.parametrize("broker", ["is soon back", "is not there"])
async def test_a_topic_is_created_once_the_cluster_has_a_broker_for_it(
    kafka: str, broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then it says that a replication of one is too much; an answer that stays so is told."""
    monkeypatch.setattr("bus.kafka.admin._NO_BROKERS_S", 30.0 if broker == "is soon back" else 0.2)
    asked: list[list[str]] = []
    create = AIOKafkaAdminClient.create_topics

    async def fenced(self: Any, topics: Any) -> Any:
        asked.append([topic.name for topic in topics])
        if broker == "is soon back" and len(asked) == 3:
            return await create(self, topics)
        made = await create(self, topics[1:]) if len(asked) == 1 else None
        refused = (topics[0].name, InvalidReplicationFactorError.errno, "no brokers")
        return SimpleNamespace(topic_errors=[refused, *(made.topic_errors if made else ())])

    monkeypatch.setattr(AIOKafkaAdminClient, "create_topics", fenced)
    late, early = unique("late"), unique("early")
    async with opened(kafka) as transport:
        creating = transport.admin.create([TopicSpec(late, 2), TopicSpec(early, 1)])
        if broker == "is soon back":
            await creating
            assert asked == [[late, early], [late], [late]]
            assert (await transport.admin.describe([late]))[late].partitions == 2
        else:
            with pytest.raises(BusError, match=f"'{late}' was not created: InvalidReplicationFactorError no brokers"):
                await creating


async def test_a_compacted_topic_refuses_a_record_without_a_key_and_no_other(kafka: str) -> None:
    async with opened(kafka) as transport:
        topic = unique("compacted")
        await transport.admin.create([TopicSpec(topic, 1, compact=True)])
        answers = await transport.publish([Outgoing(topic, b"k", b"1"), Outgoing(topic, None, b"2"), *to(topic, "3")])
        assert kinds(answers) == ["Ack", "Failed", "Ack"]


async def test_a_record_that_has_no_form_on_the_wire_fails_alone(kafka: str) -> None:
    async with opened(kafka) as transport:
        topic = await new_topic(transport, partitions=1)
        bad = Outgoing(topic, b"k", b"v", (("\ud800", b""),), 0)
        assert kinds(await transport.publish([*to(topic, "1"), bad, *to(topic, "2"), bad])) == [
            "Ack",
            "Failed",
            "Ack",
            "Failed",
        ]
        assert await read_all(transport, topic) == ["1", "2"]
