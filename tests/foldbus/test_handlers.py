"""Handlers with SQL of their own, on both stores: one effect, whole or not at all, in order, whoever else is at it."""

# Without `from __future__ import annotations`: some handlers are made per test.
import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio
from pydantic import BaseModel
from sqlalchemy import Column, Integer, MetaData, String, Table, insert, select, text, update
from sqlalchemy.orm import DeclarativeBase

from bus.envelope import Failure, Kind, Origin, ReplyTo, StreamId
from bus.metrics import MemoryMetrics
from bus.processing import Again, Failed, Item, Processor, Result
from bus.seams import NoFailpoints, SystemClock, Uuid7Ids
from eventstore.errors import StoreUnavailable
from eventstore.port import ClaimState, Store
from eventstore.postgres import PostgresStore
from foldbus import (
    BadAnswer,
    BadHandler,
    BadService,
    Command,
    Connection,
    Context,
    Decider,
    Event,
    Handler,
    Key,
    Message,
    Refused,
    Service,
    ThreadContext,
)
from foldbus.worker import command_processor
from tests.eventstore.stores import NOON, whole_log

ids = Uuid7Ids()
tables = MetaData()
accounts = Table("accounts", tables, Column("id", String, primary_key=True), Column("cents", Integer, nullable=False))


class Paid(Event, type="shop.paid.v1"):
    account: Key[str]
    cents: int
    balance: int


class Pay(Command[Paid], type="shop.pay.v1"):
    account: Key[str]
    cents: int


class PayBack(Command[Paid], type="shop.pay-back.v1"):
    account: Key[str]
    cents: int


class Notified(Event, type="shop.notified.v1"):
    account: Key[str]
    so_far: int


class Notify(Command[Notified], type="shop.notify.v1"):
    account: Key[str]


class TooMuch(Refused, code="shop.too-much"):
    """No."""


class Notes(BaseModel, frozen=True):
    n: int = 0


def evolve(notes: Notes, event: Notified) -> Notes:
    return Notes(n=event.so_far)


def decide(notes: Notes, command: Notify) -> list[Notified]:
    return [Notified(account=command.account, so_far=notes.n + 1)]


notes = Decider("notes", initial=Notes(), evolve=evolve, decide=decide)


async def pay(command: Pay | PayBack, ctx: Context) -> Paid:
    """Adds to the balance, blindly: twice would be seen."""
    sql = await ctx.sql()
    if command.cents > 1000:
        await sql.execute(insert(accounts).values(id=f"{command.account}-rest", cents=0))
        raise TooMuch(cents=command.cents)
    await sql.execute(text("insert into accounts values (:id, 0) on conflict (id) do nothing"), {"id": command.account})
    cents = command.cents if isinstance(command, Pay) else -command.cents
    await sql.execute(update(accounts).where(accounts.c.id == command.account).values(cents=accounts.c.cents + cents))
    balance = (await sql.execute(select(accounts.c.cents).where(accounts.c.id == command.account))).scalar_one()
    if command.cents == 13:
        raise RuntimeError("a bug at thirteen")
    paid = Paid(account=command.account, cents=command.cents, balance=balance)
    ctx.publish(paid)
    ctx.send(Notify(account=command.account))
    return paid


class _Broker:
    """For a connection that publishes nothing itself."""

    max_bytes = 1_000_000


def connection(store: Store, *handlers: Callable[..., Any], failpoint: Any = None) -> Connection:
    service = Service("shop", deciders=[notes], handlers=handlers or (pay,), refusals=[TooMuch])
    broker: Any = _Broker()
    return Connection(
        service, store=store, transport=broker, clock=SystemClock(), ids=ids, metrics=MemoryMetrics(),
        failpoint=failpoint or NoFailpoints(),
    )  # fmt: skip


@pytest_asyncio.fixture
async def store(store: Store) -> Store:
    """With the table that the handlers write to."""
    async with store.transaction() as tx:
        await tx.sql.run_sync(tables.create_all)
    return store


def item(message: Message, *, id: UUID | None = None, undoes: UUID | None = None) -> Item:
    origin = Origin("front", id or ids.new(), NOON, ids.new())
    to = ReplyTo("front.inbox", "front-1", "i-7")
    codec = Service("shop", deciders=[notes], handlers=[pay]).codec
    return Item(codec.encode(message, origin, topic="shop.commands", reply_to=to, undoes=undoes), None)


async def balance(store: Store, account: str = "a") -> int | None:
    async with store.transaction() as tx:
        return (await tx.sql.execute(select(accounts.c.cents).where(accounts.c.id == account))).scalar()


async def answers(store: Store) -> list[tuple[UUID | None, str]]:
    return [(one.causation_id, str(one.outcome)) for one in await whole_log(store) if one.outcome is not None]


def kinds(results: Sequence[Result]) -> list[str]:
    return [type(result).__name__ for result in results]


async def settle(processor: Processor, *items: Item, passes: int = 8) -> None:
    """What the engine does: again, in order, until everything is done."""
    waiting = list(items)
    for _ in range(passes):
        results = await processor.process(waiting, {})
        waiting = [one for one, result in zip(waiting, results, strict=True) if isinstance(result, Again)]
        if not waiting:
            return
    raise AssertionError(f"{len(waiting)} items are not done after {passes} passes")


class TestAHandler:
    async def test_commits_rows_messages_answer_and_claim_together(self, store: Store) -> None:
        one = item(Pay(account="a", cents=5))
        assert kinds(await command_processor(connection(store)).process([one], {("shop.commands", 0): 4})) == ["Done"]
        assert await balance(store) == 5
        logged = await whole_log(store)
        assert [(record.kind, record.type) for record in logged] == [
            (Kind.EVENT, "shop.paid.v1"),
            (Kind.COMMAND, "shop.notify.v1"),
            (Kind.REPLY, "shop.pay.reply.v1"),
        ]
        assert {record.correlation_id for record in logged} == {one.envelope.correlation_id}
        assert {record.causation_id for record in logged} == {one.envelope.id}
        (standing,) = await store.examine("shop", [(one.envelope.id, "a")])
        assert standing.state is ClaimState.DONE
        assert await store.watermarks("shop") == {("shop.commands", 0): 4}

    async def test_has_one_effect_when_its_message_comes_again(self, store: Store) -> None:
        id = ids.new()
        for _ in range(3):
            await settle(command_processor(connection(store)), item(Pay(account="a", cents=5), id=id))
        assert await balance(store) == 5
        assert await answers(store) == [(id, "ok")] * 3, "whoever asks again gets the stored answer"

    async def test_that_fails_leaves_nothing(self, store: Store) -> None:
        processor = command_processor(connection(store))
        one = item(Pay(account="a", cents=13))
        (result,) = await processor.process([one], {})
        assert isinstance(result, Failed)
        assert "thirteen" in str(result.error)
        assert await balance(store) is None
        assert await whole_log(store) == []
        assert (await store.examine("shop", [(one.envelope.id, "a")]))[0].state is ClaimState.NEW

    async def test_that_is_given_up_answers_died_and_does_nothing_later(self, store: Store) -> None:
        processor = command_processor(connection(store))
        one = item(Pay(account="a", cents=5))
        await processor.give_up(one, Failure("RuntimeError", "no", "", 3, NOON, NOON, "1"))
        await settle(processor, item(Pay(account="a", cents=5), id=one.envelope.id))
        assert await balance(store) is None
        assert await answers(store) == [(one.envelope.id, "died")] * 2

    async def test_that_refuses_takes_its_rows_back_and_answers_so_again(self, store: Store) -> None:
        id = ids.new()
        for _ in range(2):
            await settle(command_processor(connection(store)), item(Pay(account="a", cents=2000), id=id))
        assert await balance(store, "a-rest") is None
        assert await answers(store) == [(id, "refused")] * 2

    @pytest.mark.parametrize("refusal", [TooMuch("x" * 2_000_000), TooMuch("half \ud800"), TooMuch(by=NOON)])  # type: ignore[arg-type]
    async def test_whose_refusal_cannot_be_sent_fails_alone(self, store: Store, refusal: Refused) -> None:
        """An error that leaves `process` says nothing about any message: this one would come again for ever."""

        async def refuse(command: Pay, ctx: Context) -> Paid:
            if command.cents == 13:
                raise refusal
            return Paid(account=command.account, cents=1, balance=1)

        processor = command_processor(connection(store, refuse))
        one, other = item(Pay(account="a", cents=13)), item(Pay(account="b", cents=1))
        assert kinds(await processor.process([one, other], {})) == ["Failed", "Done"]
        await processor.give_up(one, Failure("MessageTooLarge", "no", "", 3, NOON, NOON, "1"))
        assert await answers(store) == [(other.envelope.id, "ok"), (one.envelope.id, "died")]

    async def test_without_sql_needs_no_transaction(self, store: Store) -> None:
        async def quiet(command: Pay, ctx: Context) -> Paid:
            ctx.append(notes, Notified(account=command.account, so_far=1), expected=0)
            return Paid(account=command.account, cents=1, balance=1)

        one = item(Pay(account="a", cents=1))
        for _ in range(2):
            await settle(command_processor(connection(store, quiet)), one)
        assert [record.type for record in await whole_log(store, outgoing=False)] == ["shop.notified.v1"]

    async def test_that_appends_at_a_stale_version_leaves_nothing_and_is_tried_again(self, store: Store) -> None:
        seen: list[int] = []

        async def careful(command: Pay, ctx: Context) -> Paid:
            sql = await ctx.sql()
            await sql.execute(insert(accounts).values(id="a", cents=len(seen)))
            ctx.append(notes, Notified(account="a", so_far=9), expected=len(seen))
            seen.append(1)
            return Paid(account="a", cents=1, balance=1)

        await settle(command_processor(connection(store)), item(Notify(account="a")))
        await settle(command_processor(connection(store, careful)), item(Pay(account="a", cents=1)))
        assert (len(seen), await balance(store)) == (2, 1)

    async def test_that_answers_with_something_else_stores_nothing(self, store: Store) -> None:
        async def wrong(command: Pay, ctx: Context) -> Any:
            await (await ctx.sql()).execute(insert(accounts).values(id="a", cents=1))
            return Notified(account="a", so_far=1)

        (result,) = await command_processor(connection(store, wrong)).process([item(Pay(account="a", cents=1))], {})
        assert isinstance(result, Failed)
        assert isinstance(result.error, BadAnswer)
        assert await balance(store) is None

    async def test_that_takes_too_long_fails_and_leaves_nothing(self, store: Store) -> None:
        async def slow(command: Pay, ctx: Context) -> Paid:
            await (await ctx.sql()).execute(insert(accounts).values(id="a", cents=1))
            await asyncio.Event().wait()
            return Paid(account=command.account, cents=1, balance=1)

        processor = command_processor(connection(store, Handler(slow, timeout_s=0.1)))
        (result,) = await processor.process([item(Pay(account="a", cents=1))], {})
        assert isinstance(result, Failed)
        assert isinstance(result.error, TimeoutError)
        assert await balance(store) is None

    async def test_uses_the_orm(self, store: Store) -> None:
        class Base(DeclarativeBase):
            metadata = tables

        class Account(Base):
            __table__ = accounts

        async def with_session(command: Pay, ctx: Context) -> Paid:
            session = await ctx.session()
            session.add(Account(id=command.account, cents=command.cents))
            if command.cents == 13:
                await session.flush()
                raise RuntimeError("a bug at thirteen")
            return Paid(account=command.account, cents=1, balance=1)

        processor = command_processor(connection(store, with_session))
        results = await processor.process([item(Pay(account="a", cents=7)), item(Pay(account="b", cents=13))], {})
        assert kinds(results) == ["Done", "Failed"]
        assert (await balance(store), await balance(store, "b")) == (7, None)

    async def test_ends_with_its_context(self, store: Store) -> None:
        kept: list[Context] = []

        async def leaking(command: Pay, ctx: Context) -> Paid:
            kept.append(ctx)
            return Paid(account=command.account, cents=1, balance=1)

        await settle(command_processor(connection(store, leaking)), item(Pay(account="a", cents=1)))
        with pytest.raises(Exception, match="its context is closed"):
            await kept[0].sql()
        with pytest.raises(Exception, match="its context is closed"):
            kept[0].publish(Paid(account="a", cents=1, balance=1))


class TestABatch:
    async def test_keeps_the_order_of_a_key_among_deciders_and_handlers(self, store: Store) -> None:
        order: list[str] = []

        async def look(command: Pay, ctx: Context) -> Paid:
            (part,) = [s for s in await whole_log(store, outgoing=False) if s.stream == StreamId("notes", "a")][-1:]
            order.append(f"{command.cents} after {part.version}")
            return Paid(account=command.account, cents=1, balance=1)

        batch = [
            item(Notify(account="a")),
            item(Pay(account="a", cents=1)),
            item(Notify(account="b")),
            item(Notify(account="a")),
            item(Pay(account="a", cents=2)),
        ]
        assert kinds(await command_processor(connection(store, look)).process(batch, {})) == ["Done"] * 5
        assert order == ["1 after 1", "2 after 2"]

    async def test_holds_back_what_is_behind_a_failure_and_nobody_else(self, store: Store) -> None:
        processor = command_processor(connection(store))
        batch = [
            item(Pay(account="a", cents=13)),
            item(Pay(account="a", cents=1)),
            item(Notify(account="a")),
            item(Pay(account="b", cents=2)),
            item(Notify(account="c")),
        ]
        assert kinds(await processor.process(batch, {})) == ["Failed", "Again", "Again", "Done", "Done"]
        assert (await balance(store), await balance(store, "b")) == (None, 2)

    async def test_runs_keys_side_by_side(self, store: Store) -> None:
        """Each waits for the other: one after the other would never end. (Without SQL: SQLite has one writer.)"""
        meeting = asyncio.Barrier(2)

        async def meet(command: Pay, ctx: Context) -> Paid:
            async with asyncio.timeout(40):
                await meeting.wait()
            return Paid(account=command.account, cents=1, balance=1)

        batch = [item(Pay(account="a", cents=1)), item(Pay(account="b", cents=1))]
        assert kinds(await command_processor(connection(store, meet)).process(batch, {})) == ["Done"] * 2

    async def test_is_given_again_whole_when_the_store_does_not_answer_for_one(self, store: Store) -> None:
        class Gone(Exception):
            connection_invalidated = True

        broken = [True]

        async def flaky(command: Pay, ctx: Context) -> Paid:
            if command.account == "b" and broken:
                raise Gone
            return await pay(command, ctx)

        processor = command_processor(connection(store, flaky))
        batch = [item(Pay(account="a", cents=1)), item(Pay(account="b", cents=2)), item(Notify(account="c"))]
        with pytest.raises(StoreUnavailable):
            await processor.process(batch, {})
        broken.clear()
        await settle(processor, *batch)
        assert (await balance(store), await balance(store, "b")) == (1, 2)


class TestTwoWorkers:
    async def test_on_one_message_have_one_effect(self, store: Store, twin: Store) -> None:
        """A zombie is inside its handler when the message is given to somebody else, who comes back for what becomes
        of it. (On SQLite it waits for the file.)"""
        inside, go_on, ran = asyncio.Event(), asyncio.Event(), []

        async def slow(command: Pay, ctx: Context) -> Paid:
            await ctx.sql()
            ran.append(1)
            inside.set()
            await go_on.wait()
            return await pay(command, ctx)

        one = item(Pay(account="a", cents=5))
        first = asyncio.create_task(command_processor(connection(store, slow)).process([one], {}))
        await inside.wait()
        successor, again = command_processor(connection(twin, slow)), replace(one)
        second = asyncio.create_task(successor.process([again], {}))
        done, _ = await asyncio.wait({second}, timeout=0.3)
        assert not done or kinds(await second) == ["Again"], "it went on beside the first"
        go_on.set()
        assert kinds(await first) == ["Done"]
        if kinds(await second) == ["Again"]:
            await settle(successor, again)
        assert (len(ran), await balance(store)) == (1, 5)
        assert await answers(store) == [(one.envelope.id, "ok")] * 2

    async def test_a_frozen_one_holds_up_its_message_alone_on_postgres(self, shop_database: str) -> None:
        """Where writers are side by side, nobody waits in a statement for somebody who may never wake."""
        inside, go_on = asyncio.Event(), asyncio.Event()

        async def frozen(command: Pay, ctx: Context) -> Paid:
            await ctx.sql()
            inside.set()
            await go_on.wait()
            return await pay(command, ctx)

        held, behind, other = (item(Pay(account=account, cents=5)) for account in "aab")
        async with (
            PostgresStore.open(shop_database, service="shop") as store,
            PostgresStore.open(shop_database, service="shop") as twin,
        ):
            async with store.transaction() as tx:
                await tx.sql.run_sync(tables.create_all)
            first = asyncio.create_task(command_processor(connection(store, frozen)).process([held], {}))
            await inside.wait()
            successor, again = command_processor(connection(twin)), replace(held)
            async with asyncio.timeout(40):
                assert kinds(await successor.process([again, behind, other], {})) == ["Again", "Again", "Done"]
            assert await balance(twin, "b") == 5
            go_on.set()
            assert kinds(await first) == ["Done"]
            await settle(successor, again, behind)
            assert await balance(twin) == 10

    async def test_cannot_be_fooled_by_a_handler_that_catches_everything(self, store: Store) -> None:
        fooled: list[Exception] = []

        async def catching(command: Pay, ctx: Context) -> Paid:
            try:
                return await pay(command, ctx)
            except Exception as error:
                fooled.append(error)
                return Paid(account=command.account, cents=0, balance=0)

        one = item(Pay(account="a", cents=5))
        for _ in range(2):
            await settle(command_processor(connection(store, catching)), replace(one))
        assert (fooled, await balance(store)) == ([], 5)
        assert [record.type for record in await whole_log(store)].count("shop.paid.v1") == 1


class TestAnUndo:
    async def test_of_a_step_that_was_done_is_handled(self, store: Store) -> None:
        processor = command_processor(connection(store))
        step = item(Pay(account="a", cents=5))
        undo = item(PayBack(account="a", cents=5), undoes=step.envelope.id)
        await settle(processor, step, undo)
        assert await balance(store) == 0

    async def test_of_a_step_that_never_came_does_nothing_and_keeps_it_out(self, store: Store) -> None:
        processor = command_processor(connection(store))
        step = item(Pay(account="a", cents=5))
        undo = item(PayBack(account="a", cents=5), undoes=step.envelope.id)
        await settle(processor, undo)
        await settle(processor, step)
        assert await balance(store) is None
        assert await answers(store) == [(undo.envelope.id, "ok"), (step.envelope.id, "cancelled")]

    async def test_that_overtakes_a_step_in_its_handler_keeps_it_from_committing(
        self, store: Store, twin: Store
    ) -> None:
        inside, go_on = asyncio.Event(), asyncio.Event()

        async def slow(command: Pay, ctx: Context) -> Paid:
            inside.set()
            await go_on.wait()
            return await pay(command, ctx)

        step = item(Pay(account="a", cents=5))
        first = asyncio.create_task(command_processor(connection(store, slow)).process([step], {}))
        await inside.wait()
        undo = item(PayBack(account="a", cents=5), undoes=step.envelope.id)
        await settle(command_processor(connection(twin)), undo)
        go_on.set()
        assert kinds(await first) == ["Done"]
        assert await balance(store) is None
        assert await answers(store) == [(undo.envelope.id, "ok"), (step.envelope.id, "cancelled")]


class TestInAThread:
    async def test_a_handler_may_block_and_do_all_that_others_do(self, store: Store) -> None:
        loop_thread, went_on = threading.get_ident(), threading.Event()

        def blocking(command: Pay, ctx: ThreadContext) -> Paid:
            assert threading.get_ident() != loop_thread
            assert went_on.wait(40), "the event loop stands still"
            ctx.execute(insert(accounts).values(id=command.account, cents=command.cents))
            cents = ctx.execute(select(accounts.c.cents)).scalar_one()
            ctx.append(notes, Notified(account=command.account, so_far=1), expected=0)
            ctx.send(Notify(account=command.account))
            paid = Paid(account=command.account, cents=command.cents, balance=cents)
            ctx.publish(paid)
            if command.cents == 13:
                raise RuntimeError("a bug at thirteen")
            return paid

        processor = command_processor(connection(store, blocking))
        running = asyncio.create_task(processor.process([item(Pay(account="a", cents=5))], {}))
        await asyncio.sleep(0)
        went_on.set()
        assert kinds(await running) == ["Done"]
        assert await balance(store) == 5
        assert [record.type for record in await whole_log(store)] == [
            "shop.notified.v1", "shop.notify.v1", "shop.paid.v1", "shop.pay.reply.v1",
        ]  # fmt: skip
        (result,) = await processor.process([item(Pay(account="b", cents=13))], {})
        assert isinstance(result, Failed)
        assert await balance(store, "b") is None

    async def test_a_handler_that_is_cut_short_writes_nothing_more(self, store: Store) -> None:
        inside, go_on, over, told = threading.Event(), threading.Event(), threading.Event(), list[BaseException]()

        def blocking(command: Pay, ctx: ThreadContext) -> Paid:
            ctx.execute(insert(accounts).values(id=command.account, cents=command.cents))
            inside.set()
            go_on.wait(40)
            try:
                ctx.execute(insert(accounts).values(id="later", cents=1))
            except BaseException as error:
                told.append(error)
                raise
            finally:
                over.set()
            return Paid(account=command.account, cents=1, balance=1)

        processor = command_processor(connection(store, blocking))
        running = asyncio.create_task(processor.process([item(Pay(account="a", cents=5))], {}))
        assert await asyncio.to_thread(inside.wait, 40)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        go_on.set()
        assert await asyncio.to_thread(over.wait, 40)
        assert "its context is closed" in str(told[0])
        assert (await balance(store), await balance(store, "later")) == (None, None)


class Kill(BaseException):
    pass


class TestADeath:
    @pytest.mark.parametrize(("place", "effect"), [("before-commit", None), ("after-commit", 5)])
    async def test_around_the_commit_leaves_all_or_nothing(self, store: Store, place: str, effect: int | None) -> None:
        class At:
            def hit(self, name: str) -> None:
                if name == place:
                    raise Kill

        one = item(Pay(account="a", cents=5))
        with pytest.raises(Kill):
            await command_processor(connection(store, pay, failpoint=At())).process([one], {})
        assert await balance(store) == effect
        await settle(command_processor(connection(store)), one)
        assert await balance(store) == 5


async def _no_annotation(command, ctx):  # type: ignore[no-untyped-def]
    ...


async def _mixed(message: Pay | Paid, ctx: Context) -> Paid: ...  # type: ignore[empty-body]


async def _cannot_answer(command: Pay, ctx: Context) -> None: ...


async def _one_parameter(command: Pay) -> Paid: ...  # type: ignore[empty-body]


async def _foreign(command: "Elsewhere", ctx: Context) -> None: ...


class Elsewhere(Command[None], type="elsewhere.do.v1"):
    id: Key[str]


class TestStartUp:
    @pytest.mark.parametrize(
        ("function", "told"),
        [
            (_no_annotation, "does not say which Messages it takes"),
            (_mixed, "takes Pay, Paid; wanted commands only, or events only"),
            (_cannot_answer, "cannot answer Pay: wanted Paid"),
            (_one_parameter, "wants two parameters"),
            (lambda command, ctx: None, "handler"),
        ],
    )
    def test_refuses_a_handler_that_could_only_fail_later(self, function: Any, told: str) -> None:
        with pytest.raises(BadHandler, match=told):
            Service("shop", handlers=[function])

    def test_refuses_two_who_take_one_command(self) -> None:
        with pytest.raises(BadService, match=r"shop\.pay\.v1"):
            Service("shop", handlers=[pay, Handler(pay, name="again")])

    def test_refuses_a_handler_of_anothers_commands(self) -> None:
        with pytest.raises(BadService, match="commands of 'elsewhere' arrive"):
            Service("shop", handlers=[_foreign])
