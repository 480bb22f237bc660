"""The transport on Kafka. Order, bounds and errors are those of `bus/transport.py`; how is told in `publisher.py`,
`member.py` and `reader.py`.

What to know when running it: a group member commits rarely and in bulk, because a commit costs what the broker's
`group.coordinator.append.linger.ms` says (5 ms on Kafka 4.1, adaptive from 4.2 on).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor

from bus.envelope import Offset
from bus.errors import MissingTopics, TransportUnavailable
from bus.kafka.admin import KafkaAdmin
from bus.kafka.diagnosis import why_refused
from bus.kafka.member import KafkaMember, KafkaTail
from bus.kafka.options import client_options, milliseconds, unpacked_bytes_max, warn_when_slow
from bus.kafka.publisher import Publisher
from bus.kafka.reader import Reader
from bus.metrics import MemoryMetrics, Metrics
from bus.seams import Clock, SystemClock
from bus.transport import (
    Assignment,
    Assignments,
    Consumer,
    Outgoing,
    PollSettings,
    Published,
    TopicAdmin,
    TopicSpec,
)

MAX_POLL_INTERVAL_S = 300.0
"""An engine that has not polled for so long is taken for dead by its own member, which leaves the group."""


class KafkaTransport:
    """A `Transport`. One producer for all publishing, one consumer per `consume` and `tail`."""

    def __init__(
        self, options: dict[str, Any], settings: PollSettings, publisher: Publisher, admin: KafkaAdmin,
        *, clock: Clock, metrics: Metrics
    ) -> None:  # fmt: skip
        """Use `open`."""
        self.max_bytes = TopicSpec("").max_bytes
        self._options, self._settings, self._publisher, self._admin = options, settings, publisher, admin
        self._clock, self._metrics = clock, metrics

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        bootstrap: str,
        *,
        settings: PollSettings | None = None,
        client_id: str = "foldbus",
        clock: Clock | None = None,
        metrics: Metrics | None = None,
    ) -> AsyncGenerator[KafkaTransport]:
        """`bootstrap` is `host:port` or several with commas; a `kafka://` before them is left out. `options.py` lists
        what `settings.extra` takes.

        Raises TransportUnavailable when no broker answers within the request timeout, and LinkRefused, within twice
        that, when one answers and it is certificates, logins or protocols that do not fit. Leaving the context is
        bounded, also when the broker is down; what was not acknowledged by then was answered `Unknown`.
        """
        settings = settings or PollSettings()
        clock = clock or SystemClock()
        metrics = metrics or MemoryMetrics()
        warn_when_slow(metrics)
        options = client_options(bootstrap.removeprefix("kafka://"), settings, client_id)
        admin = KafkaAdmin(options, settings)
        publisher = Publisher(options, settings, admin, clock=clock, metrics=metrics)
        try:
            try:
                await admin.start()
                await publisher.start()
            except TransportUnavailable as error:
                refused = await why_refused(options, timeout_s=settings.request_timeout_s)
                if refused is None:
                    raise
                raise refused from error
            yield cls(options, settings, publisher, admin, clock=clock, metrics=metrics)
        finally:
            await publisher.close()
            await admin.close()

    @property
    def admin(self) -> TopicAdmin:
        return self._admin

    async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Published]:
        return await self._publisher.publish(batch)

    @asynccontextmanager
    async def consume(self, group: str, topics: Sequence[str], *, listener: Assignments) -> AsyncGenerator[Consumer]:
        missing = set(topics) - (await self._admin.describe(topics)).keys()
        if missing:
            raise MissingTopics(missing)
        settings = self._settings
        reader = await self._reader(
            group_id=group,
            session_timeout_ms=milliseconds(settings.session_timeout_s),
            heartbeat_interval_ms=milliseconds(settings.heartbeat_s),
            # Left out it would be the session timeout, and a longer drain would be expelled (T11).
            rebalance_timeout_ms=milliseconds(settings.rebalance_timeout_s),
            max_poll_interval_ms=milliseconds(max(MAX_POLL_INTERVAL_S, 2 * settings.rebalance_timeout_s)),
            # One only: with two, aiokafka joins once for each, and waits in between (T9). Not its sticky one, which
            # keeps what it remembers on the class: two consumers in a process would overwrite each other.
            partition_assignment_strategy=(RoundRobinPartitionAssignor,),
        )
        member = KafkaMember(
            reader, group, topics, listener, rebalance_timeout_s=settings.rebalance_timeout_s, metrics=self._metrics
        )
        try:
            member.join()
            yield member
        finally:
            await member.leave()

    @asynccontextmanager
    async def tail(
        self, topic: str, *, start: Mapping[int, Offset] | Literal["begin", "end"]
    ) -> AsyncGenerator[Consumer]:
        bounds = await self._admin.offsets(topic)
        reader = await self._reader(group_id=None)
        try:
            starts: dict[Assignment, Offset] = {}
            for partition, (first, end) in bounds.items():
                at = end if start == "end" else first if start == "begin" else start.get(partition, first)
                starts[Assignment(topic, partition)] = at
            reader.raw.assign([TopicPartition(topic, partition) for partition in bounds])
            reader.hold(list(starts), starts)
            yield KafkaTail(reader)
        finally:
            await reader.close()

    async def _reader(self, **options: Any) -> Reader:
        raw: Any = AIOKafkaConsumer(
            **self._options,
            **options,
            enable_auto_commit=False,
            # Positions are placed by us: one that is gone is an error, never a jump.
            auto_offset_reset="none",
            isolation_level="read_committed",
            client_rack=self._settings.extra.get("client_rack"),
        )
        reader = Reader(
            raw,
            timeout_s=self._settings.request_timeout_s,
            clock=self._clock,
            metrics=self._metrics,
            unpacked_bytes_max=unpacked_bytes_max(self._settings),
        )
        try:
            await reader.ask(raw.start(), "reaching the broker")
        except BaseException:
            await reader.close()
            raise
        return reader
