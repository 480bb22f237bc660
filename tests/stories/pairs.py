"""The two pairs of backends that every story runs on, and waiting for what a story leads to.

| pair | store | bus |
| --- | --- | --- |
| embedded | SQLite files in a directory of the test's own | a file beside them |
| servers | a PostgreSQL database of the test's own | the run's Kafka |

The broker is shared by all tests of a run: a story's services take names from `unique`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

from bus.engine.settings import EngineSettings
from bus.metrics import MemoryMetrics
from bus.seams import SystemClock
from bus.transport import PollSettings, Transport
from foldbus import Connection, Service, WorkerSettings
from foldbus.backends import open_transport
from foldbus.parking import ParkSettings

T = TypeVar("T")

QUICK = WorkerSettings(
    engine=EngineSettings(attempts_max=3, retry_base_s=0.01, retry_max_s=0.05, commit_interval_s=0.2),
    parking=ParkSettings(base_s=0.02, max_s=0.1, total_s=0.2, lease_s=20.0),
    timer_poll_s=0.05,
)
"""What fails is retried, parked and a dead letter within a second."""
SEATED = PollSettings(session_timeout_s=20.0, heartbeat_s=0.5, rebalance_timeout_s=20.0)
"""On the embedded bus, whose own session of 3 s a busy machine outlasts now and then: what is counted then counts."""


@dataclass(frozen=True)
class Pair:
    """Where a story's services live."""

    name: str
    store: str
    bus: str

    def connect(self, service: Service, **options: Any) -> AbstractAsyncContextManager[Connection]:
        """The service, prepared and run here; `worker=False` for a client."""
        chosen: dict[str, Any] = {"worker": True, "migrate": True, "apply_topics": True} | options
        if chosen["worker"]:
            chosen.setdefault("settings", QUICK)
        if self.bus.startswith("embedded:"):
            chosen.setdefault("poll", SEATED)
        return service.connect(store=self.store, bus=self.bus, **chosen)

    def transport(self) -> AbstractAsyncContextManager[Transport]:
        """A stranger on the same bus."""
        return open_transport(self.bus, clock=SystemClock(), metrics=MemoryMetrics(), settings=PollSettings())


def unique(word: str) -> str:
    """A service name that no other test uses."""
    return f"{word}-{uuid4().hex[:8]}"


async def eventually(look: Callable[[], Awaitable[T]], wanted: Callable[[T], bool], *, timeout_s: float = 60.0) -> T:
    """What `look` gives once that is `wanted`; fails with what it gave last."""
    until = time.monotonic() + timeout_s
    while True:
        found = await look()
        if wanted(found):
            return found
        assert time.monotonic() < until, f"after {timeout_s} s still {found!r:.2000}"
        await asyncio.sleep(0.05)
