"""A reader that skips everything of a topic says so once, and only then."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

import pytest

from bus.transport import Assignment, Delivery
from bus.unmet import ENOUGH, Unmet

LOG = logging.getLogger("foldbus.test.unmet")


def test_says_once_what_was_skipped_when_nothing_of_a_topic_was_wanted(caplog: pytest.LogCaptureFixture) -> None:
    unmet = Unmet("shop.handler.greet", LOG)
    unmet.read("crm.events", wanted=False, skipped={"crm.called.v1": ENOUGH - 2})
    assert caplog.messages == []
    assert unmet.watches(["crm.events"])
    unmet.read("crm.events", wanted=False, skipped={"crm.moved.v1": 1, "crm.called.v1": 1})
    assert caplog.messages == [
        "shop.handler.greet: the first 100 records of crm.events are all of types that it does not name: "
        "crm.called.v1 (99), crm.moved.v1 (1); is a name misspelt? (foldbus describe shows what it names)"
    ]
    assert not unmet.watches(["crm.events"])
    unmet.read("crm.events", wanted=False, skipped={"crm.called.v1": ENOUGH})
    assert len(caplog.messages) == 1


def test_is_silent_once_a_record_was_wanted_however_many_are_skipped(caplog: pytest.LogCaptureFixture) -> None:
    unmet = Unmet("shop.handler.greet", LOG)
    unmet.read("crm.events", wanted=False, skipped={"crm.called.v1": ENOUGH - 1})
    unmet.read("crm.events", wanted=True, skipped={"crm.called.v1": 1})
    unmet.read("crm.events", wanted=False, skipped={"crm.called.v1": 10 * ENOUGH})
    assert caplog.messages == []
    assert not unmet.watches(["crm.events"])


def test_tells_topics_apart(caplog: pytest.LogCaptureFixture) -> None:
    unmet = Unmet("shop.handler.greet", LOG)
    unmet.read("crm.events", wanted=True, skipped={})
    unmet.read("bank.events", wanted=False, skipped={f"bank.paid-{n}.v1": 50 - n for n in range(7)})
    assert unmet.watches(["crm.events", "bank.events"]) is False
    assert "of bank.events" in caplog.messages[0]
    assert "bank.paid-4.v1 (46), …; is a name misspelt?" in caplog.messages[0]


def deliveries(topic: str, partition: int, offsets: range) -> list[Delivery]:
    part = Assignment(topic, partition)
    return [Delivery(part, offset, b"k", b"{}", (), datetime.now(UTC)) for offset in offsets]


def test_counts_what_came_and_was_skipped_by_topic(caplog: pytest.LogCaptureFixture) -> None:
    unmet = Unmet("shop.handler.greet", LOG)
    came = [*deliveries("crm.events", 0, range(60)), *deliveries("bank.events", 0, range(60))]
    unmet.took(came, {("crm.events", "crm.called.v1"): 60, ("bank.events", "bank.paid.v1"): 59})
    assert caplog.messages == []
    assert not unmet.watches(["bank.events"])  # one of its records was wanted
    unmet.took(deliveries("crm.events", 1, range(60)), {("crm.events", "crm.called.v1"): 60})
    (line,) = caplog.messages
    assert "the first 120 records of crm.events" in line


def test_who_goes_on_where_it_was_is_not_judged_by_what_comes_next(caplog: pytest.LogCaptureFixture) -> None:
    """A worker that is started again behind the last order has nothing but the end of sagas before it."""
    unmet = Unmet("shop.saga.fulfil", LOG)
    unmet.took(deliveries("shop.events", 0, range(7, 7 + ENOUGH)), {("shop.events", "shop.done.v1"): ENOUGH})
    assert caplog.messages == []
    assert not unmet.watches(["shop.events"])
