"""Handlers without a claim: at least once on both stores, at most once without any; and breakers around all kinds."""

# Without `from __future__ import annotations`: handlers and classes are made per test.
import asyncio
import logging
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio
from sqlalchemy import insert

from bus.breaker import Breaker
from bus.cloudevents import to_record
from bus.codec import JsonCodec
from bus.envelope import Envelope, Failure, Origin
from bus.metrics import MemoryMetrics
from bus.processing import Again, Failed, Item
from bus.records import RecordReader
from bus.registry import Registry
from bus.seams import NoFailpoints, SystemClock, Uuid7Ids
from bus.transport import Assignment, Delivery
from eventstore.port import ClaimState, Store
from foldbus import (
    AT_LEAST_ONCE,
    AT_MOST_ONCE,
    EXACTLY_ONCE,
    BadHandler,
    BareContext,
    Command,
    Connection,
    Context,
    EffectContext,
    Event,
    Handler,
    Key,
    Refused,
    Service,
    ThreadContext,
    upcast,
)
from foldbus.early import AtMostOnce
from foldbus.parking import ParkSettings
from foldbus.worker import command_processor, subscription_processor
from tests.eventstore.stores import NOON, whole_log
from tests.foldbus.test_handlers import accounts, balance, kinds, tables

ids = Uuid7Ids()
PARKING = ParkSettings()


class Seen(Event, type="shop.seen.v2"):
    who: Key[str]
    n: int = 1


class OldSeen(Event, type="shop.seen.v1"):
    who: Key[str]


class Other(Event, type="shop.other.v1"):
    who: Key[str]


class Told(Event, type="tracker.told.v1"):
    who: Key[str]


class Call(Command[None], type="tracker.call.v1"):
    who: Key[str]
    n: int = 1


class HandClock(SystemClock):
    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        return 1000.0 + self.ahead_s

    def now(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self.ahead_s)


def connect(store: Any, *handlers: Any, clock: Any = None, **options: Any) -> Connection:
    service = Service("tracker", handlers=handlers, messages=[Told], **options)
    broker: Any = type("_Broker", (), {"max_bytes": 1_000_000})()
    return Connection(
        service, store=store, transport=broker, clock=clock or SystemClock(), ids=ids, metrics=MemoryMetrics(),
        failpoint=NoFailpoints(),
    )  # fmt: skip


def enveloped(message: Any, *, id: UUID | None = None) -> Envelope:
    codec = JsonCodec(Registry([Seen, OldSeen, Other, Call]))
    return codec.encode(message, Origin("shop", id or ids.new(), NOON, ids.new()), topic="shop.events")


def item(message: Any, *, id: UUID | None = None) -> Item:
    return Item(enveloped(message, id=id), None)


def records(*messages: Any) -> list[Delivery]:
    found: list[Delivery] = []
    for offset, message in enumerate(messages):
        record = to_record(message if isinstance(message, Envelope) else enveloped(message))
        found.append(Delivery(Assignment("shop.events", 0, 1), offset, record.key, record.value, record.headers, NOON))
    return found


@pytest_asyncio.fixture
async def store(store: Store) -> Store:
    async with store.transaction() as tx:
        await tx.sql.run_sync(tables.create_all)
    return store


class TestAtLeastOnce:
    async def test_is_handled_again_when_it_comes_again_and_leaves_no_claim(self, store: Store) -> None:
        seen: list[str] = []

        async def track(event: Seen, ctx: Context) -> None:
            seen.append(event.who)

        one = item(Seen(who="a"))
        connection = connect(store, Handler(track, delivery=AT_LEAST_ONCE))
        processor = subscription_processor(connection, connection.service.subscriptions[0], PARKING)
        for _ in range(2):
            assert kinds(await processor.process([replace(one)], {})) == ["Done"]
        assert seen == ["a", "a"]
        (standing,) = await store.examine(processor.group, [(one.envelope.id, "a")])
        assert standing.state is ClaimState.NEW

    async def test_writes_its_rows_and_messages_together_or_not_at_all(self, store: Store) -> None:
        async def track(event: Seen, ctx: Context) -> None:
            sql = await ctx.sql()
            await sql.execute(insert(accounts).values(id=event.who, cents=event.n))
            ctx.publish(Told(who=event.who))
            if event.n == 13:
                raise RuntimeError("a bug at thirteen")

        connection = connect(store, Handler(track, delivery=AT_LEAST_ONCE))
        processor = subscription_processor(connection, connection.service.subscriptions[0], PARKING)
        batch = [item(Seen(who="a")), item(Seen(who="b", n=13)), item(Seen(who="b")), item(Seen(who="c"))]
        assert kinds(await processor.process(batch, {})) == ["Done", "Failed", "Again", "Done"]
        assert [await balance(store, who) for who in "abc"] == [1, None, 1]
        assert {record.key for record in await whole_log(store)} == {"a", "c"}  # side by side, so in any order

    async def test_stages_without_a_transaction_too(self, store: Store) -> None:
        async def track(event: Seen, ctx: Context) -> None:
            ctx.publish(Told(who=event.who))

        connection = connect(store, Handler(track, delivery=AT_LEAST_ONCE))
        processor = subscription_processor(connection, connection.service.subscriptions[0], PARKING)
        await processor.process([item(Seen(who="a"))], {("shop.events", 0): 3})
        assert [record.type for record in await whole_log(store)] == ["tracker.told.v1"]
        assert await store.watermarks(processor.group) == {("shop.events", 0): 3}

    async def test_becomes_a_dead_letter_at_the_end_and_its_key_goes_on(self, store: Store) -> None:
        """Without claims nothing could keep its successors behind it in a queue."""

        async def track(event: Seen, ctx: Context) -> None: ...

        connection = connect(store, Handler(track, delivery=AT_LEAST_ONCE))
        processor = subscription_processor(connection, connection.service.subscriptions[0], PARKING)
        one = item(Seen(who="a"))
        gone = Failure("RuntimeError", "no", "", 3, NOON, NOON, "1")
        assert kinds([await processor.give_up(one, gone)]) == ["Done"]
        assert [letter.id for letter in await store.dead_letters()] == [one.envelope.id]
        assert kinds(await processor.process([item(Seen(who="a"))], {})) == ["Done"]

    @pytest.mark.parametrize("delivery", [AT_LEAST_ONCE, AT_MOST_ONCE])
    def test_is_refused_for_commands_which_want_an_answer(self, delivery: Any) -> None:
        async def call(command: Call, ctx: Any) -> None: ...

        with pytest.raises(BadHandler, match=r"takes Call, a command, at-.*-once: its answer is stored with its claim"):
            Handler(call, delivery=delivery)
        Handler(call, delivery=EXACTLY_ONCE)


class Tracker:
    """A connection without any store, and a handler that is called at most once."""

    def __init__(self, function: Any, **options: Any) -> None:
        service_options = {name: options.pop(name) for name in ("upcasters", "middleware") if name in options}
        self.clock = options.pop("clock", SystemClock())
        made = Handler(function, delivery=AT_MOST_ONCE, **options)
        self.connection = connect(None, made, clock=self.clock, **service_options)
        self.metrics: Any = self.connection.metrics
        reader = RecordReader(1_000_000, {})
        self.processor = AtMostOnce(self.connection, made, reader, max_bytes=1_000_000)

    async def handle(self, *messages: Any) -> None:
        await self.processor.handle(records(*messages))

    def lost(self, **labels: str) -> int:
        return int(self.metrics.total("foldbus_lost_total", **labels))


class TestAtMostOnce:
    async def test_calls_the_handler_for_each_message_it_names_and_counts_the_others(self) -> None:
        seen: list[tuple[str, int]] = []

        async def track(event: Seen, ctx: BareContext) -> None:
            seen.append((event.who, event.n))

        tracker = Tracker(track)
        await tracker.handle(Seen(who="a", n=1), Other(who="a"), Seen(who="a", n=2))
        assert seen == [("a", 1), ("a", 2)]
        assert tracker.metrics.total("foldbus_handled_total") == 2
        assert tracker.metrics.total("foldbus_skipped_total", type="shop.other.v1") == 1

    async def test_says_once_when_nothing_of_its_topic_is_named(self, caplog: pytest.LogCaptureFixture) -> None:
        async def track(event: Seen, ctx: BareContext) -> None: ...

        tracker = Tracker(track)
        for _ in range(12):
            await tracker.handle(*[Other(who="a")] * 10)
        (line,) = [one for one in caplog.messages if "misspelt" in one]
        assert "the first 100 records of" in line
        assert "shop.other.v1 (100)" in line

    async def test_gives_the_envelope_as_it_came(self) -> None:
        contexts: list[BareContext] = []

        async def track(event: Seen, ctx: BareContext) -> None:
            contexts.append(ctx)

        one = enveloped(Seen(who="a"))
        await Tracker(track).handle(one)
        (ctx,) = contexts
        assert (ctx.message_id, ctx.correlation_id) == (one.id, one.correlation_id)
        assert (ctx.envelope.source, ctx.envelope.key, ctx.envelope.data) == ("shop", "a", one.data)
        assert abs((ctx.now - datetime.now(UTC)).total_seconds()) < 30
        assert ctx.deps is None

    async def test_reads_older_types_and_foreign_forms_too(self) -> None:
        seen: list[tuple[str, int]] = []

        async def track(event: Seen, ctx: BareContext) -> None:
            seen.append((ctx.envelope.key, event.n))

        lift = upcast("shop.seen.v1", to="shop.seen.v2", by=lambda data: {**data, "n": 7})
        tracker = Tracker(track, upcasters=[lift])
        (plain,) = records(Seen(who="a", n=2))
        structured = replace(
            plain,
            key=b"b",
            value=b'{"specversion":"1.0","id":"x-1","source":"elsewhere","type":"shop.seen.v2","subject":"b",'
            b'"data":{"who":"b","n":3}}',
            headers=(("content-type", b"application/cloudevents+json"),),
        )
        await tracker.processor.handle([plain, structured, *records(OldSeen(who="c"))])
        assert sorted(seen) == [("a", 2), ("b", 3), ("c", 7)]

    async def test_of_what_cannot_be_read_or_fails_only_that_is_gone_and_it_is_told(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        seen: list[str] = []

        async def track(event: Seen, ctx: BareContext) -> None:
            if event.who == "bug":
                raise RuntimeError("a bug")
            seen.append(event.who)

        tracker = Tracker(track)
        good, other = records(Seen(who="a"), Seen(who="z"))
        bad = [
            replace(good, value=b"{"),
            replace(good, value=b'{"who":"somebody else"}'),
            replace(good, value=None),
            replace(good, value=(good.value or b"") + b" " * 2_000_000),
            replace(good, headers=(*good.headers, ("ce_subject", b"twice"))),
            replace(good, headers=()),
            replace(good, flaw="unpacks to more than there is memory"),
        ]
        keyless = replace(good, key=None)  # its subject says whose it is
        with caplog.at_level(logging.WARNING):
            await tracker.processor.handle([good, *bad, keyless, *records(Seen(who="bug")), other])
        assert sorted(seen) == ["a", "a", "z"]
        assert (tracker.lost(), tracker.lost(error="RuntimeError")) == (len(bad) + 1, 1)
        told = sum("is gone, it is handled at most once" in record.message for record in caplog.records)
        assert told == len(bad) + 1

    async def test_keeps_the_order_of_a_key_and_runs_keys_side_by_side(self) -> None:
        order: list[tuple[str, int]] = []
        meeting = asyncio.Barrier(2)

        async def track(event: Seen, ctx: BareContext) -> None:
            if event.n == 0:
                async with asyncio.timeout(40):
                    await meeting.wait()
            order.append((event.who, event.n))

        keys = ["a", next(str(n) for n in range(1000) if hash(str(n).encode()) % 8 != hash(b"a") % 8)]
        await Tracker(track).handle(*(Seen(who=who, n=n) for n in range(5) for who in keys))
        for who in keys:
            assert [n for found, n in order if found == who] == list(range(5))

    async def test_ends_a_call_that_takes_too_long_and_goes_on_with_the_next(self) -> None:
        seen: list[str] = []

        async def track(event: Seen, ctx: BareContext) -> None:
            if event.n == 0:
                await asyncio.Event().wait()
            seen.append(event.who)

        tracker = Tracker(track, timeout_s=0.1, at_once=1)
        async with asyncio.timeout(20):
            await tracker.handle(Seen(who="a"), Seen(who="b", n=0), Seen(who="c"), Seen(who="d", n=0), Seen(who="e"))
        assert seen == ["a", "c", "e"]
        assert tracker.lost(error="TimeoutError") == 2

    async def test_passes_a_cancellation_through(self) -> None:
        inside = asyncio.Event()

        async def track(event: Seen, ctx: BareContext) -> None:
            inside.set()
            await asyncio.Event().wait()

        tracker = Tracker(track)
        task = asyncio.create_task(tracker.handle(Seen(who="a"), Seen(who="b")))
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert tracker.lost() == 0

    async def test_runs_functions_without_async_in_threads(self) -> None:
        seen: list[bool] = []

        def track(event: Seen, ctx: BareContext) -> None:
            seen.append(threading.current_thread() is threading.main_thread())

        await Tracker(track).handle(Seen(who="a"))
        assert seen == [False]

    async def test_asks_for_small_batches_where_an_outage_would_cost_them(self) -> None:
        async def track(event: Seen, ctx: BareContext) -> None:
            raise ConnectionError("down")

        assert Tracker(track).processor.free() is None
        clock = HandClock()
        bank = Breaker("bank", counts=(ConnectionError,), failures=2, open_s=10)
        tracker = Tracker(track, breakers=[bank], at_once=4, clock=clock)
        assert tracker.processor.free() == 4
        await tracker.handle(Seen(who="a"), Seen(who="a"), Seen(who="a"))
        assert tracker.processor.free() == 0
        assert (tracker.lost(error="ConnectionError"), tracker.lost(error="BreakerOpen")) == (2, 1)
        clock.ahead_s += 10
        assert tracker.processor.free() == 1


class Dependency:
    """Down or not, and what was asked of it."""

    def __init__(self) -> None:
        self.down = False
        self.calls: list[str] = []

    async def call(self, who: str) -> None:
        self.calls.append(who)
        await asyncio.sleep(0)
        if self.down:
            raise ConnectionError("refused")


BANK = Breaker("bank", counts=(ConnectionError, TimeoutError), failures=3, open_s=10)


def in_three_kinds(bank: Dependency, *, guarded: bool = False) -> dict[str, Handler]:
    async def with_sql(command: Call, ctx: Context) -> None:
        if not guarded:
            return await bank.call(command.who)
        try:
            async with ctx.breaker(BANK):
                await bank.call(command.who)
        except ConnectionError:
            pass  # handled here; the breaker has seen it
        return None

    async def effect(command: Call, ctx: EffectContext) -> None:
        if not guarded:
            return await bank.call(command.who)
        try:
            async with ctx.breaker("bank"):
                await bank.call(command.who)
        except ConnectionError:
            pass
        return None

    loop = asyncio.get_running_loop()

    def in_thread(command: Call, ctx: ThreadContext) -> None:
        def call() -> None:
            asyncio.run_coroutine_threadsafe(bank.call(command.who), loop).result()

        if not guarded:
            return call()
        try:
            with ctx.breaker("bank"):
                call()
        except ConnectionError:
            pass
        return None

    return {
        "sql": Handler(with_sql, breakers=[BANK]),
        "effect": Handler(effect, effect=True, breakers=[BANK]),
        "thread": Handler(in_thread, breakers=[BANK]),
    }


@pytest.mark.parametrize("kind", ["sql", "effect", "thread"])
class TestABreaker:
    async def test_holds_messages_back_and_counts_no_attempt_while_its_dependency_is_down(
        self, store: Store, kind: str
    ) -> None:
        bank, clock = Dependency(), HandClock()
        connection = connect(store, in_three_kinds(bank)[kind], clock=clock)
        processor = command_processor(connection)
        bank.down = True
        works = [item(Call(who=who)) for who in "abcdefgh"]
        results = await processor.process(works[:2], {})
        assert kinds(results) == ["Failed"] * 2
        results = await processor.process(works[2:3], {})
        assert kinds(results) == ["Again"], "the failure that opens it is the dependency's"
        calls = list(bank.calls)
        for _ in range(3):
            results = await processor.process(works, {})
            assert [round(one.after_s) for one in results if isinstance(one, Again)] == [10] * 8
        assert bank.calls == calls
        for one in works:
            (standing,) = await store.examine("tracker", [(one.envelope.id, one.envelope.key)])
            assert standing.started == (kind == "effect" and one in works[:3]), "what was not called was not begun"

        clock.ahead_s += 10
        results = await processor.process(works, {})
        assert sorted(kinds(results)) == ["Again"] * 8
        assert len(bank.calls) == len(calls) + 1, "one message is let through"
        clock.ahead_s += 20
        bank.down = False
        calls = list(bank.calls)
        assert kinds(await processor.process([works.pop()], {})) == ["Done"]
        assert kinds(await processor.process(works, {})) == ["Done"] * 7
        assert sorted(bank.calls[len(calls) :]) == sorted("abcdefgh")

    async def test_spares_what_was_in_flight_when_it_opened(self, store: Store, kind: str) -> None:
        bank, clock = Dependency(), HandClock()
        bank.down = True
        connection = connect(store, in_three_kinds(bank)[kind], clock=clock)
        processor = command_processor(connection)
        works = [item(Call(who=who)) for who in "abcdef"]
        found = sorted(kinds(await processor.process(works, {})))
        # They were all begun while it was closed; two failed before it opened.
        assert (found.count("Failed"), found.count("Again")) == (2, 4)
        metrics: Any = connection.metrics
        assert metrics.total("foldbus_breaker_spared_total") >= 1

    async def test_sees_what_a_guarded_call_raises_though_the_handler_catches_it(self, store: Store, kind: str) -> None:
        bank, clock = Dependency(), HandClock()
        bank.down = True
        connection = connect(store, in_three_kinds(bank, guarded=True)[kind], clock=clock)
        processor = command_processor(connection)
        works = [item(Call(who="a", n=n)) for n in range(3)]
        assert kinds(await processor.process(works, {})) == ["Done"] * 3
        assert kinds(await processor.process([item(Call(who="a"))], {})) == ["Again"]

    async def test_is_not_opened_by_errors_that_it_does_not_count(self, store: Store, kind: str) -> None:
        class Odd(Dependency):
            async def call(self, who: str) -> None:
                raise (Refused("no", code="x.y") if who == "r" else ValueError(who))

        connection = connect(store, in_three_kinds(Odd())[kind], clock=HandClock())
        processor = command_processor(connection)
        works = [item(Call(who=who)) for who in ("a", "b", "c", "d", "r")]
        assert kinds(await processor.process(works, {})) == ["Failed"] * 4 + ["Done"]
        assert connection.circuits.of(BANK).free is None


async def test_an_error_that_is_not_the_dependencys_says_nothing_about_it(store: Store) -> None:
    """A message that is refused before anything was called does not close a breaker that waits for its probe."""
    bank, clock = Dependency(), HandClock()
    bank.down = True

    async def pay(command: Call, ctx: EffectContext) -> None:
        if command.n == 0:
            raise Refused("no", code="x.y")
        if command.n == 13:
            raise ValueError("thirteen")
        await bank.call(command.who)

    connection = connect(store, Handler(pay, effect=True, breakers=[BANK]), clock=clock)
    processor, circuit = command_processor(connection), connection.circuits.of(BANK)
    await processor.process([item(Call(who=who)) for who in "abc"], {})
    assert circuit.free == 0
    clock.ahead_s += 10
    for n, expected in ((0, "Done"), (13, "Failed")):
        assert circuit.free == 1
        assert kinds(await processor.process([item(Call(who=f"d{n}", n=n))], {})) == [expected]
    assert circuit.free == 1


async def test_a_guarded_call_that_is_refused_by_its_breaker_waits_without_an_attempt(store: Store) -> None:
    """It opened while the handler was at something else, by another message."""
    bank, clock, inside, go_on = Dependency(), HandClock(), asyncio.Event(), asyncio.Event()

    async def slow(command: Call, ctx: EffectContext) -> None:
        async with ctx.breaker(BANK):
            pass
        inside.set()
        await go_on.wait()
        async with ctx.breaker(BANK):
            await bank.call(command.who)

    connection = connect(store, Handler(slow, effect=True, breakers=[BANK]), clock=clock)
    running = asyncio.create_task(command_processor(connection).process([item(Call(who="a"))], {}))
    await inside.wait()
    for _ in range(3):
        call = connection.circuits.of(BANK).begin()
        assert call is not None
        call.failed(ConnectionError())
        call = None
    go_on.set()
    (result,) = await running
    # One answer stands against three failures: open.
    assert isinstance(result, Again)
    assert bank.calls == []


async def test_a_handlers_own_time_limit_counts_as_its_dependencys(store: Store) -> None:
    async def hangs(command: Call, ctx: EffectContext) -> None:
        async with ctx.breaker("bank"):
            await asyncio.Event().wait()

    made = Handler(hangs, effect=True, breakers=[replace(BANK, failures=2)], timeout_s=0.05)
    connection = connect(store, made, clock=HandClock())
    results = await command_processor(connection).process([item(Call(who="a")), item(Call(who="b"))], {})
    assert sorted(kinds(results)) == ["Again", "Failed"]


async def test_a_breaker_that_the_handler_does_not_name_is_not_there(store: Store) -> None:
    async def asks(command: Call, ctx: EffectContext) -> None:
        async with ctx.breaker("mail"):
            raise AssertionError

    connection = connect(store, Handler(asks, effect=True, breakers=[BANK]))
    (result,) = await command_processor(connection).process([item(Call(who="a"))], {})
    assert isinstance(result, Failed)
    assert "the handler names bank in breakers=" in str(result.error)
