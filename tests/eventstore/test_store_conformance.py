"""What every store promises about commits. The rules are written down at the tests; no adapter has its own."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import uuid4

import pytest

from bus.envelope import Envelope, Kind, ReplyOutcome, ReplyTo, StreamId, Token
from eventstore.errors import BadUnit
from eventstore.port import (
    ANY,
    Append,
    CancelTimer,
    Claim,
    ClaimState,
    Fence,
    Standing,
    Store,
    Unit,
    Verdict,
    Watermark,
)
from tests.eventstore.stores import (
    CONSUMER,
    IDS,
    NOON,
    SERVICE,
    Backend,
    append,
    claim,
    commit,
    dead_letter,
    event,
    message,
    one,
    reply,
    stream,
    timer,
    verdicts,
    version,
    wanted,
    whole_log,
)

# --- what goes in comes out ------------------------------------------------------------------------------------------


def loaded_envelope(key: str = "ö-1") -> Envelope:
    """One with everything set."""
    return Envelope(
        id=IDS.new(),
        kind=Kind.EVENT,
        type="shop.order-placed.v1",
        source=SERVICE,
        key=key,
        data=b'{"b": 1e2, "a":"\xc3\xa9", "a":2}\n\xff\x00',
        time=datetime(1999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
        correlation_id=IDS.new(),
        causation_id=IDS.new(),
        reply_to=ReplyTo("front.inbox", "front-ß", "i-7"),
        deadline=datetime(2026, 7, 1, 0, 0, 0, 1, tzinfo=timezone(timedelta(hours=5, minutes=30))),
        undoes=IDS.new(),
        outcome=ReplyOutcome.REFUSED,
        token=Token("else", 3, "k", 17, 16),
        tenant="acme",
        actor="anna",
        topic="shop.events",
        headers={"traceparent": "00-ab", "b": "", "a": "ü"},
    )


async def test_an_event_is_read_back_to_the_last_byte_and_header(store: Store) -> None:
    rich, plain = loaded_envelope(), event("ö-1", public=False, data=b"")
    place = stream("ö-1", "ord-er")
    outcome = await one(store, Unit(appends=(Append(place, 0, (rich, plain)),)))
    (found,) = await store.load([wanted(place)])
    first = replace(rich, stream=place, version=1, position=outcome.public)
    second = replace(plain, stream=place, version=2, position=outcome.position)
    assert list(found.records) == [first, second]
    assert list(found.records[0].headers.items()) == list(rich.headers.items())
    assert found.records[0].deadline is not None
    assert found.records[0].deadline.utcoffset() == timedelta(0)
    assert await whole_log(store) == [first, second]


async def test_an_outgoing_message_and_a_stored_reply_are_read_back_to_the_last_header(store: Store) -> None:
    sent, answer = (
        replace(loaded_envelope(), kind=Kind.COMMAND),
        replace(loaded_envelope(), token=None, kind=Kind.REPLY),
    )
    made = claim(reply=answer)
    outcome = await one(store, Unit(made, outgoing=(sent,)))
    answer = replace(answer, token=Token(SERVICE, store.epoch, made.key, 0, 0))
    assert outcome.position == 0
    first, second = await whole_log(store)
    assert first == replace(sent, position=first.position)
    assert second == replace(answer, position=second.position)
    assert (await store.examine(CONSUMER, [(made.message_id, made.key)])) == [Standing(ClaimState.DONE, answer)]


async def test_the_epoch_of_the_log_is_stored_with_what_its_own_service_made_and_foreign_ones_stay(
    store: Store,
) -> None:
    foreign = replace(message(), source="else", epoch=7)
    await one(store, Unit(appends=(append("o-1", 0),), outgoing=(foreign, message())))
    assert [envelope.epoch for envelope in await whole_log(store)] == [store.epoch, 7, store.epoch]


# --- positions, versions, tokens -------------------------------------------------------------------------------------


async def test_within_a_call_positions_follow_units_and_within_a_unit_events_come_first_then_outgoing_then_the_reply(
    store: Store,
) -> None:
    a, b, c, d, e, f = event("a"), event("b"), message("x"), message("y"), event("a"), message("z")
    answer = reply()
    outcomes = await store.commit(
        [
            Unit(
                claim(reply=answer),
                appends=(Append(stream("b"), 0, (b,)), Append(stream("a"), 0, (a,))),
                outgoing=(d, c),
            ),
            Unit(outgoing=(f,), appends=(Append(stream("a"), 1, (e,)),)),
        ]
    )
    log = await whole_log(store)
    assert [record.id for record in log] == [one.id for one in (b, a, d, c, answer, e, f)]
    positions = [record.position or 0 for record in log]
    assert positions == sorted(set(positions))
    assert positions[0] > 0
    assert [outcome.position for outcome in outcomes] == [positions[1], positions[5]]


async def test_an_outcome_names_the_last_event_the_last_public_one_and_the_new_versions(store: Store) -> None:
    public, private = event("o-1"), event("o-2", public=False)
    outcome = await one(
        store,
        Unit(appends=(Append(stream("o-1"), 0, (public, public_twin := event("o-1"))), append("o-2", 0, private))),
    )
    at = {record.id: record.position for record in await whole_log(store)}
    assert outcome.position == at[private.id]
    assert outcome.public == at[public_twin.id]
    assert outcome.versions == {stream("o-1"): 2, stream("o-2"): 1}
    assert outcome.reply is None
    silent = await one(store, Unit(appends=(append("o-3", 0, 2, public=False),), outgoing=(message(),)))
    assert silent.public == 0
    assert silent.position > outcome.position


async def test_a_reply_is_stamped_with_where_its_unit_ended_stored_with_the_claim_and_published_with_the_unit(
    store: Store,
) -> None:
    answer = reply()
    made = claim(key="o-1", reply=answer)
    outcome = await one(
        store, Unit(made, appends=(append("o-1", 0), append("o-2", 0, 1, public=False)), outgoing=(message(),))
    )
    stamped = replace(answer, token=Token(SERVICE, store.epoch, "o-1", outcome.position, outcome.public))
    assert 0 < outcome.public < outcome.position
    last = (await whole_log(store))[-1]
    assert last == replace(stamped, position=last.position)
    again = await one(store, Unit(made, appends=(append("o-1", 0),)))
    assert (again.verdict, again.reply) == (Verdict.DUPLICATE, stamped)
    assert await store.examine(CONSUMER, [(made.message_id, "o-1")]) == [Standing(ClaimState.DONE, stamped)]


async def test_a_reply_without_a_topic_is_stored_with_the_claim_and_not_published(store: Store) -> None:
    made = claim(reply=reply(topic=None, outcome=ReplyOutcome.REFUSED))
    await one(store, Unit(made))
    assert await whole_log(store) == []
    (standing,) = await store.examine(CONSUMER, [(made.message_id, "o-1")])
    assert standing.reply is not None
    assert standing.reply.outcome is ReplyOutcome.REFUSED


async def test_two_categories_with_the_same_id_are_two_streams(store: Store) -> None:
    left, right = StreamId("a", "b-c"), StreamId("a-b", "c")
    assert await commit(store, Unit(appends=(append(left, 0), append(right, 0, 2)))) == ["ok"]
    assert [slice.version for slice in await store.load([wanted(left), wanted(right)])] == [1, 2]


async def test_five_hundred_units_on_one_stream_in_one_call_chain_without_a_gap(store: Store) -> None:
    units = [Unit(claim(reply=reply()), appends=(append("hot", n),)) for n in range(500)]
    outcomes = await store.commit(units)
    assert verdicts(outcomes) == ["ok"] * 500
    assert [outcome.versions[stream("hot")] for outcome in outcomes] == list(range(1, 501))
    (slice,) = await store.load([wanted("hot")])
    assert [record.version for record in slice.records] == list(range(1, 501))
    assert [record.position for record in slice.records] == sorted(record.position or 0 for record in slice.records)


async def test_an_empty_call_does_nothing(store: Store) -> None:
    assert list(await store.commit([])) == []
    assert await store.head() == 0


# --- expected versions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expected", [0, 1, 3, 9])
async def test_an_append_at_any_but_the_current_version_appends_nothing_and_says_what_was_found(
    store: Store, expected: int
) -> None:
    await one(store, Unit(appends=(append("o-1", 0, 2),)))
    outcome = await one(
        store, Unit(claim(), appends=(append("o-2", 0), append("o-1", expected, 2)), outgoing=(message(),))
    )
    assert outcome.verdict is Verdict.CONFLICT
    assert (outcome.stream, outcome.expected, outcome.actual) == (stream("o-1"), expected, 2)
    assert (outcome.position, outcome.public, outcome.versions) == (0, 0, {})
    assert len(await whole_log(store)) == 2
    assert await version(store, "o-2") == 0


async def test_any_appends_at_the_current_version_also_within_a_call(store: Store) -> None:
    outcomes = await store.commit(
        [Unit(appends=(append("o-1", ANY, 2),)), Unit(appends=(append("o-1", 2),)), Unit(appends=(append("o-1", ANY),))]
    )
    assert [outcome.versions for outcome in outcomes] == [{stream(): 2}, {stream(): 3}, {stream(): 4}]


async def test_an_assert_holds_a_decision_to_the_version_it_read(store: Store) -> None:
    await one(store, Unit(appends=(append("o-1", 0),)))
    stale = claim(key="stale")
    outcome = await one(store, Unit(stale, asserts=((stream("o-1"), 1), (stream("o-2"), 3))))
    assert (outcome.verdict, outcome.stream, outcome.expected, outcome.actual) == (
        Verdict.CONFLICT,
        stream("o-2"),
        3,
        0,
    )
    assert await store.examine(CONSUMER, [(stale.message_id, "stale")]) == [Standing(ClaimState.NEW)]
    assert await commit(store, Unit(claim(key="good"), asserts=((stream("o-1"), 1), (stream("o-2"), 0)))) == ["ok"]


async def test_an_assert_is_about_the_version_before_the_unit_and_after_earlier_units(store: Store) -> None:
    assert await commit(
        store,
        Unit(claim(key="a"), appends=(append("o-1", 0),), asserts=((stream("o-1"), 0),)),
        Unit(claim(key="b"), asserts=((stream("o-1"), 1),)),
    ) == ["ok", "ok"]


async def test_the_first_mismatch_is_named_appends_before_asserts(store: Store) -> None:
    outcome = await one(
        store, Unit(appends=(append("o-1", 0), append("o-2", 4)), asserts=((stream("o-3"), 5), (stream("o-1"), 7)))
    )
    assert (outcome.stream, outcome.expected, outcome.actual) == (stream("o-2"), 4, 0)


@pytest.mark.parametrize("round_", range(5))
async def test_of_two_writers_racing_on_one_stream_one_wins_and_the_other_is_told(
    store: Store, twin: Store, round_: int
) -> None:
    await one(store, Unit(appends=(append("o-1", 0, round_ + 1),)))
    at = round_ + 1
    both = await asyncio.gather(
        *(one(where, Unit(claim(key=str(n)), appends=(append("o-1", at),))) for n, where in enumerate((store, twin)))
    )
    assert sorted(verdicts(both)) == ["conflict", "ok"]
    loser = next(outcome for outcome in both if outcome.verdict is Verdict.CONFLICT)
    assert (loser.stream, loser.expected, loser.actual) == (stream("o-1"), at, at + 1)
    assert await version(store) == at + 1


async def test_many_writers_on_few_streams_from_two_stores_lose_nothing_and_never_lock_each_other_out(
    store: Store, twin: Store
) -> None:
    """Overlapping streams in opposite orders: what was acknowledged is what is stored."""
    acknowledged: list[Any] = []

    async def writer(where: Store, n: int) -> None:
        names = ["a", "b", "c", "d"] if n % 2 else ["d", "c", "b", "a"]
        for _ in range(6):
            slices = await where.load([wanted(name) for name in names])
            appends = tuple(append(slice.stream, slice.version) for slice in slices)
            outcome = await one(where, Unit(claim(key=f"w{n}"), appends=appends))
            if outcome.verdict is Verdict.COMMITTED:
                acknowledged.extend(one.envelopes[0].id for one in appends)

    await asyncio.gather(*(writer(where, n) for n, where in enumerate((store, twin) * 5)))
    log = await whole_log(store)
    assert {record.id for record in log} == set(acknowledged)
    assert len(acknowledged) >= 4 * 6
    for name in "abcd":
        (slice,) = await store.load([wanted(name)])
        assert [record.version for record in slice.records] == list(range(1, slice.version + 1))


# --- claims ----------------------------------------------------------------------------------------------------------


async def test_a_message_id_is_taken_once_per_consumer(store: Store) -> None:
    id = IDS.new()
    assert await commit(store, Unit(claim(id), appends=(append("o-1", 0),))) == ["ok"]
    assert await commit(store, Unit(claim(id), appends=(append("o-1", 1),), outgoing=(message(),))) == ["duplicate"]
    assert await commit(store, Unit(claim(id, consumer="else"), appends=(append("o-1", 1),))) == ["ok"]
    assert len(await whole_log(store)) == 2


async def test_the_same_message_twice_in_one_call_is_written_once_and_answered_with_the_same_reply(
    store: Store,
) -> None:
    made = claim(reply=reply())
    first, second = await store.commit([Unit(made, appends=(append("o-1", 0),)), Unit(made, outgoing=(message(),))])
    assert (first.verdict, second.verdict) == (Verdict.COMMITTED, Verdict.DUPLICATE)
    assert second.reply is not None
    assert second.reply.token == Token(SERVICE, store.epoch, "o-1", first.position, first.public)
    assert len(await whole_log(store)) == 2


@pytest.mark.parametrize("round_", range(5))
async def test_a_message_delivered_to_two_workers_at_once_has_one_effect(
    store: Store, twin: Store, round_: int
) -> None:
    made = claim(reply=reply())
    both = await asyncio.gather(
        one(store, Unit(made, appends=(append("a", 0),))), one(twin, Unit(made, appends=(append("b", 0),)))
    )
    assert sorted(verdicts(both)) == ["duplicate", "ok"]
    duplicate = next(outcome for outcome in both if outcome.verdict is Verdict.DUPLICATE)
    assert duplicate.reply is not None
    assert duplicate.reply.token is not None
    assert len(await whole_log(store, outgoing=False)) == 1


async def test_a_lost_unit_gives_its_claim_back(store: Store) -> None:
    made = claim()
    assert await commit(store, Unit(made, appends=(append("o-1", 4),))) == ["conflict"]
    assert await commit(store, Unit(made, appends=(append("o-1", 0),))) == ["ok"]


async def test_a_message_given_up_is_dead_with_its_bytes_and_answers_duplicate_with_its_reply(store: Store) -> None:
    died = reply(outcome=ReplyOutcome.DIED)
    letter = dead_letter()
    made = claim(letter.id, state=ClaimState.DEAD, reply=died)
    assert await commit(store, Unit(made, dead_letter=letter)) == ["ok"]
    (standing,) = await store.examine(CONSUMER, [(letter.id, "o-1")])
    assert (standing.state, standing.reply) == (
        ClaimState.DEAD,
        replace(died, token=Token(SERVICE, store.epoch, "o-1", 0, 0)),
    )
    again = await one(store, Unit(claim(letter.id), appends=(append("o-1", 0),)))
    assert (again.verdict, again.reply) == (Verdict.DUPLICATE, standing.reply)
    assert list(await store.dead_letters()) == [letter]


async def test_examine_answers_in_the_order_asked_also_twice_and_for_many(store: Store) -> None:
    made = [claim(key=str(n), reply=reply() if n % 2 else None) for n in range(700)]
    await store.commit([Unit(one) for one in made])
    asked = [(IDS.new(), "new"), *((one.message_id, one.key) for one in reversed(made)), (made[3].message_id, "3")]
    standings = await store.examine(CONSUMER, asked)
    assert [one.state for one in standings] == [ClaimState.NEW] + [ClaimState.DONE] * 701
    assert [one.reply is not None for one in standings[1:-1]] == [n % 2 == 1 for n in reversed(range(700))]
    assert standings[-1].reply is not None
    assert list(await store.examine("else", [(made[0].message_id, "0")])) == [Standing(ClaimState.NEW)]
    assert list(await store.examine(CONSUMER, [])) == []


# --- losers and who follows them -------------------------------------------------------------------------------------


async def test_a_loser_takes_along_later_units_of_its_key_and_of_its_streams_and_nobody_else(store: Store) -> None:
    await one(store, Unit(appends=(append("taken", 0),)))
    outcomes = await store.commit(
        [
            Unit(claim(key="before"), appends=(append("s-0", 0),)),
            Unit(claim(key="k"), appends=(append("s-1", 0), append("taken", 0)), asserts=((stream("s-2"), 0),)),
            Unit(claim(key="k"), appends=(append("s-3", 0),)),
            Unit(claim(key="k2"), appends=(append("s-1", 0),)),
            Unit(claim(key="k3"), asserts=((stream("s-2"), 0),)),
            Unit(appends=(append("s-1", ANY),)),
            Unit(claim(key="k", consumer="else"), appends=(append("s-4", 0),)),
            Unit(claim(key="before"), appends=(append("s-0", 1),)),
            Unit(claim(key="k4"), appends=(append("s-5", 0),)),
        ]
    )
    assert verdicts(outcomes) == ["ok", "conflict", "conflict", "conflict", "conflict", "conflict", "ok", "ok", "ok"]
    first, *others = [outcome for outcome in outcomes if outcome.verdict is Verdict.CONFLICT]
    assert (first.stream, first.expected, first.actual) == (stream("taken"), 0, 1)
    assert {(other.stream, other.expected, other.actual) for other in others} == {(None, None, None)}
    assert [await version(store, f"s-{n}") for n in range(6)] == [2, 0, 0, 0, 1, 1]


async def test_followers_are_taken_along_transitively(store: Store) -> None:
    outcomes = await commit(
        store,
        Unit(claim(key="a"), appends=(append("s-1", 9),)),
        Unit(claim(key="b"), appends=(append("s-2", 0),), asserts=((stream("s-1"), 0),)),
        Unit(claim(key="c"), appends=(append("s-3", 0), append("s-2", 0))),
        Unit(claim(key="c")),
        Unit(claim(key="d"), asserts=((stream("s-3"), 0),)),
        Unit(claim(key="e"), asserts=((stream("s-4"), 0),)),
    )
    assert outcomes == ["conflict"] * 5 + ["ok"]


async def test_a_loser_without_a_claim_takes_along_its_streams_only(store: Store) -> None:
    assert await commit(
        store,
        Unit(appends=(append("o-1", 9),)),
        Unit(claim(key="o-1"), appends=(append("o-2", 0),)),
        Unit(claim(key="x"), appends=(append("o-1", 0),)),
    ) == ["conflict", "ok", "conflict"]


async def test_losers_of_one_call_are_forgotten_in_the_next(store: Store) -> None:
    unit = Unit(claim(key="a"), appends=(append("o-1", 9),))
    assert await commit(store, unit) == ["conflict"]
    assert await commit(store, Unit(claim(key="a"), appends=(append("o-1", 0),))) == ["ok"]


async def test_a_duplicate_in_the_middle_of_a_chain_takes_nobody_along_whose_versions_still_fit(store: Store) -> None:
    done = claim(key="k")
    await one(store, Unit(done, appends=(append("o-1", 0),)))
    assert await commit(
        store,
        Unit(claim(key="k"), appends=(append("o-1", 1),)),
        Unit(done, appends=(append("o-1", 2),)),
        Unit(claim(key="k"), appends=(append("o-1", 2),)),
        Unit(claim(key="k"), appends=(append("o-2", 0),)),
    ) == ["ok", "duplicate", "ok", "ok"]
    assert await version(store) == 3


async def test_a_follower_that_counted_on_a_duplicates_events_conflicts_by_its_version(store: Store) -> None:
    done = claim(key="k")
    await one(store, Unit(done, appends=(append("o-1", 0),)))
    first, second, third = await store.commit(
        [
            Unit(done, appends=(append("o-1", 1),)),
            Unit(claim(key="k"), appends=(append("o-1", 2),)),
            Unit(claim(key="k"), appends=(append("o-1", 1),)),
        ]
    )
    assert (first.verdict, second.verdict, third.verdict) == (Verdict.DUPLICATE, Verdict.CONFLICT, Verdict.CONFLICT)
    assert (second.stream, second.expected, second.actual) == (stream(), 2, 1)


async def test_a_duplicate_behind_a_loser_of_its_key_is_still_answered_as_what_it_is(store: Store) -> None:
    done = claim(key="k", reply=reply())
    await one(store, Unit(done))
    lost, duplicate = await store.commit([Unit(claim(key="k"), appends=(append("o-1", 9),)), Unit(done)])
    assert (lost.verdict, duplicate.verdict) == (Verdict.CONFLICT, Verdict.DUPLICATE)
    assert duplicate.reply is not None


async def test_the_same_message_behind_its_own_loss_is_lost_too(store: Store) -> None:
    made = claim(key="k")
    assert await commit(store, Unit(made, appends=(append("o-1", 9),)), Unit(made)) == ["conflict", "conflict"]
    assert await store.examine(CONSUMER, [(made.message_id, "k")]) == [Standing(ClaimState.NEW)]


# --- appends without a claim, repeated -------------------------------------------------------------------------------


async def test_an_append_repeated_with_the_same_event_ids_answers_its_first_result(store: Store) -> None:
    unit = Unit(appends=(append("o-1", 1, 2), append("o-2", 0, 1, public=False)), outgoing=(message(),))
    await one(store, Unit(appends=(append("o-1", 0),)))
    first = await one(store, unit)
    await one(store, Unit(appends=(append("o-1", 3),)))
    size = len(await whole_log(store))
    again = await one(store, unit)
    assert again == first
    assert again.public < again.position
    assert len(await whole_log(store)) == size


async def test_an_append_repeated_within_a_call_or_behind_a_loser_answers_its_first_result(store: Store) -> None:
    unit = Unit(appends=(append("o-1", 0, 2),))
    first, again = await store.commit([unit, unit])
    assert again == first
    lost, repeated, fresh = await store.commit(
        [Unit(claim(), appends=(append("o-1", 9),)), unit, Unit(appends=(append("o-1", 2),))]
    )
    assert (lost.verdict, repeated, fresh.verdict) == (Verdict.CONFLICT, first, Verdict.CONFLICT)
    assert await version(store) == 2


async def test_a_repeat_half_stored_and_half_made_in_this_call_is_no_repeat_but_a_chain_over_both_is(
    store: Store,
) -> None:
    a, b = event(), event()
    await one(store, Unit(appends=(append("o-1", 0, a),)))
    outcomes = await store.commit([Unit(appends=(append("o-1", 1, b),)), Unit(appends=(append("o-1", 0, a, b),))])
    assert verdicts(outcomes) == ["ok", "ok"]
    assert outcomes[1].position == outcomes[0].position
    assert outcomes[1].versions == {stream(): 2}
    assert await version(store) == 2


@pytest.mark.parametrize("how", ["other ids", "any", "longer", "other version", "one of two", "with a claim"])
async def test_an_append_that_only_resembles_an_earlier_one_is_no_repeat(store: Store, how: str) -> None:
    a, b = event(), event()
    await one(store, Unit(appends=(append("o-1", 0, a, b),)))
    match how:
        case "other ids":
            unit = Unit(appends=(append("o-1", 0, a, event()),))
        case "any":
            unit = Unit(appends=(append("o-1", ANY, a, b),))
        case "longer":
            unit = Unit(appends=(append("o-1", 0, a, b, event()),))
        case "other version":
            unit = Unit(appends=(append("o-1", 1, a, b),))
        case "one of two":
            unit = Unit(appends=(append("o-1", 0, a, b), append("o-2", 0)))
        case _:
            unit = Unit(claim(), appends=(append("o-1", 0, a, b),))
    outcome = await one(store, unit)
    if how == "any":
        assert outcome.versions == {stream(): 4}
    else:
        assert outcome.verdict is Verdict.CONFLICT
        assert await version(store) == 2
        assert await version(store, "o-2") == 0


# --- watermarks, timers and dead letters of a unit -------------------------------------------------------------------


async def test_watermarks_are_stored_whatever_the_outcomes_also_without_units_and_never_go_back(store: Store) -> None:
    def marks(*offsets: int) -> list[Watermark]:
        return [Watermark("g", "shop.commands", n, offset) for n, offset in enumerate(offsets)]

    lost = Unit(claim(), appends=(append("o-1", 9),))
    assert verdicts(await store.commit([lost], watermarks=marks(5, 0))) == ["conflict"]
    assert await store.watermarks("g") == {("shop.commands", 0): 5, ("shop.commands", 1): 0}
    assert list(await store.commit([], watermarks=[*marks(3, 8), Watermark("h", "shop.commands", 0, 1)])) == []
    assert await store.watermarks("g") == {("shop.commands", 0): 5, ("shop.commands", 1): 8}
    assert await store.watermarks("h") == {("shop.commands", 0): 1}
    assert await store.watermarks("nobody") == {}


async def test_the_highest_of_several_watermarks_of_one_partition_in_a_call_stays(store: Store) -> None:
    await store.commit([], watermarks=[Watermark("g", "t", 0, 4), Watermark("g", "t", 0, 9), Watermark("g", "t", 0, 6)])
    assert await store.watermarks("g") == {("t", 0): 9}


async def test_a_lost_unit_stages_no_timer_no_dead_letter_and_cancels_none(store: Store) -> None:
    kept = timer(NOON)
    await one(store, Unit(timers=(kept,)))
    lost = Unit(
        claim(),
        appends=(append("o-1", 9),),
        timers=(timer(NOON), CancelTimer(CONSUMER, kept.id)),
        dead_letter=dead_letter(),
    )
    assert await commit(store, lost) == ["conflict"]
    assert await store.dead_letters() == []
    assert [found.id for found in await store.timers.due(limit=10)] == [kept.id]


async def test_a_timer_staged_again_changes_nothing_and_cancelling_what_is_not_there_does_no_harm(
    store: Store,
) -> None:
    first = timer(NOON)
    await one(store, Unit(timers=(first, replace(first, key="other"), CancelTimer(CONSUMER, IDS.new()))))
    await one(
        store, Unit(timers=(replace(first, due_at=NOON - timedelta(days=1)), timer(NOON, first.id, consumer="e")))
    )
    due = {found.consumer: found for found in await store.timers.due(limit=10)}
    assert due[CONSUMER] == first
    assert set(due) == {CONSUMER, "e"}


async def test_timers_of_a_call_are_staged_and_cancelled_in_order(store: Store) -> None:
    a, b, c = timer(NOON), timer(NOON), timer(NOON)
    cancel_a, cancel_b = CancelTimer(CONSUMER, a.id), CancelTimer(CONSUMER, b.id)
    await store.commit(
        [Unit(timers=(a, b, cancel_a)), Unit(timers=(cancel_b, c)), Unit(timers=(replace(b, key="b2"),))]
    )
    due = {found.id: found.key for found in await store.timers.due(limit=10)}
    assert due == {b.id: "b2", c.id: "o-1"}


async def test_a_second_dead_letter_of_a_message_changes_nothing_and_pages_come_oldest_first(store: Store) -> None:
    letters = [dead_letter(at=NOON + timedelta(microseconds=n // 2)) for n in range(7)]
    for letter in reversed(letters):
        await one(store, Unit(dead_letter=letter))
    await one(store, Unit(dead_letter=replace(letters[0], topic="other")))
    bare = replace(letters[0], consumer="z", key=None, value=None, headers=(), type="", offset=-1)
    expected = sorted(letters, key=lambda letter: (letter.failure.failed_at, letter.id))
    found = list(await store.dead_letters())
    assert found == expected
    paged = []
    after = None
    while page := await store.dead_letters(after=after, limit=2):
        paged += page
        after = (page[-1].failure.failed_at, page[-1].id)
    assert paged == expected
    await one(store, Unit(dead_letter=replace(bare, id=IDS.new())))
    assert any(replace(letter, id=bare.id) == bare for letter in await store.dead_letters())


async def test_a_dead_letter_keeps_an_error_text_of_any_characters(store: Store) -> None:
    letter = dead_letter()
    strange = replace(letter, failure=replace(letter.failure, message="nul \x00 half \ud83d \U0001f600", stack="\x01"))
    await one(store, Unit(dead_letter=strange))
    assert list(await store.dead_letters()) == [strange]


# --- malformed units -------------------------------------------------------------------------------------------------

BAD: dict[str, Unit] = {
    "empty append": Unit(appends=(Append(stream(), 0, ()),)),
    "stream twice": Unit(appends=(append("o-1", 0), append("o-1", 1))),
    "negative version": Unit(appends=(append("o-1", -1),)),
    "negative assert": Unit(asserts=((stream(), -1),)),
    "no stream id": Unit(appends=(append(stream(""), 0),)),
    "nul in a stream": Unit(asserts=((stream("a\x00b"), 0),)),
    "nul in a key": Unit(appends=(append("o-1", 0, event("a\x00")),)),
    "nul in a header": Unit(outgoing=(replace(message(), headers={"a": "\x00"}),)),
    "surrogate": Unit(outgoing=(replace(message(), actor="\ud800"),)),
    "outgoing without a topic": Unit(outgoing=(message(topic=None),)),
    "fence without fences": Unit(Claim(CONSUMER, IDS.new(), "k", fence=Fence.CANCEL)),
    "fences without fence": Unit(Claim(CONSUMER, IDS.new(), "k", fences=IDS.new())),
    "claim made as cancelled": Unit(claim(state=ClaimState.CANCELLED)),
    "claim without consumer": Unit(claim(consumer="")),
    "nul in a claim": Unit(claim(key="\x00")),
    "naive time": Unit(outgoing=(replace(message(), time=datetime(2026, 1, 1)),)),  # noqa: DTZ001
    "naive timer": Unit(timers=(timer(datetime(2026, 1, 1)),)),  # noqa: DTZ001
}


@pytest.mark.parametrize("what", list(BAD))
async def test_a_malformed_unit_is_refused_and_nothing_of_the_call_is_written(store: Store, what: str) -> None:
    good = Unit(claim(key="g"), appends=(append("good", 0),))
    with pytest.raises(BadUnit, match="unit 1 of 2"):
        await store.commit([good, BAD[what]], watermarks=[Watermark("g", "t", 0, 1)])
    assert await whole_log(store) == []
    assert await store.watermarks("g") == {}
    assert await commit(store, good) == ["ok"]


async def test_a_bad_unit_hurts_only_its_own_caller(store: Store) -> None:
    bad = list(BAD.values())

    async def caller(n: int) -> Any:
        unit = bad[n % len(bad)] if n % 3 == 0 else Unit(claim(key=str(n)), appends=(append(f"s-{n}", 0),))
        return await store.commit([unit])

    answers = await asyncio.gather(*(caller(n) for n in range(30)), return_exceptions=True)
    for n, answer in enumerate(answers):
        assert isinstance(answer, BadUnit) if n % 3 == 0 else verdicts(answer) == ["ok"]
    assert len(await whole_log(store)) == 20


async def test_a_cancelled_caller_leaves_a_store_that_works_and_its_unit_whole_or_absent(store: Store) -> None:
    for n in range(20):
        unit = Unit(claim(key=f"k{n}", reply=reply()), appends=(append(f"s-{n}", 0, 2),), outgoing=(message(),))
        calling = asyncio.create_task(store.commit([unit]))
        for _ in range(n % 5):
            await asyncio.sleep(0)
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)
        assert await commit(store, unit) in (["ok"], ["duplicate"])
        assert await version(store, f"s-{n}") == 2
    assert len(await whole_log(store)) == 80


# --- many stores on one database -------------------------------------------------------------------------------------


async def test_what_was_committed_is_there_when_the_store_is_opened_again(backend: Backend) -> None:
    made = claim(reply=reply())
    async with backend.open() as first:
        await one(first, Unit(made, appends=(append("o-1", 0),)))
        log = await whole_log(first)
    async with backend.open() as again:
        assert await whole_log(again) == log
        assert await commit(again, Unit(made)) == ["duplicate"]
        outcome = await one(again, Unit(appends=(append("o-1", 1),)))
        assert outcome.position > (log[-1].position or 0)


async def test_migrating_again_and_twice_at_once_does_no_harm(unmigrated: Backend) -> None:
    await asyncio.gather(*(unmigrated.migrate() for _ in range(3)))
    async with unmigrated.open() as store:
        await one(store, Unit(appends=(append("o-1", 0),)))
    await unmigrated.migrate()
    async with unmigrated.open() as store:
        assert await version(store) == 1


async def test_ids_of_any_version_are_ids(store: Store) -> None:
    id = uuid4()
    await one(store, Unit(claim(id), appends=(append("o-1", 0, event(id=uuid4())),)))
    assert await commit(store, Unit(claim(id))) == ["duplicate"]
