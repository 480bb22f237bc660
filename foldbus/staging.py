"""What a unit collects before it is committed: events for streams, messages to publish, commands to send.

The same for `Connection.unit()` and for a handler's `ctx`; only the cause that messages inherit from differs.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Protocol, TypeVar
from uuid import UUID

from bus.codec import check_size
from bus.envelope import Envelope, StreamId, Version
from bus.errors import BadMessageClass
from bus.messages import Command, Event, Message
from bus.registry import service_of
from eventstore.decider import BadDecision, Decider
from eventstore.port import ANY, Append, ExpectedVersion, Timer
from foldbus.scheduling import BadDelay, When, timer_of, when

E = TypeVar("E", bound=Event)


class MakeEnvelope(Protocol):
    def __call__(self, message: Message, *, topic: str | None, id: UUID | None = None) -> Envelope: ...


class Staging:
    """Nothing here is written before its unit is committed, in the order in which it was staged: events first."""

    def __init__(
        self,
        service: str,
        envelope: MakeEnvelope,
        *,
        max_bytes: int,
        store_now: Callable[[], datetime] | None = None,
    ) -> None:
        """`store_now` is the store's clock (`store.timers.now`); None: nothing can be delayed."""
        self._service, self._make, self._max_bytes = service, envelope, max_bytes
        self._store_now = store_now
        self._delayed: list[tuple[Envelope, When]] = []
        self._appends: dict[StreamId, tuple[ExpectedVersion, list[Envelope]]] = {}
        self._asserts: dict[StreamId, Version] = {}
        self._outgoing: list[Envelope] = []

    def publish(
        self, event: Event, *, id: UUID | None = None, at: datetime | None = None, delay_s: float | None = None
    ) -> UUID:
        """Stored with the unit, published on the service's own topic after its commit, or when its time has come; it
        enters no stream. Raises BadMessageClass for an event of another service, MessageTooLarge, BadDelay at once."""
        self._check_own(event)
        return self._stage(event, f"{self._service}.events", id, when(at, delay_s))

    def send(
        self,
        command: Command[Any],
        *,
        id: UUID | None = None,
        at: datetime | None = None,
        delay_s: float | None = None,
    ) -> UUID:
        """Stored with the unit, sent after its commit; nobody waits for the answer.

        With `at` or `delay_s` (counted from when the unit is put together) it is kept and sent then, by a worker of
        this service: not early by the store's clock, once in effect. `Connection.cancel_delayed(id)` takes it back.
        """
        return self._stage(command, f"{check_kind(command, Command)}.commands", id, when(at, delay_s))

    def append(self, decider: Decider[Any, Any, E], *events: E, expected: ExpectedVersion = ANY) -> None:
        """Appends to the stream of the events' key; public ones are published too. `expected` is the version that the
        writer saw (0: the stream must not exist). A second call for the same stream adds to the first, whose
        `expected` counts.

        Raises BadDecision for an event that the decider does not evolve on, or of another key than the first. The
        commit raises WrongExpectedVersion, and then nothing of the unit is written.
        """
        if not events:
            return
        key = events[0].key
        for event in events:
            if not isinstance(event, decider.events):
                raise BadDecision(
                    f"{type(event).__name__} was appended to {decider!r}; wanted one of "
                    f"{', '.join(known.__name__ for known in decider.events)}; nothing was stored"
                )
            if event.key != key:
                raise BadDecision(
                    f"events with keys {key!r} and {event.key!r} were appended to {decider!r} in one call; an append "
                    "is to one stream; nothing was stored"
                )
        _, staged = self._appends.setdefault(decider.stream(key), (expected, []))
        for event in events:
            topic = f"{self._service}.events" if type(event).public else None
            envelope = self._make(event, topic=topic)
            check_size(envelope, self._max_bytes)
            staged.append(envelope)

    def expect(self, decider: Decider[Any, Any, Any], key: object, version: Version) -> None:
        """For a stream that was only read: the unit is written if it is still at `version` (0: if it does not exist).
        Else the commit raises WrongExpectedVersion, and nothing of the unit is written."""
        self._asserts[decider.stream(key)] = version

    def _check_own(self, event: Event) -> None:
        """Whoever waits for it reads its owner's topic, where only its owner publishes."""
        owner = check_kind(event, Event)
        foreign = type(event).foreign_topic
        if owner != self._service or foreign not in (None, f"{owner}.events"):
            whose = f"arrives on {foreign!r}" if foreign is not None else f"belongs to service {owner!r}"
            raise BadMessageClass(
                f"{type(event).type_name} {whose}, and service {self._service!r} publishes its own events, on "
                f"{self._service}.events; nothing was sent: publish it there, or name it {self._service}.…"
            )

    @property
    def asserts(self) -> tuple[tuple[StreamId, Version], ...]:
        return tuple(self._asserts.items())

    @property
    def appends(self) -> tuple[Append, ...]:
        return tuple(
            Append(stream, expected, tuple(envelopes)) for stream, (expected, envelopes) in self._appends.items()
        )

    @property
    def outgoing(self) -> tuple[Envelope, ...]:
        return tuple(self._outgoing)

    @property
    def delays(self) -> bool:
        """Is anything of it delayed?"""
        return bool(self._delayed)

    @property
    def timers(self) -> tuple[Timer, ...]:
        """Of what was delayed."""
        if not self._delayed:
            return ()
        assert self._store_now is not None
        now = self._store_now()
        return tuple(timer_of(self._service, envelope, when, now=now) for envelope, when in self._delayed)

    def _stage(self, message: Message, topic: str, id: UUID | None = None, when: When | None = None) -> UUID:
        if when is not None and self._store_now is None:
            raise BadDelay("nothing can be delayed here; nothing was staged")
        envelope = self._make(message, topic=topic, id=id)
        check_size(envelope, self._max_bytes)
        if when is None:
            self._outgoing.append(envelope)
        else:
            self._delayed.append((envelope, when))
        return envelope.id


def check_kind(message: object, wanted: type[Message]) -> str:
    """The service that owns it. Raises BadMessageClass for what is no message of that kind, or has no type name."""
    if not isinstance(message, wanted):
        raise BadMessageClass(f"{type(message).__qualname__} is no {wanted.__name__}; nothing was sent")
    return service_of(type(message))


__all__ = ["Staging", "check_kind"]
