"""The command line on embedded backends: what it prints, what it changes, and with which exit code it ends."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from bus.topics import apply
from bus.transport import Outgoing, TopicSpec
from eventstore.sqlite.migrations import migrate
from foldbus import Connection, Service
from foldbus.cli import app as program
from foldbus.settings import Settings
from foldbus.worker import Worker
from tests.foldbus.desk import SOURCE, Desk, cli, dead_letters

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def quiet_logging() -> Iterator[None]:
    """Commands configure the root logger; a test's end takes that back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    return Desk("desk", f"sqlite:{tmp_path}/data", f"embedded:{tmp_path}/data")


def eventually(find: Callable[[], Any], wanted: Any, *, within_s: float = 45) -> None:
    until = time.monotonic() + within_s
    while (found := find()) != wanted:
        assert time.monotonic() < until, f"found {found}, wanted {wanted}"
        time.sleep(0.05)


def with_elsewhere(desk: Desk) -> None:
    async def work(connection: Connection) -> None:
        await apply(connection.transport.admin, desk.module.other.topics)

    desk.do(work, worker=False)


class TestEveryCommand:
    def test_says_in_one_line_what_is_wrong_with_the_service_and_exits_2(self, desk: Desk) -> None:
        for wrong in ("nocolon", "no.such.module:app", f"{desk.module_name}:Opened"):
            said = cli("describe", wrong)
            assert (said.code, said.out) == (2, "")
            assert said.err.startswith("foldbus: ")
            assert wrong in said.err

    def test_names_a_variable_that_nothing_reads(self, desk: Desk) -> None:
        said = desk.cli("db check", env={"FOLDBUS_STOER": "sqlite:x", "FOLDBUS_TEST_KAFKA": ""})
        assert "FOLDBUS_STOER is set, but nothing reads it" in said.err
        assert "FOLDBUS_TEST_KAFKA" not in said.err

    def test_refuses_a_variable_of_the_wrong_form(self, desk: Desk) -> None:
        said = desk.cli("lag", env={"FOLDBUS_TOPICS": "maybe"})
        assert said.code == 2
        assert "topics" in said.err
        assert "maybe" in said.err

    def test_takes_the_backends_from_the_environment_unless_told_otherwise(self, desk: Desk, tmp_path: Path) -> None:
        env = {"FOLDBUS_STORE": f"sqlite:{tmp_path}/elsewhere"}
        assert cli("db", "check", desk.app, env=env).out.count("elsewhere") == 1
        assert desk.cli("db check", env=env).out.count("data") == 1


_WITH_HANDLERS = """
from foldbus import AT_MOST_ONCE, BareContext, EffectContext, handler


class Ring(Command[Opened], type="desk.ring.v1"):
    ticket_id: Key[str]


class SeenElsewhere(Event, type="other.seen.v1"):
    name: Key[str]


@handler(effect=True)
async def ring(command: Ring, ctx: EffectContext) -> Opened:
    return Opened(ticket_id=command.ticket_id, number=1)


@handler(delivery=AT_MOST_ONCE)
async def watch(event: SeenElsewhere, ctx: BareContext) -> None: ...


app = Service("desk", handlers=[ring, watch])
"""


class TestDescribe:
    def test_tells_the_table_without_opening_anything(self, desk: Desk) -> None:
        found = cli(
            "describe", desk.app, "--json", "--store", "postgresql://nowhere/x", "--bus", "kafka://nowhere:1"
        ).data
        assert [topic["name"] for topic in found["topics"]] == [spec.name for spec in desk.service.topics]
        (decider,) = found["deciders"]
        assert {command["type"]: command["reply"] for command in decider["commands"]} == {
            "desk.open.v1": "desk.opened.v1",
            "desk.close.v1": "desk.closed.v1",
            "desk.note.v1": None,
        }
        assert {event["type"]: event["public"] for event in decider["events"]}["desk.noted.v1"] is False
        assert found["sagas"] == [
            {"name": "tidy", "version": 1, "starts_on": "desk.opened.v1", "group": "desk.saga.tidy"}
        ]
        assert [one["name"] for one in found["projections"]] == ["tickets", "foldbus-sagas"]
        assert found["handlers"] == []
        assert not list(Path().iterdir())

    def test_tells_handlers_with_what_they_take(self, desk: Desk) -> None:
        exec(compile(_WITH_HANDLERS, "handlers", "exec"), desk.module.__dict__)
        assert cli("describe", desk.app, "--json").data["handlers"] == [
            {
                "name": "ring",
                "effect": True,
                "delivery": "exactly-once",
                "commands": [{"type": "desk.ring.v1", "key": "ticket_id", "reply": "desk.opened.v1"}],
                "events": [],
            },
            {
                "name": "watch",
                "effect": False,
                "delivery": "at-most-once",
                "commands": [],
                "events": [{"type": "other.seen.v1", "key": "name", "topic": "other.events"}],
            },
        ]
        shown = cli("describe", desk.app).out
        assert "handler ring, an effect\n  takes desk.ring.v1, answers desk.opened.v1\n" in shown
        assert "handler watch, at-most-once\n  reads other.events: other.seen.v1\n" in shown

    async def test_names_the_groups_that_a_worker_truly_joins(self, desk: Desk) -> None:
        async with desk.service.connect(store=desk.store, bus=desk.bus) as connection:
            worker = Worker(connection)
            joined = {engine._processor.group: engine._topics for engine in worker.engines}
        assert joined == dict(desk.service.groups)


class TestItsPage:
    """docs/cli.md"""

    text = (ROOT / "docs" / "cli.md").read_text()

    def test_names_every_command_and_no_other(self) -> None:
        groups = "db|topics|flow|saga|projection|dlq|parked|schema|store"
        named = set(re.findall(rf"foldbus ((?:{groups}) [a-z-]+|[a-z]+)\b", self.text))
        assert named == set(_commands(typer.main.get_command(program)))

    def test_names_every_variable(self) -> None:
        named = set(re.findall(r"^\| `(FOLDBUS_[A-Z_]+)`", self.text, re.MULTILINE))
        assert named == {f"FOLDBUS_{name.upper()}" for name in Settings.model_fields}


def _commands(group: Any) -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from (f"{name} {one}" for one in _commands(command))
        else:
            yield name


class TestTopics:
    def test_are_planned_validated_and_applied(self, desk: Desk) -> None:
        names = [spec.name for spec in desk.service.topics]
        for command in ("plan", "validate"):
            said = desk.cli(f"topics {command}", "--json")
            assert [spec["name"] for spec in said.data["create"]] == names
            assert said.code == (0 if command == "plan" else 1)
        assert [spec["name"] for spec in desk.cli("topics apply", "--json").data["create"]] == names
        assert desk.cli("topics apply", "--json").data == {"create": [], "mismatches": [], "absent": []}
        assert desk.cli("topics validate").code == 0

    def test_that_are_there_otherwise_exit_1_and_nothing_is_created(self, desk: Desk) -> None:
        async def other_count(connection: Connection) -> None:
            await connection.transport.admin.create([TopicSpec("late.events", 9)])

        desk.do(other_count, worker=False)
        late = Desk("late", desk.store, desk.bus)
        for command in ("plan", "validate"):
            said = late.cli(f"topics {command}")
            assert said.code == 1
            assert "late.events" in said.out
        assert late.cli("topics apply").code == 1
        assert len(late.cli("topics plan", "--json").data["create"]) == 4


class TestDb:
    def test_check_exits_1_until_upgrade(self, desk: Desk) -> None:
        said = desk.cli("db check", "--json")
        assert said.code == 1
        assert "db upgrade" in said.data["stores"][0]["problem"]
        assert desk.cli("db upgrade", f"{desk.module_name}:other", "--json").code == 0
        found = desk.cli("db check", f"{desk.module_name}:other", "--json")
        assert (found.code, [one["service"] for one in found.data["stores"]]) == (0, ["desk", "desk-other"])

    def test_check_exits_1_on_a_store_of_newer_code(self, desk: Desk, tmp_path: Path) -> None:
        desk.cli("db upgrade")
        with sqlite3.connect(tmp_path / "data" / "desk.db") as file:
            file.execute("INSERT INTO foldbus_schema (number, name) VALUES (9999, 'later')")
        works = desk.cli("db check", "--json")
        assert (works.code, works.data["stores"][0]["state"]) == (0, "newer")
        with file:
            file.execute("UPDATE foldbus_log SET oldest=9999")
        file.close()
        said = desk.cli("db check")
        assert said.code == 1
        assert "too new" in said.out
        assert desk.cli("db upgrade").code == 2

    def test_sql_prints_what_upgrade_would_run(self, desk: Desk, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        said = desk.cli("db sql")
        assert said.code == 0
        assert not (tmp_path / "data" / "desk.db").exists()
        with sqlite3.connect(tmp_path / "data" / "desk.db") as file:
            file.executescript(said.out)
        file.close()
        assert desk.cli("db check").code == 0
        assert desk.cli("db sql").out == ""

    def test_restored_raises_the_epoch_and_only_when_confirmed(self, desk: Desk) -> None:
        desk.cli("db upgrade")
        assert desk.cli("db restored").code == 2
        assert desk.cli("db check", "--json").data["stores"][0]["epoch"] == 0
        assert desk.cli("db restored", "--yes", "--json").data["stores"] == [
            {"service": "desk", "epoch": 1, "problem": None}
        ]
        assert desk.cli("db check", "--json").data["stores"][0]["epoch"] == 1


class TestLag:
    def test_counts_what_nobody_has_handled_yet(self, desk: Desk) -> None:
        async def send(connection: Connection) -> None:
            for number in (1, 2, 3):
                await connection.send(desk.module.Open(ticket_id=f"t{number}", number=number))
            async with connection.unit() as unit:
                unit.publish(desk.module.Opened(ticket_id="t9", number=9))
            await connection.execute(desk.module.Note(ticket_id="t9"))  # a private event: nobody publishes it

        desk.do(send, worker=False)
        found = desk.cli("lag", "--json").data
        behind = {}
        for one in found["groups"]:
            behind[one["group"]] = behind.get(one["group"], 0) + one["behind"]
        assert behind == {"desk": 3, "desk.saga.tidy": 0, "desk.replies": 0}
        assert (found["relay"]["waiting"], found["relay"]["behind"]) == (1, 2)
        assert found["relay"]["oldest_s"] >= 0
        assert {one["name"]: (one["generation"], one["behind"]) for one in found["projections"]} == {
            "tickets": (0, 2),
            "foldbus-sagas": (0, 2),
        }

    def test_is_nothing_once_a_worker_is_through(self, desk: Desk) -> None:
        desk.open(1, 2)
        with desk.working():
            eventually(lambda: _behind(desk), 0)
        found = desk.cli("lag")
        assert found.code == 0
        assert "desk.commands" not in found.out  # nothing behind, nothing to say
        assert desk.cli("lag", "--all").out.count("desk.commands") == 2

    def test_names_overdue_timers_and_dead_letters_and_missing_topics(self, desk: Desk, tmp_path: Path) -> None:
        async def beast(connection: Connection) -> None:
            await connection.send(desk.module.Open(ticket_id="t666", number=666))
            await dead_letters(connection, 1)

        desk.do(beast)
        assert desk.cli("lag", "--json").data["dead_letters"] == 1
        elsewhere = cli("lag", desk.app, "--json", "--store", desk.store, "--bus", f"embedded:{tmp_path}/empty").data
        assert elsewhere["missing_topics"] == ["desk.commands", "desk.events", "desk.replies"]
        assert elsewhere["waiting_groups"] == {
            "desk": ["desk.commands"],
            "desk.saga.tidy": ["desk.events"],
            "desk.replies": ["desk.replies"],
        }
        assert elsewhere["timers"] == {"next_due": None, "overdue_s": 0.0}


def test_lag_tells_whether_a_worker_leads_and_which_sagas_want_a_person(desk: Desk) -> None:
    with_elsewhere(desk)
    found = desk.cli("lag", "--json").data
    assert (found["worker"], found["leases"], found["sagas"]) == (False, {}, {"parked": 0, "undoing": 0})
    assert "none leads: is one running" in desk.cli("lag").out
    desk.open(1, 7, 13, 14)
    with desk.working():
        eventually(lambda: _sagas(desk), {"t1": "completed", "t7": "running", "t13": "parked", "t14": "completed"})
        leases = {"relay", "projection:tickets:1:0", "projection:foldbus-sagas:1:0"}
        eventually(lambda: set(desk.cli("lag", "--json").data["leases"]), leases)
        found = desk.cli("lag", "--json").data
        assert found["worker"] is True
        assert found["sagas"] == {"parked": 1, "undoing": 0}
        shown = desk.cli("lag").out
        assert re.search(r"^worker +one leads$", shown, re.MULTILINE)
        assert re.search(r"^sagas +1 parked, 0 undoing$", shown, re.MULTILINE)
    assert desk.cli("lag", "--json").data["worker"] is False
    desk.module.app = Service("plain", deciders=[])
    assert desk.cli("db upgrade").code == 0
    assert desk.cli("lag", "--json").data["sagas"] is None


def test_lag_shows_what_waits_for_a_topic_of_another_service(desk: Desk) -> None:
    desk.module.app = Service("watch", sagas=[desk.module.tidy], projections=[desk.module.tickets])

    async def nothing(connection: Connection) -> None: ...

    desk.do(nothing, worker=False)
    found = desk.cli("lag", "--json").data
    assert found["missing_topics"] == ["desk.events"]
    assert found["waiting_groups"] == {"watch.saga.tidy": ["desk.events"]}
    shown = desk.cli("lag")
    assert shown.code == 0
    for line in ("projection tickets", "group watch.saga.tidy"):
        assert "waits for topic desk.events" in next(one for one in shown.out.splitlines() if line in one)


def _behind(desk: Desk) -> int:
    found = desk.cli("lag", "--json").data
    return int(sum(one["behind"] for one in (*found["groups"], *found["projections"])) + found["relay"]["waiting"])


class TestSagas:
    def test_are_listed_shown_retried_and_cancelled(self, desk: Desk) -> None:
        with_elsewhere(desk)
        desk.open(1, 7, 13)
        with desk.working():
            eventually(lambda: _sagas(desk), {"t1": "completed", "t7": "running", "t13": "parked"})
            listed = {one["start_key"]: one for one in desk.cli("saga list", "--json").data["sagas"]}
            assert listed["t13"]["error"] == "RuntimeError: a bug at thirteen"
            assert listed["t7"]["waiting"] == ["2"]
            parked, running = listed["t13"]["saga_id"], listed["t7"]["saga_id"]
            lines = {line.split()[0]: line for line in desk.cli("saga list").out.splitlines()}
            assert lines[parked].endswith("RuntimeError: a bug at thirteen")
            assert re.search(r" t7 +step 2 \(desk-other\.[a-z-]+\.v1\) +-$", lines[running])

            desk.module.BROKEN = False  # the fix is deployed
            assert desk.cli("saga retry", parked, "--json").data == {"saga": parked, "done": True, "refused": None}
            again = desk.cli("saga retry", running)
            assert again.code == 1
            assert "nothing to retry" in again.err

            assert desk.cli("saga cancel", running).code == 2  # nobody to ask
            assert desk.cli("saga cancel", running, "--yes").code == 0
            eventually(lambda: _sagas(desk), {"t1": "completed", "t7": "compensated", "t13": "completed"})
        listed = {one["start_key"]: one for one in desk.cli("saga list", "--json").data["sagas"]}
        assert (listed["t13"]["error"], listed["t13"]["waiting"]) == (None, [])
        assert "cancelled" in listed["t7"]["error"]
        assert listed["t7"]["ended_at"] is not None
        story = desk.cli("saga show", running)
        assert "cancelled by" in story.out
        assert "undo of step 1: ok" in story.out
        assert desk.cli("saga show", running, "--json").data["status"] == "compensated"

    def test_are_filtered_with_the_latest_first_up_to_a_limit(self, desk: Desk) -> None:
        desk.open(1)
        desk.open(2)
        desk.open(13)
        with desk.working():
            eventually(lambda: _sagas(desk), {"t1": "completed", "t2": "completed", "t13": "parked"})

        def keys(*args: str) -> list[str]:
            return [one["start_key"] for one in desk.cli("saga list", "--json", *args).data["sagas"]]

        assert keys() == ["t13", "t2", "t1"]
        assert keys("--limit", "2") == ["t13", "t2"]
        assert keys("--status", "completed") == ["t2", "t1"]
        assert keys("--definition", "tidy", "--status", "parked") == ["t13"]
        assert keys("--definition", "other") == []

    def test_that_began_while_no_worker_folded_them_are_listed_all_the_same(self, desk: Desk, tmp_path: Path) -> None:
        desk.open(13)
        with desk.working():
            eventually(lambda: _sagas(desk), {"t13": "parked"})
        with sqlite3.connect(tmp_path / "data" / "desk.db") as file:
            file.execute("DELETE FROM projection_foldbus_sagas_g1")
            file.execute("UPDATE projection_checkpoints SET places = '[]' WHERE projection = 'foldbus-sagas'")
        file.close()
        assert _sagas(desk) == {"t13": "parked"}

    def test_list_that_cannot_catch_up_says_so_and_exits_1(self, desk: Desk, tmp_path: Path) -> None:
        """Somebody else leads the list's fold, and does nothing."""
        desk.open(1)
        with sqlite3.connect(tmp_path / "data" / "desk.db") as file:
            file.execute("UPDATE foldbus_leases SET until = ? WHERE name LIKE 'projection:foldbus-sagas:%'", (2**62,))
            file.execute("UPDATE projection_checkpoints SET places = '[]' WHERE projection = 'foldbus-sagas'")
        file.close()
        said = desk.cli("saga list", "--json", "--timeout", "0.2")
        assert (said.code, said.data["up_to_date"]) == (1, False)
        assert "not up to date" in said.err

    def test_that_nobody_knows_are_an_error(self, desk: Desk) -> None:
        desk.open(1)
        said = desk.cli("saga show", "00000000-0000-0000-0000-000000000000")
        assert said.code == 2
        assert "tidy" in said.err

    def test_are_named_by_the_beginning_of_an_id_or_the_key_that_started_them(self, desk: Desk) -> None:
        desk.open(1, 2, 13)
        with desk.working():
            eventually(lambda: _sagas(desk), {"t1": "completed", "t2": "completed", "t13": "parked"})
        listed = {one["start_key"]: one["saga_id"] for one in desk.cli("saga list", "--json").data["sagas"]}
        others = [id for key, id in listed.items() if key != "t13"]
        length = next(n for n in range(1, 37) if not any(id.startswith(listed["t13"][:n]) for id in others))
        for text in (listed["t13"], listed["t13"].upper(), listed["t13"][:length], "t13"):
            assert desk.cli("saga show", text, "--json").data["id"] == listed["t13"], text
        desk.module.BROKEN = False
        with desk.working():
            assert desk.cli("saga retry", "t13", "--json").data["saga"] == listed["t13"]
        said = desk.cli("saga show", "t")
        assert (said.code, said.out) == (2, "")
        assert "has no saga t, by id, beginning of an id or key" in said.err

    def test_that_may_be_meant_alike_are_all_named(self, desk: Desk) -> None:
        twice = type(desk.module.tidy)
        desk.module.app = Service(
            "desk",
            deciders=desk.service.deciders,
            sagas=[desk.module.tidy, twice("again", 1, desk.module.Opened, desk.module.tidy.body)],
        )
        desk.open(1)
        with desk.working():
            eventually(lambda: len(desk.cli("saga list", "--status", "completed", "--json").data["sagas"]), 2)
        said = desk.cli("saga show", "t1")
        assert said.code == 2
        heading, *lines = said.err.splitlines()
        assert heading == "foldbus: 't1' may be any of these sagas:"
        assert {line.split()[0] for line in lines} == {
            one["saga_id"] for one in desk.cli("saga list", "--json").data["sagas"]
        }
        assert {tuple(line.split()[1:]) for line in lines} == {
            ("tidy", "v1", "completed", "t1"),
            ("again", "v1", "completed", "t1"),
        }

    def test_told_while_no_worker_runs_are_an_unknown_outcome(self, desk: Desk) -> None:
        desk.open(13)
        with desk.working():
            eventually(lambda: _sagas(desk), {"t13": "parked"})
        (one,) = desk.cli("saga list", "--json").data["sagas"]
        said = desk.cli("saga retry", one["saga_id"], "--timeout", "2")
        assert said.code == 2
        assert "unknown" in said.err
        assert "is a worker of 'desk' running" in said.err

    def test_that_have_ended_are_refused_without_a_worker(self, desk: Desk) -> None:
        desk.open(1)
        with desk.working():
            eventually(lambda: _sagas(desk), {"t1": "completed"})
        for verb in ("retry", "cancel --yes"):
            said = desk.cli(f"saga {verb}", "t1", "--timeout", "20")
            assert said.code == 1
            assert f"the saga is completed, nothing to {verb.split()[0]}" in said.err


def _sagas(desk: Desk) -> dict[str, str]:
    return {one["start_key"]: one["status"] for one in desk.cli("saga list", "--json").data["sagas"]}


class TestProjections:
    def test_are_listed_rebuilt_swapped_back_and_verified(self, desk: Desk) -> None:
        assert desk.cli("db upgrade").code == 0
        before = desk.cli("projection list", "--json").data["generations"]
        assert [(one["projection"], one["generation"], one["status"]) for one in before] == [
            ("tickets", 0, "not started"),
            ("foldbus-sagas", 0, "not started"),
        ]
        desk.open(1, 2)
        rebuilt = desk.cli("projection rebuild", "tickets", "--json")
        assert rebuilt.data == {"projection": "tickets", "generation": 2, "swapped": True}
        assert json.loads(rebuilt.err.splitlines()[-1])["task"] == "rebuild tickets"
        assert _generations(desk) == {1: "retired", 2: "serving"}
        assert desk.cli("projection verify", "tickets", "--json").data["rows"] == 2
        assert desk.cli("projection swap-back", "tickets").code == 2
        assert desk.cli("projection swap-back", "tickets", "--yes", "--json").data["generation"] == 1
        assert _generations(desk)[1] == "serving"
        assert desk.cli("projection rebuild", "nosuch").code == 2

    def test_whose_rows_were_tampered_with_fail_to_verify(self, desk: Desk, tmp_path: Path) -> None:
        desk.open(1, 2)
        assert desk.cli("projection rebuild", "tickets").code == 0
        with sqlite3.connect(tmp_path / "data" / "desk.db") as file:
            file.execute("UPDATE projection_tickets_g2 SET number = 5 WHERE key = 't1'")
        file.close()
        said = desk.cli("projection verify", "tickets", "--json")
        assert (said.code, said.data["different"]) == (1, 1)
        (difference,) = said.data["differences"]
        assert (difference["key"], difference["stored"]["number"], difference["folded"]["number"]) == ("t1", 5, 1)

    def test_that_differ_widely_are_shown_as_a_few_columns_and_a_count(self, desk: Desk, tmp_path: Path) -> None:
        desk.open(*range(20, 35), 666_000)
        assert desk.cli("projection rebuild", "tickets").code == 0
        with sqlite3.connect(tmp_path / "data" / "desk.db") as file:
            file.execute("UPDATE projection_tickets_g2 SET number = number + 1000 WHERE key <> 't666000'")
            file.execute("DELETE FROM projection_tickets_g2 WHERE key = 't20'")
        file.close()
        said = desk.cli("projection verify", "tickets")
        assert said.code == 1
        head, first, second, *more = [line.split() for line in said.out.splitlines()]
        assert head == ["key", "column", "stored", "folded"]
        assert (first, second) == (["t20", "(row)", "none", "there"], ["t21", "number", "1021", "21"])
        assert len(more) == 8
        assert "5 rows more are different" in said.err
        assert "15 different" in said.err.splitlines()[-1]

    def test_that_are_not_of_this_code_are_listed_with_what_comes_of_that(self, desk: Desk) -> None:
        def listed(source: str) -> tuple[Any, str]:
            exec(compile(source.replace("NAME", desk.name), "desk_service.txt", "exec"), desk.module.__dict__)
            said = desk.cli("projection list", "--json").data["generations"]
            (serving,) = (one for one in said if (one["projection"], one["status"]) == ("tickets", "serving"))
            return serving["differs"], desk.cli("projection list").err

        desk.open(1)
        assert listed(SOURCE) == (None, "")
        wider = SOURCE.replace("    closed: bool = False", "    closed: bool = False\n    shelf: str = ''")
        differs, said = listed(wider)
        assert differs == "this code has other columns: the next worker that starts builds another one"
        assert said.strip() == f"tickets: generation 1 serves, and {differs}"
        newer = SOURCE.replace('projection("tickets", version=1)', 'projection("tickets", version=2)')
        assert listed(newer)[0] == "this code is version 2: the next worker that starts builds another one"
        assert desk.cli("projection rebuild", "tickets").code == 0
        assert listed(newer)[0] is None
        assert listed(SOURCE)[0] == "this code is version 1: a worker of it stands by"
        assert desk.cli("projection swap-back", "tickets", "--yes").code == 0
        # It was swapped out by somebody, so no worker takes it back by itself.
        assert listed(newer)[0] == "this code is version 2: a worker of it stands by"

    def test_of_the_framework_cannot_be_named_by_users(self, desk: Desk) -> None:
        from foldbus import BadService, Service
        from foldbus.saga_list import saga_list

        with pytest.raises(BadService, match="foldbus-"):
            Service("desk", projections=[saga_list])


def _generations(desk: Desk) -> dict[int, str]:
    return {
        one["generation"]: one["status"]
        for one in desk.cli("projection list", "--json").data["generations"]
        if one["projection"] == "tickets"
    }


class TestDlq:
    def test_lists_what_was_given_up_with_its_bytes(self, desk: Desk) -> None:
        async def bad(connection: Connection) -> None:
            topic = "desk.commands"
            await connection.transport.publish([Outgoing(topic, b"k", b"\xff\x00", (("x", b"\xfe"),))])
            await connection.send(desk.module.Open(ticket_id="t666", number=666))
            await dead_letters(connection, 2)

        desk.do(bad)
        found = desk.cli("dlq list", "--json").data
        assert found["more"] is False
        raw = next(one for one in found["dead_letters"] if one["value"] is None)
        assert (raw["topic"], raw["key"], raw["value_base64"]) == ("desk.commands", "k", "/wA=")
        beast = next(one for one in found["dead_letters"] if one["type"] == "desk.open.v1")
        assert (beast["consumer"], beast["error"]) == ("desk", "ValueError")
        assert json.loads(beast["value"])["number"] == 666
        one = desk.cli("dlq list", "--limit", "1", "--json").data
        assert (len(one["dead_letters"]), one["more"]) == (1, True)
        assert "the number of the beast" in desk.cli("dlq list").out


class TestRun:
    """`foldbus run` as a process of its own, on the shop."""

    def start(self, tmp_path: Path, *args: str, **env: str) -> subprocess.Popen[str]:
        path = os.pathsep.join((str(ROOT), str(ROOT / "examples")))
        return subprocess.Popen(
            [sys.executable, "-m", "foldbus", "run", "shop.insights:app", *args],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": path, **env}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def until(self, process: subprocess.Popen[str], text: str) -> str:
        """Reads standard error up to the line with `text`; the test's timeout is the bound."""
        assert process.stderr is not None
        seen = ""
        for line in process.stderr:
            seen += line
            if text in line:
                return line
        raise AssertionError(f"ended without {text!r}:\n{seen}")

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_says_that_it_is_ready_and_ends_with_0_when_it_is_asked_to(self, tmp_path: Path, number: int) -> None:
        process = self.start(tmp_path)
        ready = json.loads(self.until(process, "ready"))
        assert ready["message"] == "ready: insights reads orders.events"
        process.send_signal(number)
        _, rest = process.communicate(timeout=50)
        assert process.returncode == 0, rest
        assert "stopping insights" in rest

    def test_ends_with_1_and_the_reason_when_a_part_fails_for_good(self, tmp_path: Path) -> None:
        """The projection's view has a name that a table of somebody else's bears."""
        file = tmp_path / ".foldbus" / "insights.db"
        migrate(file, service="insights")
        with sqlite3.connect(file) as connection:
            connection.execute("CREATE TABLE customers (mine TEXT)")
        connection.close()
        process = self.start(tmp_path)
        _, said = process.communicate(timeout=50)
        assert process.returncode == 1, said
        assert said.splitlines()[-1].startswith("foldbus: a part of the worker failed for good: NameTaken: ")

    def test_ends_with_2_when_it_cannot_begin(self, tmp_path: Path) -> None:
        process = self.start(tmp_path, "--store", "nowhere:x")
        _, said = process.communicate(timeout=50)
        assert process.returncode == 2, said
        assert said.splitlines()[-1].startswith("foldbus: store URL starts with 'nowhere'")
        process = self.start(tmp_path, FOLDBUS_FAILPOINT="before-lunch:1")
        _, said = process.communicate(timeout=50)
        assert process.returncode == 2, said
        assert "before-lunch" in said.splitlines()[-1]
