"""`Service`: the explicit table of what one service runs, checked when it is made.

It composes values that know nothing of each other (deciders, handlers, sagas, projections) and opens no connection
before `connect()`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Literal

from bus.breaker import Breaker
from bus.codec import JsonCodec
from bus.errors import FoldbusError
from bus.messages import Command, Event, Message, Refused
from bus.metrics import Metrics
from bus.records import TopicRule
from bus.registry import Registry, service_of
from bus.seams import Clock, Failpoint, Ids
from bus.transport import TopicSpec
from bus.upcasting import Upcaster
from eventstore.decider import Decider
from foldbus.calling import Middleware
from foldbus.delivery import EXACTLY_ONCE
from foldbus.handlers import Handler, SqlFunction
from foldbus.parking import Policy
from foldbus.querying import QueryHandler, queries_topic
from foldbus.resources import Lifespan
from foldbus.retention import keep_of
from foldbus.statuses import FRAMEWORK, answering
from foldbus.topics import put_together
from projections import Projection
from sagas import SagaDefinition, saga_group

if TYPE_CHECKING:
    from foldbus.connection import Connection

_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")

Holds = Callable[..., Any] | Handler | SagaDefinition[Any] | Literal["commands", "replies"]


class BadService(FoldbusError):
    """A service is put together so that it cannot work; found at start-up, nothing was opened."""


class Service:
    """One service: its deciders, handlers, sagas and projections, by name.

    `handlers` are functions `(message, ctx)`, with SQL of their own; see `foldbus/handlers.py`.
    `queries` are functions `(query, ctx)` that answer and change nothing; see `foldbus/querying.py`.
    `messages` adds classes that only `send` and `request` use; `refusals` are the `Refused` classes that arrive as
    themselves (any other arrives as plain `Refused` with its code). `upcasters` say what older types are read as, in
    the store and on topics, also of other services' events. Raises BadUpcaster for a table of them that leads nowhere,
    BadService for a decider of another service's commands, two owners of one name, and whatever else could only fail
    later.

    `lifespan` opens what handlers need of the world, once per worker, and gives it to them as `ctx.deps`
    (`foldbus/resources.py`); `middleware` wraps each call of a handler, the first one outermost (`foldbus/calling.py`).

    `hold` lists whose keys wait for a person when a message of theirs has failed for good, instead of making a dead
    letter of it and going on: handlers of events, sagas (what starts them), "commands" (all that deciders and handlers
    take), and "replies" (to all sagas, their timeouts among them). See docs/decisions/0009.

    `topics` are declared otherwise than by default: own ones (each stands in full for the default of its name, or is
    one more) and what is expected of those of others. `keep_claims_s` is how long a message that was handled is
    remembered, for all consumer groups or by group; None is for ever. `keep_steps_s` is the same for commands of sagas:
    longer than any saga lives that sends some here. See docs/topics.md; raises BadTopics, ClaimsTooShort.
    """

    def __init__(
        self,
        name: str,
        *,
        deciders: Sequence[Decider[Any, Any, Any]] = (),
        sagas: Sequence[SagaDefinition[Any]] = (),
        projections: Sequence[Projection[Any]] = (),
        handlers: Sequence[SqlFunction | Handler] = (),
        queries: Sequence[Callable[..., Any] | QueryHandler] = (),
        messages: Sequence[type[Message]] = (),
        refusals: Sequence[type[Refused]] = (),
        upcasters: Sequence[Upcaster] = (),
        hold: Sequence[Holds] = (),
        lifespan: Lifespan | None = None,
        middleware: Sequence[Middleware] = (),
        partitions: int = 12,
        topics: Sequence[TopicSpec] = (),
        keep_claims_s: float | Mapping[str, float] | None = None,
        keep_steps_s: float | None = None,
    ) -> None:
        if _NAME.fullmatch(name) is None:
            raise BadService(f"service name {name!r}: wanted lower-case letters, digits and dashes, at most 40")
        self.name, self.partitions = name, partitions
        self.lifespan, self.middleware = lifespan, tuple(middleware)
        self.deciders, self.sagas, self.projections = tuple(deciders), tuple(sagas), tuple(projections)
        self.handlers = tuple(one if isinstance(one, Handler) else Handler(one) for one in handlers)
        self.queries = answering([one if isinstance(one, QueryHandler) else QueryHandler(one) for one in queries])
        self._check()
        self._held = frozenset(self._consumer_that_holds(one) for one in hold)
        named: list[type[Message]] = [
            *(command for decider in deciders for command in decider.commands),
            *(event for decider in deciders for event in decider.events),
            *(definition.start for definition in sagas),
            *(event for projection in projections for event in projection.events),
            *(message for handler in self.handlers for message in handler.messages),
            *(query for function in self.queries for query in function.queries),
            *messages,
        ]
        self.registry = Registry(named, refusals, upcasters)
        self.registry.upcasting.check(self.registry.types)
        if self.queries and not any(spec.name == f"{name}.queries" for spec in topics):
            topics = (*topics, queries_topic(name, partitions=partitions))
        self._topics = put_together(name, topics, partitions=partitions, read=self.read_events)
        without = {handler_group(name, one) for one in self.subscriptions if one.delivery is not EXACTLY_ONCE}
        claiming = [group for group in self.groups if group not in {*without, f"{name}.queries"}]
        self.keep = keep_of(keep_claims_s, keep_steps_s, claiming, name)
        self.codec = JsonCodec(self.registry)

    def __repr__(self) -> str:
        return f"Service({self.name!r})"

    @property
    def topics(self) -> tuple[TopicSpec, ...]:
        """The topics this service owns, as declared."""
        return self._topics.own

    @property
    def expected_topics(self) -> tuple[TopicSpec, ...]:
        """What it declares of topics of others that it reads. They are compared, never created."""
        return self._topics.foreign

    @property
    def rules(self) -> Mapping[str, TopicRule]:
        """How records of some topics are read; see `bus/records.py`."""
        return self._topics.rules

    def topic_of(self, event: type[Event]) -> str:
        """Where events of this class are published."""
        return event.foreign_topic or f"{service_of(event)}.events"

    def decides(self, command: type[Message]) -> bool:
        """Does a decider or a handler of this service take it?"""
        return command in self.commands

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """The consumer groups of this service's workers, and the topics that each reads."""
        found: dict[str, tuple[str, ...]] = {}
        if self.commands:
            found[self.name] = (f"{self.name}.commands",)
        for handler in self.subscriptions:
            found[handler_group(self.name, handler)] = tuple(sorted({self.topic_of(event) for event in handler.events}))
        for name in dict.fromkeys(one.name for one in self.sagas):
            topics = {self.topic_of(one.start) for one in self.sagas if one.name == name}
            found[saga_group(self.name, name)] = tuple(sorted(topics))
        if self.sagas:
            found[f"{self.name}.replies"] = (f"{self.name}.replies",)
        if self.queries:
            found[f"{self.name}.queries"] = (f"{self.name}.queries",)
        return found

    def policy(self, consumer: str) -> Policy:
        """What this consumer does with a message that has failed for good."""
        return "hold" if consumer in self._held else "skip"

    def _consumer_that_holds(self, one: Holds) -> str:
        consumer, delivery = None, EXACTLY_ONCE
        if one == "commands":
            consumer = self.name
        elif one == "replies":
            consumer = f"{self.name}.replies"
        elif isinstance(one, SagaDefinition):
            consumer = saga_group(self.name, one.name) if one in self.sagas else None
        else:
            for handler in self.handlers:
                if handler is one or handler.function is one:
                    consumer = handler_group(self.name, handler) if handler.events else None
                    delivery = handler.delivery
        if consumer is None or consumer not in self.groups:
            raise BadService(
                f"service {self.name!r} cannot hold {one!r}: wanted one of its handlers of events, one of its sagas, "
                '"commands" (of all deciders and handlers: they share the queues of their keys) or "replies"'
            )
        if delivery is not EXACTLY_ONCE:
            raise BadService(f"service {self.name!r} cannot hold {one!r}: its messages have no claims ({delivery})")
        return consumer

    @property
    def commands(self) -> tuple[type[Command[Any]], ...]:
        """What deciders and handlers take from `<service>.commands`."""
        decided = (command for decider in self.deciders for command in decider.commands)
        return (*decided, *(command for handler in self.handlers for command in handler.commands))

    @property
    def subscriptions(self) -> tuple[Handler, ...]:
        """The handlers that take events."""
        return tuple(handler for handler in self.handlers if handler.events)

    @property
    def foreign_topics(self) -> tuple[str, ...]:
        """Topics of others that this service reads."""
        return tuple(sorted(self.read_events.keys() - {f"{self.name}.events"}))

    @property
    def read_events(self) -> Mapping[str, Sequence[type[Event]]]:
        """By topic, the events that sagas, projections and handlers of this service take."""
        read = [definition.start for definition in self.sagas]
        read += [event for projection in self.projections for event in projection.events]
        read += [event for handler in self.handlers for event in handler.events]
        found: dict[str, list[type[Event]]] = {}
        for event in dict.fromkeys(read):
            found.setdefault(self.topic_of(event), []).append(event)
        return found

    def connect(
        self,
        *,
        store: str = "sqlite:.foldbus",
        bus: str = "embedded:.foldbus",
        worker: bool = False,
        migrate: bool | None = None,
        apply_topics: bool | None = None,
        clock: Clock | None = None,
        ids: Ids | None = None,
        metrics: Metrics | None = None,
        failpoint: Failpoint | None = None,
        strict: bool = False,
        **options: Any,
    ) -> AbstractAsyncContextManager[Connection]:
        """A client of the service; with `worker=True` it also runs the service until the context ends.

        `migrate` and `apply_topics` None: embedded backends are prepared as they are opened; PostgreSQL must have been
        upgraded (`foldbus db upgrade`) and Kafka's topics made (`foldbus topics apply`), or this raises. `strict`: a
        link that may be read on its way raises PlaintextLink, instead of a warning.
        """
        from foldbus.connecting import connect

        return connect(
            self, store=store, bus=bus, worker=worker, migrate=migrate, apply_topics=apply_topics, clock=clock,
            ids=ids, metrics=metrics, failpoint=failpoint, strict=strict, **options,
        )  # fmt: skip

    def _check(self) -> None:
        for decider in self.deciders:
            for command in decider.commands:
                if service_of(command) != self.name:
                    raise BadService(
                        f"service {self.name!r} cannot decide {command.type_name}: commands of "
                        f"{service_of(command)!r} arrive on {service_of(command)}.commands; "
                        f"put {decider!r} into that service, or name the command {self.name}.…"
                    )
            for event in decider.events:
                if service_of(event) != self.name or event.foreign_topic is not None:
                    raise BadService(
                        f"{decider!r} of service {self.name!r} evolves on {event.type_name}, which belongs to "
                        f"{event.foreign_topic or service_of(event)!r}; a decider's events are its own service's"
                    )
        for handler in self.handlers:
            for command in handler.commands:
                if service_of(command) != self.name:
                    raise BadService(
                        f"service {self.name!r} cannot handle {command.type_name}: commands of "
                        f"{service_of(command)!r} arrive on {service_of(command)}.commands; put {handler!r} into that "
                        f"service, or name the command {self.name}.…"
                    )
        for function in self.queries:
            for query in function.queries:
                if service_of(query) not in (self.name, FRAMEWORK):
                    raise BadService(
                        f"service {self.name!r} cannot answer {query.type_name}: queries of {service_of(query)!r} "
                        f"arrive on {service_of(query)}.queries; put {function!r} into that service, or name the query "
                        f"{self.name}.…"
                    )
        _unique("query", [str(query.type_name) for one in self.queries for query in one.queries], self.name)
        self._check_resources()
        _unique("handler", [handler.name for handler in self.handlers], self.name)
        _unique("decider category", [decider.category for decider in self.deciders], self.name)
        _unique("command", [str(command.type_name) for command in self.commands], self.name)
        _unique("saga version", [f"{one.name} v{one.version}" for one in self.sagas], self.name)
        _unique("projection", [one.name for one in self.projections], self.name)
        for one in self.projections:
            if one.name.startswith("foldbus-"):
                raise BadService(f"projection {one.name!r}: names that start with foldbus- are the framework's own")

    def _check_resources(self) -> None:
        breakers: dict[str, Breaker] = {}
        for handler in self.handlers:
            if handler.deps is not None and self.lifespan is None:
                raise BadService(
                    f"{handler!r} of service {self.name!r} wants {handler.deps.__name__} as ctx.deps, but the service "
                    "has no lifespan that gives it"
                )
            for breaker in handler.breakers:
                if breakers.setdefault(breaker.name, breaker) != breaker:
                    raise BadService(f"service {self.name!r} has two breakers called {breaker.name!r}; wanted one")


def handler_group(service: str, handler: Handler) -> str:
    """Consumer group, and name on the claims, of a handler's subscription to events."""
    return f"{service}.handler.{handler.name}"


def _unique(what: str, names: Sequence[str], service: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadService(f"service {service!r} lists {what} {', '.join(twice)} twice; wanted each once")
