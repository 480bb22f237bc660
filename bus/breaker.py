"""Circuit breaker: when a dependency is down, messages wait for it instead of failing one after the other.

`Breaker` is what a service declares, `Circuit` is one process's view of that dependency:

- **closed**: calls are made. When `failures` of them failed within `window_s`, and they are at least the share `rate`
  of the calls in that time, it opens.
- **open**: no call is made for `open_s`; twice as long after each probe that failed, at most `open_max_s`.
- **half-open**: one call is made, the probe; whoever else asks waits for what becomes of it. It closes, or opens again.

What was begun before the circuit opened says nothing about it any more, whatever becomes of it. Time is the given
clock's, and nothing here waits: whoever asks is told for how long. (Libraries were considered: none lets exactly one
probe through, tells how long to wait and takes a clock.)
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from bus.errors import FoldbusError
from bus.metrics import Metrics
from bus.seams import Clock

log = logging.getLogger("foldbus.breaker")

_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")
_SLICES = 10


class BadBreaker(FoldbusError):
    """A breaker is declared so that it cannot work."""


@dataclass(frozen=True, slots=True)
class Breaker:
    """A dependency by name, and which errors say that it is down.

    `counts` should be errors of the dependency (no connection, no answer in time, a 5xx), not of a message: a message
    that nobody can handle would hold up the others, one probe after the other.
    """

    name: str
    counts: tuple[type[Exception], ...]
    failures: int = 5
    rate: float = 0.5
    window_s: float = 30.0
    open_s: float = 10.0
    open_max_s: float = 300.0

    def __post_init__(self) -> None:
        if _NAME.fullmatch(self.name) is None:
            raise BadBreaker(
                f"{self.name!r} is no name for a breaker; wanted up to 40 of a-z, 0-9 and -, a letter first"
            )
        counts: tuple[Any, ...] = self.counts
        if not counts or not all(isinstance(one, type) and issubclass(one, Exception) for one in counts):
            raise BadBreaker(
                f"breaker {self.name!r} counts {self.counts!r}; wanted classes of exceptions, at least one"
            )
        if not (self.failures >= 1 and 0 < self.rate <= 1 and self.window_s > 0 and 0 < self.open_s <= self.open_max_s):
            raise BadBreaker(
                f"breaker {self.name!r}: failures={self.failures}, rate={self.rate:g}, window_s={self.window_s:g}, "
                f"open_s={self.open_s:g}, open_max_s={self.open_max_s:g}; wanted failures of 1 or more, a rate above 0 "
                "and at most 1, and times above 0 with open_s at most open_max_s"
            )


class State(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


_GAUGE = {State.CLOSED: 0.0, State.HALF_OPEN: 0.5, State.OPEN: 1.0}


class Circuit:
    """Of one breaker in one process. Not for several threads."""

    def __init__(self, breaker: Breaker, *, clock: Clock, metrics: Metrics) -> None:
        self.breaker = breaker
        self._clock, self._metrics = clock, metrics
        self._state = State.CLOSED
        self._era = 0
        self._until = 0.0
        self._open_s = breaker.open_s
        self._probe: Call | None = None
        self._window = _Window(breaker.window_s)
        metrics.gauge("foldbus_breaker_open", 0.0, breaker=breaker.name)

    @property
    def state(self) -> State:
        if self._state is State.OPEN and self._clock.monotonic() >= self._until:
            self._turn(State.HALF_OPEN)
            log.info("breaker %s is half-open: the next call is a probe", self.breaker.name)
        return self._state

    @property
    def free(self) -> int | None:
        """How many calls may begin now; None: as many as there are."""
        match self.state:
            case State.CLOSED:
                return None
            case State.OPEN:
                return 0
            case State.HALF_OPEN:
                return 0 if self._probe is not None else 1

    @property
    def wait_s(self) -> float:
        """How long until it is worth asking again; 0: now. While a probe is under way nobody knows: a moment."""
        if self.free != 0:
            return 0.0
        return max(0.0, self._until - self._clock.monotonic()) if self._state is State.OPEN else PROBE_WAIT_S

    def begin(self) -> Call | None:
        """A call is about to be made, and must be ended; None: it must not be made now."""
        if self.free == 0:
            return None
        call = Call(self, self._era)
        if self._state is State.HALF_OPEN:
            self._probe = call
        return call

    # --- what became of calls -----------------------------------------------------------------------------------------

    def ended(self, call: Call, error: BaseException | None, *, known: bool) -> None:
        """`error` None: it answered. Not `known`: it was cut short, which says nothing about the dependency."""
        if self._probe is call:
            self._probe = None
        if call.era != self._era or not known:
            return
        failed = isinstance(error, self.breaker.counts)
        if self._state is State.HALF_OPEN:
            if failed:
                self._open_s = min(self._open_s * 2, self.breaker.open_max_s)
                self._open(f"its probe failed: {type(error).__name__}: {error}")
            else:
                self._close()
            return
        now = self._clock.monotonic()
        self._window.add(now, failed=failed)
        if failed:
            failures, calls = self._window.sums(now)
            breaker = self.breaker
            if failures >= breaker.failures and failures >= breaker.rate * calls:
                self._open(
                    f"{failures} of {calls} calls failed within {breaker.window_s:g} s, "
                    f"the last one with {type(error).__name__}: {error}"
                )

    def _open(self, why: str) -> None:
        self._turn(State.OPEN)
        self._until = self._clock.monotonic() + self._open_s
        self._metrics.count("foldbus_breaker_opened_total", breaker=self.breaker.name)
        log.error("breaker %s is open for %.1f s: %s", self.breaker.name, self._open_s, why)

    def _close(self) -> None:
        self._turn(State.CLOSED)
        self._open_s = self.breaker.open_s
        self._window = _Window(self.breaker.window_s)
        self._metrics.count("foldbus_breaker_closed_total", breaker=self.breaker.name)
        log.warning("breaker %s is closed: its probe was answered", self.breaker.name)

    def _turn(self, state: State) -> None:
        self._state = state
        self._era += 1
        self._probe = None
        self._metrics.gauge("foldbus_breaker_open", _GAUGE[state], breaker=self.breaker.name)


PROBE_WAIT_S = 0.2


class Call:
    """One call of a dependency. The first verdict counts; later ones change nothing."""

    __slots__ = ("_circuit", "_over", "era")

    def __init__(self, circuit: Circuit, era: int) -> None:
        self._circuit, self.era = circuit, era
        self._over = False

    @property
    def over(self) -> bool:
        return self._over

    def answered(self) -> None:
        self._end(None, known=True)

    def failed(self, error: BaseException) -> None:
        """An error that the breaker does not count is an answer: somebody was there to give it."""
        self._end(error, known=True)

    def abandoned(self) -> None:
        """It was cut short, or not made after all."""
        self._end(None, known=False)

    def _end(self, error: BaseException | None, *, known: bool) -> None:
        if not self._over:
            self._over = True
            self._circuit.ended(self, error, known=known)


class _Window:
    """Calls and failures of the last `window_s`, in slices: bounded, however many calls there are."""

    def __init__(self, window_s: float) -> None:
        self._slice_s = window_s / _SLICES
        self._slices: deque[list[float]] = deque(maxlen=_SLICES + 1)  # begin, calls, failures

    def add(self, now: float, *, failed: bool) -> None:
        if not self._slices or now >= self._slices[-1][0] + self._slice_s:
            self._slices.append([now, 0, 0])
        last = self._slices[-1]
        last[1] += 1
        last[2] += failed

    def sums(self, now: float) -> tuple[int, int]:
        """Failures, calls."""
        while self._slices and self._slices[0][0] <= now - self._slice_s * _SLICES:
            self._slices.popleft()
        return int(sum(one[2] for one in self._slices)), int(sum(one[1] for one in self._slices))


class Circuits:
    """A process's circuits, by name: two handlers that name one breaker share what is known of it."""

    def __init__(self, *, clock: Clock, metrics: Metrics) -> None:
        self._clock, self._metrics = clock, metrics
        self._circuits: dict[str, Circuit] = {}

    def of(self, breaker: Breaker) -> Circuit:
        """Raises BadBreaker when the name has another breaker already."""
        found = self._circuits.get(breaker.name)
        if found is None:
            found = self._circuits[breaker.name] = Circuit(breaker, clock=self._clock, metrics=self._metrics)
        elif found.breaker != breaker:
            raise BadBreaker(f"two breakers are called {breaker.name!r}: {found.breaker} and {breaker}; wanted one")
        return found

    def all_of(self, breakers: Sequence[Breaker]) -> tuple[Circuit, ...]:
        return tuple(map(self.of, breakers))


def free_of(circuits: Sequence[Circuit]) -> int | None:
    """How many messages that need all of these may go to work now; None: as many as there are."""
    bounds = [free for free in (circuit.free for circuit in circuits) if free is not None]
    return min(bounds, default=None)


def wait_of(circuits: Sequence[Circuit]) -> float:
    return max((circuit.wait_s for circuit in circuits), default=0.0)


def begin_all(circuits: Sequence[Circuit]) -> list[Call] | None:
    """A call of each, or of none."""
    if free_of(circuits) == 0:
        return None
    calls = [circuit.begin() for circuit in circuits]
    return [call for call in calls if call is not None]


__all__ = ["BadBreaker", "Breaker", "Call", "Circuit", "Circuits", "State", "begin_all", "free_of", "wait_of"]
