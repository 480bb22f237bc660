"""A transport and a processor that do what a test tells them, when it tells them: interleavings forced, not met.

`FakeTransport` keeps a log per partition and the group's offsets, as a broker would; rebalances and errors happen
inside the next poll, in the order in which a test asks for them. `Recorder` is a processor over a store in memory.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from random import Random
from typing import Any
from uuid import UUID

from bus.consumer import ConsumerEngine, EngineSettings
from bus.envelope import Envelope, Failure, Kind, Offset
from bus.errors import Fenced, MissingTopics, Undecodable, UnknownType
from bus.metrics import MemoryMetrics
from bus.processing import Again, Answer, Done, Item, Result, Watermarks
from bus.seams import NoFailpoints, SystemClock
from bus.transport import Assignment, Assignments, Delivery

NOW = datetime(2024, 5, 1, tzinfo=UTC)
T = "orders.events"


class FakeTransport:
    """One member's view. Several engines may use it one after the other: logs and committed offsets stay."""

    max_bytes = 1_000_000

    def __init__(self) -> None:
        self.logs: dict[tuple[str, int], list[Delivery]] = defaultdict(list)
        self.first: dict[tuple[str, int], Offset] = {}
        self.committed: dict[tuple[str, int], Offset] = {}
        self.commits: list[dict[tuple[str, int], Offset]] = []
        self.commit_errors: deque[Exception] = deque()
        self.join_errors: deque[Exception] = deque()
        self.positions: dict[Assignment, Offset] = {}
        self.paused: set[Assignment] = set()
        self.pauses = self.resumes = self.polls = self.joins = 0
        self.poll_cancelled = self.in_step = False
        self.polled_max: list[int] = []
        self.told = False
        self._epoch = 0
        self._steps: deque[tuple[Callable[[], Awaitable[Any]], asyncio.Future[Any]]] = deque()
        self._injected: deque[Delivery] = deque()
        self._news = asyncio.Event()
        self._listener: Assignments | None = None

    # -- what a test does with it -------------------------------------------------------------------------------------

    def record(
        self,
        key: str,
        value: bytes = b"",
        *,
        partition: int = 0,
        topic: str = T,
        offset: int | None = None,
        type: str = "e",
    ) -> Offset:
        """Appends; `offset` beyond the end leaves a gap, as compaction does."""
        log = self.logs[topic, partition]
        at = (log[-1].offset + 1 if log else 0) if offset is None else offset
        log.append(Delivery(Assignment(topic, partition), at, key.encode(), value, (("type", type.encode()),), NOW))
        self._news.set()
        return at

    async def assign(self, *partitions: int, topic: str = T) -> list[Assignment]:
        self._epoch += 1
        parts = [Assignment(topic, partition, self._epoch) for partition in partitions or (0,)]

        async def step() -> list[Assignment]:
            assert self._listener is not None
            committed = {part: self.committed.get((part.topic, part.partition)) for part in parts}
            starts = await self._listener.assigned(parts, committed)
            for part in parts:
                self.positions[part] = starts.get(part, committed[part] or 0)
            return parts

        return await self._in_poll(step)  # type: ignore[no-any-return]

    async def revoke(self, *parts: Assignment, lost: bool = False) -> None:
        async def step() -> None:
            assert self._listener is not None
            if lost:
                for part in parts:
                    del self.positions[part]
            await self._listener.revoked(parts, lost=lost)
            for part in parts:
                self.positions.pop(part, None)
                self.paused.discard(part)

        await self._in_poll(step)

    async def raise_in_poll(self, error: Exception) -> None:
        async def step() -> None:
            raise error

        await self._in_poll(step)

    def inject(self, delivery: Delivery) -> None:
        """Comes out of the next poll, whatever the assignment says."""
        self._injected.append(delivery)
        self._news.set()

    def take_away(self, part: Assignment) -> None:
        """The broker gave it to somebody else and this member has not heard of it: its commits are fenced."""
        del self.positions[part]

    async def _in_poll(self, step: Callable[[], Awaitable[Any]]) -> Any:
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._steps.append((step, done))
        self._news.set()
        return await done

    # -- the port -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def consume(
        self, group: str, topics: Sequence[str], *, listener: Assignments
    ) -> AsyncIterator[FakeTransport]:
        self.joins += 1
        if self.join_errors:
            raise self.join_errors.popleft()
        self._listener = listener
        try:
            yield self
        finally:
            if self.positions:
                await listener.revoked(list(self.positions), lost=False)
            self.positions.clear()
            self.paused.clear()
            self._listener = None

    async def poll(self, *, max_records: int, timeout_s: float) -> Sequence[Delivery]:
        self.polls += 1
        self.polled_max.append(max_records)
        try:
            await asyncio.sleep(0)
            for _ in range(2):
                self._news.clear()
                while self._steps:
                    step, done = self._steps.popleft()
                    self.in_step = True
                    try:
                        done.set_result(await step())
                    except Exception:
                        done.set_result(None)
                        raise
                    finally:
                        self.in_step = False
                if self._injected:
                    return [self._injected.popleft()]
                found = self._read(max_records)
                if found or timeout_s == 0:
                    return found
                if self.told:
                    self.told = False
                    return []
                try:
                    async with asyncio.timeout(timeout_s):
                        await self._news.wait()
                except TimeoutError:
                    return []
            return []
        except asyncio.CancelledError:
            self.poll_cancelled = True
            raise

    def _read(self, max_records: int) -> list[Delivery]:
        found: list[Delivery] = []
        for part, position in self.positions.items():
            if part in self.paused:
                continue
            log = self.logs[part.topic, part.partition]
            low, high = 0, len(log)
            while low < high:
                middle = (low + high) // 2
                low, high = (middle + 1, high) if log[middle].offset < position else (low, middle)
            for one in log[low : low + max_records - len(found)]:
                found.append(Delivery(part, one.offset, one.key, one.value, one.headers, one.time))
                self.positions[part] = one.offset + 1
        return found

    def wake(self) -> None:
        self.told = True
        self._news.set()

    def pause(self, parts: Collection[Assignment]) -> None:
        self.pauses += 1
        self.paused.update(parts)

    def resume(self, parts: Collection[Assignment]) -> None:
        self.resumes += 1
        self.paused.difference_update(parts)
        self._news.set()

    async def commit(self, offsets: Mapping[Assignment, Offset]) -> None:
        await asyncio.sleep(0)
        if self.commit_errors:
            raise self.commit_errors.popleft()
        if any(part not in self.positions for part in offsets):
            raise Fenced("not yours")
        plain = {(part.topic, part.partition): offset for part, offset in offsets.items()}
        self.commits.append(plain)
        self.committed.update(plain)

    async def end_offsets(self) -> Mapping[Assignment, Offset]:
        return {part: self._end(part.topic, part.partition) for part in self.positions}

    def _end(self, topic: str, partition: int) -> Offset:
        log = self.logs[topic, partition]
        return log[-1].offset + 1 if log else self.first.get((topic, partition), 0)

    @property
    def admin(self) -> FakeTransport:
        return self

    async def offsets(self, topic: str) -> Mapping[int, tuple[Offset, Offset]]:
        found = {p: (self.first.get((t, p), 0), self._end(t, p)) for t, p in list(self.logs) if t == topic}
        for p in range(8):
            found.setdefault(p, (self.first.get((topic, p), 0), self._end(topic, p)))
        if topic == "missing":
            raise MissingTopics([topic])
        return found


def parse(delivery: Delivery) -> Envelope:
    if delivery.value == b"unreadable":
        raise Undecodable("not what the type demands")
    if delivery.value == b"parser bug":
        raise ZeroDivisionError
    return envelope(
        (delivery.key or b"").decode(),
        id=UUID(int=delivery.partition << 64 | delivery.offset + 1),
        type=delivery.headers[0][1].decode(),
        data=delivery.value or b"",
    )


def envelope(key: str, *, id: UUID, type: str = "e", data: bytes = b"") -> Envelope:
    return Envelope(id, Kind.EVENT, type, "orders", key, data, NOW, id)


class Recorder:
    """Handles everything unless `answer` says otherwise. `gate` shut, `process` waits in there."""

    group = "billing"

    def __init__(self, answer: Callable[[Item], Answer] = lambda item: Done()) -> None:
        self.answer = answer
        self.gate = asyncio.Event()
        self.gate.set()
        self.entered = 0
        self.handled: list[tuple[str, int]] = []
        self.batches: list[list[Item]] = []
        self.marks: list[dict[tuple[str, int], Offset]] = []
        self.stored: dict[tuple[str, int], Offset] = {}
        self.stored_alone: list[dict[tuple[str, int], Offset]] = []
        self.process_errors: deque[Exception] = deque()
        self.give_up_errors: deque[Exception] = deque()
        self.store_errors: deque[Exception] = deque()
        self.read_errors: deque[Exception] = deque()
        self.give_up_answers: deque[Result] = deque()
        self.dead: list[tuple[Item, Failure]] = []
        self.raw: list[tuple[Delivery, Failure]] = []
        self.forgotten: list[tuple[str, int]] = []
        self.cancelled = 0

    def wants(self, type_name: str) -> bool:
        if type_name == "unknown":
            raise UnknownType("nobody here names 'unknown'")
        return type_name != "other"

    async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Answer]:
        self.entered += 1
        marks = dict(watermarks)
        self.batches.append(list(batch))
        try:
            await self.gate.wait()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.process_errors:
            raise self.process_errors.popleft()
        self.marks.append(marks)
        self.stored.update(marks)
        results: list[Answer] = []
        stuck: dict[str, Answer] = {}
        for item in batch:
            key = item.envelope.key
            result = Again() if key in stuck else self.answer(item)
            if isinstance(result, Done):
                self.handled.append((key, offset_of(item)))
            else:
                stuck[key] = result
            results.append(result)
        return results

    async def give_up(self, item: Item, failure: Failure) -> Result:
        await asyncio.sleep(0)
        if self.give_up_errors:
            raise self.give_up_errors.popleft()
        if self.give_up_answers:
            return self.give_up_answers.popleft()
        self.dead.append((item, failure))
        return Done()

    async def give_up_raw(self, delivery: Delivery, failure: Failure) -> None:
        await asyncio.sleep(0)
        if self.give_up_errors:
            raise self.give_up_errors.popleft()
        self.raw.append((delivery, failure))

    async def stored_watermarks(self) -> Watermarks:
        if self.read_errors:
            raise self.read_errors.popleft()
        return dict(self.stored)

    async def store_watermarks(self, watermarks: Watermarks) -> None:
        await asyncio.sleep(0)
        if self.store_errors:
            raise self.store_errors.popleft()
        self.stored_alone.append(dict(watermarks))
        self.stored.update(watermarks)

    def forget(self, topics: Collection[tuple[str, int]]) -> None:
        self.forgotten += sorted(topics)

    def offsets(self, key: str) -> list[int]:
        return [offset for found, offset in self.handled if found == key]


def offset_of(item: Item) -> int:
    return -1 if item.delivery is None else item.delivery.offset


FAST = EngineSettings(
    poll_timeout_s=0.02,
    retry_base_s=0.01,
    retry_max_s=0.05,
    retry_total_s=60.0,
    commit_interval_s=0.01,
    commit_timeout_s=20.0,
    drain_timeout_s=20.0,
)


def make_engine(
    transport: Any, processor: Any, settings: EngineSettings = FAST, *, topics: Sequence[str] = (T,), **options: Any
) -> tuple[ConsumerEngine, MemoryMetrics]:
    metrics = MemoryMetrics()
    options = {"clock": SystemClock(), "failpoint": NoFailpoints(), "rng": Random(7), "parse": parse} | options
    return ConsumerEngine(transport, topics, processor, settings=settings, metrics=metrics, **options), metrics


@asynccontextmanager
async def running(engine: ConsumerEngine) -> AsyncIterator[asyncio.Task[None]]:
    """Runs it beside the test; the end is a clean stop, and an error of the engine is the test's."""
    task = asyncio.create_task(engine.run())
    try:
        yield task
    finally:
        engine.stop()
        await asyncio.wait({task}, timeout=40)
        if not task.done():
            task.cancel()
            raise AssertionError("the engine did not stop")
    task.result()
