"""Messages: what users write. Frozen pydantic models with a hand-chosen type name and exactly one key.

A type name is `<service>.<name>.v<version>`, for example `orders.order-placed.v1`. Its first segment names the owning
service and so its topic. Nothing here knows bytes or brokers: see `codec.py` for those.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Generic, TypeVar, Unpack, cast
from uuid import UUID

from pydantic import BaseModel, ConfigDict, JsonValue, RootModel

from bus.errors import BadMessageClass

T = TypeVar("T")
R_co = TypeVar("R_co", covariant=True)

_GRAMMAR = re.compile(
    r"(?P<service>[a-z][a-z0-9-]*)\.(?P<name>[a-z][a-z0-9-]*(?:\.[a-z][a-z0-9-]*)*)\.v(?P<version>[1-9][0-9]*)"
)


class _KeyMark:
    def __repr__(self) -> str:
        return "Key"


_KEY = _KeyMark()

Key = Annotated[T, _KEY]
"""Marks the one field whose value is the stream's id, the topic's key and the unit of order: `order_id: Key[str]`.

The value may be a `str`, an `int` or a `UUID`; on the wire it is its text. An empty key is refused when the message
is encoded.
"""


@dataclass(frozen=True, slots=True)
class TypeName:
    """`orders.order-placed.v1`, taken apart. `base` is the name without the version."""

    service: str
    name: str
    version: int

    @classmethod
    def parse(cls, text: str) -> TypeName:
        """Raises BadMessageClass when `text` is not `<service>.<name>.v<version>`."""
        found = _GRAMMAR.fullmatch(text)
        if found is None:
            raise BadMessageClass(
                f"{text!r} is no type name; wanted <service>.<name>.v<version> in lower case, "
                "for example 'orders.order-placed.v1'"
            )
        return cls(found["service"], found["name"], int(found["version"]))

    @property
    def base(self) -> str:
        return f"{self.service}.{self.name}"

    def __str__(self) -> str:
        return f"{self.base}.v{self.version}"


class Message(BaseModel):
    """Root of commands, events and queries. Unknown fields are ignored, so that a producer may add some."""

    model_config = ConfigDict(frozen=True)

    type_name: ClassVar[TypeName]
    key_field: ClassVar[str]

    def __init_subclass__(cls, *, type: str | None = None, **config: Unpack[ConfigDict]) -> None:
        super().__init_subclass__(**config)  # what `type` means is settled below, once the fields are known

    @classmethod
    def __pydantic_init_subclass__(cls, *, type: str | None = None, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        if type is None:  # an abstract base, or Command[R] on its way to becoming one
            return
        cls.type_name = TypeName.parse(type)
        keys = [name for name, field in cls.model_fields.items() if any(mark is _KEY for mark in field.metadata)]
        if len(keys) != 1:
            found = "none" if not keys else " and ".join(keys)
            raise BadMessageClass(
                f"{cls.__qualname__} ({type}) has {found} marked as Key; wanted exactly one field, "
                "for example `order_id: Key[str]`"
            )
        cls.key_field = keys[0]

    @property
    def key(self) -> str:
        """The key as text."""
        return str(getattr(self, self.key_field))


class Command(Message, Generic[R_co]):
    """A wish addressed to the service that owns its type. `Command[R]` is answered with an R,
    `Command[None]` with None."""

    @classmethod
    def reply_type(cls) -> type[BaseModel] | None:
        """The R of `Command[R]`; None for `Command[None]`."""
        return cast("type[BaseModel] | None", _generic_argument(cls, Command))


class Query(Message, Generic[R_co]):
    """A question to the service that owns its type; asking changes nothing. `Query[R]` is answered with an R: a model,
    or anything that pydantic can write and read, such as `OrderSummary | None` or `list[OrderSummary]`."""

    _answers: ClassVar[type[BaseModel] | None] = None

    @classmethod
    def answer_type(cls) -> object:
        """The R of `Query[R]`, as it was written."""
        return _generic_argument(cls, Query)

    @classmethod
    def reply_type(cls) -> type[BaseModel]:
        """What is on the wire: R itself when that is a model, else a `RootModel` around it."""
        found: type[BaseModel] | None = cls.__dict__.get("_answers")
        if found is None:
            wanted: Any = cls.answer_type()
            found = cast("type[BaseModel]", RootModel[wanted] if cls.wrapped() else wanted)
            cls._answers = found
        return found

    @classmethod
    def wrapped(cls) -> bool:
        """Is R no model by itself?"""
        wanted = cls.answer_type()
        return not (isinstance(wanted, type) and issubclass(wanted, BaseModel))


class Event(Message):
    """A fact. Public events are published on the service's `.events` topic; `public=False` keeps one in the store.

    `topic="legacy.customers"` names a foreign topic on which events of this type arrive; such an event is never
    decided here. With `deletes=True` it stands for the records of that topic that have no value: its topic is declared
    compacted in the Service, and all that is known of what was deleted is its key.
    """

    public: ClassVar[bool] = True
    foreign_topic: ClassVar[str | None] = None
    deletes: ClassVar[bool] = False

    def __init_subclass__(
        cls,
        *,
        type: str | None = None,
        public: bool = True,
        topic: str | None = None,
        deletes: bool = False,
        **config: Unpack[ConfigDict],
    ) -> None:
        super().__init_subclass__(type=type, **config)

    @classmethod
    def __pydantic_init_subclass__(
        cls,
        *,
        type: str | None = None,
        public: bool = True,
        topic: str | None = None,
        deletes: bool = False,
        **options: Any,
    ) -> None:
        super().__pydantic_init_subclass__(type=type, **options)
        cls.public = public
        cls.foreign_topic = topic
        cls.deletes = deletes
        if deletes:
            wanted = [name for name, one in cls.model_fields.items() if one.is_required() and name != cls.key_field]
            if topic is None or wanted:
                raise BadMessageClass(
                    f"{cls.__qualname__} ({type}) stands for deletes and "
                    + (f"wants {', '.join(wanted)}, which a delete does not say" if wanted else "names no topic=")
                    + "; wanted topic= and a Key field, anything else with a default"
                )


@lru_cache(maxsize=1024)  # asked for every command that is decided
def _generic_argument(cls: type[BaseModel], origin: type[BaseModel]) -> object:
    for base in cls.__mro__:
        meta = getattr(base, "__pydantic_generic_metadata__", None)
        if meta and meta["origin"] is origin:
            argument = meta["args"][0]
            return None if argument is type(None) else argument
    raise BadMessageClass(
        f"{cls.__qualname__} names no reply; wanted {origin.__name__}[Reply] or {origin.__name__}[None]"
    )


class Refused(Exception):
    """A business answer of "no": replied to the caller, never retried. Subclass it once per reason.

    `class AlreadyPlaced(Refused, code="order.already-placed")`. Keyword arguments become JSON attributes that
    travel with the reply; an unknown code arrives as plain `Refused`. Raising one commits claim and reply only.
    """

    code: str = "refused"

    def __init_subclass__(cls, *, code: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if code is not None:
            cls.code = code

    def __init__(self, message: str = "", *, code: str | None = None, **attributes: JsonValue) -> None:
        if code is not None:
            self.code = code
        super().__init__(message or self.code)
        self.message = message or self.code
        self.attributes: Mapping[str, JsonValue] = attributes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Refused) and (self.code, self.message, self.attributes) == (
            other.code,
            other.message,
            other.attributes,
        )

    def __hash__(self) -> int:
        return hash((self.code, self.message))


MessageId = UUID
