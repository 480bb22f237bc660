"""The handler runtime: a batch of messages becomes units, committed in one call.

*load (one batched read, cache) → decide → commit*, the same for aggregates and for sagas: a `Behaviour` says which
stream decides and what it decides; everything about claims, fences, versions, stored replies and dead letters is here.
What a unit promises is the store's business (`eventstore/port.py`), order and retries are the consumer engine's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from bus.codec import check_size
from bus.envelope import Failure, StreamId, Version
from bus.errors import BadInput
from bus.metrics import Metrics
from bus.processing import Again, Done, Failed, Item, Result, Watermarks
from bus.seams import Clock, Failpoint, Ids
from bus.transport import Delivery
from eventstore.behaviour import Behaviour, Decision
from eventstore.errors import BadUnit
from eventstore.port import (
    Append,
    Claim,
    Outcome,
    Store,
    Unit,
    Verdict,
    Watermark,
)
from foldbus.claims import Claims, Work
from foldbus.parking import Parker
from foldbus.snapshotting import Snapshotter
from foldbus.states import Known, States

log = logging.getLogger("foldbus.runtime")


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
        snapshots: Snapshotter | None = None,
        parker: Parker | None = None,
    ) -> None:
        self.group, self.consumer = group, consumer
        self._service, self._behaviour, self._store, self._wants = service, behaviour, store, wants
        self._ids, self._clock, self._metrics, self._failpoint = ids, clock, metrics, failpoint
        self._max_bytes = max_bytes
        self._claims = Claims(
            consumer=consumer, service=service, store=store, ids=ids, clock=clock, metrics=metrics, max_bytes=max_bytes,
            parker=parker,
        )  # fmt: skip
        self._before, self._after = f"before-{commit_failpoint}", f"after-{commit_failpoint}"
        self.states = States(behaviour, store, clock=clock, metrics=metrics, cache_size=cache_size, snapshots=snapshots)

    def wants(self, type_name: str) -> bool:
        return self._wants(type_name)

    # --- a batch ------------------------------------------------------------------------------------------------

    async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Result]:
        works = [Work(item) for item in batch]
        await self._claims.settle_known(works)
        before = await self._load(works)
        states = dict(before)
        self._decide(works, states)
        await self._commit(works, states, before, watermarks)
        await self._claims.set_aside(works)
        _keep_order(works)
        return [work.result or Again() for work in works]

    async def _load(self, works: Sequence[Work]) -> dict[StreamId, Known]:
        wanted: dict[StreamId, bool] = {}
        for work in works:
            if work.result is not None or work.unit is not None or work.follows:
                continue
            try:
                work.stream = self._behaviour.stream_of(work.item.envelope)
            except BadInput as error:
                work.result = Failed(error)
                continue
            wanted[work.stream] = wanted.get(work.stream, False) or work.item.examine
        states: dict[StreamId, Known] = {}
        for stream, found in (await self.states.load(wanted)).items() if wanted else ():
            if not isinstance(found, Exception):
                states[stream] = found
                continue
            for work in works:  # the stream cannot be folded: fails whoever needs it, nobody else
                if work.stream == stream and work.result is None:
                    work.result = Failed(found)
        return states

    def _decide(self, works: Sequence[Work], states: dict[StreamId, Known]) -> None:
        """In order, each on the state that the one before it leaves. What fails holds up its key and its stream."""
        blocked_keys: set[str] = set()
        blocked_streams: set[StreamId] = set()
        earlier_keys: set[str] = set()
        passing = any(work.step_parked for work in works)
        for work in works:
            envelope, stream = work.item.envelope, work.stream
            if passing:
                if work.step_parked and envelope.key in earlier_keys:
                    blocked_keys.add(envelope.key)  # its unit goes in a call of its own, before the others'
                earlier_keys.add(envelope.key)
            if envelope.key in blocked_keys or (stream is not None and stream in blocked_streams):
                work.result, work.unit = Again(), None
            elif isinstance(work.result, (Failed, Again)) or work.follows:
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
                work.unit = self._unit(work, stream, version, decision)
                states[stream] = (version + len(decision.events), decision.state)

    def _check_sizes(self, decision: Decision[Any]) -> None:
        for staged in (*decision.events, *decision.outgoing):
            if staged.topic is not None:
                check_size(staged, self._max_bytes)
        if decision.reply is not None:
            check_size(decision.reply, self._max_bytes)

    def _unit(self, work: Work, stream: StreamId, version: Version, decision: Decision[Any]) -> Unit:
        envelope = work.item.envelope
        return Unit(
            claim=Claim(
                self.consumer,
                envelope.id,
                envelope.key,
                reply=decision.reply,
                fences=envelope.undoes,
                fence=work.fence,
            ),
            appends=(Append(stream, version, decision.events),) if decision.events else (),
            asserts=() if decision.events else ((stream, version),),
            outgoing=decision.outgoing,
            timers=decision.timers,
        )

    async def _commit(
        self,
        works: Sequence[Work],
        states: Mapping[StreamId, Known],
        before: Mapping[StreamId, Known],
        watermarks: Watermarks,
    ) -> None:
        staged = [work for work in works if work.unit is not None]
        marks = self._marks(watermarks)
        self._failpoint.hit(self._before)
        try:
            outcomes = await self._written(staged, marks)
        except BadUnit as error:
            await self._commit_one_by_one(staged, error)
            return
        self._failpoint.hit(self._after)
        lost: set[StreamId] = set()
        ended: set[StreamId] = set()
        resend: list[Unit] = []
        for work, outcome in outcomes:
            work.result = self._claims.result(work, outcome, resend)
            if work.stream is not None and outcome.verdict is not Verdict.COMMITTED:
                lost.add(work.stream)
            elif work.stream is not None and work.decision is not None and work.decision.forget:
                ended.add(work.stream)
        for stream, (version, state) in states.items():
            if stream in lost:
                self.states.lost(stream, before.get(stream))
            elif stream not in ended:
                self.states.won(stream, version, state)
        if resend:
            await self._store.commit(resend)

    async def _written(self, staged: Sequence[Work], marks: Sequence[Watermark]) -> list[tuple[Work, Outcome]]:
        """One call for all, and before it one for each that leaves a queue, or makes another leave it. What is of the
        key of such a one, behind it, finds the key free or joins the queue; behind an undo that lost it waits."""
        if not any(map(self._claims.apart, staged)):
            return await self._written_together(staged, marks)
        outcomes: dict[Work, Outcome] = {}
        lost: set[str] = set()
        for work in staged:
            key = work.item.envelope.key
            if key in lost:
                outcomes[work] = Outcome(Verdict.CONFLICT)
            elif work.unit is not None and self._claims.apart(work):
                outcome = outcomes[work] = await self._claims.commit(work, work.unit)
                if work.item.parked is None and outcome.verdict is Verdict.CONFLICT:
                    lost.add(key)
        outcomes.update(await self._written_together([work for work in staged if work not in outcomes], marks))
        return [(work, outcomes[work]) for work in staged]

    async def _written_together(self, staged: Sequence[Work], marks: Sequence[Watermark]) -> list[tuple[Work, Outcome]]:
        units = [work.unit for work in staged if work.unit is not None]
        outcomes = await self._store.commit(units, watermarks=marks) if units or marks else ()
        return list(zip(staged, outcomes, strict=True))

    async def _commit_one_by_one(self, staged: Sequence[Work], error: BadUnit) -> None:
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
                work.unit = None
                if not isinstance(work.result, Done):
                    waiting.add(key)

    # --- giving up ----------------------------------------------------------------------------------------------

    async def give_up(self, item: Item, failure: Failure) -> Result:
        return await self._claims.give_up(item, failure)

    async def give_up_raw(self, delivery: Delivery, failure: Failure) -> None:
        await self._claims.give_up_raw(delivery, failure)

    # --- watermarks ---------------------------------------------------------------------------------------------

    def _marks(self, watermarks: Watermarks) -> list[Watermark]:
        return [Watermark(self.group, topic, part, offset) for (topic, part), offset in watermarks.items()]

    async def stored_watermarks(self) -> Watermarks:
        return await self._store.watermarks(self.group)

    async def store_watermarks(self, watermarks: Watermarks) -> None:
        await self._store.commit([], watermarks=self._marks(watermarks))

    def forget(self, topics: Collection[tuple[str, int]]) -> None:
        self.states.forget()  # which stream came by which partition is not kept; a load is cheap


def _keep_order(works: Sequence[Work]) -> None:
    """Behind an item that is not done, nothing of its key is: what was settled out of turn is settled again later."""
    waiting: set[str] = set()
    for work in works:
        key = work.item.envelope.key
        if key in waiting and isinstance(work.result, Done):
            work.item.examine, work.result = True, Again()
        elif not isinstance(work.result, Done):
            waiting.add(key)


def any_of(types: Iterable[str]) -> Callable[[str], bool]:
    """Wants exactly these types."""
    known = frozenset(types)
    return lambda name: name in known
