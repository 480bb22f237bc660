"""Handlers behind parked keys, on both stores: a transaction in its turn, effects that were begun, undos of both."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest_asyncio

from bus.engine.settings import failure_of
from bus.envelope import Failure
from bus.processing import Aside, Item
from eventstore.port import ClaimState, Store
from foldbus import Context, Handler
from foldbus.contexts import EffectContext
from foldbus.handling import HandlerProcessor
from foldbus.parking import ParkSettings
from foldbus.worker import command_processor
from tests.eventstore.stores import NOON
from tests.foldbus.test_handlers import (
    Notify,
    Paid,
    Pay,
    PayBack,
    answers,
    balance,
    connection,
    item,
    kinds,
    pay,
    settle,
    tables,
)

NOW_AND_THEN = ParkSettings(base_s=3600.0, max_s=3600.0, total_s=86_400.0)


@pytest_asyncio.fixture
async def store(store: Store) -> Store:
    """With the table that the handlers write to."""
    async with store.transaction() as tx:
        await tx.sql.run_sync(tables.create_all)
    return store


def parking(store: Store, *handlers: Callable[..., Any] | Handler) -> HandlerProcessor:
    processor = command_processor(connection(store, *(handlers or (pay,))), NOW_AND_THEN)
    assert isinstance(processor, HandlerProcessor)
    return processor


def failure(*, attempts: int = 3, spent_s: float = 1.0) -> Failure:
    return failure_of(
        RuntimeError("no"), attempts=attempts, first_failed_at=NOON, failed_at=NOON + timedelta(seconds=spent_s),
        code_version="",
    )  # fmt: skip


async def head(store: Store, key: str = "a") -> Item:
    parked = await store.parking.seize("shop", key, lease_s=60.0)
    assert parked is not None
    return Item(parked.message.envelope, parked.message.delivery, parked=parked)


async def standing(store: Store, *items: Item) -> list[ClaimState]:
    found = await store.examine("shop", [(one.envelope.id, one.envelope.key) for one in items])
    return [one.state for one in found]


class TestATransaction:
    async def test_of_a_message_in_its_turn_is_committed_with_its_leaving(self, store: Store) -> None:
        shop = parking(store)
        first, second = item(Pay(account="a", cents=5)), item(Pay(account="a", cents=7))
        assert isinstance(await shop.give_up(first, failure()), Aside)
        assert kinds(await shop.process([second], {})) == ["Aside"]
        assert await balance(store) is None
        assert kinds(await shop.process([await head(store)], {})) == ["Done"]
        assert (await balance(store), len(await store.parking.queue("shop", "a"))) == (5, 1)
        assert kinds(await shop.process([await head(store)], {})) == ["Done"]
        assert (await balance(store), await store.parking.keys()) == (12, [])
        assert await answers(store) == [(first.envelope.id, "ok"), (second.envelope.id, "ok")]

    async def test_whose_turn_was_lost_is_taken_back(self, store: Store, twin: Store) -> None:
        shop, other = parking(store), parking(twin)
        await shop.give_up(item(Pay(account="a", cents=5)), failure())
        slow, quick = await head(store), await head(twin)
        assert kinds(await shop.process([slow], {})) == ["Aside"]
        assert await balance(store) is None
        assert kinds(await other.process([quick], {})) == ["Done"]
        assert await balance(store) == 5

    async def test_that_finds_its_key_parked_is_taken_back_and_joins(self, store: Store, twin: Store) -> None:
        """The key was parked by another worker, and this one has not heard of it; nor did the handler ask for SQL."""
        ran: list[int] = []

        async def note(command: Pay, ctx: Context) -> Paid:
            ran.append(command.cents)
            return Paid(account=command.account, cents=command.cents, balance=0)

        plain = parking(store, note)
        await parking(twin).give_up(item(Pay(account="a", cents=13)), failure())
        batch = [item(Pay(account="a", cents=cents)) for cents in (1, 2, 3)]
        assert kinds(await plain.process(batch, {})) == ["Aside"] * 3
        assert len(await store.parking.queue("shop", "a")) == 4
        assert ran == [1]  # the rest was not tried

    async def test_of_a_parked_key_runs_no_statement(self, store: Store, twin: Store) -> None:
        """Its transaction's first one tells that others wait before it: the handler gets no connection."""
        reached: list[int] = []

        async def note(command: Pay, ctx: Context) -> Paid:
            await ctx.sql()
            reached.append(command.cents)
            return Paid(account=command.account, cents=command.cents, balance=0)

        plain = parking(store, note)
        await parking(twin).give_up(item(Pay(account="a", cents=13)), failure())
        assert kinds(await plain.process([item(Pay(account="a", cents=1))], {})) == ["Aside"]
        assert reached == []

    async def test_of_what_stands_behind_a_decider_waits_as_well(self, store: Store) -> None:
        """Commands of deciders and of handlers share the queue of their key."""
        shop = parking(store)
        poison = item(Pay(account="a", cents=13))
        assert kinds(await shop.process([poison], {})) == ["Failed"]
        await shop.give_up(poison, failure())
        batch = [item(Notify(account="a")), item(Pay(account="a", cents=1)), item(Pay(account="b", cents=1))]
        assert kinds(await shop.process(batch, {})) == ["Aside", "Aside", "Done"]
        await shop.give_up(await head(store), failure(spent_s=86_400.0))
        for _ in range(2):
            assert kinds(await shop.process([await head(store)], {})) == ["Done"]
        assert (await balance(store), await balance(store, "b"), await store.parking.keys()) == (1, 1, [])


class TestAnUndo:
    async def test_of_a_parked_step_is_handled_in_its_own_transaction_if_it_may_have_happened(
        self, store: Store
    ) -> None:
        shop = parking(store)
        step = item(Pay(account="a", cents=5))
        await store.effects.begin("shop", step.envelope.id, "a", lease_s=60)
        await shop.give_up(step, failure())
        undo = item(PayBack(account="a", cents=5), undoes=step.envelope.id)
        assert kinds(await shop.process([undo], {})) == ["Done"]
        assert await balance(store) == -5
        assert await standing(store, step, undo) == [ClaimState.CANCELLED, ClaimState.DONE]
        assert await store.parking.keys() == []

    async def test_of_a_parked_step_that_never_began_runs_nothing(self, store: Store) -> None:
        shop = parking(store)
        step = item(Pay(account="a", cents=5))
        await shop.give_up(step, failure())
        undo = item(PayBack(account="a", cents=5), undoes=step.envelope.id)
        await settle(shop, undo)
        assert await balance(store) is None
        assert await standing(store, step, undo) == [ClaimState.CANCELLED, ClaimState.DONE]


class TestAnEffect:
    async def test_in_its_turn_is_begun_on_record_so_that_its_undo_runs(self, store: Store) -> None:
        """A follower that was never tried becomes the head; its call is made, and the worker dies in it."""
        called: list[tuple[str, int, bool]] = []

        class Dies(BaseException): ...

        async def charge(command: Pay | PayBack, ctx: EffectContext) -> Paid:
            called.append((type(command).__name__, command.cents, ctx.started))
            if command.cents == 7 and isinstance(command, Pay):
                raise Dies
            return Paid(account=command.account, cents=command.cents, balance=0)

        shop = parking(store, Handler(charge, effect=True))
        first, second = item(Pay(account="a", cents=5)), item(Pay(account="a", cents=7))
        await shop.give_up(first, failure())
        assert kinds(await shop.process([second], {})) == ["Aside"]
        assert called == []
        assert kinds(await shop.process([await head(store)], {})) == ["Done"]
        with suppress(Dies):
            await shop.process([await head(store)], {})
        undo = item(PayBack(account="a", cents=7), undoes=second.envelope.id)
        await settle(shop, undo)
        assert called == [("Pay", 5, False), ("Pay", 7, False), ("PayBack", 7, False)]
        assert await standing(store, first, second, undo) == [
            ClaimState.DONE,
            ClaimState.CANCELLED,
            ClaimState.DONE,
        ]
