"""`foldbus store …` and `foldbus db …` on both databases: what they print, what they change, how they end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from threading import Thread
from typing import IO, Any

import asyncpg
import pytest

from bus.envelope import StreamId
from eventstore.port import Snapshot, Unit, Wanted
from eventstore.repository import snapshot_schema
from eventstore.sqlite.migrations import IMPORT
from foldbus import Connection
from foldbus.archive import seen_by_all
from tests.eventstore.stores import append
from tests.foldbus.desk import Desk, cli, dead_letters, settled, until
from tests.servers.postgres import new_database

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


@pytest.fixture
def empty(desk: Desk, request: pytest.FixtureRequest, elsewhere: str) -> Iterator[str]:
    """A second place of the desk's kind."""
    if desk.store.startswith("sqlite:"):
        yield elsewhere
    else:
        with new_database(request.getfixturevalue("postgres")) as dsn:
            yield dsn


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
            until_it_leads(desk)
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

    @pytest.mark.timeout(180)  # seven processes after each other, and each may be slow to start
    def test_an_import_goes_on_after_kills(self, desk: Desk, empty: str, tmp_path: Path) -> None:
        """In the middle of a batch, as soon as it has come some further; it could not end, the end was not sent."""

        async def fill(connection: Connection) -> None:
            for nth in range(40):
                await connection.store.commit([Unit(appends=(append(f"s-{nth}", 0, 500),))])

        desk.do(fill, worker=False)
        assert cli("store", "export", "desk", "whole.jsonl", "--store", desk.store).code == 0
        lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
        came: list[int] = []
        for part in (8000, 14000, len(lines) - 1):
            came.append(killed_import(empty, lines[:part], beyond=came[-1] if came else 1))
            said = cli("store", "verify", "desk", "--store", empty)
            assert (said.code, "not finished" in said.err) == (2, True), said
        assert came == sorted(set(came))
        assert cli("store", "import", "desk", "whole.jsonl", "--store", empty).code == 0
        assert cli("store", "export", "desk", "again.jsonl", "--store", empty).code == 0
        assert (tmp_path / "again.jsonl").read_bytes() == b"".join(lines)


_SECTIONS = (
    "event",
    "archived",
    "outgoing",
    "stream",
    "claim",
    "settled_letter",
    "snapshot",
    "timer",
    "dead_letter",
    "watermark",
    "lease",
    "parked_key",
    "parked",
    "effect",
    "pause",
)


def killed(command: list[str], file: Path) -> None:
    """Runs it, and kills it when the file has grown: from a thread inside it, since whoever looks from outside may look
    too late."""
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(file), *command], env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=file.parent, stderr=subprocess.DEVNULL, check=False, timeout=50,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"


KILLED = """
import os, signal, sys, threading, time
from pathlib import Path

from foldbus.cli import main

file = Path(sys.argv.pop(1))


def kill():
    while not file.exists() or file.stat().st_size < 100_000:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


threading.Thread(target=kill, daemon=True).start()
main()
"""


def killed_import(store: str, lines: list[bytes], *, beyond: int) -> int:
    """Pours these into an import, kills it once more than `beyond` of them are in the store, answers how many are."""
    process = subprocess.Popen(
        [sys.executable, "-m", "foldbus", "store", "import", "desk", "-", "--store", store],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdin is not None

    def pour(into: IO[bytes]) -> None:
        with suppress(BrokenPipeError):
            into.write(b"".join(lines))
            into.flush()

    pouring = Thread(target=pour, args=(process.stdin,))
    pouring.start()
    until = time.monotonic() + 45
    while imported(store) <= beyond:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until
    process.send_signal(signal.SIGKILL)
    process.wait()
    pouring.join()
    with suppress(BrokenPipeError):
        process.stdin.close()
    return imported(store)


def imported(store: str) -> int:
    """How many lines of an import that is not finished are in the store."""
    if not store.startswith("sqlite:"):

        async def ask() -> int:
            db: Any = await asyncpg.connect(store)
            try:
                return int(await db.fetchval("select lines from foldbus_desk.import"))
            except asyncpg.UndefinedTableError:
                return 0
            finally:
                await db.close()

        return asyncio.run(ask())
    file = Path(store.removeprefix("sqlite:")) / "desk.db"
    if not file.exists():
        return 0
    with closing(sqlite3.connect(file)) as db:
        try:
            return int(db.execute(f"SELECT lines FROM {IMPORT}").fetchone()[0])
        except sqlite3.OperationalError:
            return 0


def until_it_leads(desk: Desk) -> None:
    """The worker in the other thread is connected, and takes its leases a moment later."""
    until = time.monotonic() + 45
    while not desk.cli("lag", "--json").data["worker"]:
        assert time.monotonic() < until
        time.sleep(0.05)


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
                [Snapshot(stream, part.version, str(snapshot_schema(decider)), state, now)]
            )

        desk.do(tamper, worker=False)
        said = desk.cli("store verify", "--json")
        assert said.code == 1
        (one,) = said.data["damages"]
        assert one["check"] == "snapshots equal full folds"
        assert said.data["compared"] == said.data["snapshots"] == 1


async def at_rest(connection: Connection) -> None:
    """Nothing is under way, and everybody has read the log to its end."""

    async def read() -> bool:
        head = await connection.store.head()
        return await seen_by_all(connection.store, connection.service, clock=connection.clock) >= head

    await settled(connection)
    await until(read)


def version(desk: Desk, id: str) -> int:
    found = cli("store", "streams", "desk", "--store", desk.store, "--category", "ticket", "--json").data["streams"]
    (said,) = [one["version"] for one in found if one["id"] == id]
    return int(said)


class TestStreams:
    def test_are_listed_with_what_became_of_them(self, desk: Desk) -> None:
        desk.open(1, 2, 3)
        said = cli("store", "streams", "desk", "--store", desk.store, "--category", "ticket", "--limit", "2", "--json")
        assert [(one["id"], one["kept_from"]) for one in said.data["streams"]] == [("t1", 1), ("t2", 1)]
        assert said.data["more"] is True
        plain = desk.cli("store streams", "--after", "ticket/t2", "--category", "ticket")
        assert plain.out.splitlines()[1].split() == ["ticket", "t3", str(version(desk, "t3")), "1", "-"]
        assert desk.cli("store streams", "--after", "nothing").code == 2

    def test_are_archived_and_come_back(self, desk: Desk) -> None:
        desk.open(1, 2)
        desk.do(at_rest)
        at = version(desk, "t1")
        dry = desk.cli("store archive", "ticket", "t1", "--dry-run", "--json")
        assert (dry.data["allowed"], dry.data["version"]) == (True, at)
        said = desk.cli("store archive", "ticket", "t1", "--json")
        assert said.code == 0, said.err
        assert said.data["archived_at"] is not None
        assert desk.cli("store verify").code == 0
        assert "is archived" in desk.cli("store truncate", "ticket", "t1", "--upto", "1", "--yes").err

        async def close(connection: Connection) -> None:
            await connection.send(desk.module.Close(ticket_id="t1"))
            await dead_letters(connection, 1)
            (letter,) = await connection.store.dead_letters()
            assert letter.failure.error.endswith("StreamArchived")
            assert f"was archived at version {at}" in letter.failure.message

        desk.do(close)
        dry = cli("store", "restore-stream", "desk", "ticket", "t1", "--store", desk.store, "--dry-run", "--json")
        assert dry.data["archived"] is True
        back = cli("store", "restore-stream", "desk", "ticket", "t1", "--store", desk.store, "--json")
        assert (back.data["archived_at"], back.data["version"]) == (None, at)
        assert desk.cli("store verify").code == 0

    def test_stay_in_the_log_until_everybody_has_read_them(self, desk: Desk) -> None:
        async def append_one(connection: Connection) -> None:
            await connection.store.commit([Unit(appends=(append(StreamId("ticket", "t9"), 0),))])

        desk.open(1)
        desk.do(append_one, worker=False)  # no relay runs
        dry = desk.cli("store archive", "ticket", "t9", "--dry-run", "--json")
        assert dry.data["allowed"] is False
        said = desk.cli("store archive", "ticket", "t9")
        assert said.code == 2
        assert "not read by everybody" in said.err
        assert desk.cli("store archive", "ticket", "nobody").code == 2

    def test_stay_in_the_log_until_a_projection_over_it_has_read_them(self, desk: Desk) -> None:
        desk.open(1)
        desk.do(at_rest)

        async def behind(connection: Connection) -> None:
            """The relay has passed it, the built-in list of sagas has not."""
            await connection.store.commit([Unit(appends=(append(StreamId("ticket", "t9"), 0, public=False),))])
            head = await connection.store.head()
            async with connection.store.leases.lead("relay") as leading:
                await connection.store.leases.mark(leading.lease, old=leading.lease.position, new=head)

        desk.do(behind, worker=False)
        assert "not read by everybody" in desk.cli("store archive", "ticket", "t9").err

    def test_lose_their_first_events_behind_a_snapshot_that_is_read_today(self, desk: Desk) -> None:
        desk.open(1)
        desk.do(at_rest)
        at = version(desk, "t1")
        assert at > 1

        async def snapshot(connection: Connection, schema: str | None = None) -> None:
            decider = desk.service.deciders[0]
            (part,) = await connection.store.load([Wanted(decider.stream("t1"))])
            state = decider.state_codec().dump(desk.module.Ticket(status="closed"))
            now, schema = connection.clock.now(), schema or str(snapshot_schema(decider))
            await connection.store.snapshots.save([Snapshot(decider.stream("t1"), part.version, schema, state, now)])

        async def of_other_code(connection: Connection) -> None:
            await snapshot(connection, "v0-of-yesterday")

        desk.do(of_other_code, worker=False)
        assert "other code" in desk.cli("store truncate", "ticket", "t1", "--upto", "1", "--yes").err
        desk.do(snapshot, worker=False)
        assert desk.cli("store truncate", "ticket", "t1", "--upto", "1").code == 2  # nobody was asked
        said = desk.cli("store truncate", "ticket", "t1", "--upto", "1", "--yes", "--json")
        assert said.code == 0, said.err
        assert (said.data["kept_from"], said.data["version"]) == (2, at)
        verified = desk.cli("store verify", "--full", "--json")
        assert (verified.code, verified.data["compared"], verified.data["snapshots"]) == (0, 0, 1)
        assert "there is no stream" in desk.cli("store truncate", "ticket", "t2", "--upto", "1", "--yes").err
