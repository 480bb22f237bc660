"""How query functions are declared, and what is refused before anything is opened."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from foldbus import BadQueryHandler, BadService, Command, Key, Query, QueryContext, Service


class Seat(BaseModel, frozen=True):
    seat: str


class Find(Query[Seat | None], type="hall.find.v1"):
    seat: Key[str]


class Total(Query[int], type="hall.total.v1"):
    hall: Key[str]


class Exact(Query[Seat], type="hall.exact.v1"):
    seat: Key[str]


class Elsewhere(Query[int], type="stall.total.v1"):
    hall: Key[str]


class Take(Command[None], type="hall.take.v1"):
    seat: Key[str]


async def find(query: Find, ctx: QueryContext) -> Seat:
    return Seat(seat=query.seat)


def in_a_thread(query: Find, ctx: QueryContext) -> Seat:
    return Seat(seat=query.seat)


async def no_query(query: Take, ctx: QueryContext) -> None: ...


async def one_parameter(query: Find) -> Seat:
    return Seat(seat=query.seat)


async def wrong_answer(query: Find, ctx: QueryContext) -> str:
    return query.seat


async def both(query: Find | Total, ctx: QueryContext) -> Seat | int:
    return 3


async def elsewhere(query: Elsewhere, ctx: QueryContext) -> int:
    return 3


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (in_a_thread, "is no `async def`"),
        (no_query, "wanted subclasses of Query"),
        (one_parameter, "wants two parameters"),
        (wrong_answer, "cannot answer Find"),
    ],
)
def test_a_query_function_that_cannot_work_is_refused(function: Callable[..., Any], why: str) -> None:
    with pytest.raises(BadQueryHandler, match=why):
        Service("hall", queries=[function])


def test_a_service_answers_only_its_own_queries_and_each_once() -> None:
    with pytest.raises(BadService, match=r"queries of 'stall' arrive on stall\.queries"):
        Service("hall", queries=[elsewhere])
    with pytest.raises(BadService, match=r"lists query hall\.find\.v1 twice"):
        Service("hall", queries=[find, both])


async def test_an_answer_of_another_type_than_the_query_wants_is_a_mistake(tmp_path: Path) -> None:
    async def loose(query: Find | Total | Exact, ctx: QueryContext):  # type: ignore[no-untyped-def]
        return 3 if isinstance(query, Exact) else Seat(seat="x")

    service = Service("hall", queries=[loose])
    async with service.connect(store=f"sqlite:{tmp_path}", bus=f"embedded:{tmp_path}") as hall:
        assert await hall.ask(Find(seat="x")) == Seat(seat="x")
        with pytest.raises(Exception, match="answered Total wrongly"):
            await hall.ask(Total(hall="x"))
        with pytest.raises(Exception, match="answered Exact with int; wanted Seat"):
            await hall.ask(Exact(seat="x"))


def test_the_topic_for_queries_is_declared_with_them_and_short_lived() -> None:
    service = Service("hall", queries=[find], partitions=4)
    (spec,) = [spec for spec in service.topics if spec.name == "hall.queries"]
    assert (spec.partitions, spec.retention_s) == (4, 900.0)
    assert service.groups == {"hall.queries": ("hall.queries",)}
