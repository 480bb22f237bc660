"""Counting what happens: every retry, dead letter, fence and skipped event is a metric and a log line (P8)."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Protocol

log = logging.getLogger("foldbus")


class Metrics(Protocol):
    def count(self, name: str, n: int = 1, **labels: str) -> None:
        """Adds to a counter. Names are `foldbus_<what>_total`; labels never hold ids."""
        ...

    def gauge(self, name: str, value: float, **labels: str) -> None: ...


class MemoryMetrics:
    """The default: counters to look at in a test or to print at the end of a run."""

    def __init__(self) -> None:
        self.counters: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
        self.gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def count(self, name: str, n: int = 1, **labels: str) -> None:
        self.counters[name, tuple(sorted(labels.items()))] += n

    def gauge(self, name: str, value: float, **labels: str) -> None:
        self.gauges[name, tuple(sorted(labels.items()))] = value

    def total(self, name: str, **labels: str) -> int:
        """Sum of a counter over all series that carry these labels."""
        wanted = set(labels.items())
        return sum(n for (found, series), n in self.counters.items() if found == name and wanted <= set(series))
