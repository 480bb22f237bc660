"""Upcasters: chains, splits and drops against a plain model, what is refused at start-up, and what a bad one does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any
from uuid import UUID, uuid5

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.codec import JsonCodec
from bus.envelope import Envelope, Failure, Kind, StreamId
from bus.errors import BadInput, BadUpcaster, Undecodable, UnknownVersion, UpcastFailed
from bus.messages import Command, Event, Key, Message
from bus.metrics import MemoryMetrics
from bus.processing import Again, Aside, Done, Failed, Item, Result, Watermarks
from bus.registry import Registry
from bus.transport import Delivery
from bus.upcast_processing import UpcastProcessor
from bus.upcasting import PARTS_MAX, Json, Parts, Upcaster, Upcasting, drop_event, split_event, upcast

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
V1, V2, V3 = (f"orders.order-placed.v{n}" for n in (1, 2, 3))
PAID, SENT = "orders.order-paid.v1", "orders.order-sent.v1"
CLOSED = "orders.order-closed.v1"


class Placed(Event, type=V3):
    order_id: Key[str]
    cents: int
    currency: str


class Paid(Event, type=PAID):
    order_id: Key[str]


class Sent(Event, type=SENT):
    order_id: Key[str]


class Place(Command[Placed], type="orders.place.v2"):
    order_id: Key[str]


def in_cents(data: Json) -> Json:
    data["cents"] = round(data.pop("euros") * 100)
    return data


def in_euros(data: Json) -> Json:
    return {**data, "currency": "EUR"}


def closing(data: Json) -> Parts:
    return [(PAID, {"order_id": data["order_id"]}), (SENT, {"order_id": data["order_id"]})]


CHAIN = (upcast(V1, to=V2, by=in_cents), upcast(V2, to=V3, by=in_euros))
SPLIT = split_event(CLOSED, to=(PAID, SENT), by=closing)


def stored(name: str, document: Any, *, number: int = 7) -> Envelope:
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return Envelope(
        id=UUID(int=number), kind=Kind.EVENT, type=name, source="orders", key="o1", data=data, time=NOON,
        correlation_id=UUID(int=1), stream=StreamId("order", "o1"), version=number, position=number * 10,
    )  # fmt: skip


def codec(*upcasters: Upcaster) -> JsonCodec:
    return JsonCodec(Registry([Placed, Paid, Sent, Place], upcasters=upcasters))


# --- reading ---------------------------------------------------------------------------------------------------------


def test_an_old_event_is_read_as_todays_through_all_versions() -> None:
    read = codec(*CHAIN)
    (today,) = read.upcast(stored(V1, {"order_id": "o1", "euros": 1.5}), {V3})
    assert read.decode(today) == Placed(order_id="o1", cents=150, currency="EUR")
    (today,) = read.upcast(stored(V2, {"order_id": "o1", "cents": 5}), {V3})
    assert read.decode(today) == Placed(order_id="o1", cents=5, currency="EUR")


def test_a_chain_ends_at_the_first_type_that_the_reader_names() -> None:
    old = stored(V1, {"order_id": "o1", "euros": 1})
    table = Upcasting(CHAIN)
    assert [part.type for part in table.read(old, {V2, V3})] == [V2]
    assert [part.type for part in table.read(old, {V1, V3})] == [V1]
    assert table.older({V3}) == {V1, V2}
    assert table.older({V2}) == {V1}
    assert table.older({PAID}) == frozenset()


def test_what_is_read_keeps_its_place_its_key_and_its_story() -> None:
    old = stored(V1, {"order_id": "o1", "euros": 1})
    (today,) = Upcasting(CHAIN).read(old, {V3})
    assert replace(today, type=old.type, data=old.data) == old


def test_a_message_that_needs_none_is_given_back_as_it_is_even_when_it_is_no_json() -> None:
    torn = stored(V3, b"\xff")
    assert Upcasting(CHAIN).read(torn, {V3}) == (torn,)
    unknown = stored("orders.other.v1", b"\xff")
    assert Upcasting(CHAIN).read(unknown, {V3}) == (unknown,)


def test_a_split_event_keeps_its_id_for_the_first_part_that_the_reader_names() -> None:
    old = stored(CLOSED, {"order_id": "o1"})
    table = Upcasting([SPLIT])
    both = table.read(old, {PAID, SENT})
    assert [(part.type, part.id) for part in both] == [(PAID, old.id), (SENT, uuid5(old.id, "1"))]
    second = table.read(old, {SENT})
    assert [(part.type, part.id) for part in second] == [(PAID, uuid5(old.id, "0")), (SENT, old.id)]
    assert {part.position for part in both} == {old.position}
    assert table.read(old, {PAID, SENT}) == both


def test_a_dropped_event_is_nothing() -> None:
    assert Upcasting([drop_event(CLOSED)]).read(stored(CLOSED, {}), {PAID}) == []
    nothing = split_event(CLOSED, to=(PAID,), by=lambda data: ())
    assert Upcasting([nothing]).read(stored(CLOSED, {}), {PAID}) == []


def test_a_step_sees_json_and_nothing_that_an_earlier_step_left_behind() -> None:
    """Parts that share an object, and values that are no JSON, must look like those of a stored event."""
    seen: list[Any] = []
    shared = {"at": datetime(2026, 1, 1, tzinfo=UTC), "tags": ("a",)}

    def share(data: Json) -> Parts:
        return [(PAID, {"order_id": "o1", "x": shared}), (PAID, {"order_id": "o1", "x": shared})]

    def look(data: Json) -> Json:
        seen.append(json.loads(json.dumps(data)))
        data["x"].clear()
        return data

    table = Upcasting([split_event(CLOSED, to=PAID, by=share), upcast(PAID, to=SENT, by=look)])
    table.read(stored(CLOSED, {}), {SENT})
    assert seen == [{"order_id": "o1", "x": {"at": "2026-01-01T00:00:00Z", "tags": ["a"]}}] * 2
    assert shared["tags"] == ("a",)


def test_what_is_upcast_is_validated_as_json_is() -> None:
    """A strict model takes a date from JSON text, but not from a Python string."""

    class Dated(Event, type="orders.dated.v2", strict=True):
        order_id: Key[str]
        at: datetime

    read = JsonCodec(Registry([Dated], upcasters=[upcast("orders.dated.v1", to="orders.dated.v2", by=dict)]))
    (part,) = read.upcast(stored("orders.dated.v1", {"order_id": "o1", "at": NOON.isoformat()}), {"orders.dated.v2"})
    assert read.decode(part) == Dated(order_id="o1", at=NOON)


FAILING: list[tuple[Callable[[Json], Any], Any, str]] = [
    (lambda data: data["cents"], {"order_id": "o1"}, "KeyError: 'cents'"),
    (lambda data: None, {}, "it gave NoneType for .*v2, wanted a dict"),
    (lambda data: {"a": object()}, {}, "PydanticSerializationError"),
    (lambda data: {"a": "\ud800"}, {}, "failed: .*Error"),
    (dict, b"\xff", "is no JSON"),
    (dict, [1], "is a JSON list, .* wanted an object"),
]


@pytest.mark.parametrize(("by", "data", "said"), FAILING)
def test_a_failing_upcaster_says_of_which_type_and_why(by: Any, data: Any, said: str) -> None:
    table = Upcasting([upcast(V1, to=V2, by=by)])
    with pytest.raises(UpcastFailed, match=said) as raised:
        table.read(stored(V1, data), {V2})
    assert V1 in str(raised.value)
    assert isinstance(raised.value, BadInput)


def test_a_part_of_a_type_that_the_table_does_not_say_is_refused() -> None:
    table = Upcasting([split_event(CLOSED, to=(PAID,), by=closing)])
    with pytest.raises(UpcastFailed, match=f"it gave a '{SENT}'"):
        table.read(stored(CLOSED, {"order_id": "o1"}), {PAID})


def test_an_event_does_not_become_more_messages_than_the_bound() -> None:
    def times(count: int, target: str) -> Callable[[Json], Parts]:
        return lambda data: [(target, data)] * count

    many = split_event(CLOSED, to=(PAID,), by=times(PARTS_MAX + 1, PAID))
    with pytest.raises(UpcastFailed, match="more than 1000 parts"):
        Upcasting([many]).read(stored(CLOSED, {}), {PAID})
    some = split_event(CLOSED, to=(PAID,), by=times(40, PAID))
    more = split_event(PAID, to=(SENT,), by=times(40, SENT))
    with pytest.raises(UpcastFailed, match="became more than 1000"):
        Upcasting([some, more]).read(stored(CLOSED, {}), {SENT})


def test_a_cancelled_reader_is_cancelled() -> None:
    def cancel(data: Json) -> Json:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        Upcasting([upcast(V1, to=V2, by=cancel)]).read(stored(V1, {}), {V2})


# --- any table, against a plain model --------------------------------------------------------------------------------

Table = Mapping[int, Sequence[int]]


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Type n becomes types above n, in that order, some of them twice."""
    count = draw(st.integers(1, 6))
    sources = draw(st.sets(st.integers(0, count - 1)))
    return {n: draw(st.lists(st.integers(n + 1, count), max_size=3)) for n in sorted(sources)}


def name(number: int) -> str:
    return f"orders.thing-{'abcdefgh'[number]}.v1"


def model(table: Table, at: int, names: Collection[int], trail: tuple[int, ...] = ()) -> list[tuple[int, list[int]]]:
    if at in names or at not in table:
        return [(at, list(trail))]
    return [end for to in table[at] for end in model(table, to, names, (*trail, at))]


def upcasters(table: Table) -> list[Upcaster]:
    def of(source: int, targets: Sequence[int]) -> Upcaster:
        def by(data: Json) -> Parts:
            data["trail"].append(source)
            return [(name(target), data) for target in targets]

        return split_event(name(source), to={name(target) for target in targets}, by=by)

    return [of(source, targets) for source, targets in table.items()]


@given(tables(), st.sets(st.integers(0, 6)), st.integers(0, 6))
def test_any_table_reads_as_the_plain_model_does(table: Table, names: set[int], start: int) -> None:
    named = {name(number) for number in names}
    made = Upcasting(upcasters(table))
    record = stored(name(start), {"trail": []})
    parts = made.read(record, named)
    wanted = model(table, start, names)
    assert [(part.type, json.loads(part.data)["trail"]) for part in parts] == [(name(end), by) for end, by in wanted]
    assert len({part.id for part in parts}) == len(parts)
    first = next((number for number, (end, _) in enumerate(wanted) if end in names), 0)
    assert [number for number, part in enumerate(parts) if part.id == record.id] == ([first] if parts else [])
    may_lead = {n for n in table if n not in names and any(reaches(table, to, names) for to in table[n])}
    assert made.older(named) - named == {name(n) for n in may_lead}


def reaches(table: Table, at: int, names: Collection[int]) -> bool:
    return at in names or any(reaches(table, to, names) for to in table.get(at, ()))


# --- start-up --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([*CHAIN, upcast(V1, to=V3, by=dict)], f"two upcasters say what becomes of {V1}"),
        ([drop_event(V1), drop_event(V1)], f"two upcasters say what becomes of {V1}"),
        ([upcast(V1, to=V2, by=dict), upcast(V2, to=V1, by=dict)], f"in a circle: {V1} → {V2} → {V1}"),
        ([upcast(V1, to=V1, by=dict)], f"in a circle: {V1} → {V1}"),
        (
            [upcast(PAID, to=V1, by=dict), upcast(V1, to=V2, by=dict), upcast(V2, to=V1, by=dict)],
            f"in a circle: {V1} → {V2} → {V1}",
        ),
        ([upcast("OrderPlaced", to=V1, by=dict)], "'OrderPlaced' is no type name"),
        ([upcast(V1, to="orders.order-placed.2", by=dict)], f"upcaster of '{V1}': 'orders.order-placed.2' is no type"),
        ([upcast(V1, to=V2, by=dict)], f"{V1} is upcast to {V2}, and there it stops: this service names {V3}"),
        ([upcast(V1, to="orders.unheard.v1", by=dict)], "orders.unheard.v1, which is not one that this service names"),
        ([upcast("orders.place.v1", to=PAID, by=dict)], "upcast from command and event"),
        ([split_event("orders.place.v1", to=("orders.place.v2",), by=lambda data: ())], "cannot be split or dropped"),
        ([drop_event("orders.place.v1")], "cannot be split or dropped"),
    ],
)
def test_a_table_that_cannot_work_is_refused_with_its_reason(table: list[Upcaster], said: str) -> None:
    with pytest.raises(BadUpcaster, match=said.replace(".", r"\.")):
        codec(*table).registry.upcasting.check(codec().registry.types)


def test_a_table_that_works_is_taken() -> None:
    command = upcast("orders.place.v1", to="orders.place.v2", by=dict)
    older = upcast("orders.order-placed.v9", to=V3, by=dict)  # a consumer that is behind its producer
    made = codec(*CHAIN, SPLIT, command, older, drop_event("orders.order-touched.v1"))
    made.registry.upcasting.check(made.registry.types)
    assert made.registry.upcasting.table[CLOSED] == (PAID, SENT)


def test_a_lattice_of_splits_is_checked_in_no_time() -> None:
    """Its paths are 2 to the power of 60: whoever walks each of them never comes back."""
    rows = [(f"orders.a{n}.v1", f"orders.b{n}.v1") for n in range(60)]
    table = [split_event(source, to=below, by=lambda data: ()) for above, below in pairwise(rows) for source in above]
    ends: dict[str, type[Message]] = {rows[-1][0]: Paid, rows[-1][1]: Sent}
    Upcasting(table).check(ends)


def test_a_version_that_no_upcaster_takes_is_still_unknown() -> None:
    read = codec(*CHAIN)
    (same,) = read.upcast(stored("orders.order-placed.v7", b"{}"), {V3})
    with pytest.raises(UnknownVersion):
        read.decode(same)


# --- a processor's view ----------------------------------------------------------------------------------------------


class Recorder:
    """Handles what it is given, and answers what the test says for an id."""

    group = "orders.saga.x"

    def __init__(self) -> None:
        self.seen: list[Envelope] = []
        self.answers: dict[UUID, Result] = {}
        self.given_up: list[Envelope] = []
        self.marks: Watermarks = {}
        self.raw = 0

    def wants(self, type_name: str) -> bool:
        if type_name == "orders.order-placed.v9":
            raise UnknownVersion(type_name)
        return type_name in (PAID, SENT)

    async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Result]:
        self.marks = watermarks
        self.seen = [item.envelope for item in batch]
        waiting: set[str] = set()
        results: list[Result] = []
        for item in batch:
            result: Result = Again() if item.envelope.key in waiting else self.answers.get(item.envelope.id, Done())
            if not isinstance(result, Done):
                waiting.add(item.envelope.key)
                item.examine = True
            results.append(result)
        return results

    async def give_up(self, item: Item, failure: Failure) -> Result:
        self.given_up.append(item.envelope)
        return self.answers.get(item.envelope.id, Done())

    async def give_up_raw(self, delivery: Delivery, failure: Failure) -> None:
        self.raw += 1

    async def stored_watermarks(self) -> Watermarks:
        return {("t", 0): 4}

    async def store_watermarks(self, watermarks: Watermarks) -> None:
        self.marks = watermarks

    def forget(self, topics: Collection[tuple[str, int]]) -> None:
        self.marks = {}


OLD_PAID = "orders.was-paid.v1"


def fragile(data: Json) -> Json:
    return {"order_id": data["order_id"]}


class World:
    def __init__(self, *names: str) -> None:
        self.inner, self.metrics = Recorder(), MemoryMetrics()
        made = codec(SPLIT, upcast(OLD_PAID, to=PAID, by=fragile), drop_event("orders.order-touched.v1"), *CHAIN)
        self.outer = UpcastProcessor(self.inner, names or (PAID, SENT), codec=made, metrics=self.metrics)

    async def process(self, *envelopes: Envelope) -> list[Result]:
        self.items = [Item(envelope, None) for envelope in envelopes]
        return list(await self.outer.process(self.items, {("t", 0): 3}))


def failure() -> Failure:
    return Failure("KeyError", "x", "", 1, NOON, NOON)


async def test_a_consumer_wants_what_leads_to_its_types_and_skips_the_rest_by_header() -> None:
    outer = World(PAID).outer
    assert [outer.wants(one) for one in (PAID, OLD_PAID, CLOSED)] == [True, True, True]
    assert [outer.wants(one) for one in (V1, "orders.order-touched.v1", "orders.else.v1")] == [False, False, False]
    with pytest.raises(UnknownVersion):
        outer.wants("orders.order-placed.v9")


async def test_a_batch_without_old_events_goes_through_as_it_is() -> None:
    world = World()
    await world.process(stored(PAID, b"\xff"), stored(SENT, b"\xff", number=8))
    assert [one.data for one in world.inner.seen] == [b"\xff"] * 2
    assert world.inner.marks == {("t", 0): 3}


async def test_a_split_event_is_done_when_all_its_parts_are() -> None:
    world = World()
    old = stored(CLOSED, {"order_id": "o1"})
    assert await world.process(old) == [Done()]
    assert [(one.type, one.id) for one in world.inner.seen] == [(PAID, old.id), (SENT, uuid5(old.id, "1"))]
    assert world.inner.marks == {("t", 0): 3}
    world.inner.answers[uuid5(old.id, "1")] = Again(after_s=2.0)
    assert await world.process(old) == [Again(after_s=2.0)]
    assert world.items[0].examine
    failed = Failed(RuntimeError())
    world.inner.answers[old.id] = failed
    assert await world.process(old) == [failed]


async def test_parts_that_the_consumer_does_not_name_are_skipped_and_counted() -> None:
    world = World(PAID)
    assert await world.process(stored(CLOSED, {"order_id": "o1"})) == [Done()]
    assert [one.type for one in world.inner.seen] == [PAID]
    assert world.metrics.total("foldbus_skipped_total") == 1


async def test_what_cannot_be_upcast_fails_alone_and_holds_up_only_its_key() -> None:
    world = World()
    before, other = stored(PAID, {"order_id": "o1"}, number=1), replace(stored(OLD_PAID, {"order_id": "o2"}), key="o2")
    bad, behind = stored(OLD_PAID, {}, number=3), stored(SENT, {"order_id": "o1"}, number=4)
    first, failed, waits, fine = await world.process(before, bad, behind, other)
    assert [one.id for one in world.inner.seen] == [before.id, other.id]
    assert (first, waits, fine) == (Done(), Again(), Done())
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, UpcastFailed)


async def test_behind_what_is_not_done_nothing_of_its_key_is_done() -> None:
    """Also not an old event that turns out to be nothing: the engine would take it for a broken processor."""
    world = World(SENT)
    before = stored(SENT, {"order_id": "o1"}, number=1)
    world.inner.answers[before.id] = Again()
    nothing = replace(stored(CLOSED, {"order_id": "o1"}, number=2), type=CLOSED)
    world.outer = UpcastProcessor(
        world.inner,
        (SENT,),
        codec=codec(split_event(CLOSED, to=(SENT,), by=lambda data: ())),
        metrics=world.metrics,
    )
    assert await world.process(before, nothing) == [Again(), Again()]
    world.inner.answers.clear()
    assert await world.process(before, nothing) == [Done(), Done()]


async def test_what_is_given_up_keeps_the_bytes_that_came() -> None:
    world = World()
    bad = stored(OLD_PAID, {})
    await world.outer.give_up(Item(bad, None), failure())
    assert world.inner.given_up == [bad]
    plain = stored(OLD_PAID, {"order_id": "o1"})
    await world.outer.give_up(Item(plain, None), failure())
    assert world.inner.given_up[1:] == [plain]


async def test_of_a_split_event_every_part_is_given_up_under_its_own_id() -> None:
    """A part that was handled answers that it was; its dead letter would hide the one of the other part."""
    world = World()
    old = stored(CLOSED, {"order_id": "o1"})
    world.inner.answers[uuid5(old.id, "1")] = Again()
    assert await world.outer.give_up(Item(old, None), failure()) == Again()
    assert [(one.id, one.key, one.type == old.type) for one in world.inner.given_up] == [
        (old.id, old.key, False),
        (uuid5(old.id, "1"), old.key, False),
    ]


async def test_what_stands_behind_a_part_that_was_parked_is_given_again() -> None:
    """It follows that one into the queue, and has not failed itself."""
    world = World()
    old = stored(CLOSED, {"order_id": "o1"})
    world.inner.answers[old.id] = Aside()
    assert await world.outer.give_up(Item(old, None), failure()) == Again()
    assert [one.id for one in world.inner.given_up] == [old.id]
    world.inner.answers = {old.id: Done(), uuid5(old.id, "1"): Aside()}
    assert await world.outer.give_up(Item(old, None), failure()) == Aside()


async def test_an_event_that_was_parked_whole_and_splits_now_is_not_half_handled() -> None:
    """Its place in the queue is one message's: it is given up, and its letter is redriven as it came."""

    class Parked:
        failure = None

    world = World()
    old = stored(CLOSED, {"order_id": "o1"})
    (result,) = await world.outer.process([Item(old, None, parked=Parked())], {})
    assert isinstance(result, Failed)
    assert "discard it from its queue" in str(result.error)
    plain = stored(OLD_PAID, {"order_id": "o1"})
    assert await world.outer.process([Item(plain, None, parked=Parked())], {}) == [Done()]


async def test_everything_else_is_the_inner_processors() -> None:
    world = World()
    assert await world.outer.stored_watermarks() == {("t", 0): 4}
    await world.outer.store_watermarks({("t", 1): 9})
    assert world.inner.marks == {("t", 1): 9}
    world.outer.forget([("t", 1)])
    assert world.inner.marks == {}
    with pytest.raises(Undecodable):
        codec(*CHAIN).decode(world.outer._codec.upcast(stored(V2, {"order_id": 1}), {V3})[0])  # pyright: ignore[reportPrivateUsage]
