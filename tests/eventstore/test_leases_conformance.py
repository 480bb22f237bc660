"""Leases and timers: one leader at a time with a token that rises, and messages that come up when they are due.

Short times and no clock of the test's own: PostgreSQL decides by its own.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from bus.errors import Fenced
from eventstore.port import CancelTimer, Leadership, Store, Timer, Unit
from tests.eventstore.stores import CONSUMER, NOON, claim, commit, one, timer

# --- leases ----------------------------------------------------------------------------------------------------------


async def _lead(store: Store, stack: AsyncExitStack, **options: Any) -> Leadership:
    return await asyncio.wait_for(stack.enter_async_context(store.leases.lead("relay", **options)), 10)


async def test_the_first_leader_finds_position_zero_and_the_next_one_what_was_marked(store: Store) -> None:
    assert await store.leases.position("relay") == 0
    async with store.leases.lead("relay") as first:
        assert first.lease.position == 0
        assert not first.lost
        await store.leases.mark(first.lease, old=0, new=17)
        await store.leases.mark(first.lease, old=17, new=40)
        assert await store.leases.position("relay") == 40
    async with store.leases.lead("relay") as second:
        assert second.lease.position == 40
        assert second.lease.token > first.lease.token
    assert await store.leases.position("other") == 0


async def test_one_leads_while_the_other_waits_and_follows_at_once_when_the_first_leaves(
    store: Store, twin: Store
) -> None:
    """At once: long before the time to live of a minute is over."""
    async with AsyncExitStack() as first, AsyncExitStack() as second:
        leader = await _lead(store, first, ttl_s=60)
        waiting = asyncio.create_task(_lead(twin, second, ttl_s=60))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        await first.aclose()
        follower = await asyncio.wait_for(waiting, 30)
        assert follower.lease.token > leader.lease.token


async def test_what_is_held_now_is_told_with_the_time_that_is_left(store: Store, twin: Store) -> None:
    assert await twin.leases.held() == {}
    async with store.leases.lead("relay", ttl_s=60):
        async with store.leases.lead("else", ttl_s=30):
            held = await twin.leases.held()
            assert held.keys() == {"relay", "else"}
            assert 30 < held["relay"] <= 60
            assert 0 < held["else"] <= 30
        assert (await twin.leases.held()).keys() == {"relay"}
    assert await twin.leases.held() == {}


async def test_two_of_one_store_do_not_lead_at_once_either_but_two_names_do(store: Store) -> None:
    async with store.leases.lead("relay"):
        async with asyncio.timeout(30), store.leases.lead("else"):
            pass
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2), store.leases.lead("relay"):
                pass


async def test_many_contenders_lead_one_after_the_other(store: Store, twin: Store) -> None:
    leading, most, tokens = 0, 0, []

    async def contend(where: Store) -> None:
        nonlocal leading, most
        async with where.leases.lead("relay") as leadership:
            leading += 1
            most = max(most, leading)
            tokens.append(leadership.lease.token)
            await asyncio.sleep(0.01)
            leading -= 1

    await asyncio.wait_for(asyncio.gather(*(contend(where) for where in (store, twin) * 3)), 30)
    assert most == 1
    assert tokens == sorted(set(tokens))


async def test_a_leader_renews_and_stays_for_longer_than_its_time_to_live(store: Store, twin: Store) -> None:
    async with store.leases.lead("relay", ttl_s=4.0) as leadership, AsyncExitStack() as stack:
        waiting = asyncio.create_task(_lead(twin, stack, ttl_s=4.0))
        began, renewed, left_s = time.monotonic(), 0, 4.0
        async with asyncio.timeout(40):
            while time.monotonic() - began < 4.0 or renewed < 2:
                before, left_s = left_s, (await store.leases.held())["relay"]
                renewed += left_s > before
                await asyncio.sleep(0.05)
        assert not waiting.done()
        assert not leadership.lost
        await store.leases.mark(leadership.lease, old=0, new=1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_a_zombies_mark_is_fenced_and_changes_nothing(store: Store, twin: Store) -> None:
    """The zombie is one that left; what it still holds is a lease with an old token."""
    async with store.leases.lead("relay") as zombie:
        await store.leases.mark(zombie.lease, old=0, new=5)
    async with twin.leases.lead("relay") as leader:
        with pytest.raises(Fenced):
            await store.leases.mark(zombie.lease, old=5, new=99)
        assert await store.leases.position("relay") == 5
        await twin.leases.mark(leader.lease, old=5, new=6)
        with pytest.raises(Fenced):
            await store.leases.mark(zombie.lease, old=6, new=99)
    assert await store.leases.position("relay") == 6


async def test_a_mark_from_another_position_than_the_stored_one_is_fenced(store: Store) -> None:
    async with store.leases.lead("relay") as leadership:
        await store.leases.mark(leadership.lease, old=0, new=5)
        with pytest.raises(Fenced):
            await store.leases.mark(leadership.lease, old=0, new=7)
        with pytest.raises(Fenced):
            await store.leases.mark(replace(leadership.lease, name="other"), old=0, new=7)
        assert await store.leases.position("relay") == 5


async def test_of_two_marks_at_once_one_wins(store: Store) -> None:
    async with store.leases.lead("relay") as leadership:
        answers = await asyncio.gather(
            *(store.leases.mark(leadership.lease, old=0, new=n) for n in (5, 6)), return_exceptions=True
        )
    assert sorted(type(answer).__name__ for answer in answers) == ["Fenced", "NoneType"]


async def test_waiting_for_a_lease_can_be_cancelled_and_leaves_it_to_others(store: Store, twin: Store) -> None:
    async with AsyncExitStack() as stack:
        await _lead(store, stack)
        waiting = asyncio.create_task(_lead(twin, AsyncExitStack()))
        await asyncio.sleep(0.1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    async with AsyncExitStack() as stack:
        await _lead(store, stack)


async def test_a_lease_is_given_up_also_when_its_holder_fails(store: Store, twin: Store) -> None:
    with pytest.raises(RuntimeError):
        async with store.leases.lead("relay", ttl_s=60):
            raise RuntimeError
    async with AsyncExitStack() as stack:
        await _lead(twin, stack)


# --- timers ----------------------------------------------------------------------------------------------------------


async def _due(store: Store, n: int = 1, *, lease_s: float = 30.0) -> list[Timer]:
    """Waits for `n` timers to come up."""
    found: list[Timer] = []
    async with asyncio.timeout(30):
        while len(found) < n:
            found += await store.timers.due(limit=10, lease_s=lease_s)
            await asyncio.sleep(0.01)
    return found


async def test_a_timer_comes_up_when_it_is_due_and_not_before(store: Store) -> None:
    later = timer(store.timers.now() + timedelta(hours=1))
    await commit(store, Unit(timers=(later,)))
    assert await store.timers.next_due() == later.due_at
    assert list(await store.timers.due(limit=10)) == []
    soon = timer(store.timers.now() + timedelta(seconds=0.4))
    await commit(store, Unit(timers=(soon,)))
    assert await store.timers.next_due() == soon.due_at
    assert await _due(store) == [soon]
    assert store.timers.now() >= soon.due_at


async def test_timers_come_up_earliest_first_up_to_the_limit(store: Store) -> None:
    made = [timer(NOON + timedelta(microseconds=n)) for n in range(6)]
    await commit(store, Unit(timers=tuple(made[3:])), Unit(timers=tuple(reversed(made[:3]))))
    assert list(await store.timers.due(limit=4)) == made[:4]
    assert list(await store.timers.due(limit=4)) == made[4:]
    assert list(await store.timers.due(limit=4)) == []


async def test_two_who_ask_at_once_do_not_get_the_same_timer(store: Store, twin: Store) -> None:
    made = [timer(NOON + timedelta(microseconds=n)) for n in range(40)]
    await commit(store, Unit(timers=tuple(made)))
    given = await asyncio.gather(*(where.timers.due(limit=5) for where in (store, twin) * 6))
    ids = [found.id for one in given for found in one]
    assert len(ids) == len(set(ids))
    rest = await store.timers.due(limit=40)
    assert {*ids, *(found.id for found in rest)} == {one.id for one in made}


async def test_a_timer_that_was_given_is_hidden_until_its_lease_ends_then_given_to_another(
    store: Store, twin: Store
) -> None:
    long, short = timer(NOON), timer(NOON)
    await commit(store, Unit(timers=(long,)))
    assert list(await store.timers.due(limit=10, lease_s=3600)) == [long]
    assert list(await twin.timers.due(limit=10)) == []
    await commit(store, Unit(timers=(short,)))
    given_at = store.timers.now()
    assert list(await store.timers.due(limit=10, lease_s=0.4)) == [short]
    hidden_until = await twin.timers.next_due()
    assert hidden_until is not None
    assert hidden_until >= given_at + timedelta(seconds=0.35)
    assert await _due(twin) == [short]
    assert twin.timers.now() >= hidden_until


async def test_the_unit_that_handles_a_timer_takes_it_away(store: Store) -> None:
    made = timer(NOON)
    await commit(store, Unit(timers=(made,)))
    (given,) = await store.timers.due(limit=10, lease_s=0.05)
    handled = Unit(claim(given.id), timers=(CancelTimer(given.consumer, given.id),))
    assert await commit(store, handled) == ["ok"]
    assert await store.timers.next_due() is None
    await asyncio.sleep(0.1)
    assert list(await store.timers.due(limit=10)) == []
    assert await commit(store, handled) == ["duplicate"]


async def test_a_released_timer_comes_up_again_after_the_delay(store: Store) -> None:
    made = timer(NOON)
    await commit(store, Unit(timers=(made,)))
    (given,) = await store.timers.due(limit=10)
    await store.timers.release(given, delay_s=3600)
    assert list(await store.timers.due(limit=10)) == []
    released_at = store.timers.now()
    await store.timers.release(given, delay_s=0.3)
    assert await _due(store) == [made]
    assert store.timers.now() >= released_at + timedelta(seconds=0.25)


async def test_releasing_a_timer_that_is_gone_does_no_harm(store: Store) -> None:
    made = timer(NOON)
    await commit(store, Unit(timers=(made,)))
    await commit(store, Unit(timers=(CancelTimer(CONSUMER, made.id),)))
    await store.timers.release(made, delay_s=0)
    assert await store.timers.next_due() is None


async def test_no_timer_no_next_one(store: Store) -> None:
    assert await store.timers.next_due() is None
    assert list(await store.timers.due(limit=10)) == []
    await one(store, Unit(timers=(timer(NOON + timedelta(days=1)), timer(NOON + timedelta(hours=2)))))
    assert await store.timers.next_due() == NOON + timedelta(hours=2)
