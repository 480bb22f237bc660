"""Waiting until a read model has seen what a token stands for: read-your-writes, within and across services."""

from __future__ import annotations

import asyncio

from bus.envelope import Token
from bus.partitioner import partition_of
from projections.definition import Projection
from projections.errors import NotThere, TokenElsewhere
from projections.port import LOG, Place, Places, Row, Rows

_FIRST_S, _MOST_S = 0.002, 0.05


async def wait_for(
    projection: Projection[Row], rows: Rows[Row], token: Token, *, service: str, timeout_s: float
) -> None:
    """Returns once the serving generation has passed `token`: of the own service its last event, of another its last
    public one, in the partition of the token's key. At once when the token stands for no such event.

    Raises NotThere after `timeout_s`, TokenElsewhere when the projection never reads that service.
    """
    sources = projection.sources(service)
    topic = f"{token.source}.events"
    own = token.source == service and LOG in sources
    if not own and topic not in sources:
        raise TokenElsewhere(
            f"projection {projection.name!r} of {service!r} reads {', '.join(sorted(sources))}; "
            f"the token is from {token.source!r}"
        )
    wanted = token.position if own else token.public
    if wanted == 0:
        return
    pause = _FIRST_S
    at = Place()
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                serving = await rows.serving()
                places = (await rows.checkpoint(serving.number)).places
                at = places.get((LOG, 0), Place()) if own else _of_key(places, topic, token.key)
                if (at.epoch, at.position) >= (token.epoch, wanted):
                    return
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, _MOST_S)
    except TimeoutError as error:
        raise NotThere(
            f"projection {projection.name!r} is at epoch {at.epoch}, position {at.position} of {token.source!r}, "
            f"wanted epoch {token.epoch}, position {wanted}; it was not there within {timeout_s} s: "
            "is a worker of this service running?"
        ) from error


def _of_key(places: Places, topic: str, key: str) -> Place:
    """A feed has a place for every partition of its topic from its first page on."""
    parts = [part for source, part in places if source == topic]
    return places[topic, partition_of(key.encode(), len(parts))] if parts else Place()
