"""Frozen values that are made by the dozen for every message.

`dataclass(frozen=True)` sets each field by a call of `object.__setattr__`: an envelope's 22 fields cost ten times what
plain assignments would, which was an eighth of a worker's whole CPU time (benchmarks/README.md). Here the new object is
of a twin class that may be assigned to while `__init__` runs, and of its own class before anybody sees it.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, TypeVar

T = TypeVar("T")


def quick(cls: type[T]) -> type[T]:
    """Give a frozen dataclass with slots (and without `__post_init__`) a fast `__init__` of the same signature. It is
    as frozen as before. Raises TypeError for a class that is not of this kind."""
    parameters: Any = getattr(cls, "__dataclass_params__", None)
    if parameters is None or not parameters.frozen or "__slots__" not in cls.__dict__:
        raise TypeError(f"{cls.__qualname__} is no frozen dataclass with slots")
    if hasattr(cls, "__post_init__"):
        raise TypeError(f"{cls.__qualname__} has a __post_init__, wanted none")
    own: Any = cls
    draft = type(
        cls.__name__,
        (cls,),
        # Both: with one of them alone each assignment would still be looked up and called.
        {"__slots__": (), "__setattr__": object.__setattr__, "__delattr__": object.__delattr__},
    )
    known: dict[str, Any] = {"_draft": draft, "_own": own, "_become": object.__setattr__, "_absent": MISSING}
    signature: list[str] = []
    body = ["_become(self, '__class__', _draft)"]
    for one in fields(own):
        if not one.init or one.kw_only:
            raise TypeError(f"{cls.__qualname__}.{one.name} is left out of __init__ or keyword-only, wanted neither")
        value = one.name
        if one.default is not MISSING:
            known[f"_default_{one.name}"] = one.default
            signature.append(f"{one.name}=_default_{one.name}")
        elif one.default_factory is not MISSING:
            known[f"_make_{one.name}"] = one.default_factory
            signature.append(f"{one.name}=_absent")
            value = f"_make_{one.name}() if {one.name} is _absent else {one.name}"
        else:
            signature.append(one.name)
        body.append(f"self.{one.name} = {value}")
    body.append("self.__class__ = _own")
    # As `dataclass` makes its own: the source is of field names alone, which are identifiers.
    exec(f"def __init__(self, {', '.join(signature)}):\n  " + "\n  ".join(body), known)
    made: Any = known["__init__"]
    made.__qualname__ = f"{cls.__qualname__}.__init__"
    made.__module__, made.__annotations__ = cls.__module__, own.__init__.__annotations__
    own.__init__ = made
    return cls
