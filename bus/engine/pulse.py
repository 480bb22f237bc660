"""What a loop is at, since when, and how long that may take: for whoever asks whether it still lives.

Health reads it (`foldbus/health.py`); the engine only says what it begins.
"""

from __future__ import annotations

from bus.seams import Clock


class Pulse:
    """`what` is empty when nothing runs. `bound_s` is how long this step takes at most when all is well."""

    __slots__ = ("_clock", "bound_s", "since", "what")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.what = ""
        self.bound_s = 0.0
        self.since = 0.0

    def begins(self, what: str, *, bound_s: float) -> None:
        self.what, self.bound_s, self.since = what, bound_s, self._clock.monotonic()

    def rests(self) -> None:
        self.what = ""

    @property
    def age_s(self) -> float:
        """How long the step has been going on; 0 when nothing runs."""
        return self._clock.monotonic() - self.since if self.what else 0.0
