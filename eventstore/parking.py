"""Parking: messages that failed for longer than a queue in memory should wait, and all that came behind them.

A key (within its consumer) is parked as long as its queue in the database holds a message. A message joins the queue's
end and leaves from its head, so a key's order outlives retries, rebalances, restarts and whoever owns the partition.

What holds it together, on both stores (`test_parking_conformance.py`, `test_turns_conformance.py`):

- Every message in a queue has a claim that is PARKED. `Store.commit` answers PARKED for a unit whose claim is, and for
  one whose claim is new while its key is parked: such a unit loses like a conflict, and the message goes to `follow`.
- Whoever takes the head away holds the key's row until the end of the transaction: a message that comes meanwhile
  either joins the queue before, or finds the key free.
- Only the head may be handled, by one worker at a time: `due` gives it for a while, with a token that every change of
  hands raises.

A queue's transactions lock the key's row, then claims, then streams.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Protocol
from uuid import UUID

from bus.envelope import Envelope, Failure
from bus.transport import Delivery

if TYPE_CHECKING:
    from eventstore.port import Outcome, Standing, Tx, Unit


@dataclass(frozen=True, slots=True)
class Waiting:
    """A message for a queue, with the record it came in: byte for byte what a dead letter of it needs. A message of a
    timer has no place in a topic: `delivery` None."""

    envelope: Envelope
    delivery: Delivery | None = None


@dataclass(frozen=True, slots=True)
class Parked:
    """A message in its queue. `number` rises along the queue and is never used twice for a key.

    `failure` is its last one, with the attempts so far; None: it waits because of those before it. `token` says whose
    turn it is: 0 unless it came from `due`. The epoch of its delivery's assignment is 0."""

    consumer: str
    key: str
    number: int
    message: Waiting
    parked_at: datetime
    failure: Failure | None = None
    token: int = 0


@dataclass(frozen=True, slots=True)
class ParkedKey:
    """A parked key as a list shows it. `due_at` is when its head is tried again; None: it is held, and waits for
    somebody to decide. `waiting` counts the messages in its queue, the head included."""

    consumer: str
    key: str
    since: datetime
    due_at: datetime | None
    waiting: int
    head: Parked


class Parking(Protocol):
    async def park(self, consumer: str, message: Waiting, why: Failure, *, due_at: datetime | None) -> Standing:
        """Puts a failed message to the end of its key's queue, which begins with it if there is none; `due_at` counts
        only then. Its claim becomes PARKED, also one that was STARTED (which it remembers). A message without a
        delivery came from a timer, which is taken away.

        Answers what stands at the end: PARKED, now or since before; DONE, DEAD or CANCELLED when somebody dealt with it
        meanwhile, and nothing was written. A second call changes nothing."""
        ...

    async def follow(self, consumer: str, messages: Sequence[Waiting]) -> Sequence[Standing]:
        """Puts each message, in order, to the end of its key's queue; one transaction. PARKED: it is there, now or
        since before. NEW: its key is not parked any more, nothing was written, it may be handled. DONE, DEAD, CANCELLED
        or STARTED: so its claim stands, nothing was written; one that was STARTED joins when its lease is over."""
        ...

    async def due(self, *, consumers: Collection[str], limit: int, lease_s: float) -> Sequence[Parked]:
        """Heads whose time has come by the store's clock, the longest due first, each hidden from other callers for
        `lease_s`."""
        ...

    async def next_due(self, *, consumers: Collection[str] | None = None) -> datetime | None:
        """When the earliest head (of these consumers, or any) comes up, hidden ones at the end of their lease; None:
        nothing is parked but held."""
        ...

    async def seize(self, consumer: str, key: str, *, lease_s: float) -> Parked | None:
        """The key's head for somebody who decides about it, as from `due`, be it due, held, or somebody else's turn:
        theirs is over. One that was held stays so. None: it is not parked."""
        ...

    async def commit(
        self, parked: Parked, unit: Unit, *, tx: Tx | None = None, instead: Waiting | None = None
    ) -> Outcome:
        """`Store.commit` of one unit whose claim is that of a head from `due`, and in the same transaction the message
        leaves its queue: the next one is due at once, after the last one the key is free. The unit may give it up
        (claim DEAD, with its letter).

        `instead`: a new message of this key takes its place and its number, as if it had just joined, and is due at
        once; its claim is PARKED. CONFLICT when there is a claim of its id.

        Whatever is not COMMITTED changes nothing: CONFLICT as ever; DUPLICATE or CANCELLED when its claim says so;
        PARKED when it is somebody else's turn (the token), or the message is not its key's head."""
        ...

    async def postpone(self, parked: Parked, why: Failure, *, due_at: datetime | None) -> bool:
        """It failed once more: due again at `due_at`, or held (None) until `wake`. False: it is somebody else's turn,
        nothing changed."""
        ...

    async def cancel(self, consumer: str, step: UUID, unit: Unit, *, tx: Tx | None = None) -> Outcome:
        """An undo whose step is parked: commits `unit`, whose claim fences the step with CANCEL, and takes the step out
        of its queue, CANCELLED. The unit's own key may be parked: it passes the queue, also when it is in that already.
        CONFLICT when the step is not parked any more, DUPLICATE or CANCELLED when the unit's own claim says so; then
        nothing changed."""
        ...

    async def keys(
        self, *, consumer: str | None = None, after: tuple[str, str] | None = None, limit: int = 100
    ) -> Sequence[ParkedKey]:
        """By (consumer, key), beginning after `after`."""
        ...

    async def queue(self, consumer: str, key: str, *, after: int = 0, limit: int = 100) -> Sequence[Parked]:
        """A key's queue from its head, beginning after number `after`; empty when it is not parked."""
        ...

    async def wake(self, consumer: str, key: str) -> bool:
        """Its head is due now, held or not, and it is nobody's turn any more. False: it is not parked."""
        ...


class Effects(Protocol):
    """Claims of handlers that call the outside world: what was begun and may have happened."""

    async def begin(
        self, consumer: str, message_id: UUID, key: str, *, lease_s: float, parked: Parked | None = None
    ) -> Standing:
        """Records that somebody is at it, and for how long at most. NEW: it is the caller's now; `Standing.token` is
        what `commit` and `release` ask for, `Standing.started` whether an earlier attempt may have happened.

        With `parked`, a head whose turn it is, it is recorded beside its claim, which stays PARKED, and
        `Parking.commit` ends it; PARKED when it is somebody else's turn. (STARTED as ever: whose turn it was before may
        be at it still. `Parking.park` ends the lease of what it parks.)

        STARTED: it is somebody else's until the lease ends. KEY_PARKED: its key is parked, `follow` it (begun before or
        not). PARKED, DONE (with the stored reply), DEAD, CANCELLED: so it stands. Nothing was written in these
        cases."""
        ...

    async def release(self, consumer: str, message_id: UUID, token: int) -> None:
        """The attempt failed: the next `begin` need not wait for the lease. The claim stays STARTED, since what was
        called may have happened. Nothing happens when it is not the caller's any more."""
        ...

    async def commit(self, token: int, unit: Unit) -> Outcome:
        """`Store.commit` of one unit whose claim was begun with `token`, also when its key was parked since. STARTED
        when it is somebody else's by now, or anybody's, else what became of it; nothing is written unless it is
        COMMITTED. What was DONE is remembered as started no more."""
        ...


__all__ = ["Effects", "Parked", "ParkedKey", "Parking", "Waiting"]
