"""The handler runtime: a batch of messages becomes units, committed in one call.

*load (one batched read, cache) → decide → commit*, the same for aggregates and for sagas: a `Behaviour` says which
stream decides and what it decides; everything about claims, fences, versions, stored replies and dead letters is here.
What a unit promises is the store's business (`eventstore/port.py`), order and retries are the consumer engine's.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

from bus.codec import check_size, died_reply, reply_envelope
from bus.envelope import Envelope, Failure, Kind, Origin, ReplyOutcome, StreamId, Version
from bus.errors import BadInput
from bus.metrics import Metrics
from bus.processing import Again, Done, Failed, Item, Result, Watermarks
from bus.seams import Clock, Failpoint, Ids
from bus.transport import Delivery
from eventstore.behaviour import Behaviour, Decision
from eventstore.errors import BadUnit
from eventstore.letters import DeadLetters
from eventstore.port import (
    Append,
    Claim,
    ClaimState,
    Fence,
    Outcome,
    Standing,
    Store,
    Unit,
    Verdict,
    Wanted,
    Watermark,
)

log = logging.getLogger("foldbus.runtime")


class StateCache:
    """Folded states of the streams touched last, bounded by count. A state is taken out while a batch works on it and
    put back only when its commit won: nothing half-done is ever seen."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._states: OrderedDict[StreamId, tuple[Version, Any]] = OrderedDict()

    def take(self, stream: StreamId) -> tuple[Version, Any] | None:
        return self._states.pop(stream, None)

    def put(self, stream: StreamId, version: Version, state: Any) -> None:
        self._states[stream] = (version, state)
        if len(self._states) > self._size:
            self._states.popitem(last=False)

    def clear(self) -> None:
        self._states.clear()


class _Work:
    """One item of a batch, on its way from message to unit to result."""

    __slots__ = ("decision", "item", "result", "stream", "unit")

    def __init__(self, item: Item) -> None:
        self.item = item
        self.stream: StreamId | None = None
        self.decision: Decision[Any] | None = None
        self.unit: Unit | None = None
        self.result: Result | None = None


class UnitProcessor:
    """Implements `bus.processing.Processor` over a store. `consumer` names the claims, `group` the watermarks."""

    def __init__(
        self,
        *,
        group: str,
        consumer: str,
        service: str,
        behaviour: Behaviour[Any],
        store: Store,
        wants: Callable[[str], bool],
        ids: Ids,
        clock: Clock,
        metrics: Metrics,
        failpoint: Failpoint,
        max_bytes: int,
        commit_failpoint: str = "commit",
        cache_size: int = 10_000,
    ) -> None:
        self.group, self.consumer = group, consumer
        self._service, self._behaviour, self._store, self._wants = service, behaviour, store, wants
        self._ids, self._clock, self._metrics, self._failpoint = ids, clock, metrics, failpoint
        self._max_bytes = max_bytes
        self._letters = DeadLetters(service, consumer, clock=clock, metrics=metrics, max_bytes=max_bytes)
        self._before, self._after = f"before-{commit_failpoint}", f"after-{commit_failpoint}"
        self._cache = StateCache(cache_size)

    def wants(self, type_name: str) -> bool:
        return self._wants(type_name)

    # --- a batch ------------------------------------------------------------------------------------------------

    async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Result]:
        works = [_Work(item) for item in batch]
        await self._settle_known(works)
        states = await self._load(works)
        self._decide(works, states)
        await self._commit(works, states, watermarks)
        return [work.result or Again() for work in works]

    async def _settle_known(self, works: Sequence[_Work]) -> None:
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
                self._settle(work, own)
            elif envelope.undoes in earlier:
                work.result = Again()  # its step is decided in this very batch: look again once that is committed
            elif envelope.undoes is not None and not _had_effect(standing[envelope.undoes]):
                self._cancel_step(work)
            earlier.add(envelope.id)

    def _settle(self, work: _Work, standing: Standing) -> None:
        """Handled before: nothing happens again, but whoever asks gets the stored answer."""
        work.result = Done()
        envelope = work.item.envelope
        self._metrics.count("foldbus_duplicates_total", consumer=self.consumer, state=standing.state)
        if envelope.reply_to is None:
            return
        stored = standing.reply
        if standing.state is ClaimState.CANCELLED:
            reply = reply_envelope(envelope, ReplyOutcome.CANCELLED, b"null", self._origin(envelope))
        elif stored is not None:
            to = envelope.reply_to
            reply = replace(stored, id=self._ids.new(), key=to.key, topic=to.topic, reply_to=to, position=None)
        else:
            return
        work.result, work.unit = None, Unit(outgoing=(reply,))

    def _cancel_step(self, work: _Work) -> None:
        """The step never happened (or was refused, or died): nothing to undo, and it may not happen later either."""
        envelope = work.item.envelope
        reply = reply_envelope(envelope, ReplyOutcome.OK, b"null", self._origin(envelope))
        self._metrics.count("foldbus_fenced_steps_total", consumer=self.consumer)
        log.info("undo %s of %s: nothing to undo, the step is fenced", envelope.id, envelope.undoes)
        work.unit = Unit(
            claim=Claim(
                self.consumer, envelope.id, envelope.key, reply=reply, fences=envelope.undoes, fence=Fence.CANCEL
            )
        )

    async def _load(self, works: Sequence[_Work]) -> dict[StreamId, tuple[Version, Any]]:
        states: dict[StreamId, tuple[Version, Any]] = {}
        wanted: dict[StreamId, None] = {}
        for work in works:
            if work.result is not None or work.unit is not None:
                continue
            try:
                work.stream = self._behaviour.stream_of(work.item.envelope)
            except BadInput as error:
                work.result = Failed(error)
                continue
            stream = work.stream
            if stream in states or stream in wanted:
                continue
            known = None if work.item.examine else self._cache.take(stream)
            if known is None:
                self._cache.take(stream)
                wanted[stream] = None
            else:
                states[stream] = known
        if wanted:
            for part in await self._store.load([Wanted(stream) for stream in wanted]):
                try:
                    folded = self._behaviour.fold(self._behaviour.initial(part.stream), part.records)
                except Exception as error:  # the stream cannot be folded: fails whoever needs it, nobody else
                    for work in works:
                        if work.stream == part.stream and work.result is None:
                            work.result = Failed(error)
                else:
                    states[part.stream] = (part.version, folded)
        return states

    def _decide(self, works: Sequence[_Work], states: dict[StreamId, tuple[Version, Any]]) -> None:
        """In order, each on the state that the one before it leaves. What fails holds up its key and its stream."""
        blocked_keys: set[str] = set()
        blocked_streams: set[StreamId] = set()
        for work in works:
            envelope, stream = work.item.envelope, work.stream
            if envelope.key in blocked_keys or (stream is not None and stream in blocked_streams):
                work.result, work.unit = Again(), None
            elif isinstance(work.result, (Failed, Again)):
                blocked_keys.add(envelope.key)
            elif work.result is None and work.unit is None:
                assert stream is not None
                version, state = states[stream]
                try:
                    decision = self._behaviour.decide(state, envelope)
                    self._check_sizes(decision)
                except Exception as error:
                    work.result = Failed(error)
                    work.item.examine = True  # it may have been given up before; and the state is read anew
                    blocked_keys.add(envelope.key)
                    blocked_streams.add(stream)
                    states.pop(stream)  # what `decide` may have left half changed
                    continue
                work.decision = decision
                work.unit = self._unit(envelope, stream, version, decision)
                states[stream] = (version + len(decision.events), decision.state)

    def _check_sizes(self, decision: Decision[Any]) -> None:
        for staged in (*decision.events, *decision.outgoing):
            if staged.topic is not None:
                check_size(staged, self._max_bytes)
        if decision.reply is not None:
            check_size(decision.reply, self._max_bytes)

    def _unit(self, envelope: Envelope, stream: StreamId, version: Version, decision: Decision[Any]) -> Unit:
        fenced = envelope.undoes is not None
        return Unit(
            claim=Claim(
                self.consumer,
                envelope.id,
                envelope.key,
                reply=decision.reply,
                fences=envelope.undoes,
                fence=Fence.EXPECT_DONE if fenced else None,
            ),
            appends=(Append(stream, version, decision.events),) if decision.events else (),
            asserts=() if decision.events else ((stream, version),),
            outgoing=decision.outgoing,
            timers=decision.timers,
        )

    async def _commit(
        self, works: Sequence[_Work], states: Mapping[StreamId, tuple[Version, Any]], watermarks: Watermarks
    ) -> None:
        staged = [work for work in works if work.unit is not None]
        marks = self._marks(watermarks)
        self._failpoint.hit(self._before)
        try:
            outcomes = await self._store.commit(
                [work.unit for work in staged if work.unit is not None], watermarks=marks
            )
        except BadUnit as error:
            await self._commit_one_by_one(staged, works, error)
            return
        self._failpoint.hit(self._after)
        dropped: set[StreamId] = set()
        resend: list[Unit] = []
        for work, outcome in zip(staged, outcomes, strict=True):
            work.result = self._result(work, outcome, resend)
            ended = work.decision is not None and work.decision.forget
            if work.stream is not None and (ended or outcome.verdict is not Verdict.COMMITTED):
                dropped.add(work.stream)
        for stream, (version, state) in states.items():
            if stream not in dropped:
                self._cache.put(stream, version, state)
        if resend:
            await self._store.commit(resend)
        _keep_order(works)

    async def _commit_one_by_one(self, staged: Sequence[_Work], works: Sequence[_Work], error: BadUnit) -> None:
        """A unit that no store takes fails its message, as a bug does; the others of the batch are tried again alone.
        (Some may be committed: the standing tells.) The states of this batch are forgotten."""
        if len(staged) == 1:
            staged[0].result = Failed(error)
        elif not staged:  # then it was a watermark
            raise error
        else:
            self._metrics.count("foldbus_batches_split_total", consumer=self.consumer)
            log.warning("%s: a batch of %d is handled one by one: %s", self.consumer, len(staged), error)
            waiting: set[str] = set()
            for work in staged:
                key = work.item.envelope.key
                work.item.examine = True
                (work.result,) = [Again()] if key in waiting else await self.process([work.item], {})
                if not isinstance(work.result, Done):
                    waiting.add(key)
        _keep_order(works)

    def _result(self, work: _Work, outcome: Outcome, resend: list[Unit]) -> Result:
        item = work.item
        match outcome.verdict:
            case Verdict.COMMITTED:
                self._metrics.count("foldbus_handled_total", consumer=self.consumer)
                return Done()
            case Verdict.DUPLICATE | Verdict.CANCELLED:
                state = ClaimState.DONE if outcome.verdict is Verdict.DUPLICATE else ClaimState.CANCELLED
                again = _Work(item)
                self._settle(again, Standing(state, outcome.reply))
                if again.unit is not None:
                    resend.append(again.unit)
                return Done()
            case Verdict.CONFLICT:
                item.examine = True
                self._metrics.count("foldbus_conflicts_total", consumer=self.consumer)
                return Again()  # at once; who keeps losing is slowed down by whoever gives it again
            case Verdict.STARTED | Verdict.PARKED:
                return Again(after_s=1.0)

    # --- giving up ----------------------------------------------------------------------------------------------

    async def give_up(self, item: Item, failure: Failure) -> Result:
        envelope = item.envelope
        origin = self._origin(envelope)
        reply = died_reply(envelope, f"{failure.error}: {failure.message}", origin) if _answered(envelope) else None
        unit = self._letters.of_message(envelope, failure, delivery=item.delivery, reply=reply)
        (outcome,) = await self._store.commit([unit])
        self._letters.report(unit, outcome)
        if outcome.verdict is Verdict.COMMITTED:
            return Done()
        resend: list[Unit] = []
        result = self._result(_Work(item), outcome, resend)
        if resend:  # it was given up, handled or cancelled before: whoever asks again gets that answer
            await self._store.commit(resend)
        return result

    async def give_up_raw(self, delivery: Delivery, failure: Failure) -> None:
        unit = self._letters.of_record(delivery, failure)
        (outcome,) = await self._store.commit([unit])
        self._letters.report(unit, outcome)

    # --- watermarks ---------------------------------------------------------------------------------------------

    def _marks(self, watermarks: Watermarks) -> list[Watermark]:
        return [Watermark(self.group, topic, part, offset) for (topic, part), offset in watermarks.items()]

    async def stored_watermarks(self) -> Watermarks:
        return await self._store.watermarks(self.group)

    async def store_watermarks(self, watermarks: Watermarks) -> None:
        await self._store.commit([], watermarks=self._marks(watermarks))

    def forget(self, topics: Collection[tuple[str, int]]) -> None:
        self._cache.clear()  # which stream came by which partition is not kept; a load is cheap

    def _origin(self, cause: Envelope) -> Origin:
        return Origin(self._service, self._ids.new(), self._clock.now(), cause.correlation_id, cause.id, cause.tenant)


def _keep_order(works: Sequence[_Work]) -> None:
    """Behind an item that is not done, nothing of its key is: what was settled out of turn is settled again later."""
    waiting: set[str] = set()
    for work in works:
        key = work.item.envelope.key
        if key in waiting and isinstance(work.result, Done):
            work.item.examine, work.result = True, Again()
        elif not isinstance(work.result, Done):
            waiting.add(key)


def _had_effect(standing: Standing) -> bool:
    """Did the step do something that an undo must undo? Refused, dead, cancelled and absent ones did not."""
    return standing.state is ClaimState.DONE and (
        standing.reply is None or standing.reply.outcome in (None, ReplyOutcome.OK)
    )


def _answered(envelope: Envelope) -> bool:
    return envelope.kind in (Kind.COMMAND, Kind.QUERY)


def any_of(types: Iterable[str]) -> Callable[[str], bool]:
    """Wants exactly these types."""
    known = frozenset(types)
    return lambda name: name in known
