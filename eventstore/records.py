"""What the relay asks of a store: its log as records, ready to be published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bus.envelope import Position
from bus.transport import Outgoing


@dataclass(frozen=True, slots=True)
class RecordPage:
    """What has a topic, in position order, and where each of it stands. Everything at or below `upto` has been seen:
    read on with `after=upto`. `head` is the log's watermark as far as it is known; another look may find it higher."""

    records: Sequence[Outgoing]
    positions: Sequence[Position]
    upto: Position
    head: Position


class Records(Protocol):
    async def read(self, *, after: Position, limit: int) -> RecordPage:
        """As `Store.read_all(outgoing=True)`, of up to `limit` messages, but what it gives is `to_record` of each that
        has a topic. A page that ends at `after` says that there is nothing above it; one that ends at `head` does not,
        and asking again does. Raises CheckpointAhead."""
        ...


__all__ = ["RecordPage", "Records"]
