"""Each benchmark runs, briefly, and says something about each of its variants. What it says is not looked at: figures
of a fraction of a second on a busy machine mean nothing."""

import asyncio
import json
import math
import sys
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS
from benchmarks.harness import Row, Setting, compare, per_second, quantile, table


@pytest.mark.timeout(600)  # "store" starts a process per peer, twelve in all
@pytest.mark.parametrize("name", BENCHMARKS)
async def test_a_benchmark_measures_each_of_its_variants(name: str, kafka: str, postgres: str, tmp_path: Path) -> None:
    rows = await BENCHMARKS[name](Setting(kafka, postgres, tmp_path, rounds=1, quick=True))
    cases: dict[str, set[str]] = {}
    for row in rows:
        if row.note:  # a peer that is not installed: it is not what is tested
            assert not row.values
            assert "not installed" in row.note, row
            continue
        assert len(row.values) == 1
        assert all(math.isfinite(value) and value > 0 for value in row.values), row
        cases.setdefault(row.case, set()).add(row.variant)
    assert all(len(variants) >= 2 for variants in cases.values()), cases
    if name != "purchases":  # its two pairs of backends are no floor of each other
        compared = {row.case for row in rows if row.ratio is not None}
        assert compared == cases.keys()


@pytest.mark.timeout(300)
async def test_costs_says_where_the_time_of_a_purchase_goes() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.costs", "--purchases", "20"),
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await process.communicate()
    assert process.returncode == 0
    assert b"20 purchases" in said
    assert b"_Till.sell" in said or b"UnitProcessor.process" in said


class TestCompare:
    async def test_lets_variants_take_turns_in_changing_order(self) -> None:
        order: list[tuple[int, str]] = []

        async def measure(name: str, number: int) -> dict[str, float]:
            order.append((number, name))
            return {"/s": 1.0}

        await compare("case", {"a": lambda n: measure("a", n), "b": lambda n: measure("b", n)}, rounds=2, warm_up=True)
        assert order == [(-1, "b"), (-1, "a"), (0, "a"), (0, "b"), (1, "b"), (1, "a")]

    async def test_sets_each_variant_beside_the_floor_of_the_same_round(self) -> None:
        speeds = {"floor": [10.0, 20.0, 40.0], "mine": [5.0, 5.0, 30.0]}

        async def measure(name: str, number: int) -> dict[str, float]:
            return {"/s": speeds[name][number]}

        floor, mine = await compare(
            "case",
            {"mine": lambda n: measure("mine", n), "floor": lambda n: measure("floor", n)},
            rounds=3,
            floor="floor",
        )
        assert (floor.variant, floor.ratio) == ("floor", None)
        assert (mine.median, mine.ratio, mine.ratios) == (5.0, 0.25, (0.25, 0.75))

    async def test_leaves_the_warm_up_out(self) -> None:
        async def measure(number: int) -> dict[str, float]:
            return {"/s": 1000.0 if number < 0 else 1.0}

        (row,) = await compare("case", {"mine": measure}, rounds=2, warm_up=True)
        assert row.values == (1.0, 1.0)


async def test_per_second_counts_what_all_callers_did() -> None:
    calls = 0

    async def work() -> None:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.002)

    began = time.perf_counter()
    rate = await per_second(work, callers=4, seconds=0.05, each=10)
    assert calls >= 4
    assert rate >= calls * 10 / (time.perf_counter() - began)  # it has looked at the clock before we did
    assert rate <= calls * 10 / 0.05


def test_quantile_is_a_value_that_was_measured() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile([7.0], 0.99)) == (51.0, 100.0, 7.0)


def test_a_row_can_be_read_by_people_and_by_programs() -> None:
    row = Row("case", "mine", "/s", (12_345.0, 200.0, 1.5), (100.0, 100.0, 100.0))
    assert "200 /s" in table([row])
    assert "× 2.00 [0.01–123.45]" in table([row])
    assert json.loads(json.dumps(row.as_json()))["ratio"] == 2.0
