"""The CloudEvents mapping: our envelopes survive it to the last field, foreign events are taken as far as they go, and
whatever cannot be read is Undecodable, with what was found and what was wanted."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import pytest
from cloudevents.core.bindings import kafka as peer
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.cloudevents import HEADER_BYTES_MAX, HEADERS_MAX, foreign_id, from_record, to_record
from bus.envelope import Envelope, Kind, ReplyOutcome, ReplyTo, StreamId, Token
from bus.errors import BusError, Undecodable
from bus.transport import Assignment, Delivery, Headers, Outgoing

READ_AT = datetime(2024, 5, 17, 9, 30, tzinfo=UTC)
AN_ID = UUID("0190d0f0-1111-7222-8333-444455556666")
BARE: Mapping[str, bytes] = {"ce_specversion": b"1.0", "ce_id": b"1", "ce_source": b"/shop", "ce_type": b"shop.sold.v1"}


def read_back(record: Outgoing) -> Delivery:
    return Delivery(Assignment(record.topic, 3, 1), 42, record.key, record.value, record.headers, READ_AT)


def delivered(
    headers: Mapping[str, bytes] | Headers, *, key: bytes | None = b"k-1", value: bytes | None = b"{}"
) -> Delivery:
    pairs = tuple(headers.items()) if isinstance(headers, Mapping) else headers
    return read_back(Outgoing("shop.events", key, value, pairs))


def an_envelope(**changes: Any) -> Envelope:
    plain = Envelope(
        id=AN_ID,
        kind=Kind.EVENT,
        type="orders.order-placed.v1",
        source="orders",
        key="order-7",
        data=b'{"total_cents":1250}',
        time=datetime(2024, 5, 17, 9, 29, 59, 123456, tzinfo=UTC),
        correlation_id=AN_ID,
        topic="orders.events",
    )
    return replace(plain, **changes)


texts = st.text(st.characters(exclude_characters="\x00", codec="utf-8"), max_size=30)
words = st.text(st.characters(exclude_characters="\x00", codec="utf-8"), min_size=1, max_size=30)
sources = st.one_of(
    words.filter(lambda text: "/" not in text and ":" not in text),
    st.sampled_from(["https://a.example/b", "/a/b", "/"]),
)
numbers = st.integers(0, 2**63 - 1)
times = st.datetimes(timezones=st.just(UTC))
own_names = st.sampled_from(["traceparent", "tracestate", "x-tenant", "ce_dataschema", "Übung"])

envelopes = st.builds(
    Envelope,
    id=st.uuids(),
    kind=st.sampled_from(Kind),
    type=words,
    source=sources,
    key=words,
    data=st.binary(max_size=50),
    time=times,
    correlation_id=st.uuids(),
    causation_id=st.none() | st.uuids(),
    epoch=numbers,
    reply_to=st.none() | st.builds(ReplyTo, words, words, texts),
    deadline=st.none() | times,
    undoes=st.none() | st.uuids(),
    outcome=st.none() | st.sampled_from(ReplyOutcome),
    token=st.none() | st.builds(Token, texts, numbers, texts, numbers, numbers),
    tenant=st.none() | texts,
    actor=st.none() | texts,
    topic=words,
    stream=st.none() | st.builds(StreamId, words, words),
    version=st.none() | numbers,
    position=st.none() | numbers,
    headers=st.dictionaries(own_names, texts, max_size=3),
)


@given(envelopes)
@settings(max_examples=400, deadline=None)
def test_an_envelope_survives_the_wire_field_by_field(envelope: Envelope) -> None:
    record = to_record(envelope)
    assert (record.topic, record.key, record.value) == (envelope.topic, envelope.key.encode(), envelope.data)
    assert from_record(read_back(record)) == envelope


def test_the_record_is_a_cloudevent_in_binary_mode() -> None:
    record = to_record(an_envelope(version=3, position=17, tenant="t-1", headers={"traceparent": "00-ab-cd-01"}))
    assert dict(record.headers) == {
        "ce_specversion": b"1.0",
        "ce_id": str(AN_ID).encode(),
        "ce_source": b"/orders",
        "ce_type": b"orders.order-placed.v1",
        "ce_time": b"2024-05-17T09:29:59.123456+00:00",
        "ce_subject": b"order-7",
        "content-type": b"application/json",
        "ce_kind": b"event",
        "ce_correlationid": str(AN_ID).encode(),
        "ce_position": b"17",
        "ce_sequence": b"3",
        "ce_tenantid": b"t-1",
        "traceparent": b"00-ab-cd-01",
    }
    names = [name for name, _ in record.headers]
    assert len(set(names)) == len(names)


def test_an_id_read_fast_is_the_same_as_one_that_uuid_parsed() -> None:
    found = from_record(read_back(to_record(an_envelope())))
    assert (found.id, hash(found.id), str(found.id)) == (AN_ID, hash(AN_ID), str(AN_ID))
    assert {found.id: 1}[AN_ID] == 1
    assert found.id.is_safe is AN_ID.is_safe
    assert found.id.version == 7


# --- the cloudevents package -----------------------------------------------------------------------------------------


def test_the_cloudevents_package_reads_what_we_write() -> None:
    record = to_record(an_envelope(position=17))
    assert record.value is not None
    event = peer.from_kafka_event(peer.KafkaMessage(dict(record.headers), record.key, record.value))
    assert event.get_id() == str(AN_ID)
    assert event.get_source() == "/orders"
    assert event.get_type() == "orders.order-placed.v1"
    assert event.get_subject() == "order-7"
    assert event.get_time() == datetime(2024, 5, 17, 9, 29, 59, 123456, tzinfo=UTC)
    assert event.get_extension("position") == "17"
    assert event.get_extension("kind") == "event"
    assert event.get_data() == {"total_cents": 1250}


@pytest.mark.parametrize("write", [peer.to_binary_event, peer.to_structured_event], ids=["binary", "structured"])
def test_we_read_what_the_cloudevents_package_writes(write: Callable[[CloudEvent], peer.KafkaMessage]) -> None:
    event = CloudEvent(
        {
            "id": "sale#12",
            "source": "https://shop.example/till/4",
            "type": "shop.sold.v1",
            "time": READ_AT,
            "subject": "customer-1",
            "datacontenttype": "application/json",
            "dataschema": "https://shop.example/schema",
            "partitionkey": "customer-1",
            "traceparent": "00-ab-cd-01",
        },
        {"cents": 5, "who": "Zoë"},
    )
    written = write(event)
    assert isinstance(written.key, str)
    found = from_record(delivered(written.headers, key=written.key.encode(), value=written.value))
    assert json.loads(found.data) == {"cents": 5, "who": "Zoë"}
    assert replace(found, data=b"") == Envelope(
        id=foreign_id("https://shop.example/till/4", "sale#12"),
        kind=Kind.EVENT,
        type="shop.sold.v1",
        source="https://shop.example/till/4",
        key="customer-1",
        data=b"",
        time=READ_AT,
        correlation_id=found.id,
        topic="shop.events",
        headers={
            "ce_id": "sale#12",
            "ce_dataschema": "https://shop.example/schema",
            "ce_partitionkey": "customer-1",
            "traceparent": "00-ab-cd-01",
        },
    )


@given(envelopes)
@settings(max_examples=100, deadline=None)
def test_structured_mode_carries_every_field_too(envelope: Envelope) -> None:
    envelope = replace(envelope, data=b'{"a":[1,null,"\xc3\xab"]}')
    record = to_record(envelope)
    attributes = {name[3:]: value.decode() for name, value in record.headers if name.startswith("ce_")}
    body = attributes | {"data": json.loads(envelope.data), "sequence": envelope.version}
    plain = [(name, value) for name, value in record.headers if name[:3] != "ce_" and name != "content-type"]
    headers = (("Content-Type", b"Application/CloudEvents+JSON; charset=UTF-8"), *plain)
    found = from_record(replace(read_back(record), headers=headers, value=json.dumps(body).encode()))
    assert found == envelope


# --- what others send ------------------------------------------------------------------------------------------------


def test_a_foreign_id_always_becomes_the_same_uuid_and_the_original_goes_out_again() -> None:
    found = from_record(delivered(BARE))
    assert found.id == foreign_id("shop", "1") == from_record(delivered(BARE)).id
    assert found.id != from_record(delivered({**BARE, "ce_source": b"/other"})).id
    assert found.headers == {"ce_id": "1"}
    again = to_record(found)
    assert [value for name, value in again.headers if name == "ce_id"] == [b"1"]
    assert from_record(read_back(again)) == found


def test_a_message_that_only_inherited_a_foreign_ids_header_goes_out_under_its_own_id() -> None:
    record = to_record(
        an_envelope(
            headers={"ce_id": "1", "ce_type": "forged", "CE_Type": "forged", "content-type": "application/json"}
        )
    )
    assert [value for name, value in record.headers if name == "ce_id"] == [str(AN_ID).encode()]
    assert [value for name, value in record.headers if name.lower() == "ce_type"] == [b"orders.order-placed.v1"]


def test_a_foreign_event_gets_defaults_for_what_it_does_not_say() -> None:
    found = from_record(delivered({**BARE, "ce_id": str(AN_ID).encode()}))
    assert found == Envelope(
        AN_ID, Kind.EVENT, "shop.sold.v1", "shop", "k-1", b"{}", READ_AT, AN_ID, topic="shop.events"
    )


def test_the_key_is_the_subject_before_the_record_key() -> None:
    assert from_record(delivered({**BARE, "ce_subject": b"s-1"})).key == "s-1"
    assert from_record(delivered({**BARE, "ce_subject": b"s-1"}, key=b"\xff")).key == "s-1"
    assert from_record(delivered(BARE)).key == "k-1"


def test_a_foreign_events_own_use_of_our_names_is_kept_and_not_believed() -> None:
    told = {
        "ce_position": b"12",
        "ce_token": b"secret",
        "ce_outcome": b"goal",
        "ce_sequence": b"000A",
        "ce_correlationid": b"abc",
        "ce_causationid": str(AN_ID).encode(),
        "traceparent": b"00-w3c",
        "ce_traceparent": b"00-attribute",
        "ce_tracestate": b"a=b",
    }
    found = from_record(delivered({**BARE, **told}))
    assert (found.position, found.version, found.token, found.outcome) == (None, None, None, None)
    assert (found.correlation_id, found.causation_id) == (found.id, AN_ID)
    assert found.headers == {
        "ce_id": "1",
        "foreign_position": "12",
        "foreign_token": "secret",
        "foreign_outcome": "goal",
        "foreign_sequence": "000A",
        "foreign_correlationid": "abc",
        "traceparent": "00-w3c",
        "tracestate": "a=b",
    }
    assert from_record(read_back(to_record(found))) == found


def test_header_names_are_ours_in_any_case() -> None:
    assert from_record(delivered({name.upper(): value for name, value in BARE.items()})) == from_record(delivered(BARE))


def test_another_content_type_is_kept_with_the_message() -> None:
    found = from_record(delivered({**BARE, "content-type": b"text/xml"}, value=b"<a/>"))
    assert (found.data, found.headers["content-type"]) == (b"<a/>", "text/xml")
    assert dict(to_record(found).headers)["content-type"] == b"text/xml"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("2024-05-17T11:30:00+02:00", READ_AT),
        ("2024-05-17T09:30:00Z", READ_AT),
        ("2024-05-17T09:30:00.123456789Z", READ_AT.replace(microsecond=123456)),
    ],
)
def test_times_are_read_as_rfc_3339_writes_them(written: str, read: datetime) -> None:
    found = from_record(delivered({**BARE, "ce_time": written.encode()})).time
    assert found == read
    assert found.utcoffset() == timedelta(0)


def test_times_of_other_zones_are_the_same_instant_after_the_wire() -> None:
    here = datetime(2024, 5, 17, 11, 30, tzinfo=timezone(timedelta(hours=2)))
    assert from_record(read_back(to_record(an_envelope(time=here)))).time == here


def test_structured_data_may_come_as_base64_as_text_or_as_null() -> None:
    def structured(**more: object) -> Envelope:
        body = {
            "specversion": "1.0",
            "id": str(AN_ID),
            "source": "/shop",
            "type": "shop.sold.v1",
            "subject": "k",
            **more,
        }
        return from_record(
            delivered({"content-type": b"application/cloudevents+json"}, value=json.dumps(body).encode())
        )

    assert structured(data_base64=b64encode(b'{"a":1}').decode()).data == b'{"a":1}'
    assert structured(data=None).data == b"null"
    assert structured(data="text").data == b'"text"'
    assert structured(data="text", datacontenttype="text/plain").data == b"text"
    assert structured(data="text", datacontenttype="application/problem+json; charset=utf-8").data == b'"text"'
    assert structured(data=1, flag=True, size=7, nothing=None).headers == {"ce_flag": "true", "ce_size": "7"}


# --- what cannot be read ---------------------------------------------------------------------------------------------

OURS: Mapping[str, bytes] = {**BARE, "ce_kind": b"command"}
STRUCTURED = {"content-type": b"application/cloudevents+json"}


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        ({}, "no specversion; wanted a CloudEvent 1.0"),
        ({**BARE, "ce_specversion": b"0.3"}, r"specversion is b'0.3', wanted '1.0'"),
        ({**BARE, "ce_id": b""}, "wanted CloudEvents attributes id, source and type"),
        ({**BARE, "ce_source": b""}, "wanted CloudEvents attributes"),
        ({"ce_specversion": b"1.0", "ce_id": b"1", "ce_source": b"/a"}, "wanted CloudEvents attributes"),
        ({**BARE, "ce_type": b"shop.\xff"}, r"header 'ce_type' holds byte 0xff at 5; wanted UTF-8"),
        ({**BARE, "ce_source": b"\xc3"}, "header 'ce_source' holds byte 0xc3"),
        ({**BARE, "ce_id": b"\xff" * 36}, "header 'ce_id' holds byte 0xff"),
        ({**BARE, "x-any": b"\xff"}, "header 'x-any' holds byte 0xff"),
        ({**BARE, "ce_type": b"a\x00b"}, "header 'ce_type' holds a NUL"),
        ({**BARE, "x\x00y": b""}, "header name .* holds a NUL"),
        ({**BARE, "CE_TYPE": b"again"}, "header 'ce_type' is there twice, wanted once"),
        ({**BARE, "ce_time": b"yesterday"}, "time is b'yesterday', wanted a time as in RFC 3339"),
        ({**BARE, "ce_time": b"2024-05-17T09:30:00"}, "wanted a time with its offset"),
        ({**BARE, "ce_time": b"0001-01-01T00:00:00+14:00"}, "wanted a time that UTC has"),
        ({**BARE, "ce_subject": b"k" * 1025}, "key .* cannot be used; wanted 1 to 1024 bytes"),
        ({**BARE, **{f"x-{i}": b"" for i in range(HEADERS_MAX)}}, f"wanted at most {HEADERS_MAX}"),
        ({**BARE, "x": b"x" * HEADER_BYTES_MAX}, f"more than {HEADER_BYTES_MAX} bytes of headers"),
        ({**OURS, "ce_kind": b"wish"}, "kind is b'wish', wanted one of command, event, query, reply"),
        ({**OURS, "ce_correlationid": b"7"}, "correlationid is b'7', wanted a UUID"),
        ({**OURS, "ce_correlationid": b" 190d0f0-1111-7222-8333-444455556666"}, "wanted a UUID"),
        ({**OURS, "ce_correlationid": b"0190d0f0-1111-7222-8333-44445555666_"}, "wanted a UUID"),
        ({**OURS, "ce_causationid": b"0190d0f011117222833344445555666600-0"}, "causationid .* wanted a UUID"),
        ({**OURS, "ce_causationid": b"0190d0f01111-7222-8333-4444-55556666"}, "causationid .* wanted a UUID"),
        ({**OURS, "ce_causationid": b"0190d0f0-1111-7222-8333-4444555566--"}, "causationid .* wanted a UUID"),
        ({**OURS, "ce_undoes": b"x"}, "undoes is b'x', wanted a UUID"),
        ({**OURS, "ce_deadline": b"soon"}, "deadline is b'soon', wanted a time"),
        ({**OURS, "ce_outcome": b"maybe"}, "outcome is b'maybe', wanted one of ok, refused, died, cancelled"),
        ({**OURS, "ce_position": b"-1"}, "position is b'-1', wanted a number"),
        ({**OURS, "ce_position": b"9223372036854775808"}, "wanted a number from 0 to 9223372036854775807"),
        ({**OURS, "ce_sequence": "٣".encode()}, "sequence .* wanted a number"),
        ({**OURS, "ce_sourceepoch": b"1" * 5000}, "sourceepoch .* wanted a number"),
        ({**OURS, "ce_replytotopic": b"a.replies"}, "wanted replytotopic and replytokey"),
        ({**OURS, "ce_token": b"[1,2"}, "token .* wanted a JSON array"),
        ({**OURS, "ce_token": b'[1,2,-3,"a","b"]'}, "token .* wanted .epoch, position"),
        ({**OURS, "ce_token": b'[true,2,3,"a","b"]'}, "token .* wanted .epoch, position"),
        ({**OURS, "ce_token": b"[" * 50_000}, "token .* wanted a JSON array"),
        ({**OURS, "ce_tenantid": b"\xff"}, "header 'ce_tenantid' holds byte 0xff"),
    ],
)
def test_headers_that_cannot_be_read_are_undecodable_and_named(headers: Mapping[str, bytes], told: str) -> None:
    with pytest.raises(Undecodable, match=told) as caught:
        from_record(delivered(headers))
    assert str(caught.value).startswith("shop.events[3] offset 42: ")
    assert len(str(caught.value)) < 500


def test_a_repeated_required_header_is_undecodable_and_a_repeated_foreign_one_counts_last() -> None:
    twice = (*BARE.items(), ("ce_id", b"2"))
    with pytest.raises(Undecodable, match="'ce_id' is there twice"):
        from_record(delivered(twice))
    assert from_record(delivered((*BARE.items(), ("x-a", b"1"), ("x-a", b"2")))).headers["x-a"] == "2"


def test_a_tombstone_is_undecodable() -> None:
    with pytest.raises(Undecodable, match="found a record without a value"):
        from_record(delivered(BARE, value=None))
    with pytest.raises(Undecodable, match="found a record without a value"):
        from_record(delivered(STRUCTURED, value=None))


@pytest.mark.parametrize("key", [None, b"", b"\xff", b"a\x00b"])
def test_a_record_without_a_usable_key_is_undecodable(key: bytes | None) -> None:
    with pytest.raises(Undecodable, match="key"):
        from_record(delivered(BARE, key=key))


@pytest.mark.parametrize(
    ("content_type", "value", "told"),
    [
        (b"application/cloudevents-batch+json", b"[]", "content type is .*batch.*, wanted application/json or"),
        (b"application/cloudevents+avro", b"", "content type is"),
        (b"application/cloudevents+json", b"{", "the value is no JSON"),
        (b"application/cloudevents+json", b"[1]", r"the value is '\[1\]', wanted a JSON object"),
        (b"application/cloudevents+json", b"\xff", "the value holds byte 0xff at 0; wanted UTF-8"),
        (b"application/cloudevents+json", b'{"data":NaN}', "NaN is no JSON"),
        (b"application/cloudevents+json", b"[" * 50_000, "the value is no JSON"),
        (b"application/cloudevents+json", b"1" * 5000, "the value is no JSON"),
        (b"application/cloudevents+json", b'{"id":{}}', "attribute 'id' is {}, wanted a short text"),
        (b"application/cloudevents+json", b'{"id":"a\\u0000b"}', "attribute 'id' is"),
        (b"application/cloudevents+json", b'{"id":"\\ud800"}', "'id' holds half of a surrogate pair"),
        (b"application/cloudevents+json", b'{"data":"\\ud800"}', "'data' holds half of a surrogate pair"),
        (b"application/cloudevents+json", b'{"data":1,"data_base64":"AA=="}', "either data or data_base64"),
        (b"application/cloudevents+json", b'{"data_base64":"!"}', "no base64"),
        (b"application/cloudevents+json", b'{"specversion":"1.0"}', "found a record without a value"),
        (b"application/cloudevents+json", b'{"data":1}', "no specversion"),
    ],
)
def test_structured_events_that_cannot_be_read_are_undecodable(content_type: bytes, value: bytes, told: str) -> None:
    with pytest.raises(Undecodable, match=told):
        from_record(delivered({"content-type": content_type}, value=value))


names = st.sampled_from([name for name, _ in to_record(an_envelope(token=Token("a", 1, "k", 2, 3))).headers]) | words
values = st.binary(max_size=20) | st.sampled_from([b"1.0", b"/a", b"event", str(AN_ID).encode(), b"[1,2,3]"])


@given(
    st.lists(st.tuples(names, values), max_size=14),
    st.booleans(),
    st.none() | st.binary(max_size=9),
    st.none() | st.binary(),
)
@settings(max_examples=500, deadline=None)
def test_whatever_bytes_come_nothing_but_undecodable_is_raised(
    noise: list[tuple[str, bytes]], valid: bool, key: bytes | None, value: bytes | None
) -> None:
    headers = (*BARE.items(), *noise) if valid else tuple(noise)
    try:
        found = from_record(delivered(headers, key=key, value=value))
    except Undecodable:
        return
    assert from_record(read_back(to_record(found))) == found


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda x: st.lists(x, max_size=3)))
@settings(max_examples=100, deadline=None)
def test_whatever_json_comes_nothing_but_undecodable_is_raised(noise: object) -> None:
    body = {"specversion": "1.0", "id": noise, "source": "/a", "type": "t", "subject": "k", "data": noise}
    try:
        found = from_record(delivered(STRUCTURED, value=json.dumps(body).encode()))
    except Undecodable:
        return
    assert from_record(read_back(to_record(found))) == found


def test_an_envelope_that_is_not_published_or_holds_no_text_makes_no_record() -> None:
    with pytest.raises(ValueError, match="has no topic"):
        to_record(an_envelope(topic=None))
    with pytest.raises(BusError, match="no text that UTF-8 can carry"):
        to_record(an_envelope(key="\ud800", id=uuid4()))
