"""`Repository`: one kind of aggregate on a store, for programs without a `Service`, and for looking into the past.

    accounts = Repository(account, store=store)
    await accounts.execute(OpenAccount(account_id="a-1"))
    (await accounts.load("a-1", at_version=3)).state

What is loaded is what is committed, read at that moment; nothing is cached here. Snapshots are used where they are, and
made by the services' runtime (foldbus/snapshotting.py).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import count
from typing import Any, Generic, TypeVar, cast
from uuid import UUID, uuid5

from bus.codec import Codec, JsonCodec, died_error
from bus.envelope import Envelope, Origin, Position, ReplyOutcome, StreamId, Version
from bus.errors import Cancelled, Died
from bus.messages import Command, Event, Refused
from bus.metrics import MemoryMetrics, Metrics
from bus.registry import Registry
from bus.seams import Clock, Ids, SystemClock, Uuid7Ids
from eventstore.ahead import Ahead
from eventstore.archiving import misfit
from eventstore.decider import Aggregate, BadDecision, Decider, DeciderBehaviour
from eventstore.errors import NoSuchVersion, TooManyConflicts, WrongExpectedVersion
from eventstore.loading import PAGE, Folded, load_folded, truncated
from eventstore.port import Append, Claim, ExpectedVersion, Slice, Snapshot, Store, Unit, Verdict, Wanted
from eventstore.snapshots import UnfitState, UnreadableSnapshot, unshared

S = TypeVar("S")
C = TypeVar("C", bound=Command[Any])
E = TypeVar("E", bound=Event)
R = TypeVar("R")

ATTEMPTS_MAX = 200
BACKWARD_MAX = 10_000
_AT_ONCE = 3
_BACKOFF_S = (0.001, 0.05)


@dataclass(frozen=True, slots=True)
class Loaded(Generic[S]):
    """`state` is what the first `version` events of `stream` fold to (0: it is the initial one)."""

    stream: StreamId
    version: Version
    state: S


@dataclass(frozen=True, slots=True)
class Step(Generic[S]):
    """One stored event of a history, and the `state` after it. `events` are what it is to today's code: itself, or
    what it is upcast to, which may be several or none. `type` is the stored one."""

    version: Version
    time: datetime
    type: str
    events: tuple[Event, ...]
    state: S
    id: UUID
    correlation_id: UUID
    causation_id: UUID | None
    actor: str | None


@dataclass(frozen=True, slots=True)
class Appended:
    """`version` of the stream, and `position` in the log, of the last event appended."""

    version: Version
    position: Position


class Repository(Generic[S, C, E]):
    """The aggregates of one decider. Safe for many tasks at once.

    `codec` is the service's; without one, events and commands are those that the decider names, and `refusals` arrive
    as themselves. `source` names who appends (by default the store's service): its claims keep a command from being
    executed twice, here or by that service's worker.
    """

    def __init__(
        self,
        decider: Decider[S, C, E],
        *,
        store: Store,
        codec: Codec | None = None,
        refusals: Sequence[type[Refused]] = (),
        source: str | None = None,
        clock: Clock | None = None,
        ids: Ids | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.decider = decider
        self._store, self._source = store, source or store.service
        self._codec: Codec = codec or JsonCodec(Registry([*decider.commands, *decider.events], refusals))
        self._clock, self._ids, self._metrics = clock or SystemClock(), ids or Uuid7Ids(), metrics or MemoryMetrics()
        self._jitter = random.Random()
        self._behaviour = DeciderBehaviour(
            [decider], service=self._source, codec=self._codec, ids=self._ids, clock=self._clock
        )
        self._schema = snapshot_schema(decider)

    # --- loading ----------------------------------------------------------------------------------------------------

    async def load(self, key: object, *, at_version: Version | None = None, at: datetime | None = None) -> Loaded[S]:
        """The state now, or as it was. An aggregate that does not exist is at version 0, in its initial state.

        `at_version`: after so many events; raises NoSuchVersion when there are fewer. `at`: after the longest run of
        events from the first one whose times are all at or before it; times are the writers' clocks' and need not rise,
        so an event that looks older than one before it counts with that one. Raises StreamArchived, and StreamTruncated
        where the events that it takes are gone.
        """
        stream = self.decider.stream(key)
        if at is not None:
            if at_version is not None:
                raise ValueError("at_version= and at= were both given; wanted one of them")
            return await self._load_at(stream, at)
        if at_version is not None:
            return await self._load_version(stream, at_version)
        return await self._fold(Wanted(stream, snapshot_schema=self._schema))

    async def _load_version(self, stream: StreamId, at_version: Version) -> Loaded[S]:
        if at_version < 0:
            raise ValueError(f"at_version is {at_version}; wanted 0 or more")
        (head,) = await self._store.load([Wanted(stream, limit=0, snapshot_schema=self._schema)])
        if head.version < at_version:
            raise NoSuchVersion(stream, wanted=at_version, actual=head.version)
        if at_version == 0:
            return Loaded(stream, 0, self.decider.fresh())
        snapshot = head.snapshot
        if snapshot is not None and snapshot.version <= at_version:
            try:
                state = self.decider.state_codec().load(snapshot.state)
            except UnreadableSnapshot:
                self._metrics.count("foldbus_states_anew_total", why="UnreadableSnapshot")
            else:
                if snapshot.version == at_version:
                    return Loaded(stream, at_version, state)
                wanted = Wanted(stream, after=snapshot.version, limit=at_version - snapshot.version)
                return await self._fold(wanted, begin=lambda part: state)
        return await self._fold(Wanted(stream, limit=at_version))

    async def _load_at(self, stream: StreamId, at: datetime) -> Loaded[S]:
        if at.tzinfo is None:
            raise ValueError(f"at is {at}, without a time zone; wanted an instant")
        state, version = self.decider.fresh(), 0
        async with aclosing(self._pages(stream, after=0)) as pages:
            async for records in pages:
                until = next((nth for nth, one in enumerate(records) if one.time > at), len(records))
                if until:
                    state, version = self._folded(state, records[:until]), records[until - 1].version or 0
                if until < len(records):
                    break
        return Loaded(stream, version, state)

    async def _fold(self, wanted: Wanted, *, begin: Callable[[Slice], S] | None = None) -> Loaded[S]:
        begin, behaviour = begin or self._begin, self._behaviour
        folded = await load_folded(
            self._store,
            [wanted],
            begin=lambda part: Aggregate(self.decider, begin(part)),
            fold=behaviour.fold,
            fold_bodies=behaviour.fold_bodies,
        )
        found = folded[wanted.stream]
        if isinstance(found, UnreadableSnapshot):
            self._metrics.count("foldbus_states_anew_total", why="UnreadableSnapshot")
            return await self._fold(Wanted(wanted.stream, limit=wanted.limit))
        if not isinstance(found, Folded):
            raise found
        return Loaded(found.stream, found.version, cast("S", found.state.state))

    def _begin(self, part: Slice) -> S:
        if part.snapshot is not None:
            return self.decider.state_codec().load(part.snapshot.state)
        return self.decider.fresh()

    def _folded(self, state: S, records: Sequence[Envelope]) -> S:
        return cast("S", self._behaviour.fold(Aggregate(self.decider, state), records).state)

    async def _pages(self, stream: StreamId, *, after: Version) -> AsyncGenerator[Sequence[Envelope]]:
        """To the end as it is when it is reached. From the second page on the next one is read ahead."""
        ahead: Ahead[Sequence[Slice]] = Ahead()
        try:
            for nth in count():
                wanted = Wanted(stream, after=after, limit=PAGE)
                (part,) = await (ahead.take() if ahead else self._store.load([wanted]))
                if part.version <= after:
                    return
                if not part.records or part.records[0].version != after + 1:
                    raise truncated(part, after)
                after += len(part.records)
                if nth and after < part.version:
                    await ahead.start(self._store.load([replace(wanted, after=after)]))
                yield part.records
        finally:
            await ahead.close()

    async def fold_whole(self, stream: StreamId, *, upto: Version) -> S:
        """The state at a version that the stream has reached, from its first event, whatever snapshots there are."""
        found = await self._fold(Wanted(stream, limit=upto))
        if found.version < upto:
            raise NoSuchVersion(stream, wanted=upto, actual=found.version)
        return found.state

    # --- history ----------------------------------------------------------------------------------------------------

    async def history(
        self, key: object, *, after_version: Version = 0, limit: int | None = None, backward: bool = False
    ) -> AsyncGenerator[Step[S]]:
        """Event by event, with the state after each; page by page, so that a long one takes no more memory than a
        short one. Only events after `after_version`, at most `limit`.

        `backward` gives the same steps of the last `limit` events, the last one first; it needs a limit, of at most
        10,000, which are held in memory. A stream that does not exist, or not that far, has no history.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}; wanted 1 or more")
        if not backward:
            async for step in self._forward(key, after_version, limit):
                yield step
            return
        if limit is None or limit > BACKWARD_MAX:
            raise ValueError(f"backward with a limit of {limit}; wanted one, of at most {BACKWARD_MAX}")
        (head,) = await self._store.load([Wanted(self.decider.stream(key), limit=0)])
        after = max(after_version, head.version - limit)
        if head.version <= after:
            return
        steps = [step async for step in self._forward(key, after, head.version - after)]
        for step in reversed(steps):
            yield step

    async def _forward(self, key: object, after: Version, limit: int | None) -> AsyncGenerator[Step[S]]:
        stream, evolve = self.decider.stream(key), self.decider.evolve
        try:
            base = await self.load(key, at_version=after)
        except NoSuchVersion:
            return
        state, left = base.state, limit
        async with aclosing(self._pages(stream, after=after)) as pages:
            async for records in pages:
                for record in records:
                    if left is not None and left <= 0:
                        return
                    left = None if left is None else left - 1
                    events = tuple(cast("Sequence[E]", self._behaviour.events(self.decider.category, record)))
                    state = unshared(state)  # what was given before stays as it was
                    for event in events:
                        state = evolve(state, event)
                    yield Step(
                        record.version or 0, record.time, record.type, events, state,
                        record.id, record.correlation_id, record.causation_id, record.actor,
                    )  # fmt: skip

    # --- appending --------------------------------------------------------------------------------------------------

    async def execute(self, command: Command[R], *, id: UUID | None = None, timeout_s: float = 30.0) -> R:
        """Loads, decides, appends; the answer. Decided again when somebody else appended in between.

        The same `id` again brings the first answer. Raises the `Refused` (which is stored, too), what `decide` raised
        (nothing was stored), TooManyConflicts after `timeout_s` of lost races.
        """
        message_id = id or self._ids.new()
        now = self._clock.now()
        envelope = self._codec.encode(command, Origin(self._source, message_id, now, correlation_id=message_id))
        stream = self._behaviour.stream_of(envelope)
        began, attempt = self._clock.monotonic(), 0
        for attempt in range(1, ATTEMPTS_MAX + 1):
            loaded = await self._fold(Wanted(stream, snapshot_schema=self._schema))
            decision = self._behaviour.decide(Aggregate(self.decider, loaded.state), envelope)
            appends = (Append(stream, loaded.version, decision.events),) if decision.events else ()
            (outcome,) = await self._store.commit(
                [
                    Unit(
                        Claim(self._source, message_id, envelope.key, reply=decision.reply),
                        appends,
                        () if appends else ((stream, loaded.version),),
                    )
                ]
            )
            if outcome.verdict is Verdict.COMMITTED:
                return self._answer(command, message_id, decision.reply)
            if outcome.verdict is Verdict.DUPLICATE:
                return self._answer(command, message_id, outcome.reply)
            if outcome.verdict is Verdict.CANCELLED:
                raise Cancelled(message_id)
            self._metrics.count("foldbus_executions_repeated_total")
            if self._clock.monotonic() - began >= timeout_s:
                break
            least, most = _BACKOFF_S
            backoff = 0.0 if attempt < _AT_ONCE else self._jitter.uniform(0, min(most, least * 2**attempt))
            await asyncio.sleep(backoff)
        self._metrics.count("foldbus_executions_given_up_total")
        raise TooManyConflicts(
            f"{envelope.type} for {stream}", attempts=attempt, seconds=self._clock.monotonic() - began
        )

    async def append(self, key: object, *events: E, expected: ExpectedVersion, id: UUID | None = None) -> Appended:
        """Appends events as they are. `expected` is the version that the writer saw: 0 for a stream that must not
        exist, ANY to opt out.

        With an `id` a second call with the same id, events and expected version changes nothing and gives the first
        result (not with ANY). Raises WrongExpectedVersion when the stream is at another version, StreamArchived when
        it is closed, BadDecision for an event of another key or one that the decider does not evolve on; nothing was
        appended then.
        """
        stream = self.decider.stream(key)
        now, cause = self._clock.now(), id or self._ids.new()
        envelopes: list[Envelope] = []
        for nth, event in enumerate(events):
            if not isinstance(event, self.decider.events) or event.key != stream.id:
                raise BadDecision(
                    f"{type(event).__name__} with key {event.key!r} was appended to {stream}; wanted that key, and one "
                    f"of {', '.join(known.__name__ for known in self.decider.events)}; nothing was stored"
                )
            event_id = uuid5(id, f"event {nth}") if id is not None else self._ids.new()
            topic = f"{self._source}.events" if type(event).public else None
            envelopes.append(self._codec.encode(event, Origin(self._source, event_id, now, cause), topic=topic))
        (outcome,) = await self._store.commit([Unit(appends=(Append(stream, expected, tuple(envelopes)),))])
        if outcome.verdict is not Verdict.COMMITTED:
            raise misfit(outcome) or WrongExpectedVersion(stream, expected=expected, actual=0)
        return Appended(outcome.versions[stream], outcome.position)

    def _answer(self, command: Command[R], id: UUID, reply: Envelope | None) -> R:
        if reply is None:
            raise Died(id, error="its claim has no answer")
        if reply.outcome is ReplyOutcome.DIED:
            raise Died(id, error=died_error(reply))
        value = self._codec.decode_reply(reply, cast("type[Command[Any]]", type(command)))
        if isinstance(value, Refused):
            raise value
        return cast("R", value)


def snapshot_schema(decider: Decider[Any, Any, Any]) -> str | None:
    """Of the snapshots that this decider's streams load with; None: it has none."""
    if decider.snapshots is None:
        return None
    try:
        return decider.state_codec().schema
    except UnfitState:
        return None


@dataclass(frozen=True, slots=True)
class Difference:
    """A snapshot that is not what its events fold to. `stored` is None when it cannot even be read."""

    stream: StreamId
    version: Version
    schema: str
    stored: Any
    folded: Any
    why: str


async def compare_snapshot(
    store: Store, decider: Decider[S, Any, Any], codec: Codec, snapshot: Snapshot
) -> Difference | None:
    """Folds the stream again from its first event up to the snapshot's version, and compares. A difference means that
    `evolve` (or an upcaster) changed and `Decider(version=)` was not raised, or that the row was tampered with.

    None: they are the same, or the snapshot is of another schema and read by nobody. Raises StreamTruncated or
    StreamArchived when the events are gone, NoSuchVersion when it is ahead of its stream.
    """
    if snapshot.schema != snapshot_schema(decider):
        return None
    whole = Repository(decider, store=store, codec=codec)
    folded = await whole.fold_whole(snapshot.stream, upto=snapshot.version)
    states = decider.state_codec()
    stored: Any = None
    try:
        stored = states.load(snapshot.state)
        if type(stored) is type(folded) and stored == folded:
            return None
        why = "the snapshot holds another state than its events fold to"
    except UnreadableSnapshot as error:
        why = str(error)
    return Difference(snapshot.stream, snapshot.version, snapshot.schema, stored, folded, why)


__all__ = [
    "Appended",
    "Difference",
    "Loaded",
    "Repository",
    "Step",
    "compare_snapshot",
    "snapshot_schema",
]
