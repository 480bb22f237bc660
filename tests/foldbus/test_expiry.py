"""Requests that nobody waits for any more: which are skipped, and which never; on every store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from bus.cloudevents import to_record
from bus.envelope import ReplyTo
from bus.errors import MissingTopics
from bus.metrics import MemoryMetrics
from bus.processing import Again, Done, Item, Result, Watermarks
from bus.seams import SystemClock
from bus.transport import Ack, Assignment, Delivery, Outgoing
from eventstore.port import ClaimState, Store, Unit
from foldbus.expiry import ExpiringProcessor, how_late
from foldbus.outbox import Publisher
from tests.eventstore.stores import IDS, NOON, SERVICE, claim, message


class Inner:
    """What comes through is noted, and is done unless `again` says otherwise."""

    def __init__(self) -> None:
        self.group = f"{SERVICE}.commands"
        self.got: list[UUID] = []
        self.again: set[UUID] = set()

    def wants(self, type_name: str) -> bool:
        return True

    async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Result]:
        self.got += [item.envelope.id for item in batch]
        return [Again() if item.envelope.id in self.again else Done() for item in batch]

    async def give_up(self, item: Item, failure: Any) -> Result:
        return Done()

    async def give_up_raw(self, delivery: Delivery, failure: Any) -> None: ...

    async def stored_watermarks(self) -> Watermarks:
        return {}

    async def store_watermarks(self, watermarks: Watermarks) -> None: ...

    def forget(self, topics: Any) -> None: ...


class Silent:
    """A transport that takes everything."""

    max_bytes = 1_000_000

    def __init__(self) -> None:
        self.records: list[Outgoing] = []

    async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Ack]:
        self.records += batch
        return [Ack(0, 0) for _ in batch]


class Desk:
    """An `ExpiringProcessor` at noon."""

    def __init__(self, store: Store, *, tolerance_s: float = 5.0) -> None:
        class Noon(SystemClock):
            def now(self) -> datetime:
                return NOON

        self.inner, self.metrics, self.transport = Inner(), MemoryMetrics(), Silent()
        transport: Any = self.transport
        self.processor = ExpiringProcessor(
            self.inner, service=SERVICE, store=store, publisher=Publisher(transport), clock=Noon(), ids=IDS,
            metrics=self.metrics, tolerance_s=tolerance_s,
        )  # fmt: skip

    async def process(self, *items: Item) -> list[str]:
        results = await self.processor.process(list(items), {})
        return [type(result).__name__ for result in results]

    @property
    def skipped(self) -> int:
        return self.metrics.total("foldbus_expired_requests_total", consumer=self.inner.group)


def request(late_s: float | None = 60.0, *, key: str = "o-1", partition: int = 0, sent: datetime = NOON) -> Item:
    envelope = replace(
        message(key),
        deadline=None if late_s is None else NOON - timedelta(seconds=late_s),
        reply_to=ReplyTo("front.inbox", "i-7", "i-7"),
        time=sent,
    )
    record = to_record(envelope)
    part = Assignment("shop.commands", partition)
    return Item(envelope, Delivery(part, 7, record.key, record.value, record.headers, NOON))


class TestTheExpiringProcessor:
    async def test_skips_what_is_later_than_the_tolerance_and_tells_whoever_waits(self, store: Store) -> None:
        desk = Desk(store)
        late, just, early, never = request(5.001), request(5.0), request(-60), request(None)
        assert await desk.process(late, just, early, never) == ["Done"] * 4
        assert desk.inner.got == [just.envelope.id, early.envelope.id, never.envelope.id]
        assert desk.skipped == 1
        (record,) = desk.transport.records
        assert (record.topic, record.key, dict(record.headers)["ce_outcome"]) == ("front.inbox", b"i-7", b"expired")
        assert dict(record.headers)["ce_deadline"].decode() == late.envelope.deadline.isoformat()  # type: ignore[union-attr]
        (standing,) = await store.examine(desk.inner.group, [(late.envelope.id, "o-1")])
        assert standing.state is ClaimState.NEW

    async def test_leaves_alone_what_was_taken_up_before(self, store: Store) -> None:
        desk = Desk(store)
        done, dead, failed, redriven, undo, timed = (request() for _ in range(6))
        await store.commit([
            Unit(claim(done.envelope.id, consumer=desk.inner.group)),
            Unit(claim(dead.envelope.id, key="o-2", consumer=desk.inner.group, state=ClaimState.DEAD)),
        ])  # fmt: skip
        failed.attempts = 1
        redriven = request(partition=-1)
        undo = replace(undo, envelope=replace(undo.envelope, undoes=IDS.new()))
        timed = replace(timed, delivery=None)
        items = [done, dead, failed, redriven, undo, timed]
        assert await desk.process(*items) == ["Done"] * 6
        assert desk.inner.got == [item.envelope.id for item in items]
        assert desk.skipped == 0

    async def test_says_of_nothing_that_it_is_done_before_what_comes_before_it_is(self, store: Store) -> None:
        desk = Desk(store)
        first, late, other = request(None), request(), request(key="o-2")
        desk.inner.again = {first.envelope.id}
        assert await desk.process(first, late, other) == ["Again", "Again", "Done"]
        assert desk.skipped == 1
        desk.inner.again = set()
        assert await desk.process(first, late) == ["Done", "Done"]
        assert desk.skipped == 2
        assert late.envelope.id not in desk.inner.got

    async def test_goes_on_when_those_who_asked_cannot_be_told(self, store: Store) -> None:
        desk = Desk(store)

        async def fails(batch: Sequence[Outgoing]) -> Sequence[Ack]:
            raise MissingTopics(["front.inbox"])

        desk.transport.publish = fails  # type: ignore[method-assign]
        assert await desk.process(request()) == ["Done"]
        assert desk.skipped == 1


async def test_what_a_restored_database_may_have_answered_is_handled_again(backend: Any) -> None:
    """A reply is a promise: the restore took the effect back, not the answer that somebody has."""
    async with backend.open() as store:
        assert store.epoch_since is None
        assert (await Desk(store).process(request()), Desk(store).skipped) == (["Done"], 0)
    if backend.name == "sqlite":
        from eventstore.sqlite import SqliteStore

        await SqliteStore.restored(backend.where, service=SERVICE)
    else:
        from eventstore.postgres import PostgresStore

        await PostgresStore.raise_epoch(backend.where, service=SERVICE)
    async with backend.open() as store:
        since = store.epoch_since
        assert since is not None
        assert abs(since - datetime.now(UTC)) < timedelta(seconds=120)
        desk = Desk(store)
        before, after = request(sent=since - timedelta(seconds=1)), request(sent=since + timedelta(seconds=6))
        await desk.process(before, after)
        assert desk.inner.got == [before.envelope.id]
        assert desk.skipped == 1


def test_how_late_a_request_is() -> None:
    late = request(7.5).envelope
    assert how_late(late, NOON, tolerance_s=5) == 7.5
    assert how_late(late, NOON, tolerance_s=7.5) is None
    assert how_late(replace(late, deadline=None), NOON, tolerance_s=0) is None
