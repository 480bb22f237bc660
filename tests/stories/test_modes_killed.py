"""Subscriptions without claims whose worker is killed by SIGKILL around the commit of its offsets, on both pairs.

What they did is told by a file outside of any database. The worker is a process of its own (`foldbus run`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.docs.blocks import ROOT
from tests.stories.pairs import Pair, unique

SOURCE = Path(__file__).with_name("modes_service.txt").read_text()
KEYS = [f"k{n}" for n in range(5)]


@dataclass
class Program:
    """A service that tracks, and the one that says what there is to track."""

    pair: Pair
    mode: str
    directory: Path
    name: str = field(default_factory=lambda: unique("track"))
    said: int = 0
    worker: subprocess.Popen[bytes] | None = None
    module: ModuleType = field(init=False)

    def __post_init__(self) -> None:
        text = SOURCE.replace("NAME", self.name).replace("SOURCE", f"{self.name}-src").replace("MODE", self.mode)
        file = self.directory / "tracking.py"
        file.write_text(text.replace('OUT"', f'{self.out}"'))
        self.module = ModuleType("tracking")
        exec(compile(file.read_text(), str(file), "exec", dont_inherit=True), self.module.__dict__)

    @property
    def out(self) -> Path:
        return self.directory / "out.txt"

    async def prepare(self) -> None:
        """Topics and databases."""
        for service in (self.module.source, self.module.app):
            async with self.pair.connect(service, worker=False):
                pass

    async def say(self, times: int) -> None:
        """So many events of each key, in order, published when it returns."""
        async with self.pair.connect(self.module.source) as source:
            async with source.unit() as unit:
                for _ in range(times):
                    for key in KEYS:
                        unit.publish(self.module.Said(who=key, n=self.said))
                    self.said += 1
            async with asyncio.timeout(80):
                while await source.store.leases.position("relay") < await source.store.head():  # noqa: ASYNC110
                    await asyncio.sleep(0.02)

    def start(self, failpoint: str = "") -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FOLDBUS_")}
        environment = {
            **kept,
            "FOLDBUS_STORE": self.pair.store,
            "FOLDBUS_BUS": self.pair.bus,
            "FOLDBUS_SESSION_TIMEOUT_S": "3",
            "PYTHONPATH": os.pathsep.join([str(self.directory), str(ROOT)]),
            **({"FOLDBUS_FAILPOINT": failpoint} if failpoint else {}),
        }
        command = [sys.executable, "-m", "foldbus", "run", "tracking:app"]
        with (self.directory / "log").open("ab") as log:
            self.worker = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stderr=log, cwd=self.directory
            )

    @property
    def taken_over(self) -> int:
        """How often a worker was given partitions: once for each start, and again where its session ended meanwhile."""
        lines = (self.directory / "log").read_text().splitlines()
        return sum(f"{self.name}.handler." in line and "took over" in line for line in lines)

    def died(self) -> None:
        """The failpoint killed it."""
        assert self.worker is not None
        assert self.worker.wait(timeout=80) == -signal.SIGKILL
        self.worker = None

    def close(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker.wait()

    @property
    def tracked(self) -> dict[str, list[int]]:
        """Per key, the numbers in the order in which they were handled."""
        found: dict[str, list[int]] = defaultdict(list)
        for line in self.out.read_text().splitlines():
            mode, key, number = line.split()
            assert mode == self.mode
            found[key].append(int(number))
        return found

    def until(self, there: Any) -> None:
        until = time.monotonic() + 80
        while not there(self.tracked):
            assert time.monotonic() < until, self.tracked
            assert self.worker is None or self.worker.poll() is None, "the worker has ended"
            time.sleep(0.05)


@pytest.fixture
def program(request: pytest.FixtureRequest, pair: Pair, tmp_path: Path) -> Iterator[Program]:
    made = Program(pair, request.param, tmp_path)
    yield made
    made.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("program", ["most"], indirect=True)
@pytest.mark.parametrize("failpoint", ["before-offset-commit", "after-offset-commit"])
async def test_at_most_once_loses_at_most_its_batch_and_repeats_nothing(program: Program, failpoint: str) -> None:
    """Killed before its commit the batch comes again, for nobody has handled it; killed after it, it is gone."""
    await program.prepare()
    program.start()
    await program.say(4)
    program.until(lambda found: all(len(found[key]) == 4 for key in KEYS))
    program.close()
    program.start(f"{failpoint}:1")
    await program.say(3)
    program.died()
    program.start()
    await program.say(5)
    program.until(lambda found: all(found[key][-1:] == [11] for key in KEYS))
    lost = set()
    for key in KEYS:
        numbers = program.tracked[key]
        assert numbers == sorted(set(numbers)), f"{key} was repeated or inverted: {numbers}"
        lost |= {(key, number) for number in range(12)} - {(key, number) for number in numbers}
    if failpoint == "before-offset-commit":
        assert lost == set()
    else:
        assert lost, "the batch in its hands when it died"
        assert lost <= {(key, number) for key in KEYS for number in range(4, 7)}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("program", ["least"], indirect=True)
async def test_at_least_once_loses_nothing_and_repeats_of_each_key_a_last_stretch(program: Program) -> None:
    """Killed at any moment, and then when it has handled what the group does not know of yet."""
    await program.prepare()
    program.start()
    await program.say(4)
    program.until(lambda found: all(len(found[key]) == 4 for key in KEYS))
    program.close()
    program.start("before-offset-commit:1")
    await program.say(3)
    program.died()
    before = program.tracked
    program.start()
    await program.say(5)
    program.until(lambda found: all(found[key][-1:] == [11] for key in KEYS))
    for key in KEYS:
        numbers = program.tracked[key]
        steps = list(pairwise(numbers))
        jumps = [(one, other) for one, other in steps if other != one + 1]
        assert numbers[0] == 0
        assert all(other <= one for one, other in jumps), f"{key} lost something: {numbers}"
        assert len(jumps) < program.taken_over, f"{key} jumped back oftener than it was taken over: {numbers}"
    repeated = [key for key in KEYS if program.tracked[key][len(before[key])] <= before[key][-1]]
    assert repeated, "nothing was repeated: the test proves nothing"
