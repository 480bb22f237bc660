"""`@saga(name, version=…)` turns a coroutine function into a `SagaDefinition`, a value that registers nothing.

An instance stays on the version that it began with, so a changed saga is a second function with the next version,
listed beside the first until the last old instance has ended.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from uuid import UUID, uuid5

from bus.envelope import StreamId
from bus.messages import Event
from sagas.errors import BadSaga
from sagas.run import SagaRun

E = TypeVar("E", bound=Event)

_NAMES = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
_NAME_LENGTH_MAX = 100
_SAGAS = UUID("7d0c1f2e-6f0b-5f7e-9a43-0f9d2ac1b6e4")
"""Namespace of all saga ids. Never to be changed: running sagas are found by ids made from it."""


@dataclass(frozen=True, slots=True)
class SagaDefinition(Generic[E]):
    """A saga's name and version, the event that starts it, and its story."""

    name: str
    version: int
    start: type[E]
    body: Callable[[SagaRun, E], Coroutine[Any, Any, None]]

    def __repr__(self) -> str:
        return f"<saga {self.name} v{self.version}, starts on {self.start.type_name}>"


def saga(name: str, *, version: int = 1) -> Callable[[Callable[[SagaRun, E], Coroutine[Any, Any, None]]],
                                                     SagaDefinition[E]]:  # fmt: skip
    """`async def story(run: SagaRun, placed: OrderPlaced) -> None`: starts on the event that the second parameter is
    annotated with. `name` is lower case with hyphens and is part of every instance's id: renaming a saga orphans its
    instances. Raises BadSaga when something is missing."""
    if not _NAMES.fullmatch(name) or len(name) > _NAME_LENGTH_MAX:
        raise BadSaga(f"{name!r} is no name for a saga; wanted lower case words joined by hyphens, as 'fulfil-order'")
    if isinstance(version, bool) or version < 1:
        raise BadSaga(f"saga {name!r} has version {version!r}; wanted a number from 1")
    frame = inspect.currentframe()
    caller = frame.f_back if frame is not None else None
    scope = caller.f_locals if caller is not None else {}  # where a saga inside a function finds its event

    def define(body: Callable[[SagaRun, E], Coroutine[Any, Any, None]]) -> SagaDefinition[E]:
        return SagaDefinition(name, version, _start_type(name, body, scope), body)

    return define


def saga_id(name: str, start_id: UUID) -> UUID:
    """The instance of saga `name` that the event `start_id` starts, however often it is delivered."""
    return uuid5(uuid5(_SAGAS, name), str(start_id))


def saga_stream(name: str, instance: UUID | str) -> StreamId:
    """Where an instance's history is."""
    return StreamId(f"saga.{name}", str(instance))


def saga_group(service: str, name: str) -> str:
    """The consumer that starts saga `name`; replies have a consumer of their own."""
    return f"{service}.saga.{name}"


def _start_type(name: str, body: Callable[..., Any], scope: Mapping[str, Any]) -> Any:
    where = f"saga {name!r} ({getattr(body, '__qualname__', body)!s})"
    if not inspect.iscoroutinefunction(body):
        raise BadSaga(f"{where} is no coroutine function; wanted `async def {name.replace('-', '_')}(run, event)`")
    parameters = list(inspect.signature(body).parameters.values())
    if len(parameters) != 2 or any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
        raise BadSaga(f"{where} takes ({', '.join(map(str, parameters))}); wanted two parameters: run and the event")
    event = parameters[1]
    found = event.annotation
    if found is event.empty:
        raise BadSaga(f"{where}: parameter {event.name!r} has no annotation; wanted the event that starts the saga")
    if isinstance(found, str):
        try:
            found = eval(found, body.__globals__, dict(scope))
        except Exception as error:
            raise BadSaga(f"{where}: annotation {found!r} of {event.name!r} cannot be resolved: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Event) and hasattr(found, "type_name")):
        raise BadSaga(f"{where}: parameter {event.name!r} is annotated {found!r}; wanted one event class with a type")
    if not found.public:
        raise BadSaga(
            f"{where}: {found.type_name} is not public, so it is never published and would never start anything; "
            "wanted a public event"
        )
    return found
