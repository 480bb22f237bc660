"""Due timers on their way to the engines: a saga's timeouts, and dead letters that were redriven."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from uuid import UUID

from bus.cloudevents import to_record
from bus.consumer import ConsumerEngine
from bus.metrics import Metrics
from bus.processing import Item, Result
from bus.transport import Assignment, Delivery
from eventstore.errors import StoreUnavailable
from eventstore.port import CancelTimer, Store, Timer, Unit

log = logging.getLogger("foldbus.worker")

_HOMELESS_S = 30.0
"""How long a timer is left alone whose consumer is nobody of this code."""


class DueTimers:
    """Hands each due timer to its consumer's engine, where it waits in its key's queue like any message."""

    def __init__(self, store: Store, engines: Mapping[str, ConsumerEngine], *, metrics: Metrics, poll_s: float) -> None:
        self._store, self._engines, self._metrics, self._poll_s = store, engines, metrics, poll_s
        self._hands = _Hands()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._hands.put_away(self._store)
                for timer in await self._store.timers.due(limit=500):
                    await self._offer(timer)
            except StoreUnavailable as error:
                log.warning("timers wait, the store does not answer: %s", error)
            await asyncio.sleep(self._poll_s)

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


def _is_redriven(timer: Timer) -> bool:
    """A saga's timers bear the id of their message; see `foldbus/redriving.py`."""
    return timer.id != timer.envelope.id


def _redelivery(timer: Timer) -> Delivery | None:
    """The record that a redriven message came in, but for its place: should it die again, its letter needs that."""
    envelope = timer.envelope
    if not _is_redriven(timer) or envelope.topic is None:
        return None
    record = to_record(envelope)
    return Delivery(Assignment(envelope.topic, -1), -1, record.key, record.value, record.headers, envelope.time)
