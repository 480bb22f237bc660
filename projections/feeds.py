"""Where events come from: the own log, topics of others, or several of both.

`open_feed` gives the feed that a projection needs. Types that it does not name are skipped by their header and counted;
their places count all the same, so that waiting for a token ends also when its event is none of ours.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from types import TracebackType
from typing import Protocol

from bus.envelope import Envelope, Position
from bus.errors import BadInput, MissingTopics
from bus.messages import Event
from bus.metrics import MemoryMetrics, Metrics
from bus.records import RecordReader, TopicRule
from bus.registry import Registry
from bus.seams import Clock, SystemClock
from bus.transport import Consumer, Delivery, Headers, Transport
from bus.unmet import Unmet
from eventstore.errors import WrongEpoch
from eventstore.port import Page, Where
from projections.definition import Projection
from projections.port import LOG, BadRecord, Checkpoint, Feed, FeedPage, FeedRecord, Place, Row

log = logging.getLogger("foldbus.projections")

_ENDS_EVERY_S = 1.0
_INT_MAX = 2**63 - 1


class Log(Protocol):
    """What a feed needs of the store."""

    epoch: int

    async def read_all(self, *, after: Position, limit: int, where: Where | None = None) -> Page: ...

    async def wait_past(self, position: Position, *, timeout_s: float) -> None: ...


class Wanted:
    """Which types a source is read for, by header: those named, those that are upcast to them, and unknown versions of
    them, which become dead letters. Everything else is skipped and counted."""

    def __init__(self, projection: str, events: Iterable[type[Event]], registry: Registry, metrics: Metrics) -> None:
        names = [event.type_name for event in events]
        today = frozenset(str(name) for name in names)
        self._names = today | registry.upcasting.older(today)
        self._bases = frozenset(name.base for name in names)
        self._registry, self._metrics, self._projection = registry, metrics, projection
        self.unmet = Unmet(f"projection {projection}", log)

    def __call__(self, type_name: str) -> bool:
        if type_name in self._names:
            return True
        registry = self._registry
        known = type_name in registry.types or type_name in registry.upcasting
        return type_name.rpartition(".v")[0] in self._bases and not known

    def where(self) -> Where:
        """What a log is asked for: all that is wanted, and little else."""
        return Where(types=self._names | {f"{base}.v*" for base in self._bases})

    def skipped(self, source: str, reasons: Counter[str]) -> None:
        for reason, n in reasons.items():
            self._metrics.count(
                "foldbus_projection_skipped_total", n, projection=self._projection, source=source, reason=reason
            )
            log.debug("%s: %s of %s skipped: %s", self._projection, n, source, reason)


class LogFeed:
    """The own log: `offset` and `position` are the page's watermark, which no event appears below any more.

    Rows and log live in one database and are restored together, so a checkpoint of a lower epoch is good. One of a
    higher epoch, or beyond what the log has drawn, is refused (WrongEpoch, CheckpointAhead), not waited on.

    The database leaves out what is not named; the positions passed over so (other events, outgoing messages, what was
    rolled back) are counted as skipped for `position`."""

    sources = frozenset({LOG})

    def __init__(self, store: Log, wanted: Wanted) -> None:
        self._store, self._wanted, self._where = store, wanted, wanted.where()

    async def read(self, after: Checkpoint, *, limit: int, timeout_s: float = 0.0) -> FeedPage:
        place = after.places.get((LOG, 0), Place())
        if place.epoch > self._store.epoch:
            raise WrongEpoch(
                f"the checkpoint is from epoch {place.epoch} of the log, this database is in {self._store.epoch}: "
                "it is an older one, and what it will write would be skipped; nothing was read"
            )
        at = place.position
        page = await self._store.read_all(after=at, limit=limit, where=self._where)
        if page.upto <= at and timeout_s > 0:
            await self._store.wait_past(at, timeout_s=timeout_s)
            page = await self._store.read_all(after=at, limit=limit, where=self._where)
        wanted = self._wanted
        records = [FeedRecord(envelope) for envelope in page.records if wanted(envelope.type)]
        upto = max(page.upto, at)
        passed = upto - at - len(page.records)
        wanted.skipped(LOG, +Counter(type=len(page.records) - len(records), position=passed))
        places = {**after.places, (LOG, 0): Place(upto, self._store.epoch, upto)}
        return FeedPage(records, replace(after, places=places), max(0, page.head - upto))


class TopicFeed:
    """All partitions of one topic, without a group. An async context manager: it holds a reader open.

    Of `<service>.events` a record of that service at or below its partition's (epoch, position) is a replay and is
    skipped; elsewhere, and for other producers, the offset alone decides.
    """

    def __init__(
        self,
        transport: Transport,
        topic: str,
        wanted: Wanted,
        *,
        clock: Clock,
        metrics: Metrics,
        rules: Mapping[str, TopicRule] | None = None,
    ) -> None:
        self.topic = topic
        self._read = RecordReader(transport.max_bytes, rules or {})
        self.sources = frozenset({topic})
        self._transport, self._wanted, self._clock, self._metrics = transport, wanted, clock, metrics
        self._owner = topic.removesuffix(".events") if topic.endswith(".events") else None
        self._reader: AsyncExitStack | None = None
        self._consumer: Consumer | None = None
        self._next: dict[int, int] = {}
        self._polling: asyncio.Task[object] | None = None
        self._ends: Mapping[int, int] = {}
        self._ends_at = float("-inf")
        self._looking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> TopicFeed:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def read(self, after: Checkpoint, *, limit: int, timeout_s: float = 0.0) -> FeedPage:
        places = {part: at for (source, part), at in after.places.items() if source == self.topic}
        consumer = await self._seek(places)
        found = await self._poll(consumer, limit, timeout_s)
        records: list[FeedRecord] = []
        bad: list[BadRecord] = []
        skipped: Counter[str] = Counter()
        unmet, others = self._wanted.unmet, Counter[tuple[str, str]]()
        watching = unmet.watches((self.topic,))
        for delivery in found:
            part = delivery.partition
            place = places[part]
            if delivery.offset < place.offset:
                skipped["offset"] += 1
                continue
            taken, at = self._take(delivery, place)
            places[part] = at
            if isinstance(taken, Envelope):
                records.append(FeedRecord(taken, delivery))
            elif isinstance(taken, BadInput):
                bad.append(BadRecord(delivery, taken))
            else:
                skipped[taken] += 1
                if watching and taken == "type":
                    others[self.topic, _peek(delivery.headers)[0] or "(in structured mode)"] += 1
        self._wanted.skipped(self.topic, skipped)
        if watching:
            unmet.took(found, others)
        self._next = {part: place.offset for part, place in places.items()}
        await self._look_at_ends(consumer, fresh=not found)
        behind = sum(max(0, end - places[part].offset) for part, end in self._ends.items() if part in places)
        checkpoint = replace(after, places={**after.places, **{(self.topic, part): at for part, at in places.items()}})
        return FeedPage(records, checkpoint, behind, bad)

    def _take(self, delivery: Delivery, place: Place) -> tuple[Envelope | BadInput | str, Place]:
        """The event, what is wrong with it, or why it is skipped; and the place after it."""
        type_name, source, epoch, position = _peek(delivery.headers)
        beyond = replace(place, offset=delivery.offset + 1)
        after = beyond
        taken: Envelope | BadInput | None = None
        if type_name is None or delivery.value is None:  # structured mode, a delete, or no event at all
            try:
                taken = self._read(delivery)
            except BadInput as error:
                return error, beyond
            type_name, source, epoch, position = taken.type, taken.source, taken.epoch, taken.position
        if position is not None and source == self._owner:
            if epoch < place.epoch:
                return "epoch", beyond
            if (epoch, position) <= (place.epoch, place.position):
                return "replay", beyond
            after = Place(beyond.offset, epoch, position)
        if not self._wanted(type_name):
            return "type", after
        if taken is None:
            try:
                taken = self._read(delivery)
            except BadInput as error:
                return error, beyond  # what it says of its position counts no more than the rest of it
        return taken, after

    async def _seek(self, places: dict[int, Place]) -> Consumer:
        """The open reader, if `places` follow from its last page; else a new one. Fills in partitions that have no
        place yet."""
        follows = {part: place.offset for part, place in places.items()} == self._next
        if self._consumer is not None and self._polling is None and follows:
            return self._consumer
        await self._close()
        for part, (first, _) in (await self._transport.admin.offsets(self.topic)).items():
            if part not in places:
                places[part] = Place(first)
                if first > 0:
                    self._metrics.count("foldbus_projection_history_missing_total", topic=self.topic)
                    log.warning("%s[%s] begins at offset %s: what was before is not in it", self.topic, part, first)
        reader = AsyncExitStack()
        start = {part: place.offset for part, place in places.items()}
        self._consumer = await reader.enter_async_context(self._transport.tail(self.topic, start=start))
        self._reader, self._next = reader, start
        self._ends, self._ends_at = {}, float("-inf")
        return self._consumer

    async def _poll(self, consumer: Consumer, limit: int, timeout_s: float) -> list[Delivery]:
        """A poll must not be cancelled: who cancels us leaves it running, and `_close` ends it."""
        polling = asyncio.ensure_future(consumer.poll(max_records=limit, timeout_s=timeout_s))
        self._polling = polling
        found = await asyncio.shield(polling)
        self._polling = None
        return list(found)

    async def _look_at_ends(self, consumer: Consumer, *, fresh: bool) -> None:
        """`fresh`: asked now, or under way. Otherwise not much older than a second, and nothing that was read waits for
        the answer: a broker takes up one request of a connection after the other, and the next fetch is before it."""
        if self._looking is not None and self._looking.done():
            self._looked(self._looking)
        if self._looking is None and (fresh or self._clock.monotonic() - self._ends_at >= _ENDS_EVERY_S):
            self._looking = asyncio.create_task(self._look(consumer))
        if self._looking is not None and (fresh or not self._ends):
            await asyncio.wait({self._looking})  # who cancels us leaves it under way
            self._looked(self._looking)

    def _looked(self, looking: asyncio.Task[None]) -> None:
        """Raises, once, why the ends are not known."""
        self._looking = None
        looking.result()

    async def _look(self, consumer: Consumer) -> None:
        self._ends = {part.partition: end for part, end in (await consumer.end_offsets()).items()}
        self._ends_at = self._clock.monotonic()

    async def _close(self) -> None:
        polling, self._polling = self._polling, None
        looking, self._looking = self._looking, None
        consumer, self._consumer = self._consumer, None
        reader, self._reader = self._reader, None
        try:
            if polling is not None and consumer is not None:
                consumer.wake()
            if looking is not None:
                looking.cancel()
            pending = [task for task in (polling, looking) if task is not None]
            if pending:
                await asyncio.wait(pending)
                for task in pending:
                    if not task.cancelled():
                        task.exception()
        finally:
            if reader is not None:
                await reader.aclose()


def _peek(headers: Headers) -> tuple[str | None, str | None, int, int | None]:
    """Type, source, epoch and position without decoding; type None when a full reading has to tell. Only what is ours
    (it has `ce_kind`) is believed about its position, as `from_record` has it."""
    found: dict[str, bytes] = dict(headers)
    if "ce_type" not in found or found.get("content-type", b"")[:23].lower() == b"application/cloudevents":
        return None, None, 0, None
    try:
        source, kind = found.get("ce_source", b"").decode(), found["ce_type"].decode()
        source = source[1:] if source[:1] == "/" else source
        if "ce_kind" not in found or "ce_position" not in found:
            return kind, source, 0, None
        epoch, position = int(found.get("ce_sourceepoch", b"0")), int(found["ce_position"])
    except ValueError:
        return None, None, 0, None
    if not (0 <= epoch <= _INT_MAX and 0 <= position <= _INT_MAX):
        return None, None, 0, None
    return kind, source, epoch, position


class CombinedFeed:
    """Several feeds as one; order holds within each source. An async context manager.

    Each part reads ahead by one page while the others are handled; nobody waits for the slowest. One whose topic does
    not exist (yet) is asked again every `absent_s`, and the pages name it meanwhile; MissingTopics is raised only when
    nothing else is to be read.
    """

    def __init__(
        self,
        parts: Collection[Feed],
        *,
        clock: Clock | None = None,
        metrics: Metrics | None = None,
        absent_s: float = 1.0,
    ) -> None:
        self._parts = tuple(parts)
        self._clock, self._metrics, self._absent_s = clock or SystemClock(), metrics or MemoryMetrics(), absent_s
        self._absent: dict[int, tuple[float, MissingTopics]] = {}  # when to ask again, and what was said
        self.sources = frozenset(source for part in parts for source in part.sources)
        self._reading: dict[int, tuple[Checkpoint, asyncio.Task[FeedPage]]] = {}
        self._behind: dict[int, int] = {}

    async def __aenter__(self) -> CombinedFeed:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [task for _, task in self._reading.values()]
        self._reading.clear()
        if tasks:
            await asyncio.wait(tasks)  # each is bounded by its timeout; a poll must not be cancelled
            for task in tasks:
                if not task.cancelled():
                    task.exception()

    async def read(self, after: Checkpoint, *, limit: int, timeout_s: float = 0.0) -> FeedPage:
        now = self._clock.monotonic()
        for number, part in enumerate(self._parts):
            if number in self._absent and now < self._absent[number][0]:
                continue
            mine = {where: at for where, at in after.places.items() if where[0] in part.sources}
            pending = self._reading.get(number)
            if pending is not None and pending[0].places != mine:  # the reader of all this went back: start over
                await asyncio.wait([pending[1]])
                pending[1].exception()
                pending = None
            if pending is None:
                start = Checkpoint(mine)
                # With no patience there is nothing to gain from a page that comes later: all are waited for.
                task = asyncio.ensure_future(part.read(start, limit=limit, timeout_s=timeout_s))
                self._reading[number] = (start, task)
        tasks = {task for _, task in self._reading.values()}
        if not tasks:
            raise MissingTopics(self._missing())
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED if timeout_s > 0 else asyncio.ALL_COMPLETED)
        places = dict(after.places)
        records: list[FeedRecord] = []
        bad: list[BadRecord] = []
        for number, (_, task) in sorted(self._reading.items()):
            if not task.done():
                continue
            del self._reading[number]
            try:
                page = task.result()
            except MissingTopics as error:
                self._absent[number] = (self._clock.monotonic() + self._absent_s, error)
                for topic in error.names:
                    self._metrics.count("foldbus_projection_topic_missing_total", topic=topic)
                continue
            self._absent.pop(number, None)
            records += page.records
            bad += page.bad
            places.update(page.checkpoint.places)
            self._behind[number] = page.behind
        if len(self._absent) == len(self._parts):
            raise MissingTopics(self._missing())
        return FeedPage(records, replace(after, places=places), sum(self._behind.values()), bad, self._missing())

    def _missing(self) -> tuple[str, ...]:
        return tuple(sorted({topic for _, error in self._absent.values() for topic in error.names}))


@asynccontextmanager
async def open_feed(
    projection: Projection[Row],
    *,
    service: str,
    store: Log,
    transport: Transport | None,
    registry: Registry,
    clock: Clock,
    metrics: Metrics,
    rules: Mapping[str, TopicRule] | None = None,
) -> AsyncGenerator[Feed]:
    """The feed of everything that `projection` reads in `service`. `transport` may be None when that is the own log
    alone; `rules` are how records of some topics are read. Raises BadProjection."""
    async with AsyncExitStack() as stack:
        parts: list[Feed] = []
        for source, events in projection.sources(service).items():
            wanted = Wanted(projection.name, events, registry, metrics)
            if source == LOG:
                parts.append(LogFeed(store, wanted))
                continue
            assert transport is not None, f"projection {projection.name!r} reads {source} and needs a transport"
            topic = TopicFeed(transport, source, wanted, clock=clock, metrics=metrics, rules=rules)
            parts.append(await stack.enter_async_context(topic))
        if len(parts) == 1:
            yield parts[0]
        else:
            yield await stack.enter_async_context(CombinedFeed(parts, clock=clock, metrics=metrics))
