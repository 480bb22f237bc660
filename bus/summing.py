"""One log line for what comes by the hundred. The metric beside it counts every single one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from bus.seams import Clock


class Summed:
    """Counts by kind. The first of a while is told at once, those that follow within `every_s` together.

    `add` and then `due`; and `due` now and then, so that the last ones are told too.
    """

    def __init__(self, clock: Clock, *, every_s: float = 5.0) -> None:
        self._clock, self._every_s = clock, every_s
        self._told_at = float("-inf")
        self._held: Counter[str] = Counter()

    def add(self, kind: str) -> None:
        self._held[kind] += 1

    def due(self, *, now: bool = False) -> Mapping[str, int]:
        """What is to be told by now, once; `now`: all that is held."""
        if not self._held or not (now or self._clock.monotonic() - self._told_at >= self._every_s):
            return {}
        self._told_at = self._clock.monotonic()
        held, self._held = dict(self._held), Counter()
        return held
