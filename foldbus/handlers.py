"""Handlers: plain functions with a context, for what SQL says better than events, and for what happens outside.

    async def move_customer(command: MoveCustomer, ctx: Context) -> CustomerMoved:
        sql = await ctx.sql()
        await sql.execute(update(customers).where(…))
        ctx.publish(CustomerMoved(…))

A handler has a transaction of its own, begun at its first `ctx.sql()`: what it writes there, what it stages on `ctx`,
its answer and the claim that the message is done are committed together, or nothing is. A message that comes twice has
one effect. Whatever leaves the database (a mail, a payment) is not undone with it and belongs into an effect:

    @handler(effect=True, timeout_s=10, breakers=[bank])
    async def take_payment(command: TakePayment, ctx: EffectContext[Resources]) -> PaymentTaken:
        await ctx.deps.bank.charge(command.amount_cents, idempotency_key=str(ctx.message_id))
        return PaymentTaken(…)

No transaction is open while an effect runs. That it was begun is recorded before, for as long as it may take: nobody
else is at the same message meanwhile, and what was begun is never called undone (`foldbus/effects.py`).

A function without `async` runs in a thread, so that it may block.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import typing
from collections.abc import Awaitable, Callable, Sequence
from types import NoneType
from typing import Any, Literal, TypeGuard, overload

from pydantic import BaseModel

from bus.breaker import Breaker
from bus.errors import FoldbusError
from bus.messages import Command, Event, Message
from eventstore.decider import BadDecider, parameter_types
from foldbus.contexts import BareContext, Context, EffectContext, HandlerContext, HandlerEnded, ThreadContext
from foldbus.delivery import AT_MOST_ONCE, EXACTLY_ONCE, DeliveryMode

_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")

Answer = BaseModel | None
SqlFunction = (
    Callable[[Any, Context[Any]], Awaitable[BaseModel | None]] | Callable[[Any, ThreadContext[Any]], BaseModel | None]
)
EffectFunction = (
    Callable[[Any, EffectContext[Any]], Awaitable[BaseModel | None]]
    | Callable[[Any, EffectContext[Any]], BaseModel | None]
)
BareFunction = Callable[[Any, BareContext[Any]], Awaitable[None]] | Callable[[Any, BareContext[Any]], None]


class BadHandler(FoldbusError):
    """A handler is declared so that it cannot work; found at start-up, nothing was opened."""


class Handler:
    """A function as a service lists it, with what its annotations say.

    It takes commands of its own service, which it answers with what it returns, or events of any service: then it is a
    subscription with its own consumer group, named after the function unless `name` says otherwise. Its first
    parameter's annotation (a class or a union of classes) names what it takes. Renaming a subscription starts it anew.

    An attempt that takes longer than `timeout_s` failed, and is tried again like any other. (PostgreSQL ends a
    transaction of ours that stands idle for 60 s, since it may hold up readers; an effect may take longer.)

    `delivery` is how often it may be called for one event (`foldbus/delivery.py`); commands, which want an answer, and
    effects are EXACTLY_ONCE. `breakers` are the dependencies that it calls: while one of them is taken for down, its
    messages wait and no attempt is counted. `at_once` bounds how many keys an effect, or a handler that is called at
    most once, is at side by side; handlers with SQL share eight turns, since each may hold a connection.
    """

    @overload
    def __init__(
        self,
        function: SqlFunction,
        *,
        name: str | None = ...,
        timeout_s: float = ...,
        delivery: Literal[DeliveryMode.EXACTLY_ONCE, DeliveryMode.AT_LEAST_ONCE] = ...,
        breakers: Sequence[Breaker] = ...,
    ) -> None: ...

    @overload
    def __init__(
        self,
        function: EffectFunction,
        *,
        effect: Literal[True],
        name: str | None = ...,
        timeout_s: float = ...,
        breakers: Sequence[Breaker] = ...,
        at_once: int = ...,
    ) -> None: ...

    @overload
    def __init__(
        self,
        function: BareFunction,
        *,
        delivery: Literal[DeliveryMode.AT_MOST_ONCE],
        name: str | None = ...,
        timeout_s: float = ...,
        breakers: Sequence[Breaker] = ...,
        at_once: int = ...,
    ) -> None: ...

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        timeout_s: float = 50.0,
        effect: bool = False,
        delivery: DeliveryMode = EXACTLY_ONCE,
        breakers: Sequence[Breaker] = (),
        at_once: int = 8,
    ) -> None:
        self.function, self.timeout_s, self.effect, self.delivery = function, timeout_s, effect, delivery
        self.breakers, self.at_once = tuple(breakers), at_once
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

    @property
    def context(self) -> type[HandlerContext[Any]] | type[ThreadContext[Any]]:
        """The class of what it is given besides its message."""
        if self.effect:
            return EffectContext
        if self.delivery is AT_MOST_ONCE:
            return BareContext
        return ThreadContext if self.in_thread else Context

    @property
    def deps(self) -> type | None:
        """What its context's annotation wants of the service's lifespan, as far as that is a class."""
        found = [one for one in typing.get_args(self._annotated_context()) if isinstance(one, type)]
        return found[0] if found and found[0] is not NoneType else None

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
        self._check_mode()
        self._check_answer()

    def _check_mode(self) -> None:
        if self.timeout_s <= 0 or self.at_once < 1:
            raise BadHandler(
                f"{self!r}: timeout_s={self.timeout_s:g}, at_once={self.at_once}; wanted above 0, and 1 or more"
            )
        if self.delivery is not EXACTLY_ONCE and self.commands:
            raise BadHandler(
                f"{self!r} takes {self.commands[0].__name__}, a command, {self.delivery}: its answer is stored with "
                "its claim, so wanted EXACTLY_ONCE"
            )
        if self.delivery is not EXACTLY_ONCE and self.effect:
            raise BadHandler(
                f"{self!r} is an effect, {self.delivery}: its claim is what makes it one; wanted EXACTLY_ONCE"
            )
        names = [one.name for one in self.breakers]
        if len(set(names)) != len(names):
            raise BadHandler(f"{self!r} names a breaker twice: {', '.join(names)}")
        annotated = self._annotated_context()
        given = typing.get_origin(annotated) or annotated
        if isinstance(given, type) and given is not Any and not issubclass(self.context, given):
            raise BadHandler(
                f"{self!r} wants a {given.__name__}, but is given a {self.context.__name__}: {self._kind()}"
            )

    def _kind(self) -> str:
        if self.effect:
            return "it is an effect"
        if self.delivery is AT_MOST_ONCE:
            return "nothing is stored for what is called at most once"
        return "it runs in a thread, for want of `async`" if self.in_thread else "it has a transaction"

    def _annotated_context(self) -> Any:
        names = list(inspect.signature(self.function).parameters)
        return typing.get_type_hints(self.function).get(names[1])

    def _check_answer(self) -> None:
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

    async def __call__(self, message: Message, ctx: HandlerContext[Any]) -> BaseModel | None:
        """What the function returns; from a thread, if it is not `async`."""
        function: Any = self.function
        if not self.in_thread:
            return await function(message, ctx)  # type: ignore[no-any-return]
        given = ThreadContext(ctx, asyncio.get_running_loop()) if isinstance(ctx, Context) else ctx
        return await asyncio.to_thread(function, message, given)

    def checked(self, message: Message, answer: object) -> BaseModel | None:
        """The answer to a message. Raises BadAnswer when that is not what the command is answered with."""
        kind: type[Message] = type(message)
        wanted = kind.reply_type() if _is_command(kind) else None
        if wanted is None:
            return None
        if not isinstance(answer, wanted):
            raise BadAnswer(
                f"{self!r} answered {kind.__name__} with {type(answer).__name__}; wanted {wanted.__name__}; "
                "nothing was stored"
            )
        return answer


@overload
def handler(
    *,
    name: str | None = ...,
    timeout_s: float = ...,
    delivery: Literal[DeliveryMode.EXACTLY_ONCE, DeliveryMode.AT_LEAST_ONCE] = ...,
    breakers: Sequence[Breaker] = ...,
) -> Callable[[SqlFunction], Handler]: ...


@overload
def handler(
    *,
    effect: Literal[True],
    name: str | None = ...,
    timeout_s: float = ...,
    breakers: Sequence[Breaker] = ...,
    at_once: int = ...,
) -> Callable[[EffectFunction], Handler]: ...


@overload
def handler(
    *,
    delivery: Literal[DeliveryMode.AT_MOST_ONCE],
    name: str | None = ...,
    timeout_s: float = ...,
    breakers: Sequence[Breaker] = ...,
    at_once: int = ...,
) -> Callable[[BareFunction], Handler]: ...


def handler(**options: Any) -> Callable[[Any], Handler]:
    """`Handler(function, …)` as a decorator. It registers nothing: what a service runs is what it lists."""

    def make(function: Callable[..., Any]) -> Handler:
        return Handler(function, **options)

    return make


class BadAnswer(FoldbusError):
    """A handler returned something else than its command is answered with. Nothing was stored."""


def _is_command(message: type[Message]) -> TypeGuard[type[Command[Any]]]:
    return issubclass(message, Command)


def _members(annotation: object) -> tuple[object, ...]:
    if annotation is None:
        return (NoneType,)
    arguments = typing.get_args(annotation)
    return tuple(one for part in arguments for one in _members(part)) if arguments else (annotation,)


__all__ = [
    "Answer",
    "BadAnswer",
    "BadHandler",
    "BareContext",
    "BareFunction",
    "Context",
    "EffectContext",
    "EffectFunction",
    "Handler",
    "HandlerContext",
    "HandlerEnded",
    "SqlFunction",
    "ThreadContext",
    "handler",
]
