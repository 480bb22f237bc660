"""Replaying a log: what is chosen, what goes where, and that an interrupted replay goes on without loss or doubles."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from bus.cloudevents import from_record
from bus.envelope import Envelope, Kind, StreamId
from bus.seams import SystemClock, Uuid7Ids
from bus.transport import Ack, Failed, Outgoing, Published, TopicSpec, Unknown
from eventstore.port import ANY, Append, Store, Unit
from foldbus.replay import (
    BadReplay,
    FileSink,
    Selection,
    State,
    TopicSink,
    begin,
    check_same,
    count,
    line_of,
    run,
)
from tests.eventstore.stores import NOON
from tests.foldbus.desk import Desk, cli

ids = Uuid7Ids()


def event(n: int, **changes: Any) -> Envelope:
    id = ids.new()
    given: dict[str, Any] = {
        "id": id, "kind": Kind.EVENT, "type": "shop.sold.v1", "source": "shop", "key": f"k{n % 3}",
        "data": b'{"n":%d}' % n, "time": NOON + timedelta(minutes=n), "correlation_id": id, "topic": "shop.events",
    }  # fmt: skip
    return Envelope(**(given | changes))


async def filled(store: Store, n: int = 6) -> list[Envelope]:
    """Events 0 to n-1 in streams k0, k1, k2 in turn; every fourth is a private one of another type."""
    made = [event(nth, **({"type": "shop.counted.v1", "topic": None} if nth % 4 == 3 else {})) for nth in range(n)]
    for one in made:
        await store.commit([Unit(appends=(Append(StreamId("stock", one.key), ANY, (one,)),))])
    return made


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["data"]["n"] for line in path.read_bytes().splitlines()]


async def to_file(store: Store, path: Path, selection: Selection) -> None:
    state = await begin(store, selection, to=f"file:{path}", id=ids.new())
    sink = FileSink.create(path)
    try:
        await run(store, selection, sink, state, path.with_suffix(".state"), clock=SystemClock())
    finally:
        sink.close()


class TestASelection:
    @pytest.mark.parametrize(
        ("selection", "wanted"),
        [
            (Selection(), [0, 1, 2, 3, 4, 5]),
            (Selection(stream=StreamId("stock", "k1")), [1, 4]),
            (Selection(stream=StreamId("stock", "nobody")), []),
            (Selection(types=frozenset({"shop.counted.v1"})), [3]),
            (Selection(since=NOON + timedelta(minutes=2), before=NOON + timedelta(minutes=4)), [2, 3]),
        ],
        ids=["everything", "a stream", "no stream", "a type", "a time"],
    )
    async def test_replays_these_in_order(
        self, store: Store, tmp_path: Path, selection: Selection, wanted: list[int]
    ) -> None:
        await filled(store)
        await to_file(store, tmp_path / "out", selection)
        assert numbers(tmp_path / "out") == wanted
        assert (await count(store, selection)).events == len(wanted)

    async def test_by_position_is_above_one_and_up_to_the_other(self, store: Store, tmp_path: Path) -> None:
        await filled(store)
        at = [one.position or 0 for one in (await store.read_all(after=0, limit=10)).records]
        for stream, wanted in ((None, [2, 3, 4]), (StreamId("stock", "k1"), [4])):
            await to_file(store, tmp_path / "out", Selection(stream=stream, after=at[1], until=at[4]))
            assert numbers(tmp_path / "out") == wanted

    async def test_ends_where_the_log_ended_when_it_began(self, store: Store, tmp_path: Path) -> None:
        await filled(store, 3)
        state = await begin(store, Selection(), to="file", id=ids.new())
        await store.commit([Unit(appends=(Append(StreamId("stock", "k0"), ANY, (event(99),)),))])
        sink = FileSink.create(tmp_path / "out")
        await run(store, Selection(), sink, state, tmp_path / "state", clock=SystemClock())
        sink.close()
        assert numbers(tmp_path / "out") == [0, 1, 2]

    async def test_of_a_long_stream_is_read_page_by_page(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("foldbus.replay._PAGE", 2)
        await filled(store, 17)
        await to_file(store, tmp_path / "out", Selection(stream=StreamId("stock", "k0")))
        assert numbers(tmp_path / "out") == [0, 3, 6, 9, 12, 15]
        at = [one.position or 0 for one in (await store.read_all(after=0, limit=20)).records]
        await to_file(store, tmp_path / "out", Selection(stream=StreamId("stock", "k0"), after=at[5], until=at[12]))
        assert numbers(tmp_path / "out") == [6, 9, 12]
        await to_file(store, tmp_path / "out", Selection())
        assert numbers(tmp_path / "out") == list(range(17))


class TestALine:
    def test_holds_the_very_bytes_where_they_are_json(self) -> None:
        data = b'{"price":1.10,"big":123456789012345678901234567890,"who":"\xc3\xa9"}'
        line = line_of(event(1, data=data))
        assert data in line
        assert line.count(b"\n") == 1
        assert json.loads(line)["data"]["big"] == 123456789012345678901234567890

    @pytest.mark.parametrize("data", [b"\xff\x00", b"{", b'{\n"n": 1}'])
    def test_holds_base64_where_they_are_not(self, data: bytes) -> None:
        line = line_of(event(1, data=data))
        assert line.count(b"\n") == 1
        assert base64.b64decode(json.loads(line)["data_base64"]) == data


class Stopping:
    """A sink that passes `n` writes on, then fails once the bytes are out, as an interruption would have it."""

    def __init__(self, sink: FileSink, n: int) -> None:
        self.sink, self.left = sink, n

    async def write(self, records: Sequence[Envelope]) -> None:
        await self.sink.write(records)
        self.left -= 1
        if self.left == 0:
            raise asyncio.CancelledError


class TestAnInterruptedReplay:
    @pytest.fixture(autouse=True)
    def small_pages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("foldbus.replay._PAGE", 4)
        monkeypatch.setattr("foldbus.replay._BATCH", 2)

    @pytest.fixture
    async def interrupted(self, store: Store, tmp_path: Path) -> tuple[Path, Path]:
        """A replay of ten events that ended behind its second write, before it could be counted."""
        await filled(store, 10)
        path, kept = tmp_path / "out", tmp_path / "state"
        state = await begin(store, Selection(), to="file:out", id=ids.new())
        sink = FileSink.create(path)
        with pytest.raises(asyncio.CancelledError):
            await run(store, Selection(), Stopping(sink, 2), state, kept, clock=SystemClock())
        sink.close()
        assert numbers(path) == [0, 1, 2, 3]
        assert State.load(kept).events == 2  # the state is older than the file
        return path, kept

    async def go_on(self, store: Store, path: Path, kept: Path) -> None:
        state = State.load(kept)
        sink = FileSink.resume(path, state)
        try:
            await run(store, Selection(), sink, state, kept, clock=SystemClock())
        finally:
            sink.close()

    async def test_goes_on_with_each_event_once(self, store: Store, interrupted: tuple[Path, Path]) -> None:
        path, kept = interrupted
        await store.commit([Unit(appends=(Append(StreamId("stock", "k0"), ANY, (event(99),)),))])
        await self.go_on(store, path, kept)
        assert numbers(path) == list(range(10))  # and still ends where it was to end
        assert not kept.exists()

    async def test_writes_a_torn_line_anew(self, store: Store, interrupted: tuple[Path, Path]) -> None:
        path, kept = interrupted
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 7)
            file.seek(0, os.SEEK_END)
            file.write(b"x" * 5000)  # what a power cut may leave
        await self.go_on(store, path, kept)
        assert numbers(path) == list(range(10))

    async def test_refuses_a_file_that_lost_lines(self, store: Store, interrupted: tuple[Path, Path]) -> None:
        path, kept = interrupted
        path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
        with pytest.raises(BadReplay, match="1 lines"):
            await self.go_on(store, path, kept)
        path.unlink()
        with pytest.raises(BadReplay, match="gone"):
            await self.go_on(store, path, kept)

    async def test_is_taken_for_no_other(self, store: Store, interrupted: tuple[Path, Path]) -> None:
        state = State.load(interrupted[1])
        check_same(state, store, Selection(), to="file:out")
        with pytest.raises(BadReplay, match="selection"):
            check_same(state, store, Selection(after=1), to="file:out")
        with pytest.raises(BadReplay, match="destination"):
            check_same(state, store, Selection(), to="topic:out")
        state.epoch += 1
        with pytest.raises(BadReplay, match="epoch"):
            check_same(state, store, Selection(), to="file:out")

    async def test_that_never_was_cannot_go_on(self, tmp_path: Path) -> None:
        with pytest.raises(BadReplay, match="no interrupted replay"):
            State.load(tmp_path / "none")
        (tmp_path / "none").write_text("{}")
        with pytest.raises(BadReplay, match="no replay's state"):
            State.load(tmp_path / "none")


class Broker:
    """A transport that answers what it is told to, then acknowledges."""

    max_bytes = 1_000_000

    def __init__(self, *answers: Sequence[type[Published]]) -> None:
        self.answers = list(answers)
        self.written: list[Outgoing] = []
        self.calls = 0

    async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Published]:
        self.calls += 1
        kinds = self.answers.pop(0) if self.answers else [Ack] * len(batch)
        found: list[Published] = []
        for record, kind in zip(batch, kinds, strict=True):
            if kind is Ack:
                self.written.append(record)
            found.append(Ack(0, 0) if kind is Ack else kind(ValueError("no")))  # type: ignore[call-arg, arg-type]
        return found


class FakeClock(SystemClock):
    def __init__(self) -> None:
        self.at = 0.0

    def monotonic(self) -> float:
        return self.at


def topic_sink(broker: Broker, **options: Any) -> TopicSink:
    given: dict[str, Any] = {"clock": SystemClock()}
    return TopicSink(broker, "copy.events", UUID(int=7), **(given | options))  # type: ignore[arg-type]


class TestATopic:
    async def test_gets_the_first_ids_positions_and_the_mark(self) -> None:
        broker = Broker()
        one = event(1, stream=StreamId("stock", "k1"), version=3, position=17, epoch=2, headers={"traceparent": "x"})
        await topic_sink(broker).write([one])
        (record,) = broker.written
        headers = dict(record.headers)
        assert record.topic == "copy.events"
        assert headers["ce_id"] == str(one.id).encode()
        assert (headers["ce_position"], headers["ce_sourceepoch"], headers["ce_sequence"]) == (b"17", b"2", b"3")
        assert headers["foldbus-replayed"] == str(UUID(int=7)).encode()
        assert record.value == one.data

    async def test_gets_again_what_was_not_acknowledged_in_order(self) -> None:
        broker = Broker([Ack, Unknown, Unknown])
        await topic_sink(broker).write([event(n) for n in range(3)])
        assert [record.value for record in broker.written] == [b'{"n":%d}' % n for n in range(3)]
        assert broker.calls == 2

    async def test_that_refuses_a_record_ends_the_replay(self) -> None:
        with pytest.raises(ValueError, match="no"):
            await topic_sink(Broker([Ack, Failed])).write([event(n) for n in range(2)])

    async def test_gets_no_more_per_second_than_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock, broker, naps = FakeClock(), Broker(), list[float]()

        async def sleep(seconds: float) -> None:
            naps.append(seconds)
            clock.at += seconds

        monkeypatch.setattr("foldbus.replay.asyncio.sleep", sleep)
        sink = topic_sink(broker, clock=clock, rate=20.0)
        await sink.write([event(n) for n in range(7)])
        await sink.write([event(n) for n in range(3)])
        assert len(broker.written) == 10
        assert clock.at == pytest.approx(9 / 20)  # when the tenth went

    async def test_for_commands_or_replies_is_refused(self) -> None:
        for name in ("shop.commands", "shop.replies", "shop.inbox", "shop.dlq"):
            with pytest.raises(BadReplay, match="not for events"):
                await TopicSink(Broker(), name, UUID(int=7), clock=SystemClock()).check()  # type: ignore[arg-type]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    return Desk("desk", f"sqlite:{tmp_path}/data", f"embedded:{tmp_path}/data")


def read_topic(desk: Desk, topic: str) -> list[Envelope]:
    async def read(connection: Any) -> list[Envelope]:
        ends = await connection.transport.admin.offsets(topic)
        left = sum(end for _, end in ends.values())
        found: list[Envelope] = []
        async with connection.transport.tail(topic, start="begin") as consumer, asyncio.timeout(45):
            while len(found) < left:
                found += [from_record(one) for one in await consumer.poll(max_records=1000, timeout_s=0.2)]
        return sorted(found, key=lambda one: one.position or 0)

    return desk.do(read, worker=False)


class TestTheCommand:
    def test_counts_first_then_writes_a_file_that_it_does_not_overwrite_unasked(self, desk: Desk) -> None:
        desk.open(1, 2)
        dry = desk.cli("replay", "--to", "file:out.jsonl", "--type", "desk.opened.v1", "--dry-run", "--json").data
        assert (dry["dry_run"], dry["events"], dry["by_type"]) == (True, 2, {"desk.opened.v1": 2})
        assert not Path("out.jsonl").exists()
        args = ("--to", "file:out.jsonl", "--type", "desk.opened.v1", "--json")
        done = desk.cli("replay", *args)
        assert (done.code, done.data["events"]) == (0, 2)
        assert numbers_of(Path("out.jsonl")) == [1, 2]
        assert not Path("out.jsonl.replay-state").exists()
        assert desk.cli("replay", *args).code == 2
        assert desk.cli("replay", *args, "--yes").code == 0
        one = desk.cli("replay", "--to", "file:one", "--from-stream", "ticket/t2", "--type", "desk.opened.v1", "--json")
        assert (one.data["events"], numbers_of(Path("one"))) == (1, [2])

    def test_publishes_public_events_only_once_it_is_confirmed(self, desk: Desk) -> None:
        desk.open(1, 2)

        async def make(connection: Any) -> None:
            await connection.transport.admin.create([TopicSpec("copy.events", 1)])

        desk.do(make, worker=False)
        assert desk.cli("replay", "--to", "topic:copy.events").code == 2
        assert desk.cli("replay", "--to", "topic:missing.events", "--yes").code == 2
        done = desk.cli("replay", "--to", "topic:copy.events", "--yes", "--json").data
        first = {one.id: one.position for one in read_topic(desk, "desk.events")}
        copied = read_topic(desk, "copy.events")
        assert {one.id: one.position for one in copied} == {
            id: position for id, position in first.items() if (position or 0) <= done["until_position"]
        }
        assert len({one.headers["foldbus-replayed"] for one in copied}) == 1
        assert done["private_left_out"] > 0
        assert not any(path.is_file() for path in Path(".foldbus/replay").rglob("*"))

    def test_into_a_projection_is_a_rebuild(self, desk: Desk) -> None:
        desk.open(1)
        dry = desk.cli("replay", "--to", "projection:tickets", "--dry-run", "--json").data
        assert dry["by_type"]["desk.opened.v1"] == 1
        assert "desk.noted.v1" not in dry["by_type"]
        assert desk.cli("replay", "--to", "projection:tickets", "--json").data["swapped"] is True
        assert desk.cli("replay", "--to", "projection:tickets", "--type", "desk.opened.v1").code == 2

    @pytest.mark.parametrize(
        "args",
        [
            ("--to", "elsewhere:x"),
            ("--to", "file:"),
            ("--to", "file:out", "--from-stream", "ticket"),
            ("--to", "file:out", "--since", "yesterday"),
            ("--to", "file:out", "--rate", "5"),
            ("--to", "file:out", "--resume"),
            ("--to", "file:no/such/directory/out"),
        ],
    )
    def test_says_what_cannot_be_and_exits_2(self, desk: Desk, args: tuple[str, ...]) -> None:
        desk.cli("db upgrade")
        said = desk.cli("replay", *args)
        assert (said.code, said.out) == (2, "")
        assert said.err

    def test_interrupted_by_a_signal_goes_on_with_resume(self, desk: Desk, tmp_path: Path) -> None:
        """At a record every ten seconds nobody misses the moment."""
        desk.open(*range(1, 5))

        async def make(connection: Any) -> None:
            await connection.transport.admin.create([TopicSpec("copy.events", 1)])

        desk.do(make, worker=False)
        (tmp_path / "deskapp.py").write_text(desk.source)
        command = ["replay", "deskapp:app", "--to", "topic:copy.events", "--type", "desk.opened.v1", "--yes", "--json",
                   "--store", desk.store, "--bus", desk.bus]  # fmt: skip
        root = str(Path(__file__).resolve().parents[2])
        process = subprocess.Popen(
            [sys.executable, "-m", "foldbus", *command, "--rate", "0.1"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        state = tmp_path / ".foldbus" / "replay" / "desk-to-copy.events.json"
        bound = time.monotonic() + 45
        while not (state.exists() and 0 < len(read_topic(desk, "copy.events")) < 4):
            assert time.monotonic() < bound
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=45)
        assert (process.returncode, out) == (1, "")
        assert "--resume" in err.splitlines()[-1]
        assert str(state.relative_to(tmp_path)) in err.splitlines()[-1]
        sys.path.insert(0, str(tmp_path))
        try:
            done = cli(*command, "--resume")
        finally:
            sys.path.remove(str(tmp_path))
            sys.modules.pop("deskapp", None)
        assert (done.code, done.data["resumed"]) == (0, True)
        copied = read_topic(desk, "copy.events")
        keys = list(dict.fromkeys(one.key for one in copied))
        assert keys == ["t1", "t2", "t3", "t4"]
        assert len(copied) <= 5  # at most what was under way went twice
        assert len({one.headers["foldbus-replayed"] for one in copied}) == 1
        assert not state.exists()


def numbers_of(path: Path) -> list[int]:
    return [json.loads(line)["data"]["number"] for line in path.read_bytes().splitlines()]
