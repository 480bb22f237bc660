"""Delayed messages: not early, once in effect, cancelled for certain, by the clock of the store."""

# Without `from __future__ import annotations`: services are made per test, of classes that only exist in there.
import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from bus.envelope import Envelope
from bus.seams import SystemClock
from eventstore.port import Store, Timer, Unit
from foldbus import (
    BadDelay,
    Command,
    Context,
    EffectContext,
    Event,
    Handler,
    Key,
    MemoryMetrics,
    Service,
    ThreadContext,
    WorkerSettings,
)
from foldbus.scheduling import Delayed, delayed_by, timer_of, when
from foldbus.staging import Staging
from foldbus.timing import DueTimers
from tests.eventstore.stores import IDS, NOON, message
from tests.stories.pairs import Pair, eventually, unique

NEVER_POLLS = WorkerSettings(timer_poll_s=300.0)


def delayed(store: Store, metrics: MemoryMetrics | None = None) -> Delayed:
    return Delayed("shop", store, metrics=metrics or MemoryMetrics())


def timer(due_at: datetime = NOON, id: UUID | None = None) -> Timer:
    envelope = message()
    return Timer("shop.delayed", id or envelope.id, envelope.key, due_at, envelope)


async def outbox(store: Store) -> list[Envelope]:
    return list((await store.read_all(after=0, limit=100, outgoing=True)).records)


async def due(store: Store) -> Sequence[Timer]:
    """As a worker that died after asking: they come up again at once."""
    found = await store.timers.due(limit=100)
    for one in found:
        await store.timers.release(one, delay_s=0)
    return found


class TestOnEveryStore:
    async def test_two_workers_that_have_the_same_timer_send_it_once(self, store: Store, twin: Store) -> None:
        made, metrics = timer(), MemoryMetrics()
        await store.commit([Unit(timers=(made,))])
        assert [one.id for one in await due(store)] == [one.id for one in await due(twin)] == [made.id]
        await asyncio.gather(*(delayed(where, metrics).send([made]) for where in (store, twin) * 3))
        assert [one.id for one in await outbox(store)] == [made.envelope.id]
        assert await store.timers.next_due() is None
        assert metrics.total("foldbus_delayed_sent_total") == 1
        assert metrics.total("foldbus_duplicates_total") == 5

    async def test_a_message_that_was_staged_again_after_it_was_sent_is_not_sent_again(self, store: Store) -> None:
        made = timer()
        for _ in range(2):
            await store.commit([Unit(timers=(made,))])
            await delayed(store).send(await due(store))
        assert [one.id for one in await outbox(store)] == [made.envelope.id]
        assert await store.timers.next_due() is None

    async def test_it_is_sent_as_it_was_staged(self, store: Store) -> None:
        made = timer()
        await store.commit([Unit(timers=(made,))])
        await delayed(store).send(await due(store))
        (sent,) = await outbox(store)
        assert (sent.id, sent.type, sent.key, sent.data, sent.topic, sent.time, sent.correlation_id) == (
            made.envelope.id, made.envelope.type, made.envelope.key, made.envelope.data, "stock.commands",
            made.envelope.time, made.envelope.correlation_id,
        )  # fmt: skip

    async def test_cancelled_it_is_not_sent_also_by_whoever_has_it_in_hand(self, store: Store, twin: Store) -> None:
        made, other = timer(), timer()
        await store.commit([Unit(timers=(made, other))])
        in_hand = await due(store)
        assert await delayed(twin).cancel(made.id)
        assert await delayed(twin).cancel(made.id)
        await delayed(store).send(in_hand)
        assert [one.id for one in await outbox(store)] == [other.id]
        assert await store.timers.next_due() is None

    async def test_what_was_sent_cannot_be_cancelled(self, store: Store) -> None:
        made = timer()
        await store.commit([Unit(timers=(made,))])
        await delayed(store).send(await due(store))
        assert not await delayed(store).cancel(made.id)
        assert not await delayed(store).cancel(made.id)

    async def test_cancelled_before_it_is_staged_it_is_never_sent(self, store: Store) -> None:
        made = timer()
        assert await delayed(store).cancel(made.id)
        await store.commit([Unit(timers=(made,))])
        await delayed(store).send(await due(store))
        assert await outbox(store) == []
        assert await store.timers.next_due() is None

    async def test_either_the_cancellation_wins_or_the_sending_and_both_know(self, store: Store, twin: Store) -> None:
        for _ in range(20):
            made = timer()
            await store.commit([Unit(timers=(made,))])
            before = len(await outbox(store))
            _, cancelled = await asyncio.gather(delayed(store).send([made]), delayed(twin).cancel(made.id))
            assert len(await outbox(store)) - before == (0 if cancelled else 1)
            assert await store.timers.next_due() is None

    async def test_one_that_no_store_takes_holds_up_no_other(self, store: Store) -> None:
        from dataclasses import replace

        good, metrics = timer(), MemoryMetrics()
        bad = timer()
        bad = replace(bad, envelope=replace(bad.envelope, topic=None))
        await store.commit([Unit(timers=(good,))])
        await delayed(store, metrics).send([bad, good])
        assert [one.id for one in await outbox(store)] == [good.id]
        assert metrics.total("foldbus_delayed_failed_total") == 1

    async def test_timers_are_looked_for_when_they_are_due_not_by_polling(self, store: Store) -> None:
        turns = 0

        async def each_turn() -> None:
            nonlocal turns
            turns += 1

        timers = DueTimers(
            store, {}, metrics=MemoryMetrics(), poll_s=300.0, each_turn=each_turn, delayed=delayed(store)
        )
        later = [timer(store.timers.now() + timedelta(seconds=0.3 * n)) for n in (1, 2)]
        await store.commit([Unit(timers=tuple(later))])
        running = asyncio.create_task(timers.run())
        try:
            await eventually(lambda: outbox(store), lambda found: len(found) == 2)
            assert SystemClock().now() >= later[1].due_at
            assert turns < 50
            # One that is staged in this process is not slept through.
            soon = timer(store.timers.now() + timedelta(seconds=0.2))
            await store.commit([Unit(timers=(soon,))])
            timers.wake()
            await eventually(lambda: outbox(store), lambda found: len(found) == 3)
            assert SystemClock().now() >= soon.due_at
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


# --- through the front ------------------------------------------------------------------------------------------------


class Office:
    """A service that reminds itself and others, with a delay, from a handler or from outside."""

    def __init__(self) -> None:
        office, clerk = unique("office"), unique("clerk")
        self.heard: list[tuple[str, str, datetime]] = []
        its = self

        class Note(Command[None], type=f"{clerk}.note.v1"):
            key_: Key[str]
            text: str

        class Noted(Event, type=f"{office}.noted.v1"):
            key_: Key[str]
            text: str

        class Remind(Command[None], type=f"{office}.remind.v1"):
            key_: Key[str]
            delay_s: float

        class RemindInThread(Command[None], type=f"{office}.remind-in-thread.v1"):
            key_: Key[str]
            delay_s: float

        class RemindOutside(Command[None], type=f"{office}.remind-outside.v1"):
            key_: Key[str]
            delay_s: float

        def in_a_thread(command: RemindInThread, ctx: ThreadContext) -> None:
            ctx.send(Note(key_=command.key_, text="by a thread"), delay_s=command.delay_s)
            ctx.publish(Noted(key_=command.key_, text="by a thread"), at=ctx.now + timedelta(seconds=command.delay_s))

        async def outside(command: RemindOutside, ctx: EffectContext) -> None:
            ctx.send(Note(key_=command.key_, text="by an effect"), delay_s=command.delay_s)

        async def remind(command: Remind, ctx: Context) -> None:
            ctx.send(Note(key_=command.key_, text="by a handler"), delay_s=command.delay_s)
            ctx.publish(Noted(key_=command.key_, text="by a handler"), delay_s=command.delay_s)

        async def note(command: Note, ctx: Context) -> None:
            its.heard.append(("command", command.text, SystemClock().now()))

        async def read(event: Noted, ctx: Context) -> None:
            its.heard.append(("event", event.text, SystemClock().now()))

        reminders = [Remind, RemindInThread, RemindOutside]
        handlers: list[Any] = [remind, in_a_thread, Handler(outside, effect=True)]
        self.office = Service(office, handlers=handlers, messages=[Note, Noted], partitions=2)
        self.clerk = Service(clerk, handlers=[note, read], messages=reminders, partitions=2)
        self.say = SimpleNamespace(Note=Note, Noted=Noted, reminders=reminders)

    async def hears(self, n: int) -> list[str]:
        async def heard() -> list[str]:
            return sorted(f"{kind} {text}" for kind, text, _ in self.heard)

        return await eventually(heard, lambda found: len(found) >= n)


async def test_delayed_by_a_client_a_unit_and_a_handler_each_is_handled_once_and_not_early(pair: Pair) -> None:
    its = Office()
    say = its.say
    async with pair.connect(its.clerk) as clerk, pair.connect(its.office) as office:
        began = SystemClock().now()
        await office.send(say.Note(key_="a", text="by a client"), delay_s=1.0)
        for n, reminder in enumerate(say.reminders):
            await clerk.send(reminder(key_=f"a{n}", delay_s=1.0))
        async with office.unit() as unit:
            unit.send(say.Note(key_="b", text="by a unit"), at=began + timedelta(seconds=1))
            unit.publish(say.Noted(key_="b", text="by a unit"), delay_s=1.0)
        wanted = [
            *(f"command by {who}" for who in ("a client", "a handler", "a thread", "a unit", "an effect")),
            *(f"event by {who}" for who in ("a handler", "a thread", "a unit")),
        ]
        assert await its.hears(len(wanted)) == wanted
        # The database and this test are on one machine: their clocks agree to the millisecond.
        assert min(at for _, _, at in its.heard) >= began + timedelta(seconds=0.99)
        assert office.worker is not None
        assert await office.store.timers.next_due() is None


async def test_staged_by_a_client_that_went_it_is_sent_by_a_worker_that_comes_later(pair: Pair) -> None:
    its = Office()
    async with pair.connect(its.office, worker=False) as office:
        id = await office.send(its.say.Note(key_="a", text="later"), delay_s=0.1)
        gone = await office.send(its.say.Note(key_="a", text="never"), delay_s=0.1)
        assert await office.cancel_delayed(gone)
    await asyncio.sleep(0.2)
    async with pair.connect(its.clerk) as clerk, pair.connect(its.office) as office:
        assert await its.hears(1) == ["command later"]
        assert not await office.cancel_delayed(id)
        assert str((await clerk.status(id)).state) == "done"


async def test_a_worker_that_only_sends_delays_too_and_is_woken(pair: Pair) -> None:
    """It has no consumer at all, and its timers are polled for every five minutes."""
    its = Office()
    sender = Service(unique("sender"), messages=[its.say.Note], partitions=1)
    async with pair.connect(its.clerk), pair.connect(sender, settings=NEVER_POLLS) as sending:
        await sending.send(its.say.Note(key_="a", text="soon"), delay_s=0.3)
        assert await its.hears(1) == ["command soon"]


async def test_the_same_id_is_sent_once_however_often_it_is_staged(pair: Pair) -> None:
    its = Office()
    id = IDS.new()
    async with pair.connect(its.clerk), pair.connect(its.office) as office:
        for _ in range(3):
            assert await office.send(its.say.Note(key_="a", text="once"), id=id, delay_s=0.2) == id
        await office.send(its.say.Note(key_="a", text="last"), delay_s=0.6)
        assert await its.hears(2) == ["command last", "command once"]


async def test_a_unit_that_is_not_committed_delays_nothing(pair: Pair) -> None:
    its = Office()
    async with pair.connect(its.office, worker=False) as office:

        async def fails() -> None:
            async with office.unit() as unit:
                unit.send(its.say.Note(key_="a", text="never"), delay_s=0.1)
                raise RuntimeError

        with pytest.raises(RuntimeError):
            await fails()
        assert await office.store.timers.next_due() is None


async def test_a_delay_is_counted_by_the_databases_clock_whatever_the_senders_says(
    database: str, tmp_path: Path
) -> None:
    class AnHourAhead(SystemClock):
        jump_s = 3600.0

        def now(self) -> datetime:
            return datetime.now(UTC) + timedelta(seconds=self.jump_s)

    its, clock = Office(), AnHourAhead()
    async with its.office.connect(store=database, bus=f"embedded:{tmp_path}", migrate=True, clock=clock) as office:
        clock.jump_s = -7200.0  # it was set while nobody looked
        await office.send(its.say.Note(key_="a", text="x"), delay_s=100)
        due_at = await office.store.timers.next_due()
        assert due_at is not None
        assert abs(due_at - datetime.now(UTC) - timedelta(seconds=100)) < timedelta(seconds=30)


async def test_on_sqlite_the_clock_given_decides_also_when_it_jumps(tmp_path: Path) -> None:
    class Clock(SystemClock):
        at = NOON

        def now(self) -> datetime:
            return self.at

    its, clock = Office(), Clock()
    settings = WorkerSettings(timer_poll_s=0.02)
    where: dict[str, Any] = {"store": f"sqlite:{tmp_path}", "bus": f"embedded:{tmp_path}"}
    async with its.office.connect(**where, clock=clock, worker=True, settings=settings) as office:
        await office.send(its.say.Note(key_="a", text="x"), delay_s=60)
        for jump_s in (59.9, -3600.0, 59.999):
            clock.at = NOON + timedelta(seconds=jump_s)
            await asyncio.sleep(0.1)
            assert await office.store.timers.next_due() == NOON + timedelta(seconds=60)
        clock.at = NOON + timedelta(days=400)

        async def gone() -> bool:
            return await office.store.timers.next_due() is None

        await eventually(gone, bool)


# --- what is no delay -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "delay_s", "why"),
    [
        (NOON, 1.0, "wanted one of them"),
        (NOON.replace(tzinfo=None), None, "wanted an aware datetime"),
        (None, -1.0, "wanted 0 to"),
        (None, float("nan"), "wanted 0 to"),
        (None, 1e12, "wanted 0 to"),
    ],
)
def test_when_it_is_to_be_sent_must_be_said_well(at: datetime | None, delay_s: float | None, why: str) -> None:
    with pytest.raises(BadDelay, match=why):
        when(at, delay_s)


def test_a_moment_and_a_delay() -> None:
    assert when(None, None) is None
    assert when(NOON, None) == NOON
    assert when(None, 0.0) == 0.0
    envelope = message()
    assert timer_of("shop", envelope, 90.0, now=NOON) == Timer(
        delayed_by("shop"), envelope.id, "o-1", NOON + timedelta(seconds=90), envelope
    )


def test_where_no_store_is_nothing_can_be_delayed() -> None:
    class Ring(Command[None], type="office.ring.v1"):
        key_: Key[str]

    def make(*given: Any, **options: Any) -> Envelope:
        return message()

    staging = Staging("office", make, max_bytes=1000_000)
    with pytest.raises(BadDelay, match="nothing can be delayed here"):
        staging.send(Ring(key_="a"), delay_s=1)
    assert (staging.outgoing, staging.timers) == ((), ())
