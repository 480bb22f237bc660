"""Foldbus: event-sourced services that talk over Kafka, with sagas that undo themselves and read models that rebuild.

Users import from here. The rooms beside this package (`bus`, `eventstore`, `sagas`, `projections`) are its siblings;
other distributions ship modules of these names, so an intruder is named rather than half used.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

_HOME = Path(__file__).resolve().parent.parent


def _check_siblings() -> None:
    for room in ("bus", "eventstore", "sagas", "projections"):
        found = importlib.util.find_spec(room)
        origin = Path(found.origin).resolve() if found is not None and found.origin else None
        if origin is None or origin.parent.parent != _HOME:
            raise ImportError(
                f"foldbus needs its own package {room!r} beside it, but this environment offers "
                f"{origin or 'none'}; another distribution or a file of yours has that name: rename or remove it"
            )


_check_siblings()

from bus.breaker import BadBreaker, Breaker  # noqa: E402
from bus.envelope import Envelope, StreamId, Token  # noqa: E402
from bus.errors import (  # noqa: E402
    BadMessageClass,
    BadUpcaster,
    BusError,
    Cancelled,
    Died,
    FoldbusError,
    MessageTooLarge,
    MissingTopics,
    NoAnswer,
    NobodyDecides,
    OutcomeUnknown,
    QueryFailed,
    TopicMismatch,
    TransportUnavailable,
    UpcastFailed,
)
from bus.links import LinkRefused  # noqa: E402
from bus.messages import Command, Event, Key, Message, Query, Refused  # noqa: E402
from bus.metrics import MemoryMetrics, Metrics  # noqa: E402
from bus.transport import TopicSpec  # noqa: E402
from bus.upcasting import Upcaster, drop_event, split_event, upcast  # noqa: E402
from eventstore.decider import BadDecider, BadDecision, Decider, NoState  # noqa: E402
from eventstore.errors import (  # noqa: E402
    EventStoreError,
    NoSuchVersion,
    StoreUnavailable,
    StreamArchived,
    StreamTruncated,
    TooManyConflicts,
    WrongExpectedVersion,
)
from eventstore.port import ANY  # noqa: E402
from eventstore.repository import Appended, Loaded, Repository, Step  # noqa: E402
from eventstore.snapshots import Snapshots  # noqa: E402
from foldbus.calling import CallNext, Middleware, MiddlewareError  # noqa: E402
from foldbus.connection import Connection, Receipt, Status, token_of  # noqa: E402
from foldbus.contexts import BreakerOpen  # noqa: E402
from foldbus.delivery import AT_LEAST_ONCE, AT_MOST_ONCE, EXACTLY_ONCE, DeliveryMode  # noqa: E402
from foldbus.handlers import (  # noqa: E402
    Answer,
    BadAnswer,
    BadHandler,
    BareContext,
    Context,
    EffectContext,
    Handler,
    HandlerContext,
    HandlerEnded,
    ThreadContext,
    handler,
)
from foldbus.health import Health, HealthSettings  # noqa: E402
from foldbus.parking import KeyParked, ParkSettings  # noqa: E402
from foldbus.plaintext import PlaintextLink  # noqa: E402
from foldbus.querying import BadQueryAnswer, BadQueryHandler, QueryContext, QueryHandler  # noqa: E402
from foldbus.reading import Recorded  # noqa: E402
from foldbus.resources import Lifespan, LifespanFailed  # noqa: E402
from foldbus.retention import ClaimsTooShort  # noqa: E402
from foldbus.scheduling import BadDelay  # noqa: E402
from foldbus.service import BadService, Service  # noqa: E402
from foldbus.statuses import command_status  # noqa: E402
from foldbus.topics import BadTopics  # noqa: E402
from foldbus.transactions import BadTransaction  # noqa: E402
from foldbus.watchdog import WatchdogSettings  # noqa: E402
from foldbus.worker import Worker, WorkerSettings  # noqa: E402
from projections import (  # noqa: E402
    BadProjection,
    NotThere,
    Projection,
    ProjectionError,
    RebuildStopped,
    TokenElsewhere,
    projection,
)
from sagas import (  # noqa: E402
    SagaDefinition,
    SagaRun,
    StepCancelled,
    StepDied,
    StepFailed,
    StepRefused,
    StepTimedOut,
    StepUnknown,
    saga,
)

__all__ = [
    "ANY",
    "AT_LEAST_ONCE",
    "AT_MOST_ONCE",
    "EXACTLY_ONCE",
    "Answer",
    "Appended",
    "BadAnswer",
    "BadBreaker",
    "BadDecider",
    "BadDecision",
    "BadDelay",
    "BadHandler",
    "BadMessageClass",
    "BadProjection",
    "BadQueryAnswer",
    "BadQueryHandler",
    "BadService",
    "BadTopics",
    "BadTransaction",
    "BadUpcaster",
    "BareContext",
    "Breaker",
    "BreakerOpen",
    "BusError",
    "CallNext",
    "Cancelled",
    "ClaimsTooShort",
    "Command",
    "Connection",
    "Context",
    "Decider",
    "DeliveryMode",
    "Died",
    "EffectContext",
    "Envelope",
    "Event",
    "EventStoreError",
    "FoldbusError",
    "Handler",
    "HandlerContext",
    "HandlerEnded",
    "Health",
    "HealthSettings",
    "Key",
    "KeyParked",
    "Lifespan",
    "LifespanFailed",
    "LinkRefused",
    "Loaded",
    "MemoryMetrics",
    "Message",
    "MessageTooLarge",
    "Metrics",
    "Middleware",
    "MiddlewareError",
    "MissingTopics",
    "NoAnswer",
    "NoState",
    "NoSuchVersion",
    "NobodyDecides",
    "NotThere",
    "OutcomeUnknown",
    "ParkSettings",
    "PlaintextLink",
    "Projection",
    "ProjectionError",
    "Query",
    "QueryContext",
    "QueryFailed",
    "QueryHandler",
    "RebuildStopped",
    "Receipt",
    "Recorded",
    "Refused",
    "Repository",
    "SagaDefinition",
    "SagaRun",
    "Service",
    "Snapshots",
    "Status",
    "Step",
    "StepCancelled",
    "StepDied",
    "StepFailed",
    "StepRefused",
    "StepTimedOut",
    "StepUnknown",
    "StoreUnavailable",
    "StreamArchived",
    "StreamId",
    "StreamTruncated",
    "ThreadContext",
    "Token",
    "TokenElsewhere",
    "TooManyConflicts",
    "TopicMismatch",
    "TopicSpec",
    "TransportUnavailable",
    "UpcastFailed",
    "Upcaster",
    "WatchdogSettings",
    "Worker",
    "WorkerSettings",
    "WrongExpectedVersion",
    "command_status",
    "drop_event",
    "handler",
    "projection",
    "saga",
    "split_event",
    "token_of",
    "upcast",
]
