"""`shop.verify` finds what is broken: one thing at a time is damaged in the files of a shop that was right.

A verifier that finds nothing proves nothing by itself. Each damage names the invariant that must turn red; the rest of
the shop stays as it is.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack, closing
from itertools import pairwise
from pathlib import Path
from uuid import uuid5

import pytest

from bus.embedded.log import LANE_BITS, unpack_headers
from bus.envelope import Failure
from bus.metrics import MemoryMetrics
from bus.seams import SystemClock
from eventstore.port import DeadLetter, Unit
from eventstore.sqlite import SqliteStore
from shop import insights, orders, payments, verify, warehouse
from shop.accounts import Account
from shop.demo import _ORDERS
from shop.journal import Journal
from shop.messages import PlaceOrder
from tests.docs.blocks import ROOT

pytestmark = pytest.mark.timeout(150)

Damage = Callable[[Path], None]


def verified(home: Path) -> Account:
    store, bus = f"sqlite:{home}", f"embedded:{home}"
    return asyncio.run(verify.verify(store, bus, journal=home / "journal", wait_s=0))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shop at rest: 20 orders, some declined, some too large for a parcel and so refunded, two of each customer."""
    home = tmp_path_factory.mktemp("sound")
    asyncio.run(_sell(home))
    return home


async def _sell(home: Path) -> None:
    store, bus = f"sqlite:{home}", f"embedded:{home}"
    async with AsyncExitStack() as stack:
        for service in (payments.app, warehouse.app, insights.app, orders.app):
            client = await stack.enter_async_context(service.connect(store=store, bus=bus, worker=True))
        with Journal(home / "journal") as journal:
            for n in range(20):
                order = PlaceOrder(
                    order_id=f"o-{n}",
                    customer_id=f"c-{n % 10}",
                    quantity=12 if n % 5 == 3 else 1,
                    cents=30_000 if n % 7 == 2 else 500,
                )
                id = uuid5(_ORDERS, order.order_id)
                journal.write("intent", id, order.order_id)
                await client.send(order, id=id)
                journal.write("ack", id, order.order_id)
        account = await verify.verify(store, bus, journal=home / "journal", wait_s=40)
        assert account.findings.found == {}


def in_file(home: Path, name: str, *statements: str) -> None:
    """Each statement changes at least one row: a damage that hits nothing proves nothing."""
    with closing(sqlite3.connect(home / f"{name}.db", isolation_level=None)) as connection:
        for statement in statements:
            assert connection.execute(statement).rowcount > 0, statement


def records(home: Path, topic: str, type: str = "") -> list[int]:
    """Records of one type that are not the last of their partition."""
    with closing(sqlite3.connect(home / "bus.db")) as connection:
        rows = connection.execute(
            "SELECT r.id, r.headers FROM records r JOIN lanes l ON r.id >> ? = l.id JOIN topics t ON t.id = l.topic_id "
            "WHERE t.name = ? AND (r.id & ?) < l.next_offset - 1 ORDER BY r.id",
            (LANE_BITS, topic, 2**LANE_BITS - 1),
        ).fetchall()
    return [id for id, headers in rows if dict(unpack_headers(headers))["ce_type"].startswith(type.encode())]


def neighbours(home: Path, topic: str) -> tuple[int, int]:
    """Two records that follow each other in one partition."""
    found = records(home, topic)
    return next((a, b) for a, b in pairwise(found) if b == a + 1)


# --- the damages -----------------------------------------------------------------------------------------------------


def an_event_is_missing_on_its_topic(home: Path) -> None:
    in_file(home, "bus", f"DELETE FROM records WHERE id = {records(home, 'payments.events')[0]}")


def an_event_on_its_topic_is_not_what_the_log_says(home: Path) -> None:
    in_file(home, "bus", f"UPDATE records SET value = x'7b7d' WHERE id = {records(home, 'payments.events')[0]}")


def a_command_of_a_saga_is_missing_on_its_topic(home: Path) -> None:
    in_file(home, "bus", f"DELETE FROM records WHERE id = {records(home, 'payments.commands')[0]}")


def the_log_lost_what_the_topic_has(home: Path) -> None:
    in_file(home, "payments", "DELETE FROM foldbus_events WHERE type = 'payments.payment-refunded.v1'")


def an_acknowledged_order_is_nowhere(home: Path) -> None:
    with Journal(home / "journal") as journal:
        journal.write("ack", uuid5(_ORDERS, "never arrived"), "never arrived")


def there_is_a_dead_letter(home: Path) -> None:
    now = SystemClock().now()
    letter = DeadLetter(
        "payments", uuid5(_ORDERS, "letter"), "payments.commands", 0, 0, None, None, (),
        Failure("ValueError", "no number", "", 1, now, now),
    )  # fmt: skip

    async def put() -> None:
        async with SqliteStore.open(
            home / "payments.db", service="payments", clock=SystemClock(), metrics=MemoryMetrics()
        ) as store:
            await store.commit([Unit(dead_letter=letter)])

    asyncio.run(put())


def copied_event(home: Path, service: str, type: str) -> None:
    """The event once more, as if its command had been decided twice: new id, next version of its stream."""
    in_file(
        home,
        service,
        "INSERT INTO foldbus_events SELECT (SELECT max(position) + 1 FROM foldbus_events), stream, "
        "(SELECT max(version) + 1 FROM foldbus_events s WHERE s.stream = e.stream), randomblob(16), type, key, "
        f"NULL, data, time, meta FROM foldbus_events e WHERE type = '{type}' LIMIT 1",
        "UPDATE foldbus_log SET head = (SELECT max(position) FROM foldbus_events)",
    )


def a_command_had_two_effects(home: Path) -> None:
    copied_event(home, "warehouse", "warehouse.stock-reserved.v1")


def an_order_was_placed_that_nobody_intended(home: Path) -> None:
    lines = (home / "journal").read_bytes().splitlines(keepends=True)
    (home / "journal").write_bytes(b"".join(line for line in lines if b'"o-7"' not in line))


def an_order_started_two_sagas(home: Path) -> None:
    """The second one under another id: a copy of a whole history."""
    with closing(sqlite3.connect(home / "orders.db", isolation_level=None)) as connection:
        (stream,) = connection.execute(
            "SELECT stream FROM foldbus_events WHERE type = 'foldbus.saga-started.v1' LIMIT 1"
        ).fetchone()
        (top,) = connection.execute("SELECT max(position) FROM foldbus_events").fetchone()
        connection.execute(
            "INSERT INTO foldbus_streams (number, category, id, version) "
            "SELECT ?, category, 'another', version FROM foldbus_streams WHERE number = ?",
            (top + 1, stream),
        )
        connection.execute(
            "INSERT INTO foldbus_events SELECT ? + version, ?, version, randomblob(16), type, key, topic, data, time, "
            "meta FROM foldbus_events WHERE stream = ?",
            (top, top + 1, stream),
        )
        connection.execute("UPDATE foldbus_log SET head = (SELECT max(position) FROM foldbus_events)")


def a_stream_has_a_hole(home: Path) -> None:
    in_file(home, "orders", "DELETE FROM foldbus_events WHERE type = 'orders.order-placed.v1' AND key = 'o-4'")


def two_records_were_published_in_the_wrong_order(home: Path) -> None:
    a, b = neighbours(home, "warehouse.events")
    in_file(
        home,
        "bus",
        f"UPDATE records SET id = -1 WHERE id = {a}",
        f"UPDATE records SET id = {a} WHERE id = {b}",
        f"UPDATE records SET id = {b} WHERE id = -1",
    )


def a_saga_never_ended(home: Path) -> None:
    in_file(home, "orders", "DELETE FROM foldbus_events WHERE type = 'foldbus.saga-compensated.v1'")


def a_step_was_never_undone(home: Path) -> None:
    """Neither scheduled nor answered; versions close up, so that nothing but the story is wrong."""
    with closing(sqlite3.connect(home / "orders.db", isolation_level=None)) as connection:
        (stream,) = connection.execute(
            "SELECT stream FROM foldbus_events WHERE json_extract(CAST(data AS TEXT), '$.path') LIKE 'undo:%' LIMIT 1"
        ).fetchone()
        connection.execute(
            "DELETE FROM foldbus_events WHERE stream = ? AND json_extract(CAST(data AS TEXT), '$.path') LIKE 'undo:%'",
            (stream,),
        )
        rows = connection.execute(
            "SELECT position FROM foldbus_events WHERE stream = ? ORDER BY version", (stream,)
        ).fetchall()
        for version, (position,) in enumerate(rows, 1):
            connection.execute("UPDATE foldbus_events SET version = ? WHERE position = ?", (version, position))


def a_row_of_the_read_model_is_wrong(home: Path) -> None:
    in_file(home, "insights", "UPDATE projection_customers_g1 SET cents = cents + 1 WHERE key = 'c-1'")


def a_row_of_the_read_model_is_missing(home: Path) -> None:
    in_file(home, "insights", "DELETE FROM projection_customers_g1 WHERE key = 'c-1'")


def an_offset_is_ahead_of_what_was_stored_with_the_units(home: Path) -> None:
    in_file(home, "payments", "UPDATE foldbus_watermarks SET next_offset = 0 WHERE consumer_group = 'payments'")


def a_watermark_is_beyond_the_topic(home: Path) -> None:
    in_file(home, "orders", "UPDATE foldbus_watermarks SET next_offset = next_offset + 1000")


def the_relay_is_beyond_its_log(home: Path) -> None:
    in_file(home, "payments", "UPDATE foldbus_leases SET position = position + 1000 WHERE name = 'relay'")


def the_relay_has_not_published(home: Path) -> None:
    in_file(home, "payments", "UPDATE foldbus_leases SET position = 0 WHERE name = 'relay'")


def a_group_is_behind_its_topic(home: Path) -> None:
    in_file(home, "warehouse", "UPDATE foldbus_watermarks SET next_offset = 0")
    in_file(home, "bus", "UPDATE shares SET committed = 0 WHERE committed > 0")


DAMAGES: dict[Damage, tuple[str, str]] = {
    an_event_is_missing_on_its_topic: ("I1", "is not on payments.events"),
    an_event_on_its_topic_is_not_what_the_log_says: ("I1", "the log _Published("),
    a_command_of_a_saga_is_missing_on_its_topic: ("I1", "a saga's payments.take-payment.v1"),
    the_log_lost_what_the_topic_has: ("I1", "which no log has"),
    an_acknowledged_order_is_nowhere: ("I1", "was acknowledged and is not in the log"),
    there_is_a_dead_letter: ("I1", "payments has a dead letter of payments"),
    a_command_had_two_effects: ("I2", "caused warehouse.stock-reserved.v1 and warehouse.stock-reserved.v1"),
    an_order_was_placed_that_nobody_intended: ("I2", "placed an order that nobody intended"),
    an_order_started_two_sagas: ("I2", "started 2 sagas, wanted one"),
    a_stream_has_a_hole: ("I3", "order-o-4 has version 2 where 1 comes next"),
    two_records_were_published_in_the_wrong_order: ("I3", " was first delivered after "),
    a_saga_never_ended: ("I4", " is compensating"),
    a_step_was_never_undone: ("I4", "with compensations [], wanted ['undo:1']"),
    a_row_of_the_read_model_is_wrong: ("I5", "customer c-1 is ("),
    a_row_of_the_read_model_is_missing: ("I5", "customer c-1 is None"),
    an_offset_is_ahead_of_what_was_stored_with_the_units: ("I6", "its store knows of 0"),
    a_watermark_is_beyond_the_topic: ("I6", "which ends at "),
    the_relay_is_beyond_its_log: ("I6", "the relay of payments is at "),
    the_relay_has_not_published: ("I7", "messages are not published"),
    a_group_is_behind_its_topic: ("I7", "group warehouse is at 0 of "),
}
"""The invariant that turns red, and words of the finding."""


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_is_damaged_is_found(sound: Path, tmp_path: Path, damage: Damage) -> None:
    home = tmp_path / "damaged"
    shutil.copytree(sound, home)
    damage(home)
    found = verified(home).findings.found
    rule, words = DAMAGES[damage]
    assert any(words in text for text in found.get(rule, [])), found


def test_a_sound_shop_passes_and_a_damaged_one_ends_the_program_with_1(sound: Path, tmp_path: Path) -> None:
    home = tmp_path / "copy"
    shutil.copytree(sound, home)
    chosen = ("--store", f"sqlite:{home}", "--bus", f"embedded:{home}", "--journal", str(home / "journal"))

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "shop.verify", *chosen, "--wait", "0"],
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}"}, capture_output=True, text=True, check=False, timeout=50,
        )  # fmt: skip

    ran = run()
    assert (ran.returncode, ran.stdout.splitlines()[-1]) == (0, "all invariants hold"), ran.stderr
    a_row_of_the_read_model_is_wrong(home)
    ran = run()
    assert ran.returncode == 1
    assert "I5: customer c-1 is " in ran.stdout
