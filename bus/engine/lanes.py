"""Lanes take batches to the processor and deal with its answers; the undertaker gives up what cannot be handled.

They never meet in one key (`queues.py`). A failing key waits alone, and so does one whose answer comes later; an
exception out of `process` says nothing about any message, so the lane rests, tries smaller batches, and counts no
attempt.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from random import Random

from bus.engine.partitions import Partitions
from bus.engine.queues import Entry, KeyQueue, KeyQueues, State
from bus.engine.settings import EngineSettings, failure_of
from bus.errors import BadInput, BusError
from bus.metrics import Metrics
from bus.processing import Again, Answer, Aside, Done, Failed, Item, Later, Processor, Result
from bus.seams import Clock

log = logging.getLogger("foldbus.bus")

DONE = Done()
Gate = Callable[[], int | None]
"""How many messages may go to work now; None: as many as there are. Shut (0) while a dependency is taken for down."""
GATE_S = 0.2
"""How often it is asked again."""
AGAINS_AT_ONCE = 3
"""So many lost races in a row are taken up again at once, further ones wait a little longer each time."""


class BrokenProcessor(BusError):
    """A processor's answer breaks its contract: a bug, so the engine stops before more is committed."""


class Lanes:
    def __init__(
        self,
        processor: Processor,
        queues: KeyQueues,
        partitions: Partitions,
        settings: EngineSettings,
        *,
        clock: Clock,
        metrics: Metrics,
        rng: Random,
        code_version: str,
    ) -> None:
        self._processor, self._queues, self._partitions = processor, queues, partitions
        self._settings, self._clock, self._metrics, self._rng = settings, clock, metrics, rng
        self._code_version = code_version
        self._group = processor.group
        self._begun: dict[object, float] = {}
        self._late: set[asyncio.Future[Result]] = set()
        self._abandoned = False
        self._broke, self._bugs = asyncio.Event(), list[BaseException]()
        self.gate: Gate | None = None

    @property
    def oldest(self) -> float | None:
        """Since when the call that has gone on longest is at work (`clock.monotonic()`); None: nothing is."""
        return min(self._begun.values(), default=None)

    async def work(self, *, spare: bool = False) -> None:
        """One lane, until cancelled. A spare one takes what is more than the others take at once, so that a batch is
        decided while the one before it is written; none behind a gate that counts, whose answer is for one lane."""
        lane = object()
        queues, processor, limit_max = self._queues, self._processor, self._settings.batch_size_max
        limit, failures = limit_max, 0
        wakes = queues.surplus if spare else queues.work
        while True:
            free = None if self.gate is None else self.gate()
            rests = spare and (free is not None or not queues.look_for_surplus())
            batch = [] if rests else queues.take(limit if free is None else min(limit, free))
            if not batch and free is not None and not spare:
                await asyncio.sleep(GATE_S)
                continue
            if not batch:
                wakes.clear()
                await wakes.wait()
                continue
            items: list[Item] = [entry.item for entry in batch if entry.item is not None]
            marks = self._partitions.marks()
            began = self._begun[lane] = self._clock.monotonic()
            try:
                results = await processor.process(items, marks)
            except Exception as error:
                failures += 1
                # Should it be one message that upsets the whole call, halving finds a batch without it.
                limit = max(1, len(batch) // 2)
                self._nothing_known(batch, error)
                del self._begun[lane]
                await asyncio.sleep(self._settings.backoff_s(failures, self._rng))
                continue
            del self._begun[lane]
            self._partitions.stored(marks)
            limit, failures = min(limit_max, limit * 2), 0
            if self._answered(batch, results, began):
                # Processors that never suspend must not keep the pump from polling.
                await asyncio.sleep(0)

    async def fate(self) -> None:
        """Raises what came late and would have ended a lane. Until cancelled."""
        await self._broke.wait()
        raise self._bugs[0]

    async def abandon(self) -> None:
        """Cancels what is still at work though its lane has gone on. For the end."""
        self._abandoned = True
        for result in self._late:
            result.cancel()
        await asyncio.gather(*self._late, return_exceptions=True)

    async def bury(self) -> None:
        """Gives up one message at a time, until cancelled; next to the lanes, so that a dead letter that cannot be
        written holds up neither other keys nor other messages."""
        queues = self._queues
        while True:
            entry = queues.take_verdict()
            if entry is None:
                queues.verdicts.clear()
                await queues.verdicts.wait()
                continue
            self._begun[queues] = self._clock.monotonic()
            await self._give_up(entry)
            del self._begun[queues]
            queues.progress.set()

    # -- answers ------------------------------------------------------------------------------------------------------

    def _answered(self, batch: Sequence[Entry], results: Sequence[Answer], began: float) -> bool:
        """Answers whether something goes back, or will."""
        if len(results) != len(batch):
            raise BrokenProcessor(f"{self._group}: process() answered {len(results)} results for {len(batch)} items")
        queues = self._queues
        back: dict[KeyQueue, list[Entry]] = {}
        waits: dict[KeyQueue, float] = {}
        late: dict[KeyQueue, Later] = {}
        for entry, result in zip(batch, results, strict=True):
            queue = entry.queue
            earlier = back.get(queue) if back else None
            if isinstance(result, Done | Later) and earlier is not None:
                raise BrokenProcessor(
                    f"{self._group}: process() took up offset {entry.offset} of key {queue.key!r} before offset "
                    f"{earlier[0].offset}, which it answered is not done; nothing more is committed"
                )
            if isinstance(result, Done):
                queues.finish(entry, result)
            elif earlier is not None:
                # It stood behind one that is not done, so it was not tried, whatever the answer.
                earlier.append(entry)
                if isinstance(result, Again) and entry.item is not None:
                    entry.item.examine = True
            else:
                back[queue] = [entry]
                if isinstance(result, Later):
                    late[queue] = result
                else:
                    waits[queue] = self._not_done(entry, result)
        for entry in batch:
            if entry.queue.state is State.WORK and entry.queue not in late:  # once per key: it changes the state
                queues.release(entry.queue, back.get(entry.queue, ()), waits.get(entry.queue, 0.0))
        for queue, later in late.items():
            self._wait_for(later.result, back[queue], began)
        queues.progress.set()
        return bool(back)

    def _wait_for(self, result: asyncio.Future[Result], entries: Sequence[Entry], began: float) -> None:
        """The first of a key's entries is still at work; the key stays there until it is over."""

        def over(result: asyncio.Future[Result]) -> None:
            self._late.discard(result)
            del self._begun[result]
            if self._abandoned:
                return
            error = asyncio.CancelledError() if result.cancelled() else result.exception()
            if isinstance(error, Exception | asyncio.CancelledError):
                self._nothing_known(entries, error)
                return
            try:
                if error is not None:
                    raise error
                self._answered(entries, [result.result(), *(Again() for _ in entries[1:])], began)
            except BaseException as bug:  # as if it had come out of a lane
                self._bugs.append(bug)
                self._broke.set()

        self._late.add(result)
        self._begun[result] = began
        result.add_done_callback(over)

    def _not_done(self, entry: Entry, result: Again | Failed) -> float:
        """How long its key waits."""
        item = entry.item
        assert item is not None
        if isinstance(result, Again):
            item.examine = True
            entry.agains += 1
            self._metrics.count("foldbus_again_total", group=self._group)
            log.debug(
                "%s: %s %s once more in %.3f s", self._group, item.envelope.type, item.envelope.id, result.after_s
            )
            spare = entry.agains - AGAINS_AT_ONCE
            return max(result.after_s, self._settings.backoff_s(spare, self._rng) if spare > 0 else 0.0)
        error, now = result.error, self._clock.monotonic()
        item.attempts += 1
        item.unreadable = isinstance(error, BadInput)
        if entry.first_failed_at is None:
            earlier = None if item.parked is None else item.parked.failure
            entry.first_failed_at = self._clock.now() if earlier is None else earlier.first_failed_at
            entry.first_failed = now
        settings = self._settings
        if (
            item.unreadable
            or item.parked is not None  # one attempt for each turn
            or item.attempts >= settings.attempts_max
            or now - entry.first_failed >= settings.retry_total_s
        ):
            entry.failure = failure_of(
                error,
                attempts=item.attempts,
                first_failed_at=entry.first_failed_at,
                failed_at=self._clock.now(),
                code_version=self._code_version,
            )
            return 0.0
        wait_s = settings.backoff_s(item.attempts, self._rng)
        self._metrics.count("foldbus_retried_total", group=self._group, type=item.envelope.type)
        log.warning(
            "%s: %s %s failed (attempt %d of %d), its key waits %.3f s: %s: %s",
            self._group, item.envelope.type, item.envelope.id, item.attempts, settings.attempts_max, wait_s,
            type(error).__name__, error,
        )  # fmt: skip
        return wait_s

    def _nothing_known(self, batch: Sequence[Entry], error: BaseException) -> None:
        self._metrics.count("foldbus_process_failed_total", group=self._group)
        log.warning(
            "%s: a batch of %d got no answer and is given again: %s: %s",
            self._group, len(batch), type(error).__name__, error,
        )  # fmt: skip
        back: dict[KeyQueue, list[Entry]] = {}
        for entry in batch:
            back.setdefault(entry.queue, []).append(entry)
        wait_s = 0.0
        if len(back) == 1:  # perhaps it is this one alone: out of the others' way
            batch[0].raised += 1
            wait_s = self._settings.backoff_s(batch[0].raised, self._rng)
        for queue, entries in back.items():
            self._queues.release(queue, entries, wait_s)
        self._queues.progress.set()

    # -- giving up ----------------------------------------------------------------------------------------------------

    async def _give_up(self, entry: Entry) -> None:
        failure, item, queues = entry.failure, entry.item, self._queues
        assert failure is not None
        error: Exception | None = None
        result: Result = DONE
        try:
            if item is not None:
                result = await self._processor.give_up(item, failure)
            elif entry.delivery is not None:
                await self._processor.give_up_raw(entry.delivery, failure)
        except Exception as raised:
            error = raised
        else:
            if isinstance(result, Failed):
                error = result.error
        if error is not None:
            # Until it is in the dead letters its offset stays uncommitted, so there is no last attempt here.
            entry.raised += 1
            wait_s = self._settings.backoff_s(entry.raised, self._rng)
            self._metrics.count("foldbus_give_up_failed_total", group=self._group)
            log.warning(
                "%s: %s could not be given up, again in %.3f s: %s: %s",
                self._group, _name(entry), wait_s, type(error).__name__, error,
            )  # fmt: skip
            queues.release(entry.queue, (entry,), wait_s)
        elif isinstance(result, Again) and item is not None:
            item.examine, entry.failure = True, None
            entry.agains += 1
            self._metrics.count("foldbus_again_total", group=self._group)
            log.info("%s: %s is looked at once more before it is given up", self._group, _name(entry))
            spare = entry.agains - AGAINS_AT_ONCE
            wait_s = max(result.after_s, self._settings.backoff_s(spare, self._rng) if spare > 0 else 0.0)
            queues.release(entry.queue, (entry,), wait_s)
        elif isinstance(result, Aside):
            log.debug("%s: %s is set aside after %d attempts", self._group, _name(entry), failure.attempts)
            queues.finish(entry, result)
            queues.release(entry.queue, (), 0.0)
        else:
            self._metrics.count("foldbus_given_up_total", group=self._group, error=failure.error)
            log.info(  # the dead letter itself is an error in the log, from whoever wrote it
                "%s: %s given up after %d attempts: %s: %s",
                self._group, _name(entry), failure.attempts, failure.error, failure.message,
            )  # fmt: skip
            queues.finish(entry, Failed(GivenUp(failure.error, failure.message)))
            queues.release(entry.queue, (), 0.0)


class GivenUp(BusError):
    """What an offer learns when its message went to the dead letters."""

    def __init__(self, error: str, message: str) -> None:
        super().__init__(f"given up, in the dead letters: {error}: {message}")
        self.error, self.message = error, message


def _name(entry: Entry) -> str:
    what = f"{entry.item.envelope.type} {entry.item.envelope.id}" if entry.item is not None else "an unreadable record"
    if entry.delivery is None:
        return what
    return f"{what} ({entry.delivery.topic}[{entry.delivery.partition}] at {entry.offset})"
