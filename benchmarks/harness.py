"""Rounds, rows and ratios.

Absolute figures drift with the machine's mood, by a factor of two within minutes. So the variants of a case take turns,
round after round, in changing order, and what counts is the ratio to the case's floor within the same run.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests.servers.postgres import new_database


@dataclass(frozen=True, slots=True)
class Setting:
    """Where the servers are and how long to measure. `quick` is for seeing that it runs: its figures mean nothing."""

    kafka: str
    postgres: str
    directory: Path
    rounds: int = 5
    quick: bool = False

    def pick(self, full: float, quick: float) -> float:
        return quick if self.quick else full

    def count(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def fewer(self, rounds: int) -> int:
        """For what takes long: at most so many rounds."""
        return min(self.rounds, rounds)

    @property
    def bus(self) -> str:
        return f"kafka://{self.kafka}"

    @asynccontextmanager
    async def database(self) -> AsyncIterator[str]:
        """An empty database, dropped afterwards."""
        making = new_database(self.postgres)
        dsn = await asyncio.to_thread(making.__enter__)
        try:
            yield dsn
        finally:
            await asyncio.to_thread(making.__exit__, None, None, None)

    def fresh(self) -> Path:
        """A directory that nobody used before."""
        path = self.directory / uuid4().hex[:12]
        path.mkdir(parents=True)
        return path


@dataclass(frozen=True, slots=True)
class Row:
    """One variant of one case: a figure per round, beside the floor's of the same rounds (empty: it has none). Without
    figures, `note` says why."""

    case: str
    variant: str
    unit: str
    values: tuple[float, ...]
    floor: tuple[float, ...] = ()
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def ratio(self) -> float | None:
        """Of the medians."""
        return self.median / statistics.median(self.floor) if self.floor else None

    @property
    def ratios(self) -> tuple[float, float] | None:
        """The lowest and the highest ratio of one round."""
        found = [mine / floor for mine, floor in zip(self.values, self.floor, strict=True)] if self.floor else []
        return (min(found), max(found)) if found else None

    def as_json(self) -> dict[str, Any]:
        if not self.values:
            return {"case": self.case, "variant": self.variant, "note": self.note}
        return {
            "case": self.case,
            "variant": self.variant,
            "unit": self.unit,
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "rounds": len(self.values),
            "ratio": self.ratio,
            "ratio_min": self.ratios and self.ratios[0],
            "ratio_max": self.ratios and self.ratios[1],
        }


Variant = Callable[[int], Awaitable[Mapping[str, float]]]
"""Measures one round; answers a figure per unit of measure."""


async def compare(
    case: str, variants: Mapping[str, Variant], *, rounds: int, floor: str | None = None, warm_up: bool = False
) -> list[Row]:
    """Lets the variants take turns. The floor's rows come first; each other row of the same unit is set beside it."""
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in variants}
    for number in range(-1 if warm_up else 0, rounds):
        names = list(variants)
        for name in names if number % 2 == 0 else reversed(names):
            figures = await variants[name](number)
            if number >= 0:
                found[name].append(figures)
    rows: list[Row] = []
    for name in sorted(variants, key=lambda one: one != floor):
        for unit in found[name][0]:
            values = tuple(figures[unit] for figures in found[name])
            beside: tuple[float, ...] = ()
            if floor is not None and name != floor and unit in found[floor][0]:
                beside = tuple(figures[unit] for figures in found[floor])
            rows.append(Row(case, name, unit, values, beside))
    return rows


async def per_second(work: Callable[[], Awaitable[object]], *, callers: int, seconds: float, each: int = 1) -> float:
    """How much is done per second when so many callers call `work` again and again; a call does `each`."""
    calls = 0
    began = time.perf_counter()
    end = began + seconds

    async def caller() -> None:
        nonlocal calls
        while time.perf_counter() < end:
            await work()
            calls += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
    return calls * each / (time.perf_counter() - began)


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of all does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def table(rows: list[Row]) -> str:
    """For people: a line per row, under a heading per case."""
    lines: list[str] = []
    case = ""
    for row in rows:
        if row.case != case:
            case = row.case
            lines += ["", case]
        if not row.values:
            lines.append(f"  {row.variant:<44} {row.note}")
            continue
        spread = f"[{_short(min(row.values))}–{_short(max(row.values))}]"
        line = f"  {row.variant:<44} {_short(row.median):>8} {row.unit:<22} {spread:<18}"
        if row.ratio is not None and row.ratios is not None:
            line += f" × {row.ratio:.2f} [{row.ratios[0]:.2f}–{row.ratios[1]:.2f}]"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _short(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:.1f}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
