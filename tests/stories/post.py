"""A small post office as its author means it: `test_planted_handlers.py` plants one mistake at a time into a copy."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, assert_type

from foldbus import (
    AT_MOST_ONCE,
    Answer,
    BareContext,
    Breaker,
    CallNext,
    Command,
    Connection,
    Context,
    EffectContext,
    Event,
    HandlerContext,
    Key,
    Message,
    Service,
    ThreadContext,
    handler,
)


class Mailed(Event, type="post.mailed.v1"):
    letter_id: Key[str]
    receipt: str


class Mail(Command[Mailed], type="post.mail.v1"):
    letter_id: Key[str]
    text: str


class Forget(Command[None], type="post.forget.v1"):
    letter_id: Key[str]


class Mailer:
    async def send(self, text: str, *, key: str) -> str:
        return key


@dataclass(frozen=True)
class Resources:
    mailer: Mailer


@asynccontextmanager
async def resources(connection: Connection) -> AsyncGenerator[Resources]:
    yield Resources(Mailer())


smtp = Breaker("smtp", counts=(OSError,))


@handler(effect=True, timeout_s=10, breakers=[smtp])
async def mail(command: Mail, ctx: EffectContext[Resources]) -> Mailed:
    async with ctx.breaker(smtp):
        receipt = await ctx.deps.mailer.send(command.text, key=str(ctx.message_id))
    assert_type(receipt, str)
    return Mailed(letter_id=command.letter_id, receipt=receipt)


async def forget(command: Forget, ctx: Context) -> None:
    sql = await ctx.sql()
    await sql.commit()


def note(event: Mailed, ctx: ThreadContext[Resources]) -> None:
    assert_type(ctx.deps, Resources)


@handler(delivery=AT_MOST_ONCE)
async def count(event: Mailed, ctx: BareContext) -> None:
    assert_type(ctx.deps, None)


async def timed(message: Message, ctx: HandlerContext[Any], call_next: CallNext) -> Answer:
    return await call_next()


app = Service("post", handlers=[mail, forget, note, count], lifespan=resources, middleware=[timed])
