"""The relay: publishes what the log holds, in the log's order.

One leader per service, by lease. It reads events and outgoing messages in position order, publishes them page by page
and marks how far it came, by compare-and-set on the lease's token. While a page is on its way to the broker the next
one is read, and the mark of those before is written: a page is published at a time, never two, so nothing is overtaken.

A leader that dies between publishing and marking is followed by one that publishes the same suffix again: positions
rise within a partition, except in a replayed suffix, and consumers recognise the ids. `RelaySettings` bounds how long
that suffix is.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from bus.envelope import Position
from bus.errors import Fenced, MissingTopics
from bus.metrics import Metrics
from bus.seams import Clock, Failpoint
from bus.transport import Ack, Failed, Outgoing, Published, Transport
from eventstore.ahead import Ahead
from eventstore.errors import StoreUnavailable
from eventstore.port import Leadership, Store
from eventstore.records import RecordPage
from foldbus.relay_marks import Marks
from foldbus.relay_waiting import Due, Waiting, is_reply, refused_letter

log = logging.getLogger("foldbus.relay")

LEASE = "relay"


@dataclass(frozen=True, slots=True)
class RelaySettings:
    """A crash, or a lease that is lost, makes the successor publish again what was not marked: what was published
    within `mark_s` and the time that a mark takes, at most `unmarked_max` records and a page."""

    batch_max: int = 2000
    """Messages per page: what is published at a time."""
    mark_s: float = 0.1
    """The checkpoint is written as often, at most."""
    unmarked_max: int = 20_000
    """So many records may be published above the checkpoint; then publishing waits for the mark."""
    wait_s: float = 1.0
    lease_ttl_s: float = 10.0
    retry_max_s: float = 5.0
    missing_retry_s: float = 1.0
    """How often a topic that does not exist is tried again."""
    missing_reply_s: float = 60.0
    """A reply whose topic is missing for so long becomes a dead letter: whoever asked for it had that topic, or never
    will; other records wait."""
    waiting_max: int = 10_000
    """So many records may wait for missing topics; then the relay stands still until one of them appears."""
    prune_every: int = 20_000
    """Published outgoing rows are deleted after so many positions, or when the log is idle."""
    prune_s: float = 1.0
    """In an idle log they are deleted as often, at most."""


class Relay:
    def __init__(
        self,
        store: Store,
        transport: Transport,
        *,
        clock: Clock,
        metrics: Metrics,
        failpoint: Failpoint,
        settings: RelaySettings | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._store, self._transport = store, transport
        self._clock, self._metrics, self._failpoint = clock, metrics, failpoint
        self._settings = settings or RelaySettings()
        self._rng = rng or random.Random()

    async def run(self) -> None:
        """Until cancelled: lead, publish, be followed. Faults of the store or the broker are waited out."""
        failures = 0
        while True:
            try:
                async with self._store.leases.lead(LEASE, ttl_s=self._settings.lease_ttl_s) as leadership:
                    failures = 0
                    await self._lead(leadership)
            except Fenced as error:
                self._metrics.count("foldbus_fenced_total", who="relay")
                log.warning("relay fenced, another one leads: %s", error)
            except StoreUnavailable as error:
                failures += 1
                log.warning("relay waits, the store does not answer: %s", error)
                await self._pause(failures)

    async def _lead(self, leadership: Leadership) -> None:
        """`read` is how far the log was read, the mark how far it is published for certain: up to the first record that
        waits for a topic. A successor begins at the mark and publishes what came after it once more."""
        settings = self._settings
        read = leadership.lease.position
        waiting = Waiting(self._clock)
        marks = Marks(
            self._store, leadership.lease, clock=self._clock, failpoint=self._failpoint, mark_s=settings.mark_s,
            unmarked_max=settings.unmarked_max, prune_every=settings.prune_every, prune_s=settings.prune_s,
        )  # fmt: skip
        ahead: Ahead[RecordPage] = Ahead()
        try:
            while not leadership.lost:
                if waiting and (published := await self._retry(waiting, leadership)):
                    marks.reached(waiting.published_up_to(read), published)
                await marks.turn()
                if len(waiting) >= settings.waiting_max:  # nothing may pile up without a bound
                    await self._pause(10)
                    continue
                page = await (ahead.take() if ahead else self._read(read))
                if page.upto <= read:
                    await marks.idle()
                    await self._store.wait_past(read, timeout_s=min(settings.wait_s, marks.due_in_s()))
                    continue
                if page.upto < page.head:
                    ahead.begin(self._read(page.upto))
                positions, records = waiting.behind(page.positions, page.records)
                if records:
                    self._failpoint.hit("before-publish")
                    waiting.add(await self._publish(positions, records, leadership))
                    self._failpoint.hit("after-publish")
                read = page.upto
                marks.reached(waiting.published_up_to(read), len(records))
                self._metrics.count("foldbus_relayed_total", len(records))
                self._metrics.gauge("foldbus_relay_lag", page.head - marks.marked)
        except asyncio.CancelledError:
            await marks.last()  # so that the next leader does not publish it all again
            raise
        finally:
            await ahead.close()
            await marks.close()

    async def _read(self, after: int) -> RecordPage:
        return await self._store.records.read(after=after, limit=self._settings.batch_max)

    async def _retry(self, waiting: Waiting, leadership: Leadership) -> int:
        """Publishes to topics that were missing, if it is time to look again. Answers how many went out."""
        now = self._clock.monotonic()
        if now < waiting.next_try:
            return 0
        waiting.next_try = now + self._settings.missing_retry_s
        before = len(waiting)
        for topic in list(waiting.topics):
            records, since = waiting.topics.pop(topic), waiting.since.pop(topic)
            missing = await self._publish(*_parted(records), leadership)
            if missing and now - since >= self._settings.missing_reply_s:
                missing = await self._without_replies(missing)
            waiting.add(missing)
            if missing:
                waiting.since[topic] = since
        return before - len(waiting)

    async def _without_replies(self, missing: Sequence[Due]) -> Sequence[Due]:
        """Those that are no replies; replies become dead letters."""
        kept: list[Due] = []
        for one in missing:
            if is_reply(one[1]):
                await self._dead_letter(one, MissingTopics([one[1].topic]), 1, self._clock.now())
            else:
                kept.append(one)
        return kept

    async def _publish(
        self, positions: Sequence[Position], records: Sequence[Outgoing], leadership: Leadership
    ) -> Sequence[Due]:
        """In order per partition: from the first that is not acknowledged on, a partition's records are sent again. A
        record that the broker refuses for good becomes a dead letter, so that nobody waits for it. Answers those whose
        topic does not exist (yet)."""
        missing: list[Due] = []
        attempts, first_failed = 0, self._clock.now()
        while records:
            if leadership.lost:
                raise Fenced("the relay's lease ran out while publishing")
            results = await self._transport.publish(records)
            attempts += 1
            if not [result for result in results if type(result) is not Ack]:
                break
            due, refused, absent = _sorted_out(list(zip(positions, records, strict=True)), results)
            missing += absent
            for one, error in refused:
                await self._dead_letter(one, error, attempts, first_failed)
            if due and not refused:
                why = next(r.error for r in results if not isinstance(r, Ack))
                self._metrics.count("foldbus_retries_total", len(due), who="relay")
                log.warning("relay: %d of %d records not acknowledged, again: %s", len(due), len(results), why)
                await self._pause(attempts)
            positions, records = _parted(due)
        return missing

    async def _dead_letter(self, due: Due, error: Exception, attempts: int, since: datetime) -> None:
        unit, what = refused_letter(due, error, attempts=attempts, since=since, now=self._clock.now())
        await self._store.commit([unit])
        self._metrics.count("foldbus_dead_letters_total", consumer="relay", error=type(error).__qualname__)
        log.error("relay: %s cannot be published, dead letter: %s", what, error)

    async def _pause(self, attempts: int) -> None:
        bound = min(self._settings.retry_max_s, 0.05 * 2 ** min(attempts, 10))
        await asyncio.sleep(bound * (0.5 + self._rng.random() / 2))


def _parted(due: Sequence[Due]) -> tuple[Sequence[Position], Sequence[Outgoing]]:
    return [position for position, _ in due], [record for _, record in due]


def _sorted_out(
    sent: Sequence[Due], results: Sequence[Published]
) -> tuple[list[Due], list[tuple[Due, Exception]], list[Due]]:
    """What must be sent again (in order), what was refused for good, and what has no topic.

    The transport acknowledges nothing of a partition after a record that is certainly not there, and a record behind
    an `Unknown` only if that one was written too: sending it again makes a second copy, never an inversion of first
    deliveries.
    """
    again: list[Due] = []
    refused: list[tuple[Due, Exception]] = []
    absent: list[Due] = []
    for one, result in zip(sent, results, strict=True):
        match result:
            case Ack():
                pass
            case Failed(error=MissingTopics()):
                absent.append(one)
            case Failed(error=error):
                refused.append((one, error))
            case _:
                again.append(one)
    return again, refused, absent
