"""The test kit that users get: it must be right, and it must catch what it promises to catch."""

from __future__ import annotations

import random
import time
from itertools import count
from typing import Any

import pytest

from bus.messages import Command
from sagas import NotDeterministic, SagaError, SagaRun, Status, StepRefused, saga
from sagas.testing import NO_ANSWER, After, Cancelled, Died, Unknown, drive
from tests.sagas.stories import (
    PLACED,
    CancelOrder,
    CardDeclined,
    Note,
    OrderPlaced,
    Paid,
    Pay,
    Refund,
    Release,
    Reserve,
    Reserved,
    Ship,
    fulfil_order,
    names,
)

HAPPY: dict[type[Command[Any]], Any] = {Reserve: Reserved(), Pay: Paid(receipt="r-7")}


def test_a_story_that_goes_well() -> None:
    played = drive(fulfil_order, PLACED, HAPPY)
    assert (played.status, played.reason) == (Status.COMPLETED, None)
    assert names(played.sent) == ["Reserve", "Pay", "Ship"]
    assert played.sent[2] == Ship(order_id="o-1", note="r-7")
    assert played.lines[-1].endswith("completed")


@pytest.mark.parametrize("pay", [CardDeclined("no funds"), Died("disk"), Cancelled()])
def test_a_certain_failure(pay: Any) -> None:
    played = drive(fulfil_order, PLACED, {**HAPPY, Pay: pay})
    assert played.status is Status.COMPENSATED
    assert names(played.sent) == ["Reserve", "Pay", "CancelOrder", "Release"]
    assert played.took_s == 0


def test_a_step_that_was_given_up_after_it_was_begun_is_undone() -> None:
    """Nobody knows whether it happened outside; so it is treated as if it had."""
    played = drive(fulfil_order, PLACED, {**HAPPY, Pay: Unknown("the bank hung up")})
    assert played.status is Status.COMPENSATED
    assert names(played.sent) == ["Reserve", "Pay", "CancelOrder", "Refund", "Release"]
    assert played.took_s == 0, "it waits for no timeout"
    assert any("unknown (the bank hung up)" in line for line in played.lines)


def test_an_undo_that_was_given_up_after_it_was_begun_parks() -> None:
    played = drive(fulfil_order, PLACED, {**HAPPY, Ship: CardDeclined("no"), Refund: Unknown("the bank hung up")})
    assert played.status is Status.PARKED
    assert "the bank hung up" in (played.reason or "")


def test_no_answer_lets_the_timeout_decide_in_virtual_time() -> None:
    played = drive(fulfil_order, PLACED, {**HAPPY, Pay: NO_ANSWER})
    assert names(played.sent) == ["Reserve", "Pay", "CancelOrder", "Refund", "Release"]
    assert played.sent[2] == CancelOrder(order_id="o-1", reason="no answer within 30 s")
    assert played.took_s == 30


@pytest.mark.parametrize(("seconds", "status"), [(29.9, Status.COMPLETED), (30.1, Status.COMPENSATED)])
def test_an_answer_may_take_its_time(seconds: float, status: Status) -> None:
    assert drive(fulfil_order, PLACED, {**HAPPY, Pay: After(seconds, Paid())}).status is status


def test_a_late_answer_changes_nothing() -> None:
    played = drive(fulfil_order, PLACED, {**HAPPY, Pay: After(31, Paid()), Refund: After(60)})
    assert names(played.sent) == ["Reserve", "Pay", "CancelOrder", "Refund", "Release"]


def test_answers_may_come_one_after_another_or_from_a_function() -> None:
    @saga("tries")
    async def tries(run: SagaRun, placed: OrderPlaced) -> None:
        while True:
            try:
                await run.step(Pay(payment_id=str(run.uuid())))
                return
            except StepRefused:
                pass

    assert len(drive(tries, PLACED, {Pay: [CardDeclined(), CardDeclined(), Paid()]}).sent) == 3
    numbers = count()
    assert len(drive(tries, PLACED, lambda command: Paid() if next(numbers) == 4 else CardDeclined()).sent) == 5
    with pytest.raises(SagaError, match="Pay is sent 3 times, 2 answers are scripted"):
        drive(tries, PLACED, {Pay: [CardDeclined(), CardDeclined()]})


def test_an_undo_that_fails_shows_up_as_parked() -> None:
    played = drive(fulfil_order, PLACED, {**HAPPY, Pay: CardDeclined(), Release: Died("gone")})
    assert played.status is Status.PARKED
    assert played.reason is not None
    assert "gone" in played.reason


def test_thirty_days_take_milliseconds() -> None:
    @saga("slow")
    async def slow(run: SagaRun, placed: OrderPlaced) -> None:
        for day in range(30):
            await run.step(Note(text=str(day)), timeout_s=90_000)

    began = time.perf_counter()
    played = drive(slow, PLACED, {Note: After(86_400)})
    assert played.took_s == 30 * 86_400
    assert time.perf_counter() - began < 5  # a bound for slow machines; some 30 ms here


def test_scripts_that_cannot_be_are_refused() -> None:
    with pytest.raises(SagaError, match="no answer is scripted for Reserve; wanted a Reserved"):
        drive(fulfil_order, PLACED, {})
    with pytest.raises(SagaError, match="wanted Reserved"):
        drive(fulfil_order, PLACED, {Reserve: Paid()})
    with pytest.raises(SagaError, match="neither an answer nor a timeout: it waits for step 1"):
        drive(fulfil_order, PLACED, {Reserve: NO_ANSWER})


def test_a_saga_without_an_end_is_stopped() -> None:
    @saga("endless")
    async def endless(run: SagaRun, placed: OrderPlaced) -> None:
        for number in count():
            await run.step(Note(text=str(number)))

    with pytest.raises(SagaError, match="does not come to an end"):
        drive(endless, PLACED, {}, messages_max=20)


def test_what_differs_from_one_replay_to_the_next_is_caught() -> None:
    tossed = random.Random(1)
    seen: list[int] = []

    @saga("random-key")
    async def random_key(run: SagaRun, placed: OrderPlaced) -> None:
        await run.step(Note(text=str(tossed.random())))

    @saga("random-field")
    async def random_field(run: SagaRun, placed: OrderPlaced) -> None:
        await run.step(Ship(order_id="o", note=str(tossed.random())))

    @saga("global-state")
    async def global_state(run: SagaRun, placed: OrderPlaced) -> None:
        await run.step(Note(text="a"))
        seen.append(1)
        await run.step(Note(text=f"seen {len(seen)}"))

    for story in (random_key, random_field, global_state):
        with pytest.raises(NotDeterministic, match="decides otherwise"):
            drive(story, PLACED, {})


def test_a_seed_decides_the_order_of_what_comes_at_once() -> None:
    def order(seed: int) -> str:
        seen: list[str] = []

        @saga("branches")
        async def branches(run: SagaRun, placed: OrderPlaced) -> None:
            heard: list[str] = []

            async def branch(name: str) -> None:
                await run.step(Note(text=name))
                heard.append(name)

            await run.all(*[branch(name) for name in "abcd"])
            seen[:] = heard

        drive(branches, PLACED, {}, seed=seed)
        return "".join(seen)

    assert order(1) == order(1)
    assert len({order(seed) for seed in range(20)}) > 5
