"""Envelopes as rows, shared by the adapters: some columns, and one JSON document for everything else.

Columns: id, type, key, topic, data (the very bytes), time, and by place version, stream and position. `meta` holds the
rest, absent fields left out, so that a plain event costs some 130 bytes. A whole envelope outside a table of its own
(a stored reply, a timer's message) is `document` plus its `data`. Instants inside a document are microseconds since
1970. What is read back equals what was stored, to the last header.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from typing import Any, SupportsIndex, cast
from uuid import UUID, SafeUUID

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
_2000 = 946_684_800_000_000  # where PostgreSQL counts from, in microseconds since 1970
_set = object.__setattr__
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
    """The inverse: an envelope from its columns and its `meta`, which is parsed when something in it is asked for."""
    made = _Draft.__new__(_Draft)
    made.id = id
    made.type = type
    made.key = key
    made.topic = topic
    made.data = data
    made.time = time
    made.stream = stream
    made.version = version
    made.position = position
    made.unparsed = meta
    made.__class__ = Stored
    return cast("Envelope", made)


def lean_envelope(
    id: bytes,
    type: str,
    key: str,
    topic: str | None,
    data: bytes,
    time: bytes | int,
    meta: str | bytes,
    stream: StreamId | None,
    version: Version | None,
    position: Position | None,
) -> Envelope:
    """The same, with id and time as the database has them: a UUID's 16 bytes; the microseconds since 2000 in 8, or
    those since 1970 as a number. Folds ask for neither, and a driver's values of both cost more than the rest."""
    made = _Draft.__new__(_Draft)
    made.type = type
    made.key = key
    made.topic = topic
    made.data = data
    made.stream = stream
    made.version = version
    made.position = position
    made.unparsed = (id, time, meta)
    made.__class__ = Stored
    return cast("Envelope", made)


def lean_envelopes(found: Iterable[Sequence[Any]]) -> list[Envelope]:
    """The same of many rows: position, type, key, topic, data, category, stream's id, version, id, time, meta.

    Written out: what a call per row costs is half of the whole.
    """
    made: list[Any] = []
    streams: dict[tuple[str, str], StreamId] = {}
    new, draft, stored = _Draft.__new__, _Draft, Stored
    for position, type, key, topic, data, category, name, version, id, time, meta in found:
        place = (category, name)
        stream = streams.get(place)
        if stream is None:
            stream = streams[place] = StreamId(category, name)
        one = new(draft)
        one.type = type
        one.key = key
        one.topic = topic
        one.data = data
        one.stream = stream
        one.version = version
        one.position = position
        one.unparsed = (id, time, meta)
        one.__class__ = stored
        made.append(one)
    return made


class Stored(Envelope):
    """An envelope as it came from a table: a fold needs type, key, data and place, so that is all it has at first. It
    becomes a plain Envelope when anything else is asked of it, and nobody can tell the difference but by its class.

    Threads may ask at once: each parses the same document and sets the same values.
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        # Only for a slot that nothing was put into.
        if name not in _LATE:
            raise AttributeError(f"an Envelope has no {name!r}", name=name, obj=self)
        return getattr(_settled(self), name)

    def __eq__(self, other: object) -> bool:
        return _settled(self) == other

    def __hash__(self) -> int:
        return hash(_settled(self))

    def __repr__(self) -> str:
        return repr(_settled(self))

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        return _settled(self).__reduce_ex__(protocol)


_Draft: Any = type(
    "Stored", (Stored,), {"__slots__": (), "__setattr__": object.__setattr__, "__delattr__": object.__delattr__}
)
"""May be assigned to (see bus/quick.py); its objects become `Stored` before anybody sees them."""

_COLUMNS = frozenset({"type", "key", "topic", "data", "stream", "version", "position"})
_LATE = frozenset(one.name for one in fields(Envelope)) - _COLUMNS
_SET: dict[str, Callable[[Envelope, Any], None]] = {name: getattr(Envelope, name).__set__ for name in _LATE}
"""Frozen as they are: a slot's own setter knows nothing of that."""


def _settled(stored: Envelope) -> Envelope:
    unparsed: Any = stored.unparsed
    if unparsed is not None:  # else another thread has done it since
        meta = unparsed
        if type(unparsed) is tuple:
            id, time, meta = cast("tuple[bytes, bytes | int, str | bytes]", unparsed)
            _SET["id"](stored, uuid_of(id))
            _SET["time"](stored, instant(time if isinstance(time, int) else int.from_bytes(time, signed=True) + _2000))
        for name, value in zip(_IN_META, _parsed(from_json(meta)), strict=True):
            _SET[name](stored, value)
        _set(stored, "unparsed", None)
    _set(stored, "__class__", Envelope)
    return stored


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
    return Envelope(
        id=uuid_of(found["id"]),
        type=found["type"],
        key=found["key"],
        data=data,
        time=instant(found["time"]),
        topic=found.get("topic"),
        **dict(zip(_IN_META, _parsed(found), strict=True)),
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


_IN_META = (
    "kind",
    "source",
    "correlation_id",
    "causation_id",
    "epoch",
    "reply_to",
    "deadline",
    "undoes",
    "outcome",
    "token",
    "tenant",
    "actor",
    "headers",
)


def _parsed(found: dict[str, Any]) -> tuple[Any, ...]:
    """The fields named in `_IN_META`, in its order."""
    get = found.get
    causation, reply_to, deadline, undoes = get("causation"), get("reply_to"), get("deadline"), get("undoes")
    outcome, token, headers = get("outcome"), get("token"), get("headers")
    return (
        _KINDS[found["kind"]],
        found["source"],
        uuid_of(found["correlation"]),
        None if causation is None else uuid_of(causation),
        get("epoch", 0),
        None if reply_to is None else ReplyTo(*reply_to),
        None if deadline is None else instant(deadline),
        None if undoes is None else uuid_of(undoes),
        None if outcome is None else _OUTCOMES[outcome],
        None if token is None else Token(*token),
        get("tenant"),
        get("actor"),
        NO_HEADERS if headers is None else dict(headers),
    )


def uuid_of(stored: str | bytes) -> UUID:
    """A UUID of the 32 digits or the 16 bytes that we stored: without the checks, in a quarter of the time."""
    made = UUID.__new__(UUID)
    _set(made, "int", int(stored, 16) if isinstance(stored, str) else int.from_bytes(stored))
    _set(made, "is_safe", SafeUUID.unknown)
    return made


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
