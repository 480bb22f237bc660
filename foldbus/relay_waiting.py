"""Records that the relay cannot publish: those that wait for their topic, and those that were refused."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from uuid import NAMESPACE_URL, UUID, uuid5

from bus.cloudevents import from_record
from bus.envelope import Failure, Kind, Position
from bus.errors import Undecodable
from bus.seams import Clock
from bus.transport import Assignment, Delivery, Outgoing
from eventstore.port import DeadLetter, Unit

log = logging.getLogger("foldbus.relay")

Due = tuple[Position, Outgoing]
"""A record and its place in the log."""

_REPLY = ("ce_kind", Kind.REPLY.value.encode())


class Waiting:
    """Records whose topic does not exist yet, by topic, in order. Others' records pass them by."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.topics: dict[str, list[Due]] = {}
        self.since: dict[str, float] = {}
        self.next_try = 0.0

    def __len__(self) -> int:
        return sum(map(len, self.topics.values()))

    def add(self, records: Sequence[Due]) -> None:
        for one in records:
            topic = one[1].topic
            if topic not in self.topics:
                log.warning("relay: topic %s does not exist, its records wait, others go on", topic)
                self.since[topic] = self._clock.monotonic()
            self.topics.setdefault(topic, []).append(one)

    def behind(
        self, positions: Sequence[Position], records: Sequence[Outgoing]
    ) -> tuple[Sequence[Position], Sequence[Outgoing]]:
        """Keeps those whose topic is waited for, behind what waits already; answers the others."""
        if not self.topics:
            return positions, records
        due = list(zip(positions, records, strict=True))
        self.add([one for one in due if one[1].topic in self.topics])
        others = [one for one in due if one[1].topic not in self.topics]
        return [position for position, _ in others], [record for _, record in others]

    def published_up_to(self, read: Position) -> Position:
        """Everything at or below is published: just below the first record that waits."""
        return min((records[0][0] - 1 for records in self.topics.values() if records), default=read)


def is_reply(record: Outgoing) -> bool:
    return _REPLY in record.headers


def refused_letter(due: Due, error: Exception, *, attempts: int, since: datetime, now: datetime) -> tuple[Unit, str]:
    """The dead letter of a record that the broker does not take, and what to call it."""
    position, record = due
    id, name = _named(position, record, now)
    letter = DeadLetter(
        consumer="relay",
        id=uuid5(id, f"relay:{record.topic}"),
        topic=record.topic,
        partition=-1,
        offset=-1,
        key=record.key,
        value=record.value,
        headers=tuple(record.headers),
        failure=Failure(type(error).__qualname__, str(error), "", attempts, since, now),
        type=name,
    )
    return Unit(dead_letter=letter), f"{name} {id}"


def _named(position: Position, record: Outgoing, now: datetime) -> tuple[UUID, str]:
    """Id and type of the message."""
    delivery = Delivery(Assignment(record.topic, -1), -1, record.key, record.value, tuple(record.headers), now)
    try:
        envelope = from_record(delivery)
    except Undecodable:  # too much in its headers, for one: it is known by its place
        return uuid5(NAMESPACE_URL, f"{record.topic}@{position}"), f"a record for {record.topic}"
    return envelope.id, envelope.type
