"""`@saga`: a value, and clear words when it cannot be one."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from bus.messages import Event, Key
from sagas import BadSaga, SagaDefinition, SagaRun, saga, saga_group, saga_id, saga_stream
from tests.sagas.stories import Note, OrderPlaced, fulfil_order


def test_a_saga_is_a_value_that_starts_on_what_it_is_annotated_with() -> None:
    assert isinstance(fulfil_order, SagaDefinition)
    assert (fulfil_order.name, fulfil_order.version, fulfil_order.start) == ("fulfil-order", 1, OrderPlaced)


def test_a_saga_inside_a_function_finds_its_local_event() -> None:
    class Local(Event, type="here.local.v1"):
        id: Key[str]

    @saga("local", version=7)
    async def local(run: SagaRun, event: Local) -> None: ...

    assert local.start is Local


async def no_event(run: SagaRun) -> None: ...
async def no_annotation(run, event) -> None: ...  # type: ignore[no-untyped-def]
async def a_command(run: SagaRun, event: Note) -> None: ...
async def two_events(run: SagaRun, event: OrderPlaced | Note) -> None: ...
async def abstract(run: SagaRun, event: Event) -> None: ...
async def unknown(run: SagaRun, event: Nowhere) -> None: ...  # type: ignore[name-defined] # noqa: F821
async def keyword(run: SagaRun, *, event: OrderPlaced) -> None: ...
def not_async(run: SagaRun, event: OrderPlaced) -> None: ...


class Private(Event, type="here.private.v1", public=False):
    id: Key[str]


async def private(run: SagaRun, event: Private) -> None: ...


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (no_event, "wanted two parameters"),
        (no_annotation, "'event' has no annotation"),
        (a_command, "wanted one event class"),
        (two_events, "wanted one event class"),
        (abstract, "wanted one event class"),
        (unknown, "annotation 'Nowhere' of 'event' cannot be resolved"),
        (keyword, "wanted two parameters"),
        (not_async, "is no coroutine function"),
        (private, "is not public, so it is never published"),
    ],
)
def test_a_wrong_definition_is_refused_when_it_is_made(body: Any, says: str) -> None:
    with pytest.raises(BadSaga, match=says) as caught:
        saga("story")(body)
    assert "saga 'story'" in str(caught.value)


@pytest.mark.parametrize("name", ["", "Fulfil", "fulfil order", "fulfil.order", "-x", "x" * 101])
def test_a_name_that_would_not_do_as_a_topic_is_refused(name: str) -> None:
    with pytest.raises(BadSaga, match="is no name for a saga"):
        saga(name)


@pytest.mark.parametrize("version", [0, -1, True])
def test_a_version_is_a_number_from_one(version: int) -> None:
    with pytest.raises(BadSaga, match="wanted a number from 1"):
        saga("story", version=version)


def test_ids_streams_and_groups_are_stable() -> None:
    """Running sagas are found by these: a change here loses them."""
    instance = saga_id("fulfil-order", UUID(int=7))
    assert str(instance) == "f0ee823d-24fa-5730-a489-2619d9d8c711"
    assert str(saga_stream("fulfil-order", instance)) == f"saga.fulfil-order-{instance}"
    assert saga_group("orders", "fulfil-order") == "orders.saga.fulfil-order"
