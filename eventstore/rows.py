"""Envelopes as rows, shared by the adapters: some columns, and one JSON document for everything else.

Columns: id, type, key, topic, data (the very bytes), time, and by place version, stream and position. `meta` holds the
rest, absent fields left out, so that a plain event costs some 130 bytes. A whole envelope outside a table of its own
(a stored reply, a timer's message) is `document` plus its `data`. Instants inside a document are microseconds since
1970. What is read back equals what was stored, to the last header.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from pydantic_core import from_json, to_json

from bus.envelope import (
    NO_HEADERS,
    Envelope,
    Failure,
    Kind,
    Position,
    ReplyOutcome,
    ReplyTo,
    StreamId,
    Token,
    Version,
)
from eventstore.port import DeadLetter

_START = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_plain = str.__str__  # an enum's text without the enum: half the time of encoding it
_KINDS = {str(kind): kind for kind in Kind}
_OUTCOMES = {str(outcome): outcome for outcome in ReplyOutcome}


def micros(instant: datetime) -> int:
    """Microseconds since 1970, exact."""
    return (instant - _START) // _MICROSECOND


def instant(micros: int) -> datetime:
    """The inverse of `micros`, in UTC."""
    return _START + timedelta(microseconds=micros)


def meta(envelope: Envelope, *, epoch: int, token: Token | None = None) -> str:
    """Everything without a column of its own, as JSON. `epoch` is what is stored as the envelope's (see `log_epoch`),
    and so is `token` if given: a reply's, which is known only when its unit is written."""
    return to_json(_meta(envelope, epoch, token)).decode()


def log_epoch(envelope: Envelope, *, service: str, epoch: int) -> int:
    """The epoch to store with an envelope: that of the log it enters, if its own service's; otherwise it stays.

    Stamped when it is appended, not when it is published: what a restored database holds from before keeps its old
    epoch, so that a consumer that has seen it recognises it when it is published once more.
    """
    return epoch if envelope.source == service else envelope.epoch


def envelope(
    id: UUID,
    type: str,
    key: str,
    topic: str | None,
    data: bytes,
    time: datetime,
    meta: str | bytes,
    stream: StreamId | None = None,
    version: Version | None = None,
    position: Position | None = None,
) -> Envelope:
    """The inverse: an envelope from its columns and its `meta`."""
    return _envelope(id, type, key, topic, data, time, from_json(meta), stream, version, position)


def document(envelope: Envelope, *, epoch: int, token: Token | None = None) -> str:
    """All of an envelope but `data` (and its place in a log) as JSON; `epoch` and `token` as for `meta`."""
    found = _meta(envelope, epoch, token)
    found["id"] = envelope.id.hex
    found["type"] = envelope.type
    found["key"] = envelope.key
    found["time"] = micros(envelope.time)
    if envelope.topic is not None:
        found["topic"] = envelope.topic
    return to_json(found).decode()


def from_document(document: str | bytes, data: bytes) -> Envelope:
    found = from_json(document)
    return _envelope(
        UUID(found["id"]),
        found["type"],
        found["key"],
        found.get("topic"),
        data,
        instant(found["time"]),
        found,
        None,
        None,
        None,
    )


def _meta(envelope: Envelope, epoch: int, token: Token | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": _plain(envelope.kind),
        "source": envelope.source,
        "correlation": envelope.correlation_id.hex,
    }
    if epoch:
        found["epoch"] = epoch
    if envelope.causation_id is not None:
        found["causation"] = envelope.causation_id.hex
    if (to := envelope.reply_to) is not None:
        found["reply_to"] = (to.topic, to.key, to.instance)
    if envelope.deadline is not None:
        found["deadline"] = micros(envelope.deadline)
    if envelope.undoes is not None:
        found["undoes"] = envelope.undoes.hex
    if envelope.outcome is not None:
        found["outcome"] = _plain(envelope.outcome)
    token = token or envelope.token
    if token is not None:
        found["token"] = (token.source, token.epoch, token.key, token.position, token.public)
    if envelope.tenant is not None:
        found["tenant"] = envelope.tenant
    if envelope.actor is not None:
        found["actor"] = envelope.actor
    if envelope.headers:
        # As pairs: the order of headers is part of the message.
        found["headers"] = tuple(envelope.headers.items())
    return found


def _envelope(
    id: UUID,
    type: str,
    key: str,
    topic: str | None,
    data: bytes,
    time: datetime,
    found: dict[str, Any],
    stream: StreamId | None,
    version: Version | None,
    position: Position | None,
) -> Envelope:
    get = found.get
    causation, reply_to, deadline, undoes = get("causation"), get("reply_to"), get("deadline"), get("undoes")
    outcome, token, headers = get("outcome"), get("token"), get("headers")
    return Envelope(
        id,
        _KINDS[found["kind"]],
        type,
        found["source"],
        key,
        data,
        time,
        UUID(found["correlation"]),
        None if causation is None else UUID(causation),
        get("epoch", 0),
        None if reply_to is None else ReplyTo(*reply_to),
        None if deadline is None else instant(deadline),
        None if undoes is None else UUID(undoes),
        None if outcome is None else _OUTCOMES[outcome],
        None if token is None else Token(*token),
        get("tenant"),
        get("actor"),
        topic,
        stream,
        version,
        position,
        NO_HEADERS if headers is None else dict(headers),
    )


def dead_letter_document(letter: DeadLetter) -> str:
    """What a dead letter has besides consumer, id, key, value and the time it failed, as JSON."""
    failure = letter.failure
    # The standard library's: an error's text may hold half a surrogate pair, which it escapes and pydantic refuses.
    return json.dumps(
        {
            "topic": letter.topic,
            "partition": letter.partition,
            "offset": letter.offset,
            "type": letter.type,
            "headers": [(name, value.hex()) for name, value in letter.headers],
            "error": failure.error,
            "message": failure.message,
            "stack": failure.stack,
            "attempts": failure.attempts,
            "first_failed_at": micros(failure.first_failed_at),
            "code_version": failure.code_version,
        }
    )


def dead_letter(
    consumer: str, id: UUID, key: bytes | None, value: bytes | None, failed_at: datetime, document: str | bytes
) -> DeadLetter:
    found = json.loads(document)
    return DeadLetter(
        consumer=consumer,
        id=id,
        topic=found["topic"],
        partition=found["partition"],
        offset=found["offset"],
        key=key,
        value=value,
        headers=tuple((name, bytes.fromhex(text)) for name, text in found["headers"]),
        failure=Failure(
            error=found["error"],
            message=found["message"],
            stack=found["stack"],
            attempts=found["attempts"],
            first_failed_at=instant(found["first_failed_at"]),
            failed_at=failed_at,
            code_version=found["code_version"],
        ),
        type=found["type"],
    )
