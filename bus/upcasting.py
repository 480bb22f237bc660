"""Upcasters: turn a message's stored form into today's, before anything is validated. A table of plain functions.

    upcast("orders.order-placed.v1", to="orders.order-placed.v2", by=with_currency)

They lead from type to type, as far as the reader asks: **a reader gets what it names**, and a chain ends at the first
type that it does. The class of an old type need not exist any more. Whoever names the type that is stored never comes
here, so today's messages pay nothing.

Every step takes the JSON of one type and gives the JSON of the next, as a decoder would find it in the store. A later
function never sees a datetime that an earlier one left behind, nor an object that two parts of a split share.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, cast
from uuid import UUID, uuid5

from pydantic_core import from_json, to_json

from bus.envelope import Envelope
from bus.errors import BadMessageClass, BadUpcaster, UpcastFailed
from bus.messages import Command, Message, TypeName

Json = dict[str, Any]
Parts = Iterable[tuple[str, Json]]

PARTS_MAX = 1000
"""How many messages one stored message may become."""


@dataclass(frozen=True, slots=True)
class Upcaster:
    """One line of the table: made by `upcast`, `split_event` or `drop_event`. `by` gives the parts, in order."""

    source: str
    targets: tuple[str, ...]
    by: Callable[[Json], Parts]
    splits: bool = True


def upcast(source: str, *, to: str, by: Callable[[Json], Json]) -> Upcaster:
    """Events or commands of type `source` are read as type `to`: `by` takes the stored JSON, which it may change, and
    gives the new one. It must be pure, as a fold is: the same message is read many times, by several processes."""

    def one(data: Json) -> Parts:
        return [(to, by(data))]

    return Upcaster(source, (to,), one, splits=False)


def split_event(source: str, *, to: Collection[str], by: Callable[[Json], Parts]) -> Upcaster:
    """An event of type `source` is read as the events that `by` gives, in their order: any number of pairs of a type
    and its JSON, of types listed in `to`. All of them stay at the place of the stored one."""
    return Upcaster(source, (to,) if isinstance(to, str) else tuple(to), by)


def drop_event(source: str) -> Upcaster:
    """Events of type `source` mean nothing any more: every reader goes on as if they were not there."""
    return Upcaster(source, (), lambda data: ())


class Upcasting:
    """The table of one service. Raises BadUpcaster for two upcasters of one type, a circle, or a name that is none."""

    def __init__(self, upcasters: Iterable[Upcaster] = ()) -> None:
        self._by_source: dict[str, Upcaster] = {}
        for one in upcasters:
            for name in (one.source, *one.targets):
                _parse(name, one)
            if self._by_source.setdefault(one.source, one) is not one:
                raise BadUpcaster(f"two upcasters say what becomes of {one.source}; wanted one")
        self._refuse_circles()

    def __bool__(self) -> bool:
        return bool(self._by_source)

    def __contains__(self, name: object) -> bool:
        return name in self._by_source

    @property
    def table(self) -> Mapping[str, Sequence[str]]:
        """What becomes of which type, one step each."""
        return {source: one.targets for source, one in sorted(self._by_source.items())}

    def older(self, names: Collection[str]) -> frozenset[str]:
        """The types that a reader of `names` reads as one of those, in one step or in several."""
        found: set[str] = set()
        while True:
            reached = {*names, *found}
            more = {source for source, one in self._by_source.items() if reached.intersection(one.targets)} - reached
            if not more:
                return frozenset(found)
            found |= more

    def check(self, named: Mapping[str, type[Message]]) -> None:
        """Raises BadUpcaster when a step leads to a type that nobody names and no upcaster takes further (a gap), when
        commands become events or the other way round, and when a command is split or dropped."""
        for source, one in self._by_source.items():
            for target in one.targets:
                if target not in named and target not in self._by_source:
                    raise BadUpcaster(_gap(source, target, named))
            kinds = {_kind(named[end]) for end in self._ends(source, named)}
            kinds |= {_kind(known) for name, known in named.items() if _base(name) == _base(source)}
            if len(kinds) > 1:
                raise BadUpcaster(f"{source} is upcast from {' and '.join(sorted(kinds))}; wanted one kind throughout")
            if one.splits and kinds == {"command"}:
                raise BadUpcaster(
                    f"{source} is a command, and a command is done once and answered: "
                    "it may become one other command (`upcast`), it cannot be split or dropped"
                )

    def read(self, envelope: Envelope, names: Collection[str]) -> Sequence[Envelope]:
        """What the stored message is to a reader of `names`: itself when the reader names it or no upcaster takes it.

        Otherwise its parts, in order, at its place and with its key, also those that lead to types which this reader
        does not name (its own business: it skips them or complains). The first part that the reader names keeps the id;
        each further part's id is uuid5 of that id and its number. Raises UpcastFailed.
        """
        if envelope.type in names or envelope.type not in self._by_source:
            return (envelope,)
        parts: list[tuple[str, bytes]] = []
        waiting = [(envelope.type, envelope.data)]
        while waiting:
            name, data = waiting.pop()
            one = self._by_source.get(name)
            if name in names or one is None:
                parts.append((name, data))
            else:
                waiting.extend(reversed(_step(one, data)))
            if len(parts) + len(waiting) > PARTS_MAX:
                raise UpcastFailed(f"{envelope.type} became more than {PARTS_MAX} messages, the last one {name}")
        kept = next((number for number, (name, _) in enumerate(parts) if name in names), 0)
        return [
            _part(envelope, envelope.id if number == kept else uuid5(envelope.id, str(number)), name, data)
            for number, (name, data) in enumerate(parts)
        ]

    def _refuse_circles(self) -> None:
        good: set[str] = set()
        for start in self._by_source:
            path = [start]
            branches = [iter(self._by_source[start].targets)]
            while path:
                step = next(branches[-1], None)
                if step is None:
                    good.add(path.pop())
                    branches.pop()
                elif step in path:
                    raise BadUpcaster(f"upcasters lead in a circle: {' → '.join((*path[path.index(step) :], step))}")
                elif step not in good and step in self._by_source:
                    path.append(step)
                    branches.append(iter(self._by_source[step].targets))

    def _ends(self, source: str, named: Mapping[str, type[Message]]) -> set[str]:
        """The named types that `source` may become, or already is."""
        reached, waiting = {source}, [source]
        while waiting:
            one = self._by_source.get(waiting.pop())
            more = set(one.targets if one else ()) - reached
            reached |= more
            waiting += more
        return reached.intersection(named)


def _step(one: Upcaster, data: bytes) -> list[tuple[str, bytes]]:
    """One function applied to one JSON text. Whatever is wrong with it, or with what it gives, is UpcastFailed."""
    try:
        found = from_json(data)
    except ValueError as error:
        raise UpcastFailed(f"{one.source} is no JSON, so it cannot be upcast: {error}") from error
    if not isinstance(found, dict):
        raise UpcastFailed(f"{one.source} is a JSON {type(found).__name__}, so it cannot be upcast; wanted an object")
    wanted = " or ".join(one.targets) or "nothing"
    try:
        made: list[tuple[str, bytes]] = []
        for name, value in one.by(cast("Json", found)):
            if name not in one.targets:
                raise TypeError(f"it gave a {name!r}")
            if not isinstance(value, dict):  # pyright: ignore[reportUnnecessaryIsInstance] (users' functions)
                raise TypeError(f"it gave {type(value).__name__} for {name}, wanted a dict")
            made.append((name, to_json(value)))
            if len(made) > PARTS_MAX:
                raise ValueError(f"it gave more than {PARTS_MAX} parts")
    except Exception as error:
        raise UpcastFailed(
            f"the upcaster of {one.source} (to {wanted}) failed: {type(error).__qualname__}: {error}"
        ) from error
    return made


_FIELDS = [field.name for field in fields(Envelope)]
_ID, _TYPE, _DATA = (_FIELDS.index(name) for name in ("id", "type", "data"))
_values = attrgetter(*_FIELDS)


def _part(envelope: Envelope, id: UUID, name: str, data: bytes) -> Envelope:
    """`dataclasses.replace`, which looks at 22 fields one by one, was half the price of an old event."""
    values = list(_values(envelope))
    values[_ID], values[_TYPE], values[_DATA] = id, name, data
    return Envelope(*values)


def _parse(name: str, one: Upcaster) -> None:
    try:
        TypeName.parse(name)
    except BadMessageClass as error:
        raise BadUpcaster(f"upcaster of {one.source!r}: {error}") from None


def _gap(source: str, target: str, named: Mapping[str, type[Message]]) -> str:
    others = sorted((name for name in named if _base(name) == _base(target)), key=_version)
    if not others:
        return (
            f"{source} is upcast to {target}, which is not one that this service names; "
            "name its class in a decider, a saga, a projection or messages=, or correct the upcaster"
        )
    return (
        f"{source} is upcast to {target}, and there it stops: this service names {', '.join(others)}; "
        f"add an upcaster from {target}, or lead to {others[-1]} at once"
    )


def _base(name: str) -> str:
    return name.rpartition(".v")[0]


def _version(name: str) -> int:
    return int(name.rpartition(".v")[2])


def _kind(message: type[Message]) -> str:
    return "command" if issubclass(message, Command) else "event"
