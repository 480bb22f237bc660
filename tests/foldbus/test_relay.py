"""The relay on both stores, against a scripted transport: order, retries, missing topics, reading ahead and marking
beside the publishing, death and succession."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import pytest

from bus.errors import Fenced, MessageTooLarge, MissingTopics, TransportUnavailable
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
async def relaying(store: Any, topics: Any, **changes: Any) -> AsyncIterator[Relay]:
    settings = RelaySettings(wait_s=0.1, lease_ttl_s=60.0, retry_max_s=0.02, missing_retry_s=0.05)
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


async def until(condition: Callable[[], Any], *, within_s: float = 40.0) -> None:
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


def so_many(topics: Topics, count: int) -> Callable[[], bool]:
    return lambda: len(topics.records) == count


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
    settings = RelaySettings(wait_s=3600.0, lease_ttl_s=60.0)
    async with relaying(store, topics, settings=settings):
        for n in range(3):
            await store.commit([on("stock.commands")])
            await until(so_many(topics, n + 1))


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


async def test_what_fails_again_when_it_is_sent_again_is_known_by_its_own_place(store: Store) -> None:
    await store.commit([on("stock.commands"), on("stock.commands"), on("late.commands"), on("stock.commands")])
    late = next(one for one in await whole_log(store) if one.topic == "late.commands")
    topics = Topics()

    def flaky(record: Outgoing) -> Published | None:
        if topics.calls == 1 and topics.records:  # only the first one gets through
            return Unknown(TransportUnavailable("no answer"))
        return Failed(MissingTopics([record.topic])) if record.topic == "late.commands" else None

    topics.answer = flaky
    async with relaying(store, topics):
        await until(lambda: len(topics.ids("stock.commands")) == 3)
    assert await store.leases.position(LEASE) == (late.position or 0) - 1


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


# --- beside the publishing --------------------------------------------------------------------------------------------


class Beside:
    """A store of which some parts are watched, or held up."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.records = self.leases = self
        self.read_after: list[int] = []
        self.marks: list[tuple[int, int]] = []
        self.marking, self.may_mark = asyncio.Event(), asyncio.Event()
        self.may_mark.set()
        self.read_on = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def lead(self, name: str, **options: Any) -> Any:
        return self._store.leases.lead(name, **options)

    async def read(self, *, after: int, limit: int) -> Any:
        self.read_after.append(after)
        page = await self._store.records.read(after=after, limit=limit)
        if after:
            self.read_on.set()
        return page

    async def mark(self, lease: Any, *, old: int, new: int) -> None:
        self.marking.set()
        await self.may_mark.wait()
        await self._store.leases.mark(lease, old=old, new=new)
        self.marks.append((old, new))


async def test_the_next_page_is_read_while_one_is_on_its_way(store: Store) -> None:
    await store.commit([on("stock.commands") for _ in range(6)])
    wanted = [one.id for one in await whole_log(store)]
    beside = Beside(store)

    class Slow(Topics):
        async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Published]:
            if not self.calls:
                await beside.read_on.wait()  # for ever, if it is read after this only
            return await super().publish(batch)

    topics = Slow()
    async with relaying(beside, topics, settings=RelaySettings(batch_max=2)):
        await until(lambda: marked(store))
    assert topics.ids() == wanted


async def test_one_page_is_published_at_a_time_however_much_is_read(store: Store) -> None:
    await store.commit([on("stock.commands") for _ in range(9)])
    wanted = [one.id for one in await whole_log(store)]

    class Narrow(Topics):
        at_once = most = 0

        async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Published]:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            await asyncio.sleep(0.01)
            self.at_once -= 1
            return await super().publish(batch)

    topics = Narrow()
    async with relaying(store, topics, settings=RelaySettings(batch_max=2, mark_s=0.001)):
        await until(lambda: marked(store))
    assert topics.ids() == wanted
    assert (topics.calls, topics.most) == (5, 1)


async def test_publishing_goes_on_while_a_mark_is_written_up_to_a_bound(store: Store) -> None:
    await store.commit([on("stock.commands") for _ in range(20)])
    wanted = [one.id for one in await whole_log(store)]
    beside, topics = Beside(store), Topics()
    beside.may_mark.clear()
    settings = RelaySettings(batch_max=2, mark_s=0.001, unmarked_max=6, wait_s=0.1)
    async with relaying(beside, topics, settings=settings):
        await until(lambda: len(topics.ids()) >= 6)
        assert beside.marks == []
        for _ in range(20):  # time enough for more, were it not for the bound
            await asyncio.sleep(0.005)
        assert topics.ids() == wanted[:6]
        assert await store.leases.position(LEASE) == 0
        beside.may_mark.set()
        await until(lambda: marked(store))
    assert topics.ids() == wanted
    assert [old for old, _ in beside.marks[1:]] == [new for _, new in beside.marks[:-1]]


async def test_marks_are_few_and_the_last_one_comes_when_there_is_nothing_to_do(store: Store) -> None:
    beside, topics = Beside(store), Topics()
    async with relaying(beside, topics, settings=RelaySettings(batch_max=2, mark_s=2.0, wait_s=3600.0)):
        for n in range(8):
            await store.commit([on("stock.commands")])
            await until(so_many(topics, n + 1))
        await until(lambda: marked(store))  # long before `wait_s`
    assert 1 <= len(beside.marks) < 8


async def test_stopped_it_marks_what_it_has_published(store: Store) -> None:
    beside, topics = Beside(store), Topics()
    async with relaying(beside, topics, settings=RelaySettings(mark_s=600.0)):
        await store.commit([on("stock.commands")])
        await until(lambda: marked(store))
        await store.commit([on("stock.commands")])
        await until(lambda: len(topics.records) == 2)
        assert len(beside.marks) == 1
    assert await marked(store)
    successor = Topics()
    async with relaying(store, successor):
        await store.commit([on("stock.commands")])
        await until(lambda: len(successor.records) >= 1)
        await until(lambda: marked(store))
    assert len(successor.records) == 1


async def test_a_mark_that_is_fenced_ends_the_leadership_and_another_begins_where_it_stood(store: Store) -> None:
    class Stolen(Beside):
        """The first mark is refused while later pages are published."""

        async def mark(self, lease: Any, *, old: int, new: int) -> None:
            if not self.marking.is_set():
                self.marking.set()
                raise Fenced("somebody else leads")
            await super().mark(lease, old=old, new=new)

    class Slow(Topics):
        async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Published]:
            if self.calls == 1:
                await beside.marking.wait()
            return await super().publish(batch)

    await store.commit([on("stock.commands") for _ in range(4)])
    wanted = [one.id for one in await whole_log(store)]
    beside, topics, metrics = Stolen(store), Slow(), MemoryMetrics()
    async with relaying(beside, topics, metrics=metrics, settings=RelaySettings(batch_max=1, wait_s=0.1)):
        await until(lambda: marked(store))
    assert topics.ids() == wanted[:2] + wanted
    assert metrics.total("foldbus_fenced_total", who="relay") == 1
