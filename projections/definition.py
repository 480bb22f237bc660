"""What a projection is: a fold per key into a typed row, as a value. `@projection` builds one, it registers nothing.

The fold's annotations say what is read and what is kept: `(row: R | None, event: A | B) -> R | None`. Returning None
deletes the row or leaves it absent. A fold is pure: it may run again for the same event, in another process, and on
rebuilds from the beginning.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Generic, Protocol, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from bus.messages import Event
from projections.errors import BadProjection
from projections.port import LOG, Row

E = TypeVar("E", bound=Event)
R = TypeVar("R", bound=BaseModel)

_GRAMMAR = re.compile(r"[a-z][a-z0-9-]{0,39}")
_RESERVED = ("projection-", "sqlite-", "pg-")


@dataclass(frozen=True, slots=True)
class Projection(Generic[Row]):
    """`name` also names the view that users query, with `_` for `-`. Raise `version` whenever fold or key mean
    something else than before: the next start builds the new version beside the old one, then swaps."""

    name: str
    version: int
    fold: Callable[[Row | None, Any], Row | None]
    row: type[Row]
    events: tuple[type[Event], ...]
    key: Callable[[Any], object]

    def __post_init__(self) -> None:
        if not _GRAMMAR.fullmatch(self.name) or self.name.startswith(_RESERVED):
            raise BadProjection(
                f"{self.name!r} is no name for a projection; wanted up to 40 of a-z, 0-9 and '-', a letter first, "
                f"and none of {', '.join(_RESERVED)} at its beginning: it names a view"
            )
        if self.version < 1:
            raise BadProjection(f"projection {self.name!r} has version {self.version}; wanted 1 or above")

    def __call__(self, row: Row | None, event: Any) -> Row | None:
        """The fold itself, for tests of it."""
        return self.fold(row, event)

    @property
    def view(self) -> str:
        """The view's name in the database."""
        return self.name.replace("-", "_")

    def key_of(self, event: Event) -> str | None:
        """The row that `event` belongs to; None when the key function says that it belongs to none."""
        found = self.key(event)
        return None if found is None else str(found)

    def sources(self, service: str) -> Mapping[str, Collection[type[Event]]]:
        """Where `service` reads which types: `log` for its own, else a topic. Raises BadProjection for a private event
        of another service, which is never published."""
        found: dict[str, list[type[Event]]] = {}
        for event in self.events:
            if event.foreign_topic is not None:
                source = event.foreign_topic
            elif event.type_name.service == service:
                source = LOG
            elif event.public:
                source = f"{event.type_name.service}.events"
            else:
                raise BadProjection(
                    f"projection {self.name!r} of service {service!r} wants {event.type_name}, a private event of "
                    f"{event.type_name.service!r}; it is never published"
                )
            found.setdefault(source, []).append(event)
        return found


class Builds(Protocol):
    """What `@projection(…)` applies to a fold."""

    def __call__(self, fold: Callable[[R | None, E], R | None]) -> Projection[R]: ...


def projection(name: str, *, version: int, key: Callable[[Any], object] | None = None) -> Builds:
    """Makes a Projection of a fold. `key` names the row of an event (default: the event's Key); its answer is taken as
    text, None means that the event concerns no row. Raises BadProjection when annotations are missing or unfit, and
    without `key` when the events' Key fields have different names."""

    def build(fold: Callable[[R | None, E], R | None]) -> Projection[R]:
        row, events = _read_annotations(name, fold)
        if key is None:
            _check_keys(name, events)
        return Projection(
            name=name,
            version=version,
            fold=fold,
            row=cast("type[R]", row),
            events=events,
            key=key if key is not None else _own_key,
        )

    return build


def _check_keys(name: str, events: Iterable[type[Event]]) -> None:
    """Keys of different names are most likely keys of different things, and those have no row in common."""
    fields: dict[str, type[Event]] = {}
    for event in events:
        fields.setdefault(event.key_field, event)
    if len(fields) > 1:
        found = ", ".join(f"{field} of {event.type_name}" for field, event in fields.items())
        raise BadProjection(f"projection {name!r} reads events whose keys have different names: {found}: pass key=")


def _own_key(event: Event) -> str:
    return event.key


def _read_annotations(name: str, fold: Callable[..., object]) -> tuple[type[BaseModel], tuple[type[Event], ...]]:
    wanted = "wanted `def fold(row: Row | None, event: A | B) -> Row | None`"
    where = f"projection {name!r} ({getattr(fold, '__qualname__', fold)})"
    parameters = list(inspect.signature(fold).parameters.values())
    if len(parameters) != 2:
        raise BadProjection(f"{where} takes {len(parameters)} parameters; {wanted}")
    if inspect.iscoroutinefunction(fold):
        raise BadProjection(f"{where} is a coroutine function; {wanted}: a fold is pure")
    try:
        hints = get_type_hints(fold)
    except NameError as error:
        raise BadProjection(
            f"{where}: the annotation {error.name!r} cannot be resolved; classes used there must be at module level"
        ) from error
    missing = [one for one in (parameters[0].name, parameters[1].name, "return") if one not in hints]
    if missing:
        raise BadProjection(f"{where} has no annotation for {' and '.join(missing)}; {wanted}")
    rows = _members(hints[parameters[0].name])
    models = [one for one in rows if one is not NoneType]
    if len(models) != 1 or len(rows) != 2 or not _is_class(models[0], BaseModel):
        raise BadProjection(f"{where}: the row is {hints[parameters[0].name]}; wanted a pydantic model `| None`")
    row = cast("type[BaseModel]", models[0])
    if not set(_members(hints["return"])) <= {row, NoneType} or row not in _members(hints["return"]):
        raise BadProjection(f"{where} returns {hints['return']}; wanted {row.__name__} or {row.__name__} | None")
    events = _members(hints[parameters[1].name])
    for event in events:
        if not _is_class(event, Event) or not hasattr(event, "type_name"):
            raise BadProjection(f"{where}: {event} is no event with a type name; {wanted}")
    return row, tuple(cast("list[type[Event]]", events))


def _is_class(found: object, base: type) -> bool:
    return isinstance(found, type) and issubclass(found, base)


def _members(annotation: object) -> list[object]:
    """The members of a union, also behind `type X = A | B`, in order."""
    if hasattr(annotation, "__value__"):
        return _members(cast("Any", annotation).__value__)
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]
