"""The pump: polls all the time, also while everything is paused, and sorts records into the queues.

Reading pauses at high water and resumes at half, for the whole engine or for one crowded partition. What cannot be read
goes to the undertaker (`lanes.py`), what nobody here handles is skipped and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

from bus.engine.lanes import Gate
from bus.engine.partitions import Partitions, set_within
from bus.engine.pulse import Pulse
from bus.engine.queues import Entry, KeyQueues
from bus.engine.settings import EngineSettings, failure_of
from bus.engine.watermark import Part
from bus.envelope import Envelope, Failure
from bus.errors import OffsetOutOfRange, TransportUnavailable
from bus.metrics import Metrics
from bus.processing import Item, Processor
from bus.seams import Clock
from bus.transport import Assignment, Consumer, Delivery, Transport
from bus.unmet import Unmet

log = logging.getLogger("foldbus.bus")

SHORT_POLL_S = 0.02
"""How long a poll may wait while some parts are paused: they resume between polls."""
PAUSED_S = 0.2
"""How long nothing is polled while all parts are paused and no lane makes room."""
MOMENT_S = 0.2
"""How long lanes are waited for before everything is paused."""
JOIN_S = 60.0
"""How long finding the topics and reaching the broker takes at most; the transport gives up before."""


class Pump:
    def __init__(
        self,
        transport: Transport,
        topics: Sequence[str],
        processor: Processor,
        parse: Callable[[Delivery], Envelope],
        queues: KeyQueues,
        partitions: Partitions,
        settings: EngineSettings,
        *,
        clock: Clock,
        metrics: Metrics,
        rng: Random,
        code_version: str,
        stop: asyncio.Event,
        pulse: Pulse,
    ) -> None:
        self.last_poll: float | None = None
        self.unavailable: str | None = None
        """What the broker's last answer was, when it was none."""
        self._transport, self._topics, self._processor, self._parse = transport, tuple(topics), processor, parse
        self._queues, self._partitions, self._settings = queues, partitions, settings
        self._clock, self._metrics, self._rng, self._code_version = clock, metrics, rng, code_version
        self._stop, self._pulse = stop, pulse
        self._group = processor.group
        self._unmet = Unmet(processor.group, log)
        self._full = False
        self._largest = 1
        self.gate: Gate | None = None

    async def run(self) -> None:
        """Until told to stop: joins, polls, joins again when the broker was gone. Raises MissingTopics."""
        failures = 0
        try:
            while not self._stop.is_set():
                self._pulse.begins("joining its group", bound_s=JOIN_S)
                try:
                    async with self._transport.consume(
                        self._group, self._topics, listener=self._partitions
                    ) as consumer:
                        self._partitions.begin(consumer)
                        failures = 0
                        await self._poll_on(consumer)
                except TransportUnavailable as error:
                    failures += 1
                    await self._unavailable("group cannot be joined or left", error, failures)
                finally:
                    self._partitions.abandon()
        finally:
            self._pulse.rests()

    async def _poll_on(self, consumer: Consumer) -> None:
        failures = 0
        while not self._stop.is_set():
            await self._moment_at_high_water()
            timeout_s = self._throttle(consumer)
            self._pulse.begins("a poll", bound_s=self._settings.poll_timeout_s)
            try:
                deliveries = await consumer.poll(max_records=self._room(), timeout_s=timeout_s)
            except TransportUnavailable as error:
                failures += 1
                await self._unavailable("poll failed", error, failures)
                continue
            except OffsetOutOfRange as error:
                failures += 1
                self._hold(error)
                await set_within(self._stop, self._settings.backoff_s(failures, self._rng))
                continue
            failures, self.unavailable = 0, None
            self.last_poll = self._clock.monotonic()
            if deliveries:
                self._take_in(deliveries)
            elif timeout_s == 0:
                # All is paused: sleep until a lane has made room, but not past the time of the next poll.
                self._queues.progress.clear()
                await set_within(self._queues.progress, min(PAUSED_S, self._settings.poll_timeout_s))

    async def _unavailable(self, what: str, error: Exception, failures: int) -> None:
        wait_s = self._settings.backoff_s(failures, self._rng)
        self.unavailable = f"{what}: {error}"
        self._pulse.begins("waiting for the broker", bound_s=wait_s)
        self._metrics.count("foldbus_transport_unavailable_total", group=self._group)
        log.warning("%s: %s, again in %.3f s: %s", self._group, what, wait_s, error)
        await set_within(self._stop, wait_s)

    def _hold(self, error: OffsetOutOfRange) -> None:
        """Never skipped: the part stands still, loudly, and is asked again from time to time; the others go on."""
        self._metrics.count("foldbus_offset_out_of_range_total", group=self._group, topic=error.assignment.topic)
        log.error("%s: %s; this partition stands still until its offset is put right", self._group, error)
        part = self._partitions.live.get(error.assignment)
        if part is not None:
            part.held_until = self._clock.monotonic() + self._settings.hold_s

    def _room(self) -> int:
        settings, queues = self._settings, self._queues
        records = min(settings.poll_records_max, settings.in_flight_max - queues.in_flight)
        by_bytes = (settings.in_flight_bytes_max - queues.in_flight_bytes) // self._largest
        return max(1, min(records, by_bytes))

    async def _moment_at_high_water(self) -> None:
        """What a client has fetched of a partition is thrown away when that is paused, and fetched again: lanes that
        keep up are waited for instead, until they have made room for a whole poll."""
        settings, queues = self._settings, self._queues
        if self._full or not self._brims(1):
            return
        room = min(settings.poll_records_max, settings.in_flight_max // 2)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(MOMENT_S, settings.poll_timeout_s)):
                while not self._stop.is_set() and (queues.in_flight > settings.in_flight_max - room or self._brims(1)):
                    queues.progress.clear()
                    await queues.progress.wait()

    def _brims(self, factor: int) -> bool:
        settings, queues = self._settings, self._queues
        return (
            queues.in_flight * factor >= settings.in_flight_max
            or queues.in_flight_bytes * factor >= settings.in_flight_bytes_max
        )

    def _throttle(self, consumer: Consumer) -> float:
        """Pauses at high water, resumes at half; answers how long the next poll may wait."""
        settings, queues, parts = self._settings, self._queues, self._partitions.live.values()
        self._full = self._brims(2 if self._full else 1)
        pause: list[Assignment] = []
        resume: list[Assignment] = []
        shut = self.gate is not None and self.gate() == 0
        for part in parts:
            wanted = self._crowded(part) or self._full or shut
            if wanted is not part.paused:
                part.paused = wanted
                (pause if wanted else resume).append(part.assignment)
        if pause:
            consumer.pause(pause)
            self._metrics.count("foldbus_paused_total", len(pause), group=self._group)
            log.debug("%s: paused %d partitions at %d in flight", self._group, len(pause), queues.in_flight)
        if resume:
            consumer.resume(resume)
        paused = sum(part.paused for part in parts)
        if not paused:
            return settings.poll_timeout_s
        return 0.0 if paused == len(parts) else min(SHORT_POLL_S, settings.poll_timeout_s)

    def _crowded(self, part: Part) -> bool:
        settings = self._settings
        if part.crowd:
            part.crowd = {queue for queue in part.crowd if len(queue.entries) * 2 > settings.per_key_max}
        part.ahead = part.spread * (2 if part.ahead else 1) >= settings.spread_max
        if part.held_until is not None and part.held_until <= self._clock.monotonic():
            part.held_until = None
        return bool(part.crowd) or part.ahead or part.held_until is not None

    def _take_in(self, deliveries: Sequence[Delivery]) -> None:
        live, queues, parse, wants = self._partitions.live, self._queues, self._parse, self._processor.wants
        assignment: Assignment | None = None
        part: Part | None = None
        skipped: Counter[tuple[str, str]] = Counter()
        topics: set[str] = set()
        largest = self._largest // 2  # forgets slowly, learns at once
        stale = 0
        for delivery in deliveries:
            if delivery.assignment is not assignment:
                assignment = delivery.assignment
                part = live.get(assignment)
                topics.add(assignment.topic)
            offset = delivery.offset
            if part is None or not part.receive(offset):
                stale += 1
                continue
            size = delivery.size
            if size > largest:
                largest = size
            try:
                envelope = parse(delivery)
            except Exception as error:
                # Also what is not a BadInput: a parser's bug must not stop the partition, and the bytes are kept.
                entry = Entry(queues.queue((delivery.assignment, offset)), None, delivery, part, offset, size)
                entry.failure = self._unreadable(error)
                queues.put(entry)
                continue
            try:
                if not wants(envelope.type):
                    part.complete(offset)
                    skipped[delivery.assignment.topic, envelope.type] += 1
                    continue
            except Exception as error:
                failure: Failure | None = self._unreadable(error)
            else:
                failure = None
            item = Item(envelope, delivery, unreadable=failure is not None, held=part)
            queues.put(Entry(queues.queue(envelope.key), item, delivery, part, offset, size, failure))
        self._largest = max(1, largest)
        queues.look_for_surplus()
        for (_, type_name), n in skipped.items():
            self._metrics.count("foldbus_skipped_total", n, group=self._group, type=type_name)
            log.debug("%s: skipped %d of %s, which nobody here handles", self._group, n, type_name)
        if self._unmet.watches(topics):
            self._unmet.took(deliveries, skipped)
        if stale:
            self._metrics.count("foldbus_stale_records_total", stale, group=self._group)
            log.info("%s: ignored %d records of partitions that are not ours at that epoch", self._group, stale)

    def _unreadable(self, error: Exception) -> Failure:
        now = self._clock.now()
        return failure_of(error, attempts=1, first_failed_at=now, failed_at=now, code_version=self._code_version)
