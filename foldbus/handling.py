"""Handlers behind the consumer engine: one transaction per message, keys side by side, each key in order.

Deciders' commands of the same batch go to their own processor in one call: the two meet in no key.

The claim of a message is the closing statement of its transaction, so that it carries the answer. Its first statement
is `Store.take`, which keeps everybody else from the same message meanwhile (docs/decisions/0008).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from bus.codec import check_size, decode_command
from bus.envelope import Envelope, Failure
from bus.errors import BadInput
from bus.messages import Message, Refused
from bus.processing import Again, Done, Failed, Item, Processor, Result, Watermarks
from bus.transport import Delivery
from eventstore.errors import StoreUnavailable
from eventstore.port import Claim, ClaimState, Fence, Outcome, Standing, Tx, Unit, Verdict
from foldbus.claims import Claims, Work, answered
from foldbus.handlers import Context, Handler

if TYPE_CHECKING:
    from foldbus.connection import Connection

log = logging.getLogger("foldbus.runtime")

AT_ONCE = 8
"""So many handlers of one processor run side by side: each may hold a connection."""


class HandlerProcessor:
    """Implements `bus.processing.Processor`. `inner` takes what is no handler's, and stores the watermarks."""

    def __init__(
        self, connection: Connection, inner: Processor, handlers: Mapping[str, Handler], *, consumer: str
    ) -> None:
        self.group, self.consumer = inner.group, consumer
        self._connection, self._inner, self._handlers = connection, inner, handlers
        self._claims = Claims(
            consumer=consumer,
            service=connection.service.name,
            store=connection.store,
            ids=connection.ids,
            clock=connection.clock,
            metrics=connection.metrics,
            max_bytes=connection.transport.max_bytes,
        )
        self._turns = asyncio.Semaphore(AT_ONCE)

    def wants(self, type_name: str) -> bool:
        return type_name in self._handlers or self._inner.wants(type_name)

    # --- a batch ------------------------------------------------------------------------------------------------

    async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Result]:
        ours = {item.envelope.key for item in batch if item.envelope.type in self._handlers}
        chains: dict[str, list[int]] = {}
        others: list[int] = []
        for place, item in enumerate(batch):
            if item.envelope.key in ours:
                chains.setdefault(item.envelope.key, []).append(place)
            else:
                others.append(place)
        results: list[Result] = [Again() for _ in batch]
        errors: list[Exception] = []

        async def rest() -> None:
            if others or watermarks:
                for place, result in zip(
                    others, await self._inner.process([batch[place] for place in others], watermarks), strict=True
                ):
                    results[place] = result

        async def chain(places: Sequence[int]) -> None:
            for place in places:
                async with self._turns:
                    results[place] = await self._one(batch[place])
                if not isinstance(results[place], Done):
                    return  # what is behind it waits

        async def noted(work: Any) -> None:
            try:
                await work
            except Exception as error:
                errors.append(error)

        async with asyncio.TaskGroup() as group:
            for work in (rest(), *map(chain, chains.values())):
                group.create_task(noted(work))
        if errors:
            # Nothing is known of some: all are given again, and those that are done answer as duplicates.
            raise errors[0]
        return results

    async def _one(self, item: Item) -> Result:
        handler = self._handlers.get(item.envelope.type)
        if handler is None:
            return (await self._inner.process([item], {}))[0]
        work = Work(item)
        await self._claims.settle_known([work])
        if work.result is not None:
            return work.result
        if work.unit is not None:
            return await self._commit(work, work.unit)
        try:
            message = self._decoded(item.envelope, handler)
        except BadInput as error:
            return Failed(error)
        return await self._handle(work, handler, message)

    def _decoded(self, envelope: Envelope, handler: Handler) -> Message:
        codec = self._connection.service.codec
        return decode_command(codec, envelope, handler.types) if handler.commands else codec.decode(envelope)

    async def _handle(self, work: Work, handler: Handler, message: Message) -> Result:
        connection, envelope = self._connection, work.item.envelope
        failpoint = connection.failpoint
        try:
            async with AsyncExitStack() as stack:
                ctx = self._context(envelope, stack)
                try:
                    async with asyncio.timeout(handler.timeout_s):
                        value = await handler(message, ctx)
                        await ctx.finish()
                finally:
                    ctx.close()
                unit = self._unit(envelope, value, ctx)
                failpoint.hit("before-commit")
                if ctx.tx is not None:
                    (outcome,) = await connection.store.commit([unit], tx=ctx.tx)
                    if outcome.verdict is not Verdict.COMMITTED:
                        raise _Lost(outcome)
            if ctx.tx is None:
                return await self._commit(work, unit)
        except _Known as known:
            self._claims.settle(work, known.standing)
            return work.result or await self._commit(work, work.unit or Unit())
        except _Lost as lost:
            return await self._judge(work, lost.outcome)
        except Refused as refusal:
            try:
                unit = self._unit(envelope, refusal, None)
            except Exception as error:  # too large, or no JSON: this message fails, nobody else
                work.item.examine = True
                return Failed(error)
            return await self._commit(work, unit)
        except StoreUnavailable:
            raise
        except Exception as error:
            if _connection_lost(error):
                raise StoreUnavailable(f"{handler!r}: the database went away, nothing is known: {error}") from error
            work.item.examine = True  # it may have been given up before
            return Failed(error)
        failpoint.hit("after-commit")
        self._connection.metrics.count("foldbus_handled_total", consumer=self.consumer)
        return Done()

    def _context(self, envelope: Envelope, stack: AsyncExitStack) -> Context:
        connection = self._connection

        def make(message: Message, *, topic: str | None, id: UUID | None = None) -> Envelope:
            origin = self._claims.origin(envelope)
            return connection.service.codec.encode(message, replace(origin, id=id or origin.id), topic=topic)

        async def take(tx: Tx) -> None:
            standing = await connection.store.take(tx, self.consumer, envelope.id)
            if standing.state in (ClaimState.DONE, ClaimState.DEAD, ClaimState.CANCELLED):
                raise _Known(standing)

        return Context(
            envelope,
            service=connection.service.name,
            make=make,
            store=connection.store,
            max_bytes=connection.transport.max_bytes,
            now=connection.clock.now(),
            take=take,
            stack=stack,
        )

    def _unit(self, envelope: Envelope, answer: Any, ctx: Context | None) -> Unit:
        reply = None
        if answered(envelope):
            reply = self._connection.service.codec.encode_reply(envelope, answer, self._claims.origin(envelope))
            check_size(reply, self._connection.transport.max_bytes)
        undoes = envelope.undoes
        claim = Claim(
            self.consumer,
            envelope.id,
            envelope.key,
            reply=reply,
            fences=undoes,
            fence=Fence.EXPECT_DONE if undoes is not None else None,
        )
        if ctx is None:
            return Unit(claim)
        return Unit(claim, appends=ctx.appends, asserts=ctx.asserts, outgoing=ctx.outgoing)

    async def _commit(self, work: Work, unit: Unit) -> Result:
        (outcome,) = await self._connection.store.commit([unit])
        return await self._judge(work, outcome)

    async def _judge(self, work: Work, outcome: Outcome) -> Result:
        resend: list[Unit] = []
        result = self._claims.result(work, outcome, resend)
        if resend:
            await self._connection.store.commit(resend)
        return result

    # --- the rest -----------------------------------------------------------------------------------------------

    async def give_up(self, item: Item, failure: Failure) -> Result:
        return await self._claims.give_up(item, failure)

    async def give_up_raw(self, delivery: Delivery, failure: Failure) -> None:
        await self._claims.give_up_raw(delivery, failure)

    async def stored_watermarks(self) -> Watermarks:
        return await self._inner.stored_watermarks()

    async def store_watermarks(self, watermarks: Watermarks) -> None:
        await self._inner.store_watermarks(watermarks)

    def forget(self, topics: Collection[tuple[str, int]]) -> None:
        self._inner.forget(topics)


class _Known(BaseException):
    """The message was handled before: the transaction is left, nothing written. Passes a handler's `except Exception`
    by, as a cancellation does."""

    def __init__(self, standing: Standing) -> None:
        super().__init__(str(standing.state))
        self.standing = standing


class _Lost(Exception):
    """The unit was not written: the transaction is rolled back."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(str(outcome.verdict))
        self.outcome = outcome


def _connection_lost(error: BaseException) -> bool:
    """Did the user's statement fail because its connection did? SQLAlchemy says so on its own errors."""
    return getattr(error, "connection_invalidated", False) is True
