"""`foldbus flow` and `foldbus topics` as commands: what they print, and how they exit."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

import pytest

from bus.transport import TopicSpec
from foldbus import Connection, Context, Event, Key, Service
from tests.foldbus.desk import Desk, cli
from tests.stories.pairs import Pair


@pytest.fixture
def desk(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    found = Desk(f"desk-{secrets.token_hex(4)}", pair.store, pair.bus)
    assert [found.cli(command).code for command in ("db upgrade", "topics apply")] == [0, 0]
    return found


def states(desk: Desk) -> dict[str, str]:
    return {one["group"]: one["state"] for one in desk.cli("flow list", "--json").data["groups"]}


def test_groups_are_paused_listed_placed_and_resumed(desk: Desk) -> None:
    saga, replies = f"{desk.name}.saga.tidy", f"{desk.name}.replies"
    assert states(desk) == dict.fromkeys([desk.name, saga, replies], "no members")
    said = desk.cli("flow pause", desk.name, saga, "--reason", "the mail server moves")
    assert said.code == 0
    assert desk.cli("flow pause", desk.name, "--json").data == {
        "groups": [{"group": desk.name, "state": "paused", "changed": False}]
    }
    assert states(desk) == {desk.name: "paused", saga: "paused", replies: "no members"}
    listed = desk.cli("flow list", saga)
    assert "the mail server moves" in listed.out
    assert replies not in listed.out
    assert f"group {desk.name}" in desk.cli("lag").out
    assert set(desk.cli("lag", "--json").data["paused"]) == {desk.name, saga}

    assert desk.cli("flow resume", "--all").code == 0
    assert set(states(desk).values()) == {"no members"}
    acts = [(one["group"], one["what"]) for one in desk.cli("flow log", "--json").data["acts"]]
    assert acts == [(saga, "resumed"), (desk.name, "resumed"), (saga, "paused"), (desk.name, "paused")]


def test_a_place_is_told_first_and_set_when_asked_for(desk: Desk) -> None:
    async def send(connection: Connection) -> None:
        for number in range(3):
            await connection.send(desk.module.Open(ticket_id="t1", number=number))

    desk.do(send, worker=False)
    dry = desk.cli("flow seek", desk.name, "--to", "end", "--json")
    assert (dry.code, dry.data["done"], dry.data["refused"]) == (0, False, None)
    assert sum(one["skipped"] for one in dry.data["moves"]) == 3
    assert behind(desk) == 3
    assert "nothing was changed; --yes to do it" in desk.cli("flow seek", desk.name, "--to", "end").err
    done = desk.cli("flow seek", desk.name, "--to", "end", "--yes", "--reason", "test tickets", "--json")
    assert (done.code, done.data["done"]) == (0, True)
    assert behind(desk) == 0
    assert "test tickets" in desk.cli("flow log").out
    back = desk.cli("flow seek", desk.name, "--to", "2020-01-01", "--yes", "--json").data
    assert sum(one["again"] for one in back["moves"]) == 3
    assert behind(desk) == 3


def behind(desk: Desk) -> int:
    return sum(one["behind"] for one in desk.cli("lag", "--json").data["groups"] if one["group"] == desk.name)


def test_what_is_refused_changes_nothing_and_exits_1(desk: Desk) -> None:
    out_of_range = desk.cli("flow seek", desk.name, "--to", "17", "--partition", "0", "--yes")
    assert out_of_range.code == 1
    assert "holds offsets 0 to 0; wanted one of these, not 17" in out_of_range.err
    with desk.working():
        asyncio.run(joined(desk))
        told = desk.cli("flow seek", desk.name, "--to", "end")
        assert (told.code, "is not paused: --yes would be refused" in told.err) == (0, True)
        live = desk.cli("flow seek", desk.name, "--to", "end", "--yes")
        assert live.code == 1
        assert "is not paused; nothing was changed" in live.err
    assert [one["what"] for one in desk.cli("flow log", "--json").data["acts"]] == []


async def joined(desk: Desk) -> None:
    async with desk.service.connect(store=desk.store, bus=desk.bus) as connection, asyncio.timeout(45):
        while not await connection.transport.admin.members(desk.name):  # noqa: ASYNC110 - another thread's worker
            await asyncio.sleep(0.05)


def test_a_group_that_is_none_is_wrong_usage(desk: Desk) -> None:
    for command in (["flow pause", "nobody"], ["flow list", "nobody"], ["flow seek", "nobody", "--to", "end"]):
        said = desk.cli(*command)
        assert said.code == 2
        assert f"has no consumer group 'nobody'; it has {desk.name}, " in said.err
    for command in (["flow pause"], ["flow resume", desk.name, "--all"]):
        said = desk.cli(*command)
        assert said.code == 2
        assert "wanted groups or --all" in said.err


def listening(desk: Desk, name: str, event: type[Event], *topics: TopicSpec, keep_claims_s: float | None = None) -> str:
    """Another service of the desk's module, which hears of `event`; as the command line names it."""

    async def note(event: Event, ctx: Context) -> None: ...

    note.__annotations__ = {"event": event, "ctx": Context, "return": None}
    setattr(
        desk.module,
        name,
        Service(f"{desk.name}-{name}", handlers=[note], topics=topics, partitions=1, keep_claims_s=keep_claims_s),
    )
    return f"{desk.module_name}:{name}"


def test_a_topic_that_keeps_longer_than_claims_is_refused_by_plan_and_nothing_is_made(desk: Desk) -> None:
    events = TopicSpec(f"{desk.name}.events", 2)
    app = listening(desk, "short", desk.module.Opened, events, keep_claims_s=86_400.0)
    for command in ("plan", "validate", "apply"):
        said = cli("topics", command, app, "--bus", desk.bus)
        assert said.code == 1, command
        assert "keeps messages for ever" in said.out + said.err
    assert len(cli("topics", "plan", app, "--bus", desk.bus, "--json").data["create"]) == 5
    app = listening(desk, "short", desk.module.Opened, events)
    assert cli("topics", "apply", app, "--bus", desk.bus).code == 0
    assert cli("topics", "validate", app, "--bus", desk.bus).code == 0


def test_a_declared_topic_of_others_that_is_missing_is_named_and_not_made(desk: Desk) -> None:
    class Far(Event, type=f"{desk.name}-elsewhere.far.v1"):
        ticket_id: Key[str]

    topic = f"{desk.name}-elsewhere.events"
    app = listening(desk, "far", Far, TopicSpec(topic, 2))
    assert cli("topics", "apply", app, "--bus", desk.bus, "--json").data["absent"] == [topic]
    found = cli("topics", "validate", app, "--bus", desk.bus)
    assert (found.code, f"absent: {topic}; its owner makes it" in found.out) == (0, True)
