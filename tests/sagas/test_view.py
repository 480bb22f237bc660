"""What an operator sees, made from stored history alone."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from sagas import CancelSaga, SagaError, SagaRun, Status, describe, saga, timeline
from sagas.events import SagaCompensating
from sagas.testing import Died
from tests.sagas.stories import PLACED, CardDeclined, Erase, Note, OrderPlaced, Paid, Reserved, Ship, fulfil_order
from tests.sagas.world import World


def lived(*answers: object, every_s: float = 2) -> World:
    world = World(fulfil_order)
    world.start(PLACED)
    for answer in answers:
        world.clock.time += timedelta(seconds=every_s)
        world.answer(answer)
    return world


def test_a_running_saga_shows_what_it_waits_for_and_how_old_it_is() -> None:
    world = lived(Reserved())
    view = describe(world.history, now=world.clock.now() + timedelta(seconds=58))
    assert (view.id, view.definition, view.version) == (world.saga_id, "fulfil-order", 1)
    assert (view.status, view.waiting, view.error, view.ended_at) == (Status.RUNNING, ("3",), None, None)
    assert view.age == timedelta(seconds=60)
    reserve, pay = view.steps
    assert (reserve.path, reserve.command_type, reserve.key) == ("1", "stock.reserve.v1", "o-1")
    assert (reserve.outcome, reserve.took) == ("ok", timedelta(seconds=2))
    assert (pay.path, pay.outcome, pay.took, pay.timeout_s) == ("3", None, None, 30)
    assert pay.command_id == str(world.sent[-1].id)


def test_a_compensating_saga_shows_why_and_its_age_ends_with_it() -> None:
    world = lived(Reserved(), CardDeclined("no funds"), None)
    view = describe(world.history)
    assert (view.status, view.waiting) == (Status.COMPENSATING, ("undo:1",))
    assert view.error == "payments.pay.v1: payments.card-declined: no funds"
    assert [step.why for step in view.steps if step.path == "3"] == ["payments.card-declined: no funds"]
    world.answer(None)
    ended = describe(world.history, now=world.clock.now() + timedelta(days=9))
    assert (ended.status, ended.age, ended.waiting) == (Status.COMPENSATED, timedelta(seconds=6), ())
    assert ended.error == view.error


def test_a_parked_saga_shows_its_reason_and_a_retry_clears_it() -> None:
    world = lived(Reserved(), CardDeclined(), None, Died("no such shelf"))
    view = describe(world.history)
    assert view.status is Status.PARKED
    assert view.error is not None
    assert "no such shelf" in view.error
    world.retry()
    view = describe(world.history)
    assert (view.status, view.waiting) == (Status.COMPENSATING, ("undo:1#2",))
    assert [(step.attempt, step.outcome) for step in view.steps if step.path == "undo:1"] == [(1, "died"), (2, None)]


def test_timed_out_and_abandoned_steps_are_told_apart() -> None:
    world = lived(Reserved())
    (timer,) = world.timers.values()
    world.replier.handle(timer.envelope)
    world.replier.handle(world.verb(CancelSaga))
    assert [step.outcome for step in describe(world.history).steps] == ["ok", "timed-out", "abandoned", None]


def test_the_timeline_reads_as_a_story() -> None:
    world = lived(Reserved(), CardDeclined("no funds"), None, None)
    heading, error, *lines = timeline(describe(world.history))
    assert heading == f"fulfil-order v1  {world.saga_id}  compensated  age 8.000s"
    assert error == "  payments.pay.v1: payments.card-declined: no funds"
    payment = world.sent[1].key
    assert lines == [
        "     0.000s  started by orders.order-placed.v1 'o-1'",
        "     0.000s  step 1: stock.reserve.v1 for 'o-1'",
        "     2.000s  step 1: ok",
        f"     2.000s  step 2: payments.pay.v1 for '{payment}', within 30 s",
        "     4.000s  step 2: refused (payments.card-declined: no funds)",
        "     4.000s  step 3: orders.cancel-order.v1 for 'o-1'",
        "     6.000s  step 3: ok",
        "     6.000s  compensating: payments.pay.v1: payments.card-declined: no funds",
        "     6.000s  undo of step 1: stock.release.v1 for 'o-1'",
        "     8.000s  undo of step 1: ok",
        "     8.000s  compensated",
    ]


def test_a_refusal_that_says_no_more_than_its_code_is_shown_once() -> None:
    world = lived(Reserved(), CardDeclined(), None)
    view = describe(world.history)
    assert view.error == "payments.pay.v1: payments.card-declined"
    assert [step.why for step in view.steps if step.path == "3"] == ["payments.card-declined"]


def test_steps_are_numbered_as_people_count_whatever_took_a_place_in_the_story() -> None:
    @saga("tour", version=1)
    async def tour(run: SagaRun, placed: OrderPlaced) -> None:
        async def shipping() -> None:
            run.uuid()
            await run.step(Ship(order_id="o-1"))
            await run.step(Note(text="shipped"))

        run.uuid()
        await run.step(Note(text="first"), undo=Erase(text="first"))
        await run.all(run.step(Note(text="left")), run.step(Note(text="right")))
        await run.all(shipping(), run.step(Note(text="beside")))
        await run.step(Note(text="last"))

    world = World(tour)
    world.start(PLACED)
    world.answer(None)
    for nth in (-2, -1):
        world.answer(None, to=world.sent[nth])
    beside, ship = sorted(world.sent[-2:], key=lambda sent: sent.key)
    world.answer(None, to=beside)
    world.answer(None, to=ship)
    world.answer(None)
    world.answer(Died("no paper"))
    view = describe(world.history)
    assert {step.path: step.name for step in view.steps} == {
        "2": "step 1", "3": "step 2", "4": "step 3", "7.1.2": "step 4.1.1", "6": "step 5", "7.1.3": "step 4.1.2",
        "8": "step 6", "undo:2": "undo of step 1",
    }  # fmt: skip


def test_an_old_reason_that_names_a_path_is_shown_with_the_number() -> None:
    world = lived(Reserved(), CardDeclined("no funds"), None)
    nth, record = next((nth, one) for nth, one in enumerate(world.history) if one.type == SagaCompensating.type_name)
    old = SagaCompensating(at=record.time, why="step 3 (payments.pay.v1): payments.card-declined: step 3 (x): no funds")
    world.history[nth] = replace(record, data=old.model_dump_json().encode())
    assert describe(world.history).error == "step 2 (payments.pay.v1): payments.card-declined: step 3 (x): no funds"


def test_a_parked_step_is_named_by_its_number() -> None:
    world = lived(Reserved())
    torn = replace(world.reply(Paid()), data=b'"torn"')
    world.replier.handle(torn)
    view = describe(world.history)
    assert view.error is not None
    assert view.error.startswith("the answer to step 2 cannot be read")
    assert view.timeline[-1].what == f"parked: {view.error}"


def test_an_event_of_a_newer_program_is_named_and_the_rest_is_shown() -> None:
    world = lived(Reserved(), Paid())
    world.history.append(replace(world.history[-1], type="foldbus.saga-dreamt.v1"))
    view = describe(world.history)
    assert view.waiting == ("4",)
    assert "foldbus.saga-dreamt.v1" in view.timeline[-1].what


def test_what_is_no_history_is_refused() -> None:
    with pytest.raises(SagaError, match="begins with nothing"):
        describe([])
    with pytest.raises(SagaError, match=r"begins with foldbus\.saga-step-scheduled\.v1"):
        describe(lived().history[1:])
