"""The log as something to iterate over: page by page, at the reader's own pace, to its end or beyond."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from bus.envelope import Envelope, Position
from eventstore.port import Page, Where

PAGE = 500
_WAIT_S = 60.0


class Followed(Protocol):
    """What following needs of the store."""

    async def read_all(self, *, after: Position, limit: int, where: Where | None = None) -> Page: ...

    async def wait_past(self, position: Position, *, timeout_s: float) -> None: ...


def follow(store: Followed, *, after: Position = 0, where: Where | None = None, page: int = PAGE) -> Following:
    """Events above `after`, in position order, without end: at the log's end it waits for the next one, and is woken
    by commits of this process at once, by others' as the store hears of them. See `Following`."""
    return Following(store, after=after, where=where, page=page, upto=None)


def read_log(
    store: Followed, *, after: Position = 0, upto: Position, where: Where | None = None, page: int = PAGE
) -> Following:
    """Events above `after`, up to `upto`, in position order; ends there. See `Following`."""
    return Following(store, after=after, where=where, page=page, upto=upto)


class Following(AsyncIterator[Envelope]):
    """For one task at a time; nothing runs between two steps, so leaving it needs no closing.

    A page is read when the consumer asks for more than the last one held: whoever is slow holds up nobody, and never
    has more than `page` events waiting. Raises what reading raises; then, and after a cancellation, go on by asking
    again, or with a new one from `position`.
    """

    def __init__(
        self, store: Followed, *, after: Position, where: Where | None, page: int, upto: Position | None
    ) -> None:
        if page < 1:
            raise ValueError(f"page is {page}; wanted 1 or more")
        self._store, self._where, self._page, self._end = store, where, page, upto
        self._records: Sequence[Envelope] = ()
        self._next = 0
        self._read = self._position = after

    @property
    def position(self) -> Position:
        """Everything at or below it was given, or is not wanted: a checkpoint, once what was given is handled. It moves
        on through what is not wanted as well."""
        return self._position

    def __aiter__(self) -> Following:
        return self

    async def __anext__(self) -> Envelope:
        while self._next >= len(self._records):
            self._position = self._read
            await self._turn()
        record = self._records[self._next]
        self._next += 1
        assert record.position is not None
        if self._end is not None and record.position > self._end:
            self._next -= 1
            raise StopAsyncIteration
        self._position = record.position
        return record

    async def _turn(self) -> None:
        """To the next page, which may be empty."""
        if self._end is not None and self._read >= self._end:
            raise StopAsyncIteration
        found = await self._store.read_all(after=self._read, limit=self._page, where=self._where)
        if found.upto <= self._read:
            await self._store.wait_past(self._read, timeout_s=_WAIT_S)
            return
        self._records, self._next, self._read = found.records, 0, found.upto


__all__ = ["PAGE", "Followed", "Following", "follow", "read_log"]
