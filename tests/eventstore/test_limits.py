"""What the stores take and what they refuse, the same on both: names, sizes, counts. The numbers are in `checks.py`."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from bus.cloudevents import to_record
from bus.envelope import StreamId
from eventstore import checks
from eventstore.checks import DATA_MAX, NAME_BYTES_MAX, TEXT_MAX, UNIT_MAX, UNITS_MAX, check_units
from eventstore.errors import BadUnit
from eventstore.port import Append, Store, Timer, Unit, Watermark
from tests.eventstore.stores import (
    NOON,
    append,
    claim,
    commit,
    dead_letter,
    event,
    message,
    one,
    stream,
    timer,
    version,
    wanted,
    whole_log,
)

RANDOM = random.Random(7)


def noise(size: int) -> str:
    """That many bytes which no index compresses."""
    return "".join(RANDOM.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_", k=size))


LONGEST = noise(NAME_BYTES_MAX)

NAMES = {
    "with spaces and signs": "o 1/%$#'\";--",
    "of other scripts": "Größe-注文-🛒",
    "that looks like a number": "0007",
    "that looks like a pattern": "%_*",
    "with a line's end": "a\nb\r\tc",
    "composed": "\u00e9",
    "decomposed": "e\u0301",
    "as long as may be": LONGEST,
    "as long as may be, of other scripts": "注" * (NAME_BYTES_MAX // 3),
}


async def test_a_streams_id_is_any_text_and_no_two_of_them_are_one(store: Store) -> None:
    for number, name in enumerate(NAMES.values(), 1):
        assert (await one(store, Unit(appends=(append(stream(name), 0, number),)))).verdict == "committed"
    slices = await store.load([wanted(stream(name)) for name in NAMES.values()])
    assert [each.version for each in slices] == list(range(1, len(NAMES) + 1))
    assert {record.stream.id for record in await whole_log(store) if record.stream} == set(NAMES.values())


async def test_every_name_may_be_as_long_as_the_limit_at_once(store: Store) -> None:
    """What stands together in one index still fits, also when it cannot be compressed."""
    longest = [noise(NAME_BYTES_MAX) for _ in range(5)]
    category = "c" * 128
    to = StreamId(category, longest[0])
    due = Timer(longest[1], dead_letter().id, noise(5000), NOON, message(noise(5000), topic=None))
    unit = Unit(
        claim(key=noise(9000), consumer=longest[2]),
        appends=(append(to, 0, event(noise(9000))),),
        timers=(due,),
        dead_letter=dead_letter(consumer=longest[3]),
    )
    mark = Watermark(longest[3], longest[4], 0, 1)
    (outcome,) = await store.commit([unit], watermarks=[mark])
    assert outcome.versions == {to: 1}
    assert await store.watermarks(longest[3]) == {(longest[4], 0): 1}
    assert await commit(store, unit) == ["duplicate"]
    assert [each.consumer for each in await store.timers.due(limit=5)] == [longest[1]]


def envelopes(count: int) -> tuple[Any, ...]:
    return (event(),) * count


BAD: dict[str, tuple[Unit, str]] = {
    "no category": (Unit(appends=(append(stream("a", ""), 0),)), "category"),
    "a category in capitals": (Unit(appends=(append(stream("a", "Order"), 0),)), "category"),
    "a category with a space": (Unit(asserts=((stream("a", "order line"), 0),)), "category"),
    "a category that begins with a digit": (Unit(appends=(append(stream("a", "1order"), 0),)), "category"),
    "a category with a line's end": (Unit(appends=(append(stream("a", "order\n"), 0),)), "category"),
    "a category of 129": (Unit(appends=(append(stream("a", "c" * 129), 0),)), "category"),
    "an id of a byte too many": (Unit(appends=(append(stream(LONGEST + "x"), 0),)), "1025 bytes"),
    "an id of a byte too many in UTF-8": (Unit(asserts=((stream("é" * (NAME_BYTES_MAX // 2) + "x"), 0),)), "1025"),
    "a consumer too long": (Unit(claim(consumer=LONGEST + "x")), "consumer is 1025 bytes"),
    "a timer's consumer too long": (Unit(timers=(timer(NOON, consumer=LONGEST + "x"),)), "timer's consumer"),
    "a timer without consumer": (Unit(timers=(timer(NOON, consumer=""),)), "timer's consumer is empty"),
    "a dead letter's consumer too long": (Unit(dead_letter=dead_letter(consumer=LONGEST + "x")), "dead letter's"),
    "an event too large": (Unit(appends=(append("a", 0, event(data=b"x" * (DATA_MAX + 1))),)), "bytes of data"),
    "a message too large": (Unit(outgoing=(replace(message(), data=b"x" * (DATA_MAX + 1)),)), "bytes of data"),
    "headers too large": (Unit(outgoing=(replace(message(), headers={"a": "x" * TEXT_MAX}),)), "characters of text"),
    "a key too large": (Unit(claim(key="x" * (TEXT_MAX + 1))), "characters of text"),
    "too many events": (Unit(appends=(Append(stream("a"), 0, envelopes(UNIT_MAX)),)), f"at most {UNIT_MAX}"),
    "too many asserts": (Unit(asserts=((stream("a"), 0),) * UNIT_MAX), f"at most {UNIT_MAX}"),
    "too many messages": (Unit(outgoing=(message(),) * UNIT_MAX), f"at most {UNIT_MAX}"),
}


@pytest.mark.parametrize("what", list(BAD))
async def test_what_passes_a_limit_is_refused_by_name_and_nothing_of_the_call_is_written(
    store: Store, what: str
) -> None:
    good = Unit(claim(key="g"), appends=(append("good", 0),))
    bad, says = BAD[what]
    with pytest.raises(BadUnit, match="unit 1 of 2") as refused:
        await store.commit([good, bad], watermarks=[Watermark("g", "t", 0, 1)])
    assert says in str(refused.value)
    assert len(str(refused.value)) < 500, "an error that repeats what is too large is too large itself"
    assert await whole_log(store) == []
    assert await store.watermarks("g") == {}
    assert await commit(store, good) == ["ok"]


@pytest.mark.parametrize(
    ("mark", "says"),
    [
        (Watermark(LONGEST + "x", "t", 0, 1), "group is 1025 bytes"),
        (Watermark("g", "", 0, 1), "topic is empty"),
        (Watermark("g", "t", 2**31, 1), "partition"),
        (Watermark("g", "t", 0, -1), "offset"),
        (Watermark("g", "t", 0, 2**63), "offset"),
    ],
)
async def test_a_watermark_that_cannot_be_one_is_refused(store: Store, mark: Watermark, says: str) -> None:
    good = Unit(claim(key="g"), appends=(append("good", 0),))
    with pytest.raises(BadUnit, match=says):
        await store.commit([good], watermarks=[mark])
    assert await version(store, "good") == 0


async def test_a_call_of_too_many_units_is_refused(store: Store) -> None:
    with pytest.raises(BadUnit, match=f"{UNITS_MAX + 1} units"):
        await store.commit([Unit()] * (UNITS_MAX + 1))


async def test_the_bytes_of_a_call_are_bounded_wherever_they_are(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CALL_DATA_MAX", 1_000)
    large = b"x" * 300
    due = replace(timer(NOON), envelope=replace(message(topic=None), data=large))
    four = [
        Unit(appends=(append("a", 0, event(data=large)),)),
        Unit(outgoing=(replace(message(), data=large),)),
        Unit(timers=(due,)),
        Unit(claim(reply=replace(event(), data=large))),
    ]
    for place in range(4):
        three = [*four[:place], *four[place + 1 :]]
        assert await commit(store, *three, Unit(appends=(append(f"n-{place}", 0),))) is not None
    with pytest.raises(BadUnit, match="1200 bytes"):
        await store.commit(four)


async def test_the_largest_event_comes_back_to_the_last_byte(store: Store) -> None:
    data = RANDOM.randbytes(DATA_MAX)
    assert await commit(store, Unit(appends=(append("a", 0, event(data=data)),))) == ["ok"]
    (found,) = await store.load([wanted("a")])
    assert found.records[0].data == data


DEEP = 200_000


@pytest.mark.parametrize("data", [b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP + b"1" + b"}" * DEEP, b"", b"\x00\xff"])
async def test_a_store_does_not_care_what_the_bytes_of_an_event_are(store: Store, data: bytes) -> None:
    """However deep it nests: the store never parses it. Who decodes it is told (`tests/bus/test_codec.py`)."""
    assert await commit(store, Unit(appends=(append("a", 0, event(data=data)),))) == ["ok"]
    (found,) = await store.load([wanted("a")])
    assert found.records[0].data == data
    assert to_record(found.records[0]).value == data
    assert (await whole_log(store))[0].data == data


def test_a_thousand_good_units_pass_the_checks() -> None:
    check_units([Unit(claim(key=str(n)), appends=(append(str(n), 0),)) for n in range(1000)])
