"""The relay: publishes what the log holds, in the log's order.

One leader per service, by lease. It reads events and outgoing messages in position order, publishes them in batches and
marks how far it came, by compare-and-set on the lease's token. A leader that dies between publishing and marking is
followed by one that publishes the same suffix again: positions rise within a partition, except in a replayed suffix,
and consumers recognise the ids.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import uuid5

from bus.cloudevents import to_record
from bus.envelope import Envelope, Failure, Kind, Position
from bus.errors import Fenced, MissingTopics
from bus.metrics import Metrics
from bus.seams import Clock, Failpoint
from bus.transport import Ack, Failed, Outgoing, Published, Transport
from eventstore.errors import StoreUnavailable
from eventstore.port import DeadLetter, Leadership, Lease, Store, Unit

log = logging.getLogger("foldbus.relay")

LEASE = "relay"


@dataclass(frozen=True, slots=True)
class RelaySettings:
    batch_max: int = 1000
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
        self._pruned: Position = 0

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
        """`read` is how far the log was read, `marked` how far it is published for certain: up to the first record that
        waits for a topic. A successor begins at `marked` and publishes what came after it once more."""
        lease = leadership.lease
        read = marked = lease.position
        waiting = _Waiting(self._clock)
        while not leadership.lost:
            if waiting and await self._retry(waiting, leadership):
                marked = await self._mark(lease, marked, waiting.marks_up_to(read))
            if len(waiting) >= self._settings.waiting_max:  # nothing may pile up without a bound
                await self._pause(10)
                continue
            page = await self._store.read_all(after=read, limit=self._settings.batch_max, outgoing=True)
            if page.upto == read:
                await self._prune(marked, idle=True)
                await self._store.wait_past(read, timeout_s=self._settings.wait_s)
                continue
            due = waiting.behind([record for record in page.records if record.topic is not None])
            if due:
                self._failpoint.hit("before-publish")
                waiting.add(await self._publish(due, leadership))
                self._failpoint.hit("after-publish")
            read = page.upto
            marked = await self._mark(lease, marked, waiting.marks_up_to(read))
            self._metrics.count("foldbus_relayed_total", len(due))
            self._metrics.gauge("foldbus_relay_lag", page.head - marked)
            await self._prune(marked, idle=False)

    async def _mark(self, lease: Lease, old: Position, new: Position) -> Position:
        if new > old:
            self._failpoint.hit("before-mark")
            await self._store.leases.mark(lease, old=old, new=new)
            self._failpoint.hit("after-mark")
        return max(old, new)

    async def _retry(self, waiting: _Waiting, leadership: Leadership) -> bool:
        """Publishes to topics that were missing, if it is time to look again. True when something went out."""
        now = self._clock.monotonic()
        if now < waiting.next_try:
            return False
        waiting.next_try = now + self._settings.missing_retry_s
        before = len(waiting)
        for topic in list(waiting.topics):
            records, since = waiting.topics.pop(topic), waiting.since.pop(topic)
            missing = await self._publish(records, leadership)
            if missing and now - since >= self._settings.missing_reply_s:
                missing = await self._without_replies(missing)
            waiting.add(missing)
            if missing:
                waiting.since[topic] = since
        return len(waiting) < before

    async def _without_replies(self, missing: Sequence[Envelope]) -> Sequence[Envelope]:
        """Those that are no replies; replies become dead letters."""
        kept: list[Envelope] = []
        for envelope in missing:
            if envelope.kind is Kind.REPLY:
                assert envelope.topic is not None
                await self._dead_letter(envelope, MissingTopics([envelope.topic]), 1, self._clock.now())
            else:
                kept.append(envelope)
        return kept

    async def _publish(self, envelopes: Sequence[Envelope], leadership: Leadership) -> Sequence[Envelope]:
        """In order per partition: from the first that is not acknowledged on, a partition's records are sent again. A
        record that the broker refuses for good becomes a dead letter, so that nobody waits for it. Answers those whose
        topic does not exist (yet)."""
        due = list(envelopes)
        missing: list[Envelope] = []
        attempts, first_failed = 0, self._clock.now()
        while due:
            if leadership.lost:
                raise Fenced("the relay's lease ran out while publishing")
            results = await self._transport.publish([to_record(envelope) for envelope in due])
            attempts += 1
            due, refused, absent = _sorted_out(due, results)
            missing += absent
            for envelope, error in refused:
                await self._dead_letter(envelope, error, attempts, first_failed)
            if due and not refused:
                why = next(r.error for r in results if not isinstance(r, Ack))
                self._metrics.count("foldbus_retries_total", len(due), who="relay")
                log.warning("relay: %d of %d records not acknowledged, again: %s", len(due), len(results), why)
                await self._pause(attempts)
        return missing

    async def _dead_letter(self, envelope: Envelope, error: Exception, attempts: int, since: datetime) -> None:
        record: Outgoing = to_record(envelope)
        letter = DeadLetter(
            consumer="relay",
            id=uuid5(envelope.id, f"relay:{envelope.topic}"),
            topic=record.topic,
            partition=-1,
            offset=-1,
            key=record.key,
            value=record.value,
            headers=record.headers,
            failure=Failure(type(error).__qualname__, str(error), "", attempts, since, self._clock.now()),
            type=envelope.type,
        )
        await self._store.commit([Unit(dead_letter=letter)])
        self._metrics.count("foldbus_dead_letters_total", consumer="relay", error=type(error).__qualname__)
        log.error("relay: %s %s cannot be published, dead letter: %s", envelope.type, envelope.id, error)

    async def _prune(self, upto: Position, *, idle: bool) -> None:
        if upto - self._pruned >= (1 if idle else self._settings.prune_every):
            self._pruned = upto
            await self._store.forget_outgoing(upto=upto)

    async def _pause(self, attempts: int) -> None:
        bound = min(self._settings.retry_max_s, 0.05 * 2 ** min(attempts, 10))
        await asyncio.sleep(bound * (0.5 + self._rng.random() / 2))


class _Waiting:
    """Records whose topic does not exist yet, by topic, in order. Others' records pass them by."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.topics: dict[str, list[Envelope]] = {}
        self.since: dict[str, float] = {}
        self.next_try = 0.0

    def __len__(self) -> int:
        return sum(map(len, self.topics.values()))

    def add(self, records: Sequence[Envelope]) -> None:
        for record in records:
            assert record.topic is not None
            if record.topic not in self.topics:
                log.warning("relay: topic %s does not exist, its records wait, others go on", record.topic)
                self.since[record.topic] = self._clock.monotonic()
            self.topics.setdefault(record.topic, []).append(record)

    def behind(self, records: Sequence[Envelope]) -> list[Envelope]:
        """Keeps those whose topic is waited for, behind what waits already; answers the others."""
        if not self.topics:
            return list(records)
        self.add([record for record in records if record.topic in self.topics])
        return [record for record in records if record.topic not in self.topics]

    def marks_up_to(self, read: Position) -> Position:
        """Everything at or below is published: just below the first record that waits."""
        firsts = [records[0].position for records in self.topics.values() if records]
        return min((first - 1 for first in firsts if first is not None), default=read)


def _sorted_out(
    sent: Sequence[Envelope], results: Sequence[Published]
) -> tuple[list[Envelope], list[tuple[Envelope, Exception]], list[Envelope]]:
    """What must be sent again (in order), what was refused for good, and what has no topic.

    The transport acknowledges nothing of a partition after a record that is certainly not there, and a record behind
    an `Unknown` only if that one was written too: sending it again makes a second copy, never an inversion of first
    deliveries.
    """
    due: list[Envelope] = []
    refused: list[tuple[Envelope, Exception]] = []
    absent: list[Envelope] = []
    for envelope, result in zip(sent, results, strict=True):
        match result:
            case Ack():
                pass
            case Failed(error=MissingTopics()):
                absent.append(envelope)
            case Failed(error=error):
                refused.append((envelope, error))
            case _:
                due.append(envelope)
    return due, refused, absent
