"""What an operator does about parked keys: look, have the head tried now, give it up, or put another in its place.

Opens the store alone; a worker that runs, or starts later, goes on with the key. Each key is one transaction: stopped
anywhere, the same call goes on with the rest.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from enum import StrEnum

from bus.cloudevents import to_record
from bus.envelope import Envelope, Failure
from bus.errors import FoldbusError
from bus.metrics import Metrics
from bus.processing import Item
from bus.seams import Clock, Ids
from bus.transport import Assignment, Delivery, TopicSpec
from eventstore.parking import Parked, ParkedKey, Waiting
from eventstore.port import Settled, Settlement, Store, Unit, Verdict
from foldbus.claims import Claims
from foldbus.redriving import CannotEdit, Edit, Redriver, of_a_saga
from foldbus.service import Service

log = logging.getLogger("foldbus.parking")

LEASE_S = 30.0
_PAGE = 100
_OTHER_HEAD = "another message is at its head by now"
_NOT_PARKED = "it is not parked any more"


class ParkedBecame(StrEnum):
    """Of one key, when something was done about its head."""

    WOKEN = "woken"
    DISCARDED = "discarded"
    REPLACED = "replaced"
    GONE = "gone"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class ParkedWhere:
    """Which parked keys; all that is given must hold, of the head. `type` and `error` may end in `*`; `held`: only
    those that wait for somebody to decide."""

    consumer: str | None = None
    keys: frozenset[str] | None = None
    type: str | None = None
    error: str | None = None
    held: bool = False

    def holds(self, one: ParkedKey) -> bool:
        failure = one.head.failure
        return (
            (self.keys is None or one.key in self.keys)
            and _like(self.type, one.head.message.envelope.type)
            and _like(self.error, "" if failure is None else failure.error)
            and (one.due_at is None or not self.held)
        )


@dataclass(frozen=True, slots=True)
class ParkedResult:
    key: ParkedKey
    became: ParkedBecame
    why: str = ""


class ParkedKeys:
    """Of one service's store. `by` is who asks, for the record."""

    def __init__(
        self,
        service: Service,
        store: Store,
        *,
        clock: Clock,
        ids: Ids,
        metrics: Metrics,
        by: str = "",
        max_bytes: int = TopicSpec("").max_bytes,
    ) -> None:
        self._service, self._store = service, store
        self._clock, self._ids, self._metrics, self._by, self._max_bytes = clock, ids, metrics, by, max_bytes

    async def chosen(self, where: ParkedWhere, *, limit: int) -> AsyncGenerator[ParkedKey]:
        """By consumer and key, each at most once."""
        after: tuple[str, str] | None = None
        found = 0
        while found < limit:
            page = await self._store.parking.keys(consumer=where.consumer, after=after, limit=_PAGE)
            for one in page:
                if where.holds(one) and found < limit:
                    found += 1
                    yield one
            if len(page) < _PAGE:
                return
            after = (page[-1].consumer, page[-1].key)

    async def retry(self, one: ParkedKey) -> ParkedResult:
        """Its head is tried as soon as a worker comes to it. What fails again is postponed, or held, as before."""
        if not await self._store.parking.wake(one.consumer, one.key):
            return ParkedResult(one, ParkedBecame.GONE, _NOT_PARKED)
        self._metrics.count("foldbus_woken_total", consumer=one.consumer)
        log.info("%s: key %r is woken by %s", one.consumer, one.key, self._by or "-")
        return ParkedResult(one, ParkedBecame.WOKEN)

    def refused(self, one: ParkedKey, edit: Edit | None = None, *, sagas_too: bool = False) -> str:
        """Why its head cannot be given up so; empty when it can. Raises CannotEdit."""
        if edit is None:
            return ""
        self._edited(one.head, edit)
        if not sagas_too and (why := of_a_saga(one.head.message.envelope)) is not None:
            return why
        return ""

    async def discard(
        self, one: ParkedKey, reason: str, edit: Edit | None = None, *, sagas_too: bool = False
    ) -> ParkedResult:
        """The head, if it is still the one that was seen, becomes a dead letter, and the next one is due. Whoever asked
        is told that it died, or that nobody knows, when a call of the outside world was begun. With `edit`, another
        message takes its place: with an id of its own, caused by the old one, whose letter is settled as replaced.
        Raises CannotEdit, and ValueError without a reason."""
        if not reason.strip():
            raise ValueError("a message is discarded for a reason; found none")
        if why := self.refused(one, edit, sagas_too=sagas_too):
            return ParkedResult(one, ParkedBecame.REFUSED, why)
        found = await self._store.parking.queue(one.consumer, one.key, limit=1)
        head: Parked | None = None
        if found and found[0].number == one.head.number:  # nobody's turn is taken for another head
            head = await self._store.parking.seize(one.consumer, one.key, lease_s=LEASE_S)
        if head is None or head.number != one.head.number:
            return ParkedResult(one, ParkedBecame.GONE, _OTHER_HEAD if found else _NOT_PARKED)
        instead = None if edit is None else self._edited(head, edit)
        (standing,) = await self._store.examine(one.consumer, [(head.message.envelope.id, one.key)])
        unit = self._letter(head, reason, started=standing.started)
        outcome = await self._store.parking.commit(head, unit, instead=instead)
        if outcome.verdict is not Verdict.COMMITTED:
            return ParkedResult(one, ParkedBecame.GONE, f"somebody else dealt with it: {outcome.verdict}")
        id, who = head.message.envelope.id, self._by or "-"
        if instead is None:
            self._metrics.count("foldbus_parked_discarded_total", consumer=one.consumer)
            log.warning("%s: parked %s of key %r is discarded by %s: %s", one.consumer, id, one.key, who, reason)
            return ParkedResult(one, ParkedBecame.DISCARDED, reason)
        as_ = f"as {instead.envelope.id}"
        assert unit.dead_letter is not None
        settlement = Settlement(Settled.REPLACED, self._clock.now(), self._by, f"with another payload, {as_}: {reason}")
        await self._store.letters.settle(unit.dead_letter, settlement)
        self._metrics.count("foldbus_parked_replaced_total", consumer=one.consumer)
        log.warning("%s: parked %s of key %r is replaced by %s, %s: %s", one.consumer, id, one.key, who, as_, reason)
        return ParkedResult(one, ParkedBecame.REPLACED, as_)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _letter(self, head: Parked, reason: str, *, started: bool = False) -> Unit:
        message, failure, by = head.message, head.failure, self._by or "-"
        now = self._clock.now()
        if failure is None:
            failure = Failure(f"{Discarded.__module__}.Discarded", f"discarded by {by}: {reason}", "", 0, now, now)
        else:
            failure = replace(failure, message=f"{failure.message}; discarded by {by}: {reason}", failed_at=now)
        claims = Claims(
            consumer=head.consumer,
            service=self._service.name,
            store=self._store,
            ids=self._ids,
            clock=self._clock,
            metrics=self._metrics,
            max_bytes=self._max_bytes,
        )
        return claims.letter(Item(message.envelope, message.delivery), failure, started=started)

    def _edited(self, head: Parked, edit: Edit) -> Waiting:
        """What takes its place, with the record that a dead letter of it would need."""
        old, delivery = head.message.envelope, head.message.delivery
        letter = self._letter(head, "another payload").dead_letter
        assert letter is not None
        redriver = Redriver(
            self._service, self._store, clock=self._clock, ids=self._ids, metrics=self._metrics, by=self._by,
            max_bytes=self._max_bytes,
        )  # fmt: skip
        new = replace(redriver.edited(letter, old, edit), topic=old.topic)
        if new.key != head.key:
            raise CannotEdit(
                f"the edited payload is of key {new.key!r}, this is the queue of {head.key!r}; nothing was changed"
            )
        if len(new.data) > self._max_bytes:
            raise CannotEdit(f"{len(new.data)} bytes of payload; wanted at most {self._max_bytes}; nothing was changed")
        return Waiting(new, None if delivery is None else _record(new, delivery.topic))


class Discarded(FoldbusError):
    """What the dead letter of a message says that was given up before it was ever tried."""


def _record(envelope: Envelope, topic: str) -> Delivery:
    record = to_record(replace(envelope, topic=topic))
    return Delivery(Assignment(topic, -1), -1, record.key, record.value, tuple(record.headers), envelope.time)


def _like(wanted: str | None, found: str) -> bool:
    if wanted is None or wanted == found:
        return True
    return wanted.endswith("*") and found.startswith(wanted[:-1])


__all__ = ["Discarded", "ParkedBecame", "ParkedKeys", "ParkedResult", "ParkedWhere"]
