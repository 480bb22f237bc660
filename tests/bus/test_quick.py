"""The fast `__init__` makes the same values, as frozen, and nobody sees the twin class."""

import copy
import inspect
import pickle
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from typing import Any
from uuid import uuid4

import pytest

from bus.envelope import Envelope, Origin
from bus.quick import quick
from bus.transport import Delivery, Outgoing
from eventstore.port import Claim, Outcome, Unit


@dataclass(frozen=True, slots=True)
class Slow:
    name: str
    count: int = 3
    extra: Mapping[str, int] = field(default_factory=dict[str, int])


@quick
@dataclass(frozen=True, slots=True)
class Fast:
    name: str
    count: int = 3
    extra: Mapping[str, int] = field(default_factory=dict[str, int])


def test_takes_the_same_arguments() -> None:
    assert inspect.signature(Fast).parameters.keys() == inspect.signature(Slow).parameters.keys()
    assert [getattr(Fast("a"), one.name) for one in fields(Fast)] == ["a", 3, {}]
    assert Fast("a", extra={"b": 1}, count=0) == Fast("a", 0, {"b": 1}) != Fast("a", 0)
    wrong: tuple[Any, ...]
    for wrong in ((), ("a", 1, {}, 2)):
        with pytest.raises(TypeError, match="argument"):
            Fast(*wrong)
    with pytest.raises(TypeError, match="colour"):
        Fast("a", colour="red")  # type: ignore[call-arg]


def test_makes_a_new_default_each_time() -> None:
    assert Fast("a").extra is not Fast("b").extra


@pytest.mark.parametrize(
    "made", [Fast("a"), replace(Fast("b"), name="a"), copy.copy(Fast("a")), pickle.loads(pickle.dumps(Fast("a")))]
)
def test_is_of_its_own_class_and_frozen(made: Fast) -> None:
    assert type(made) is Fast
    assert made == Fast("a")
    assert repr(made) == "Fast(name='a', count=3, extra={})"
    with pytest.raises(FrozenInstanceError):
        made.name = "b"  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        del made.name
    assert made.name == "a"


@pytest.mark.parametrize("kind", [Envelope, Origin, Delivery, Outgoing, Claim, Unit, Outcome])
def test_what_is_made_for_every_message_is_frozen(kind: type) -> None:
    given = {name: uuid4() for name in inspect.signature(kind).parameters}
    made = kind(**given)
    assert type(made) is kind
    assert {name: getattr(made, name) for name in given} == given
    with pytest.raises(FrozenInstanceError):
        setattr(made, next(iter(given)), None)


def test_refuses_a_class_of_another_kind() -> None:
    @dataclass(slots=True)
    class Thawed:
        name: str

    @dataclass(frozen=True)
    class Slotless:
        name: str

    @dataclass(frozen=True, slots=True)
    class Checked:
        name: str

        def __post_init__(self) -> None:
            assert self.name

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Named:
        name: str

    for kind in (Thawed, Slotless, Checked, Named, int):
        with pytest.raises(TypeError):
            quick(kind)
