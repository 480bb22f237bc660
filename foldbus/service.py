"""`Service`: the explicit table of what one service runs, checked when it is made.

It composes values that know nothing of each other (deciders, handlers, sagas, projections) and opens no connection
before `connect()`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from bus.codec import JsonCodec
from bus.errors import FoldbusError
from bus.messages import Command, Event, Message, Refused
from bus.metrics import Metrics
from bus.registry import Registry, service_of
from bus.seams import Clock, Failpoint, Ids
from bus.topics import service_topics
from bus.transport import TopicSpec
from bus.upcasting import Upcaster
from eventstore.decider import Decider
from foldbus.handlers import Handler
from projections import Projection
from sagas import SagaDefinition, saga_group

if TYPE_CHECKING:
    from foldbus.connection import Connection

_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")


class BadService(FoldbusError):
    """A service is put together so that it cannot work; found at start-up, nothing was opened."""


class Service:
    """One service: its deciders, handlers, sagas and projections, by name.

    `handlers` are functions `(message, ctx)`, with SQL of their own; see `foldbus/handlers.py`.
    `messages` adds classes that only `send` and `request` use; `refusals` are the `Refused` classes that arrive as
    themselves (any other arrives as plain `Refused` with its code). `upcasters` say what older types are read as, in
    the store and on topics, also of other services' events. Raises BadUpcaster for a table of them that leads nowhere,
    BadService for a decider of another service's commands, two owners of one name, and whatever else could only fail
    later.
    """

    def __init__(
        self,
        name: str,
        *,
        deciders: Sequence[Decider[Any, Any, Any]] = (),
        sagas: Sequence[SagaDefinition[Any]] = (),
        projections: Sequence[Projection[Any]] = (),
        handlers: Sequence[Callable[..., Any] | Handler] = (),
        messages: Sequence[type[Message]] = (),
        refusals: Sequence[type[Refused]] = (),
        upcasters: Sequence[Upcaster] = (),
        partitions: int = 12,
    ) -> None:
        if _NAME.fullmatch(name) is None:
            raise BadService(f"service name {name!r}: wanted lower-case letters, digits and dashes, at most 40")
        self.name, self.partitions = name, partitions
        self.deciders, self.sagas, self.projections = tuple(deciders), tuple(sagas), tuple(projections)
        self.handlers = tuple(one if isinstance(one, Handler) else Handler(one) for one in handlers)
        self._check()
        named: list[type[Message]] = [
            *(command for decider in deciders for command in decider.commands),
            *(event for decider in deciders for event in decider.events),
            *(definition.start for definition in sagas),
            *(event for projection in projections for event in projection.events),
            *(message for handler in self.handlers for message in handler.messages),
            *messages,
        ]
        self.registry = Registry(named, refusals, upcasters)
        self.registry.upcasting.check(self.registry.types)
        self.codec = JsonCodec(self.registry)

    def __repr__(self) -> str:
        return f"Service({self.name!r})"

    @property
    def topics(self) -> tuple[TopicSpec, ...]:
        """The topics this service owns, as declared."""
        return service_topics(self.name, partitions=self.partitions)

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
        return found

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
        read = [definition.start for definition in self.sagas]
        read += [event for projection in self.projections for event in projection.events]
        read += [event for handler in self.handlers for event in handler.events]
        own = f"{self.name}.events"
        return tuple(sorted({self.topic_of(event) for event in read} - {own}))

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
        **options: Any,
    ) -> AbstractAsyncContextManager[Connection]:
        """A client of the service; with `worker=True` it also runs the service until the context ends.

        `migrate` and `apply_topics` None: embedded backends are prepared as they are opened; PostgreSQL must have been
        upgraded (`foldbus db upgrade`) and Kafka's topics made (`foldbus topics apply`), or this raises.
        """
        from foldbus.connection import connect

        return connect(
            self, store=store, bus=bus, worker=worker, migrate=migrate, apply_topics=apply_topics, clock=clock,
            ids=ids, metrics=metrics, failpoint=failpoint, **options,
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
        _unique("handler", [handler.name for handler in self.handlers], self.name)
        _unique("decider category", [decider.category for decider in self.deciders], self.name)
        _unique("command", [str(command.type_name) for command in self.commands], self.name)
        _unique("saga version", [f"{one.name} v{one.version}" for one in self.sagas], self.name)
        _unique("projection", [one.name for one in self.projections], self.name)
        for one in self.projections:
            if one.name.startswith("foldbus-"):
                raise BadService(f"projection {one.name!r}: names that start with foldbus- are the framework's own")


def handler_group(service: str, handler: Handler) -> str:
    """Consumer group, and name on the claims, of a handler's subscription to events."""
    return f"{service}.handler.{handler.name}"


def _unique(what: str, names: Sequence[str], service: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadService(f"service {service!r} lists {what} {', '.join(twice)} twice; wanted each once")
