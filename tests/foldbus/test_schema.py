"""The schema file: every rule in a table, a property that no table has, and the command that keeps the file."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from foldbus import Command, Event, Key, Service, drop_event, upcast
from foldbus.compatibility import findings, schema_of
from foldbus.schema import BadSchema, Change, compare, document, load, save
from tests.docs.blocks import ROOT
from tests.foldbus.desk import cli

Fields = Mapping[str, Any]
CENTS: Fields = {"cents": (int, ...)}


class Line(BaseModel):
    sku: str
    count: int


class LineWithNote(Line):
    note: str


class Tree(BaseModel):
    name: str
    below: list[Tree] = []
    other: Tree | None = None


class TreeOfNumbers(BaseModel):
    name: int
    below: list[TreeOfNumbers] = []
    other: TreeOfNumbers | None = None


class ByCard(BaseModel):
    how: Literal["card"]
    number: str


class ByCash(BaseModel):
    how: Literal["cash"]


class ByCashWithCoins(BaseModel):
    how: Literal["cash"]
    coins: int


def event(
    fields: Fields, *, public: bool = True, key: str = "order_id", type: str = "orders.placed.v1", **more: Any
) -> Any:
    options: dict[str, Any] = {"type": type, "public": public} | more
    every: dict[str, Any] = {key: (Key[str], ...), **fields}
    return create_model("Placed", __base__=Event, __cls_kwargs__=options, **every)


def command(fields: Fields, *, reply: Any = None, type: str = "orders.place.v1", **more: Any) -> Any:
    every: dict[str, Any] = {"order_id": (Key[str], ...), **fields}
    return create_model("Place", __base__=Command[reply], __cls_kwargs__={"type": type, **more}, **every)


def service(*messages: Any, name: str = "orders", upcasters: Any = ()) -> Service:
    return Service(name, messages=messages, upcasters=upcasters)


def changes(before: Service, now: Service) -> list[Change]:
    """As after a way through the file."""
    old = json.loads(json.dumps(document(before)))
    return compare(old, document(now), service=before.name)


def brief(found: list[Change]) -> list[tuple[str, str]]:
    return [(one.level, one.field) for one in found]


# --- events ----------------------------------------------------------------------------------------------------------

BREAKING, WARNING, NOTE = "breaking", "warning", "note"
CARD = Annotated[ByCard | ByCash, Field(discriminator="how")]
CARD_WITH_COINS = Annotated[ByCard | ByCashWithCoins, Field(discriminator="how")]

PUBLIC_EVENTS: dict[str, tuple[Fields, Fields, list[tuple[str, str]], str]] = {
    "nothing": (CENTS, CENTS, [], ""),
    "a new optional field": (CENTS, {**CENTS, "note": (str, "")}, [(NOTE, "note")], "ignore it"),
    "a new field that may be null": (CENTS, {**CENTS, "note": (str | None, None)}, [(NOTE, "note")], "ignore it"),
    "a new required field": (CENTS, {**CENTS, "note": (str, ...)}, [(BREAKING, "note")], "stored events .* lacks it"),
    "a removed field": ({**CENTS, "note": (str, "")}, CENTS, [(BREAKING, "note")], "not read any more"),
    "a renamed field": (CENTS, {"amount": (int, ...)}, [(BREAKING, "amount"), (BREAKING, "cents")], "lacks it"),
    "a field made optional": (CENTS, {"cents": (int, 0)}, [], ""),
    "a field made required": ({"cents": (int, 0)}, CENTS, [(BREAKING, "cents")], "lacks it"),
    "a changed default": ({"cents": (int, 0)}, {"cents": (int, 1)}, [(WARNING, "cents")], "another value"),
    "a narrower type": ({"cents": (int | str, ...)}, CENTS, [(BREAKING, "cents")], "stored events"),
    "a wider type": (CENTS, {"cents": (int | str, ...)}, [(BREAKING, "cents")], "consumers .* old type only"),
    "a type that may be null": (CENTS, {"cents": (int | None, ...)}, [(BREAKING, "cents")], "consumers"),
    "another type": (CENTS, {"cents": (str, ...)}, [(BREAKING, "cents")], "stored events .*; consumers"),
    "float for int": (CENTS, {"cents": (float, ...)}, [(BREAKING, "cents")], "consumers"),
    "int for float": ({"cents": (float, ...)}, CENTS, [(BREAKING, "cents")], "stored events"),
    "text for an id": ({"u": (UUID, ...)}, {"u": (str, ...)}, [(BREAKING, "u")], "consumers .* old form"),
    "an id for text": ({"u": (str, ...)}, {"u": (UUID, ...)}, [(BREAKING, "u")], "stored events"),
    "text or a number for a decimal": (
        {"d": (Decimal, ...)}, {"d": (float | str, ...)}, [(BREAKING, "d")], "consumers .* old form",
    ),
    "a decimal for one word": (
        {"d": (Literal["a"], ...)}, {"d": (Decimal, ...)}, [(BREAKING, "d")], "stored events",
    ),
    "a value removed": (
        {"s": (Literal["a", "b"], ...)}, {"s": (Literal["a"], ...)}, [(BREAKING, "s")], "stored .* removed",
    ),
    "a value added": (
        {"s": (Literal["a"], ...)}, {"s": (Literal["a", "b"], ...)}, [(WARNING, "s")], "consumers with the old list",
    ),
    "any text for a list of values": (
        {"s": (Literal["a", "b"], ...)}, {"s": (str, ...)}, [(BREAKING, "s")], "consumers .* old type",
    ),
    "a tighter maximum": (
        {"n": (Annotated[int, Field(le=9)], ...)}, {"n": (Annotated[int, Field(le=5)], ...)},
        [(BREAKING, "n")], "stored events .* out of bounds",
    ),
    "a looser maximum": (
        {"n": (Annotated[int, Field(le=5)], ...)}, {"n": (Annotated[int, Field(le=9)], ...)},
        [(WARNING, "n")], "consumers with the old bounds",
    ),
    "a minimum": (CENTS, {"cents": (Annotated[int, Field(ge=1)], ...)}, [(BREAKING, "cents")], "out of bounds"),
    "an exclusive minimum": (
        {"n": (Annotated[int, Field(ge=1)], ...)}, {"n": (Annotated[int, Field(gt=1)], ...)},
        [(BREAKING, "n")], "out of bounds",
    ),
    "a shorter text": (
        {"s": (str, ...)}, {"s": (Annotated[str, Field(max_length=3)], ...)}, [(BREAKING, "s")], "out of bounds",
    ),
    "a pattern": (
        {"s": (str, ...)}, {"s": (Annotated[str, Field(pattern="^a")], ...)}, [(BREAKING, "s")], "old form",
    ),
    "a step": (CENTS, {"cents": (Annotated[int, Field(multiple_of=5)], ...)}, [(BREAKING, "cents")], "old form"),
    "a field within a list": (
        {"lines": (list[Line], ...)}, {"lines": (list[LineWithNote], ...)}, [(BREAKING, "lines[].note")], "lacks it",
    ),
    "a field within a list removed": (
        {"lines": (list[LineWithNote], ...)}, {"lines": (list[Line], ...)},
        [(BREAKING, "lines[].note")], "not read any more",
    ),
    "a longer tuple": (
        {"p": (tuple[int, int], ...)}, {"p": (tuple[int, int, int], ...)}, [(BREAKING, "p")], "out of bounds",
    ),
    "another place of a tuple": (
        {"p": (tuple[int, int], ...)}, {"p": (tuple[int, str], ...)}, [(BREAKING, "p[1]")], "stored events",
    ),
    "a map's values": (
        {"m": (dict[str, int], ...)}, {"m": (dict[str, str], ...)}, [(BREAKING, "m{}")], "stored events",
    ),
    "a set for a list": ({"s": (list[int], ...)}, {"s": (set[int], ...)}, [(BREAKING, "s")], "out of bounds"),
    "a class that contains itself": ({"t": (Tree, ...)}, {"t": (Tree, ...)}, [], ""),
    "within a class that contains itself": (
        {"t": (Tree, ...)}, {"t": (TreeOfNumbers, ...)}, [(BREAKING, "t.name")], "stored events",
    ),
    "within one way of a union": (
        {"by": (CARD, ...)}, {"by": (CARD_WITH_COINS, ...)}, [(BREAKING, "by.coins")], "lacks it",
    ),
    "a way of a union removed": (
        {"by": (CARD, ...)}, {"by": (ByCard, ...)}, [(BREAKING, "by.how"), (BREAKING, "by.number")], "removed one",
    ),
    "anything": ({"x": (Any, ...)}, {"x": (Any, ...)}, [], ""),
    "something for anything": ({"x": (Any, ...)}, {"x": (int, ...)}, [(BREAKING, "x")], "stored events"),
    "only what people read": (
        CENTS, {"cents": (int, Field(title="Price", description="in cents", examples=[3]))}, [], "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC_EVENTS)
def test_a_changed_public_event(name: str) -> None:
    before, now, wanted, why = PUBLIC_EVENTS[name]
    found = changes(service(event(before)), service(event(now)))
    within = [one for one in found if not one.field.startswith("t.below") and not one.field.startswith("t.other")]
    assert sorted(set(brief(within))) == sorted(wanted)
    reasons = " / ".join(one.why for one in found)
    assert bool(why) == bool(found)
    assert re.search(why, reasons), reasons
    assert all(one.way_out for one in found if one.level != NOTE)


@pytest.mark.parametrize(
    ("before", "now", "wanted"),
    [
        (CENTS, {"cents": (int | str, ...)}, [(NOTE, "cents")]),
        ({"s": (Literal["a"], ...)}, {"s": (Literal["a", "b"], ...)}, [(NOTE, "s")]),
        (CENTS, {**CENTS, "note": (str, "")}, [(NOTE, "note")]),
        (CENTS, {}, [(BREAKING, "cents")]),
        (CENTS, {**CENTS, "note": (str, ...)}, [(BREAKING, "note")]),
        ({"cents": (int | str, ...)}, CENTS, [(BREAKING, "cents")]),
    ],
)
def test_a_changed_private_event_breaks_only_what_is_stored(before: Fields, now: Fields, wanted: Any) -> None:
    found = changes(service(event(before, public=False)), service(event(now, public=False)))
    assert brief(found) == wanted
    assert not any("consumers in other" in one.why for one in found)


def test_fields_that_consumers_or_readers_forbid() -> None:
    strict: Any = {"extra": "forbid"}
    found = changes(service(event(CENTS, **strict)), service(event({**CENTS, "note": (str, "")}, **strict)))
    assert [(one.level, one.field, "refuse fields" in one.why) for one in found] == [(BREAKING, "note", True)]
    found = changes(service(event({**CENTS, "note": (str, "")})), service(event(CENTS, **strict)))
    assert (BREAKING, "note") in brief(found)


@pytest.mark.parametrize(
    ("before", "now", "level", "why"),
    [
        (event(CENTS), event(CENTS, key="id"), BREAKING, "the key names the stream"),
        (event(CENTS), event(CENTS, public=False), BREAKING, "consumers in other services get no more"),
        (event(CENTS, public=False), event(CENTS), NOTE, "from now on"),
        (event(CENTS), command(CENTS, type="orders.placed.v1"), BREAKING, "know it as the other"),
        (event(CENTS), event(CENTS, topic="legacy.orders"), WARNING, "old topic"),
    ],
)
def test_what_is_around_a_message(before: Any, now: Any, level: str, why: str) -> None:
    found = changes(service(before), service(now))
    assert (level, why) in [(one.level, why) for one in found if why in one.why]


def test_a_type_that_is_gone_breaks_unless_an_upcaster_says_what_it_is() -> None:
    old, new = event(CENTS), event(CENTS, type="orders.placed.v2")
    (new_one, gone) = sorted(changes(service(old), service(new)), key=lambda one: one.type, reverse=True)
    assert (gone.level, gone.type, gone.now) == (BREAKING, "orders.placed.v1", "absent")
    assert "upcast(…)" in gone.way_out
    assert (new_one.level, new_one.type) == (NOTE, "orders.placed.v2")
    step = upcast("orders.placed.v1", to="orders.placed.v2", by=dict)
    found = changes(service(old), service(new, upcasters=[step]))
    assert [(one.level, one.type) for one in found] == [(WARNING, "orders.placed.v1"), (NOTE, "orders.placed.v2")]
    assert "consumers that name only orders.placed.v1" in found[0].why
    private = service(event(CENTS, public=False))
    (dropped,) = changes(private, service(upcasters=[drop_event("orders.placed.v1")]))
    assert (dropped.level, dropped.now) == (NOTE, "upcast to nothing")


def test_an_upcaster_that_is_gone_breaks_what_is_stored() -> None:
    new = event(CENTS, type="orders.placed.v2")
    step = upcast("orders.placed.v1", to="orders.placed.v2", by=dict)
    (gone,) = changes(service(new, upcasters=[step]), service(new))
    assert (gone.level, gone.type, gone.was) == (BREAKING, "orders.placed.v1", "upcast to orders.placed.v2")
    # With the class back it may go; and a step more is no step less.
    assert [one.level for one in changes(service(new, upcasters=[step]), service(new, event(CENTS)))] == [NOTE]


def test_of_another_services_event_only_reading_counts() -> None:
    def office(fields: Fields | None) -> Service:
        return service(*([] if fields is None else [event(fields)]), name="office")

    assert brief(changes(office(CENTS), office({**CENTS, "note": (str, ...)}))) == [(BREAKING, "note")]
    assert brief(changes(office(CENTS), office({"cents": (int | str, ...)}))) == []
    assert brief(changes(office(CENTS), office(None))) == [(NOTE, "")]
    assert document(service(command(CENTS), name="office"))["messages"] == {}  # its owner's file says what it is


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "now", "wanted"),
    [
        (CENTS, {**CENTS, "note": (str, ...)}, [(BREAKING, "note")]),
        (CENTS, {**CENTS, "note": (str, "")}, [(NOTE, "note")]),
        ({**CENTS, "note": (str, "")}, CENTS, [(NOTE, "note")]),
        (CENTS, {}, [(NOTE, "cents")]),
        ({"cents": (int | str, ...)}, CENTS, [(BREAKING, "cents")]),
        (CENTS, {"cents": (int | str, ...)}, [(NOTE, "cents")]),
        ({"s": (Literal["a", "b"], ...)}, {"s": (Literal["a"], ...)}, [(BREAKING, "s")]),
        ({"s": (Literal["a"], ...)}, {"s": (Literal["a", "b"], ...)}, [(NOTE, "s")]),
        (CENTS, {"cents": (Annotated[int, Field(le=3)], ...)}, [(BREAKING, "cents")]),
        ({"cents": (int, 0)}, {"cents": (int, 1)}, [(WARNING, "cents")]),
    ],
)
def test_a_changed_command(before: Fields, now: Fields, wanted: Any) -> None:
    found = changes(service(command(before)), service(command(now)))
    assert brief(found) == wanted
    assert all("callers" in one.why or one.level == WARNING for one in found)


def test_a_command_that_forbids_what_callers_still_send() -> None:
    found = changes(service(command({**CENTS, "note": (str, "")})), service(command(CENTS, extra="forbid")))
    assert brief(found) == [(BREAKING, "note")]


def test_a_command_that_is_gone() -> None:
    old, new = command(CENTS), command(CENTS, type="orders.place.v2")
    gone = changes(service(old), service(new))[0]
    assert (gone.level, gone.type) == (BREAKING, "orders.place.v1")
    assert "dead letters" in gone.why
    step = upcast("orders.place.v1", to="orders.place.v2", by=dict)
    assert {one.level for one in changes(service(old), service(new, upcasters=[step]))} == {NOTE}


def reply(**fields: Any) -> Any:
    return create_model("Answer", **fields)


@pytest.mark.parametrize(
    ("before", "now", "wanted"),
    [
        (reply(n=(int, ...)), reply(), [(BREAKING, "reply.n")]),
        (reply(n=(int, ...)), reply(n=(int, 0)), []),
        (reply(n=(int, ...)), reply(n=(int, ...), m=(int, ...)), [(WARNING, "reply.m")]),
        (reply(n=(int, ...)), reply(n=(int, ...), m=(int, 0)), [(NOTE, "reply.m")]),
        (reply(n=(int, ...)), reply(n=(int | str, ...)), [(BREAKING, "reply.n")]),
        (reply(n=(int | str, ...)), reply(n=(int, ...)), [(WARNING, "reply.n")]),
        (reply(s=(Literal["a"], ...)), reply(s=(Literal["a", "b"], ...)), [(WARNING, "reply.s")]),
        (reply(n=(int, ...)), None, [(BREAKING, "reply")]),
        (None, reply(n=(int, ...)), [(BREAKING, "reply")]),
        (None, None, []),
    ],
)
def test_a_changed_reply(before: Any, now: Any, wanted: Any) -> None:
    found = changes(service(command({}, reply=before)), service(command({}, reply=now)))
    assert brief(found) == wanted


# --- the property behind the rules -----------------------------------------------------------------------------------

SIMPLE: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "int": (int, st.integers(-20, 20)),
    "small": (Annotated[int, Field(ge=0, le=5)], st.integers(0, 5)),
    "above": (Annotated[int, Field(gt=0)], st.integers(1, 20)),
    "float": (float, st.floats(-5, 5)),
    "str": (str, st.text(max_size=5)),
    "short": (Annotated[str, Field(max_length=2)], st.text(max_size=2)),
    "bool": (bool, st.booleans()),
    "none": (None, st.none()),
    "a": (Literal["a"], st.just("a")),
    "ab1": (Literal["a", "b", 1], st.sampled_from(["a", "b", 1])),
    "uuid": (UUID, st.uuids()),
    "decimal": (Decimal, st.decimals(-5, 5, places=2)),
    "ints": (list[int], st.lists(st.integers(-9, 9), max_size=3)),
    "pair": (tuple[int, str], st.tuples(st.integers(), st.text(max_size=2))),
    "map": (dict[str, int], st.dictionaries(st.text(max_size=2), st.integers(), max_size=2)),
    "line": (Line, st.builds(Line)),
    "noted": (LineWithNote, st.builds(LineWithNote)),
    "tree": (Tree, st.builds(Tree, below=st.lists(st.builds(Tree, below=st.just([]), other=st.none()), max_size=1))),
}
kinds = st.lists(st.sampled_from(sorted(SIMPLE)), min_size=1, max_size=2, unique=True)


@st.composite
def models(draw: st.DrawFn) -> tuple[type[BaseModel], dict[str, st.SearchStrategy[Any]]]:
    fields: dict[str, Any] = {}
    values: dict[str, st.SearchStrategy[Any]] = {}
    for name in draw(st.sets(st.sampled_from("xyz"))):
        chosen = draw(kinds)
        annotation: Any = SIMPLE[chosen[0]][0]
        for other in chosen[1:]:
            annotation = annotation | SIMPLE[other][0]
        value = st.one_of([SIMPLE[each][1] for each in chosen])
        default = draw(value) if draw(st.booleans()) else ...
        fields[name], values[name] = (annotation, default), value
    config = ConfigDict(extra=draw(st.sampled_from(["ignore", "forbid"])))
    return create_model("M", __config__=config, **fields), values


@given(models(), models(), st.data())
def test_where_nothing_is_found_everything_written_is_read(old: Any, new: Any, data: st.DataObject) -> None:
    """Of a random pair of classes: either something is found, or whatever the one writes the other validates."""
    (writer, values), (reader, _) = old, new
    found = findings(schema_of(writer), schema_of(reader))
    if any(one.what not in ("unread", "default") for one in found):
        return
    written = writer(**{name: data.draw(value) for name, value in values.items()}).model_dump_json()
    reader.model_validate_json(written)


@given(models())
def test_a_class_reads_what_it_writes(made: Any) -> None:
    schema = schema_of(made[0])
    assert findings(schema, schema) == []
    assert findings(schema, schema, writes_all=True) == []
    assert json.loads(json.dumps(schema)) == schema


def test_a_field_may_be_called_as_a_keyword() -> None:
    class Odd(BaseModel):
        title: str
        required: int
        enum: str = "x"

    class Less(BaseModel):
        required: int

    found = findings(schema_of(Odd), schema_of(Less))
    assert [(one.what, one.path) for one in found] == [("unread", "title"), ("unread", "enum")]


# --- the file and the command ----------------------------------------------------------------------------------------

MODULE = """
from foldbus import Event, Key, Service

class Placed(Event, type="orders.placed.v1"):
    order_id: Key[str]
    {field}

app = Service("orders", messages=[Placed])
other = Service("office", messages=[Placed])
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(field: str, *, number: int) -> str:
        name = f"shop_{tmp_path.name.replace('-', '_')}_{number}"
        (tmp_path / f"{name}.py").write_text(MODULE.format(field=field))
        importlib.invalidate_caches()
        return f"{name}:app"

    return write


def test_check_exits_1_on_a_breaking_change_and_says_why_and_the_way_out(module: Any, tmp_path: Path) -> None:
    first, breaking = module("cents: int", number=1), module("cents: int\n    note: str", number=2)
    assert cli("schema", "write", first).code == 0
    before = (tmp_path / "foldbus-schema.json").read_bytes()
    same = cli("schema", "check", first)
    assert (same.code, same.out) == (0, "")
    said = cli("schema", "check", breaking)
    assert said.code == 1
    assert said.out.splitlines() == [
        "breaking: orders.placed.v1 note: was absent, is required string",
        "  why: stored events cannot be read any more: their JSON lacks it",
        "  way out: give it a default, or leave orders.placed.v1 as it is and make orders.placed.v2 of the new form, "
        "with upcast('orders.placed.v1', to=…)",
    ]
    refused = cli("schema", "write", breaking)
    assert refused.code == 1
    assert "--accept-breaking" in refused.err
    assert (tmp_path / "foldbus-schema.json").read_bytes() == before
    assert cli("schema", "write", breaking, "--accept-breaking").code == 0
    assert cli("schema", "check", breaking).code == 0


def test_other_changes_are_told_and_recorded(module: Any) -> None:
    first, wider = module("cents: int", number=1), module("cents: int\n    note: str = ''", number=2)
    cli("schema", "write", first)
    said = cli("schema", "check", wider, "--json")
    assert said.code == 0
    assert json.loads(said.out) == {
        "breaking": False,
        "changes": [
            {
                "service": "orders", "level": "note", "type": "orders.placed.v1", "field": "note", "was": "absent",
                "now": "string", "why": "consumers that do not know it ignore it", "way_out": "",
            }
        ],
    }  # fmt: skip
    assert "record it with `foldbus schema write" in cli("schema", "check", wider).err
    assert cli("schema", "write", wider).code == 0
    assert json.loads(cli("schema", "check", wider, "--json").out)["changes"] == []


def test_one_file_holds_several_services_and_is_the_same_bytes_however_often_written(
    module: Any, tmp_path: Path
) -> None:
    app = module("cents: int", number=1)
    other = app.replace(":app", ":other")
    file = tmp_path / "messages.json"
    assert cli("schema", "write", app, "--file", str(file)).code == 0
    assert cli("schema", "check", other, "--file", str(file)).code == 2
    assert cli("schema", "write", other, "--file", str(file)).code == 0
    written = file.read_bytes()
    assert sorted(load(file)) == ["office", "orders"]
    assert cli("schema", "write", other, app, "--file", str(file)).code == 0
    assert file.read_bytes() == written
    save(file, load(file))
    assert file.read_bytes() == written


@pytest.mark.parametrize("content", [None, "{", "[]", '{"foldbus_schema": 99}'])
def test_a_file_that_is_none_is_refused(content: str | None, module: Any, tmp_path: Path) -> None:
    app = module("cents: int", number=1)
    if content is not None:
        (tmp_path / "foldbus-schema.json").write_text(content)
    said = cli("schema", "check", app)
    assert said.code == 2
    assert "foldbus-schema.json" in said.err
    with pytest.raises(BadSchema):
        load(tmp_path / "foldbus-schema.json")


def test_a_model_without_a_json_schema_is_named() -> None:
    class Opaque:
        """Nothing that JSON could say."""

    odd = event({"x": (Opaque, ...)}, arbitrary_types_allowed=True)
    with pytest.raises(BadSchema, match=r"orders\.placed\.v1: Placed has no JSON schema"):
        document(service(odd))


def test_the_shops_file_is_as_the_shop_is() -> None:
    kept = load(ROOT / "examples/shop/foldbus-schema.json")
    modules = {"orders": "shop.orders", "payments": "shop.payments", "warehouse": "shop.warehouse"}
    modules["insights"] = "shop.insights"
    assert sorted(kept) == sorted(modules)
    for name, where in modules.items():
        app: Service = importlib.import_module(where).app
        assert compare(kept[name], document(app), service=name) == []
        assert kept[name] == document(app)


def test_a_value_that_is_refused_is_really_refused() -> None:
    """The table's words on Literal are pydantic's behaviour, not a guess."""
    with pytest.raises(ValidationError):
        event({"s": (Literal["a"], ...)}).model_validate_json('{"order_id":"o","s":"b"}')
