"""Feeds: the own log on both stores, topics on both transports, several sources at once."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from bus.cloudevents import to_record
from bus.envelope import StreamId
from bus.errors import MissingTopics, TransportUnavailable
from bus.metrics import MemoryMetrics
from bus.transport import Outgoing, TopicSpec, Transport
from eventstore.port import Append, Unit
from projections import Checkpoint, Feed, FeedPage, LogFeed, Place, TopicFeed, Wanted
from projections.feeds import CombinedFeed
from tests.bus.transports import eventually, unique
from tests.projections.world import (
    CLOCK,
    REGISTRY,
    Closed,
    LegacySeen,
    Moved,
    Placed,
    Unrelated,
    append,
    envelope,
    publish,
    publish_raw,
)


def wanted(*events: Any, metrics: MemoryMetrics | None = None) -> Wanted:
    return Wanted("p", events, REGISTRY, metrics or MemoryMetrics())


def keys(page: FeedPage) -> list[str]:
    return [record.envelope.key for record in page.records]


async def drained(feed: Feed, after: Checkpoint, *, n: int, within_s: float = 40.0) -> tuple[list[Any], FeedPage]:
    """Reads until `n` records and bad ones have come and nothing is known to be behind."""
    found: list[Any] = []
    async with asyncio.timeout(within_s):
        while True:
            page = await feed.read(after, limit=3, timeout_s=0.2)
            found += [*page.records, *page.bad]
            after = page.checkpoint
            if len(found) >= n and page.behind == 0:
                return found, page


# --- the own log -----------------------------------------------------------------------------------------------------


async def test_the_log_comes_in_order_and_its_checkpoint_moves_past_what_is_skipped(store: Any) -> None:
    metrics = MemoryMetrics()
    feed = LogFeed(store, wanted(Placed, metrics=metrics))
    await append(store, Placed(order_id="1", customer_id="a"), Unrelated(order_id="2"))
    last = await append(store, Placed(order_id="3", customer_id="a"), Closed(order_id="4", customer_id="a"))
    first = await feed.read(Checkpoint(), limit=1)
    assert keys(first) == ["1"]
    assert first.behind > 0
    second = await feed.read(first.checkpoint, limit=10)
    assert keys(second) == ["3"]
    place = second.checkpoint.places["log", 0]
    assert place.position == place.offset == last
    assert place.epoch == store.epoch
    assert second.behind == 0
    assert metrics.total("foldbus_projection_skipped_total", reason="position") == 2


async def test_reading_the_log_waits_for_what_comes(store: Any) -> None:
    feed = LogFeed(store, wanted(Placed))
    reading = asyncio.create_task(feed.read(Checkpoint(), limit=5, timeout_s=10))
    await asyncio.sleep(0)
    await append(store, Placed(order_id="1", customer_id="a"))
    assert keys(await reading) == ["1"]


async def test_an_unknown_version_of_a_named_type_is_not_skipped(store: Any) -> None:
    """It must become a dead letter, so the feed has to hand it on."""
    accept = wanted(Placed)
    assert accept("shop.placed.v1")
    assert accept("shop.placed.v7")
    assert not accept("shop.closed.v1")
    assert not accept("shop.nobody-knows.v1")
    await append(store, Unrelated(order_id="1"))
    later = replace(envelope(Placed(order_id="2", customer_id="a")), type="shop.placed.v7")
    await store.commit([Unit(appends=(Append(StreamId("order", "2"), 0, (later,)),))])
    page = await LogFeed(store, accept).read(Checkpoint(), limit=5)
    assert [record.envelope.type for record in page.records] == ["shop.placed.v7"]


# --- topics ----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def topic(transport: Transport) -> str:
    """Of a service named for this test alone, with 3 partitions."""
    name = f"{unique('svc')}.events"
    await transport.admin.create([TopicSpec(name, partitions=3)])
    return name


def topic_feed(transport: Transport, topic: str, *events: Any, metrics: MemoryMetrics | None = None) -> TopicFeed:
    found = metrics or MemoryMetrics()
    return TopicFeed(transport, topic, wanted(*(events or (Moved,)), metrics=found), clock=CLOCK, metrics=found)


async def moved(
    transport: Transport, topic: str, n: int, position: int | None, *, part: int = 0, epoch: int = 0
) -> None:
    event = Moved(sku=f"s{n}", customer_id="a", amount=n)
    owner = topic.removesuffix(".events")
    record = envelope(event, source=owner, topic=topic, position=position, epoch=epoch)
    await publish_raw(transport, replace(to_record(record), partition=part))


async def test_all_partitions_are_read_and_a_second_reader_goes_on_from_the_checkpoint(
    transport: Transport, topic: str
) -> None:
    for n in range(9):
        await moved(transport, topic, n, n + 1, part=n % 3)
    async with topic_feed(transport, topic) as feed:
        found, page = await drained(feed, Checkpoint(), n=9)
    assert sorted(record.envelope.key for record in found) == [f"s{n}" for n in range(9)]
    for part in range(3):
        mine = [record.envelope.position for record in found if record.delivery.partition == part]
        assert mine == sorted(mine)
        assert page.checkpoint.places[topic, part] == Place(3, 0, part + 7)
    await moved(transport, topic, 9, 10, part=1)
    async with topic_feed(transport, topic) as feed:
        found, page = await drained(feed, page.checkpoint, n=1)
    assert [record.envelope.key for record in found] == ["s9"]


async def test_a_replayed_suffix_is_skipped_and_a_new_epoch_is_not(transport: Transport, topic: str) -> None:
    metrics = MemoryMetrics()
    for position in (10, 20, 30):
        await moved(transport, topic, position, position)
    for position in (20, 30):  # the relay died after publishing and before its mark
        await moved(transport, topic, position, position)
    await moved(transport, topic, 40, 40)
    await moved(transport, topic, 15, 15, epoch=1)  # restored from a backup: positions start lower again
    await moved(transport, topic, 99, 99, epoch=0)  # a worker that still runs from before
    await moved(transport, topic, 16, 16, epoch=1)
    async with topic_feed(transport, topic, metrics=metrics) as feed:
        found, page = await drained(feed, Checkpoint(), n=6)
    assert [record.envelope.position for record in found] == [10, 20, 30, 40, 15, 16]
    assert page.checkpoint.places[topic, 0] == Place(9, 1, 16)
    assert metrics.total("foldbus_projection_skipped_total", reason="replay") == 2
    assert metrics.total("foldbus_projection_skipped_total", reason="epoch") == 1


async def test_without_positions_and_from_other_sources_the_offset_alone_decides(
    transport: Transport, topic: str
) -> None:
    await moved(transport, topic, 50, 50)
    await moved(transport, topic, 1, None)
    await moved(transport, topic, 1, None)
    await publish(transport, topic, Moved(sku="foreign", customer_id="a"), partition=0, position=2)
    async with topic_feed(transport, topic) as feed:
        found, page = await drained(feed, Checkpoint(), n=4)
    assert [record.envelope.key for record in found] == ["s50", "s1", "s1", "foreign"]
    assert page.checkpoint.places[topic, 0] == Place(4, 0, 50)


async def test_types_not_named_are_skipped_but_move_the_place(transport: Transport, topic: str) -> None:
    metrics = MemoryMetrics()
    await moved(transport, topic, 1, 77)
    async with topic_feed(transport, topic, LegacySeen, metrics=metrics) as feed:
        async with asyncio.timeout(20):
            after = Checkpoint()
            while after.places.get((topic, 0), Place()).offset < 1:
                page = await feed.read(after, limit=10, timeout_s=0.2)
                assert not page.records
                after = page.checkpoint
    assert after.places[topic, 0] == Place(1, 0, 77)
    assert metrics.total("foldbus_projection_skipped_total", reason="type") == 1


async def test_a_topic_of_which_no_type_is_named_is_told_once(
    transport: Transport, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise whoever misspells a type has an empty read model, and nothing that says why."""
    for sku in range(120):
        await moved(transport, topic, sku, sku + 1)
    async with topic_feed(transport, topic, LegacySeen) as feed, asyncio.timeout(40):
        after = Checkpoint()
        while after.places.get((topic, 0), Place()).offset < 120:
            after = (await feed.read(after, limit=50, timeout_s=0.2)).checkpoint
    (line,) = [one for one in caplog.messages if "misspelt" in one]
    assert f"records of {topic} are all of types that it does not name: {Moved.type_name} (" in line
    caplog.clear()
    async with topic_feed(transport, topic, Moved) as feed:
        await drained(feed, Checkpoint(), n=120)
    assert not caplog.messages


async def test_what_is_no_event_comes_as_a_bad_record_and_the_rest_goes_on(transport: Transport, topic: str) -> None:
    await moved(transport, topic, 1, 1)
    await publish_raw(transport, Outgoing(topic, b"k", b"\xff not an event", (("h", b"\xfe"),), partition=0))
    await publish_raw(transport, Outgoing(topic, b"k", None, (), partition=0))
    await moved(transport, topic, 2, 2)
    async with topic_feed(transport, topic) as feed:
        found, page = await drained(feed, Checkpoint(), n=4)
    assert len(found) == 4
    bad = [one.delivery.offset for one in found if hasattr(one, "error")]
    assert bad == [1, 2]
    assert page.checkpoint.places[topic, 0].offset == 4


async def test_a_checkpoint_that_does_not_follow_makes_the_feed_seek(transport: Transport, topic: str) -> None:
    for n in range(4):
        await moved(transport, topic, n, n + 1)
    async with topic_feed(transport, topic) as feed:
        first, _ = await drained(feed, Checkpoint(), n=4)
        again, _ = await drained(feed, Checkpoint(), n=4)
    assert [one.envelope.id for one in first] == [one.envelope.id for one in again]


async def test_a_read_that_was_cancelled_loses_nothing(transport: Transport, topic: str) -> None:
    async with topic_feed(transport, topic) as feed:
        page = await feed.read(Checkpoint(), limit=10, timeout_s=0.1)
        reading = asyncio.create_task(feed.read(page.checkpoint, limit=10, timeout_s=1.0))
        await asyncio.sleep(0.05)  # the poll is under way
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await moved(transport, topic, 1, 1)  # the poll that goes on takes it, and nobody hears of it
        found, _ = await drained(feed, page.checkpoint, n=1)
    assert len(found) == 1


async def test_what_was_read_does_not_wait_for_the_ends_of_its_partitions(
    transport: Transport, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker answers who asks for them only after the next fetch, half a second later when nothing more comes."""
    monkeypatch.setattr("projections.feeds._ENDS_EVERY_S", 0.0)
    async with topic_feed(transport, topic) as feed:
        _, page = await drained(feed, Checkpoint(), n=0)
        checkpoint = page.checkpoint
        consumer = feed._consumer
        assert consumer is not None
        ask, may_answer, asked = consumer.end_offsets, asyncio.Event(), list[int]()

        async def slow() -> Any:
            asked.append(1)
            await may_answer.wait()
            return await ask()

        monkeypatch.setattr(consumer, "end_offsets", slow)
        for n in range(3):
            await moved(transport, topic, n, n + 1)
            async with asyncio.timeout(15):
                while checkpoint.places[topic, 0].offset <= n:
                    page = await feed.read(checkpoint, limit=10, timeout_s=5.0)
                    checkpoint = page.checkpoint
        assert len(asked) == 1, "one question at a time"
        may_answer.set()
        page = await feed.read(checkpoint, limit=10)
        assert (page.records, page.behind) == ([], 0)


async def test_ends_that_could_not_be_had_are_told_once(
    transport: Transport, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with topic_feed(transport, topic) as feed:
        _, page = await drained(feed, Checkpoint(), n=0)
        consumer = feed._consumer
        assert consumer is not None
        ask = consumer.end_offsets

        async def once() -> Any:
            monkeypatch.setattr(consumer, "end_offsets", ask)
            raise TransportUnavailable("away for a moment")

        monkeypatch.setattr(consumer, "end_offsets", once)
        with pytest.raises(TransportUnavailable):
            await feed.read(page.checkpoint, limit=10)
        assert (await feed.read(page.checkpoint, limit=10)).behind == 0


async def test_who_goes_back_is_told_how_much_is_behind_by_todays_ends(transport: Transport, topic: str) -> None:
    async with topic_feed(transport, topic) as feed:
        await moved(transport, topic, 0, 1)
        await drained(feed, Checkpoint(), n=1)
        for n in range(1, 5):
            await moved(transport, topic, n, n + 1)
        page = await feed.read(Checkpoint(), limit=1, timeout_s=30.0)
        assert (len(page.records), page.behind) == (1, 4)


async def test_a_feed_that_is_closed_does_not_wait_for_the_poll_of_a_cancelled_read(
    transport: Transport, topic: str
) -> None:
    async with asyncio.timeout(40), topic_feed(transport, topic) as feed:
        _, page = await drained(feed, Checkpoint(), n=0)
        reading = asyncio.create_task(feed.read(page.checkpoint, limit=10, timeout_s=600.0))
        await eventually(lambda: feed._polling is not None, what="a poll")
        reading.cancel()
        await asyncio.wait({reading})


async def test_a_missing_topic_says_so_and_is_read_once_it_is_there(transport: Transport) -> None:
    name = f"{unique('late')}.events"
    async with topic_feed(transport, name) as feed:
        with pytest.raises(MissingTopics):
            await feed.read(Checkpoint(), limit=1)
        await transport.admin.create([TopicSpec(name, partitions=1)])
        await moved(transport, name, 1, 1)
        found, _ = await drained(feed, Checkpoint(), n=1)
    assert len(found) == 1


# --- both ------------------------------------------------------------------------------------------------------------


async def test_a_quiet_source_holds_up_no_other_and_nothing_is_lost_between_them(
    sqlite_store: Any, embedded: Transport
) -> None:
    await embedded.admin.create([TopicSpec("stock.events", partitions=2)])
    async with (
        topic_feed(embedded, "stock.events") as topic,
        CombinedFeed([LogFeed(sqlite_store, wanted(Placed)), topic]) as feed,
    ):
        assert feed.sources == {"log", "stock.events"}
        await append(sqlite_store, Placed(order_id="1", customer_id="a"))
        before = CLOCK.monotonic()
        page = await feed.read(Checkpoint(), limit=10, timeout_s=50.0)
        assert CLOCK.monotonic() - before < 25.0
        found = list(page.records)
        for n in range(2, 12):
            if n % 2:
                await append(sqlite_store, Placed(order_id=str(n), customer_id="a"))
            else:
                await publish(embedded, "stock.events", Moved(sku=str(n), customer_id="a"), position=n)
            async with asyncio.timeout(10):
                while len(found) < n:
                    page = await feed.read(page.checkpoint, limit=10, timeout_s=0.5)
                    found += page.records
        assert [record.envelope.key for record in found] == [str(n) for n in range(1, 12)]
        rest = await feed.read(Checkpoint(), limit=100, timeout_s=0.0)  # from the beginning, while reads are under way
        while len(keys(rest)) < 11:
            more = await feed.read(rest.checkpoint, limit=100, timeout_s=0.2)
            rest = replace(more, records=[*rest.records, *more.records])
        assert sorted(keys(rest), key=int) == [str(n) for n in range(1, 12)]
