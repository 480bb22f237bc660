"""The reader's side: rows by key, read-your-writes by token, and whether rows are what a fold from scratch gives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Generic

from bus.envelope import Token
from bus.errors import MissingTopics
from projections.building import Workshop
from projections.definition import Projection
from projections.folding import Folder
from projections.port import Checkpoint, FeedPage, FeedRecord, Place, Row, Rows
from projections.waiting import wait_for


class ReadModel(Generic[Row]):
    """What users ask: `await orders.view(customers).get(customer_id, after=token)`. Reads what serves at the moment,
    also while a rebuild or a swap is going on."""

    def __init__(self, projection: Projection[Row], rows: Rows[Row], *, service: str) -> None:
        self.projection, self._rows, self._service = projection, rows, service

    async def get(self, key: str, *, after: Token | None = None, timeout_s: float = 5.0) -> Row | None:
        """The row, or None. With `after` it first waits until the event of that token is in it.

        Raises NotThere when that takes longer than `timeout_s`, TokenElsewhere when the projection does not read the
        token's service at all, RowUnreadable when a newer version is still being built and the rows that serve do not
        fit this code.
        """
        if after is not None:
            await wait_for(self.projection, self._rows, after, service=self._service, timeout_s=timeout_s)
        return await self._rows.get(key)

    async def __aiter__(self) -> AsyncIterator[tuple[str, Row]]:
        async for one in self.all():
            yield one

    async def all(self, *, page: int = 1000) -> AsyncIterator[tuple[str, Row]]:
        """All rows with their keys, by key, read page by page: what changes meanwhile is seen or not."""
        after: str | None = None
        while True:
            found = await self._rows.page(after=after, limit=page)
            for one in found:
                yield one
            if len(found) < page:
                return
            after = found[-1][0]

    async def count(self) -> int:
        return await self._rows.count()


@dataclass(frozen=True, slots=True)
class Difference(Generic[Row]):
    """A key whose stored row is not what a fold from scratch gives."""

    key: str
    stored: Row | None
    folded: Row | None


@dataclass(frozen=True, slots=True)
class Verified(Generic[Row]):
    """`differences` are the first hundred of `different`."""

    generation: int
    rows: int
    events: int
    failures: int
    different: int
    differences: tuple[Difference[Row], ...]

    @property
    def ok(self) -> bool:
        return self.different == 0


async def verify(shop: Workshop[Row], *, timeout_s: float = 600.0) -> Verified[Row]:
    """Folds everything from the beginning up to the serving generation's checkpoint, in memory, and compares.

    The service may go on running. A fold that depends on the order of several partitions differs from itself. Events
    that cannot be folded are left out, as they were live. All rows are held in memory twice. Raises TimeoutError when
    the sources do not give up their history in time.
    """
    await shop.rows.serving()
    stored = await shop.rows.snapshot()
    rows: dict[str, Row] = {}
    events = failures = 0
    folder = Folder(shop.projection, shop.codec, attempts=1, cache_rows=shop.settings.cache_rows)

    async def load(keys: object) -> dict[str, Row]:
        return rows

    at = Checkpoint()
    async with asyncio.timeout(timeout_s), shop.open_feed() as feed:
        while not all(
            at.places.get(where, Place()).offset >= place.offset for where, place in stored.checkpoint.places.items()
        ):
            page = await feed.read(at, limit=shop.settings.page, timeout_s=0.2)
            if page.missing:
                raise MissingTopics(page.missing)
            at = page.checkpoint
            records = [record for record in page.records if _within(record, stored.checkpoint)]
            folded = await folder.fold(FeedPage(records, at, page.behind), load)
            events, failures = events + folded.events, failures + len(folded.failures)
            folder.keep(folded.rows)
            for key, row in folded.rows.items():
                if row is None:
                    rows.pop(key, None)
                else:
                    rows[key] = row
    wrong = [key for key in sorted(rows.keys() | stored.rows.keys()) if rows.get(key) != stored.rows.get(key)]
    differences = tuple(Difference(key, stored.rows.get(key), rows.get(key)) for key in wrong[:100])
    return Verified(stored.generation, len(stored.rows), events, failures, len(wrong), differences)


def _within(record: FeedRecord, upto: Checkpoint) -> bool:
    if record.delivery is not None:
        delivery = record.delivery
        place = upto.places.get((delivery.topic, delivery.partition))
        return place is not None and delivery.offset < place.offset
    place = upto.places.get(("log", 0))
    return place is not None and (record.envelope.position or 0) <= place.position
