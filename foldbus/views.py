"""Read models of a connected service: looking at them, waiting for an answer to be in them, rebuilding them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import BaseModel

from foldbus.saga_list import SETTINGS as SAGA_LIST_SETTINGS
from foldbus.saga_list import UnhurriedFeed, saga_codec, saga_list
from projections import (
    Feed,
    Generation,
    Progress,
    Projection,
    ProjectionRunner,
    ProjectionSettings,
    ReadModel,
    Verified,
    Workshop,
    open_feed,
    rows_for,
    verify,
)
from projections import rebuild as rebuild_generation
from projections import swap_back as swap_back_generation

if TYPE_CHECKING:
    from foldbus.connection import Connection
    from foldbus.service import Service

Row = TypeVar("Row", bound=BaseModel)


def workshop(
    connection: Connection, projection: Projection[Row], settings: ProjectionSettings | None = None
) -> Workshop[Row]:
    """Everything that a projection's machinery needs of a connection."""
    service = connection.service
    built_in = projection.name == saga_list.name

    @asynccontextmanager
    async def feed() -> AsyncGenerator[Feed]:
        async with open_feed(
            projection,
            service=service.name,
            store=connection.store,
            transport=connection.transport,
            registry=service.registry,
            clock=connection.clock,
            metrics=connection.metrics,
            rules=service.rules,
        ) as opened:
            yield UnhurriedFeed(opened) if built_in else opened

    return Workshop(
        projection=projection,
        store=connection.store,
        rows=rows_for(connection.store, projection, clock=connection.clock),
        open_feed=feed,
        codec=saga_codec if built_in else service.codec,
        clock=connection.clock,
        metrics=connection.metrics,
        failpoint=connection.failpoint,
        settings=settings or (SAGA_LIST_SETTINGS if built_in else ProjectionSettings()),
    )


def all_projections(service: Service) -> Sequence[Projection[Any]]:
    """What a worker of this service runs: the service's own projections and, with sagas, the built-in list of them."""
    return (*service.projections, saga_list) if service.sagas else service.projections


def projection_runner(
    connection: Connection, projection: Projection[Row], settings: ProjectionSettings | None = None
) -> ProjectionRunner[Row]:
    return ProjectionRunner(workshop(connection, projection, settings))


class View(Generic[Row]):
    """One read model of a service, as `Connection.view` gives it."""

    def __init__(self, connection: Connection, projection: Projection[Row]) -> None:
        self._shop = workshop(connection, projection)
        self._model = ReadModel(projection, self._shop.rows, service=connection.service.name)

    async def get(self, key: object, *, after: object = None, timeout_s: float = 5.0) -> Row | None:
        """The row of `key`, or None. With `after` (an answer of `request`, a Receipt or a Token) it waits until what
        that answer stands for is in the read model; an answer without a token waits for nothing.

        Raises NotThere after `timeout_s`, TokenElsewhere when the projection does not read the answering service.
        """
        from foldbus.connection import token_of

        return await self._model.get(str(key), after=token_of(after), timeout_s=timeout_s)

    def rows(self) -> AsyncIterator[tuple[str, Row]]:
        """All rows with their keys, by key, read in pages."""
        return self._model.all()

    async def count(self) -> int:
        return await self._model.count()

    def rebuild(self, *, skip_failures: bool = False) -> AsyncGenerator[Progress]:
        """Builds the next generation beside the serving one and swaps; see `projections.rebuild`."""
        return rebuild_generation(self._shop, skip_failures=skip_failures)

    async def swap_back(self) -> Generation:
        """Undoes the last swap."""
        return await swap_back_generation(self._shop)

    async def verify(self) -> Verified[Row]:
        """Compares every row with a fold from scratch."""
        return await verify(self._shop)
