"""What became of a command, asked of the service that owns it: a query that every service with queries answers.

A service that wants to be asked this and has no other queries lists `command_status`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeGuard
from uuid import UUID

from pydantic import BaseModel

from bus.codec import command_type_name, died_error, reply_type_name
from bus.envelope import Envelope, Kind, ReplyOutcome
from bus.errors import BadInput
from bus.messages import Command, Key, Message, Query
from eventstore.port import ClaimState, Standing
from foldbus.asking import Status
from foldbus.querying import QueryContext, QueryHandler

if TYPE_CHECKING:
    from bus.codec import Codec

FRAMEWORK = "foldbus"
"""What types of the framework's own begin with."""
_UNKNOWN = datetime(1970, 1, 1, tzinfo=UTC)


class CommandStatus(BaseModel, frozen=True):
    """`outcome`, `type` and `data` are those of the stored reply."""

    state: ClaimState
    outcome: ReplyOutcome | None = None
    type: str = ""
    data: str = ""


class StatusOf(Query[CommandStatus], type="foldbus.status-of.v1"):
    command_id: Key[UUID]


async def answer_status(query: StatusOf, ctx: QueryContext) -> CommandStatus:
    standing = await ctx.standing(query.command_id)
    reply = standing.reply
    if reply is None:
        return CommandStatus(state=standing.state)
    return CommandStatus(state=standing.state, outcome=reply.outcome, type=reply.type, data=reply.data.decode())


command_status = QueryHandler(answer_status)


def answering(queries: Sequence[QueryHandler]) -> tuple[QueryHandler, ...]:
    """What a service answers that lists these."""
    if not queries or any(StatusOf in one.queries for one in queries):
        return tuple(queries)
    return (*queries, command_status)


def status_of_own(codec: Codec, standing: Standing) -> Status:
    """With the answer as its type says; without it where that type is not known here any more."""
    if standing.reply is None:
        return Status(standing.state)
    return _status(codec, standing.state, standing.reply, None)


def status_of_other(codec: Codec, found: CommandStatus, asked: StatusOf, of: type[Command[Any]] | None) -> Status:
    """`of` says how to read the answer; None: if its type is named here."""
    if found.outcome is None:
        return Status(found.state)
    reply = Envelope(
        id=asked.command_id, kind=Kind.REPLY, type=found.type, source="", key=asked.key, data=found.data.encode(),
        time=_UNKNOWN, correlation_id=asked.command_id, causation_id=asked.command_id, outcome=found.outcome,
    )  # fmt: skip
    return replace(_status(codec, found.state, reply, of), reply=None)


def _status(codec: Codec, state: ClaimState, reply: Envelope, of: type[Command[Any]] | None) -> Status:
    if reply.outcome in (ReplyOutcome.DIED, ReplyOutcome.UNKNOWN):
        return Status(state, reply, None, died_error(reply))
    if state is not ClaimState.DONE:
        return Status(state, reply)
    if of is None or reply_type_name(str(of.type_name)) != reply.type:
        of = _command(codec, reply)
    return Status(state, reply, codec.decode_reply(reply, of) if of is not None else None)


def _command(codec: Codec, reply: Envelope) -> type[Command[Any]] | None:
    try:
        found = codec.registry.find(command_type_name(reply.type))
    except BadInput:
        return None
    return found if _is_command(found) else None


def _is_command(message: type[Message]) -> TypeGuard[type[Command[Any]]]:
    return issubclass(message, Command)
