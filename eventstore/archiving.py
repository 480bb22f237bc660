"""What may be archived and truncated, decided for both adapters in one place, on rows that they hold locked."""

from __future__ import annotations

from dataclasses import dataclass

from bus.envelope import Position, StreamId, Version
from eventstore.errors import NoSuchStream, NotSeen, NotTruncated, StreamArchived, WrongExpectedVersion
from eventstore.port import Outcome, StreamInfo


@dataclass(frozen=True, slots=True)
class Found:
    """A stream's row and its snapshot's."""

    info: StreamInfo
    snapshot: Version | None
    schema: str | None


def no_stream(stream: StreamId) -> NoSuchStream:
    return NoSuchStream(f"there is no stream {stream}; nothing was changed")


def check_limit(limit: int) -> None:
    if limit < 1:
        raise ValueError(f"limit is {limit}; wanted 1 or more")


def is_archived(found: Found, *, expected: Version) -> bool:
    """Already? Raises WrongExpectedVersion."""
    if found.info.version != expected:
        raise WrongExpectedVersion(found.info.stream, expected=expected, actual=found.info.version)
    return found.info.archived_at is not None


def misfit(outcome: Outcome) -> StreamArchived | WrongExpectedVersion | None:
    """Why a CONFLICT is one; None where no stream was at fault. An archived stream's `actual` is minus its version: its
    writer need not read it again, it stays closed."""
    stream, actual = outcome.stream, outcome.actual
    if stream is None or actual is None:
        return None
    if actual < 0:
        return StreamArchived(
            f"stream {stream} was archived at version {-actual}: it takes no events, nothing was written; "
            "`foldbus store restore-stream` opens it again"
        )
    return WrongExpectedVersion(stream, expected=outcome.expected, actual=actual)


def is_truncated(found: Found, *, upto: Version, schema: str | None) -> bool:
    """Already? Raises NotTruncated, StreamArchived."""
    info = found.info
    if info.archived_at is not None:
        raise StreamArchived(f"stream {info.stream} is archived; restore it before it is truncated")
    if upto < info.kept_from:
        return True
    if found.snapshot is None:
        raise NotTruncated(f"stream {info.stream} has no snapshot; wanted one at version {upto} or above")
    if found.snapshot < upto:
        raise NotTruncated(
            f"the snapshot of {info.stream} is of version {found.snapshot}; wanted one at version {upto} or above"
        )
    if schema is not None and found.schema != schema:
        raise NotTruncated(
            f"the snapshot of {info.stream} was made by other code (schema {found.schema}, wanted {schema}): today's "
            "would not read it"
        )
    return False


def check_seen(found: Found, last: Position | None, *, seen: Position) -> None:
    """Raises NotSeen."""
    if last is not None and last > seen:
        raise NotSeen(
            f"stream {found.info.stream} has an event at position {last}, which is not read by everybody: the last "
            f"reader is at {seen}; nothing was changed"
        )
