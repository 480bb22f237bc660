"""The conformance suite of `Rows`: both adapters, no expectations of their own."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, StrEnum
from functools import partial
from typing import Any, Literal
from uuid import UUID

import pytest
from pydantic import BaseModel

from bus.errors import Fenced
from projections import (
    BadProjection,
    BadRow,
    Checkpoint,
    NameTaken,
    NotCaughtUp,
    NothingToSwapBack,
    Place,
    Projection,
    Rows,
    RowUnreadable,
    Status,
    rows_for,
)
from tests.projections.world import Customer, Placed, customers, customers_v2, eventually

AT_5 = {("log", 0): Place(5, 0, 5)}
AT_9 = {("log", 0): Place(9, 0, 9)}
LOG = {"log"}


class Colour(StrEnum):
    RED = "red"


class Size(Enum):
    LARGE = 40


class Line(BaseModel, frozen=True):
    sku: str
    amounts: tuple[int, ...] = ()


class Everything(BaseModel, frozen=True):
    text: str
    number: int
    real: float
    truth: bool
    at: datetime
    day: date
    id: UUID
    price: Decimal
    colour: Colour
    status: Literal["new", "paid"]
    size: Size
    line: Line
    lines: dict[str, list[Line]]
    at_noon: time
    blob: bytes
    maybe_number: int | None = None
    maybe_line: Line | None = None
    maybe_price: Decimal | None = None
    either: int | str | None = None


def everything(**changes: Any) -> Everything:
    plain = Everything(
        text="Straße 🚲 \"'\\ \n ",
        number=-(2**63),
        real=0.1,
        truth=True,
        at=datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=timezone(timedelta(hours=5, minutes=30))),
        day=date(1, 1, 1),
        id=UUID("0190b8a0-0000-7000-8000-00000000002a"),
        price=Decimal("12345678901234567890.000100"),
        colour=Colour.RED,
        status="paid",
        size=Size.LARGE,
        line=Line(sku="ü", amounts=(1, 2)),
        lines={"ключ": [Line(sku="a")], "": []},
        at_noon=time(12, 0),
        blob=b"bytes",
    )
    return plain.model_copy(update=changes)


class Tagged(BaseModel, frozen=True):
    tag: Literal["a", "b", "A", "'; drop"]
    other: str


def projection_of(row: type[BaseModel], name: str = "thing", version: int = 1) -> Projection[Any]:
    return Projection(name, version, lambda row, event: row, row, (Placed,), lambda event: event.key)


async def saved(rows: Rows[Any], found: dict[str, Any], *, generation: int = 1, places: Any = AT_5) -> None:
    old = await rows.checkpoint(generation)
    await rows.save(generation, found, old=old, new=Checkpoint(places, old.revision))


async def test_every_kind_of_column_comes_back_as_it_went_in(store: Any) -> None:
    rows = rows_for(store, projection_of(Everything))
    await rows.serving()
    full = everything(
        maybe_number=2**63 - 1, maybe_line=Line(sku="x"), maybe_price=Decimal("-0.5"), either="7", real=float("-inf")
    )
    found = {"plain": everything(), "full": full, "int": everything(either=7)}
    await saved(rows, found)
    for key, row in found.items():
        assert await rows.get(key) == row
    assert (await rows.load(1, found)) == found
    assert (await rows.snapshot()).rows == found
    again = await rows.get("plain")
    assert again is not None
    assert again.at.utcoffset() == timedelta(0)
    assert again.price.as_tuple() == everything().price.as_tuple()


async def test_not_a_number_stays_not_a_number(store: Any) -> None:
    rows = rows_for(store, projection_of(Everything))
    await rows.serving()
    await saved(rows, {"k": everything(real=float("nan"))})
    row = await rows.get("k")
    assert row is not None
    assert row.real != row.real


async def test_reading_before_anything_ran_finds_nothing(store: Any) -> None:
    rows = rows_for(store, customers)
    assert await rows.get("a") is None
    assert await rows_for(store, customers_v2).count() == 0
    assert (await rows.serving()).number == 1


async def test_rows_are_counted_by_what_their_columns_of_text_hold(store: Any) -> None:
    rows = rows_for(store, projection_of(Tagged))
    await rows.serving()
    found = {str(n): Tagged(tag=tag, other="x") for n, tag in enumerate(("a", "b", "a", "'; drop", "A"))}
    await saved(rows, found)
    assert await rows.count() == 5
    assert [await rows.count(where={"tag": tag}) for tag in ("a", "b", "'; drop", "c")] == [2, 1, 1, 0]
    assert await rows.count(where={"tag": "a", "other": "x"}) == 2
    assert await rows.count(where={"tag": "a", "other": "y"}) == 0
    with pytest.raises(KeyError):
        await rows.count(where={"tag = tag or tag": "a"})


async def test_keys_are_any_text_and_pages_follow_their_bytes(store: Any) -> None:
    rows = rows_for(store, customers)
    await rows.serving()
    keys = ["a", "A", "é", "z", "日本", "🚲", "b c", "'", '"', "%", "\\", "a\n", "1", "10", "2"]
    await saved(rows, {key: Customer(customer_id=key) for key in keys})
    seen: list[str] = []
    while page := await rows.page(after=seen[-1] if seen else None, limit=4):
        assert all(row.customer_id == key for key, row in page)
        seen += [key for key, _ in page]
    assert seen == sorted(keys, key=str.encode)
    assert await rows.count() == len(keys)
    assert set(await rows.load(1, [*keys, "absent"])) == set(keys)


async def test_none_deletes_and_the_others_stay(store: Any) -> None:
    rows = rows_for(store, customers)
    await rows.serving()
    await saved(rows, {key: Customer(customer_id=key) for key in "abc"})
    await saved(rows, {"a": None, "b": Customer(customer_id="b", placed=2), "never": None}, places=AT_9)
    assert {key: row.placed for key, row in (await rows.snapshot()).rows.items()} == {"b": 2, "c": 0}
    assert await rows.get("a") is None


async def test_places_come_back_and_the_revision_rises_by_one(store: Any) -> None:
    rows = rows_for(store, customers)
    await rows.serving()
    places = {("log", 0): Place(7, 2, 7), ("stock.events", 11): Place(2**62, 3, 2**61), ("b", 0): Place()}
    await saved(rows, {}, places=places)
    assert await rows.checkpoint(1) == Checkpoint(places, 1)


async def test_a_stale_revision_saves_nothing(store: Any, twin: Any) -> None:
    """I6: neither rows nor checkpoint of the loser."""
    rows, others = rows_for(store, customers), rows_for(twin, customers)
    await rows.serving()
    old = await rows.checkpoint(1)
    await others.save(1, {"a": Customer(customer_id="a", placed=1)}, old=old, new=Checkpoint(AT_5))
    with pytest.raises(Fenced):
        await rows.save(1, {"a": None, "b": Customer(customer_id="b")}, old=old, new=Checkpoint(AT_9))
    assert await rows.checkpoint(1) == Checkpoint(AT_5, 1)
    assert {key: row.placed for key, row in (await rows.snapshot()).rows.items()} == {"a": 1}


async def test_of_many_racing_saves_one_wins(store: Any, twin: Any) -> None:
    sides = [rows_for(store, customers), rows_for(twin, customers)]
    old = await _prepared(sides[0])
    results = await asyncio.gather(
        *(
            sides[n % 2].save(1, {f"k{n}": Customer(customer_id=f"k{n}")}, old=old, new=Checkpoint(AT_5))
            for n in range(8)
        ),
        return_exceptions=True,
    )
    assert sum(result is None for result in results) == 1
    assert all(result is None or isinstance(result, Fenced) for result in results)
    assert await sides[0].count() == 1


async def _prepared(rows: Rows[Any]) -> Checkpoint:
    await rows.serving()
    return await rows.checkpoint(1)


async def test_many_starts_at_once_create_one_generation(store: Any, twin: Any) -> None:
    found = await asyncio.gather(*(rows_for((store, twin)[n % 2], customers).serving() for n in range(8)))
    assert {(one.number, one.status) for one in found} == {(1, Status.SERVING)}
    assert len(await rows_for(store, customers).generations()) == 1
    built = await asyncio.gather(*(rows_for((store, twin)[n % 2], customers_v2).build() for n in range(8)))
    assert {one.number for one in built} == {2}


async def test_a_swap_changes_what_is_read_at_once_and_fences_the_old(store: Any) -> None:
    rows, new = rows_for(store, customers), rows_for(store, customers_v2)
    await rows.serving()
    await saved(rows, {"a": Customer(customer_id="a", cents=1)})
    assert (await new.build()).number == 2
    late = await rows.checkpoint(1)
    await saved(new, {"a": Customer(customer_id="a", cents=100)}, generation=2)
    assert (await rows.get("a")).cents == 1  # type: ignore[union-attr]
    await new.swap(2, sources=LOG)
    assert (await rows.get("a")).cents == 100  # type: ignore[union-attr]
    assert [one.status for one in await rows.generations()] == [Status.RETIRED, Status.SERVING]
    with pytest.raises(Fenced):
        await rows.save(1, {}, old=late, new=Checkpoint(AT_9))
    with pytest.raises(Fenced):
        await rows.save(1, {}, old=await rows.checkpoint(1), new=Checkpoint(AT_9))
    await saved(new, {"b": Customer(customer_id="b")}, generation=2, places=AT_9)


async def test_a_build_that_is_behind_is_not_swapped_in(store: Any) -> None:
    rows, new = rows_for(store, customers), rows_for(store, customers_v2)
    await rows.serving()
    await saved(rows, {"a": Customer(customer_id="a")}, places=AT_9)
    await new.build()
    await saved(new, {}, generation=2, places=AT_5)
    with pytest.raises(NotCaughtUp):
        await new.swap(2, sources=LOG)
    assert [one.status for one in await rows.generations()] == [Status.SERVING, Status.BUILDING]
    assert await rows.count() == 1
    await saved(rows, {}, places={**AT_9, ("gone.events", 0): Place(3)})  # a source that the new version reads no more
    await saved(new, {}, generation=2, places=AT_9)
    await new.swap(2, sources=LOG)


async def test_a_hold_stops_savers_also_those_that_already_know_the_revision(store: Any) -> None:
    rows = rows_for(store, customers)
    await rows.serving()

    async def lapsed() -> bool:
        return not (await rows.serving()).held

    late = await rows.checkpoint(1)
    held = await rows.hold(1, 60.0)
    assert (await rows.serving()).held
    for old in (late, held):
        with pytest.raises(Fenced):
            await rows.save(1, {}, old=old, new=Checkpoint(AT_5))
    held = await rows.hold(1, 0.5)  # the last one counts
    await eventually(lapsed)
    await rows.save(1, {}, old=held, new=Checkpoint(AT_5))


async def test_a_swap_is_undone_once(store: Any) -> None:
    rows, new = rows_for(store, customers), rows_for(store, customers_v2)
    await rows.serving()
    await saved(rows, {"a": Customer(customer_id="a", cents=1)})
    with pytest.raises(NothingToSwapBack):
        await rows.swap_back()
    await new.build()
    await saved(new, {"a": Customer(customer_id="a", cents=100)}, generation=2)
    await new.swap(2, sources=LOG)
    assert (await rows.swap_back()).number == 1
    assert (await rows.get("a")).cents == 1  # type: ignore[union-attr]
    assert (await rows.serving()).number == 1
    await saved(rows, {"b": Customer(customer_id="b")}, places=AT_9)


async def test_a_build_is_found_again_and_one_of_another_version_is_dropped(store: Any) -> None:
    rows, second = rows_for(store, customers), rows_for(store, customers_v2)
    third = rows_for(store, projection_of(Customer, "customers", version=3))
    await rows.serving()
    await second.build()
    await saved(second, {"a": Customer(customer_id="a")}, generation=2)
    assert (await second.build()).number == 2
    assert len(await second.load(2, ["a"])) == 1
    assert (await third.build()).number == 3
    for use in (second.checkpoint(2), second.load(2, ["a"])):
        with pytest.raises(Fenced):
            await use
    with pytest.raises(Fenced):
        await second.save(2, {"a": None}, old=Checkpoint(AT_5, 1), new=Checkpoint(AT_9))
    with pytest.raises(Fenced):
        await second.swap(2, sources=LOG)
    statuses = [one.status for one in await rows.generations()]
    assert statuses == [Status.SERVING, Status.DROPPED, Status.BUILDING]


async def test_what_retired_is_dropped_when_the_next_build_begins(store: Any) -> None:
    rows = rows_for(store, customers)
    await rows.serving()
    for number in (2, 3):
        assert (await rows.build()).number == number
        await rows.swap(number, sources=LOG)
    statuses = [one.status for one in await rows.generations()]
    assert statuses == [Status.DROPPED, Status.RETIRED, Status.SERVING]


class Wider(BaseModel, frozen=True):
    cents: str
    customer_id: str
    extra: float = 1.5


async def test_the_view_takes_other_columns_at_the_swap(store: Any) -> None:
    rows, new = rows_for(store, customers), rows_for(store, projection_of(Wider, "customers", version=2))
    await rows.serving()
    await saved(rows, {"a": Customer(customer_id="a", cents=1)})
    with pytest.raises(RowUnreadable):
        await new.get("a")  # a number where the new code has text: refused rather than guessed
    await new.build()
    await saved(new, {"a": Wider(cents="one", customer_id="a")}, generation=2)
    await new.swap(2, sources=LOG)
    assert await new.get("a") == Wider(cents="one", customer_id="a")
    await new.swap_back()
    assert (await rows.get("a")).cents == 1  # type: ignore[union-attr]


async def test_readers_never_see_less_while_generations_are_swapped(store: Any, twin: Any) -> None:
    rows, reading = rows_for(store, customers), rows_for(twin, customers)
    await rows.serving()
    await saved(rows, {f"k{n}": Customer(customer_id="k", placed=1) for n in range(50)})
    seen: set[int] = set()
    done = asyncio.Event()

    async def read() -> None:
        while not done.is_set():
            page = await reading.page(after=None, limit=100)
            assert len(page) == 50
            assert len({row.placed for _, row in page}) == 1
            seen.add(page[0][1].placed)

    async with asyncio.TaskGroup() as tasks:
        readers = [tasks.create_task(read()) for _ in range(2)]
        for generation in (2, 3, 4):
            await rows.build()
            filled = {f"k{n}": Customer(customer_id="k", placed=generation) for n in range(50)}
            await saved(rows, filled, generation=generation)
            await rows.swap(generation, sources=LOG)
            await eventually(partial(_seen_or_failed, seen, generation, readers))
        done.set()
    assert {2, 3, 4} <= seen


@pytest.mark.parametrize(
    "change",
    [
        {"text": "a\x00b"},
        {"text": "\ud800"},
        {"number": 2**63},
        {"at": datetime(2026, 1, 1)},  # noqa: DTZ001
        {"at": datetime.max.replace(tzinfo=timezone(timedelta(hours=-1)))},
        {"price": Decimal("NaN")},
        {"price": Decimal("1E+5000")},
        {"number": "7"},
        {"line": "no line"},
        {"maybe_line": {"sku": 3}},
    ],
    ids=repr,
)
async def test_a_row_that_cannot_be_kept_or_read_back_is_refused_before_anything_is_written(
    store: Any, change: dict[str, Any]
) -> None:
    rows = rows_for(store, projection_of(Everything))
    await rows.serving()
    with pytest.raises(BadRow):
        await saved(rows, {"good": everything(), "bad": everything(**change)})
    assert await rows.count() == 0
    assert (await rows.checkpoint(1)).revision == 0


async def test_a_view_name_that_is_taken_changes_nothing(store: Any) -> None:
    await rows_for(store, customers).serving()
    clash = projection_of(Customer, "customers-too")
    rows = rows_for(store, clash)
    table = "customers_too"
    if hasattr(store, "database"):
        await store.database.write(lambda connection: connection.execute(f"CREATE TABLE {table} (x)"))
    else:
        async with store.connection() as connection:
            await connection.execute(f"CREATE TABLE {store.schema}.{table} (x int)")
    with pytest.raises(NameTaken):
        await rows.serving()
    assert await rows.generations() == []


async def test_a_row_model_without_fields_still_has_rows(store: Any) -> None:
    class Nothing(BaseModel, frozen=True):
        pass

    rows = rows_for(store, projection_of(Nothing))
    await rows.serving()
    await saved(rows, {"a": Nothing()})
    await saved(rows, {"a": Nothing(), "b": None}, places=AT_9)
    assert await rows.get("a") == Nothing()


async def _seen_or_failed(seen: set[int], generation: int, readers: list[asyncio.Task[None]]) -> bool:
    return generation in seen or any(one.done() for one in readers)


class WithKey(BaseModel, frozen=True):
    Key: int


class Twins(BaseModel, frozen=True):
    name: str
    NAME: str


class Open(BaseModel, extra="allow"):
    name: str


@pytest.mark.parametrize("model", [WithKey, Twins, Open])
def test_a_model_that_cannot_be_columns_is_refused(model: type[BaseModel], tmp_path: Any) -> None:
    from projections.rows import Columns

    with pytest.raises(BadProjection):
        Columns("thing", model)


def test_the_same_columns_have_the_same_shape_and_others_another() -> None:
    from projections.rows import Columns

    class A(BaseModel):
        a: int
        b: str = "x"

    class Same(BaseModel):
        a: int = 3
        b: str

    class Other(BaseModel):
        a: int
        b: int

    assert Columns("p", A).shape == Columns("p", Same).shape != Columns("p", Other).shape


def test_utc_is_what_times_are_kept_in() -> None:
    from projections.rows import Columns

    columns = Columns("p", Everything)
    values = dict(zip(columns.names, columns.encode(everything()), strict=True))
    assert values["at"].tzinfo is UTC
