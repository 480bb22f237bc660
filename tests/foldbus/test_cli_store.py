"""`foldbus store …` and `foldbus db …` on both databases: what they print, what they change, how they end."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eventstore.port import Snapshot, Unit, Wanted
from eventstore.repository import snapshot_schema
from foldbus import Connection
from tests.eventstore.stores import append
from tests.foldbus.desk import Desk, cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["sqlite", "postgres"])
def desk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    store = f"sqlite:{tmp_path}/data" if request.param == "sqlite" else request.getfixturevalue("database")
    made = Desk("desk", store, f"embedded:{tmp_path}/data")
    assert made.cli("db upgrade").code == 0
    return made


@pytest.fixture
def elsewhere(tmp_path: Path) -> str:
    return f"sqlite:{tmp_path}/elsewhere"


class TestExportAndImport:
    def test_move_a_store_by_its_services_name(self, desk: Desk, elsewhere: str, tmp_path: Path) -> None:
        desk.open(1, 2, 3)
        said = cli("store", "export", "desk", "desk.jsonl", "--store", desk.store, "--json")
        assert said.code == 0, said.err
        assert said.data["counts"]["event"] >= 3
        assert said.data["service"] == "desk"
        moved = cli("store", "import", desk.app, "desk.jsonl", "--store", elsewhere, "--json")
        assert moved.code == 0, moved.err
        assert moved.data == said.data
        assert cli("store", "export", "desk", "again.jsonl", "--store", elsewhere).code == 0
        assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "desk.jsonl").read_bytes()
        there = Desk("desk", elsewhere, desk.bus)
        there.open(4)

    def test_pass_a_store_through_a_pipe(self, desk: Desk, elsewhere: str, tmp_path: Path) -> None:
        desk.open(1)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "foldbus", "store"]
        piped = subprocess.run(
            [*command, "export", "desk", "-", "--store", desk.store], capture_output=True, check=True, env=environment
        )
        filled = subprocess.run(
            [*command, "import", "desk", "-", "--store", elsewhere, "--json"],
            input=piped.stdout, capture_output=True, check=True, env=environment,
        )  # fmt: skip
        assert json.loads(filled.stdout)["counts"] == {
            name: count for name, count in json.loads(piped.stdout.splitlines()[0]).items() if name in _SECTIONS
        }

    def test_refuse_while_a_worker_runs(self, desk: Desk) -> None:
        with desk.working():
            said = cli("store", "export", "desk", "desk.jsonl", "--store", desk.store)
            assert (said.code, said.out) == (2, "")
            assert "in use" in said.err
            assert not Path("desk.jsonl").exists()
            assert cli("store", "export", "desk", "desk.jsonl", "--store", desk.store, "--online").code == 0

    def test_refuse_a_store_that_holds_something(self, desk: Desk) -> None:
        desk.open(1)
        assert cli("store", "export", "desk", "desk.jsonl", "--store", desk.store).code == 0
        said = cli("store", "import", "desk", "desk.jsonl", "--store", desk.store)
        assert said.code == 2
        assert "wanted an empty store" in said.err

    def test_refuse_a_file_that_is_not_whole_before_anything_is_written(self, desk: Desk, elsewhere: str) -> None:
        desk.open(1)
        assert cli("store", "export", "desk", "desk.jsonl", "--store", desk.store).code == 0
        whole = Path("desk.jsonl").read_bytes()
        Path("desk.jsonl").write_bytes(whole[:-5])
        said = cli("store", "import", "desk", "desk.jsonl", "--store", elsewhere)
        assert said.code == 2
        assert "broken off" in said.err
        assert not Path("elsewhere").exists()
        Path("desk.jsonl").write_bytes(whole[: len(whole) // 2])
        assert cli("store", "export", "desk", "desk.jsonl", "--store", desk.store).code == 0
        assert Path("desk.jsonl").read_bytes() == whole

    def test_go_on_after_a_kill(self, desk: Desk, tmp_path: Path) -> None:
        """Big enough to be killed in the middle: the process is killed once it has told of progress."""

        async def fill(connection: Connection) -> None:
            for nth in range(40):
                await connection.store.commit([Unit(appends=(append(f"s-{nth}", 0, 500),))])

        desk.do(fill, worker=False)
        assert cli("store", "export", "desk", "whole.jsonl", "--store", desk.store).code == 0
        killed(["store", "export", "desk", "part.jsonl", "--store", desk.store], tmp_path / "part.jsonl")
        part = (tmp_path / "part.jsonl").stat().st_size
        whole = (tmp_path / "whole.jsonl").read_bytes()
        assert 0 < part < len(whole)
        assert cli("store", "export", "desk", "part.jsonl", "--store", desk.store).code == 0
        assert (tmp_path / "part.jsonl").read_bytes() == whole


_SECTIONS = (
    "event",
    "archived",
    "outgoing",
    "stream",
    "claim",
    "snapshot",
    "timer",
    "dead_letter",
    "watermark",
    "lease",
)


def killed(command: list[str], file: Path) -> None:
    """Runs it, and kills it when the file has grown."""
    process = subprocess.Popen(
        [sys.executable, "-m", "foldbus", *command], env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=file.parent, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 30
    while not file.exists() or file.stat().st_size < 100_000:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


def damage(desk: Desk, sql: str) -> None:
    """On SQLite, where the store is a file."""
    connection = sqlite3.connect(desk.store.removeprefix("sqlite:") + "/desk.db")
    connection.execute(sql)
    connection.commit()
    connection.close()


class TestVerify:
    def test_finds_nothing_wrong_with_a_store_at_work(self, desk: Desk) -> None:
        desk.open(1, 2)
        with desk.working():
            said = desk.cli("store verify", "--full", "--json")
        assert said.code == 0, said.out
        assert (said.data["ok"], said.data["damages"]) == (True, [])
        assert "snapshots equal full folds" in said.data["checks"]
        by_name = cli("store", "verify", "desk", "--store", desk.store)
        assert by_name.code == 0
        assert "snapshots equal full folds" not in by_name.out

    @pytest.mark.parametrize("desk", ["sqlite"], indirect=True)
    def test_names_each_damage_and_ends_with_1(self, desk: Desk) -> None:
        desk.open(1, 2)
        damage(desk, "UPDATE foldbus_streams SET version=version+5 WHERE category='ticket' AND id='t1'")
        said = desk.cli("store verify")
        assert said.code == 1
        assert "a stream's row has its highest version: ticket t1: the row says" in said.out
        assert desk.cli("store verify", "--json").data["ok"] is False

    @pytest.mark.parametrize("desk", ["sqlite"], indirect=True)
    def test_finds_a_projection_that_is_ahead_of_its_log(self, desk: Desk) -> None:
        desk.open(1)
        damage(desk, """UPDATE projection_checkpoints SET places='[["log",0,9000,0,9000]]'""")
        said = desk.cli("store verify", "--json")
        assert said.code == 1
        assert {one["check"] for one in said.data["damages"]} == {"projections are not ahead"}

    def test_finds_a_snapshot_that_is_not_what_its_events_fold_to(self, desk: Desk) -> None:
        desk.open(1, 2)

        async def tamper(connection: Connection) -> None:
            decider = desk.service.deciders[0]
            stream = decider.stream("t1")
            (part,) = await connection.store.load([Wanted(stream)])
            state = decider.state_codec().dump(decider.initial)
            now = connection.clock.now()
            await connection.store.snapshots.save(
                [Snapshot(stream, part.version, snapshot_schema(decider), state, now)]
            )

        desk.do(tamper, worker=False)
        said = desk.cli("store verify", "--json")
        assert said.code == 1
        (one,) = said.data["damages"]
        assert one["check"] == "snapshots equal full folds"
        assert said.data["compared"] == said.data["snapshots"] == 1
