"""Workers of a group that come, go, die, freeze and come back, on a real Kafka: nothing lost, one effect, in order.

Each worker is a process. The ledger they write has nothing unique in it, so a second effect would be a second row.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.stories.lives import Life, Lives, lives_of, until
from tests.stories.pairs import eventually, unique

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
async def lives(kafka: str, database: str, tmp_path: Path) -> AsyncIterator[Lives]:
    async with lives_of(unique("ledger"), store=database, bus=f"kafka://{kafka}", marks=tmp_path) as lives:
        yield lives
    for life in lives.all:  # seen where a test fails
        print(f"--- {life.pid}, {life.process.returncode}", *life.tail(40), sep="\n")


def took_all(life: Life) -> int:
    """How often it was given all partitions there are."""
    return sum("took over" in message and "commands[0-5]" in message for message in life.messages())


def took_over(life: Life) -> int:
    """How often it was given partitions."""
    return sum("took over" in message for message in life.messages())


async def test_sigterm_under_load_finishes_what_is_in_hand_and_commits_nothing_else(lives: Lives) -> None:
    (worker,) = await lives.working(1)
    for n in range(60):
        await lives.enter(f"a{n % 20}", 10, where="inside", for_s=0.1 if n < 20 else 1.0)
    await until(lambda: len(worker.said) > 30, what="at work")
    worker.signal(signal.SIGTERM)
    assert await worker.ended() == 0
    begun, ended = (
        {(line["account"], line["n"]) for line in worker.said if line["event"] == event}
        for event in ("began", "goes on")
    )
    done = {(account, n) for account, ns in (await lives.rows()).items() for n in ns}
    assert len(done) < 600, "it was to be stopped in the middle"
    assert begun == ended == done
    committed = await lives.committed()
    assert committed
    assert committed <= done
    lives.go_on()
    await lives.working(1)
    await lives.account()


async def test_what_a_killed_worker_had_in_hand_is_done_by_another_once(lives: Lives) -> None:
    victim, other = await lives.working(2)
    for n in range(60):
        await lives.enter(f"a{n}", 5, where="inside", for_s=0.01)

    async def at_work() -> bool:
        if not len(victim.said) > 5:  # the other one may have done all there was
            await lives.enter_all([f"a{n}" for n in range(60)], where="inside", for_s=0.01)
        return len(victim.said) > 5

    await eventually(at_work, bool, timeout_s=40)
    victim.signal(signal.SIGKILL)
    assert await victim.ended() == -signal.SIGKILL
    await lives.account()
    assert other.runs


@pytest.mark.parametrize("where", ["before", "inside"])
async def test_a_worker_stopped_inside_a_handler_past_its_session_comes_back_and_does_nothing_twice(
    lives: Lives, where: str
) -> None:
    """(5). `before` its transaction: another one does the message meanwhile, and the one that comes back finds that out
    from the claim. `inside`: it holds the message, commits when it comes back, and the other one finds that out. Its
    offsets are fenced both times."""
    zombie, other = await lives.working(2)
    await lives.enter("stuck", 1, where=where, for_s=60.0)
    await until(lambda: zombie.says("began", "stuck") or other.says("began", "stuck"), what="inside the handler")
    if other.says("began", "stuck"):
        zombie, other = other, zombie
    before, others = took_over(zombie), took_all(other)
    zombie.signal(signal.SIGSTOP)
    lives.go_on()
    await lives.enter("stuck", 9)
    for n in range(30):
        await lives.enter(f"a{n}", 3)
    try:
        await until(lambda: other.says("began", "stuck") or where == "inside", what="taken over")
        await until(lambda: took_all(other) > others, what="the zombie's partitions")
        if where == "before":
            await lives.account()  # all of it is done while the zombie sleeps
    finally:
        zombie.signal(signal.SIGCONT)
    await lives.account()
    await until(
        lambda: any("gave back" in one and "(lost)" in one for one in zombie.messages()), what="it hears of its loss"
    )
    await until(lambda: zombie.says("goes on", "stuck"), what="its handler went on")
    await until(lambda: took_over(zombie) > before, what="a member again")
    await lives.enter("later", 20)
    found = await lives.account()
    assert found["stuck"] == list(range(10))
    await until(lambda: zombie.heard("the whole process stood still for"), what="it tells of it")


async def test_a_handler_that_blocks_the_loop_past_its_session_is_named_and_loses_its_partitions_not_its_effect(
    lives: Lives,
) -> None:
    """T14. Heartbeats are of the same loop: the group takes the partitions away. The watchdog says who it was."""
    one, two = await lives.working(2)
    await lives.enter("blocking", 1, where="blocking", for_s=60.0)
    await until(lambda: one.says("began", "blocking") or two.says("began", "blocking"), what="blocking")
    if two.says("began", "blocking"):
        one, two = two, one
    await lives.enter("blocking", 4)
    for n in range(30):
        await lives.enter(f"a{n}", 3)
    await until(lambda: any("in enter (" in message for message in one.messages()), what="named in the log")
    await until(lambda: two.says("began", "blocking"), what="given to the other one")
    lives.go_on()
    await lives.account()
    await until(lambda: any("stood for" in message for message in one.messages()), what="it goes on")
    await until(lambda: any("(lost)" in message for message in one.messages()), what="it hears of its loss")
    assert any("ERROR" in line["level"] and "in enter (" in line["message"] for line in one.logged)


async def test_workers_that_come_and_go_all_the_time_lose_nothing_and_do_nothing_twice(lives: Lives) -> None:
    """Three start at once. Then one leaves in an orderly way and one comes, again and again, faster than a session."""
    await asyncio.gather(*(lives.start() for _ in range(3)))
    for turn in range(4):
        for n in range(30):
            await lives.enter(f"a{n}", 5)
        old = lives.all[turn]
        await until(lambda old=old: any("ready:" in one for one in old.messages()), what="ready")
        old.signal(signal.SIGTERM)
        await lives.start()
        assert await old.ended() == 0
    await lives.account()
