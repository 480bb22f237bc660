"""Whatever others put into our topics: it becomes a dead letter that says what was found and what was wanted, with its
bytes; everything around it is handled, once and in order.

The story: tills sell, the office of another service books every sale by a saga and keeps takings by a projection.
"""

# Without `from __future__ import annotations`: the services are made per test, of classes that only exist in there.
import asyncio
import gzip
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from pydantic import BaseModel

from bus.cloudevents import to_record
from bus.envelope import Origin, ReplyTo
from bus.metrics import MemoryMetrics
from bus.seams import SystemClock, Uuid7Ids
from bus.transport import Ack, Delivery, Headers, Outgoing, TopicSpec, Transport
from eventstore.port import DeadLetter, Store, Wanted
from foldbus import Command, Connection, Decider, Died, Event, Key, Projection, SagaRun, Service, projection, saga
from tests.stories.pairs import QUICK, Pair, eventually, unique

ids = Uuid7Ids()
clock = SystemClock()

LARGE = 3_000_000
PARTITIONS = 3
KEYS = [f"till {n}" for n in range(7)]
SALES = 105


class Log(BaseModel, frozen=True):
    """What an aggregate has seen, in order."""

    ns: tuple[int, ...] = ()


class Takings(BaseModel, frozen=True):
    ns: list[int] = []
    note: str = ""


@dataclass
class World:
    """Two services, and the messages between them."""

    till: Service
    office: Service
    sell: Any
    sold: Any
    book: Any
    booked: Any
    takings: Projection[Takings]

    @property
    def commands(self) -> str:
        return f"{self.till.name}.commands"

    @property
    def events(self) -> str:
        return f"{self.till.name}.events"

    @property
    def replies(self) -> str:
        return f"{self.office.name}.replies"


def a_world() -> World:
    till, office = unique("till"), unique("office")

    class Sold(Event, type=f"{till}.sold.v1"):
        till: Key[str]
        n: int
        note: str = ""

    class Sell(Command[Sold], type=f"{till}.sell.v1"):
        till: Key[str]
        n: int
        note: str = ""

    class Booked(Event, type=f"{office}.booked.v1"):
        till: Key[str]
        n: int

    class Book(Command[Booked], type=f"{office}.book.v1"):
        till: Key[str]
        n: int

    def sold(log: Log, event: Sold) -> Log:
        return Log(ns=(*log.ns, event.n))

    def sell(log: Log, command: Sell) -> list[Sold]:
        if command.n == 13:
            raise RuntimeError("a bug at thirteen")
        return [Sold(till=command.till, n=command.n, note=command.note)]

    def booked(log: Log, event: Booked) -> Log:
        return Log(ns=(*log.ns, event.n))

    def book(log: Log, command: Book) -> list[Booked]:
        return [Booked(till=command.till, n=command.n)]

    class Checked(Event, type=f"{till}.checked.v1"):
        till: Key[str]

    @saga("book-sale", version=1)
    async def book_sale(run: SagaRun, sale: Sold) -> None:
        await run.step(Book(till=sale.till, n=sale.n))

    @projection("takings", version=1)
    def takings(row: Takings | None, event: Sold | Checked) -> Takings | None:
        row = row or Takings()
        if isinstance(event, Checked):
            return row
        return Takings(ns=[*row.ns, event.n], note=event.note.replace("\0", "?"))  # no column holds a NUL

    tills = Decider("till", initial=Log(), evolve=sold, decide=sell)
    books = Decider("books", initial=Log(), evolve=booked, decide=book)
    return World(
        Service(till, deciders=[tills], partitions=PARTITIONS),
        Service(office, deciders=[books], sagas=[book_sale], projections=[takings], partitions=PARTITIONS),
        Sell, Sold, Book, Booked, takings,
    )  # fmt: skip


# --- what is wrong ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """A record, and what its dead letter must say: what was found, and what was wanted."""

    record: Outgoing
    says: tuple[str, ...]


def changed(record: Outgoing, **headers: bytes | None) -> Outgoing:
    """With these headers instead; None takes one away."""
    kept = {name: value for name, value in record.headers if name not in headers}
    kept |= {name: value for name, value in headers.items() if value is not None}
    return replace(record, headers=tuple(kept.items()))


def unreadable(good: Outgoing) -> list[Bad]:
    """What no consumer can make an envelope of."""
    assert good.value is not None
    keyless = changed(good, ce_subject=None)
    no_id = ("id, source and type; at least one is missing", "wanted CloudEvents attributes")
    large = good.value[:-1] + b', "note": "' + b"x" * 2_000_000 + b'"}'
    return [
        Bad(Outgoing(good.topic, good.key, b"\x00\xff\xfe no event"), ("has no specversion", "wanted a CloudEvent")),
        Bad(changed(good, ce_type=b"\xff\xfe"), ("header 'ce_type' holds byte 0xff", "wanted UTF-8")),
        Bad(changed(good, ce_source=b"/a\x00b"), ("header 'ce_source' holds a NUL", "wanted text")),
        Bad(changed(good, ce_time=b"yesterday"), ("time is b'yesterday'", "wanted a time as in RFC 3339")),
        Bad(changed(good, ce_position=b"9" * 30), ("position is b'9999", "wanted a number from 0 to")),
        Bad(changed(good, ce_id=None), no_id),
        Bad(replace(good, headers=(*good.headers, ("ce_id", b"2"))), ("'ce_id' is there twice", "wanted once")),
        Bad(replace(good, value=None), ("without a value (a tombstone)", "wanted an event with data")),
        Bad(replace(keyless, key=None), ("neither a subject nor a record key", "wanted the key")),
        Bad(replace(keyless, key=b"a\x00b"), ("key 'a\\x00b' cannot be used", "without NUL")),
        Bad(replace(good, value=large), (f"a record of {replace_size(good, large)} bytes", "wanted at most 1000000")),
        *hostile_headers(good),
        *hostile_keys(keyless),
        *hostile_structures(good),
    ]  # fmt: skip


def hostile_headers(good: Outgoing) -> list[Bad]:
    """More of them, and more in them, than anybody who meant well would send."""
    many: Headers = tuple((f"x-{n}", b"") for n in range(1000))
    return [
        Bad(replace(good, headers=(*good.headers, *many)), ("found 10", "headers, wanted at most 128")),
        Bad(replace(good, headers=(*good.headers, ("x", b"x" * 70_000))), ("more than 65536 bytes of headers",)),
        Bad(replace(good, headers=(*good.headers, ("x" * 70_000, b""))), ("more than 65536 bytes of headers",)),
        Bad(replace(good, headers=(*good.headers, ("x\x00y", b""))), ("header name 'x\\x00y' holds a NUL",)),
        Bad(replace(good, headers=(*good.headers, ("x", b"a\x00"))), ("header 'x' holds a NUL", "wanted text")),
        Bad(changed(good, ce_subject=b"\xed\xa0\x80"), ("header 'ce_subject' holds byte 0xed", "wanted UTF-8")),
    ]  # fmt: skip


def hostile_keys(keyless: Outgoing) -> list[Bad]:
    return [
        Bad(replace(keyless, key=b""), ("key '' cannot be used", "wanted 1 to 1024 bytes")),
        Bad(replace(keyless, key=b"k" * 1_000_000), ("(1000000 characters)' cannot be used", "wanted 1 to 1024 bytes")),
        Bad(replace(keyless, key=b"\xed\xa0\x80"), ("the record key holds byte 0xed", "wanted UTF-8")),
        Bad(replace(keyless, key=b"\xff"), ("the record key holds byte 0xff", "wanted UTF-8")),
    ]


def hostile_structures(good: Outgoing) -> list[Bad]:
    """JSON that costs whoever reads it: structured mode is read by another parser than data."""
    bombs: list[tuple[bytes, tuple[str, ...]]] = [
        (b'{"a":' * 100_000, ("the value is no JSON",)),
        (b'{"specversion": ' + b"9" * 100_000 + b"}", ("the value is no JSON",)),
        (b'{"specversion": "1.0", "id": "\\ud800"}', ("'id' holds half of a surrogate pair", "wanted text")),
        (b'{"specversion": "1.0", "x": "' + b"x" * 900_000 + b'"}', ("attribute 'x' is", "wanted a short text")),
        (b'{"specversion": 1e999}', ("attribute 'specversion' is inf", "wanted a short text")),
    ]
    structured = changed(good, **{"content-type": b"application/cloudevents+json"})
    return [Bad(replace(structured, value=value), says) for value, says in bombs]


def unfit(good: Outgoing, kind: bytes) -> list[Bad]:
    """Envelopes whose message is none that this type has."""
    service, key = kind.split(b".")[0], good.key or b""
    return [
        Bad(changed(good, ce_type=kind.replace(b".v1", b".v9")), ("version v9 is unknown here", "wanted one of v1")),
        Bad(replace(good, value=b'{"till": "%s"}' % key), (kind.decode(), "n: Field required")),
        Bad(replace(good, value=b'{"till": "its", "n": 1}'), ("the record's key is", "says 'its'; wanted the same")),
        Bad(replace(good, value=b'{"till": "%s", "n": "many"}' % key), ("valid integer", "found 'many'")),
        Bad(replace(good, value=b"\xff\xfe"), (kind.decode(), "JSON")),
        Bad(replace(good, value=b"[" * 100_000), (kind.decode(), "JSON")),
        Bad(with_full_headers(good, b'{"till": "no end' + b"x" * 999_900), (service.decode(), "JSON")),
        Bad(replace(good, value=b""), (kind.decode(), "JSON")),  # an event without data
        Bad(changed(replace(good, value=gzip.compress(good.value or b"")), **{"content-encoding": b"gzip"}), ("JSON",)),
        Bad(replace(good, value=b'{"till": "%s", "n": %s}' % (key, b"9" * 10_000)), (kind.decode(), "out of range")),
        Bad(replace(good, value=b'{"till": "%s", "n": 1e999}' % key), (kind.decode(), "n: ")),
        Bad(replace(good, value=b'{"till": "%s", "n": 1, "note": "\\ud800"}' % key), (kind.decode(), "JSON")),
        Bad(replace(good, value=b'{"till": "%s", "n": %s}' % (key, b"[" * 500_000)), (kind.decode(), "JSON")),
        Bad(replace(good, value=b'{"till": "%s\\u0000", "n": 1}' % key), ("the record's key is", "wanted the same")),
    ]  # fmt: skip


def fresh(bad: Bad) -> Bad:
    """Under an id of its own, unless its id is what is wrong with it: one that came before is known and dropped."""
    if [name for name, _ in bad.record.headers].count("ce_id") != 1:
        return bad
    return replace(bad, record=changed(bad.record, ce_id=str(ids.new()).encode()))


def with_full_headers(good: Outgoing, value: bytes) -> Outgoing:
    """As large as a record may be, with as many headers as one may have: its copy has the least room."""
    more: Headers = tuple((f"x-{n}", b"h" * 1000) for n in range(63))
    return replace(good, headers=(*good.headers, *more), value=value)


def replace_size(good: Outgoing, value: bytes) -> int:
    return len(good.key or b"") + len(value) + sum(len(name) + len(text) for name, text in good.headers)


def record_of(service: Service, message: Any, topic: str, **options: Any) -> Outgoing:
    first = ids.new()
    return to_record(
        service.codec.encode(message, Origin(service.name, first, clock.now(), first), topic=topic, **options)
    )


def bad_commands(world: World, key: str) -> list[Bad]:
    good = record_of(world.till, world.sell(till=key, n=-1), world.commands)
    bogus = f"{world.till.name}.bogus.v1"
    unknown = Bad(changed(good, ce_type=bogus.encode()), (f"type '{bogus}'", "not one that this service names"))
    foreign = Bad(changed(good, ce_type=b"no type"), ("type 'no type'", "not one that this service names"))
    return [*unreadable(good), *unfit(good, f"{world.till.name}.sell.v1".encode()), unknown, foreign]


def bad_events(world: World, key: str) -> list[Bad]:
    good = record_of(world.till, world.sold(till=key, n=-1), world.events)
    called = f"{world.till.name}.painted.v3".encode()
    return [
        *unreadable(good),
        *unfit(good, f"{world.till.name}.sold.v1".encode()),
        # A position that none of ours has reached: were it believed, all that follows would be taken for replays.
        Bad(changed(good, ce_position=b"9" * 18, ce_time=b"noon"), ("time is b'noon'", "wanted a time as in RFC 3339")),
        Bad(changed(good, ce_position=b"9" * 30, ce_type=called), ("position is b'9999", "wanted a number from 0 to")),
    ]


def bad_for_one(world: World, key: str) -> list[Bad]:
    """An unknown version of what the projection names and the saga does not: the saga skips it."""
    good = record_of(world.till, world.sold(till=key, n=-1), world.events)
    version = changed(good, ce_type=f"{world.till.name}.checked.v2".encode())
    return [Bad(version, ("version v2 is unknown here", "wanted one of v1"))]


def bad_replies(world: World, key: str) -> list[Bad]:
    good = record_of(world.office, world.booked(till=key, n=-1), world.replies)
    to = ReplyTo(world.replies, "no uuid", "book-sale")
    keyed = record_of(world.office, world.book(till=key, n=-1), world.replies, reply_to=to)
    reply = {"ce_type": f"{world.office.name}.book.reply.v1".encode(), "ce_kind": b"reply"}
    arrived = f"type '{world.office.name}.booked.v1' arrived on {world.replies}"
    return [
        *unreadable(good),
        Bad(good, (arrived, "wanted <command>.reply.v<version>")),
        Bad(changed(good, **reply), ("names no saga", "wanted one in reply_to.instance")),
        Bad(changed(keyed, **reply, ce_outcome=b"ok"), (f"has the key {key!r}", "wanted a saga id")),
        Bad(changed(good, **reply, ce_outcome=b"perhaps"), ("outcome is b'perhaps'", "wanted one of ok")),
    ]


# --- looking ---------------------------------------------------------------------------------------------------------

Places = Mapping[tuple[str, int, int], Bad]


async def all_letters(store: Store) -> list[DeadLetter]:
    found: list[DeadLetter] = []
    while True:
        after = (found[-1].failure.failed_at, found[-1].id) if found else None
        page = await store.dead_letters(after=after, limit=500)
        found += page
        if len(page) < 500:
            return found


async def copies(transport: Transport, topic: str, wanted: int) -> list[Delivery]:
    """What a `.dlq` holds, once that is as much as wanted; and a little later, so that a surplus is seen."""
    found: list[Delivery] = []
    async with transport.tail(topic, start="begin") as reader:
        async with asyncio.timeout(60):
            while len(found) < wanted:
                found += await reader.poll(max_records=1000, timeout_s=0.2)
        found += await reader.poll(max_records=1000, timeout_s=0.5)
    return found


async def folded(connection: Connection) -> Mapping[str, list[int]]:
    service = connection.service
    (one,) = service.deciders
    found = await connection.store.load([Wanted(one.stream(key)) for key in KEYS])
    seen: dict[str, list[int]] = {}
    for key, part in zip(KEYS, found, strict=True):
        events = [service.codec.decode(record) for record in part.records]
        seen[key] = [event.n for event in events]  # type: ignore[attr-defined]
    return seen


def check_letters(letters: Sequence[DeadLetter], consumer: str, bad: Places) -> None:
    """One letter per bad record, with its very bytes, saying what was found and what was wanted."""
    mine = {(one.topic, one.partition, one.offset): one for one in letters if one.consumer == consumer}
    assert len(mine) == len([one for one in letters if one.consumer == consumer])
    assert mine.keys() == bad.keys()
    for place, letter in mine.items():
        record, says = bad[place].record, bad[place].says
        assert (letter.key, letter.value, letter.headers) == (record.key, record.value, record.headers)
        missing = [text for text in says if text not in letter.failure.message]
        assert not missing, f"{letter.failure.message!r} does not say {missing}"
        assert letter.failure.attempts == 1


def check_copies(found: Sequence[Delivery], consumer: str, bad: Places) -> None:
    mine: dict[tuple[str, int, int], Delivery] = {}
    for copy in found:
        facts = {name.removeprefix("x-dlq-"): value.decode() for name, value in copy.headers if name[:6] == "x-dlq-"}
        if facts["consumer"] == consumer and facts["topic"]:
            place = (facts["topic"], int(facts["partition"]), int(facts["offset"]))
            assert place not in mine
            mine[place] = copy
            assert facts["error"]
            assert facts["message"]
    assert mine.keys() >= bad.keys()
    for place, one in bad.items():
        value = one.record.value or b""
        held = mine[place].value
        assert held is not None
        assert held == value or (len(value) > 900_000 and len(held) >= 900_000 and value.startswith(held))


class Strangers:
    """Puts bad records between good ones, and remembers where they went."""

    def __init__(self, transport: Transport, bad: Sequence[Bad]) -> None:
        self._transport, self._left = transport, list(bad)
        self.places: dict[tuple[str, int, int], Bad] = {}

    async def one(self) -> None:
        if self._left:
            bad = fresh(self._left.pop(0))
            (ack,) = await self._transport.publish([bad.record])
            assert isinstance(ack, Ack), ack
            self.places[(bad.record.topic, ack.partition, ack.offset)] = bad

    async def rest(self) -> None:
        while self._left:
            await self.one()


# --- the stories -----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
async def test_each_bad_record_becomes_a_dead_letter_and_all_others_are_handled_once_in_order(pair: Pair) -> None:
    world = a_world()
    till_metrics, office_metrics = MemoryMetrics(), MemoryMetrics()
    expected: dict[str, list[int]] = defaultdict(list)
    async with pair.transport() as outside:
        # Others made these topics, and allow more than we do.
        topics = (world.commands, world.events, world.replies)
        await outside.admin.create([TopicSpec(name, PARTITIONS, max_bytes=LARGE) for name in topics])
        async with (
            pair.connect(world.till, metrics=till_metrics) as till,
            pair.connect(world.office, metrics=office_metrics) as office,
        ):
            commands = Strangers(outside, bad_commands(world, KEYS[0]))
            events = Strangers(outside, bad_events(world, KEYS[0]))
            replies = Strangers(outside, bad_replies(world, KEYS[0]))
            checked = Strangers(outside, bad_for_one(world, KEYS[0]))
            named_by_nobody = record_of(world.till, world.sold(till=KEYS[0], n=-2), world.events)
            painted = f"{world.till.name}.painted.v3".encode()  # a stranger's, with a position of its own
            named_by_nobody = changed(named_by_nobody, ce_type=painted, ce_kind=None, ce_position=b"9" * 18)
            for n in range(SALES):
                key = KEYS[n % len(KEYS)] if n % 3 else KEYS[0]
                expected[key].append(100 + n)
                await till.send(world.sell(till=key, n=100 + n))
                if n % 4 == 0:
                    for strangers in (commands, events, replies):
                        await strangers.one()
                if n % 50 == 0:
                    await outside.publish([named_by_nobody])
            for strangers in (commands, events, replies, checked):
                await strangers.rest()
            last = [await till.request(world.sell(till=key, n=999), timeout_s=60) for key in KEYS]
            assert [one.n for one in last] == [999] * len(KEYS)
            for key in KEYS:
                expected[key].append(999)

            assert await folded(till) == expected
            booked = await eventually(lambda: folded(office), lambda found: found == expected)
            assert booked == expected
            view = office.view(world.takings)
            for key in KEYS:
                row = await eventually(
                    lambda key=key: view.get(key),  # type: ignore[misc]
                    lambda row, key=key: row is not None and len(row.ns) >= len(expected[key]),  # type: ignore[misc]
                )
                assert row is not None
                assert row.ns == expected[key]

            consumers = {
                world.till.name: (till, commands.places),
                f"{world.office.name}.saga.book-sale": (office, events.places),
                f"{world.office.name}.projection.takings": (office, events.places | checked.places),
                world.replies: (office, replies.places),
            }
            totals = {world.till.name: 0, world.office.name: 0}
            for consumer, (connection, bad) in consumers.items():

                def mine(letters: list[DeadLetter], consumer: str = consumer, bad: Places = bad) -> bool:
                    return len([one for one in letters if one.consumer == consumer]) >= len(bad)

                letters = await eventually(lambda c=connection: all_letters(c.store), mine)  # type: ignore[misc]
                check_letters(letters, consumer, bad)
                totals[connection.service.name] += len(bad)
            assert len(await all_letters(till.store)) == totals[world.till.name]
            assert len(await all_letters(office.store)) == totals[world.office.name]
            for name, total in totals.items():
                found = await copies(outside, f"{name}.dlq", total)
                assert len(found) == total
                for consumer, (connection, bad) in consumers.items():
                    if connection.service.name == name:
                        check_copies(found, consumer, bad)

            group = f"{world.office.name}.saga.book-sale"
            skipped = {"group": group, "type": f"{world.till.name}.painted.v3"}
            assert office_metrics.total("foldbus_skipped_total", **skipped) == 3
            assert office_metrics.total("foldbus_projection_skipped_total", projection="takings", reason="type") == 3


@pytest.mark.timeout(200)
async def test_a_failing_handler_is_tried_again_then_answers_died_and_its_key_goes_on(pair: Pair) -> None:
    world = a_world()
    metrics = MemoryMetrics()
    patient = replace(QUICK, parking=replace(QUICK.parking, total_s=6.0))  # far more than three attempts take
    async with pair.connect(world.till, metrics=metrics, settings=patient) as till:
        before = asyncio.create_task(till.request(world.sell(till="t", n=1), timeout_s=60))
        doomed = ids.new()
        answers = [
            before,
            asyncio.create_task(till.request(world.sell(till="t", n=13), timeout_s=60, id=doomed)),
            asyncio.create_task(till.request(world.sell(till="t", n=2), timeout_s=60)),
            asyncio.create_task(till.request(world.sell(till="other", n=3), timeout_s=60)),
        ]
        first, died, after, other = await asyncio.gather(*answers, return_exceptions=True)
        assert [one.n for one in (first, after, other)] == [1, 2, 3]  # type: ignore[union-attr]
        assert isinstance(died, Died)
        assert died.id == doomed
        assert "RuntimeError: a bug at thirteen" in died.error

        (letter,) = await till.store.dead_letters()
        assert (letter.id, letter.topic, letter.key) == (doomed, world.commands, b"t")
        assert letter.value == world.sell(till="t", n=13).model_dump_json().encode()
        attempts = letter.failure.attempts
        assert (letter.failure.error, attempts > 3) == ("RuntimeError", True)  # three in place, then parked
        assert "in sell" in letter.failure.stack
        assert letter.failure.first_failed_at < letter.failure.failed_at
        assert metrics.total("foldbus_retried_total", group=world.till.name) == 2
        assert metrics.total("foldbus_dead_letters_total") == 1
        async with pair.transport() as outside:
            (copy,) = await copies(outside, f"{world.till.name}.dlq", 1)
        assert copy.value == letter.value
        facts = dict(copy.headers)
        assert (facts["x-dlq-attempts"], facts["x-dlq-error"]) == (b"%d" % attempts, b"RuntimeError")

        with pytest.raises(Died):  # asked again under its id: the answer stands, it is not tried again
            await till.request(world.sell(till="t", n=13), timeout_s=60, id=doomed)
        assert len(await till.store.dead_letters()) == 1
