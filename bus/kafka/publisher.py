"""Publishing: one idempotent producer, whole batches per partition, and a deadline of our own.

Records of a call are grouped by partition and sent as ready-made batches: several times as fast as record by record.
Each partition is a lane that one call holds at a time, first come, first served; so order holds across calls that run
side by side, and a partition that waits or fails holds up no other.

What aiokafka leaves to us:

- An idempotent batch never times out. At the deadline the records are `Unknown`, and the producer is abandoned with
  all that it still has in hand: it must not write, later, what the caller meanwhile sends again (T5).
- After a refused batch the broker takes nothing more for that partition from this producer (T2): it is replaced, and
  what other partitions have under way is finished first.
- A producer that stops waits for every acknowledgement (T4): bounded, then abandoned.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    InvalidTimestampError,
    InvalidTopicError,
    KafkaError,
    MessageSizeTooLargeError,
    PolicyViolationError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
)

from bus.errors import BusError, MessageTooLarge, MissingTopics, TransportUnavailable
from bus.kafka import internals
from bus.kafka.admin import RECORD_OVERHEAD_BYTES, KafkaAdmin
from bus.kafka.batches import Batch, Writer
from bus.kafka.options import compression
from bus.metrics import Metrics
from bus.partitioner import hashes_of
from bus.seams import Clock
from bus.transport import Ack, Failed, Outgoing, PollSettings, Published, TopicState, Unknown

log = logging.getLogger("foldbus.bus")

BATCH_BYTES = 512 * 1024
"""A batch is closed here, before compression, unless one record alone is larger."""
STOP_TIMEOUT_S = 5.0

_TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)
_REFUSALS = (
    *_TOO_LARGE,
    TopicAuthorizationFailedError,
    ClusterAuthorizationFailedError,
    InvalidTopicError,
    InvalidTimestampError,
    PolicyViolationError,
)
"""The broker looked at the batch and took nothing of it; the same batch gets the same answer."""


class _Malformed(BusError):
    """A record that has no form on the wire."""


@dataclass(slots=True, eq=False)
class _Producer:
    """An aiokafka producer in service. `abandoned` is done when nothing of it is to be waited for any more."""

    raw: Any
    abandoned: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(slots=True, eq=False)
class _Lane:
    """A partition. `turn` is held by the call that sends, the others wait in order."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Publisher:
    """Publishes for one transport. `close` is bounded, whatever the broker does."""

    def __init__(
        self,
        options: dict[str, Any],
        settings: PollSettings,
        admin: KafkaAdmin,
        *,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._compression = compression(settings)
        self._options: dict[str, Any] = {
            **options,
            "acks": "all",
            "enable_idempotence": True,
            "linger_ms": 0,
            "max_batch_size": BATCH_BYTES,
            "max_request_size": 64 * 1024 * 1024,
            "compression_type": self._compression,  # looks whether its codec is there; batches.py writes and compresses
        }
        self._settings, self._admin, self._clock, self._metrics = settings, admin, clock, metrics
        self._topics: dict[str, TopicState] = {}
        self._asking = asyncio.Lock()
        self._lanes: defaultdict[tuple[str, int], _Lane] = defaultdict(_Lane)
        self._producer: _Producer | None = None
        self._producing = asyncio.Lock()
        self._sending: set[asyncio.Task[None]] = set()
        self._retiring: set[asyncio.Task[None]] = set()
        self._keyless = 0
        self._closed = False

    async def start(self) -> None:
        """Raises TransportUnavailable within the request timeout."""
        await self._in_service(asyncio.get_running_loop().time() + self._settings.request_timeout_s)

    async def close(self) -> None:
        self._closed = True
        if self._sending:
            await asyncio.wait(set(self._sending), timeout=STOP_TIMEOUT_S)
        if self._sending and self._producer is not None:
            self._abandon(self._producer)
        self._retire(flush=True)
        if self._retiring:
            _, slow = await asyncio.wait(set(self._retiring), timeout=STOP_TIMEOUT_S)
            for task in slow:
                task.cancel()
            if slow:
                await asyncio.wait(slow)
        for task in set(self._sending):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Published]:
        if self._closed:
            raise BusError("the transport is closed; nothing was published")
        deadline = asyncio.get_running_loop().time() + self._settings.publish_deadline_s
        results: list[Published | None] = [None] * len(batch)
        wanted = {record.topic for record in batch}
        if self._asking.locked() or not wanted <= self._topics.keys():
            # First come, first served, so that a call that has to ask is not overtaken by the next one.
            async with self._asking:
                trouble = await self._learn(wanted - self._topics.keys())
                lanes = self._sort(batch, results, trouble)
        else:
            lanes = self._sort(batch, results, {})
        if lanes:
            # A task of its own: who cancels a publish does not stop what is already on its way, nor what waits behind.
            sending = asyncio.create_task(self._send_all(lanes, batch, results, deadline))
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)
            await asyncio.shield(sending)
        return [result if result is not None else _not_sent() for result in results]

    async def _send_all(
        self,
        lanes: dict[tuple[str, int], list[int]],
        batch: Sequence[Outgoing],
        results: list[Published | None],
        deadline: float,
    ) -> None:
        work = [self._send(*lane, batch, indexes, results, deadline) for lane, indexes in lanes.items()]
        if len(work) == 1:
            await work[0]
        else:
            await _all(work)

    # --- where a record goes -----------------------------------------------------------------------------------------

    async def _learn(self, names: set[str]) -> dict[str, Failed | Unknown]:
        """Looks topics up; answers what to say of the records of those that are not to be had."""
        if not names:
            return {}
        try:
            found = await self._admin.describe(names)
        except TransportUnavailable as error:
            return dict.fromkeys(names, Unknown(error))
        except BusError as error:
            if len(names) == 1:
                return {name: Failed(error) for name in names}
            # One of them is refused (no right to it, no possible name) and must not take the others along.
            trouble: dict[str, Failed | Unknown] = {}
            for name in sorted(names):
                trouble |= await self._learn({name})
            return trouble
        self._topics.update(found)
        missing = names - found.keys()
        if missing:
            self._metrics.count("foldbus_publish_failures_total", len(missing), why="missing topic")
            log.warning("publishing to topics that do not exist: %s", ", ".join(sorted(missing)))
        return {name: Failed(MissingTopics([name])) for name in missing}

    def _sort(
        self, batch: Sequence[Outgoing], results: list[Published | None], trouble: dict[str, Failed | Unknown]
    ) -> dict[tuple[str, int], list[int]]:
        """Who is too large is found out in `_build`, where sizes are known without counting."""
        hashes = hashes_of([record.key or b"" for record in batch])
        lanes: dict[tuple[str, int], list[int]] = {}
        by_topic: dict[str, dict[int, list[int]]] = {}
        topic, state, mine = "", None, dict[int, list[int]]()
        for index, record in enumerate(batch):
            if record.topic != topic:
                topic = record.topic
                state, mine = self._topics.get(topic), by_topic.setdefault(topic, {})
            if state is None:
                results[index] = trouble.get(topic) or _not_sent()
                continue
            key, partition = record.key, record.partition
            if partition is None:
                if key is not None:
                    partition = hashes[index] % state.partitions
                else:
                    self._keyless += 1
                    partition = self._keyless % state.partitions
            elif not 0 <= partition < state.partitions:
                results[index] = Failed(
                    BusError(f"topic {topic!r} has partitions 0 to {state.partitions - 1}, wanted {partition}")
                )
                continue
            if key is None and state.compact:
                results[index] = Failed(BusError(f"topic {topic!r} is compacted, wanted a record with a key"))
                continue
            lane = mine.get(partition)
            if lane is None:
                lane = mine[partition] = lanes[topic, partition] = []
            lane.append(index)
        return lanes

    # --- one partition -----------------------------------------------------------------------------------------------

    async def _send(
        self,
        topic: str,
        partition: int,
        batch: Sequence[Outgoing],
        indexes: list[int],
        results: list[Published | None],
        deadline: float,
    ) -> None:
        """Sends one call's records of one partition, in order, until all are in or one of them is in doubt."""
        lane = self._lanes[topic, partition]
        try:
            async with asyncio.timeout_at(deadline):
                await lane.turn.acquire()
        except TimeoutError:
            self._doubt(topic, indexes, results, TransportUnavailable("earlier records of the partition took too long"))
            return
        try:
            todo, count_max = indexes, len(indexes)
            while todo:
                try:
                    producer = await self._in_service(deadline)
                except TransportUnavailable as error:
                    self._doubt(topic, todo, results, error)
                    return
                try:
                    builder, count = self._build(topic, [batch[index] for index in todo[:count_max]])
                except (MessageTooLarge, _Malformed) as error:  # the first one
                    if isinstance(error, MessageTooLarge):
                        self._metrics.count("foldbus_publish_failures_total", why="too large")
                    results[todo[0]] = Failed(error)
                    todo = todo[1:]
                    continue
                try:
                    offset = await self._deliver(producer, builder, topic, partition, deadline)
                except _REFUSALS as error:
                    self._replace(producer, error)
                    if count > 1:  # one of them, or all together: halve until the broker has told which
                        count_max = count // 2
                        continue
                    results[todo[0]] = Failed(self._refusal(batch[todo[0]], error))
                    self._topics.pop(topic, None)  # its limits may have changed: ask again
                    todo = todo[1:]
                except TransportUnavailable as error:
                    self._doubt(topic, todo, results, error)
                    return
                else:
                    for place, index in enumerate(todo[:count]):
                        results[index] = Ack(partition, offset + place)
                    todo = todo[count:]
        finally:
            lane.turn.release()

    def _build(self, topic: str, records: Sequence[Outgoing]) -> tuple[Batch, int]:
        """A batch of as many of these as fit, at least one, and how many they are. Raises _Malformed or MessageTooLarge
        of the first one; a later one that is neither well-formed nor small enough ends the batch."""
        state = self._topics.get(topic)
        limit = BATCH_BYTES if state is None else state.max_bytes
        writer = Writer(int(self._clock.now().timestamp() * 1000), min(BATCH_BYTES, RECORD_OVERHEAD_BYTES + limit))
        add = writer.add
        for record in records:
            try:
                written = add(record)
            except (TypeError, ValueError, AttributeError) as error:  # no bytes, or a header name that is no text
                if writer.count:
                    break
                raise _Malformed(f"{_type_of(record)} cannot be written as a record: {error}") from error
            if not written:
                break
            # On the wire it is larger than it counts, so most need not be counted.
            if written > limit and state is not None and (size := _size(record)) > limit:
                if writer.count > 1:
                    return self._build(topic, records[: writer.count - 1])
                raise MessageTooLarge(_type_of(record), size=size, limit=limit)
        return writer.batch(self._compression), writer.count

    async def _deliver(self, producer: _Producer, builder: Any, topic: str, partition: int, deadline: float) -> int:
        """The offset of the batch's first record. Raises what the broker refused it for; TransportUnavailable when it
        may or may not be in the topic, and the producer is then out of service."""
        try:
            async with asyncio.timeout_at(deadline):
                accepted = await producer.raw.send_batch(builder, topic, partition=partition)
                accepted.add_done_callback(_look_at)
                await asyncio.wait({accepted, producer.abandoned}, return_when=asyncio.FIRST_COMPLETED)
            if not accepted.done() or accepted.cancelled():
                raise TransportUnavailable("the producer was abandoned before the broker acknowledged")
            return int(accepted.result().offset)
        except TimeoutError as error:
            self._abandon(producer)
            raise TransportUnavailable(
                f"{topic}[{partition}]: no acknowledgement within {self._settings.publish_deadline_s:g} s"
            ) from error
        except _REFUSALS:
            raise
        except (KafkaError, OSError, AssertionError) as error:  # the assertion: a partition that is there no more
            self._replace(producer, error)
            raise TransportUnavailable(f"{topic}[{partition}]: {error!r}") from error

    def _doubt(
        self, topic: str, indexes: Sequence[int], results: list[Published | None], error: TransportUnavailable
    ) -> None:
        self._metrics.count("foldbus_publish_unknown_total", len(indexes), topic=topic)
        log.warning("%s records for %s may or may not be written: %s", len(indexes), topic, error)
        for index in indexes:
            results[index] = Unknown(error)

    def _refusal(self, record: Outgoing, error: Exception) -> BusError:
        self._metrics.count("foldbus_publish_failures_total", why=type(error).__name__)
        if isinstance(error, _TOO_LARGE):
            limit = self._topics[record.topic].max_bytes if record.topic in self._topics else 0
            found: BusError = MessageTooLarge(_type_of(record), size=_size(record), limit=limit)
        else:
            found = BusError(f"{record.topic}: the broker refused a record: {type(error).__name__}")
        found.__cause__ = error
        return found

    # --- producers come and go ---------------------------------------------------------------------------------------

    async def _in_service(self, deadline: float) -> _Producer:
        """The producer to use now; starts one where there is none. Raises TransportUnavailable."""
        if self._producer is not None:
            return self._producer
        try:
            async with asyncio.timeout_at(deadline), self._producing:
                if self._producer is None:
                    raw: Any = AIOKafkaProducer(**self._options)
                    try:
                        await raw.start()
                    except BaseException:
                        await internals.abandon_producer(raw)
                        raise
                    self._producer = _Producer(raw)
                return self._producer
        except TimeoutError as error:
            raise TransportUnavailable("no broker gave this producer an id in time") from error
        except (KafkaError, OSError) as error:
            raise TransportUnavailable(f"the broker cannot be reached: {error!r}") from error

    def _replace(self, producer: _Producer, error: Exception) -> None:
        """The next batch gets a new producer; this one finishes what it has in hand."""
        if producer is self._producer:
            self._metrics.count("foldbus_producers_replaced_total", why=type(error).__name__)
            log.warning("replacing the producer after %r", error)
            self._retire(flush=True)

    def _abandon(self, producer: _Producer) -> None:
        """Nothing that this producer still has in hand may be sent any more."""
        if producer.abandoned.done():
            return
        producer.abandoned.set_result(None)
        self._metrics.count("foldbus_producers_replaced_total", why="no acknowledgement")
        log.warning("abandoning a producer whose records were not acknowledged")
        if producer is self._producer:
            self._retire(flush=False)
        else:
            self._later(internals.abandon_producer(producer.raw))

    def _retire(self, *, flush: bool) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            self._later(self._stop(producer) if flush else internals.abandon_producer(producer.raw))

    async def _stop(self, producer: _Producer) -> None:
        stopping = asyncio.ensure_future(producer.raw.stop())
        try:
            await asyncio.wait({stopping}, timeout=self._settings.publish_deadline_s)
        finally:
            if not stopping.done():
                log.warning("a producer did not stop in time: its broker acknowledges nothing")
                if not producer.abandoned.done():
                    producer.abandoned.set_result(None)
                stopping.cancel()
                await internals.abandon_producer(producer.raw)
            await asyncio.gather(stopping, return_exceptions=True)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)


def _size(record: Outgoing) -> int:
    """As `Delivery.size`: bytes of key, value and headers."""
    size = len(record.key or b"") + len(record.value or b"")
    return size + sum([len(name) + len(value) for name, value in record.headers])


def _type_of(record: Outgoing) -> str:
    for name, value in record.headers:
        if name == "ce_type":
            return value.decode(errors="replace")
    return f"a record for {record.topic}"


def _not_sent() -> Unknown:
    return Unknown(TransportUnavailable("not sent"))


def _look_at(future: asyncio.Future[Any]) -> None:
    """So that an acknowledgement nobody waits for any more is not reported as an error that nobody looked at."""
    if not future.cancelled():
        future.exception()


async def _all(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    async with asyncio.TaskGroup() as group:
        for one in work:
            group.create_task(one)
