"""Messages to park, and what a queue looks like in short."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from bus.envelope import Failure
from bus.transport import Assignment, Delivery
from eventstore.parking import Parked, Waiting
from eventstore.port import ClaimState, Store, Unit
from tests.eventstore.stores import CONSUMER, NOON, append, claim, failure, message

FAR = datetime(2124, 2, 29, tzinfo=UTC)
WHY = failure()


def waiting(key: str = "o-1", id: UUID | None = None, *, offset: int = 0) -> Waiting:
    """A message that came in a record."""
    envelope = message(key, topic="shop.commands")
    if id is not None:
        envelope = replace(envelope, id=id)
    record = Delivery(
        Assignment("shop.commands", 3, 0), offset, key.encode(), envelope.data, (("ce_id", b"\xfe"),), NOON
    )
    return Waiting(envelope, record)


def failed(attempts: int) -> Failure:
    return replace(WHY, attempts=attempts, failed_at=WHY.failed_at + timedelta(minutes=attempts))


async def queue_of(store: Store, key: str = "o-1", *, head: Waiting | None = None, behind: int = 2) -> list[Waiting]:
    """Parks a head, due long since, and so many messages behind it."""
    messages = [head or waiting(key), *(waiting(key, offset=nth) for nth in range(1, behind + 1))]
    standing = await store.parking.park(CONSUMER, messages[0], WHY, due_at=NOON)
    assert standing.state is ClaimState.PARKED
    for standing in await store.parking.follow(CONSUMER, messages[1:]):
        assert standing.state is ClaimState.PARKED
    return messages


async def head(store: Store, *, lease_s: float = 600.0, consumer: str = CONSUMER) -> Parked:
    (found,) = await store.parking.due(consumers=[consumer], limit=10, lease_s=lease_s)
    return found


def unit_of(parked: Parked | Waiting, *, appends: Sequence[Any] = (), **options: Any) -> Unit:
    """Handles it. `options` are the claim's."""
    envelope = parked.envelope if isinstance(parked, Waiting) else parked.message.envelope
    return Unit(claim(envelope.id, envelope.key, **options), appends=tuple(appends))


def effect_of(parked: Parked | Waiting, expected: int = 0, to: str = "s") -> Unit:
    return unit_of(parked, appends=[append(to, expected)])


async def ids(store: Store, key: str = "o-1") -> list[UUID]:
    return [one.message.envelope.id for one in await store.parking.queue(CONSUMER, key)]


async def states(store: Store, *messages: Waiting) -> list[str]:
    asked = [(one.envelope.id, one.envelope.key) for one in messages]
    return [str(one.state) for one in await store.examine(CONSUMER, asked)]
