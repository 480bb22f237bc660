"""What became of a message, and giving it up: the part of a processor that is the same for every kind of handler.

A `Work` is one item of a batch on its way from message to unit to result. `Claims` answers a message that was handled
before, judges an undo by the standing of its step, reads the outcome of a commit, and makes dead letters. What concerns
the queues of parked keys it leaves to its `Parker`; without one (`execute`) nothing is parked.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

from bus.cloudevents import from_record
from bus.codec import died_reply, reply_envelope, unknown_reply
from bus.envelope import Envelope, Failure, Kind, Origin, ReplyOutcome, StreamId
from bus.errors import BadInput
from bus.metrics import Metrics
from bus.processing import Again, Aside, Done, Failed, Item, Result
from bus.seams import Clock, Ids
from bus.transport import Delivery
from eventstore.archiving import misfit
from eventstore.behaviour import Decision
from eventstore.errors import StreamArchived
from eventstore.letters import DeadLetters
from eventstore.port import Claim, ClaimState, Fence, Outcome, Standing, Store, Tx, Unit, Verdict
from foldbus.parking import KeyParked, Parker

log = logging.getLogger("foldbus.runtime")

ENDED = frozenset((ClaimState.DONE, ClaimState.DEAD, ClaimState.CANCELLED))
"""Nothing more happens to a message of such a standing."""
STARTED_AGAIN_S = 1.0
BURY_LEASE_S = 10.0


class Work:
    """One item of a batch, on its way from message to unit to result.

    `fence` is what its unit demands of the step that it undoes; `step_parked`: that step waits in a queue. `follows`:
    its key is parked, so it goes behind."""

    __slots__ = ("decision", "fence", "follows", "item", "result", "step_parked", "stream", "unit")

    def __init__(self, item: Item) -> None:
        self.item = item
        self.fence: Fence | None = None
        self.step_parked = self.follows = False
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
        parker: Parker | None = None,
    ) -> None:
        self.consumer = consumer
        self._service, self._store, self._parker = service, store, parker
        self._ids, self._clock, self._metrics = ids, clock, metrics
        self._letters = DeadLetters(service, consumer, clock=clock, metrics=metrics, max_bytes=max_bytes)

    # --- what is known ------------------------------------------------------------------------------------------

    async def settle_known(self, works: Sequence[Work]) -> None:
        """Asks what became of ids where that decides what to do: undos (of their step too), second passes, and keys
        that were parked a moment ago."""
        parker = self._parker
        asked: dict[UUID, str] = {}
        for work in works:
            envelope = work.item.envelope
            suspect = parker is not None and work.item.parked is None and parker.suspects(envelope.key)
            if work.item.examine or envelope.undoes is not None or suspect:
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
            if own is not None and own.state in ENDED:
                self.settle(work, own)
            elif envelope.undoes in earlier:
                work.result = Again()  # its step is decided in this very batch: look again once that is committed
            elif envelope.undoes is None:
                self._goes_behind(work, own)
            else:
                self._judge_undo(work, own, standing[envelope.undoes])
            earlier.add(envelope.id)

    def _goes_behind(self, work: Work, own: Standing | None) -> bool:
        """Those before it wait in the database (or it does, and comes a second time)."""
        if own is not None and work.item.parked is None:
            work.follows = own.state in (ClaimState.PARKED, ClaimState.KEY_PARKED)
            if own.state is ClaimState.NEW and self._parker is not None:
                self._parker.found_free(work.item.envelope.key)
        return work.follows

    def _judge_undo(self, work: Work, own: Standing | None, step: Standing) -> None:
        """What is to be undone, and what the undo's unit demands of the step. An undo of a parked step passes the queue
        that the step waits in."""
        if step.state is ClaimState.PARKED:
            work.step_parked = True
        elif self._goes_behind(work, own):
            return
        if step.state is ClaimState.STARTED:
            work.result = Again(after_s=STARTED_AGAIN_S)  # it is under way, or its worker died: the lease tells
        elif not had_effect(step):
            self._cancel_step(work)
        else:
            work.fence = Fence.EXPECT_DONE if step.state is ClaimState.DONE else Fence.CANCEL

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

    # --- committing ---------------------------------------------------------------------------------------------

    def apart(self, work: Work) -> bool:
        """Does its unit go through a key's queue, in a call of its own?"""
        return work.unit is not None and work.unit.claim is not None and _through_queue(work)

    async def commit(self, work: Work, unit: Unit, *, tx: Tx | None = None) -> Outcome:
        """One unit of this work, through its key's queue where it must."""
        if unit.claim is None or not _through_queue(work):
            (outcome,) = await self._store.commit([unit], tx=tx)
            return outcome
        assert self._parker is not None, "what is parked goes to whoever parks"
        if work.step_parked:
            return await self._parker.cancel(work.item, unit, tx=tx)
        return await self._parker.commit(work.item, unit, tx=tx)

    def result(self, work: Work, outcome: Outcome, resend: list[Unit]) -> Result:
        """What the outcome means. A work that `follows` is not done before `set_aside` has seen it."""
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
            case Verdict.STARTED:
                return Again(after_s=STARTED_AGAIN_S)
            case Verdict.PARKED:
                if item.parked is not None:
                    return Aside()  # whose turn it is handles it
                # An undo is judged anew: its step may be parked as well.
                item.examine, work.follows = True, item.envelope.undoes is None
                return Again()

    # --- parking ------------------------------------------------------------------------------------------------

    async def join_queue(self, items: Sequence[Item]) -> Sequence[Result]:
        """What stands behind one that was set aside, of its key, as far as that goes."""
        works = [Work(item) for item in items]
        for work in works:
            work.follows, work.result = work.item.parked is None and work.item.envelope.undoes is None, Again()
        await self.set_aside(works)
        stuck = False
        for work in works:
            stuck = stuck or not isinstance(work.result, Done)
            if stuck:
                work.item.examine, work.result = True, Again()
        return [work.result or Again() for work in works]

    async def set_aside(self, works: Sequence[Work]) -> None:
        """Those that follow join the queues of their keys, in order and in one call, and so does what stands behind
        them in this batch."""
        behind: set[str] = set()
        waiting: set[str] = set()
        following: list[Work] = []
        for work in works if any(work.follows for work in works) else ():
            key = work.item.envelope.key
            if key in waiting or (isinstance(work.result, Done) and not work.follows):
                continue
            if work.follows or (key in behind and work.item.parked is None and work.item.envelope.undoes is None):
                behind.add(key)
                following.append(work)
            else:
                waiting.add(key)
        if not following:
            return
        if self._parker is None:
            for work in following:
                work.result = Failed(_key_parked(work.item.envelope))
            return
        resend: list[Unit] = []
        for work, standing in zip(following, await self._parker.follow([work.item for work in following]), strict=True):
            work.follows, work.unit = False, None
            match standing.state:
                case ClaimState.PARKED:
                    work.result = Aside()
                case ClaimState.DONE | ClaimState.DEAD | ClaimState.CANCELLED:
                    again = Work(work.item)
                    self.settle(again, standing)
                    if again.unit is not None:
                        resend.append(again.unit)
                    work.result = Done()
                case ClaimState.STARTED:
                    work.result = Again(after_s=STARTED_AGAIN_S)
                case ClaimState.NEW | ClaimState.KEY_PARKED:
                    work.result = Again()
        if resend:
            await self._store.commit(resend)

    # --- giving up ----------------------------------------------------------------------------------------------

    async def give_up(self, item: Item, failure: Failure) -> Result:
        """Its attempts in place, or its turn, are over: parks it, postpones it, or makes a dead letter of it."""
        parker = self._parker
        if parker is None or parker.gives_up(item, failure):
            return await self._bury(item, failure)
        if item.parked is not None:
            await parker.postpone(item, failure)
            return Aside()
        standing = await parker.park(item, failure)
        if standing.state is ClaimState.PARKED:
            return Aside()
        return await self._answer_again(Work(item), standing)

    async def _bury(self, item: Item, failure: Failure) -> Result:
        work, envelope = Work(item), item.envelope
        (standing,) = await self._store.examine(self.consumer, [(envelope.id, envelope.key)])
        unit = self.letter(item, failure, started=standing.started)
        if standing.state is ClaimState.STARTED and item.parked is None:
            outcome = await self._commit_begun(envelope, unit)
        else:
            outcome = await self.commit(work, unit)
        self._letters.report(unit, outcome)
        if outcome.verdict is Verdict.COMMITTED:
            return Done()
        resend: list[Unit] = []
        result = self.result(work, outcome, resend)
        if resend:  # it was given up, handled or cancelled before: whoever asks again gets that answer
            await self._store.commit(resend)
        if work.follows and self._parker is not None:
            await self.set_aside([work])
            return work.result or Again()
        return result

    async def _commit_begun(self, envelope: Envelope, unit: Unit) -> Outcome:
        """Of an effect whose attempts are over: nobody may be at it while it is given up."""
        begun = await self._store.effects.begin(self.consumer, envelope.id, envelope.key, lease_s=BURY_LEASE_S)
        match begun.state:
            case ClaimState.NEW:
                return await self._store.effects.commit(begun.token, unit)
            case ClaimState.STARTED:
                return Outcome(Verdict.STARTED)
            case ClaimState.PARKED | ClaimState.KEY_PARKED:
                return Outcome(Verdict.PARKED)
            case ClaimState.CANCELLED:
                return Outcome(Verdict.CANCELLED)
            case ClaimState.DONE | ClaimState.DEAD:
                return Outcome(Verdict.DUPLICATE, reply=begun.reply)

    async def _answer_again(self, work: Work, standing: Standing) -> Result:
        if standing.state not in ENDED:
            return Again(after_s=STARTED_AGAIN_S)
        self.settle(work, standing)
        if work.unit is not None:
            await self._store.commit([work.unit])
        return Done()

    def letter(self, item: Item, failure: Failure, *, started: bool = False) -> Unit:
        """The unit that gives it up: claim, dead letter, copy, and the reply that it died; or, of an effect that was
        `started`, that nobody knows."""
        envelope, reply = item.envelope, None
        if answered(envelope):
            say = unknown_reply if started else died_reply
            reply = say(envelope, f"{failure.error}: {failure.message}", self.origin(envelope))
        return self._letters.of_message(_as_it_came(item), failure, delivery=item.delivery, reply=reply)

    async def give_up_raw(self, delivery: Delivery, failure: Failure) -> None:
        unit = self._letters.of_record(delivery, failure)
        (outcome,) = await self._store.commit([unit])
        self._letters.report(unit, outcome)

    def origin(self, cause: Envelope) -> Origin:
        return Origin(self._service, self._ids.new(), self._clock.now(), cause.correlation_id, cause.id, cause.tenant)


def had_effect(standing: Standing) -> bool:
    """Did the step do something that an undo must undo, or may it have? Refused and absent ones did not, and dead,
    parked or cancelled ones only if what they call outside was begun."""
    if standing.state is ClaimState.DONE:
        return standing.reply is None or standing.reply.outcome in (None, ReplyOutcome.OK)
    return standing.started and standing.state in (ClaimState.DEAD, ClaimState.PARKED, ClaimState.CANCELLED)


def answered(envelope: Envelope) -> bool:
    return envelope.kind in (Kind.COMMAND, Kind.QUERY)


def _through_queue(work: Work) -> bool:
    return work.item.parked is not None or work.step_parked


def _as_it_came(item: Item) -> Envelope:
    """A dead letter shows what came, not what an upcaster made of it, under the claim's id."""
    envelope = item.envelope
    if item.delivery is None:
        return envelope
    try:
        came = from_record(item.delivery)
    except BadInput:
        return envelope
    return envelope if came.type == envelope.type else replace(envelope, type=came.type, data=came.data)


def _key_parked(envelope: Envelope) -> KeyParked:
    return KeyParked(
        f"{envelope.type} {envelope.id}: messages of key {envelope.key!r} are parked, this one may not overtake them; "
        "nothing was done: `send` it, or see `foldbus parked`"
    )
