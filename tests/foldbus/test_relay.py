"""The relay on both stores, against a scripted transport: order, retries, missing topics, death and succession."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import pytest

from bus.errors import MessageTooLarge, MissingTopics, TransportUnavailable
from bus.metrics import MemoryMetrics
from bus.seams import NoFailpoints, SystemClock
from bus.transport import Ack, Failed, Outgoing, Published, Unknown
from eventstore.port import Store, Unit
from foldbus.relay import LEASE, Relay, RelaySettings
from tests.eventstore.stores import append, message, reply, whole_log


class Topics:
    """Takes every record, unless the script says otherwise."""

    max_bytes = 1_000_000

    def __init__(self) -> None:
        self.records: list[Outgoing] = []
        self.answer: Callable[[Outgoing], Published | None] = lambda record: None
        self.calls = 0
        self.moved = asyncio.Event()

    async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Published]:
        self.calls += 1
        results: list[Published] = []
        for record in batch:
            scripted = self.answer(record)
            if scripted is None:
                self.records.append(record)
            results.append(scripted or Ack(0, len(self.records)))
        self.moved.set()
        return results

    def ids(self, topic: str | None = None) -> list[UUID]:
        return [
            UUID(dict(record.headers)["ce_id"].decode())
            for record in self.records
            if topic is None or record.topic == topic
        ]


@asynccontextmanager
async def relaying(store: Store, topics: Any, **changes: Any) -> AsyncIterator[Relay]:
    settings = RelaySettings(wait_s=0.1, lease_ttl_s=2.0, retry_max_s=0.02, missing_retry_s=0.05)
    options: dict[str, Any] = {
        "clock": SystemClock(),
        "metrics": MemoryMetrics(),
        "failpoint": NoFailpoints(),
        "settings": settings,
    }
    relay = Relay(store, topics, **(options | changes))
    task = asyncio.create_task(relay.run())
    try:
        yield relay
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], Any], *, within_s: float = 15.0) -> None:
    """Waits for a condition, sync or async."""
    async with asyncio.timeout(within_s):
        while True:
            found = condition()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return
            await asyncio.sleep(0.01)


async def marked(store: Store) -> bool:
    return await store.leases.position(LEASE) == await store.head()


def on(topic: str) -> Unit:
    return Unit(outgoing=(message(topic=topic),))


async def test_events_and_outgoing_go_out_in_the_logs_order_and_private_events_stay(store: Store) -> None:
    await store.commit(
        [
            Unit(appends=(append("o-1", 0, 2),), outgoing=(message(),)),
            Unit(appends=(append("o-2", 0, 1, public=False),)),
            Unit(outgoing=(reply(),)),
        ]
    )
    wanted = [one.id for one in await whole_log(store) if one.topic is not None]
    topics = Topics()
    async with relaying(store, topics):
        await until(lambda: marked(store))
    assert topics.ids() == wanted
    assert len(wanted) == 4


async def test_what_is_committed_later_goes_out_at_once(store: Store) -> None:
    topics = Topics()
    settings = RelaySettings(wait_s=30.0, lease_ttl_s=2.0)
    async with relaying(store, topics, settings=settings):
        for n in range(3):
            await store.commit([on("stock.commands")])
            await until(lambda n=n: len(topics.records) == n + 1, within_s=5.0)


async def test_published_outgoing_rows_are_forgotten_and_events_stay(store: Store) -> None:
    await store.commit([Unit(appends=(append("o-1", 0, 1),), outgoing=(message(),))])
    async with relaying(store, Topics()):

        async def pruned() -> bool:
            return [one.kind for one in await whole_log(store)] == ["event"]

        await until(pruned)


async def test_what_is_not_acknowledged_is_sent_again_in_order(store: Store) -> None:
    await store.commit([on("stock.commands") for _ in range(6)])
    wanted = [one.id for one in await whole_log(store)]
    topics = Topics()
    failures = iter([2, 3, 4, 5])  # of the first call only the first two get through

    def flaky(record: Outgoing) -> Published | None:
        position = wanted.index(UUID(dict(record.headers)["ce_id"].decode()))
        return Unknown(TransportUnavailable("no answer")) if topics.calls == 1 and position in failures else None

    topics.answer = flaky
    async with relaying(store, topics):
        await until(lambda: marked(store))
    assert topics.ids() == wanted


async def test_a_record_that_the_broker_refuses_becomes_a_dead_letter_and_others_go_on(store: Store) -> None:
    await store.commit([on("stock.commands"), on("front.commands"), on("stock.commands")])
    wanted = [one.id for one in await whole_log(store)]
    topics = Topics()
    topics.answer = lambda record: (
        Failed(MessageTooLarge("x", size=2, limit=1)) if record.topic == "front.commands" else None
    )
    async with relaying(store, topics):
        await until(lambda: marked(store))
    assert topics.ids() == [wanted[0], wanted[2]]
    (letter,) = await store.dead_letters()
    assert (letter.consumer, letter.topic) == ("relay", "front.commands")
    assert "MessageTooLarge" in letter.failure.error


async def test_a_missing_topic_holds_up_nobody_and_gets_its_records_in_order_once_it_is_there(store: Store) -> None:
    await store.commit([on("late.commands"), on("stock.commands"), on("late.commands")])
    topics = Topics()
    there = False
    topics.answer = lambda record: (
        Failed(MissingTopics(["late.commands"])) if record.topic == "late.commands" and not there else None
    )
    async with relaying(store, topics):
        await until(lambda: len(topics.ids("stock.commands")) == 1)
        await store.commit([on("stock.commands"), on("late.commands")])
        await until(lambda: len(topics.ids("stock.commands")) == 2)
        assert topics.ids("late.commands") == []
        wanted = [one.id for one in await whole_log(store) if one.topic == "late.commands"]
        assert len(wanted) == 3, "what waits must not be pruned"
        there = True
        await until(lambda: marked(store))
    assert topics.ids("late.commands") == wanted


async def test_records_for_a_missing_topic_survive_the_relay_that_read_them(store: Store) -> None:
    await store.commit([on("late.commands"), on("stock.commands")])
    late, stock = (one.id for one in await whole_log(store))
    topics = Topics()
    topics.answer = lambda record: Failed(MissingTopics([record.topic])) if record.topic == "late.commands" else None
    async with relaying(store, topics):
        await until(lambda: topics.ids() == [stock])
    successor = Topics()
    async with relaying(store, successor):
        await until(lambda: marked(store))
    assert successor.ids() == [late, stock]  # the suffix once more: consumers recognise the ids


async def test_only_so_many_records_wait_for_a_missing_topic(store: Store) -> None:
    await store.commit([on("late.commands") for _ in range(8)])
    await store.commit([on("stock.commands")])
    topics = Topics()
    there = False
    topics.answer = lambda record: (
        Failed(MissingTopics(["late.commands"])) if record.topic == "late.commands" and not there else None
    )
    settings = RelaySettings(wait_s=0.1, retry_max_s=0.02, missing_retry_s=0.02, waiting_max=8, batch_max=4)
    async with relaying(store, topics, settings=settings):
        await until(lambda: topics.calls > 6)
        assert topics.records == []  # the bound: it stands still
        there = True
        await until(lambda: marked(store))
    assert len(topics.ids("late.commands")) == 8
    assert len(topics.ids("stock.commands")) == 1


class _Stopped(Exception):
    """Stands for a kill: the failpoint raises it where the process would end."""


class StopAt:
    def __init__(self, name: str) -> None:
        self.name = name

    def hit(self, name: str) -> None:
        if name == self.name:
            raise _Stopped(name)


@pytest.mark.parametrize("at", ["before-publish", "after-publish", "before-mark", "after-mark"])
async def test_killed_anywhere_its_successor_loses_nothing(store: Store, at: str) -> None:
    await store.commit([on("stock.commands") for _ in range(5)])
    wanted = [one.id for one in await whole_log(store)]
    topics = Topics()
    dying = Relay(
        store, topics, clock=SystemClock(), metrics=MemoryMetrics(), failpoint=StopAt(at)  # type: ignore[arg-type]
    )  # fmt: skip
    with pytest.raises(_Stopped):
        await dying.run()
    async with relaying(store, topics):
        await until(lambda: marked(store))
    assert list(dict.fromkeys(topics.ids())) == wanted


async def test_of_two_relays_one_publishes(store: Store, twin: Store) -> None:
    topics = Topics()
    async with relaying(store, topics), relaying(twin, topics):
        for _ in range(20):
            await store.commit([on("stock.commands")])
        await until(lambda: marked(store))
    assert len(topics.ids()) == len(set(topics.ids())) == 20
