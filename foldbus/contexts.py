"""What a handler has besides its message, one class per kind of handler, so that a checker sees a verb too many.

| context | of | has besides |
| --- | --- | --- |
| `Context` | `async` handlers with SQL | `sql()`, `session()`, and what it stages |
| `ThreadContext` | the same without `async` | the same verbs, which wait |
| `EffectContext` | handlers that call the outside world | `started`, and what it stages |
| `BareContext` | handlers that are called at most once | nothing: nothing is stored for them |

`Context[Resources]` says what the service's lifespan gives: `ctx.deps` is that. A context belongs to one attempt and is
closed when the handler has returned.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, cast
from uuid import UUID

from typing_extensions import TypeVar

from bus.breaker import Breaker
from bus.envelope import Envelope
from bus.errors import FoldbusError
from bus.messages import Command, Event, Message
from bus.seams import Clock
from eventstore.port import Store, Tx
from foldbus.guards import BreakerOpen, Calls, Guard, on_loop, wait_for
from foldbus.scheduling import When
from foldbus.staging import MakeEnvelope, Staging

if TYPE_CHECKING:
    from sqlalchemy import CursorResult, Executable
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

T = TypeVar("T")
Deps = TypeVar("Deps", covariant=True, default=None)


class HandlerEnded(FoldbusError):
    """A context was used after its handler had returned or had been cut short. Nothing was done."""


class HandlerContext(Generic[Deps]):
    """What all contexts have."""

    def __init__(self, envelope: Envelope, *, deps: Any, now: datetime, calls: Calls | None = None) -> None:
        self._envelope, self._now = envelope, now
        self._deps, self._calls = deps, calls or Calls({})
        self._loop = asyncio.get_running_loop()

    @property
    def envelope(self) -> Envelope:
        return self._envelope

    @property
    def now(self) -> datetime:
        """When this attempt began."""
        return self._now

    @property
    def deps(self) -> Deps:
        """What the service's `lifespan` gave; None without one."""
        return cast("Deps", self._deps)

    @property
    def message_id(self) -> UUID:
        """The same at every attempt and delivery: an idempotency key for whatever is called outside."""
        return self.envelope.id

    @property
    def correlation_id(self) -> UUID:
        return self.envelope.correlation_id

    def breaker(self, breaker: Breaker | str) -> Guard:
        """Around a call of that dependency, which the handler names in `breakers=`: `async with ctx.breaker("bank"):`,
        or `with` in a thread. What leaves the block says how the dependency is, also when the handler catches it.
        Raises BreakerOpen, before the call."""
        return self._calls.guard(breaker if isinstance(breaker, str) else breaker.name, self._loop)


class Context(HandlerContext[Deps], Staging):
    """Of a handler with SQL. What `publish`, `send` and `append` stage goes with its transaction; see `Staging`."""

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
        deps: Any = None,
        calls: Calls | None = None,
    ) -> None:
        super().__init__(envelope, deps=deps, now=now, calls=calls)
        Staging.__init__(self, service, make, max_bytes=max_bytes, store_now=store.timers.now)
        self.tx: Tx | None = None
        self._store, self._take, self._stack = store, take, stack
        self._session: AsyncSession | None = None
        self._closed = False
        self._opening = asyncio.Lock()

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
        _check(self._closed)

    def _stage(self, message: Message, topic: str, id: UUID | None = None, when: When | None = None) -> UUID:
        self._check_open()
        return super()._stage(message, topic, id, when)


class ThreadContext(Generic[Deps]):
    """A `Context` as seen from a handler's thread: the same verbs, which wait for the event loop."""

    def __init__(self, ctx: Context[Deps], loop: asyncio.AbstractEventLoop) -> None:
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

    @property
    def deps(self) -> Deps:
        return self._ctx.deps

    def breaker(self, breaker: Breaker | str) -> Guard:
        """`with ctx.breaker("bank"):`; see `HandlerContext.breaker`."""
        return self._ctx.breaker(breaker)

    def execute(self, statement: Executable, parameters: Any = None) -> CursorResult[Any]:
        """One statement in the handler's transaction; its rows are at hand when it returns."""

        async def run() -> CursorResult[Any]:
            return await (await self._ctx.sql()).execute(statement, parameters)

        return wait_for(run(), self._loop)

    def publish(
        self, event: Event, *, id: UUID | None = None, at: datetime | None = None, delay_s: float | None = None
    ) -> UUID:
        """See `Staging.publish`."""
        return on_loop(self._loop, lambda: self._ctx.publish(event, id=id, at=at, delay_s=delay_s))

    def send(
        self,
        command: Command[Any],
        *,
        id: UUID | None = None,
        at: datetime | None = None,
        delay_s: float | None = None,
    ) -> UUID:
        """See `Staging.send`."""
        return on_loop(self._loop, lambda: self._ctx.send(command, id=id, at=at, delay_s=delay_s))

    def append(self, *given: Any, **options: Any) -> None:
        """See `Staging.append`."""
        on_loop(self._loop, lambda: self._ctx.append(*given, **options))


class EffectContext(HandlerContext[Deps], Staging):
    """Of a handler that calls the outside world, in a thread as well. No transaction is open while it runs; what it
    stages is committed with its answer, after it has returned.

    Pass `message_id` on as the idempotency key: an attempt may be the second one.
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
        started: bool,
        deps: Any = None,
        calls: Calls | None = None,
    ) -> None:
        super().__init__(envelope, deps=deps, now=now, calls=calls)
        Staging.__init__(self, service, make, max_bytes=max_bytes, store_now=store.timers.now)
        self.started = started
        """An earlier attempt was begun, and what it called may have happened: where the other side knows no idempotency
        keys, ask it first."""
        self._closed = False

    def close(self) -> None:
        self._closed = True

    def append(self, decider: Any, *events: Any, **options: Any) -> None:
        """See `Staging.append`."""

        def append() -> None:
            _check(self._closed)
            Staging.append(self, decider, *events, **options)

        on_loop(self._loop, append)

    def _stage(self, message: Message, topic: str, id: UUID | None = None, when: When | None = None) -> UUID:
        def stage() -> UUID:
            _check(self._closed)
            return Staging._stage(self, message, topic, id, when)

        return on_loop(self._loop, stage)


class BareContext(HandlerContext[Deps]):
    """Of a handler whose delivery is AT_MOST_ONCE: there is no transaction, no claim and nothing to stage on."""

    __slots__ = ("_calls", "_clock", "_deps", "_loop", "_read")

    def __init__(
        self, read: Callable[[], Envelope], deps: Any, clock: Clock, calls: Calls, loop: asyncio.AbstractEventLoop
    ) -> None:
        # Made for every message of a stream: nothing is looked up here, and the envelope is read when it is asked for.
        self._read, self._deps, self._clock, self._calls, self._loop = read, deps, clock, calls, loop

    @property
    def envelope(self) -> Envelope:
        """Read when it is asked for: raises Undecodable when there is something wrong with it that nobody needed."""
        return self._read()

    @property
    def now(self) -> datetime:
        return self._clock.now()


def _check(closed: bool) -> None:
    if closed:
        raise HandlerEnded("the handler has returned: its context is closed, this was not done")


__all__ = [
    "BareContext",
    "BreakerOpen",
    "Calls",
    "Context",
    "EffectContext",
    "Guard",
    "HandlerContext",
    "HandlerEnded",
    "ThreadContext",
]
