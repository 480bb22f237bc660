"""At most once: offsets are committed first, then the records are handled, in batches and without a queue per key.

What this promises, pinned by `tests/bus/test_early_engine.py`:

- No record is handled before the group's offset is past it, as the broker has answered. So nothing is handled twice by
  this group: not after a crash, a rebalance, or a commit of which nobody knows whether it came through.
- A crash loses what was committed and not handled: at most `early_batch_max` records. A clean stop and a rebalance lose
  nothing.
- Records of one partition go to the handler in their order, a batch at a time; meanwhile the next batch is committed,
  and no further one. Where a dependency may go down meanwhile (`free`), none is.

There is nothing to try again and nothing to give up, so there are no dead letters: whoever handles counts and logs.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import Any, Protocol

from bus.consumer import ConsumerEngine
from bus.engine.partitions import Partitions
from bus.engine.pump import Pump
from bus.engine.queues import KeyQueues
from bus.engine.settings import EngineSettings
from bus.engine.watermark import Part
from bus.envelope import Failure, Offset
from bus.metrics import Metrics
from bus.processing import Done, Item, Result, Watermarks
from bus.seams import Clock
from bus.tasks import ended
from bus.transport import Delivery, Transport

log = logging.getLogger("foldbus.bus")

GATE_S = 0.2
_ASSIGNMENT = attrgetter("assignment")


class EarlyProcessor(Protocol):
    """Handles records whose offsets are committed: whatever becomes of them now, nobody gives them again."""

    group: str

    def free(self) -> int | None:
        """How many records it would take now; None: as many as there are. Asked before each batch is committed."""
        ...

    async def handle(self, records: Sequence[Delivery]) -> None:
        """In order per partition. Deals with every failure by itself; what it raises is logged and costs the batch."""
        ...


class _EarlyPump(Pump):
    """With another place for what comes."""

    lanes: EarlyLanes

    def _take_in(self, deliveries: Sequence[Delivery]) -> None:
        stale = self.lanes.take_in(deliveries)
        self._largest = max(1, self._largest // 2, max(map(_value_size, deliveries), default=0))
        if stale:
            self._metrics.count("foldbus_stale_records_total", stale, group=self._group)
            log.info("%s: ignored %d records of partitions that are not ours at that epoch", self._group, stale)


class EarlyEngine(ConsumerEngine):
    """A `ConsumerEngine` for an `EarlyProcessor`: same life, same polling, other order of committing and handling.
    `offer` takes nothing: what comes from timers has a claim."""

    pump_type = _EarlyPump

    def __init__(
        self,
        transport: Transport,
        topics: Sequence[str],
        processor: EarlyProcessor,
        *,
        settings: EngineSettings,
        **options: Any,
    ) -> None:
        self._early = processor
        # One lane: batches of a partition must not overtake each other.
        settings = replace(settings, lanes=1)
        super().__init__(transport, topics, _NoStore(processor.group), settings=settings, parse=_never, **options)

    def _put_together(self) -> None:
        super()._put_together()
        self._partitions.early = True
        lanes = self._lanes = EarlyLanes(  # type: ignore[assignment]
            self._early, self._queues, self._partitions, self._settings,
            clock=self._clock, metrics=self._metrics, rng=self._rng, stop=self._stop,
        )  # fmt: skip
        assert isinstance(self._pump, _EarlyPump)
        self._pump.lanes = lanes
        self._pump.gate = self._early.free

    @property
    def room(self) -> int:
        return 0

    def _reached(self, part: Part) -> Offset:
        lanes: Any = self._lanes
        received: Offset = lanes.received(part)
        return max(part.position, received)

    def offer(self, item: Item) -> asyncio.Future[Result] | None:
        return None


@dataclass(slots=True)
class Run:
    """Consecutive records of one assignment, taken in together."""

    part: Part
    records: Sequence[Delivery]
    size: int

    def split(self, count: int) -> tuple[Run, Run]:
        size = _size(self.records[:count])
        return (
            Run(self.part, self.records[:count], size),
            Run(self.part, self.records[count:], self.size - size),
        )

    @property
    def first(self) -> Offset:
        return self.records[0].offset

    @property
    def next(self) -> Offset:
        return self.records[-1].offset + 1


class EarlyLanes:
    """In place of `Lanes`. A part's position is where the batch in hand ends: what was received beyond it waits here
    and counts as not read."""

    def __init__(
        self,
        processor: EarlyProcessor,
        queues: KeyQueues,
        partitions: Partitions,
        settings: EngineSettings,
        *,
        clock: Clock,
        metrics: Metrics,
        rng: Any,
        stop: asyncio.Event,
    ) -> None:
        self._processor, self._queues, self._partitions, self._settings = processor, queues, partitions, settings
        self._clock, self._metrics, self._rng, self._stop = clock, metrics, rng, stop
        self._group = processor.group
        self._runs: deque[Run] = deque()
        self._received: dict[Part, Offset] = {}
        self.oldest: float | None = None
        """Since when the batch in hand is being handled (`clock.monotonic()`)."""

    def received(self, part: Part) -> Offset:
        """The first offset of a part that did not come yet, handled or not."""
        return self._received.get(part, part.position)

    # --- coming in --------------------------------------------------------------------------------------------------

    def take_in(self, deliveries: Sequence[Delivery]) -> int:
        """Answers how many are not ours, or came before. Those that can be, wait for `work`."""
        live, stale = self._partitions.live, 0
        for assignment, group in groupby(deliveries, key=_ASSIGNMENT):
            records = list(group)
            part = live.get(assignment)
            if part is None:
                stale += len(records)
                continue
            expected = self._received.get(part, part.position)
            fresh = records if records[0].offset >= expected else [one for one in records if one.offset >= expected]
            stale += len(records) - len(fresh)
            if not fresh:
                continue
            run = Run(part, fresh, _size(fresh))
            self._received[part] = run.next
            self._runs.append(run)
            self._queues.in_flight += len(fresh)
            self._queues.in_flight_bytes += run.size
        if self._runs:
            self._queues.work.set()
        return stale

    # --- going to work ----------------------------------------------------------------------------------------------

    async def fate(self) -> None:
        """Until cancelled."""
        await asyncio.Event().wait()

    async def abandon(self) -> None:
        """Nothing goes on beside a lane here."""

    async def work(self) -> None:
        """Until cancelled."""
        most = self._settings.early_batch_max
        half = most // 2 or 1  # one is handled, one is committed
        handling: asyncio.Task[None] | None = None
        try:
            while True:
                free = self._processor.free()
                if handling is not None and (free is not None or most == 1 or not self._runs):
                    await handling
                    handling = None
                    continue
                batch = self._take(half if free is None else min(free, half))
                if batch:
                    ours = await self._ours(batch)
                    if handling is not None:
                        await handling
                    handling = asyncio.create_task(self._handle(batch, ours))
                elif self._runs:  # a dependency is taken for down
                    await asyncio.sleep(GATE_S)
                else:
                    self._queues.work.clear()
                    await self._queues.work.wait()
        finally:
            if handling is not None:
                await ended(handling)

    async def bury(self) -> None:
        """Nobody is buried here. Until cancelled."""
        await asyncio.Event().wait()

    def _take(self, limit: int) -> list[Run]:
        batch: list[Run] = []
        while self._runs and limit > 0 and not self._stop.is_set():
            run = self._runs.popleft()
            if not run.part.taking:
                self._uncount(run)
                continue
            if len(run.records) > limit:
                run, rest = run.split(limit)
                self._runs.appendleft(rest)
            limit -= len(run.records)
            batch.append(run)
        return batch

    async def _ours(self, batch: Sequence[Run]) -> Sequence[Run]:
        for run in batch:
            self._at_work(run, 1)
        try:
            return await self._committed(batch)
        except BaseException:
            self._rest(batch)
            raise

    async def _handle(self, batch: Sequence[Run], ours: Sequence[Run]) -> None:
        try:
            if ours:
                self.oldest = self._clock.monotonic()
                await self._hand_over([record for run in ours for record in run.records])
        finally:
            self.oldest = None
            self._rest(batch)

    def _rest(self, batch: Sequence[Run]) -> None:
        for run in batch:
            self._at_work(run, -1)
            self._uncount(run)
        self._queues.progress.set()

    async def _hand_over(self, records: Sequence[Delivery]) -> None:
        try:
            await self._processor.handle(records)
        except Exception as error:
            self._metrics.count("foldbus_early_batches_lost_total", group=self._group)
            log.exception(
                "%s: a batch of %d records is lost: %s: %s", self._group, len(records), type(error).__name__, error
            )

    async def _committed(self, batch: Sequence[Run]) -> list[Run]:
        """Those whose offsets the group has. The others go to whoever has their partition now."""
        for run in batch:
            run.part.position = run.next
        failures = 0
        while True:
            await self._partitions.commit(dict.fromkeys(run.part for run in batch))
            waiting = [run for run in batch if run.part.committed < run.next and _kept(run.part)]
            if not waiting or self._partitions.broken:
                break
            failures += 1
            await asyncio.sleep(self._settings.backoff_s(failures, self._rng))
        ours = [run for run in batch if run.part.committed >= run.next]
        for run in reversed(batch):
            if run.part.committed < run.next:
                run.part.position = run.first  # nobody has handled it: it is not to be committed by the last commit
        return ours

    def _at_work(self, run: Run, sign: int) -> None:
        count = sign * len(run.records)
        run.part.at_work += count
        self._queues.at_work += count

    def _uncount(self, run: Run) -> None:
        self._queues.in_flight -= len(run.records)
        self._queues.in_flight_bytes -= run.size
        if not run.part.taking:
            self._received.pop(run.part, None)


def _kept(part: Part) -> bool:
    return part.taking and not part.gone


def _size(records: Sequence[Delivery]) -> int:
    """Bytes, with headers as large as those of the first: for a bound, and a tenth of what counting them all costs."""
    values = sum([len(record.value or b"") for record in records])
    return values + len(records) * (records[0].size - len(records[0].value or b"")) if records else 0


def _value_size(delivery: Delivery) -> int:
    return len(delivery.value or b"")


class _NoStore:
    """What the engine's other parts ask of a processor, for one that stores nothing."""

    def __init__(self, group: str) -> None:
        self.group = group

    def wants(self, type_name: str) -> bool:
        return True

    async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Result]:
        raise AssertionError("records go to the early processor")

    async def give_up(self, item: Item, failure: Failure) -> Result:
        return Done()

    async def give_up_raw(self, delivery: Delivery, failure: Failure) -> None:
        return None

    async def stored_watermarks(self) -> Watermarks:
        return {}

    async def store_watermarks(self, watermarks: Watermarks) -> None:
        return None

    def forget(self, topics: Collection[tuple[str, int]]) -> None:
        return None


def _never(delivery: Delivery) -> Any:
    raise AssertionError("records are parsed by the early processor")


__all__ = ["EarlyEngine", "EarlyProcessor"]
