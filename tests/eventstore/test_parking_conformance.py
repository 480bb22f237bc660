"""Parked keys on every store: what joins a queue, in which order, and what a commit says of it."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from bus.envelope import Failure, Kind, ReplyOutcome, ReplyTo, StreamId, Token
from bus.transport import Assignment, Delivery
from eventstore.errors import BadUnit
from eventstore.parking import Parked, Waiting
from eventstore.port import (
    ClaimState,
    Fence,
    Outcome,
    Standing,
    Store,
    Unit,
    Verdict,
)
from tests.eventstore.parked import WHY, effect_of, failed, head, ids, queue_of, states, unit_of, waiting
from tests.eventstore.stores import (
    CONSUMER,
    IDS,
    NOON,
    append,
    claim,
    commit,
    message,
    one,
    reply,
    stream,
    timer,
    undo,
    verdicts,
    version,
)

PARKED = Standing(ClaimState.PARKED)
EPOCH = NOON - timedelta(days=1)


class TestWhileAKeyIsParked:
    async def test_its_message_and_all_that_are_new_of_the_key_are_parked_for_a_commit(self, store: Store) -> None:
        messages = await queue_of(store, behind=1)
        outcomes = await store.commit(
            [effect_of(messages[0]), unit_of(messages[1]), Unit(claim()), Unit(claim(key="x"))]
        )
        assert verdicts(outcomes) == ["parked", "parked", "parked", "ok"]
        assert outcomes[0] == outcomes[2] == Outcome(Verdict.PARKED)
        assert await version(store, "s") == 0

    async def test_a_lone_unit_of_the_key_is_parked(self, store: Store) -> None:
        """The lean path of a lone caller."""
        (first,) = await queue_of(store, behind=0)
        new = claim()
        for unit in (effect_of(first), Unit(new, appends=(append("s", 0),)), Unit(new)):
            assert await one(store, unit) == Outcome(Verdict.PARKED)
        assert await version(store, "s") == 0
        assert (await store.examine(CONSUMER, [(new.message_id, "x")])) == [Standing(ClaimState.NEW)]

    async def test_a_parked_unit_takes_along_followers_of_its_streams_and_nobody_else(self, store: Store) -> None:
        (first,) = await queue_of(store, behind=0)
        outcomes = await store.commit(
            [
                effect_of(first),
                Unit(claim(key="a"), appends=(append("s", 0),)),
                Unit(claim(key="b"), asserts=((stream("s"), 0),)),
                Unit(claim(key="a")),
                Unit(appends=(append("s", 0),)),
                Unit(claim(key="c"), appends=(append("t", 0),)),
            ]
        )
        assert verdicts(outcomes) == ["parked", "conflict", "conflict", "conflict", "conflict", "ok"]
        assert outcomes[1] == Outcome(Verdict.CONFLICT)

    async def test_a_unit_whose_key_is_parked_takes_along_followers_of_its_streams(self, store: Store) -> None:
        await queue_of(store, behind=0)
        units = [Unit(claim(), appends=(append("s", 0),)), Unit(claim(key="a"), appends=(append("s", 0),))]
        assert await commit(store, *units) == ["parked", "conflict"]
        assert await commit(store, units[1]) == ["ok"]

    async def test_what_is_done_is_a_duplicate_all_the_same(self, store: Store) -> None:
        done = claim(reply=reply())
        await one(store, Unit(done))
        await queue_of(store)
        outcome = await one(store, Unit(done))
        assert outcome.verdict is Verdict.DUPLICATE
        assert outcome.reply is not None

    async def test_another_consumers_messages_of_the_key_are_not(self, store: Store) -> None:
        await queue_of(store)
        assert await commit(store, Unit(claim(consumer="else"))) == ["ok"]
        assert await store.examine("else", [(IDS.new(), "o-1")]) == [Standing(ClaimState.NEW)]

    async def test_units_without_a_claim_are_not(self, store: Store) -> None:
        await queue_of(store)
        assert await commit(store, Unit(appends=(append("o-1", 0),))) == ["ok"]

    async def test_examine_and_take_say_so(self, store: Store) -> None:
        first, second = await queue_of(store, behind=1)
        new = IDS.new()
        asked = [(first.envelope.id, "o-1"), (second.envelope.id, "o-1"), (new, "o-1"), (new, "x")]
        found = await store.examine(CONSUMER, asked)
        assert found == [PARKED, PARKED, Standing(ClaimState.KEY_PARKED), Standing(ClaimState.NEW)]
        async with store.transaction() as tx:
            assert await store.take(tx, CONSUMER, first.envelope.id) == PARKED
            assert await store.take(tx, CONSUMER, new) == Standing(ClaimState.NEW)
            assert await store.take(tx, CONSUMER, new, key="o-1") == Standing(ClaimState.KEY_PARKED)
            assert await store.take(tx, CONSUMER, new, key="x") == Standing(ClaimState.NEW)
            assert verdicts(await store.commit([Unit(claim(new))], tx=tx)) == ["parked"]

    async def test_a_step_is_looked_for_under_its_own_key_and_not_its_undos(self, store: Store) -> None:
        await queue_of(store, "u", behind=0)
        step = waiting("s")
        undoing = Unit(undo(step.envelope.id, Fence.CANCEL, key="u"))
        assert await commit(store, undoing, unit_of(step)) == ["parked", "ok"]
        await queue_of(store, "t", behind=0)
        step = waiting("t")
        undoing = Unit(undo(step.envelope.id, Fence.EXPECT_DONE, key="v"))
        assert await commit(store, undoing, unit_of(step)) == ["conflict", "parked"]

    @pytest.mark.parametrize("fence", list(Fence))
    async def test_an_undo_of_a_parked_step_is_a_conflict_for_an_ordinary_commit(
        self, store: Store, fence: Fence
    ) -> None:
        (step,) = await queue_of(store, behind=0)
        assert await commit(store, Unit(undo(step.envelope.id, fence, key="u"))) == ["conflict"]
        assert await commit(store, Unit(undo(step.envelope.id, fence))) == ["parked"]
        assert await ids(store) == [step.envelope.id]


class TestParking:
    async def test_gives_back_what_it_was_given_to_the_byte(self, store: Store) -> None:
        odd = Delivery(
            Assignment("shop.commands", 3, 0),
            2**40,
            b"\x00\xff",
            b"\x00 other bytes \xff",
            (("ce_id", b"\xfe"), ("ce_id", b""), ("\udcff", b"again")),
            NOON + timedelta(microseconds=1),
        )
        full = replace(
            message(topic="shop.commands"),
            causation_id=IDS.new(),
            epoch=3,
            reply_to=ReplyTo("front.inbox", "front-1", "i"),
            deadline=NOON,
            undoes=IDS.new(),
            tenant="t",
            actor="a",
            token=Token("shop", 1, "k", 7, 6),
            stream=StreamId("order", "o-1"),
            version=4,
            position=9,
            headers={"b": "\u2028", "a": "2"},
            data=b"\x00\xff",
        )
        answer = replace(message(), kind=Kind.REPLY, outcome=ReplyOutcome.REFUSED, data=b"")
        why = Failure("Value\x00Error", "half a pair: \ud800", "Trace\nback", 7, EPOCH, NOON, "")
        given = [
            Waiting(full, odd),
            Waiting(answer, replace(odd, key=None, value=None, headers=())),
            Waiting(replace(message(), data=b""), replace(odd, value=b"")),
            Waiting(message(topic=None)),
            waiting(),
        ]
        assert await store.parking.park(CONSUMER, given[0], why, due_at=NOON) == PARKED
        assert await store.parking.follow(CONSUMER, given[1:]) == [PARKED] * 4
        found = await store.parking.queue(CONSUMER, "o-1")
        assert [one.message for one in found] == given
        assert [one.failure for one in found] == [why, None, None, None, None]
        assert {(one.consumer, one.key, one.token) for one in found} == {(CONSUMER, "o-1", 0)}
        parked = await head(store)
        assert (parked.message, parked.failure, parked.parked_at) == (given[0], why, found[0].parked_at)
        assert parked.parked_at.tzinfo is not None

    async def test_forgets_the_epoch_of_an_assignment(self, store: Store) -> None:
        given = waiting()
        assert given.delivery is not None
        mine = replace(given.delivery, assignment=Assignment("shop.commands", 3, 17))
        await store.parking.park(CONSUMER, replace(given, delivery=mine), WHY, due_at=NOON)
        assert (await head(store)).message == given

    async def test_a_second_time_changes_nothing(self, store: Store) -> None:
        first, second = await queue_of(store, behind=1)
        before = await store.parking.keys()
        for again in (first, second):
            assert await store.parking.park(CONSUMER, again, failed(9), due_at=None) == PARKED
        assert await store.parking.keys() == before
        assert (await head(store)).failure == WHY

    async def test_a_failed_message_of_a_parked_key_goes_to_the_end_with_its_failure(self, store: Store) -> None:
        messages = await queue_of(store, behind=1)
        last = waiting()
        assert await store.parking.park(CONSUMER, last, failed(5), due_at=None) == PARKED
        assert await ids(store) == [one.envelope.id for one in (*messages, last)]
        (key,) = await store.parking.keys()
        assert (key.due_at, key.waiting) == (NOON, 3)
        assert (await store.parking.queue(CONSUMER, "o-1"))[-1].failure == failed(5)

    @pytest.mark.parametrize("state", [ClaimState.DONE, ClaimState.DEAD, ClaimState.CANCELLED])
    async def test_what_somebody_dealt_with_is_not_parked(self, store: Store, state: ClaimState) -> None:
        given = waiting()
        if state is ClaimState.CANCELLED:
            await one(store, Unit(undo(given.envelope.id, Fence.CANCEL)))
        else:
            await one(store, unit_of(given, state=state, reply=reply()))
        standing = await store.parking.park(CONSUMER, given, WHY, due_at=NOON)
        assert standing.state is state
        assert (standing.reply is None) is (state is ClaimState.CANCELLED)
        assert (await store.parking.follow(CONSUMER, [given])) == [standing]
        assert await store.parking.keys() == []
        assert await states(store, waiting()) == ["new"]

    async def test_takes_its_timer_away(self, store: Store) -> None:
        """Or it would come up again at the end of every lease, while the queue has it."""
        due, behind, other = (timer(NOON) for _ in range(3))
        await one(store, Unit(timers=(due, behind, other)))
        messages = [Waiting(replace(one.envelope, id=one.id)) for one in (due, behind)]
        await store.parking.park(CONSUMER, messages[0], WHY, due_at=NOON)
        await store.parking.follow(CONSUMER, messages[1:])
        assert [one.id for one in await store.timers.due(limit=10)] == [other.id]

    async def test_a_key_may_be_as_long_as_a_record(self, store: Store) -> None:
        long, other = "k" * 1_000_000, "k" * 999_999 + "l"
        given = waiting(long)
        await store.parking.park(CONSUMER, given, WHY, due_at=NOON)
        assert await commit(store, Unit(claim(key=long)), Unit(claim(key=other))) == ["parked", "ok"]
        parked = await head(store)
        assert (parked.key, parked.message) == (long, given)
        assert (await store.parking.commit(parked, unit_of(parked))).verdict is Verdict.COMMITTED
        assert await commit(store, Unit(claim(key=long))) == ["ok"]

    @pytest.mark.parametrize(
        "wrong",
        [
            Waiting(replace(message(), key="nul\x00")),
            Waiting(replace(message(), time=NOON.replace(tzinfo=None))),
            replace(waiting(), delivery=Delivery(Assignment("t", 0), 0, b"", b"", (), NOON.replace(tzinfo=None))),
        ],
    )
    async def test_a_message_that_no_database_holds_is_refused(self, store: Store, wrong: Waiting) -> None:
        with pytest.raises(BadUnit):
            await store.parking.park(CONSUMER, wrong, WHY, due_at=NOON)
        with pytest.raises(BadUnit):
            await store.parking.follow(CONSUMER, [waiting(), wrong])
        with pytest.raises(BadUnit):
            await store.parking.park("", waiting(), WHY, due_at=NOON)
        with pytest.raises(BadUnit):
            await store.parking.park(
                CONSUMER, waiting(), replace(WHY, failed_at=NOON.replace(tzinfo=None)), due_at=NOON
            )
        with pytest.raises(ValueError, match="without a time zone"):
            await store.parking.park(CONSUMER, waiting(), WHY, due_at=NOON.replace(tzinfo=None))
        assert await store.parking.keys() == []


class TestFollowing:
    async def test_keeps_the_order_given_within_each_key(self, store: Store) -> None:
        await store.parking.park(CONSUMER, a := waiting("a"), WHY, due_at=NOON)
        await store.parking.park(CONSUMER, b := waiting("b"), WHY, due_at=NOON)
        more = [waiting("ab"[nth % 2]) for nth in range(6)]
        assert await store.parking.follow(CONSUMER, more) == [PARKED] * 6
        assert await ids(store, "a") == [one.envelope.id for one in (a, *more[0::2])]
        assert await ids(store, "b") == [one.envelope.id for one in (b, *more[1::2])]

    async def test_answers_for_each_how_it_stands(self, store: Store) -> None:
        first, second = await queue_of(store, behind=1)
        done, free, new = waiting(), waiting("free"), waiting()
        await store.parking.commit(await head(store), unit_of(first))
        await one(store, Unit(claim(done.envelope.id, "elsewhere")))
        found = await store.parking.follow(CONSUMER, [second, done, free, new, new])
        assert [str(one.state) for one in found] == ["parked", "done", "new", "parked", "parked"]
        assert await ids(store) == [second.envelope.id, new.envelope.id]
        assert await states(store, free) == ["new"]
        assert await store.parking.follow(CONSUMER, []) == []

    async def test_a_key_that_is_free_again_takes_nobody(self, store: Store) -> None:
        (first,) = await queue_of(store, behind=0)
        late = waiting()
        assert await commit(store, unit_of(late)) == ["parked"]
        await store.parking.commit(await head(store), unit_of(first))
        assert await store.parking.follow(CONSUMER, [late]) == [Standing(ClaimState.NEW)]
        assert await commit(store, unit_of(late)) == ["ok"]


class TestLooking:
    async def test_keys_come_in_pages_in_order_of_consumer_and_key(self, store: Store) -> None:
        await store.parking.park("else", waiting("z"), WHY, due_at=None)
        heads = {key: (await queue_of(store, key, behind=nth))[0] for nth, key in enumerate(["b", "a", "ö", "B"])}
        found = await store.parking.keys()
        assert [(one.consumer, one.key, one.waiting) for one in found] == [
            ("else", "z", 1),
            (CONSUMER, "B", 4),
            (CONSUMER, "a", 2),
            (CONSUMER, "b", 1),
            (CONSUMER, "ö", 3),
        ]
        assert [one.due_at for one in found] == [None, NOON, NOON, NOON, NOON]
        assert [one.head.message for one in found[1:]] == [heads[one.key] for one in found[1:]]
        assert [one.since for one in found] == [one.head.parked_at for one in found]
        assert await store.parking.keys(limit=2) == found[:2]
        assert await store.parking.keys(after=(found[1].consumer, found[1].key), limit=2) == found[2:4]
        assert await store.parking.keys(consumer="else") == found[:1]
        assert await store.parking.keys(consumer=CONSUMER, after=(CONSUMER, "b")) == found[4:]
        assert await store.parking.keys(consumer="nobody") == []
        with pytest.raises(ValueError, match="limit"):
            await store.parking.keys(limit=0)

    async def test_a_queue_comes_in_pages_from_its_head(self, store: Store) -> None:
        messages = await queue_of(store, behind=4)
        await queue_of(store, "other")
        found: list[Parked] = list(await store.parking.queue(CONSUMER, "o-1", limit=2))
        found += await store.parking.queue(CONSUMER, "o-1", after=found[-1].number, limit=2)
        found += await store.parking.queue(CONSUMER, "o-1", after=found[-1].number)
        assert [one.message for one in found] == messages
        assert await store.parking.queue(CONSUMER, "o-1", after=found[-1].number) == []
        assert await store.parking.queue("else", "o-1") == []
        with pytest.raises(ValueError, match="limit"):
            await store.parking.queue(CONSUMER, "o-1", limit=0)

    async def test_what_is_parked_is_there_when_the_store_is_opened_again(self, store: Store, twin: Store) -> None:
        messages = await queue_of(store)
        assert [one.message for one in await twin.parking.queue(CONSUMER, "o-1")] == messages
        assert await commit(twin, Unit(claim())) == ["parked"]
        parked = await head(twin)
        assert await store.parking.due(consumers=[CONSUMER], limit=1, lease_s=1) == []
        assert (await twin.parking.commit(parked, unit_of(parked))).verdict is Verdict.COMMITTED
