"""Stored events as a service's own classes: one stream, the whole log, the log as it grows."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, cast
from uuid import UUID

from bus.envelope import Envelope, Position, StreamId, Version
from bus.messages import Event
from eventstore.following import follow, read_log
from eventstore.port import Where

if TYPE_CHECKING:
    from foldbus.connection import Connection

PAGE = 500


@dataclass(frozen=True, slots=True)
class Recorded:
    """A stored event: as what it is today, and as it was stored. An event that is upcast to several comes as several,
    one after the other, with one position; one that is upcast to none does not come."""

    event: Event
    envelope: Envelope

    @property
    def position(self) -> Position:
        """Its place in the log. Reading goes on after it with `after=`."""
        return cast("Position", self.envelope.position)

    @property
    def stream(self) -> StreamId:
        return cast("StreamId", self.envelope.stream)

    @property
    def version(self) -> Version:
        return cast("Version", self.envelope.version)

    @property
    def time(self) -> datetime:
        """When it was made, by its writer's clock."""
        return self.envelope.time


async def read_stream(
    connection: Connection,
    stream: StreamId,
    *,
    after: Version,
    upto: Version | None,
    backward: bool,
    limit: int | None,
) -> AsyncGenerator[Recorded]:
    """See `Connection.read`."""
    registry, codec = connection.service.registry, connection.service.codec
    names = frozenset(registry.types)
    left = limit
    while left is None or left > 0:
        most = PAGE if left is None else min(PAGE, left)
        part = await connection.store.read_stream(stream, after=after, upto=upto, backward=backward, limit=most)
        for record in part.records:
            for today in codec.upcast(record, names):
                yield Recorded(cast("Event", codec.decode(today)), record)
        if len(part.records) < most:
            return
        last = part.records[-1].version or 0
        after, upto = (after, last - 1) if backward else (last, part.version if upto is None else upto)
        left = None if left is None else left - most


async def read_events(
    connection: Connection,
    *,
    after: Position,
    types: Collection[type[Event]] | None,
    categories: Collection[str] | None,
    stream: StreamId | None,
    correlation_id: UUID | None,
    since: datetime | None,
    until: datetime | None,
    following: bool,
) -> AsyncGenerator[Recorded]:
    """See `Connection.events`."""
    registry, codec = connection.service.registry, connection.service.codec
    named = registry if types is None else types
    names = frozenset(str(one.type_name) for one in named if issubclass(one, Event))
    where = Where(
        types=names | registry.upcasting.older(names),
        categories=None if categories is None else frozenset(categories),
        stream=stream,
        correlation_id=correlation_id,
        since=since,
        until=until,
    )
    store = connection.store
    if following:
        records = follow(store, after=after, where=where, page=PAGE)
    else:
        records = read_log(store, after=after, upto=await store.head(), where=where, page=PAGE)
    async for record in records:
        for today in codec.upcast(record, names):
            if today.type in names:
                yield Recorded(cast("Event", codec.decode(today)), record)


__all__ = ["Recorded", "read_events", "read_stream"]
