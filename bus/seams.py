"""Clock, ids and failpoints: passed in everywhere, so that tests and simulations may replace them."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import UTC, datetime
from typing import Protocol
from uuid import UUID

if sys.version_info >= (3, 14):
    from uuid import uuid7
else:
    from uuid_utils.compat import uuid7


class Clock(Protocol):
    def now(self) -> datetime:
        """Wall time, aware, in UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back; for measuring and for bounds."""
        ...


class Ids(Protocol):
    def new(self) -> UUID:
        """A new UUIDv7: unique, roughly ascending in time."""
        ...


class Failpoint(Protocol):
    def hit(self, name: str) -> None:
        """Called before and after every step that a crash must not hurt; does nothing unless armed.

        The names are listed in `FAILPOINTS`; an adapter never hits one, only the code above the ports does.
        """
        ...


class SystemClock:
    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()


class Uuid7Ids:
    def new(self) -> UUID:
        return uuid7()


class NoFailpoints:
    def hit(self, name: str) -> None:
        return None


FAILPOINTS = tuple(
    f"{when}-{step}"
    for step in ("commit", "publish", "mark", "offset-commit", "saga-feed", "projection-save", "swap")
    for when in ("before", "after")
)
"""`before-commit` … `after-swap`: the moments at which a worker may be killed by an armed failpoint."""


class KillAt:
    """Kills the own process with SIGKILL when failpoint `name` is hit for the `nth` time. `spec` is `name:nth`."""

    def __init__(self, spec: str) -> None:
        name, _, nth = spec.partition(":")
        if name not in FAILPOINTS:
            raise ValueError(f"no failpoint {name!r}; wanted one of {', '.join(FAILPOINTS)}")
        self._name, self._left = name, int(nth or "1")

    def hit(self, name: str) -> None:
        if name == self._name:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
