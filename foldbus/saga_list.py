"""The read model of a service's sagas: one row per instance, in the view `foldbus_sagas`.

Every worker with sagas runs it like any projection of the user's, from the service's own log. What is folded are the
sagas' own events, which are no messages: they name no key, the stream they were stored in does. `SagaCodec` puts them
into messages, so that the projection's machinery needs to know nothing of them.
"""

from __future__ import annotations

import asyncio
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
from projections import LOG, Checkpoint, Feed, FeedPage, Projection, ProjectionSettings
from sagas import Status
from sagas.events import (
    EVENTS,
    SagaCompensated,
    SagaCompensating,
    SagaCompleted,
    SagaEvent,
    SagaParked,
    SagaRetried,
    SagaStarted,
    read,
)


class SagaRow(BaseModel, frozen=True):
    """`changed_at` is when the status last changed, `failed_because` what it undoes itself for, `parked_because` what a
    person has to look at. What its steps are at is in the saga's stream: see `sagas.describe`."""

    saga_id: UUID
    definition: str
    version: int
    status: Literal["running", "compensating", "parked", "completed", "compensated"]
    started_by: str
    start_key: str
    started_at: datetime
    changed_at: datetime
    ended_at: datetime | None = None
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
    match event:
        case SagaCompensating(why=why):
            return {"status": Status.COMPENSATING.value, "failed_because": why}
        case SagaParked(reason=reason):
            return {"status": Status.PARKED.value, "parked_because": reason}
        case SagaRetried():
            # One that was parked while it undid itself goes on undoing.
            status = Status.RUNNING if row.failed_because is None else Status.COMPENSATING
            return {"status": status.value, "parked_because": None}
        case SagaCompleted():
            return {"status": Status.COMPLETED.value, "ended_at": event.at}
        case SagaCompensated(why=why):
            return {"status": Status.COMPENSATED.value, "ended_at": event.at, "failed_because": why}
        case _:
            return {}


# Steps come and go several times as often as all of these together: they are skipped by their type.
_FOLDED = (SagaStarted, SagaCompensating, SagaParked, SagaRetried, SagaCompleted, SagaCompensated)

saga_list: Projection[SagaRow] = _OwnLog(
    name="foldbus-sagas",
    version=1,
    fold=_fold,
    row=SagaRow,
    events=tuple(_WRAPPERS[event.type_name] for event in _FOLDED),
    key=lambda happened: happened.saga_id,
)
"""`connection.view(saga_list)` looks at it from a program."""

saga_codec = SagaCodec()

SETTINGS = ProjectionSettings(page=2000)
PAUSE_S = 0.5


class UnhurriedFeed:
    """Looks only every half second while there is little to read: a saga's beginning and its end are often moments
    apart, and read together they are one row written. Whoever asks for the list waits until it has reached the log's
    end, and sees no difference."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._near = False

    @property
    def sources(self) -> Collection[str]:
        return self._feed.sources

    async def read(self, after: Checkpoint, *, limit: int, timeout_s: float = 0.0) -> FeedPage:
        if self._near and timeout_s > 0:
            await asyncio.sleep(min(PAUSE_S, timeout_s))
        page = await self._feed.read(after, limit=limit, timeout_s=timeout_s)
        self._near = page.behind < limit
        return page
