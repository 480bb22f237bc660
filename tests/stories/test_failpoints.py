"""A worker killed before and after every step that a crash must not hurt, on both pairs of backends.

One shop per pair runs all the time, each service in a process of its own. For each failpoint one worker is started anew
with it armed, orders come in (some are declined, some refused by shipping), the worker dies there by SIGKILL and is
started again. Then a program of its own, `shop.verify`, reads logs, topics and the read model and checks every
invariant, and what came out is compared with a plain pass over the purchases.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from uuid import uuid5

import pytest

from bus.errors import OutcomeUnknown, TransportUnavailable
from bus.seams import FAILPOINTS
from shop import orders
from shop.demo import _ORDERS, _prepare
from shop.journal import Journal
from shop.messages import PlaceOrder
from shop.purchases import Purchase, plain_pass
from tests.docs.blocks import ROOT
from tests.servers import start_kafka, start_postgres

PAIRS = ("embedded", "servers")
ORDERS = 24
SERVICES = ("orders", "payments", "warehouse", "insights")
DIES = {
    "commit": "warehouse",
    "publish": "orders",
    "mark": "payments",
    "offset-commit": "warehouse",
    "saga-feed": "orders",
    "projection-save": "insights",
}
REBUILD = """
import asyncio, sys
from bus.seams import KillAt
from shop.insights import app, customers

async def main():
    async with app.connect(store=sys.argv[1], bus=sys.argv[2], failpoint=KillAt(sys.argv[3])) as connection:
        async for _ in connection.view(customers).rebuild():
            pass

asyncio.run(main())
"""


class Shop:
    """Four workers as processes, on one pair of backends, and everything that was ever sold there."""

    def __init__(self, store: str, bus: str, journal: Path) -> None:
        self.store, self.bus, self.journal = store, bus, journal
        self.sold: list[Purchase] = []
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FOLDBUS_")},
            "FOLDBUS_STORE": store,
            "FOLDBUS_BUS": bus,
            "FOLDBUS_SESSION_TIMEOUT_S": "1.5",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")]),
        }

    def start(self, service: str, failpoint: str | None = None) -> None:
        armed = {"FOLDBUS_FAILPOINT": failpoint} if failpoint else {}
        self.workers[service] = subprocess.Popen(
            [sys.executable, "-m", "foldbus", "run", f"shop.{service}:app", "--quiet"],
            env=self.environment | armed,
            stdin=subprocess.DEVNULL,
        )

    def kill(self, service: str) -> None:
        worker = self.workers.pop(service)
        assert worker.poll() is None, f"{service} ended by itself with {worker.returncode}"
        worker.kill()
        worker.wait()

    def close(self) -> None:
        for worker in self.workers.values():
            worker.kill()
            worker.wait()

    def sell(self, name: str) -> None:
        """Every seventh parcel is too large, every fifth card is declined."""
        purchases = [
            Purchase(
                f"{name}-{n}", f"customer-{n % 9}", 12 if n % 7 == 3 else 1 + n % 4, 30_000 if n % 5 == 2 else 100 * n
            )
            for n in range(ORDERS)
        ]
        self.sold += purchases
        asyncio.run(self._place(purchases))

    async def _place(self, purchases: list[Purchase]) -> None:
        async with orders.app.connect(store=self.store, bus=self.bus) as client:
            with Journal(self.journal) as journal:
                for one in purchases:
                    id = uuid5(_ORDERS, one.purchase_id)
                    journal.write("intent", id, one.purchase_id)
                    command = PlaceOrder(
                        order_id=one.purchase_id, customer_id=one.customer_id, quantity=one.quantity, cents=one.cents
                    )
                    while True:
                        try:
                            await client.send(command, id=id)
                        except (OutcomeUnknown, TransportUnavailable):
                            journal.write("unknown", id, one.purchase_id)
                        else:
                            journal.write("ack", id, one.purchase_id)
                            break

    def rebuild(self, failpoint: str) -> int:
        """A rebuild of the insights with `failpoint` armed; answers how its process ended."""
        ran = subprocess.run(
            [sys.executable, "-c", REBUILD, self.store, self.bus, failpoint],
            env=self.environment,
            timeout=120,
            check=False,
        )
        return ran.returncode

    def verified(self) -> dict[str, object]:
        """The report of the separate program, once the shop has come to rest."""
        chosen = ("--store", self.store, "--bus", self.bus, "--journal", str(self.journal), "--wait", "120", "--json")
        ran = subprocess.run(
            [sys.executable, "-m", "shop.verify", *chosen],
            env=self.environment,
            capture_output=True,
            timeout=180,
            check=False,
        )
        assert ran.stdout, ran.stderr.decode()[-2000:]
        report: dict[str, object] = json.loads(ran.stdout)
        assert (ran.returncode, report["findings"]) == (0, {})
        return report


@pytest.fixture(scope="module", params=PAIRS)
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    home = tmp_path_factory.mktemp(str(request.param))
    with ExitStack() as stack:
        store, bus = f"sqlite:{home}", f"embedded:{home}"
        if request.param == "servers":  # of its own: the shop's topics have fixed names
            kafka = stack.enter_context(start_kafka(own=True))
            postgres = stack.enter_context(start_postgres(own=True))
            store, bus = postgres.dsn, f"kafka://{kafka.bootstrap}"
        asyncio.run(_prepare(store, bus))
        shop = Shop(store, bus, home / "journal")
        stack.callback(shop.close)
        for service in SERVICES:
            shop.start(service)
        yield shop


@pytest.mark.timeout(400)
@pytest.mark.parametrize("failpoint", [name for name in FAILPOINTS if not name.endswith("-swap")])
def test_a_worker_killed_there_loses_nothing_and_does_nothing_twice(shop: Shop, failpoint: str) -> None:
    service = DIES[failpoint.split("-", 1)[1]]
    shop.kill(service)
    shop.start(service, failpoint)
    shop.sell(failpoint)
    assert shop.workers[service].wait(timeout=120) == -signal.SIGKILL, f"{service} was not killed at {failpoint}"
    shop.start(service)
    assert shop.verified()["figures"] == asdict(plain_pass(iter(shop.sold))[0])


@pytest.mark.timeout(400)
@pytest.mark.parametrize("failpoint", ["before-swap", "after-swap"])
def test_a_rebuild_killed_there_leaves_a_read_model_that_is_right_and_goes_on(shop: Shop, failpoint: str) -> None:
    shop.sell(failpoint)
    assert shop.rebuild(f"{failpoint}:1") == -signal.SIGKILL
    assert shop.verified()["figures"] == asdict(plain_pass(iter(shop.sold))[0])
    assert shop.rebuild(f"{failpoint}:9") == 0  # to its end: what was begun goes on, what was done is built anew
    shop.verified()
