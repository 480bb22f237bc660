"""The log as something to iterate over: page by page, at the reader's own pace, to its end or beyond."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, Protocol

from bus.envelope import Envelope, Position
from eventstore.ahead import Ahead
from eventstore.port import Page, Where

PAGE = 1000
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
    """For one task at a time. Leaving it needs no closing; `aclose` waits until nothing of it runs any more.

    A page is read when the consumer asks for more than the last one held. Who has asked for a second one is likely to
    go on: from then on one more is read ahead, while there is more. So whoever is slow holds up nobody, and never has
    more than two pages waiting. Raises what reading raises, after the events before it were given; then, and after a
    cancellation, go on by asking again, or with a new one from `position`.
    """

    def __init__(
        self, store: Followed, *, after: Position, where: Where | None, page: int, upto: Position | None
    ) -> None:
        if page < 1:
            raise ValueError(f"page is {page}; wanted 1 or more")
        self._store, self._where, self._page, self._end = store, where, page, upto
        self._waiting: Iterator[Envelope] = iter(())
        self._given: Envelope | None = None
        self._ahead: Ahead[Page] = Ahead()
        self._pages = 0
        self._read = self._passed = after

    @property
    def position(self) -> Position:
        """Everything at or below it was given, or is not wanted: a checkpoint, once what was given is handled. It moves
        on through what is not wanted as well."""
        given = None if self._given is None else self._given.position
        return self._passed if given is None else given

    def __aiter__(self) -> Following:
        return self

    async def __anext__(self) -> Envelope:
        while True:
            for record in self._waiting:
                self._given = record
                return record
            self._given, self._passed = None, self._read
            await self._turn()

    async def aclose(self) -> None:
        """Ends what is read ahead. Asked once more, it goes on all the same."""
        await self._ahead.close()

    async def _turn(self) -> None:
        """To the next page, which may be empty."""
        if self._end is not None and self._read >= self._end:
            raise StopAsyncIteration
        found = await (self._ahead.take() if self._ahead else self._call())
        if found.upto <= self._read:
            await self._store.wait_past(self._read, timeout_s=_WAIT_S)
            return
        records, upto, last = found.records, found.upto, found.head
        if self._end is not None:
            end = self._end
            last = min(last, end)
            if upto > end:
                upto, records = end, [one for one in records if (one.position or 0) <= end]
        self._waiting, self._read = iter(records), upto
        self._pages += 1
        if self._pages > 1 and upto < last:
            await self._ahead.start(self._call())

    def _call(self) -> Coroutine[Any, Any, Page]:
        # Not one of our own: while it runs, it would keep us from being dropped, and so from cancelling it.
        return self._store.read_all(after=self._read, limit=self._page, where=self._where)


__all__ = ["PAGE", "Followed", "Following", "follow", "read_log"]
