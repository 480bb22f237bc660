"""What an operator can tell a saga, as commands to the service that runs it, and the timer's own message.

Send them with the saga's id as key to the topic of the service's replies, where its sagas listen.
"""

from __future__ import annotations

from typing import TypeVar
from uuid import UUID

from pydantic import BaseModel, ConfigDict, ValidationError

from bus.codec import explain
from bus.envelope import Envelope
from bus.errors import Undecodable
from bus.messages import Command, Key, Refused

M = TypeVar("M", bound=BaseModel)


class RetrySaga(Command[None], type="foldbus.saga-retry.v1"):
    """Lets a parked saga go on: its history is replayed on today's code; an undo that failed is sent once more.
    Refused with SagaNotParked when there is nothing to retry."""

    saga_id: Key[UUID]
    definition: str
    by: str = ""


class CancelSaga(Command[None], type="foldbus.saga-cancel.v1"):
    """Fails every step under way, so that the saga compensates. Refused with SagaNotRunning when it has ended, is
    parked, or is compensating already."""

    saga_id: Key[UUID]
    definition: str
    by: str = ""


class SagaNotParked(Refused, code="foldbus.saga-not-parked"):
    pass


class SagaNotRunning(Refused, code="foldbus.saga-not-running"):
    pass


TIMEOUT_TYPE = "foldbus.step-timed-out.v1"
RETRY_TYPE = str(RetrySaga.type_name)
CANCEL_TYPE = str(CancelSaga.type_name)


class Timeout(BaseModel):
    """What a step's timer carries."""

    model_config = ConfigDict(frozen=True)

    path: str


def parse(model: type[M], envelope: Envelope) -> M:
    """Raises Undecodable."""
    try:
        return model.model_validate_json(envelope.data)
    except ValidationError as error:
        raise Undecodable(f"{envelope.type} cannot be read: {explain(error)}") from error
