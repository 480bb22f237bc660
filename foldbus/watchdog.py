"""The watchdog: names what blocks the event loop, while it does.

Everything of a worker shares one loop, Kafka's heartbeats too: a handler that computes or waits without `await` for as
long as a session lasts loses its partitions, and nobody who runs inside the loop can say so. So a daemon thread asks
the loop for a sign of life again and again. When none comes it looks at the stack of the loop's thread and logs it.

A process that stood still as a whole (stopped, swapped out, starved, or held by a call that lets no other thread run)
is told apart: then this thread woke late itself.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import bus
from bus.metrics import Metrics
from bus.seams import Clock

log = logging.getLogger("foldbus.watchdog")

STACK_FRAMES_MAX = 40

_HOME = Path(bus.__file__).parent.parent
_OURS = tuple(f"{_HOME / room}/" for room in ("bus", "eventstore", "sagas", "projections", "foldbus"))
_STANDARD = f"{sysconfig.get_path('stdlib')}/"
_THE_LOOPS = ("asyncio/events.py", "asyncio/base_events.py", "asyncio/runners.py")
_DRIVERS = ("sqlalchemy", "asyncpg", "aiosqlite", "aiokafka", "pydantic", "uvloop", "greenlet")


@dataclass(frozen=True, slots=True)
class WatchdogSettings:
    """A loop that gives no sign of life for `threshold_s` is named in a warning, for `alert_s` in an error: a third of
    the transport's session timeout, from where on partitions are at stake."""

    threshold_s: float = 1.0
    alert_s: float = 15.0

    def __post_init__(self) -> None:
        if not 0 < self.threshold_s <= self.alert_s:
            found = f"threshold_s is {self.threshold_s:g} and alert_s {self.alert_s:g}"
            raise ValueError(f"{found}; wanted 0 < threshold_s <= alert_s")


@dataclass(frozen=True, slots=True)
class Blocked:
    """The loop stands still. `by` names the user's function that it is in, else the innermost one."""

    since: float
    by: str
    stack: str


class Watchdog:
    """A context around what is watched. `blocked` may be read from any thread."""

    def __init__(self, *, name: str, clock: Clock, metrics: Metrics, settings: WatchdogSettings) -> None:
        self.blocked: Blocked | None = None
        """What blocks the loop now; None when it answers."""
        self._name, self._clock, self._metrics, self._settings = name, clock, metrics, settings
        self._end = threading.Event()
        self._answered = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loops_thread = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        self._loop, self._loops_thread = asyncio.get_running_loop(), threading.get_ident()
        self._end.clear()
        self._thread = threading.Thread(target=self._watch, name=f"watchdog of {self._name}", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        self._end.set()
        self._answered.set()  # after the end, which it looks at once more: it never waits out a slice while we wait
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    # --- in its own thread ------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        slice_s = self._settings.threshold_s / 2
        while True:
            self._answered.clear()
            if self._end.is_set():
                return
            asked = self._clock.monotonic()
            if not self._ask(self._answered.set):
                return
            self._await_answer(asked, slice_s)
            self._sleep(self._end, slice_s)

    def _await_answer(self, asked: float, slice_s: float) -> None:
        settings, excused, alerted = self._settings, 0.0, False
        while True:
            answered, late_s = self._sleep(self._answered, slice_s)
            if answered or self._end.is_set():
                break
            excused += late_s  # this thread did not run either: no handler's doing
            waited = self._clock.monotonic() - asked - excused
            if waited >= settings.alert_s and not alerted:
                alerted = True
                self._name_it(asked, waited, logging.ERROR)
            elif waited >= settings.threshold_s and self.blocked is None:
                self._name_it(asked, waited, logging.WARNING)
        blocked, self.blocked = self.blocked, None
        if blocked is not None:
            lasted = self._clock.monotonic() - asked - excused
            log.warning("%s: the event loop goes on; it stood for %.1f s in %s", self._name, lasted, blocked.by)
            self._ask(lambda: self._metrics.gauge("foldbus_loop_blocked_seconds", lasted, service=self._name))

    def _name_it(self, since: float, waited: float, level: int) -> None:
        frame = sys._current_frames().get(self._loops_thread)  # pyright: ignore[reportPrivateUsage] (the only way there is)
        if frame is None or self._answered.is_set():
            return
        by = culprit(frame)
        depth = min(len(_inside_the_loop(frame)), STACK_FRAMES_MAX)
        stack = "".join(traceback.format_list(traceback.extract_stack(frame, limit=depth)))
        del frame  # it would keep alive what the handler holds
        first, self.blocked = self.blocked is None, Blocked(since, by, stack)
        log.log(
            level,
            "%s: the event loop has not answered for %.1f s; it is in %s. Nothing else runs meanwhile, heartbeats "
            "neither: await in there, or let a function without async do it, which runs in a thread\n%s",
            self._name, waited, by, stack,
        )  # fmt: skip
        if first:
            self._ask(lambda: self._metrics.count("foldbus_loop_blocked_total", service=self._name))

    def _sleep(self, event: threading.Event, seconds: float) -> tuple[bool, float]:
        """Waits for `event`; answers whether it came, and how much too late this thread woke, if that is much."""
        began = self._clock.monotonic()
        came = event.wait(seconds)
        late_s = self._clock.monotonic() - began - seconds
        if late_s <= self._settings.threshold_s:
            return came, 0.0
        log.warning(
            "%s: the whole process stood still for %.1f s: stopped, swapped out, without a processor, or in a call "
            "that lets no other thread run",
            self._name, late_s,
        )  # fmt: skip
        self._ask(lambda: self._metrics.count("foldbus_process_stood_still_total", service=self._name))
        return came, late_s

    def _ask(self, callback: Callable[[], None]) -> bool:
        """Metrics are the loop's, too: counted there, as soon as it answers. False when it is closed."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            return False
        return True


def culprit(frame: FrameType) -> str:
    """`function (file:line)` of the outermost frame inside the loop that is neither ours nor a library's: the handler.
    Without one, the innermost frame."""
    outwards = _inside_the_loop(frame)
    chosen = next((one for one in reversed(outwards) if _is_a_users(one.f_code.co_filename)), frame)
    return f"{chosen.f_code.co_qualname} ({chosen.f_code.co_filename}:{chosen.f_lineno})"


def _inside_the_loop(frame: FrameType) -> list[FrameType]:
    """From `frame` outwards, up to where the loop called it."""
    found: list[FrameType] = []
    at: FrameType | None = frame
    while at is not None and not at.f_code.co_filename.endswith(_THE_LOOPS):
        found.append(at)
        at = at.f_back
    return found


def _is_a_users(path: str) -> bool:
    if path.startswith((*_OURS, "<")):
        return False
    package = path.rpartition("/site-packages/")[2] if "/site-packages/" in path else ""
    if package:
        return package.partition("/")[0] not in _DRIVERS
    return not path.startswith(_STANDARD)
