"""Delayed messages: sent or published when their time has come, by whichever worker of the service looks first.

A delayed message is a timer row, written by the very unit that stages it. When it is due, one unit takes the row away,
puts the message into the outbox and claims its id for `<service>.delayed`: so two workers, or one that died halfway,
send it once, and whoever cancels it either comes before that unit or is told that it was sent.

Due by the database's clock (on SQLite: the clock of the process), never early by it. Late by what it takes to look,
commit and relay; longer when no worker of the service runs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import UUID, uuid5

from bus.envelope import Envelope
from bus.errors import FoldbusError
from bus.metrics import Metrics
from eventstore.errors import BadUnit
from eventstore.port import CancelTimer, Claim, Fence, Store, Timer, Unit, Verdict

log = logging.getLogger("foldbus.worker")

DELAY_MAX_S = 10 * 365 * 86_400.0
_BAD_S = 60.0


class BadDelay(FoldbusError):
    """When a message is to be sent is not said, or not in a way that can be kept. Nothing was stored."""


def delayed_by(service: str) -> str:
    """The consumer of the timers and claims of a service's delayed messages."""
    return f"{service}.delayed"


When = datetime | float
"""A moment, or seconds from the commit on."""


def when(at: datetime | None, delay_s: float | None) -> When | None:
    """None: at once. Raises BadDelay."""
    if at is not None and delay_s is not None:
        raise BadDelay(f"found at={at.isoformat()} and delay_s={delay_s!r}; wanted one of them")
    if at is not None and at.tzinfo is None:
        raise BadDelay(f"found at={at.isoformat()} without a time zone; wanted an aware datetime")
    if delay_s is not None and not (math.isfinite(delay_s) and 0 <= delay_s <= DELAY_MAX_S):
        raise BadDelay(f"found delay_s={delay_s!r}; wanted 0 to {DELAY_MAX_S:.0f} (ten years)")
    return at if at is not None else delay_s


def timer_of(service: str, envelope: Envelope, when: When, *, now: datetime) -> Timer:
    """`now` is the store's clock's (`store.timers.now()`)."""
    due_at = when if isinstance(when, datetime) else now + timedelta(seconds=when)
    return Timer(delayed_by(service), envelope.id, envelope.key, due_at, envelope)


class Delayed:
    """Sends what is due, and cancels. Of one service's store."""

    def __init__(self, service: str, store: Store, *, metrics: Metrics) -> None:
        self.consumer = delayed_by(service)
        self._store, self._metrics = store, metrics

    async def send(self, timers: Sequence[Timer]) -> None:
        """Each into the outbox, once. Raises StoreUnavailable: then they come up again."""
        if not timers:
            return
        try:
            outcomes = await self._store.commit([self._unit(timer) for timer in timers])
        except BadUnit as error:
            if len(timers) == 1:
                log.error("delayed %s %s cannot be sent: %s", timers[0].envelope.type, timers[0].id, error)
                self._metrics.count("foldbus_delayed_failed_total")
                await self._store.timers.release(timers[0], delay_s=_BAD_S)
                return
            for timer in timers:
                await self.send([timer])
            return
        over: list[CancelTimer] = []
        for timer, outcome in zip(timers, outcomes, strict=True):
            if outcome.verdict is Verdict.COMMITTED:
                self._metrics.count("foldbus_delayed_sent_total")
            else:  # another worker did, or somebody cancelled it
                self._metrics.count("foldbus_duplicates_total", consumer=self.consumer, state=str(outcome.verdict))
                log.info("delayed %s %s is not sent: %s", timer.envelope.type, timer.id, outcome.verdict)
                over.append(CancelTimer(timer.consumer, timer.id))
        if over:
            await self._store.commit([Unit(timers=tuple(over))])

    def _unit(self, timer: Timer) -> Unit:
        claim = Claim(self.consumer, timer.id, str(timer.id))
        return Unit(claim, outgoing=(timer.envelope,), timers=(CancelTimer(timer.consumer, timer.id),))

    async def cancel(self, id: UUID) -> bool:
        """True: it will not be sent, also if it is only staged later; also at a second call. False: it was sent."""
        claim = Claim(self.consumer, uuid5(id, "cancel"), str(id), fences=id, fence=Fence.CANCEL)
        (outcome,) = await self._store.commit([Unit(claim, timers=(CancelTimer(self.consumer, id),))])
        match outcome.verdict:
            case Verdict.COMMITTED:
                self._metrics.count("foldbus_delayed_cancelled_total")
                log.info("delayed message %s is cancelled", id)
                return True
            case Verdict.DUPLICATE:
                return True
            case _:
                return False


__all__ = ["BadDelay", "Delayed", "When", "delayed_by", "timer_of", "when"]
