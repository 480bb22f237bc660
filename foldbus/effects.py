"""Effects: calls of the outside world, begun on record and committed with their result.

An attempt is begun (`eventstore.parking.Effects`): from then on nobody else is at the message, for the handler's time
limit and a margin. It ends in a unit with the claim, or failed; a worker that dies in between leaves a claim that says
*started*, and the next attempt, which has the same message id, knows that from `ctx.started`. What was begun is never
called certainly undone: given up it is answered *unknown*, and an undo of it runs.

A message whose turn it is in its key's queue (`parking.py`) is begun there as well, under the turn that it has.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from uuid import uuid5

from bus.metrics import Metrics
from bus.processing import Item
from eventstore.parking import Parked
from eventstore.port import Claim, ClaimState, Fence, Outcome, Standing, Store, Unit, Verdict
from foldbus.handlers import Handler

if TYPE_CHECKING:
    from foldbus.claims import Claims, Work

log = logging.getLogger("foldbus.effects")

LEASE_MARGIN_S = 10.0
"""A lease outlives the handler's time limit by this: by then its result is committed, or the attempt was cut short."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """This worker's. `started`: an earlier one was begun."""

    item: Item
    standing: Standing

    @property
    def started(self) -> bool:
        return self.standing.started


class EffectClaims:
    """Of one consumer."""

    def __init__(self, claims: Claims, store: Store, metrics: Metrics) -> None:
        self._claims, self._store, self._metrics = claims, store, metrics

    async def begin(self, item: Item, handler: Handler) -> Attempt | Standing:
        """An attempt, or what stands in its way."""
        envelope = item.envelope
        standing = await self._store.effects.begin(
            self._claims.consumer,
            envelope.id,
            envelope.key,
            lease_s=handler.timeout_s + LEASE_MARGIN_S,
            parked=cast("Parked | None", item.parked),
        )
        if standing.state is not ClaimState.NEW:
            return standing
        if standing.started:
            self._metrics.count("foldbus_effects_repeated_total", consumer=self._claims.consumer, type=envelope.type)
            log.warning(
                "%s: %s %s is called once more: an earlier attempt was begun, and its outcome is not known",
                self._claims.consumer, envelope.type, envelope.id,
            )  # fmt: skip
        return Attempt(item, standing)

    async def commit(self, attempt: Attempt, work: Work, unit: Unit) -> Outcome:
        """STARTED: it is somebody else's by now."""
        if attempt.item.parked is not None:
            return await self._claims.commit(work, unit)
        return await self._store.effects.commit(attempt.standing.token, unit)

    async def release(self, attempt: Attempt) -> None:
        """The attempt failed, and is over: the next one need not wait for the lease."""
        envelope = attempt.item.envelope
        await self._store.effects.release(self._claims.consumer, envelope.id, attempt.standing.token)

    async def cancel_parked_step(self, work: Work) -> bool:
        """An undo's step waits in a queue, and may have happened: takes it out of there, cancelled, before the undo is
        called. Under a claim of its own, since the undo's is that of the call; should the worker die in between, the
        step says that it was begun, and the undo runs all the same. False: the step is not parked any more."""
        envelope = work.item.envelope
        claim = Claim(
            self._claims.consumer,
            uuid5(envelope.id, "cancels its step"),
            envelope.key,
            fences=envelope.undoes,
            fence=Fence.CANCEL,
        )
        outcome = await self._claims.commit(work, Unit(claim))
        if outcome.verdict not in (Verdict.COMMITTED, Verdict.DUPLICATE):
            return False
        work.step_parked, work.fence = False, Fence.CANCEL
        return True


__all__ = ["LEASE_MARGIN_S", "Attempt", "EffectClaims"]
