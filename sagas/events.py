"""A saga's own history: what its stream holds. Never published; read by replay, by people and by nobody else.

Each event is one stored envelope, JSON without defaults. `at` is the recorded time that `run.now()` answers while the
event is fed. A type is never changed, only added: sagas that run for a year are replayed from what is written here.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, ClassVar
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, PlainSerializer, PlainValidator, ValidationError

from bus.codec import explain
from bus.envelope import Envelope, Kind, ReplyOutcome
from bus.errors import Undecodable, UnknownType
from sagas.instance import label


def _to_utc(at: datetime) -> datetime:
    return at.astimezone(UTC)


def _bytes_to_json(data: bytes) -> str | dict[str, str]:
    try:
        return data.decode()
    except UnicodeDecodeError:  # a codec that encrypts
        return {"base64": base64.b64encode(data).decode()}


def _bytes_from_json(found: object) -> bytes:
    match found:
        case bytes():
            return found
        case str():
            return found.encode()
        case {"base64": str(text)}:
            return base64.b64decode(text)
        case _:
            raise ValueError(f"wanted text or base64, found {found!r:.80}")


Time = Annotated[datetime, AfterValidator(_to_utc)]
Body = Annotated[bytes, PlainValidator(_bytes_from_json), PlainSerializer(_bytes_to_json, when_used="json")]
"""A message's very bytes, as text within JSON."""


class StoredMessage(BaseModel):
    """The envelope that started the saga, whole but for where it was read."""

    model_config = ConfigDict(frozen=True)

    id: UUID
    type: str
    source: str
    key: str
    data: Body
    time: Time
    correlation_id: UUID
    causation_id: UUID | None = None
    epoch: int = 0
    tenant: str | None = None
    actor: str | None = None
    headers: dict[str, str] = {}

    @classmethod
    def of(cls, envelope: Envelope) -> StoredMessage:
        return cls(
            id=envelope.id,
            type=envelope.type,
            source=envelope.source,
            key=envelope.key,
            data=envelope.data,
            time=envelope.time,
            correlation_id=envelope.correlation_id,
            causation_id=envelope.causation_id,
            epoch=envelope.epoch,
            tenant=envelope.tenant,
            actor=envelope.actor,
            headers=dict(envelope.headers),
        )

    def envelope(self) -> Envelope:
        return Envelope(
            id=self.id,
            kind=Kind.EVENT,
            type=self.type,
            source=self.source,
            key=self.key,
            data=self.data,
            time=self.time,
            correlation_id=self.correlation_id,
            causation_id=self.causation_id,
            epoch=self.epoch,
            tenant=self.tenant,
            actor=self.actor,
            headers=self.headers,
        )


class SagaEvent(BaseModel):
    model_config = ConfigDict(frozen=True)

    type_name: ClassVar[str]
    at: Time


class SagaStarted(SagaEvent):
    """Always the first. The instance stays on this version of the definition."""

    type_name = "foldbus.saga-started.v1"
    definition: str
    version: int
    start: StoredMessage


class StepScheduled(SagaEvent):
    """A command was sent, in the same unit. `id` is the command's; an undo has the path `undo:<path of its step>`."""

    type_name = "foldbus.saga-step-scheduled.v1"
    path: str
    id: UUID
    type: str
    key: str
    attempt: int = 1
    undo_type: str | None = None
    timeout_s: float | None = None

    @property
    def label(self) -> str:
        return label(self.path, self.attempt)


class StepReplied(SagaEvent):
    """The first answer to a step. `data` are the reply's bytes; `why` says in words why it was not ok."""

    type_name = "foldbus.saga-step-replied.v1"
    path: str
    outcome: ReplyOutcome
    data: Body = b"null"
    attempt: int = 1
    why: str | None = None


class StepExpired(SagaEvent):
    """The step's timeout came before its answer: its outcome is unknown."""

    type_name = "foldbus.saga-step-timed-out.v1"
    path: str
    timeout_s: float | None = None


class SagaCompensating(SagaEvent):
    """A failure left the saga's body: what was done is being undone."""

    type_name = "foldbus.saga-compensating.v1"
    why: str


class SagaParked(SagaEvent):
    """The saga stands still until a person retries it. For people: a replay does not feed it."""

    type_name = "foldbus.saga-parked.v1"
    reason: str
    path: str | None = None


class SagaRetried(SagaEvent):
    """An operator let a parked saga go on: rebuilt from its history on the code of that moment."""

    type_name = "foldbus.saga-retried.v1"
    by: str = ""


class SagaCancelled(SagaEvent):
    """An operator cancelled the saga: every step under way failed as abandoned."""

    type_name = "foldbus.saga-cancelled.v1"
    by: str = ""


class SagaCompleted(SagaEvent):
    type_name = "foldbus.saga-completed.v1"


class SagaCompensated(SagaEvent):
    """Everything that was to be undone is undone; `why` is the failure that led here."""

    type_name = "foldbus.saga-compensated.v1"
    why: str


EVENTS: Mapping[str, type[SagaEvent]] = {
    event.type_name: event
    for event in (
        SagaStarted,
        StepScheduled,
        StepReplied,
        StepExpired,
        SagaCompensating,
        SagaParked,
        SagaRetried,
        SagaCancelled,
        SagaCompleted,
        SagaCompensated,
    )
}


def stored(event: SagaEvent, id: UUID, *, key: str, source: str, start: StoredMessage, cause: UUID) -> Envelope:
    """The event as it is appended to the saga's stream; of the story of what started the saga."""
    return Envelope(
        id=id,
        kind=Kind.EVENT,
        type=event.type_name,
        source=source,
        key=key,
        data=event.__pydantic_serializer__.to_json(event, exclude_defaults=True),
        time=event.at,
        correlation_id=start.correlation_id,
        causation_id=cause,
        tenant=start.tenant,
        actor=start.actor,
    )


def read(record: Envelope) -> SagaEvent:
    """The event of a stored envelope. Raises UnknownType when a newer program wrote it, Undecodable when it is torn."""
    found = EVENTS.get(record.type)
    if found is None:
        raise UnknownType(f"a saga's history holds {record.type!r}, which this program does not know")
    try:
        event: SagaEvent = found.__pydantic_validator__.validate_json(record.data)
    except ValidationError as error:
        raise Undecodable(f"{record.type} in a saga's history: {explain(error)}") from error
    return event
