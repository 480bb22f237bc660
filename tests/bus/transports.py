"""The transports under test, and what every test of them needs: members that poll, listeners that remember.

`TRANSPORTS` names each kind once. A `Rig` opens transports of one kind on one bus: several of them, as several
processes would, and `member.py` opens one more in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from uuid import uuid4

import pytest

from bus.transport import Ack, Assignment, Consumer, Delivery, Headers, Outgoing, PollSettings, TopicSpec, Transport

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Rig:
    """One kind of transport and where its bus is."""

    kind: str
    address: str
    settings: PollSettings

    def open(self) -> AbstractAsyncContextManager[Transport]:
        return open_transport(self.kind, self.address, self.settings)

    def mortal(self) -> Rig:
        """Of short sessions, for a test that waits until one has ended. All others keep members that stand still for
        some seconds, as a busy machine makes them."""
        session_s = {"embedded": 3.0, "kafka": 4.0}[self.kind]
        return replace(self, settings=replace(self.settings, session_timeout_s=session_s, rebalance_timeout_s=60.0))

    async def forget_before(self, transport: Transport, topic: str, partition: int, offset: int) -> None:
        """Makes the bus drop what is below `offset`, as retention would."""
        await FORGET[self.kind](self, transport, topic, partition, offset)


@asynccontextmanager
async def open_transport(kind: str, address: str, settings: PollSettings) -> AsyncIterator[Transport]:
    match kind:
        case "embedded":
            from bus.embedded import EmbeddedTransport

            async with EmbeddedTransport.open(address, settings=settings) as embedded:
                yield embedded
        case "kafka":
            from bus.kafka import KafkaTransport

            async with KafkaTransport.open(address, settings=settings, client_id=unique("test")) as kafka:
                yield kafka
        case _:
            raise ValueError(f"no transport {kind!r}")


def _embedded(request: pytest.FixtureRequest) -> Rig:
    path: Path = request.getfixturevalue("tmp_path")
    return Rig(
        "embedded",
        str(path / "bus.db"),
        PollSettings(session_timeout_s=30.0, heartbeat_s=0.1, rebalance_timeout_s=30.0, publish_deadline_s=30.0),
    )


def _kafka(request: pytest.FixtureRequest) -> Rig:
    return Rig(
        "kafka",
        request.getfixturevalue("kafka"),
        PollSettings(
            session_timeout_s=30.0,
            heartbeat_s=0.3,
            rebalance_timeout_s=30.0,
            request_timeout_s=30.0,
            publish_deadline_s=30.0,
        ),
    )


TRANSPORTS: dict[str, Callable[[pytest.FixtureRequest], Rig]] = {"embedded": _embedded, "kafka": _kafka}


async def _forget_embedded(rig: Rig, transport: Transport, topic: str, partition: int, offset: int) -> None:
    from bus.embedded import EmbeddedTransport

    assert isinstance(transport, EmbeddedTransport)
    await transport.forget_before(topic, partition, offset)


async def _forget_kafka(rig: Rig, transport: Transport, topic: str, partition: int, offset: int) -> None:
    from aiokafka import TopicPartition
    from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

    admin = AIOKafkaAdminClient(bootstrap_servers=rig.address)
    await admin.start()
    try:
        await admin.delete_records({TopicPartition(topic, partition): RecordsToDelete(before_offset=offset)})
    finally:
        await admin.close()


FORGET: dict[str, Callable[[Rig, Transport, str, int, int], Awaitable[None]]] = {
    "embedded": _forget_embedded,
    "kafka": _forget_kafka,
}


def unique(name: str) -> str:
    """Topic and group names are never used twice: one broker serves the whole run."""
    return f"{name}-{uuid4().hex[:10]}"


async def eventually(condition: Callable[[], bool], *, what: str, within_s: float = 40.0) -> None:
    """Waits until `condition` holds; fails with `what` after `within_s`."""
    try:
        async with asyncio.timeout(within_s):
            while not condition():  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"not within {within_s} s: {what}") from None


async def new_topic(transport: Transport, *, partitions: int = 4, max_bytes: int = 1_000_000) -> str:
    name = unique("topic")
    await transport.admin.create([TopicSpec(name, partitions=partitions, max_bytes=max_bytes)])
    return name


async def put(
    transport: Transport, topic: str, *values: str, partition: int | None = 0, headers: Headers = ()
) -> list[int]:
    """Publishes and insists on acknowledgements; answers the offsets."""
    answers = await transport.publish([Outgoing(topic, b"k", v.encode(), headers, partition) for v in values])
    assert [a for a in answers if not isinstance(a, Ack)] == []
    return [a.offset for a in answers if isinstance(a, Ack)]


async def take(consumer: Consumer, n: int, *, within_s: float = 20.0) -> list[Delivery]:
    """Polls until `n` records are here."""
    records: list[Delivery] = []
    async with asyncio.timeout(within_s):
        while len(records) < n:
            records += await consumer.poll(max_records=500, timeout_s=0.2)
    assert len(records) == n, f"wanted {n} records, came {len(records)}"
    return records


def values(records: Sequence[Delivery]) -> list[str]:
    return [r.value.decode() if r.value is not None else "" for r in records]


@dataclass
class Recorder:
    """A listener that remembers. `start` answers `assigned`; `drain` runs inside `revoked`."""

    start: Callable[[Assignment], int | None] = lambda part: None
    drain: Callable[[Sequence[Assignment], bool], Awaitable[None]] | None = None
    journal: list[str] = field(default_factory=list[str])
    """Shared among listeners, it tells the order in which things happened: "a + 3", "a - 3"."""
    name: str = "a"
    held: set[Assignment] = field(default_factory=set[Assignment])
    assigned_parts: list[Assignment] = field(default_factory=list[Assignment])
    revoked_parts: list[Assignment] = field(default_factory=list[Assignment])
    lost_parts: list[Assignment] = field(default_factory=list[Assignment])
    committed: dict[Assignment, int | None] = field(default_factory=dict[Assignment, "int | None"])
    stood_by: int = 0
    """How often it was told that the group has nothing for it."""

    @property
    def partitions(self) -> set[int]:
        return {part.partition for part in self.held}

    async def assigned(
        self, parts: Sequence[Assignment], committed: Mapping[Assignment, int | None]
    ) -> Mapping[Assignment, int]:
        assert set(committed) == set(parts)
        self.stood_by += not parts
        self.held |= set(parts)
        self.assigned_parts += parts
        self.committed.update(committed)
        self.journal += [f"{self.name} + {part.partition}" for part in parts]
        starts = {part: self.start(part) for part in parts}
        return {part: offset for part, offset in starts.items() if offset is not None}

    async def revoked(self, parts: Sequence[Assignment], *, lost: bool) -> None:
        assert set(parts) <= self.held, "revoked what was not assigned"
        if self.drain is not None:
            await self.drain(parts, lost)
        self.held -= set(parts)
        (self.lost_parts if lost else self.revoked_parts).extend(parts)
        self.journal += [f"{self.name} - {part.partition}" for part in parts]


@dataclass
class Member:
    """A consumer that is polled in the background, as the engine does."""

    consumer: Consumer
    listener: Recorder
    records: list[Delivery] = field(default_factory=list[Delivery])

    def part(self, partition: int) -> Assignment:
        return next(part for part in self.listener.held if part.partition == partition)


@asynccontextmanager
async def member(
    transport: Transport, group: str, topic: str, listener: Recorder | None = None
) -> AsyncIterator[Member]:
    listener = listener or Recorder()
    async with transport.consume(group, [topic], listener=listener) as consumer:
        this = Member(consumer, listener)
        stop = False

        async def pump() -> None:
            while not stop:
                this.records += await consumer.poll(max_records=500, timeout_s=0.05)

        task = asyncio.create_task(pump())
        try:
            yield this
        finally:
            stop = True
            await task


class Child:
    """`member.py` in a process of its own, which may be killed, stopped and continued."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.events: dict[str, list[dict[str, object]]] = defaultdict(list)
        self._reader = asyncio.create_task(self._read())

    @classmethod
    @asynccontextmanager
    async def start(cls, rig: Rig, *, group: str, topic: str) -> AsyncIterator[Child]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.bus.member", rig.kind, rig.address, json.dumps(asdict(rig.settings))),
            *(group, topic),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        child = cls(process)
        try:
            yield child
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            await child._reader

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            event = json.loads(line)
            self.events[event["event"]].append(event)

    def partitions(self) -> set[int]:
        """What it has been assigned so far, less what it has been told to be gone."""
        held: set[int] = set()
        for event in sorted(self.events["assigned"] + self.events["revoked"], key=_number):
            parts = event["partitions"]
            assert isinstance(parts, list)
            held = held | set(parts) if event["event"] == "assigned" else held - set(parts)
        return held


def _number(event: dict[str, object]) -> int:
    number = event["n"]
    assert isinstance(number, int)
    return number


def all_partitions(members: Collection[Member]) -> list[int]:
    """Every partition in the hands of these members, doubles included."""
    return sorted(part.partition for m in members for part in m.listener.held)
