"""Calling a handler: middleware around it, its time limit, its breakers, and the answer looked at.

    async def timed(message: Message, ctx: HandlerContext, call_next: CallNext) -> Answer:
        began = time.monotonic()
        try:
            return await call_next()
        finally:
            log.info("%s took %.3f s", type(message).__name__, time.monotonic() - began)

    Service("shop", handlers=[…], middleware=[traced, timed])

The first one listed is the outermost. A middleware is inside the attempt: within the transaction and the time limit,
before the answer is checked and the claim is taken. It sees what the handler raises; what it raises itself fails the
attempt as the handler would; one that returns without `call_next` answers in the handler's place. It is called anew for
each attempt, and may let the handler run once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from bus.breaker import Circuit, Circuits, begin_all, wait_of
from bus.errors import FoldbusError
from bus.messages import Message
from foldbus.contexts import Calls, HandlerContext
from foldbus.handlers import Answer, Handler

if TYPE_CHECKING:
    from foldbus.connection import Connection

CallNext = Callable[[], Awaitable[Answer]]
Middleware = Callable[[Any, HandlerContext[Any], CallNext], Awaitable[Answer]]
WAIT_LEAST_S = 0.05


class MiddlewareError(FoldbusError):
    """A middleware called `call_next` a second time: the handler would have run twice for one claim."""


class Caller:
    """Of one connection."""

    def __init__(self, middleware: Sequence[Middleware], circuits: Circuits) -> None:
        self._middleware, self._circuits = tuple(middleware), circuits

    @classmethod
    def of(cls, connection: Connection) -> Caller:
        return cls(connection.service.middleware, connection.circuits)

    # --- breakers ---------------------------------------------------------------------------------------------------

    def circuits(self, handler: Handler) -> tuple[Circuit, ...]:
        return self._circuits.all_of(handler.breakers)

    def begin(self, handler: Handler) -> Calls | None:
        """For one attempt; None: a dependency is taken for down, and the handler must not run now."""
        if not handler.breakers:
            return _NO_CALLS
        circuits = self.circuits(handler)
        begun = begin_all(circuits)
        if begun is None:
            return None
        by_name = {circuit.breaker.name: circuit for circuit in circuits}
        return Calls(by_name, dict(zip(by_name, begun, strict=True)))

    def wait_s(self, handler: Handler) -> float:
        """How long a message of this handler waits for its dependencies, before it is worth asking again."""
        return max(WAIT_LEAST_S, wait_of(self.circuits(handler)))

    # --- the call ---------------------------------------------------------------------------------------------------

    async def call(self, handler: Handler, message: Message, ctx: HandlerContext[Any]) -> Answer:
        """Raises what the handler or a middleware raised, TimeoutError, BadAnswer."""
        async with asyncio.timeout(handler.timeout_s):
            return await self.plain(handler, message, ctx)

    async def plain(self, handler: Handler, message: Message, ctx: HandlerContext[Any]) -> Answer:
        """The same without a time limit, for who keeps one by himself."""
        if not self._middleware:
            return handler.checked(message, await handler(message, ctx))
        return handler.checked(message, await self._wrapped(handler, message, ctx)())

    def _wrapped(self, handler: Handler, message: Message, ctx: HandlerContext[Any]) -> CallNext:
        call: CallNext = _Once(lambda: handler(message, ctx))
        for middleware in reversed(self._middleware):
            call = _Once(_layer(middleware, message, ctx, call))
        return call


def _layer(middleware: Middleware, message: Message, ctx: HandlerContext[Any], inner: CallNext) -> CallNext:
    return lambda: middleware(message, ctx, inner)


class _Once:
    def __init__(self, call: CallNext) -> None:
        self._call: CallNext | None = call

    async def __call__(self) -> Answer:
        call, self._call = self._call, None
        if call is None:
            raise MiddlewareError("call_next was called a second time; a handler runs once per attempt")
        return await call()


_NO_CALLS = Calls({})


__all__ = ["CallNext", "Caller", "Middleware", "MiddlewareError"]
