"""What operators tell the workers, and what a store forgets: pauses, places to read from, claims that are too old.

`tests/eventstore/test_flow_conformance.py` and `test_inbox_conformance.py` pin both ports on every store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Protocol
from uuid import UUID

if TYPE_CHECKING:
    from eventstore.port import Watermark

REPLIES = ".replies"
"""A command whose answer goes to a topic of this ending is a saga's step, or an undo of one."""


@dataclass(frozen=True, slots=True)
class Pause:
    """A consumer group whose workers stand still. `by` and `reason` are for people."""

    group: str
    at: datetime
    by: str
    reason: str


@dataclass(frozen=True, slots=True)
class Act:
    """Something that somebody did to a group; `what` is a line for people. `number` rises."""

    number: int
    at: datetime
    group: str
    what: str
    by: str
    reason: str


class Flow(Protocol):
    """Each verb writes an `Act` with what it changes, in one transaction. Times are the store's clock's."""

    async def pause(self, group: str, *, by: str, reason: str = "") -> bool:
        """From now on, also after a restart, until `resume`. False: it was paused already, nothing changed."""
        ...

    async def resume(self, group: str, *, by: str, reason: str = "") -> bool:
        """False: it was not paused, nothing changed."""
        ...

    async def paused(self) -> Mapping[str, Pause]:
        """By group. Cheap: workers ask a few times a second."""
        ...

    async def place(self, marks: Sequence[Watermark], *, by: str, reason: str = "") -> None:
        """Sets these watermarks, also backwards: the one exception to "it never goes back". For a group without
        members: what a member still holds would be stored over it. One `Act` for each."""
        ...

    async def acts(self, *, limit: int = 100) -> Sequence[Act]:
        """The youngest first."""
        ...


@dataclass(frozen=True, slots=True)
class Forgotten:
    """`looked` at so many claims, `gone` are so many of them. Go on after `after`; None: the end was reached."""

    looked: int
    gone: int
    after: UUID | None


class Inbox(Protocol):
    async def forget(
        self,
        consumer: str,
        *,
        older_than_s: float,
        steps_older_than_s: float | None = None,
        after: UUID | None = None,
        limit: int = 2000,
    ) -> Forgotten:
        """Deletes claims of a consumer (and the replies stored with them) that were taken longer ago than that, by the
        store's clock; looks at the `limit` next ones by message id, beginning after `after`.

        Age alone is never enough. Kept are claims that are in hand (STARTED, PARKED), those of open dead letters, and,
        unless they are older than `steps_older_than_s` too (None: always), those that an undo may still ask for: of
        commands whose answer went to a saga, and the fences that undos left behind. What somebody changes at the same
        time is passed over.

        Raises ValueError for a limit below 1."""
        ...


def check_limit(limit: int) -> None:
    if limit < 1:
        raise ValueError(f"limit is {limit}; wanted 1 or more")


def placed(mark: Watermark) -> str:
    """An `Act`'s line."""
    return f"placed {mark.topic}[{mark.partition}] at {mark.offset}"


__all__ = ["REPLIES", "Act", "Flow", "Forgotten", "Inbox", "Pause", "check_limit", "placed"]
