"""The gate before each engine: nothing begins before pauses are known, a pause ends what runs, resuming begins anew."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from bus.metrics import MemoryMetrics
from eventstore.errors import StoreUnavailable
from eventstore.flow import Pause
from foldbus.gate import Gate

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


class Desk:
    """A gate over pauses in memory, and work that says when it runs."""

    def __init__(self, *groups: str) -> None:
        self.pauses: dict[str, Pause] = {}
        self.down = False
        self.metrics = MemoryMetrics()
        store: Any = SimpleNamespace(flow=SimpleNamespace(paused=self._paused))
        self.gate = Gate(store, groups or ("a",), metrics=self.metrics)
        self.runs = self.drained = 0
        self.at_work = asyncio.Event()
        self.may_drain = asyncio.Event()
        self.may_drain.set()
        self.stop = asyncio.Event()
        self.error: Exception | None = None

    async def _paused(self) -> dict[str, Pause]:
        if self.down:
            raise StoreUnavailable("down")
        return dict(self.pauses)

    def pause(self, group: str = "a") -> None:
        self.pauses[group] = Pause(group, NOON, "ann", "")

    async def work(self) -> None:
        """As an engine's `run`: until stopped; when it is cancelled it drains first."""
        self.runs += 1
        self.at_work.set()
        try:
            await self.stop.wait()
            if self.error is not None:
                raise self.error
        except asyncio.CancelledError:
            await self.may_drain.wait()
            self.drained += 1
            if self.error is not None:
                raise self.error from None
            raise
        finally:
            self.at_work.clear()

    def start(self, group: str = "a") -> asyncio.Task[None]:
        return asyncio.create_task(self.gate.run(group, self.work))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110 - a few turns of the loop
            await asyncio.sleep(0)


async def turns(n: int = 20) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


async def test_nothing_begins_before_it_is_known_what_is_paused() -> None:
    desk = Desk()
    part = desk.start()
    await turns()
    assert desk.runs == 0
    desk.down = True
    with pytest.raises(StoreUnavailable):
        await desk.gate.look()
    await turns()
    assert desk.runs == 0
    desk.down = False
    await desk.gate.look()
    await until(lambda: desk.runs == 1)
    desk.stop.set()
    await part


async def test_a_group_that_was_paused_before_the_start_does_not_begin() -> None:
    desk = Desk()
    desk.pause()
    part = desk.start()
    await desk.gate.look()
    await turns()
    assert desk.runs == 0
    desk.pauses.clear()
    await desk.gate.look()
    await until(lambda: desk.runs == 1)
    desk.stop.set()
    await part


async def test_a_pause_drains_what_runs_and_resuming_begins_anew() -> None:
    desk = Desk()
    part = desk.start()
    await desk.gate.look()
    await until(lambda: desk.runs == 1)
    desk.may_drain.clear()
    desk.pause()
    await desk.gate.look()
    await turns()
    assert (desk.drained, part.done()) == (0, False)
    desk.may_drain.set()
    await until(lambda: desk.drained == 1)
    await turns()
    assert desk.runs == 1
    desk.pauses.clear()
    await desk.gate.look()
    await until(lambda: desk.runs == 2)
    desk.stop.set()
    await part


async def test_resumed_while_it_still_drains_it_begins_anew_afterwards_and_not_beside() -> None:
    desk = Desk()
    part = desk.start()
    await desk.gate.look()
    await until(lambda: desk.runs == 1)
    desk.may_drain.clear()
    desk.pause()
    await desk.gate.look()
    await turns()
    desk.pauses.clear()
    await desk.gate.look()
    await turns()
    assert desk.runs == 1
    desk.may_drain.set()
    await until(lambda: desk.runs == 2)
    desk.stop.set()
    await part


async def test_other_groups_go_on() -> None:
    one, other = Desk("a", "b"), Desk("a", "b")
    parts = [asyncio.create_task(one.gate.run("a", one.work)), asyncio.create_task(one.gate.run("b", other.work))]
    await one.gate.look()
    await until(lambda: one.runs == other.runs == 1)
    one.pause("a")
    one.pause("c")  # of another service's code
    await one.gate.look()
    await until(lambda: one.drained == 1)
    assert other.drained == 0
    assert set(one.gate.paused) == {"a"}
    one.gate.close()
    other.stop.set()
    await asyncio.gather(*parts)


async def test_closing_lets_a_paused_part_end_and_waits_for_one_that_runs() -> None:
    paused, running = Desk(), Desk()
    paused.pause()
    parts = [paused.start(), running.start()]
    await paused.gate.look()
    await running.gate.look()
    await until(lambda: running.runs == 1)
    paused.gate.close()
    running.gate.close()
    await asyncio.wait_for(parts[0], 30)
    await turns()
    assert not parts[1].done()
    running.stop.set()
    await asyncio.wait_for(parts[1], 30)
    assert (paused.runs, running.drained) == (0, 0)


@pytest.mark.parametrize("draining", [False, True])
async def test_an_error_of_the_work_comes_out_also_while_it_drains_for_a_pause(draining: bool) -> None:
    desk = Desk()
    part = desk.start()
    await desk.gate.look()
    await until(lambda: desk.runs == 1)
    desk.error = RuntimeError("a bug")
    if draining:
        desk.pause()
        await desk.gate.look()
    else:
        desk.stop.set()
    with pytest.raises(RuntimeError, match="a bug"):
        await asyncio.wait_for(part, 30)


async def test_a_cancelled_part_takes_its_work_along_and_drains_it() -> None:
    desk = Desk()
    part = desk.start()
    await desk.gate.look()
    await until(lambda: desk.runs == 1)
    part.cancel()
    with pytest.raises(asyncio.CancelledError):
        await part
    assert (desk.drained, desk.at_work.is_set()) == (1, False)


async def test_a_part_cancelled_while_its_work_drains_for_a_pause_leaves_nothing_behind() -> None:
    desk = Desk()
    part = desk.start()
    await desk.gate.look()
    await until(lambda: desk.runs == 1)
    desk.may_drain.clear()
    desk.pause()
    await desk.gate.look()
    await turns()
    part.cancel()
    with pytest.raises(asyncio.CancelledError):
        await part
    assert not desk.at_work.is_set()


async def test_each_change_is_a_gauge() -> None:
    desk = Desk()
    await desk.gate.look()
    assert desk.metrics.gauges["foldbus_group_paused", (("group", "a"),)] == 0.0
    desk.pause()
    await desk.gate.look()
    assert desk.metrics.gauges["foldbus_group_paused", (("group", "a"),)] == 1.0
