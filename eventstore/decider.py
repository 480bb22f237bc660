"""Aggregates: two pure functions in a value, and their adapter to the handler runtime.

A `Decider` folds events into state and decides new events. It knows no bytes and no store; a test calls its functions.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import reduce
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel

from bus.codec import Codec, decode_command, decoder_of_bodies, reply_envelope
from bus.envelope import Envelope, Origin, ReplyOutcome, StreamId
from bus.errors import UnknownType
from bus.messages import Command, Event, Message, Refused
from bus.quick import quick
from bus.seams import Clock, Ids
from eventstore.behaviour import Decision
from eventstore.errors import EventStoreError
from eventstore.port import Bodies
from eventstore.snapshots import Snapshots, StateCodec, UnfitState, is_value

S = TypeVar("S")
C = TypeVar("C", bound=Command[Any])
E = TypeVar("E", bound=Event)
M = TypeVar("M", bound=Message)


class BadDecider(EventStoreError):
    """A decider is declared so that it cannot work: found at start-up or at its definition."""


class BadDecision(EventStoreError):
    """`decide` gave something that cannot be stored: an event of another key or an undeclared type, or no reply."""


class NoState(EventStoreError):
    """`evolve` gave None, and its state is never None: most often a `match` without a case for the event."""


class Decider(Generic[S, C, E]):
    """One kind of aggregate: `initial` state, `evolve(state, event) -> state`, `decide(state, command) -> events`.

    Which commands and events it handles is read from the annotations (a class or a union of classes). `category` is the
    first half of its stream ids. Events carry the command's key. A command is answered with the first decided event
    of its reply type, or by `reply(state, command, events)`, where `state` is the one after the events. `Refused`
    raised in `decide` is the answer no.

    `snapshots` says when states are stored aside, so that long streams load quickly; None: never. By default they are,
    unless the state does not come back from JSON as it was: then one line of the log says so at start-up. With a policy
    given such a state raises BadDecider. Raise `version` whenever `evolve` (or an upcaster) changes what a stored event
    means: older snapshots are ignored from then on. (A changed type of state, or initial state, is noticed.)
    """

    def __init__(
        self,
        category: str,
        *,
        initial: S,
        evolve: Callable[[S, E], S],
        decide: Callable[[S, C], Sequence[E]],
        reply: Callable[[S, C, Sequence[E]], BaseModel | None] | None = None,
        version: int = 1,
        snapshots: Snapshots | Literal["auto"] | None = "auto",
    ) -> None:
        self.category, self.initial, self.version = category, initial, version
        self.evolve, self.decide, self.reply = evolve, decide, reply
        self.commands: tuple[type[Command[Any]], ...] = parameter_types(decide, 1, Command)
        self.events: tuple[type[Event], ...] = parameter_types(evolve, 1, Event)
        for command in self.commands:
            wanted = command.reply_type()
            if wanted is not None and reply is None and not any(issubclass(event, wanted) for event in self.events):
                raise BadDecider(
                    f"decider {category!r} can give no reply to {command.__name__}: it wants {wanted.__name__}, "
                    f"which is none of the events {', '.join(event.__name__ for event in self.events)}; "
                    "decide such an event or pass reply="
                )

        self._initial_is_value = is_value(initial)
        self._state_codec: StateCodec[S] | None = None
        self.snapshots = Snapshots() if snapshots == "auto" else snapshots
        if isinstance(snapshots, Snapshots):
            try:
                self.state_codec()
            except UnfitState as error:
                raise BadDecider(f"decider {category!r} cannot have snapshots=: {error}") from error

    def stream(self, key: object) -> StreamId:
        """The stream of one aggregate."""
        return StreamId(self.category, str(key))

    def fresh(self) -> S:
        """The initial state; each time another one if somebody might change it in place."""
        return self.initial if self._initial_is_value else deepcopy(self.initial)

    def state_codec(self) -> StateCodec[S]:
        """How states are stored. Raises UnfitState when they cannot be."""
        if self._state_codec is None:
            annotation = state_type(self.evolve, self.initial)
            self._state_codec = StateCodec(annotation, initial=self.initial, version=self.version)
        return self._state_codec

    def check_evolved(self, state: S, type_name: str) -> None:
        """Raises NoState when `state`, which `evolve` gave for an event of this type, is None and must not be."""
        if state is None and not self._may_be_none():
            raise NoState(
                f"evolve of {self!r} gave None for {type_name}; wanted a state: is a case for it missing, or a return?"
            )

    def _may_be_none(self) -> bool:
        annotation = state_type(self.evolve, self.initial)
        return self.initial is None or annotation is type(None) or type(None) in typing.get_args(annotation)

    def __repr__(self) -> str:
        return f"Decider({self.category!r})"


@quick
@dataclass(frozen=True, slots=True)
class Aggregate:
    """A folded stream: its state, and which decider folded it."""

    decider: Decider[Any, Any, Any]
    state: Any


class DeciderBehaviour:
    """All deciders of one service behind the runtime's `Behaviour`; the command's type says which one decides."""

    def __init__(
        self, deciders: Sequence[Decider[Any, Any, Any]], *, service: str, codec: Codec, ids: Ids, clock: Clock
    ) -> None:
        self._service, self._codec, self._ids, self._clock = service, codec, ids, clock
        self._decode_bodies = decoder_of_bodies(codec)
        self._by_command: dict[str, Decider[Any, Any, Any]] = {}
        self._by_category: dict[str, Decider[Any, Any, Any]] = {}
        self._events: dict[str, frozenset[str]] = {}
        self._commands: dict[str, frozenset[str]] = {}
        for decider in deciders:
            if self._by_category.setdefault(decider.category, decider) is not decider:
                raise BadDecider(f"two deciders share the category {decider.category!r}; wanted one each")
            for command in decider.commands:
                name = str(command.type_name)
                if self._by_command.setdefault(name, decider) is not decider:
                    other = self._by_command[name]
                    raise BadDecider(f"{name} is decided by {other!r} and by {decider!r}; wanted one")
            self._events[decider.category] = frozenset(str(event.type_name) for event in decider.events)
            self._commands[decider.category] = frozenset(str(command.type_name) for command in decider.commands)
        for decider in deciders:
            for name in codec.registry.upcasting.older(self._commands[decider.category]):
                self._by_command.setdefault(name, decider)

    @property
    def commands(self) -> frozenset[str]:
        """The types of command that are taken here, those that are upcast first included."""
        return frozenset(self._by_command)

    def stream_of(self, envelope: Envelope) -> StreamId:
        decider = self._by_command.get(envelope.type)
        if decider is None:
            raise UnknownType(f"no decider of service {self._service!r} takes {envelope.type!r}")
        return StreamId(decider.category, envelope.key)

    def initial(self, stream: StreamId) -> Aggregate:
        decider = self._by_category[stream.category]
        return Aggregate(decider, decider.fresh())

    def fold(self, state: Aggregate, records: Sequence[Envelope]) -> Aggregate:
        folded, evolve, decode = state.state, state.decider.evolve, self._codec.decode
        today = self._events[state.decider.category]
        last = "an earlier event"
        try:
            for record in records:
                if record.type in today:
                    folded = evolve(folded, decode(record))
                    last = record.type
                else:
                    for event in self._older(record, state.decider, today):
                        folded = evolve(folded, event)
                        last = record.type
        except Exception as error:
            if folded is None and not isinstance(error, EventStoreError):  # so the one before is to blame
                state.decider.check_evolved(folded, last)
            raise
        if folded is None:
            state.decider.check_evolved(folded, last)
        return Aggregate(state.decider, folded)

    def fold_bodies(self, state: Aggregate, bodies: Bodies) -> Aggregate | None:
        """As `fold`, from type and data alone. None: an event is of an older type, or the codec looks at more."""
        decider = state.decider
        if self._decode_bodies is None or not self._events[decider.category].issuperset(bodies.types):
            return None
        events = self._decode_bodies(bodies.types, bodies.data)
        folded: Any = reduce(decider.evolve, events, state.state)
        if folded is None and bodies.types:
            decider.check_evolved(folded, bodies.types[-1])
        return Aggregate(decider, folded)

    def events(self, category: str, record: Envelope) -> Sequence[Message]:
        """What one stored event is to the decider of this category: one event, or those that it is upcast to."""
        today = self._events[category]
        if record.type in today:
            return [self._codec.decode(record)]
        return self._older(record, self._by_category[category], today)

    def decide(self, state: Aggregate, envelope: Envelope) -> Decision[Aggregate]:
        decider = state.decider
        command = decode_command(self._codec, envelope, self._commands[decider.category])
        now = self._clock.now()
        try:
            events = decider.decide(state.state, command)
        except Refused as refusal:
            return Decision(state, reply=self._answer(envelope, refusal, self._origin(envelope, now)))
        folded = state.state
        staged: list[Envelope] = []
        for event in events:
            self._check(decider, command, event)
            folded = decider.evolve(folded, event)
            if folded is None:
                decider.check_evolved(folded, str(typing.cast("Event", event).type_name))
            topic = f"{self._service}.events" if type(event).public else None
            staged.append(self._codec.encode(event, self._origin(envelope, now), topic=topic))
        value = self._reply_value(decider, folded, command, events)
        reply = self._answer(envelope, value, self._origin(envelope, now))
        return Decision(Aggregate(decider, folded), events=tuple(staged), reply=reply)

    def _older(self, record: Envelope, decider: Decider[Any, Any, Any], today: frozenset[str]) -> list[Message]:
        """The events that an older one stands for now: any number, all of which its own decider must know."""
        parts = self._codec.upcast(record, today)
        events = [self._codec.decode(part) for part in parts]
        for part in parts:
            if part.type not in today:
                became = f", upcast to {part.type}," if part.type != record.type else ""
                raise UnknownType(
                    f"{record.stream or decider.category} holds {record.type}{became} which {decider!r} does not "
                    "evolve on: name it in the union of evolve, or upcast it to what is named there, or drop it"
                )
        return events

    def _origin(self, cause: Envelope, now: Any) -> Origin:
        return Origin(
            self._service, self._ids.new(), now, cause.correlation_id, cause.id, cause.tenant, cause.actor, trace(cause)
        )

    def _answer(self, command: Envelope, answer: BaseModel | Refused | None, origin: Origin) -> Envelope:
        return self._codec.encode_reply(command, answer, origin)

    def nothing_to_undo(self, undo: Envelope) -> Envelope:
        """The answer to an undo whose step had no effect: ok, without a value."""
        return reply_envelope(undo, ReplyOutcome.OK, b"null", self._origin(undo, self._clock.now()))

    def _check(self, decider: Decider[Any, Any, Any], command: Message, event: Any) -> None:
        # What is of the very class needs no look through pydantic's metaclass, which is slow.
        if type(event) not in decider.events and not isinstance(event, decider.events):
            raise BadDecision(
                f"{decider!r} decided {type(event).__name__} for {type(command).__name__}; wanted one of "
                f"{', '.join(known.__name__ for known in decider.events)}; nothing was stored"
            )
        if event.key != command.key:
            raise BadDecision(
                f"{decider!r} decided {type(event).__name__} with key {event.key!r} for a command with key "
                f"{command.key!r}; events carry their command's key; nothing was stored"
            )

    def _reply_value(
        self, decider: Decider[Any, Any, Any], state: Any, command: Message, events: Sequence[Event]
    ) -> BaseModel | None:
        name = type(command).__name__
        wanted = typing.cast("Command[Any]", command).reply_type()
        if decider.reply is not None:
            value: BaseModel | None = decider.reply(state, command, events)
            if value is not None and wanted is not None and not isinstance(value, wanted):
                raise BadDecision(
                    f"reply= of {decider!r} answered {name} with {type(value).__name__}; "
                    f"wanted {wanted.__name__}; nothing was stored"
                )
        elif wanted is None:
            return None
        else:
            value = next((event for event in events if type(event) is wanted or isinstance(event, wanted)), None)
        if value is None and wanted is not None:
            raise BadDecision(
                f"{decider!r} decided {[type(event).__name__ for event in events]} for {name}, "
                f"which is answered with {wanted.__name__}: decide one, refuse, or pass reply=; nothing was stored"
            )
        return value if wanted is not None else None


_TRACE = ("traceparent", "tracestate")


def trace(cause: Envelope) -> Mapping[str, str]:
    """The W3C trace context of the message being handled, for those it gives rise to."""
    if not cause.headers:
        return cause.headers
    return {name: cause.headers[name] for name in _TRACE if name in cause.headers}


def state_type(evolve: Callable[..., Any], initial: object) -> object:
    """What `evolve` says that its state is; the type of the initial state where it says nothing useful."""
    try:
        annotation = typing.get_type_hints(evolve, include_extras=True)[evolve.__code__.co_varnames[0]]
    except (AttributeError, IndexError, KeyError, NameError, TypeError):
        return type(initial)
    if annotation in (Any, object) or isinstance(annotation, TypeVar):
        return type(initial)
    return annotation


def parameter_types(function: Callable[..., Any], index: int, root: type[M]) -> tuple[type[M], ...]:
    """The message classes that a function's parameter is annotated with: one, or a union. Raises BadDecider."""
    name = getattr(function, "__qualname__", repr(function))
    parameters = list(getattr(function, "__annotations__", ()))
    try:
        hints = typing.get_type_hints(function)
        code = function.__code__
        parameter = code.co_varnames[: code.co_argcount][index]
        annotation = hints[parameter]
    except (AttributeError, IndexError, KeyError, NameError) as error:
        raise BadDecider(
            f"{name} does not say which {root.__name__}s it takes (found {parameters or 'no annotations'}): annotate "
            f"its parameter number {index + 1} with a class or a union of classes, importable where it is defined"
        ) from error
    found = _classes(annotation)
    for one in found:
        if not (isinstance(one, type) and issubclass(one, root) and hasattr(one, "type_name")):
            raise BadDecider(f"{name} takes {one!r} as {parameter}; wanted subclasses of {root.__name__} with a type=")
    return typing.cast("tuple[type[M], ...]", found)


def _classes(annotation: object) -> tuple[object, ...]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _classes(typing.get_args(annotation)[0])
    if origin is typing.Union or origin is types.UnionType:
        return tuple(one for part in typing.get_args(annotation) for one in _classes(part))
    return (annotation,)
