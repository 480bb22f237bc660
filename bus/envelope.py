"""The envelope: a message's bytes with its ids, its time and its way back. Every port speaks envelopes or bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any
from uuid import UUID

from bus.quick import quick

Position = int
"""Place in one service's log, of events and outgoing messages alike; grows, may have gaps. The first is above 0."""
Version = int
"""How many events a stream holds; its first event has version 1, an empty stream is at 0."""
Offset = int
"""Place of a record in one partition of a topic."""

NO_HEADERS: Mapping[str, str] = MappingProxyType({})


def _no_headers() -> Mapping[str, str]:
    return NO_HEADERS


class Kind(StrEnum):
    COMMAND = "command"
    EVENT = "event"
    QUERY = "query"
    REPLY = "reply"


class ReplyOutcome(StrEnum):
    OK = "ok"
    REFUSED = "refused"
    DIED = "died"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"
    """Given up after its handler had begun to call the outside world: in the dead letters, and perhaps done."""
    EXPIRED = "expired"
    """Not begun, since its deadline had passed. Says nothing about a repeat, which carries a later one: the reply names
    the deadline it is about."""


@quick
@dataclass(frozen=True, slots=True, order=True)
class StreamId:
    """The events of one aggregate: a category (which decider) and an id (the key)."""

    category: str
    id: str

    def __str__(self) -> str:
        return f"{self.category}-{self.id}"


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """Where the answer goes: topic and record key; `instance` tells replicas that share the topic apart."""

    topic: str
    key: str
    instance: str = ""


@quick
@dataclass(frozen=True, slots=True)
class Token:
    """Where in a log a unit ended: what `after=` waits for.

    `position` is the unit's last event, `public` its last public one (0: none); `key` is the key its events carry.
    """

    source: str
    epoch: int
    key: str
    position: Position
    public: Position


class _Unparsed:
    """A place for what an adapter has not parsed yet. Not a field: it is no part of the message."""

    __slots__ = ("unparsed",)
    unparsed: Any


@quick
@dataclass(frozen=True, slots=True)
class Envelope(_Unparsed):
    """One message as it is stored and sent; `data` are the very bytes of both.

    `source` is the service that made it, `epoch` counts that service's restored databases. `undoes` names the command
    that this one compensates. `topic` is where it is published (None: it is only stored). `stream`, `version` and
    `position` are set on stored events, `position` alone on stored outgoing messages. A reply has `outcome`, the
    command's id as `causation_id`, and `token` once it was committed. `headers` carries W3C trace context and foreign
    headers.
    """

    id: UUID
    kind: Kind
    type: str
    source: str
    key: str
    data: bytes
    time: datetime
    correlation_id: UUID
    causation_id: UUID | None = None
    epoch: int = 0
    reply_to: ReplyTo | None = None
    deadline: datetime | None = None
    undoes: UUID | None = None
    outcome: ReplyOutcome | None = None
    token: Token | None = None
    tenant: str | None = None
    actor: str | None = None
    topic: str | None = None
    stream: StreamId | None = None
    version: Version | None = None
    position: Position | None = None
    headers: Mapping[str, str] = field(default_factory=_no_headers)


@quick
@dataclass(frozen=True, slots=True)
class Origin:
    """What a new envelope inherits: who makes it, and because of which message."""

    source: str
    id: UUID
    time: datetime
    correlation_id: UUID
    causation_id: UUID | None = None
    tenant: str | None = None
    actor: str | None = None
    headers: Mapping[str, str] = field(default_factory=_no_headers)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a message was given up: the error as class, text and stack, how often it was tried, by which code."""

    error: str
    message: str
    stack: str
    attempts: int
    first_failed_at: datetime
    failed_at: datetime
    code_version: str = ""
