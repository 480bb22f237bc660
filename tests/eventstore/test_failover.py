"""A database that is not the one a reader came from: restored, promoted too early, or another one altogether.

Its log is shorter than the reader's checkpoint, or in an earlier epoch. Whoever waited there for more would skip what
is written up to that point; so everybody stops and says so.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bus.metrics import MemoryMetrics
from eventstore.errors import CheckpointAhead, WrongEpoch
from eventstore.port import Store, Unit
from foldbus.relay import LEASE
from projections import Checkpoint, LogFeed, Place, Wanted
from projections.port import LOG
from tests.eventstore.stores import append, message
from tests.foldbus.test_relay import Topics, relaying
from tests.projections.world import REGISTRY, Placed, Unrelated
from tests.projections.world import append as append_events


async def test_a_relay_whose_checkpoint_is_ahead_of_the_log_stops_and_publishes_nothing(store: Store) -> None:
    await store.commit([Unit(appends=(append("a", 0, 3),), outgoing=(message(),))])
    async with store.leases.lead(LEASE) as leadership:
        await store.leases.mark(leadership.lease, old=0, new=1_000)
    topics = Topics()
    async with relaying(store, topics) as relay:
        with pytest.raises(CheckpointAhead, match="position 1000"):
            await asyncio.wait_for(relay.run(), 20)
    assert topics.records == []
    assert await store.leases.position(LEASE) == 1_000, "a person decides"


def feed_of(store: Any) -> LogFeed:
    return LogFeed(store, Wanted("p", [Placed, Unrelated], REGISTRY, MemoryMetrics()))


def at(position: int, epoch: int = 0) -> Checkpoint:
    return Checkpoint({(LOG, 0): Place(position, epoch, position)})


async def test_a_projection_whose_checkpoint_is_ahead_of_the_log_is_told(store: Any) -> None:
    last = await append_events(store, Placed(order_id="1", customer_id="a"))
    assert (await feed_of(store).read(at(last), limit=10)).records == []
    with pytest.raises(CheckpointAhead):
        await feed_of(store).read(at(last + 1), limit=10, timeout_s=5)


async def test_a_projection_from_a_later_epoch_than_the_logs_is_told_also_where_the_position_would_fit(
    store: Any,
) -> None:
    """A backup older than the last restore: positions that the checkpoint has passed are drawn once more."""
    for n in range(3):
        await append_events(store, Placed(order_id=str(n), customer_id="a"))
    with pytest.raises(WrongEpoch, match="epoch 1"):
        await feed_of(store).read(at(1, epoch=1), limit=10)
    assert len((await feed_of(store).read(at(1, epoch=0), limit=10)).records) == 2


async def test_a_projection_that_was_restored_with_its_log_goes_on_in_the_new_epoch(store: Any) -> None:
    """Rows, checkpoint and log are one database: they came back together."""
    for n in range(3):
        await append_events(store, Placed(order_id=str(n), customer_id="a"))
    store.epoch += 1
    page = await feed_of(store).read(at(1, epoch=0), limit=10)
    assert [record.envelope.key for record in page.records] == ["1", "2"]
    assert page.checkpoint.places[LOG, 0].epoch == 1
