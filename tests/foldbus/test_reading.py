"""Streams and the log through a connection, as a service's own events, on both stores."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from bus.envelope import Envelope, StreamId
from bus.errors import UnknownType
from bus.upcasting import drop_event, split_event, upcast
from eventstore.errors import CheckpointAhead
from eventstore.port import Append, Unit
from foldbus import Command, Connection, Decider, Event, Key, Recorded, Service
from tests.eventstore.stores import NOON, Backend, event


class Opened(Event, type="shop.opened.v2"):
    id: Key[str]
    cents: int


class Paid(Event, type="shop.paid.v1"):
    id: Key[str]


class Sent(Event, type="shop.sent.v1"):
    id: Key[str]


class Open(Command[None], type="shop.open.v1"):
    id: Key[str]


def evolve(state: int, event: Opened | Paid | Sent) -> int:
    return state + 1


def decide(state: int, command: Open) -> list[Opened | Paid | Sent]:
    return []


doors = Decider("door", initial=0, evolve=evolve, decide=decide)
app = Service(
    "shop",
    deciders=[doors],
    upcasters=[
        upcast("shop.opened.v1", to="shop.opened.v2", by=lambda data: {"id": data["id"], "cents": data["euros"] * 100}),
        split_event(
            "shop.closed.v1",
            to=("shop.paid.v1", "shop.sent.v1"),
            by=lambda data: [("shop.paid.v1", {"id": data["id"]}), ("shop.sent.v1", {"id": data["id"]})],
        ),
        drop_event("shop.touched.v1"),
    ],
)
STREAM = StreamId("door", "d-1")


def stored(type: str, data: bytes = b'{"id":"d-1"}', *, hours: int = 0) -> Envelope:
    return replace(event("d-1"), type=type, data=data, time=NOON + timedelta(hours=hours))


HISTORY = (
    stored("shop.opened.v1", b'{"id":"d-1","euros":2}'),
    stored("shop.touched.v1", hours=1),
    stored("shop.opened.v2", b'{"id":"d-1","cents":7}', hours=2),
    stored("shop.closed.v1", hours=3),
    stored("shop.sent.v1", hours=4),
)
TODAY = [
    (1, Opened(id="d-1", cents=200)),
    (3, Opened(id="d-1", cents=7)),
    (4, Paid(id="d-1")),
    (4, Sent(id="d-1")),
    (5, Sent(id="d-1")),
]


@pytest.fixture
def url(backend: Backend, tmp_path: Path) -> str:
    return f"sqlite:{tmp_path}" if backend.name == "sqlite" else backend.where


@asynccontextmanager
async def connected(url: str, tmp_path: Path) -> AsyncGenerator[Connection]:
    async with app.connect(store=url, bus=f"embedded:{tmp_path / 'bus'}", migrate=True) as connection:
        yield connection


async def append(connection: Connection, expected: int, *envelopes: Envelope, stream: StreamId = STREAM) -> None:
    await connection.store.commit([Unit(appends=(Append(stream, expected, envelopes),))])


async def of(reading: AsyncIterator[Recorded]) -> list[tuple[int, Event]]:
    async with asyncio.timeout(45):
        return [(one.version, one.event) async for one in reading]


async def test_what_is_read_is_what_the_stored_events_are_today(url: str, tmp_path: Path) -> None:
    async with connected(url, tmp_path) as connection:
        await append(connection, 0, *HISTORY)
        assert await of(connection.read(STREAM)) == TODAY
        assert await of(connection.events()) == TODAY
        assert await of(connection.read(STREAM, after=1, upto=3)) == [TODAY[1]]
        assert await of(connection.read(STREAM, backward=True, limit=1)) == [TODAY[4]]
        assert [version for version, _ in await of(connection.read(STREAM, backward=True))] == [5, 4, 4, 3, 1]
        first = await anext(connection.events(types=[Opened]))
        assert first.envelope.type == "shop.opened.v1"
        assert (first.stream, first.version, first.time) == (STREAM, 1, NOON)


async def test_the_log_is_chosen_from_by_the_classes_of_today(url: str, tmp_path: Path) -> None:
    """Also where an older type becomes them, wholly or in part."""
    async with connected(url, tmp_path) as connection:
        await append(connection, 0, *HISTORY)
        assert await of(connection.events(types=[Sent])) == [TODAY[3], TODAY[4]]
        assert await of(connection.events(types=[Opened, Paid], since=NOON + timedelta(hours=1))) == TODAY[1:3]
        assert await of(connection.events(until=NOON + timedelta(hours=1))) == TODAY[:1]
        assert await of(connection.events(categories=["window"])) == []
        story = HISTORY[2].correlation_id
        assert await of(connection.events(correlation_id=story)) == [TODAY[1]]
        assert await of(connection.events(stream=STREAM, after=await connection.store.head())) == []


async def test_what_the_service_does_not_name_is_left_out_of_the_log_and_refused_in_a_stream(
    url: str, tmp_path: Path
) -> None:
    """The log has the sagas' own events too; but a stream without one of its events would be another story."""
    async with connected(url, tmp_path) as connection:
        await append(connection, 0, HISTORY[2], stored("saga.started.v1"), HISTORY[4])
        assert [version for version, _ in await of(connection.events())] == [1, 3]
        with pytest.raises(UnknownType):
            await of(connection.read(STREAM))


async def test_long_streams_are_read_in_pages(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldbus.reading.PAGE", 3)
    async with connected(url, tmp_path) as connection:
        await append(connection, 0, *(stored("shop.sent.v1") for _ in range(10)))

        async def versions(**asked: int | bool) -> list[int]:
            return [version for version, _ in await of(connection.read(STREAM, **asked))]  # type: ignore[arg-type]

        assert await versions() == list(range(1, 11))
        assert await versions(backward=True) == list(range(10, 0, -1))
        assert await versions(after=1, limit=7) == list(range(2, 9))
        assert await versions(backward=True, after=2, upto=9, limit=5) == [9, 8, 7, 6, 5]
        assert await versions(after=4, upto=6) == [5, 6]
        assert await versions(limit=0) == []


async def test_a_reading_ends_where_stream_or_log_ended_when_it_began(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise whoever appends for each event read would read without end."""
    monkeypatch.setattr("foldbus.reading.PAGE", 1)
    async with connected(url, tmp_path) as connection:
        await append(connection, 0, HISTORY[4], HISTORY[4])
        end = 2
        for reading in (connection.read(STREAM), connection.events()):
            seen, wanted = 0, end
            async for one in reading:
                seen += 1
                assert one.version == seen <= wanted
                await append(connection, end, HISTORY[4])
                end += 1
            assert seen == wanted


async def test_following_goes_on_with_what_is_stored_later(url: str, tmp_path: Path) -> None:
    async with connected(url, tmp_path) as connection:
        await append(connection, 0, *HISTORY)
        following = connection.events(types=[Paid], follow=True)
        async with asyncio.timeout(45):
            first = await anext(following)
            waiting = asyncio.ensure_future(anext(following))
            await asyncio.wait({waiting}, timeout=0.05)
            assert not waiting.done()
            await append(connection, 5, stored("shop.sent.v1"), stored("shop.paid.v1"))
            second = await waiting
        assert (first.version, second.version) == (4, 7)
        assert second.position > first.position
        again = connection.events(types=[Paid], after=first.position, follow=True)
        assert (await anext(again)).position == second.position


async def test_a_position_that_this_log_never_reached_is_refused(url: str, tmp_path: Path) -> None:
    async with connected(url, tmp_path) as connection:
        with pytest.raises(CheckpointAhead):
            await of(connection.events(after=1_000, follow=True))
