"""What both adapters make of a `Where`, and how much of the log one call looks through.

A filter that nearly nothing matches would have the database read the whole log in one statement, while the reader
knows nothing of how far that is. So a call looks through a span of positions, at most, and says in `Page.upto` how far
it came; the caller goes on from there, page after empty page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bus.envelope import Envelope, Position, StreamId, Version
from eventstore.errors import StreamArchived
from eventstore.port import Page, Where

SPAN = 50_000
"""Positions that one call looks through, at most: some tens of milliseconds of the database's time."""


@dataclass(frozen=True, slots=True)
class Span:
    """What one filtered call looks at: above `after`, up to `upto`."""

    after: Position
    upto: Position
    head: Position

    def page(self, found: Sequence[Envelope], limit: int) -> Page:
        """A full page ends at its last record, any other at the end of the span."""
        upto = found[-1].position or self.upto if len(found) >= limit else self.upto
        return Page(found, upto, self.head)

    def page_of_stream(self, found: Sequence[Envelope], limit: int, where: Where) -> Page:
        """Of one stream's next `limit` records, those that match what else is asked."""
        page = self.page(found, limit)
        rest = replace(where, stream=None)
        return page if rest == _ALL else replace(page, records=[one for one in found if matches(rest, one)])


def span(where: Where, *, after: Position, head: Position) -> Span:
    """A stream's own events are found without looking through others', so its span is the whole log."""
    upto = head if where.stream is not None else min(head, after + SPAN)
    return Span(after, max(after, upto), head)


def check_where(where: Where, *, outgoing: bool) -> None:
    """Raises ValueError for what cannot be asked."""
    if outgoing:
        raise ValueError("where= chooses events; wanted it without outgoing=True")
    for name, at in (("since", where.since), ("until", where.until)):
        if at is not None and at.tzinfo is None:
            raise ValueError(f"{name}={at} has no time zone; wanted one")
    texts = [*(where.types or ()), *(where.categories or ())]
    if where.stream is not None:
        texts += [where.stream.category, where.stream.id]
    for text in texts:
        if "\x00" in text:
            raise ValueError(f"found a NUL in {text[:80]!r}; no event has such a name")


def check_version(stream: StreamId, version: Version) -> None:
    """The version that is stored with a stream: negative, when it was archived. Raises StreamArchived."""
    if version < 0:
        raise StreamArchived(
            f"stream {stream} was archived at version {-version}: its events are not in the log; nothing was read"
        )


def any_version(type_name: str) -> str:
    """`orders.order-placed.v*` for every version of it."""
    return type_name.rstrip("0123456789") + "*"


def asks_for_any_version(where: Where) -> bool:
    return any(name.endswith(".v*") for name in where.types or ())


def matches(where: Where, record: Envelope) -> bool:
    """Is this stored event one of those?"""
    stream = record.stream
    return (
        (where.types is None or record.type in where.types or any_version(record.type) in where.types)
        and (where.categories is None or (stream is not None and stream.category in where.categories))
        and (where.stream is None or stream == where.stream)
        and (where.correlation_id is None or record.correlation_id == where.correlation_id)
        and (where.since is None or record.time >= where.since)
        and (where.until is None or record.time < where.until)
    )


_ALL = Where()

__all__ = ["SPAN", "Span", "asks_for_any_version", "check_version", "check_where", "matches", "span"]
