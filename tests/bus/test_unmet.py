"""A reader that skips everything of a topic says so once, and only then."""

from __future__ import annotations

import logging

import pytest

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
