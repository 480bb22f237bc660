"""The live runner on both stores: folding, crashes, fences, dead letters, tokens."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from bus.cloudevents import to_record
from bus.envelope import StreamId, Token
from bus.errors import Fenced, MissingTopics
from bus.messages import Event
from bus.metrics import MemoryMetrics
from bus.partitioner import partition_of
from bus.transport import Outgoing, TopicSpec, Transport
from eventstore.port import ANY, Append, Unit
from projections import (
    Doing,
    NotThere,
    ProjectionRunner,
    ReadModel,
    TokenElsewhere,
    projection,
    rebuild,
    verify,
)
from projections.building import Builder
from tests.projections.world import (
    SERVICE,
    SETTINGS,
    Closed,
    Customer,
    Moved,
    Placed,
    Unrelated,
    all_rows,
    append,
    append_many,
    both,
    by_customer,
    customers,
    envelope,
    eventually,
    publish,
    publish_raw,
    running,
    stock_moves,
    workshop,
)


def orders(n: int, *, customers: int = 7) -> list[Placed]:
    return [Placed(order_id=f"o{i}", customer_id=f"c{i % customers}", cents=i) for i in range(n)]


async def caught_up(shop: Any, position: int) -> None:
    async def passed() -> bool:
        serving = await shop.rows.serving()
        place = (await shop.rows.checkpoint(serving.number)).places.get(("log", 0))
        return place is not None and place.position >= position

    await eventually(passed)


async def _steps(builder: Builder[Any], n: int) -> None:
    for _ in range(n):
        await builder.step(timeout_s=0)


class Once:
    """A failpoint that raises the `nth` time it is hit, as a crash would cut things off there."""

    def __init__(self, name: str, nth: int = 1) -> None:
        self.name, self.left = name, nth

    def hit(self, name: str) -> None:
        if name == self.name:
            self.left -= 1
            if self.left == 0:
                raise Crash(name)


class Crash(Exception):
    pass


async def test_events_become_rows_and_none_deletes(store: Any) -> None:
    shop = workshop(store)
    runner = ProjectionRunner(shop)
    async with running(runner):
        await append(
            store,
            Placed(order_id="1", customer_id="a", cents=5),
            Placed(order_id="2", customer_id="b", cents=1),
            Unrelated(order_id="3"),
            Placed(order_id="4", customer_id="a", cents=7),
        )
        last = await append(store, Closed(order_id="5", customer_id="b"))
        await caught_up(shop, last)
        assert runner.state.doing is Doing.FOLLOWING
    rows = await all_rows(shop.rows)
    assert rows == {"a": Customer(customer_id="a", placed=2, cents=12, trail=("1", "4"))}
    assert (await verify(shop)).ok


@pytest.mark.parametrize("where", ["before-projection-save", "after-projection-save"])
async def test_a_crash_around_a_save_folds_nothing_twice_and_loses_nothing(store: Any, where: str) -> None:
    """I6, on the third page of many; the next runner is another object that knows nothing."""
    await append_many(store, orders(230))
    shop = workshop(store, failpoint=Once(where, 3))
    await shop.rows.serving()
    async with shop.open_feed() as feed:
        builder = Builder(shop, 1, feed, stop_on_bugs=False)
        await builder.reload()
        with pytest.raises(Crash):
            await _steps(builder, 5)
    place = (await shop.rows.checkpoint(1)).places["log", 0]
    folded = sum(row.placed for row in (await all_rows(shop.rows)).values())
    assert folded == (100 if where.startswith("before") else 150)
    assert place.position > 0
    after = workshop(store)
    async with running(ProjectionRunner(after)):
        await caught_up(after, await store.head())
    rows = await all_rows(after.rows)
    assert sum(row.placed for row in rows.values()) == 230
    assert rows["c3"].trail == tuple(f"o{i}" for i in range(230) if i % 7 == 3)
    assert (await verify(after)).ok


async def test_of_two_runners_on_one_generation_the_loser_is_fenced_and_nothing_is_folded_twice(
    store: Any, twin: Any
) -> None:
    """Two that both believe to lead: they take turns as badly as can be."""
    await append_many(store, orders(200))
    shops = [workshop(store), workshop(twin)]
    await shops[0].rows.serving()
    fenced = 0
    async with shops[0].open_feed() as one, shops[1].open_feed() as other:
        builders = [Builder(shop, 1, feed, stop_on_bugs=False) for shop, feed in zip(shops, (one, other), strict=True)]
        for builder in builders:
            await builder.reload()
        for turn in range(40):
            results = await asyncio.gather(*(builder.step(timeout_s=0) for builder in builders), return_exceptions=True)
            for builder, result in zip(builders, results, strict=True):
                if isinstance(result, BaseException):
                    assert isinstance(result, Fenced), result
                    fenced += 1
                    await builder.reload()
            if turn < 10:
                await append(store, Placed(order_id=f"late{turn}", customer_id="c0"))
    assert fenced > 0
    rows = await all_rows(shops[0].rows)
    assert sum(row.placed for row in rows.values()) == 210
    assert (await verify(shops[0])).ok


async def test_a_runner_that_was_fenced_reads_again_and_goes_on(store: Any, twin: Any) -> None:
    metrics = MemoryMetrics()
    shop, other = workshop(store, metrics=metrics), workshop(twin)
    async with running(ProjectionRunner(shop)):
        last = await append(store, *orders(3))
        await caught_up(shop, last)
        checkpoint = await other.rows.checkpoint(1)  # somebody writes behind its back
        await other.rows.save(1, {"c0": Customer(customer_id="c0", placed=100)}, old=checkpoint, new=checkpoint)
        last = await append(store, Placed(order_id="x", customer_id="c0"))
        await caught_up(shop, last)
    assert (await all_rows(shop.rows))["c0"].placed == 101
    assert metrics.total("foldbus_projection_fenced_total") >= 1


async def test_an_event_that_cannot_be_folded_becomes_a_dead_letter_and_the_rest_goes_on(store: Any) -> None:
    metrics = MemoryMetrics()
    shop = workshop(store, metrics=metrics)
    poison = Placed(order_id="2", customer_id="a", cents=666)
    await append(store, Placed(order_id="1", customer_id="a"))
    at = await append(store, poison)
    last = await append(store, Placed(order_id="3", customer_id="a"), Placed(order_id="4", customer_id="b"))
    async with running(ProjectionRunner(shop)):
        await caught_up(shop, last)
    rows = await all_rows(shop.rows)
    assert rows["a"].trail == ("1", "3")
    assert rows["b"].trail == ("4",)
    (letter,) = await store.dead_letters()
    assert letter.consumer == "shop.projection.customers"
    assert (letter.topic, letter.offset, letter.type) == ("log", at, "shop.placed.v1")
    assert letter.value == poison.model_dump_json().encode()
    assert letter.failure.error == "ValueError"
    assert letter.failure.attempts == SETTINGS.attempts
    assert "this event is poison" in letter.failure.stack
    assert metrics.total("foldbus_dead_letters_total") == 1
    copies = [
        one for one in (await store.read_all(after=0, limit=100, outgoing=True)).records if one.topic == "shop.dlq"
    ]
    assert len(copies) == 1
    assert (await verify(shop)).ok


@pytest.mark.parametrize("where", ["before-projection-save", "after-projection-save"])
async def test_a_dead_letter_is_written_once_when_the_save_after_it_was_cut_off(store: Any, where: str) -> None:
    await append(store, Placed(order_id="2", customer_id="a", cents=666))
    shop = workshop(store, failpoint=Once(where))
    async with running(ProjectionRunner(shop)):
        await caught_up(shop, await store.head())
    assert len(await store.dead_letters()) == 1


async def test_undecodable_and_unknown_versions_in_the_log_become_dead_letters(store: Any) -> None:
    odd = [
        envelope(Placed(order_id="1", customer_id="a"), data=b"{}"),
        envelope(Placed(order_id="1", customer_id="a"), type="shop.placed.v9"),
        envelope(Placed(order_id="1", customer_id="a\x00")),
        envelope(Placed(order_id="1", customer_id="a")),
    ]
    await store.commit([Unit(appends=(Append(StreamId("order", "1"), ANY, tuple(odd)),))])
    shop = workshop(store)
    async with running(ProjectionRunner(shop)):
        await caught_up(shop, await store.head())
    errors = sorted(letter.failure.error for letter in await store.dead_letters())
    assert errors == ["Undecodable", "Undecodable", "UnknownVersion"]
    assert (await all_rows(shop.rows))["a"].placed == 1


@projection("careless", version=1, key=by_customer)
def careless(row: Customer | None, event: Placed) -> Customer | None:
    row = row or Customer(customer_id=event.customer_id)
    count: Any = "not a number" if event.cents == 19 else row.placed + 1
    return row.model_copy(update={"placed": count})  # which validates nothing


async def test_a_row_that_could_not_be_read_again_is_the_events_fault_and_not_the_pages(store: Any) -> None:
    shop = workshop(store, careless)
    await append_many(store, [Placed(order_id=str(n), customer_id=f"c{n % 2}", cents=n) for n in range(20)])
    async with running(ProjectionRunner(shop)):
        await caught_up(shop, await store.head())
    assert {key: row.placed for key, row in (await all_rows(shop.rows)).items()} == {"c0": 10, "c1": 9}
    assert len(await store.dead_letters()) == 1


@pytest.mark.parametrize("page", [1, 50])
@pytest.mark.parametrize("then", [Placed(order_id="3", customer_id="a"), Closed(order_id="3", customer_id="a")])
async def test_an_event_is_to_blame_wherever_its_page_ends(store: Any, page: int, then: Event) -> None:
    """Though the next one mends what it did, or takes it away: a rebuild, whose pages end elsewhere, must agree."""

    @projection("forgetful", version=1, key=by_customer)
    def forgetful(row: Customer | None, event: Placed | Closed) -> Customer | None:
        count: Any = event.order_id if event.order_id == "2" else 1 if row is None else int(row.placed) + 1
        return None if isinstance(event, Closed) else Customer.model_construct(customer_id="a", placed=count, cents=0)

    shop = workshop(store, forgetful, settings=replace(SETTINGS, page=page))
    await append(store, Placed(order_id="1", customer_id="a"), Placed(order_id="2", customer_id="a"), then)
    async with running(ProjectionRunner(shop)):
        await caught_up(shop, await store.head())
    (letter,) = await store.dead_letters()
    assert letter.failure.error == "BadRow"
    assert {key: row.placed for key, row in (await all_rows(shop.rows)).items()} == (
        {} if isinstance(then, Closed) else {"a": 2}
    )


async def test_a_store_that_fails_for_a_while_is_only_a_delay(store: Any) -> None:
    shop = workshop(store)
    feeds = 0

    @asynccontextmanager
    async def flaky() -> Any:
        nonlocal feeds
        feeds += 1
        if feeds < 3:
            raise OSError("no route to host")
        async with shop.open_feed() as feed:
            yield feed

    metrics = MemoryMetrics()
    runner = ProjectionRunner(replace(shop, open_feed=flaky, metrics=metrics))
    last = await append(store, *orders(3))
    async with running(runner):
        await caught_up(shop, last)
        await eventually(lambda: _true(runner.state.error == ""))
    assert metrics.total("foldbus_projection_errors_total", error="OSError") == 2


async def _true(found: bool) -> bool:
    return found


async def test_the_cache_of_rows_is_bounded_and_its_size_changes_nothing(store: Any) -> None:
    shop = workshop(store, settings=replace(SETTINGS, cache_rows=2, page=10))
    await append_many(store, orders(120, customers=9))
    async with running(ProjectionRunner(shop)):
        await caught_up(shop, await store.head())
    assert (await verify(shop)).ok
    assert await shop.rows.count() == 9


# --- topics ----------------------------------------------------------------------------------------------------------


async def stock(transport: Transport) -> None:
    await transport.admin.create([TopicSpec("stock.events", partitions=4)])


async def test_partitions_that_feed_one_row_and_a_replayed_suffix(store: Any, embedded: Transport) -> None:
    await stock(embedded)
    shop = workshop(store, stock_moves, transport=embedded)
    records = [
        to_record(
            envelope(Moved(sku=f"s{n}", customer_id="a", amount=n), source="stock", topic="stock.events", position=n)
        )
        for n in range(1, 41)
    ]
    async with running(ProjectionRunner(shop)):
        await embedded.publish(records)
        await embedded.publish(records[-15:])  # the relay was killed before its mark and sends again
        await publish_raw(embedded, Outgoing("stock.events", b"x", b"garbage", partition=1))
        await publish(embedded, "stock.events", Moved(sku="s1", customer_id="b"), position=41)
        await eventually(lambda: _has(shop.rows, "b"))

        async def letters() -> bool:
            row = await shop.rows.get("a")
            return len(await store.dead_letters()) == 1 and row is not None and row.placed >= 40

        await eventually(letters)
    row = (await all_rows(shop.rows))["a"]
    assert (row.placed, row.cents) == (40, sum(range(1, 41)))
    assert shop.metrics.total("foldbus_projection_skipped_total", reason="replay") == 15  # type: ignore[attr-defined]
    assert (await verify(shop)).ok


async def _has(rows: Any, key: str) -> bool:
    return await rows.get(key) is not None


async def test_a_missing_foreign_topic_means_wait(
    store: Any, embedded: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    shop = workshop(store, stock_moves, transport=embedded)
    runner = ProjectionRunner(shop)
    async with running(runner):
        await eventually(lambda: _true(_errors(shop) >= 3))
        assert "MissingTopics" in runner.state.error
        (said,) = [record for record in caplog.records if "stock.events" in record.getMessage()]
        assert (said.levelname, said.exc_info) == ("WARNING", None)
        await stock(embedded)
        await publish(embedded, "stock.events", Moved(sku="1", customer_id="a"), position=1)
        await eventually(lambda: _has(shop.rows, "a"))


async def test_a_missing_foreign_topic_does_not_hold_up_the_other_sources(
    store: Any, embedded: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    shop: Any = workshop(store, both, transport=embedded)
    runner = ProjectionRunner(shop)
    async with running(runner):
        await append(store, Placed(order_id="1", customer_id="a"))
        await eventually(lambda: _has(shop.rows, "a"))
        await eventually(lambda: _true("stock.events" in runner.state.error))
        assert runner.state.doing is Doing.FOLLOWING
        assert shop.metrics.total("foldbus_projection_topic_missing_total", topic="stock.events") >= 1
        assert _errors(shop) == 0
        (said,) = [record for record in caplog.records if "stock.events" in record.getMessage()]
        assert (said.levelname, said.exc_info) == ("WARNING", None)
        with pytest.raises(MissingTopics):  # half of a read model is not to be swapped in
            async for _ in rebuild(shop):
                pass
        await stock(embedded)
        await publish(embedded, "stock.events", Moved(sku="1", customer_id="b"), position=1)
        await eventually(lambda: _has(shop.rows, "b"))
        await append(store, Placed(order_id="2", customer_id="c"))
        await eventually(lambda: _has(shop.rows, "c"))
        await eventually(lambda: _true(runner.state.error == ""))
    assert (await verify(shop)).ok


def _errors(shop: Any) -> int:
    return int(shop.metrics.total("foldbus_projection_errors_total"))


async def test_own_log_and_a_topic_together(store: Any, embedded: Transport) -> None:
    await stock(embedded)
    shop = workshop(store, both, transport=embedded)
    async with running(ProjectionRunner(shop)):
        for n in range(20):
            await append(store, Placed(order_id=f"o{n}", customer_id=f"c{n % 3}"))
            await publish(embedded, "stock.events", Moved(sku=f"s{n}", customer_id=f"c{n % 3}"), position=n + 1)

        async def all_in() -> bool:
            return sum(row.placed for row in (await all_rows(shop.rows)).values()) == 40

        await eventually(all_in)
    assert (await verify(shop)).ok


# --- tokens ----------------------------------------------------------------------------------------------------------


async def test_reading_after_a_token_sees_the_own_write(store: Any) -> None:
    shop = workshop(store)
    view = ReadModel(customers, shop.rows, service=SERVICE)
    async with running(ProjectionRunner(shop)):
        for n in range(1, 6):
            at = await append(store, Placed(order_id=str(n), customer_id="a"))
            row = await view.get("a", after=Token(SERVICE, store.epoch, "a", at, at))
            assert row is not None
            assert row.placed == n
        at = await append(store, Unrelated(order_id="9"))  # nothing of ours: it has passed all the same
        await view.get("a", after=Token(SERVICE, store.epoch, "9", at, at))
    assert [key async for key, _ in view] == ["a"]
    assert await view.count() == 1


async def test_a_token_that_is_not_reached_in_time_says_so(store: Any) -> None:
    shop = workshop(store)
    view = ReadModel(customers, shop.rows, service=SERVICE)
    at = await append(store, Placed(order_id="1", customer_id="a"))
    with pytest.raises(NotThere, match=r"is a worker of this service running\?$"):
        await view.get("a", after=Token(SERVICE, store.epoch, "a", at, at), timeout_s=0.1)
    assert await view.get("a") is None
    assert await view.get("a", after=Token(SERVICE, store.epoch, "a", 0, 0), timeout_s=0.1) is None


async def test_a_foreign_token_waits_for_the_partition_of_its_key(store: Any, embedded: Transport) -> None:
    await stock(embedded)
    shop = workshop(store, stock_moves, transport=embedded)
    view = ReadModel(stock_moves, shop.rows, service=SERVICE)
    with pytest.raises(TokenElsewhere):
        await view.get("a", after=Token("billing", 0, "k", 1, 1))
    async with running(ProjectionRunner(shop)):
        here = await publish(embedded, "stock.events", Moved(sku="here", customer_id="a"), position=50)
        other = next(
            key for key in ("k1", "k2", "k3", "k4", "k5", "k6") if partition_of(key.encode(), 4) != here.partition
        )
        row = await view.get("a", after=Token("stock", 0, "here", 60, 50))  # its public event, not its last
        assert row is not None
        with pytest.raises(NotThere):  # another partition is at 50, this one has seen nothing
            await view.get("a", after=Token("stock", 0, other, 50, 50), timeout_s=0.3)
        with pytest.raises(NotThere):  # the source was restored since: its new epoch has not come yet
            await view.get("a", after=Token("stock", 1, "here", 1, 1), timeout_s=0.3)
        await publish(embedded, "stock.events", Moved(sku="here", customer_id="b"), position=2, epoch=1)
        assert await view.get("b", after=Token("stock", 1, "here", 2, 2)) is not None
