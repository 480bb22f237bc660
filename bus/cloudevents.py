"""Envelopes as records and back: CloudEvents 1.0, Kafka binding. We write binary mode and read structured mode too.

`from_record(to_record(envelope))` is the envelope again, field by field. What others wrote is taken as far as it can
be: an id that is no UUID becomes uuid5 of (source, id) and stays in the headers as `ce_id`; a record without
`ce_kind` is a foreign event, of which only the standard attributes, `correlationid` and `causationid` are read. What
of ours a foreign record uses for purposes of its own is kept in the headers as `foreign_<name>`; extensions that
nobody here knows are kept as `ce_<name>`. Everything that cannot be read raises Undecodable; nothing else is raised.

On the path of every message: no pydantic, no regular expressions, one pass over the headers.
"""

from __future__ import annotations

import json
from base64 import b64decode
from binascii import unhexlify
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import NoReturn, cast
from uuid import NAMESPACE_URL, UUID, SafeUUID, uuid5

from bus.codec import check_key
from bus.envelope import NO_HEADERS, Envelope, Kind, ReplyOutcome, ReplyTo, StreamId, Token
from bus.errors import Undecodable
from bus.transport import Delivery, Headers, Outgoing

HEADERS_MAX = 128
"""How many headers a record may have."""
HEADER_BYTES_MAX = 64 * 1024
"""What the headers of a record may take together, names included."""

_INT_MAX = 2**63 - 1
_JSON = b"application/json"
_STRUCTURED = b"application/cloudevents"
_FOREIGN = "foreign_"

_TO_KIND = {kind.value.encode(): kind for kind in Kind}
_TO_OUTCOME = {outcome.value.encode(): outcome for outcome in ReplyOutcome}
_KIND_HEADER = {kind: ("ce_kind", kind.value.encode()) for kind in Kind}
_OUTCOME_HEADER = {outcome: ("ce_outcome", outcome.value.encode()) for outcome in ReplyOutcome}
SPECVERSION_HEADER = ("ce_specversion", b"1.0")
CONTENT_TYPE_HEADER = ("content-type", _JSON)

_STANDARD = ("ce_specversion", "ce_id", "ce_source", "ce_type", "ce_time", "ce_subject", "content-type")
_STORY = ("ce_correlationid", "ce_causationid")
_OURS = (
    "ce_kind",
    "ce_sequence",
    "ce_stream",
    "ce_streamid",
    "ce_position",
    "ce_sourceepoch",
    "ce_replytotopic",
    "ce_replytokey",
    "ce_replytoinstance",
    "ce_deadline",
    "ce_undoes",
    "ce_outcome",
    "ce_token",
    "ce_tenantid",
    "ce_actor",
)
_RESERVED = frozenset((*_STANDARD, *_STORY, *_OURS))
_TRACE = {"ce_traceparent": "traceparent", "ce_tracestate": "tracestate"}


# --- writing ---------------------------------------------------------------------------------------------------------


def to_record(envelope: Envelope) -> Outgoing:
    """The record to publish. `envelope.topic` must be set. Of `envelope.headers`, names that this mapping writes itself
    are left out, but for the `ce_id` and the `content-type` that `from_record` put there.

    Raises Undecodable when a text is none that UTF-8 can carry (half of a surrogate pair).
    """
    topic = envelope.topic
    if topic is None:
        raise ValueError(f"{envelope.type} {envelope.id} has no topic: it is stored, not published")
    try:
        return Outgoing(topic, envelope.key.encode(), envelope.data, _headers_of(envelope))
    except UnicodeEncodeError as error:
        raise Undecodable(
            f"{envelope.type} {envelope.id}: {error.object!r:.80} is no text that UTF-8 can carry"
        ) from error


def _headers_of(envelope: Envelope) -> Headers:
    message_id = str(envelope.id).encode()
    correlation_id = envelope.correlation_id
    headers = [
        SPECVERSION_HEADER,
        ("ce_id", message_id),
        source_header(envelope.source),
        type_header(envelope.type),
        ("ce_time", envelope.time.isoformat().encode()),
        ("ce_subject", envelope.key.encode()),
        CONTENT_TYPE_HEADER,
        _KIND_HEADER[envelope.kind],
        ("ce_correlationid", message_id if correlation_id is envelope.id else str(correlation_id).encode()),
    ]
    add = headers.append
    if envelope.causation_id is not None:
        add(("ce_causationid", str(envelope.causation_id).encode()))
    if envelope.position is not None:
        add(("ce_position", b"%d" % envelope.position))
    if envelope.version is not None:
        add(("ce_sequence", b"%d" % envelope.version))
    if envelope.stream is not None:
        add(("ce_stream", envelope.stream.category.encode()))
        if envelope.stream.id != envelope.key:
            add(("ce_streamid", envelope.stream.id.encode()))
    if envelope.epoch:
        add(("ce_sourceepoch", b"%d" % envelope.epoch))
    to = envelope.reply_to
    if to is not None:
        add(("ce_replytotopic", to.topic.encode()))
        add(("ce_replytokey", to.key.encode()))
        if to.instance:
            add(("ce_replytoinstance", to.instance.encode()))
    if envelope.deadline is not None:
        add(("ce_deadline", envelope.deadline.isoformat().encode()))
    if envelope.undoes is not None:
        add(("ce_undoes", str(envelope.undoes).encode()))
    if envelope.outcome is not None:
        add(_OUTCOME_HEADER[envelope.outcome])
    if envelope.token is not None:
        add(("ce_token", token_bytes(envelope.token)))
    if envelope.tenant is not None:
        add(("ce_tenantid", envelope.tenant.encode()))
    if envelope.actor is not None:
        add(("ce_actor", envelope.actor.encode()))
    if envelope.headers:
        _add_own_headers(headers, envelope)
    return tuple(headers)


def _add_own_headers(headers: list[tuple[str, bytes]], envelope: Envelope) -> None:
    for name, value in envelope.headers.items():
        if name.lower() not in _RESERVED:
            headers.append((name, value.encode()))
        elif name == "ce_id" and foreign_id(envelope.source, value) == envelope.id:
            headers[1] = ("ce_id", value.encode())  # as it came: whoever reads it makes the same UUID of it
        elif name == "content-type":
            headers[6] = ("content-type", value.encode())


@lru_cache(maxsize=1024)
def source_header(source: str) -> tuple[str, bytes]:
    """`orders` is `/orders` on the wire, a URI reference; what is a path or a URI already stays."""
    return "ce_source", (source if "/" in source or ":" in source else f"/{source}").encode()


@lru_cache(maxsize=4096)
def type_header(type_name: str) -> tuple[str, bytes]:
    return "ce_type", type_name.encode()


def token_bytes(token: Token) -> bytes:
    parts = (token.epoch, token.position, token.public, token.source, token.key)
    return json.dumps(parts, separators=(",", ":"), ensure_ascii=False).encode()


# --- reading ---------------------------------------------------------------------------------------------------------


def from_record(delivery: Delivery) -> Envelope:
    """The envelope of a record that was read. Raises Undecodable, saying what was found and what was wanted."""
    try:
        if delivery.flaw:
            raise _Bad(delivery.flaw)
        return _read(delivery)
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise Undecodable(f"{_where(delivery)}: {_culprit(delivery)} holds {found}; wanted UTF-8") from error
    except _Bad as error:
        raise Undecodable(f"{_where(delivery)}: {error}") from error.__cause__


def foreign_id(source: str, text: str) -> UUID:
    """The UUID by which a message with an id of another form is known here: uuid5 of (source, id)."""
    return uuid5(NAMESPACE_URL, f"{source}\n{text}")


class _Bad(Exception):
    """What is wrong with a record; `from_record` adds where the record is."""


def _read(delivery: Delivery) -> Envelope:
    headers = delivery.headers
    if len(headers) > HEADERS_MAX:
        raise _Bad(f"found {len(headers)} headers, wanted at most {HEADERS_MAX}")
    blob = b"".join([value for _, value in headers])
    rest = dict(headers)
    strange = len(rest) != len(headers) or not rest.keys() <= _RESERVED  # else the names are few and short
    if len(blob) + (sum([len(name) for name, _ in headers]) if strange else 0) > HEADER_BYTES_MAX:
        raise _Bad(f"found more than {HEADER_BYTES_MAX} bytes of headers, wanted at most that")
    if b"\x00" in blob:
        raise _Bad(f"header {next(name for name, value in headers if 0 in value)!r:.80} holds a NUL, wanted text")
    if strange:
        rest = _tidy(headers)
    data = delivery.value
    content_type = rest.pop("content-type", _JSON)
    if content_type != _JSON and content_type[: len(_STRUCTURED)].lower() == _STRUCTURED:
        content_type, data = _unpack(content_type, data, rest)
    if data is None:
        raise _Bad("found a record without a value (a tombstone), wanted an event with data")
    take = rest.pop
    if take("ce_specversion", None) != b"1.0":
        _refuse_specversion(dict(headers))

    source_bytes, type_bytes, id_bytes = take("ce_source", b""), take("ce_type", b""), take("ce_id", b"")
    if not (source_bytes and type_bytes and id_bytes):
        raise _Bad("wanted CloudEvents attributes id, source and type; at least one is missing or empty")
    source = _source(source_bytes)
    type_name = type_bytes.decode()
    own: dict[str, str] = {}
    message_id = _uuid_or_none(id_bytes)
    if message_id is None:
        own["ce_id"] = id_bytes.decode()
        message_id = foreign_id(source, own["ce_id"])
    if content_type != _JSON:
        own["content-type"] = content_type.decode()

    subject = take("ce_subject", None) or delivery.key
    if subject is None:
        raise _Bad("has neither a subject nor a record key; wanted the key of the message in one of them")
    key = subject.decode()
    if not key or len(key) > 256 or "\x00" in key:
        try:
            check_key(key)
        except Undecodable as error:
            raise _Bad(str(error)) from error
    time_bytes = take("ce_time", None)
    time = delivery.time if time_bytes is None else _instant("time", time_bytes)

    kind_bytes = take("ce_kind", None)
    correlation_bytes, causation_bytes = take("ce_correlationid", None), take("ce_causationid", None)
    if kind_bytes is None:
        correlation_id, causation_id = _foreign_story(correlation_bytes, causation_bytes, rest, own)
        _keep(rest, own)
        return Envelope(
            message_id, Kind.EVENT, type_name, source, key, data, time, correlation_id or message_id, causation_id,
            topic=delivery.assignment.topic, headers=own or NO_HEADERS,
        )  # fmt: skip

    kind = _TO_KIND.get(kind_bytes)
    if kind is None:
        raise _Bad(f"kind is {kind_bytes!r:.80}, wanted one of {', '.join(Kind)}")
    if correlation_bytes is None or correlation_bytes == id_bytes:
        correlation_id = message_id
    else:
        correlation_id = _uuid("correlationid", correlation_bytes)
    causation_id = None if causation_bytes is None else _uuid("causationid", causation_bytes)
    if not rest:
        return Envelope(
            message_id, kind, type_name, source, key, data, time, correlation_id, causation_id,
            topic=delivery.assignment.topic, headers=own or NO_HEADERS,
        )  # fmt: skip
    position, version, epoch = take("ce_position", None), take("ce_sequence", None), take("ce_sourceepoch", None)
    category, stream_id = take("ce_stream", None), take("ce_streamid", None)
    stream = None
    if category is not None:
        stream = StreamId(category.decode(), key if stream_id is None else stream_id.decode())
    reply_to = deadline = undoes = outcome = token = None
    if rest:
        if "ce_replytotopic" in rest:
            reply_to = _reply_to(rest)
        deadline_bytes, undoes_bytes = take("ce_deadline", None), take("ce_undoes", None)
        outcome_bytes, token_bytes = take("ce_outcome", None), take("ce_token", None)
        deadline = None if deadline_bytes is None else _instant("deadline", deadline_bytes)
        undoes = None if undoes_bytes is None else _uuid("undoes", undoes_bytes)
        outcome = None if outcome_bytes is None else _outcome(outcome_bytes)
        token = None if token_bytes is None else _token(token_bytes)
    tenant, actor = take("ce_tenantid", None), take("ce_actor", None)
    if rest:
        _keep(rest, own)
    return Envelope(
        message_id,
        kind,
        type_name,
        source,
        key,
        data,
        time,
        correlation_id,
        causation_id,
        0 if epoch is None else _number("sourceepoch", epoch),
        reply_to,
        deadline,
        undoes,
        outcome,
        token,
        None if tenant is None else tenant.decode(),
        None if actor is None else actor.decode(),
        delivery.assignment.topic,
        stream,
        None if version is None else _number("sequence", version),
        None if position is None else _number("position", position),
        own or NO_HEADERS,
    )


def _tidy(headers: Headers) -> dict[str, bytes]:
    """Header names of ours in any case; one of ours twice is refused, of any other the last counts, as Kafka has it."""
    found: dict[str, bytes] = {}
    for name, value in headers:
        if "\x00" in name:
            raise _Bad(f"header name {name!r:.80} holds a NUL, wanted text")
        lower = name.lower()
        if lower not in _RESERVED:
            found[lower if lower in _TRACE else name] = value
        elif lower in found:
            raise _Bad(f"header {lower!r} is there twice, wanted once")
        else:
            found[lower] = value
    return found


def _keep(rest: dict[str, bytes], own: dict[str, str]) -> None:
    """What is left goes into the envelope's headers; `traceparent` as W3C names it, whichever way it came."""
    for name, value in rest.items():
        if name in _RESERVED:
            own[_FOREIGN + name.removeprefix("ce_")] = value.decode()
        elif name not in _TRACE:
            own[name] = value.decode()
        elif _TRACE[name] not in rest:
            own[_TRACE[name]] = value.decode()


def _foreign_story(
    correlation: bytes | None, causation: bytes | None, rest: dict[str, bytes], own: dict[str, str]
) -> tuple[UUID | None, UUID | None]:
    found: list[UUID | None] = []
    for name, value in zip(_STORY, (correlation, causation), strict=True):
        known = None if value is None else _uuid_or_none(value)
        if value is not None and known is None:
            rest[name] = value  # not in our form: `_keep` keeps it as it is
        found.append(known)
    return found[0], found[1]


def _reply_to(rest: dict[str, bytes]) -> ReplyTo:
    topic, key = rest.pop("ce_replytotopic"), rest.pop("ce_replytokey", b"")
    instance = rest.pop("ce_replytoinstance", b"")
    if not topic or not key:
        raise _Bad("wanted replytotopic and replytokey; one of them is missing or empty")
    return ReplyTo(topic.decode(), key.decode(), instance.decode())


def _outcome(text: bytes) -> ReplyOutcome:
    found = _TO_OUTCOME.get(text)
    if found is None:
        raise _Bad(f"outcome is {text!r:.80}, wanted one of {', '.join(ReplyOutcome)}")
    return found


def _token(text: bytes) -> Token:
    try:
        parts: object = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise _Bad(f"token is {text!r:.80}, wanted a JSON array") from error
    match parts:
        case [int(epoch), int(position), int(public), str(source), str(key)] if all(
            0 <= number <= _INT_MAX and not isinstance(number, bool) for number in (epoch, position, public)
        ):
            return Token(source, epoch, key, position, public)
        case _:
            raise _Bad(f"token is {text!r:.80}, wanted [epoch, position, public position, source, key]")


@lru_cache(maxsize=1024)
def _source(text: bytes) -> str:
    source = text.decode()
    bare = source[1:]
    return bare if source[0] == "/" and bare and "/" not in bare and ":" not in bare else source


def _uuid_or_none(text: bytes) -> UUID | None:
    """As `UUID(text)` for the one form that we write, at half its price: three of these are in every message."""
    if len(text) != 36 or not (text[8] == text[13] == text[18] == text[23] == 45):
        return None
    try:
        raw = unhexlify(text.replace(b"-", b""))
    except ValueError:
        return None
    if len(raw) != 16:
        return None
    found = _new_uuid(UUID)
    _set(found, "int", int.from_bytes(raw, "big"))
    _set(found, "is_safe", SafeUUID.unknown)
    return found


_new_uuid = UUID.__new__
_set = object.__setattr__


def _uuid(name: str, text: bytes) -> UUID:
    found = _uuid_or_none(text)
    if found is None:
        raise _Bad(f"{name} is {text!r:.80}, wanted a UUID")
    return found


def _number(name: str, text: bytes) -> int:
    if text.isdigit() and len(text) <= 19:
        found = int(text)
        if found <= _INT_MAX:
            return found
    raise _Bad(f"{name} is {text!r:.80}, wanted a number from 0 to {_INT_MAX}")


def _instant(name: str, text: bytes) -> datetime:
    try:
        found = datetime.fromisoformat(text.decode())
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise _Bad(f"{name} is {text!r:.80}, wanted a time as in RFC 3339") from error
    if found.tzinfo is UTC:
        return found
    if found.tzinfo is None:
        raise _Bad(f"{name} is {text!r:.80}, wanted a time with its offset from UTC")
    try:
        return found.astimezone(UTC)
    except OverflowError as error:
        raise _Bad(f"{name} is {text!r:.80}, wanted a time that UTC has") from error


# --- structured mode -------------------------------------------------------------------------------------------------


def _unpack(content_type: bytes, value: bytes | None, rest: dict[str, bytes]) -> tuple[bytes, bytes | None]:
    """Structured mode: attributes out of the JSON in `value` into `rest`, as binary mode has them; answers content type
    and data. `ce_` headers beside it do not count, as the binding says."""
    media_type = content_type.partition(b";")[0].strip().lower()
    if media_type != b"application/cloudevents+json":
        raise _Bad(f"content type is {content_type!r:.80}, wanted application/json or application/cloudevents+json")
    for name in [name for name in rest if name[:3].lower() == "ce_"]:
        del rest[name]
    attributes = _json_object(value)
    data = attributes.pop("data", _ABSENT)
    base64 = attributes.pop("data_base64", None)
    inner = attributes.pop("datacontenttype", None)
    for name, attribute in attributes.items():
        text = _attribute(name, attribute)
        if text is not None:
            rest["ce_" + name.lower()] = text
    inner_type = _attribute("datacontenttype", inner) or _JSON
    if base64 is not None:
        if not isinstance(base64, str) or data is not _ABSENT:
            raise _Bad("wanted either data or data_base64 with text")
        try:
            return inner_type, b64decode(base64, validate=True)
        except ValueError as error:
            raise _Bad("data_base64 is no base64") from error
    if data is _ABSENT:
        return inner_type, None
    if isinstance(data, str) and not _is_json(inner_type):
        return inner_type, _utf8("data", data)
    return inner_type, _utf8("data", json.dumps(data, separators=(",", ":"), ensure_ascii=False))


_ABSENT = object()


def _json_object(value: bytes | None) -> dict[str, object]:
    if value is None:
        raise _Bad("found a record without a value (a tombstone), wanted an event with data")
    text = value.decode()
    try:
        found: object = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _Bad(f"the value is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise _Bad(f"the value is {text[:40]!r}, wanted a JSON object")
    return cast("dict[str, object]", found)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _attribute(name: str, value: object) -> bytes | None:
    match value:
        case None:
            return None
        case bool():
            return b"true" if value else b"false"
        case int():
            return b"%d" % value
        case str() if "\x00" not in value and "\x00" not in name and len(value) <= HEADER_BYTES_MAX:
            return _utf8(name, value)
        case _:
            raise _Bad(f"attribute {name!r:.80} is {value!r:.80}, wanted a short text, a whole number or a truth value")


def _utf8(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise _Bad(f"{name!r:.80} holds half of a surrogate pair, wanted text") from error


def _is_json(content_type: bytes) -> bool:
    media_type = content_type.partition(b";")[0].strip().lower()
    return media_type.endswith((b"/json", b"+json"))


# --- saying what is wrong --------------------------------------------------------------------------------------------


def _where(delivery: Delivery) -> str:
    return f"{delivery.topic}[{delivery.partition}] offset {delivery.offset}"


def _refuse_specversion(headers: Mapping[str, bytes]) -> NoReturn:
    found = next((value for name, value in headers.items() if name.lower() == "ce_specversion"), None)
    if found is None:
        raise _Bad("has no specversion; wanted a CloudEvent 1.0, in binary or structured mode")
    raise _Bad(f"specversion is {found!r:.80}, wanted '1.0'")


def _culprit(delivery: Delivery) -> str:
    """Which part of a record is no UTF-8."""
    parts = [(f"header {name!r:.80}", value) for name, value in delivery.headers]
    parts += [("the record key", delivery.key or b""), ("the value", delivery.value or b"")]
    for name, value in parts:
        try:
            value.decode()
        except UnicodeDecodeError:
            return name
    return "an attribute"
