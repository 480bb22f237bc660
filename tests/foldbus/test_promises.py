"""What could break a promise at the seams between the rooms: bad neighbours, cancellation, stopping, starting."""

# Without `from __future__ import annotations`: services are made per test, of classes that only exist in there.
import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel

from bus.cloudevents import from_record, to_record
from bus.envelope import Envelope, ReplyTo
from bus.errors import MissingTopics, OffsetOutOfRange, OutcomeUnknown, TransportUnavailable
from bus.metrics import MemoryMetrics
from bus.seams import SystemClock
from bus.transport import Assignment, Delivery, Failed, Outgoing, PollSettings, Published
from eventstore.decider import DeciderBehaviour
from eventstore.errors import StoreUnavailable
from eventstore.port import Store, Unit
from foldbus import Command, Decider, Event, Key, Service
from foldbus.outbox import Inbox, Publisher
from foldbus.relay import RelaySettings
from tests.eventstore.stores import message, reply
from tests.foldbus.test_relay import Topics, marked, on, relaying, until
from tests.foldbus.test_runtime import Reserve, codec, ids, item, kinds, left, processor, settle, stock
from tests.stories.conftest import PAIRS
from tests.stories.pairs import QUICK, Pair, eventually, unique


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return PAIRS[request.param](request)


class Count(BaseModel, frozen=True):
    ns: tuple[int, ...] = ()


class Counter:
    """A service that counts, with a name of its own."""

    def __init__(self) -> None:
        name = unique("count")

        class Counted(Event, type=f"{name}.counted.v1"):
            key_: Key[str]
            n: int
            so_far: int

        class Add(Command[Counted], type=f"{name}.add.v1"):
            key_: Key[str]
            n: int

        def evolve(count: Count, event: Counted) -> Count:
            return Count(ns=(*count.ns, event.n))

        def decide(count: Count, command: Add) -> list[Counted]:
            return [Counted(key_=command.key_, n=command.n, so_far=len(count.ns) + 1)]

        self.add: Any = Add
        decider = Decider("count", initial=Count(), evolve=evolve, decide=decide)
        self.service = Service(name, deciders=[decider], partitions=2)


class TestABadUnit:
    async def test_fails_alone_and_its_batch_goes_on(self, store: Store) -> None:
        """Whatever a behaviour stages that no store takes: that message fails, like any bug, and is given up."""

        class Careless(DeciderBehaviour):
            def decide(self, state: Any, envelope: Envelope) -> Any:
                decision = super().decide(state, envelope)
                if envelope.key != "bad":
                    return decision
                return replace(decision, outgoing=(replace(message(), key="a\x00b"),))

        careless = Careless([stock], service="shop", codec=codec, ids=ids, clock=SystemClock())
        runtime = processor(store, behaviour=careless)
        batch = [item(Reserve(sku=sku)) for sku in ("cd", "bad", "lp", "bad")]
        assert kinds(await runtime.process(batch, {("shop.commands", 0): 4})) == ["Done", "Failed", "Done", "Again"]
        assert (await left(store), await left(store, "bad"), await left(store, "lp")) == (9, 10, 9)


class TestARuntime:
    async def test_remembers_nothing_of_what_is_done(self, store: Store, twin: Store) -> None:
        mine, theirs = processor(store), processor(twin)
        await settle(mine, item(Reserve(sku="cd")))
        late = item(Reserve(sku="cd"))
        late.envelope = replace(late.envelope, reply_to=None)
        await settle(theirs, item(Reserve(sku="cd")))
        assert kinds(await mine.process([late], {})) == ["Again"]
        await settle(theirs, item(Reserve(sku="cd"), id=late.envelope.id))
        await settle(mine, late)
        assert str(late.envelope.id) not in repr(vars(mine))


class TestThePublisher:
    async def test_forgets_what_callers_have_given_up_before_it_was_sent(self) -> None:
        """A broker that answers nobody: callers time out and come again, and nothing may pile up behind them."""
        gate, topics = asyncio.Event(), Topics()

        seen: list[int] = []

        class Stuck:
            max_bytes = 1_000_000

            async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Published]:
                seen.append(len(batch))
                await gate.wait()
                return await topics.publish(batch)

        transport: Any = Stuck()
        publisher = Publisher(transport)
        first = asyncio.create_task(publisher.publish(message()))
        await until(lambda: seen)
        for _ in range(20):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await publisher.publish(message())
        kept = asyncio.create_task(publisher.publish(message()))
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, kept)
        assert seen == [1, 1]
        await publisher.close()


class Tails:
    """A transport of which only `tail` is there; polls take from `turns`, one per tail: records, or what is raised."""

    def __init__(self, *turns: list[Any]) -> None:
        self.turns, self.opened = list(turns), 0

    @asynccontextmanager
    async def tail(self, topic: str, *, start: Any) -> AsyncGenerator[Any]:
        mine = self.turns[min(self.opened, len(self.turns) - 1)]
        self.opened += 1

        class Reader:
            async def poll(self, *, max_records: int, timeout_s: float) -> Sequence[Delivery]:
                await asyncio.sleep(0)
                if not mine:
                    await asyncio.sleep(0.01)
                    return []
                found = mine.pop(0)
                if isinstance(found, Exception):
                    raise found
                return [found]

        yield Reader()


def answer_to(id: UUID, instance: str = "me") -> Delivery:
    to = ReplyTo("front.inbox", instance, instance)
    record = to_record(replace(reply(), causation_id=id, key=instance, topic="front.inbox", reply_to=to))
    return Delivery(Assignment("front.inbox", 0), 0, record.key, record.value, record.headers, SystemClock().now())


class TestTheInbox:
    async def test_goes_on_after_its_place_in_the_topic_was_deleted(self) -> None:
        id = ids.new()
        gone = OffsetOutOfRange(Assignment("front.inbox", 0), wanted=1, first=7, end=9)
        transport: Any = Tails([gone], [answer_to(id)])
        inbox = Inbox(transport, "front.inbox", "me", MemoryMetrics())
        waiting = inbox.expect(id)
        await inbox.ready()
        try:
            async with asyncio.timeout(30):
                assert await waiting.next() is None  # it may have been answered meanwhile: ask again
                answer = await waiting.next()
            assert answer is not None
            assert answer.causation_id == id
        finally:
            await inbox.close()

    async def test_keeps_an_answer_for_the_second_who_waits_when_the_first_has_gone(self) -> None:
        id = ids.new()
        transport: Any = Tails([])
        inbox = Inbox(transport, "front.inbox", "me", MemoryMetrics())
        inbox.expect(id)
        second = inbox.expect(id)
        inbox.forget(id)  # the first one's time is up
        await inbox.ready()
        transport.turns[0].append(answer_to(id))
        try:
            async with asyncio.timeout(30):
                answer = await second.next()
            assert answer is not None
            assert answer.causation_id == id
        finally:
            inbox.forget(id)
            await inbox.close()


class TestARequest:
    async def test_ends_in_time_when_the_inbox_cannot_be_opened(self, pair: Pair) -> None:
        counter = Counter()
        async with pair.connect(counter.service, worker=False) as connection:

            @asynccontextmanager
            async def never(topic: str, *, start: Any) -> AsyncGenerator[Any]:
                await asyncio.Event().wait()
                yield None

            connection.transport.tail = never  # type: ignore[method-assign]
            async with asyncio.timeout(40):
                with pytest.raises(OutcomeUnknown):
                    await connection.request(counter.add(key_="a", n=1), timeout_s=0.2)

    async def test_repeated_with_its_id_after_the_worker_restarted_brings_the_first_answer(self, pair: Pair) -> None:
        counter = Counter()
        id = ids.new()
        async with pair.connect(counter.service) as first:
            one = await first.request(counter.add(key_="a", n=1), id=id, timeout_s=20)
            await first.request(counter.add(key_="a", n=2), timeout_s=20)
        async with pair.connect(counter.service) as second:
            again = await second.request(counter.add(key_="a", n=1), id=id, timeout_s=20)
            assert again == one
            third = await second.request(counter.add(key_="a", n=3), timeout_s=20)
            assert third.so_far == 3


class TestTwoWorkers:
    async def test_of_one_service_in_one_process_handle_each_message_once_and_in_order(self, pair: Pair) -> None:
        counter = Counter()
        async with pair.connect(counter.service) as one, pair.connect(counter.service) as other:

            async def count_up(key: str) -> list[int]:
                connections = (one, other)
                answers = [
                    await connections[n % 2].request(counter.add(key_=key, n=n), timeout_s=30) for n in range(10)
                ]
                return [answer.so_far for answer in answers]

            found = await asyncio.gather(*(count_up(key) for key in "abcd"))
            assert found == [list(range(1, 11))] * 4


class TestStopping:
    async def test_that_is_cancelled_leaves_nothing_running(self, pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
        """The second Ctrl-C: engines still drain within their bound, and relay and projections end all the same."""
        counter = Counter()
        settings = replace(QUICK, engine=replace(QUICK.engine, drain_timeout_s=1.0, commit_timeout_s=1.0))
        before = asyncio.all_tasks()
        reached, gate = asyncio.Event(), asyncio.Event()

        async def serve() -> None:
            async with pair.connect(counter.service, settings=settings) as connection:
                store = connection.store
                assert connection.worker is not None
                await connection.request(counter.add(key_="a", n=1), timeout_s=20)
                commit = store.commit

                async def held(*args: Any, **options: Any) -> Any:
                    reached.set()
                    await gate.wait()
                    return await commit(*args, **options)

                store.commit = held  # type: ignore[method-assign]
                await connection.send(counter.add(key_="a", n=2))
                await reached.wait()

        serving = asyncio.create_task(serve())
        await reached.wait()
        await asyncio.sleep(0.05)  # it is in its drain now
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        gate.set()

        async def running() -> list[str]:
            return [task.get_name() for task in asyncio.all_tasks() - before - {serving}]

        await eventually(running, lambda found: not found)
        # They were ended, and did not fail because their store was closed under them.
        assert [one.message for one in caplog.records if one.levelname == "CRITICAL"] == []
        assert not [one for one in caplog.records if one.name == "foldbus.relay"]


class TestStarting:
    async def test_says_which_server_does_not_answer(self, database: str, kafka: str) -> None:
        counter = Counter()
        nobody = "127.0.0.1:1"
        poll = PollSettings(request_timeout_s=1.0, publish_deadline_s=1.0)
        async with asyncio.timeout(50):
            with pytest.raises(TransportUnavailable):
                async with Pair("", database, f"kafka://{nobody}").connect(counter.service, poll=poll):
                    raise AssertionError("connected to nobody")
            dsn = f"postgresql://postgres@{nobody}/x"
            with pytest.raises(StoreUnavailable):
                async with Pair("", dsn, f"kafka://{kafka}").connect(counter.service, migrate=False):
                    raise AssertionError("connected to nobody")
            with pytest.raises(StoreUnavailable):
                async with Pair("", dsn, f"kafka://{kafka}").connect(counter.service, migrate=True):
                    raise AssertionError("connected to nobody")


class TestAReplyToNowhere:
    async def test_holds_up_nobody_and_harms_no_other_record(self, pair: Pair) -> None:
        """Whoever asks chooses the topic of the answer; a name that no broker takes must stay their own trouble."""
        counter = Counter()
        name = counter.service.name
        async with pair.connect(counter.service, worker=False) as connection:
            event = connection.envelope(counter.add(key_="a", n=1), topic=f"{name}.events")
            nowhere = replace(reply(), topic="no such topic!")
            await connection.store.commit([Unit(outgoing=(nowhere, event))])
        async with pair.connect(counter.service) as connection, pair.transport() as stranger:
            async with stranger.tail(f"{name}.events", start="begin") as reader:

                async def found() -> list[UUID]:
                    return [from_record(one).id for one in await reader.poll(max_records=10, timeout_s=0.1)]

                assert await eventually(found, bool) == [event.id]
            letters = await connection.store.dead_letters()
            assert [one.topic for one in letters] in ([], ["no such topic!"])

    async def test_is_given_up_after_a_while_so_that_the_relay_stays_free(self, store: Store) -> None:
        topics = Topics()
        topics.answer = lambda record: Failed(MissingTopics(["front.inbox"])) if record.topic == "front.inbox" else None
        settings = RelaySettings(wait_s=0.05, missing_retry_s=0.02, missing_reply_s=0.2, waiting_max=10)
        await store.commit([Unit(outgoing=(replace(reply(), topic="front.inbox"),)) for _ in range(30)])
        await store.commit([on("stock.commands")])
        async with relaying(store, topics, settings=settings):
            await until(lambda: marked(store))
        assert len(topics.ids()) == 1
        assert len(await store.dead_letters()) == 30
