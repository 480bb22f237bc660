"""`Connection`: a service as the program around it sees it. Send, request, execute, publish, look at read models.

Opened by `Service.connect()` (`connecting.py`); with `worker=True` the service's worker (`worker.py`) runs beside it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Collection
from contextlib import asynccontextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload
from uuid import UUID

from pydantic import BaseModel

from bus.breaker import Circuits
from bus.codec import died_error
from bus.envelope import Envelope, Origin, Position, ReplyOutcome, StreamId, Version
from bus.errors import Cancelled, Died, NoAnswer, NobodyDecides, OutcomeUnknown, QueryFailed
from bus.messages import Command, Event, Message, Query
from bus.metrics import Metrics
from bus.processing import Item
from bus.registry import service_of
from bus.seams import Clock, Failpoint, Ids
from bus.transport import Transport
from eventstore.archiving import misfit
from eventstore.decider import Decider
from eventstore.port import Store, Tx, Unit, Verdict
from eventstore.repository import Loaded, Repository, Step
from foldbus.asking import TOKEN, Receipt, Requests, Status, Unanswered, raised, token_of
from foldbus.executing import Executing
from foldbus.outbox import Inbox, Publisher
from foldbus.querying import Queries, TookTooLong
from foldbus.reading import Recorded, read_events, read_stream
from foldbus.resources import Resources
from foldbus.scheduling import Delayed
from foldbus.snapshotting import Snapshotter
from foldbus.staging import Staging, check_kind
from foldbus.statuses import StatusOf, status_of_other, status_of_own
from foldbus.transactions import in_transaction
from foldbus.views import View

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

    from foldbus.service import Service
    from foldbus.worker import Worker
    from projections import Projection

log = logging.getLogger("foldbus.client")

R = TypeVar("R")
S = TypeVar("S")
Row = TypeVar("Row", bound=BaseModel)


class StagedUnit(Staging):
    """What `Connection.unit()` collects; committed when the context ends without an error."""

    def unit(self) -> Unit:
        return Unit(appends=self.appends, asserts=self.asserts, outgoing=self.outgoing, timers=self.timers)


class Connection:
    """A service, connected. Safe for many tasks at once; closes with its context."""

    def __init__(
        self,
        service: Service,
        *,
        store: Store,
        transport: Transport,
        clock: Clock,
        ids: Ids,
        metrics: Metrics,
        failpoint: Failpoint,
        bus: str = "its bus",
    ) -> None:
        """`bus` is what to call the transport when nobody answers there."""
        self.service, self.store, self.transport, self.bus = service, store, transport, bus
        self.clock, self.ids, self.metrics, self.failpoint = clock, ids, metrics, failpoint
        self.publisher = Publisher(transport)
        self.inbox = Inbox(transport, f"{service.name}.inbox", str(ids.new()), metrics)
        self.requests = Requests(self.publisher, self.inbox, clock=clock, metrics=metrics, bus=bus)
        self.queries = Queries(self, service.queries)
        self.delayed = Delayed(service.name, store, metrics=metrics)
        self.circuits = Circuits(clock=clock, metrics=metrics)
        self.resources = Resources(self)
        self.worker: Worker | None = None
        self._snapshots: Snapshotter | None = None
        self._executing: Executing | None = None

    # --- messages -----------------------------------------------------------------------------------------------

    async def send(
        self,
        command: Command[Any],
        *,
        id: UUID | None = None,
        at: datetime | None = None,
        delay_s: float | None = None,
    ) -> UUID:
        """In the command's topic when it returns: it will be handled. The same `id` again has one effect.

        With `at` or `delay_s` it is stored here and sent then, see `Staging.send` and `cancel_delayed`.

        Raises BadMessageClass, MessageTooLarge, BadDelay, MissingTopics (it was not sent) or OutcomeUnknown (send it
        again with its id); StoreUnavailable where it is delayed.
        """
        if at is not None or delay_s is not None:
            async with self.unit() as unit:
                return unit.send(command, id=id, at=at, delay_s=delay_s)
        envelope = self.envelope(command, topic=f"{check_kind(command, Command)}.commands", id=id)
        await self.publisher.publish(envelope)
        return envelope.id

    async def cancel_delayed(self, id: UUID) -> bool:
        """A delayed message of this service, sent by whichever process or handler, is not sent after all. True: it will
        not be, for certain, also at a second call, and if it is only staged later. False: it was sent before."""
        return await self.delayed.cancel(id)

    @overload
    async def request(
        self,
        command: Command[R],
        *,
        timeout_s: float = ...,
        id: UUID | None = ...,
        receipt: Literal[False] = ...,
        topic: str | None = ...,
    ) -> R: ...

    @overload
    async def request(
        self,
        command: Command[R],
        *,
        timeout_s: float = ...,
        id: UUID | None = ...,
        receipt: Literal[True],
        topic: str | None = ...,
    ) -> Receipt[R]: ...

    @overload
    async def request(self, command: Query[R], *, timeout_s: float = ..., topic: str | None = ...) -> R: ...

    async def request(
        self,
        command: Command[R] | Query[R],
        *,
        timeout_s: float = 5.0,
        id: UUID | None = None,
        receipt: bool = False,
        topic: str | None = None,
    ) -> R | Receipt[R]:
        """Sends, and waits for the typed answer. `topic` None is where the service that owns the command listens. A
        query is asked, see `ask`.

        Raises the `Refused` that the service answered; Died or Cancelled when it was certainly not done; OutcomeUnknown
        when no answer came in `timeout_s`: call again with `id=error.id`, which has no second effect and brings the
        stored answer, if there is one. A command that its service reads only after that time is not begun. Raises
        BadMessageClass or NobodyDecides at once for what no worker could answer.
        """
        if isinstance(command, Query):
            return await self.ask(command, timeout_s=timeout_s, topic=topic)
        owner = check_kind(command, Command)
        if topic is None and owner == self.service.name and not self.service.decides(type(command)):
            raise NobodyDecides(
                f"{command.type_name} belongs to service {owner!r}, and no decider of it takes it; nothing was sent: "
                "put it into the command union of a `decide`, and that decider into the Service"
            )
        envelope = self.envelope(command, topic=topic or f"{owner}.commands", id=id)
        try:
            reply = await self.requests.exchange(envelope, timeout_s=timeout_s)
        except Unanswered as silence:
            self.metrics.count("foldbus_unknown_outcomes_total")
            raise OutcomeUnknown(envelope.id, why=str(silence)) from silence.__cause__
        return self._answer(command, reply, receipt=receipt)

    async def ask(self, query: Query[R], *, timeout_s: float = 5.0, topic: str | None = None) -> R:
        """The answer of the service that owns the query; in this process when that is this service. Changes nothing,
        so it may be asked again at any time.

        Raises the `Refused` that was answered; NoAnswer after `timeout_s`; QueryFailed when another service could not
        answer, what the function raised when this one could not; BadMessageClass or NobodyDecides for what nobody could
        answer, MissingTopics when the owner answers no queries at all.
        """
        owner = check_kind(query, Query)
        if topic is None and owner == self.service.name:
            return await self._ask_here(query, timeout_s)
        envelope = self.envelope(query, topic=topic or f"{owner}.queries")
        try:
            reply = await self.requests.exchange(envelope, timeout_s=timeout_s)
        except Unanswered as silence:
            self.metrics.count("foldbus_unanswered_queries_total")
            raise NoAnswer(envelope.type, why=str(silence)) from silence.__cause__
        if reply.outcome is ReplyOutcome.DIED:
            raise QueryFailed(envelope.type, error=died_error(reply))
        return cast("R", raised(self.service.codec.decode_reply(reply, type(query))))

    async def _ask_here(self, query: Query[R], timeout_s: float) -> R:
        handler = self.queries.handler_of(type(query))
        if handler is None:
            raise NobodyDecides(
                f"{query.type_name} belongs to service {self.service.name!r}, and no query function of it takes it; "
                "nothing was asked: put one into the Service (queries=[…])"
            )
        await self.resources.open()  # left when this connection closes
        try:
            answer = await self.queries.answer(handler, query, within_s=timeout_s)
        except TookTooLong as late:
            self.metrics.count("foldbus_unanswered_queries_total")
            raise NoAnswer(str(query.type_name), why=str(late)) from late.__cause__
        return cast("R", handler.plain(query, answer))

    async def execute(self, command: Command[R], *, id: UUID | None = None, timeout_s: float = 30.0) -> R:
        """Decides here and now, without the bus: committed when it returns. For the service's own commands.

        The same `id` again brings the first answer. Raises the `Refused`, or what the decider raised (nothing was
        committed). Tried again when another process appended in between; TooManyConflicts after `timeout_s` of that.
        """
        check_kind(command, Command)
        if self._executing is None:
            self._executing = Executing(self._own_processor(), clock=self.clock, metrics=self.metrics)
        processor = self._own_processor()
        message_id = id or self.ids.new()
        item = Item(self.envelope(command, topic=None, id=message_id), None)
        decided = any(type(command) in decider.commands for decider in self.service.deciders)
        if not decided:
            await self.resources.open()  # left when this connection closes
        await self._executing.run(item, timeout_s=timeout_s, in_turn=decided)
        (standing,) = await self.store.examine(processor.consumer, [(message_id, command.key)])
        if standing.reply is None:
            raise Died(message_id, error=f"its claim says {standing.state}")
        return cast("R", self._answer(command, standing.reply, receipt=False))

    async def load(
        self,
        decider: Decider[S, Any, Any],
        key: object,
        *,
        at_version: Version | None = None,
        at: datetime | None = None,
    ) -> Loaded[S]:
        """An aggregate as it is committed now, or as it was: see `Repository.load`."""
        return await self._repository(decider).load(key, at_version=at_version, at=at)

    def history(
        self,
        decider: Decider[S, Any, Any],
        key: object,
        *,
        after_version: Version = 0,
        limit: int | None = None,
        backward: bool = False,
    ) -> AsyncGenerator[Step[S]]:
        """What happened to an aggregate, event by event, with the state after each: see `Repository.history`."""
        steps = self._repository(decider).history
        return steps(key, after_version=after_version, limit=limit, backward=backward)

    def read(
        self,
        stream: StreamId,
        *,
        after: Version = 0,
        upto: Version | None = None,
        backward: bool = False,
        limit: int | None = None,
    ) -> AsyncGenerator[Recorded]:
        """The events of one stream (`decider.stream(key)`), read in pages as they are asked for: those with `after` <
        version <= `upto` (None: as far as it goes when the reading begins), ascending, or `backward` descending. At
        most `limit` stored ones. Raises UnknownType for an event that this service does not name, StreamArchived."""
        return read_stream(self, stream, after=after, upto=upto, backward=backward, limit=limit)

    def events(
        self,
        *,
        after: Position = 0,
        types: Collection[type[Event]] | None = None,
        categories: Collection[str] | None = None,
        stream: StreamId | None = None,
        correlation_id: UUID | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        follow: bool = False,
    ) -> AsyncGenerator[Recorded]:
        """The service's log above position `after`, in the order of positions, as far as it goes when the reading
        begins; with `follow` without end: at the log's end it waits for the next event.

        What is given must all hold (see `Where`), and is asked of the database; `types` None: all events that this
        service names. A page is read when the last one is used up, so a slow reader holds up nobody. Raises
        StoreUnavailable: go on with `after=` the last position handled. CheckpointAhead: this log never got there.
        """
        return read_events(
            self, after=after, types=types, categories=categories, stream=stream, correlation_id=correlation_id,
            since=since, until=until, following=follow,
        )  # fmt: skip

    async def status(self, id: UUID, *, of: type[Command[Any]] | str | None = None, timeout_s: float = 5.0) -> Status:
        """What became of a command, whoever sent it; see `Status`. `of` is its class, or the service that owns it (then
        the answer is read if its type is named here); None: this service.

        Another service is asked over the bus, if it answers queries: raises NoAnswer, MissingTopics, QueryFailed.
        """
        codec = self.service.codec
        owner = self.service.name if of is None else of if isinstance(of, str) else service_of(of)
        if owner == self.service.name:
            (standing,) = await self.store.examine(owner, [(id, "")])
            return status_of_own(codec, standing)
        asked = StatusOf(command_id=id)
        found = await self.ask(asked, timeout_s=timeout_s, topic=f"{owner}.queries")
        return status_of_other(codec, found, asked, None if isinstance(of, str) else of)

    @asynccontextmanager
    async def unit(self, *, tx: Tx | AsyncSession | AsyncConnection | None = None) -> AsyncGenerator[StagedUnit]:
        """Stages events and messages and writes them together when the context ends without an error.

        With `tx`, an SQLAlchemy session or connection on the store's own database, they are written in its transaction,
        beside your own rows, and live or die with it: committing is up to you, and best done soon, since readers of the
        log wait for an appender. Raises WrongExpectedVersion when a stream moved on, StreamArchived when it is closed;
        nothing of the unit is written.
        """
        timers = self.store.timers
        staged = StagedUnit(self.service.name, self.envelope, max_bytes=self.transport.max_bytes, store_now=timers.now)
        yield staged
        if staged.delays:
            await timers.next_due()  # a delay counts from now, by the clock of the store: ask what that says
        within = None if tx is None else await in_transaction(tx, self.store)
        (outcome,) = await self.store.commit([staged.unit()], tx=within)
        if staged.delays and self.worker is not None:
            self.worker.wake_timers()
        if outcome.verdict is not Verdict.COMMITTED:
            why = misfit(outcome)
            assert why is not None, outcome
            raise why

    def view(self, projection: Projection[Row]) -> View[Row]:
        """A read model of this service, to look at: `get(key, after=answer)` waits until it has seen that answer."""
        return View(self, projection)

    # --- helpers of the rooms beside this one -------------------------------------------------------------------

    def envelope(
        self,
        message: Message,
        *,
        topic: str | None,
        id: UUID | None = None,
    ) -> Envelope:
        message_id = id or self.ids.new()
        origin = Origin(self.service.name, message_id, self.clock.now(), correlation_id=message_id)
        return self.service.codec.encode(message, origin, topic=topic)

    def _repository(self, decider: Decider[S, Any, Any]) -> Repository[S, Any, Any]:
        return Repository(
            decider, store=self.store, codec=self.service.codec, clock=self.clock, ids=self.ids, metrics=self.metrics
        )

    @property
    def snapshots(self) -> Snapshotter:
        """Of the service's aggregates, for whoever decides here."""
        if self._snapshots is None:
            self._snapshots = Snapshotter(self.service.deciders, self.store, clock=self.clock, metrics=self.metrics)
        return self._snapshots

    async def close_snapshots(self) -> None:
        """What waits to be saved is saved, or dropped after a moment."""
        if self._snapshots is not None:
            await self._snapshots.close()

    def _own_processor(self) -> Any:
        from foldbus.worker import command_processor

        if not hasattr(self, "_processor"):
            self._processor = command_processor(self)
        return self._processor

    def _answer(self, command: Command[R], reply: Envelope, *, receipt: bool) -> R | Receipt[R]:
        if reply.causation_id is None:
            raise OutcomeUnknown(reply.id, why="the answer names no command")
        match reply.outcome:
            case ReplyOutcome.DIED:
                raise Died(reply.causation_id, error=died_error(reply))
            case ReplyOutcome.CANCELLED:
                raise Cancelled(reply.causation_id)
            case ReplyOutcome.UNKNOWN:
                raise OutcomeUnknown(reply.causation_id, why=given_up_begun(died_error(reply)))
            case _:
                value = raised(self.service.codec.decode_reply(reply, type(command)))
        if receipt:
            return Receipt(cast("R", value), reply.token)
        if value is not None and reply.token is not None:
            # Beside the fields: kept out of equality, hash and dump.
            object.__setattr__(value, TOKEN, reply.token)
        return cast("R", value)


def given_up_begun(error: str) -> str:
    return f"it is in the dead letters, given up after its handler had begun to call outside: {error}"


__all__ = ["Connection", "Receipt", "StagedUnit", "Status", "token_of"]
