"""Sending from outside a handler: straight to the topic, and awaiting answers on the service's inbox topic."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack
from uuid import UUID

from bus.cloudevents import from_record, to_record
from bus.codec import check_size
from bus.envelope import Envelope
from bus.errors import BadInput, OutcomeUnknown, TransportUnavailable
from bus.metrics import Metrics
from bus.transport import Ack, Failed, Outgoing, Published, Transport

log = logging.getLogger("foldbus.client")


class Publisher:
    """Coalesces what many callers send at once into few calls; a lone caller waits for nobody. Keeps callers' order."""

    def __init__(self, transport: Transport, *, batch_max: int = 500, waiting_max: int = 10_000) -> None:
        self._transport, self._batch_max = transport, batch_max
        self._room = asyncio.Semaphore(waiting_max)
        self._waiting: list[tuple[Outgoing, asyncio.Future[Published]]] = []
        self._task: asyncio.Task[None] | None = None

    async def publish(self, envelope: Envelope) -> None:
        """Returns when it is in the topic. Raises MessageTooLarge or MissingTopics (it is not), OutcomeUnknown."""
        check_size(envelope, self._transport.max_bytes)
        record = to_record(envelope)
        async with self._room:
            answer: asyncio.Future[Published] = asyncio.get_running_loop().create_future()
            self._waiting.append((record, answer))
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._drain())
            result = await asyncio.shield(answer)
        match result:
            case Ack():
                return
            case Failed(error=error):
                raise error
            case _:
                raise OutcomeUnknown(envelope.id, why=f"the broker did not acknowledge it ({result.error})")

    async def _drain(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[: self._batch_max], self._waiting[self._batch_max :]
            try:
                results: Sequence[Published] = await self._transport.publish([record for record, _ in batch])
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for (_, answer), result in zip(batch, results, strict=True):
                if not answer.done():
                    answer.set_result(result)

    async def close(self) -> None:
        """Waits for what is under way."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)


class Inbox:
    """Replies to this process: tails the service's inbox topic from the moment of the first request on.

    Every replica reads the topic and keeps what carries its own instance. A reply that nobody waits for any more is
    counted and dropped: the command's claim keeps it for whoever asks again.
    """

    def __init__(self, transport: Transport, topic: str, instance: str, metrics: Metrics) -> None:
        self.topic, self.instance = topic, instance
        self._transport, self._metrics = transport, metrics
        self._pending: dict[UUID, asyncio.Future[Envelope]] = {}
        self._stack = AsyncExitStack()
        self._reading: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._closing = False

    def expect(self, command_id: UUID) -> asyncio.Future[Envelope]:
        """Call before sending; `forget` afterwards. Two waiters for one id share the answer."""
        waiting = self._pending.get(command_id)
        if waiting is None:
            waiting = self._pending[command_id] = asyncio.get_running_loop().create_future()
        return waiting

    def forget(self, command_id: UUID) -> None:
        self._pending.pop(command_id, None)

    async def ready(self) -> None:
        """Returns once every reply from now on will be seen."""
        async with self._starting:
            if self._reading is None:
                consumer = await self._stack.enter_async_context(self._transport.tail(self.topic, start="end"))

                async def read() -> None:
                    while not self._closing:
                        try:
                            deliveries = await consumer.poll(max_records=1000, timeout_s=0.5)
                        except TransportUnavailable as error:
                            log.warning("inbox %s waits: %s", self.topic, error)
                            await asyncio.sleep(0.2)
                            continue
                        for delivery in deliveries:
                            try:
                                self._take(from_record(delivery))
                            except BadInput as error:
                                self._metrics.count("foldbus_skipped_total", why="undecodable", topic=self.topic)
                                log.warning("inbox %s@%s: %s", self.topic, delivery.offset, error)

                self._reading = asyncio.create_task(read())

    def _take(self, reply: Envelope) -> None:
        if reply.reply_to is None or reply.reply_to.instance != self.instance:
            return
        waiting = self._pending.get(reply.causation_id) if reply.causation_id else None
        if waiting is None or waiting.done():
            self._metrics.count("foldbus_late_replies_total")
            log.info("reply to %s came after its deadline, nobody waits for it", reply.causation_id)
        else:
            waiting.set_result(reply)

    async def close(self) -> None:
        self._closing = True
        if self._reading is not None:
            await asyncio.gather(self._reading, return_exceptions=True)
        await self._stack.aclose()
