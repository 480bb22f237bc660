"""Reading: what a group member and a tail have in common. Fetches records, turns aiokafka's errors into ours.

A fetch of aiokafka must never be cancelled (T6), and it waits without a limit while the group rebalances. So it runs in
a task of its own in short slices, and whoever polls waits for the task or for a wake-up, never inside the fetch.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from aiokafka import TopicPartition
from aiokafka.errors import CorruptRecordException as CorruptRecord
from aiokafka.errors import IllegalStateError, KafkaError, OffsetOutOfRangeError

from bus.envelope import Offset
from bus.errors import BusError, OffsetOutOfRange, TransportUnavailable
from bus.kafka import internals
from bus.kafka.unpacking import Unpacking
from bus.metrics import Metrics
from bus.seams import Clock
from bus.transport import Assignment, Delivery

log = logging.getLogger("foldbus.bus")

T = TypeVar("T")

SLICE_S = 0.5
"""A fetch waits no longer than this for records; then it is asked again."""
UNREADABLE_RETRY_S = 30.0
STOP_TIMEOUT_S = 10.0
LOOKS_MAX = 3
"""More than one: what was under way when a partition was put on the list is not rewritten."""


class UnreadablePartition(TransportUnavailable):
    """A partition's next records are damaged (a wrong checksum): nothing is skipped, so this partition stands and is
    tried again every half minute, and the others go on. It takes somebody to look at the broker's disk, or to set the
    group's offset past the damage."""

    def __init__(self, assignment: Assignment, *, position: Offset) -> None:
        super().__init__(
            f"{assignment.topic}[{assignment.partition}] cannot be read from offset {position} on: "
            "the broker's records are damaged; the partition stands, nothing was skipped"
        )
        self.assignment, self.position = assignment, position


class Reader:
    """Records of the partitions in `held`, as long as `open`. One caller at a time."""

    def __init__(self, raw: Any, *, timeout_s: float, clock: Clock, metrics: Metrics, unpacked_bytes_max: int) -> None:
        """`raw` has not started yet."""
        self.raw = raw
        self._unpacking = Unpacking(bytes_max=unpacked_bytes_max, metrics=metrics)
        self._unpacking.watch(raw)
        self.held: dict[TopicPartition, Assignment] = {}
        self.open = False
        self._timeout_s, self._clock, self._metrics = timeout_s, clock, metrics
        self._fetch: asyncio.Task[dict[Any, list[Any]]] | None = None
        self._wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._paused: set[TopicPartition] = set()
        self._next: dict[TopicPartition, Offset] = {}
        self._unreadable: dict[TopicPartition, float] = {}
        self._looks: Counter[tuple[TopicPartition, Offset]] = Counter()

    def hold(self, parts: Collection[Assignment], starts: Mapping[Assignment, Offset]) -> None:
        """Reads these, from there, and nothing else. Raises IllegalStateError when aiokafka holds them no more."""
        for part in parts:
            self.raw.seek(_partition(part), starts[part])
        self.held = {_partition(part): part for part in parts}
        self._paused.clear()
        self._unreadable.clear()
        self._unpacking.closely.clear()
        self._looks.clear()
        self._next = {_partition(part): starts[part] for part in parts}
        self.open = True

    def drop(self) -> None:
        self.open = False
        self.held = {}

    def wake(self) -> None:
        """Whoever waits in `wait` or `take` returns."""
        if not self._wake.done():
            self._wake.set_result(None)

    async def wait(self, timeout_s: float) -> None:
        await asyncio.wait({self._wake}, timeout=max(0.0, timeout_s))
        self._woken()

    async def take(self, *, max_records: int, timeout_s: float) -> list[Delivery]:
        """What can be had within `timeout_s`, or a slice of it; empty when woken."""
        if self._unreadable:
            self._try_unreadable_again()
        if self._fetch is None:
            wait_ms = int(min(max(timeout_s, 0.0), SLICE_S) * 1000)
            self._fetch = asyncio.create_task(self.raw.getmany(timeout_ms=wait_ms, max_records=max_records))
        events: list[asyncio.Future[Any]] = [self._fetch, self._wake]
        await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
        self._woken()
        if not self.open or not self._fetch.done():
            return []
        fetch, self._fetch = self._fetch, None
        if fetch.cancelled():
            raise TransportUnavailable("the fetch was cancelled: the consumer is closing")
        error = fetch.exception()
        if error is None:
            return self._deliveries(fetch.result())
        internals.mend_fetch_count(self.raw)
        if isinstance(error, UnicodeDecodeError) and self._looks_closely():
            return []
        raise await self._explained(error) from error

    async def settle(self) -> None:
        """Waits for a fetch that is under way and forgets what it brings; every partition is then placed anew."""
        fetch, self._fetch = self._fetch, None
        if fetch is not None:
            await asyncio.wait({fetch})
            if not fetch.cancelled() and fetch.exception() is not None:
                internals.mend_fetch_count(self.raw)

    def pause(self, parts: Collection[Assignment]) -> None:
        for partition in self._current(parts):
            self._paused.add(partition)
            if partition not in self._unreadable:
                _quietly(self.raw.pause, partition)

    def resume(self, parts: Collection[Assignment]) -> None:
        for partition in self._current(parts):
            self._paused.discard(partition)
            if partition not in self._unreadable:
                _quietly(self.raw.resume, partition)

    async def end_offsets(self) -> Mapping[Assignment, Offset]:
        held = dict(self.held)
        if not held:
            return {}
        ends = await self.ask(self.raw.end_offsets(list(held)), "reading end offsets")
        return {part: ends[partition] for partition, part in held.items()}

    async def ask(self, question: Awaitable[T], what: str) -> T:
        """Bounded (aiokafka repeats without a limit, T12); raises TransportUnavailable."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await question
        except TimeoutError as error:
            raise TransportUnavailable(f"{what}: no answer from the broker within {self._timeout_s:g} s") from error
        except (KafkaError, OSError) as error:
            raise TransportUnavailable(f"{what}: {error!r}") from error

    async def close(self) -> None:
        """Leaves and disconnects, within a bound."""
        self.drop()
        stopping = asyncio.ensure_future(self.raw.stop())
        await asyncio.wait({stopping}, timeout=min(STOP_TIMEOUT_S, self._timeout_s))
        if not stopping.done():
            log.warning("a consumer did not stop in time: its broker does not answer")
            stopping.cancel()
            await internals.abandon_consumer(self.raw)
        elif stopping.cancelled() or stopping.exception() is not None:
            # A fetch that could not reach its broker ends aiokafka's stop half-way, and its client would stay.
            await internals.abandon_consumer(self.raw)
        await asyncio.gather(stopping, return_exceptions=True)
        if self._fetch is not None:  # the consumer is gone: now a fetch may be cancelled
            self._fetch.cancel()
            await asyncio.gather(self._fetch, return_exceptions=True)

    def _woken(self) -> None:
        if self._wake.done():
            self._wake = asyncio.get_running_loop().create_future()

    def _current(self, parts: Collection[Assignment]) -> list[TopicPartition]:
        found = ((part, _partition(part)) for part in parts)
        return [partition for part, partition in found if self.held.get(partition) == part]

    def _deliveries(self, fetched: Mapping[TopicPartition, list[Any]]) -> list[Delivery]:
        deliveries: list[Delivery] = []
        add = deliveries.append
        mark = self._unpacking.mark if self._unpacking.marked else None
        for partition, records in fetched.items():
            part = self.held.get(partition)
            if part is None or not records:
                continue
            if partition in self._paused:  # paused while the fetch was under way: read again after `resume`
                _quietly(self.raw.seek, partition, records[0].offset)
                continue
            self._next[partition] = records[-1].offset + 1
            if self._looks and partition in self._unpacking.closely:
                self._unpacking.closely.discard(partition)
                self._looks = Counter({at: n for at, n in self._looks.items() if at[0] != partition})
            for record in records:
                headers = record.headers
                for _, value in headers:
                    if value is None:
                        headers = tuple([(name, value or b"") for name, value in headers])
                        break
                flaw = ""
                if mark is not None and headers and headers[0][0] == mark:
                    flaw, headers = headers[0][1].decode(), headers[1:]
                add(Delivery(part, record.offset, record.key, record.value, headers, _time(record.timestamp), flaw))
        return deliveries

    async def _explained(self, error: BaseException) -> BusError:
        if isinstance(error, OffsetOutOfRangeError):
            ((partition, wanted),) = dict(error.args[0]).items()
            part = self.held.get(partition)
            if part is None:
                return TransportUnavailable(f"reading failed: {error!r}")
            first = await self.ask(self.raw.beginning_offsets([partition]), "reading first offsets")
            end = await self.ask(self.raw.end_offsets([partition]), "reading end offsets")
            self._metrics.count("foldbus_offset_out_of_range_total", topic=part.topic)
            return OffsetOutOfRange(part, wanted=wanted, first=first[partition], end=end[partition])
        if isinstance(error, KafkaError) and not isinstance(error, CorruptRecord):
            self._metrics.count("foldbus_poll_failures_total", why=type(error).__name__)
            return TransportUnavailable(f"reading failed: {error!r}")
        return self._unreadable_at(internals.failed_partition(self.raw), error)

    def _looks_closely(self) -> bool:
        """A header name that is no UTF-8: until something of that partition is delivered, what is fetched of it is
        rewritten (`unpacking.py`), and all others go back to what was delivered of them. False when that did not help
        at this place."""
        culprit = internals.failed_partition(self.raw)
        if culprit is None or culprit not in self.held:
            return False
        place = (culprit, self._next[culprit])
        if self._looks[place] == LOOKS_MAX:
            return False
        self._looks[place] += 1
        self._unpacking.closely.add(culprit)
        for partition in self.held:
            _quietly(self.raw.seek, partition, self._next[partition])
        return True

    def _unreadable_at(self, culprit: TopicPartition | None, error: BaseException) -> BusError:
        """The partition stands, and all others go back to what was delivered of them: what `getmany` had already taken
        out of them when it failed is gone with the error, and their positions are past it."""
        for partition in self.held:
            _quietly(self.raw.seek, partition, self._next[partition])
        part = self.held.get(culprit) if culprit is not None else None
        if culprit is None or part is None:
            return TransportUnavailable(f"reading failed: {error!r}")
        _quietly(self.raw.pause, culprit)
        self._unreadable[culprit] = self._clock.monotonic() + UNREADABLE_RETRY_S
        position = self._next[culprit]
        self._metrics.count("foldbus_unreadable_partitions_total", topic=part.topic)
        log.error("%s[%s] cannot be read from offset %s on: %r", part.topic, part.partition, position, error)
        return UnreadablePartition(part, position=position)

    def _try_unreadable_again(self) -> None:
        now = self._clock.monotonic()
        for partition in [tp for tp, again_at in self._unreadable.items() if again_at <= now]:
            del self._unreadable[partition]
            if partition not in self._paused:
                _quietly(self.raw.resume, partition)


def partitions_of(parts: Sequence[Assignment]) -> list[TopicPartition]:
    return [_partition(part) for part in parts]


def _partition(part: Assignment) -> TopicPartition:
    return TopicPartition(part.topic, part.partition)


def _quietly(verb: Any, partition: TopicPartition, *arguments: Any) -> None:
    try:
        verb(partition, *arguments)
    except (IllegalStateError, KeyError):  # taken away a moment ago: the rebalance tells the rest
        pass


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LATEST_MS = 253_402_300_799_000


def _time(milliseconds: int) -> datetime:
    """A record's timestamp; the producer may have written anything, so it is held within what a datetime can be."""
    if 0 <= milliseconds <= _LATEST_MS:
        return datetime.fromtimestamp(milliseconds / 1000, UTC)
    return _EPOCH if milliseconds < 0 else datetime.max.replace(tzinfo=UTC)
