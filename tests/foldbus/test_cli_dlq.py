"""`foldbus dlq show|redrive|discard` as it is typed, on the embedded pair."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from bus.envelope import ReplyTo
from bus.transport import Outgoing
from eventstore.port import Unit
from foldbus import Connection
from tests.foldbus.desk import Desk, dead_letters, until


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    return Desk("desk", f"sqlite:{tmp_path}/store", f"embedded:{tmp_path}/bus")


def poison(desk: Desk, *names: str) -> list[str]:
    """Commands that die; answers their ids."""

    async def bad(connection: Connection) -> None:
        for name in names:
            await connection.send(desk.module.Open(ticket_id=name, number=666))
        await dead_letters(connection, len(names))

    desk.do(bad)
    listed = {one["key"]: one["id"] for one in desk.cli("dlq list", "--json").data["dead_letters"]}
    return [listed[name] for name in names]


def events(desk: Desk) -> list[tuple[str, str]]:
    async def read(connection: Connection) -> list[tuple[str, str]]:
        page = await connection.store.read_all(after=0, limit=100)
        return [
            (one.type.split(".")[1], one.key) for one in page.records if one.stream and one.stream.category == "ticket"
        ]

    return desk.do(read, worker=False)


def until_handled(desk: Desk) -> None:
    async def wait(connection: Connection) -> None:
        async def nothing_waits() -> bool:
            store = connection.store
            return await store.timers.next_due() is None and not await store.parking.keys()

        await until(nothing_waits)

    desk.do(wait)


class TestRedrive:
    def test_without_yes_tells_what_it_would_do_and_changes_nothing(self, desk: Desk) -> None:
        (id,) = poison(desk, "a")
        told = desk.cli("dlq redrive", id)
        assert (told.code, "would redrive" in told.out) == (0, True)
        assert "--yes" in told.err
        assert "died" not in told.out  # `send` awaits no answer
        assert desk.cli("dlq discard", id, "--reason", "test").code == 0
        assert [one["id"] for one in desk.cli("dlq list", "--json").data["dead_letters"]] == [id]
        assert desk.cli("dlq list", "--all", "--json").data["dead_letters"][0]["settled"] is None

    def test_with_yes_is_handled_by_the_next_worker_and_shown_with_its_history(self, desk: Desk) -> None:
        (id, other) = poison(desk, "a", "b")
        done = desk.cli("dlq redrive", id, "--yes", "--json")
        assert done.code == 0
        assert done.data == {
            "dry_run": False,
            "letters": [{"id": id, "consumer": "desk", "type": "desk.open.v1", "what": "redriven", "why": None}],
            "more": False,
        }
        until_handled(desk)  # the bug is still there
        first, second = desk.cli("dlq show", id[:36], "--json").data["letters"]
        assert first["settled"]["how"] == "redriven"
        assert second["settled"] is None
        assert "the number of the beast" in second["stack"]
        shown = desk.cli("dlq show", id).out
        assert "the number of the beast" in shown
        assert "header ce_type: desk.open.v1" in shown
        assert {one["id"] for one in desk.cli("dlq list", "--json").data["dead_letters"]} == {id, other}

    def test_of_a_sagas_step_is_refused_with_the_reason_unless_it_is_asked_for(self, desk: Desk) -> None:
        async def bad(connection: Connection) -> None:
            step = connection.envelope(desk.module.Open(ticket_id="a", number=666), topic="desk.commands")
            to = ReplyTo("desk.replies", str(UUID(int=7)), "tidy")
            await connection.store.commit([Unit(outgoing=(replace(step, reply_to=to),))])
            await dead_letters(connection, 1)

        desk.do(bad)
        dry = desk.cli("dlq redrive", "--type", "desk.open.v1", "--json")
        assert (dry.code, dry.data["letters"][0]["what"]) == (1, "would refuse")
        assert f"a step of saga tidy {UUID(int=7)}" in dry.data["letters"][0]["why"]
        refused = desk.cli("dlq redrive", "--type", "desk.open.v1", "--yes", "--json")
        assert (refused.code, refused.data["letters"][0]["what"]) == (1, "refused")
        told = desk.cli("dlq redrive", "--type", "desk.open.v1", "--sagas-too", "--json")
        assert (told.code, told.data["letters"][0]["what"]) == (0, "would redrive")
        assert "died" in told.data["letters"][0]["why"]
        done = desk.cli("dlq redrive", "--type", "desk.open.v1", "--sagas-too", "--yes", "--json")
        assert (done.code, done.data["letters"][0]["what"]) == (0, "redriven")

    def test_by_filters_with_another_value_or_payload(self, desk: Desk, tmp_path: Path) -> None:
        (id, other) = poison(desk, "a", "b")
        assert desk.cli("dlq redrive", "--key", "a", "--set", "number=1", "--yes").code == 0
        payload = tmp_path / "payload.json"
        payload.write_text('{"ticket_id": "c", "number": 2}')
        assert desk.cli("dlq redrive", other, "--edit", str(payload), "--yes").code == 0
        until_handled(desk)
        opened = sorted(key for type, key in events(desk) if type == "opened")  # keys have no order among them
        assert opened == ["a", "c"]
        settled = desk.cli("dlq list", "--all", "--json").data["dead_letters"]
        assert {(one["id"], one["settled"]["how"]) for one in settled} == {(id, "replaced"), (other, "replaced")}

    def test_of_one_that_was_settled_or_never_was_is_refused_with_the_reason(self, desk: Desk) -> None:
        (id,) = poison(desk, "a")
        assert desk.cli("dlq discard", id, "--reason", "a test order", "--yes").code == 0
        refused = desk.cli("dlq redrive", id, "--yes", "--json")
        assert refused.code == 1
        assert "discarded" in refused.data["letters"][0]["why"]
        absent = desk.cli("dlq redrive", str(UUID(int=7)), "--yes", "--json")
        assert (absent.code, absent.data["letters"][0]["why"]) == (1, "no dead letter has this id")

    def test_of_everything_refuses_what_cannot_be_read_and_does_the_rest(self, desk: Desk) -> None:
        async def bad(connection: Connection) -> None:
            await connection.transport.publish([Outgoing("desk.commands", b"k", b"\xff\x00", (("x", b"\xfe"),))])
            await connection.send(desk.module.Open(ticket_id="a", number=666))
            await dead_letters(connection, 2)

        desk.do(bad)
        done = desk.cli("dlq redrive", "--everything", "--yes", "--json", "--per-second", "1000")
        assert done.code == 1
        assert sorted(one["what"] for one in done.data["letters"]) == ["redriven", "refused"]

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ([], "wanted ids or filters"),
            (["--everything", "--key", "a"], "found both"),
            (["abc", "--set", "x"], "FIELD=VALUE"),
            (["zz"], "no beginning of an id"),
            (["abc"], "no dead letter"),
            (["--key", "a", "--since", "noon"], "no time"),
            (["--key", "a", "--set", "number=1"], "for one letter"),
            (["--key", "a", "--edit", "/nowhere/at/all"], "No such file"),
        ],
    )
    def test_of_nothing_that_can_be_chosen_is_wrong_usage(self, desk: Desk, arguments: list[str], said: str) -> None:
        desk.do(_nothing, worker=False)
        refused = desk.cli("dlq redrive", *arguments, "--yes")
        assert refused.code == 2
        assert said in refused.err


async def _nothing(connection: Connection) -> Any: ...


def test_a_filter_that_meets_no_letter_says_so(desk: Desk) -> None:
    (id,) = poison(desk, "a")
    for verb, more in (("redrive", ()), ("discard", ("--reason", "a test order"))):
        said = desk.cli(f"dlq {verb}", "--consumer", "desk.saga.*", "--yes", *more)
        assert (said.code, said.out) == (0, "")
        assert "no open dead letter matches; nothing was changed" in said.err
    assert [one["id"] for one in desk.cli("dlq list", "--json").data["dead_letters"]] == [id]


class TestDiscard:
    def test_wants_a_reason_and_keeps_it(self, desk: Desk) -> None:
        (id, other) = poison(desk, "a", "b")
        assert desk.cli("dlq discard", id, "--yes").code == 2
        assert desk.cli("dlq discard", id, "--reason", " ", "--yes").code == 2
        done = desk.cli("dlq discard", "--key", "a", "--reason", "a test order", "--yes", "--json")
        assert [one["what"] for one in done.data["letters"]] == ["discarded"]
        assert [one["id"] for one in desk.cli("dlq list", "--json").data["dead_letters"]] == [other]
        (kept,) = [one for one in desk.cli("dlq list", "--all", "--json").data["dead_letters"] if one["settled"]]
        assert (kept["id"], kept["settled"]["how"], kept["settled"]["reason"]) == (id, "discarded", "a test order")
        assert "a test order" in desk.cli("dlq list", "--all").out
