"""What may meet at a parked key, made to meet, on both stores: the drain and who arrives, the undo and its step, two
workers and one turn, a decision here and now."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import timedelta
from random import Random
from typing import Any

import pytest

from bus.engine.settings import failure_of
from bus.envelope import Envelope, Failure, ReplyOutcome, StreamId
from bus.metrics import MemoryMetrics
from bus.processing import Aside, Done, Failed, Item, Result
from bus.seams import NoFailpoints
from eventstore.parking import Parked
from eventstore.port import ClaimState, Store, Unit, Wanted
from foldbus.parking import KeyParked, Parker, ParkSettings, Policy
from tests.eventstore.stores import NOON, append
from tests.foldbus.test_runtime import Release, Reserve, Reserved, codec, item, kinds, processor, replies, settle

NOW_AND_THEN = ParkSettings(base_s=3600.0, max_s=3600.0, total_s=86_400.0)


def parking(
    store: Store, *, policy: Policy = "skip", settings: ParkSettings = NOW_AND_THEN
) -> tuple[Any, MemoryMetrics]:
    """A processor that parks, and what it counts."""
    metrics = MemoryMetrics()
    parker = Parker(
        "shop", store, settings=settings, policy=policy, metrics=metrics, failpoint=NoFailpoints(), rng=Random(1)
    )
    return processor(store, parker=parker, metrics=metrics), metrics


def failure(*, attempts: int = 3, spent_s: float = 1.0) -> Failure:
    return failure_of(
        RuntimeError("no"), attempts=attempts, first_failed_at=NOON, failed_at=NOON + timedelta(seconds=spent_s),
        code_version="",
    )  # fmt: skip


async def head(store: Store, key: str = "cd") -> Item:
    """The head of this key, in its turn."""
    parked = await store.parking.seize("shop", key, lease_s=60.0)
    assert parked is not None
    return turn(parked)


def turn(parked: Parked) -> Item:
    return Item(parked.message.envelope, parked.message.delivery, parked=parked)


async def queue(store: Store, key: str = "cd") -> list[Envelope]:
    return [one.message.envelope for one in await store.parking.queue("shop", key)]


async def reserved(store: Store, key: str = "cd") -> list[int]:
    """What was reserved, in the order of the stream."""
    (part,) = await store.load([Wanted(StreamId("stock", key))])
    found = [codec.decode(record) for record in part.records]
    return [event.n for event in found if isinstance(event, Reserved)]


async def standing(store: Store, *items: Item) -> list[ClaimState]:
    found = await store.examine("shop", [(one.envelope.id, one.envelope.key) for one in items])
    return [one.state for one in found]


def before(
    store: Store, name: str, first: Callable[[], Coroutine[Any, Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Does `first` right before the next call of this verb of the store's parking."""
    verb = getattr(store.parking, name)

    async def slow(*given: Any, **options: Any) -> Any:
        monkeypatch.undo()
        await first()
        return await verb(*given, **options)

    monkeypatch.setattr(store.parking, name, slow)


def _n(one: int) -> Item:
    return item(Reserve(sku="cd", n=one))


class TestAMessageOfAParkedKey:
    async def test_joins_in_order_with_all_that_stands_behind_it(self, store: Store) -> None:
        runtime, metrics = parking(store)
        first, *others = [_n(n) for n in (1, 2, 3, 4)]
        assert isinstance(await runtime.give_up(first, failure()), Aside)
        elsewhere = item(Reserve(sku="ef", n=7))
        assert kinds(await runtime.process([*others, elsewhere], {})) == ["Aside"] * 3 + ["Done"]
        assert [one.id for one in await queue(store)] == [one.envelope.id for one in (first, *others)]
        assert await standing(store, first, *others) == [ClaimState.PARKED] * 4
        assert await reserved(store) == []
        assert metrics.total("foldbus_followed_total") == 3

    async def test_delivered_again_is_where_it_was(self, store: Store, twin: Store) -> None:
        """The worker died between parking and committing its offset."""
        first, second = _n(1), _n(2)
        runtime, _ = parking(store)
        await runtime.give_up(first, failure())
        await runtime.process([second], {})
        again, _ = parking(twin)
        fresh = [Item(one.envelope, None) for one in (first, second, _n(3))]
        assert kinds(await again.process(fresh, {})) == ["Aside"] * 3
        assert [one.id for one in await queue(store)] == [one.envelope.id for one in fresh]

    async def test_is_not_tried_before_it_is_its_turn(self, store: Store) -> None:
        """13 raises when it is decided: behind a parked key it is not, once the key is known to be parked."""
        runtime, metrics = parking(store)
        await runtime.give_up(_n(1), failure())
        results = await runtime.process([_n(13), _n(2)], {})
        assert kinds(results) == ["Aside", "Aside"]
        assert metrics.total("foldbus_followed_total") == 2

    async def test_that_failed_before_the_key_was_looked_at_is_not_tried_again(self, store: Store, twin: Store) -> None:
        runtime, _ = parking(store)
        other, _ = parking(twin)
        await other.give_up(_n(1), failure())
        bad = _n(13)
        assert kinds(await runtime.process([bad], {})) == ["Failed"]
        assert kinds(await runtime.process([bad], {})) == ["Aside"]
        queued = await store.parking.queue("shop", "cd")
        assert [one.failure is None for one in queued] == [False, True]

    async def test_behind_one_that_failed_waits_for_that(self, store: Store, twin: Store) -> None:
        """Both are of a parked key, but only the second is known to be: it may not join before the first."""
        runtime, _ = parking(store)
        other, _ = parking(twin)
        await other.give_up(_n(1), failure())
        bad, behind = _n(13), _n(2)
        behind.examine = True
        assert kinds(await runtime.process([bad, behind], {})) == ["Failed", "Again"]
        assert len(await queue(store)) == 1
        assert kinds(await runtime.process([bad, behind], {})) == ["Aside", "Aside"]
        assert [one.id for one in (await queue(store))[1:]] == [bad.envelope.id, behind.envelope.id]

    async def test_takes_along_what_stands_behind_it_unseen(self, store: Store, twin: Store) -> None:
        """Only the first is known to be of a parked key; one call takes both."""
        runtime, _ = parking(store)
        other, _ = parking(twin)
        await other.give_up(_n(1), failure())
        seen, unseen = _n(2), _n(3)
        seen.examine = True
        assert kinds(await runtime.process([seen, unseen], {})) == ["Aside", "Aside"]
        assert [one.id for one in (await queue(store))[1:]] == [seen.envelope.id, unseen.envelope.id]

    async def test_arriving_as_the_drain_empties_its_key_is_handled_behind_it(
        self, store: Store, twin: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its commit was told PARKED; before it follows, the last one has left: it finds the key free."""
        runtime, _ = parking(store)
        drain, _ = parking(twin)
        await runtime.give_up(_n(1), failure())
        first = await head(twin)

        async def empties() -> None:
            assert kinds(await drain.process([first], {})) == ["Done"]

        before(store, "follow", empties, monkeypatch)
        late = _n(2)
        assert kinds(await runtime.process([late], {})) == ["Again"]
        assert await standing(store, late) == [ClaimState.NEW]
        late.examine = True
        assert kinds(await runtime.process([late], {})) == ["Done"]
        assert await reserved(store) == [1, 2]

    async def test_arriving_before_the_drain_empties_its_key_is_drained_with_it(
        self, store: Store, twin: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It joins while the last one is being handled: the key stays parked, and the new one is due."""
        runtime, _ = parking(store)
        drain, _ = parking(twin)
        await runtime.give_up(_n(1), failure())
        first, late = await head(twin), _n(2)

        async def arrives() -> None:
            assert kinds(await runtime.process([late], {})) == ["Aside"]

        before(twin, "commit", arrives, monkeypatch)
        assert kinds(await drain.process([first], {})) == ["Done"]
        assert [one.id for one in await queue(store)] == [late.envelope.id]
        (due,) = await twin.parking.due(consumers=["shop"], limit=10, lease_s=60)
        assert kinds(await drain.process([turn(due)], {})) == ["Done"]
        assert await reserved(store) == [1, 2]
        assert await store.parking.keys() == []

    async def test_decided_here_and_now_is_refused_and_does_not_join(self, store: Store) -> None:
        runtime, _ = parking(store)
        await runtime.give_up(_n(1), failure())
        now = _n(2)
        (result,) = await processor(store).process([now], {})
        assert isinstance(result, Failed)
        assert isinstance(result.error, KeyParked)
        assert await standing(store, now) == [ClaimState.KEY_PARKED]


class TestATurn:
    async def test_of_two_workers_at_one_head_one_has_an_effect(self, store: Store, twin: Store) -> None:
        """The first one's lease ended while it was at it."""
        one, metrics = parking(store)
        two, _ = parking(twin)
        await one.give_up(_n(1), failure())
        slow, quick = await head(store), await head(twin)
        assert kinds(await one.process([slow], {})) == ["Aside"]
        assert kinds(await two.process([quick], {})) == ["Done"]
        assert kinds(await one.process([slow], {})) == ["Done"]  # looked at once more it is found handled
        assert metrics.total("foldbus_turns_lost_total") == 1
        assert await reserved(store) == [1]

    async def test_that_was_lost_is_not_postponed(self, store: Store, twin: Store) -> None:
        one, metrics = parking(store)
        await one.give_up(_n(13), failure())
        slow, _ = await head(store), await head(twin)
        assert isinstance(await one.give_up(slow, failure(attempts=4)), Aside)
        (key,) = await store.parking.keys()
        assert key.head.failure is not None
        assert key.head.failure.attempts == 3
        assert metrics.total("foldbus_turns_lost_total") == 1

    async def test_that_was_given_anew_here_while_it_failed_is_postponed(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its lease ended a moment before."""
        one, metrics = parking(store)
        await one.give_up(_n(13), failure())
        slow = await head(store)

        async def anew() -> None:
            slow.parked = (await head(store)).parked

        before(store, "postpone", anew, monkeypatch)
        assert isinstance(await one.give_up(slow, failure(attempts=4)), Aside)
        (key,) = await store.parking.keys()
        assert key.head.failure is not None
        assert key.head.failure.attempts == 4
        assert metrics.total("foldbus_turns_lost_total") == 0

    async def test_that_lost_a_race_for_its_stream_is_taken_again(
        self, store: Store, twin: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Somebody appended to the stream meanwhile: decided anew, it keeps its turn."""
        runtime, _ = parking(store)
        await runtime.give_up(_n(4), failure())
        mine = await head(store)

        async def appends() -> None:
            event = codec.encode(Reserved(sku="cd", n=9), runtime._claims.origin(mine.envelope), topic="shop.events")
            await twin.commit([Unit(appends=(append(StreamId("stock", "cd"), 0, event),))])

        before(store, "commit", appends, monkeypatch)
        assert kinds(await runtime.process([mine], {})) == ["Again"]
        assert kinds(await runtime.process([mine], {})) == ["Done"]
        assert (await replies(store))[-1] == (mine.envelope.id, ReplyOutcome.REFUSED)  # 1 was left
        assert await store.parking.keys() == []

    async def test_and_its_followers_of_one_batch_stay_in_order(self, store: Store) -> None:
        runtime, _ = parking(store)
        await runtime.give_up(_n(1), failure())
        batch = [await head(store), _n(2), _n(3)]
        assert isinstance((await runtime.process(batch, {}))[0], Done)
        await settle(runtime, *batch)
        assert await reserved(store) == [1, 2, 3]
        assert await store.parking.keys() == []

    async def test_that_dies_is_a_letter_and_the_next_one_is_due(self, store: Store) -> None:
        runtime, metrics = parking(store)
        await runtime.give_up(_n(13), failure())
        await runtime.process([_n(2)], {})
        dying = await head(store)
        result = await runtime.give_up(dying, failure(attempts=9, spent_s=86_400.0))
        assert (type(result), type(result) is Aside) == (Done, False)
        (letter,) = await store.dead_letters()
        assert (letter.id, letter.failure.attempts) == (dying.envelope.id, 9)
        assert (await replies(store))[-1] == (dying.envelope.id, ReplyOutcome.DIED)
        (due,) = await store.parking.due(consumers=["shop"], limit=10, lease_s=60)
        assert kinds(await runtime.process([turn(due)], {})) == ["Done"]
        assert await reserved(store) == [2]
        assert metrics.total("foldbus_unparked_total", how="given-up") == 1

    async def test_waits_longer_each_time_and_no_longer_than_the_bound(self, store: Store) -> None:
        settings = ParkSettings(base_s=10.0, max_s=100.0, total_s=1000.0)
        runtime, _ = parking(store, settings=settings)
        waits: list[tuple[float, float, float]] = []
        for spent_s in (0.0, 1.0, 30.0, 99.0, 500.0, 999.0):
            key = f"k{spent_s}"
            now = store.timers.now()
            await runtime.give_up(item(Reserve(sku=key)), failure(spent_s=spent_s))
            (due,) = [one.due_at for one in await store.parking.keys() if one.key == key]
            assert due is not None
            full = min(max(10.0, spent_s), 100.0)
            after = store.timers.now()  # between the two it was decided, however long parking itself took
            waits.append(((due - after).total_seconds(), (due - now).total_seconds(), full))
        for least, most, full in waits:
            assert full / 2 <= most + 1e-6
            assert least <= full + 1e-6


class TestAnUndo:
    async def test_of_a_parked_step_passes_the_queue_and_the_step_never_happens(self, store: Store) -> None:
        runtime, metrics = parking(store)
        step, behind = _n(4), _n(2)
        await runtime.give_up(step, failure())
        await runtime.process([behind], {})
        undo = item(Release(sku="cd", n=4), undoes=step.envelope.id)
        assert kinds(await runtime.process([undo], {})) == ["Done"]
        assert await standing(store, step, undo) == [ClaimState.CANCELLED, ClaimState.DONE]
        assert (await replies(store))[-1] == (undo.envelope.id, ReplyOutcome.OK)
        (due,) = await store.parking.due(consumers=["shop"], limit=10, lease_s=60)  # who stood behind it is the head
        assert kinds(await runtime.process([turn(due)], {})) == ["Done"]
        assert await reserved(store) == [2]
        assert metrics.total("foldbus_unparked_total", how="cancelled") == 1

    async def test_of_a_parked_step_that_may_have_happened_is_decided(self, store: Store) -> None:
        """Its handler had begun to call the outside world when it was parked."""
        runtime, _ = parking(store)
        step = _n(4)
        await store.effects.begin("shop", step.envelope.id, "cd", lease_s=60)
        await runtime.give_up(step, failure())
        undo = item(Release(sku="cd", n=4), undoes=step.envelope.id)
        assert kinds(await runtime.process([undo], {})) == ["Done"]
        (part,) = await store.load([Wanted(StreamId("stock", "cd"))])
        assert [record.type for record in part.records] == ["shop.released.v1"]
        assert await standing(store, step, undo) == [ClaimState.CANCELLED, ClaimState.DONE]
        assert await store.parking.keys() == []

    async def test_of_a_dead_step_that_may_have_happened_is_decided(self, store: Store) -> None:
        runtime, _ = parking(store)
        step = _n(4)
        await store.effects.begin("shop", step.envelope.id, "cd", lease_s=60)
        await runtime.give_up(step, failure())
        await runtime.give_up(await head(store), failure(spent_s=86_400.0))
        assert await standing(store, step) == [ClaimState.DEAD]
        undo = item(Release(sku="cd", n=4), undoes=step.envelope.id)
        assert kinds(await runtime.process([undo], {})) == ["Done"]
        (part,) = await store.load([Wanted(StreamId("stock", "cd"))])
        assert [record.type for record in part.records] == ["shop.released.v1"]

    async def test_whose_step_is_handled_in_its_turn_meanwhile_undoes_it(
        self, store: Store, twin: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The step's turn ends between the undo's look and its commit."""
        runtime, _ = parking(store)
        drain, _ = parking(twin)
        step = _n(4)
        await runtime.give_up(step, failure())
        first = await head(twin)

        async def handles() -> None:
            assert kinds(await drain.process([first], {})) == ["Done"]

        before(store, "cancel", handles, monkeypatch)
        undo = item(Release(sku="cd", n=4), undoes=step.envelope.id)
        assert kinds(await runtime.process([undo], {})) == ["Again"]
        assert kinds(await runtime.process([undo], {})) == ["Done"]
        (part,) = await store.load([Wanted(StreamId("stock", "cd"))])
        assert [record.type for record in part.records] == ["shop.reserved.v1", "shop.released.v1"]

    async def test_that_came_first_in_the_turn_keeps_the_step_out(self, store: Store, twin: Store) -> None:
        runtime, _ = parking(store)
        drain, _ = parking(twin)
        step = _n(4)
        await runtime.give_up(step, failure())
        first = await head(twin)
        undo = item(Release(sku="cd", n=4), undoes=step.envelope.id)
        assert kinds(await runtime.process([undo], {})) == ["Done"]
        assert kinds(await drain.process([first], {})) == ["Done"]  # cancelled: dropped
        assert await reserved(store) == []

    async def test_of_another_step_waits_in_the_queue_of_its_key(self, store: Store) -> None:
        """What it undoes is done: it may not overtake what stands before it."""
        runtime, _ = parking(store)
        step, poison = _n(4), _n(13)
        await runtime.process([step], {})
        await runtime.give_up(poison, failure())
        undo = item(Release(sku="cd", n=4), undoes=step.envelope.id)
        assert kinds(await runtime.process([undo], {})) == ["Aside"]
        await runtime.give_up(await head(store), failure(spent_s=86_400.0))
        assert kinds(await runtime.process([await head(store)], {})) == ["Done"]
        (part,) = await store.load([Wanted(StreamId("stock", "cd"))])
        assert [record.type for record in part.records] == ["shop.reserved.v1", "shop.released.v1"]

    async def test_in_the_queue_before_its_own_step_cancels_it(self, store: Store) -> None:
        """The step came late, behind its undo: both wait, and the undo has its turn first."""
        runtime, _ = parking(store)
        step, poison = _n(4), _n(13)
        await runtime.give_up(poison, failure())
        undo = item(Release(sku="cd", n=4), undoes=step.envelope.id)
        assert kinds(await runtime.process([undo], {})) == ["Aside"]
        assert kinds(await runtime.process([step], {})) == ["Aside"]
        await runtime.give_up(await head(store), failure(spent_s=86_400.0))
        assert kinds(await runtime.process([await head(store)], {})) == ["Done"]
        assert await standing(store, step, undo) == [ClaimState.CANCELLED, ClaimState.DONE]
        assert await store.parking.keys() == []
        assert await reserved(store) == []

    async def test_in_one_batch_with_a_step_that_follows_cancels_it(self, store: Store) -> None:
        runtime, _ = parking(store)
        await runtime.give_up(_n(13), failure())
        step, behind = _n(4), _n(2)
        undo = item(Release(sku="cd", n=4), undoes=step.envelope.id)
        batch = [step, undo, behind]
        assert kinds(await runtime.process(batch, {})) == ["Aside", "Again", "Again"]
        for one in batch[1:]:
            one.examine = True
        results: Sequence[Result] = await runtime.process(batch[1:], {})
        assert [isinstance(result, Done) for result in results] == [True, True]
        assert await standing(store, step, undo, behind) == [
            ClaimState.CANCELLED,
            ClaimState.DONE,
            ClaimState.PARKED,
        ]

    async def test_of_a_parked_step_of_another_key_does_not_overtake_its_own(self, store: Store) -> None:
        """It passes the queue that its step waits in, not what stands before it in its batch."""
        runtime, _ = parking(store)
        step = item(Reserve(sku="ef", n=4))
        await runtime.give_up(step, failure())
        before_it, undo = _n(1), item(Release(sku="cd", n=4), undoes=step.envelope.id)
        assert kinds(await runtime.process([before_it, undo], {})) == ["Done", "Again"]
        assert kinds(await runtime.process([undo], {})) == ["Done"]
        assert await standing(store, step, undo) == [ClaimState.CANCELLED, ClaimState.DONE]

    async def test_that_lost_is_not_overtaken_by_what_stands_behind_it(
        self, store: Store, twin: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its step, of another key, was handled in the meantime."""
        runtime, _ = parking(store)
        drain, _ = parking(twin)
        step = item(Reserve(sku="ef", n=4))
        await runtime.give_up(step, failure())
        first = await head(twin, "ef")

        async def handles() -> None:
            assert kinds(await drain.process([first], {})) == ["Done"]

        before(store, "cancel", handles, monkeypatch)
        undo, behind = item(Release(sku="cd", n=4), undoes=step.envelope.id), _n(1)
        assert kinds(await runtime.process([undo, behind], {})) == ["Again", "Again"]
        assert await reserved(store) == []
        await settle(runtime, undo, behind)
        (part,) = await store.load([Wanted(StreamId("stock", "cd"))])
        assert [record.type for record in part.records] == ["shop.released.v1", "shop.reserved.v1"]


class TestHold:
    async def test_holds_at_once_what_cannot_be_read_and_later_what_had_its_time(self, store: Store) -> None:
        runtime, metrics = parking(store, policy="hold")
        unreadable = replace(item(Reserve(sku="ef")), unreadable=True)
        await runtime.give_up(unreadable, failure(attempts=1, spent_s=0.0))
        await runtime.give_up(_n(13), failure())
        due = {one.key: one.due_at for one in await store.parking.keys()}
        assert due["ef"] is None
        assert due["cd"] is not None
        await runtime.give_up(await head(store), failure(attempts=20, spent_s=86_400.0))
        due = {one.key: one.due_at for one in await store.parking.keys()}
        assert due == {"cd": None, "ef": None}
        assert metrics.total("foldbus_held_total") == 2
        assert await store.dead_letters() == []
        assert await store.parking.due(consumers=["shop"], limit=10, lease_s=60) == []
