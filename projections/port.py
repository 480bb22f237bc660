"""The projection ports: where events come from (`Feed`) and where rows and the checkpoint go (`Rows`).

A checkpoint is a place in every partition of a source. Own log: source `log`, partition 0, `offset` = position.
Another service's topic: source = the topic's name; `offset` is the next to read, `epoch` and `position` are of the last
event seen there: a record of the same epoch at or below that position is a replay and is skipped; a lower epoch too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

from pydantic import BaseModel

from bus.envelope import Envelope, Offset, Position
from bus.errors import BadInput
from bus.transport import Delivery

Row = TypeVar("Row", bound=BaseModel)

LOG = "log"
"""The source name of the service's own log."""


@dataclass(frozen=True, slots=True)
class Place:
    offset: Offset = 0
    epoch: int = 0
    position: Position = 0

    def reached(self, other: Place) -> bool:
        """Is everything that `other` has seen of this partition seen here as well?"""
        return self.offset >= other.offset and (self.epoch, self.position) >= (other.epoch, other.position)


Places = Mapping[tuple[str, int], Place]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How far one build of a projection is. `revision` rises with every save: the compare-and-set."""

    places: Places = field(default_factory=dict[tuple[str, int], Place])
    revision: int = 0


@dataclass(frozen=True, slots=True)
class FeedRecord:
    """An event that this projection names; `delivery` is the record it came in (None: from the own log). Of an event
    that was upcast `stored` is the older one: dead letters keep that."""

    envelope: Envelope
    delivery: Delivery | None = None
    stored: Envelope | None = None


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that never became an envelope: a dead letter of its bytes."""

    delivery: Delivery
    error: BadInput


@dataclass(frozen=True, slots=True)
class FeedPage:
    """Events in order per partition, the checkpoint after them (also past skipped and bad ones), and how many messages
    are known to be left behind it. `missing` are topics among the feed's sources that do not exist (yet): nothing is
    read of them, and nothing else waits for them."""

    records: Sequence[FeedRecord]
    checkpoint: Checkpoint
    behind: int
    bad: Sequence[BadRecord] = ()
    missing: Sequence[str] = ()


class Feed(Protocol):
    @property
    def sources(self) -> Collection[str]:
        """`log` and topics: whose places its checkpoints hold."""
        ...

    async def read(self, after: Checkpoint, *, limit: int, timeout_s: float = 0.0) -> FeedPage:
        """The next page, up to `limit` records per source; waits up to `timeout_s` for something to come when there is
        nothing. Any `after` may be given: one that does not follow from the last page makes the feed seek.

        Raises MissingTopics, OffsetOutOfRange (retention took what was not read yet) and what store and transport
        raise when they cannot be reached; it may be called again after each.
        """
        ...


class FeedFactory(Protocol):
    def __call__(self) -> AbstractAsyncContextManager[Feed]:
        """A feed of its own for each reader (runner, rebuild, verify): feeds hold open readers."""
        ...


class Status(StrEnum):
    BUILDING = "building"
    SERVING = "serving"
    RETIRED = "retired"
    """Was serving; kept whole until the next rebuild begins, for `swap_back`."""
    DROPPED = "dropped"
    """Its table is gone; the line stays, so that old code is recognised as old."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One build of a projection. `shape` is a hash of the row's columns; `held` while a swap is going on: nothing is
    saved meanwhile."""

    number: int
    version: int
    shape: str
    status: Status
    created_at: datetime
    swapped_at: datetime | None = None
    held: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot(Generic[Row]):
    """All rows of the serving generation and the checkpoint they belong to, from one moment."""

    generation: int
    checkpoint: Checkpoint
    rows: Mapping[str, Row]


class Rows(Protocol[Row]):
    """One read model's tables, all generations of it. One conformance suite, `tests/projections/test_rows.py`."""

    async def serving(self) -> Generation:
        """The generation that serves. Creates control tables, generation 1 and the view when they are not there yet;
        any number of processes may call it at once. Raises NameTaken when the view's name belongs to something else."""
        ...

    async def generations(self) -> Sequence[Generation]:
        """All there ever were, ascending; empty before the first `serving`."""
        ...

    async def build(self) -> Generation:
        """The generation being built for this code's version and shape: the one that is there already (a build that
        was killed goes on), else a new one. A build of another version or shape and what was retired are dropped."""
        ...

    async def checkpoint(self, generation: int) -> Checkpoint:
        """Raises Fenced when that generation was dropped."""
        ...

    async def load(self, generation: int, keys: Collection[str]) -> Mapping[str, Row]:
        """Those that exist. Raises RowUnreadable when one does not fit the row model."""
        ...

    async def save(self, generation: int, rows: Mapping[str, Row | None], *, old: Checkpoint, new: Checkpoint) -> None:
        """Rows (None deletes) and checkpoint in one statement or transaction, only if the stored checkpoint's revision
        is `old`'s and the generation is serving or building and not held. What is stored afterwards has `new`'s places
        and revision `old.revision + 1`. Raises Fenced otherwise: nothing changed."""
        ...

    async def hold(self, generation: int, seconds: float) -> Checkpoint:
        """Keeps everyone from saving to `generation` until a swap or for `seconds`, also whoever is about to; answers
        the checkpoint at which it stands still."""
        ...

    async def swap(self, to: int, *, sources: Collection[str]) -> None:
        """In one transaction the view and the status: `to`, which is being built, serves; what served is retired.

        Raises NotCaughtUp (nothing changed) when a place of `sources` is behind the serving generation's, Fenced when
        `to` is not being built (any more), SwapBlocked when readers kept the view locked.
        """
        ...

    async def swap_back(self) -> Generation:
        """Undoes the last swap: the youngest retired generation serves again and goes on from where it stood. Raises
        NothingToSwapBack."""
        ...

    async def get(self, key: str) -> Row | None:
        """From the generation that serves at this moment. Raises RowUnreadable."""
        ...

    async def page(self, *, after: str | None, limit: int) -> Sequence[tuple[str, Row]]:
        """Rows above key `after`, by key in the order of UTF-8 bytes."""
        ...

    async def count(self, *, where: Mapping[str, str] | None = None) -> int:
        """All rows, or those whose columns of text hold these values. Raises KeyError where there is no such column."""
        ...

    async def snapshot(self) -> Snapshot[Row]:
        """Holds all rows in memory: for `verify`."""
        ...
