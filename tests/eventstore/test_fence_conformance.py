"""A step and its undo, in every order: the fence decides, and what it decided lasts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from uuid import UUID

import pytest

from bus.envelope import ReplyOutcome
from eventstore.port import Claim, ClaimState, Fence, Outcome, Standing, Store, Unit, Verdict
from tests.eventstore.stores import (
    CONSUMER,
    IDS,
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
    whole_log,
)


def step(id: UUID, outcome: ReplyOutcome | None = ReplyOutcome.OK, *, key: str = "o-1", at: int = 0) -> Unit:
    """The step, done with effect (it appends) or, when it is refused, without."""
    answer = None if outcome is None else reply(id, outcome=outcome)
    appends = (append("o-1", at),) if outcome in (None, ReplyOutcome.OK) else ()
    return Unit(claim(id, key, reply=answer), appends=appends)


def dead(id: UUID) -> Unit:
    return Unit(
        claim(id, state=ClaimState.DEAD, reply=reply(id, outcome=ReplyOutcome.DIED)), dead_letter=dead_letter(id)
    )


async def state(store: Store, id: UUID) -> ClaimState:
    (standing,) = await store.examine(CONSUMER, [(id, "o-1")])
    return standing.state


BEFORE: dict[str, Callable[[UUID], Unit | None]] = {
    "absent": lambda id: None,
    "done": step,
    "done without a reply": lambda id: step(id, None),
    "refused": lambda id: step(id, ReplyOutcome.REFUSED),
    "dead": dead,
}
HOLDS = {
    ("done", Fence.EXPECT_DONE),
    ("done without a reply", Fence.EXPECT_DONE),
    ("absent", Fence.CANCEL),
    ("refused", Fence.CANCEL),
    ("dead", Fence.CANCEL),
}
AFTER = {"absent": ClaimState.CANCELLED, "dead": ClaimState.CANCELLED, "refused": ClaimState.DONE}
UNTOUCHED = {"absent": ClaimState.NEW, "dead": ClaimState.DEAD}


@pytest.mark.parametrize("together", [False, True], ids=["two calls", "one call"])
@pytest.mark.parametrize("fence", list(Fence))
@pytest.mark.parametrize("before", list(BEFORE))
async def test_an_undo_meets_its_step(store: Store, before: str, fence: Fence, together: bool) -> None:
    id = IDS.new()
    first = BEFORE[before](id)
    units = [] if first is None else [first]
    the_undo = Unit(undo(id, fence, key="undo", reply=reply()), appends=(append("undone", 0),))
    if together:
        *_, outcome = await store.commit([*units, the_undo])
    else:
        await store.commit(units)
        outcome = await one(store, the_undo)
    holds = (before, fence) in HOLDS
    assert outcome.verdict is (Verdict.COMMITTED if holds else Verdict.CONFLICT)
    assert (outcome.stream, outcome.expected, outcome.actual) == (None, None, None)
    assert await version(store, "undone") == (1 if holds else 0)
    expected = AFTER.get(before, ClaimState.DONE) if holds and fence is Fence.CANCEL else UNTOUCHED.get(before)
    assert await state(store, id) is (expected or ClaimState.DONE)


@pytest.mark.parametrize("together", [False, True], ids=["two calls", "one call"])
async def test_a_step_that_arrives_after_its_undo_is_cancelled_and_writes_nothing(store: Store, together: bool) -> None:
    id = IDS.new()
    the_undo = Unit(undo(id, Fence.CANCEL, reply=reply()))
    if together:
        outcomes = await store.commit([the_undo, step(id)])
    else:
        outcomes = [await one(store, the_undo), await one(store, step(id))]
    assert verdicts(outcomes) == ["ok", "cancelled"]
    assert outcomes[1] == Outcome(Verdict.CANCELLED)
    assert await version(store) == 0
    assert await store.examine(CONSUMER, [(id, "o-1")]) == [Standing(ClaimState.CANCELLED)]


async def test_a_cancelled_unit_drags_nobody_along(store: Store) -> None:
    id = IDS.new()
    assert await commit(
        store,
        Unit(undo(id, Fence.CANCEL)),
        step(id),
        Unit(claim(key="o-1"), appends=(append("o-1", 0),)),
    ) == ["ok", "cancelled", "ok"]


async def test_an_undo_whose_fence_does_not_hold_takes_its_followers_along(store: Store) -> None:
    assert await commit(
        store,
        Unit(undo(IDS.new(), Fence.EXPECT_DONE, key="k"), appends=(append("s", 0),)),
        Unit(claim(key="k")),
        Unit(claim(key="x"), asserts=((stream("s"), 0),)),
        Unit(claim(key="y")),
    ) == ["conflict", "conflict", "conflict", "ok"]


async def test_an_undo_that_loses_by_version_cancels_nothing(store: Store) -> None:
    id = IDS.new()
    the_undo = Unit(undo(id, Fence.CANCEL, key="u"), asserts=((stream("o-1"), 5),))
    assert await commit(store, the_undo, step(id)) == ["conflict", "conflict"]  # it touches the same stream
    assert await commit(store, the_undo) == ["conflict"]
    assert await state(store, id) is ClaimState.NEW
    assert await commit(store, step(id)) == ["ok"]


async def test_an_undo_taken_once_is_not_taken_again_and_its_fence_is_not_asked_again(store: Store) -> None:
    id, undo_id = IDS.new(), IDS.new()
    await store.commit([step(id)])
    the_undo = Unit(undo(id, Fence.EXPECT_DONE, undo_id, reply=reply()))
    assert await commit(store, the_undo, the_undo) == ["ok", "duplicate"]
    assert await commit(store, Unit(undo(id, Fence.CANCEL, undo_id))) == ["duplicate"]
    assert await state(store, id) is ClaimState.DONE


async def test_a_second_undo_of_an_absent_step_finds_it_cancelled_and_is_content(store: Store) -> None:
    id = IDS.new()
    assert await commit(store, Unit(undo(id, Fence.CANCEL)), Unit(undo(id, Fence.CANCEL))) == ["ok", "ok"]
    assert await commit(store, Unit(undo(id, Fence.CANCEL)), Unit(undo(id, Fence.EXPECT_DONE, key="x"))) == [
        "ok",
        "conflict",
    ]


async def test_a_step_is_its_consumers_own_a_fence_of_another_does_not_touch_it(store: Store) -> None:
    id = IDS.new()
    await store.commit([step(id)])
    foreign = Claim("else", IDS.new(), "k", fences=id, fence=Fence.CANCEL)
    assert await commit(store, Unit(foreign)) == ["ok"]
    assert await state(store, id) is ClaimState.DONE
    assert (await store.examine("else", [(id, "k")])) == [Standing(ClaimState.CANCELLED)]


@pytest.mark.parametrize("together", [False, True], ids=["two calls", "one call"])
async def test_a_dead_step_that_was_cancelled_leaves_the_dead_letters_so_that_nobody_redrives_it(
    store: Store, together: bool
) -> None:
    id, other = IDS.new(), IDS.new()
    units = [dead(id), dead(other), Unit(undo(id, Fence.CANCEL))]
    for call in [units] if together else [[unit] for unit in units]:
        assert set(verdicts(await store.commit(call))) == {"ok"}
    assert [letter.id for letter in await store.dead_letters()] == [other]
    assert await store.examine(CONSUMER, [(id, "o-1")]) == [Standing(ClaimState.CANCELLED)]
    assert await commit(store, step(id)) == ["cancelled"]


async def test_a_refused_step_keeps_its_answer_when_it_is_undone(store: Store) -> None:
    id = IDS.new()
    await store.commit([step(id, ReplyOutcome.REFUSED), Unit(undo(id, Fence.CANCEL))])
    (standing,) = await store.examine(CONSUMER, [(id, "o-1")])
    assert standing.state is ClaimState.DONE
    assert standing.reply is not None
    assert standing.reply.outcome is ReplyOutcome.REFUSED


@pytest.mark.parametrize("round_", range(10))
async def test_a_step_and_its_undo_in_flight_at_once_one_of_them_sees_the_other(
    store: Store, twin: Store, round_: int
) -> None:
    """Never both: an effect, and an undo that believed there was none. Both orders of starting are tried."""
    id = IDS.new()
    calls = [one(store, step(id)), one(twin, Unit(undo(id, Fence.CANCEL, key="u"), appends=(append("undone", 0),)))]
    if round_ % 2:
        done, undone = await asyncio.gather(*calls)
    else:
        undone, done = await asyncio.gather(*reversed(calls))
    pair = (str(done.verdict), str(undone.verdict))
    assert pair in {("committed", "conflict"), ("cancelled", "committed")}
    assert len(await whole_log(store, outgoing=False)) == 1


@pytest.mark.parametrize("round_", range(10))
async def test_a_dead_step_undone_and_a_redrive_at_once(store: Store, twin: Store, round_: int) -> None:
    id = IDS.new()
    await store.commit([dead(id)])
    undone, again = await asyncio.gather(one(store, Unit(undo(id, Fence.CANCEL, key="u"))), one(twin, step(id)))
    assert undone.verdict is Verdict.COMMITTED
    assert again.verdict in (Verdict.DUPLICATE, Verdict.CANCELLED)
    assert await state(store, id) is ClaimState.CANCELLED
    assert await version(store) == 0
