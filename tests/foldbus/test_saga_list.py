"""The list of sagas says what the operator's view of the same history says, after every turning point."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from uuid import uuid4

import pytest

from bus.envelope import Envelope, Kind
from bus.errors import UnknownType
from foldbus.saga_list import SagaHappened, SagaRow, saga_codec, saga_list
from sagas import saga_stream
from sagas.events import (
    SagaCompensated,
    SagaCompensating,
    SagaCompleted,
    SagaEvent,
    SagaParked,
    SagaRetried,
    SagaStarted,
    StoredMessage,
    stored,
)
from sagas.view import describe
from tests.eventstore.stores import NOON

START = StoredMessage(
    id=uuid4(), type="shop.sold.v1", source="shop", key="k1", data=b"{}", time=NOON, correlation_id=uuid4()
)
STARTED = SagaStarted(at=NOON, definition="ship", version=2, start=START)
LATER = NOON + timedelta(minutes=1)
COMPENSATING, COMPENSATED = SagaCompensating(at=LATER, why="no stock"), SagaCompensated(at=LATER, why="no stock")
PARKED, RETRIED, COMPLETED = SagaParked(at=LATER, reason="a bug"), SagaRetried(at=LATER), SagaCompleted(at=LATER)


def folded(*events: SagaEvent) -> tuple[SagaRow, list[Envelope]]:
    stream, row, records = saga_stream("ship", uuid4()), None, []
    for event in events:
        record = stored(event, uuid4(), key=stream.id, source="shop", start=START, cause=START.id)
        record = replace(record, stream=stream, version=len(records) + 1)
        records.append(record)
        happened = saga_codec.decode(record)
        assert isinstance(happened, SagaHappened)
        row = saga_list.fold(row, happened)
    assert row is not None
    return row, records


@pytest.mark.parametrize(
    "events",
    [
        (STARTED,),
        (STARTED, COMPLETED),
        (STARTED, PARKED),
        (STARTED, PARKED, RETRIED),
        (STARTED, COMPENSATING),
        (STARTED, COMPENSATING, COMPENSATED),
        (STARTED, COMPENSATING, PARKED),
        (STARTED, COMPENSATING, PARKED, RETRIED, COMPENSATED),
    ],
    ids=lambda events: events[-1].type_name,
)
def test_a_row_says_what_the_history_says(events: tuple[SagaEvent, ...]) -> None:
    row, records = folded(*events)
    view = describe(records)
    assert (row.definition, row.version, row.status, row.error) == ("ship", 2, view.status, view.error)
    assert (row.ended_at is None) == (view.ended_at is None)
    assert (row.started_at, row.changed_at, row.start_key) == (NOON, events[-1].at, "k1")


def test_one_that_was_parked_while_it_undid_itself_goes_on_undoing_when_retried() -> None:
    row, _ = folded(STARTED, COMPENSATING, PARKED, RETRIED)
    assert (row.status, row.error) == ("compensating", "no stock")


def test_nothing_else_is_taken_for_a_sagas_event() -> None:
    other = Envelope(uuid4(), Kind.EVENT, "shop.sold.v1", "shop", "k1", b"{}", NOON, uuid4())
    with pytest.raises(UnknownType):
        saga_codec.decode(other)
