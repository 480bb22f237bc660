"""What `@projection` reads from a fold, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from bus.messages import Event, Key
from projections import BadProjection, Projection, projection
from tests.projections.world import Closed, Customer, LegacySeen, Moved, Placed, both, customers, stock_moves


class Private(Event, type="stock.private.v1", public=False):
    sku: Key[str]


Union = Placed | Closed


def test_row_and_events_come_from_the_annotations() -> None:
    assert customers.row is Customer
    assert customers.events == (Placed, Closed)
    assert (customers.name, customers.version, customers.view) == ("customers", 1, "customers")
    assert stock_moves.view == "stock_moves"

    @projection("by-alias", version=3)
    def fold(row: Customer | None, event: Union) -> Customer: ...

    assert isinstance(fold, Projection)
    assert fold.events == (Placed, Closed)


def test_the_row_is_the_events_key_unless_told_otherwise() -> None:
    @projection("orders", version=1)
    def fold(row: Customer | None, event: Placed) -> Customer | None: ...

    @projection("none", version=1, key=lambda event: None)
    def none(row: Customer | None, event: Placed) -> Customer | None: ...

    event = Placed(order_id="o", customer_id="c")
    assert fold.key_of(event) == "o"
    assert customers.key_of(event) == "c"
    assert none.key_of(event) is None


def test_events_whose_keys_have_different_names_need_a_key_function() -> None:
    def fold(row: Customer | None, event: Placed | LegacySeen) -> Customer | None: ...

    with pytest.raises(BadProjection) as caught:
        projection("mixed", version=1)(fold)
    assert "order_id of shop.placed.v1, customer_id of legacy.seen.v1: pass key=" in str(caught.value)
    assert projection("mixed", version=1, key=lambda event: event.key)(fold).events == (Placed, LegacySeen)


def test_a_projection_is_called_like_its_fold() -> None:
    row = customers(None, Placed(order_id="o", customer_id="c"))
    assert row is not None
    assert row.placed == 1
    assert customers(row, Placed(order_id="p", customer_id="c")) == customers.fold(
        row, Placed(order_id="p", customer_id="c")
    )


def test_own_events_come_from_the_log_and_others_from_their_topics() -> None:
    assert both.sources("shop") == {"log": [Placed], "stock.events": [Moved]}
    assert both.sources("stock") == {"shop.events": [Placed], "log": [Moved]}

    @projection("legacy", version=1)
    def fold(row: Customer | None, event: LegacySeen) -> Customer | None: ...

    assert fold.sources("legacy") == {"legacy.customers": [LegacySeen]}


def test_a_private_event_of_another_service_is_refused() -> None:
    @projection("secrets", version=1)
    def fold(row: Customer | None, event: Private) -> Customer | None: ...

    assert fold.sources("stock") == {"log": [Private]}
    with pytest.raises(BadProjection, match="private"):
        fold.sources("shop")


@pytest.mark.parametrize(
    "name", ["", "Customers", "9lives", "a_b", "a;drop", "é", "projection-x-g1", "sqlite-master", "a" * 41]
)
def test_a_name_outside_the_grammar_is_refused(name: str) -> None:
    with pytest.raises(BadProjection):
        Projection(name, 1, customers.fold, Customer, (Placed,), lambda event: event.key)


def _no_row(row, event: Placed) -> Customer | None: ...  # type: ignore[no-untyped-def]
def _no_event(row: Customer | None, event) -> Customer | None: ...  # type: ignore[no-untyped-def]
def _no_return(row: Customer | None, event: Placed): ...  # type: ignore[no-untyped-def]
def _never_absent(row: Customer, event: Placed) -> Customer | None: ...
def _no_model(row: int | None, event: Placed) -> int | None: ...
def _other_return(row: Customer | None, event: Placed) -> Placed | None: ...
def _no_row_returned(row: Customer | None, event: Placed) -> None: ...
def _no_event_type(row: Customer | None, event: Customer) -> Customer | None: ...
def _abstract_event(row: Customer | None, event: Event) -> Customer | None: ...
def _one_parameter(row: Customer | None) -> Customer | None: ...
def _unresolved(row: Customer | None, event: NotThere) -> Customer | None: ...  # type: ignore[name-defined] # noqa: F821
async def _coroutine(row: Customer | None, event: Placed) -> Customer | None: ...


@pytest.mark.parametrize(
    "fold",
    [
        _no_row, _no_event, _no_return, _never_absent, _no_model, _other_return, _no_row_returned, _no_event_type,
        _abstract_event, _one_parameter, _unresolved, _coroutine,
    ],
)  # fmt: skip
def test_annotations_that_do_not_fit_are_refused_and_say_what_was_wanted(fold: Any) -> None:
    with pytest.raises(BadProjection, match=r"(wanted|module level)"):
        projection("p", version=1)(fold)


def test_a_version_below_one_is_refused() -> None:
    with pytest.raises(BadProjection):
        projection("p", version=0)(customers.fold)
