"""A server dies under a running worker and comes back: the worker goes on by itself, and nothing is lost or doubled.

The story: counters are counted up, one sender per counter, each `Added` starts a saga that books it. While that goes on
the database or the broker is killed (kill -9) and started again. Nobody restarts the worker.
"""

# Without `from __future__ import annotations`: the services are made per test, of classes that only exist in there.
import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel

from bus.engine.settings import EngineSettings
from bus.envelope import StreamId
from bus.errors import OutcomeUnknown
from bus.transport import PollSettings
from eventstore.port import Wanted
from foldbus import Command, Connection, Decider, Event, Key, SagaRun, Service, projection, saga
from foldbus.relay import RelaySettings
from foldbus.worker import WorkerSettings
from tests.servers import Kafka, Postgres
from tests.stories.pairs import Pair, eventually, unique

COUNTERS = 6
EACH = 30

# A dead broker is noticed after the request timeout, a lost member after the session timeout.
POLL = PollSettings(
    session_timeout_s=6.0, heartbeat_s=1.0, rebalance_timeout_s=10.0, request_timeout_s=8.0, publish_deadline_s=5.0
)
SETTINGS = WorkerSettings(
    engine=EngineSettings(retry_base_s=0.02, retry_max_s=0.5, commit_interval_s=0.2, drain_timeout_s=3.0),
    relay=RelaySettings(lease_ttl_s=3.0, retry_max_s=0.5),
    timer_poll_s=0.1,
)


class Numbers(BaseModel, frozen=True):
    """What an aggregate or a row has seen, in order."""

    ns: tuple[int, ...] = ()


class Row(BaseModel, frozen=True):
    ns: list[int] = []


class Story:
    def __init__(self) -> None:
        name = unique("counter")

        class Added(Event, type=f"{name}.added.v1"):
            counter: Key[str]
            n: int

        class Add(Command[Added], type=f"{name}.add.v1"):
            counter: Key[str]
            n: int

        class Booked(Event, type=f"{name}.booked.v1"):
            book: Key[str]
            n: int

        class Book(Command[Booked], type=f"{name}.book.v1"):
            book: Key[str]
            n: int

        def evolve_counter(seen: Numbers, event: Added) -> Numbers:
            return Numbers(ns=(*seen.ns, event.n))

        def evolve_book(seen: Numbers, event: Booked) -> Numbers:
            return Numbers(ns=(*seen.ns, event.n))

        def add(seen: Numbers, command: Add) -> list[Added]:
            return [Added(counter=command.counter, n=command.n)]

        def book(seen: Numbers, command: Book) -> list[Booked]:
            return [Booked(book=command.book, n=command.n)]

        @saga("book-it", version=1)
        async def book_it(run: SagaRun, added: Added) -> None:
            await run.step(Book(book=f"book of {added.counter}", n=added.n), timeout_s=300)

        @projection("sums", version=1)
        def sums(row: Row | None, event: Added) -> Row | None:
            return Row(ns=[*(row.ns if row else []), event.n])

        self.add: Any = Add
        self.sums = sums
        self.counters = Decider("counter", initial=Numbers(), evolve=evolve_counter, decide=add)
        self.books = Decider("book", initial=Numbers(), evolve=evolve_book, decide=book)
        self.service = Service(
            name, deciders=[self.counters, self.books], sagas=[book_it], projections=[sums], partitions=3
        )

    async def numbers(self, connection: Connection, category: str, key: str) -> list[int]:
        (part,) = await connection.store.load([Wanted(StreamId(category, key))])
        decoded: list[Any] = [connection.service.codec.decode(record) for record in part.records]
        return [event.n for event in decoded]


async def count_up(connection: Connection, story: Story, counter: str, halfway: Callable[[], None]) -> None:
    """Sends until each is acknowledged, with the same id: what anybody does who must know."""
    for n in range(EACH):
        id = connection.ids.new()
        while True:
            try:
                await connection.send(story.add(counter=counter, n=n), id=id)
            except OutcomeUnknown:
                await asyncio.sleep(0.05)
            else:
                break
        if n == EACH // 3:
            halfway()
        await asyncio.sleep(0.02)


async def survives(pair: Pair, kill: Callable[[], None], start: Callable[[], None], *, down_s: float) -> None:
    story = Story()
    counters = [f"c{n}" for n in range(COUNTERS)]
    halfway = asyncio.Event()
    async with pair.connect(story.service, settings=SETTINGS, poll=POLL) as connection:
        await connection.request(story.add(counter="warm", n=0), timeout_s=60)
        sending = asyncio.gather(*(count_up(connection, story, counter, halfway.set) for counter in counters))
        await halfway.wait()
        await asyncio.to_thread(kill)
        await asyncio.sleep(down_s)  # the outage itself
        await asyncio.to_thread(start)
        await asyncio.wait_for(sending, 80)
        wanted = list(range(EACH))

        async def counted() -> dict[str, list[int]]:
            return {counter: await story.numbers(connection, "counter", counter) for counter in counters}

        async def booked() -> dict[str, list[int]]:
            return {c: sorted(await story.numbers(connection, "book", f"book of {c}")) for c in counters}

        async def shown() -> dict[str, list[int]]:
            view = connection.view(story.sums)
            rows = {counter: await view.get(counter) for counter in counters}
            return {counter: row.ns if row else [] for counter, row in rows.items()}

        complete = dict.fromkeys(counters, wanted)
        for look in (counted, shown, booked):
            await eventually(look, lambda found: found == complete)
        # The inbox, the relay and the view of this very connection are well again, too.
        receipt = await connection.request(story.add(counter="warm", n=1), timeout_s=60, receipt=True)
        row = await connection.view(story.sums).get("warm", after=receipt, timeout_s=60)
        assert row is not None
        assert row.ns == [0, 1]
        assert connection.worker is not None
        connection.worker.check()
        assert await connection.store.dead_letters() == []


@pytest.mark.timeout(240)
async def test_a_worker_goes_on_after_postgresql_was_killed(fresh_postgres: Postgres, kafka: str) -> None:
    pair = Pair("servers", fresh_postgres.dsn, f"kafka://{kafka}")
    await survives(pair, fresh_postgres.kill, fresh_postgres.start, down_s=2.0)


@pytest.mark.timeout(240)
async def test_a_worker_goes_on_after_kafka_was_killed(database: str, fresh_kafka: Kafka) -> None:
    pair = Pair("servers", database, f"kafka://{fresh_kafka.bootstrap}")
    await survives(pair, fresh_kafka.kill, fresh_kafka.start, down_s=2.0)


async def stops(pair: Pair, kill: Callable[[], None]) -> float:
    """How long a worker takes to stop once its server is gone, with messages under way."""
    story = Story()
    # Whatever cannot end by itself is cancelled so late that the test would notice.
    settings = replace(SETTINGS, stop_timeout_s=100.0)
    async with pair.connect(story.service, settings=settings, poll=POLL) as connection:
        await connection.request(story.add(counter="warm", n=0), timeout_s=60)
        await asyncio.to_thread(kill)
        with suppress(OutcomeUnknown):
            await connection.send(story.add(counter="late", n=0))
        began = time.monotonic()
    return time.monotonic() - began


async def nothing_runs() -> None:
    """Tasks that end by themselves in a moment are no leak."""

    async def running() -> list[str]:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        return [f"{task.get_name()} {task.get_coro()}" for task in others]

    await eventually(running, lambda found: not found)


@pytest.mark.timeout(240)
async def test_a_worker_stops_while_postgresql_is_dead(fresh_postgres: Postgres, kafka: str) -> None:
    assert await stops(Pair("servers", fresh_postgres.dsn, f"kafka://{kafka}"), fresh_postgres.kill) < 60
    await nothing_runs()


@pytest.mark.timeout(240)
async def test_a_worker_stops_while_kafka_is_dead(database: str, fresh_kafka: Kafka) -> None:
    assert await stops(Pair("servers", database, f"kafka://{fresh_kafka.bootstrap}"), fresh_kafka.kill) < 60
    await nothing_runs()
