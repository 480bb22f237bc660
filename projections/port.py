"""The projection ports: where events come from (`Feed`) and where rows and the checkpoint go (`Rows`).

A checkpoint is a place in every partition of a source. Own log: source `log`, partition 0, `offset` = position.
Another service's topic: source = the topic's name; `offset` is the next to read, `epoch` and `position` are of the last
event seen there: a record of the same epoch at or below that position is a replay and is skipped; a lower epoch too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from pydantic import BaseModel

from bus.envelope import Envelope, Offset, Position

Row = TypeVar("Row", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Place:
    offset: Offset = 0
    epoch: int = 0
    position: Position = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How far one build of a projection is. `revision` rises with every save: the compare-and-set."""

    places: Mapping[tuple[str, int], Place] = field(default_factory=dict)
    revision: int = 0


@dataclass(frozen=True, slots=True)
class FeedPage:
    """Events in order per partition, the checkpoint after them (also past skipped ones), and how many messages are
    known to be left behind it."""

    records: Sequence[Envelope]
    checkpoint: Checkpoint
    behind: int


class Feed(Protocol):
    async def read(self, after: Checkpoint, *, limit: int, timeout_s: float = 0.0) -> FeedPage:
        """The next page; waits up to `timeout_s` for something to come when there is nothing."""
        ...


class Rows(Protocol[Row]):
    """One read model's tables, all generations of it."""

    async def load(self, generation: int, keys: Collection[str]) -> Mapping[str, Row]:
        """Those that exist."""
        ...

    async def save(self, generation: int, rows: Mapping[str, Row | None], *, old: Checkpoint, new: Checkpoint) -> None:
        """Rows (None deletes) and checkpoint in one statement or transaction, only if the stored checkpoint's revision
        is `old`'s. Raises Fenced otherwise: another runner saved; nothing changed."""
        ...
