"""Folding streams of any length: page by page, so that memory holds a page of each and never the whole.

What the runtime and everybody else who needs a stream's state loads with. The database is asked for all streams at
once, then for the rest of those that are longer than their share of a page. The rest of a single one is read a page
ahead of the fold, and of its events no more than type and data where the fold needs no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, NoReturn, Protocol, TypeVar, runtime_checkable

from bus.envelope import Envelope, StreamId, Version
from eventstore.ahead import Ahead
from eventstore.errors import EventStoreError, StreamArchived, StreamTruncated
from eventstore.port import Bodies, Slice, Wanted

S = TypeVar("S")

PAGE = 1_000
"""Events of one stream in one call, at most."""
FIRST_PAGE = 100
"""Those of a single stream in its first call: the rest comes as bodies, which cost less, and ahead of the fold."""
_TOGETHER = 10_000
"""Events of all streams in one call, at most..."""
_SHARE = 50
"""...but for this many of each: most streams are short, and are loaded in one go however many there are."""


class Loads(Protocol):
    async def load(self, wanted: Sequence[Wanted]) -> Sequence[Slice]: ...


@runtime_checkable
class ReadsBodies(Protocol):
    async def read_bodies(self, stream: StreamId, *, after: Version, upto: Version) -> Bodies: ...


@dataclass(frozen=True, slots=True)
class Folded(Generic[S]):
    """`state` is what the stream was at `version`. `events` of them were folded, onto the snapshot at
    `snapshot_version` if there was one."""

    stream: StreamId
    version: Version
    state: S
    events: int
    snapshot_version: Version | None = None


async def load_folded(
    store: Loads,
    wanted: Sequence[Wanted],
    *,
    begin: Callable[[Slice], S],
    fold: Callable[[S, Sequence[Envelope]], S],
    fold_bodies: Callable[[S, Bodies], S | None] | None = None,
    page: int = PAGE,
) -> dict[StreamId, Folded[S] | Exception]:
    """The state of each wanted stream, which are distinct, as it was at some one moment: a stream that grows meanwhile
    is folded to where it was first seen. One that is archived, or truncated beyond what is wanted, has that as its
    answer.

    `begin` is given a stream's first slice and answers the state before its records: the initial one, or what
    `slice.snapshot` holds. What `begin` or `fold` raises is the answer for that stream, and concerns no other. What the
    store raises is raised.

    `fold_bodies` does as `fold` does, with less, and is asked instead where the store reads less. None: it cannot, and
    has changed nothing; the same events come as envelopes.
    """
    streams: list[_Stream[S]] = [_Stream(one) for one in wanted]
    left: list[_Stream[S]] = streams
    while left:
        if len(left) == 1 and left[0].begun:
            await _fold_rest(store, left[0], fold, fold_bodies, page)
            break
        most = FIRST_PAGE if len(left) == 1 else max(_SHARE, _TOGETHER // len(left))
        try:
            parts = await store.load([one.next(min(page, most)) for one in left])
        except (StreamArchived, StreamTruncated):
            await _load_one_by_one(store, left, min(page, most), begin, fold)
            parts = ()
        for stream, part in zip(left, parts, strict=bool(parts)):
            stream.take(part, begin, fold)
        left = [one for one in left if one.unfinished]
    return {one.wanted.stream: one.failed or one.folded() for one in streams}


async def _load_one_by_one(
    store: Loads,
    streams: Sequence[_Stream[S]],
    most: int,
    begin: Callable[[Slice], S],
    fold: Callable[[S, Sequence[Envelope]], S],
) -> None:
    """One of them cannot be loaded, which concerns no other."""
    for stream in streams:
        try:
            (part,) = await store.load([stream.next(most)])
        except (StreamArchived, StreamTruncated) as error:
            stream.failed = error
        else:
            stream.take(part, begin, fold)


async def _fold_rest(
    store: Loads,
    stream: _Stream[S],
    fold: Callable[[S, Sequence[Envelope]], S],
    fold_bodies: Callable[[S, Bodies], S | None] | None,
    page: int,
) -> None:
    """What is left of a stream that was begun, one page ahead of its fold."""
    ahead: Ahead[Slice | Bodies] = Ahead()
    lean = store if fold_bodies is not None and isinstance(store, ReadsBodies) else None
    try:
        while stream.unfinished:
            at, upto = stream.next_page(page)
            found = await (ahead.take() if ahead else _read(store, lean, stream, at, upto))
            if upto < stream.target:
                await ahead.start(_read(store, lean, stream, upto, min(upto + page, stream.target)))
            if isinstance(found, Slice):
                stream.take(found, _never, fold)
            elif fold_bodies is None or not stream.take_bodies(found, upto, fold_bodies):
                lean = None  # older types, or events that went away: as envelopes, from here on
            if stream.at < upto:
                await ahead.close()
    except (StreamArchived, StreamTruncated) as error:
        stream.failed = error
    finally:
        await ahead.close()


async def _read(
    store: Loads, lean: ReadsBodies | None, stream: _Stream[S], after: Version, upto: Version
) -> Slice | Bodies:
    if lean is not None:
        return await lean.read_bodies(stream.wanted.stream, after=after, upto=upto)
    (part,) = await store.load([Wanted(stream.wanted.stream, after=after, limit=upto - after)])
    return part


def _never(part: Slice) -> NoReturn:
    raise AssertionError(f"{part.stream} was begun before")


class _Stream(Generic[S]):
    __slots__ = ("_events", "_snapshot", "_state", "at", "begun", "failed", "target", "wanted")

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.failed: Exception | None = None
        self.at = self.target = wanted.after
        self.begun = False
        self._events = 0
        self._snapshot: Version | None = None

    _state: S

    @property
    def unfinished(self) -> bool:
        return self.failed is None and self.at < self.target

    def next(self, most: int) -> Wanted:
        wanted = self.wanted
        if not self.begun:
            return replace(wanted, limit=most if wanted.limit is None else min(most, wanted.limit))
        return Wanted(wanted.stream, after=self.at, limit=min(most, self.target - self.at))

    def next_page(self, most: int) -> tuple[Version, Version]:
        """The versions to read after, and up to."""
        return self.at, min(self.at + most, self.target)

    def take_bodies(self, found: Bodies, upto: Version, fold: Callable[[S, Bodies], S | None]) -> bool:
        """False: they are not all there, or `fold` cannot do with them; nothing was taken."""
        count = len(found.data)
        if count < upto - self.at:
            return False
        try:
            folded = fold(self._state, found)
        except Exception as error:
            self.failed = error
            return True
        if folded is None:
            return False
        self._state, self.at = folded, upto
        self._events += count
        return True

    def take(self, part: Slice, begin: Callable[[Slice], S], fold: Callable[[S, Sequence[Envelope]], S]) -> None:
        try:
            self._take(part, begin, fold)
        except Exception as error:
            self.failed = error

    def _take(self, part: Slice, begin: Callable[[Slice], S], fold: Callable[[S, Sequence[Envelope]], S]) -> None:
        first_part, self.begun = not self.begun, True
        if first_part:
            if part.snapshot is not None:
                self.at = self._snapshot = part.snapshot.version
            limit = self.wanted.limit
            self.target = part.version if limit is None else min(part.version, self.at + limit)
            self._state = begin(part)
        if self.at < self.target and (not part.records or part.records[0].version != self.at + 1):
            raise truncated(part, self.at) if first_part else _gone(part, self.at)
        if part.records:
            self._state = fold(self._state, part.records)
            self._events += len(part.records)
            self.at = part.records[-1].version or self.at

    def folded(self) -> Folded[S]:
        return Folded(self.wanted.stream, self.at, self._state, self._events, self._snapshot)


def whole(wanted: Wanted, part: Slice) -> Slice:
    """`part` itself, for adapters. Raises StreamTruncated when the events that it should begin with are gone."""
    after = wanted.after if part.snapshot is None else part.snapshot.version
    if part.version > after and wanted.limit != 0 and (not part.records or part.records[0].version != after + 1):
        raise truncated(part, after)
    return part


def truncated(part: Slice, after: Version) -> StreamTruncated:
    """The error for a part that does not begin with the event after `after`, though the stream is further."""
    found = f"the next one stored is {part.records[0].version}" if part.records else "none is stored"
    return StreamTruncated(
        f"stream {part.stream} is at version {part.version}; wanted its events after {after}, but {found}: the others "
        "were truncated, and no snapshot of today's schema takes their place"
    )


def _gone(part: Slice, after: Version) -> EventStoreError:
    found = f"version {part.records[0].version}" if part.records else "nothing"
    return EventStoreError(
        f"stream {part.stream} is at version {part.version}; found {found} after {after}: was it truncated or archived "
        "while it was loaded? Load it again"
    )


__all__ = ["FIRST_PAGE", "PAGE", "Folded", "Loads", "load_folded", "truncated", "whole"]
