"""What the consumer engine (`consumer.py`) asks of whoever handles messages; the bus knows no store."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bus.envelope import Envelope, Failure, Offset
from bus.transport import Delivery

Watermarks = Mapping[tuple[str, int], Offset]
"""Per (topic, partition): everything below is handled."""


class Waits(Protocol):
    """What the engine looks at of a parked message; the rest is its processor's."""

    @property
    def failure(self) -> Failure | None:
        """Its last one, with the attempts so far; None: it has not been tried."""
        ...


class Held(Protocol):
    """The partition that an item came from, as long as this member holds it."""

    @property
    def taking(self) -> bool:
        """False once it is being handed over: what has not begun by then is left to whoever gets it."""
        ...


@dataclass(slots=True, eq=False)
class Item:
    """A message on its way through the engine: from a topic (`delivery`, `held`) or from a timer (None), or, with
    `parked`, from its key's queue in the database, whose turn it is: it is tried once, and given up until its next
    turn.

    `attempts` counts failures so far. `examine` is set once a commit answered that something was taken or moved on:
    then ask what became of the id before deciding again. `unreadable`: what it failed with was a BadInput, so that
    trying it again as it is cannot help.
    """

    envelope: Envelope
    delivery: Delivery | None
    attempts: int = 0
    examine: bool = False
    parked: Waits | None = None
    unreadable: bool = False
    held: Held | None = None

    @property
    def withdrawn(self) -> bool:
        return self.held is not None and not self.held.taking


@dataclass(frozen=True, slots=True)
class Done:
    """Handled, or found handled: its offset counts as complete."""


@dataclass(frozen=True, slots=True)
class Aside(Done):
    """Not handled, but kept where its key's order is kept: in the key's queue in the database. Its offset counts as
    complete."""


@dataclass(frozen=True, slots=True)
class Again:
    """Not handled and not at fault (lost a race, or waits behind an earlier one of its key): once more, in order.
    `after_s` above 0 lets it wait, its key behind it."""

    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Failed:
    """The handler raised, or the message cannot be read (a BadInput: given up at once). Counts as an attempt."""

    error: Exception


Result = Done | Again | Failed


@dataclass(frozen=True, slots=True, eq=False)
class Later:
    """Still at work when the rest of its batch was done: what becomes of it is `result`'s. Its key waits for that,
    nobody else does; what stands behind it in the batch was not tried. Should `result` raise, nothing is known of the
    message, and it is given again. The engine cancels what it no longer waits for."""

    result: asyncio.Future[Result]


Answer = Result | Later


class Processor(Protocol):
    """Handles batches for one group. Results come in the order of `batch`."""

    group: str

    def wants(self, type_name: str) -> bool:
        """Is this type handled here? Asked by header, before decoding: False skips the record and counts it. Raises
        UnknownType or UnknownVersion when it must become a dead letter instead."""
        ...

    async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Answer]:
        """One batch, keys interleaved, per key in order. `watermarks` are contiguous *before* this call and are stored
        with it. An exception means that nothing is known of any of them (the store does not answer): the engine waits
        and gives the same items again, without counting an attempt."""
        ...

    async def give_up(self, item: Item, failure: Failure) -> Result:
        """Its attempts are used up. Aside: it is parked, to be tried again later. Done: a dead letter was made of it,
        or somebody else has dealt with it. Again: look at it once more, something changed meanwhile."""
        ...

    async def give_up_raw(self, delivery: Delivery, failure: Failure) -> None:
        """A record that never became an envelope: a dead letter of its bytes."""
        ...

    async def stored_watermarks(self) -> Watermarks:
        """What was stored with the units of this group, by whichever process."""
        ...

    async def store_watermarks(self, watermarks: Watermarks) -> None:
        """Stores watermarks without a batch: before the group's offsets move past records that made no unit."""
        ...

    def forget(self, topics: Collection[tuple[str, int]]) -> None:
        """These partitions went to somebody else: drop what is cached."""
        ...
