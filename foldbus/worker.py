"""The worker: everything a service runs, in one task group.

| part | reads | group |
| --- | --- | --- |
| commands | `<service>.commands` | `<service>` |
| each handler of events | the topics of its events | `<service>.handler.<name>` |
| each saga's starts | the topic of its start event | `<service>.saga.<name>` |
| replies, timeouts, operators' verbs of all sagas | `<service>.replies` | `<service>.replies` |
| queries | `<service>.queries` | `<service>.queries` |
| relay | own log | by lease |
| each projection | own log, others' topics | by lease, without a group |
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bus.breaker import free_of
from bus.codec import command_type_name
from bus.consumer import ConsumerEngine, EngineSettings
from bus.engine.early import EarlyEngine
from bus.errors import FoldbusError, MissingTopics, Undecodable, UnknownType
from bus.messages import Event
from bus.processing import Processor
from bus.records import RecordReader
from bus.tasks import all_ended
from bus.upcast_processing import UpcastProcessor
from eventstore.behaviour import Behaviour
from eventstore.decider import DeciderBehaviour
from foldbus.calling import Caller
from foldbus.delivery import AT_MOST_ONCE, EXACTLY_ONCE
from foldbus.early import AtMostOnce
from foldbus.expiry import TOLERANCE_S, ExpiringProcessor
from foldbus.gate import Gate
from foldbus.handlers import Handler
from foldbus.handling import BATCH_MAX, MOMENT_S, HandlerProcessor
from foldbus.health import Health, HealthSettings, alive, ready
from foldbus.parking import Parker, ParkSettings
from foldbus.query_processing import QueryProcessor
from foldbus.relay import Relay, RelaySettings
from foldbus.retention import Forgetting, RetentionSettings
from foldbus.runtime import UnitProcessor
from foldbus.service import handler_group
from foldbus.timing import DueParked, DueTimers
from foldbus.views import all_projections, projection_runner
from foldbus.watchdog import Watchdog
from projections import ProjectionSettings
from sagas import CANCEL_TYPE, RETRY_TYPE, TIMEOUT_TYPE, SagaBehaviour, SagaDefinition, saga_group

if TYPE_CHECKING:
    from foldbus.connection import Connection

log = logging.getLogger("foldbus.worker")


IN_HAND = 4
"""So many batches of messages for handlers are taken from their topics."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    engine: EngineSettings = field(default_factory=EngineSettings)
    relay: RelaySettings = field(default_factory=RelaySettings)
    projections: ProjectionSettings = field(default_factory=ProjectionSettings)
    health: HealthSettings = field(default_factory=HealthSettings)
    parking: ParkSettings = field(default_factory=ParkSettings)
    retention: RetentionSettings = field(default_factory=RetentionSettings)
    clock_tolerance_s: float = TOLERANCE_S
    """By how much the clocks of those who ask and of this machine may differ; see `foldbus/expiry.py`."""
    timer_poll_s: float = 1.0
    """How late a timer, or the next try of a parked message, may be, at most, when nothing else wakes the worker;
    and how soon a pause is noticed."""
    topics_wait_s: float = 30.0
    """How often a topic that another service has not made yet is named in the log."""
    stop_timeout_s: float = 30.0


def command_processor(
    connection: Connection, parking: ParkSettings | None = None, *, moment_s: float | None = None
) -> UnitProcessor | HandlerProcessor:
    """The processor of a service's own commands; claims carry the service's name. Without `parking` it is for
    `execute`: what would have to wait fails. `moment_s`: see `HandlerProcessor`."""
    service = connection.service
    behaviour = DeciderBehaviour(
        service.deciders, service=service.name, codec=service.codec, ids=connection.ids, clock=connection.clock
    )
    taken = behaviour.commands

    def wants(type_name: str) -> bool:
        if type_name in taken:
            return True
        service.registry.find(type_name)  # says that the version is unknown, where it is that
        raise UnknownType(
            f"type {type_name!r} arrived on {service.name}.commands, but nobody here takes it: no decider and no "
            "handler that the Service lists"
        )

    parker = _parker(connection, service.name, parking)
    inner = _processor(connection, service.name, service.name, behaviour, wants, parker)
    older = service.registry.upcasting.older
    handlers = {
        name: handler
        for handler in service.handlers
        if handler.commands
        for name in (*handler.types, *older(handler.types))
    }
    if not handlers:
        return inner
    return HandlerProcessor(connection, inner, handlers, consumer=service.name, parker=parker, moment_s=moment_s)


def subscription_processor(
    connection: Connection, handler: Handler, parking: ParkSettings, *, moment_s: float | None = None
) -> Processor:
    """The processor of one handler of events, also of those that are upcast to its own."""
    service = connection.service
    group = handler_group(service.name, handler)
    bases = frozenset(event.type_name.base for event in handler.events)

    def wants(type_name: str) -> bool:
        if type_name.rpartition(".v")[0] in bases:  # an event that it names, in a version that nobody here does
            service.registry.find(type_name)
        return False

    behaviour = DeciderBehaviour(
        (), service=service.name, codec=service.codec, ids=connection.ids, clock=connection.clock
    )
    # Without claims there is nothing to keep successors back by.
    parker = _parker(connection, group, parking) if handler.delivery is EXACTLY_ONCE else None
    inner = _processor(connection, group, group, behaviour, wants, parker)
    names = [str(event.type_name) for event in handler.events]
    processor = HandlerProcessor(
        connection, inner, dict.fromkeys(names, handler), consumer=group, parker=parker, moment_s=moment_s
    )
    if not service.registry.upcasting:
        return processor
    return UpcastProcessor(processor, names, codec=service.codec, metrics=connection.metrics)


def _processor(
    connection: Connection,
    group: str,
    consumer: str,
    behaviour: Behaviour[Any],
    wants: Callable[[str], bool],
    parker: Parker | None,
    failpoint: str = "commit",
) -> UnitProcessor:
    return UnitProcessor(
        group=group,
        consumer=consumer,
        service=connection.service.name,
        behaviour=behaviour,
        store=connection.store,
        wants=wants,
        ids=connection.ids,
        clock=connection.clock,
        metrics=connection.metrics,
        failpoint=connection.failpoint,
        max_bytes=connection.transport.max_bytes,
        commit_failpoint=failpoint,
        snapshots=connection.snapshots if isinstance(behaviour, DeciderBehaviour) else None,
        parker=parker,
    )


def _parker(connection: Connection, consumer: str, settings: ParkSettings | None) -> Parker | None:
    if settings is None:
        return None
    return Parker(
        consumer,
        connection.store,
        settings=settings,
        policy=connection.service.policy(consumer),
        metrics=connection.metrics,
        failpoint=connection.failpoint,
    )


_VERBS = frozenset((TIMEOUT_TYPE, RETRY_TYPE, CANCEL_TYPE))


def _saga_behaviour(
    connection: Connection, definitions: Sequence[SagaDefinition[Any]], starts: str | None = None
) -> SagaBehaviour:
    service = connection.service
    return SagaBehaviour(
        definitions,
        service=service.name,
        codec=service.codec,
        ids=connection.ids,
        clock=connection.clock,
        starts=starts,
        metrics=connection.metrics,
    )


def start_processor(connection: Connection, name: str, parking: ParkSettings) -> Processor:
    """Starts of one saga (all its versions listed; the newest starts), also from events that are upcast to its own."""
    service = connection.service
    definitions = [one for one in service.sagas if one.name == name]
    starts = frozenset(str(one.start.type_name) for one in definitions)
    bases = frozenset(one.start.type_name.base for one in definitions)

    def wants(type_name: str) -> bool:
        if type_name in starts:
            return True
        if type_name.rpartition(".v")[0] in bases:  # an event that this saga names, in a version that nobody here does
            service.registry.find(type_name)
        return False

    consumer = saga_group(service.name, name)
    parker = _parker(connection, consumer, parking)
    units = _processor(connection, consumer, consumer, _saga_behaviour(connection, definitions, name), wants, parker)
    if not service.registry.upcasting:
        return units
    return UpcastProcessor(units, starts, codec=service.codec, metrics=connection.metrics)


def reply_processor(connection: Connection, parking: ParkSettings) -> UnitProcessor:
    """Replies to all sagas of the service, their timeouts, and operators' verbs."""
    service = connection.service

    def wants(type_name: str) -> bool:
        if type_name not in _VERBS:
            try:
                command_type_name(type_name)
            except Undecodable as error:
                raise UnknownType(f"type {type_name!r} arrived on {service.name}.replies; {error}") from None
        return True

    consumer = f"{service.name}.replies"
    behaviour, parker = _saga_behaviour(connection, service.sagas), _parker(connection, consumer, parking)
    return _processor(connection, consumer, consumer, behaviour, wants, parker, failpoint="saga-feed")


def _with_handlers(handlers: Iterable[Handler], settings: EngineSettings) -> EngineSettings:
    """A transaction or a call for each message: what is at work is waited for when a worker ends, and what is in hand
    stands before the first message of a partition that comes. No more of both than may soon be done."""
    if not any(handlers):
        return settings
    return replace(
        settings,
        batch_size_max=min(settings.batch_size_max, BATCH_MAX),
        in_flight_max=min(settings.in_flight_max, IN_HAND * BATCH_MAX),
    )


class Worker:
    """Runs a connected service. `running()` starts it and, at the end, drains and stops it."""

    def __init__(self, connection: Connection, settings: WorkerSettings | None = None) -> None:
        self.connection = connection
        self.settings = settings or WorkerSettings()
        self.engines: list[ConsumerEngine] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done, with its error, when a part failed for good."""
        self.watchdog = Watchdog(
            name=connection.service.name,
            clock=connection.clock,
            metrics=connection.metrics,
            settings=self.settings.health.watchdog,
        )
        self.running_now = False
        """From `running()` until it begins to drain."""
        self.waiting_for_topics: set[str] = set()
        """Groups whose topics another service has not made yet."""
        self._consumers: dict[str, ConsumerEngine] = {}
        self._ending = False
        self._queries: QueryProcessor | None = None
        self._build()
        self.gate = Gate(connection.store, self._consumers, metrics=connection.metrics)
        """Which groups an operator paused."""
        self._timers = DueTimers(
            connection.store,
            self._consumers,
            metrics=connection.metrics,
            poll_s=self.settings.timer_poll_s,
            each_turn=self.gate.look,
            delayed=connection.delayed,
        )
        service = connection.service
        self.forgetting = (
            Forgetting(
                connection.store,
                connection.transport.admin,
                service.keep,
                service.groups,
                clock=connection.clock,
                metrics=connection.metrics,
                settings=self.settings.retention,
            )
            if service.keep.groups
            else None
        )

    def _build(self) -> None:
        service, parking = self.connection.service, self.settings.parking
        if service.name in service.groups:
            processor = self._expiring(command_processor(self.connection, parking, moment_s=MOMENT_S))
            settings = _with_handlers((one for one in service.handlers if one.commands), self.settings.engine)
            self._engine([f"{service.name}.commands"], processor, settings=settings)
        if service.queries:
            self._queries = QueryProcessor(self.connection, tolerance_s=self.settings.clock_tolerance_s)
            self._engine([f"{service.name}.queries"], self._queries)
        for handler in service.subscriptions:
            topics = sorted({self._topic(event) for event in handler.events})
            if handler.delivery is AT_MOST_ONCE:
                self._early_engine(topics, handler)
            else:
                gate = partial(free_of, Caller.of(self.connection).circuits(handler)) if handler.breakers else None
                processor = subscription_processor(self.connection, handler, parking, moment_s=MOMENT_S)
                self._engine(topics, processor, settings=_with_handlers([handler], self.settings.engine), gate=gate)
        for name in dict.fromkeys(definition.name for definition in service.sagas):
            topics = sorted({self._topic(one.start) for one in service.sagas if one.name == name})
            self._engine(topics, start_processor(self.connection, name, parking))
        if service.sagas:
            self._engine([f"{service.name}.replies"], reply_processor(self.connection, parking))
        longest_s = max((handler.timeout_s for handler in service.handlers), default=0.0)
        self._parked = DueParked(
            self.connection.store,
            self._consumers,
            metrics=self.connection.metrics,
            settings=replace(parking, lease_s=max(parking.lease_s, longest_s + 10.0)),
            poll_s=self.settings.timer_poll_s,
        )
        self.relay = Relay(
            self.connection.store,
            self.connection.transport,
            clock=self.connection.clock,
            metrics=self.connection.metrics,
            failpoint=self.connection.failpoint,
            settings=self.settings.relay,
        )
        self.runners = [
            projection_runner(self.connection, one, self.settings.projections) for one in all_projections(service)
        ]

    def _expiring(self, inner: Processor) -> Processor:
        connection = self.connection
        return ExpiringProcessor(
            inner,
            service=connection.service.name,
            store=connection.store,
            publisher=connection.publisher,
            clock=connection.clock,
            ids=connection.ids,
            metrics=connection.metrics,
            tolerance_s=self.settings.clock_tolerance_s,
        )

    def wake_timers(self) -> None:
        """A timer was staged in this process: it may be due sooner than those that are known."""
        self._timers.wake()

    def _topic(self, event: type[Event]) -> str:
        return self.connection.service.topic_of(event)

    def _early_engine(self, topics: list[str], handler: Handler) -> None:
        connection = self.connection
        parse = RecordReader(connection.transport.max_bytes, connection.service.rules)
        engine = EarlyEngine(
            connection.transport,
            topics,
            AtMostOnce(connection, handler, parse, max_bytes=connection.transport.max_bytes),
            settings=self.settings.engine,
            clock=connection.clock,
            metrics=connection.metrics,
            failpoint=connection.failpoint,
        )
        self.engines.append(engine)
        self._consumers[engine.group] = engine

    def _engine(
        self,
        topics: list[str],
        processor: Processor,
        *,
        settings: EngineSettings | None = None,
        gate: Callable[[], int | None] | None = None,
    ) -> None:
        connection = self.connection
        engine = ConsumerEngine(
            connection.transport,
            topics,
            processor,
            parse=RecordReader(connection.transport.max_bytes, connection.service.rules),
            settings=settings or self.settings.engine,
            clock=connection.clock,
            metrics=connection.metrics,
            failpoint=connection.failpoint,
            gate=gate,
        )
        self.engines.append(engine)
        self._consumers[processor.group] = engine

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """While the context lasts the service is handled here; then what is in hand is finished.

        As in a TaskGroup: a part that fails for good cancels the body and ends the other parts, and its error comes out
        of the context (also of `ended`, and of `check`). What the body raises by itself comes out as it is.
        """
        with self.watchdog:
            async with self.connection.resources.in_use(self._part_ended), self._running():
                yield

    @asynccontextmanager
    async def _running(self) -> AsyncGenerator[None]:
        body = _Body()
        self._ending = False
        gate = self.gate
        parts = [
            asyncio.create_task(
                gate.run(engine.group, partial(self._when_topics_exist, engine)), name=f"engine {engine}"
            )
            for engine in self.engines
        ]
        background = [asyncio.create_task(self.relay.run(), name="relay")]
        background += [asyncio.create_task(runner.run(), name="projection") for runner in self.runners]
        background.append(asyncio.create_task(self._timers.run(), name="timers"))
        if self.engines:
            background.append(asyncio.create_task(self._parked.run(), name="parked"))
        if self.forgetting is not None:
            background.append(asyncio.create_task(self.forgetting.run(), name="forgetting"))
        for task in (*parts, *background):
            task.add_done_callback(self._part_ended)
        self.ended.add_done_callback(lambda _: body.cancel())
        self.running_now = True
        try:
            try:
                yield
            finally:
                self.running_now = False
                await body.leave()
        except asyncio.CancelledError:
            if body.cancelled_by_others or not self.ended.done():
                raise
        finally:
            self._ending = True
            gate.close()
            for engine in self.engines:
                engine.stop()
            try:
                if parts:
                    _, late = await asyncio.wait(parts, timeout=self.settings.stop_timeout_s)
                    for task in late:
                        log.error("%s did not drain in %s s, cancelled", task.get_name(), self.settings.stop_timeout_s)
                    await self._parked.put_back()
                if self._queries is not None:
                    await self._queries.close(timeout_s=self.settings.stop_timeout_s)
            finally:  # also when the wait itself is cancelled: nobody else would end them
                await all_ended([*parts, *background])
                if self.ended.done():
                    self.ended.exception()  # seen
        self.check()

    async def alive(self) -> Health:
        """Should this process be left running? False asks for a restart. Bounded, raises nothing; see `health.py`."""
        return await alive(self)

    async def ready(self) -> Health:
        """Does it do its work now? Bounded, raises nothing; see `health.py`."""
        return await ready(self)

    def check(self) -> None:
        """Raises what made a part fail for good, if one did."""
        if self.ended.done():
            self.ended.result()

    def _part_ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is None and not self._ending:
            error = PartEnded(
                f"{task.get_name()} ended while the worker runs: a mistake in it, or somebody cancelled it"
            )
        if error is not None and not self.ended.done():
            log.critical("%s failed for good", task.get_name(), exc_info=error)
            self.ended.set_exception(error)

    async def _when_topics_exist(self, engine: ConsumerEngine) -> None:
        """A foreign topic that is missing means wait, not fail: its service may not have started yet."""
        waited = 0.0
        while True:
            try:
                self.waiting_for_topics.discard(engine.group)
                return await engine.run()
            except MissingTopics as error:
                self.waiting_for_topics.add(engine.group)
                if waited % self.settings.topics_wait_s == 0:
                    log.warning("waiting for topics on %s: %s", self.connection.bus, error)
                waited += 0.5
                await asyncio.sleep(0.5)


class PartEnded(FoldbusError):
    """A part of a worker ended by itself, without an error, though nobody asked it to."""


class _Body:
    """The task that a context's body runs in, to be cancelled once by us and told apart from others' cancelling."""

    def __init__(self) -> None:
        self._task = asyncio.current_task()
        self._left = self._cancelled = False
        self.cancelled_by_others = False

    def cancel(self) -> None:
        if self._task is not None and not self._left:
            self._cancelled = self._task.cancel()

    async def leave(self) -> None:
        """Takes our cancelling back, also one that has not reached the body before it ended."""
        self._left = True
        task = asyncio.current_task()
        if task is None or task is not self._task:  # a fixture's end, for one: nobody is to be cancelled there
            return
        try:
            if self._cancelled:
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            if task.cancelling() > 1:
                raise
        finally:
            if self._cancelled:
                task.uncancel()
            self.cancelled_by_others = task.cancelling() > 0
