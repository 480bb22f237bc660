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
import math
import types
import typing
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast
from uuid import UUID

from pydantic import BaseModel, RootModel, ValidationError

from bus.codec import check_size, died_reply, expired_reply, explain
from bus.envelope import Envelope, Failure, Kind, Offset, Origin, Version
from bus.errors import BadInput, BusError, FoldbusError, MessageTooLarge
from bus.messages import Message, Query, Refused
from bus.processing import Done, Item, Result, Watermarks
from bus.transport import Delivery, TopicSpec
from eventstore.decider import BadDecider, Decider, parameter_types
from eventstore.errors import StoreUnavailable
from eventstore.port import Standing
from eventstore.repository import Loaded
from foldbus.claims import Claims
from foldbus.expiry import how_late

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


class QueryProcessor:
    """Implements `bus.processing.Processor` for the queries of one service.

    A query counts as done when it was taken up: its offset may be committed before it is answered. Nothing is stored,
    also no watermark: the group's offset alone says where to go on, so a restored database changes nothing here.
    """

    def __init__(self, connection: Connection, *, tolerance_s: float) -> None:
        service = connection.service.name
        self.group = f"{service}.queries"
        self._connection, self._tolerance_s = connection, tolerance_s
        self._claims = Claims(
            consumer=self.group,
            service=service,
            store=connection.store,
            ids=connection.ids,
            clock=connection.clock,
            metrics=connection.metrics,
            max_bytes=connection.transport.max_bytes,
        )
        self._room = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    def wants(self, type_name: str) -> bool:
        return True  # what nobody here knows is answered, too

    async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Result]:
        """Returns when the last one has found room."""
        for item in batch:
            await self._room.acquire()
            task = asyncio.create_task(self._serve(item.envelope), name="query")
            self._tasks.add(task)
            task.add_done_callback(self._served)
        return [Done() for _ in batch]

    def _served(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._connection.metrics.count("foldbus_query_bugs_total")
            log.error("a query was not answered", exc_info=error)

    async def close(self, *, timeout_s: float) -> None:
        """Waits for those that are being answered; cuts short what takes longer."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    # --- one query --------------------------------------------------------------------------------------------------

    async def _serve(self, envelope: Envelope) -> None:
        reply, outcome = await self._reply(envelope)
        known = envelope.type in self._connection.service.registry.types
        self._connection.metrics.count(
            "foldbus_queries_total", query=envelope.type if known else "unknown", outcome=outcome
        )
        if reply is not None and reply.topic is not None:
            await self._send(envelope, reply)

    async def _reply(self, envelope: Envelope) -> tuple[Envelope | None, str]:
        """The reply, if there is one, and how it went."""
        connection = self._connection
        codec, origin = connection.service.codec, self._claims.origin(envelope)
        late_s = how_late(envelope, connection.clock.now(), tolerance_s=self._tolerance_s)
        if late_s is not None:
            return self._expired(envelope, late_s, origin), "expired"
        left_s = math.inf
        if envelope.deadline is not None:
            left_s = (envelope.deadline - connection.clock.now()).total_seconds() + self._tolerance_s
        try:
            query = self._decoded(envelope)
            handler = connection.queries.handler_of(type(query))
            if handler is None:
                raise QueryUnknown(f"{envelope.type} is no query that {connection.service.name!r} answers")
            answer: BaseModel | Refused = await connection.queries.answer(
                handler, query, within_s=left_s, envelope=envelope
            )
        except Refused as refusal:
            answer = refusal
        except TookTooLong as late:
            log.warning("query %s %s: %s", envelope.type, envelope.id, late)
            return died_reply(envelope, str(late), origin), "timeout"
        except Exception as error:
            log.warning("query %s %s failed: %s: %s", envelope.type, envelope.id, type(error).__name__, error)
            return died_reply(envelope, f"{type(error).__name__}: {error}", origin), "failed"
        try:
            reply = codec.encode_reply(envelope, answer, origin)
            check_size(reply, connection.transport.max_bytes)
        except (MessageTooLarge, BadInput) as error:
            log.warning("query %s %s: its answer cannot be sent: %s", envelope.type, envelope.id, error)
            return died_reply(envelope, f"{type(error).__name__}: {error}", origin), "failed"
        return reply, "refused" if isinstance(answer, Refused) else "ok"

    def _decoded(self, envelope: Envelope) -> Query[Any]:
        if envelope.kind is not Kind.QUERY:
            raise QueryUnknown(f"a {envelope.kind} arrived on {self.group}; wanted queries")
        found = self._connection.service.codec.decode(envelope)
        if not _is_query(found):
            raise QueryUnknown(f"{envelope.type} is no query")
        return found

    def _expired(self, envelope: Envelope, late_s: float, origin: Origin) -> Envelope | None:
        connection = self._connection
        connection.metrics.count("foldbus_expired_requests_total", consumer=self.group)
        log.info("%s: %s %s is skipped, it expired %.3f s ago", self.group, envelope.type, envelope.id, late_s)
        why = f"{connection.service.name!r} skipped it: it had expired {late_s:.3f} s before, by the clock there"
        return expired_reply(envelope, why, origin) if envelope.reply_to is not None else None

    async def _send(self, envelope: Envelope, reply: Envelope) -> None:
        try:
            await self._connection.publisher.publish(reply)
        except BusError as error:
            self._connection.metrics.count("foldbus_query_replies_lost_total")
            log.warning("the answer to %s %s is not sent: %s", envelope.type, envelope.id, error)

    # --- the rest of a processor ------------------------------------------------------------------------------------

    async def give_up(self, item: Item, failure: Failure) -> Result:
        del item, failure  # nothing fails here: what cannot be answered is answered with that
        return Done()

    async def give_up_raw(self, delivery: Delivery, failure: Failure) -> None:
        """Nobody could be told: its bytes are kept, as everywhere."""
        await self._claims.give_up_raw(delivery, failure)

    async def stored_watermarks(self) -> Watermarks:
        return _AheadOfAll()

    async def store_watermarks(self, watermarks: Watermarks) -> None:
        return None

    def forget(self, topics: Collection[tuple[str, int]]) -> None:
        return None


class QueryUnknown(FoldbusError):
    """Something arrived where queries are answered that is none, or none of this service's."""


class _AheadOfAll(Mapping[tuple[str, int], Offset]):
    """Says of every partition that all of it is stored: then the group's offset, the lower of the two, alone counts."""

    def __getitem__(self, key: tuple[str, int]) -> Offset:
        return 2**62

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(())

    def __len__(self) -> int:
        return 0


def queries_topic(service: str, *, partitions: int) -> TopicSpec:
    """`<service>.queries`; declared by services that list query functions."""
    return TopicSpec(f"{service}.queries", partitions, retention_s=RETENTION_S)


def _is_query(message: Message) -> TypeGuard[Query[Any]]:
    return isinstance(message, Query)


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
    "QueryProcessor",
    "TookTooLong",
    "queries_topic",
]
