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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import uuid5

from bus.cloudevents import to_record
from bus.envelope import Envelope, Failure, Position
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
        published: Callable[[Position], None] | None = None,
    ) -> None:
        self._store, self._transport = store, transport
        self._clock, self._metrics, self._failpoint = clock, metrics, failpoint
        self._settings = settings or RelaySettings()
        self._rng = rng or random.Random()
        self._pruned: Position = 0
        self._published = published

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
        lease = leadership.lease
        done = lease.position
        while not leadership.lost:
            page = await self._store.read_all(after=done, limit=self._settings.batch_max, outgoing=True)
            if page.upto == done:
                await self._prune(done, idle=True)
                await self._store.wait_past(done, timeout_s=self._settings.wait_s)
                continue
            due = [record for record in page.records if record.topic is not None]
            if due:
                self._failpoint.hit("before-publish")
                await self._publish(due, leadership)
                self._failpoint.hit("after-publish")
            await self._mark(lease, done, page.upto)
            done = page.upto
            self._metrics.count("foldbus_relayed_total", len(due))
            self._metrics.gauge("foldbus_relay_lag", page.head - done)
            if self._published is not None:
                self._published(done)
            await self._prune(done, idle=False)

    async def _mark(self, lease: Lease, old: Position, new: Position) -> None:
        self._failpoint.hit("before-mark")
        await self._store.leases.mark(lease, old=old, new=new)
        self._failpoint.hit("after-mark")

    async def _publish(self, envelopes: Sequence[Envelope], leadership: Leadership) -> None:
        """All of them, in order per partition: from the first that is not acknowledged on, a partition's records are
        sent again. A record that the broker refuses for good becomes a dead letter, so that nobody waits for it."""
        due = list(envelopes)
        attempts, first_failed = 0, self._clock.now()
        while due:
            if leadership.lost:
                raise Fenced("the relay's lease ran out while publishing")
            results = await self._transport.publish([to_record(envelope) for envelope in due])
            attempts += 1
            due, refused = _still_due(due, results)
            for envelope, error in refused:
                await self._dead_letter(envelope, error, attempts, first_failed)
            if due and not refused:
                why = next(r.error for r in results if not isinstance(r, Ack))
                self._metrics.count("foldbus_retries_total", len(due), who="relay")
                log.warning("relay: %d of %d records not acknowledged, again: %s", len(due), len(results), why)
                await self._pause(attempts)

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


def _still_due(
    sent: Sequence[Envelope], results: Sequence[Published]
) -> tuple[list[Envelope], list[tuple[Envelope, Exception]]]:
    """What must be sent again (in order), and what was refused for good.

    The transport acknowledges nothing of a partition after a record that is certainly not there, and a record behind
    an `Unknown` only if that one was written too: sending it again makes a second copy, never an inversion of first
    deliveries. MissingTopics is not for good: the topic may be created any moment.
    """
    due: list[Envelope] = []
    refused: list[tuple[Envelope, Exception]] = []
    for envelope, result in zip(sent, results, strict=True):
        match result:
            case Ack():
                pass
            case Failed(error=error) if not isinstance(error, MissingTopics):
                refused.append((envelope, error))
            case _:
                due.append(envelope)
    return due, refused
