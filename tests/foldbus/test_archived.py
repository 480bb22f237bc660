"""Who appends to an archived stream without loading it is told that it is archived, and tries once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from pydantic import BaseModel

from bus.envelope import Origin, StreamId
from bus.metrics import MemoryMetrics
from bus.processing import Failed, Item
from bus.seams import NoFailpoints, SystemClock, Uuid7Ids
from eventstore.errors import StreamArchived, WrongExpectedVersion
from eventstore.port import ANY, Store
from eventstore.repository import Repository
from foldbus import Command, Connection, Context, Decider, Event, Key, Service
from foldbus.worker import command_processor
from tests.eventstore.stores import NOON, whole_log

ids = Uuid7Ids()


class Noted(Event, type="pad.noted.v1"):
    pad: Key[str]


class Note(Command[None], type="pad.note.v1"):
    pad: Key[str]


class Blind(Command[None], type="pad.blind.v1"):
    pad: Key[str]


class Pad(BaseModel, frozen=True):
    n: int = 0


def evolve(pad: Pad, event: Noted) -> Pad:
    return Pad(n=pad.n + 1)


def decide(pad: Pad, command: Note) -> list[Noted]:
    return [Noted(pad=command.pad)]


pads = Decider("pad", initial=Pad(), evolve=evolve, decide=decide)
LAST = StreamId("pad", "last")


async def blind(command: Blind, ctx: Context) -> None:
    ctx.append(pads, Noted(pad=command.pad))


class _Broker:
    """For a connection that publishes nothing itself."""

    max_bytes = 1_000_000


@pytest.fixture
def open_connection(store: Store) -> Connection:
    broker: Any = _Broker()
    return Connection(
        Service("pad", deciders=[pads], handlers=[blind]), store=store, transport=broker, clock=SystemClock(), ids=ids,
        metrics=MemoryMetrics(), failpoint=NoFailpoints(),
    )  # fmt: skip


async def archived(store: Store) -> None:
    await Repository(pads, store=store).append("last", Noted(pad="last"), Noted(pad="last"), expected=0)
    await store.archive.archive(LAST, expected=2, seen=await store.head())


async def by_a_unit(connection: Connection, expected: Any) -> None:
    async with connection.unit() as unit:
        unit.append(pads, Noted(pad="last"), expected=expected)
        unit.append(pads, Noted(pad="other"))


async def by_a_repository(connection: Connection, expected: Any) -> None:
    await Repository(pads, store=connection.store).append("last", Noted(pad="last"), expected=expected)


@pytest.mark.parametrize("append", [by_a_unit, by_a_repository])
async def test_an_append_says_that_the_stream_is_archived(
    store: Store, open_connection: Connection, append: Callable[[Connection, Any], Awaitable[None]]
) -> None:
    await archived(store)
    for expected in (ANY, 0, 2):
        with pytest.raises(StreamArchived, match="stream pad-last was archived at version 2: it takes no events"):
            await append(open_connection, expected)
    assert await whole_log(store) == []
    await store.archive.restore(LAST)
    with pytest.raises(WrongExpectedVersion, match="is at version 2, not the expected 0"):
        await append(open_connection, 0)
    await append(open_connection, 2)


async def test_an_expectation_says_that_the_stream_is_archived(store: Store, open_connection: Connection) -> None:
    await archived(store)

    async def expecting() -> None:
        async with open_connection.unit() as unit:
            unit.expect(pads, "last", 2)
            unit.append(pads, Noted(pad="other"))

    with pytest.raises(StreamArchived, match="archived at version 2"):
        await expecting()
    assert await whole_log(store) == []


async def test_a_handler_that_appends_blindly_fails_instead_of_losing_for_ever(
    store: Store, open_connection: Connection
) -> None:
    await archived(store)
    handler = command_processor(open_connection)
    envelope = open_connection.service.codec.encode(
        Blind(pad="last"), Origin("front", ids.new(), NOON, ids.new()), topic="pad.commands"
    )
    (result,) = await handler.process([Item(envelope, None)], {})
    assert isinstance(result, Failed)
    assert isinstance(result.error, StreamArchived)
    assert await whole_log(store) == []
