"""Parking at run time: what becomes of a message that has failed its attempts, and of those behind it.

It has failed in place for a moment (`EngineSettings`). Then its key is parked in the database, with its successors
behind it in order; its head is tried again at growing intervals (`timing.DueParked`), by whichever worker comes first.
What has had its time becomes a dead letter and the next one is tried (policy *skip*), or stays at the head until
somebody decides (*hold*). What order the queue promises is the store's business (`eventstore/parking.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from random import Random
from typing import Literal, cast

from bus.envelope import Envelope, Failure
from bus.errors import FoldbusError
from bus.metrics import Metrics
from bus.processing import Item
from bus.seams import Failpoint
from eventstore.parking import Parked, Waiting
from eventstore.port import ClaimState, Outcome, Standing, Store, Tx, Unit, Verdict

log = logging.getLogger("foldbus.parking")

Policy = Literal["skip", "hold"]
"""What a consumer does with a message that has had its time: *skip* makes a dead letter of it and goes on with its key,
*hold* keeps it, and its key behind it, until somebody decides (`foldbus parked`)."""

_SUSPECTS_MAX = 10_000


class KeyParked(FoldbusError):
    """Nothing was done: messages of this key wait in the database, and this one may not overtake them. `send` it: it
    will be handled behind them."""


@dataclass(frozen=True, slots=True)
class ParkSettings:
    """How long a parked message is tried, and how often.

    `base_s` is the first wait; each further one is as long as all that went before, at most `max_s`, with jitter
    downwards. `total_s` after its first failure a message has had its time; 0 parks nothing but what is held. `lease_s`
    bounds one turn: a worker that dies in it is followed by another after that.
    """

    base_s: float = 1.0
    max_s: float = 60.0
    total_s: float = 900.0
    lease_s: float = 60.0
    at_once_max: int = 100
    """So many parked messages are in one worker's hands."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            least = 0 if name == "total_s" else 1e-6
            if not least <= getattr(self, name) < 10 * 365 * 86_400:
                raise ValueError(f"{name} is {getattr(self, name)!r}, wanted a number above 0, and below ten years")


class Parker:
    """Of one consumer: the queue side of its claims. Safe for several processors of that consumer."""

    def __init__(
        self,
        consumer: str,
        store: Store,
        *,
        settings: ParkSettings,
        policy: Policy,
        metrics: Metrics,
        failpoint: Failpoint,
        rng: Random | None = None,
    ) -> None:
        self.consumer, self.policy = consumer, policy
        self._store, self._settings, self._metrics, self._failpoint = store, settings, metrics, failpoint
        self._rng = rng or Random()
        self._suspects: dict[str, None] = {}

    # --- what is decided ----------------------------------------------------------------------------------------

    def gives_up(self, item: Item, failure: Failure) -> bool:
        """Is it a dead letter by now?"""
        return self.policy == "skip" and self._had_its_time(item, failure)

    def _had_its_time(self, item: Item, failure: Failure) -> bool:
        return item.unreadable or _spent_s(failure) >= self._settings.total_s

    def _due_at(self, item: Item, failure: Failure) -> datetime | None:
        """None: held. By the store's clock, which decides what is due."""
        if self._had_its_time(item, failure):
            return None
        wait_s = min(max(self._settings.base_s, _spent_s(failure)), self._settings.max_s)
        return self._store.timers.now() + timedelta(seconds=wait_s * self._rng.uniform(0.5, 1.0))

    def suspects(self, key: str) -> bool:
        """Was this key parked when it was last looked at? Then ask before its message is tried."""
        return key in self._suspects

    def found_free(self, key: str) -> None:
        self._suspects.pop(key, None)

    # --- into the queue -----------------------------------------------------------------------------------------

    async def park(self, item: Item, failure: Failure) -> Standing:
        """It failed its attempts in place. PARKED, or what somebody else made of it meanwhile."""
        envelope, due_at = item.envelope, self._due_at(item, failure)
        self._failpoint.hit("before-park")
        message = Waiting(envelope, item.delivery)
        standing = await self._store.parking.park(self.consumer, message, failure, due_at=due_at)
        self._failpoint.hit("after-park")
        if standing.state is ClaimState.PARKED:
            self._suspect(envelope.key)
            self._metrics.count("foldbus_parked_total", consumer=self.consumer, error=failure.error)
            log.warning(
                "%s: key %r is parked: %s %s failed %d times, %s: %s: %s",
                self.consumer, envelope.key, envelope.type, envelope.id, failure.attempts, _next(due_at),
                failure.error, failure.message,
            )  # fmt: skip
            self._report_held(envelope, due_at)
        return standing

    async def follow(self, items: Sequence[Item]) -> Sequence[Standing]:
        """To the end of their keys' queues, in order. NEW: its key is not parked any more."""
        self._failpoint.hit("before-follow")
        standings = await self._store.parking.follow(
            self.consumer, [Waiting(item.envelope, item.delivery) for item in items]
        )
        self._failpoint.hit("after-follow")
        behind: list[Item] = []
        for item, standing in zip(items, standings, strict=True):
            if standing.state is ClaimState.PARKED:
                behind.append(item)
                self._suspect(item.envelope.key)
            elif standing.state is ClaimState.NEW:
                self._suspects.pop(item.envelope.key, None)
        if behind:
            self._metrics.count("foldbus_followed_total", len(behind), consumer=self.consumer)
            keys = sorted({item.envelope.key for item in behind})
            log.info(
                "%s: %d messages wait behind others of their keys: %s%s",
                self.consumer, len(behind), ", ".join(map(repr, keys[:5])), " …" if len(keys) > 5 else "",
            )  # fmt: skip
        return standings

    # --- out of the queue ---------------------------------------------------------------------------------------

    async def commit(self, item: Item, unit: Unit, *, tx: Tx | None = None) -> Outcome:
        """The unit of a message whose turn it is."""
        self._failpoint.hit("before-turn")
        outcome = await self._store.parking.commit(_parked(item), unit, tx=tx)
        self._failpoint.hit("after-turn")
        if outcome.verdict is Verdict.COMMITTED:
            claim = unit.claim
            how = "given up" if claim is not None and claim.state is ClaimState.DEAD else "handled"
            self._metrics.count("foldbus_unparked_total", consumer=self.consumer, how=how.replace(" ", "-"))
            log.info(
                "%s: %s %s left the queue of key %r, %s",
                self.consumer, item.envelope.type, item.envelope.id, item.envelope.key, how,
            )  # fmt: skip
        elif outcome.verdict is Verdict.PARKED:
            self.lost_turn(item)
        return outcome

    async def cancel(self, undo: Item, unit: Unit, *, tx: Tx | None = None) -> Outcome:
        """The unit of an undo whose step is parked: the step leaves its queue, cancelled."""
        step = undo.envelope.undoes
        assert step is not None
        outcome = await self._store.parking.cancel(self.consumer, step, unit, tx=tx)
        if outcome.verdict is Verdict.COMMITTED:
            self._metrics.count("foldbus_unparked_total", consumer=self.consumer, how="cancelled")
            log.info("%s: parked step %s is cancelled by its undo %s", self.consumer, step, undo.envelope.id)
        return outcome

    async def postpone(self, item: Item, failure: Failure) -> None:
        """It failed once more in its turn."""
        envelope, due_at = item.envelope, self._due_at(item, failure)
        self._failpoint.hit("before-postpone")
        turn = _parked(item)
        mine = await self._store.parking.postpone(turn, failure, due_at=due_at)
        if not mine and _parked(item) is not turn:  # its lease ended meanwhile, and it was given anew here
            mine = await self._store.parking.postpone(_parked(item), failure, due_at=due_at)
        self._failpoint.hit("after-postpone")
        if not mine:
            self.lost_turn(item)
            return
        self._metrics.count("foldbus_postponed_total", consumer=self.consumer, error=failure.error)
        log.warning(
            "%s: parked %s %s of key %r failed for the %d. time, %s: %s: %s",
            self.consumer, envelope.type, envelope.id, envelope.key, failure.attempts, _next(due_at),
            failure.error, failure.message,
        )  # fmt: skip
        self._report_held(envelope, due_at)

    def lost_turn(self, item: Item) -> None:
        self._metrics.count("foldbus_turns_lost_total", consumer=self.consumer)
        log.info("%s: parked %s %s is somebody else's now", self.consumer, item.envelope.type, item.envelope.id)

    # --- inside -------------------------------------------------------------------------------------------------

    def _report_held(self, envelope: Envelope, due_at: datetime | None) -> None:
        if due_at is None:
            self._metrics.count("foldbus_held_total", consumer=self.consumer)
            log.error(
                "%s: key %r is held by %s %s, and so is all that follows: see `foldbus parked`",
                self.consumer, envelope.key, envelope.type, envelope.id,
            )  # fmt: skip

    def _suspect(self, key: str) -> None:
        self._suspects[key] = None
        if len(self._suspects) > _SUSPECTS_MAX:
            del self._suspects[next(iter(self._suspects))]


def _parked(item: Item) -> Parked:
    return cast("Parked", item.parked)


def _spent_s(failure: Failure) -> float:
    return (failure.failed_at - failure.first_failed_at).total_seconds()


def _next(due_at: datetime | None) -> str:
    return "held" if due_at is None else f"next try at {due_at.isoformat(timespec='milliseconds')}"


__all__ = ["KeyParked", "ParkSettings", "Parker", "Policy"]
