"""`Connection`: a service as the program around it sees it. Send, request, execute, publish, look at read models.

Opened by `Service.connect()`; with `worker=True` the service's worker (`worker.py`) runs beside it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast, overload
from uuid import UUID

from pydantic import BaseModel

from bus.codec import died_error
from bus.envelope import Envelope, Origin, Position, ReplyOutcome, ReplyTo, StreamId, Token, Version
from bus.errors import Cancelled, Died, NobodyDecides, OutcomeUnknown, TransportUnavailable
from bus.messages import Command, Event, Message, Refused
from bus.metrics import MemoryMetrics, Metrics
from bus.processing import Item
from bus.seams import Clock, Failpoint, Ids, NoFailpoints, SystemClock, Uuid7Ids
from bus.topics import apply, validate
from bus.transport import Transport
from eventstore.archiving import misfit
from eventstore.decider import Decider
from eventstore.port import ClaimState, Store, Tx, Unit, Verdict
from eventstore.repository import Loaded, Repository, Step
from foldbus.backends import BusUrl, StoreUrl, open_store, open_transport
from foldbus.executing import Executing
from foldbus.outbox import Inbox, Publisher
from foldbus.reading import Recorded, read_events, read_stream
from foldbus.snapshotting import Snapshotter
from foldbus.staging import Staging, check_kind
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


@dataclass(frozen=True, slots=True)
class Receipt(Generic[R]):
    """An answer with the place in the log where it was decided, for `after=`."""

    value: R
    token: Token | None


@dataclass(frozen=True, slots=True)
class Status:
    """What became of a message of this service: its claim's state, and the answer if there is one."""

    state: ClaimState
    reply: Envelope | None


_TOKEN = "_foldbus_token"


def token_of(answer: object) -> Token | None:
    """The token that travelled with an answer; None for None answers, and for models made by hand."""
    if isinstance(answer, Token):
        return answer
    if isinstance(answer, Receipt):
        return answer.token
    return cast("Token | None", getattr(answer, "__dict__", {}).get(_TOKEN))


class StagedUnit(Staging):
    """What `Connection.unit()` collects; committed when the context ends without an error."""

    def unit(self) -> Unit:
        return Unit(appends=self.appends, asserts=self.asserts, outgoing=self.outgoing)


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
    ) -> None:
        self.service, self.store, self.transport = service, store, transport
        self.clock, self.ids, self.metrics, self.failpoint = clock, ids, metrics, failpoint
        self.publisher = Publisher(transport)
        self.inbox = Inbox(transport, f"{service.name}.inbox", str(ids.new()), metrics)
        self.worker: Worker | None = None
        self._snapshots: Snapshotter | None = None
        self._executing: Executing | None = None

    # --- messages -----------------------------------------------------------------------------------------------

    async def send(self, command: Command[Any], *, id: UUID | None = None) -> UUID:
        """In the command's topic when it returns: it will be handled. The same `id` again has one effect.

        Raises BadMessageClass, MessageTooLarge, MissingTopics (it was not sent) or OutcomeUnknown (send it again with
        its id).
        """
        envelope = self.envelope(command, topic=f"{check_kind(command, Command)}.commands", id=id)
        await self.publisher.publish(envelope)
        return envelope.id

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

    async def request(
        self,
        command: Command[R],
        *,
        timeout_s: float = 5.0,
        id: UUID | None = None,
        receipt: bool = False,
        topic: str | None = None,
    ) -> R | Receipt[R]:
        """Sends, and waits for the typed answer. `topic` None is where the service that owns the command listens.

        Raises the `Refused` that the service answered; Died or Cancelled when it was certainly not done; OutcomeUnknown
        when no answer came in `timeout_s`: call again with `id=error.id`, which has no second effect and brings the
        stored answer. Raises BadMessageClass or NobodyDecides at once for what no worker could answer.
        """
        owner = check_kind(command, Command)
        if topic is None and owner == self.service.name and not self.service.decides(type(command)):
            raise NobodyDecides(
                f"{command.type_name} belongs to service {owner!r}, and no decider of it takes it; nothing was sent: "
                "put it into the command union of a `decide`, and that decider into the Service"
            )
        message_id = id or self.ids.new()
        to = ReplyTo(self.inbox.topic, self.inbox.instance, self.inbox.instance)
        deadline = self.clock.now() + timedelta(seconds=timeout_s)
        where = topic or f"{owner}.commands"
        envelope = self.envelope(command, topic=where, id=message_id, reply_to=to, deadline=deadline)
        answer = self.inbox.expect(message_id)
        try:
            async with asyncio.timeout(timeout_s):
                await self.inbox.ready()
                await self.publisher.publish(envelope)
                reply = await asyncio.shield(answer)
        except TimeoutError:
            self.metrics.count("foldbus_unknown_outcomes_total")
            raise OutcomeUnknown(message_id, why=_no_answer(timeout_s, where.rpartition(".")[0])) from None
        except TransportUnavailable as error:
            self.metrics.count("foldbus_unknown_outcomes_total")
            raise OutcomeUnknown(message_id, why=f"the broker does not answer: {error}") from error
        finally:
            self.inbox.forget(message_id)
        return self._answer(command, reply, receipt=receipt)

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

    async def status(self, id: UUID) -> Status:
        """What became of a command of this service, whoever sent it. Standing NEW: it has not been handled (yet)."""
        (standing,) = await self.store.examine(self.service.name, [(id, "")])
        return Status(standing.state, standing.reply)

    @asynccontextmanager
    async def unit(self, *, tx: Tx | AsyncSession | AsyncConnection | None = None) -> AsyncGenerator[StagedUnit]:
        """Stages events and messages and writes them together when the context ends without an error.

        With `tx`, an SQLAlchemy session or connection on the store's own database, they are written in its transaction,
        beside your own rows, and live or die with it: committing is up to you, and best done soon, since readers of the
        log wait for an appender. Raises WrongExpectedVersion when a stream moved on, StreamArchived when it is closed;
        nothing of the unit is written.
        """
        staged = StagedUnit(self.service.name, self.envelope, max_bytes=self.transport.max_bytes)
        yield staged
        within = None if tx is None else await in_transaction(tx, self.store)
        (outcome,) = await self.store.commit([staged.unit()], tx=within)
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
        reply_to: ReplyTo | None = None,
        deadline: Any = None,
    ) -> Envelope:
        message_id = id or self.ids.new()
        origin = Origin(self.service.name, message_id, self.clock.now(), correlation_id=message_id)
        return self.service.codec.encode(message, origin, topic=topic, reply_to=reply_to, deadline=deadline)

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
            case _:
                value = self.service.codec.decode_reply(reply, cast("type[Command[Any]]", type(command)))
        if isinstance(value, Refused):
            raise value
        if receipt:
            return Receipt(cast("R", value), reply.token)
        if value is not None and reply.token is not None:
            # Beside the fields: kept out of equality, hash and dump.
            object.__setattr__(value, _TOKEN, reply.token)
        return cast("R", value)


def _no_answer(timeout_s: float, owner: str) -> str:
    return f"no answer within {timeout_s} s; is a worker of {owner!r} running (foldbus run, or connect(worker=True))?"


@asynccontextmanager
async def connect(
    service: Service,
    *,
    store: str,
    bus: str,
    worker: bool = False,
    migrate: bool | None = None,
    apply_topics: bool | None = None,
    clock: Clock | None = None,
    ids: Ids | None = None,
    metrics: Metrics | None = None,
    failpoint: Failpoint | None = None,
    **options: Any,
) -> AsyncGenerator[Connection]:
    """See `Service.connect`."""
    from foldbus.worker import Worker

    StoreUrl.parse(store)  # before the bus makes its file
    embedded = BusUrl.parse(bus).embedded
    clock, ids, metrics = clock or SystemClock(), ids or Uuid7Ids(), metrics or MemoryMetrics()
    async with AsyncExitStack() as stack:
        transport = await stack.enter_async_context(
            open_transport(
                bus,
                clock=clock,
                metrics=metrics,
                settings=options.pop("poll", None),
                client_id=f"foldbus-{service.name}",
            )
        )
        if apply_topics or (apply_topics is None and embedded):
            await apply(transport.admin, service.topics)
        else:
            await validate(transport.admin, service.topics)
        opened = await stack.enter_async_context(
            open_store(store, service.name, clock=clock, ids=ids, metrics=metrics, migrate=migrate)
        )
        connection = Connection(
            service, store=opened, transport=transport, clock=clock, ids=ids, metrics=metrics,
            failpoint=failpoint or NoFailpoints(),
        )  # fmt: skip
        stack.push_async_callback(connection.publisher.close)
        stack.push_async_callback(connection.inbox.close)
        stack.push_async_callback(connection.close_snapshots)
        if worker:
            connection.worker = Worker(connection, **options)
            await stack.enter_async_context(connection.worker.running())
        yield connection
