"""The partitions in this member's hands: where reading starts, what is committed, how they are handed over.

A watermark is stored with the units first and committed to the group afterwards, so the group's offset is never ahead
of the database. A part starts at the lower of the two: a database restored from a backup asks for its messages again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from random import Random

from bus.engine.pulse import Pulse
from bus.engine.queues import KeyQueues
from bus.engine.settings import EngineSettings
from bus.engine.watermark import Part
from bus.envelope import Offset
from bus.errors import BusError, Fenced, TransportUnavailable
from bus.metrics import Metrics
from bus.processing import Processor, Watermarks
from bus.seams import Clock, Failpoint
from bus.transport import Assignment, Consumer, Transport

log = logging.getLogger("foldbus.bus")


class Partitions:
    """The engine's `bus.transport.Assignments`. `broken` is set after a bug: then nothing more is committed."""

    early = False
    """Offsets are committed before anything is handled (`early.py`): the group's are all there is."""

    def __init__(
        self,
        transport: Transport,
        processor: Processor,
        queues: KeyQueues,
        settings: EngineSettings,
        *,
        clock: Clock,
        metrics: Metrics,
        failpoint: Failpoint,
        rng: Random,
        stop: asyncio.Event,
        pulse: Pulse,
    ) -> None:
        self.live: dict[Assignment, Part] = {}
        self.consumer: Consumer | None = None
        self.joined = False
        self.waiting_since: float | None = None
        """Since when the group has told this member nothing of its parts; None once it has, be they none."""
        self.broken = False
        self._transport, self._processor, self._queues = transport, processor, queues
        self._settings, self._clock, self._metrics, self._rng = settings, clock, metrics, rng
        self._failpoint, self._stop, self._pulse = failpoint, stop, pulse
        self._group = processor.group
        self._lock = asyncio.Lock()

    # -- coming and going ---------------------------------------------------------------------------------------------

    async def assigned(
        self, parts: Sequence[Assignment], committed: Mapping[Assignment, Offset | None]
    ) -> Mapping[Assignment, Offset]:
        """Waits for the database when it does not answer: without its watermarks the start is a guess. Meanwhile the
        member does not poll and is replaced after a while by one that can read them."""
        if not parts:  # others have all of them
            self.joined, self.waiting_since = True, None
            return {}
        self._pulse.begins("reading where its parts begin", bound_s=self._settings.commit_timeout_s)
        stored = await self._stored_watermarks()
        if stored is None:  # told to stop meanwhile: take nothing
            return {}
        older = [part for part in self.live.values() if any(_same(part.assignment, new) for new in parts)]
        self._discard(older)  # an adapter that forgot to revoke
        starts: dict[Assignment, Offset] = {}
        for assignment in parts:
            in_group = committed.get(assignment)
            in_store = stored.get((assignment.topic, assignment.partition))
            known = [offset for offset in (in_group, in_store) if offset is not None]
            if len(known) < 2 and not (self.early and known):
                # One of the two knows nothing of this part: from the beginning. A known one below the beginning stays
                # the start: what retention took before it was handled must be out of range, not skipped.
                first = await self._beginning(assignment)
                known = [*known, first] if first is not None else [0] if in_group is not None else []
            start = min(known) if known else None
            if start is not None:
                starts[assignment] = start
            if in_group is not None and (start or 0) < in_group:
                self._metrics.count("foldbus_rewound_total", group=self._group, topic=assignment.topic)
                log.warning(
                    "%s: %s[%d] is read again from %d: the group is at %d, the database at %s",
                    self._group, assignment.topic, assignment.partition, start or 0, in_group, in_store,
                )  # fmt: skip
            self.live[assignment] = Part(assignment, start=start or 0, stored=in_store)
        self.joined, self.waiting_since = True, None
        self._pulse.begins("a poll", bound_s=self._settings.poll_timeout_s)
        self._metrics.count("foldbus_assigned_total", len(parts), group=self._group)
        log.info("%s: took over %s", self._group, names_of(parts))
        return starts

    async def revoked(self, parts: Sequence[Assignment], *, lost: bool) -> None:
        """Drops what is queued, waits for what is at work, commits. What is at work longer than `drain_timeout_s` may
        still finish in the database (claims protect it); here its end is ignored."""
        mine = [self.live[assignment] for assignment in parts if assignment in self.live]
        lost = lost or self.broken
        settings = self._settings
        self._pulse.begins("handing its parts over", bound_s=settings.drain_timeout_s + settings.commit_timeout_s)
        for part in mine:
            part.taking, part.gone = False, lost
        dropped = self._queues.drop(set(mine))
        try:
            if mine and not lost:
                await self._drained(mine)
                await self._commit_last(mine)
        finally:
            self._discard(mine)
            self._pulse.begins("a poll", bound_s=settings.poll_timeout_s)
            if not self.live:
                self.waiting_since = self._clock.monotonic()
            self._metrics.count("foldbus_revoked_total", len(parts), group=self._group, lost=str(lost).lower())
            log.info(
                "%s: gave back %s%s, %d queued messages left to others",
                self._group, names_of(parts), " (lost)" if lost else "", dropped,
            )  # fmt: skip

    def begin(self, consumer: Consumer) -> None:
        """Now a member, which the group has told nothing yet."""
        self.consumer, self.waiting_since = consumer, self._clock.monotonic()

    def abandon(self) -> None:
        """After the group was left: whatever was not revoked is lost."""
        self._discard(list(self.live.values()))
        self.consumer, self.joined, self.waiting_since = None, False, None

    def _discard(self, parts: Collection[Part]) -> None:
        if not parts:
            return
        for part in parts:
            part.taking, part.gone = False, True
            self.live.pop(part.assignment, None)
        self._queues.drop(set(parts))
        self._queues.progress.set()
        self._processor.forget({part.where for part in parts})

    async def _drained(self, parts: Collection[Part]) -> None:
        progress = self._queues.progress
        try:
            async with asyncio.timeout(self._settings.drain_timeout_s):
                while any(part.at_work for part in parts):
                    progress.clear()
                    await progress.wait()
        except TimeoutError:
            self._metrics.count("foldbus_drain_timeouts_total", group=self._group)
            log.warning(
                "%s: %d messages were still at work after %.1f s; they stay uncommitted",
                self._group, sum(part.at_work for part in parts), self._settings.drain_timeout_s,
            )  # fmt: skip

    async def _commit_last(self, parts: Collection[Part]) -> None:
        try:
            async with asyncio.timeout(self._settings.commit_timeout_s):
                await self.commit(parts)
        except TimeoutError:
            self._commit_failed("no answer in time")

    async def _stored_watermarks(self) -> Watermarks | None:
        failures = 0
        while True:
            try:
                return await self._processor.stored_watermarks()
            except Exception as error:
                failures += 1
                wait_s = self._settings.backoff_s(failures, self._rng)
                self._pulse.begins("waiting for the database", bound_s=wait_s + self._settings.commit_timeout_s)
                self._metrics.count("foldbus_store_unavailable_total", group=self._group)
                log.warning(
                    "%s: stored watermarks cannot be read, again in %.3f s: %s: %s",
                    self._group, wait_s, type(error).__name__, error,
                )  # fmt: skip
            if await set_within(self._stop, wait_s):
                return None

    async def _beginning(self, assignment: Assignment) -> Offset | None:
        """The first offset the topic still holds: "from the beginning" is not 0 where retention has deleted. None when
        the broker does not say; reading from 0 is then either right or loudly out of range."""
        try:
            async with asyncio.timeout(self._settings.commit_timeout_s):
                held = await self._transport.admin.offsets(assignment.topic)
            return held[assignment.partition][0]
        except (BusError, KeyError, TimeoutError) as error:
            log.warning("%s: no first offset of %s[%d]: %s", self._group, assignment.topic, assignment.partition, error)
            return None

    # -- watermarks ---------------------------------------------------------------------------------------------------

    def marks(self) -> Watermarks:
        """What is handled now and not stored yet, to be stored by the call that begins now."""
        return _Marks(self.live.values())

    def stored(self, marks: Watermarks) -> None:
        """The call that took `marks` along has returned."""
        assert isinstance(marks, _Marks)
        for part, offset in marks.taken:
            if part.stored is None or part.stored < offset:
                part.stored = offset

    async def commit(self, parts: Iterable[Part] | None = None) -> None:
        """Stores, then commits, what moved. A database or broker that does not answer leaves all as it was."""
        async with self._lock:
            # Values are read before anything is awaited: what completes meanwhile waits for the next commit.
            moved = [
                (part, part.watermark)
                for part in (self.live.values() if parts is None else parts)
                if not part.gone and part.watermark > part.committed
            ]
            unstored = [(part, offset) for part, offset in moved if part.stored is None or part.stored < offset]
            if unstored:
                try:
                    await self._processor.store_watermarks({part.where: offset for part, offset in unstored})
                except Exception as error:
                    return self._commit_failed("the database did not store the watermarks", error)
                for part, offset in unstored:
                    part.stored = offset
            moved = [(part, offset) for part, offset in moved if not part.gone]
            if not moved or self.consumer is None or self.broken:
                return None
            self._failpoint.hit("before-offset-commit")
            try:
                if not await self._commit(self.consumer, moved):
                    # Which of them is not ours any more, the error does not say.
                    for each in moved:
                        if not await self._commit(self.consumer, [each]):
                            self._fenced(each[0])
            except TransportUnavailable as error:
                return self._commit_failed("the broker did not answer", error)
            self._failpoint.hit("after-offset-commit")
            return None

    async def _commit(self, consumer: Consumer, moved: Sequence[tuple[Part, Offset]]) -> bool:
        try:
            await consumer.commit({part.assignment: offset for part, offset in moved})
        except Fenced:
            return False
        for part, offset in moved:
            part.committed = offset
        return True

    def _fenced(self, part: Part) -> None:
        self._metrics.count("foldbus_fenced_total", group=self._group, topic=part.assignment.topic)
        log.warning("%s: %s is somebody else's now; its state is discarded", self._group, names_of([part.assignment]))
        self._discard([part])

    def _commit_failed(self, why: str, error: Exception | None = None) -> None:
        self._metrics.count("foldbus_offset_commits_failed_total", group=self._group)
        log.warning("%s: offsets were not committed, %s%s", self._group, why, f": {error}" if error else "")


class _Marks(dict[tuple[str, int], Offset]):
    """Watermarks that remember whose they are: a part may be gone, or assigned anew, when the call returns."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self.taken = [(part, part.watermark) for part in parts if part.stored != part.watermark]
        super().__init__((part.where, offset) for part, offset in self.taken)


def _same(one: Assignment, other: Assignment) -> bool:
    return one.topic == other.topic and one.partition == other.partition


def names_of(parts: Sequence[Assignment]) -> str:
    """One short line, however many: `orders.commands[0-5,7] epoch 3`."""
    by_topic: dict[tuple[str, int], list[int]] = {}
    for part in sorted(parts):
        by_topic.setdefault((part.topic, part.epoch), []).append(part.partition)
    return (
        ", ".join(f"{topic}[{_runs(found)}] epoch {epoch}" for (topic, epoch), found in by_topic.items()) or "nothing"
    )


def _runs(numbers: Sequence[int]) -> str:
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


async def set_within(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
