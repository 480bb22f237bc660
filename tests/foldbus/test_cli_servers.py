"""The command line on Kafka and PostgreSQL: what differs there is that nothing is made unless it is asked for."""

from __future__ import annotations

import asyncio
import json
import secrets
from pathlib import Path

import pytest

from foldbus import Connection, Service
from tests.foldbus.desk import Desk, dead_letters, settled


@pytest.fixture
def desk(kafka: str, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    return Desk(f"desk-{secrets.token_hex(4)}", database, f"kafka://{kafka}")


def test_a_service_is_prepared_looked_at_and_replayed(desk: Desk) -> None:
    # Nothing is there yet, and looking makes nothing.
    assert [desk.cli("db check").code for _ in range(2)] == [1, 1]
    assert [desk.cli("topics validate").code for _ in range(2)] == [1, 1]
    assert len(desk.cli("topics plan", "--json").data["create"]) == 5
    assert desk.cli("lag").code == 2

    assert desk.cli("db upgrade", f"{desk.module_name}:other").code == 0
    checked = desk.cli("db check", f"{desk.module_name}:other", "--json").data["stores"]
    assert [(one["service"], one["epoch"], one["problem"], one["state"]) for one in checked] == [
        (desk.name, 0, None, "up to date"),
        (f"{desk.name}-other", 0, None, "up to date"),
    ]
    assert desk.cli("db sql").out == ""
    assert desk.cli("topics apply").code == 0
    assert desk.cli("topics validate").code == 0
    assert desk.cli("topics apply", "--json").data == {"create": [], "mismatches": [], "absent": []}
    app, desk.module.app = desk.module.app, Service(desk.name, partitions=3)
    mismatch = desk.cli("topics validate")
    assert mismatch.code == 1
    assert "keys would move" in mismatch.out
    desk.module.app = app

    async def send(connection: Connection) -> None:
        await connection.send(desk.module.Open(ticket_id="t1", number=1))
        await connection.send(desk.module.Open(ticket_id="t666", number=666))

    desk.do(send, worker=False)
    assert behind(desk) == {desk.name: 2, f"{desk.name}.saga.tidy": 0, f"{desk.name}.replies": 0}

    async def work(connection: Connection) -> None:
        await dead_letters(connection, 1)
        async with asyncio.timeout(30):
            await connection.request(desk.module.Open(ticket_id="t13", number=13), timeout_s=20)
        await settled(connection)

    desk.do(work)
    assert behind(desk)[desk.name] == 0
    found = desk.cli("lag", "--json").data
    assert found["dead_letters"] == 1
    assert desk.cli("dlq list", "--json").data["dead_letters"][0]["error"] == "ValueError"

    opened = ("--type", f"{desk.name}.opened.v1", "--json")
    assert desk.cli("replay", "--to", "file:out", *opened).data["events"] == 2
    assert [json.loads(line)["key"] for line in Path("out").read_text().splitlines()] == ["t1", "t13"]
    done = desk.cli("replay", "--to", f"topic:{desk.name}.events", "--yes", *opened)
    assert (done.code, done.data["events"]) == (0, 2)

    assert {one["start_key"] for one in desk.cli("saga list", "--json").data["sagas"]} <= {"t1", "t13"}
    assert desk.cli("projection rebuild", "tickets", "--json").data["swapped"] is True
    assert desk.cli("projection verify", "tickets", "--json").data["rows"] == 2
    assert desk.cli("projection swap-back", "tickets", "--yes").code == 0

    assert desk.cli("db restored", "--yes", "--json").data["stores"][0]["epoch"] == 1
    assert desk.cli("db check", "--json").data["stores"][0]["epoch"] == 1


def test_lag_goes_on_when_a_topic_of_another_service_is_missing(desk: Desk) -> None:
    desk.module.app = Service(f"{desk.name}-watch", sagas=[desk.module.tidy], projections=[desk.module.tickets])
    assert [desk.cli(command).code for command in ("db upgrade", "topics apply")] == [0, 0]
    found = desk.cli("lag", "--json")
    assert found.code == 0, found.err
    assert found.data["missing_topics"] == [f"{desk.name}.events"]
    assert found.data["projections"][0]["missing_topics"] == [f"{desk.name}.events"]


def behind(desk: Desk) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in desk.cli("lag", "--json").data["groups"]:
        found[one["group"]] = found.get(one["group"], 0) + one["behind"]
    return found
