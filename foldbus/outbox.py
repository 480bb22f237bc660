"""Sending from outside a handler: straight to the topic; and answers to this process, on the service's inbox topic."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import datetime
from itertools import islice
from uuid import UUID

from bus.cloudevents import from_record, to_record
from bus.codec import check_size
from bus.envelope import Envelope, ReplyOutcome
from bus.errors import BadInput, OutcomeUnknown, TransportUnavailable
from bus.metrics import Metrics
from bus.seams import Clock, SystemClock
from bus.summing import Summed
from bus.transport import Ack, Consumer, Failed, Outgoing, Published, Transport

log = logging.getLogger("foldbus.client")


class Publisher:
    """Coalesces what many callers send at once into few calls; a lone caller waits for nobody. Keeps callers' order."""

    def __init__(self, transport: Transport, *, batch_max: int = 500, waiting_max: int = 10_000) -> None:
        self._transport, self._batch_max = transport, batch_max
        self._room = asyncio.Semaphore(waiting_max)
        self._waiting: dict[asyncio.Future[Published], Outgoing] = {}
        self._task: asyncio.Task[None] | None = None

    async def publish(self, envelope: Envelope) -> None:
        """Returns when it is in the topic. Raises MessageTooLarge or MissingTopics (it is not), OutcomeUnknown.

        Cancelled before its turn came, it is not sent at all.
        """
        check_size(envelope, self._transport.max_bytes)
        record = to_record(envelope)
        async with self._room:
            answer: asyncio.Future[Published] = asyncio.get_running_loop().create_future()
            self._waiting[answer] = record
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._drain())
            try:
                result = await answer
            finally:
                self._waiting.pop(answer, None)
        match result:
            case Ack():
                return
            case Failed(error=error):
                raise error
            case _:
                raise OutcomeUnknown(envelope.id, why=f"the broker did not acknowledge it ({result.error})")

    async def _drain(self) -> None:
        while self._waiting:
            answers = list(islice(self._waiting, self._batch_max))
            batch = [self._waiting.pop(answer) for answer in answers]
            try:
                results: Sequence[Published] = await self._transport.publish(batch)
            except Exception as error:
                for answer in answers:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for answer, result in zip(answers, results, strict=True):
                if not answer.done():
                    answer.set_result(result)

    async def close(self) -> None:
        """Waits for what is under way."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)


class Waiting:
    """Whoever waits here for the answer to one id: several may, and share it."""

    __slots__ = ("answer", "deadline", "waiters")

    def __init__(self) -> None:
        self.waiters = 0
        self.deadline: datetime | None = None
        """Of the one that asked last: an answer that says "expired" is about that one or about nobody here."""
        self.answer: asyncio.Future[Envelope | None] = asyncio.get_running_loop().create_future()

    async def next(self) -> Envelope | None:
        """The answer. None: it may have come while the topic was not read, so ask again with the same id."""
        return await asyncio.shield(self.answer)

    def missed(self) -> None:
        if not self.answer.done():
            self.answer.set_result(None)
            self.answer = asyncio.get_running_loop().create_future()


class Inbox:
    """Replies to this process: tails the service's inbox topic from the moment of the first request on.

    Every replica reads the topic and keeps what carries its own instance, told by the record's key before anything is
    parsed. A reply that nobody waits for any more is counted and dropped: the command's claim keeps it for whoever asks
    again.

    A broker that does not answer, or a partition whose leader moves, is waited for: the place in the topic stays. When
    that place is gone (the topic was made anew, retention went past it) the topic is read from its end again and
    whoever waits is told to ask once more; until then requests wait, nothing is sent.
    """

    def __init__(
        self, transport: Transport, topic: str, instance: str, metrics: Metrics, *, clock: Clock | None = None
    ) -> None:
        self.topic, self.instance = topic, instance
        self._transport, self._metrics = transport, metrics
        self._key = instance.encode()
        self._pending: dict[UUID, Waiting] = {}
        self._reading: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._closing = False
        self._lates = Summed(clock or SystemClock())

    def expect(self, message_id: UUID, deadline: datetime | None = None) -> Waiting:
        """Call before sending; `forget` afterwards, as often. Two waiters for one id share the answer."""
        waiting = self._pending.get(message_id)
        if waiting is None:
            waiting = self._pending[message_id] = Waiting()
        waiting.waiters += 1
        waiting.deadline = deadline
        return waiting

    def forget(self, message_id: UUID) -> None:
        waiting = self._pending[message_id]
        waiting.waiters -= 1
        if waiting.waiters == 0:
            del self._pending[message_id]

    async def ready(self) -> None:
        """Returns once every reply from now on will be seen. Raises what kept the topic from being opened."""
        if self._reading is None or self._reading.done():
            self._ready = asyncio.get_running_loop().create_future()
            self._reading = asyncio.create_task(self._read(self._ready))
        assert self._ready is not None
        await asyncio.shield(self._ready)

    async def _read(self, ready: asyncio.Future[None]) -> None:
        """Until closed."""
        opened, failures = False, 0
        while not self._closing:
            try:
                async with self._transport.tail(self.topic, start="end") as consumer:
                    if opened:
                        log.warning("inbox %s is read again, from its end", self.topic)
                        for waiting in self._pending.values():
                            waiting.missed()
                    opened, failures = True, 0
                    ready.set_result(None)
                    await self._read_on(consumer)
            except Exception as error:
                if not opened:
                    ready.set_exception(error)
                    ready.exception()  # seen, also when nobody waits any more
                    return
                if ready.done():  # whoever asks from now on waits until the topic is read again
                    ready = self._ready = asyncio.get_running_loop().create_future()
                failures += 1
                self._metrics.count("foldbus_inbox_reopened_total", topic=self.topic)
                log.error("inbox %s is opened anew: %s: %s", self.topic, type(error).__name__, error)
                await asyncio.sleep(min(5.0, 0.1 * 2 ** min(failures, 10)))

    async def _read_on(self, consumer: Consumer) -> None:
        while not self._closing:
            try:
                deliveries = await consumer.poll(max_records=1000, timeout_s=0.5)
            except TransportUnavailable as error:
                self._metrics.count("foldbus_transport_unavailable_total", topic=self.topic)
                log.warning("inbox %s waits: %s", self.topic, error)
                await asyncio.sleep(0.2)
                continue
            for delivery in deliveries:
                if delivery.key != self._key:
                    continue  # another replica's: most are, so they are not even parsed
                try:
                    self._take(from_record(delivery))
                except BadInput as error:
                    self._metrics.count("foldbus_skipped_total", why="undecodable", topic=self.topic)
                    log.warning("inbox %s@%s: %s", self.topic, delivery.offset, error)
            self._tell_lates()

    def _take(self, reply: Envelope) -> None:
        if reply.reply_to is None or reply.reply_to.instance != self.instance:
            return
        waiting = self._pending.get(reply.causation_id) if reply.causation_id else None
        stale = reply.outcome is ReplyOutcome.EXPIRED and waiting is not None and reply.deadline != waiting.deadline
        if waiting is None or waiting.answer.done() or stale:
            self._metrics.count("foldbus_late_replies_total")
            self._lates.add("replies")
            log.debug("reply to %s came after its deadline, nobody waits for it", reply.causation_id)
        else:
            waiting.answer.set_result(reply)

    def _tell_lates(self, *, now: bool = False) -> None:
        for kind, n in self._lates.due(now=now).items():
            log.info("inbox %s: %d %s came after their deadlines, nobody waits for them", self.topic, n, kind)

    async def close(self) -> None:
        self._closing = True
        if self._reading is not None:
            if self._ready is not None and not self._ready.done():
                self._reading.cancel()  # it is still being opened; a poll, in contrast, is not to be cancelled
            await asyncio.gather(self._reading, return_exceptions=True)
        self._tell_lates(now=True)
