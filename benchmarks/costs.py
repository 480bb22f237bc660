"""Where a purchase's CPU time goes: python -m benchmarks.costs [--purchases N] [--store URL --bus URL]

Runs the shop demo, counts the CPU time of the selling alone (not of starting up, nor of checking the result), and
samples the event loop's stack every millisecond of CPU. CPU time, because it means the same on a busy machine. For the
servers' share start them as parents' children:

    python -m tests.servers run -- python -m benchmarks.costs --store '{postgres}' --bus '{kafka}'
"""

from __future__ import annotations

import argparse
import asyncio
import io
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from foldbus.progress import Progress
from shop import demo
from shop.purchases import Purchase

ROOT = Path(__file__).resolve().parents[1]
SERVERS = {"postgres": "PostgreSQL", "java": "Kafka"}


class Sampler:
    """Counts, per function, in how many samples it was on the stack."""

    def __init__(self) -> None:
        self.samples = 0
        self.on_stack: Counter[str] = Counter()

    def start(self) -> None:
        signal.signal(signal.SIGPROF, self._sample)
        signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)

    def _sample(self, _: int, frame: FrameType | None) -> None:
        self.samples += 1
        seen: set[str] = set()
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            file = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-2:])
            seen.add(f"{file} {getattr(frame.f_code, 'co_qualname', frame.f_code.co_name)}")
            frame = frame.f_back
        self.on_stack.update(seen)


def cpu_seconds() -> Mapping[str, float]:
    """Of this process, of its event loop alone, and of servers that this process's parent has started."""
    found: dict[str, float] = {"Python": time.process_time(), "Python, event loop": time.thread_time()}
    for process in (psutil.Process().parent() or psutil.Process()).children(recursive=True):
        try:
            for part, name in SERVERS.items():
                if part in process.name():
                    found[name] = found.get(name, 0.0) + sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            pass
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.costs", description=__doc__.partition("\n")[0])
    parser.add_argument("--purchases", type=int, default=1000)
    parser.add_argument("--store")
    parser.add_argument("--bus")
    chosen = parser.parse_args()
    sampler = Sampler()
    spent: list[Mapping[str, float]] = []
    sell, wait = demo._Till.sell, demo._wait_for_insights

    async def sold(till: Any, purchases: Sequence[Purchase]) -> None:
        spent.append(cpu_seconds())
        sampler.start()
        await sell(till, purchases)

    async def waited(*arguments: Any) -> None:
        await wait(*arguments)
        sampler.stop()
        spent.append(cpu_seconds())

    setattr(demo._Till, "sell", sold)  # noqa: B010 - only here: the demo has no place of its own for it
    setattr(demo, "_wait_for_insights", waited)  # noqa: B010
    with tempfile.TemporaryDirectory(prefix="foldbus-costs-") as directory:
        options = demo.Options(
            limit=chosen.purchases, store=chosen.store, bus=chosen.bus, directory=Path(directory) / "demo"
        )
        report = asyncio.run(demo.run(options, Progress(stream=io.StringIO(), interactive=False)))
    assert report.ok, report.differing
    count = report.expected.placed
    handled = report.counters.get("foldbus_handled_total", 0)
    print(f"{count} purchases, {handled / count:.1f} messages handled each; CPU time per purchase:")
    for name, seconds in spent[1].items():
        each = (seconds - spent[0].get(name, 0.0)) / count * 1e6
        print(f"  {each:7.0f} µs  {name} ({each / (handled / count):.0f} µs per message)")
    print(f"on the event loop's stack, share of {sampler.samples} samples:")
    for name, samples in sampler.on_stack.most_common(70):
        print(f"  {samples / sampler.samples:6.1%}  {name}")


if __name__ == "__main__":
    main()
