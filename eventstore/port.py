"""The store port: streams, the log, and the commit of units. Adapters: `sqlite/` (the reference) and `postgres/`.

Promises that both adapters keep and `tests/eventstore/test_store_conformance.py` pins, to the last number:

- A unit is written whole or not at all; a unit that loses (CONFLICT, PARKED, STARTED) takes along later units of the
  same call that share its claim's key (within its consumer) or any stream it touches (appends or asserts), and nobody
  else.
- Events and outgoing messages draw positions from one sequence. Within a call positions follow `units`; within a unit
  events come first, in the order of `appends`, then outgoing, then the reply.
- `read_all` never shows a gap that is filled later, never inverts a stream, is not held up by foreign transactions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, runtime_checkable
from uuid import UUID

from bus.envelope import Envelope, Failure, Offset, Position, StreamId, Token, Version
from bus.quick import quick
from eventstore.flow import Flow, Inbox
from eventstore.parking import Effects, Parking
from eventstore.records import Records

if TYPE_CHECKING:  # half a second of imports that most processes never need
    from sqlalchemy.ext.asyncio import AsyncConnection


class Any_(StrEnum):
    ANY = "any"


ANY = Any_.ANY
"""Expected version of a writer that opts out of the check."""
ExpectedVersion = Version | Any_


class ClaimState(StrEnum):
    """What became of a message id. STARTED: a handler that calls the outside world is at it, or was. PARKED: it waits
    in its key's queue in the database. KEY_PARKED: nothing is known of it, but its key is parked."""

    NEW = "new"
    DONE = "done"
    DEAD = "dead"
    CANCELLED = "cancelled"
    STARTED = "started"
    PARKED = "parked"
    KEY_PARKED = "key-parked"


class Fence(StrEnum):
    """What an undo demands of the step it undoes, checked and made lasting by the undo's own commit."""

    EXPECT_DONE = "expect-done"
    """The step's claim is `done` with an ok reply (or none); otherwise the unit answers CONFLICT."""
    CANCEL = "cancel"
    """The step is absent (it becomes cancelled, and is dropped when it arrives), refused (stays as it is), dead
    (becomes cancelled) or cancelled already; if it is done with effect the unit answers CONFLICT."""


@quick
@dataclass(frozen=True, slots=True)
class Claim:
    """The record that `consumer` has taken `message_id`. `reply` is stored with it for whoever asks again, and is
    published with the unit if it has a topic. `state` is DONE, or DEAD when the message is given up.

    `fences` names the command that this one undoes, with `fence` saying what is demanded of it (same consumer).
    """

    consumer: str
    message_id: UUID
    key: str
    reply: Envelope | None = None
    state: ClaimState = ClaimState.DONE
    fences: UUID | None = None
    fence: Fence | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """Answer to "what became of this id?". `reply` is the stored one, its token included. `started`: what its handler
    calls outside may have happened, also where it is PARKED or DEAD by now. `token`: see `Effects.begin`."""

    state: ClaimState
    reply: Envelope | None = None
    started: bool = False
    token: int = 0


@quick
@dataclass(frozen=True, slots=True)
class Append:
    """Events for one stream. `expected` is the version before the first of them; within one call the next append to
    the same stream expects what this one makes. The store sets stream, version and position; ids are the writer's."""

    stream: StreamId
    expected: ExpectedVersion
    envelopes: tuple[Envelope, ...]


@dataclass(frozen=True, slots=True)
class Timer:
    """Due once, not early, by the store's clock. Handled by any worker under the claim (consumer, id); the unit that
    handles it cancels it. Staging a timer whose (consumer, id) exists changes nothing."""

    consumer: str
    id: UUID
    key: str
    due_at: datetime
    envelope: Envelope


@dataclass(frozen=True, slots=True)
class CancelTimer:
    """Takes a timer away; nothing happens when it is not there."""

    consumer: str
    id: UUID


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message given up, with its bytes and its history. `id` is the message's, or uuid5 of topic, partition and
    offset where it has none. Written with the claim; a second one with the same (consumer, id) changes nothing.

    `envelope` is None when the bytes never became one. `copy` goes to the `.dlq` topic as an outgoing row.
    """

    consumer: str
    id: UUID
    topic: str
    partition: int
    offset: Offset
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    failure: Failure
    type: str = ""


@dataclass(frozen=True, slots=True)
class Watermark:
    """All records of `topic`/`partition` below `offset` are handled by `group`. It never goes back."""

    group: str
    topic: str
    partition: int
    offset: Offset


@quick
@dataclass(frozen=True, slots=True)
class Unit:
    """Everything that one message changes, as a value, committed whole. Without a claim it always tries to write."""

    claim: Claim | None = None
    appends: tuple[Append, ...] = ()
    asserts: tuple[tuple[StreamId, Version], ...] = ()
    outgoing: tuple[Envelope, ...] = ()
    timers: tuple[Timer | CancelTimer, ...] = ()
    dead_letter: DeadLetter | None = None


class Verdict(StrEnum):
    COMMITTED = "committed"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    CANCELLED = "cancelled"
    STARTED = "started"
    PARKED = "parked"


@quick
@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a unit.

    COMMITTED: `position` is its last event (0: it had none), `public` its last public one, `versions` the new version
    of each stream it appended to. DUPLICATE: the claim was taken before, `reply` is what is stored with it. An append
    without a claim that repeats event ids at an explicit expected version is COMMITTED again with its first result.
    CONFLICT: `stream`, `expected` and `actual` name the first mismatch (None when it was a fence, or when an earlier
    unit of the call was lost, be it as PARKED or STARTED); of an archived stream `actual` is minus its version.
    CANCELLED: the claim was cancelled by an undo. PARKED: the message waits in its key's queue, or its key is parked
    (see `eventstore/parking.py`). STARTED: an effect's handler is at it.
    """

    verdict: Verdict
    position: Position = 0
    public: Position = 0
    versions: Mapping[StreamId, Version] = field(default_factory=dict["StreamId", "Version"])
    reply: Envelope | None = None
    stream: StreamId | None = None
    expected: ExpectedVersion | None = None
    actual: Version | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A folded state of `stream` at `version`, serialised. `schema` says which code made it: a snapshot of another
    schema is as good as none. It is never the truth: it may be dropped at any time."""

    stream: StreamId
    version: Version
    schema: str
    state: bytes
    made_at: datetime


@dataclass(frozen=True, slots=True)
class Wanted:
    """A stream to load, from the event after version `after`, up to `limit` events (None: all).

    With `snapshot_schema` a stored snapshot of exactly that schema, above `after`, comes along, and the events begin
    after it."""

    stream: StreamId
    after: Version = 0
    limit: int | None = None
    snapshot_schema: str | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """`version` is the stream's own at the time of reading (0: it does not exist), whatever `limit` was. `records` are
    in the order asked for, without holes, and begin after `snapshot` if there is one."""

    stream: StreamId
    version: Version
    records: Sequence[Envelope]
    snapshot: Snapshot | None = None


@dataclass(frozen=True, slots=True)
class Bodies:
    """Type and data of consecutive events of one stream, in their order: what folding most of them takes."""

    stream: StreamId
    types: Sequence[str]
    data: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Where:
    """Which events of the log; all that is given must hold. A type like `orders.order-placed.v*` stands for all its
    versions. `since` (inclusive) and `until` (exclusive) compare the envelope's time, which its writer's clock set: it
    need not rise with positions."""

    types: frozenset[str] | None = None
    categories: frozenset[str] | None = None
    stream: StreamId | None = None
    correlation_id: UUID | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """A stream as a list shows it. `kept_from` is the first version that is still stored (1, unless truncated)."""

    stream: StreamId
    version: Version
    kept_from: Version = 1
    archived_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Records in position order, and `upto`: everything at or below it has been seen. Read on with `after=upto`;
    `upto` may be ahead of the last record (rolled back or filtered positions). `head` is the log's watermark now."""

    records: Sequence[Envelope]
    upto: Position
    head: Position


@dataclass(frozen=True, slots=True)
class Lease:
    """Leadership of `name`; `token` rises with every new leader. `position` is the checkpoint found when it began."""

    name: str
    token: int
    position: Position


class Settled(StrEnum):
    """How somebody dealt with a dead letter."""

    REDRIVEN = "redriven"
    REPLACED = "replaced"
    """By another message, with another payload and id; the dead one stays dead."""
    DISCARDED = "discarded"
    HANDLED = "handled"
    """Its message was found handled: nothing was left to do."""
    FOLDED = "folded"
    """A newer generation of its projection folded the event."""


class Settling(StrEnum):
    """What became of an attempt to settle a letter: see `Letters.settle`."""

    SETTLED = "settled"
    HANDLED = "handled"
    CANCELLED = "cancelled"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Settlement:
    """`by` and `reason` are for people."""

    how: Settled
    at: datetime
    by: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter and what became of it (None: it is open). One that died again after a redrive is there once for
    each time: `number` tells the settled ones apart and rises with each settling; it is 0 while open."""

    letter: DeadLetter
    settled: Settlement | None = None
    number: int = 0


@dataclass(frozen=True, slots=True)
class LetterWhere:
    """Which dead letters; all that is given must hold. `type` and `error` may end in `*`, `prefix` is the beginning of
    an id (hexadecimal, dashes or not), `since` (inclusive) and `until` (exclusive) compare when they failed last."""

    consumer: str | None = None
    type: str | None = None
    error: str | None = None
    topic: str | None = None
    key: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    ids: frozenset[UUID] | None = None
    prefix: str | None = None


@runtime_checkable
class Tx(Protocol):
    """A transaction of the store's own database, for a user's SQL and staged units together."""

    @property
    def sql(self) -> AsyncConnection: ...


class Store(Protocol):
    """One service's database. Opening it applies nothing: see `migrate`."""

    service: str
    epoch: int
    """The log's source epoch; raised when the database is restored from a backup."""
    epoch_since: datetime | None
    """When it was raised last, by the database's clock; None: never. What was sent before may have been answered by
    what the restore took back."""

    async def load(self, wanted: Sequence[Wanted]) -> Sequence[Slice]:
        """One round trip for all; answers in the order of `wanted`, each a consistent prefix of its stream."""
        ...

    async def read_bodies(self, stream: StreamId, *, after: Version, upto: Version) -> Bodies:
        """Of the events with `after` < version <= `upto`, all that are stored: fewer where the stream is shorter, or
        was truncated or archived. A fraction of what `load` costs; meant for the rest of a stream that is longer than
        its first page."""
        ...

    async def examine(self, consumer: str, ids: Sequence[tuple[UUID, str]]) -> Sequence[Standing]:
        """What became of each (message id, key); NEW when nothing is known, KEY_PARKED when its key is parked."""
        ...

    async def commit(
        self, units: Sequence[Unit], *, watermarks: Sequence[Watermark] = (), tx: Tx | None = None
    ) -> Sequence[Outcome]:
        """Write each unit whole or not at all; a unit that loses, loses alone (but for followers, see the module).

        Outcomes come in the order of `units`. `watermarks` are stored in the same transaction, whatever the outcomes.
        Replies are stamped with a Token. Raises StoreUnavailable when it is unknown whether anything was written: call
        again with the same units, what was committed answers DUPLICATE. Raises BadUnit (nothing is written) when a
        unit itself is malformed.
        """
        ...

    def transaction(self) -> AbstractAsyncContextManager[Tx]:
        """A transaction with `tx.sql`, an SQLAlchemy connection; committed when the context ends without an error."""
        ...

    def reading(self) -> AbstractAsyncContextManager[Tx]:
        """A transaction that only reads, on one snapshot: it holds up no writer, and what writes in it fails."""
        ...

    async def take(self, tx: Tx, consumer: str, message_id: UUID, *, key: str | None = None) -> Standing:
        """First statement of a transaction that will commit a unit with this claim: keeps everybody else from the same
        message until `tx` ends, and answers what is known of it. STARTED where somebody else is at it now: ask again
        later, in another transaction. (A store that has one writer at a time waits for that one instead.) KEY_PARKED
        only when `key` is given."""
        ...

    def committed(self) -> None:
        """A transaction that was given as `tx` has committed: readers of this process need not find out by
        themselves. Only a hint: without it they are late by a poll."""
        ...

    async def read_stream(
        self,
        stream: StreamId,
        *,
        after: Version = 0,
        upto: Version | None = None,
        backward: bool = False,
        limit: int | None = None,
    ) -> Slice:
        """Events with `after` < version <= `upto` (None: to its end), ascending or, `backward`, descending from there;
        at most `limit`. A stream that does not exist is empty, at version 0."""
        ...

    async def streams(
        self, *, category: str | None = None, after: StreamId | None = None, limit: int = 1000
    ) -> Sequence[StreamInfo]:
        """Ordered by (category, id), beginning after `after`; archived ones included."""
        ...

    async def read_all(
        self, *, after: Position, limit: int, outgoing: bool = False, where: Where | None = None
    ) -> Page:
        """In position order: once `after` was passed, nothing appears at or below it, ever.

        `where` filters in the database (events only, so not together with `outgoing`); `upto` moves past what does not
        match, so that a reader of few events among many does not start over.
        """
        ...

    async def head(self) -> Position:
        """The log's watermark: every committed record up to it can be read."""
        ...

    async def wait_past(self, position: Position, *, timeout_s: float) -> None:
        """Returns once the log may hold something above `position`, or after `timeout_s`. Woken at once by commits of
        this process, by a notification or a cheap poll for others'."""
        ...

    async def watermarks(self, group: str) -> Mapping[tuple[str, int], Offset]:
        """Per (topic, partition) what was stored with the units."""
        ...

    async def forget_outgoing(self, *, upto: Position) -> int:
        """Deletes outgoing rows at or below `upto` (they are published); answers how many."""
        ...

    async def dead_letters(
        self, *, after: tuple[datetime, UUID] | None = None, limit: int = 100
    ) -> Sequence[DeadLetter]:
        """Oldest first."""
        ...

    @property
    def leases(self) -> Leases: ...

    @property
    def timers(self) -> Timers: ...

    @property
    def snapshots(self) -> Snapshots: ...

    @property
    def archive(self) -> Archive: ...

    @property
    def letters(self) -> Letters: ...

    @property
    def records(self) -> Records: ...

    @property
    def parking(self) -> Parking: ...

    @property
    def effects(self) -> Effects: ...

    @property
    def flow(self) -> Flow: ...

    @property
    def inbox(self) -> Inbox: ...


class Snapshots(Protocol):
    """At most one snapshot per stream. `Store.load` reads them."""

    async def save(self, snapshots: Sequence[Snapshot]) -> int:
        """Stores each unless the stream's own version is below it, or a newer one of its schema is there; answers how
        many. A snapshot of another schema is replaced."""
        ...

    async def page(self, *, after: StreamId | None = None, limit: int = 1000) -> Sequence[Snapshot]:
        """Ordered by (category, id), for those who check them."""
        ...

    async def drop(self, *, category: str | None = None, keep_schema: str | None = None) -> int:
        """Removes those of the category (None: all), but for those of `keep_schema`; answers how many."""
        ...


class Archive(Protocol):
    """What takes events out of the log again; never by itself.

    `seen` is the lowest checkpoint of everybody who must have read an event before it goes (the relay, projections over
    the own log): checkpoints only grow, so the caller asks for them first. An event above it raises NotSeen. A stream
    that there is not raises NoSuchStream. An append that is repeated (see Outcome) after its events left the log is
    answered with CONFLICT.
    """

    async def archive(self, stream: StreamId, *, expected: Version, seen: Position) -> StreamInfo:
        """Closes a stream and sets its events aside: `commit` answers CONFLICT to appends and asserts, ANY included,
        `load` and `read_stream` raise StreamArchived, `read_all` passes over its positions, `read` gives its events.
        A second call changes nothing. Raises WrongExpectedVersion."""
        ...

    async def restore(self, stream: StreamId) -> StreamInfo:
        """The inverse: events come back at their old positions. Who has passed those does not see them again. A second
        call changes nothing."""
        ...

    async def truncate(
        self, stream: StreamId, *, upto: Version, seen: Position, schema: str | None = None
    ) -> StreamInfo:
        """Deletes the events at or below version `upto`, for good. Refused (NotTruncated) unless a snapshot, of that
        schema if one is given, at or above `upto` holds what they folded to. That snapshot is kept from then on until
        a later one replaces it; code of another schema cannot load the stream any more. A second call changes nothing.
        Raises StreamArchived."""
        ...

    async def read(self, stream: StreamId, *, after: Version = 0, limit: int = 1000) -> Slice:
        """Archived events, and the stream's version; no events when it is not archived."""
        ...


class Letters(Protocol):
    """Dead letters as an operator deals with them: open ones, and those that were settled."""

    async def page(
        self, where: LetterWhere, *, settled: bool = False, after: Letter | None = None, limit: int = 100
    ) -> Sequence[Letter]:
        """Open ones, oldest failure first; or `settled` ones, in the order of their settling. Read on with the last one
        as `after`. Raises ValueError for a limit below 1."""
        ...

    async def settle(self, letter: DeadLetter, settlement: Settlement, *, unit: Unit | None = None) -> Settling:
        """One transaction: whatever it answers holds at its end, and killed in the middle it leaves nothing behind.

        Only this very letter (consumer, id, time of failure) is settled: GONE when it is not open any more. REDRIVEN
        and REPLACED commit `unit`, of timers and outgoing messages, if the claim of (consumer, id) is dead or there is
        none; REDRIVEN gives it back, every other way of settling leaves it as it is. When the claim is done they answer
        HANDLED (the letter is settled as that), when it was cancelled by an undo CANCELLED, and nothing of the unit is
        written. Raises BadUnit when the unit has anything else, or is given with any other way of settling.
        """
        ...


class Leases(Protocol):
    def lead(self, name: str, *, ttl_s: float = 10.0) -> AbstractAsyncContextManager[Leadership]:
        """Waits until this process leads `name`, renews while the context lasts, gives up at its end."""
        ...

    async def mark(self, lease: Lease, *, old: Position, new: Position) -> None:
        """Moves the checkpoint by compare-and-set on token and `old`. Raises Fenced: somebody else leads, or `old` is
        not what is stored; nothing changed."""
        ...

    async def position(self, name: str) -> Position:
        """The checkpoint, for lag; 0 when there was never a leader."""
        ...

    async def held(self) -> Mapping[str, float]:
        """The leases that somebody holds now, by name, and for how many seconds unless they are renewed; for lag."""
        ...


class Leadership(Protocol):
    lease: Lease

    @property
    def lost(self) -> bool:
        """True once renewal failed for longer than the time to live: stop. `mark` is what truly fences."""
        ...


class Timers(Protocol):
    async def due(self, *, limit: int, lease_s: float = 30.0) -> Sequence[Timer]:
        """Timers whose time has come, earliest first, each hidden from other callers for `lease_s`: a worker that dies
        is followed by another. What `due` gave is taken away by the unit that handles it."""
        ...

    async def next_due(self) -> datetime | None:
        """When the earliest timer (hidden ones at the end of their lease) comes up; None: there is none."""
        ...

    async def release(self, timer: Timer, *, delay_s: float) -> None:
        """Not handled: show it again after `delay_s`."""
        ...

    def now(self) -> datetime:
        """The clock that decides what is due, as far as this process can tell."""
        ...


__all__ = [
    "ANY",
    "Append",
    "Archive",
    "CancelTimer",
    "Claim",
    "ClaimState",
    "DeadLetter",
    "ExpectedVersion",
    "Fence",
    "Leadership",
    "Lease",
    "Leases",
    "Letter",
    "LetterWhere",
    "Letters",
    "Outcome",
    "Page",
    "Settled",
    "Settlement",
    "Settling",
    "Slice",
    "Snapshot",
    "Snapshots",
    "Standing",
    "Store",
    "StreamInfo",
    "Timer",
    "Timers",
    "Token",
    "Tx",
    "Unit",
    "Verdict",
    "Wanted",
    "Watermark",
    "Where",
]
