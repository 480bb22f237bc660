"""From a row model to columns and back, the same values on both databases.

Each field is a column of its own name beside the primary key `key`: text, bigint, double, boolean, timestamptz, date,
uuid and numeric where the annotation says so, JSON text for everything else. What cannot be stored the same way on both
databases (NUL, half a surrogate pair, an int beyond 64 bits, a naive time) raises BadRow before anything is written, so
that one event is to blame and not a whole page. Every row is read back by its model before it is stored: a
`model_copy(update=…)` validates nothing, and what cannot be read again would stop the projection later.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Generic, Literal, Union, get_args, get_origin
from uuid import UUID

from pydantic import BaseModel, PydanticUserError, TypeAdapter, ValidationError

from bus.codec import check_key as _check_wire_key
from bus.codec import explain
from bus.errors import Undecodable
from projections.errors import BadProjection, BadRow, RowUnreadable
from projections.port import Row

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_INT64 = 2**63
_DIGITS_MAX = 1000

Convert = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Column:
    """A field's column. `encode` gives the value that PostgreSQL takes and checks it; `to_sqlite` turns that into what
    SQLite takes, `from_sqlite` back; `decode` gives what the model validates."""

    name: str
    kind: str
    postgres: str
    sqlite: str
    encode: Convert
    to_sqlite: Convert | None = None
    from_sqlite: Convert | None = None
    decode: Convert | None = None


class Columns(Generic[Row]):
    """The columns of one row model. Raises BadProjection when a field cannot be one."""

    def __init__(self, projection: str, model: type[Row]) -> None:
        self.projection, self.model = projection, model
        if model.model_config.get("extra") == "allow":
            raise BadProjection(f"{model.__qualname__} allows extra fields; wanted a column for each, by name")
        lower: set[str] = set()
        for name, field in model.model_fields.items():
            if not _NAME.fullmatch(name) or name.lower() == "key" or name.lower() in lower:
                raise BadProjection(
                    f"{model.__qualname__}.{name} cannot be a column; wanted up to 63 of A-Z, a-z, 0-9 and '_', "
                    "different without regard to case, and not 'key', which is the row's key"
                )
            lower.add(name.lower())
            by_name = model.model_config.get("populate_by_name") or model.model_config.get("validate_by_name")
            if (field.alias or field.validation_alias) and not by_name:
                raise BadProjection(
                    f"{model.__qualname__}.{name} has an alias; columns are named after fields: set populate_by_name"
                )
        self.columns = tuple(_column(name, _annotation(model, name)) for name in model.model_fields)
        self.names = tuple(column.name for column in self.columns)
        self._by_name = {column.name: column for column in self.columns}
        shape = "\n".join(f"{column.name} {column.kind}" for column in self.columns)
        self.shape = hashlib.sha256(shape.encode()).hexdigest()[:16]
        self._encoders = tuple((column.name, column.encode, column.decode) for column in self.columns)
        self._validate = model.__pydantic_validator__.validate_python

    def named(self, name: str) -> str:
        """Raises KeyError when there is no such column."""
        return self._by_name[name].name

    def encode(self, row: Row) -> tuple[Any, ...]:
        """The values of all columns, as PostgreSQL takes them. Raises BadRow."""
        if type(row) is not self.model:
            raise BadRow(f"the fold returned {type(row).__qualname__}, wanted {self.model.__qualname__} or None")
        fields = row.__dict__
        values: list[Any] = []
        back: dict[str, Any] = {}
        name = "?"
        try:
            for name, encode, decode in self._encoders:
                found = fields[name]
                if found is not None:
                    found = encode(found)
                values.append(found)
                back[name] = found if decode is None or found is None else decode(found)
        except Exception as error:  # whatever a serializer of the user's raises belongs to this row
            raise BadRow(f"{self.model.__qualname__}.{name} cannot be stored: {error}") from error
        try:
            self._validate(back)
        except ValidationError as error:
            raise BadRow(f"{self.model.__qualname__} could not be read back: {explain(error)}") from error
        return tuple(values)

    def decode(self, key: str, values: Mapping[str, Any]) -> Row:
        """The row of what PostgreSQL gave, or SQLite after `from_sqlite`. Columns that the model does not know are
        ignored. Raises RowUnreadable."""
        try:
            row: Row = self._validate(
                {
                    name: found if found is None or (decode := self._by_name[name].decode) is None else decode(found)
                    for name, found in values.items()
                    if name in self._by_name
                }
            )
        except ValidationError as error:
            raise RowUnreadable(self.projection, key, explain(error)) from error
        except (ValueError, TypeError) as error:
            raise RowUnreadable(self.projection, key, str(error)) from error
        return row

    def to_sqlite(self, values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(
            found if found is None or column.to_sqlite is None else column.to_sqlite(found)
            for column, found in zip(self.columns, values, strict=True)
        )

    def from_sqlite(self, key: str, values: Mapping[str, Any]) -> Row:
        """Raises RowUnreadable."""
        try:
            plain = {
                name: column.from_sqlite(found)
                if found is not None and (column := self._by_name.get(name)) is not None and column.from_sqlite
                else found
                for name, found in values.items()
            }
        except (ValueError, TypeError, ArithmeticError) as error:
            raise RowUnreadable(self.projection, key, str(error)) from error
        return self.decode(key, plain)


def check_key(key: str) -> None:
    """Raises BadInput for a key that cannot be a primary key on every database."""
    if key.isascii() and 0 < len(key) <= 256 and "\x00" not in key:
        return
    _check_wire_key(key)
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise Undecodable(f"key {key[:40]!r} holds half of a surrogate pair; wanted text") from error


# --- one field -------------------------------------------------------------------------------------------------------


def _annotation(model: type[BaseModel], name: str) -> Any:
    """The field's whole annotation, its constraints and serializers included."""
    field = model.model_fields[name]
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def _bare(annotation: Any) -> Any:
    """Without Annotated, NewType, `type X = …` and `| None`."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif hasattr(annotation, "__supertype__"):
            annotation = annotation.__supertype__
        elif hasattr(annotation, "__value__"):
            annotation = annotation.__value__
        elif get_origin(annotation) in (Union, UnionType):
            members = [member for member in get_args(annotation) if member is not NoneType]
            if len(members) != 1:
                return annotation
            annotation = members[0]
        else:
            return annotation


def _column(name: str, annotation: Any) -> Column:
    bare = _bare(annotation)
    plain = _PLAIN.get(bare) if isinstance(bare, type) else None
    if plain is not None:
        kind, postgres, sqlite, encode, to_sqlite, from_sqlite = plain
        return Column(name, kind, postgres, sqlite, encode, to_sqlite, from_sqlite)
    if isinstance(bare, type) and issubclass(bare, Enum) and issubclass(bare, str):
        return Column(name, "text", "text", "TEXT", _enum, decode=bare)
    if get_origin(bare) is Literal and all(type(one) is str for one in get_args(bare)):
        return Column(name, "text", "text", "TEXT", _text)
    try:
        adapter = TypeAdapter[Any](annotation)
    except PydanticUserError as error:
        raise BadProjection(f"field {name!r} ({annotation}) cannot be JSON: {error}") from error
    return Column(
        name, "json", "text", "TEXT", lambda found: adapter.dump_json(found).decode(), decode=adapter.validate_json
    )


def _text(found: Any) -> str:
    if not isinstance(found, str):
        raise TypeError(f"found {found!r:.80}, wanted text")
    if "\x00" in found:
        raise ValueError("found text with a NUL, which PostgreSQL cannot hold")
    if not found.isascii():
        found.encode()
    return found


def _enum(found: Any) -> str:
    return _text(found.value if isinstance(found, Enum) else found)


def _int(found: Any) -> int:
    if not isinstance(found, int) or isinstance(found, bool):
        raise TypeError(f"found {found!r:.80}, wanted a whole number")
    if not -_INT64 <= found < _INT64:
        raise ValueError(f"found {found!r:.80}, wanted a number of 64 bits")
    return found


def _float(found: Any) -> float:
    return float(found)


def _bool(found: Any) -> bool:
    if not isinstance(found, bool):
        raise TypeError(f"found {found!r:.80}, wanted True or False")
    return found


def _datetime(found: Any) -> datetime:
    if not isinstance(found, datetime) or found.tzinfo is None:
        raise TypeError(f"found {found!r:.80}, wanted a time with a time zone")
    return found if found.tzinfo is UTC else found.astimezone(UTC)


def _date(found: Any) -> date:
    if not isinstance(found, date) or isinstance(found, datetime):
        raise TypeError(f"found {found!r:.80}, wanted a date")
    return found


def _uuid(found: Any) -> UUID:
    return found if type(found) is UUID else UUID(str(found))


def _decimal(found: Any) -> Decimal:
    if not isinstance(found, Decimal) or not found.is_finite() or abs(found.adjusted()) > _DIGITS_MAX:
        raise ValueError(f"found {found!r:.80}, wanted a finite Decimal of at most {_DIGITS_MAX} digits")
    return found


def _float_to_sqlite(found: float) -> float | str:
    return found if found == found else "NaN"  # SQLite would keep NULL instead


def _micros(found: datetime) -> str:
    return found.isoformat(timespec="microseconds")  # of one length, so that text sorts as time does


_PLAIN: dict[type, tuple[str, str, str, Convert, Convert | None, Convert | None]] = {
    str: ("text", "text", "TEXT", _text, None, None),
    bool: ("boolean", "boolean", "INTEGER", _bool, int, bool),
    int: ("bigint", "bigint", "INTEGER", _int, None, None),
    float: ("double", "double precision", "REAL", _float, _float_to_sqlite, float),
    datetime: ("instant", "timestamptz", "TEXT", _datetime, _micros, datetime.fromisoformat),
    date: ("date", "date", "TEXT", _date, date.isoformat, date.fromisoformat),
    UUID: ("uuid", "uuid", "TEXT", _uuid, str, UUID),
    Decimal: ("numeric", "numeric", "TEXT", _decimal, str, Decimal),
}

__all__ = ["Column", "Columns", "check_key"]
