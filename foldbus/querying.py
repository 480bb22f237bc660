"""Queries: questions that a service answers from its own database, and that change nothing.

    async def find_order(query: FindOrder, ctx: QueryContext) -> OrderSummary | None:
        return await ctx.view(order_summary).get(query.order_id)

A query comes in on `<service>.queries`, or is answered in the asking process when that process is the service itself.
It has no claim and nothing of it is stored: a worker that dies with it in hand answers nothing, and whoever asked asks
again. It waits for no command of its key and for no other query, only for room (`AT_ONCE`).

Tried until somebody's answer would come too late: only a database that does not answer is a reason to try again; what
the function raises is answered at once.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import types
import typing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast
from uuid import UUID

from pydantic import BaseModel, RootModel, ValidationError

from bus.codec import explain
from bus.envelope import Envelope, Version
from bus.errors import FoldbusError
from bus.messages import Query
from bus.transport import TopicSpec
from eventstore.decider import BadDecider, Decider, parameter_types
from eventstore.errors import StoreUnavailable
from eventstore.port import Standing
from eventstore.repository import Loaded

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from foldbus.connection import Connection
    from foldbus.views import View
    from projections import Projection

log = logging.getLogger("foldbus.queries")

S = TypeVar("S")
Row = TypeVar("Row", bound=BaseModel)

AT_ONCE = 64
"""So many queries of one worker are answered side by side; further ones wait in their topic."""
RETENTION_S = 15 * 60.0
"""Nobody waits longer for an answer: questions are not kept."""
_RETRY_S = 0.05
_RETRY_MAX_S = 1.0


class BadQueryHandler(FoldbusError):
    """A query function is declared so that it cannot work; found at start-up, nothing was opened."""


class QueryHandler:
    """A query function as a service lists it: `async def (query, ctx) -> R`, for one `Query[R]` or a union of them.

    It has `timeout_s` at most, and never longer than somebody waits for the answer.
    """

    def __init__(self, function: Callable[[Any, QueryContext], Awaitable[Any]], *, timeout_s: float = 10.0) -> None:
        self.function, self.timeout_s = function, timeout_s
        self.name = getattr(function, "__name__", repr(function))
        if not inspect.iscoroutinefunction(function):
            raise BadQueryHandler(f"{self!r} is no `async def`; a query function is one")
        try:
            self.queries = parameter_types(function, 0, Query)
        except BadDecider as error:
            raise BadQueryHandler(f"query function {error}") from error
        if len(inspect.signature(function).parameters) != 2:
            raise BadQueryHandler(f"{self!r} wants two parameters: (query, ctx)")
        self._check_answer(typing.get_type_hints(function).get("return", Any))

    def __repr__(self) -> str:
        return f"query function {self.name!r}"

    def _check_answer(self, given: Any) -> None:
        """A part of what is wanted will do (`-> Row` for `Query[Row | None]`); answers are looked at one by one."""
        if given is Any:
            return
        gives = _members(given)
        for query in self.queries:
            wanted = _members(query.answer_type())
            if not any(one == want or _is_subclass(one, want) for one in gives for want in wanted):
                raise BadQueryHandler(
                    f"{self!r} returns {given!r}, which cannot answer {query.__name__}: wanted {query.answer_type()!r}"
                )

    async def __call__(self, query: Query[Any], ctx: QueryContext) -> BaseModel:
        """The answer as it goes on the wire. Raises BadQueryAnswer when it is not what the query is answered with."""
        value = await self.function(query, ctx)
        kind: type[Query[Any]] = type(query)
        wanted: Any = kind.reply_type()
        if kind.wrapped():
            try:
                wrapped: BaseModel = wanted(value)
                return wrapped
            except ValidationError as error:
                raise BadQueryAnswer(f"{self!r} answered {type(query).__name__} wrongly: {explain(error)}") from error
        if isinstance(value, wanted):
            return cast("BaseModel", value)
        raise BadQueryAnswer(
            f"{self!r} answered {type(query).__name__} with {type(value).__name__}; wanted {wanted.__name__}"
        )

    def plain(self, query: Query[Any], answer: BaseModel) -> Any:
        """The answer as the function gave it."""
        kind: type[Query[Any]] = type(query)
        return cast("RootModel[Any]", answer).root if kind.wrapped() else answer


class BadQueryAnswer(FoldbusError):
    """A query function returned something else than its query is answered with."""


class QueryContext:
    """What a query function has besides its query: the service's state, to look at. Closed when it has returned."""

    def __init__(
        self, connection: Connection, stack: AsyncExitStack, *, deadline: datetime, envelope: Envelope | None
    ) -> None:
        self._connection, self._stack = connection, stack
        self._sql: AsyncConnection | None = None
        self._opening = asyncio.Lock()
        self.deadline, self.envelope = deadline, envelope
        """`deadline` is when the function is cut short; `envelope` is None where the query did not come by the bus."""

    @property
    def now(self) -> datetime:
        return self._connection.clock.now()

    @property
    def deps(self) -> Any:
        """What the service's `lifespan` gave; None without one."""
        return self._connection.resources.deps

    def view(self, projection: Projection[Row]) -> View[Row]:
        """A read model of the service; see `Connection.view`."""
        return self._connection.view(projection)

    async def load(
        self,
        decider: Decider[S, Any, Any],
        key: object,
        *,
        at_version: Version | None = None,
        at: datetime | None = None,
    ) -> Loaded[S]:
        """An aggregate as it is committed now, or as it was; see `Connection.load`."""
        return await self._connection.load(decider, key, at_version=at_version, at=at)

    async def standing(self, id: UUID) -> Standing:
        """What became of a command of this service; `Connection.status` makes more of it."""
        (found,) = await self._connection.store.examine(self._connection.service.name, [(id, "")])
        return found

    async def sql(self) -> AsyncConnection:
        """SQLAlchemy's connection in a transaction that only reads, on one snapshot; the same one at a second call."""
        async with self._opening:
            if self._sql is None:
                self._sql = (await self._stack.enter_async_context(self._connection.store.reading())).sql
        return self._sql


class Queries:
    """The query functions of one connected service."""

    def __init__(self, connection: Connection, handlers: Sequence[QueryHandler]) -> None:
        self._connection = connection
        self._handlers: Mapping[type[Query[Any]], QueryHandler] = {
            query: handler for handler in handlers for query in handler.queries
        }

    def handler_of(self, query: type[Query[Any]]) -> QueryHandler | None:
        return self._handlers.get(query)

    async def answer(
        self, handler: QueryHandler, query: Query[Any], *, within_s: float, envelope: Envelope | None = None
    ) -> BaseModel:
        """Raises what the function raises, TookTooLong when its time is over."""
        connection = self._connection
        within_s = min(within_s, handler.timeout_s)
        deadline = connection.clock.now() + timedelta(seconds=within_s)
        wait_s, failed = _RETRY_S, None
        bound = asyncio.timeout(within_s)
        try:
            async with bound:
                while True:
                    try:
                        async with AsyncExitStack() as stack:
                            ctx = QueryContext(connection, stack, deadline=deadline, envelope=envelope)
                            return await handler(query, ctx)
                    except StoreUnavailable as error:
                        failed = error
                        connection.metrics.count("foldbus_query_retries_total", query=str(query.type_name))
                        log.warning("%r waits, the store does not answer: %s", handler, error)
                        await asyncio.sleep(wait_s)
                        wait_s = min(_RETRY_MAX_S, wait_s * 2)
        except TimeoutError:
            if not bound.expired():  # the function's own
                raise
            why = f": {failed}" if failed is not None else ""
            raise TookTooLong(f"{handler!r} took longer than it may ({within_s:g} s){why}") from failed


class TookTooLong(Exception):
    """Inside `foldbus` only."""


def queries_topic(service: str, *, partitions: int) -> TopicSpec:
    """`<service>.queries`; declared by services that list query functions."""
    return TopicSpec(f"{service}.queries", partitions, retention_s=RETENTION_S)


def _members(annotation: object) -> tuple[object, ...]:
    if annotation is None:
        return (type(None),)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(one for part in typing.get_args(annotation) for one in _members(part))
    return (annotation,)


def _is_subclass(one: object, wanted: object) -> bool:
    return isinstance(one, type) and isinstance(wanted, type) and issubclass(one, wanted)


__all__ = [
    "BadQueryAnswer",
    "BadQueryHandler",
    "Queries",
    "QueryContext",
    "QueryHandler",
    "TookTooLong",
    "queries_topic",
]
