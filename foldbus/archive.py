"""Archiving and truncating a service's streams: who has to have read an event before it leaves the log."""

from __future__ import annotations

from bus.envelope import Position, StreamId, Version
from bus.seams import Clock
from eventstore.port import Store, StreamInfo
from eventstore.repository import snapshot_schema
from foldbus.relay import LEASE
from foldbus.service import Service
from foldbus.views import all_projections
from projections import LOG, Checkpoint, Place, Status, rows_for


async def seen_by_all(store: Store, service: Service, *, clock: Clock) -> Position:
    """The lowest checkpoint: the relay's, and those of the projections that read this service's own log (what serves
    and what is being built; a projection that was never run is at 0). It only grows."""
    lowest = await store.leases.position(LEASE)
    for projection in all_projections(service):
        if LOG not in projection.sources(service.name):
            continue
        rows = rows_for(store, projection, clock=clock)
        running = [one for one in await rows.generations() if one.status in (Status.SERVING, Status.BUILDING)]
        checkpoints = [await rows.checkpoint(one.number) for one in running] or [Checkpoint()]
        lowest = min(lowest, *(one.places.get((LOG, 0), Place()).position for one in checkpoints))
    return lowest


async def archive_stream(store: Store, service: Service, stream: StreamId, *, clock: Clock) -> StreamInfo:
    """At the version that it has now. Raises what `Archive.archive` raises."""
    version = (await store.archive.read(stream, limit=1)).version
    return await store.archive.archive(stream, expected=version, seen=await seen_by_all(store, service, clock=clock))


async def truncate_stream(
    store: Store, service: Service, stream: StreamId, *, upto: Version, clock: Clock
) -> StreamInfo:
    """Behind a snapshot that today's code reads. Raises what `Archive.truncate` raises."""
    decider = next((one for one in service.deciders if one.category == stream.category), None)
    schema = None if decider is None else snapshot_schema(decider)
    seen = await seen_by_all(store, service, clock=clock)
    return await store.archive.truncate(stream, upto=upto, seen=seen, schema=schema)


__all__ = ["archive_stream", "seen_by_all", "truncate_stream"]
