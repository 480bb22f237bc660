"""The `cloudevents` package on the other side of a real Kafka: it reads what our services publish, and our sagas and
projections handle what it writes, in binary and in structured mode."""

# Without `from __future__ import annotations`: the services are made per test, of classes that only exist in there.
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord
from cloudevents.core.bindings import kafka as peer
from cloudevents.core.v1.event import CloudEvent
from pydantic import BaseModel

from bus.cloudevents import foreign_id
from bus.envelope import StreamId
from bus.metrics import MemoryMetrics
from bus.transport import TopicSpec
from eventstore.port import Wanted
from foldbus import Command, Connection, Decider, Event, Key, SagaRun, Service, projection, saga
from sagas import saga_id, saga_stream
from tests.stories.pairs import Pair, eventually, unique

pytestmark = pytest.mark.timeout(200)


@pytest.fixture
def pair(database: str, kafka: str) -> Pair:
    return Pair("servers", database, f"kafka://{kafka}")


class Nothing(BaseModel, frozen=True):
    pass


class Address(BaseModel, frozen=True):
    city: str = ""
    closed: bool = False


async def read(bootstrap: str, topic: str, wanted: int) -> list[ConsumerRecord[bytes, bytes]]:
    """The records of a topic from its beginning, by a client that knows nothing of us."""
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest", group_id=None)
    await consumer.start()
    try:
        return [await consumer.getone() for _ in range(wanted)]
    finally:
        await consumer.stop()


@asynccontextmanager
async def producing(bootstrap: str) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap)
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


async def test_the_cloudevents_package_reads_what_a_service_publishes(pair: Pair, kafka: str) -> None:
    shop = unique("shop")

    class Sold(Event, type=f"{shop}.sold.v1"):
        sale_id: Key[str]
        cents: int
        who: str

    class Audited(Event, type=f"{shop}.audited.v1", public=False):
        sale_id: Key[str]

    class Sell(Command[Sold], type=f"{shop}.sell.v1"):
        sale_id: Key[str]
        cents: int

    def evolve(state: Nothing, event: Sold | Audited) -> Nothing:
        return state

    def decide(state: Nothing, command: Sell) -> list[Sold | Audited]:
        return [Audited(sale_id=command.sale_id), Sold(sale_id=command.sale_id, cents=command.cents, who="Zoë")]

    service = Service(shop, deciders=[Decider("sale", initial=Nothing(), evolve=evolve, decide=decide)], partitions=2)
    started = datetime.now(UTC)
    async with pair.connect(service) as connection:
        command_id = await connection.send(Sell(sale_id="s 1", cents=5))
        await connection.send(Sell(sale_id="s 2", cents=7))
        records = await read(kafka, f"{shop}.events", 2)
        slices = await connection.store.load([Wanted(StreamId("sale", key)) for key in ("s 1", "s 2")])
    stored = {one.records[1].key: one.records[1] for one in slices}
    assert len(records) == 2
    for record in records:
        event = peer.from_kafka_event(peer.KafkaMessage(dict(record.headers), record.key, record.value or b""))
        envelope = stored[event.get_subject() or ""]
        assert record.key == envelope.key.encode()
        assert event.get_id() == str(envelope.id)
        assert event.get_source() == f"/{shop}"
        assert event.get_type() == f"{shop}.sold.v1"
        assert event.get_specversion() == "1.0"
        assert event.get_time() == envelope.time
        assert started <= envelope.time <= datetime.now(UTC)
        assert event.get_datacontenttype() == "application/json"
        assert event.get_data() == {"sale_id": envelope.key, "cents": 5 if envelope.key == "s 1" else 7, "who": "Zoë"}
        assert event.get_extension("sequence") == "2"
        assert event.get_extension("position") == str(envelope.position)
        assert event.get_extension("correlationid") == event.get_extension("causationid")
    first = next(record for record in records if record.key == b"s 1")
    assert dict(first.headers)["ce_causationid"] == str(command_id).encode()


class Crm:
    """A service of ours that follows two topics of strangers: one named like a service's, one named at will."""

    def __init__(self) -> None:
        self.name, self.crm, self.legacy = unique("letters"), unique("crm"), unique("legacy.customers")
        name, crm = self.name, self.crm

        class Moved(Event, type=f"{crm}.customer-moved.v1"):
            customer: Key[str]
            city: str

        class Closed(Event, type=f"{crm}.customer-closed.v1", topic=self.legacy):
            customer: Key[str]

        class Written(Event, type=f"{name}.written.v1"):
            customer: Key[str]
            text: str

        class Write(Command[Written], type=f"{name}.write.v1"):
            customer: Key[str]
            text: str

        def evolve(state: Nothing, event: Written) -> Nothing:
            return state

        def decide(state: Nothing, command: Write) -> list[Written]:
            return [Written(customer=command.customer, text=command.text)]

        @saga("greet", version=1)
        async def greet(run: SagaRun, moved: Moved) -> None:
            await run.step(Write(customer=moved.customer, text=f"welcome to {moved.city}"))

        @saga("say-goodbye", version=1)
        async def say_goodbye(run: SagaRun, closed: Closed) -> None:
            await run.step(Write(customer=closed.customer, text="goodbye"))

        @projection("addresses", version=1)
        def addresses(row: Address | None, event: Moved | Closed) -> Address | None:
            row = row or Address()
            match event:
                case Moved(city=city):
                    return row.model_copy(update={"city": city})
                case Closed():
                    return row.model_copy(update={"closed": True})

        self.addresses = addresses
        self.service = Service(
            name,
            deciders=[Decider("letter", initial=Nothing(), evolve=evolve, decide=decide)],
            sagas=[greet, say_goodbye],
            projections=[addresses],
            partitions=2,
        )

    async def letters(self, connection: Connection, customer: str) -> list[str]:
        (found,) = await connection.store.load([Wanted(StreamId("letter", customer))])
        written: list[Any] = [self.service.codec.decode(record) for record in found.records]
        return [one.text for one in written]

    async def ended(self, connection: Connection, saga_name: str, start: UUID) -> bool:
        (found,) = await connection.store.load([Wanted(saga_stream(saga_name, saga_id(saga_name, start)))])
        return bool(found.records) and found.records[-1].type == "foldbus.saga-completed.v1"


@pytest.mark.parametrize("mode", ["binary", "structured"])
async def test_what_the_cloudevents_package_writes_starts_sagas_and_feeds_projections(
    pair: Pair, kafka: str, mode: str
) -> None:
    write = peer.to_binary_event if mode == "binary" else peer.to_structured_event
    world, metrics = Crm(), MemoryMetrics()
    source, at = "https://crm.example/eu", datetime(2024, 5, 17, 11, 30, tzinfo=UTC) + timedelta(microseconds=7)

    def event(name: str, id: str, customer: str, data: dict[str, object], **more: str) -> peer.KafkaMessage:
        attributes = {"id": id, "source": source, "type": f"{world.crm}.{name}", "subject": customer, "time": at}
        written = write(CloudEvent({**attributes, "datacontenttype": "application/json", **more}, data))
        assert "ce_kind" not in written.headers
        return written

    moved = [
        event("customer-moved.v1", f"move#{n}", f"Zoë {n}", {"customer": f"Zoë {n}", "city": f"Köln {n}", "new": None})
        for n in range(3)
    ]
    keyed = event("customer-moved.v1", "move#3", "Zoë 3", {"customer": "Zoë 3", "city": "Ulm"}, partitionkey="another")
    closed = event("customer-closed.v1", "close#1", "Zoë 1", {"customer": "Zoë 1"})
    unnamed = event("customer-called.v1", "call#1", "Zoë 1", {"customer": "Zoë 1"})

    async with pair.transport() as outside, producing(kafka) as producer:
        await outside.admin.create([TopicSpec(f"{world.crm}.events", 2), TopicSpec(world.legacy, 1)])

        async def send(topic: str, message: peer.KafkaMessage) -> None:
            key = message.key.encode() if isinstance(message.key, str) else message.key
            await producer.send_and_wait(topic, message.value, key=key, headers=list(message.headers.items()))

        async with pair.connect(world.service, metrics=metrics) as connection:
            for message in (*moved, keyed, moved[0], unnamed):  # the first one again: its id is known
                await send(f"{world.crm}.events", message)
            await send(world.legacy, closed)
            await send(world.legacy, closed)

            view = connection.view(world.addresses)
            wanted = {
                "Zoë 0": (Address(city="Köln 0"), ["welcome to Köln 0"]),
                "Zoë 1": (Address(city="Köln 1", closed=True), ["goodbye", "welcome to Köln 1"]),
                "Zoë 2": (Address(city="Köln 2"), ["welcome to Köln 2"]),
                "Zoë 3": (Address(city="Ulm"), ["welcome to Ulm"]),
            }

            async def rows() -> dict[str, tuple[Address | None, list[str]]]:
                return {key: (await view.get(key), sorted(await world.letters(connection, key))) for key in wanted}

            async def all_ended() -> list[bool]:
                known = [("greet", f"move#{n}") for n in range(4)] + [("say-goodbye", "close#1")]
                return [await world.ended(connection, name, foreign_id(source, id)) for name, id in known]

            async def skipped() -> tuple[int, int]:
                group = f"{world.name}.saga.greet"
                return (
                    metrics.total("foldbus_skipped_total", group=group, type=f"{world.crm}.customer-called.v1"),
                    metrics.total("foldbus_projection_skipped_total", source=f"{world.crm}.events", reason="type"),
                )

            await eventually(rows, lambda found: found == wanted)
            await eventually(all_ended, all)
            await eventually(skipped, lambda found: found == (1, 1))

            async def duplicates() -> int:
                return metrics.total("foldbus_duplicates_total") + metrics.total("foldbus_saga_late_total")

            await eventually(duplicates, lambda found: found >= 2)
            assert await rows() == wanted, "the second delivery had an effect of its own"
            assert await connection.store.dead_letters() == []
            (start,) = (
                await connection.store.load(
                    [Wanted(saga_stream("greet", saga_id("greet", foreign_id(source, "move#3"))))]
                )
            )[0].records[:1]
            assert b'"ce_id":"move#3"' in start.data, "the original id stays with the story"
