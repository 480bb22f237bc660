"""The transport port: topics of partitions of records, in bytes. Adapters: `embedded.py` (SQLite) and `kafka.py`.

Promises that both adapters keep and `tests/bus/test_transport_conformance.py` pins:

- A record whose publish answered `Ack` is in the topic and stays there. `Failed` is certainly not there, `Unknown`
  may be.
- Records of one partition keep the order of `publish` calls and, within a call, of the batch.
- The partition of a key is `murmur2(key) % partitions`, as Java clients compute it, on every adapter.
- A group's partitions are shared out among its live members; each has one owner at a time, with a rising epoch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol

from bus.envelope import Offset
from bus.packing import PackedHeaders
from bus.quick import quick

Headers = tuple[tuple[str, bytes], ...]
"""As on the wire: ordered, names may repeat."""


@quick
@dataclass(frozen=True, slots=True)
class Outgoing:
    """A record to publish. `value` None is a tombstone. `partition` None: by the key. Headers that are packed already
    need not be on the way to Kafka."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers | PackedHeaders = ()
    partition: int | None = None


@quick
@dataclass(frozen=True, slots=True)
class Ack:
    partition: int
    offset: Offset


@dataclass(frozen=True, slots=True)
class Failed:
    """Certainly not in the topic: too large, no such topic, not allowed. Sending it again gives the same answer."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Unknown:
    """May be in the topic: no answer in time. Send the same records of that partition, from this one on, again."""

    error: Exception


Published = Ack | Failed | Unknown


@dataclass(frozen=True, slots=True, order=True)
class Assignment:
    """One partition in the hands of one member. `epoch` rises with each assignment; a tail's is 0."""

    topic: str
    partition: int
    epoch: int = 0


@quick
@dataclass(frozen=True, slots=True)
class Delivery:
    """A record that was read, with the assignment it was read under. `time` is the record's timestamp (the broker's
    or the producer's). With a `flaw` it could not be read as it is, and that says why: it is for the dead letters."""

    assignment: Assignment
    offset: Offset
    key: bytes | None
    value: bytes | None
    headers: Headers
    time: datetime
    flaw: str = ""

    @property
    def topic(self) -> str:
        return self.assignment.topic

    @property
    def partition(self) -> int:
        return self.assignment.partition

    @property
    def size(self) -> int:
        """Bytes of key, value and headers."""
        size = len(self.key or b"") + len(self.value or b"")
        for name, value in self.headers:  # asked for every record: a generator would cost three times as much
            size += len(name) + len(value)
        return size


class Assignments(Protocol):
    """What a group member does when partitions come and go. Called from within `poll`, never concurrently."""

    async def assigned(
        self, parts: Sequence[Assignment], committed: Mapping[Assignment, Offset | None]
    ) -> Mapping[Assignment, Offset]:
        """Answers where to start reading each part: the next offset to be read. `committed` is the group's (None: none
        yet; a part left out of the answer starts there, or at the beginning). Called with nothing when the group has
        nothing for this member: it stands by."""
        ...

    async def revoked(self, parts: Sequence[Assignment], *, lost: bool) -> None:
        """Drain and commit, then return; unless `lost`, commits are still accepted in here. Called on a clean leave
        as well."""
        ...


class Consumer(Protocol):
    async def poll(self, *, max_records: int, timeout_s: float) -> Sequence[Delivery]:
        """Records in offset order per partition; empty after `timeout_s`. Must be called again and again, also while
        everything is paused, or the member is taken for dead. Never cancel it: it returns within `timeout_s` (plus
        the time of a rebalance).

        Raises OffsetOutOfRange when the position is gone from the topic, TransportUnavailable when the broker cannot
        be reached for long; both may be polled again.
        """
        ...

    def wake(self) -> None:
        """A poll that waits, or else the next one, returns at once, be it with nothing. Told twice, it is told once."""
        ...

    def pause(self, parts: Collection[Assignment]) -> None:
        """Nothing more from these parts until `resume`. Unknown or stale parts are ignored."""
        ...

    def resume(self, parts: Collection[Assignment]) -> None: ...

    async def commit(self, offsets: Mapping[Assignment, Offset]) -> None:
        """Stores the next offsets to be read. Raises Fenced when a part is no longer this member's at that epoch
        (nothing is stored then), TransportUnavailable when that is unknown."""
        ...

    async def end_offsets(self) -> Mapping[Assignment, Offset]:
        """The next offset that will be written, for each part in hand: for lag and for "caught up"."""
        ...


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """What a service declares. `retention_s` None keeps for ever; `compact` keeps the latest record per key, and a
    record without a value is then a declared delete. `max_bytes` bounds one record (value and headers).

    `keyed`: every record brings its key, or it is a dead letter. Without, the key of a record that brings none is read
    from its message's own Key field: for topics of others whose producers send no keys. Such a producer spreads a key
    over all partitions, so its messages are in order within a partition only."""

    name: str
    partitions: int = 12
    retention_s: float | None = None
    compact: bool = False
    max_bytes: int = 1_000_000
    keyed: bool = True


@dataclass(frozen=True, slots=True)
class TopicState:
    """What the broker has. `retention_s` None: no message goes because of its age. `lingers_s`: how much longer than
    that one may stay, since old messages go together with those around them."""

    name: str
    partitions: int
    retention_s: float | None = None
    compact: bool = False
    max_bytes: int = 1_000_000
    lingers_s: float = 0.0


class TopicAdmin(Protocol):
    async def describe(self, names: Collection[str]) -> Mapping[str, TopicState]:
        """Those that exist; the others are absent from the answer."""
        ...

    async def create(self, specs: Sequence[TopicSpec]) -> None:
        """Creates what does not exist and returns when it can be used; what exists is left as it is. Two calls at once
        do no harm. Raises TransportUnavailable."""
        ...

    async def offsets(self, topic: str) -> Mapping[int, tuple[Offset, Offset]]:
        """Per partition the first offset still held and the next one to be written. Raises MissingTopics."""
        ...

    async def offsets_at(self, topic: str, time: datetime) -> Mapping[int, Offset]:
        """Per partition the first offset still held whose record's time is at or after `time`; the end where there is
        none. Raises MissingTopics."""
        ...

    async def committed(self, group: str, topics: Sequence[str]) -> Mapping[tuple[str, int], Offset]:
        """A group's committed offsets, also when it has no members."""
        ...

    async def members(self, group: str) -> int:
        """How many are in the group now, as far as the broker knows: one that was killed counts until its session
        ends. 0 for a group that there is not."""
        ...

    async def place(self, group: str, offsets: Mapping[tuple[str, int], Offset]) -> None:
        """Sets a group's offsets, per (topic, partition), also backwards and also for a group that there is not yet.

        Raises GroupInUse when the group has members (checked by the broker, together with setting them), MissingTopics;
        nothing was set then. TransportUnavailable: unknown, call again."""
        ...


class Transport(Protocol):
    max_bytes: int
    """Bound of one record (key, value, headers) unless its topic has another."""

    async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Published]:
        """Answers per record, in the order of `batch`. Never raises for a record; bounded in time.

        After an `Unknown` or `Failed` in a partition, later records of that partition and call are not `Ack` unless
        they were truly written after it: the caller sends again from the first one that is not `Ack`.
        """
        ...

    def consume(
        self, group: str, topics: Sequence[str], *, listener: Assignments
    ) -> AbstractAsyncContextManager[Consumer]:
        """Joins the group; leaving the context revokes, then leaves. Raises MissingTopics."""
        ...

    def tail(
        self, topic: str, *, start: Mapping[int, Offset] | Literal["begin", "end"]
    ) -> AbstractAsyncContextManager[Consumer]:
        """All partitions, without a group; `commit` is not for it. When the context is entered the positions are fixed:
        what is published from then on is read. With a mapping, partitions left out start at their beginning."""
        ...

    @property
    def admin(self) -> TopicAdmin: ...


@dataclass(frozen=True, slots=True)
class PollSettings:
    """Timings of a group member, in seconds; adapters take what they can use."""

    session_timeout_s: float = 45.0
    heartbeat_s: float = 3.0
    rebalance_timeout_s: float = 60.0
    request_timeout_s: float = 30.0
    publish_deadline_s: float = 30.0
    extra: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    """What only one adapter knows; it may hold passwords."""
