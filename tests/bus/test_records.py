"""Records by what is declared of their topic: without a value, without a key."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import pytest

from bus.codec import JsonCodec
from bus.envelope import Kind
from bus.errors import BadMessageClass, Undecodable
from bus.messages import Event, Key
from bus.records import NOBODYS, RecordReader, TopicRule, rules_of
from bus.registry import Registry
from bus.transport import Assignment, Delivery, TopicSpec

NOW = datetime(2024, 5, 1, tzinfo=UTC)
TOPIC = "legacy.customers"


class CustomerChanged(Event, type="legacy.customer-changed.v1", topic=TOPIC):
    customer_id: Key[str]
    name: str


class CustomerDeleted(Event, type="legacy.customer-deleted.v1", topic=TOPIC, deletes=True):
    customer_id: Key[str]
    why: str = "gone"


class Numbered(Event, type="legacy.numbered.v1", topic="legacy.numbers", deletes=True):
    number: Key[int]


CODEC = JsonCodec(Registry([CustomerChanged, CustomerDeleted, Numbered]))


def record(
    value: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    key: bytes | None = b"c-1",
    topic: str = TOPIC,
) -> Delivery:
    pairs = tuple((name, text.encode()) for name, text in (headers or {}).items())
    return Delivery(Assignment(topic, 2), 17, key, value, pairs, NOW)


def reader(*specs: TopicSpec, **events: Any) -> RecordReader:
    read = {TOPIC: [CustomerChanged, CustomerDeleted], "legacy.numbers": [Numbered]} | events
    return RecordReader(1000, rules_of(specs, read))


COMPACT = TopicSpec(TOPIC, compact=True)
KEYLESS = TopicSpec(TOPIC, keyed=False)
CHANGED = {"ce_specversion": "1.0", "ce_id": "1", "ce_source": "crm", "ce_type": "legacy.customer-changed.v1"}
BODY = b'{"customer_id": "c-9", "name": "Ann"}'


# --- without a value -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "specs", [(), (TopicSpec(TOPIC),), (TopicSpec("legacy.others", compact=True),), (TopicSpec(TOPIC, keyed=False),)]
)
def test_a_record_without_a_value_is_refused_where_nothing_is_declared_compacted(specs: Any) -> None:
    with pytest.raises(Undecodable) as caught:
        reader(*specs)(record())
    assert str(caught.value) == (
        "legacy.customers/2/17: a record without a value (a tombstone), and legacy.customers is not declared "
        "compacted; wanted an event with data, or topics=[TopicSpec('legacy.customers', compact=True)]: a delete"
    )


def test_on_a_topic_declared_compacted_it_is_the_event_that_stands_for_deletes() -> None:
    envelope = reader(COMPACT)(record())
    assert (envelope.kind, envelope.type, envelope.key) == (Kind.EVENT, "legacy.customer-deleted.v1", "c-1")
    assert (envelope.topic, envelope.source, envelope.time) == (TOPIC, TOPIC, NOW)
    assert CODEC.decode(envelope) == CustomerDeleted(customer_id="c-1")


def test_a_delete_is_the_same_message_however_often_it_is_read() -> None:
    one, again = reader(COMPACT)(record()), reader(COMPACT)(record())
    assert one.id == again.id == one.correlation_id == uuid5(NAMESPACE_URL, "foldbus:legacy.customers/2/17")


def test_headers_of_a_delete_change_nothing() -> None:
    assert reader(COMPACT)(record(None, CHANGED)).type == "legacy.customer-deleted.v1"


def test_a_key_that_is_a_number_becomes_one() -> None:
    envelope = reader(TopicSpec("legacy.numbers", compact=True))(record(key=b"42", topic="legacy.numbers"))
    assert CODEC.decode(envelope) == Numbered(number=42)


def test_a_delete_that_no_event_stands_for_has_a_type_that_nobody_names() -> None:
    rules = rules_of([COMPACT], {TOPIC: [CustomerChanged]})
    assert RecordReader(1000, rules)(record()).type == NOBODYS


@pytest.mark.parametrize(("key", "told"), [(None, "without a record key"), (b"\xff", "no UTF-8"), (b"", "key")])
def test_a_delete_of_nobody_knows_what_is_refused(key: bytes | None, told: str) -> None:
    with pytest.raises(Undecodable, match=told):
        reader(COMPACT)(record(key=key))


def test_a_compacted_topics_other_records_are_read_as_ever() -> None:
    envelope = reader(COMPACT)(record(BODY, CHANGED, key=b"c-9"))
    assert CODEC.decode(envelope) == CustomerChanged(customer_id="c-9", name="Ann")


def without_topic() -> type[Event]:
    class Nowhere(Event, type="legacy.nowhere.v1", deletes=True):
        customer_id: Key[str]

    return Nowhere


def with_more_than_a_key() -> type[Event]:
    class TooMuch(Event, type="legacy.too-much.v1", topic=TOPIC, deletes=True):
        customer_id: Key[str]
        name: str

    return TooMuch


@pytest.mark.parametrize(
    ("make", "told"),
    [(without_topic, "names no topic="), (with_more_than_a_key, "wants name, which a delete does not say")],
)
def test_an_event_for_deletes_wants_a_topic_and_nothing_but_its_key(make: Callable[[], object], told: str) -> None:
    with pytest.raises(BadMessageClass, match=told):
        make()


# --- without a key ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("specs", [(), (COMPACT,)])
def test_a_record_without_a_key_is_refused_unless_its_topic_is_declared_so(specs: Any) -> None:
    with pytest.raises(Undecodable, match="neither a subject nor a record key"):
        reader(*specs)(record(BODY, CHANGED, key=None))


def test_without_keys_the_key_is_the_messages_own() -> None:
    envelope = reader(KEYLESS)(record(BODY, CHANGED, key=None))
    assert envelope.key == "c-9"
    assert CODEC.decode(envelope) == CustomerChanged(customer_id="c-9", name="Ann")


def test_a_newer_version_of_a_named_type_has_its_key_too() -> None:
    newer = CHANGED | {"ce_type": "legacy.customer-changed.v7"}
    assert reader(KEYLESS)(record(BODY, newer, key=None)).key == "c-9"


def test_a_key_that_is_there_counts_also_where_none_is_needed() -> None:
    assert reader(KEYLESS)(record(BODY, CHANGED, key=b"c-1")).key == "c-1"
    assert reader(KEYLESS)(record(BODY, CHANGED | {"ce_subject": "c-2"}, key=None)).key == "c-2"


def test_structured_events_without_keys_are_looked_into() -> None:
    event = {"specversion": "1.0", "id": "1", "source": "crm", "type": CHANGED["ce_type"], "data": json.loads(BODY)}
    structured = {"content-type": "application/cloudevents+json"}
    found = reader(KEYLESS)(record(json.dumps(event).encode(), structured, key=None))
    assert found.key == "c-9"
    with_subject = json.dumps(event | {"subject": "c-3"}).encode()
    assert reader(KEYLESS)(record(with_subject, structured, key=None)).key == "c-3"


def test_types_that_nobody_names_need_no_key() -> None:
    envelope = reader(KEYLESS)(record(b"{}", CHANGED | {"ce_type": "legacy.else.v1"}, key=None))
    assert envelope.type == "legacy.else.v1"


@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b'{"customer_id": null}', b'{"customer_id": ["c"]}', b"1"])
def test_a_message_whose_key_cannot_be_found_is_refused(body: bytes) -> None:
    with pytest.raises(Undecodable, match="neither a subject nor a record key"):
        reader(KEYLESS)(record(body, CHANGED, key=None))


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_record_over_the_limit_is_refused_before_anything_looks_into_it() -> None:
    with pytest.raises(Undecodable, match="wanted at most 1000"):
        reader(KEYLESS)(record(b"x" * 1001, key=None))


def test_topics_that_need_no_rule_have_none() -> None:
    assert rules_of([TopicSpec("a.events"), TopicSpec("a.b", retention_s=5.0)], {}) == {}
    assert rules_of([TopicSpec("a.b", compact=True)], {}) == {"a.b": TopicRule(compact=True)}
