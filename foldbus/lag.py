"""How far a service is behind: its groups, its relay, its read models, its timers; how much was given up or waits for a
person; and whether a worker is there.

Reads store and broker, changes nothing, and needs no worker to run. Figures of different lines are not of one moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from bus.errors import MissingTopics
from bus.transport import TopicAdmin
from eventstore.flow import Pause
from eventstore.port import Store
from foldbus.relay import LEASE
from foldbus.saga_list import saga_list
from foldbus.views import all_projections, workshop
from projections import LOG, Checkpoint, Place, Status

if TYPE_CHECKING:
    from foldbus.connection import Connection

_PAGE = 1000
_PARKED_PAGE = 100
"""Each comes with the bytes of its head."""
PARKED_MAX = 1000
COUNTED_MAX = 10_000
"""Nothing is counted further than this: `…_more` says that there is more."""


@dataclass(frozen=True, slots=True)
class GroupLag:
    """`committed` None: this group has not committed anything there yet, all that the topic holds is before it."""

    group: str
    topic: str
    partition: int
    committed: int | None
    end: int
    behind: int


@dataclass(frozen=True, slots=True)
class RelayLag:
    """`behind` in positions, of which some are no messages; `waiting` are messages that are not published yet, the
    first of them made `oldest_s` ago."""

    position: int
    head: int
    behind: int
    waiting: int
    waiting_more: bool
    oldest_s: float | None


@dataclass(frozen=True, slots=True)
class ProjectionLag:
    """`generation` 0: no worker has run it yet. `behind`: positions of the own log and records of others' topics that
    are still to be read. `version` is the serving generation's. `missing_topics` are what it waits for; what
    it reads elsewhere goes on."""

    name: str
    generation: int
    version: int
    behind: int
    building: bool
    missing_topics: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SagaLag:
    """Of the list of sagas, as far as that is: how many wait for a person, and how many undo what they did."""

    parked: int = 0
    undoing: int = 0


@dataclass(frozen=True, slots=True)
class TimerLag:
    """`overdue_s`: for how long the earliest timer has been due (0: it is not yet)."""

    next_due: datetime | None
    overdue_s: float


@dataclass(frozen=True, slots=True)
class ParkedLag:
    """Parked keys, how many of them are held, and the messages that wait in their queues. `oldest_s`: for how long the
    one that was parked first has been."""

    keys: int = 0
    held: int = 0
    messages: int = 0
    more: bool = False
    oldest_s: float | None = None


@dataclass(frozen=True, slots=True)
class Lag:
    service: str
    groups: tuple[GroupLag, ...]
    relay: RelayLag
    projections: tuple[ProjectionLag, ...]
    timers: TimerLag
    dead_letters: int
    dead_letters_more: bool
    missing_topics: tuple[str, ...] = field(default=())
    waiting_groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Groups that join nothing before these topics are there."""
    worker: bool = False
    """Does a worker lead the relay at this moment? Each tries to; after a kill its lease runs on for a while."""
    leases: Mapping[str, float] = field(default_factory=dict[str, float])
    """What workers lead now, and for how many seconds unless they renew it."""
    sagas: SagaLag | None = None
    """None: this service has no sagas."""
    parked: Mapping[str, ParkedLag] = field(default_factory=dict[str, ParkedLag])
    """By consumer, those that have any; of the first `PARKED_MAX` keys."""
    paused: Mapping[str, Pause] = field(default_factory=dict[str, Pause])
    """Groups that an operator paused."""


async def measure(connection: Connection) -> Lag:
    """Raises what store and transport raise when they cannot be reached; a topic that is not there is named."""
    missing: set[str] = set()
    waiting: dict[str, tuple[str, ...]] = {}
    store, admin = connection.store, connection.transport.admin
    ends = _Ends(admin, missing)
    groups: list[GroupLag] = []
    for group, topics in connection.service.groups.items():
        committed = await admin.committed(group, topics)
        for topic in topics:
            for partition, (first, end) in sorted((await ends.of(topic)).items()):
                at = committed.get((topic, partition))
                groups.append(GroupLag(group, topic, partition, at, end, max(0, end - (first if at is None else at))))
        if absent := sorted(missing.intersection(topics)):
            waiting[group] = tuple(absent)
    head = await store.head()
    letters, more_letters = await count_dead_letters(store)
    leases = await store.leases.held()
    return Lag(
        service=connection.service.name,
        groups=tuple(groups),
        relay=await _relay(connection, head),
        projections=tuple([await _projection(connection, one, head, ends) for one in _projections(connection)]),
        timers=await _timers(store),
        dead_letters=letters,
        dead_letters_more=more_letters,
        missing_topics=tuple(sorted(missing)),
        waiting_groups=waiting,
        worker=LEASE in leases,
        leases={name: round(left, 3) for name, left in leases.items()},
        sagas=await _sagas(connection) if connection.service.sagas else None,
        parked=await _parked(store),
        paused=await store.flow.paused(),
    )


class _Ends:
    """Offsets of topics, each asked for once."""

    def __init__(self, admin: TopicAdmin, missing: set[str]) -> None:
        self._admin, self._missing = admin, missing
        self._known: dict[str, dict[int, tuple[int, int]]] = {}

    async def of(self, topic: str) -> dict[int, tuple[int, int]]:
        if topic not in self._known:
            try:
                self._known[topic] = dict(await self._admin.offsets(topic))
            except MissingTopics:
                self._missing.add(topic)
                self._known[topic] = {}
        return self._known[topic]


def _projections(connection: Connection) -> Sequence[Any]:
    return all_projections(connection.service)


async def _relay(connection: Connection, head: int) -> RelayLag:
    store = connection.store
    position = at = await store.leases.position(LEASE)
    waiting, oldest = 0, None
    while waiting < COUNTED_MAX:
        page = await store.read_all(after=at, limit=_PAGE, outgoing=True)
        due = [record for record in page.records if record.topic is not None]
        waiting += len(due)
        if oldest is None and due:
            oldest = max(0.0, (connection.clock.now() - due[0].time).total_seconds())
        if page.upto >= page.head or page.upto <= at:
            return RelayLag(position, head, max(0, head - position), waiting, False, oldest)
        at = page.upto
    return RelayLag(position, head, max(0, head - position), waiting, True, oldest)


async def _projection(connection: Connection, projection: Any, head: int, ends: _Ends) -> ProjectionLag:
    rows = workshop(connection, projection).rows
    found = await rows.generations()
    serving = next((one for one in found if one.status is Status.SERVING), None)
    places = (await rows.checkpoint(serving.number) if serving is not None else Checkpoint()).places
    behind = 0
    missing: list[str] = []
    for source in projection.sources(connection.service.name):
        if source == LOG:
            behind += max(0, head - places.get((LOG, 0), Place()).position)
        else:
            found_ends = await ends.of(source)
            if not found_ends:
                missing.append(source)
            for partition, (first, end) in found_ends.items():
                behind += max(0, end - places.get((source, partition), Place(first)).offset)
    return ProjectionLag(
        name=projection.name,
        generation=serving.number if serving is not None else 0,
        version=serving.version if serving is not None else 0,
        behind=behind,
        building=any(one.status is Status.BUILDING for one in found),
        missing_topics=tuple(sorted(missing)),
    )


async def _sagas(connection: Connection) -> SagaLag:
    rows = workshop(connection, saga_list).rows
    if not any(one.status is Status.SERVING for one in await rows.generations()):
        return SagaLag()  # no worker has run it, and looking makes nothing
    return SagaLag(
        parked=await rows.count(where={"status": "parked"}), undoing=await rows.count(where={"status": "compensating"})
    )


async def _timers(store: Store) -> TimerLag:
    due = await store.timers.next_due()
    late = 0.0 if due is None else max(0.0, (store.timers.now() - due).total_seconds())
    return TimerLag(due, round(late, 3))


async def _parked(store: Store) -> dict[str, ParkedLag]:
    found: dict[str, ParkedLag] = {}
    after, count, now = None, 0, store.timers.now()
    while True:
        page = await store.parking.keys(after=after, limit=_PARKED_PAGE)
        count += len(page)
        for one in page:
            so_far = found.get(one.consumer, ParkedLag())
            found[one.consumer] = ParkedLag(
                so_far.keys + 1,
                so_far.held + (one.due_at is None),
                so_far.messages + one.waiting,
                oldest_s=round(max(so_far.oldest_s or 0.0, (now - one.since).total_seconds()), 3),
            )
        if len(page) < _PARKED_PAGE:
            return found
        if count >= PARKED_MAX:
            return {consumer: replace(one, more=True) for consumer, one in found.items()}
        after = (page[-1].consumer, page[-1].key)


async def count_dead_letters(store: Store) -> tuple[int, bool]:
    """How many, and whether there are more than that."""
    count, after = 0, None
    while count < COUNTED_MAX:
        page = await store.dead_letters(after=after, limit=_PAGE)
        count += len(page)
        if len(page) < _PAGE:
            return count, False
        last: tuple[datetime, UUID] = (page[-1].failure.failed_at, page[-1].id)
        after = last
        await asyncio.sleep(0)
    return count, True
