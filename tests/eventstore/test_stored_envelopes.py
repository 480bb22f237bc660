"""An envelope that came from a table parses its document when it is first asked for more than a fold needs. Nobody can
tell it from the envelope that was stored."""

import copy
import dataclasses
import pickle
import threading
from dataclasses import FrozenInstanceError, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from bus.codec import JsonCodec
from bus.envelope import Envelope, Kind, ReplyOutcome, ReplyTo, StreamId, Token
from bus.errors import Undecodable
from bus.messages import Event, Key
from bus.registry import Registry
from eventstore import rows

ID, CORRELATION, CAUSE = UUID(int=2**127 + 1), UUID(int=7), UUID(int=8)
TIME = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)
STREAM = StreamId("note", "n1")

PLAIN = Envelope(
    ID, Kind.EVENT, "bench.noted.v1", "bench", "n1", b'{"n":1}', TIME, CORRELATION,
    topic="bench.events", stream=STREAM, version=3, position=9,
)  # fmt: skip
FULL = replace(
    PLAIN,
    kind=Kind.REPLY,
    causation_id=CAUSE,
    epoch=4,
    reply_to=ReplyTo("a.replies", "k", "i"),
    deadline=TIME + timedelta(seconds=1),
    undoes=CAUSE,
    outcome=ReplyOutcome.REFUSED,
    token=Token("bench", 4, "k", 5, 6),
    tenant="t",
    actor="me",
    headers={"traceparent": "00", "a": "b"},
)


def stored(envelope: Envelope) -> Envelope:
    meta = rows.meta(envelope, epoch=envelope.epoch)
    return rows.envelope(
        envelope.id, envelope.type, envelope.key, envelope.topic, envelope.data, envelope.time, meta,
        envelope.stream, envelope.version, envelope.position,
    )  # fmt: skip


def lean(envelope: Envelope) -> Envelope:
    meta = rows.meta(envelope, epoch=envelope.epoch)
    since_2000 = (envelope.time - datetime(2000, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    return rows.lean_envelope(
        envelope.id.bytes, envelope.type, envelope.key, envelope.topic, envelope.data,
        since_2000.to_bytes(8, signed=True), meta, envelope.stream, envelope.version, envelope.position,
    )  # fmt: skip


@pytest.fixture(params=[stored, lean])
def back(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("envelope", [PLAIN, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("name", [one.name for one in fields(Envelope)])
def test_has_each_field_whichever_is_asked_for_first(back: Any, envelope: Envelope, name: str) -> None:
    assert getattr(back(envelope), name) == getattr(envelope, name)


@pytest.mark.parametrize("envelope", [PLAIN, FULL], ids=["plain", "full"])
def test_is_equal_to_what_was_stored_from_both_sides(back: Any, envelope: Envelope) -> None:
    assert back(envelope) == envelope
    assert envelope == back(envelope)
    assert back(envelope) == back(envelope)
    assert back(envelope) != replace(envelope, epoch=99)
    assert replace(envelope, epoch=99) != back(envelope)
    assert back(envelope) != 1


def test_is_printed_copied_pickled_and_replaced_as_any_other(back: Any) -> None:
    assert repr(back(FULL)) == repr(FULL)
    assert copy.copy(back(FULL)) == FULL
    assert pickle.loads(pickle.dumps(back(FULL))) == FULL
    assert type(pickle.loads(pickle.dumps(back(FULL)))) is Envelope
    assert replace(back(FULL), tenant="other") == replace(FULL, tenant="other")
    late = {name: getattr(FULL, name) for name in rows._LATE}
    assert replace(back(PLAIN), **late) == FULL  # asks it for nothing that is parsed late
    assert dataclasses.asdict(back(FULL)) == dataclasses.asdict(FULL)


def test_has_no_hash_as_little_as_any_other(back: Any) -> None:
    for made in (FULL, back(FULL)):
        with pytest.raises(TypeError, match="unhashable"):  # its headers are a mapping
            hash(made)


def test_is_frozen_before_and_after(back: Any) -> None:
    made = back(PLAIN)
    for _ in range(2):
        with pytest.raises(FrozenInstanceError):
            made.type = "other"
        with pytest.raises(FrozenInstanceError):
            made.source = "other"
        assert made.source == "bench"


def test_parses_nothing_for_a_fold() -> None:
    made = rows.lean_envelope(ID.bytes, "t.v1", "k", None, b"{}", 0, "no JSON", STREAM, 1, 2)
    assert (made.type, made.key, made.topic, made.data) == ("t.v1", "k", None, b"{}")
    assert (made.stream, made.version, made.position) == (STREAM, 1, 2)
    with pytest.raises(ValueError, match="line 1"):
        _ = made.source


def test_knows_no_other_names(back: Any) -> None:
    with pytest.raises(AttributeError, match="no 'colour'"):
        _ = back(PLAIN).colour
    assert not hasattr(back(PLAIN), "colour")


def test_takes_a_time_as_microseconds_too() -> None:
    made = rows.lean_envelope(
        ID.bytes, "t.v1", "k", None, b"{}", rows.micros(TIME), rows.meta(PLAIN, epoch=0), STREAM, 1, 2
    )
    assert made.time == TIME
    assert made.id == ID


@pytest.mark.parametrize("when", [datetime(1999, 12, 31, tzinfo=UTC), datetime(1969, 1, 1, tzinfo=UTC), TIME])
def test_takes_times_before_the_database_counts(when: datetime) -> None:
    assert lean(replace(PLAIN, time=when)).time == when


def test_threads_may_ask_at_once() -> None:
    made = [lean(FULL) for _ in range(200)]
    gate = threading.Barrier(4)
    wrong: list[object] = []

    def ask(name: str) -> None:
        gate.wait(10)
        for one in made:
            try:
                if getattr(one, name) != getattr(FULL, name):
                    wrong.append((name, getattr(one, name)))
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("id", "headers", "kind", "time")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not wrong


def test_settles_once_more_after_another_thread_did() -> None:
    """The interleaving: a thread that is already in `__getattr__` when another one has parsed and cleared."""
    made = lean(FULL)
    assert rows._settled(made) == FULL
    assert rows._settled(made) == FULL


@pytest.mark.parametrize("id", [UUID(int=0), UUID(int=1), UUID(int=2**128 - 1), ID])
def test_a_uuid_is_made_of_its_digits_or_its_bytes(id: UUID) -> None:
    for made in (rows.uuid_of(id.hex), rows.uuid_of(id.bytes)):
        assert (made, type(made), hash(made), made.is_safe) == (id, UUID, hash(id), id.is_safe)


def test_decodes_each_type_as_itself_and_a_stored_event_under_any_key() -> None:
    class First(Event, type="bench.first.v1"):
        note_id: Key[str]

    class Second(Event, type="bench.second.v1"):
        note_id: Key[str]

    codec = JsonCodec(Registry([First, Second]))
    for _ in range(2):
        for kind in (First, Second):
            data = b'{"note_id":"n2"}'
            assert codec.decode(stored(replace(PLAIN, type=str(kind.type_name), data=data))) == kind(note_id="n2")
            with pytest.raises(Undecodable, match="n2"):
                codec.decode(replace(PLAIN, type=str(kind.type_name), data=data, stream=None))
