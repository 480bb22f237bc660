"""A service whose messages changed shape: what an older deployment stored and sent is read by today's code.

Every story has two deployments of one service on the same store and bus: `old` writes, `new` reads.
"""

# Without `from __future__ import annotations`: services are made per test, of classes that only exist in there.
from dataclasses import replace
from typing import Any
from uuid import uuid5

import pytest
from pydantic import BaseModel

from bus.cloudevents import to_record
from bus.codec import JsonCodec
from bus.envelope import Envelope, Kind, Origin, ReplyOutcome, ReplyTo, StreamId
from bus.errors import BadUpcaster, UnknownType, UpcastFailed
from bus.metrics import MemoryMetrics
from bus.registry import Registry
from bus.seams import SystemClock, Uuid7Ids
from bus.transport import Ack
from bus.upcasting import Json, Parts
from eventstore.decider import DeciderBehaviour
from eventstore.port import ANY, Append, Unit, Wanted
from foldbus import (
    Command,
    Connection,
    Context,
    Decider,
    Event,
    Key,
    SagaRun,
    Service,
    drop_event,
    projection,
    saga,
    split_event,
    upcast,
)
from foldbus.cli import describe
from sagas import saga_id
from tests.eventstore.stores import whole_log
from tests.stories.conftest import PAIRS
from tests.stories.pairs import Pair, eventually, unique

ids, clock = Uuid7Ids(), SystemClock()


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return PAIRS[request.param](request)


class Order(BaseModel, frozen=True):
    cents: int = 0
    currency: str = ""
    seen: tuple[str, ...] = ()


class Summary(BaseModel, frozen=True):
    order_id: str
    cents: int = 0
    seen: tuple[str, ...] = ()


def in_cents(data: Json) -> Json:
    return {"order_id": data["order_id"], "cents": round(data["euros"] * 100)}


def with_currency(data: Json) -> Json:
    return {**data, "currency": "EUR"}


class Shop:
    """One shop, as it was and as it is: `placed` is at v3, `closed` became two events, `touched` is gone."""

    def __init__(self) -> None:
        name = self.name = unique("shop")
        self.v1, self.v2, self.v3 = (f"{name}.placed.v{n}" for n in (1, 2, 3))
        self.closed, self.touched = f"{name}.closed.v1", f"{name}.touched.v1"

        class OldPlaced(Event, type=self.v1):
            order_id: Key[str]
            euros: float

        class Closed(Event, type=self.closed):
            order_id: Key[str]

        class Touched(Event, type=self.touched):
            order_id: Key[str]

        class OldPlace(Command[OldPlaced], type=f"{name}.place.v1"):
            order_id: Key[str]
            euros: float

        class Close(Command[Closed], type=f"{name}.close.v1"):
            order_id: Key[str]

        class Touch(Command[Touched], type=f"{name}.touch.v1"):
            order_id: Key[str]

        def old_evolve(order: Order, event: OldPlaced | Closed | Touched) -> Order:
            return order

        def old_decide(order: Order, command: OldPlace | Close | Touch) -> list[OldPlaced | Closed | Touched]:
            match command:
                case OldPlace():
                    return [OldPlaced(order_id=command.order_id, euros=command.euros)]
                case Close():
                    return [Closed(order_id=command.order_id)]
                case Touch():
                    return [Touched(order_id=command.order_id)]

        self.old_place: Any = OldPlace
        self.close: Any = Close
        self.touch: Any = Touch
        self.old = Service(
            name, deciders=[Decider("order", initial=Order(), evolve=old_evolve, decide=old_decide)], partitions=2
        )

        class Placed(Event, type=self.v3):
            order_id: Key[str]
            cents: int
            currency: str

        class Paid(Event, type=f"{name}.paid.v1"):
            order_id: Key[str]

        class Sent(Event, type=f"{name}.sent.v1"):
            order_id: Key[str]

        class Place(Command[Placed], type=f"{name}.place.v2"):
            order_id: Key[str]
            cents: int
            currency: str

        def evolve(order: Order, event: Placed | Paid | Sent) -> Order:
            seen = (*order.seen, type(event).__name__)
            if isinstance(event, Placed):
                return Order(cents=order.cents + event.cents, currency=event.currency, seen=seen)
            return order.model_copy(update={"seen": seen})

        def decide(order: Order, command: Place) -> list[Placed]:
            cents = order.cents + command.cents  # tells what was folded
            return [Placed(order_id=command.order_id, cents=cents, currency=command.currency)]

        @projection("summary", version=1)
        def summary(row: Summary | None, event: Placed | Paid | Sent) -> Summary:
            row = row or Summary(order_id=event.order_id)
            cents = event.cents if isinstance(event, Placed) else 0
            return Summary(order_id=row.order_id, cents=row.cents + cents, seen=(*row.seen, type(event).__name__))

        @projection("sales", version=1)
        def sales(row: Summary | None, event: Placed | Sent) -> Summary:
            row = row or Summary(order_id=event.order_id)
            cents = event.cents if isinstance(event, Placed) else 0
            return Summary(order_id=row.order_id, cents=row.cents + cents, seen=(*row.seen, type(event).__name__))

        @saga("thank")
        async def thank(run: SagaRun, event: Paid) -> None:
            run.now()

        def closing(data: Json) -> Parts:
            return [(f"{name}.paid.v1", dict(data)), (f"{name}.sent.v1", dict(data))]

        self.placed, self.paid, self.sent = Placed, Paid, Sent
        self.place: Any = Place
        self.orders = Decider("order", initial=Order(), evolve=evolve, decide=decide)
        self.summary, self.sales, self.thank = summary, sales, thank
        self.events = [
            upcast(self.v1, to=self.v2, by=in_cents),
            upcast(self.v2, to=self.v3, by=with_currency),
            split_event(self.closed, to=(f"{name}.paid.v1", f"{name}.sent.v1"), by=closing),
            drop_event(self.touched),
        ]
        self.upcasters = [
            *self.events,
            upcast(f"{name}.place.v1", to=f"{name}.place.v2", by=lambda data: with_currency(in_cents(data))),
        ]
        self.new = self.service()

    def service(self, **changes: Any) -> Service:
        options: dict[str, Any] = {
            "deciders": [self.orders], "projections": [self.summary], "upcasters": self.upcasters, "partitions": 2,
        }  # fmt: skip
        return Service(self.name, **(options | changes))

    async def live_through(self, connection: Connection) -> None:
        """What the old deployment stored, of one order."""
        await connection.execute(self.old_place(order_id="o1", euros=1.5))
        await connection.execute(self.touch(order_id="o1"))
        await connection.execute(self.close(order_id="o1"))

    def behaviour(self, service: Service) -> DeciderBehaviour:
        return DeciderBehaviour(service.deciders, service=self.name, codec=service.codec, ids=ids, clock=clock)


SEEN = ("Placed", "Paid", "Sent")


async def test_an_aggregate_folds_what_older_deployments_stored(pair: Pair) -> None:
    shop = Shop()
    async with pair.connect(shop.old, worker=False) as connection:
        await shop.live_through(connection)
    async with pair.connect(shop.new, worker=False) as connection:
        placed = await connection.execute(shop.place(order_id="o1", cents=5, currency="EUR"))
        assert placed.cents == 155
        stream = StreamId("order", "o1")
        (part,) = await connection.store.load([Wanted(stream)])
        assert part.version == 4  # stored events, whatever they are read as
        behaviour = shop.behaviour(shop.new)
        state = behaviour.fold(behaviour.initial(stream), part.records).state
        assert state == Order(cents=305, currency="EUR", seen=(*SEEN, "Placed"))
        assert [record.type for record in part.records] == [shop.v1, shop.touched, shop.closed, shop.v3]


async def test_a_read_model_of_the_own_log_is_rebuilt_from_old_events(pair: Pair) -> None:
    shop, metrics = Shop(), MemoryMetrics()
    async with pair.connect(shop.old, worker=False) as connection:
        await shop.live_through(connection)
    async with pair.connect(shop.new, metrics=metrics) as connection:
        await connection.execute(shop.place(order_id="o1", cents=5, currency="EUR"))
        view = connection.view(shop.summary)
        row = await eventually(lambda: view.get("o1"), lambda row: row is not None and len(row.seen) == 4)
        assert row == Summary(order_id="o1", cents=305, seen=(*SEEN, "Placed"))
        assert (await view.verify()).ok
        assert await connection.store.dead_letters() == []


async def test_a_read_model_of_another_services_topic_takes_old_records(pair: Pair) -> None:
    """The consuming service says by itself what the other's old events mean to it; what it names of a split is one."""
    shop = Shop()
    metrics = MemoryMetrics()
    office = Service(
        unique("office"), projections=[shop.sales], messages=[shop.paid], upcasters=shop.events, partitions=2
    )
    async with pair.connect(shop.old) as connection:
        await shop.live_through(connection)
        async with pair.connect(office, metrics=metrics) as reader:
            view = reader.view(shop.sales)
            row = await eventually(lambda: view.get("o1"), lambda row: row is not None and len(row.seen) == 2)
            assert row == Summary(order_id="o1", cents=150, seen=("Placed", "Sent"))
            assert await reader.store.dead_letters() == []
            assert metrics.total("foldbus_projection_skipped_total", projection="sales", reason="part") == 1


async def test_a_command_of_an_older_caller_is_done_and_answered_as_it_asked(pair: Pair) -> None:
    """The answer has the type that the caller waits for: a saga of an older deployment takes no other."""
    shop = Shop()
    async with pair.connect(shop.new) as connection:
        old = shop.old_place(order_id="o1", euros=2.0)
        origin = Origin("caller", ids.new(), clock.now(), ids.new())
        to = ReplyTo(f"{shop.name}.replies", "k", "caller")
        asked = JsonCodec(Registry([shop.old_place])).encode(old, origin, topic=f"{shop.name}.commands", reply_to=to)
        (ack,) = await connection.transport.publish([to_record(asked)])
        assert isinstance(ack, Ack)

        status = await eventually(lambda: connection.status(asked.id), lambda status: status.reply is not None)
        reply = status.reply
        assert reply is not None
        assert (reply.type, reply.outcome, reply.causation_id) == (
            f"{shop.name}.place.reply.v1", ReplyOutcome.OK, asked.id,
        )  # fmt: skip
        (stored,) = [one for one in await whole_log(connection.store) if one.kind is Kind.EVENT]
        assert (stored.type, stored.data) == (shop.v3, b'{"order_id":"o1","cents":200,"currency":"EUR"}')


async def test_a_command_that_cannot_be_upcast_dies_as_the_one_that_was_sent(pair: Pair) -> None:
    shop = Shop()
    async with pair.connect(shop.new) as connection:
        torn = JsonCodec(Registry([shop.old_place])).encode(
            shop.old_place(order_id="o1", euros=1), Origin("caller", ids.new(), clock.now(), ids.new())
        )
        torn = replace(torn, data=b'{"order_id":"o1"}', topic=f"{shop.name}.commands")
        await connection.transport.publish([to_record(torn)])
        (letter,) = await eventually(connection.store.dead_letters, lambda found: len(found) == 1)
        assert (letter.id, letter.type, letter.value) == (torn.id, f"{shop.name}.place.v1", b'{"order_id":"o1"}')
        assert letter.failure.error == "bus.errors.UpcastFailed"
        assert f"the upcaster of {shop.name}.place.v1" in letter.failure.message
        assert "KeyError: 'euros'" in letter.failure.message


def events_of(shop: Shop, *bodies: tuple[str, bytes]) -> list[Envelope]:
    return [
        Envelope(
            id=ids.new(), kind=Kind.EVENT, type=name, source=shop.name, key="o1", data=data, time=clock.now(),
            correlation_id=ids.new(), topic=f"{shop.name}.events",
        )
        for name, data in bodies
    ]  # fmt: skip


async def append(connection: Connection, stream: StreamId, *envelopes: Envelope) -> None:
    await connection.store.commit([Unit(claim=None, appends=(Append(stream, ANY, tuple(envelopes)),))])


async def test_an_old_event_that_cannot_be_upcast_fails_its_aggregate_and_is_a_dead_letter_of_readers(
    pair: Pair,
) -> None:
    shop = Shop()
    bad, good = events_of(shop, (shop.v1, b'{"order_id":"o1"}'), (shop.v1, b'{"order_id":"o1","euros":1}'))
    async with pair.connect(shop.new) as connection:
        await append(connection, StreamId("order", "o1"), bad, good)
        with pytest.raises(UpcastFailed, match="KeyError: 'euros'"):
            await connection.execute(shop.place(order_id="o1", cents=5, currency="EUR"))
        assert (await connection.execute(shop.place(order_id="o2", cents=5, currency="EUR"))).cents == 5
        view = connection.view(shop.summary)
        row = await eventually(lambda: view.get("o1"), lambda row: row is not None)
        assert row == Summary(order_id="o1", cents=100, seen=("Placed",))
        (letter,) = await connection.store.dead_letters()
        assert (letter.id, letter.type, letter.value, letter.failure.error) == (
            bad.id,
            shop.v1,
            bad.data,
            "UpcastFailed",
        )


async def test_of_a_split_event_a_read_model_takes_all_parts_or_none(pair: Pair) -> None:
    shop = Shop()

    def halfway(data: Json) -> Parts:
        return [(f"{shop.name}.paid.v1", data), (f"{shop.name}.sent.v1", {"parcel": 1})]

    torn = split_event(shop.closed, to=(f"{shop.name}.paid.v1", f"{shop.name}.sent.v1"), by=halfway)
    service = shop.service(upcasters=[torn])
    (old,) = events_of(shop, (shop.closed, b'{"order_id":"o1"}'))
    (after,) = events_of(shop, (f"{shop.name}.sent.v1", b'{"order_id":"o1"}'))
    async with pair.connect(service) as connection:
        await append(connection, StreamId("order", "o1"), old, after)
        view = connection.view(shop.summary)
        row = await eventually(lambda: view.get("o1"), lambda row: row is not None)
        assert row == Summary(order_id="o1", seen=("Sent",))
        (letter,) = await connection.store.dead_letters()
        assert (letter.id, letter.type, letter.value) == (old.id, shop.closed, old.data)


async def test_the_dead_letter_of_what_was_upcast_keeps_what_was_stored(pair: Pair) -> None:
    """Also where the upcaster did its work and what it made does not fit."""
    shop = Shop()
    service = shop.service(upcasters=[upcast(shop.v1, to=shop.v3, by=dict), upcast(shop.v2, to=shop.v3, by=dict)])
    (old,) = events_of(shop, (shop.v1, b'{"order_id": "o1","euros":1}'))
    async with pair.connect(service) as connection:
        await append(connection, StreamId("order", "o1"), old)
        (letter,) = await eventually(connection.store.dead_letters, lambda found: len(found) == 1)
        assert (letter.id, letter.type, letter.value) == (old.id, shop.v1, old.data)
        assert "cents: Field required" in letter.failure.message


async def test_a_dropped_version_of_an_event_that_is_named_is_no_dead_letter(pair: Pair) -> None:
    shop, metrics = Shop(), MemoryMetrics()
    service = shop.service(upcasters=[drop_event(shop.v1)])
    old, unknown = events_of(shop, (shop.v1, b'{"order_id":"o1"}'), (shop.v2, b'{"order_id":"o1"}'))
    async with pair.connect(service, metrics=metrics) as connection:
        await append(connection, StreamId("order", "o1"), old, unknown)
        (letter,) = await eventually(connection.store.dead_letters, lambda found: len(found) > 0)
        assert (letter.id, letter.failure.error) == (unknown.id, "UnknownVersion")
        skipped = metrics.total("foldbus_projection_skipped_total", projection="summary", source="log", reason="type")
        assert skipped == 1


async def test_an_aggregate_refuses_a_part_that_it_does_not_know(pair: Pair) -> None:
    shop = Shop()
    stray = upcast(f"{shop.name}.old.v1", to=f"{shop.name}.elsewhere.v1", by=dict)

    class Elsewhere(Event, type=f"{shop.name}.elsewhere.v1"):
        order_id: Key[str]

    service = shop.service(upcasters=[stray], messages=[Elsewhere])
    (old,) = events_of(shop, (f"{shop.name}.old.v1", b'{"order_id":"o1"}'))
    async with pair.connect(service, worker=False) as connection:
        await append(connection, StreamId("order", "o1"), old)
        with pytest.raises(UnknownType, match=r"old\.v1, upcast to .*elsewhere\.v1, which .* does not evolve on"):
            await connection.execute(shop.place(order_id="o1", cents=5, currency="EUR"))


class TestASaga:
    async def test_starts_on_old_records_once_for_each_part_that_it_names(self, pair: Pair) -> None:
        shop = Shop()

        def twice(data: Json) -> Parts:
            return [(f"{shop.name}.paid.v1", dict(data)), (f"{shop.name}.sent.v1", dict(data))] * 2

        split = split_event(shop.closed, to=(f"{shop.name}.paid.v1", f"{shop.name}.sent.v1"), by=twice)
        office = Service(
            unique("office"), sagas=[shop.thank], messages=[shop.sent], upcasters=[split, drop_event(shop.touched)],
            partitions=2,
        )  # fmt: skip
        async with pair.connect(shop.old) as connection:
            await shop.live_through(connection)
            (closed,) = [one for one in await whole_log(connection.store) if one.type == shop.closed]
            wanted = {str(saga_id("thank", closed.id)), str(saga_id("thank", uuid5(closed.id, "2")))}
            metrics = MemoryMetrics()
            async with pair.connect(office, metrics=metrics) as reader:

                async def started() -> set[str]:
                    log = await whole_log(reader.store)
                    return {one.key for one in log if one.type == "foldbus.saga-started.v1"}

                assert await eventually(started, lambda found: len(found) >= 2) == wanted
                # Once more, and a bad one, and a good one behind: nothing starts twice, and nothing waits.
                again = replace(closed, topic=f"{shop.name}.events")
                (bad,) = events_of(shop, (shop.closed, b"[]"))
                (last,) = events_of(shop, (f"{shop.name}.paid.v1", b'{"order_id":"o1"}'))
                await reader.transport.publish([to_record(again), to_record(bad), to_record(last)])
                wanted.add(str(saga_id("thank", last.id)))
                assert await eventually(started, lambda found: len(found) >= 3) == wanted
                (letter,) = await reader.store.dead_letters()
                assert (letter.id, letter.type, letter.value) == (bad.id, shop.closed, b"[]")
                assert letter.failure.error == "bus.errors.UpcastFailed"

    async def test_that_began_on_an_old_event_goes_on_under_the_new_class(self, pair: Pair) -> None:
        name, office = unique("shop"), unique("office")

        class OldPlaced(Event, type=f"{name}.placed.v1"):
            order_id: Key[str]

        class Placed(Event, type=f"{name}.placed.v2"):
            order_id: Key[str]
            note: str

        class Noted(Event, type=f"{name}.noted.v1"):
            order_id: Key[str]
            note: str

        class Note(Command[Noted], type=f"{name}.note.v1"):
            order_id: Key[str]

        class Thank(Command[Noted], type=f"{name}.thank.v1"):
            order_id: Key[str]
            note: str

        @saga("thank")
        async def before(run: SagaRun, placed: OldPlaced) -> None:
            await run.step(Note(order_id=placed.order_id))
            await run.step(Thank(order_id=placed.order_id, note="?"))

        @saga("thank")
        async def after(run: SagaRun, placed: Placed) -> None:
            await run.step(Note(order_id=placed.order_id))
            await run.step(Thank(order_id=placed.order_id, note=placed.note))

        def decide(order: Order, command: Note | Thank) -> list[Noted]:
            note = command.note if isinstance(command, Thank) else ""
            return [Noted(order_id=command.order_id, note=note)]

        def evolve(order: Order, event: Noted) -> Order:
            return order

        shop = Service(
            name, deciders=[Decider("order", initial=Order(), evolve=evolve, decide=decide)], messages=[OldPlaced]
        )
        async with pair.connect(shop, worker=False) as client, pair.transport() as outside:
            async with pair.connect(Service(office, sagas=[before])) as reader:
                start = client.envelope(OldPlaced(order_id="o1"), topic=f"{name}.events")
                await outside.publish([to_record(start)])

                async def asked() -> list[Envelope]:
                    log = await whole_log(reader.store)
                    return [one for one in log if one.type == "foldbus.saga-step-scheduled.v1"]

                await eventually(asked, lambda found: len(found) == 1)
        later = upcast(f"{name}.placed.v1", to=f"{name}.placed.v2", by=lambda data: {**data, "note": "thanks"})
        async with pair.connect(shop) as client, pair.connect(Service(office, sagas=[after], upcasters=[later])):

            async def noted() -> list[bytes]:
                log = await whole_log(client.store)
                return [one.data for one in log if one.type == f"{name}.noted.v1"]

            found = await eventually(noted, lambda found: len(found) == 2)
            assert found == [b'{"order_id":"o1","note":""}', b'{"order_id":"o1","note":"thanks"}']


class TestAHandler:
    async def test_takes_old_events_part_by_part_and_old_commands(self, pair: Pair) -> None:
        shop, seen = Shop(), list[str]()
        name = unique("office")
        placed, sent = shop.placed, shop.sent

        class Stamp(Command[None], type=f"{name}.stamp.v2"):
            paper: Key[str]
            ink: str

        class OldStamp(Command[None], type=f"{name}.stamp.v1"):
            paper: Key[str]

        async def note(event: Event, ctx: Context) -> None:
            seen.append(type(event).__name__)

        note.__annotations__["event"] = placed | sent

        async def stamp(command: Stamp, ctx: Context) -> None:
            seen.append(command.ink)

        inked = upcast(f"{name}.stamp.v1", to=f"{name}.stamp.v2", by=lambda data: {**data, "ink": "red"})
        office = Service(
            name, handlers=[note, stamp], messages=[shop.paid], upcasters=[*shop.events, inked], partitions=2
        )
        async with pair.connect(shop.old) as connection:
            await shop.live_through(connection)
            async with pair.connect(office) as reader:
                origin = Origin("caller", ids.new(), clock.now(), ids.new())
                old = JsonCodec(Registry([OldStamp])).encode(OldStamp(paper="p"), origin, topic=f"{name}.commands")
                await reader.transport.publish([to_record(old)])

                async def all_seen() -> list[str]:
                    return sorted(seen)

                assert await eventually(all_seen, lambda found: len(found) >= 3) == ["Placed", "Sent", "red"]
                assert await reader.store.dead_letters() == []


def test_describe_tells_what_old_types_are_read_as(capsys: pytest.CaptureFixture[str]) -> None:
    shop = Shop()
    found = describe.document(shop.new)
    told = {one["type"]: one["read_as"] for one in found["upcasters"]}
    assert told[shop.v1] == [shop.v2]
    assert told[shop.touched] == []
    describe._show(found)  # pyright: ignore[reportPrivateUsage]
    assert f"reads {shop.touched} as nothing" in capsys.readouterr().out


def test_a_service_refuses_a_table_that_leads_nowhere() -> None:
    shop = Shop()
    with pytest.raises(BadUpcaster, match="and there it stops: this service names"):
        shop.service(upcasters=shop.events[:1])
