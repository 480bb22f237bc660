"""What one assignment has received, and up to where all of it is handled.

The watermark is the first incomplete of the *received* offsets, never a range: compaction and transaction markers
leave gaps, and an offset that never arrives must not hold anything up. A `Part` belongs to one epoch; what ends after
the epoch did says nothing to the next one.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from bus.envelope import Offset
from bus.transport import Assignment

if TYPE_CHECKING:
    from bus.engine.queues import KeyQueue


class Part:
    """One partition in this member's hands.

    `taking` ends when it is being revoked (what is at work may still complete), `gone` when it is no longer ours.
    `committed` and `stored` are what the group and the database know; `stored` None: nothing yet.
    """

    __slots__ = (
        "_done",
        "_open",
        "ahead",
        "assignment",
        "at_work",
        "committed",
        "crowd",
        "gone",
        "held_until",
        "paused",
        "position",
        "stored",
        "taking",
        "where",
    )

    def __init__(self, assignment: Assignment, *, start: Offset, stored: Offset | None = None) -> None:
        self.assignment = assignment
        self.where = (assignment.topic, assignment.partition)
        self.position = start
        self.committed = start
        self.stored = stored
        self.taking = True
        self.gone = False
        self.at_work = 0
        self.paused = False
        self.ahead = False
        self.crowd: set[KeyQueue] = set()
        self.held_until: float | None = None
        self._open: deque[Offset] = deque()
        self._done: set[Offset] = set()

    @property
    def watermark(self) -> Offset:
        """Everything below was handled: the next offset to be read, should another take over now."""
        return self._open[0] if self._open else self.position

    @property
    def spread(self) -> int:
        """How many received offsets lie at or above the watermark, handled or not: what a crash would read again."""
        return len(self._open)

    def receive(self, offset: Offset) -> bool:
        """False when this epoch has seen the offset already."""
        if offset < self.position:
            return False
        self._open.append(offset)
        self.position = offset + 1
        return True

    def complete(self, offset: Offset) -> None:
        """Once per received offset, in any order. O(1) amortised."""
        pending = self._open
        if pending[0] != offset:
            self._done.add(offset)
            return
        pending.popleft()
        done = self._done
        while done and pending[0] in done:
            done.remove(pending.popleft())
