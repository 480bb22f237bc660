"""One page of events folded into rows: decode, group by key, load what is not remembered, fold, check.

Nothing is written here. An older event is folded as what it is upcast to: none, one or several, all of them in the page
of the stored one, so that its place covers all or nothing. What cannot be decoded or folded comes back as failures; the
events of a key around a failing one are folded as if it had not been there.
"""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic

from bus.codec import Codec
from bus.errors import BadInput
from bus.messages import Event
from projections.definition import Projection
from projections.port import FeedPage, FeedRecord, Row
from projections.rows.columns import Columns, check_key

Load = Callable[[Collection[str]], Awaitable[Mapping[str, Row]]]


@dataclass(frozen=True, slots=True)
class Unfolded:
    """An event that was given up, and why. `bug` is False when the message itself was at fault."""

    record: FeedRecord
    error: Exception
    attempts: int
    bug: bool

    @property
    def stack(self) -> str:
        return "".join(traceback.format_exception(self.error))


@dataclass(slots=True)
class Folded(Generic[Row]):
    """The rows that a page changes (None: deleted), and what could not be folded."""

    rows: dict[str, Row | None] = field(default_factory=dict[str, Row | None])
    failures: list[Unfolded] = field(default_factory=list[Unfolded])
    events: int = 0
    keyless: int = 0
    dropped: int = 0
    """Older events that an upcaster made nothing of."""
    parts_skipped: int = 0
    """Parts of older events that this projection does not name."""
    retries: int = 0


class Folder(Generic[Row]):
    """Folds pages of one generation and remembers up to `cache_rows` rows, absent ones too, the hottest longest.

    Remembering is safe because saving is a compare-and-set: whoever is not the only writer fails to save, and must then
    `forget`.
    """

    def __init__(self, projection: Projection[Row], codec: Codec, *, attempts: int, cache_rows: int) -> None:
        self._projection, self._codec = projection, codec
        self._columns = Columns(projection.name, projection.row)
        self._attempts, self._cache_rows = attempts, cache_rows
        self._today = frozenset(str(event.type_name) for event in projection.events)
        self._cache: OrderedDict[str, Row | None] = OrderedDict()

    async def fold(self, page: FeedPage, load: Load[Row]) -> Folded[Row]:
        """Raises what `load` raises."""
        done = Folded[Row]()
        groups = self._group(page.records, done)
        missing = [key for key in groups if key not in self._cache]
        if missing:
            found = await load(missing)
            for key in missing:
                self._cache[key] = found.get(key)
        for key, entries in groups.items():
            before = self._cache[key]
            self._fold_key(key, before, entries, done)
            if before is None and key in done.rows and done.rows[key] is None:
                del done.rows[key]  # was absent, stays absent
        return done

    def keep(self, rows: Mapping[str, Row | None]) -> None:
        """These were saved."""
        cache = self._cache
        for key, row in rows.items():
            cache[key] = row
            cache.move_to_end(key)
        while len(cache) > self._cache_rows:
            cache.popitem(last=False)

    def forget(self) -> None:
        self._cache.clear()

    def _group(self, records: Sequence[FeedRecord], done: Folded[Row]) -> dict[str, list[tuple[FeedRecord, Event]]]:
        projection, decode, today = self._projection, self._codec.decode, self._today
        groups: dict[str, list[tuple[FeedRecord, Event]]] = {}
        if not today.issuperset({record.envelope.type for record in records}):
            records = self._upcast(records, done)
        for record in records:
            try:
                event = decode(record.envelope)
            except BadInput as error:
                done.failures.append(Unfolded(record, error, 1, bug=False))
                continue
            if not isinstance(event, projection.events):
                done.keyless += 1
                continue
            try:
                key = projection.key_of(event)
                if key is None:
                    done.keyless += 1
                    continue
                check_key(key)
            except BadInput as error:
                done.failures.append(Unfolded(record, error, 1, bug=False))
                continue
            except Exception as error:
                done.failures.append(Unfolded(record, error, 1, bug=True))
                continue
            done.events += 1
            groups.setdefault(key, []).append((record, event))
        return groups

    def _upcast(self, records: Sequence[FeedRecord], done: Folded[Row]) -> Sequence[FeedRecord]:
        """The records with older ones in today's form. One whose parts cannot all be had fails whole."""
        codec, today = self._codec, self._today
        found: list[FeedRecord] = []
        for record in records:
            stored = record.envelope
            if stored.type in today:
                found.append(record)
                continue
            try:
                parts = codec.upcast(stored, today)
                if len(parts) > 1:
                    for part in parts:
                        codec.decode(part)
            except BadInput as error:
                done.failures.append(Unfolded(record, error, 1, bug=False))
                continue
            for part in parts:
                if part is stored:
                    found.append(record)
                elif part.type in today:
                    found.append(replace(record, envelope=part, stored=stored))
            done.parts_skipped += sum(part.type not in today for part in parts if part is not stored)
            done.dropped += not parts
        return found

    def _fold_key(
        self, key: str, before: Row | None, entries: list[tuple[FeedRecord, Event]], done: Folded[Row]
    ) -> None:
        fold, check = self._projection.fold, self._columns.encode
        row = before
        try:
            for _, event in entries:
                after = fold(row, event)
                # Each, not the last alone: whether an event is at fault must not depend on where its page ends.
                if after is not None and after is not row:
                    check(after)
                row = after
        except Exception:
            row = self._fold_slowly(before, entries, done)
        if row is not before:
            done.rows[key] = row

    def _fold_slowly(self, row: Row | None, entries: list[tuple[FeedRecord, Event]], done: Folded[Row]) -> Row | None:
        """Event by event, each tried a few times, to find the one at fault."""
        for record, event in entries:
            failed: Exception | None = None
            for attempt in range(1, self._attempts + 1):
                try:
                    after = self._projection.fold(row, event)
                    if after is not None:
                        self._columns.encode(after)
                except Exception as error:
                    failed = error
                    done.retries += attempt < self._attempts
                else:
                    row, failed = after, None
                    break
            if failed is not None:
                done.failures.append(Unfolded(record, failed, self._attempts, bug=True))
        return row
