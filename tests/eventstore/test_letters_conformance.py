"""Dead letters on every store: choosing them, settling them, and the races of a redrive."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from bus.envelope import ReplyOutcome
from eventstore.errors import BadUnit
from eventstore.port import (
    CancelTimer,
    ClaimState,
    DeadLetter,
    Fence,
    Letter,
    LetterWhere,
    Settled,
    Settlement,
    Settling,
    Store,
    Timer,
    Unit,
)
from tests.eventstore.stores import (
    CONSUMER,
    IDS,
    NOON,
    Backend,
    append,
    claim,
    commit,
    dead_letter,
    failure,
    message,
    reply,
    undo,
    whole_log,
)

REDRIVEN = Settlement(Settled.REDRIVEN, NOON, by="ann")
DISCARDED = Settlement(Settled.DISCARDED, NOON, by="ann", reason="a test order")


async def died(store: Store, id: UUID | None = None, **changes: Any) -> DeadLetter:
    """A message of the consumer's, dead, with the answer that it died."""
    letter = replace(dead_letter(id), **changes)
    answer = reply(letter.id, outcome=ReplyOutcome.DIED, topic=None)
    dead = claim(letter.id, state=ClaimState.DEAD, consumer=letter.consumer, reply=answer)
    assert await commit(store, Unit(dead, dead_letter=letter)) == ["ok"]
    return letter


def again(letter: DeadLetter) -> Unit:
    """What handles it after all."""
    envelope = replace(message(), id=letter.id)
    return Unit(timers=(Timer(letter.consumer, letter.id, "o-1", letter.failure.failed_at, envelope),))


async def standing(store: Store, letter: DeadLetter) -> ClaimState:
    (found,) = await store.examine(letter.consumer, [(letter.id, "o-1")])
    return found.state


async def open_ids(store: Store, **where: Any) -> list[UUID]:
    return [one.letter.id for one in await store.letters.page(LetterWhere(**where))]


async def settled(store: Store, **where: Any) -> list[tuple[UUID, Settled]]:
    page = await store.letters.page(LetterWhere(**where), settled=True)
    return [(one.letter.id, one.settled.how) for one in page if one.settled is not None]


class TestChoosing:
    async def test_everything_of_a_letter_is_kept_open_and_settled(self, store: Store) -> None:
        letter = await died(store)
        assert list(await store.letters.page(LetterWhere())) == [Letter(letter)]
        assert await store.letters.settle(letter, DISCARDED) is Settling.SETTLED
        assert await store.letters.page(LetterWhere()) == []
        (kept,) = await store.letters.page(LetterWhere(), settled=True)
        assert (kept.letter, kept.settled) == (letter, DISCARDED)
        assert kept.number > 0

    async def test_each_filter_takes_its_own_and_together_they_all_must_hold(self, store: Store) -> None:
        late = NOON + timedelta(seconds=1)
        first = await died(store, UUID(int=0xAB << 120 | 1))
        second = await died(
            store,
            UUID(int=0xCD << 120 | 2),
            consumer="shop.handler.mail",
            topic="bank.events",
            key="ü".encode(),
            type="bank.paid.v2",
            failure=replace(failure(at=late), error="Undecodable"),
        )
        one, two = [first.id], [second.id]
        assert await open_ids(store) == one + two
        for where, wanted in (
            ({"consumer": CONSUMER}, one),
            ({"consumer": "shop"}, []),
            ({"topic": "bank.events"}, two),
            ({"key": "ü"}, two),
            ({"type": "bank.paid.v2"}, two),
            ({"type": "bank.*"}, two),
            ({"type": "bank"}, []),
            ({"error": "ValueError"}, one),
            ({"error": "Und*"}, two),
            ({"since": late}, two),
            ({"until": late}, one),
            ({"ids": frozenset(two)}, two),
            ({"ids": frozenset[UUID]()}, []),
            ({"prefix": "ab000000-0"}, one),
            ({"prefix": "CD"}, two),
            ({"prefix": "ac"}, []),
            ({"type": "bank.*", "error": "ValueError"}, []),
            ({"consumer": CONSUMER, "until": late, "prefix": "ab"}, one),
        ):
            assert await open_ids(store, **where) == wanted, where
            assert await settled(store, **where) == []

    async def test_pages_follow_one_another_without_gap_or_repetition_also_of_one_instant(self, store: Store) -> None:
        """Of 130 letters every third fits: more than are read together."""
        letters: list[DeadLetter] = []
        for n in range(130):
            id = UUID(int=n // 2 + 1)
            consumer = "shop.handler.a" if n % 2 else "shop.handler.b"
            letters.append(
                replace(dead_letter(id, consumer=consumer), type="a.b.v1" if n % 3 == 0 else "c.d.v1", offset=n)
            )
        await commit(store, *(Unit(dead_letter=letter) for letter in letters))

        async def walk(*, settled: bool) -> list[Letter]:
            found: list[Letter] = []
            while page := await store.letters.page(
                LetterWhere(type="a.b.v1"), settled=settled, after=found[-1] if found else None, limit=7
            ):
                assert len(page) <= 7
                found += page
            return found

        wanted = sorted((one for one in letters if one.type == "a.b.v1"), key=lambda one: (one.id, one.consumer))
        assert [one.letter for one in await walk(settled=False)] == wanted
        for letter in reversed(letters):
            assert await store.letters.settle(letter, DISCARDED) is Settling.SETTLED
        assert [one.letter for one in await walk(settled=True)] == [
            one for one in reversed(letters) if one.type == "a.b.v1"
        ]
        assert await walk(settled=False) == []

    @pytest.mark.parametrize(
        ("where", "limit"),
        [
            (LetterWhere(prefix="xyz"), 1),
            (LetterWhere(prefix=""), 1),
            (LetterWhere(prefix="0" * 33), 1),
            (LetterWhere(), 0),
            (LetterWhere(since=NOON.replace(tzinfo=None)), 1),
            (LetterWhere(ids=frozenset(IDS.new() for _ in range(501))), 1),
        ],
    )
    async def test_what_cannot_be_asked_is_refused(self, store: Store, where: LetterWhere, limit: int) -> None:
        with pytest.raises(ValueError, match=r"id|limit|time zone"):
            await store.letters.page(where, limit=limit)


class TestRedriving:
    async def test_gives_the_claim_and_its_answer_back_and_stages_the_message(self, store: Store) -> None:
        letter = await died(store)
        outgoing = message()
        unit = replace(again(letter), outgoing=(outgoing,))
        assert await store.letters.settle(letter, REDRIVEN, unit=unit) is Settling.SETTLED
        assert (await store.examine(CONSUMER, [(letter.id, "o-1")]))[0].reply is None
        assert await standing(store, letter) is ClaimState.NEW
        (timer,) = await store.timers.due(limit=10)
        assert (timer.consumer, timer.id, timer.envelope.id) == (CONSUMER, letter.id, letter.id)
        assert [one.id for one in await whole_log(store)] == [outgoing.id]
        assert await settled(store) == [(letter.id, Settled.REDRIVEN)]
        # Now it can be handled, once, with an answer of its own.
        answer = reply(letter.id, topic=None)
        taken = Unit(claim(letter.id, reply=answer), (append("o-1", 0),), timers=(CancelTimer(CONSUMER, letter.id),))
        assert await commit(store, taken, taken) == ["ok", "duplicate"]
        (found,) = await store.examine(CONSUMER, [(letter.id, "o-1")])
        assert (found.state, found.reply and found.reply.outcome) == (ClaimState.DONE, ReplyOutcome.OK)

    async def test_wakes_whoever_waits_for_the_log(self, store: Store) -> None:
        letter = await died(store)
        head = await store.head()
        waiting = asyncio.create_task(store.wait_past(head, timeout_s=60))
        await asyncio.sleep(0)
        await store.letters.settle(letter, REDRIVEN, unit=Unit(outgoing=(message(),)))
        await asyncio.wait_for(waiting, 20)
        assert await store.head() > head

    async def test_of_what_dies_again_is_an_open_letter_again_with_its_history(self, store: Store) -> None:
        letter = await died(store)
        await store.letters.settle(letter, REDRIVEN, unit=again(letter))
        second = await died(store, letter.id, failure=failure(at=NOON + timedelta(hours=1)))
        assert [one.letter for one in await store.letters.page(LetterWhere())] == [second]
        assert await store.letters.settle(letter, REDRIVEN, unit=again(letter)) is Settling.GONE  # seen before that
        assert await standing(store, letter) is ClaimState.DEAD
        await store.letters.settle(second, DISCARDED)
        history = await store.letters.page(LetterWhere(ids=frozenset([letter.id])), settled=True)
        assert [one.letter for one in history] == [letter, second]

    async def test_of_a_message_whose_undo_came_first_is_refused_and_it_stays_cancelled(self, store: Store) -> None:
        letter = await died(store)
        assert await commit(store, Unit(undo(letter.id, Fence.CANCEL))) == ["ok"]
        assert await store.letters.settle(letter, REDRIVEN, unit=again(letter)) is Settling.CANCELLED
        assert await standing(store, letter) is ClaimState.CANCELLED
        assert await store.timers.due(limit=10) == []
        assert await open_ids(store) == []
        assert await settled(store) == []

    async def test_before_its_undo_still_lets_the_undo_keep_it_out(self, store: Store) -> None:
        letter = await died(store)
        assert await store.letters.settle(letter, REDRIVEN, unit=again(letter)) is Settling.SETTLED
        assert await commit(store, Unit(undo(letter.id, Fence.CANCEL))) == ["ok"]
        assert await commit(store, Unit(claim(letter.id), (append("o-1", 0),))) == ["cancelled"]

    @pytest.mark.parametrize("undo_first", [True, False])
    async def test_and_its_undo_at_once_end_in_one_of_both_orders(
        self, store: Store, twin: Store, undo_first: bool
    ) -> None:
        """One is in the middle of its transaction when the other begins: it must wait, and see what came of it."""
        letter = await died(store)
        undoing = Unit(undo(letter.id, Fence.CANCEL))
        if undo_first:
            async with store.transaction() as tx:
                (outcome,) = await store.commit([undoing], tx=tx)
                redriving = asyncio.create_task(twin.letters.settle(letter, REDRIVEN, unit=again(letter)))
                await asyncio.sleep(0.1)  # nothing to wait for: it may not end
                assert not redriving.done()
            assert outcome.verdict == "committed"
            assert await redriving is Settling.CANCELLED
            assert await store.timers.due(limit=10) == []
        else:
            verdicts = await asyncio.gather(
                store.letters.settle(letter, REDRIVEN, unit=again(letter)), twin.commit([undoing])
            )
            assert verdicts[0] in (Settling.SETTLED, Settling.CANCELLED)
        assert await standing(store, letter) is ClaimState.CANCELLED
        assert await open_ids(store) == []

    async def test_of_what_was_handled_meanwhile_settles_it_as_handled_and_does_nothing(self, store: Store) -> None:
        """As an import, or a hand at the database, may leave it."""
        letter = dead_letter()
        await commit(store, Unit(claim(letter.id)), Unit(dead_letter=letter))
        assert await store.letters.settle(letter, REDRIVEN, unit=again(letter)) is Settling.HANDLED
        assert await standing(store, letter) is ClaimState.DONE
        assert await store.timers.due(limit=10) == []
        assert await settled(store) == [(letter.id, Settled.HANDLED)]

    async def test_by_two_operators_at_once_happens_once(self, store: Store, twin: Store) -> None:
        letters = [await died(store) for _ in range(20)]

        async def all_of(by: Store) -> Sequence[Settling]:
            return [await by.letters.settle(one, REDRIVEN, unit=Unit(outgoing=(message(),))) for one in letters]

        mine, theirs = await asyncio.gather(all_of(store), all_of(twin))
        for pair in zip(mine, theirs, strict=True):
            assert sorted(pair) == [Settling.GONE, Settling.SETTLED]
        assert len(await whole_log(store)) == len(letters)
        assert len(await settled(store)) == len(letters)

    async def test_by_one_while_another_discards_does_only_one_of_both(self, store: Store, twin: Store) -> None:
        letters = [await died(store) for _ in range(10)]
        for letter in letters:
            one, other = await asyncio.gather(
                store.letters.settle(letter, REDRIVEN, unit=again(letter)), twin.letters.settle(letter, DISCARDED)
            )
            assert sorted((one, other)) == [Settling.GONE, Settling.SETTLED]
            won = one is Settling.SETTLED
            assert await standing(store, letter) is (ClaimState.NEW if won else ClaimState.DEAD)
        timers = len(await store.timers.due(limit=100))
        assert timers == sum(how is Settled.REDRIVEN for _, how in await settled(store))

    async def test_that_fails_in_the_middle_changes_nothing_and_can_be_repeated(
        self, backend: Backend, store: Store
    ) -> None:
        letter = await died(store)
        table = "foldbus_settled_letters" if backend.name == "sqlite" else "foldbus_shop.settled_letters"

        async def rename(old: str, new: str) -> None:
            async with store.transaction() as tx:
                await tx.sql.execute(text(f"alter table {old} rename to {new}"))

        away = "set_aside"
        await rename(table, away)
        with pytest.raises(Exception, match="settled_letters"):
            await store.letters.settle(letter, REDRIVEN, unit=replace(again(letter), outgoing=(message(),)))
        assert await standing(store, letter) is ClaimState.DEAD
        (found,) = await store.examine(CONSUMER, [(letter.id, "o-1")])
        assert found.reply is not None
        assert await open_ids(store) == [letter.id]
        assert await store.timers.due(limit=10) == []
        assert await whole_log(store) == []
        await rename(away if backend.name == "sqlite" else f"foldbus_shop.{away}", table.rpartition(".")[2])
        assert await store.letters.settle(letter, REDRIVEN, unit=again(letter)) is Settling.SETTLED

    async def test_with_another_payload_stages_that_and_leaves_the_dead_claim_where_it_is(self, store: Store) -> None:
        """Were it given back, the old message could have its effect as well when it is delivered again."""
        letter = await died(store)
        replaced = replace(REDRIVEN, how=Settled.REPLACED)
        assert await store.letters.settle(letter, replaced, unit=Unit(outgoing=(message(),))) is Settling.SETTLED
        assert await standing(store, letter) is ClaimState.DEAD
        assert len(await whole_log(store)) == 1
        assert await settled(store) == [(letter.id, Settled.REPLACED)]
        cancelled = await died(store)
        await commit(store, Unit(undo(cancelled.id, Fence.CANCEL)))
        assert await store.letters.settle(cancelled, replaced, unit=Unit(outgoing=(message(),))) is Settling.CANCELLED
        assert len(await whole_log(store)) == 1

    async def test_of_a_letter_without_a_claim_stages_its_message(self, store: Store) -> None:
        """The relay's have none."""
        letter = dead_letter(consumer="relay")
        await commit(store, Unit(dead_letter=letter))
        assert await store.letters.settle(letter, REDRIVEN, unit=Unit(outgoing=(message(),))) is Settling.SETTLED
        assert len(await whole_log(store)) == 1

    @pytest.mark.parametrize(
        ("settlement", "unit"),
        [
            (DISCARDED, Unit(outgoing=(message(),))),
            (REDRIVEN, Unit(claim())),
            (REDRIVEN, Unit(appends=(append("o-1", 0),))),
            (REDRIVEN, Unit(outgoing=(message(topic=None),))),
        ],
    )
    async def test_with_a_unit_that_is_none_is_refused(self, store: Store, settlement: Settlement, unit: Unit) -> None:
        letter = await died(store)
        with pytest.raises(BadUnit):
            await store.letters.settle(letter, settlement, unit=unit)
        assert await open_ids(store) == [letter.id]


class TestDiscarding:
    async def test_leaves_the_claim_dead_with_its_answer(self, store: Store) -> None:
        letter = await died(store)
        assert await store.letters.settle(letter, DISCARDED) is Settling.SETTLED
        (found,) = await store.examine(CONSUMER, [(letter.id, "o-1")])
        assert (found.state, found.reply and found.reply.outcome) == (ClaimState.DEAD, ReplyOutcome.DIED)
        assert await store.letters.settle(letter, DISCARDED) is Settling.GONE
        assert len(await settled(store)) == 1

    async def test_touches_no_letter_of_another_consumer(self, store: Store) -> None:
        letter = await died(store)
        other = await died(store, letter.id, consumer="shop.handler.mail")
        await store.letters.settle(letter, DISCARDED)
        assert [one.letter for one in await store.letters.page(LetterWhere())] == [other]
