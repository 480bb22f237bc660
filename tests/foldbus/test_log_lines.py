"""What a worker logs where hundreds of the same would drown the rest."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from bus.engine.partitions import names_of
from bus.envelope import ReplyTo
from bus.metrics import MemoryMetrics
from bus.summing import Summed
from bus.transport import Assignment
from foldbus import Service
from foldbus.outbox import Inbox
from sagas.testing import VirtualClock
from tests.foldbus.desk import until
from tests.sagas.stories import PLACED, Paid, Reserved, fulfil_order
from tests.sagas.world import World


def said(caplog: pytest.LogCaptureFixture, word: str) -> Sequence[str]:
    return [record.getMessage() for record in caplog.records if word in record.getMessage()]


def test_the_first_is_told_at_once_the_next_together_and_none_twice() -> None:
    clock = VirtualClock()
    summed = Summed(clock, every_s=5.0)
    assert summed.due() == {}
    summed.add("reply")
    assert summed.due() == {"reply": 1}
    for kind in ("reply", "reply", "timeout"):
        summed.add(kind)
    assert summed.due() == {}
    clock.time += timedelta(seconds=5)
    assert summed.due() == {"reply": 2, "timeout": 1}
    summed.add("reply")
    assert summed.due() == {}
    assert summed.due(now=True) == {"reply": 1}
    assert summed.due(now=True) == {}


def test_late_replies_to_sagas_are_one_line_per_while_and_each_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    world = World(fulfil_order)
    world.start(PLACED)
    first = world.sent[-1]
    world.answer(Reserved())
    for _ in range(100):
        world.answer(Reserved(), to=first)
    assert said(caplog, "late") == ["late: reply for a saga fulfil-order that is running, 1 times; they change nothing"]
    world.clock.time += timedelta(seconds=5)
    world.answer(Paid())
    assert len(said(caplog, "late")) == 2
    assert "that is running, 99 times" in said(caplog, "late")[-1]
    assert world.metrics.total("foldbus_saga_late_total", what="reply") == 100


def test_a_line_about_a_saga_names_it_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    world = World(fulfil_order)
    world.start(PLACED)
    world.answer(Reserved())
    (timer,) = world.timers.values()
    world.replier.handle(timer.envelope)
    (line,) = said(caplog, "timed out")
    assert line.startswith(f"saga fulfil-order {world.saga_id}: ")


async def test_late_replies_to_a_program_are_one_line_per_while(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock, metrics = VirtualClock(), MemoryMetrics()
    world = World(fulfil_order)
    async with Service("desk").connect(store=f"sqlite:{tmp_path}", bus=f"embedded:{tmp_path}") as connection:
        inbox = Inbox(connection.transport, "desk.inbox", "me", metrics, clock=clock)
        await inbox.ready()

        async def answered(n: int, total: int) -> None:
            to = ReplyTo("desk.inbox", "me", "me")
            for _ in range(n):
                world.start(PLACED)
                reply = world.reply(Reserved())
                await connection.publisher.publish(replace(reply, topic=to.topic, key=to.key, reply_to=to))

            async def counted() -> bool:
                return metrics.total("foldbus_late_replies_total") == total

            await until(counted)

        await answered(1, 1)

        async def told() -> bool:
            return bool(said(caplog, "deadlines"))

        await until(told)
        await answered(20, 21)
        assert len(said(caplog, "deadlines")) == 1
        await inbox.close()
    assert [line.split()[2] for line in said(caplog, "deadlines")] == ["1", "20"]


def test_a_rebalance_is_one_short_line() -> None:
    parts = [Assignment("a.commands", n, 3) for n in (7, 0, 1, 2, 10, 11)] + [Assignment("b.events", 4, 3)]
    assert names_of(parts) == "a.commands[0-2,7,10-11] epoch 3, b.events[4] epoch 3"
    assert names_of([]) == "nothing"
