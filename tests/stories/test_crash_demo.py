"""`foldbus demo --crash` on both pairs: workers killed at random moments, and every figure as in a plain pass.

One run each, of a seed that kills soon: the first four kills come after 0.7, 1.7, 2.9 and 3.6 seconds and are of
orders, payments, insights and warehouse. `python -m benchmarks.soak` does the same with seeds nobody chose.
"""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foldbus.progress import Progress
from shop import demo, orders
from shop.crash import Crashes
from shop.outcome import count_shop
from tests.servers import start_kafka
from tests.stories.pairs import Pair

SEED = 309
PURCHASES = 600


@pytest.fixture(params=["embedded", "servers"])
def own_pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    """The demo's topics have fixed names and it wants them empty: a broker of its own."""
    if request.param == "embedded":
        yield Pair("embedded", f"sqlite:{tmp_path / 'shop'}", f"embedded:{tmp_path / 'shop'}")
    else:
        database: str = request.getfixturevalue("database")
        with start_kafka(own=True) as kafka:
            yield Pair("servers", database, f"kafka://{kafka.bootstrap}")


@pytest.mark.timeout(330)
def test_workers_that_are_killed_again_and_again_sell_what_a_plain_pass_says(own_pair: Pair, tmp_path: Path) -> None:
    chosen = ("--limit", str(PURCHASES), "--seed", str(SEED), "--store", own_pair.store, "--bus", own_pair.bus)
    ran = subprocess.run(
        [sys.executable, "-m", "foldbus", "demo", "--crash", "--json", "--directory", str(tmp_path / "shop"), *chosen],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    report = json.loads(ran.stdout)
    assert (report["ok"], report["seed"]) == (True, SEED)
    assert report["shop"] == report["expected"]
    assert report["shop"]["placed"] == PURCHASES
    assert report["kills"] >= 2, "all was sold within 1.7 s"


async def test_nothing_is_counted_before_every_order_is_undone_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An order is told to be cancelled before what was done for it is undone."""

    async def at_once(*_: Any) -> None: ...

    async def ends_of_sagas(store: str, bus: str) -> int:
        async with orders.app.connect(store=store, bus=bus) as connection:
            return len((await connection.store.read_all(after=0, limit=1000, where=demo._SAGA_ENDS)).records)

    async def count(store: str, bus: str) -> Any:
        ended.append(await ends_of_sagas(store, bus))
        return await count_shop(store, bus)

    ended: list[int] = []
    monkeypatch.setattr(demo, "_wait_for_insights", at_once)  # they may be as quick as they like
    monkeypatch.setattr(demo, "count_shop", count)
    report = await demo.run(demo.Options(limit=60, directory=tmp_path / "shop"), Progress(stream=io.StringIO()))
    assert ended == [60]
    assert (report.shop, report.undone != []) == (report.expected, True)


async def test_kills_become_rarer_while_nothing_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that starts workers more slowly than they are killed would never get anywhere."""

    class Victim:
        returncode = None

        def kill(self) -> None:
            if crashes.kills == 30:
                crashes.moved()
            if crashes.kills == 39:
                crashes.calm()

    pauses: list[float] = []

    async def slept(pause_s: float) -> None:
        pauses.append(pause_s)

    crashes = Crashes([orders.app], "", "", random.Random(1), every_s=(1.0, 1.0))
    victim: Any = Victim()
    monkeypatch.setattr(crashes, "_running", {"orders": victim})
    monkeypatch.setattr("asyncio.sleep", slept)
    await crashes._kill()
    assert pauses[:33] == [*[1.0] * 8, *[2.0] * 8, *[4.0] * 8, *[8.0] * 7, 1.0, 1.0]
