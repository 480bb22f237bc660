"""When to look again, for those who ask now and then whether another process has written.

What such a look costs is waking the event loop, not the look. So the longer nothing has changed, the less often it is
made, and those who look seldom look at the same instants: the loop wakes once for all of them.
"""

from __future__ import annotations

import math

FASTEST_S, SLOW_S, SLOWEST_S = 0.003, 0.02, 0.04
_OF_QUIET = 1 / 20
_ASLEEP_AFTER_S = 5.0


class Pace:
    """Of one who looks: after a twentieth of the time for which nothing has changed, within 3 and 20 ms; after five
    quiet seconds, every 40 ms. Times are the event loop's."""

    def __init__(self, now: float) -> None:
        self._changed_at = now

    def changed(self, now: float) -> None:
        self._changed_at = now

    def next_look(self, now: float) -> float:
        quiet_s = now - self._changed_at
        if quiet_s < SLOW_S / _OF_QUIET:
            return now + max(FASTEST_S, quiet_s * _OF_QUIET)
        grid_s = SLOW_S if quiet_s < _ASLEEP_AFTER_S else SLOWEST_S
        return (math.floor(now / grid_s + 1e-6) + 1) * grid_s  # a timer may come a nanosecond early
