"""The consumer engine: takes a group's records to a `Processor`, per key in order, and commits what is handled.

One pump polls all the time and sorts records into queues per key; lanes take batches across keys; a record that cannot
be handled becomes a dead letter. Everything is bounded by `EngineSettings`. Promises, pinned by
`tests/bus/test_consumer_engine.py`:

- An offset is committed when every received offset below it is handled, skipped or in the dead letters, and never
  before the database knows it (`engine/partitions.py`).
- Messages of one key go through in order, in at most one batch at a time, whatever fails (`engine/queues.py`).
- A failing key waits alone; a message that nobody can read stops nothing (`engine/lanes.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from random import Random

from bus.engine.lanes import BrokenProcessor, Gate, GivenUp, Lanes
from bus.engine.partitions import Partitions
from bus.engine.pulse import Pulse
from bus.engine.pump import Pump
from bus.engine.queues import Entry, KeyQueues
from bus.engine.settings import EngineSettings
from bus.engine.watermark import Part
from bus.envelope import Envelope, Offset
from bus.errors import TransportUnavailable
from bus.metrics import Metrics
from bus.processing import Item, Processor, Result
from bus.seams import Clock, Failpoint
from bus.tasks import all_ended
from bus.transport import Assignment, Delivery, Transport

__all__ = ["BrokenProcessor", "ConsumerEngine", "EngineSettings", "GivenUp"]

log = logging.getLogger("foldbus.bus")

MEASURED_QUIET_EVERY = 5
"""In so many commit intervals the ends of its parts are asked for once, while nothing happens."""


class ConsumerEngine:
    """One member of `processor.group`.

    `parse` makes an envelope of a record and raises BadInput when it cannot. `give_up` of the processor may be called
    while `process` runs, never for a key that is in that batch.
    """

    pump_type = Pump

    def __init__(
        self,
        transport: Transport,
        topics: Sequence[str],
        processor: Processor,
        *,
        parse: Callable[[Delivery], Envelope],
        settings: EngineSettings,
        clock: Clock,
        metrics: Metrics,
        failpoint: Failpoint,
        rng: Random | None = None,
        code_version: str = "",
        gate: Gate | None = None,
    ) -> None:
        self._transport, self._topics, self._processor, self._parse = transport, tuple(topics), processor, parse
        self._settings, self._clock, self._metrics, self._failpoint = settings, clock, metrics, failpoint
        self._rng, self._code_version, self._gate = rng or Random(), code_version, gate
        self._group = processor.group
        self._running = self._stop_asked = False
        self._stopped_at = 0.0
        self._lag: dict[tuple[str, int], int] = {}
        self._ends: dict[tuple[str, int], Offset] = {}
        self._offered: set[asyncio.Future[Result]] = set()
        self._put_together()

    def _put_together(self) -> None:
        """The parts of one run, empty."""
        settings, clock, metrics, rng = self._settings, self._clock, self._metrics, self._rng
        self._stop = asyncio.Event()
        self.pulse = Pulse(clock)
        self._stood: dict[tuple[str, int], tuple[Offset, Offset, float]] = {}
        self._queues = KeyQueues(clock, per_key_max=settings.per_key_max, batch_size_max=settings.batch_size_max)
        self._partitions = Partitions(
            self._transport, self._processor, self._queues, settings,
            clock=clock, metrics=metrics, failpoint=self._failpoint, rng=rng, stop=self._stop, pulse=self.pulse,
        )  # fmt: skip
        self._lanes = Lanes(
            self._processor, self._queues, self._partitions, settings,
            clock=clock, metrics=metrics, rng=rng, code_version=self._code_version,
        )  # fmt: skip
        self._pump = self.pump_type(
            self._transport, self._topics, self._processor, self._parse, self._queues, self._partitions, settings,
            clock=clock, metrics=metrics, rng=rng, code_version=self._code_version, stop=self._stop,
            pulse=self.pulse,
        )  # fmt: skip
        self._lanes.gate = self._pump.gate = self._gate

    # -- what it is asked ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until `stop()` or cancelled; both drain first, within `drain_timeout_s` and the time of a poll and a commit.

        Raises MissingTopics, BrokenProcessor, and whatever else is a bug; then nothing more is committed. A broker or
        a database that does not answer is waited for. After an error it may be run again, after `stop()` it returns at
        once; two runs at a time are refused.
        """
        if self._running:
            raise RuntimeError(f"the engine of {self._group} runs already")
        if self._stop_asked:
            return
        self._running = True
        try:
            await self._run()
        finally:
            self._running = False
            if not self._stop_asked:
                self._put_together()

    def stop(self) -> None:
        """Asks `run()` to drain and return, for good. A second call changes nothing."""
        self._stop_asked = True
        self._halt()

    def offer(self, item: Item) -> asyncio.Future[Result] | None:
        """A message of a timer, or one whose turn it is in its key's queue in the database, joins the queue of its key
        here, without an offset.

        None when there is no `room`: offer it again later. The future answers Done (Aside, when it is parked), or
        Failed with `GivenUp` when it went to the dead letters; it is cancelled when the engine ends first.
        """
        if self.room <= 0:
            return None
        ended: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._offered.add(ended)
        ended.add_done_callback(self._offered.discard)
        queue = self._queues.queue(item.envelope.key)
        self._queues.put(Entry(queue, item, None, None, 0, 0, ended=ended))
        return ended

    @property
    def group(self) -> str:
        return self._group

    @property
    def room(self) -> int:
        """How many messages may be offered now (`offers_max`); 0 when the engine does not run."""
        if not self._running or self._stop.is_set():
            return 0
        return max(0, self._settings.offers_max - self._queues.offers)

    @property
    def in_flight(self) -> int:
        """Records taken from the transport and not done, also those that wait."""
        return self._queues.in_flight

    @property
    def in_flight_bytes(self) -> int:
        return self._queues.in_flight_bytes

    @property
    def idle(self) -> bool:
        """Nothing is queued or at work, timers' messages included."""
        return self._queues.in_flight == 0 and self._queues.offers == 0

    @property
    def last_poll(self) -> float | None:
        """When the pump last came back from a poll (`clock.monotonic()`): for the liveness probe."""
        return self._pump.last_poll

    @property
    def waiting_since(self) -> float | None:
        """Since when its group has told it nothing of its parts (`clock.monotonic()`). None: it has, be they none; or
        it is no member at all."""
        return self._partitions.waiting_since

    @property
    def unavailable(self) -> str | None:
        """Why the last poll or the last try to join brought nothing, when the broker did not answer."""
        return self._pump.unavailable

    @property
    def shut(self) -> bool:
        """Does its gate let nothing through now?"""
        return self._pump.gate is not None and self._pump.gate() == 0

    @property
    def oldest_at_work(self) -> float | None:
        """Since when the longest call of the processor goes on (`clock.monotonic()`); None: it has nothing."""
        return self._lanes.oldest

    @property
    def standing(self) -> Mapping[tuple[str, int], float]:
        """Seconds for which nothing has come of parts whose end grew meanwhile, though nobody paused them."""
        now = self._clock.monotonic()
        return {where: now - since for where, (_, end, since) in self._stood.items() if self._ends.get(where, 0) > end}

    @property
    def assignments(self) -> tuple[Assignment, ...]:
        return tuple(self._partitions.live)

    @property
    def held(self) -> tuple[Assignment, ...]:
        """Parts whose position is gone from the topic: nothing is read of them until that is put right."""
        return tuple(part.assignment for part in self._partitions.live.values() if part.held_until is not None)

    @property
    def lag(self) -> Mapping[tuple[str, int], int]:
        """Offsets between watermark and end per (topic, partition), as of the last commit interval; where it was none
        and nothing is in flight, as of the last five."""
        return dict(self._lag)

    async def caught_up(self) -> bool:
        """Has this member handled all that its parts hold now? False before it joined. Markers of a foreign producer's
        transactions at the very end of a partition look like records not read yet."""
        consumer = self._partitions.consumer
        if consumer is None or not self._partitions.joined or self.waiting_since is not None or not self.idle:
            return False
        try:
            ends = await consumer.end_offsets()
        except TransportUnavailable:
            return False
        live = self._partitions.live
        handled = live.keys() == ends.keys() and all(live[each].watermark >= end for each, end in ends.items())
        return handled and self._queues.offers == 0

    # -- inside ------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        # Tasks of their own, for cancelling run() must not cancel a poll.
        pump = asyncio.create_task(self._pump.run())
        helpers = [asyncio.create_task(self._lanes.work())]
        helpers += [asyncio.create_task(self._lanes.work(spare=True)) for _ in range(self._settings.lanes - 1)]
        helpers += [asyncio.create_task(self._lanes.bury()), asyncio.create_task(self._lanes.fate())]
        helpers.append(asyncio.create_task(self._commit_regularly()))
        try:
            await asyncio.wait({pump, *helpers}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            early = [helper for helper in helpers if helper.done()]  # they never end by themselves
            self._partitions.broken = bool(early)
            try:
                await self._end(pump)
            finally:
                await self._cancel(pump, helpers)
        for task in (*early, pump):
            if task.cancelled():
                if task in early:
                    raise BrokenProcessor(f"{self._group}: a task of the engine was cancelled from inside")
            elif (error := task.exception()) is not None:
                raise error

    async def _commit_regularly(self) -> None:
        quiet = 0
        while True:
            await asyncio.sleep(self._settings.commit_interval_s)
            await self._partitions.commit()
            nothing = self.idle and self._lag.keys() == {part.where for part in self._partitions.live.values()}
            quiet = quiet + 1 if nothing and not any(self._lag.values()) else 0
            if quiet % MEASURED_QUIET_EVERY == 0:
                await self._measure()

    async def _measure(self) -> None:
        consumer, parts = self._partitions.consumer, self._partitions.live
        if consumer is None:
            return
        try:
            ends = await consumer.end_offsets()
        except TransportUnavailable as error:
            log.info("%s: end offsets are unknown: %s", self._group, error)
            return
        self._look_for_standing(ends)
        self._lag = {
            part.where: max(0, ends[assignment] - part.watermark)
            for assignment, part in parts.items()
            if assignment in ends
        }
        for (topic, partition), behind in self._lag.items():
            self._metrics.gauge("foldbus_lag", behind, group=self._group, topic=topic, partition=str(partition))
        self._metrics.gauge("foldbus_in_flight", self._queues.in_flight, group=self._group)
        self._metrics.gauge("foldbus_in_flight_bytes", self._queues.in_flight_bytes, group=self._group)

    def _look_for_standing(self, ends: Mapping[Assignment, Offset]) -> None:
        """A client may lose track of a partition without a word (after a broker's restart, for one): what is there is
        then seen by nobody. Noted are position, end and time since when the position has not moved."""
        now, before = self._clock.monotonic(), self._stood
        self._stood, self._ends = {}, {}
        for assignment, part in self._partitions.live.items():
            reached = self._reached(part)
            end = ends.get(assignment, reached)
            if end <= reached or part.paused:
                continue
            position, seen, since = before.get(part.where, (reached, end, now))
            self._stood[part.where] = (position, seen, since) if position == reached else (reached, end, now)
            self._ends[part.where] = end

    def _reached(self, part: Part) -> Offset:
        """The first offset of a part that was not received yet."""
        return part.position

    def _halt(self) -> None:
        if not self._stop.is_set():
            self._stopped_at = self._clock.monotonic()
            self._stop.set()
            self._queues.close()
            self._queues.progress.set()
            if self._partitions.consumer is not None:
                self._partitions.consumer.wake()

    async def _end(self, pump: asyncio.Task[None]) -> None:
        """Leaving the group's context revokes, which drains and commits; then timers' messages may end, too."""
        settings = self._settings
        self._halt()
        bound_s = settings.poll_timeout_s + settings.drain_timeout_s + settings.commit_timeout_s
        await asyncio.wait({pump}, timeout=bound_s)
        if not pump.done():
            log.error("%s: the group could not be left within %.1f s; leaving without", self._group, bound_s)
        left_s = settings.drain_timeout_s - (self._clock.monotonic() - self._stopped_at)
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                while self._queues.at_work and not self._partitions.broken:
                    self._queues.progress.clear()
                    await self._queues.progress.wait()
        except TimeoutError:
            log.warning("%s: %d messages still at work are cancelled", self._group, self._queues.at_work)

    async def _cancel(self, pump: asyncio.Task[None], helpers: Sequence[asyncio.Task[None]]) -> None:
        await all_ended([pump, *helpers])
        await self._lanes.abandon()
        for offered in tuple(self._offered):
            offered.cancel()
