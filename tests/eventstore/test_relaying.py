"""The log as records: what the relay publishes is, to the last byte, what `to_record` makes of the log's envelopes."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from hypothesis import given

from bus.cloudevents import foreign_id, to_record
from bus.envelope import Envelope, Kind, Position, StreamId
from bus.transport import Outgoing
from eventstore import rows
from eventstore.errors import CheckpointAhead
from eventstore.port import Append, Store, Unit
from eventstore.relaying import records_of
from tests.bus.test_cloudevents import an_envelope, envelopes
from tests.eventstore.stores import append, claim, event, message, one, reply, stream, whole_log
from tests.eventstore.test_store_conformance import loaded_envelope
from tests.eventstore.test_stored_envelopes import stored

_2000 = datetime(2000, 1, 1, tzinfo=UTC)


def row(envelope: Envelope, *, since_2000: bool) -> tuple[Any, ...]:
    """As SQLite gives it or, `since_2000`, as PostgreSQL does."""
    id, time = envelope.id.bytes, cast("int | bytes", rows.micros(envelope.time))
    if since_2000:
        id = str(envelope.id).encode()
        time = ((envelope.time - _2000) // timedelta(microseconds=1)).to_bytes(8, signed=True)
    place = (None, None) if envelope.stream is None else (envelope.stream.category, envelope.stream.id)
    meta = rows.meta(envelope, epoch=envelope.epoch)
    return (
        envelope.position, id, envelope.type, envelope.key, envelope.topic, envelope.data, *place,
        envelope.version, time, meta, None, None,
    )  # fmt: skip


@given(envelope=envelopes)
def test_a_row_is_the_record_of_its_envelope(envelope: Envelope) -> None:
    envelope = replace(envelope, topic="orders.events", position=envelope.position or 1)
    if envelope.stream is None or envelope.version is None:  # never one without the other
        envelope = replace(envelope, stream=None, version=None)
    for since_2000 in (False, True):
        assert records_of([row(envelope, since_2000=since_2000)]) == ([to_record(envelope)], [envelope.position])


@pytest.mark.parametrize("name", [one.name for one in fields(Envelope)])
def test_each_field_is_in_the_record_by_itself(name: str) -> None:
    """So that a field that is new in an envelope is not forgotten here."""
    rich = replace(loaded_envelope(), stream=StreamId("order", "other"), version=3, position=9, epoch=2)
    bare = an_envelope(position=1)
    envelope = replace(bare, **({} if name in ("stream", "version") else {name: getattr(rich, name)}))
    if name in ("stream", "version"):  # never one without the other
        envelope = replace(bare, stream=rich.stream, version=rich.version)
    assert records_of([row(envelope, since_2000=False)]) == ([to_record(stored(envelope))], [envelope.position])


def test_ids_of_one_story_come_again_and_do_not_mix() -> None:
    first = an_envelope(position=1)
    found = [first]
    for place in range(2, 40):
        cause = found[place // 3 - 1]
        found.append(
            replace(event(f"k-{place}"), position=place, causation_id=cause.id, correlation_id=cause.correlation_id)
        )
    made, positions = records_of(row(envelope, since_2000=place % 2 == 0) for place, envelope in enumerate(found))
    assert made == [to_record(envelope) for envelope in found]
    assert positions == list(range(1, 40))


def test_what_is_remembered_of_one_row_is_not_taken_for_anothers() -> None:
    """Rows of one service look alike: what differs is behind the same beginning, or as long as an id."""
    digits = an_envelope().id.hex
    plain = an_envelope(position=1, version=2, stream=StreamId("order", "order-7"))
    caused = replace(plain, causation_id=event().id)
    found = [
        plain,
        replace(
            plain, source="shipping"[: len(plain.source)].ljust(len(plain.source), "s")
        ),  # as long as the one before
        plain,
        caused,
        replace(plain, actor="x" * (len('","causation":"' + digits) - len('","actor":"'))),  # as long, too
        caused,
        replace(caused, causation_id=caused.correlation_id),
        replace(plain, actor=digits),
        replace(plain, tenant=digits),
        replace(caused, actor=digits),
        replace(plain, tenant='","causation":"' + digits),
        replace(plain, source='orders","correlation":"' + digits),
        replace(plain, source="orders2"),
        replace(plain, kind=Kind.COMMAND),
        replace(plain, epoch=3),
        replace(caused, epoch=3),
        replace(plain, headers={"traceparent": digits}),
        replace(plain, stream=StreamId("order", "another")),
        replace(plain, stream=StreamId("parcel", "order-7"), version=1_000_000),
        replace(plain, stream=None, version=None),
        replace(caused, stream=None, version=None),
    ]
    for _ in range(2):
        assert records_of(row(one, since_2000=False) for one in found)[0] == [to_record(stored(one)) for one in found]


@pytest.mark.parametrize("since_2000", [False, True])
def test_keys_positions_and_times_of_all_lengths_are_in_the_record(since_2000: bool) -> None:
    plain = an_envelope(position=1, version=2, stream=StreamId("order", "order-7"))
    found = [plain]
    for length in (1, 63, 64, 255, 256, 300, 1000):
        key = "k" * length
        found.append(replace(plain, key=key, stream=StreamId("order", key)))
        found.append(replace(found[-1], causation_id=event().id))
    found += [replace(plain, position=10**digits - 1) for digits in range(1, 19)]
    found += [replace(plain, position=2**63 - 1), replace(plain, version=2**63 - 1)]
    found += [
        replace(plain, time=plain.time.replace(microsecond=micros)) for micros in (0, 1, 99_999, 100_000, 999_999)
    ]
    for _ in range(2):
        assert records_of(row(one, since_2000=since_2000) for one in found)[0] == [to_record(one) for one in found]


def test_a_foreign_id_is_published_as_it_came() -> None:
    envelope = an_envelope(
        id=foreign_id("orders", "A-17"), headers={"ce_id": "A-17", "content-type": "text/x", "b": "c"}, position=4
    )
    assert records_of([row(envelope, since_2000=True)])[0] == [to_record(envelope)]
    assert ("ce_id", b"A-17") in to_record(envelope).headers


# --- on the stores ----------------------------------------------------------------------------------------------------


async def read(store: Store, *, after: Position = 0, limit: int = 1000) -> tuple[list[Outgoing], list[Position]]:
    """All pages."""
    records: list[Outgoing] = []
    positions: list[Position] = []
    while (page := await store.records.read(after=after, limit=limit)).upto > after:
        assert len(page.records) <= limit
        assert all(after < position <= page.upto for position in page.positions)
        assert page.upto <= page.head
        records += page.records
        positions += page.positions
        after = page.upto
    return records, positions


async def fill(store: Store) -> None:
    """Events of all sorts, private ones, commands, and a reply with its token."""
    rich = replace(loaded_envelope(), topic="shop.events")
    await one(store, Unit(appends=(Append(stream("ö-1", "ord-er"), 0, (rich, event("ö-1", public=False))),)))
    await one(store, Unit(appends=(append("o-2", 0, 3), append("o-3", 0, 2, public=False)), outgoing=(message(),)))
    await one(store, Unit(claim(reply=reply()), appends=(append("o-2", 3, 1),), outgoing=(message("ß"), message())))
    await one(store, Unit(claim(reply=reply(topic=None))))
    await one(store, Unit(appends=(append("o-4", 0, 2, public=False),)))


@pytest.mark.parametrize("limit", [1, 2, 3, 1000])
async def test_a_stores_records_are_those_of_its_log(store: Store, limit: int) -> None:
    await fill(store)
    wanted = [found for found in await whole_log(store) if found.topic is not None]
    assert [found.kind for found in wanted].count(Kind.REPLY) == 1
    assert next(found for found in wanted if found.kind is Kind.REPLY).token is not None
    assert len(wanted) == 9
    records, positions = await read(store, limit=limit)
    assert records == [to_record(found) for found in wanted]
    assert positions == [found.position for found in wanted]


async def test_what_is_committed_after_a_look_comes_with_the_next_page(store: Store, twin: Store) -> None:
    """Also what another process commits, and nothing twice."""
    await fill(store)
    records, _ = await read(twin)
    after = await store.head()
    seen = len(records)
    for _ in range(3):
        await one(store, Unit(appends=(append(f"o-{after}", 0, 2),)))
        await one(store, Unit(outgoing=(message(),)))
        more, positions = await read(twin, after=after, limit=2)
        assert len(more) == 3
        seen += 3
        after = positions[-1]
    assert len((await read(twin))[0]) == seen


async def test_a_page_without_records_moves_on_over_private_events(store: Store) -> None:
    await one(store, Unit(appends=(append("o-1", 0, 5, public=False),)))
    page = await store.records.read(after=0, limit=2)
    assert (list(page.records), list(page.positions)) == ([], [])
    assert 0 < page.upto < page.head
    assert await read(store, limit=2) == ([], [])


async def test_asked_for_what_is_above_the_log_or_for_nothing_it_refuses(store: Store) -> None:
    await fill(store)
    head = await store.head()
    with pytest.raises(CheckpointAhead):
        await store.records.read(after=head + 1000, limit=10)
    with pytest.raises(ValueError, match="limit is 0"):
        await store.records.read(after=0, limit=0)
