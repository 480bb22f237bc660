"""What can go wrong in the event store."""

from __future__ import annotations

from bus.envelope import Position, StreamId, Version
from bus.errors import FoldbusError


class EventStoreError(FoldbusError):
    """Root of the store's errors."""


class StoreUnavailable(EventStoreError):
    """The database did not answer; whether anything was written is unknown. The same call may be made again."""


class BadUnit(EventStoreError):
    """A unit contradicts itself (no events in an append, a stream appended to twice, a NUL in text, no topic on an
    outgoing message) or passes a limit of `eventstore/checks.py`: a mistake in the code that staged it. Nothing was
    written."""


class WrongExpectedVersion(EventStoreError):
    """The stream moved on since it was read: reload it and decide again."""

    def __init__(self, stream: StreamId, *, expected: object, actual: Version) -> None:
        super().__init__(f"stream {stream} is at version {actual}, not the expected {expected}; nothing was appended")
        self.stream, self.expected, self.actual = stream, expected, actual


class TooManyConflicts(EventStoreError):
    """Others appended to the stream each time between reading it and appending to it. Nothing was appended: the same
    call, with the same id, may be made again."""

    def __init__(self, what: str, *, attempts: int, seconds: float) -> None:
        super().__init__(
            f"{what}: somebody else was quicker {attempts} times within {seconds:.1f} s; nothing was appended"
        )
        self.attempts = attempts


class NoSuchVersion(EventStoreError):
    """A stream was asked for as it was at a version that it has not reached."""

    def __init__(self, stream: StreamId, *, wanted: Version, actual: Version) -> None:
        super().__init__(f"stream {stream} is at version {actual}, there is no version {wanted} of it")
        self.stream, self.wanted, self.actual = stream, wanted, actual


class SchemaMismatch(EventStoreError):
    """The database's schema is not the one this code works with: run `foldbus db upgrade`."""


class WrongEpoch(EventStoreError):
    """A checkpoint or token is from another epoch of the log: the database was restored meanwhile."""


class CheckpointAhead(EventStoreError):
    """A reader wants to go on behind a position that this log never drew: another database, one restored from a backup,
    or a standby promoted before it had everything. Reading on would skip what is yet to be written up to there."""

    def __init__(self, after: Position, *, drawn: Position) -> None:
        super().__init__(
            f"found a checkpoint at position {after}, but this log has only drawn {drawn}: it is another database, or "
            "one from before the checkpoint; nothing was read. Restore the right one, or raise the epoch "
            "(`foldbus db restored`) and begin again from a checkpoint that is in it"
        )
        self.after, self.drawn = after, drawn


class StreamArchived(EventStoreError):
    """The stream was archived: it takes no events and cannot be loaded; `foldbus store` reads or restores it."""


class StreamTruncated(EventStoreError):
    """The stream's first events were deleted: it loads from its snapshot, and no further back than that."""


class NoSuchStream(EventStoreError):
    """There is no stream of that name. Nothing was changed."""


class NotSeen(EventStoreError):
    """Events that somebody has not read yet were to be taken out of the log. Nothing was changed: wait for the relay
    and the projections, and try again."""


class NotTruncated(EventStoreError):
    """No snapshot holds what the events to be deleted folded to. Nothing was deleted."""
