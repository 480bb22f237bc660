"""Request and reply: deadlines that have passed, many replicas, an inbox that breaks, processes that are killed."""

# Without `from __future__ import annotations`: services are made per test, of classes that only exist in there.
import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel

from bus.envelope import Envelope
from bus.errors import OffsetOutOfRange
from bus.seams import SystemClock
from bus.transport import Assignment
from eventstore.port import ClaimState
from foldbus import (
    Cancelled,
    Command,
    Connection,
    Decider,
    Died,
    Event,
    Key,
    MemoryMetrics,
    MissingTopics,
    OutcomeUnknown,
    Refused,
    Service,
    Status,
    command_status,
)
from tests.docs.blocks import ROOT
from tests.eventstore.stores import IDS
from tests.stories.pairs import QUICK, Pair, eventually, unique


class Total(BaseModel, frozen=True):
    n: int = 0


class ShiftedClock(SystemClock):
    """The system's, so many seconds ahead."""

    def __init__(self, ahead_s: float = 0.0) -> None:
        self.ahead_s = ahead_s

    def now(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self.ahead_s)


class Till:
    """A service that adds, and one that asks it to."""

    def __init__(self, name: str | None = None, client: str | None = None, *, hold: bool = False) -> None:
        till, client = name or unique("till"), client or unique("client")

        class Added(Event, type=f"{till}.added.v1"):
            key_: Key[str]
            n: int
            total: int

        class Add(Command[Added], type=f"{till}.add.v1"):
            key_: Key[str]
            n: int

        class TooMuch(Refused, code=f"{till}.too-much"): ...

        def evolve(total: Total, event: Added) -> Total:
            return Total(n=event.total)

        def decide(total: Total, command: Add) -> list[Added]:
            if command.n > 100:
                raise TooMuch(n=command.n)
            if command.n == 13:
                raise RuntimeError("a bug at thirteen")
            return [Added(key_=command.key_, n=command.n, total=total.n + command.n)]

        self.adding = Decider("total", initial=Total(), evolve=evolve, decide=decide)
        self.till = Service(
            till,
            deciders=[self.adding],
            queries=[command_status],
            refusals=[TooMuch],
            partitions=2,
            hold=["commands"] if hold else [],
        )
        self.client = Service(client, messages=[Add, Added], refusals=[TooMuch], partitions=2)
        self.say = SimpleNamespace(Add=Add, Added=Added, TooMuch=TooMuch)

    async def asked_in_vain(self, client: Connection) -> None:
        """One is added for key a, and nobody is there to do it; the time is for the sending alone."""
        await client.inbox.ready()
        await client.request(self.say.Add(key_="a", n=1), timeout_s=2.0)

    async def total(self, till: Connection, key: str = "a") -> int:
        return (await till.load(self.adding, key)).state.n


# --- expired ----------------------------------------------------------------------------------------------------------


async def test_a_request_that_expired_is_not_begun_and_its_repeat_is_handled(pair: Pair) -> None:
    its = Till()
    metrics, clock = MemoryMetrics(), ShiftedClock(60.0)
    async with pair.connect(its.client, worker=False) as client, pair.connect(its.till, worker=False) as till:
        with pytest.raises(OutcomeUnknown, match="no answer within") as unknown:
            await its.asked_in_vain(client)
        id = unknown.value.id
        await client.send(its.say.Add(key_="a", n=10))  # nobody waits for this one, it has no deadline
        async with pair.connect(its.till, metrics=metrics, clock=clock):

            async def added() -> int:
                return await its.total(till)

            async def expired() -> int:
                return metrics.total("foldbus_expired_requests_total", consumer=its.till.name)

            assert await eventually(added, bool) == 10
            assert await eventually(expired, bool) == 1
            assert (await till.status(id)).state is ClaimState.NEW
            # It carries a later deadline, and is judged by that.
            added_now = await client.request(its.say.Add(key_="a", n=1), id=id, timeout_s=90)
            assert added_now.total == 11
            assert list(await till.store.dead_letters()) == []


async def test_whoever_still_waits_is_told_at_once_that_the_clocks_are_apart(pair: Pair) -> None:
    its = Till()
    clock = ShiftedClock(3600.0)
    async with pair.connect(its.client, worker=False) as client, pair.connect(its.till, clock=clock):
        with pytest.raises(OutcomeUnknown, match=r"had expired 35\d\d\.\d+ s before.*or are the clocks apart"):
            async with asyncio.timeout(55):
                await client.request(its.say.Add(key_="a", n=1), timeout_s=58)
        clock.ahead_s = 6.0  # 1 s more than the tolerance, and the request may take 30
        assert (await client.request(its.say.Add(key_="a", n=1), timeout_s=30)).total == 1


async def test_within_the_tolerance_an_old_request_is_still_handled(pair: Pair) -> None:
    its = Till()
    async with pair.connect(its.client, worker=False) as client, pair.connect(its.till, worker=False) as till:
        with pytest.raises(OutcomeUnknown):
            await its.asked_in_vain(client)
        settings = replace(QUICK, clock_tolerance_s=300.0)
        async with pair.connect(its.till, settings=settings, clock=ShiftedClock(60.0)):

            async def added() -> int:
                return await its.total(till)

            assert await eventually(added, bool) == 1


# --- the inbox --------------------------------------------------------------------------------------------------------


async def test_nothing_is_sent_before_the_inbox_has_its_place_in_the_topic(pair: Pair) -> None:
    """An answer that comes before would be missed."""
    its = Till()
    async with pair.connect(its.till), pair.connect(its.client, worker=False) as client:
        opens, tail = asyncio.Event(), client.transport.tail

        @asynccontextmanager
        async def late(topic: str, *, start: Any) -> AsyncGenerator[Any]:
            await opens.wait()
            async with tail(topic, start=start) as consumer:
                yield consumer

        client.transport.tail = late  # type: ignore[method-assign]

        async def sent() -> int:
            ends = await client.transport.admin.offsets(f"{its.till.name}.commands")
            return sum(end for _, end in ends.values())

        with pytest.raises(OutcomeUnknown, match=r"inbox could not be opened within 0\.3 s, nothing was sent"):
            await client.request(its.say.Add(key_="a", n=1), timeout_s=0.3)
        asking = asyncio.create_task(client.request(its.say.Add(key_="a", n=1), timeout_s=50))
        await asyncio.sleep(0.3)
        assert await sent() == 0
        opens.set()
        assert (await asking).total == 1
        assert await sent() == 1


async def test_a_request_whose_answer_may_have_been_missed_is_asked_again_by_itself(pair: Pair) -> None:
    """The reader of the inbox loses its place after the request was sent; the answer passes by unread."""
    its, metrics = Till(), MemoryMetrics()
    async with pair.connect(its.till), pair.connect(its.client, worker=False, metrics=metrics) as client:
        await client.request(its.say.Add(key_="a", n=1), timeout_s=30)
        blind, healthy = asyncio.Event(), client.inbox._take  # pyright: ignore[reportPrivateUsage]

        def take(reply: Envelope) -> None:
            if not blind.is_set():
                blind.set()
                raise OffsetOutOfRange(Assignment("front.inbox", 0), wanted=1, first=7, end=9)
            healthy(reply)

        client.inbox._take = take  # type: ignore[method-assign]
        assert (await client.request(its.say.Add(key_="a", n=1), timeout_s=50)).total == 2
        assert metrics.total("foldbus_requests_repeated_total") == 1
        assert metrics.total("foldbus_inbox_reopened_total") == 1
        assert (await client.request(its.say.Add(key_="a", n=1), timeout_s=30)).total == 3


# --- many -------------------------------------------------------------------------------------------------------------


async def test_two_clients_and_two_workers_every_answer_finds_the_one_who_asked(pair: Pair) -> None:
    its = Till()
    metrics = [MemoryMetrics(), MemoryMetrics()]
    async with pair.connect(its.till) as till, pair.connect(its.till) as second:

        async def shares() -> list[int]:
            engines = [each.worker.engines[0] for each in (till, second) if each.worker is not None]
            return [len(engine.assignments) for engine in engines]

        # A rebalance may bring a message, and its answer, twice.
        await eventually(shares, lambda found: found == [1, 1])
        async with pair.connect(its.client, worker=False, metrics=metrics[0]) as one:
            async with pair.connect(its.client, worker=False, metrics=metrics[1]) as other:
                assert one.inbox.instance != other.inbox.instance

                async def ask(client: Connection, who: str, n: int) -> None:
                    key = f"{who}-{n % 7}"
                    assert (await client.request(its.say.Add(key_=key, n=n), timeout_s=50)).n == n

                async with asyncio.TaskGroup() as group:
                    for n in range(40):
                        group.create_task(ask(one, "one", 100 - n if n != 87 else 1))
                        group.create_task(ask(other, "other", n if n != 13 else 14))
    assert [one.total("foldbus_late_replies_total") for one in metrics] == [0, 0]


async def test_a_reply_after_its_deadline_is_counted_and_dropped_and_kept_for_the_repeat(pair: Pair) -> None:
    its, metrics = Till(), MemoryMetrics()
    async with pair.connect(its.client, worker=False, metrics=metrics) as client:
        with pytest.raises(OutcomeUnknown) as unknown:
            async with pair.connect(its.till, worker=False):
                await its.asked_in_vain(client)
        async with pair.connect(its.till):

            async def late() -> int:
                return metrics.total("foldbus_late_replies_total")

            await eventually(late, lambda found: found == 1)
            again = await client.request(its.say.Add(key_="a", n=1), id=unknown.value.id, timeout_s=30)
            assert again.total == 1


# --- killed -----------------------------------------------------------------------------------------------------------

PROGRAM = """
import asyncio, sys
from uuid import UUID
from bus.seams import KillAt, NoFailpoints
from bus.transport import PollSettings
from tests.foldbus.test_requests import Till
from dataclasses import replace
from foldbus.relay import RelaySettings
from tests.stories.pairs import QUICK

role, till, client, store, bus, failpoint = sys.argv[1:7]
its = Till(till, client)
POLL = PollSettings(session_timeout_s=1.5, heartbeat_s=0.3)
SETTINGS = replace(QUICK, relay=RelaySettings(lease_ttl_s=1.5))

async def serve():
    chosen = KillAt(failpoint) if failpoint else NoFailpoints()
    options = dict(store=store, bus=bus, migrate=True, apply_topics=True, failpoint=chosen, poll=POLL)
    async with its.till.connect(worker=True, settings=SETTINGS, **options):
        print("ready", flush=True)
        await asyncio.Event().wait()

async def ask():
    async with its.client.connect(store=store, bus=bus, migrate=True, apply_topics=True) as connection:
        print("ready", flush=True)
        await connection.request(its.say.Add(key_="a", n=1), id=UUID(failpoint), timeout_s=60)

asyncio.run(serve() if role == "serve" else ask())
"""


def process(role: str, its: Till, pair: Pair, last: str = "") -> subprocess.Popen[bytes]:
    started = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, role, its.till.name, its.client.name, pair.store, pair.bus, last],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert started.stdout is not None
    with started.stdout as said:
        assert said.readline() == b"ready\n"
    return started


@pytest.mark.parametrize("moment", ["after-commit", "before-publish"])
async def test_a_server_killed_between_commit_and_reply_answers_when_it_is_back(pair: Pair, moment: str) -> None:
    its, id = Till(), IDS.new()
    async with pair.connect(its.client, worker=False) as client:
        dying = await asyncio.to_thread(process, "serve", its, pair, f"{moment}:1")
        try:
            asking = asyncio.create_task(client.request(its.say.Add(key_="a", n=1), id=id, timeout_s=58))
            assert await asyncio.to_thread(dying.wait, 40) == -signal.SIGKILL
            assert not asking.done()
            async with pair.connect(its.till) as till:
                first = await asking
                again = await client.request(its.say.Add(key_="a", n=1), id=id, timeout_s=30)
                assert (first.total, again.total) == (1, 1)
                assert await its.total(till) == 1
        finally:
            dying.kill()
            dying.wait()


async def test_a_client_killed_while_it_waits_is_followed_by_one_that_asks_again(pair: Pair) -> None:
    its, id, metrics = Till(), IDS.new(), MemoryMetrics()
    async with pair.connect(its.till, worker=False), pair.connect(its.client, worker=False, metrics=metrics) as client:
        await client.inbox.ready()
        dying = await asyncio.to_thread(process, "ask", its, pair, str(id))

        async def sent() -> int:
            ends = await client.transport.admin.offsets(f"{its.till.name}.commands")
            return sum(end for _, end in ends.values())

        try:
            await eventually(sent, bool)
        finally:
            dying.kill()
            dying.wait()
        async with pair.connect(its.till) as till:

            async def added() -> int:
                return await its.total(till)

            await eventually(added, bool)
            assert (await client.request(its.say.Add(key_="a", n=1), id=id, timeout_s=30)).total == 1
            assert await its.total(till) == 1
            assert metrics.total("foldbus_late_replies_total") == 0  # the dead one's answer is nobody's here


# --- status -----------------------------------------------------------------------------------------------------------


async def test_the_status_of_a_command_its_owners_and_over_the_bus(pair: Pair) -> None:
    its = Till()
    add, new, ok, no = its.say.Add, *(IDS.new() for _ in range(3))
    async with pair.connect(its.till) as till, pair.connect(its.client, worker=False) as client:
        await client.request(add(key_="a", n=1), id=ok, timeout_s=30)
        with pytest.raises(its.say.TooMuch):
            await client.request(add(key_="a", n=101), id=no, timeout_s=30)
        cancelled = IDS.new()
        undo = client.envelope(add(key_="b", n=2), topic=f"{its.till.name}.commands")
        await client.publisher.publish(replace(undo, undoes=cancelled))

        async def fenced() -> ClaimState:
            return (await till.status(cancelled)).state

        await eventually(fenced, lambda state: state is ClaimState.CANCELLED)
        with pytest.raises(Cancelled):
            await client.request(add(key_="b", n=2), id=cancelled, timeout_s=30)

        async def over_the_bus(id: UUID) -> Status:
            return await client.status(id, of=add, timeout_s=30)

        async def here(id: UUID) -> Status:
            return await till.status(id)

        for ask in (here, over_the_bus):
            assert [(await ask(id)).state for id in (new, ok, no, cancelled)] == ["new", "done", "done", "cancelled"]
            assert (await ask(ok)).answer == its.say.Added(key_="a", n=1, total=1)
            refusal = (await ask(no)).answer
            assert isinstance(refusal, its.say.TooMuch)
            assert refusal.attributes == {"n": 101}
        assert (await client.status(ok, of=its.till.name, timeout_s=30)).answer.total == 1
        assert (await till.status(ok)).reply is not None
        with pytest.raises(MissingTopics):
            await client.status(ok, of="no-such-service", timeout_s=30)


async def test_the_status_of_a_command_that_died_says_why(pair: Pair) -> None:
    its, id = Till(), IDS.new()
    settings = replace(QUICK, parking=replace(QUICK.parking, total_s=0.0))
    async with pair.connect(its.till, settings=settings) as till:
        async with pair.connect(its.client, worker=False) as client:
            with pytest.raises(Died, match="a bug at thirteen"):
                await client.request(its.say.Add(key_="a", n=13), id=id, timeout_s=50)
            for status in (await till.status(id), await client.status(id, of=its.say.Add, timeout_s=30)):
                assert (status.state, status.answer) == (ClaimState.DEAD, None)
                assert "a bug at thirteen" in (status.error or "")


async def test_the_status_of_a_command_that_is_parked(pair: Pair) -> None:
    its, id = Till(hold=True), IDS.new()
    async with pair.connect(its.till) as till, pair.connect(its.client, worker=False) as client:
        await client.send(its.say.Add(key_="a", n=13), id=id)

        async def state() -> ClaimState:
            return (await client.status(id, of=its.say.Add, timeout_s=30)).state

        await eventually(state, lambda found: found is ClaimState.PARKED)
        assert (await till.status(id)).state is ClaimState.PARKED
