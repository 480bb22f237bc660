"""When a snapshot is due, what it may hold, and which code it belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel, ConfigDict, Field, create_model

from bus.messages import Command, Event, Key
from eventstore.decider import BadDecider, Decider
from eventstore.snapshots import Snapshots, StateCodec, UnfitState, UnreadableSnapshot, is_value, unshared


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Line:
    sku: str
    price: Decimal
    at: datetime


class Order(BaseModel, frozen=True):
    id: UUID | None = None
    lines: tuple[Line, ...] = ()
    tags: frozenset[str] = frozenset()
    colour: Colour = Colour.RED
    by_key: dict[str, int] = {}


RICH = Order(
    id=UUID(int=1),
    lines=(Line("a", Decimal("1.10"), datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)),),
    tags=frozenset("xyz"),
    by_key={"b": 1, "a": 2},
)


@pytest.mark.parametrize(
    ("annotation", "initial", "state"),
    [
        (Order, Order(), RICH),
        (Order | None, None, RICH),
        (Line, RICH.lines[0], RICH.lines[0]),
        (int, 0, 10**30),
        (dict[str, int], {}, {"ä": -1}),
        (tuple[int, str], (0, ""), (1, "\x00")),
    ],
)
def test_states_come_back_as_they_were(annotation: Any, initial: Any, state: Any) -> None:
    codec = StateCodec(annotation, initial=initial, version=1)
    assert codec.load(codec.dump(state)) == state
    assert codec.load(codec.dump(initial)) == initial


class Aliased(BaseModel, frozen=True):
    count: int = Field(default=0, alias="n")


class Hidden(BaseModel, frozen=True):
    count: int = Field(default=0, exclude=True)


class Loose(BaseModel, frozen=True):
    found: Any = None


class Opaque: ...


def test_an_alias_is_no_obstacle() -> None:
    codec = StateCodec(Aliased, initial=Aliased(), version=1)
    assert codec.load(codec.dump(Aliased(n=3))) == Aliased(n=3)


@pytest.mark.parametrize(
    ("annotation", "initial"),
    [(Opaque, Opaque()), (Hidden, Hidden(count=3)), (Loose, Loose(found=datetime.now(UTC))), (int, "text")],
    ids=["a class of its own", "a field left out", "a field of any type", "not what it says"],
)
def test_a_state_that_does_not_come_back_is_unfit(annotation: Any, initial: Any) -> None:
    with pytest.raises(UnfitState):
        StateCodec(annotation, initial=initial, version=1)


def test_a_state_that_only_looks_the_same_is_unfit() -> None:
    """True == 1, and a model equals no dataclass."""
    codec = StateCodec[Any](int, initial=0, version=1)
    with pytest.raises(UnfitState, match=r"comes back from JSON as|cannot be stored"):
        codec.dump(True)


def test_bytes_that_are_no_such_state_are_unreadable() -> None:
    codec = StateCodec(Order, initial=Order(), version=1)
    for wrong in (b"", b"{", b"[]", b'{"lines": 3}', b"\xff"):
        with pytest.raises(UnreadableSnapshot):
            codec.load(wrong)


def schema(of: Any, version: int = 1, **initial: Any) -> str:
    return StateCodec[Any](of, initial=of(**initial), version=version).schema


def shape(name: str, doc: str = "", **columns: Any) -> Any:
    """A model class; its words for people differ, its name does not."""
    made: Any = create_model(name, __doc__=doc, __config__=ConfigDict(frozen=True), **columns)
    return made


def test_the_schema_changes_with_version_shape_and_initial_state_and_with_nothing_else() -> None:
    first = shape("Total", n=(int, 0), m=(str, ""))
    same = shape("Total", "Other words.", m=(str, Field(default="", description="more words")), n=(int, 0))
    wider = shape("Total", n=(int, 0), m=(str | None, ""))
    more = shape("Total", n=(int, 0), m=(str, ""), title=(str, ""))

    assert schema(first) == schema(same)
    assert len({schema(first), schema(first, 2), schema(first, n=1), schema(wider), schema(more)}) == 5


def test_the_order_of_a_set_in_the_initial_state_is_not_part_of_the_schema() -> None:
    """It differs from process to process."""
    assert schema(Order, tags=frozenset("abcdef")) == schema(Order, tags=frozenset("fedcba"))
    codec = StateCodec(list[str], initial=["b", "a"], version=1)
    assert codec.schema == StateCodec(list[str], initial=["a", "b"], version=1).schema


@pytest.mark.parametrize(
    ("policy", "events", "load_s", "due"),
    [
        (Snapshots(every=200), 199, 0.0, False),
        (Snapshots(every=200), 200, 0.0, True),
        (Snapshots(load_ms=2), 50, 0.0019, False),
        (Snapshots(load_ms=2), 50, 0.002, True),
        (Snapshots(load_ms=2), 9, 9.0, False),
        (Snapshots(every=None, load_ms=2), 10_000, 0.0, False),
        (Snapshots(every=None, load_ms=None), 10_000, 9.0, False),
        (Snapshots(every=1, load_ms=None), 1, 0.0, True),
        (Snapshots(every=1, load_ms=None), 0, 0.0, False),
    ],
)
def test_a_snapshot_is_due_after_so_many_events_or_a_slow_load(
    policy: Snapshots, events: int, load_s: float, due: bool
) -> None:
    assert policy.due(events=events, load_s=load_s) is due


@pytest.mark.parametrize("options", [{"every": 0}, {"load_ms": -1}])
def test_a_policy_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        Snapshots(**options)


class Plain(BaseModel):
    n: int = 0


@dataclass
class Open:
    n: int = 0


@dataclass(frozen=True)
class Holder:
    held: Any = field(default=())


@pytest.mark.parametrize(
    ("state", "value"),
    [
        (3, True), ("x", True), (None, True), (Colour.RED, True), ((1, ("x", frozenset([2]))), True),
        (Holder(Holder(RICH.lines)), True), (Loose(found=(1,)), True),
        ([], False), ({}, False), (set[int](), False), (Opaque(), False), (Plain(), False), (Open(), False),
        ((1, list[int]()), False), (Holder([1]), False), (Loose(found={"a": 1}), False), (RICH, False),
    ],
)  # fmt: skip
def test_a_value_is_what_nobody_can_change_in_place(state: Any, value: bool) -> None:
    assert is_value(state) is value
    other: object = unshared(state)
    assert (other is state) is value
    assert other == state or isinstance(state, Opaque)


class Counted(Event, type="shop.counted.v1"):
    id: Key[str]


class Count(Command[None], type="shop.count.v1"):
    id: Key[str]


def decide(state: Any, command: Count) -> list[Counted]:
    return [Counted(id=command.id)]


def of_opaque(state: Opaque, event: Counted) -> Opaque:
    return state


def of_anything(state: Any, event: Counted) -> Any:
    return state


def maybe(state: Order | None, event: Counted) -> Order | None:
    return state


def test_a_policy_for_a_state_that_cannot_be_stored_is_refused_where_it_is_given() -> None:
    with pytest.raises(BadDecider, match="decider 'c' cannot have snapshots="):
        Decider("c", initial=Opaque(), evolve=of_opaque, decide=decide, snapshots=Snapshots())
    assert Decider("c", initial=Opaque(), evolve=of_opaque, decide=decide, snapshots=None).snapshots is None
    assert Decider("c", initial=Opaque(), evolve=of_opaque, decide=decide).snapshots == Snapshots()


def test_the_states_type_is_what_evolve_says_or_else_the_initial_states() -> None:
    assert Decider("c", initial=None, evolve=maybe, decide=decide).state_codec().dump(RICH)
    anything = Decider("c", initial=Order(), evolve=of_anything, decide=decide).state_codec()
    assert anything.load(anything.dump(RICH)) == RICH
    with pytest.raises(UnfitState):
        Decider("c", initial=Opaque(), evolve=of_anything, decide=decide).state_codec()


def test_each_stream_has_an_initial_state_of_its_own_if_it_can_be_changed() -> None:
    changed = Decider("c", initial={"n": 0}, evolve=of_anything, decide=decide)
    changed.fresh()["n"] = 7
    assert changed.fresh() == {"n": 0}
    kept = Decider("c", initial=Order(), evolve=of_anything, decide=decide)
    assert kept.fresh() == kept.initial
