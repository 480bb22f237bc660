"""Messages to bytes and back: JSON by pydantic-core, encoded once, stored and sent as the same bytes.

`Codec` is a seam: a codec that encrypts per subject wraps this one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from typing import Any, Protocol, cast
from uuid import UUID

from pydantic import BaseModel, JsonValue, RootModel, ValidationError
from pydantic_core import from_json

from bus.envelope import Envelope, Kind, Origin, ReplyOutcome, ReplyTo
from bus.errors import MessageTooLarge, Undecodable
from bus.messages import Command, Event, Message, Query, Refused
from bus.registry import Registry

KEY_BYTES_MAX = 1024
DEPTH_MAX = 128
"""How deep a message may nest. JSON is read to a depth of 201, and a saga's history wraps messages once more: what is
written deeper than it is read would end its stream."""
_PARSED_MAX = 201


class Codec(Protocol):
    registry: Registry

    def encode(
        self,
        message: Message,
        origin: Origin,
        *,
        topic: str | None = None,
        reply_to: ReplyTo | None = None,
        deadline: datetime | None = None,
        undoes: UUID | None = None,
    ) -> Envelope:
        """Raises BadInput when the key is empty, too long or holds a NUL, or when the message nests too deep."""
        ...

    def decode(self, envelope: Envelope) -> Message:
        """Raises UnknownType, UnknownVersion or Undecodable, saying what was found and what was wanted."""
        ...

    def upcast(self, envelope: Envelope, names: Collection[str]) -> Sequence[Envelope]:
        """What a message is to a reader of the types `names`: see `Upcasting.read`. Each part can be decoded, as far
        as its type is known here. Not asked for messages of a type in `names`: it would give them back."""
        ...

    def encode_reply(self, command: Envelope, answer: BaseModel | Refused | None, origin: Origin) -> Envelope:
        """The answer to `command`, addressed to its `reply_to`; without one it is kept for whoever asks."""
        ...

    def decode_reply(self, reply: Envelope, asked: type[Command[Any]] | type[Query[Any]]) -> Any:
        """What `encode_reply` was given, a Refused included; an ok reply to a command without data (nothing to undo) is
        None, and of a query's answer what `Query[R]` says. Not for died, cancelled and expired."""
        ...


class _RefusalBody(BaseModel):
    code: str
    message: str
    attributes: dict[str, JsonValue] = {}


class _DiedBody(BaseModel):
    error: str


def decode_command(codec: Codec, envelope: Envelope, names: Collection[str]) -> Message:
    """The command as one of `names`, upcast where it is an older one; what is answered is still the one that was sent.
    Raises what `decode` raises."""
    if envelope.type in names:
        return codec.decode(envelope)
    (today,) = codec.upcast(envelope, names)
    return codec.decode(today)


def kind_of(message: Message) -> Kind:
    return _facts(type(message))[0]


@lru_cache(maxsize=1024)  # asked for every message that is encoded
def _facts(cls: type[Message]) -> tuple[Kind, str]:
    """Kind and type name of a class of messages."""
    for base, kind in ((Command, Kind.COMMAND), (Event, Kind.EVENT), (Query, Kind.QUERY)):
        if issubclass(cls, base):
            return kind, str(cls.type_name)
    raise TypeError(f"{cls.__qualname__} is neither a Command, an Event nor a Query")


def reply_type_name(command_type: str) -> str:
    """`payments.take-payment.v1` is answered by `payments.take-payment.reply.v1`."""
    base, _, version = command_type.rpartition(".")
    return f"{base}.reply.{version}"


def command_type_name(reply_type: str) -> str:
    """The inverse of `reply_type_name`. Raises Undecodable."""
    parts = reply_type.rsplit(".", 2)
    if len(parts) != 3 or parts[1] != "reply":
        raise Undecodable(f"{reply_type!r} is no reply type; wanted <command>.reply.v<version>")
    return f"{parts[0]}.{parts[2]}"


def check_key(key: str) -> None:
    """Raises BadInput for a key that cannot be a record key and a stream id everywhere."""
    if not key or "\x00" in key or len(key.encode(errors="surrogatepass")) > KEY_BYTES_MAX:
        shown = key if len(key) <= 40 else f"{key[:40]}… ({len(key)} characters)"
        raise Undecodable(f"key {shown!r} cannot be used; wanted 1 to {KEY_BYTES_MAX} bytes without NUL")


def to_bytes(message: BaseModel) -> bytes:
    """As JSON. Raises BadInput for what could not be read back: it nests deeper than `DEPTH_MAX`, or is no JSON."""
    try:
        data = message.__pydantic_serializer__.to_json(message)
        if data.count(b"[") + data.count(b"{") > DEPTH_MAX:  # else it cannot be that deep
            wrapping = _PARSED_MAX - DEPTH_MAX
            from_json(b"[" * wrapping + data + b"]" * wrapping, cache_strings="none")
    except ValueError as error:  # PydanticSerializationError is one
        raise Undecodable(
            f"{type(message).__qualname__} cannot be written as JSON that is read back, of at most {DEPTH_MAX} levels: "
            f"{str(error)[:200]}"
        ) from error
    return data


class JsonCodec:
    """The default codec."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._validators: dict[str, Callable[[bytes], Any]] = {}

    def encode(
        self,
        message: Message,
        origin: Origin,
        *,
        topic: str | None = None,
        reply_to: ReplyTo | None = None,
        deadline: datetime | None = None,
        undoes: UUID | None = None,
    ) -> Envelope:
        key = message.key
        check_key(key)
        kind, name = _facts(type(message))
        return Envelope(
            id=origin.id,
            kind=kind,
            type=name,
            source=origin.source,
            key=key,
            data=to_bytes(message),
            time=origin.time,
            correlation_id=origin.correlation_id,
            causation_id=origin.causation_id,
            reply_to=reply_to,
            deadline=deadline,
            undoes=undoes,
            tenant=origin.tenant,
            actor=origin.actor,
            topic=topic,
            headers=origin.headers,
        )

    def decode(self, envelope: Envelope) -> Message:
        # Once per event of every load and every replay: three calls more, or a check that pydantic's metaclass makes in
        # Python, take as long as the parsing.
        validate = self._validators.get(envelope.type)
        if validate is None:
            validate = self._validator(envelope.type)
        try:
            message: Message = validate(envelope.data)
        except ValueError:
            message = cast("Message", _validate(self.registry.find(envelope.type), envelope.data, envelope.type))
        if envelope.stream is None and message.key != envelope.key:
            raise Undecodable(
                f"{envelope.type}: the record's key is {envelope.key[:80]!r}, "
                f"but field {message.key_field!r} says {message.key[:80]!r}; wanted the same"
            )
        return message

    def decode_bodies(self, types: Sequence[str], data: Sequence[bytes]) -> list[Message]:
        """Stored events of which no more is at hand: what `decode` gives for each. See `decoder_of_bodies`."""
        validators = {name: self._validator(name) for name in set(types)}
        try:
            if len(validators) == 1:
                (validate,) = validators.values()
                return list(map(validate, data))
            return [validators[name](one) for name, one in zip(types, data, strict=True)]
        except ValueError:  # once more, to say which one it is
            find = self.registry.find
            return [cast("Message", _validate(find(name), one, name)) for name, one in zip(types, data, strict=True)]

    def _validator(self, name: str) -> Callable[[bytes], Any]:
        validate = self._validators.get(name)
        if validate is None:
            known = self.registry.find(name)
            validate = self._validators[name] = known.__pydantic_validator__.validate_json
        return validate

    def upcast(self, envelope: Envelope, names: Collection[str]) -> Sequence[Envelope]:
        return self.registry.upcasting.read(envelope, names)

    def encode_reply(self, command: Envelope, answer: BaseModel | Refused | None, origin: Origin) -> Envelope:
        outcome = ReplyOutcome.OK
        if isinstance(answer, Refused):
            outcome = ReplyOutcome.REFUSED
            body = _RefusalBody(code=answer.code, message=answer.message, attributes=dict(answer.attributes))
            data = to_bytes(body)
        elif answer is None:
            data = b"null"
        else:
            data = to_bytes(answer)
        return reply_envelope(command, outcome, data, origin)

    def decode_reply(self, reply: Envelope, asked: type[Command[Any]] | type[Query[Any]]) -> Any:
        if reply.outcome is ReplyOutcome.REFUSED:
            body = _validate(_RefusalBody, reply.data, reply.type)
            assert isinstance(body, _RefusalBody)
            refusal = self.registry.refusal(body.code)
            if refusal is None:
                return Refused(body.message, code=body.code, **body.attributes)
            rebuilt = refusal.__new__(refusal)
            Refused.__init__(rebuilt, body.message, code=body.code, **body.attributes)
            return rebuilt
        wanted = asked.reply_type()
        if wanted is None or (reply.data == b"null" and issubclass(asked, Command)):
            return None
        found = _validate(wanted, reply.data, reply.type)
        return cast("RootModel[Any]", found).root if issubclass(asked, Query) and asked.wrapped() else found


def decoder_of_bodies(codec: Codec) -> Callable[[Sequence[str], Sequence[bytes]], Sequence[Message]] | None:
    """How this codec decodes stored events of which only type and data were read. None: it is given envelopes, since
    nobody knows what a codec of one's own looks at."""
    if isinstance(codec, JsonCodec) and type(codec).decode is JsonCodec.decode:
        return codec.decode_bodies
    return None


def reply_envelope(command: Envelope, outcome: ReplyOutcome, data: bytes, origin: Origin) -> Envelope:
    """A reply of any outcome, addressed to the command's `reply_to`; without one it has no topic: it is only kept."""
    to = command.reply_to
    return Envelope(
        id=origin.id,
        kind=Kind.REPLY,
        type=reply_type_name(command.type),
        source=origin.source,
        key=to.key if to else command.key,
        data=data,
        time=origin.time,
        correlation_id=command.correlation_id,
        causation_id=command.id,
        reply_to=to,
        outcome=outcome,
        tenant=command.tenant,
        topic=to.topic if to else None,
        headers=origin.headers,
    )


def died_reply(command: Envelope, error: str, origin: Origin) -> Envelope:
    """Certain: the command was not done."""
    return reply_envelope(command, ReplyOutcome.DIED, _DiedBody(error=error[:2000]).model_dump_json().encode(), origin)


def unknown_reply(command: Envelope, error: str, origin: Origin) -> Envelope:
    """Given up, and perhaps done all the same: what its handler calls outside was begun."""
    data = _DiedBody(error=error[:2000]).model_dump_json().encode()
    return reply_envelope(command, ReplyOutcome.UNKNOWN, data, origin)


def expired_reply(asked: Envelope, error: str, origin: Origin) -> Envelope:
    """Not begun: it names the deadline that had passed, so that nobody takes it for the answer to a repeat."""
    data = _DiedBody(error=error[:2000]).model_dump_json().encode()
    return replace(reply_envelope(asked, ReplyOutcome.EXPIRED, data, origin), deadline=asked.deadline)


def died_error(reply: Envelope) -> str:
    """Why it died or expired, or why nobody knows."""
    body = _validate(_DiedBody, reply.data, reply.type)
    assert isinstance(body, _DiedBody)
    return body.error


HEADROOM_BYTES = 4096
"""What ids, times and trace context may take on the wire, on top of the data and the key."""


def check_size(envelope: Envelope, limit: int) -> None:
    """Raises MessageTooLarge when `envelope` may not fit into a record of `limit` bytes; asked when it is staged."""
    size = len(envelope.data) + len(envelope.key.encode()) + HEADROOM_BYTES
    if envelope.headers:
        size += sum(len(name) + len(value.encode()) for name, value in envelope.headers.items())
    if size > limit:
        raise MessageTooLarge(envelope.type, size=size, limit=limit)


def _validate(model: type[BaseModel], data: bytes, name: str) -> BaseModel:
    try:
        validated: BaseModel = model.__pydantic_validator__.validate_json(data)
    except ValidationError as error:
        raise Undecodable(f"{name} does not fit {model.__qualname__}: {explain(error)}") from error
    except ValueError as error:  # bytes that are no text at all
        raise Undecodable(f"{name} is no JSON: {error}") from error
    return validated


def explain(error: ValidationError, *, most: int = 3) -> str:
    """Pydantic's findings in one line: where, what was wanted, what was found."""
    found = error.errors(include_url=False, include_context=False)
    lines: list[str] = []
    for one in found[:most]:
        where = ".".join(str(part) for part in one["loc"]) or "the whole"
        lines.append(f"{where}: {one['msg']} (found {one['input']!r:.80})")
    if len(found) > most:
        lines.append(f"and {len(found) - most} more")
    return "; ".join(lines)
