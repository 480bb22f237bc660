"""The inbox of one replica: what it takes, and what becomes of it when it has lost its place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

from bus.cloudevents import to_record
from bus.codec import reply_envelope
from bus.envelope import Envelope, Origin, ReplyOutcome, ReplyTo
from bus.errors import MissingTopics, OffsetOutOfRange
from bus.metrics import MemoryMetrics
from bus.transport import Assignment, Delivery
from foldbus.outbox import Inbox
from tests.eventstore.stores import IDS, NOON, message
from tests.stories.pairs import eventually


class Tails:
    """A transport whose every tail reads a list of its own: records, or what is raised. `gate` holds up new tails."""

    def __init__(self) -> None:
        self.lists: list[list[Any]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.refuse: Exception | None = None

    @asynccontextmanager
    async def tail(self, topic: str, *, start: Any) -> AsyncGenerator[Any]:
        await self.gate.wait()
        if self.refuse is not None:
            raise self.refuse
        mine: list[Any] = []
        self.lists.append(mine)

        class Reader:
            async def poll(self, *, max_records: int, timeout_s: float) -> Sequence[Delivery]:
                await asyncio.sleep(0.001)
                found = mine.pop(0) if mine else None
                if isinstance(found, Exception):
                    raise found
                return [found] if found is not None else []

        yield Reader()


def answer(id: UUID, instance: str = "me", *, outcome: Any = ReplyOutcome.OK, deadline: Any = None) -> Delivery:
    asked = replace(message(), id=id, reply_to=ReplyTo("front.inbox", instance, instance))
    reply = reply_envelope(asked, outcome, b"null", Origin("shop", IDS.new(), NOON, IDS.new()))
    return delivered(replace(reply, deadline=deadline))


def delivered(envelope: Envelope) -> Delivery:
    record = to_record(envelope)
    return Delivery(Assignment("front.inbox", 0), 0, record.key, record.value, record.headers, NOON)


GONE = OffsetOutOfRange(Assignment("front.inbox", 0), wanted=1, first=7, end=9)


@asynccontextmanager
async def inbox(tails: Tails, metrics: MemoryMetrics) -> AsyncGenerator[Inbox]:
    transport: Any = tails
    opened = Inbox(transport, "front.inbox", "me", metrics)
    await opened.ready()
    try:
        yield opened
    finally:
        await opened.close()


class TestTheInbox:
    async def test_does_not_even_parse_what_another_replica_waits_for(self) -> None:
        tails, metrics, id = Tails(), MemoryMetrics(), IDS.new()
        async with inbox(tails, metrics) as mine:
            waiting = mine.expect(id)
            broken = replace(answer(id, "other"), headers=(("ce_id", b"\xff"),))
            tails.lists[0] += [broken, answer(id, "other"), replace(broken, key=b"me"), answer(id)]
            async with asyncio.timeout(30):
                assert (await waiting.next()) is not None
        assert metrics.total("foldbus_skipped_total", why="undecodable") == 1
        assert metrics.total("foldbus_late_replies_total") == 0

    async def test_takes_expired_only_for_the_attempt_that_waits(self) -> None:
        tails, metrics, id = Tails(), MemoryMetrics(), IDS.new()
        earlier, later = NOON, NOON + timedelta(seconds=5)
        async with inbox(tails, metrics) as mine:
            waiting = mine.expect(id, later)
            tails.lists[0] += [
                answer(id, outcome=ReplyOutcome.EXPIRED, deadline=earlier),
                answer(id, outcome=ReplyOutcome.EXPIRED, deadline=later),
            ]
            async with asyncio.timeout(30):
                reply = await waiting.next()
            assert reply is not None
            assert reply.deadline == later
        assert metrics.total("foldbus_late_replies_total") == 1

    async def test_sends_nothing_until_it_is_read_again(self) -> None:
        tails, metrics = Tails(), MemoryMetrics()
        async with inbox(tails, metrics) as mine:
            tails.gate.clear()
            tails.lists[0].append(GONE)

            async def reopening() -> int:
                return metrics.total("foldbus_inbox_reopened_total")

            await eventually(reopening, bool)
            ready = asyncio.create_task(mine.ready())
            await asyncio.sleep(0.3)
            assert not ready.done()
            tails.gate.set()
            async with asyncio.timeout(30):
                await ready
            assert len(tails.lists) == 2

    async def test_that_cannot_be_opened_again_tries_at_growing_intervals_until_it_is_closed(self) -> None:
        tails, metrics = Tails(), MemoryMetrics()
        async with inbox(tails, metrics) as mine:
            tails.refuse = MissingTopics(["front.inbox"])
            tails.lists[0].append(GONE)

            async def reopening() -> int:
                return metrics.total("foldbus_inbox_reopened_total")

            await eventually(reopening, lambda found: found >= 3)
            tails.refuse = None
            async with asyncio.timeout(30):
                await mine.ready()
