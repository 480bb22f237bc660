"""Commands decided here and now: in turn where that avoids a race, and after a lost one again, but not for ever."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from bus.metrics import Metrics
from bus.processing import Again, Failed, Item, Later, Processor
from bus.seams import Clock
from eventstore.errors import TooManyConflicts

log = logging.getLogger("foldbus.client")

ATTEMPTS_MAX = 200
_AT_ONCE = 3


class Turns:
    """One at a time per key, in the order of arrival: callers of one process do not race each other."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @property
    def waiting(self) -> int:
        """Keys of which somebody has the turn."""
        return len(self._locks)

    @asynccontextmanager
    async def of(self, key: str) -> AsyncGenerator[None]:
        lock, users = self._locks.get(key) or (asyncio.Lock(), 0)
        self._locks[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[key]
            if users == 1:
                del self._locks[key]
            else:
                self._locks[key] = (lock, users - 1)


class Executing:
    """Drives items through a processor until they are done. Raises what the handler raised, TooManyConflicts when
    other processes were quicker each time."""

    def __init__(
        self,
        processor: Processor,
        *,
        clock: Clock,
        metrics: Metrics,
        backoff_s: tuple[float, float] = (0.001, 0.05),
    ) -> None:
        """`backoff_s`: the first pause at most, and every pause at most."""
        self._processor, self._clock, self._metrics, self._backoff_s = processor, clock, metrics, backoff_s
        self._turns = Turns()
        self._jitter = random.Random()

    async def run(self, item: Item, *, timeout_s: float, in_turn: bool) -> None:
        """`timeout_s` bounds the attempts that lost, not the one under way. `in_turn` is for commands that cannot lead
        to another `run` of the same key: that one would wait for this one."""
        if in_turn:
            async with self._turns.of(item.envelope.key):
                await self._until_done(item, timeout_s)
        else:
            await self._until_done(item, timeout_s)

    async def _until_done(self, item: Item, timeout_s: float) -> None:
        began = self._clock.monotonic()
        for attempt in range(1, ATTEMPTS_MAX + 1):
            (result,) = await self._processor.process([item], {})
            if isinstance(result, Later):
                result = await result.result
            if isinstance(result, Failed):
                raise result.error
            if not isinstance(result, Again):
                return
            spent = self._clock.monotonic() - began
            if attempt == ATTEMPTS_MAX or spent >= timeout_s:
                self._metrics.count("foldbus_executions_given_up_total")
                log.warning("%s of %s lost %d races", item.envelope.type, item.envelope.key, attempt)
                raise TooManyConflicts(
                    f"{item.envelope.type} for {item.envelope.key!r}", attempts=attempt, seconds=spent
                )
            self._metrics.count("foldbus_executions_repeated_total")
            least, most = self._backoff_s
            backoff = 0.0 if attempt < _AT_ONCE else self._jitter.uniform(0, min(most, least * 2**attempt))
            await asyncio.sleep(max(result.after_s, backoff))


__all__ = ["ATTEMPTS_MAX", "Executing", "Turns"]
