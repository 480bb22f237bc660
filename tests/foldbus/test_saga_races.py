"""Sagas behind the runtime on both stores: every race of DESIGN §9, forced in both orders.

Two processes share one database: `store` and `twin`. A commit that is held (`held`) has decided on what it saw; then
the other process commits; then it is let go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any
from uuid import UUID, uuid5

import pytest

from bus.codec import JsonCodec
from bus.envelope import Envelope, Failure, Kind, Origin, ReplyOutcome, ReplyTo
from bus.messages import Refused
from bus.metrics import MemoryMetrics
from bus.processing import Done, Item
from bus.registry import Registry
from bus.seams import NoFailpoints, SystemClock, Uuid7Ids
from eventstore.port import Store, Timer, Wanted
from foldbus.runtime import UnitProcessor
from sagas import CancelSaga, RetrySaga, SagaBehaviour, SagaDefinition, SagaRun, saga, saga_group, saga_id, saga_stream
from tests.eventstore.stores import NOON, whole_log
from tests.foldbus.test_runtime import held, kinds, settle
from tests.sagas.stories import (
    PLACED,
    CardDeclined,
    Erase,
    Note,
    OrderPlaced,
    Paid,
    Pay,
    Release,
    Reserve,
    Reserved,
    Ship,
    fulfil_order,
)
from tests.sagas.world import MESSAGES

ids = Uuid7Ids()
codec = JsonCodec(Registry(MESSAGES, [CardDeclined]))


class LongAgo:
    """Every timer that a saga sets is due at once by the store's own clock."""

    def now(self) -> datetime:
        return NOON

    def monotonic(self) -> float:
        return 0.0


@saga("three-notes", version=1)
async def three_notes(run: SagaRun, placed: OrderPlaced) -> None:
    await run.all(*[run.step(Note(text=text), undo=Erase(text=text)) for text in "abc"])
    await run.step(Ship(order_id=placed.order_id))


@saga("shop", version=1)
async def with_a_bug(run: SagaRun, placed: OrderPlaced) -> None:
    reserved = await run.step(Reserve(order_id=placed.order_id), undo=Release(order_id=placed.order_id))
    raise RuntimeError(f"no such shelf {reserved.shelf}")


@saga("shop", version=1)
async def repaired(run: SagaRun, placed: OrderPlaced) -> None:
    reserved = await run.step(Reserve(order_id=placed.order_id), undo=Release(order_id=placed.order_id))
    await run.step(Ship(order_id=placed.order_id, note=reserved.shelf))


class Process:
    """One worker's two processors for one saga: what starts it, and what answers it."""

    def __init__(self, store: Store, definition: SagaDefinition[Any]) -> None:
        self.store, self.metrics = store, MemoryMetrics()
        group = saga_group("orders", definition.name)
        self.starts = self._processor(group, definition, starts=definition.name)
        self.replies = self._processor("orders.replies", definition)

    def _processor(self, consumer: str, definition: SagaDefinition[Any], starts: str | None = None) -> UnitProcessor:
        behaviour = SagaBehaviour(
            [definition], service="orders", codec=codec, ids=ids, clock=LongAgo(), starts=starts, metrics=self.metrics
        )
        return UnitProcessor(
            group=consumer,
            consumer=consumer,
            service="orders",
            behaviour=behaviour,
            store=self.store,
            wants=lambda _: True,
            ids=ids,
            clock=SystemClock(),
            metrics=self.metrics,
            failpoint=NoFailpoints(),
            max_bytes=1_000_000,
        )

    async def start(self, start: Envelope) -> None:
        await settle(self.starts, Item(start, None))

    async def take(self, *envelopes: Envelope) -> None:
        await settle(self.replies, *[Item(envelope, None) for envelope in envelopes])


def a_start() -> Envelope:
    first = ids.new()
    return codec.encode(PLACED, Origin("front", first, NOON, first), topic="front.events")


def answer(command: Envelope, value: Any) -> Envelope:
    origin = Origin(command.type.split(".")[0], ids.new(), NOON, command.correlation_id, command.id)
    return codec.encode_reply(command, value, origin)


def verb(kind: type[RetrySaga] | type[CancelSaga], definition: SagaDefinition[Any], start: Envelope) -> Envelope:
    message = kind(saga_id=saga_id(definition.name, start.id), definition=definition.name, by="ann")
    origin = Origin("cli", ids.new(), NOON, ids.new())
    return codec.encode(message, origin, topic="orders.replies", reply_to=ReplyTo("cli.inbox", "cli", "i-1"))


async def history(store: Store, definition: SagaDefinition[Any], start: Envelope) -> list[str]:
    (part,) = await store.load([Wanted(saga_stream(definition.name, saga_id(definition.name, start.id)))])
    return [record.type.removeprefix("foldbus.").removesuffix(".v1") for record in part.records]


async def commands(store: Store) -> list[Envelope]:
    return [one for one in await whole_log(store) if one.kind is Kind.COMMAND]


async def sent(store: Store) -> list[str]:
    return [one.type.split(".")[1] for one in await commands(store)]


async def last(store: Store, name: str) -> Envelope:
    return [one for one in await commands(store) if one.type.split(".")[1] == name][-1]


async def answers(store: Store) -> list[tuple[UUID | None, ReplyOutcome | None]]:
    return [(one.causation_id, one.outcome) for one in await whole_log(store) if one.topic == "cli.inbox"]


async def overtaken(slow: Any, late: Callable[[], Awaitable[None]], early: Callable[[], Awaitable[None]]) -> None:
    """`late` decides on `slow`, which holds its commit until `early` is through."""
    task = asyncio.ensure_future(late())
    await slow.reached.wait()
    await early()
    slow.gate.set()
    await task


async def at_payment(store: Store) -> tuple[Process, Envelope, Envelope, Timer]:
    """An order whose payment is under way: its process, its start, the command, and the timer that is due."""
    one, start = Process(store, fulfil_order), a_start()
    await one.start(start)
    await one.take(answer(await last(store, "reserve"), Reserved()))
    (timer,) = await store.timers.due(limit=10)
    return one, start, await last(store, "pay"), timer


PAID = ["saga-step-replied", "saga-step-scheduled"]
EXPIRED = ["saga-step-timed-out", "saga-step-scheduled"]
BEFORE = ["saga-started", "saga-step-scheduled", "saga-step-replied", "saga-step-scheduled"]


class TestAReplyAgainstItsTimeout:
    async def test_that_was_committed_first_takes_the_timer_away(self, store: Store) -> None:
        one, start, pay, _ = await at_payment(store)
        await one.take(answer(pay, Paid()))
        assert await store.timers.next_due() is None
        assert await history(store, fulfil_order, start) == BEFORE + PAID

    async def test_that_was_committed_first_makes_a_timeout_in_hand_change_nothing(
        self, store: Store, twin: Store
    ) -> None:
        one, start, pay, timer = await at_payment(store)
        await one.take(answer(pay, Paid()))
        await Process(twin, fulfil_order).take(timer.envelope)
        assert await history(store, fulfil_order, start) == BEFORE + PAID
        assert await sent(store) == ["reserve", "pay", "ship"]

    async def test_that_comes_after_it_changes_nothing(self, store: Store, twin: Store) -> None:
        one, start, pay, timer = await at_payment(store)
        await one.take(timer.envelope)
        await Process(twin, fulfil_order).take(answer(pay, Paid()))
        assert await store.timers.next_due() is None
        assert await history(store, fulfil_order, start) == BEFORE + EXPIRED
        assert await sent(store) == ["reserve", "pay", "cancel-order"]

    async def test_that_commits_while_the_timeout_is_decided_wins(self, store: Store, twin: Store) -> None:
        one, start, pay, timer = await at_payment(store)
        slow = held(twin)
        other = Process(slow, fulfil_order)
        await overtaken(slow, lambda: other.take(timer.envelope), lambda: one.take(answer(pay, Paid())))
        assert await history(store, fulfil_order, start) == BEFORE + PAID
        assert await sent(store) == ["reserve", "pay", "ship"]
        assert other.metrics.total("foldbus_conflicts_total") == 1

    async def test_that_is_decided_while_the_timeout_commits_loses(self, store: Store, twin: Store) -> None:
        one, start, pay, timer = await at_payment(store)
        slow = held(twin)
        other = Process(slow, fulfil_order)
        await overtaken(slow, lambda: other.take(answer(pay, Paid())), lambda: one.take(timer.envelope))
        assert await history(store, fulfil_order, start) == BEFORE + EXPIRED
        assert await sent(store) == ["reserve", "pay", "cancel-order"]
        assert other.metrics.total("foldbus_conflicts_total") == 1

    async def test_in_one_batch_with_it_is_the_first_that_counts(self, store: Store) -> None:
        one, start, pay, timer = await at_payment(store)
        await one.take(timer.envelope, answer(pay, Paid()))
        assert await history(store, fulfil_order, start) == BEFORE + EXPIRED
        assert await sent(store) == ["reserve", "pay", "cancel-order"]

    async def test_that_lost_is_made_up_for_by_an_undo_of_the_step(self, store: Store) -> None:
        """Nobody knows whether the payment happened: its refund goes out and names it; the reservation's follows."""
        one, start, pay, timer = await at_payment(store)
        await one.take(timer.envelope)
        await one.take(answer(pay, Paid()))
        await one.take(answer(await last(store, "cancel-order"), None))
        refund = await last(store, "refund")
        assert refund.undoes == pay.id
        await one.take(answer(refund, None))
        await one.take(answer(await last(store, "release"), None))
        assert (await history(store, fulfil_order, start))[-1] == "saga-compensated"
        assert await sent(store) == ["reserve", "pay", "cancel-order", "refund", "release"]


class TestATimerInTwoHands:
    async def test_fires_once(self, store: Store, twin: Store) -> None:
        """Its lease ran out at a slow worker: both have it."""
        one, start, _, timer = await at_payment(store)
        slow = held(twin)
        other = Process(slow, fulfil_order)
        await overtaken(slow, lambda: other.take(timer.envelope), lambda: one.take(timer.envelope))
        assert await history(store, fulfil_order, start) == BEFORE + EXPIRED
        assert await sent(store) == ["reserve", "pay", "cancel-order"]

    async def test_is_shown_to_one_of_two_workers_that_ask_at_once(self, store: Store, twin: Store) -> None:
        one = Process(store, fulfil_order)
        for _ in range(20):
            await one.start(a_start())
        await one.take(*[answer(command, Reserved()) for command in await commands(store)])
        shown = await asyncio.gather(*[each.timers.due(limit=7) for each in (store, twin, store, twin)])
        found = [timer.id for timers in shown for timer in timers]
        assert len(found) == len(set(found)) == 20

    async def test_that_cannot_be_handled_becomes_a_dead_letter_and_is_shown_to_nobody_again(
        self, store: Store
    ) -> None:
        one, start, _, timer = await at_payment(store)
        why = Failure("RuntimeError", "bug", "", 5, NOON, NOON)
        assert await one.replies.give_up(Item(timer.envelope, None), why) == Done()
        assert [letter.id for letter in await store.dead_letters()] == [timer.id]
        assert await store.timers.next_due() is None
        assert await history(store, fulfil_order, start) == BEFORE


class TestTwoWorkersOnOneSaga:
    @pytest.mark.parametrize("first", [0, 1, 2])
    async def test_decide_on_what_the_other_committed_and_send_once(
        self, store: Store, twin: Store, first: int
    ) -> None:
        """Three branches wait. Whichever reply commits first, the two that decided without it are told and look
        again; the last of them to commit, and it alone, sends what follows."""
        one, start = Process(store, three_notes), a_start()
        await one.start(start)
        notes = await commands(store)
        early = notes.pop(first)
        slow = held(twin)
        other = Process(slow, three_notes)
        late = [answer(note, None) for note in notes]
        await overtaken(slow, lambda: other.take(*late), lambda: one.take(answer(early, None)))
        assert (await history(store, three_notes, start)).count("saga-step-replied") == 3
        assert await sent(store) == ["note", "note", "note", "ship"]

    async def test_of_which_one_remembers_an_old_state_loses_looks_again_and_goes_on(
        self, store: Store, twin: Store
    ) -> None:
        one, other, start = Process(store, three_notes), Process(twin, three_notes), a_start()
        await one.start(start)
        a, b, c = await commands(store)
        await one.take(answer(a, None))
        await other.take(answer(b, None))
        stale = Item(answer(c, None), None)
        assert kinds(await one.replies.process([stale], {})) == ["Again"]
        assert await sent(store) == ["note", "note", "note"]
        await settle(one.replies, stale)
        assert await sent(store) == ["note", "note", "note", "ship"]

    async def test_given_the_same_reply_at_once_go_on_once(self, store: Store, twin: Store) -> None:
        one, start, pay, _ = await at_payment(store)
        reply, slow = answer(pay, Paid()), held(twin)
        other = Process(slow, fulfil_order)
        await overtaken(slow, lambda: other.take(reply), lambda: one.take(reply))
        assert await history(store, fulfil_order, start) == BEFORE + PAID
        assert await sent(store) == ["reserve", "pay", "ship"]

    async def test_given_an_answer_twice_under_two_ids_go_on_once(self, store: Store, twin: Store) -> None:
        """A command that was delivered twice is answered twice: the stored answer, under a new id."""
        one, start, pay, _ = await at_payment(store)
        slow = held(twin)
        other = Process(slow, fulfil_order)
        await overtaken(
            slow, lambda: other.take(answer(pay, Paid())), lambda: one.take(answer(pay, CardDeclined("again")))
        )
        assert (await history(store, fulfil_order, start)).count("saga-step-replied") == 2
        assert await sent(store) == ["reserve", "pay", "cancel-order"]

    async def test_end_it_once(self, store: Store, twin: Store) -> None:
        one, start, pay, _ = await at_payment(store)
        await one.take(answer(pay, Paid()))
        ship = await last(store, "ship")
        slow = held(twin)
        other = Process(slow, fulfil_order)
        await overtaken(slow, lambda: other.take(answer(ship, None)), lambda: one.take(answer(ship, None)))
        assert (await history(store, fulfil_order, start)).count("saga-completed") == 1

    async def test_given_a_cancellation_and_a_reply_at_once_do_both_in_the_order_of_commits(
        self, store: Store, twin: Store
    ) -> None:
        one, start, pay, _ = await at_payment(store)
        slow = held(twin)
        other = Process(slow, fulfil_order)
        cancel = verb(CancelSaga, fulfil_order, start)
        await overtaken(slow, lambda: other.take(answer(pay, Paid())), lambda: one.take(cancel))
        found = await history(store, fulfil_order, start)
        assert "saga-cancelled" in found
        assert found.count("saga-step-replied") == 1  # the reservation's: the payment was no longer waited for
        assert "ship" not in await sent(store)
        assert await store.timers.next_due() is None


class TestADoubledStart:
    async def test_in_one_batch_starts_once(self, store: Store) -> None:
        one, start = Process(store, fulfil_order), a_start()
        await settle(one.starts, Item(start, None), Item(start, None))
        assert await history(store, fulfil_order, start) == BEFORE[:2]
        assert await sent(store) == ["reserve"]

    async def test_at_another_worker_later_starts_once(self, store: Store, twin: Store) -> None:
        one, start = Process(store, fulfil_order), a_start()
        await one.start(start)
        await one.take(answer(await last(store, "reserve"), Reserved()))
        await Process(twin, fulfil_order).start(start)
        assert await history(store, fulfil_order, start) == BEFORE
        assert await sent(store) == ["reserve", "pay"]

    async def test_at_two_workers_at_once_starts_once(self, store: Store, twin: Store) -> None:
        one, start, slow = Process(store, fulfil_order), a_start(), held(twin)
        other = Process(slow, fulfil_order)
        await overtaken(slow, lambda: other.start(start), lambda: one.start(start))
        assert await history(store, fulfil_order, start) == BEFORE[:2]
        assert await sent(store) == ["reserve"]

    async def test_after_the_end_changes_nothing(self, store: Store, twin: Store) -> None:
        one, start, pay, _ = await at_payment(store)
        await one.take(answer(pay, Paid()))
        await one.take(answer(await last(store, "ship"), None))
        before = await history(store, fulfil_order, start)
        await Process(twin, fulfil_order).start(start)
        assert await history(store, fulfil_order, start) == before
        assert before[-1] == "saga-completed"


class TestALateReply:
    @pytest.mark.parametrize("value", [Paid(), CardDeclined("too late")], ids=["ok", "refused"])
    async def test_after_a_completed_end_changes_nothing_and_is_counted(
        self, store: Store, value: Paid | Refused
    ) -> None:
        one, _, pay, _ = await at_payment(store)
        await one.take(answer(pay, Paid()))
        await one.take(answer(await last(store, "ship"), None))
        before, known = await whole_log(store), one.metrics.total("foldbus_saga_late_total")
        await one.take(answer(pay, value))
        assert await whole_log(store) == before
        assert one.metrics.total("foldbus_saga_late_total") == known + 1

    async def test_after_a_compensated_end_changes_nothing(self, store: Store) -> None:
        one, start, pay, timer = await at_payment(store)
        await one.take(timer.envelope)
        for name in ("cancel-order", "refund", "release"):
            await one.take(answer(await last(store, name), None))
        before = await whole_log(store)
        await one.take(answer(pay, Paid()))
        assert await whole_log(store) == before
        assert (await history(store, fulfil_order, start))[-1] == "saga-compensated"

    async def test_for_a_saga_that_nobody_knows_is_claimed_and_counted(self, store: Store) -> None:
        one, _, pay, _ = await at_payment(store)
        elsewhere = ReplyTo("orders.replies", str(uuid5(pay.id, "nobody")), "fulfil-order")
        lost = codec.encode(
            Pay(payment_id="p"), Origin("orders", ids.new(), NOON, ids.new()), topic="payments.commands",
            reply_to=elsewhere,
        )  # fmt: skip
        await one.take(answer(lost, Paid()))
        assert one.metrics.total("foldbus_saga_unknown_total") == 1


class TestAParkedSaga:
    async def parked(self, store: Store) -> tuple[Process, Envelope]:
        one, start = Process(store, with_a_bug), a_start()
        await one.start(start)
        await one.take(answer(await last(store, "reserve"), Reserved(shelf="B2")))
        assert (await history(store, with_a_bug, start))[-2:] == ["saga-step-replied", "saga-parked"]
        assert await sent(store) == ["reserve"], "a bug refunds nobody"
        return one, start

    async def test_goes_on_where_it_stood_once_its_code_is_repaired(self, store: Store, twin: Store) -> None:
        _, start = await self.parked(store)
        retry = verb(RetrySaga, repaired, start)
        fixed = Process(twin, repaired)
        await fixed.take(retry)
        assert await sent(store) == ["reserve", "ship"]
        assert await answers(store) == [(retry.id, ReplyOutcome.OK)]
        ship = await last(store, "ship")
        assert codec.decode(ship) == Ship(order_id="o-1", note="B2")
        await fixed.take(answer(ship, None))
        assert (await history(store, repaired, start))[-1] == "saga-completed"

    async def test_parks_again_when_its_code_is_not(self, store: Store) -> None:
        one, start = await self.parked(store)
        await one.take(verb(RetrySaga, with_a_bug, start))
        assert (await history(store, with_a_bug, start))[-2:] == ["saga-retried", "saga-parked"]

    async def test_is_retried_once_when_two_people_ask_at_once(self, store: Store, twin: Store) -> None:
        _, start = await self.parked(store)
        one, slow = Process(store, repaired), held(twin)
        other = Process(slow, repaired)
        hers, his = verb(RetrySaga, repaired, start), verb(RetrySaga, repaired, start)
        await overtaken(slow, lambda: other.take(his), lambda: one.take(hers))
        assert await answers(store) == [(hers.id, ReplyOutcome.OK), (his.id, ReplyOutcome.REFUSED)]
        assert await sent(store) == ["reserve", "ship"]

    async def test_is_retried_once_by_a_verb_delivered_twice(self, store: Store, twin: Store) -> None:
        _, start = await self.parked(store)
        retry = verb(RetrySaga, repaired, start)
        await Process(store, repaired).take(retry)
        await Process(twin, repaired).take(retry)
        assert (await history(store, repaired, start)).count("saga-retried") == 1
        assert await sent(store) == ["reserve", "ship"]
