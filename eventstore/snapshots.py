"""Snapshots: when one is made, what is in it, and which code may read it.

A snapshot is a shortcut, never the truth. It holds a state that was folded from committed events alone, as JSON by
pydantic, and the `schema` that it was folded by: the decider's `version`, its state's shape, and its initial state.
Whatever was made by another schema is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from hashlib import sha256
from typing import Any, Generic, TypeVar, cast
from uuid import UUID

from pydantic import BaseModel, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from bus.envelope import StreamId
from eventstore.errors import EventStoreError
from eventstore.port import Snapshot

S = TypeVar("S")

EVENTS_FEWEST = 10
"""Below this many events there is nothing to gain: a snapshot is a row too."""


@dataclass(frozen=True, slots=True)
class Snapshots:
    """When a snapshot of a stream is due: `every` so many events since the last one, or as soon as folding the events
    after it took `load_ms` (whichever is first; None: not for that reason).

    By default 200 events or 2 ms, which is about the same for a small state: see docs/aggregates.md.
    """

    every: int | None = 200
    load_ms: float | None = 2.0

    def __post_init__(self) -> None:
        if (self.every is not None and self.every < 1) or (self.load_ms is not None and self.load_ms < 0):
            raise ValueError(f"{self}: wanted every= of 1 or more, load_ms= of 0 or more, or None for either")

    def due(self, *, events: int, load_s: float = 0.0) -> bool:
        """`events` since the last snapshot; `load_s` is what folding them took, 0 when they were not loaded."""
        if self.every is not None and events >= self.every:
            return True
        return self.load_ms is not None and events >= EVENTS_FEWEST and load_s > 0 and load_s * 1000 >= self.load_ms


class UnfitState(EventStoreError):
    """A state that does not come back from JSON as it was: no snapshots are made of it."""


class UnreadableSnapshot(EventStoreError):
    """A stored state of the right schema that cannot be read: the stream is folded from its first event instead."""


class StateCodec(Generic[S]):
    """A decider's states as bytes. `annotation` is the state's type, `initial` the state of an empty stream.

    Raises UnfitState when pydantic cannot serialise such a type, or when `initial` does not come back as it was.
    """

    schema: str
    """Of the snapshots made and read here: another `version`, type or initial state gives another one."""

    def __init__(self, annotation: object, *, initial: S, version: int) -> None:
        try:
            self._adapter: TypeAdapter[S] = TypeAdapter(cast("type[S]", annotation))
            shape = self._adapter.json_schema()
        except (PydanticSchemaGenerationError, PydanticUserError, TypeError, NameError) as error:
            raise UnfitState(f"pydantic cannot serialise {annotation!r}: {error}") from error
        canonical = json.dumps([_plain(shape), _plain(json.loads(self.dump(initial)))], sort_keys=True)
        self.schema = f"v{version}-{sha256(canonical.encode()).hexdigest()[:16]}"

    def dump(self, state: S) -> bytes:
        """Raises UnfitState when `state` would not come back equal."""
        try:
            data = self._adapter.dump_json(state, by_alias=True, round_trip=True, warnings="error")
            back = self._adapter.validate_json(data)
        except (PydanticSerializationError, ValidationError, ValueError, RecursionError) as error:
            raise UnfitState(f"{type(state).__qualname__} cannot be stored as JSON and read again: {error}") from error
        if type(back) is not type(state) or back != state:
            raise UnfitState(f"{state!r:.200} comes back from JSON as {back!r:.200}; wanted the same")
        return data

    def load(self, data: bytes) -> S:
        """Raises UnreadableSnapshot."""
        try:
            return self._adapter.validate_json(data)
        except ValueError as error:  # pydantic's is one
            raise UnreadableSnapshot(f"a snapshot of schema {self.schema} cannot be read: {error}") from error


_WORDS = frozenset(("title", "description", "examples"))
_NAMED = frozenset(("properties", "$defs"))


def _plain(found: Any, *, names: bool = False) -> Any:
    """A JSON document without what means nothing (words for people, the order of a list), to compare by its text."""
    if isinstance(found, dict):
        table = cast("dict[str, Any]", found)
        return {
            key: _plain(value, names=not names and key in _NAMED)
            for key, value in table.items()
            if names or key not in _WORDS
        }
    if isinstance(found, list):
        items = cast("Sequence[Any]", found)
        return sorted((_plain(one) for one in items), key=lambda one: json.dumps(one, sort_keys=True))
    return found


_ATOMS = (str, bytes, int, float, complex, Decimal, UUID, date, datetime, time, timedelta, Enum, type(None), type(...))


def is_value(state: object) -> bool:
    """Can nobody change it in place? True for plain values, and for tuples, frozen sets, frozen dataclasses and frozen
    models of such, all the way down. What is not known to be one is not."""
    waiting = [state]
    while waiting:
        one = waiting.pop()
        if isinstance(one, _ATOMS):
            continue
        if isinstance(one, (tuple, frozenset)):
            waiting.extend(cast("tuple[object, ...]", one))
        elif isinstance(one, BaseModel):
            if not one.model_config.get("frozen") or one.__pydantic_private__ or one.__pydantic_extra__:
                return False
            waiting.extend(one.__dict__.values())
        elif is_dataclass(one) and not isinstance(one, type):
            if not cast("Any", one).__dataclass_params__.frozen:
                return False
            waiting.extend(getattr(one, field.name, None) for field in fields(one))
        else:
            return False
    return True


def unshared(state: S) -> S:
    """Itself if it is a value, else a copy of its own: what somebody may go on to change in place."""
    return state if is_value(state) else deepcopy(state)


class BadSnapshot(EventStoreError):
    """A snapshot that no store takes: of no version, without a time zone, or two of one stream in a call. Nothing was
    stored."""


def check_snapshots(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """Asked by both adapters first. Answers them in the order of (category, id), in which all lock. Raises
    BadSnapshot."""
    seen: set[StreamId] = set()
    for one in snapshots:
        fault = None
        if one.version < 1:
            fault = f"version {one.version}; wanted 1 or above"
        elif one.made_at.tzinfo is None:
            fault = f"made at {one.made_at}; wanted a time zone"
        elif not one.schema or "\x00" in one.schema:
            fault = f"schema {one.schema!r}; wanted a name of some kind"
        elif one.stream in seen:
            fault = "it comes twice; wanted at most one per stream in a call"
        if fault is not None:
            raise BadSnapshot(f"snapshot of {one.stream}: {fault}; nothing was stored")
        seen.add(one.stream)
    return sorted(snapshots, key=lambda one: one.stream)


__all__ = [
    "BadSnapshot",
    "Snapshots",
    "StateCodec",
    "UnfitState",
    "UnreadableSnapshot",
    "check_snapshots",
    "is_value",
    "unshared",
]
