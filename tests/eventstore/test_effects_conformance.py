"""Claims of effects on every store: who is at it, what may have happened, and that a late one writes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bus.envelope import ReplyOutcome
from eventstore.errors import BadUnit
from eventstore.parking import Waiting
from eventstore.port import (
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
from tests.eventstore.parked import WHY, effect_of, head, ids, queue_of, states, unit_of, waiting
from tests.eventstore.stores import (
    CONSUMER,
    IDS,
    NOON,
    append,
    claim,
    commit,
    dead_letter,
    one,
    reply,
    stream,
    undo,
    verdicts,
    version,
)

NEW = Standing(ClaimState.NEW)
STARTED = Standing(ClaimState.STARTED, started=True)


async def begin(store: Store, given: Waiting, *, lease_s: float = 600.0) -> Standing:
    return await store.effects.begin(CONSUMER, given.envelope.id, given.envelope.key, lease_s=lease_s)


async def standing(store: Store, given: Waiting) -> Standing:
    (found,) = await store.examine(CONSUMER, [(given.envelope.id, given.envelope.key)])
    return found


class TestBeginning:
    async def test_the_first_time_it_is_new_and_nothing_has_happened(self, store: Store) -> None:
        given = waiting()
        begun = await begin(store, given)
        assert (begun.state, begun.started, begun.reply) == (ClaimState.NEW, False, None)
        assert begun.token > 0
        assert await standing(store, given) == STARTED
        async with store.transaction() as tx:
            assert await store.take(tx, CONSUMER, given.envelope.id, key="o-1") == STARTED

    async def test_somebody_elses_is_theirs_until_the_lease_ends(self, store: Store, twin: Store) -> None:
        given = waiting()
        first = await begin(store, given)
        assert await begin(twin, given) == STARTED
        assert await begin(store, given) == STARTED
        await store.effects.release(CONSUMER, given.envelope.id, first.token)
        second = await begin(twin, given)
        assert (second.state, second.started) == (ClaimState.NEW, True)
        assert second.token > first.token

    async def test_when_the_lease_is_over_it_is_the_next_ones_who_is_told(self, store: Store, twin: Store) -> None:
        given = waiting()
        tokens = [(await begin(at, given, lease_s=0)).token for at in (store, twin, store)]
        assert tokens == sorted(set(tokens))
        assert await standing(store, given) == STARTED

    async def test_another_consumer_begins_for_itself(self, store: Store) -> None:
        given = waiting()
        await begin(store, given)
        begun = await store.effects.begin("else", given.envelope.id, "o-1", lease_s=600)
        assert (begun.state, begun.started) == (ClaimState.NEW, False)

    async def test_of_what_is_done_dead_cancelled_or_parked_answers_so_and_writes_nothing(self, store: Store) -> None:
        done, dead, cancelled, parked = (waiting(key) for key in "abcd")
        answer = reply()
        await store.commit(
            [
                unit_of(done, reply=answer),
                unit_of(dead, state=ClaimState.DEAD),
                Unit(undo(cancelled.envelope.id, Fence.CANCEL, key="u")),
            ]
        )
        await store.parking.park(CONSUMER, parked, WHY, due_at=None)
        found = [await begin(store, given) for given in (done, dead, cancelled, parked)]
        assert [one.state for one in found] == [
            ClaimState.DONE,
            ClaimState.DEAD,
            ClaimState.CANCELLED,
            ClaimState.PARKED,
        ]
        assert found[0].reply is not None
        assert found[0].reply.id == answer.id
        assert not any(one.started or one.token for one in found)
        assert [await standing(store, given) for given in (done, dead, cancelled, parked)] == found

    async def test_a_message_of_a_parked_key_is_not_begun(self, store: Store) -> None:
        await queue_of(store, behind=0)
        given = waiting()
        assert await begin(store, given) == Standing(ClaimState.KEY_PARKED)
        assert await standing(store, given) == Standing(ClaimState.KEY_PARKED)
        assert [one.state for one in await store.parking.follow(CONSUMER, [given])] == [ClaimState.PARKED]

    @pytest.mark.parametrize(("consumer", "key"), [("", "k"), ("c\x00", "k"), (CONSUMER, "\ud800")])
    async def test_of_a_name_that_is_none_is_refused(self, store: Store, consumer: str, key: str) -> None:
        with pytest.raises(BadUnit):
            await store.effects.begin(consumer, IDS.new(), key, lease_s=1)


class TestWhatWasBegun:
    async def test_is_started_for_an_ordinary_commit_and_takes_its_key_along(self, store: Store) -> None:
        given = waiting()
        await begin(store, given, lease_s=0)
        assert await one(store, effect_of(given)) == Outcome(Verdict.STARTED)
        outcomes = await store.commit(
            [
                effect_of(given),
                Unit(claim()),
                Unit(claim(key="a"), appends=(append("s", 0),)),
                Unit(claim(key="b")),
            ]
        )
        assert verdicts(outcomes) == ["started", "conflict", "conflict", "ok"]
        assert outcomes[1] == Outcome(Verdict.CONFLICT)
        assert await version(store, "s") == 0

    async def test_does_not_keep_others_of_its_key_from_a_call_of_their_own(self, store: Store) -> None:
        await begin(store, waiting())
        assert await commit(store, Unit(claim())) == ["ok"]

    @pytest.mark.parametrize("fence", list(Fence))
    async def test_is_a_conflict_for_its_undo(self, store: Store, fence: Fence) -> None:
        given = waiting()
        await begin(store, given, lease_s=0)
        unit = Unit(undo(given.envelope.id, fence, key="u"))
        assert await commit(store, unit) == ["conflict"]
        if fence is Fence.CANCEL:
            assert await store.parking.cancel(CONSUMER, given.envelope.id, unit) == Outcome(Verdict.CONFLICT)
        assert await standing(store, given) == STARTED

    async def test_is_parked_when_it_fails_for_good_and_that_is_remembered(self, store: Store) -> None:
        given, behind = waiting(), waiting()
        begun = await begin(store, given)
        parked = Standing(ClaimState.PARKED, started=True)
        assert await store.parking.park(CONSUMER, given, WHY, due_at=NOON) == parked
        assert await standing(store, given) == parked
        assert await begin(store, given) == parked
        assert await store.parking.follow(CONSUMER, [given, behind]) == [parked, Standing(ClaimState.PARKED)]
        assert await store.effects.commit(begun.token, effect_of(given)) == Outcome(Verdict.PARKED)
        turn = await head(store)
        assert (await store.parking.commit(turn, effect_of(turn))).verdict is Verdict.COMMITTED
        assert await standing(store, given) == Standing(ClaimState.DONE)

    async def test_of_which_the_lease_is_over_joins_the_queue_of_its_key(self, store: Store) -> None:
        """An earlier message of the key was parked by whoever had it before."""
        given, other = waiting(), waiting()
        await begin(store, given, lease_s=0)
        begun = await begin(store, other)
        (first,) = await queue_of(store, behind=0)
        assert await begin(store, given) == Standing(ClaimState.KEY_PARKED, started=True)
        found = await store.parking.follow(CONSUMER, [given, other])
        assert found == [Standing(ClaimState.PARKED, started=True), STARTED]
        assert await ids(store) == [first.envelope.id, given.envelope.id]
        assert (await store.effects.commit(begun.token, unit_of(other))).verdict is Verdict.COMMITTED

    async def test_stays_out_of_the_queue_of_a_key_that_is_free(self, store: Store) -> None:
        given = waiting()
        await begin(store, given, lease_s=0)
        assert await store.parking.follow(CONSUMER, [given]) == [STARTED]
        assert await store.parking.keys() == []

    async def test_is_remembered_when_it_is_given_up_and_when_it_is_redriven(self, store: Store) -> None:
        given = waiting()
        begun = await begin(store, given)
        letter = dead_letter(given.envelope.id)
        dead = replace(
            unit_of(given, state=ClaimState.DEAD, reply=reply(outcome=ReplyOutcome.DIED)), dead_letter=letter
        )
        assert (await store.effects.commit(begun.token, dead)).verdict is Verdict.COMMITTED
        found = await standing(store, given)
        assert (found.state, found.started, found.reply and found.reply.outcome) == (
            ClaimState.DEAD,
            True,
            ReplyOutcome.DIED,
        )
        assert await store.letters.settle(letter, Settlement(Settled.REDRIVEN, NOON)) is Settling.SETTLED
        assert await standing(store, given) == Standing(ClaimState.NEW, started=True)
        again = await begin(store, given)
        assert (again.state, again.started) == (ClaimState.NEW, True)
        assert again.token > begun.token
        assert await store.effects.commit(begun.token, effect_of(given)) == Outcome(Verdict.STARTED)

    async def test_is_forgotten_with_its_claim(self, store: Store) -> None:
        given, other = waiting(), waiting()
        begun = await begin(store, given)
        await begin(store, other)
        dead = unit_of(given, state=ClaimState.DEAD)
        assert (await store.effects.commit(begun.token, dead)).verdict is Verdict.COMMITTED
        assert (await store.inbox.forget(CONSUMER, older_than_s=-60)).gone == 1
        assert await standing(store, given) == NEW
        assert await standing(store, other) == STARTED
        assert (await begin(store, given)).token == begun.token

    async def test_is_remembered_when_its_undo_cancels_it_in_its_queue(self, store: Store) -> None:
        given = waiting()
        await begin(store, given)
        await store.parking.park(CONSUMER, given, WHY, due_at=NOON)
        unit = Unit(undo(given.envelope.id, Fence.CANCEL, key="u"))
        assert (await store.parking.cancel(CONSUMER, given.envelope.id, unit)).verdict is Verdict.COMMITTED
        assert await standing(store, given) == Standing(ClaimState.CANCELLED, started=True)


class TestInItsTurn:
    """A parked message is begun by whose turn it is: recorded beside its claim, which stays parked."""

    async def test_a_head_is_begun_and_its_commit_ends_it(self, store: Store) -> None:
        first, _ = await queue_of(store, behind=1)
        turn = await head(store)
        begun = await store.effects.begin(CONSUMER, first.envelope.id, "o-1", lease_s=600, parked=turn)
        assert (begun.state, begun.started) == (ClaimState.NEW, False)
        assert begun.token > 0
        assert await standing(store, first) == Standing(ClaimState.PARKED, started=True)
        assert (await store.parking.commit(turn, effect_of(turn))).verdict is Verdict.COMMITTED
        assert await standing(store, first) == Standing(ClaimState.DONE)

    async def test_it_is_told_what_may_have_happened_before(self, store: Store) -> None:
        given = waiting()
        before = await begin(store, given)
        await store.parking.park(CONSUMER, given, WHY, due_at=NOON)
        turn = await head(store)
        begun = await store.effects.begin(CONSUMER, given.envelope.id, "o-1", lease_s=600, parked=turn)
        assert (begun.state, begun.started) == (ClaimState.NEW, True)
        assert begun.token > before.token

    async def test_the_next_turn_waits_for_whoever_is_at_it(self, store: Store) -> None:
        (first,) = await queue_of(store, behind=0)
        id = first.envelope.id
        slow = await head(store, lease_s=0)
        begun = await store.effects.begin(CONSUMER, id, "o-1", lease_s=600, parked=slow)
        turn = await head(store)
        assert await store.effects.begin(CONSUMER, id, "o-1", lease_s=600, parked=turn) == STARTED
        await store.effects.release(CONSUMER, id, begun.token)
        again = await store.effects.begin(CONSUMER, id, "o-1", lease_s=600, parked=turn)
        assert (again.state, again.started) == (ClaimState.NEW, True)

    async def test_by_whom_it_is_not_the_turn_of_is_not_begun(self, store: Store) -> None:
        first, second = await queue_of(store, behind=1)
        slow, turn = await head(store, lease_s=0), await head(store)
        behind = (await store.parking.queue(CONSUMER, "o-1"))[1]
        for parked, of in ((slow, first), (behind, second), (replace(behind, token=turn.token), second)):
            found = await store.effects.begin(CONSUMER, of.envelope.id, "o-1", lease_s=600, parked=parked)
            assert found == Standing(ClaimState.PARKED)
        await store.parking.commit(turn, unit_of(turn))
        found = await store.effects.begin(CONSUMER, first.envelope.id, "o-1", lease_s=600, parked=turn)
        assert found.state is ClaimState.DONE
        with pytest.raises(BadUnit):
            await store.effects.begin(CONSUMER, second.envelope.id, "o-1", lease_s=600, parked=turn)

    async def test_it_stays_remembered_when_it_is_given_up_in_its_turn(self, store: Store) -> None:
        (first,) = await queue_of(store, behind=0)
        turn = await head(store)
        await store.effects.begin(CONSUMER, first.envelope.id, "o-1", lease_s=600, parked=turn)
        await store.parking.commit(turn, unit_of(turn, state=ClaimState.DEAD))
        assert await standing(store, first) == Standing(ClaimState.DEAD, started=True)


class TestCommitting:
    async def test_by_whom_it_was_begun_is_as_any_commit(self, store: Store) -> None:
        given = waiting()
        begun = await begin(store, given)
        unit = replace(effect_of(given), claim=claim(given.envelope.id, reply=reply()))
        outcome = await store.effects.commit(begun.token, unit)
        assert (outcome.verdict, outcome.versions) == (Verdict.COMMITTED, {stream("s"): 1})
        found = await standing(store, given)
        assert (found.state, found.started) == (ClaimState.DONE, False)
        assert found.reply is not None
        assert found.reply.token is not None
        assert found.reply.token.position == outcome.position
        again = await store.effects.commit(begun.token, unit)
        assert again.verdict is Verdict.DUPLICATE
        assert again.reply is not None
        assert (await begin(store, given)).state is ClaimState.DONE

    async def test_after_the_lease_is_fine_while_nobody_else_began(self, store: Store) -> None:
        given = waiting()
        begun = await begin(store, given, lease_s=0)
        assert (await store.effects.commit(begun.token, effect_of(given))).verdict is Verdict.COMMITTED

    async def test_by_the_first_after_a_second_began_writes_nothing(self, store: Store, twin: Store) -> None:
        given = waiting()
        late = await begin(store, given, lease_s=0)
        mine = await begin(twin, given)
        assert await store.effects.commit(late.token, effect_of(given)) == Outcome(Verdict.STARTED)
        assert await version(store, "s") == 0
        assert await standing(store, given) == STARTED
        assert (await twin.effects.commit(mine.token, effect_of(given))).verdict is Verdict.COMMITTED
        assert (await store.effects.commit(late.token, effect_of(given))).verdict is Verdict.DUPLICATE
        assert await version(store, "s") == 1

    async def test_that_conflicts_leaves_it_begun(self, store: Store) -> None:
        given = waiting()
        begun = await begin(store, given)
        outcome = await store.effects.commit(begun.token, effect_of(given, 7))
        assert outcome == Outcome(Verdict.CONFLICT, stream=stream("s"), expected=7, actual=0)
        assert await begin(store, given) == STARTED
        assert (await store.effects.commit(begun.token, effect_of(given))).verdict is Verdict.COMMITTED

    async def test_of_what_was_never_begun_writes_nothing(self, store: Store) -> None:
        given = waiting()
        assert await store.effects.commit(1, effect_of(given)) == Outcome(Verdict.STARTED)
        assert await standing(store, given) == NEW
        assert await version(store, "s") == 0
        with pytest.raises(BadUnit):
            await store.effects.commit(1, Unit())

    async def test_of_what_began_before_its_key_was_parked_is_written(self, store: Store) -> None:
        """It has happened outside: to put it off would only make it happen again."""
        given = waiting()
        begun = await begin(store, given)
        messages = await queue_of(store)
        assert (await store.effects.commit(begun.token, effect_of(given))).verdict is Verdict.COMMITTED
        assert await states(store, given, messages[0], waiting()) == ["done", "parked", "key-parked"]
        assert len(await ids(store)) == 3


class TestReleasing:
    async def test_lets_the_next_one_begin_at_once(self, store: Store) -> None:
        given = waiting()
        begun = await begin(store, given)
        await store.effects.release(CONSUMER, given.envelope.id, begun.token)
        assert await standing(store, given) == STARTED
        assert (await begin(store, given)).started

    async def test_somebody_elses_or_nothing_does_nothing(self, store: Store) -> None:
        given = waiting()
        late = await begin(store, given, lease_s=0)
        mine = await begin(store, given)
        await store.effects.release(CONSUMER, given.envelope.id, late.token)
        assert await begin(store, given) == STARTED
        await store.effects.release(CONSUMER, IDS.new(), mine.token)
        await store.effects.release("else", given.envelope.id, mine.token)
        assert await begin(store, given) == STARTED
