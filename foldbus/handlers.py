"""Handlers: plain functions with a context, for what SQL says better than events.

    async def move_customer(command: MoveCustomer, ctx: Context) -> CustomerMoved:
        sql = await ctx.sql()
        await sql.execute(update(customers).where(…))
        ctx.publish(CustomerMoved(…))

A handler has a transaction of its own, begun at its first `ctx.sql()`: what it writes there, what it stages on `ctx`,
its answer and the claim that the message is done are committed together, or nothing is. A message that comes twice has
one effect. Whatever leaves the database (a mail, a payment) is not undone with it and does not belong in here.

A function without `async` runs in a thread, with a `ThreadContext`, so that it may block.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import typing
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from datetime import datetime
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar
from uuid import UUID

from pydantic import BaseModel

from bus.envelope import Envelope
from bus.errors import FoldbusError
from bus.messages import Command, Event, Message
from eventstore.decider import BadDecider, parameter_types
from eventstore.port import Store, Tx
from foldbus.staging import MakeEnvelope, Staging

if TYPE_CHECKING:
    from sqlalchemy import CursorResult, Executable
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

T = TypeVar("T")

_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")


class BadHandler(FoldbusError):
    """A handler is declared so that it cannot work; found at start-up, nothing was opened."""


class Handler:
    """A function as a service lists it, with what its annotations say.

    It takes commands of its own service, which it answers with what it returns, or events of any service: then it is a
    subscription with its own consumer group, named after the function unless `name` says otherwise. Its first
    parameter's annotation (a class or a union of classes) names what it takes. Renaming a subscription starts it anew.

    An attempt that takes longer than `timeout_s` failed, and is tried again like any other. (PostgreSQL ends a
    transaction of ours that stands idle for 60 s, since it may hold up readers.)
    """

    def __init__(self, function: Callable[..., Any], *, name: str | None = None, timeout_s: float = 50.0) -> None:
        self.function, self.timeout_s = function, timeout_s
        self.name = name or getattr(function, "__name__", "").strip("_").replace("_", "-")
        self.in_thread = not inspect.iscoroutinefunction(function)
        try:
            self.messages = parameter_types(function, 0, Message)
        except BadDecider as error:
            raise BadHandler(f"handler {error}") from error
        self.commands = tuple(one for one in self.messages if _is_command(one))
        self.events = tuple(one for one in self.messages if issubclass(one, Event))
        self.types = frozenset(str(one.type_name) for one in self.messages)
        self._check()

    def __repr__(self) -> str:
        return f"handler {self.name!r}"

    def _check(self) -> None:
        if _NAME.fullmatch(self.name) is None:
            raise BadHandler(
                f"{self.name!r} is no name for a handler; wanted up to 40 of a-z, 0-9 and -, a letter first"
            )
        if len(self.commands) + len(self.events) != len(self.messages) or (self.commands and self.events):
            found = ", ".join(one.__name__ for one in self.messages)
            raise BadHandler(f"{self!r} takes {found}; wanted commands only, or events only")
        if len(inspect.signature(self.function).parameters) != 2:
            raise BadHandler(f"{self!r} wants two parameters: (message, ctx)")
        given = typing.get_type_hints(self.function).get("return", inspect.Signature.empty)
        if given is inspect.Signature.empty or given is Any:
            return  # then its answers are looked at one by one
        gives = _members(given)
        for command in self.commands:
            wanted = command.reply_type()
            if (wanted or NoneType) not in gives and not (
                wanted is not None and any(isinstance(one, type) and issubclass(one, wanted) for one in gives)
            ):
                raise BadHandler(
                    f"{self!r} returns {given!r}, which cannot answer {command.__name__}: "
                    f"wanted {'None' if wanted is None else wanted.__name__}"
                )

    async def __call__(self, message: Message, ctx: Context) -> BaseModel | None:
        """Its answer. Raises BadAnswer when that is not what the command is answered with."""
        if self.in_thread:
            loop = asyncio.get_running_loop()
            value = await asyncio.to_thread(self.function, message, ThreadContext(ctx, loop))
        else:
            value = await self.function(message, ctx)
        kind: type[Message] = type(message)
        wanted = kind.reply_type() if _is_command(kind) else None
        if wanted is None:
            return None
        if not isinstance(value, wanted):
            raise BadAnswer(
                f"{self!r} answered {kind.__name__} with {type(value).__name__}; wanted {wanted.__name__}; "
                "nothing was stored"
            )
        return value


class BadAnswer(FoldbusError):
    """A handler returned something else than its command is answered with. Nothing was stored."""


class Context(Staging):
    """What a handler has besides its message: of one attempt, closed when the handler has returned.

    `publish`, `send` and `append` stage what is written with the transaction; see `Staging`.
    """

    def __init__(
        self,
        envelope: Envelope,
        *,
        service: str,
        make: MakeEnvelope,
        store: Store,
        max_bytes: int,
        now: datetime,
        take: Callable[[Tx], Awaitable[None]],
        stack: AsyncExitStack,
    ) -> None:
        super().__init__(service, make, max_bytes=max_bytes)
        self.envelope, self.now = envelope, now
        """`now` is when this attempt began."""
        self.tx: Tx | None = None
        self._store, self._take, self._stack = store, take, stack
        self._session: AsyncSession | None = None
        self._closed = False
        self._opening = asyncio.Lock()

    @property
    def message_id(self) -> UUID:
        """The same at every attempt and delivery: an idempotency key for whatever is called outside."""
        return self.envelope.id

    @property
    def correlation_id(self) -> UUID:
        return self.envelope.correlation_id

    async def sql(self) -> AsyncConnection:
        """SQLAlchemy's connection in this handler's transaction; the same one at a second call. On SQLite it holds the
        file's write lock: be quick. It is committed when the handler returns: do not do that here."""
        self._check_open()
        async with self._opening:
            if self.tx is None:
                tx = await self._stack.enter_async_context(self._store.transaction())
                await self._take(tx)
                self.tx = tx
        return self.tx.sql

    async def session(self) -> AsyncSession:
        """An ORM session on `sql()`; flushed when the handler returns."""
        from sqlalchemy.ext.asyncio import AsyncSession

        sql = await self.sql()
        if self._session is None:
            # Its commit() ends a savepoint, never the transaction that the claim is in.
            self._session = AsyncSession(bind=sql, join_transaction_mode="create_savepoint", expire_on_commit=False)
            self._stack.push_async_callback(self._session.close)
        return self._session

    async def finish(self) -> None:
        """What was left to write is written; nothing is staged after this."""
        if self._session is not None:
            await self._session.flush()
            await self._session.commit()
        self._closed = True

    def close(self) -> None:
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise HandlerEnded("the handler has returned: its context is closed, this was not done")

    def _stage(self, message: Message, topic: str, id: UUID | None = None) -> UUID:
        self._check_open()
        return super()._stage(message, topic, id)


class HandlerEnded(FoldbusError):
    """A context was used after its handler had returned or had been cut short. Nothing was done."""


class ThreadContext:
    """A `Context` as seen from a handler's thread: the same verbs, which wait for the event loop."""

    def __init__(self, ctx: Context, loop: asyncio.AbstractEventLoop) -> None:
        self._ctx, self._loop = ctx, loop

    @property
    def message_id(self) -> UUID:
        return self._ctx.message_id

    @property
    def correlation_id(self) -> UUID:
        return self._ctx.correlation_id

    @property
    def envelope(self) -> Envelope:
        return self._ctx.envelope

    @property
    def now(self) -> datetime:
        return self._ctx.now

    def execute(self, statement: Executable, parameters: Any = None) -> CursorResult[Any]:
        """One statement in the handler's transaction; its rows are at hand when it returns."""

        async def run() -> CursorResult[Any]:
            return await (await self._ctx.sql()).execute(statement, parameters)

        return self._wait(run())

    def publish(self, event: Event) -> UUID:
        return self._call(self._ctx.publish, event)

    def send(self, command: Command[Any], *, id: UUID | None = None) -> UUID:
        return self._call(lambda: self._ctx.send(command, id=id))

    def append(self, *given: Any, **options: Any) -> None:
        """See `Staging.append`."""
        self._call(lambda: self._ctx.append(*given, **options))

    def _call(self, function: Callable[..., T], *given: Any) -> T:
        async def run() -> T:
            return function(*given)

        return self._wait(run())

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _is_command(message: type[Message]) -> TypeGuard[type[Command[Any]]]:
    return issubclass(message, Command)


def _members(annotation: object) -> tuple[object, ...]:
    if annotation is None:
        return (NoneType,)
    arguments = typing.get_args(annotation)
    return tuple(one for part in arguments for one in _members(part)) if arguments else (annotation,)


__all__ = ["BadAnswer", "BadHandler", "Context", "Handler", "HandlerEnded", "ThreadContext"]
