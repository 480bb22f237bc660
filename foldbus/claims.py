"""What became of a message, and giving it up: the part of a processor that is the same for every kind of handler.

A `Work` is one item of a batch on its way from message to unit to result. `Claims` answers a message that was handled
before, judges an undo by the standing of its step, reads the outcome of a commit, and makes dead letters.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

from bus.codec import died_reply, reply_envelope
from bus.envelope import Envelope, Failure, Kind, Origin, ReplyOutcome, StreamId
from bus.metrics import Metrics
from bus.processing import Again, Done, Failed, Item, Result
from bus.seams import Clock, Ids
from bus.transport import Delivery
from eventstore.archiving import misfit
from eventstore.behaviour import Decision
from eventstore.errors import StreamArchived
from eventstore.letters import DeadLetters
from eventstore.port import Claim, ClaimState, Fence, Outcome, Standing, Store, Unit, Verdict

log = logging.getLogger("foldbus.runtime")


class Work:
    """One item of a batch, on its way from message to unit to result."""

    __slots__ = ("decision", "item", "result", "stream", "unit")

    def __init__(self, item: Item) -> None:
        self.item = item
        self.stream: StreamId | None = None
        self.decision: Decision[Any] | None = None
        self.unit: Unit | None = None
        self.result: Result | None = None


class Claims:
    """Of one consumer of one service."""

    def __init__(
        self,
        *,
        consumer: str,
        service: str,
        store: Store,
        ids: Ids,
        clock: Clock,
        metrics: Metrics,
        max_bytes: int,
    ) -> None:
        self.consumer = consumer
        self._service, self._store = service, store
        self._ids, self._clock, self._metrics = ids, clock, metrics
        self._letters = DeadLetters(service, consumer, clock=clock, metrics=metrics, max_bytes=max_bytes)

    # --- what is known ------------------------------------------------------------------------------------------

    async def settle_known(self, works: Sequence[Work]) -> None:
        """Asks what became of ids where that decides what to do: undos (of their step too), and second passes."""
        asked: dict[UUID, str] = {}
        for work in works:
            envelope = work.item.envelope
            if work.item.examine or envelope.undoes is not None:
                asked[envelope.id] = envelope.key
            if envelope.undoes is not None:
                asked[envelope.undoes] = envelope.key
        if not asked:
            return
        answers = await self._store.examine(self.consumer, list(asked.items()))
        standing = dict(zip(asked, answers, strict=True))
        earlier: set[UUID] = set()
        for work in works:
            envelope = work.item.envelope
            own = standing.get(envelope.id)
            if own is not None and own.state in (ClaimState.DONE, ClaimState.DEAD, ClaimState.CANCELLED):
                self.settle(work, own)
            elif envelope.undoes in earlier:
                work.result = Again()  # its step is decided in this very batch: look again once that is committed
            elif envelope.undoes is not None and not had_effect(standing[envelope.undoes]):
                self._cancel_step(work)
            earlier.add(envelope.id)

    def settle(self, work: Work, standing: Standing) -> None:
        """Handled before: nothing happens again, but whoever asks gets the stored answer."""
        work.result = Done()
        envelope = work.item.envelope
        self._metrics.count("foldbus_duplicates_total", consumer=self.consumer, state=standing.state)
        if envelope.reply_to is None:
            return
        stored = standing.reply
        if standing.state is ClaimState.CANCELLED:
            reply = reply_envelope(envelope, ReplyOutcome.CANCELLED, b"null", self.origin(envelope))
        elif stored is not None:
            to = envelope.reply_to
            reply = replace(stored, id=self._ids.new(), key=to.key, topic=to.topic, reply_to=to, position=None)
        else:
            return
        work.result, work.unit = None, Unit(outgoing=(reply,))

    def _cancel_step(self, work: Work) -> None:
        """The step never happened (or was refused, or died): nothing to undo, and it may not happen later either."""
        envelope = work.item.envelope
        reply = reply_envelope(envelope, ReplyOutcome.OK, b"null", self.origin(envelope))
        self._metrics.count("foldbus_fenced_steps_total", consumer=self.consumer)
        log.info("undo %s of %s: nothing to undo, the step is fenced", envelope.id, envelope.undoes)
        work.unit = Unit(
            claim=Claim(
                self.consumer, envelope.id, envelope.key, reply=reply, fences=envelope.undoes, fence=Fence.CANCEL
            )
        )

    def result(self, work: Work, outcome: Outcome, resend: list[Unit]) -> Result:
        item = work.item
        match outcome.verdict:
            case Verdict.COMMITTED:
                self._metrics.count("foldbus_handled_total", consumer=self.consumer)
                return Done()
            case Verdict.DUPLICATE | Verdict.CANCELLED:
                state = ClaimState.DONE if outcome.verdict is Verdict.DUPLICATE else ClaimState.CANCELLED
                again = Work(item)
                self.settle(again, Standing(state, outcome.reply))
                if again.unit is not None:
                    resend.append(again.unit)
                return Done()
            case Verdict.CONFLICT:
                if isinstance(why := misfit(outcome), StreamArchived):
                    return Failed(why)  # it stays closed: whoever does not load it would lose for ever
                item.examine = True
                self._metrics.count("foldbus_conflicts_total", consumer=self.consumer)
                return Again()  # at once; who keeps losing is slowed down by whoever gives it again
            case Verdict.STARTED | Verdict.PARKED:
                return Again(after_s=1.0)

    async def give_up(self, item: Item, failure: Failure) -> Result:
        envelope = item.envelope
        origin = self.origin(envelope)
        reply = died_reply(envelope, f"{failure.error}: {failure.message}", origin) if answered(envelope) else None
        unit = self._letters.of_message(envelope, failure, delivery=item.delivery, reply=reply)
        (outcome,) = await self._store.commit([unit])
        self._letters.report(unit, outcome)
        if outcome.verdict is Verdict.COMMITTED:
            return Done()
        resend: list[Unit] = []
        result = self.result(Work(item), outcome, resend)
        if resend:  # it was given up, handled or cancelled before: whoever asks again gets that answer
            await self._store.commit(resend)
        return result

    async def give_up_raw(self, delivery: Delivery, failure: Failure) -> None:
        unit = self._letters.of_record(delivery, failure)
        (outcome,) = await self._store.commit([unit])
        self._letters.report(unit, outcome)

    def origin(self, cause: Envelope) -> Origin:
        return Origin(self._service, self._ids.new(), self._clock.now(), cause.correlation_id, cause.id, cause.tenant)


def had_effect(standing: Standing) -> bool:
    """Did the step do something that an undo must undo? Refused, dead, cancelled and absent ones did not."""
    return standing.state is ClaimState.DONE and (
        standing.reply is None or standing.reply.outcome in (None, ReplyOutcome.OK)
    )


def answered(envelope: Envelope) -> bool:
    return envelope.kind in (Kind.COMMAND, Kind.QUERY)
