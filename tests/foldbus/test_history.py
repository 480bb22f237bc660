"""`Connection.load`, `Connection.history`, bounded `execute`, and `foldbus history`."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from bus.metrics import MemoryMetrics
from bus.processing import Again, Done, Failed, Item, Result
from bus.seams import SystemClock
from eventstore.errors import NoSuchVersion, TooManyConflicts, WrongExpectedVersion
from eventstore.snapshots import Snapshots
from foldbus import Connection
from foldbus.cli.history import changes
from foldbus.executing import ATTEMPTS_MAX, Executing, Turns
from tests.foldbus.desk import Desk


@pytest.fixture(autouse=True)
def quiet_logging() -> Iterator[None]:
    """Commands configure the root logger; a test's end takes that back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    desk = Desk("desk", f"sqlite:{tmp_path}/data", f"embedded:{tmp_path}/data")

    async def work(connection: Connection) -> None:
        for command in (
            desk.module.Open(ticket_id="t1", number=1),
            desk.module.Note(ticket_id="t1"),
            desk.module.Close(ticket_id="t1"),
        ):
            await connection.execute(command)

    desk.do(work, worker=False)
    return desk


def test_a_connection_loads_an_aggregate_as_it_is_and_as_it_was(desk: Desk) -> None:
    (tickets,) = desk.service.deciders

    async def work(connection: Connection) -> None:
        assert (await connection.load(tickets, "t1")).state.status == "closed"
        assert (await connection.load(tickets, "t1", at_version=2)).state.status == "open"
        assert (await connection.load(tickets, "t1", at=datetime(2000, 1, 1, tzinfo=UTC))).version == 0
        with pytest.raises(NoSuchVersion):
            await connection.load(tickets, "t1", at_version=4)
        steps = [step async for step in connection.history(tickets, "t1", limit=2, backward=True)]
        assert [(step.version, step.state.status) for step in steps] == [(3, "closed"), (2, "open")]

    desk.do(work, worker=False)


def test_a_unit_is_not_written_when_a_stream_that_was_only_read_moved_on(desk: Desk) -> None:
    (tickets,) = desk.service.deciders

    async def work(connection: Connection) -> None:
        seen = await connection.load(tickets, "t1")
        async with connection.unit() as unit:
            unit.expect(tickets, "t1", seen.version)
            unit.append(tickets, desk.module.Noted(ticket_id="t2"), expected=0)
        await connection.execute(desk.module.Note(ticket_id="t1"))

        async def write() -> None:
            async with connection.unit() as unit:
                unit.append(tickets, desk.module.Noted(ticket_id="t3"), expected=0)
                unit.expect(tickets, "t1", seen.version)

        with pytest.raises(WrongExpectedVersion) as caught:
            await write()
        assert (caught.value.stream, caught.value.expected, caught.value.actual) == (tickets.stream("t1"), 3, 4)
        assert (await connection.load(tickets, "t2")).version == 1
        assert (await connection.load(tickets, "t3")).version == 0

    desk.do(work, worker=False)


@pytest.mark.parametrize("worker", [False, True], ids=["execute", "request"])
def test_a_service_saves_snapshots_by_itself_at_the_latest_when_it_is_closed(desk: Desk, worker: bool) -> None:
    (tickets,) = desk.service.deciders
    tickets.snapshots = Snapshots(every=3, load_ms=None)

    async def decide(connection: Connection) -> None:
        for _ in range(4):
            note = desk.module.Note(ticket_id="t5")
            await (connection.request(note, timeout_s=20) if worker else connection.execute(note))

    async def look(connection: Connection) -> None:
        found = await connection.store.snapshots.page()
        assert [(one.stream, one.version, one.schema) for one in found if one.stream.id == "t5"] == [
            (tickets.stream("t5"), 3, tickets.state_codec().schema)
        ]
        assert (await connection.load(tickets, "t5")).version == 4

    desk.do(decide, worker=worker)
    desk.do(look, worker=False)


# --- executing -------------------------------------------------------------------------------------------------------


class Losing:
    """A processor that loses a number of races before it is done; how many of a key are in it at once."""

    def __init__(self, times: int) -> None:
        self.left, self.inside, self.most = times, 0, 0

    async def process(self, batch: Sequence[Item], watermarks: Any) -> Sequence[Result]:
        self.inside += 1
        self.most = max(self.most, self.inside)
        await asyncio.sleep(0)
        self.inside -= 1
        self.left -= 1
        return [Again() if self.left >= 0 else Done()]


def an_item() -> Any:
    class Envelope:
        type, key = "desk.note.v1", "t1"

    return Item(Envelope(), None)  # type: ignore[arg-type]


class Frozen(SystemClock):
    def monotonic(self) -> float:
        return 0.0


async def test_an_execution_ends_though_it_loses_every_race() -> None:
    metrics, losing = MemoryMetrics(), Losing(ATTEMPTS_MAX + 1)
    executing = Executing(losing, clock=Frozen(), metrics=metrics, backoff_s=(0, 0))  # type: ignore[arg-type]

    with pytest.raises(TooManyConflicts, match=r"desk.note.v1 for 't1': somebody else was quicker 200 times") as caught:
        await executing.run(an_item(), timeout_s=30, in_turn=True)

    assert caught.value.attempts == ATTEMPTS_MAX
    assert losing.left == 1
    assert metrics.total("foldbus_executions_given_up_total") == 1


async def test_an_execution_gives_up_when_its_time_is_over_and_not_before() -> None:
    losing = Losing(10_000)
    executing = Executing(losing, clock=SystemClock(), metrics=MemoryMetrics())  # type: ignore[arg-type]
    with pytest.raises(TooManyConflicts) as caught:
        await executing.run(an_item(), timeout_s=0, in_turn=False)
    assert caught.value.attempts == 1

    losing.left = 4
    await executing.run(an_item(), timeout_s=60, in_turn=False)
    assert losing.left == -1


async def test_executions_of_one_key_take_turns_and_leave_nothing_behind() -> None:
    losing = Losing(0)
    executing = Executing(losing, clock=SystemClock(), metrics=MemoryMetrics())  # type: ignore[arg-type]

    await asyncio.gather(*(executing.run(an_item(), timeout_s=40, in_turn=True) for _ in range(5)))
    assert losing.most == 1

    await asyncio.gather(*(executing.run(an_item(), timeout_s=40, in_turn=False) for _ in range(5)))
    assert losing.most == 5


async def test_a_cancelled_turn_is_given_to_the_next() -> None:
    turns, begun = Turns(), asyncio.Event()

    async def hold() -> None:
        async with turns.of("k"):
            begun.set()
            await asyncio.Event().wait()

    holder = asyncio.create_task(hold())
    await begun.wait()
    waiting = asyncio.create_task(hold())
    await asyncio.sleep(0)
    waiting.cancel()
    holder.cancel()
    await asyncio.gather(holder, waiting, return_exceptions=True)

    async with asyncio.timeout(30), turns.of("k"):
        pass
    assert turns.waiting == 0


def test_racing_executions_of_one_aggregate_meet_no_conflict_in_one_process(desk: Desk) -> None:
    (tickets,) = desk.service.deciders

    async def work(connection: Connection) -> None:
        await asyncio.gather(*(connection.execute(desk.module.Note(ticket_id="t9")) for _ in range(20)))
        assert (await connection.load(tickets, "t9")).version == 20
        assert isinstance(connection.metrics, MemoryMetrics)
        assert connection.metrics.total("foldbus_conflicts_total") == 0

    desk.do(work, worker=False)


def test_what_the_decider_raises_comes_out_of_execute_at_once(desk: Desk) -> None:
    async def work(connection: Connection) -> None:
        with pytest.raises(ValueError, match="the number of the beast"):
            await connection.execute(desk.module.Open(ticket_id="t6", number=666))

    desk.do(work, worker=False)


# --- the command line ------------------------------------------------------------------------------------------------


def test_history_prints_each_event_and_what_it_changed(desk: Desk) -> None:
    shown = desk.cli("history", "ticket", "t1")

    assert shown.code == 0
    assert [line.split()[::2] for line in shown.out.splitlines() if line[:5].strip()] == [
        ["1", "desk.opened.v1"], ["2", "desk.noted.v1"], ["3", "desk.closed.v1"],
    ]  # fmt: skip
    assert '"number": 1' in shown.out
    assert [line.strip() for line in shown.out.splitlines() if "→" in line] == [
        'status: "new" → "open"',
        'status: "open" → "closed"',
    ]


def test_history_as_json_is_one_document_per_event_with_the_state_after_it(desk: Desk) -> None:
    shown = desk.cli("history", "ticket", "t1", "--json")

    documents = [json.loads(line) for line in shown.out.splitlines()]
    assert [(one["version"], one["type"], one["state"]) for one in documents] == [
        (1, "desk.opened.v1", {"status": "open"}),
        (2, "desk.noted.v1", {"status": "open"}),
        (3, "desk.closed.v1", {"status": "closed"}),
    ]
    assert documents[0]["events"] == [{"ticket_id": "t1", "number": 1}]
    assert {"id", "time", "correlation_id", "causation_id", "actor"} <= documents[0].keys()


def test_history_can_be_cut_and_turned_round(desk: Desk) -> None:
    def versions(*options: str) -> list[int]:
        shown = desk.cli("history", "ticket", "t1", "--json", *options)
        return [json.loads(line)["version"] for line in shown.out.splitlines()]

    assert versions("--after", "1") == [2, 3]
    assert versions("--limit", "2") == [1, 2]
    assert versions("--backward") == [3, 2, 1]
    assert versions("--backward", "--limit", "2") == [3, 2]
    last = desk.cli("history", "ticket", "t1", "--backward", "--limit", "1")
    assert [line.strip() for line in last.out.splitlines() if "→" in line] == ['status: "open" → "closed"']


def test_history_shows_the_state_at_a_version_or_a_time(desk: Desk) -> None:
    at = desk.cli("history", "ticket", "t1", "--at-version", "1", "--json")
    assert at.data == {"stream": "ticket-t1", "version": 1, "state": {"status": "open"}}
    plain = desk.cli("history", "ticket", "t1", "--at-version", "3")
    assert plain.out.splitlines() == ["ticket-t1 at version 3", '  status: "closed"']
    later = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    assert desk.cli("history", "ticket", "t1", "--at", later, "--json").data["version"] == 3
    assert desk.cli("history", "ticket", "t1", "--at", "2001-02-03T04:05:06Z", "--json").data["version"] == 0


def test_history_says_what_it_cannot_show(desk: Desk) -> None:
    nobody = desk.cli("history", "ticket", "t0")
    assert (nobody.code, nobody.out) == (1, "")
    assert "ticket-t0 has no events" in nobody.err

    def wrong(*args: str) -> str:
        shown = desk.cli("history", *args)
        assert shown.code == 2
        assert shown.out == ""
        return " ".join(shown.err.split())

    assert "has no decider of category 'order'; it has ticket" in wrong("order", "t1")
    assert "there is no version 9" in wrong("ticket", "t1", "--at-version", "9")
    assert "no time zone" in wrong("ticket", "t1", "--at", "2026-01-01T00:00:00")
    assert "given" in wrong("ticket", "t1", "--at", "2026-01-01T00:00:00Z", "--at-version", "1")
    assert "at most" in wrong("ticket", "t1", "--backward", "--limit", "10001")


def test_changes_name_the_fields_that_differ_and_no_others() -> None:
    before = {"a": 1, "b": {"x": 1, "y": 2}, "gone": [1]}
    after = {"a": 1, "b": {"x": 1, "y": 3}, "new": None}

    assert list(changes(before, after)) == ["b.y: 2 → 3", "new: null", "gone: [1] → gone"]
    assert list(changes(after, after)) == []
    assert list(changes(1, 2)) == ["state: 1 → 2"]
    assert next(iter(changes({"a": "x" * 300}, {"a": 1}))).endswith("(302 characters) → 1")


def test_results_of_a_processor_are_told_apart() -> None:
    """What `Losing` stands for: Failed is raised, Again is tried again."""

    class Failing:
        async def process(self, batch: Sequence[Item], watermarks: Any) -> Sequence[Result]:
            return [Failed(ValueError("a bug"))]

    async def run() -> None:
        executing = Executing(Failing(), clock=SystemClock(), metrics=MemoryMetrics())  # type: ignore[arg-type]
        await executing.run(an_item(), timeout_s=40, in_turn=True)

    with pytest.raises(ValueError, match="a bug"):
        asyncio.run(run())
