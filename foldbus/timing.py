"""What comes to the engines from the database: due timers (a saga's timeouts, dead letters that were redriven), and the
heads of parked keys whose next try is due.

Both wait in their key's queue in the engine like any message, and are handled by whichever worker is given them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from uuid import UUID

from bus.cloudevents import to_record
from bus.consumer import ConsumerEngine
from bus.metrics import Metrics
from bus.processing import Aside, Item, Result
from bus.transport import Assignment, Delivery
from eventstore.errors import StoreUnavailable
from eventstore.parking import Parked
from eventstore.port import CancelTimer, Store, Timer, Unit
from foldbus.parking import ParkSettings
from foldbus.scheduling import Delayed

log = logging.getLogger("foldbus.worker")

_MOMENT_S = 0.005
_HOMELESS_S = 30.0
"""How long a timer is left alone whose consumer is nobody of this code."""
_PUT_BACK_S = 5.0
"""How long a worker that stops takes to put back what it has in hand, at most."""


class DueTimers:
    """Hands each due timer to its consumer's engine, where it waits in its key's queue like any message, and delayed
    messages to the outbox. It looks again when the next one is due, `wake` is called, or after `poll_s`: only what
    another process stages for a moment nearer than that is late. `each_turn` is whatever else is to be asked of the
    store as often."""

    def __init__(
        self,
        store: Store,
        engines: Mapping[str, ConsumerEngine],
        *,
        metrics: Metrics,
        poll_s: float,
        each_turn: Callable[[], Awaitable[None]],
        delayed: Delayed,
    ) -> None:
        self._store, self._engines, self._metrics, self._poll_s = store, engines, metrics, poll_s
        self._each_turn = each_turn
        self._delayed = delayed
        self._hands = _Hands()
        self._news = asyncio.Event()

    def wake(self) -> None:
        """A timer was staged in this process."""
        self._news.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._news.clear()
            wait_s = self._poll_s
            try:
                await self._each_turn()
                await self._hands.put_away(self._store)
                wait_s = await self._fire()
            except StoreUnavailable as error:
                log.warning("timers wait, the store does not answer: %s", error)
            await _set_within(self._news, wait_s)

    async def _fire(self) -> float:
        """Those that are due; answers how long none is."""
        timers = self._store.timers
        while (due_at := await timers.next_due()) is not None:
            left_s = (due_at - timers.now()).total_seconds()
            if left_s > 0:
                return min(left_s, self._poll_s)
            due = await timers.due(limit=500)
            if not due:  # the database's clock is a moment behind what we take it for
                return _MOMENT_S
            await self._delayed.send([timer for timer in due if timer.consumer == self._delayed.consumer])
            for timer in due:
                if timer.consumer != self._delayed.consumer:
                    await self._offer(timer)
        return self._poll_s

    async def _offer(self, timer: Timer) -> None:
        if self._hands.hold(timer):
            return  # its lease ended before it was handled
        engine = self._engines.get(timer.consumer)
        if engine is None:
            self._metrics.count("foldbus_timers_homeless_total", consumer=timer.consumer)
            log.warning("timer %s waits: nobody here is consumer %s", timer.id, timer.consumer)
            await self._store.timers.release(timer, delay_s=_HOMELESS_S)
        elif (ended := engine.offer(Item(timer.envelope, _redelivery(timer)))) is None:
            await self._store.timers.release(timer, delay_s=self._poll_s)
        else:
            self._hands.take(timer, ended)
            self._metrics.count("foldbus_timers_fired_total", consumer=timer.consumer)


class _Hands:
    """The redriven messages that this worker has in hand. A saga's timer is taken away by the unit that handles it; a
    redriven message is handled as if it came from its topic, so its timer is taken away here, after that: killed in
    between, it comes up once more and is found handled."""

    def __init__(self) -> None:
        self._held: set[tuple[str, UUID]] = set()
        self._handled: list[CancelTimer] = []

    def hold(self, timer: Timer) -> bool:
        return (timer.consumer, timer.id) in self._held

    def take(self, timer: Timer, ended: asyncio.Future[Result]) -> None:
        if not _is_redriven(timer):
            return
        name = (timer.consumer, timer.id)
        self._held.add(name)

        def put_down(ended: asyncio.Future[Result]) -> None:
            if ended.cancelled():  # the engine ended: whoever comes next gets it again
                self._held.discard(name)
            else:
                self._handled.append(CancelTimer(*name))

        ended.add_done_callback(put_down)

    async def put_away(self, store: Store) -> None:
        """Raises StoreUnavailable; then they are put away the next time."""
        while self._handled:
            some = self._handled[:500]
            await store.commit([Unit(timers=tuple(some))])
            del self._handled[: len(some)]
            self._held.difference_update((one.consumer, one.id) for one in some)


_Name = tuple[str, str, int]
"""Of a message in a queue: consumer, key, number."""


class DueParked:
    """Hands the heads of parked keys to their consumers' engines when they are due; the next of a key as soon as one
    has left. A turn that does not come to an end here ends with its lease, or with `put_back`."""

    def __init__(
        self,
        store: Store,
        engines: Mapping[str, ConsumerEngine],
        *,
        metrics: Metrics,
        settings: ParkSettings,
        poll_s: float,
    ) -> None:
        self._store, self._engines, self._metrics = store, engines, metrics
        self._settings, self._poll_s = settings, poll_s
        self._hands: dict[_Name, Item] = {}
        self._left: set[tuple[str, str]] = set()
        self._dropped: set[tuple[str, str]] = set()
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._news.clear()
            try:
                await self._put_down()
                await self._hand_out()
            except StoreUnavailable as error:
                log.warning("parked messages wait, the store does not answer: %s", error)
            await _set_within(self._news, self._poll_s)

    async def put_back(self) -> None:
        """The engines have ended: what was in hand need not wait for the end of its lease."""
        self._dropped.update((consumer, key) for consumer, key, _ in self._hands)
        self._hands.clear()
        try:
            async with asyncio.timeout(_PUT_BACK_S):
                await self._put_down()
        except (StoreUnavailable, TimeoutError) as error:
            log.warning("parked messages in hand wait for the end of their leases: %s", error)

    async def _hand_out(self) -> None:
        consumers = [name for name, engine in self._engines.items() if engine.room > 0]
        limit = self._settings.at_once_max - len(self._hands)
        if not consumers or limit <= 0:
            return
        due = await self._store.parking.due(consumers=consumers, limit=limit, lease_s=self._settings.lease_s)
        left, self._left = self._left, set()
        freed = left.difference((parked.consumer, parked.key) for parked in due)
        for parked in due:
            self._offer(parked)
        for consumer, key in sorted(freed):
            if not await self._store.parking.queue(consumer, key, limit=1):
                self._metrics.count("foldbus_keys_freed_total", consumer=consumer)
                log.info("%s: key %r is not parked any more", consumer, key)

    def _offer(self, parked: Parked) -> None:
        name = (parked.consumer, parked.key, parked.number)
        held = self._hands.get(name)
        if held is not None and held.parked is not None and held.parked.failure == parked.failure:
            held.parked = parked  # its lease ended before it was handled here, and it is still at the head
            return
        # Or it failed here once more and is due again already, before the engine's answer was heard: a turn of its own.
        failure, message = parked.failure, parked.message
        attempts = 0 if failure is None else failure.attempts
        item = Item(message.envelope, message.delivery, attempts, parked=parked)
        ended = self._engines[parked.consumer].offer(item)
        if ended is None:
            self._dropped.add((parked.consumer, parked.key))
            return
        self._hands[name] = item
        self._metrics.count("foldbus_turns_total", consumer=parked.consumer)
        ended.add_done_callback(partial(self._ended, name, item))

    def _ended(self, name: _Name, item: Item, ended: asyncio.Future[Result]) -> None:
        if self._hands.get(name) is not item:
            return
        del self._hands[name]
        consumer, key, _ = name
        if ended.cancelled():  # the engine ended before its turn came
            self._dropped.add((consumer, key))
        elif not isinstance(ended.result(), Aside):  # it left the queue: the next one is due
            self._left.add((consumer, key))
            self._news.set()

    async def _put_down(self) -> None:
        """What an engine did not take is due again. Raises StoreUnavailable; then it is put down the next time."""
        while self._dropped:
            consumer, key = next(iter(self._dropped))
            await self._store.parking.wake(consumer, key)
            self._dropped.discard((consumer, key))


async def _set_within(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass


def _is_redriven(timer: Timer) -> bool:
    """A saga's timers bear the id of their message; see `foldbus/redriving.py`."""
    return timer.id != timer.envelope.id


def _redelivery(timer: Timer) -> Delivery | None:
    """The record that a redriven message came in, but for its place: should it die again, its letter needs that."""
    envelope = timer.envelope
    if not _is_redriven(timer) or envelope.topic is None:
        return None
    record = to_record(envelope)
    return Delivery(Assignment(envelope.topic, -1), -1, record.key, record.value, tuple(record.headers), envelope.time)
