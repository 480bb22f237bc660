"""Is this worker alive, and is it ready? In words, for people and for whoever restarts processes.

**Alive** asks for a restart when it is false, so it is false only for what a restart mends: a part that ended, a pump
that came back from nothing for three times as long as it may take, a call that hangs, a member that its group has
forgotten while the broker answers. A broker or a database that is away is nobody's to restart.

**Ready** is also false for what mends itself or waits for somebody: the store or the broker does not answer, topics
are missing, partitions stand or are being handed over, an operator paused something, a handler blocks the event loop,
the worker drains. Messages wait meanwhile; nothing is lost by routing none here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from bus.consumer import ConsumerEngine
from bus.errors import FoldbusError
from bus.topics import differences
from bus.transport import TopicState
from foldbus.watchdog import WatchdogSettings

if TYPE_CHECKING:
    from foldbus.worker import Worker

T = TypeVar("T")

READY_FLOOR_S = 5.0
"""A pump is not called late before this: under load a step takes longer than its bound says."""


@dataclass(frozen=True, slots=True)
class HealthSettings:
    """`broker_s` is how long the broker may take to answer before a poll gives up on it (the transport's
    `request_timeout_s`); `work_max_s` how long one call of a processor, a batch of many handlers perhaps, may take;
    `group_s` how long a group may leave a member without a word, which covers a session and a rebalance; `standing_s`
    how long a partition may bring nothing while its end grows; `probe_s` how long store and broker may take to answer
    a probe."""

    broker_s: float = 30.0
    work_max_s: float = 300.0
    group_s: float = 180.0
    standing_s: float = 300.0
    probe_s: float = 2.0
    watchdog: WatchdogSettings = field(default_factory=WatchdogSettings)

    def __post_init__(self) -> None:
        for name in ("broker_s", "work_max_s", "group_s", "standing_s", "probe_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}, wanted a number above 0")


@dataclass(frozen=True, slots=True)
class Health:
    """`reasons` say why not, each a sentence; empty when all is well."""

    reasons: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.reasons

    def as_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


async def alive(worker: Worker) -> Health:
    """Bounded by `probe_s`. Of a worker that is ending: alive while it drains, which is bounded by itself."""
    return Health(tuple([reason async for reason in _why_not_alive(worker)]))


async def ready(worker: Worker) -> Health:
    """Bounded by `probe_s`: store and broker are asked side by side."""
    if not worker.running_now:
        return Health((_ended(worker) or "the worker is not running, or drains",))
    reasons = [reason async for reason in _why_not_alive(worker)]
    blocked = worker.watchdog.blocked
    if blocked is not None:
        reasons.append(f"the event loop is blocked by {blocked.by}")
    for engine in worker.engines:
        reasons += _why_not_ready(worker, engine)
    store, bus = await asyncio.gather(_store(worker), _bus(worker))
    return Health(tuple(dict.fromkeys((*reasons, *store, *bus))))


# --- alive ------------------------------------------------------------------------------------------------------------


async def _why_not_alive(worker: Worker) -> AsyncIterator[str]:
    ended = _ended(worker)
    if ended:
        yield ended
    if not worker.running_now:
        return
    settings, now = worker.settings.health, worker.connection.clock.monotonic()
    forgotten: list[str] = []
    for engine in worker.engines:
        pulse = engine.pulse
        limit_s = 3 * (pulse.bound_s + settings.broker_s)
        if pulse.age_s > limit_s:
            yield f"{engine.group}: {pulse.what} has gone on for {pulse.age_s:.1f} s, wanted at most {limit_s:.1f} s"
        at_work = engine.oldest_at_work
        if at_work is not None and now - at_work > settings.work_max_s:
            yield (
                f"{engine.group}: a batch has been at work for {now - at_work:.1f} s, "
                f"wanted at most {settings.work_max_s:.1f} s"
            )
        waiting = engine.waiting_since
        if waiting is not None and now - waiting > settings.group_s:
            forgotten.append(f"{engine.group}: its group has given it no answer for {now - waiting:.1f} s")
        for (topic, partition), stood_s in engine.standing.items():
            if stood_s > settings.standing_s:
                forgotten.append(
                    f"{engine.group}: nothing has come of {topic}[{partition}] for {stood_s:.1f} s, though it grows"
                )
    if forgotten and not await _bus(worker):  # no answer: then it is the broker, and a new process knows no more
        for reason in forgotten:
            yield reason


def _ended(worker: Worker) -> str:
    ended = worker.ended
    if not ended.done() or ended.cancelled():
        return ""
    error = ended.exception()
    return f"a part failed for good: {type(error).__name__}: {error}" if error is not None else ""


# --- ready ------------------------------------------------------------------------------------------------------------


def _why_not_ready(worker: Worker, engine: ConsumerEngine) -> Iterator[str]:
    pulse, group = engine.pulse, engine.group
    pause = worker.gate.paused.get(group)
    if pause is not None:
        yield f"{group}: paused by {pause.by} since {pause.at.isoformat(timespec='seconds')}: {pause.reason or '-'}"
        return
    if not pulse.what:
        yield f"{group}: waits for its topics" if group in worker.waiting_for_topics else f"{group}: is not running"
        return
    if engine.unavailable is not None:
        yield f"{group}: the broker does not answer: {engine.unavailable}"
    if pulse.age_s > max(3 * pulse.bound_s, READY_FLOOR_S):
        yield f"{group}: {pulse.what} has gone on for {pulse.age_s:.1f} s"
    if engine.waiting_since is not None:
        yield f"{group}: has no partitions yet, its group rebalances"
    if engine.shut:
        yield f"{group}: waits for a dependency whose circuit breaker is open"
    for part in engine.held:
        yield f"{group}: {part.topic}[{part.partition}] stands: its offset is gone from the topic"


async def _store(worker: Worker) -> list[str]:
    connection = worker.connection
    return await _probed("the store", connection.store.watermarks(connection.service.name), worker)


async def _bus(worker: Worker) -> list[str]:
    connection = worker.connection
    service = connection.service
    declared = (*service.topics, *service.expected_topics)
    wanted = {spec.name for spec in declared} | set(service.foreign_topics)
    found: dict[str, TopicState] = {}

    async def ask() -> None:
        found.update(await connection.transport.admin.describe(sorted(wanted)))

    silent = await _probed("the broker", ask(), worker)
    if silent:
        return silent
    missing = sorted(wanted - found.keys())
    # Changed under a running worker: partitions that were added move keys, for one.
    changed = [line for spec in declared if spec.name in found for line in differences(spec, found[spec.name])]
    return [*([f"topics are missing: {', '.join(missing)}"] if missing else []), *changed]


async def _probed(whom: str, question: Coroutine[Any, Any, object], worker: Worker) -> list[str]:
    limit_s = worker.settings.health.probe_s
    try:
        async with asyncio.timeout(limit_s):
            await question
    except TimeoutError:
        return [f"{whom} did not answer within {limit_s:g} s"]
    except FoldbusError as error:
        return [f"{whom} does not answer: {error}"]
    return []
