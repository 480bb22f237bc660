"""Queues per key: what is ready, what is at work, what waits. Pure bookkeeping, no awaiting.

A key's queue is in exactly one state, so it is in at most one batch at a time; that, and putting back at the front,
is what keeps its order through retries, rebalances and several lanes. A batch takes the ready heads across keys first
and then, round by round, one follower of each: a hot key gets what the others leave.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from itertools import count

from bus.engine.watermark import Part
from bus.envelope import Failure, Offset
from bus.processing import Item, Result
from bus.seams import Clock
from bus.transport import Delivery


class State(Enum):
    READY = auto()
    """Its head waits for a batch."""
    VERDICT = auto()
    """Its head waits to be given up."""
    WORK = auto()
    """Its head is at work; so may be followers."""
    WAITING = auto()
    """Its head waits for a moment to pass."""
    GONE = auto()
    """Empty and forgotten."""


class KeyQueue:
    __slots__ = ("due", "entries", "key", "state")

    def __init__(self, key: object) -> None:
        self.key = key
        self.entries: deque[Entry] = deque()
        self.state = State.GONE
        self.due = 0.0


@dataclass(slots=True, eq=False)
class Entry:
    """An item and what the engine knows of it. `item` is None for a record that never became an envelope, `part` and
    `delivery` for a timer's message. With `failure` it is to be given up, not processed."""

    queue: KeyQueue
    item: Item | None
    delivery: Delivery | None
    part: Part | None
    offset: Offset
    size: int
    failure: Failure | None = None
    first_failed_at: datetime | None = None
    first_failed: float = 0.0
    agains: int = 0
    raised: int = 0
    ended: asyncio.Future[Result] | None = None


class KeyQueues:
    """`in_flight` and `in_flight_bytes` count what came from the transport, `offers` what came from timers; both
    until done or dropped. `progress` is set whenever any of it changes for the better, `work` when there is something
    to take, `surplus` when there is a full batch of it."""

    def __init__(self, clock: Clock, *, per_key_max: int, batch_size_max: int) -> None:
        self.in_flight = 0
        self.in_flight_bytes = 0
        self.offers = 0
        self.at_work = 0
        self.work = asyncio.Event()
        self.surplus = asyncio.Event()
        self.verdicts = asyncio.Event()
        self.progress = asyncio.Event()
        self._clock = clock
        self._per_key_max, self._batch_size_max = per_key_max, batch_size_max
        self._keys: dict[object, KeyQueue] = {}
        self._ready: deque[KeyQueue] = deque()
        self._doomed: deque[KeyQueue] = deque()
        self._waiting: list[tuple[float, int, KeyQueue]] = []
        self._serial = count()
        self._alarm: asyncio.TimerHandle | None = None
        self._closed = False

    # -- coming in ----------------------------------------------------------------------------------------------------

    def queue(self, key: object) -> KeyQueue:
        queue = self._keys.get(key)
        if queue is None:
            queue = self._keys[key] = KeyQueue(key)
        return queue

    def put(self, entry: Entry) -> None:
        """At the end of its key's queue."""
        queue, part = entry.queue, entry.part
        entries = queue.entries
        entries.append(entry)
        if part is None:
            self.offers += 1
        else:
            self.in_flight += 1
            self.in_flight_bytes += entry.size
            if len(entries) >= self._per_key_max:
                part.crowd.add(queue)
        if queue.state is State.GONE:
            self._settle(queue)

    # -- going to work ------------------------------------------------------------------------------------------------

    def look_for_surplus(self) -> bool:
        """Does a full batch wait? Also what waits behind a key at work counts, so a batch may turn out smaller."""
        found = self.in_flight + self.offers - self.at_work >= self._batch_size_max
        if found:
            self.surplus.set()
        else:
            self.surplus.clear()
        return found

    def take(self, limit: int) -> list[Entry]:
        """The next batch: heads in the order in which their keys became ready, then followers."""
        batch: list[Entry] = []
        if self._closed:
            return batch
        ready, more = self._ready, list[KeyQueue]()
        while ready and len(batch) < limit:
            queue = ready.popleft()
            if queue.state is not State.READY:  # dropped since
                continue
            queue.state = State.WORK
            batch.append(queue.entries.popleft())
            if queue.entries:
                more.append(queue)
        while more and len(batch) < limit:
            again: list[KeyQueue] = []
            for queue in more[: limit - len(batch)]:
                if queue.entries[0].failure is None:
                    batch.append(queue.entries.popleft())
                    if queue.entries:
                        again.append(queue)
            more = again
        for entry in batch:
            if entry.part is not None:
                entry.part.at_work += 1
        self.at_work += len(batch)
        return batch

    def take_verdict(self) -> Entry | None:
        """The next entry to be given up, alone."""
        while self._doomed and not self._closed:
            queue = self._doomed.popleft()
            if queue.state is State.VERDICT:
                queue.state = State.WORK
                entry = queue.entries.popleft()
                if entry.part is not None:
                    entry.part.at_work += 1
                self.at_work += 1
                return entry
        return None

    # -- coming back --------------------------------------------------------------------------------------------------

    def finish(self, entry: Entry, result: Result) -> None:
        """It was at work and is handled: its offset is complete. Where its epoch has ended, that moves the watermark of
        a `Part` that nobody looks at any more."""
        self._rest(entry)
        if entry.part is not None:
            entry.part.complete(entry.offset)
        if entry.ended is not None and not entry.ended.done():
            entry.ended.set_result(result)

    def release(self, queue: KeyQueue, back: Sequence[Entry], wait_s: float) -> None:
        """Ends a key's turn. `back` was at work and is not done: in front again, in order, unless revoked since."""
        first = None
        for entry in reversed(back):
            part = entry.part
            if part is None or part.taking:
                queue.entries.appendleft(entry)
                first = entry
                self.at_work -= 1
                if part is not None:
                    part.at_work -= 1
            else:
                self._rest(entry)
        if wait_s > 0 and back and first is back[0]:
            self._wait(queue, wait_s)
        else:
            self._settle(queue)

    def drop(self, parts: Collection[Part]) -> int:
        """Forgets what is queued of these parts and answers how much it was; what is at work is left alone."""
        dropped = 0
        for queue in list(self._keys.values()):
            entries = queue.entries
            if not any(entry.part in parts for entry in entries):
                continue
            head = entries[0]
            kept = [entry for entry in entries if entry.part not in parts]
            for entry in entries:
                if entry.part in parts:
                    self._uncount(entry)
                    dropped += 1
            entries.clear()
            entries.extend(kept)
            if queue.state is not State.WORK and not (kept and kept[0] is head):
                queue.state = State.GONE
                self._settle(queue)
        if dropped:
            self.progress.set()
        return dropped

    def close(self) -> None:
        """Nothing goes to work any more."""
        self._closed = True
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    # -- inside -------------------------------------------------------------------------------------------------------

    def _rest(self, entry: Entry) -> None:
        self.at_work -= 1
        if entry.part is not None:
            entry.part.at_work -= 1
        self._uncount(entry)

    def _uncount(self, entry: Entry) -> None:
        if entry.part is None:
            self.offers -= 1
        else:
            self.in_flight -= 1
            self.in_flight_bytes -= entry.size

    def _settle(self, queue: KeyQueue) -> None:
        if not queue.entries:
            queue.state = State.GONE
            self._keys.pop(queue.key, None)
        elif queue.entries[0].failure is not None:
            queue.state = State.VERDICT
            self._doomed.append(queue)
            self.verdicts.set()
        else:
            queue.state = State.READY
            self._ready.append(queue)
            self.work.set()
            self.look_for_surplus()  # also of what is due again: no poll tells of that

    def _wait(self, queue: KeyQueue, wait_s: float) -> None:
        queue.state = State.WAITING
        queue.due = self._clock.monotonic() + wait_s
        heapq.heappush(self._waiting, (queue.due, next(self._serial), queue))
        if self._waiting[0][2] is queue:
            self._set_alarm()

    def _set_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if self._waiting and not self._closed:
            delay = max(0.0, self._waiting[0][0] - self._clock.monotonic())
            self._alarm = asyncio.get_running_loop().call_later(delay, self._ring)

    def _ring(self) -> None:
        now = self._clock.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            due, _, queue = heapq.heappop(self._waiting)
            if queue.state is State.WAITING and queue.due == due:  # else it was dropped, or waits anew
                self._settle(queue)
        self._set_alarm()
