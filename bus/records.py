"""Reading records by what is declared of their topic: limits, records without a value, records without a key.

`from_record` knows CloudEvents and nothing of topics. A record without a value (a tombstone) is a delete where its
topic is declared compacted, and bad input anywhere else. Where a topic is declared without keys, a record that brings
none has that of its message.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from pydantic_core import from_json, to_json

from bus.cloudevents import from_record
from bus.codec import check_key
from bus.envelope import Envelope, Kind
from bus.errors import Undecodable
from bus.messages import Event
from bus.transport import Delivery, TopicSpec

NOBODYS = "foldbus.tombstone.v1"
"""The type of a delete that no event of the service stands for: skipped and counted like any type nobody names."""
_NO_KEY = "-"
_STRUCTURED = b"application/cloudevents"


@dataclass(frozen=True, slots=True)
class TopicRule:
    """How records of one topic are read. `deletes` is the event that stands for a record without a value; `keys` names
    the Key field of each type, by its name without the version."""

    compact: bool = False
    keyed: bool = True
    deletes: type[Event] | None = None
    keys: Mapping[str, str] = field(default_factory=dict[str, str])


def rules_of(specs: Iterable[TopicSpec], events: Mapping[str, Iterable[type[Event]]]) -> Mapping[str, TopicRule]:
    """By topic; `events` are those that are read from it. Topics that need no rule are left out."""
    found: dict[str, TopicRule] = {}
    for spec in specs:
        if spec.compact or not spec.keyed:
            read = list(events.get(spec.name, ()))
            found[spec.name] = TopicRule(
                spec.compact,
                spec.keyed,
                next((event for event in read if event.deletes), None),
                {event.type_name.base: event.key_field for event in read},
            )
    return found


class RecordReader:
    """Record to envelope. Raises BadInput, and nothing else; a record over `max_bytes` is refused before anything looks
    into it."""

    def __init__(self, max_bytes: int, rules: Mapping[str, TopicRule]) -> None:
        self._max_bytes, self._rules = max_bytes, rules

    def __call__(self, delivery: Delivery) -> Envelope:
        value = delivery.value
        if delivery.flaw:
            return from_record(delivery)  # which says so: it is neither a delete nor too large
        if value is None:
            return self._without_value(delivery)
        if len(value) > self._max_bytes:
            raise Undecodable(
                f"a record of {delivery.size} bytes on {delivery.topic}; wanted at most {self._max_bytes}"
            )
        if delivery.key is None and self._rules:
            rule = self._rules.get(delivery.topic)
            if rule is not None and not rule.keyed:
                delivery = replace(delivery, key=_key_in(delivery, value, rule))
        return from_record(delivery)

    def _without_value(self, delivery: Delivery) -> Envelope:
        rule = self._rules.get(delivery.topic)
        place = f"{delivery.topic}/{delivery.partition}/{delivery.offset}"
        if rule is None or not rule.compact:
            raise Undecodable(
                f"{place}: a record without a value (a tombstone), and {delivery.topic} is not declared compacted; "
                f"wanted an event with data, or topics=[TopicSpec({delivery.topic!r}, compact=True)]: a delete"
            )
        if delivery.key is None:
            raise Undecodable(f"{place}: a delete without a record key; wanted the key of what is deleted")
        try:
            key = delivery.key.decode()
        except UnicodeDecodeError as error:
            raise Undecodable(f"{place}: a delete whose record key is no UTF-8") from error
        check_key(key)
        event = rule.deletes
        id = uuid5(
            NAMESPACE_URL, f"foldbus:{place}"
        )  # it has none of its own; its place is the same however often read
        return Envelope(
            id=id,
            kind=Kind.EVENT,
            type=NOBODYS if event is None else str(event.type_name),
            source=delivery.topic,
            key=key,
            data=b"{}" if event is None else to_json({event.key_field: key}),
            time=delivery.time,
            correlation_id=id,
            topic=delivery.topic,
        )


def _key_in(delivery: Delivery, value: bytes, rule: TopicRule) -> bytes | None:
    """The key that the message of a record has in its own Key field. A type that nobody names here needs none: it is
    skipped. None where it cannot be found: `from_record` says that a key is missing."""
    headers = {name.lower(): text for name, text in delivery.headers}
    if headers.get("ce_subject"):
        return None  # the subject is the key
    structured = headers.get("content-type", b"").lower().startswith(_STRUCTURED)
    type_name = headers.get("ce_type", b"").decode(errors="replace")
    try:
        body: Any = from_json(value)
        if structured:
            if body.get("subject"):
                return None
            type_name, body = str(body.get("type")), body.get("data")
        name = rule.keys.get(type_name.rpartition(".v")[0])
        if name is None:
            return _NO_KEY.encode()
        found = body[name]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return str(found).encode(errors="replace") if isinstance(found, str | int) else None


__all__ = ["NOBODYS", "RecordReader", "TopicRule", "rules_of"]
