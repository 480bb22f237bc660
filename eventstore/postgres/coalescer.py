"""Concurrent calls of `commit` as one statement, and one wait for the disk.

While a flush is on its way, callers queue; when it returns, those that wait make up the next one. There is no timer, so
nobody waits for company: a call that finds a flusher free goes straight to the database, in its own task, by the lean
path. What is put together is bounded, in calls' order of arrival: nobody is overtaken, so a caller waits for as many
flushes as were queued before it and no more.

Each call is answered as if it had come alone (`commit_calls` judges call by call). When a flush fails for a reason that
may be one caller's (a value that the database cannot hold), nothing was written, and each is tried alone. When the
connection is lost, every caller is told that the outcome is unknown.

A flush that waits for somebody's lock would hold up calls that want none of it, and might wait for ever: whoever holds
the lock may be waiting for one of those calls, which no database can see. So calls that share a statement wait for
locks for a moment only; then nothing was written and each is tried apart, at first for a moment again, so that those
that are free go ahead of those that are not. And a flusher that is slow lends its place to another one, up to a bound.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from bus.metrics import Metrics
from bus.seams import Clock
from eventstore.errors import EventStoreError, SchemaMismatch, StoreUnavailable
from eventstore.port import Outcome, Unit, Watermark

log = logging.getLogger("foldbus.eventstore")

UNITS_MAX, EVENTS_MAX, BYTES_MAX = 256, 1024, 1024 * 1024
"""Of one flush, together. A call with more than half of any of them goes alone, on a connection of its own."""
FLUSHERS = 2
"""Connections that flush side by side: one is filled in Python while the other one is at work in the database."""


class LocksHeld(EventStoreError):
    """Calls that share a statement did not get their locks in time: nothing was written."""


@dataclass(slots=True, eq=False)
class Asked:
    """One call that waits."""

    units: Sequence[Unit]
    watermarks: Sequence[Watermark]
    events: int
    bytes: int
    since: float
    done: asyncio.Future[Sequence[Outcome]]


@dataclass(slots=True, eq=False)
class _Place:
    """Of a flusher; without a timer, of a call that is none of the flushers'."""

    timer: asyncio.TimerHandle | None = None
    lent: bool = False


Alone = Callable[[Sequence[Unit], Sequence[Watermark]], Awaitable[Sequence[Outcome]]]
Together = Callable[[Sequence[Asked]], Awaitable[Sequence[Sequence[Outcome]]]]


class Coalescer:
    """For one event loop. `alone` commits one call, `together` several in one statement, answering each."""

    def __init__(
        self,
        alone: Alone,
        together: Together,
        *,
        metrics: Metrics,
        clock: Clock,
        wait_s: float,
        flushers: int = FLUSHERS,
        lent_max: int,
        apart_max: int,
        patience_s: float,
    ) -> None:
        """`wait_s` bounds how long a call queues; `lent_max` how many flushers come on top while others are slower than
        `patience_s`; `apart_max` how many calls wait for locks apart."""
        self._alone, self._together = alone, together
        self._metrics, self._clock = metrics, clock
        self._wait_s, self._patience_s = wait_s, patience_s
        self._free, self._lendable = flushers, lent_max
        self._waiting: deque[Asked] = deque()
        self._running = 0
        self._flushes: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._closing = False
        # Two gates: who may be free must not stand behind those that are known not to be.
        self._tries, self._waits = asyncio.Semaphore(apart_max), asyncio.Semaphore(apart_max)

    async def commit(self, units: Sequence[Unit], watermarks: Sequence[Watermark]) -> Sequence[Outcome]:
        """As `Store.commit`. A caller that is cancelled while it queues has written nothing; later it does not know."""
        if self._closing:
            raise EventStoreError("the store was closed; nothing was written")
        if self._free > 0 and not self._waiting:
            place = self._take()
            try:
                return await self._alone(units, watermarks)
            finally:
                self._give_back(place)
        events, bytes = _size(units)
        if 2 * len(units) > UNITS_MAX or 2 * events > EVENTS_MAX or 2 * bytes > BYTES_MAX:
            self._running += 1
            try:
                return await self._alone(units, watermarks)
            finally:
                self._give_back(_Place())
        done: asyncio.Future[Sequence[Outcome]] = asyncio.get_running_loop().create_future()
        self._waiting.append(Asked(units, watermarks, events, bytes, self._clock.monotonic(), done))
        return await done

    async def close(self) -> None:
        """Takes no more calls, and waits for the answers of those that were taken."""
        self._closing = True
        try:
            while self._running or self._waiting:
                self._idle.clear()
                await self._idle.wait()
        finally:
            for asked in self._waiting:
                _fail(asked, StoreUnavailable("the store was closed while the call waited; nothing was written"))
            self._waiting.clear()
            for flush in self._flushes:
                flush.cancel()

    # --- flushing ----------------------------------------------------------------------------------------------------

    def _take(self) -> _Place:
        place = _Place()
        place.timer = asyncio.get_running_loop().call_later(self._patience_s, self._lend, place)
        self._running += 1
        self._free -= 1
        return place

    def _lend(self, place: _Place) -> None:
        if self._lendable > 0:
            place.lent = True
            self._lendable -= 1
            self._free += 1
            self._metrics.count("foldbus_store_flushes_slow_total", store="postgres")
            log.info("a flush takes longer than %s s; another one may start beside it", self._patience_s)
            self._go_on()

    def _give_back(self, place: _Place) -> None:
        self._running -= 1
        if place.timer is not None:
            place.timer.cancel()
            if place.lent:
                self._lendable += 1
            else:
                self._free += 1
        self._go_on()
        if not self._running:
            self._idle.set()

    def _go_on(self) -> None:
        while self._free > 0 and self._waiting:
            # Taken at once and not by the task when it comes to run: until then others would go straight past.
            self._begin(self._flush(self._take()))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="flush commits")
        self._flushes.add(task)
        task.add_done_callback(self._flushes.discard)

    async def _flush(self, place: _Place) -> None:
        batch = self._next_batch()
        try:
            await self._answer(batch)
        except BaseException:  # the event loop ends: nobody is left to be told
            for asked in batch:
                asked.done.cancel()
            raise
        finally:
            self._give_back(place)

    def _next_batch(self) -> list[Asked]:
        batch: list[Asked] = []
        units = events = bytes = 0
        oldest = self._clock.monotonic() - self._wait_s
        while self._waiting:
            asked = self._waiting[0]
            if asked.done.done():  # given up while it waited: certainly not written
                self._waiting.popleft()
                continue
            if asked.since < oldest:
                self._waiting.popleft()
                self._metrics.count("foldbus_store_calls_expired_total")
                log.warning("a call of %d units waited longer than %s s and fails", len(asked.units), self._wait_s)
                _fail(asked, StoreUnavailable(f"waited {self._wait_s} s for its turn; nothing was written"))
                continue
            units, events, bytes = units + len(asked.units), events + asked.events, bytes + asked.bytes
            if batch and (units > UNITS_MAX or events > EVENTS_MAX or bytes > BYTES_MAX):
                break
            batch.append(self._waiting.popleft())
        return batch

    async def _answer(self, batch: Sequence[Asked]) -> None:
        if len(batch) <= 1:
            for asked in batch:
                await self._answer_alone(asked)
            return
        self._metrics.count("foldbus_store_batches_total", store="postgres")
        self._metrics.count("foldbus_store_batched_calls_total", len(batch), store="postgres")
        try:
            answers = await self._together(batch)
        except LocksHeld as error:
            self._metrics.count("foldbus_store_batches_held_total", store="postgres")
            log.info("%d calls found a lock held and are tried apart: %s", len(batch), error)
            self._apart(batch)
        except (StoreUnavailable, SchemaMismatch) as error:
            for asked in batch:
                _fail(asked, _own(error))
        except Exception as error:  # one of them is at fault, and only that one shall hear of it
            self._metrics.count("foldbus_store_batches_split_total", store="postgres")
            log.warning("%d calls failed together and are tried one by one: %r", len(batch), error)
            await self._answer_in_order(batch)
        else:
            for asked, outcomes in zip(batch, answers, strict=True):
                _succeed(asked, outcomes)

    async def _answer_in_order(self, batch: Sequence[Asked]) -> None:
        for nth, asked in enumerate(batch):
            if asked.done.done():
                continue
            try:
                (outcomes,) = await self._together([asked])
            except LocksHeld:  # nobody waits behind it, see above
                self._apart(batch[nth:])
                return
            except (StoreUnavailable, SchemaMismatch) as error:
                _fail(asked, error)
            except Exception:
                self._apart([asked])  # alone it is told which of its units it is
            else:
                _succeed(asked, outcomes)

    def _apart(self, batch: Sequence[Asked]) -> None:
        for asked in batch:
            self._running += 1
            self._begin(self._answer_apart(asked))

    async def _answer_apart(self, asked: Asked) -> None:
        try:
            async with self._tries:
                try:
                    (outcomes,) = await self._together([asked])
                except (StoreUnavailable, SchemaMismatch) as error:
                    return _fail(asked, error)
                except Exception as error:  # it waits alone, or is told alone which of its units cannot be stored
                    log.debug("a call of %d units goes alone: %r", len(asked.units), error)
                else:
                    return _succeed(asked, outcomes)
            async with self._waits:
                await self._answer_alone(asked)
        except BaseException:  # the event loop ends
            asked.done.cancel()
            raise
        finally:
            self._give_back(_Place())

    async def _answer_alone(self, asked: Asked) -> None:
        if asked.done.done():
            return
        try:
            outcomes = await self._alone(asked.units, asked.watermarks)
        except Exception as error:
            _fail(asked, error)
        else:
            _succeed(asked, outcomes)


def _size(units: Sequence[Unit]) -> tuple[int, int]:
    """Log rows, and bytes of their data."""
    events = bytes = 0
    for unit in units:
        for append in unit.appends:
            events += len(append.envelopes)
            bytes += sum(len(envelope.data) for envelope in append.envelopes)
        for envelope in unit.outgoing:
            events += 1
            bytes += len(envelope.data)
        if unit.claim is not None and unit.claim.reply is not None:
            bytes += len(unit.claim.reply.data)
        if unit.dead_letter is not None:
            bytes += len(unit.dead_letter.value or b"")
    return events, bytes


def _succeed(asked: Asked, outcomes: Sequence[Outcome]) -> None:
    if not asked.done.done():
        asked.done.set_result(outcomes)


def _fail(asked: Asked, error: Exception) -> None:
    if not asked.done.done():
        asked.done.set_exception(error)


def _own(error: StoreUnavailable | SchemaMismatch) -> Exception:
    """For one of several that it concerns: an error that all raised would gather all their tracebacks."""
    own = type(error)(*error.args)
    own.__cause__ = error.__cause__ or error
    return own
