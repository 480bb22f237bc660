"""The watchdog: what blocks the event loop is named while it does, and nothing else is."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable

import pytest

from bus.metrics import MemoryMetrics
from bus.seams import SystemClock
from foldbus.watchdog import Watchdog, WatchdogSettings, culprit
from tests.bus.transports import eventually

QUICK = WatchdogSettings(threshold_s=0.3, alert_s=0.9)


def watchdog(
    metrics: MemoryMetrics | None = None, clock: SystemClock | None = None, settings: WatchdogSettings = QUICK
) -> Watchdog:
    return Watchdog(name="orders", clock=clock or SystemClock(), metrics=metrics or MemoryMetrics(), settings=settings)


def wait_for(condition: Callable[[], bool], *, within_s: float = 20) -> None:
    """Blocks, as a careless handler does, until `condition` holds."""
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


async def careless(until: Callable[[], bool]) -> None:
    wait_for(until)


async def test_a_function_that_blocks_the_loop_is_named_while_it_does_with_its_stack_and_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metrics, settings = MemoryMetrics(), WatchdogSettings(threshold_s=0.5, alert_s=60.0)
    with watchdog(metrics, settings=settings) as dog:
        await asyncio.create_task(
            careless(lambda: any("in careless" in record.getMessage() for record in caplog.records))
        )
        named = dog.blocked
        await eventually(
            lambda: dog.blocked is None and metrics.total("foldbus_loop_blocked_total", service="orders") > 0,
            what="it goes on",
        )
    (warning,) = [one for one in caplog.records if "has not answered" in one.getMessage()]
    assert warning.levelno == logging.WARNING
    assert named is not None
    assert named.by.startswith("careless (")
    assert named.stack.partition("\n")[0].endswith("in careless")
    assert "in wait_for\n" in named.stack
    assert named.stack in warning.getMessage()
    assert [one for one in caplog.records if "goes on; it stood for" in one.getMessage()]
    assert metrics.total("foldbus_loop_blocked_total") == 1
    assert metrics.gauges["foldbus_loop_blocked_seconds", (("service", "orders"),)] >= settings.threshold_s


async def test_what_blocks_for_a_third_of_a_session_is_an_error_once(caplog: pytest.LogCaptureFixture) -> None:
    with watchdog():
        await careless(lambda: any(record.levelno == logging.ERROR for record in caplog.records))
        began = time.monotonic()
        await careless(lambda: time.monotonic() > began + 3 * QUICK.alert_s)
    levels = [record.levelname for record in caplog.records if "has not answered" in record.getMessage()]
    assert levels[:2] == ["WARNING", "ERROR"]
    assert len(levels) <= 4  # the second block may have been taken for one of its own


async def test_a_process_that_stood_still_as_a_whole_blames_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """The clock jumps as it does for a process that was stopped: while the watchdog itself waits."""

    class Jumping(SystemClock):
        ahead = 0.0

        def monotonic(self) -> float:
            return super().monotonic() + self.ahead

    clock, metrics = Jumping(), MemoryMetrics()
    with watchdog(metrics, clock, WatchdogSettings(threshold_s=3.0, alert_s=15.0)) as dog:
        async with asyncio.timeout(40):
            while metrics.total("foldbus_process_stood_still_total") == 0:
                clock.ahead += 100.0
                await asyncio.sleep(0.2)
        assert dog.blocked is None
    assert "the whole process stood still for" in caplog.text
    assert "has not answered" not in caplog.text


async def test_a_loop_that_answers_is_left_in_peace_and_the_thread_ends_with_the_context(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with watchdog() as dog:
        for _ in range(50):
            await asyncio.sleep(0.01)
        thread = dog._thread
        assert thread is not None
        assert thread.daemon
    await asyncio.to_thread(thread.join, 30)  # the context itself waits for a second only
    assert not thread.is_alive()
    assert dog.blocked is None


async def test_the_outermost_function_that_is_no_librarys_is_the_culprit() -> None:
    found: list[str] = []

    def look() -> None:
        found.append(culprit(sys._getframe()))

    async def handler() -> None:
        sorted([2, 1], key=lambda n: (look(), n)[1])

    await asyncio.get_running_loop().create_task(handler())
    assert found[0].startswith(f"{handler.__qualname__} (")

    thread = threading.Thread(target=look)  # not inside a loop: where the thread began
    thread.start()
    thread.join()
    assert found[-1].startswith(f"{look.__qualname__} (")


@pytest.mark.parametrize(("threshold_s", "alert_s"), [(0.0, 1.0), (2.0, 1.0)])
def test_bounds_that_make_no_sense_are_refused(threshold_s: float, alert_s: float) -> None:
    with pytest.raises(ValueError, match="wanted 0 < threshold_s <= alert_s"):
        WatchdogSettings(threshold_s=threshold_s, alert_s=alert_s)
