"""How long a group's rebalances keep its partitions waiting, from the effects' own times.

A rebalance has an epoch, which the members write to their logs when they take partitions over. Its pause, at a
partition, is the time from the last effect before the takeover to the first one after it; under a steady load that is
what a sender sees. A pause in which there were several rebalances is the last one's. It is counted under what was done
to the group last.
"""

from __future__ import annotations

import re
import statistics
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from bus.partitioner import partition_of

_TOOK_OVER = re.compile(r"took over (?P<parts>.*)$")
_PARTS = re.compile(r"\[(?P<runs>[\d,-]*)\] epoch (?P<epoch>\d+)")


def takeovers(logs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[int, dict[int, float]]:
    """When each partition was taken over, by epoch."""
    found: dict[int, dict[int, float]] = defaultdict(dict)
    for lines in logs:
        for line in lines:
            told = _TOOK_OVER.search(str(line["message"]))
            for parts in _PARTS.finditer(told["parts"]) if told else ():
                for partition in _numbers(parts["runs"]):
                    found[int(parts["epoch"])][partition] = float(line["heard_at"])
    return found


def pauses_of(
    effects: Sequence[tuple[str, float]],
    logs: Sequence[Sequence[Mapping[str, Any]]],
    done: Sequence[tuple[float, str]],
    *,
    partitions: int,
) -> dict[str, Any]:
    """Per rebalance its longest pause: mean and worst of those, in seconds, all in all and by cause. `effects` are
    (key, time), `done` (time, what was done to the group), both in order of time."""
    times: dict[int, list[float]] = defaultdict(list)
    for key, at in effects:
        times[partition_of(key.encode(), partitions)].append(at)
    for one in times.values():
        one.sort()
    causes = [at for at, _ in done]
    worst: dict[str, list[float]] = defaultdict(list)
    taken_over = takeovers(logs)
    ended_by: dict[tuple[int, int], int] = {}
    for epoch, taken in sorted(taken_over.items()):
        for partition, at in taken.items():
            ended_by[partition, bisect_right(times[partition], at)] = epoch
    gaps: dict[int, list[float]] = defaultdict(list)
    for (partition, after), epoch in ended_by.items():
        if 0 < after < len(times[partition]):
            gaps[epoch].append(times[partition][after] - times[partition][after - 1])
    for epoch, of_it in gaps.items():
        place = bisect_left(causes, min(taken_over[epoch].values())) - 1
        worst[done[place][1] if place >= 0 else "start"].append(max(of_it))
    usual = [gap for of_it in gaps.values() for gap in of_it]
    everything = [gap for of_it in worst.values() for gap in of_it]
    return {
        "rebalances": len(everything),
        "per_partition_mean_s": _rounded(usual, statistics.mean),
        **_summary(everything),
        "by_cause": {cause: {"rebalances": len(of_it), **_summary(of_it)} for cause, of_it in sorted(worst.items())},
    }


def _summary(gaps: Sequence[float]) -> dict[str, float | None]:
    return {"mean_s": _rounded(gaps, statistics.mean), "worst_s": _rounded(gaps, max)}


def _rounded(values: Sequence[float], figure: Any) -> float | None:
    return round(float(figure(values)), 2) if values else None


def _numbers(runs: str) -> list[int]:
    """`0-5,7` → 0, 1, 2, 3, 4, 5, 7."""
    found: list[int] = []
    for run in filter(None, runs.split(",")):
        first, _, last = run.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
