"""The head of a parked key's queue, on every store: who may handle it, postpone it, replace it, and take it out."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from bus.envelope import ReplyOutcome
from eventstore.errors import BadUnit
from eventstore.parking import Waiting
from eventstore.port import (
    Claim,
    ClaimState,
    Fence,
    Outcome,
    Settled,
    Settlement,
    Settling,
    Standing,
    Store,
    Unit,
    Verdict,
)
from tests.eventstore.parked import FAR, WHY, effect_of, failed, head, ids, queue_of, states, unit_of, waiting
from tests.eventstore.stores import (
    CONSUMER,
    IDS,
    NOON,
    append,
    claim,
    commit,
    dead_letter,
    message,
    one,
    reply,
    stream,
    timer,
    undo,
    version,
    whole_log,
)

PARKED = Standing(ClaimState.PARKED)
EPOCH = NOON - timedelta(days=1)


class TestDue:
    async def test_gives_the_heads_whose_time_has_come_the_longest_due_first(self, store: Store) -> None:
        for nth, key in enumerate("abc"):
            await store.parking.park(CONSUMER, waiting(key), WHY, due_at=NOON - timedelta(hours=nth))
            await store.parking.follow(CONSUMER, [waiting(key)])
        await store.parking.park(CONSUMER, waiting("later"), WHY, due_at=FAR)
        await store.parking.park(CONSUMER, waiting("held"), WHY, due_at=None)
        await store.parking.park("else", waiting("x"), WHY, due_at=EPOCH)
        ask = store.parking.due
        assert await ask(consumers=[], limit=10, lease_s=600) == []
        assert await ask(consumers=["nobody"], limit=10, lease_s=600) == []
        assert [one.key for one in await ask(consumers=[CONSUMER], limit=2, lease_s=600)] == ["c", "b"]
        assert [one.key for one in await ask(consumers=[CONSUMER, "else"], limit=10, lease_s=600)] == ["x", "a"]
        assert await ask(consumers=[CONSUMER, "else"], limit=10, lease_s=600) == []
        with pytest.raises(ValueError, match="limit"):
            await ask(consumers=[CONSUMER], limit=0, lease_s=600)

    async def test_gives_a_head_again_when_the_lease_is_over_with_a_higher_token(self, store: Store) -> None:
        messages = await queue_of(store)
        tokens: list[int] = []
        for _ in range(3):
            parked = await head(store, lease_s=0)
            assert parked.message == messages[0]
            tokens.append(parked.token)
        assert tokens == sorted(set(tokens))
        assert tokens[0] > 0

    async def test_next_due_is_the_earliest_head_or_end_of_a_lease(self, store: Store) -> None:
        parking = store.parking
        assert await parking.next_due() is None
        await parking.park(CONSUMER, waiting("held"), WHY, due_at=None)
        assert await parking.next_due() is None
        await parking.park(CONSUMER, waiting("b"), WHY, due_at=FAR)
        assert await parking.next_due() == FAR
        await parking.park("else", waiting("a"), WHY, due_at=NOON)
        assert await parking.next_due() == NOON
        assert await parking.next_due(consumers=[CONSUMER]) == FAR
        assert await parking.next_due(consumers=[]) is None
        await head(store, consumer="else", lease_s=600)
        end = await parking.next_due()
        assert end is not None
        assert timedelta(0) < end - store.timers.now() <= timedelta(seconds=610)


class TestCommittingAHead:
    async def test_writes_the_unit_and_the_next_one_is_due_at_once(self, store: Store) -> None:
        first, second = await queue_of(store, behind=1)
        parked = await head(store)
        made = replace(effect_of(parked), outgoing=(message(),), timers=(timer(FAR),))
        made = replace(made, claim=replace(made.claim, reply=reply()))  # type: ignore[type-var]
        outcome = await store.parking.commit(parked, made)
        assert outcome.verdict is Verdict.COMMITTED
        assert outcome.versions == {stream("s"): 1}
        (recorded, *_) = log = await whole_log(store)
        assert (outcome.position, outcome.public) == (recorded.position, recorded.position)
        assert len(log) == 3
        assert await states(store, first, second, waiting()) == ["done", "parked", "key-parked"]
        (again,) = await store.commit([made])
        assert again.verdict is Verdict.DUPLICATE
        assert again.reply is not None
        following = await head(store)
        assert following.message == second
        assert following.failure is None
        assert following.number > parked.number

    async def test_the_last_one_frees_the_key(self, store: Store) -> None:
        messages = await queue_of(store)
        for nth, given in enumerate(messages):
            parked = await head(store)
            assert parked.message == given
            assert (await store.parking.commit(parked, effect_of(parked, nth))).verdict is Verdict.COMMITTED
        assert await store.parking.keys() == []
        assert await store.parking.queue(CONSUMER, "o-1") == []
        assert await store.parking.next_due() is None
        assert await commit(store, Unit(claim())) == ["ok"]
        assert await states(store, *messages) == ["done"] * 3

    async def test_a_key_that_is_parked_again_uses_no_number_twice(self, store: Store) -> None:
        """So a worker of before, which has been asleep, is not taken for the one whose turn it is."""
        seen: list[int] = []
        for _ in range(3):
            await queue_of(store, behind=1)
            for _ in range(2):
                parked = await head(store)
                seen.append(parked.number)
                await store.parking.commit(parked, unit_of(parked))
        assert seen == sorted(set(seen))

    async def test_may_give_it_up(self, store: Store) -> None:
        first, second = await queue_of(store, behind=1)
        parked = await head(store)
        letter = dead_letter(first.envelope.id)
        dead = unit_of(first, state=ClaimState.DEAD, reply=reply(outcome=ReplyOutcome.DIED))
        outcome = await store.parking.commit(parked, replace(dead, dead_letter=letter))
        assert outcome.verdict is Verdict.COMMITTED
        assert await store.dead_letters() == [letter]
        assert await states(store, first) == ["dead"]
        assert (await head(store)).message == second

    async def test_that_conflicts_changes_nothing_and_may_be_tried_again(self, store: Store) -> None:
        await one(store, Unit(appends=(append("s", 0),)))
        await queue_of(store, behind=0)
        parked = await head(store)
        before = await store.parking.keys()
        wrong = replace(effect_of(parked), timers=(timer(NOON),), outgoing=(message(),))
        outcome = await store.parking.commit(parked, wrong)
        assert outcome == Outcome(Verdict.CONFLICT, stream=stream("s"), expected=0, actual=1)
        assert await store.parking.keys() == before
        assert await states(store, parked.message) == ["parked"]
        assert await store.timers.due(limit=10) == []
        assert len(await whole_log(store)) == 1
        assert (await store.parking.commit(parked, effect_of(parked, 1))).verdict is Verdict.COMMITTED
        assert await store.parking.keys() == []

    async def test_by_whom_it_is_not_the_turn_of_changes_nothing(self, store: Store) -> None:
        first, second = await queue_of(store, behind=1)
        slow = await head(store, lease_s=0)
        quick = await head(store)
        behind = (await store.parking.queue(CONSUMER, "o-1"))[1]
        before = await store.parking.keys()
        for not_mine in (slow, replace(quick, token=0), behind, replace(behind, token=quick.token)):
            assert await store.parking.commit(not_mine, effect_of(not_mine)) == Outcome(Verdict.PARKED)
        assert await store.parking.keys() == before
        assert await version(store, "s") == 0
        assert (await store.parking.commit(quick, effect_of(quick))).verdict is Verdict.COMMITTED
        assert await states(store, first, second) == ["done", "parked"]

    async def test_twice_is_a_duplicate_with_the_reply(self, store: Store) -> None:
        await queue_of(store, behind=1)
        parked = await head(store)
        made = unit_of(parked, reply=reply())
        await store.parking.commit(parked, made)
        outcome = await store.parking.commit(parked, made)
        assert outcome.verdict is Verdict.DUPLICATE
        assert outcome.reply is not None
        assert outcome.reply.token is not None
        assert len(await ids(store)) == 1

    async def test_of_a_cancelled_one_says_so(self, store: Store) -> None:
        first, _ = await queue_of(store, behind=1)
        parked = await head(store)
        await store.parking.cancel(CONSUMER, first.envelope.id, Unit(undo(first.envelope.id, Fence.CANCEL, key="u")))
        assert await store.parking.commit(parked, effect_of(parked)) == Outcome(Verdict.CANCELLED)
        assert len(await ids(store)) == 1

    async def test_that_was_given_up_and_redriven_is_somebody_elses_turn(self, store: Store) -> None:
        """Its claim was given back; the worker that was asleep shall not take it."""
        (first,) = await queue_of(store, behind=0)
        slow, quick = await head(store, lease_s=0), await head(store)
        letter = dead_letter(first.envelope.id)
        await store.parking.commit(quick, replace(unit_of(first, state=ClaimState.DEAD), dead_letter=letter))
        assert await store.letters.settle(letter, Settlement(Settled.REDRIVEN, NOON)) is Settling.SETTLED
        for mine in (slow, quick):
            assert await store.parking.commit(mine, effect_of(mine)) == Outcome(Verdict.PARKED)
        await store.parking.park(CONSUMER, first, WHY, due_at=NOON)
        for mine in (slow, quick):
            assert await store.parking.commit(mine, effect_of(mine)) == Outcome(Verdict.PARKED)
        assert await commit(store, effect_of(first)) == ["parked"]

    @pytest.mark.parametrize("ends", ["commit", "rollback"])
    async def test_within_a_transaction_lives_and_dies_with_it(self, store: Store, ends: str) -> None:
        first, second = await queue_of(store, behind=1)
        parked = await head(store)
        async with store.transaction() as tx:
            assert await store.take(tx, CONSUMER, first.envelope.id) == PARKED
            await tx.sql.execute(text("create table mine (n int)"))
            assert (await store.parking.commit(parked, effect_of(parked), tx=tx)).verdict is Verdict.COMMITTED
            assert await ids(store) == [first.envelope.id, second.envelope.id]
            if ends == "rollback":
                await tx.sql.rollback()
        done = ends == "commit"
        store.committed()
        assert await ids(store) == [one.envelope.id for one in ([second] if done else [first, second])]
        assert await version(store, "s") == (1 if done else 0)
        assert await commit(store, Unit(claim())) == ["parked"]
        if not done:
            assert (await store.parking.commit(parked, effect_of(parked))).verdict is Verdict.COMMITTED

    async def test_that_loses_within_a_transaction_leaves_the_rest_of_it(self, store: Store) -> None:
        await queue_of(store, behind=0)
        parked = await head(store)
        async with store.transaction() as tx:
            await tx.sql.execute(text("create table mine (n int)"))
            wrong = replace(effect_of(parked, 5), timers=(timer(NOON),))
            assert (await store.parking.commit(parked, wrong, tx=tx)).verdict is Verdict.CONFLICT
            stale = replace(parked, token=parked.token - 1)
            assert await store.parking.commit(stale, effect_of(parked), tx=tx) == Outcome(Verdict.PARKED)
            await tx.sql.execute(text("insert into mine values (1)"))
        async with store.transaction() as tx:
            assert (await tx.sql.execute(text("select count(*) from mine"))).scalar_one() == 1
        assert await states(store, parked.message) == ["parked"]
        assert await store.timers.due(limit=10) == []
        assert (await store.parking.commit(parked, effect_of(parked))).verdict is Verdict.COMMITTED

    async def test_with_another_messages_unit_is_refused(self, store: Store) -> None:
        await queue_of(store, behind=0)
        parked = await head(store)
        id = parked.message.envelope.id
        for wrong in (Unit(), Unit(claim()), Unit(claim(id, "x")), Unit(claim(id, consumer="else"))):
            with pytest.raises(BadUnit):
                await store.parking.commit(parked, wrong)
        with pytest.raises(BadUnit):
            await store.parking.commit(parked, replace(unit_of(parked), outgoing=(message(topic=None),)))
        assert await states(store, parked.message) == ["parked"]

    async def test_may_fence_a_step_and_loses_when_that_is_parked_itself(self, store: Store) -> None:
        step, free = waiting("s"), IDS.new()
        undoing = waiting("u")
        await store.parking.park(CONSUMER, undoing, WHY, due_at=NOON)
        parked = await head(store)
        await store.parking.park(CONSUMER, step, WHY, due_at=NOON)
        fenced = Unit(undo(step.envelope.id, Fence.CANCEL, parked.message.envelope.id, key="u"))
        assert await store.parking.commit(parked, fenced) == Outcome(Verdict.CONFLICT)
        fenced = Unit(undo(free, Fence.CANCEL, parked.message.envelope.id, key="u"))
        assert (await store.parking.commit(parked, fenced)).verdict is Verdict.COMMITTED
        assert await store.examine(CONSUMER, [(free, "u")]) == [Standing(ClaimState.CANCELLED)]


class TestSeizing:
    async def test_gives_the_head_whatever_becomes_of_it_otherwise(self, store: Store) -> None:
        """Due, hidden, due later or held: somebody decides about it now."""
        for due_at in (NOON, FAR, None):
            given = waiting(str(due_at))
            await store.parking.park(CONSUMER, given, WHY, due_at=due_at)
            await store.parking.follow(CONSUMER, [waiting(str(due_at))])
            seized = await store.parking.seize(CONSUMER, str(due_at), lease_s=600)
            assert seized is not None
            assert (seized.message, seized.failure) == (given, WHY)
            assert (await store.parking.commit(seized, unit_of(seized))).verdict is Verdict.COMMITTED
            assert len(await ids(store, str(due_at))) == 1

    async def test_ends_somebody_elses_turn_and_hides_it(self, store: Store) -> None:
        await queue_of(store)
        mine = await head(store, lease_s=0)
        seized = await store.parking.seize(CONSUMER, "o-1", lease_s=600)
        assert seized is not None
        assert seized.token > mine.token
        assert await store.parking.due(consumers=[CONSUMER], limit=1, lease_s=1) == []
        assert await store.parking.commit(mine, effect_of(mine)) == Outcome(Verdict.PARKED)
        assert await store.parking.postpone(seized, failed(4), due_at=NOON)

    @pytest.mark.parametrize("due_at", [FAR, None], ids=["due later", "held"])
    async def test_of_one_that_was_not_due_leaves_it_so_when_its_lease_is_over(self, store: Store, due_at: Any) -> None:
        await store.parking.park(CONSUMER, waiting(), WHY, due_at=due_at)
        assert await store.parking.seize(CONSUMER, "o-1", lease_s=0) is not None
        assert await store.parking.due(consumers=[CONSUMER], limit=1, lease_s=1) == []
        assert await store.parking.next_due() == due_at
        assert (await store.parking.keys())[0].due_at == due_at

    async def test_finds_nothing_where_nothing_is_parked(self, store: Store) -> None:
        await queue_of(store)
        assert await store.parking.seize(CONSUMER, "x", lease_s=1) is None
        assert await store.parking.seize("else", "o-1", lease_s=1) is None


class TestReplacing:
    async def test_a_new_message_takes_the_place_of_the_head(self, store: Store) -> None:
        first, second = await queue_of(store, behind=1)
        parked = await head(store)
        new = Waiting(message())
        dead = replace(unit_of(first, state=ClaimState.DEAD), dead_letter=dead_letter(first.envelope.id))
        outcome = await store.parking.commit(parked, dead, instead=new)
        assert outcome.verdict is Verdict.COMMITTED
        assert await ids(store) == [new.envelope.id, second.envelope.id]
        assert await states(store, first, new, second) == ["dead", "parked", "parked"]
        assert (await store.parking.commit(parked, unit_of(parked))).verdict is Verdict.DUPLICATE
        taken_for_it = replace(parked, message=new)
        assert await store.parking.commit(taken_for_it, unit_of(taken_for_it)) == Outcome(Verdict.PARKED)
        again = await head(store)
        assert (again.message, again.number, again.failure) == (new, parked.number, None)
        assert again.parked_at >= parked.parked_at
        assert await ids(store) == [new.envelope.id, second.envelope.id]

    async def test_of_the_last_one_keeps_the_key_parked(self, store: Store) -> None:
        await queue_of(store, behind=0)
        parked, new = await head(store), waiting()
        assert (await store.parking.commit(parked, unit_of(parked), instead=new)).verdict is Verdict.COMMITTED
        assert await commit(store, Unit(claim())) == ["parked"]
        assert await ids(store) == [new.envelope.id]

    async def test_by_one_that_is_known_is_a_conflict_and_changes_nothing(self, store: Store) -> None:
        first, second = await queue_of(store, behind=1)
        done = waiting()
        await one(store, unit_of(replace(done, envelope=replace(done.envelope, key="x"))))
        parked = await head(store)
        before = await store.parking.keys()
        for known in (first, second, done):
            outcome = await store.parking.commit(parked, effect_of(parked), instead=known)
            assert outcome == Outcome(Verdict.CONFLICT)
        assert await store.parking.keys() == before
        assert await version(store, "s") == 0
        assert await states(store, first, second, done) == ["parked", "parked", "done"]

    async def test_by_one_of_another_key_is_refused(self, store: Store) -> None:
        await queue_of(store)
        parked = await head(store)
        with pytest.raises(BadUnit):
            await store.parking.commit(parked, unit_of(parked), instead=waiting("x"))


class TestPostponing:
    async def test_keeps_it_at_the_head_with_its_new_failure(self, store: Store) -> None:
        messages = await queue_of(store)
        parked = await head(store)
        assert await store.parking.postpone(parked, failed(4), due_at=EPOCH)
        again = await head(store)
        assert (again.message, again.failure, again.number) == (messages[0], failed(4), parked.number)
        assert again.token > parked.token
        assert await store.parking.postpone(again, failed(5), due_at=FAR)
        assert await store.parking.due(consumers=[CONSUMER], limit=1, lease_s=1) == []
        assert await store.parking.next_due() == FAR
        (key,) = await store.parking.keys()
        assert (key.due_at, key.head.failure) == (FAR, failed(5))

    async def test_ends_the_callers_turn(self, store: Store) -> None:
        await queue_of(store)
        parked = await head(store)
        assert await store.parking.postpone(parked, failed(4), due_at=FAR)
        assert not await store.parking.postpone(parked, failed(5), due_at=NOON)
        assert await store.parking.commit(parked, effect_of(parked)) == Outcome(Verdict.PARKED)
        (key,) = await store.parking.keys()
        assert (key.due_at, key.head.failure) == (FAR, failed(4))

    async def test_is_not_for_whom_it_is_not_the_turn_of(self, store: Store) -> None:
        await queue_of(store)
        slow, quick = await head(store, lease_s=0), await head(store)
        before = await store.parking.keys()
        assert not await store.parking.postpone(slow, failed(4), due_at=None)
        assert await store.parking.keys() == before
        await store.parking.commit(quick, unit_of(quick))
        assert not await store.parking.postpone(quick, failed(4), due_at=None)
        assert not await store.parking.postpone(replace(quick, key="x"), failed(4), due_at=None)

    async def test_holds_it_until_it_is_woken(self, store: Store) -> None:
        messages = await queue_of(store)
        parked = await head(store)
        assert await store.parking.postpone(parked, failed(4), due_at=None)
        assert await store.parking.due(consumers=[CONSUMER], limit=1, lease_s=1) == []
        assert await store.parking.next_due() is None
        assert (await store.parking.keys())[0].due_at is None
        assert await store.parking.wake(CONSUMER, "o-1")
        assert (await head(store)).message == messages[0]


class TestWaking:
    async def test_ends_a_turn_and_makes_the_head_due(self, store: Store) -> None:
        await queue_of(store)
        asleep = await head(store)
        assert await store.parking.wake(CONSUMER, "o-1")
        awake = await head(store)
        assert await store.parking.commit(asleep, effect_of(asleep)) == Outcome(Verdict.PARKED)
        assert (await store.parking.commit(awake, effect_of(awake))).verdict is Verdict.COMMITTED

    async def test_finds_nothing_where_nothing_is_parked(self, store: Store) -> None:
        await queue_of(store)
        assert not await store.parking.wake(CONSUMER, "x")
        assert not await store.parking.wake("else", "o-1")


def undoing(step: Waiting, key: str = "u", id: UUID | None = None) -> Unit:
    return Unit(undo(step.envelope.id, Fence.CANCEL, id, key=key, reply=reply()), appends=(append("undone", 0),))


class TestCancelling:
    @pytest.mark.parametrize("nth", [0, 1, 2])
    async def test_takes_the_step_out_of_its_queue(self, store: Store, nth: int) -> None:
        messages = await queue_of(store)
        step = messages.pop(nth)
        outcome = await store.parking.cancel(CONSUMER, step.envelope.id, undoing(step))
        assert (outcome.verdict, outcome.versions) == (Verdict.COMMITTED, {stream("undone"): 1})
        assert await ids(store) == [one.envelope.id for one in messages]
        assert await states(store, step) == ["cancelled"]
        assert await commit(store, effect_of(step)) == ["cancelled"]
        assert (await head(store)).message == messages[0]

    async def test_the_next_one_is_due_only_if_it_was_the_head(self, store: Store) -> None:
        for key, at in (("a", 0), ("b", 1)):
            messages = [waiting(key), waiting(key)]
            await store.parking.park(CONSUMER, messages[0], WHY, due_at=FAR)
            await store.parking.follow(CONSUMER, messages[1:])
            step = messages[at]
            unit = Unit(undo(step.envelope.id, Fence.CANCEL, key="u"))
            assert (await store.parking.cancel(CONSUMER, step.envelope.id, unit)).verdict is Verdict.COMMITTED
        assert [one.key for one in await store.parking.due(consumers=[CONSUMER], limit=9, lease_s=9)] == ["a"]
        (_, b) = await store.parking.keys()
        assert b.due_at == FAR

    async def test_a_step_behind_leaves_the_turn_of_the_head_alone(self, store: Store) -> None:
        _, step = await queue_of(store, behind=1)
        parked = await head(store)
        await store.parking.cancel(CONSUMER, step.envelope.id, undoing(step))
        assert (await store.parking.commit(parked, effect_of(parked))).verdict is Verdict.COMMITTED
        assert await store.parking.keys() == []

    async def test_the_last_one_frees_the_key(self, store: Store) -> None:
        (step,) = await queue_of(store, behind=0)
        await store.parking.cancel(CONSUMER, step.envelope.id, undoing(step))
        assert await store.parking.keys() == []
        assert await commit(store, Unit(claim())) == ["ok"]

    @pytest.mark.parametrize("key", ["o-1", "u"])
    async def test_passes_the_queue_of_the_undos_own_key(self, store: Store, key: str) -> None:
        step, behind = await queue_of(store, behind=1)
        if key != "o-1":
            await queue_of(store, key, behind=0)
        unit = undoing(step, key)
        assert await commit(store, unit) == ["parked"]
        assert (await store.parking.cancel(CONSUMER, step.envelope.id, unit)).verdict is Verdict.COMMITTED
        assert await ids(store) == [behind.envelope.id]
        assert await commit(store, Unit(claim(key=key))) == ["parked"], "its own key is parked as before"
        assert (await store.examine(CONSUMER, [(step.envelope.id, "o-1")])) == [Standing(ClaimState.CANCELLED)]

    async def test_takes_the_undo_itself_out_of_its_queue(self, store: Store) -> None:
        """It came when its key was parked and waits; the step, of another key, waits as well."""
        (step,) = await queue_of(store, behind=0)
        first, the_undo = await queue_of(store, "u", behind=1)
        unit = undoing(step, "u", the_undo.envelope.id)
        assert (await store.parking.cancel(CONSUMER, step.envelope.id, unit)).verdict is Verdict.COMMITTED
        assert await ids(store) == []
        assert await ids(store, "u") == [first.envelope.id]
        assert await states(store, step, the_undo) == ["cancelled", "done"]

    @pytest.mark.parametrize("ends", ["commit", "rollback"])
    async def test_within_a_transaction_lives_and_dies_with_it(self, store: Store, ends: str) -> None:
        (step,) = await queue_of(store, behind=0)
        unit = undoing(step)
        async with store.transaction() as tx:
            outcome = await store.parking.cancel(CONSUMER, step.envelope.id, unit, tx=tx)
            assert outcome.verdict is Verdict.COMMITTED
            if ends == "rollback":
                await tx.sql.rollback()
        assert await states(store, step) == ["cancelled" if ends == "commit" else "parked"]

    async def test_twice_is_a_duplicate(self, store: Store) -> None:
        (step,) = await queue_of(store, behind=0)
        unit = undoing(step)
        await store.parking.cancel(CONSUMER, step.envelope.id, unit)
        outcome = await store.parking.cancel(CONSUMER, step.envelope.id, unit)
        assert outcome.verdict is Verdict.DUPLICATE
        assert outcome.reply is not None
        assert await version(store, "undone") == 1

    async def test_is_a_conflict_when_the_step_is_not_parked(self, store: Store) -> None:
        (step,) = await queue_of(store, behind=0)
        parked = await head(store)
        await store.parking.commit(parked, unit_of(parked))
        for gone in (step, waiting()):
            unit = undoing(gone)
            assert await store.parking.cancel(CONSUMER, gone.envelope.id, unit) == Outcome(Verdict.CONFLICT)
            assert unit.claim is not None
            assert await store.examine(CONSUMER, [(unit.claim.message_id, "u")]) == [Standing(ClaimState.NEW)]
        assert await states(store, step) == ["done"]
        assert await version(store, "undone") == 0

    async def test_that_conflicts_changes_nothing(self, store: Store) -> None:
        step, behind = await queue_of(store, behind=1)
        await one(store, Unit(appends=(append("undone", 0),)))
        before = await store.parking.keys()
        outcome = await store.parking.cancel(CONSUMER, step.envelope.id, undoing(step, "o-1"))
        assert (outcome.verdict, outcome.stream, outcome.actual) == (Verdict.CONFLICT, stream("undone"), 1)
        assert await store.parking.keys() == before
        assert await states(store, step, behind) == ["parked", "parked"]
        assert await commit(store, Unit(claim())) == ["parked"]

    async def test_with_a_unit_that_does_not_fence_it_is_refused(self, store: Store) -> None:
        (step,) = await queue_of(store, behind=0)
        id = step.envelope.id
        wrong = [
            Unit(),
            Unit(claim()),
            Unit(undo(id, Fence.EXPECT_DONE)),
            Unit(undo(IDS.new(), Fence.CANCEL)),
            Unit(Claim("else", IDS.new(), "k", fences=id, fence=Fence.CANCEL)),
        ]
        for unit in wrong:
            with pytest.raises(BadUnit):
                await store.parking.cancel(CONSUMER, id, unit)
        assert await states(store, step) == ["parked"]
