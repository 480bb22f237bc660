"""A database or a broker that is not there, or says no: one line that names what was tried and what to do."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import make_url

from bus.errors import TransportUnavailable
from eventstore.errors import StoreUnavailable
from foldbus import Service
from foldbus.cli.logs import Thinned
from tests.foldbus.desk import SOURCE


@pytest.fixture
def nobody() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "desk_service.py").write_text(SOURCE.replace("NAME", "desk"))
    return tmp_path


def foldbus(home: Path, *args: str) -> tuple[int, list[str]]:
    """As a process: what the libraries say by themselves is part of it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOLDBUS_")}
    done = subprocess.run(
        [sys.executable, "-m", "foldbus", *args], cwd=home, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("command", ["db upgrade", "db check", "db restored --yes", "lag", "dlq list", "run"])
def test_a_database_that_is_not_there_is_one_line(home: Path, nobody: str, command: str) -> None:
    code, said = foldbus(
        home, *command.split(), "desk_service:app", "--store", f"postgresql://me:secret@{nobody}/shop", "--bus",
        "embedded:data",
    )  # fmt: skip
    assert code == 2
    ours = [line for line in said if "created topics" not in line]
    assert ours == [
        f"foldbus: PostgreSQL at postgresql://me@{nobody}/shop cannot be reached: nobody listens there (connection "
        "refused); start it, or correct the store's URL (--store, FOLDBUS_STORE)"
    ]


@pytest.mark.parametrize("command", ["topics apply", "topics validate", "run"])
def test_a_broker_that_is_not_there_is_one_line(home: Path, nobody: str, command: str) -> None:
    code, said = foldbus(home, *command.split(), "desk_service:app", "--bus", f"kafka://{nobody}")
    assert code == 2
    assert said == [
        f"foldbus: Kafka at kafka://{nobody} cannot be reached: no broker answered there; start it, or correct the "
        "bus's URL (--bus, FOLDBUS_BUS)"
    ]


async def test_a_database_that_says_no_is_told_with_what_to_do(database: str, tmp_path: Path) -> None:
    url = make_url(database)
    absent = url.set(database="not_there", drivername="postgresql")
    stranger = url.set(username="nobody-here", password="secret", drivername="postgresql")
    for store, said in (
        (absent, r"has no database 'not_there': .*\(SQLSTATE 3D000\); make it \(`createdb not_there`\)"),
        (stranger, r"refuses user 'nobody-here': .*SQLSTATE 28.*; correct user"),
    ):
        with pytest.raises(StoreUnavailable, match=said) as refused:
            async with Service("desk").connect(
                store=store.render_as_string(hide_password=False), bus=f"embedded:{tmp_path}"
            ):
                raise AssertionError("it connected")
        assert "secret" not in str(refused.value)


async def test_a_program_gets_the_class_that_it_got_before(nobody: str, tmp_path: Path) -> None:
    service = Service("desk")
    with pytest.raises(TransportUnavailable, match="no broker answered"):
        async with service.connect(store=f"sqlite:{tmp_path}", bus=f"kafka://{nobody}"):
            raise AssertionError("it connected")


def test_an_upgrade_says_nothing_of_its_tools(home: Path, database: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "foldbus", "run", "desk_service:app", "--store", database, "--bus", "embedded:data"],
        cwd=home, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2  # it refuses the old schema
    assert "db upgrade" in done.stderr
    assert {json.loads(line)["logger"] for line in done.stderr.splitlines() if line.startswith("{")} <= {"foldbus.bus"}


class TestThinned:
    """What a client of a broker that is away says by the hundred."""

    def test_lets_one_line_through_per_interval_and_counts_the_others(self) -> None:
        now = 100.0
        thinned = Thinned("aiokafka", every_s=10.0, monotonic=lambda: now)

        def passes(name: str = "aiokafka.conn") -> str | None:
            record = logging.LogRecord(name, logging.ERROR, "", 0, "no node %s", (1,), None)
            return record.getMessage() if thinned.filter(record) else None

        assert passes() == "no node 1"
        assert [passes("aiokafka"), passes(), passes()] == [None, None, None]
        assert passes("foldbus.bus") == "no node 1"
        assert passes("aiokafka_of_others") == "no node 1"
        now += 10.0
        assert passes() == "no node 1 (and 3 lines more of aiokafka)"
        now += 10.0
        assert passes() == "no node 1"
