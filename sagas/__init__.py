"""Sagas: processes across services that undo themselves when a step fails, written as coroutines.

`sagas.testing` is the kit to test one with; `sagas.view` shows one to an operator.
"""

from sagas.behaviour import SagaBehaviour, commands_topic_of
from sagas.definition import SagaDefinition, saga, saga_group, saga_id, saga_stream
from sagas.errors import (
    BadSaga,
    BadStep,
    CannotRun,
    NotDeterministic,
    SagaError,
    StepAbandoned,
    StepCancelled,
    StepDied,
    StepFailed,
    StepRefused,
    StepTimedOut,
    StepUnknown,
)
from sagas.instance import Status
from sagas.operator import (
    CANCEL_TYPE,
    RETRY_TYPE,
    TIMEOUT_TYPE,
    CancelSaga,
    RetrySaga,
    SagaNotParked,
    SagaNotRunning,
)
from sagas.run import SagaRun
from sagas.state import SagaState
from sagas.view import SagaView, StepView, describe, timeline

__all__ = [
    "CANCEL_TYPE",
    "RETRY_TYPE",
    "TIMEOUT_TYPE",
    "BadSaga",
    "BadStep",
    "CancelSaga",
    "CannotRun",
    "NotDeterministic",
    "RetrySaga",
    "SagaBehaviour",
    "SagaDefinition",
    "SagaError",
    "SagaNotParked",
    "SagaNotRunning",
    "SagaRun",
    "SagaState",
    "SagaView",
    "Status",
    "StepAbandoned",
    "StepCancelled",
    "StepDied",
    "StepFailed",
    "StepRefused",
    "StepTimedOut",
    "StepUnknown",
    "StepView",
    "commands_topic_of",
    "describe",
    "saga",
    "saga_group",
    "saga_id",
    "saga_stream",
    "timeline",
]
