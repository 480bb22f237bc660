"""Handlers that call the outside world, on both stores: begun on record, repeated by the same id, never called undone.

The outside world is a `Bank` that keeps a list of the calls it got; it is as forgetful about ids as a test wants it.
"""

# Without `from __future__ import annotations`: some handlers are made per test.
import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio
from pydantic import BaseModel

from bus.envelope import Failure, Kind, Origin, ReplyTo
from bus.metrics import MemoryMetrics
from bus.processing import Again, Answer, Aside, Failed, Item, Processor
from bus.seams import NoFailpoints, SystemClock, Uuid7Ids
from eventstore.port import ClaimState, Store
from foldbus import (
    BadAnswer,
    BadHandler,
    Command,
    Connection,
    Context,
    Decider,
    EffectContext,
    Event,
    Handler,
    HandlerEnded,
    Key,
    Message,
    Refused,
    Service,
)
from foldbus.effects import LEASE_MARGIN_S
from foldbus.parking import ParkSettings
from foldbus.worker import command_processor
from tests.eventstore.stores import NOON, whole_log
from tests.foldbus.test_handlers import Kill, answers, kinds, settle

ids = Uuid7Ids()
NO = Failure("RuntimeError", "the bank is closed", "", 3, NOON, NOON, "1")


class Charged(Event, type="shop.charged.v1"):
    account: Key[str]
    cents: int


class Charge(Command[Charged], type="shop.charge.v1"):
    account: Key[str]
    cents: int = 5


class Refund(Command[None], type="shop.refund.v1"):
    account: Key[str]
    cents: int = 5


class Broke(Refused, code="shop.broke"): ...


class Notes(BaseModel, frozen=True):
    n: int = 0


class Note(Command[None], type="shop.note.v1"):
    account: Key[str]


class Noted(Event, type="shop.noted.v1", public=False):
    account: Key[str]


def evolve(notes: Notes, event: Noted) -> Notes:
    return Notes(n=notes.n + 1)


def decide(notes: Notes, command: Note) -> list[Noted]:
    return [Noted(account=command.account)]


notes = Decider("notes", initial=Notes(), evolve=evolve, decide=decide)


@dataclass
class Bank:
    """`calls`: what it was asked, with the idempotency key, and whether the caller knew of an earlier attempt."""

    calls: list[tuple[str, UUID, bool]] = field(default_factory=list)
    inside: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    waits: bool = False
    error: Exception | None = None

    async def call(self, what: str, ctx: EffectContext) -> None:
        self.calls.append((what, ctx.message_id, ctx.started))
        self.inside.set()
        if self.waits:
            await self.go_on.wait()
        if self.error is not None:
            raise self.error

    @property
    def done(self) -> list[str]:
        return [what for what, _, _ in self.calls]

    def handlers(self, **options: Any) -> list[Handler]:
        async def charge(command: Charge, ctx: EffectContext) -> Charged:
            await self.call("charge", ctx)
            charged = Charged(account=command.account, cents=command.cents)
            ctx.publish(charged)
            ctx.send(Note(account=command.account))
            return charged

        async def refund(command: Refund, ctx: EffectContext) -> None:
            await self.call("refund", ctx)

        return [Handler(charge, effect=True, **options), Handler(refund, effect=True, **options)]


async def until(there: Callable[[], bool]) -> None:
    async with asyncio.timeout(40):
        while not there():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0)


class _Broker:
    max_bytes = 1_000_000


def connection(store: Store, handlers: Any, *, failpoint: Any = None) -> Connection:
    service = Service("shop", deciders=[notes], handlers=handlers, refusals=[Broke])
    broker: Any = _Broker()
    return Connection(
        service, store=store, transport=broker, clock=SystemClock(), ids=ids, metrics=MemoryMetrics(),
        failpoint=failpoint or NoFailpoints(),
    )  # fmt: skip


def processor(store: Store, bank: Bank, *, parking: ParkSettings | None = None, **options: Any) -> Processor:
    return command_processor(connection(store, bank.handlers(**options)), parking)


def item(message: Message, *, id: UUID | None = None, undoes: UUID | None = None) -> Item:
    origin = Origin("front", id or ids.new(), NOON, ids.new())
    to = ReplyTo("front.inbox", "front-1", "i-7")
    codec = Service("shop", deciders=[notes], handlers=Bank().handlers()).codec
    return Item(codec.encode(message, origin, topic="shop.commands", reply_to=to, undoes=undoes), None)


async def standing(store: Store, one: Item) -> tuple[ClaimState, bool]:
    (found,) = await store.examine("shop", [(one.envelope.id, one.envelope.key)])
    return found.state, found.started


@pytest_asyncio.fixture
async def bank() -> Bank:
    return Bank()


class TestAnEffect:
    async def test_is_begun_on_record_and_commits_what_it_staged_with_its_answer(
        self, store: Store, bank: Bank
    ) -> None:
        bank.waits = True
        one = item(Charge(account="a"))
        running = asyncio.create_task(processor(store, bank).process([one], {("shop.commands", 0): 4}))
        await bank.inside.wait()
        assert await standing(store, one) == (ClaimState.STARTED, True)
        assert await whole_log(store) == []
        bank.go_on.set()
        assert kinds(await running) == ["Done"]
        assert [(record.kind, record.type) for record in await whole_log(store)] == [
            (Kind.EVENT, "shop.charged.v1"),
            (Kind.COMMAND, "shop.note.v1"),
            (Kind.REPLY, "shop.charge.reply.v1"),
        ]
        assert await standing(store, one) == (ClaimState.DONE, False)
        assert await store.watermarks("shop") == {("shop.commands", 0): 4}
        assert bank.calls == [("charge", one.envelope.id, False)]

    async def test_holds_no_transaction_while_it_runs(self, store: Store, bank: Bank) -> None:
        """On SQLite there is one writer: with a transaction open nobody else would get on."""
        bank.waits = True
        running = asyncio.create_task(processor(store, bank).process([item(Charge(account="a"))], {}))
        await bank.inside.wait()
        assert kinds(await processor(store, Bank()).process([item(Note(account="b"))], {})) == ["Done"]
        bank.go_on.set()
        assert kinds(await running) == ["Done"]

    async def test_is_not_called_again_for_a_message_that_comes_again(self, store: Store, bank: Bank) -> None:
        id = ids.new()
        for _ in range(3):
            await settle(processor(store, bank), item(Charge(account="a"), id=id))
        assert bank.done == ["charge"]
        assert await answers(store) == [(id, "ok")] * 3

    async def test_that_fails_is_called_again_at_once_and_knows_it(self, store: Store, bank: Bank) -> None:
        bank.error = RuntimeError("a hiccup")
        one, worker = item(Charge(account="a")), processor(store, bank)
        (result,) = await worker.process([one], {})
        assert isinstance(result, Failed)
        assert await standing(store, one) == (ClaimState.STARTED, True)
        bank.error = None
        assert kinds(await worker.process([one], {})) == ["Done"]
        assert bank.calls == [("charge", one.envelope.id, False), ("charge", one.envelope.id, True)]

    async def test_that_refuses_answers_so_and_leaves_nothing_to_undo(self, store: Store, bank: Bank) -> None:
        bank.error = Broke(cents=5)
        step = item(Charge(account="a"))
        for _ in range(2):
            await settle(processor(store, bank), replace(step))
        assert bank.done == ["charge"]
        assert await answers(store) == [(step.envelope.id, "refused")] * 2
        await settle(processor(store, bank), item(Refund(account="a"), undoes=step.envelope.id))
        assert bank.done == ["charge"]

    async def test_that_takes_too_long_failed_and_its_late_end_is_nobodys(self, store: Store, bank: Bank) -> None:
        bank.waits = True
        one = item(Charge(account="a"))
        (result,) = await processor(store, bank, timeout_s=0.05).process([one], {})
        assert isinstance(result, Failed)
        assert isinstance(result.error, TimeoutError)
        assert await standing(store, one) == (ClaimState.STARTED, True)
        bank.waits = False
        await settle(processor(store, bank), one)
        assert bank.calls[1] == ("charge", one.envelope.id, True)

    async def test_that_answers_with_something_else_failed_and_stores_nothing(self, store: Store) -> None:
        async def charge(command: Charge, ctx: EffectContext) -> Any:
            ctx.send(Note(account=command.account))
            return Notes()

        worker = command_processor(connection(store, [Handler(charge, effect=True)]))
        (result,) = await worker.process([item(Charge(account="a"))], {})
        assert isinstance(result, Failed)
        assert isinstance(result.error, BadAnswer)
        assert await whole_log(store) == []

    async def test_that_is_cancelled_may_be_called_again_at_once(self, store: Store, bank: Bank) -> None:
        """A drain that took too long: whoever has the message next need not wait for the lease."""
        bank.waits = True
        one = item(Charge(account="a"))
        running = asyncio.create_task(processor(store, bank).process([one], {}))
        await bank.inside.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        bank.waits = False
        assert kinds(await processor(store, bank).process([one], {})) == ["Done"]
        assert bank.calls[1] == ("charge", one.envelope.id, True)

    async def test_ends_with_its_context(self, store: Store) -> None:
        kept: list[EffectContext] = []

        async def charge(command: Charge, ctx: EffectContext) -> Charged:
            kept.append(ctx)
            return Charged(account=command.account, cents=1)

        await settle(command_processor(connection(store, [Handler(charge, effect=True)])), item(Charge(account="a")))
        with pytest.raises(HandlerEnded):
            kept[0].send(Note(account="a"))
        with pytest.raises(HandlerEnded):
            kept[0].append(notes, Noted(account="a"))

    async def test_appends_to_a_stream(self, store: Store) -> None:
        async def charge(command: Charge, ctx: EffectContext) -> Charged:
            ctx.append(notes, Noted(account=command.account), expected=0)
            return Charged(account=command.account, cents=1)

        await settle(command_processor(connection(store, [Handler(charge, effect=True)])), item(Charge(account="a")))
        assert [record.type for record in await whole_log(store, outgoing=False)] == ["shop.noted.v1"]

    async def test_is_called_for_many_keys_at_once_and_for_one_key_in_order(self, store: Store, bank: Bank) -> None:
        bank.waits = True
        worker = processor(store, bank, at_once=3)
        batch = [item(Charge(account=account)) for account in ("a", "a", "b", "c", "d")]
        running = asyncio.create_task(worker.process(batch, {}))
        await until(lambda: len(bank.calls) == 3)
        for _ in range(50):
            await asyncio.sleep(0)
        assert {id for _, id, _ in bank.calls} == {batch[place].envelope.id for place in (0, 2, 3)}
        bank.go_on.set()
        assert kinds(await running) == ["Done"] * 5


class TestAnotherWorker:
    async def test_waits_as_long_as_the_first_is_at_it(self, store: Store, twin: Store, bank: Bank) -> None:
        bank.waits = True
        one = item(Charge(account="a"))
        first = asyncio.create_task(processor(store, bank).process([one], {}))
        await bank.inside.wait()
        assert kinds(await processor(twin, bank).process([replace(one)], {})) == ["Again"]
        assert bank.done == ["charge"]
        bank.go_on.set()
        assert kinds(await first) == ["Done"]
        assert kinds(await processor(twin, bank).process([replace(one)], {})) == ["Done"]
        assert bank.done == ["charge"]

    async def test_follows_a_zombie_after_its_lease_and_one_result_counts(
        self, store: Store, twin: Store, bank: Bank, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The zombie sleeps in its call past the lease; it wakes when the other has committed, and again when the
        other has only begun: its result is dropped both times."""
        monkeypatch.setattr("foldbus.effects.LEASE_MARGIN_S", -50.0)  # the lease is over as soon as it is taken
        zombie, other = Bank(waits=True), Bank()
        for commits_before in (True, False):
            one = item(Charge(account="a" if commits_before else "b"))
            for one_bank in (zombie, other):
                one_bank.inside.clear()
                one_bank.go_on.clear()
            asleep = asyncio.create_task(processor(store, zombie).process([one], {}))
            await zombie.inside.wait()
            other.waits = not commits_before
            second = asyncio.create_task(processor(twin, other).process([replace(one)], {}))
            await other.inside.wait()
            if commits_before:
                await second
            zombie.go_on.set()
            assert kinds(await asleep) == ["Done" if commits_before else "Again"]
            other.go_on.set()
            assert kinds(await second) == ["Done"]
            assert zombie.calls[-1] == ("charge", one.envelope.id, False)
            assert other.calls[-1] == ("charge", one.envelope.id, True)
        assert [record.type for record in await whole_log(store)].count("shop.charged.v1") == 2


class TestADeath:
    async def test_between_call_and_commit_is_followed_by_a_call_with_the_same_key_that_knows(
        self, store: Store, twin: Store, bank: Bank, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class At:
            def hit(self, name: str) -> None:
                if name == "before-commit":
                    raise Kill

        async def dies(one: Item) -> None:
            with pytest.raises(Kill):
                await command_processor(connection(store, bank.handlers(), failpoint=At())).process([one], {})
            assert await whole_log(store) == []

        leased, one = item(Charge(account="b")), item(Charge(account="a"))
        monkeypatch.setattr("foldbus.effects.LEASE_MARGIN_S", 3600.0)
        await dies(leased)
        monkeypatch.setattr("foldbus.effects.LEASE_MARGIN_S", -49.5)
        await dies(one)
        for each in (leased, one):
            assert await standing(store, each) == (ClaimState.STARTED, True)
        found = await processor(twin, bank).process([replace(leased)], {})
        assert kinds(found) == ["Again"], "the lease of the dead one is not over"
        result: Answer = Again()
        async with asyncio.timeout(40):
            while kinds([result]) != ["Done"]:
                (result,) = await processor(twin, bank).process([replace(one)], {})
                await asyncio.sleep(0.05)
        assert bank.calls == [
            ("charge", leased.envelope.id, False),
            ("charge", one.envelope.id, False),
            ("charge", one.envelope.id, True),
        ]

    async def test_after_the_commit_changes_nothing(self, store: Store, bank: Bank) -> None:
        class At:
            def hit(self, name: str) -> None:
                if name == "after-commit":
                    raise Kill

        one = item(Charge(account="a"))
        with pytest.raises(Kill):
            await command_processor(connection(store, bank.handlers(), failpoint=At())).process([one], {})
        await settle(processor(store, bank), one)
        assert bank.done == ["charge"]

    def test_is_given_time_to_end(self) -> None:
        """Nobody else begins before the handler's own time limit is over, and what its result takes to commit."""
        assert LEASE_MARGIN_S >= 5


class TestGivenUp:
    async def test_after_it_was_begun_it_is_answered_unknown_and_not_died(self, store: Store, bank: Bank) -> None:
        bank.error = RuntimeError("no")
        one, worker = item(Charge(account="a")), processor(store, bank)
        await worker.process([one], {})
        assert kinds([await worker.give_up(one, NO)]) == ["Done"]
        assert await standing(store, one) == (ClaimState.DEAD, True)
        assert [letter.id for letter in await store.dead_letters()] == [one.envelope.id]
        await settle(worker, item(Charge(account="a"), id=one.envelope.id))
        assert await answers(store) == [(one.envelope.id, "unknown")] * 2
        assert bank.done == ["charge"]

    async def test_before_it_was_begun_it_certainly_died(self, store: Store, bank: Bank) -> None:
        one, worker = item(Charge(account="a")), processor(store, bank)
        await worker.give_up(one, NO)
        assert await standing(store, one) == (ClaimState.DEAD, False)
        assert await answers(store) == [(one.envelope.id, "died")]

    async def test_waits_for_whoever_is_at_it(self, store: Store, twin: Store, bank: Bank) -> None:
        bank.waits = True
        one = item(Charge(account="a"))
        first = asyncio.create_task(processor(store, bank).process([one], {}))
        await bank.inside.wait()
        assert kinds([await processor(twin, bank).give_up(replace(one), NO)]) == ["Again"]
        bank.go_on.set()
        assert kinds(await first) == ["Done"]
        assert kinds([await processor(twin, bank).give_up(replace(one), NO)]) == ["Done"]
        assert await answers(store) == [(one.envelope.id, "ok")] * 2


class TestAnUndo:
    async def undone(self, store: Store, step: Item, bank: Bank, *, expect: str = "Done") -> Item:
        undo = item(Refund(account="a"), undoes=step.envelope.id)
        bank.error = None
        results = await processor(store, bank).process([undo], {})
        assert kinds(results) == [expect]
        return undo

    async def test_of_a_step_that_was_done_is_called(self, store: Store, bank: Bank) -> None:
        step = item(Charge(account="a"))
        await settle(processor(store, bank), step)
        await self.undone(store, step, bank)
        assert bank.done == ["charge", "refund"]

    async def test_of_a_step_that_never_came_is_not_called_and_keeps_it_out(self, store: Store, bank: Bank) -> None:
        step = item(Charge(account="a"))
        await self.undone(store, step, bank)
        await settle(processor(store, bank), step)
        assert bank.done == []

    async def test_of_a_step_that_was_given_up_after_it_was_begun_is_called_and_keeps_it_from_a_redrive(
        self, store: Store, bank: Bank
    ) -> None:
        bank.error = RuntimeError("no answer")
        step, worker = item(Charge(account="a")), processor(store, bank)
        await worker.process([step], {})
        await worker.give_up(step, NO)
        undo = await self.undone(store, step, bank)
        assert bank.done == ["charge", "refund"]
        assert (await standing(store, step))[0] is ClaimState.CANCELLED
        assert (await answers(store))[-1] == (undo.envelope.id, "ok")
        await settle(processor(store, bank), replace(step, examine=True))
        assert bank.done == ["charge", "refund"]

    async def test_of_a_step_that_was_given_up_before_is_not_called(self, store: Store, bank: Bank) -> None:
        step = item(Charge(account="a"))
        await processor(store, bank).give_up(step, NO)
        await self.undone(store, step, bank)
        assert bank.done == []

    async def test_of_a_step_that_is_at_work_waits_for_what_becomes_of_it(
        self, store: Store, twin: Store, bank: Bank
    ) -> None:
        slow = Bank(waits=True)
        step = item(Charge(account="a"))
        first = asyncio.create_task(processor(store, slow).process([step], {}))
        await slow.inside.wait()
        await self.undone(twin, step, bank, expect="Again")
        slow.go_on.set()
        await first
        assert bank.done == []
        await self.undone(twin, step, bank)
        assert bank.done == ["refund"]

    @pytest.mark.parametrize("dies", [False, True])
    async def test_of_a_step_that_was_begun_and_is_parked_is_called(self, store: Store, bank: Bank, dies: bool) -> None:
        """Also by the next worker, when one dies after it took the step out of its queue."""
        bank.error = RuntimeError("no answer")
        step, parking = item(Charge(account="a")), ParkSettings(total_s=600)
        worker = processor(store, bank, parking=parking)
        await worker.process([step], {})
        failure = replace(NO, first_failed_at=NOON, failed_at=NOON)
        assert kinds([await worker.give_up(step, failure)]) == ["Aside"]
        assert await standing(store, step) == (ClaimState.PARKED, True)
        bank.error, undo = None, item(Refund(account="a"), undoes=step.envelope.id)
        if dies:
            bank.waits = True
            running = asyncio.create_task(worker.process([undo], {}))
            await bank.inside.wait()
            bank.inside.clear()
            await until(lambda: len(bank.calls) == 2)
            running.cancel()
            await asyncio.wait([running])
            bank.waits = False
        assert kinds(await processor(store, bank, parking=parking).process([undo], {})) == ["Done"]
        assert bank.done == ["charge", *["refund"] * (1 + dies)]
        assert (await standing(store, step))[0] is ClaimState.CANCELLED
        assert await store.parking.keys() == []

    async def test_of_a_step_that_is_parked_and_was_never_begun_is_not_called(self, store: Store, bank: Bank) -> None:
        step, parking = item(Charge(account="a")), ParkSettings(total_s=600)
        worker = processor(store, bank, parking=parking)
        failure = replace(NO, first_failed_at=NOON, failed_at=NOON)
        assert kinds([await worker.give_up(step, failure)]) == ["Aside"]
        undo = item(Refund(account="a"), undoes=step.envelope.id)
        assert kinds(await worker.process([undo], {})) == ["Done"]
        assert bank.done == []
        assert (await standing(store, step))[0] is ClaimState.CANCELLED


class TestInAQueue:
    async def turn(self, store: Store, worker: Processor, *, after_s: float = 3600) -> Item:
        """The head of key a, whose turn it is now."""
        await store.parking.wake("shop", "a")
        (parked,) = await store.parking.due(consumers=["shop"], limit=1, lease_s=60)
        attempts = 0 if parked.failure is None else parked.failure.attempts
        return Item(parked.message.envelope, parked.message.delivery, attempts, parked=parked)

    async def test_an_effect_is_begun_on_record_in_its_turn_too(self, store: Store, bank: Bank) -> None:
        """What waited behind a failure was never begun; in its turn it is, and a death there leaves that on record."""
        parking = ParkSettings(total_s=600)
        worker = processor(store, bank, parking=parking)
        head, behind = item(Note(account="a")), item(Charge(account="a"))
        failure = replace(NO, first_failed_at=NOON, failed_at=NOON)
        await worker.give_up(head, failure)
        assert kinds(await worker.process([behind], {})) == ["Aside"]
        assert bank.done == []
        turn = await self.turn(store, worker)
        assert kinds(await worker.process([turn], {})) == ["Done"]
        bank.waits, turn = True, await self.turn(store, worker)
        assert turn.envelope.id == behind.envelope.id
        running = asyncio.create_task(worker.process([turn], {}))
        await bank.inside.wait()
        assert await standing(store, behind) == (ClaimState.PARKED, True)
        bank.go_on.set()
        assert kinds(await running) == ["Done"]
        assert await standing(store, behind) == (ClaimState.DONE, False)
        assert await store.parking.keys() == []

    async def test_an_effect_that_fails_in_its_turn_is_called_again_in_the_next_one_and_knows_it(
        self, store: Store, bank: Bank
    ) -> None:
        parking = ParkSettings(total_s=600)
        worker = processor(store, bank, parking=parking)
        one = item(Charge(account="a"))
        failure = replace(NO, first_failed_at=NOON, failed_at=NOON)
        await worker.give_up(one, failure)
        bank.error = RuntimeError("no answer")
        turn = await self.turn(store, worker)
        assert kinds(await worker.process([turn], {})) == ["Failed"]
        assert isinstance(await worker.give_up(turn, failure), Aside)
        bank.error = None
        turn = await self.turn(store, worker)
        assert kinds(await worker.process([turn], {})) == ["Done"]
        assert [started for _, _, started in bank.calls] == [False, True]

    async def test_an_effect_whose_turn_went_to_somebody_else_is_not_called(self, store: Store, bank: Bank) -> None:
        parking = ParkSettings(total_s=600)
        worker = processor(store, bank, parking=parking)
        one = item(Charge(account="a"))
        await worker.give_up(one, replace(NO, first_failed_at=NOON, failed_at=NOON))
        stale = await self.turn(store, worker)
        mine = await self.turn(store, worker)
        assert kinds(await worker.process([stale], {})) == ["Aside"]
        assert bank.done == []
        assert kinds(await worker.process([mine], {})) == ["Done"]

    async def test_an_effect_that_is_given_up_there_is_answered_unknown(self, store: Store, bank: Bank) -> None:
        worker = processor(store, bank, parking=ParkSettings(total_s=600))
        one = item(Charge(account="a"))
        early = replace(NO, first_failed_at=NOON, failed_at=NOON)
        await worker.give_up(one, early)
        bank.error = RuntimeError("no answer")
        turn = await self.turn(store, worker)
        await worker.process([turn], {})
        late = replace(early, failed_at=NOON + timedelta(hours=1))
        assert kinds([await worker.give_up(turn, late)]) == ["Done"]
        assert await standing(store, one) == (ClaimState.DEAD, True)
        assert await answers(store) == [(one.envelope.id, "unknown")]


class TestInAThread:
    async def test_an_effect_may_block_and_stage(self, store: Store) -> None:
        loop_thread = threading.get_ident()

        def charge(command: Charge, ctx: EffectContext) -> Charged:
            assert threading.get_ident() != loop_thread
            ctx.append(notes, Noted(account=command.account), expected=0)
            ctx.send(Note(account=command.account))
            return Charged(account=command.account, cents=command.cents)

        worker = command_processor(connection(store, [Handler(charge, effect=True)]))
        assert kinds(await worker.process([item(Charge(account="a"))], {})) == ["Done"]
        assert [record.type for record in await whole_log(store)] == [
            "shop.noted.v1", "shop.note.v1", "shop.charge.reply.v1",
        ]  # fmt: skip

    async def test_one_that_was_cut_short_keeps_its_lease_since_the_thread_is_still_at_it(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("foldbus.effects.LEASE_MARGIN_S", 3600.0)
        inside, go_on, over = threading.Event(), threading.Event(), threading.Event()
        told: list[BaseException] = []

        def charge(command: Charge, ctx: EffectContext) -> Charged:
            inside.set()
            go_on.wait(40)
            try:
                ctx.send(Note(account=command.account))
            except BaseException as error:
                told.append(error)
            finally:
                over.set()
            return Charged(account=command.account, cents=command.cents)

        worker = command_processor(connection(store, [Handler(charge, effect=True, timeout_s=1.0)]))
        one = item(Charge(account="a"))
        (result,) = await worker.process([one], {})
        assert isinstance(result, Failed)
        assert inside.is_set()
        inside.clear()
        assert kinds(await worker.process([one], {})) == ["Again"]
        assert not inside.is_set(), "a second call beside the first"
        go_on.set()
        assert await asyncio.to_thread(over.wait, 40)
        assert isinstance(told[0], HandlerEnded)


# --- start-up --------------------------------------------------------------------------------------------------------


async def _with_sql(command: Charge, ctx: Context) -> Charged: ...  # type: ignore[empty-body]


async def _effect(command: Charge, ctx: EffectContext) -> Charged: ...  # type: ignore[empty-body]


async def _on_event(event: Charged, ctx: EffectContext) -> None: ...


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Handler(_with_sql, effect=True), "wants a Context, but is given a EffectContext: it is an effect"),
        (lambda: Handler(_effect), "wants a EffectContext, but is given a Context: it has a transaction"),
        (lambda: Handler(_on_event, effect=True, delivery="at-least-once"), "its claim is what makes it one"),
        (lambda: Handler(_effect, effect=True, timeout_s=0), "wanted above 0"),
    ],
)
def test_a_mode_that_does_not_fit_the_function_is_refused(make: Callable[[], Handler], told: str) -> None:
    with pytest.raises(BadHandler, match=told):
        make()
