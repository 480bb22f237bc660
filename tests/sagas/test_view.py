"""What an operator sees, made from stored history alone."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from sagas import CancelSaga, SagaError, Status, describe, timeline
from sagas.testing import Died
from tests.sagas.stories import PLACED, CardDeclined, Paid, Reserved, fulfil_order
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
    assert view.error == "step 3 (payments.pay.v1): payments.card-declined: no funds"
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
    assert error == "  step 3 (payments.pay.v1): payments.card-declined: no funds"
    payment = world.sent[1].key
    assert lines == [
        "     0.000s  started by orders.order-placed.v1 'o-1'",
        "     0.000s  step 1: stock.reserve.v1 for 'o-1'",
        "     2.000s  step 1: ok",
        f"     2.000s  step 3: payments.pay.v1 for '{payment}', within 30 s",
        "     4.000s  step 3: refused (payments.card-declined: no funds)",
        "     4.000s  step 4: orders.cancel-order.v1 for 'o-1'",
        "     6.000s  step 4: ok",
        "     6.000s  compensating: step 3 (payments.pay.v1): payments.card-declined: no funds",
        "     6.000s  step undo:1: stock.release.v1 for 'o-1'",
        "     8.000s  step undo:1: ok",
        "     8.000s  compensated",
    ]


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
