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
    NobodyDecides,
    OutcomeUnknown,
    TopicMismatch,
    TransportUnavailable,
    UpcastFailed,
)
from bus.messages import Command, Event, Key, Message, Query, Refused  # noqa: E402
from bus.metrics import MemoryMetrics, Metrics  # noqa: E402
from bus.upcasting import Upcaster, drop_event, split_event, upcast  # noqa: E402
from eventstore.decider import BadDecider, BadDecision, Decider  # noqa: E402
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
from foldbus.connection import Connection, Receipt, Status, token_of  # noqa: E402
from foldbus.handlers import BadAnswer, BadHandler, Context, Handler, ThreadContext  # noqa: E402
from foldbus.reading import Recorded  # noqa: E402
from foldbus.service import BadService, Service  # noqa: E402
from foldbus.transactions import BadTransaction  # noqa: E402
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
    saga,
)

__all__ = [
    "ANY",
    "Appended",
    "BadAnswer",
    "BadDecider",
    "BadDecision",
    "BadHandler",
    "BadMessageClass",
    "BadProjection",
    "BadService",
    "BadTransaction",
    "BadUpcaster",
    "BusError",
    "Cancelled",
    "Command",
    "Connection",
    "Context",
    "Decider",
    "Died",
    "Envelope",
    "Event",
    "EventStoreError",
    "FoldbusError",
    "Handler",
    "Key",
    "Loaded",
    "MemoryMetrics",
    "Message",
    "MessageTooLarge",
    "Metrics",
    "MissingTopics",
    "NoSuchVersion",
    "NobodyDecides",
    "NotThere",
    "OutcomeUnknown",
    "Projection",
    "ProjectionError",
    "Query",
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
    "StoreUnavailable",
    "StreamArchived",
    "StreamId",
    "StreamTruncated",
    "ThreadContext",
    "Token",
    "TokenElsewhere",
    "TooManyConflicts",
    "TopicMismatch",
    "TransportUnavailable",
    "UpcastFailed",
    "Upcaster",
    "Worker",
    "WorkerSettings",
    "WrongExpectedVersion",
    "drop_event",
    "projection",
    "saga",
    "split_event",
    "token_of",
    "upcast",
]
