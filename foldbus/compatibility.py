"""Two JSON schemas of pydantic models: can a reader of the one read whatever a writer of the other writes?

`findings` names each place where it cannot, or where it loses something. It asks nothing about commands or events: what
a finding means to whom is said in `schema.py`. Where it does not know a keyword it takes any difference for a finding.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import DecimalSchema

Schema = Mapping[str, Any]
What = Literal["missing", "unread", "refused", "type", "value", "bound", "form", "default"]

_SAID_ONLY = frozenset(("title", "description", "examples", "deprecated", "readOnly", "writeOnly", "$comment"))
_NAMED = ("properties", "patternProperties", "$defs")
_KNOWN = frozenset(
    (
        *("type", "enum", "const", "default", "anyOf", "oneOf", "discriminator", "$ref", "$defs"),
        *("properties", "required", "additionalProperties", "items", "prefixItems"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength"),
        *("minItems", "maxItems", "minProperties", "maxProperties", "uniqueItems"),
    )
)
_LEAST, _MOST = ("minLength", "minItems", "minProperties"), ("maxLength", "maxItems", "maxProperties")


@dataclass(frozen=True, slots=True)
class Finding:
    """At `path` (`lines[].sku`; empty: the message itself) the writer writes `written` and the reader takes `read`.

    `missing`: the reader must have a field that may not be there. `unread`: it ignores one that is. `refused`: it
    refuses one that it does not know. `type`, `value`, `bound`, `form` (a format, a pattern): it does not take them.
    `default`: what it puts for an absent field is something else.
    """

    what: What
    path: str
    written: str
    read: str


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The normal schema of what a class reads. Raises PydanticInvalidForJsonSchema."""
    return normal(model.model_json_schema(schema_generator=_Generator))


class _Generator(GenerateJsonSchema):
    def decimal_schema(self, schema: DecimalSchema) -> JsonSchemaValue:
        """Told from `float | str`, and the same in all versions of pydantic, of which some give it a pattern."""
        made = super().decimal_schema(schema)
        for one in made.get("anyOf", (made,)):
            if one.get("type") == "string":
                one.pop("pattern", None)
                one["format"] = "decimal"
        return made


def normal(schema: Schema) -> dict[str, Any]:
    """The same schema without what only people read, in an order of its own: two that mean the same are equal.
    References are resolved; the names of nested classes remain only where a class contains itself."""
    definitions: Mapping[str, Schema] = schema.get("$defs", {})
    recursive: dict[str, str] = {}
    kept: dict[str, Any] = {}

    def walk(found: Any, inside: tuple[str, ...]) -> Any:
        if isinstance(found, list):
            return [walk(one, inside) for one in found]  # pyright: ignore[reportUnknownVariableType]
        if not isinstance(found, dict):
            return found
        part = cast("dict[str, Any]", found)
        if "$ref" in part:
            name = str(part["$ref"]).rpartition("/")[2]
            beside = {key: value for key, value in part.items() if key != "$ref"}
            if name in recursive or name in inside:
                new = recursive.setdefault(name, f"recursive-{len(recursive) + 1}")
                if new not in kept and name not in inside:
                    kept[new] = walk(definitions[name], (*inside, name))
                return {"$ref": f"#/$defs/{new}", **walk(beside, inside)}
            body = walk(definitions[name], (*inside, name))
            if name in recursive:
                kept[recursive[name]] = body
                body = {"$ref": f"#/$defs/{recursive[name]}"}
            return {**body, **walk(beside, inside)}
        made: dict[str, Any] = {}
        for key, value in part.items():
            if key in _SAID_ONLY or key == "$defs":
                continue
            if key in _NAMED:
                made[key] = {name: walk(one, inside) for name, one in value.items()}
            elif key in ("default", "const", "enum"):
                made[key] = value
            elif key == "discriminator":
                made[key] = {"propertyName": value["propertyName"]}
            else:
                made[key] = walk(value, inside)
        return _in_order(made)

    made = cast("dict[str, Any]", walk(dict(schema), ()))
    return {**made, "$defs": kept} if kept else made


def _in_order(made: dict[str, Any]) -> dict[str, Any]:
    for key in ("required", "enum", "anyOf", "oneOf"):
        if key in made:
            made[key] = sorted(made[key], key=_text)
    return made


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def findings(writer: Schema, reader: Schema, *, writes_all: bool = False) -> list[Finding]:
    """Both normal. `writes_all`: the writer writes every field it has, also those with defaults, as our codec does;
    without it anything that the schema allows may come."""
    return _Comparison(writer.get("$defs", {}), reader.get("$defs", {}), writes_all).of(writer, reader, "")


class _Comparison:
    def __init__(self, writers: Mapping[str, Schema], readers: Mapping[str, Schema], writes_all: bool) -> None:
        self._writers, self._readers, self._writes_all = writers, readers, writes_all
        self._under_way: set[tuple[str, str]] = set()

    def of(self, writer: Schema, reader: Schema, path: str) -> list[Finding]:
        if not self._writers or not self._readers:  # nothing contains itself
            return self._branches(_branches(writer, self._writers), _branches(reader, self._readers), path)
        pair = (_text(writer), _text(reader))
        if pair in self._under_way:
            return []
        self._under_way.add(pair)
        try:
            return self._branches(_branches(writer, self._writers), _branches(reader, self._readers), path)
        finally:
            self._under_way.discard(pair)

    def _branches(self, written: Sequence[Schema], read: Sequence[Schema], path: str) -> list[Finding]:
        if any(_is_anything(one) for one in read):
            return []
        found: list[Finding] = []
        for one in written:
            if "enum" in one:
                lost = [value for value in one["enum"] if not any(_fits(value, other) for other in read)]
                if lost:
                    what: What = "value" if any("enum" in other for other in read) else "type"
                    found.append(Finding(what, path, _values(lost), told(read)))
                continue
            tried: list[list[Finding]] = [self._one(one, other, path) for other in read if _same_type(one, other)]
            if not tried:
                found.append(Finding("type", path, told([one]), told(read)))
            else:
                # Of several it may have been meant for, the one that agrees best; with a tag, that one.
                best: list[Finding] = min(tried, key=_distance)
                found += best
        return found

    def _one(self, writer: Schema, reader: Schema, path: str) -> list[Finding]:
        found: list[Finding] = []
        match reader["type"]:
            case "object":
                found += self._object(writer, reader, path)
            case "array":
                found += self._array(writer, reader, path)
            case _:
                pass
        if any(_tighter(key, writer, reader) for key in (*_LEAST, *_MOST, "lower", "upper", "uniqueItems")):
            found.append(Finding("bound", path, told([writer], bounds=True), told([reader], bounds=True)))
        for key in sorted(reader.keys() - _KNOWN):
            if writer.get(key) != reader[key]:
                said = f"{key} {writer[key]}" if key in writer else f"no {key}"
                found.append(
                    Finding("form", path, f"{told([writer])}, {said}", f"{told([reader])}, {key} {reader[key]}")
                )
        return found

    def _object(self, writer: Schema, reader: Schema, path: str) -> list[Finding]:
        found: list[Finding] = []
        written: Mapping[str, Schema] = writer.get("properties", {})
        read: Mapping[str, Schema] = reader.get("properties", {})
        others = reader.get("additionalProperties", True)
        for name, schema in written.items():
            where = f"{path}.{name}" if path else name
            if name in read:
                found += self.of(schema, read[name], where)
                if {name} - {*writer.get("required", ()), *reader.get("required", ())}:
                    before, after = (_text(one.get("default")) for one in (schema, read[name]))
                    if before != after:
                        found.append(Finding("default", where, before, after))
            elif isinstance(others, Mapping):
                found += self.of(schema, cast("Schema", others), where)
            elif others is False:
                found.append(Finding("refused", where, told([schema], self._writers), "no further fields"))
            else:
                found.append(Finding("unread", where, told([schema], self._writers), "absent"))
        there = written.keys() if self._writes_all else set(writer.get("required", ()))
        for name in sorted(set(reader.get("required", ())) - set(there)):
            where = f"{path}.{name}" if path else name
            before = "optional" if name in written else "absent"
            found.append(Finding("missing", where, before, f"required {told([read[name]], self._readers)}"))
        more = writer.get("additionalProperties")
        if isinstance(more, Mapping):
            if isinstance(others, Mapping):
                found += self.of(cast("Schema", more), cast("Schema", others), f"{path}{{}}")
            elif others is False:
                found.append(Finding("refused", f"{path}{{}}", told([cast("Schema", more)]), "no further fields"))
        return found

    def _array(self, writer: Schema, reader: Schema, path: str) -> list[Finding]:
        wrote, reads = writer.get("prefixItems", ()), reader.get("prefixItems", ())
        found: list[Finding] = []
        for place in range(max(len(wrote), len(reads))):
            one = wrote[place] if place < len(wrote) else writer.get("items", {} if not wrote else None)
            other = reads[place] if place < len(reads) else reader.get("items", {} if not reads else None)
            if one is not None and other is not None:
                found += self.of(one, other, f"{path}[{place}]")
        if not wrote and not reads:
            found += self.of(writer.get("items", {}), reader.get("items", {}), f"{path}[]")
        return found


def _distance(found: Sequence[Finding]) -> tuple[bool, int]:
    return any(one.what == "value" for one in found), len(found)


def _branches(schema: Schema, definitions: Mapping[str, Schema]) -> list[Schema]:
    """The ways in which a value may fit; all plain values together are one."""
    found: list[Schema] = []
    waiting: list[Schema] = [schema]
    values: list[Any] = []
    while waiting:
        one = waiting.pop(0)
        if "$ref" in one:
            waiting.append(definitions[str(one["$ref"]).rpartition("/")[2]])
        elif "anyOf" in one or "oneOf" in one:
            waiting += [*one.get("anyOf", ()), *one.get("oneOf", ())]
        elif "const" in one or "enum" in one:
            values += one.get("enum", [one["const"]] if "const" in one else [])
        elif one.get("type") == "null":
            values.append(None)
        else:
            found.append(one)
    return [*found, {"enum": values}] if values else found


def _is_anything(one: Schema) -> bool:
    return not (one.keys() - {"default"})


def _same_type(writer: Schema, reader: Schema) -> bool:
    if "type" not in reader or "type" not in writer:
        return False
    return writer["type"] == reader["type"] or (writer["type"], reader["type"]) == ("integer", "number")


_PYTHON: Mapping[str, type | tuple[type, ...]] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict,
}  # fmt: skip


def _fits(value: Any, reader: Schema) -> bool:
    if "enum" in reader:
        return any(type(value) is type(one) and value == one for one in reader["enum"])
    if _is_anything(reader):
        return True
    kind = str(reader.get("type"))
    if kind not in _PYTHON or not isinstance(value, _PYTHON[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return False
    if reader.keys() - _KNOWN:
        return False  # a format or a pattern: whether it has that is not looked at
    if isinstance(value, str):
        return bool(reader.get("minLength", 0) <= len(value) <= reader.get("maxLength", len(value)))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        (least, open_below), (most, open_above) = _lower(reader), _upper(reader)
        return (value > least if open_below else value >= least) and (value < most if open_above else value <= most)
    return True


def _lower(one: Schema) -> tuple[float, bool]:
    closed, opened = one.get("minimum", float("-inf")), one.get("exclusiveMinimum", float("-inf"))
    return (opened, True) if opened >= closed and "exclusiveMinimum" in one else (closed, False)


def _upper(one: Schema) -> tuple[float, bool]:
    closed, opened = one.get("maximum", float("inf")), one.get("exclusiveMaximum", float("inf"))
    return (opened, True) if opened <= closed and "exclusiveMaximum" in one else (closed, False)


def _tighter(key: str, writer: Schema, reader: Schema) -> bool:
    if key == "lower":
        return _lower(reader) > _lower(writer)
    if key == "upper":
        (most, opened), (before, was_open) = _upper(reader), _upper(writer)
        return most < before or (most == before and opened and not was_open)
    if key == "uniqueItems":
        return bool(reader.get(key)) and not writer.get(key)
    if key in _LEAST:
        return bool(reader.get(key, 0) > writer.get(key, 0))
    return bool(reader.get(key, float("inf")) < writer.get(key, float("inf")))


# --- in words --------------------------------------------------------------------------------------------------------


def told(schemas: Iterable[Schema], definitions: Mapping[str, Schema] | None = None, *, bounds: bool = False) -> str:
    """`integer | null`, `list of string`, `one of 'a', 'b'`."""
    each = [one for schema in schemas for one in (_branches(schema, definitions) if definitions else [schema])]
    return " | ".join(dict.fromkeys(_told(one) + (_bounds(one) if bounds else "") for one in each))


def _told(one: Schema) -> str:
    if "$ref" in one:
        return "object"
    if "anyOf" in one or "oneOf" in one:
        return told((*one.get("anyOf", ()), *one.get("oneOf", ())))
    if "enum" in one:
        return "null" if one["enum"] == [None] else _values(one["enum"])
    match one.get("type"):
        case None:
            return "anything"
        case "array" if "items" in one:
            return f"list of {_told(one['items'])}"
        case "array" if "prefixItems" in one:
            return f"({', '.join(_told(each) for each in one['prefixItems'])})"
        case "array":
            return "list"
        case "object" if isinstance(one.get("additionalProperties"), Mapping):
            return f"map of {_told(one['additionalProperties'])}"
        case "string" if "format" in one:
            return f"string ({one['format']})"
        case kind:
            return str(kind)


def _values(values: Iterable[Any]) -> str:
    listed = list(values)
    return ("one of " if len(listed) > 1 else "") + ", ".join(_text(value) for value in listed)


def _bounds(one: Schema) -> str:
    keys = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", *_LEAST, *_MOST, "uniqueItems")
    said = [f"{key} {one[key]}" for key in keys if key in one]
    return f" ({', '.join(said)})" if said else " (unbounded)"
