"""The pure mechanism: given answers, then commands."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid5

import pytest

from bus.errors import Undecodable
from bus.messages import Command
from sagas import SagaRun, StepAbandoned, StepFailed, StepRefused, StepTimedOut, saga
from sagas.instance import Answer, Instance, Known, Plan, Status
from tests.sagas.stories import (
    PLACED,
    CardDeclined,
    Erase,
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
)

SAGA = UUID("11111111-1111-5111-8111-111111111111")
T0 = datetime(2026, 1, 1, tzinfo=UTC)
Body = Callable[[SagaRun, OrderPlaced], Awaitable[None]]


def begin(body: Any) -> tuple[Instance, list[Plan]]:
    definition = body if hasattr(body, "body") else saga("story")(body)
    instance = Instance(definition, SAGA)
    return instance, instance.begin(PLACED, at=T0)


def ok(path: str, value: object = None, *, s: float = 0) -> Answer:
    return Answer(path, T0 + timedelta(seconds=s), lambda command: value)


def failing(path: str, failure: Exception, *, attempt: int = 1) -> Answer:
    def read(command: Command[Any]) -> Any:
        raise failure

    return Answer(path, T0, read, attempt)


def refused(path: str, *, attempt: int = 1) -> Answer:
    return failing(path, StepRefused(CardDeclined("no funds")), attempt=attempt)


def timed_out(path: str) -> Answer:
    return failing(path, StepTimedOut(30))


def paths(plans: list[Plan]) -> list[str]:
    return [plan.label for plan in plans]


def texts(plans: list[Plan]) -> list[str]:
    return [plan.command.key for plan in plans]


def why(instance: Instance) -> str:
    assert instance.status is Status.PARKED
    assert instance.parked is not None
    return instance.parked.reason


async def two_steps(run: SagaRun, placed: OrderPlaced) -> None:
    await run.step(Reserve(order_id="o"), undo=Release(order_id="o"))
    await run.step(Pay(payment_id="p"), undo=Refund(payment_id="p"))
    await run.step(Ship(order_id="o"))


# --- steps ------------------------------------------------------------------------------------------------------------


def test_each_answer_brings_the_next_command_until_the_saga_is_complete() -> None:
    instance, plans = begin(fulfil_order)
    assert [plan.command for plan in plans] == [Reserve(order_id="o-1")]
    plans = instance.feed(ok("1", Reserved()))
    payment = str(uuid5(SAGA, "2"))
    assert [(plan.path, plan.command, plan.timeout_s) for plan in plans] == [("3", Pay(payment_id=payment), 30)]
    plans = instance.feed(ok("3", Paid(receipt="r-9")))
    assert [plan.command for plan in plans] == [Ship(order_id="o-1", note="r-9")]
    assert instance.feed(ok("4")) == []
    assert instance.status is Status.COMPLETED


def test_a_refused_step_is_not_undone_the_ones_before_it_are_in_reverse_one_after_another() -> None:
    instance, _ = begin(two_steps)
    instance.feed(ok("1"))
    instance.feed(ok("2"))
    assert paths(instance.feed(refused("3"))) == ["undo:2"]
    assert instance.status is Status.COMPENSATING
    assert paths(instance.feed(ok("undo:2"))) == ["undo:1"]
    assert instance.feed(ok("undo:1")) == []
    assert instance.status is Status.COMPENSATED
    assert isinstance(instance.failure, StepRefused)
    assert (instance.failure.refusal.code, instance.failure.reason) == ("payments.card-declined", "no funds")


def test_a_step_whose_outcome_is_unknown_is_undone_as_if_it_had_happened() -> None:
    instance, _ = begin(two_steps)
    instance.feed(ok("1"))
    assert paths(instance.feed(timed_out("2"))) == ["undo:2"]
    assert paths(instance.feed(ok("undo:2"))) == ["undo:1"]


def test_an_unknown_step_is_undone_also_when_the_saga_caught_the_failure_and_completed() -> None:
    async def forgiving(run: SagaRun, placed: OrderPlaced) -> None:
        await run.step(Reserve(order_id="o"), undo=Release(order_id="o"))
        try:
            await run.step(Pay(payment_id="p"), undo=Refund(payment_id="p"))
        except Exception:
            pass
        await run.step(Ship(order_id="o"))

    instance, _ = begin(forgiving)
    instance.feed(ok("1"))
    assert paths(instance.feed(timed_out("2"))) == ["3"]
    assert paths(instance.feed(ok("3"))) == ["undo:2"]
    instance.feed(ok("undo:2"))
    assert instance.status is Status.COMPLETED


def test_the_first_answer_counts_and_a_later_one_is_only_history() -> None:
    instance, _ = begin(two_steps)
    instance.feed(ok("1"))
    instance.feed(timed_out("2"))
    assert instance.feed(ok("2", Paid())) == []
    assert instance.waiting == ("undo:2",)
    instance.feed(ok("undo:2"))
    instance.feed(ok("undo:1"))
    assert instance.feed(ok("2", Paid())) == []
    assert instance.status is Status.COMPENSATED


def test_a_saga_gives_up_by_raising_a_step_failure_itself() -> None:
    async def picky(run: SagaRun, placed: OrderPlaced) -> None:
        reserved = await run.step(Reserve(order_id="o"), undo=Release(order_id="o"))
        if reserved.shelf == "damp":
            raise StepFailed("not from that shelf")

    instance, _ = begin(picky)
    assert paths(instance.feed(ok("1", Reserved(shelf="damp")))) == ["undo:1"]
    assert str(instance.failure) == "not from that shelf"


def test_a_saga_may_send_more_while_it_handles_a_failure_and_then_compensates() -> None:
    instance, _ = begin(fulfil_order)
    instance.feed(ok("1", Reserved()))
    (cancel,) = instance.feed(refused("3"))
    assert cancel.command.model_dump() == {"order_id": "o-1", "reason": "no funds"}
    assert paths(instance.feed(ok("4"))) == ["undo:1"]
    instance.feed(ok("undo:1"))
    assert instance.status is Status.COMPENSATED


# --- bugs -------------------------------------------------------------------------------------------------------------


def test_a_bug_parks_where_it_is_and_refunds_nobody() -> None:
    async def buggy(run: SagaRun, placed: OrderPlaced) -> None:
        await run.step(Reserve(order_id="o"), undo=Release(order_id="o"))
        raise KeyError("x")

    instance, _ = begin(buggy)
    assert instance.feed(ok("1")) == []
    assert why(instance) == "KeyError: 'x'"
    assert instance.parked is not None
    assert 'raise KeyError("x")' in instance.parked.stack


def test_a_bug_in_one_branch_parks_at_once_and_sends_nothing_of_the_others() -> None:
    async def broken(run: SagaRun) -> None:
        raise ValueError("broken")

    async def story(run: SagaRun, placed: OrderPlaced) -> None:
        try:
            await run.all(run.step(Note(text="a")), broken(run), run.step(Note(text="b")))
        except ValueError:
            await run.step(Note(text="never"))

    instance, plans = begin(story)
    assert plans == []
    assert why(instance) == "ValueError: broken"


@pytest.mark.parametrize("error", [asyncio.CancelledError(), SystemExit(3), GeneratorExit(), RecursionError("deep")])
def test_a_saga_cannot_stop_its_worker_by_what_it_raises(error: BaseException) -> None:
    async def story(run: SagaRun, placed: OrderPlaced) -> None:
        raise error

    assert type(error).__name__ in why(begin(story)[0])


def test_one_step_awaited_twice_parks() -> None:
    async def twice(run: SagaRun, placed: OrderPlaced) -> None:
        step = run.step(Note(text="a"))
        await step
        await step

    instance, _ = begin(twice)
    instance.feed(ok("1"))
    assert why(instance).startswith("step 1 is awaited twice")


def test_one_step_in_two_branches_parks() -> None:
    async def twice(run: SagaRun, placed: OrderPlaced) -> None:
        step = run.step(Note(text="a"))
        await run.all(step, step)

    instance, plans = begin(twice)
    assert plans == []
    assert "awaited twice" in why(instance)


def test_a_step_that_nobody_awaits_parks_instead_of_silently_not_happening() -> None:
    async def forgetful(run: SagaRun, placed: OrderPlaced) -> None:
        run.step(Ship(order_id="o"))

    assert "step 1 (shipping.ship.v1) was made but never awaited" in why(begin(forgetful)[0])


def test_a_step_of_another_saga_parks() -> None:
    lent: list[Any] = []

    async def lends(run: SagaRun, placed: OrderPlaced) -> None:
        lent.append(run.step(Note(text="a")))
        await run.step(Note(text="b"))

    async def borrows(run: SagaRun, placed: OrderPlaced) -> None:
        await run.all(run.step(Note(text="c")), lent[0])

    lender, _ = begin(lends)
    assert lender.status is Status.RUNNING
    borrower, plans = begin(borrows)
    assert (plans, borrower.status) == ([], Status.PARKED)


def test_an_undo_for_another_service_parks() -> None:
    async def crossed(run: SagaRun, placed: OrderPlaced) -> None:
        await run.step(Reserve(order_id="o"), undo=Refund(payment_id="p"))

    assert "different services" in why(begin(crossed)[0])


def test_an_undo_under_another_key_parks_before_the_step_is_sent() -> None:
    """It would find nothing to undo, say so, and the saga would call itself compensated."""

    async def slipped(run: SagaRun, placed: OrderPlaced) -> None:
        await run.step(Reserve(order_id="o"), undo=Release(order_id="p"))

    saga, plans = begin(slipped)
    assert plans == []
    assert "has key 'o' and its undo stock.release.v1 has key 'p'" in why(saga)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
def test_a_timeout_that_makes_no_sense_parks(timeout_s: float) -> None:
    async def story(run: SagaRun, placed: OrderPlaced) -> None:
        await run.step(Ship(order_id="o"), timeout_s=timeout_s)

    assert "wanted seconds above 0" in why(begin(story)[0])


def test_an_answer_that_cannot_be_read_parks() -> None:
    instance, _ = begin(two_steps)
    instance.feed(failing("1", Undecodable("torn")))
    assert why(instance) == "the answer to step 1 cannot be read: torn"


async def sleeps(run: SagaRun, placed: OrderPlaced) -> None:
    await asyncio.sleep(1)


async def yields(run: SagaRun, placed: OrderPlaced) -> None:
    await asyncio.sleep(0)


async def swallows(run: SagaRun, placed: OrderPlaced) -> None:
    try:
        await asyncio.sleep(0)
    except Exception:
        await run.step(Note(text="went on"))


async def gathers(run: SagaRun, placed: OrderPlaced) -> None:
    await asyncio.gather(run.step(Note(text="a")), run.step(Note(text="b")))


async def limits(run: SagaRun, placed: OrderPlaced) -> None:
    async with asyncio.timeout(1):
        await run.step(Note(text="a"))


async def groups(run: SagaRun, placed: OrderPlaced) -> None:
    async with asyncio.TaskGroup():
        await run.step(Note(text="a"))


ASYNCIO = pytest.mark.parametrize("story", [sleeps, yields, swallows, gathers, limits, groups])


@ASYNCIO
def test_asyncio_inside_a_saga_parks_and_says_so(story: Body) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what asyncio itself leaves lying about
        instance, plans = begin(story)
        gc.collect()
    assert plans == []
    assert "a saga may await only what `run` makes" in why(instance)


@ASYNCIO
async def test_asyncio_inside_a_saga_leaves_the_workers_task_and_loop_alone(story: Body) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        instance, _ = begin(story)
        gc.collect()
    assert instance.status is Status.PARKED
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)
    assert asyncio.get_running_loop() is loop
    assert asyncio.all_tasks() == {task}


# --- branches ---------------------------------------------------------------------------------------------------------


def test_all_gives_results_in_order_however_the_answers_come() -> None:
    async def story(run: SagaRun, placed: OrderPlaced) -> None:
        reserved, paid, nothing = await run.all(
            run.step(Reserve(order_id="o")), run.step(Pay(payment_id="p")), run.step(Ship(order_id="o"))
        )
        await run.step(Note(text=f"{reserved.shelf} {paid.receipt} {nothing}"))

    instance, plans = begin(story)
    assert paths(plans) == ["1", "2", "3"]
    assert instance.feed(ok("3")) == []
    assert instance.feed(ok("2", Paid())) == []
    assert texts(instance.feed(ok("1", Reserved()))) == ["A1 r-1 None"]


def test_all_waits_for_every_branch_and_then_raises_the_first_failure_by_position() -> None:
    async def story(run: SagaRun, placed: OrderPlaced) -> None:
        try:
            await run.all(*[run.step(Note(text=text)) for text in "abc"])
        except StepFailed as failed:
            await run.step(Note(text=failed.reason))

    instance, _ = begin(story)
    assert instance.feed(failing("3", StepFailed("third"))) == []
    assert instance.feed(failing("2", StepFailed("second"))) == []
    assert texts(instance.feed(ok("1"))) == ["second"]


def test_branches_have_counters_of_their_own_and_may_nest() -> None:
    async def branch(run: SagaRun, name: str) -> str:
        await run.step(Note(text=f"{name}1"))
        await run.all(run.step(Note(text=f"{name}2")), run.step(Note(text=f"{name}3")))
        return name

    async def story(run: SagaRun, placed: OrderPlaced) -> None:
        await run.step(Note(text="first"))
        done = await run.all(branch(run, "x"), branch(run, "y"), run.all(branch(run, "z")))
        await run.step(Note(text=repr(done)))

    instance, plans = begin(story)
    assert paths(plans) == ["1"]
    plans = instance.feed(ok("1"))
    assert [(p.path, p.command.key) for p in plans] == [("3.1.1", "x1"), ("3.2.1", "y1"), ("2.1.1", "z1")]
    assert paths(instance.feed(ok("3.2.1"))) == ["3.2.2", "3.2.3"]
    for path in ("3.2.2", "3.2.3", "3.1.1", "3.1.2", "3.1.3", "2.1.1", "2.1.2"):
        instance.feed(ok(path))
    assert texts(instance.feed(ok("2.1.3"))) == ["('x', 'y', ('z',))"]


def test_all_of_nothing_is_done_at_once_and_a_thousand_times_is_no_deeper() -> None:
    async def quick(run: SagaRun) -> int:
        return 1

    async def story(run: SagaRun, placed: OrderPlaced) -> None:
        total = 0
        for _ in range(5000):
            total += sum(await run.all(quick(run), quick(run))) + len(await run.all())
        await run.step(Note(text=str(total)))

    assert texts(begin(story)[1]) == ["10000"]


def test_something_else_than_a_branch_is_a_bug_and_leaves_no_coroutine_behind() -> None:
    async def branch(run: SagaRun) -> None: ...

    async def story(run: SagaRun, placed: OrderPlaced) -> None:
        await run.all(branch(run), 42)  # type: ignore[arg-type]

    instance, _ = begin(story)
    gc.collect()
    assert "run.all was given 42" in why(instance)


# --- determinism ------------------------------------------------------------------------------------------------------


def test_now_is_the_time_of_the_event_in_hand_and_never_goes_back() -> None:
    seen: list[datetime] = []

    async def story(run: SagaRun, placed: OrderPlaced) -> None:
        for text in "abc":
            seen.append(run.now())
            await run.step(Note(text=text))

    instance, _ = begin(story)
    instance.feed(ok("1", s=60))
    instance.feed(ok("2", s=20))
    assert seen == [T0, T0 + timedelta(seconds=60), T0 + timedelta(seconds=60)]


def test_a_uuid_is_made_of_the_sagas_id_and_the_place_in_the_story() -> None:
    seen: list[UUID] = []

    async def story(run: SagaRun, placed: OrderPlaced) -> None:
        seen.extend([run.uuid(), run.uuid(), run.id])

    begin(story)
    begin(story)
    assert seen == 2 * [uuid5(SAGA, "1"), uuid5(SAGA, "2"), SAGA]


def test_context_variables_stay_inside_and_async_generators_work() -> None:
    depth = contextvars.ContextVar("depth", default=0)
    depth.set(3)

    async def numbers(run: SagaRun) -> AsyncIterator[int]:
        for n in range(3):
            await run.step(Note(text=f"n{n}"))
            yield n

    async def story(run: SagaRun, placed: OrderPlaced) -> None:
        depth.set(depth.get() + 7)
        async for _ in numbers(run):
            pass
        await run.step(Note(text=f"depth {depth.get()}"))

    instance, _ = begin(story)
    instance.feed(ok("1"))
    instance.feed(ok("2"))
    assert texts(instance.feed(ok("3"))) == ["depth 7"]
    assert depth.get() == 3


async def test_an_async_generator_left_in_the_middle_is_not_finished_by_the_workers_loop() -> None:
    closed: list[bool] = []

    async def numbers(run: SagaRun) -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    async def story(run: SagaRun, placed: OrderPlaced) -> None:
        async for _ in numbers(run):
            break
        await run.step(Note(text="after"))

    instance, plans = begin(story)
    gc.collect()
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1
    assert closed == [True]
    assert texts(plans) == ["after"]
    assert instance.waiting


# --- history ----------------------------------------------------------------------------------------------------------


def replay(body: Any, history: list[tuple[str, str, str]], answers: list[Answer], **options: bool) -> Instance:
    known = {path: Known(kind, key) for path, kind, key in history}
    instance = Instance(saga("story", version=3)(body), SAGA, known=known, **options)
    assert instance.begin(PLACED, at=T0) == []
    for answer in answers:
        assert instance.feed(answer) == []
    assert instance.end_replay() == []
    return instance


LIVED = [("1", "stock.reserve.v1", "o"), ("2", "payments.pay.v1", "p")]


def test_a_replay_sends_nothing_again_and_goes_on_live() -> None:
    instance = replay(two_steps, LIVED, [ok("1")], accepts_new=False)
    assert instance.waiting == ("2",)
    assert paths(instance.feed(ok("2"))) == ["3"]


@pytest.mark.parametrize(
    ("kind", "key"), [("fraud.check.v1", "p"), ("payments.pay.v1", "q")], ids=["another type", "another key"]
)
def test_a_mismatch_parks_and_names_the_first_step_that_differs(kind: str, key: str) -> None:
    history = [LIVED[0], ("2", kind, key), ("3", "shipping.ship.v1", "another")]
    instance = replay(two_steps, history, [ok("1"), ok("2")], accepts_new=False)
    assert why(instance) == (
        f"the history does not fit the code of story v3: step 2: history has {kind} for {key!r}, "
        "the code schedules payments.pay.v1 for 'p'"
    )
    assert instance.parked is not None
    assert instance.parked.path == "2"


def test_a_step_that_the_code_never_reaches_is_a_mismatch_with_its_name() -> None:
    async def shorter(run: SagaRun, placed: OrderPlaced) -> None:
        await run.step(Reserve(order_id="o"))

    instance = replay(shorter, LIVED, [ok("1")], accepts_new=False)
    assert "step 2: history has payments.pay.v1 for 'p', the code never gets there" in why(instance)


def test_a_step_that_history_lacks_is_a_mismatch_with_its_name() -> None:
    async def wider(run: SagaRun, placed: OrderPlaced) -> None:
        await run.all(run.step(Reserve(order_id="o")), run.step(Note(text="new")))

    instance = replay(wider, LIVED[:1], [], accepts_new=False)
    assert "step 2: history has nothing there, the code schedules notes.note.v1 for 'new'" in why(instance)


def test_an_answer_that_history_has_earlier_than_the_code_asks_for_it_is_kept() -> None:
    """Code that a retry accepts may ask in another order than the one that lived it."""

    async def one_by_one(run: SagaRun, placed: OrderPlaced) -> None:
        await run.step(Reserve(order_id="o"))
        await run.step(Pay(payment_id="p"))

    instance = replay(one_by_one, LIVED, [ok("2"), ok("1")])
    assert instance.status is Status.COMPLETED


def test_of_two_answers_that_come_before_the_code_asks_the_first_counts() -> None:
    async def one_by_one(run: SagaRun, placed: OrderPlaced) -> None:
        await run.step(Reserve(order_id="o"))
        await run.step(Pay(payment_id="p"))

    instance = replay(one_by_one, LIVED, [ok("2"), refused("2"), ok("1")])
    assert instance.status is Status.COMPLETED


# --- undos and operators ----------------------------------------------------------------------------------------------


def test_an_undo_that_fails_parks_and_a_retry_sends_it_again_under_another_name() -> None:
    instance, _ = begin(two_steps)
    instance.feed(ok("1"))
    instance.feed(refused("2"))
    assert instance.feed(refused("undo:1")) == []
    assert why(instance).startswith("an undo failed: ")
    assert paths(instance.retry(at=T0)) == ["undo:1#2"]
    assert instance.status is Status.COMPENSATING
    instance.feed(refused("undo:1", attempt=2))
    assert paths(instance.retry(at=T0)) == ["undo:1#3"]
    instance.feed(Answer("undo:1", T0, lambda command: None, 3))
    assert instance.status is Status.COMPENSATED


def test_a_retry_does_not_revive_a_bug() -> None:
    async def buggy(run: SagaRun, placed: OrderPlaced) -> None:
        raise KeyError("x")

    instance, _ = begin(buggy)
    assert instance.retry(at=T0) == []
    assert instance.status is Status.PARKED


def test_a_mismatch_while_compensating_is_not_taken_for_a_failed_undo() -> None:
    known = {path: Known(kind, key) for path, kind, key in LIVED}
    instance = Instance(saga("story")(two_steps), SAGA, known=known, accepts_new=False)
    instance.begin(PLACED, at=T0)
    instance.feed(ok("1"))
    instance.feed(refused("2"))  # history knows of no undo
    assert "undo:1" in why(instance)
    assert instance.end_replay() == []
    assert instance.retry(at=T0) == []
    assert instance.status is Status.PARKED


def test_cancelling_abandons_what_is_under_way_and_undoes_it() -> None:
    instance, _ = begin(two_steps)
    instance.feed(ok("1"))
    assert paths(instance.cancel(at=T0)) == ["undo:2"]
    assert isinstance(instance.failure, StepAbandoned)
    assert paths(instance.feed(ok("undo:2"))) == ["undo:1"]


def test_cancelling_never_interrupts_an_undo() -> None:
    instance, _ = begin(two_steps)
    instance.feed(ok("1"))
    instance.feed(refused("2"))
    assert instance.cancel(at=T0) == []
    assert instance.waiting == ("undo:1",)
    instance.feed(ok("undo:1"))
    assert instance.status is Status.COMPENSATED


def test_cancelling_leaves_a_parked_saga_as_it_is() -> None:
    async def bug(run: SagaRun) -> None:
        await run.step(Note(text="b"))
        raise KeyError("x")

    async def story(run: SagaRun, placed: OrderPlaced) -> None:
        await run.all(run.step(Note(text="a")), bug(run))

    instance, _ = begin(story)
    instance.feed(ok("2.2.1"))
    waiting = instance.waiting
    assert instance.status is Status.PARKED
    assert instance.cancel(at=T0) == []
    assert (instance.waiting, instance.status) == (waiting, Status.PARKED)


# --- being dropped ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "forget", "forget in a cycle"])
def test_a_suspended_saga_that_is_dropped_sends_nothing_from_its_finally(
    how: str, recwarn: pytest.WarningsRecorder
) -> None:
    """Python runs `finally` at every drop. Whatever it awaits is not there: nothing is sent, nothing is warned of."""
    ran: list[str] = []

    async def branch(run: SagaRun, name: str) -> None:
        try:
            await run.step(Note(text=name), undo=Erase(text=name))
        finally:
            ran.append(name)
            await run.step(Note(text=f"cleanup {name}"))
            ran.append("went on")

    async def story(run: SagaRun, placed: OrderPlaced) -> None:
        try:
            await run.step(Note(text="fails"))
        except StepFailed as failed:  # kept over the drop: a cycle, left to the collector
            try:
                await run.all(branch(run, "a"), branch(run, "b"))
            finally:
                ran.append(failed.reason)
                await run.all(branch(run, "c"))
                ran.append("went on")

    instance, _ = begin(story)
    plans = instance.feed(failing("1", StepFailed("no")))
    assert texts(plans) == ["a", "b"]
    if how == "close":
        instance.close()
        assert instance.retry(at=T0) == []
    elif how == "forget in a cycle":
        instance.definition = instance  # type: ignore[assignment]
    del instance
    gc.collect()
    assert sorted(ran) == ["a", "b", "no"]
    assert list(recwarn) == []


def test_a_branch_that_was_never_begun_is_dropped_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    async def bug(run: SagaRun) -> None:
        raise KeyError("x")

    async def idle(run: SagaRun) -> None: ...

    async def story(run: SagaRun, placed: OrderPlaced) -> None:
        await run.all(bug(run), idle(run))

    instance, _ = begin(story)
    assert instance.status is Status.PARKED
    del instance
    gc.collect()
    assert list(recwarn) == []
