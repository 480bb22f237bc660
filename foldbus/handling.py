"""Handlers behind the consumer engine: each message on its own, keys side by side, each key in order.

Deciders' commands of the same batch go to their own processor in one call: the two meet in no key. Handlers that take
longer than a moment are waited for by their keys alone (`bus.processing.Later`); what waits for its turn meanwhile is
bounded, and left to others when its partition goes to them.

- With SQL: one transaction per message. Its claim is the closing statement, so that it carries the answer; its first
  statement is `Store.take`, which keeps everybody else from the same message meanwhile (docs/decisions/0008).
- An effect: no transaction while it runs, a claim that says that it was begun (`effects.py`).
- AT_LEAST_ONCE: a transaction where the handler wants one, and no claim.
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
from bus.processing import Again, Answer, Aside, Done, Failed, Item, Later, Processor, Result, Watermarks
from bus.transport import Delivery
from eventstore.errors import StoreUnavailable
from eventstore.port import Claim, ClaimState, Outcome, Standing, Tx, Unit, Verdict
from foldbus.calling import Caller
from foldbus.claims import ENDED, STARTED_AGAIN_S, Claims, Work, answered
from foldbus.contexts import Calls, Context, EffectContext
from foldbus.delivery import EXACTLY_ONCE
from foldbus.effects import Attempt, EffectClaims
from foldbus.handlers import Handler
from foldbus.parking import Parker

if TYPE_CHECKING:
    from foldbus.connection import Connection

log = logging.getLogger("foldbus.runtime")

_IN_QUEUES = frozenset((ClaimState.PARKED, ClaimState.KEY_PARKED))
_NOT_NOW = ENDED | {ClaimState.STARTED}
AT_ONCE = 8
"""So many handlers with SQL of one processor run side by side: each may hold a connection."""
AHEAD = 16
"""So many keys, for each that may be at work at once, are taken up before the next batch has to wait."""
BATCH_MAX = AT_ONCE * AHEAD
MOMENT_S = 0.02
"""How long a batch waits for its slowest message, so that quick ones are answered together."""


class HandlerProcessor:
    """Implements `bus.processing.Processor`. `inner` takes what is no handler's, and stores the watermarks."""

    def __init__(
        self,
        connection: Connection,
        inner: Processor,
        handlers: Mapping[str, Handler],
        *,
        consumer: str,
        parker: Parker | None = None,
        moment_s: float | None = None,
    ) -> None:
        """`moment_s`: how long `process` waits for what takes long, before it answers `Later`; None: to its end."""
        self._moment_s = moment_s
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
            parker=parker,
        )
        self._effects = EffectClaims(self._claims, connection.store, connection.metrics)
        self._caller = Caller.of(connection)
        shared = asyncio.Semaphore(AT_ONCE)
        self._turns = {
            handler: asyncio.Semaphore(handler.at_once)
            if handler.effect or handler.delivery is not EXACTLY_ONCE
            else shared
            for handler in handlers.values()
        }
        limits = [handler.at_once for handler in {*handlers.values()} if self._turns[handler] is not shared]
        self._room = AHEAD * (sum(limits) + AT_ONCE * (shared in self._turns.values()))
        self._chains: set[asyncio.Task[Result]] = set()

    def wants(self, type_name: str) -> bool:
        return type_name in self._handlers or self._inner.wants(type_name)

    # --- a batch ------------------------------------------------------------------------------------------------

    async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Answer]:
        ours = {item.envelope.key for item in batch if item.envelope.type in self._handlers}
        chains: dict[str, _Chain] = {}
        others: list[int] = []
        for place, item in enumerate(batch):
            if item.envelope.key in ours:
                chains.setdefault(item.envelope.key, _Chain()).places.append(place)
            else:
                others.append(place)
        answers: list[Answer] = [Again() for _ in batch]
        for chain in chains.values():
            chain.task = asyncio.create_task(self._chain(chain, batch, answers))
            self._chains.add(chain.task)
            chain.task.add_done_callback(self._chains.discard)
        tasks = {chain.task for chain in chains.values()}
        try:
            if others or watermarks:
                results = await self._inner.process([batch[place] for place in others], watermarks)
                for place, result in zip(others, results, strict=True):
                    answers[place] = result
            await self._wait(tasks)
            while joining := [one.task for one in chains.values() if one.joining and not one.task.done()]:
                await asyncio.wait(joining)  # what they join is answered with them
            for task in tasks:
                if task.done():
                    task.result()
        except BaseException as error:
            # Nothing is known of some: all are given again, and those that are done answer as duplicates.
            if not isinstance(error, Exception):
                for task in tasks:
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        for chain in chains.values():
            if not chain.task.done():
                chain.cut = True
                answers[chain.places[chain.at]] = Later(chain.task)
        return answers

    async def _wait(self, tasks: Collection[asyncio.Task[Result]]) -> None:
        """For all of them, or for a moment, and until there is room for the next batch."""
        if not tasks:
            return
        await asyncio.wait(tasks, timeout=self._moment_s)
        while len(self._chains) > self._room and not all(task.done() for task in tasks):
            await asyncio.wait(self._chains, return_when=asyncio.FIRST_COMPLETED)

    async def _chain(self, chain: _Chain, batch: Sequence[Item], answers: list[Answer]) -> Result:
        """One key's messages, until one is not done, or the batch was answered without it: what became of the last."""
        while True:
            item = batch[chain.places[chain.at]]
            result = await self._one(item)
            if chain.cut:
                return result
            answers[chain.places[chain.at]] = result
            behind = chain.places[chain.at + 1 :]
            if not isinstance(result, Done) or not behind:
                return result
            if isinstance(result, Aside) and item.parked is None:  # the others in one call
                chain.joining = True
                found = await self._claims.join_queue([batch[place] for place in behind])
                for place, joined in zip(behind, found, strict=True):
                    answers[place] = joined
                return result
            chain.at += 1

    async def _one(self, item: Item) -> Result:
        handler = self._handlers.get(item.envelope.type)
        if handler is None:
            (result,) = await self._inner.process([item], {})
            assert not isinstance(result, Later)
            return result
        async with self._turns[handler]:
            return Again() if item.withdrawn else await self._in_turn(item, handler)

    async def _in_turn(self, item: Item, handler: Handler) -> Result:
        work = Work(item)
        if handler.delivery is EXACTLY_ONCE:
            await self._claims.settle_known([work])
        if work.follows:
            return await self._aside(work)
        if work.result is not None:
            return work.result
        if work.unit is not None:
            return await self._commit(work, work.unit)
        try:
            message = self._decoded(item.envelope, handler)
        except BadInput as error:
            return Failed(error)
        calls = self._caller.begin(handler)
        if calls is None:
            return Again(after_s=self._caller.wait_s(handler))
        try:
            if handler.effect:
                return await self._outside(work, handler, message, calls)
            return await self._in_transaction(work, handler, message, calls)
        finally:
            calls.abandon()

    def _decoded(self, envelope: Envelope, handler: Handler) -> Message:
        codec = self._connection.service.codec
        return decode_command(codec, envelope, handler.types) if handler.commands else codec.decode(envelope)

    # --- with SQL -------------------------------------------------------------------------------------------------

    async def _in_transaction(self, work: Work, handler: Handler, message: Message, calls: Calls) -> Result:
        connection = self._connection
        failpoint, claimed = connection.failpoint, handler.delivery is EXACTLY_ONCE
        try:
            async with AsyncExitStack() as stack:
                ctx = self._context(work, stack, calls, claimed=claimed)
                try:
                    async with asyncio.timeout(handler.timeout_s):
                        value = await self._caller.plain(handler, message, ctx)
                        await ctx.finish()
                finally:
                    ctx.close()
                calls.end(None)
                unit = self._unit(work, value, ctx, claimed=claimed)
                failpoint.hit("before-commit")
                if ctx.tx is not None:
                    outcome = await self._claims.commit(work, unit, tx=ctx.tx)
                    if outcome.verdict is not Verdict.COMMITTED:
                        raise _Lost(outcome)
            if ctx.tx is None:
                return await self._commit(work, unit) if claimed or unit != Unit() else self._done()
        except _Known as known:
            return await self._found(work, known.standing)
        except _Lost as lost:
            return await self._judge(work, lost.outcome)
        except Refused as refusal:
            return await self._refused(work, refusal)
        except StoreUnavailable:
            raise
        except Exception as error:
            if _connection_lost(error):
                raise StoreUnavailable(f"{handler!r}: the database went away, nothing is known: {error}") from error
            return self._failed(work, handler, error, calls)
        failpoint.hit("after-commit")
        return self._done()

    def _context(self, work: Work, stack: AsyncExitStack, calls: Calls, *, claimed: bool) -> Context[Any]:
        connection, envelope = self._connection, work.item.envelope
        # Its own turn passes the queue, and so does the undo of a step that waits there.
        passes = work.item.parked is not None or work.step_parked

        async def take(tx: Tx) -> None:
            if not claimed:
                return
            key = None if passes else envelope.key
            standing = await connection.store.take(tx, self.consumer, envelope.id, key=key)
            if standing.state in _NOT_NOW or (standing.state in _IN_QUEUES and not passes):
                raise _Known(standing)

        return Context(
            envelope,
            service=connection.service.name,
            make=self._maker(envelope),
            store=connection.store,
            max_bytes=connection.transport.max_bytes,
            now=connection.clock.now(),
            take=take,
            stack=stack,
            deps=connection.resources.deps,
            calls=calls,
        )

    # --- effects ----------------------------------------------------------------------------------------------------

    async def _outside(self, work: Work, handler: Handler, message: Message, calls: Calls) -> Result:
        connection, item = self._connection, work.item
        if work.step_parked and not await self._effects.cancel_parked_step(work):
            item.examine = True
            return Again()
        attempt = await self._effects.begin(item, handler)
        if isinstance(attempt, Standing):
            return await self._found(work, attempt)
        over = False
        try:
            ctx = self._effect_context(item.envelope, calls, attempt)
            try:
                value = await self._caller.call(handler, message, ctx)
            finally:
                ctx.close()
            over = True
            calls.end(None)
            unit = self._unit(work, value, ctx)
        except Refused as refusal:
            over = True
            return await self._refused(work, refusal, attempt)
        except Exception as error:
            # A thread that was cut short may still be at it: nobody else shall begin before the lease ends.
            if over or not handler.in_thread or not isinstance(error, TimeoutError):
                await self._effects.release(attempt)
            return self._failed(work, handler, error, calls)
        except BaseException:
            if not handler.in_thread:
                await self._effects.release(attempt)
            raise
        connection.failpoint.hit("before-commit")
        outcome = await self._effects.commit(attempt, work, unit)
        connection.failpoint.hit("after-commit")
        return await self._judge(work, outcome)

    def _effect_context(self, envelope: Envelope, calls: Calls, attempt: Attempt) -> EffectContext[Any]:
        connection = self._connection
        return EffectContext(
            envelope,
            service=connection.service.name,
            make=self._maker(envelope),
            store=connection.store,
            max_bytes=connection.transport.max_bytes,
            now=connection.clock.now(),
            started=attempt.started,
            deps=connection.resources.deps,
            calls=calls,
        )

    # --- what becomes of it -----------------------------------------------------------------------------------------

    def _maker(self, envelope: Envelope) -> Any:
        def make(message: Message, *, topic: str | None, id: UUID | None = None) -> Envelope:
            origin = self._claims.origin(envelope)
            return self._connection.service.codec.encode(message, replace(origin, id=id or origin.id), topic=topic)

        return make

    def _unit(
        self, work: Work, answer: Any, ctx: Context[Any] | EffectContext[Any] | None, *, claimed: bool = True
    ) -> Unit:
        envelope, reply = work.item.envelope, None
        if answered(envelope):
            reply = self._connection.service.codec.encode_reply(envelope, answer, self._claims.origin(envelope))
            check_size(reply, self._connection.transport.max_bytes)
        claim = None
        if claimed:
            claim = Claim(
                self.consumer, envelope.id, envelope.key, reply=reply, fences=envelope.undoes, fence=work.fence
            )
        if ctx is None:
            return Unit(claim)
        return Unit(claim, appends=ctx.appends, asserts=ctx.asserts, outgoing=ctx.outgoing, timers=ctx.timers)

    def _done(self) -> Result:
        self._connection.metrics.count("foldbus_handled_total", consumer=self.consumer)
        return Done()

    def _failed(self, work: Work, handler: Handler, error: Exception, calls: Calls) -> Result:
        work.item.examine = True  # it may have been given up before
        if not calls.end(error):
            return Failed(error)
        wait_s = self._caller.wait_s(handler)
        self._connection.metrics.count("foldbus_breaker_spared_total", consumer=self.consumer)
        log.warning(
            "%s: %s %s waits %.1f s for its dependency, no attempt is counted: %s: %s",
            self.consumer, work.item.envelope.type, work.item.envelope.id, wait_s, type(error).__name__, error,
        )  # fmt: skip
        return Again(after_s=wait_s)

    async def _refused(self, work: Work, refusal: Refused, attempt: Attempt | None = None) -> Result:
        try:
            unit = self._unit(work, refusal, None)
        except Exception as error:  # too large, or no JSON: this message fails, nobody else
            work.item.examine = True
            if attempt is not None:
                await self._effects.release(attempt)
            return Failed(error)
        if attempt is not None:
            return await self._judge(work, await self._effects.commit(attempt, work, unit))
        return await self._commit(work, unit)

    async def _found(self, work: Work, standing: Standing) -> Result:
        """It was handled before, or is not ours to handle now."""
        work.item.examine = True
        match standing.state:
            case ClaimState.DONE | ClaimState.DEAD | ClaimState.CANCELLED:
                self._claims.settle(work, standing)
                return work.result or await self._commit(work, work.unit or Unit())
            case ClaimState.PARKED | ClaimState.KEY_PARKED:
                if work.item.parked is not None:
                    return Aside()  # whose turn it is handles it
                work.follows = True
                return await self._aside(work)
            case ClaimState.STARTED | ClaimState.NEW:
                return Again(after_s=STARTED_AGAIN_S)

    async def _aside(self, work: Work) -> Result:
        await self._claims.set_aside([work])
        return work.result or Again()

    async def _commit(self, work: Work, unit: Unit) -> Result:
        return await self._judge(work, await self._claims.commit(work, unit))

    async def _judge(self, work: Work, outcome: Outcome) -> Result:
        resend: list[Unit] = []
        result = self._claims.result(work, outcome, resend)
        if resend:
            await self._connection.store.commit(resend)
        return await self._aside(work) if work.follows else result

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


class _Chain:
    """The messages of one key in a batch. `at`: which of `places` is at work; `joining`: those behind it follow it into
    the key's queue; `cut`: the batch was answered."""

    __slots__ = ("at", "cut", "joining", "places", "task")

    task: asyncio.Task[Result]

    def __init__(self) -> None:
        self.places: list[int] = []
        self.at, self.joining, self.cut = 0, False, False


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
