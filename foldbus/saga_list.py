"""The read model of a service's sagas: one row per instance, in the view `foldbus_sagas`.

Every worker with sagas runs it like any projection of the user's, from the service's own log. What is folded are the
sagas' own events, which are no messages: they name no key, the stream they were stored in does. `SagaCodec` puts them
into messages, so that the projection's machinery needs to know nothing of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from types import new_class
from typing import Any, Literal, cast
from uuid import UUID

from pydantic import BaseModel

from bus.codec import JsonCodec
from bus.envelope import Envelope
from bus.errors import UnknownType
from bus.messages import Event, Key, Message
from bus.registry import Registry
from projections import LOG, Projection
from sagas import Status
from sagas.events import (
    EVENTS,
    SagaCancelled,
    SagaCompensated,
    SagaCompensating,
    SagaCompleted,
    SagaEvent,
    SagaParked,
    SagaRetried,
    SagaStarted,
    StepExpired,
    StepReplied,
    StepScheduled,
    read,
)
from sagas.instance import UNDO, label


class SagaRow(BaseModel, frozen=True):
    """`waiting` are the steps without an outcome, `failed_because` is what it undoes itself for, `parked_because` what
    a person has to look at."""

    saga_id: UUID
    definition: str
    version: int
    status: Literal["running", "compensating", "parked", "completed", "compensated"]
    started_by: str
    start_key: str
    started_at: datetime
    changed_at: datetime
    ended_at: datetime | None = None
    waiting: tuple[str, ...] = ()
    failed_because: str | None = None
    parked_because: str | None = None

    @property
    def error(self) -> str | None:
        """Why it does not simply go on, or did not."""
        return self.parked_because or self.failed_because


class SagaHappened(Event):
    """A stored saga event with the instance that it belongs to."""

    saga_id: Key[str]
    event: SagaEvent


def _wrapper(type_name: str) -> type[SagaHappened]:
    options = {"type": type_name, "public": False}
    made = new_class("SagaHappened", (SagaHappened,), options, lambda names: names.update(__module__=__name__))
    return cast("type[SagaHappened]", made)


_WRAPPERS: Mapping[str, type[SagaHappened]] = {name: _wrapper(name) for name in EVENTS}


class SagaCodec(JsonCodec):
    """Reads saga events; for anything else it is the codec of a service that names nothing."""

    def __init__(self) -> None:
        super().__init__(Registry(_WRAPPERS.values()))

    def decode(self, envelope: Envelope) -> Message:
        wrapper = _WRAPPERS.get(envelope.type)
        if wrapper is None or envelope.stream is None:
            raise UnknownType(f"{envelope.type} is no saga event from a saga's stream")
        return wrapper(saga_id=envelope.stream.id, event=read(envelope))


class _OwnLog(Projection[SagaRow]):
    """Saga events belong to whichever service stored them, not to one called `foldbus`."""

    def sources(self, service: str) -> Mapping[str, Collection[type[Event]]]:
        return {LOG: self.events}


def _fold(row: SagaRow | None, happened: SagaHappened) -> SagaRow | None:
    event = happened.event
    if isinstance(event, SagaStarted):
        return SagaRow(
            saga_id=UUID(happened.saga_id),
            definition=event.definition,
            version=event.version,
            status="running",
            started_by=event.start.type,
            start_key=event.start.key,
            started_at=event.at,
            changed_at=event.at,
        )
    if row is None:
        return None
    return row.model_copy(update={"changed_at": event.at, **_changes(row, event)})


def _changes(row: SagaRow, event: SagaEvent) -> dict[str, Any]:
    """As `SagaState.apply` keeps the books."""
    match event:
        case StepScheduled(path=path):
            status = Status.COMPENSATING if path.startswith(UNDO) else Status.RUNNING
            return {"status": status.value, "waiting": (*row.waiting, event.label)}
        case StepReplied(path=path, attempt=attempt):
            return {"waiting": _without(row, label(path, attempt))}
        case StepExpired(path=path):
            return {"waiting": _without(row, path)}
        case SagaCompensating(why=why):
            return {"status": Status.COMPENSATING.value, "failed_because": why}
        case SagaParked(reason=reason):
            return {"status": Status.PARKED.value, "parked_because": reason}
        case SagaRetried():
            return {"status": Status.RUNNING.value, "parked_because": None}
        case SagaCancelled():
            return {"waiting": ()}
        case SagaCompleted():
            return {"status": Status.COMPLETED.value, "ended_at": event.at}
        case SagaCompensated(why=why):
            return {"status": Status.COMPENSATED.value, "ended_at": event.at, "failed_because": why}
        case _:
            return {}


def _without(row: SagaRow, step: str) -> tuple[str, ...]:
    return tuple(name for name in row.waiting if name != step)


saga_list: Projection[SagaRow] = _OwnLog(
    name="foldbus-sagas",
    version=1,
    fold=_fold,
    row=SagaRow,
    events=tuple(_WRAPPERS.values()),
    key=lambda happened: happened.saga_id,
)
"""`connection.view(saga_list)` looks at it from a program."""

saga_codec = SagaCodec()
