"""The type registry: which classes a service names, and what becomes of older types. Built from explicit lists;
nothing is looked up by import path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from bus.errors import BadMessageClass, UnknownType, UnknownVersion
from bus.messages import Message, Refused, TypeName
from bus.upcasting import Upcaster, Upcasting

M = TypeVar("M", bound=Message)


class Registry:
    """Type name to class, refusal code to class, older type to `upcasting`. Raises BadMessageClass when two classes
    claim one name, BadUpcaster."""

    def __init__(
        self,
        messages: Iterable[type[Message]] = (),
        refusals: Iterable[type[Refused]] = (),
        upcasters: Iterable[Upcaster] = (),
    ) -> None:
        self.upcasting = Upcasting(upcasters)
        self._types: dict[str, type[Message]] = {}
        self._bases: dict[str, set[int]] = {}
        self._refusals: dict[str, type[Refused]] = {}
        for message in messages:
            self.add(message)
        for refusal in refusals:
            self._refusals[refusal.code] = refusal

    def add(self, message: type[Message]) -> None:
        """A second call with the same class does nothing."""
        service_of(message)
        name = str(message.type_name)
        known = self._types.setdefault(name, message)
        if known is not message:
            raise BadMessageClass(
                f"type {name!r} is claimed by {known.__module__}.{known.__qualname__} "
                f"and {message.__module__}.{message.__qualname__}; a type name belongs to one class"
            )
        self._bases.setdefault(message.type_name.base, set()).add(message.type_name.version)

    def find(self, name: str) -> type[Message]:
        """Raises UnknownVersion when the type is named here in other versions only, else UnknownType."""
        found = self._types.get(name)
        if found is not None:
            return found
        base, _, version = name.rpartition(".v")
        if version.isdigit() and base in self._bases:
            known = ", ".join(f"v{number}" for number in sorted(self._bases[base]))
            raise UnknownVersion(f"type {name!r}: version v{version} is unknown here, wanted one of {known}")
        raise UnknownType(
            f"type {name!r} is not one that this service names: no decider, saga, projection or handler that it lists "
            "does, nor its messages="
        )

    def names_base(self, name: str) -> bool:
        """Is `name`, in whatever version, a type that is named here?"""
        return name.rpartition(".v")[0] in self._bases

    def refusal(self, code: str) -> type[Refused] | None:
        return self._refusals.get(code)

    @property
    def types(self) -> Mapping[str, type[Message]]:
        return self._types

    def __iter__(self) -> Iterator[type[Message]]:
        return iter(self._types.values())


def service_of(message: type[Message]) -> str:
    """The service that owns a message class. Raises BadMessageClass for a class without a type name."""
    if not hasattr(message, "type_name"):
        raise BadMessageClass(
            f"{message.__qualname__} has no type name; wanted `class {message.__name__}(..., type='service.name.v1')`"
        )
    return message.type_name.service


def type_name(text: str) -> TypeName:
    """The parts of a type name from outside. Raises UnknownType when it is none."""
    try:
        return TypeName.parse(text)
    except BadMessageClass as error:
        raise UnknownType(str(error)) from None
