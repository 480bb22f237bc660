"""The log as the relay wants it: records ready to be published, straight from rows.

An envelope is for whoever looks into a message. The relay does not, so none is made here: no UUID, no datetime, and no
header that was made a row ago: they are packed as they come. `records_of(rows)` is `to_record` of the envelopes of the
same rows, to the last byte (tests/eventstore/test_relaying.py), at a tenth of its price.
"""

from __future__ import annotations

from binascii import hexlify
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from struct import Struct
from typing import Any
from uuid import UUID

from pydantic_core import from_json

from bus.cloudevents import (
    CONTENT_TYPE_HEADER,
    SPECVERSION_HEADER,
    source_header,
    to_record,
    token_bytes,
    type_header,
)
from bus.envelope import Kind, Position, StreamId, Token
from bus.packing import PackedHeaders, packed_header, varint
from bus.transport import Headers, Outgoing
from eventstore import rows

_groups = Struct("8s4s4s4s12s").unpack
"""A UUID's 32 digits, parted as they are written."""
_since_2000 = Struct(">q").unpack
_START = datetime(1970, 1, 1, tzinfo=UTC)
_2000 = 946_684_800_000_000  # where PostgreSQL counts from, in microseconds since 1970
_KIND_HEADERS = {str(kind): ("ce_kind", kind.value.encode()) for kind in Kind}
_KNOWN_MAX = 1024

# Where the ids stand in a `meta` that has nothing but kind, source, correlation and, perhaps, causation.
_ID, _END, _CAUSATION = 32, '"}', '","causation":"'
_TAIL = _ID + len(_END)
_TAIL_WITH_CAUSATION = _TAIL + _ID + len(_CAUSATION)

# What stands between the ids of such a record, with the length of an id.
_SPECVERSION = packed_header(*SPECVERSION_HEADER)
_FIRST, _FIRST_WITH_CAUSATION = (
    varint(count) + _SPECVERSION + packed_header("ce_id", b" " * 36)[:-36] for count in (12, 13)
)
_TIME, _TIME_WITH_FRACTION = (packed_header("ce_time", b" " * length)[:-length] for length in (25, 32))
_SUBJECTS = [packed_header("ce_subject", b" " * length)[: -length or None] for length in range(256)]
"""By the number of bytes."""
_CORRELATION_ID = packed_header("ce_correlationid", b" " * 36)[:-36]
_CAUSATION_ID = packed_header("ce_causationid", b" " * 36)[:-36]
_POSITION = [packed_header("ce_position", b" " * length)[: -length or None] for length in range(20)]
"""By the number of digits."""

_plain: dict[str, tuple[bytes, bytes]] = {}
"""What stands before the ids in such a meta, and its headers, packed: the source's, and what comes between the subject
and the correlation id. One per service and kind."""


def records_of(found: Iterable[Sequence[Any]]) -> tuple[list[Outgoing], list[Position]]:
    """Of rows: position, id (its 16 bytes, or the 36 of its text), type, key, topic, data, category, stream's id,
    version, time, meta, last event, last public one. Time is the microseconds since 2000 in 8 bytes, or those since
    1970 as a number; the last two are a reply's, None elsewhere. What has no topic is left out."""
    records: list[Outgoing] = []
    positions: list[Position] = []
    plain, second, record, headers, join = _plain, _second, Outgoing, PackedHeaders, b"".join
    subjects, short_max = _SUBJECTS, len(_SUBJECTS)
    since_2000, groups = _since_2000, _groups
    before, usual, caused, known = "", 0, False, None
    for position, id, type, key, topic, data, category, stream, version, time, meta, last_event, last_public in found:
        if topic is None:
            continue
        positions.append(position)
        message_id = id if len(id) == 36 else b"-".join(groups(hexlify(id)))
        key_bytes = key.encode()
        if time.__class__ is bytes:
            time = since_2000(time)[0] + _2000
        seconds, fraction = divmod(time, 1_000_000)
        if fraction >= 100_000:  # as most are; the other formats cost twice as much
            made_at = b"%b.%d+00:00" % (second(seconds)[1], fraction)
        elif fraction:
            made_at = b"%b.%06d+00:00" % (second(seconds)[1], fraction)
        else:
            made_at = second(seconds)[0]
        if version is not None and (stream == key or stream is None):
            size, at = len(key_bytes), b"%d" % position
            if len(meta) != usual or not meta.startswith(before):  # than the row before: most look alike
                caused = meta[-_TAIL - len(_CAUSATION) : -_TAIL] == _CAUSATION
                before = meta[: -_TAIL_WITH_CAUSATION if caused else -_TAIL]
                known, usual = plain.get(before), 0 if caused else len(meta)
            if known is not None:
                if caused:
                    story, cause = meta[-_TAIL_WITH_CAUSATION : -_TAIL - len(_CAUSATION)], meta[-_TAIL : -len(_END)]
                    correlation_id = b"-".join(groups(story.encode()))
                    causation_id = correlation_id if cause == story else b"-".join(groups(cause.encode()))
                    wire = join((
                        _FIRST_WITH_CAUSATION, message_id, known[0], _type(type), made_at,
                        subjects[size] if size < short_max else _subject(size), key_bytes,
                        known[1], correlation_id, _CAUSATION_ID, causation_id,
                        _POSITION[len(at)], at, _sequence(version), _category(category),
                    ))  # fmt: skip
                else:
                    wire = join((
                        _FIRST, message_id, known[0], _type(type), made_at,
                        subjects[size] if size < short_max else _subject(size), key_bytes,
                        known[1], b"-".join(groups(meta[-_TAIL : -len(_END)].encode())),
                        _POSITION[len(at)], at, _sequence(version), _category(category),
                    ))  # fmt: skip
                records.append(record(topic, key_bytes, data, headers(wire)))
                continue
        parts: dict[str, Any] = from_json(meta)
        if "headers" in parts:  # seldom; which of them are left out is not for us to know
            row = (position, type, key, topic, data, category, stream, version, time, meta, last_event, last_public)
            records.append(_whole(id, *row))
            continue
        where = None if stream == key else stream
        rest = _rest(parts, position, category, where, version, last_event, last_public)
        first = (
            ("ce_subject", key_bytes), CONTENT_TYPE_HEADER, _KIND_HEADERS[parts["kind"]],
            ("ce_correlationid", _dash(parts["correlation"])),
        )  # fmt: skip
        wire = join((
            varint(9 + len(rest)), _FIRST[1:], message_id, packed_header(*source_header(parts["source"])),
            _type(type), made_at, *(packed_header(*one) for one in first + rest),
        ))  # fmt: skip
        records.append(record(topic, key_bytes, data, headers(wire)))
        _learn(meta, parts)
    return records, positions


def _learn(meta: str, parts: dict[str, Any]) -> None:
    """Only what has nothing behind its ids looks like this."""
    before = meta[: -_TAIL_WITH_CAUSATION if "causation" in parts else -_TAIL]
    if before.endswith('"correlation":"') and len(_plain) < _KNOWN_MAX:
        between = (packed_header(*CONTENT_TYPE_HEADER), packed_header(*_KIND_HEADERS[parts["kind"]]), _CORRELATION_ID)
        _plain[before] = (packed_header(*source_header(parts["source"])), b"".join(between))


def _subject(length: int) -> bytes:
    return packed_header("ce_subject", b" " * length)[:-length]


def _dash(digits: str) -> bytes:
    return b"-".join(_groups(digits.encode()))


def _rest(
    parts: dict[str, Any],
    position: Position,
    category: str | None,
    stream: str | None,
    version: int | None,
    last_event: Position | None,
    last_public: Position | None,
) -> Headers:
    """What comes after the correlation id, in the order of `to_record`."""
    headers: list[tuple[str, bytes]] = []
    add = headers.append
    if "causation" in parts:
        add(("ce_causationid", _dash(parts["causation"])))
    add(("ce_position", b"%d" % position))
    if version is not None:
        add(("ce_sequence", b"%d" % version))
    if category is not None:
        add(("ce_stream", category.encode()))
        if stream is not None:
            add(("ce_streamid", stream.encode()))
    if "epoch" in parts:
        add(("ce_sourceepoch", b"%d" % parts["epoch"]))
    if "reply_to" in parts:
        topic, key, instance = parts["reply_to"]
        add(("ce_replytotopic", topic.encode()))
        add(("ce_replytokey", key.encode()))
        if instance:
            add(("ce_replytoinstance", instance.encode()))
    if "deadline" in parts:
        add(("ce_deadline", rows.instant(parts["deadline"]).isoformat().encode()))
    if "undoes" in parts:
        add(("ce_undoes", _dash(parts["undoes"])))
    if "outcome" in parts:
        add(("ce_outcome", parts["outcome"].encode()))
    if "token" in parts:
        source, epoch, key, at, public = parts["token"]
        if last_event is not None:  # its positions were drawn after the document was made
            at, public = last_event, last_public or 0
        add(("ce_token", token_bytes(Token(source, epoch, key, at, public))))
    if "tenant" in parts:
        add(("ce_tenantid", parts["tenant"].encode()))
    if "actor" in parts:
        add(("ce_actor", parts["actor"].encode()))
    return tuple(headers)


def _whole(
    id: bytes,
    position: Position,
    type: str,
    key: str,
    topic: str,
    data: bytes,
    category: str | None,
    stream: str | None,
    version: int | None,
    time: int,
    meta: str | bytes,
    last_event: Position | None,
    last_public: Position | None,
) -> Outgoing:
    where = None if category is None else StreamId(category, key if stream is None else stream)
    found = rows.envelope(
        UUID(id.decode()) if len(id) == 36 else rows.uuid_of(id),
        type,
        key,
        topic,
        data,
        rows.instant(time),
        meta,
        where,
        version,
        position,
    )
    if last_event is not None and found.token is not None:
        found = replace(found, token=replace(found.token, position=last_event, public=last_public or 0))
    return to_record(found)


@lru_cache(maxsize=256)
def _second(seconds: int) -> tuple[bytes, bytes]:
    """The header of a time without a fraction, whole, and the one with a fraction up to its point; of seconds since
    1970."""
    text = (_START + timedelta(seconds=seconds)).isoformat()[:-6].encode()
    return b"%b%b+00:00" % (_TIME, text), b"%b%b" % (_TIME_WITH_FRACTION, text)


@lru_cache(maxsize=4096)
def _type(type_name: str) -> bytes:
    return packed_header(*type_header(type_name))


@lru_cache(maxsize=4096)
def _sequence(version: int) -> bytes:
    return packed_header("ce_sequence", b"%d" % version)


@lru_cache(maxsize=1024)
def _category(category: str) -> bytes:
    return packed_header("ce_stream", category.encode())


__all__ = ["records_of"]
