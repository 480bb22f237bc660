"""Forgetting claims on every store: by age, never by age alone, a bounded piece at a time."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio

from bus.envelope import ReplyOutcome, ReplyTo
from eventstore.port import ClaimState, Fence, Settled, Settlement, Store, Unit
from tests.eventstore.parked import queue_of
from tests.eventstore.stores import CONSUMER, IDS, NOON, Backend, claim, commit, dead_letter, reply, undo

HOUR = 3600.0


class Aged:
    """A store, and a way to make what is in it older, by the clock that counts there."""

    def __init__(self, store: Any, backend: Backend) -> None:
        self.store, self._backend = store, backend

    async def pass_by(self, seconds: float) -> None:
        """As if so much time had passed since."""
        if self._backend.name == "postgres":
            async with self.store.connection() as db:
                await db.execute(
                    f"update {self.store.schema}.claims set taken_at = taken_at - make_interval(secs => $1)", seconds
                )
        else:
            micros = int(seconds * 1_000_000)

            def age(connection: sqlite3.Connection) -> None:
                connection.execute("UPDATE foldbus_claims SET claimed_at=claimed_at-?", (micros,))

            await self.store.database.write(age)

    async def state(self, id: UUID) -> ClaimState:
        ((standing),) = await self.store.examine(CONSUMER, [(id, "o-1")])
        return standing.state  # type: ignore[no-any-return]

    async def forget(self, older_than_s: float = HOUR, **options: Any) -> int:
        return (await self.store.inbox.forget(CONSUMER, older_than_s=older_than_s, **options)).gone  # type: ignore[no-any-return]


@pytest_asyncio.fixture
async def aged(store: Any, backend: Backend) -> AsyncIterator[Aged]:
    yield Aged(store, backend)


async def handled(store: Store, *, consumer: str = CONSUMER, to: str | None = None) -> UUID:
    """A message that was handled; `to` is the topic that its answer went to."""
    id = IDS.new()
    answer = None if to is None else replace(reply(id), reply_to=ReplyTo(to, "k", "i"), topic=to)
    assert await commit(store, Unit(claim(id, consumer=consumer, reply=answer))) == ["ok"]
    return id


async def test_what_is_old_enough_goes_with_its_reply_and_the_rest_stays(aged: Aged) -> None:
    old, answered = await handled(aged.store), await handled(aged.store, to="front.inbox")
    await aged.pass_by(HOUR + 60)
    young = await handled(aged.store, to="front.inbox")
    others = await handled(aged.store, consumer="other")
    await aged.pass_by(60)
    assert await aged.forget() == 2
    assert [await aged.state(id) for id in (old, answered, young)] == [ClaimState.NEW, ClaimState.NEW, ClaimState.DONE]
    ((of_another),) = await aged.store.examine("other", [(others, "o-1")])
    assert of_another.state is ClaimState.DONE
    assert await commit(aged.store, Unit(claim(answered, reply=reply(answered)))) == ["ok"], "its reply was left behind"
    assert await aged.forget() == 0


async def test_claims_of_other_consumers_are_never_touched(aged: Aged) -> None:
    other = await handled(aged.store, consumer="other")
    await aged.pass_by(HOUR * 2)
    assert await aged.forget() == 0
    ((standing),) = await aged.store.examine("other", [(other, "o-1")])
    assert standing.state is ClaimState.DONE


async def test_an_undo_still_finds_the_step_of_a_saga_however_old(aged: Aged) -> None:
    step, plain = await handled(aged.store, to="orders.replies"), await handled(aged.store, to="front.inbox")
    await aged.pass_by(HOUR * 1000)
    assert await aged.forget() == 1
    assert (await aged.state(step), await aged.state(plain)) == (ClaimState.DONE, ClaimState.NEW)
    assert await commit(aged.store, Unit(undo(step, Fence.EXPECT_DONE))) == ["ok"]


async def test_a_fence_is_kept_so_that_a_late_step_is_still_dropped(aged: Aged) -> None:
    step = IDS.new()
    assert await commit(aged.store, Unit(undo(step, Fence.CANCEL))) == ["ok"]
    await aged.pass_by(HOUR * 1000)
    await aged.forget()
    assert await aged.state(step) is ClaimState.CANCELLED
    assert await commit(aged.store, Unit(claim(step))) == ["cancelled"]


async def test_steps_and_fences_go_after_a_time_of_their_own(aged: Aged) -> None:
    fenced = IDS.new()
    await commit(aged.store, Unit(undo(fenced, Fence.CANCEL)))
    step = await handled(aged.store, to="orders.replies")
    await aged.pass_by(HOUR * 5)
    assert await aged.forget(steps_older_than_s=HOUR * 6) == 1, "the undo's own claim, which nobody undoes"
    assert (await aged.state(step), await aged.state(fenced)) == (ClaimState.DONE, ClaimState.CANCELLED)
    assert await aged.forget(steps_older_than_s=HOUR * 4) == 2
    assert (await aged.state(step), await aged.state(fenced)) == (ClaimState.NEW, ClaimState.NEW)


async def test_a_step_is_never_forgotten_sooner_than_other_claims(aged: Aged) -> None:
    step = await handled(aged.store, to="orders.replies")
    await aged.pass_by(HOUR * 3)
    assert await aged.forget(HOUR * 4, steps_older_than_s=HOUR * 2) == 0
    assert await aged.state(step) is ClaimState.DONE


async def test_a_dead_message_stays_dead_while_its_letter_is_open(aged: Aged) -> None:
    letter = dead_letter()
    answer = reply(letter.id, outcome=ReplyOutcome.DIED, topic=None)
    answer = replace(answer, reply_to=ReplyTo("front.inbox", "k", "i"))
    dead = claim(letter.id, state=ClaimState.DEAD, reply=answer)
    assert await commit(aged.store, Unit(dead, dead_letter=letter)) == ["ok"]
    await aged.pass_by(HOUR * 1000)
    assert await aged.forget() == 0
    assert await aged.state(letter.id) is ClaimState.DEAD
    await aged.store.letters.settle(letter, Settlement(Settled.DISCARDED, NOON, by="ann", reason="a test"))
    assert await aged.forget() == 1
    assert await aged.state(letter.id) is ClaimState.NEW


async def test_pieces_follow_one_another_to_the_end(aged: Aged) -> None:
    ids = [await handled(aged.store) for _ in range(7)]
    await aged.pass_by(HOUR * 2)
    ids.append(await handled(aged.store))
    seen: list[tuple[int, int]] = []
    after: UUID | None = None
    while True:
        piece = await aged.store.inbox.forget(CONSUMER, older_than_s=HOUR, after=after, limit=3)
        seen.append((piece.looked, piece.gone))
        after = piece.after
        if after is None:
            break
    assert seen == [(3, 3), (3, 3), (2, 1)]
    assert [await aged.state(id) for id in ids] == [ClaimState.NEW] * 7 + [ClaimState.DONE]
    with pytest.raises(ValueError, match="limit is 0"):
        await aged.store.inbox.forget(CONSUMER, older_than_s=1, limit=0)


async def test_what_a_commit_holds_meanwhile_is_passed_over_and_nobody_waits(store: Any, backend: Backend) -> None:
    """A transaction that redrives the letter holds its claim; forgetting must neither wait nor take it away."""
    if backend.name == "sqlite":  # one writer at a time: there is no meanwhile
        aged = Aged(store, backend)
        ids = [await handled(store) for _ in range(3)]
        await aged.pass_by(HOUR * 2)
        both = await asyncio.gather(aged.forget(), aged.forget())
        assert sum(both) == len(ids)
        return
    aged = Aged(store, backend)
    held, free = await handled(store), await handled(store)
    await aged.pass_by(HOUR * 2)
    async with store.connection() as db, db.transaction():
        await db.execute(
            f"select 1 from {store.schema}.claims where consumer = $1 and message_id = $2 for update", CONSUMER, held
        )
        async with asyncio.timeout(30):
            assert await aged.forget() == 1
    assert (await aged.state(held), await aged.state(free)) == (ClaimState.DONE, ClaimState.NEW)


async def test_the_age_is_by_the_stores_clock_not_by_the_callers(aged: Aged) -> None:
    """An age is asked for, not an instant: a worker whose clock is an hour ahead forgets nothing an hour early."""
    id = await handled(aged.store)
    await aged.pass_by(HOUR - 60)
    assert await aged.forget() == 0
    assert await aged.state(id) is ClaimState.DONE


async def test_what_is_in_hand_is_never_forgotten(aged: Aged) -> None:
    """A parked message waits for its turn, an effect that was begun may have happened."""
    (parked, behind) = await queue_of(aged.store, "o-1", behind=1)
    begun = IDS.new()
    await aged.store.effects.begin(CONSUMER, begun, "o-2", lease_s=60)
    await aged.pass_by(HOUR * 1000)
    assert await aged.forget(steps_older_than_s=HOUR) == 0
    assert [await aged.state(id) for id in (parked.envelope.id, behind.envelope.id, begun)] == [
        ClaimState.PARKED, ClaimState.PARKED, ClaimState.STARTED,
    ]  # fmt: skip
