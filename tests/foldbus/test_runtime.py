"""The handler runtime on both stores: batches, claims, conflicts, and every race of a step against its undo."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from pydantic import BaseModel

from bus.codec import JsonCodec
from bus.envelope import Failure, Origin, ReplyOutcome, ReplyTo, StreamId
from bus.messages import Command, Event, Key, Message, Refused
from bus.metrics import MemoryMetrics
from bus.processing import Again, Done, Failed, Item, Result
from bus.registry import Registry
from bus.seams import NoFailpoints, SystemClock, Uuid7Ids
from eventstore.decider import Decider, DeciderBehaviour
from eventstore.port import ClaimState, Outcome, Store, Unit, Wanted
from foldbus.runtime import UnitProcessor, any_of
from tests.eventstore.stores import NOON, whole_log


class Reserved(Event, type="shop.reserved.v1"):
    sku: Key[str]
    n: int


class Released(Event, type="shop.released.v1"):
    sku: Key[str]
    n: int


class Reserve(Command[Reserved], type="shop.reserve.v1"):
    sku: Key[str]
    n: int = 1


class Release(Command[Released], type="shop.release.v1"):
    sku: Key[str]
    n: int = 1


class SoldOut(Refused, code="shop.sold-out"):
    """Fewer are left than wanted."""


class Stock(BaseModel, frozen=True):
    left: int = 10


def evolve(stock: Stock, event: Reserved | Released) -> Stock:
    return Stock(left=stock.left - event.n) if isinstance(event, Reserved) else Stock(left=stock.left + event.n)


def decide(stock: Stock, command: Reserve | Release) -> list[Reserved | Released]:
    match command:
        case Reserve(n=n) if n == 13:
            raise RuntimeError("a bug at thirteen")
        case Reserve(n=n):
            if n > stock.left:
                raise SoldOut(left=stock.left)
            return [Reserved(sku=command.sku, n=n)]
        case Release(n=n):
            return [Released(sku=command.sku, n=n)]


stock = Decider("stock", initial=Stock(), evolve=evolve, decide=decide)
codec = JsonCodec(Registry([Reserved, Released, Reserve, Release], [SoldOut]))
ids = Uuid7Ids()


def processor(store: Store, **changes: Any) -> UnitProcessor:
    options: dict[str, Any] = {
        "group": "shop",
        "consumer": "shop",
        "service": "shop",
        "behaviour": DeciderBehaviour([stock], service="shop", codec=codec, ids=ids, clock=SystemClock()),
        "wants": any_of(["shop.reserve.v1", "shop.release.v1"]),
        "ids": ids,
        "clock": SystemClock(),
        "metrics": MemoryMetrics(),
        "failpoint": NoFailpoints(),
        "max_bytes": 1_000_000,
    }
    return UnitProcessor(store=store, **(options | changes))


def item(message: Message, *, id: UUID | None = None, undoes: UUID | None = None) -> Item:
    origin = Origin("front", id or ids.new(), NOON, ids.new())
    to = ReplyTo("front.inbox", "front-1", "i-7")
    return Item(codec.encode(message, origin, topic="shop.commands", reply_to=to, undoes=undoes), None)


async def left(store: Store, sku: str = "cd") -> int:
    (part,) = await store.load([Wanted(StreamId("stock", sku))])
    state = Stock()
    for record in part.records:
        event = codec.decode(record)
        assert isinstance(event, Reserved | Released)
        state = evolve(state, event)
    return state.left


async def replies(store: Store) -> list[tuple[UUID | None, ReplyOutcome | None]]:
    return [(one.causation_id, one.outcome) for one in await whole_log(store) if one.outcome is not None]


async def settle(runtime: UnitProcessor, *items: Item, passes: int = 5) -> None:
    """What the engine does: again, in order, until everything is done."""
    waiting = list(items)
    for _ in range(passes):
        results = await runtime.process(waiting, {})
        waiting = [one for one, result in zip(waiting, results, strict=True) if isinstance(result, Again)]
        if not waiting:
            return
    raise AssertionError(f"{len(waiting)} items are not done after {passes} passes")


def kinds(results: Sequence[Result]) -> list[str]:
    return [type(result).__name__ for result in results]


class TestABatch:
    async def test_of_one_hot_key_is_decided_in_order_on_the_state_each_leaves(self, store: Store) -> None:
        batch = [item(Reserve(sku="cd", n=4)), item(Reserve(sku="cd", n=4)), item(Reserve(sku="cd", n=4))]
        assert kinds(await processor(store).process(batch, {})) == ["Done"] * 3
        assert await left(store) == 2
        assert [outcome for _, outcome in await replies(store)] == [
            ReplyOutcome.OK,
            ReplyOutcome.OK,
            ReplyOutcome.REFUSED,
        ]

    async def test_delivered_twice_has_one_effect_and_the_same_answer_again(self, store: Store, twin: Store) -> None:
        batch = [item(Reserve(sku="cd", n=4)), item(Reserve(sku="cd", n=4))]
        await settle(processor(store), *batch)
        before = await replies(store)
        await settle(processor(twin), *batch)  # another worker, which knows nothing yet
        assert await left(store) == 2
        assert await replies(store) == before * 2

    async def test_with_a_duplicate_in_the_middle_of_a_chain_handles_the_rest_once(self, store: Store) -> None:
        runtime = processor(store)
        first, second, third = (item(Reserve(sku="cd", n=n)) for n in (1, 2, 3))
        await settle(runtime, second)
        await settle(processor(store), first, second, third)
        assert await left(store) == 4

    async def test_in_which_one_fails_holds_up_its_key_and_nobody_else(self, store: Store) -> None:
        batch = [
            item(Reserve(sku="cd", n=1)),
            item(Reserve(sku="cd", n=13)),
            item(Reserve(sku="lp", n=1)),
            item(Reserve(sku="cd", n=2)),
        ]
        results = await processor(store).process(batch, {})
        assert kinds(results) == ["Done", "Failed", "Done", "Again"]
        assert (await left(store), await left(store, "lp")) == (9, 9)

    async def test_after_a_lost_race_reloads_and_decides_again(self, store: Store, twin: Store) -> None:
        mine, theirs = processor(store), processor(twin)
        await settle(mine, item(Reserve(sku="cd", n=1)))  # now cached
        await settle(theirs, item(Reserve(sku="cd", n=9)))
        late = item(Reserve(sku="cd", n=1))
        assert kinds(await mine.process([late], {})) == ["Again"]
        assert late.examine
        await settle(mine, late)
        assert await left(store) == 0
        assert (await replies(store))[-1] == (late.envelope.id, ReplyOutcome.REFUSED)

    async def test_refused_asserts_the_version_it_was_decided_at(self, store: Store, twin: Store) -> None:
        """A stale cache may cost a retry, never a wrong final answer."""
        mine, theirs = processor(store), processor(twin)
        await settle(mine, item(Reserve(sku="cd", n=10)))
        await settle(theirs, item(Release(sku="cd", n=10)))
        again = item(Reserve(sku="cd", n=5))
        await settle(mine, again)
        assert (await replies(store))[-1] == (again.envelope.id, ReplyOutcome.OK)

    async def test_that_cannot_be_folded_fails_for_its_stream_alone(self, store: Store) -> None:
        await settle(processor(store), item(Reserve(sku="cd")))
        blind = JsonCodec(Registry([Reserve, Release]))
        runtime = processor(
            store,
            behaviour=DeciderBehaviour([stock], service="shop", codec=blind, ids=ids, clock=SystemClock()),
        )
        results = await runtime.process([item(Reserve(sku="cd")), item(Reserve(sku="lp"))], {})
        assert kinds(results) == ["Failed", "Done"]

    async def test_over_the_size_limit_fails_before_anything_is_committed(self, store: Store) -> None:
        runtime = processor(store, max_bytes=4000)
        (result,) = await runtime.process([item(Reserve(sku="cd"))], {})
        assert isinstance(result, Failed)
        assert "nothing was staged" in str(result.error)
        assert await store.head() == 0


class Counted:
    """A store that counts the streams it is asked to load."""

    def __init__(self, store: Any) -> None:
        self.store, self.loaded = store, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    async def load(self, wanted: Sequence[Wanted]) -> Any:
        self.loaded += len(wanted)
        return await self.store.load(wanted)


class Ending(DeciderBehaviour):
    """Every decision is its stream's last."""

    def decide(self, state: Any, envelope: Any) -> Any:
        return replace(super().decide(state, envelope), forget=True)


class TestTheCache:
    async def test_keeps_what_won_so_that_the_next_batch_loads_nothing(self, store: Store) -> None:
        counted: Any = Counted(store)
        runtime = processor(counted)
        for _ in range(3):
            await settle(runtime, item(Reserve(sku="cd")))
        assert counted.loaded == 1

    async def test_does_not_keep_streams_that_have_ended(self, store: Store) -> None:
        counted: Any = Counted(store)
        ending = Ending([stock], service="shop", codec=codec, ids=ids, clock=SystemClock())
        runtime = processor(counted, behaviour=ending)
        for _ in range(3):
            await settle(runtime, item(Reserve(sku="cd")))
        assert counted.loaded == 3
        assert await left(store) == 7


class TestWatermarks:
    async def test_are_stored_with_the_batch(self, store: Store) -> None:
        runtime = processor(store)
        await runtime.process([item(Reserve(sku="cd"))], {("shop.commands", 3): 17})
        assert await runtime.stored_watermarks() == {("shop.commands", 3): 17}
        await runtime.store_watermarks({("shop.commands", 3): 20})
        await runtime.store_watermarks({("shop.commands", 3): 18})
        assert await runtime.stored_watermarks() == {("shop.commands", 3): 20}


@dataclass
class Held:
    """A store whose commits wait until they are let go: forces which of two processes commits first."""

    store: Any
    gate: asyncio.Event
    reached: asyncio.Event

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    async def commit(self, units: Sequence[Unit], **options: Any) -> Sequence[Outcome]:
        self.reached.set()
        await self.gate.wait()
        outcomes: Sequence[Outcome] = await self.store.commit(units, **options)
        return outcomes


def held(store: Store) -> Any:
    return Held(store, asyncio.Event(), asyncio.Event())


class TestAStepAgainstItsUndo:
    """DESIGN §6: absent, in flight, done, refused, dead; each in both orders."""

    async def test_undo_after_a_done_step_undoes_it(self, store: Store) -> None:
        runtime, step = processor(store), item(Reserve(sku="cd", n=4))
        undo = item(Release(sku="cd", n=4), undoes=step.envelope.id)
        await settle(runtime, step)
        await settle(runtime, undo)
        assert await left(store) == 10
        assert len(await whole_log(store, outgoing=False)) == 2

    async def test_undo_in_the_same_batch_as_its_step_undoes_it(self, store: Store) -> None:
        step = item(Reserve(sku="cd", n=4))
        undo = item(Release(sku="cd", n=4), undoes=step.envelope.id)
        await settle(processor(store), step, undo)
        assert await left(store) == 10
        assert len(await whole_log(store, outgoing=False)) == 2

    async def test_undo_before_its_step_does_nothing_and_the_step_is_dropped(self, store: Store, twin: Store) -> None:
        step = item(Reserve(sku="cd", n=4))
        undo = item(Release(sku="cd", n=4), undoes=step.envelope.id)
        await settle(processor(store), undo)
        await settle(processor(twin), step)
        assert await whole_log(store, outgoing=False) == []
        assert await replies(store) == [
            (undo.envelope.id, ReplyOutcome.OK),
            (step.envelope.id, ReplyOutcome.CANCELLED),
        ]

    async def test_undo_of_a_refused_step_does_nothing(self, store: Store) -> None:
        runtime, step = processor(store), item(Reserve(sku="cd", n=11))
        await settle(runtime, step)
        await settle(runtime, item(Release(sku="cd", n=11), undoes=step.envelope.id))
        assert await whole_log(store, outgoing=False) == []
        (standing,) = await store.examine("shop", [(step.envelope.id, "cd")])
        assert standing.state is ClaimState.DONE  # its answer stays

    async def test_undo_of_a_dead_step_does_nothing_and_cancels_it(self, store: Store) -> None:
        runtime, step = processor(store), item(Reserve(sku="cd", n=13))
        assert await runtime.give_up(step, Failure("RuntimeError", "bug", "", 5, NOON, NOON)) == Done()
        await settle(runtime, item(Release(sku="cd", n=13), undoes=step.envelope.id))
        assert await left(store) == 10
        (standing,) = await store.examine("shop", [(step.envelope.id, "cd")])
        assert standing.state is ClaimState.CANCELLED

    async def test_step_in_flight_wins_over_an_undo_that_looked_before_it_committed(
        self, store: Store, twin: Store
    ) -> None:
        """The undo saw no step; the step commits; the undo's commit is told and undoes it after all."""
        step = item(Reserve(sku="cd", n=4))
        undo = item(Release(sku="cd", n=4), undoes=step.envelope.id)
        slow = held(twin)
        undoing = asyncio.create_task(settle(processor(slow), undo))
        await slow.reached.wait()
        await settle(processor(store), step)
        slow.gate.set()
        await undoing
        assert await left(store) == 10
        assert len(await whole_log(store, outgoing=False)) == 2

    async def test_undo_wins_over_a_step_in_flight_that_commits_after_it(self, store: Store, twin: Store) -> None:
        step = item(Reserve(sku="cd", n=4))
        undo = item(Release(sku="cd", n=4), undoes=step.envelope.id)
        slow = held(twin)
        stepping = asyncio.create_task(settle(processor(slow), step))
        await slow.reached.wait()
        await settle(processor(store), undo)
        slow.gate.set()
        await stepping
        assert await whole_log(store, outgoing=False) == []
        assert (step.envelope.id, ReplyOutcome.CANCELLED) in await replies(store)

    async def test_step_given_up_while_its_undo_is_under_way_is_cancelled(self, store: Store, twin: Store) -> None:
        step = item(Reserve(sku="cd", n=13))
        undo = item(Release(sku="cd", n=13), undoes=step.envelope.id)
        slow = held(twin)
        undoing = asyncio.create_task(settle(processor(slow), undo))
        await slow.reached.wait()
        await processor(store).give_up(step, Failure("RuntimeError", "bug", "", 5, NOON, NOON))
        slow.gate.set()
        await undoing
        assert await whole_log(store, outgoing=False) == []
        (standing,) = await store.examine("shop", [(step.envelope.id, "cd")])
        assert standing.state is ClaimState.CANCELLED

    async def test_undo_delivered_twice_undoes_once(self, store: Store) -> None:
        step = item(Reserve(sku="cd", n=4))
        undo = item(Release(sku="cd", n=4), undoes=step.envelope.id)
        await settle(processor(store), step)
        await settle(processor(store), undo)
        await settle(processor(store), undo)
        assert await left(store) == 10


class TestGivingUp:
    async def test_writes_a_dead_letter_answers_died_and_copies_to_the_dlq(self, store: Store) -> None:
        runtime, bad = processor(store), item(Reserve(sku="cd", n=13))
        assert await runtime.give_up(bad, Failure("RuntimeError", "bug", "stack", 5, NOON, NOON)) == Done()
        (letter,) = await store.dead_letters()
        assert (letter.id, letter.value, letter.failure.attempts) == (bad.envelope.id, bad.envelope.data, 5)
        sent = {one.topic: one for one in await whole_log(store)}
        assert sent["front.inbox"].outcome is ReplyOutcome.DIED
        assert sent["shop.dlq"].data == bad.envelope.data
        assert sent["shop.dlq"].headers["x-dlq-error"] == "RuntimeError"

    async def test_of_what_another_worker_has_done_meanwhile_changes_nothing(self, store: Store, twin: Store) -> None:
        step = item(Reserve(sku="cd", n=1))
        await settle(processor(twin), step)
        await processor(store).give_up(step, Failure("RuntimeError", "bug", "", 5, NOON, NOON))
        assert await store.dead_letters() == []
        assert await left(store) == 9

    async def test_again_of_what_is_dead_already_answers_died_again(self, store: Store, twin: Store) -> None:
        """Asked again under its id: first the handler fails again, or it cannot even be read."""
        bad = item(Reserve(sku="cd", n=13))
        await processor(store).give_up(bad, Failure("RuntimeError", "bug", "stack", 5, NOON, NOON))
        runtime = processor(twin)
        assert kinds(await runtime.process([bad], {})) == ["Failed"]
        assert kinds(await runtime.process([bad], {})) == ["Done"]
        assert await runtime.give_up(bad, Failure("RuntimeError", "bug", "stack", 5, NOON, NOON)) == Done()
        assert await replies(store) == [(bad.envelope.id, ReplyOutcome.DIED)] * 3
        assert len(await store.dead_letters()) == 1
