"""The store on PostgreSQL: one schema per service, units committed by one function call.

What is where: `migrations/sql/` has tables and functions (floor lock and commit are explained there), `units.py` turns
units into the function's arrays, `feed.py` has the watermark and what wakes readers, `pool.py` the connections.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from datetime import datetime
from itertools import islice
from typing import Any, TypeAlias, TypeVar, cast
from uuid import UUID

import asyncpg
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from bus.envelope import Envelope, Offset, Position, StreamId, Version
from bus.metrics import MemoryMetrics, Metrics
from bus.seams import Clock, Ids, SystemClock
from bus.tasks import ended
from eventstore import rows, selecting
from eventstore.checks import check_units
from eventstore.errors import BadUnit, EventStoreError, StoreUnavailable
from eventstore.loading import whole
from eventstore.port import (
    Bodies,
    Claim,
    ClaimState,
    DeadLetter,
    Outcome,
    Page,
    Slice,
    Snapshot,
    Standing,
    StreamInfo,
    Tx,
    Unit,
    Verdict,
    Wanted,
    Watermark,
    Where,
)
from eventstore.postgres import feed, schema
from eventstore.postgres.archive import PostgresArchive
from eventstore.postgres.coalescer import FLUSHERS, Asked, Coalescer, LocksHeld
from eventstore.postgres.effects import PostgresEffects
from eventstore.postgres.errors import DRIVER_ERRORS, READ_ONLY, Trouble, code_of, kind, translated
from eventstore.postgres.flow import PostgresFlow, PostgresInbox
from eventstore.postgres.leases import PostgresLeases
from eventstore.postgres.letters import PostgresLetters
from eventstore.postgres.parking import PostgresParking
from eventstore.postgres.pool import Pool, driver_dsn, make_engine
from eventstore.postgres.reading import PostgresReading, with_token
from eventstore.postgres.relaying import PostgresRecords
from eventstore.postgres.snapshots import PostgresSnapshots
from eventstore.postgres.timers import PostgresTimers
from eventstore.postgres.units import ARGUMENTS, LEAN_ARGUMENTS, STATES, Call
from eventstore.queued import Lost

log = logging.getLogger("foldbus.eventstore")

T = TypeVar("T")
Driver: TypeAlias = "asyncpg.Connection[asyncpg.Record]"  # generic in its type stubs only

_ATTEMPTS = 5
"""How often a call is made that loses to a deadlock or a serialization failure."""
_BACKOFF_S = 0.01


class PostgresTx:
    """See `Tx`. Rows and staged units are written together, or not at all."""

    def __init__(self, sql: AsyncConnection) -> None:
        self.sql = sql
        self.wrote = False


class PostgresStore:
    """One service's database. See the `Store` port for every promise."""

    def __init__(
        self,
        engine: AsyncEngine,
        dsn: str,
        *,
        service: str,
        clock: Clock,
        metrics: Metrics,
        pool_size: int,
        timeout_s: float,
        patience_s: float,
    ) -> None:
        self.service = service
        self.schema = schema.schema_of(service)
        self.epoch = 0
        self.epoch_since: datetime | None = None
        self._pool = Pool(engine, metrics, timeout_s=timeout_s)
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._jitter = random.Random()
        self._wakeups = feed.Wakeups(driver_dsn(dsn), self.schema, metrics)
        self._watermark = feed.Watermark(self._query_watermark, self._wakeups)
        self.leases = PostgresLeases(self._row, self.schema, clock, metrics)
        self.timers = PostgresTimers(self._rows, self.schema, clock)
        self.snapshots = PostgresSnapshots(self._rows, self.schema)
        self.archive = PostgresArchive(self.connection, self.schema)
        self.flow = PostgresFlow(self._rows, self.schema)
        self.inbox = PostgresInbox(self._rows, self.schema)
        self.letters = PostgresLetters(
            self._rows,
            self.connection,
            self._commit_unit,
            self._retried,
            self._wakeups.committed,
            self.schema,
        )
        held = (self._rows, self.examine, self._commit_unit, self._undoably, self.schema)
        self.parking, self.effects = PostgresParking(*held), PostgresEffects(*held)
        self._reading = PostgresReading(self._rows, self._rows_below, self.schema, self._watermark)
        self.records = PostgresRecords(
            self.connection, self._retried, self.schema, self._watermark, timeout_s=timeout_s
        )
        # A flush that is slow lends its place, but others than `commit` want connections too.
        self._coalescer = Coalescer(
            self._commit_alone,
            self._commit_together,
            metrics=metrics,
            clock=clock,
            wait_s=timeout_s,
            flushers=min(FLUSHERS, pool_size),
            lent_max=max(0, pool_size // 2 - FLUSHERS),
            apart_max=max(1, pool_size // 2 - 1),
            patience_s=patience_s,
        )
        self._commit_sql = f"select * from {self.schema}.commit_calls({_places(ARGUMENTS)})"
        # Local to the statement, which is a transaction of its own. It hangs on an argument, so that it comes first.
        self._commit_together_sql = (
            f"select c.* from set_config('lock_timeout', '{round(patience_s * 1000)}', true) as s, "
            f"lateral {self.schema}.commit_calls($1 and s is not null{_places(ARGUMENTS)[2:]}) as c"
        )
        self._commit_one_sql = f"select * from {self.schema}.commit_one({_places(LEAN_ARGUMENTS)})"

    # --- life --------------------------------------------------------------------------------------------------------

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        dsn: str,
        *,
        service: str,
        clock: Clock | None = None,
        ids: Ids | None = None,
        metrics: Metrics | None = None,
        pool_size: int = 10,
        timeout_s: float = 30.0,
        patience_s: float = 0.25,
    ) -> AsyncGenerator[PostgresStore, None]:
        """Raises SchemaMismatch when the database is not what this code works with, StoreUnavailable when it does not
        answer. `timeout_s` bounds each call to the database and the wait for a connection. One more connection than
        `pool_size` listens for other processes' commits. `patience_s` bounds how long calls that share a
        statement wait for a lock together (then each waits alone), and when a slow flush makes room for another."""
        del ids  # nothing here needs new ids
        clock = clock or SystemClock()
        metrics = metrics or MemoryMetrics()
        engine = make_engine(dsn, service=service, pool_size=pool_size, timeout_s=timeout_s)
        store = cls(
            engine,
            dsn,
            service=service,
            clock=clock,
            metrics=metrics,
            pool_size=pool_size,
            timeout_s=timeout_s,
            patience_s=patience_s,
        )
        listening: asyncio.Task[None] | None = None
        try:
            await store._begin()
            listening = asyncio.create_task(store._wakeups.run(), name=f"listen {store.schema}")
            yield store
        finally:
            try:
                await store._coalescer.close()
            finally:
                try:
                    if listening is not None:
                        await ended(listening)
                finally:
                    await store._pool.close()

    @staticmethod
    async def migrate(dsn: str, *, service: str) -> None:
        """Brings the service's schema up to date. Does nothing when it is; several processes may call it at once."""
        await schema.migrate(dsn, service=service)

    @staticmethod
    async def current(dsn: str, *, service: str) -> str | None:
        """The migration that the schema is at; None: there is no schema."""
        return await schema.current(dsn, service=service)

    @staticmethod
    async def upgrade_needed(dsn: str, *, service: str) -> bool:
        return await schema.current(dsn, service=service) != schema.HEAD

    @staticmethod
    async def raise_epoch(dsn: str, *, service: str) -> int:
        """Once after the database was restored from a backup, before services start again. Answers the new epoch."""
        return await schema.raise_epoch(dsn, service=service)

    async def _begin(self) -> None:
        try:
            async with self.connection() as db:
                found = await schema.check(db, service=self.service)
                self.epoch, self.epoch_since = found.epoch, found.epoch_since
        except DRIVER_ERRORS as error:
            raise translated(error, doing=f"open {self.schema}") from error
        await self.timers.next_due()  # how far the database's clock is from ours

    def connection(self) -> AbstractAsyncContextManager[Driver]:
        """A driver connection from the pool, in autocommit. One left inside a transaction is closed, not reused."""
        return self._pool.connection()

    # --- commit ------------------------------------------------------------------------------------------------------

    async def commit(
        self, units: Sequence[Unit], *, watermarks: Sequence[Watermark] = (), tx: Tx | None = None
    ) -> Sequence[Outcome]:
        check_units(units, watermarks)
        if not units and not watermarks:
            return []
        if tx is not None:
            return await self._commit_within(self._rows_of(units, watermarks), tx)
        return await self._coalescer.commit(units, watermarks)

    def _rows_of(
        self, units: Sequence[Unit], watermarks: Sequence[Watermark], lengths: Sequence[int] | None = None
    ) -> Call:
        return Call(units, watermarks, service=self.service, epoch=self.epoch, lengths=lengths)

    async def _commit_alone(self, units: Sequence[Unit], watermarks: Sequence[Watermark]) -> Sequence[Outcome]:
        try:
            return await self._commit_call(self._rows_of(units, watermarks))
        except _DataTrouble as trouble:
            return await self._commit_one_by_one(units, watermarks, trouble)

    async def _commit_together(self, calls: Sequence[Asked]) -> Sequence[Sequence[Outcome]]:
        units = [unit for asked in calls for unit in asked.units]
        watermarks = [mark for asked in calls for mark in asked.watermarks]
        lengths = [len(asked.units) for asked in calls]
        outcomes = iter(await self._commit_call(self._rows_of(units, watermarks, lengths)))
        return [list(islice(outcomes, length)) for length in lengths]

    async def _commit_call(self, call: Call) -> Sequence[Outcome]:
        async def act() -> Sequence[Outcome]:
            try:
                async with self.connection() as db:
                    return await self._call(db, call)
            except asyncpg.LockNotAvailableError as error:
                if not call.impatient:
                    raise
                raise LocksHeld(f"waited for a lock of somebody else; nothing was written: {error}") from error

        outcomes = await self._retried(act, doing="commit")
        if any(outcome.verdict is Verdict.COMMITTED for outcome in outcomes):
            self._wakeups.committed()
        return outcomes

    async def _call(self, db: Driver, call: Call) -> Sequence[Outcome]:
        if not call.impatient and (lean := call.lean_arguments()) is not None:
            answer = cast("asyncpg.Record", await db.fetchrow(self._commit_one_sql, *lean, timeout=self._timeout_s))
            if answer["written"]:
                return [call.lean_outcome(answer["at"])]
        arguments = call.arguments()
        sql = self._commit_together_sql if call.impatient else self._commit_sql
        answer = cast("asyncpg.Record", await db.fetchrow(sql, *arguments, timeout=self._timeout_s))
        outcomes = call.outcomes(answer)
        if answer["verdicts"] is not None:
            await self._answer_duplicates(db, call.units, outcomes)
        return outcomes

    async def _answer_duplicates(self, db: Driver, units: Sequence[Unit], outcomes: list[Outcome]) -> None:
        asked: dict[str, list[int]] = {}
        for nth, (unit, outcome) in enumerate(zip(units, outcomes, strict=True)):
            if outcome.verdict is Verdict.DUPLICATE and unit.claim is not None:
                asked.setdefault(unit.claim.consumer, []).append(nth)
        for consumer, places in asked.items():
            ids = [(cast(Claim, units[nth].claim).message_id, None) for nth in places]
            for nth, standing in zip(places, await self._examine(db, consumer, ids), strict=True):
                outcomes[nth] = replace(outcomes[nth], reply=standing.reply)

    async def _commit_within(self, call: Call, tx: Tx) -> Sequence[Outcome]:
        outcomes = await self._within(tx, lambda db: self._call(db, call), doing="commit within a transaction")
        if isinstance(tx, PostgresTx):
            tx.wrote = True
        return outcomes

    async def take(self, tx: Tx, consumer: str, message_id: UUID, *, key: str | None = None) -> Standing:
        async def take(db: Driver) -> Standing:
            # Two numbers: a key space apart from the floor lock's. A collision makes somebody come back, no more.
            lock = "select pg_try_advisory_xact_lock(hashtext($1), hashtext($2))"
            if not await db.fetchval(lock, consumer, message_id.hex, timeout=self._timeout_s):
                return Standing(ClaimState.STARTED)
            # A statement, and so a snapshot, of its own: it sees what the one waited for has committed.
            (standing,) = await self._examine(db, consumer, [(message_id, key)])
            return standing

        return await self._within(tx, take, doing="take a message")

    def committed(self) -> None:
        self._wakeups.committed()

    async def _within(self, tx: Tx, act: Callable[[Driver], Awaitable[T]], *, doing: str) -> T:
        try:
            pooled = await tx.sql.get_raw_connection()
            db = cast("Driver", pooled.driver_connection)
            if not isinstance(cast("object", db), asyncpg.Connection):
                raise EventStoreError(
                    f"tx is a connection of {type(db).__module__}; wanted one of asyncpg (postgresql+asyncpg://…); "
                    "nothing was written"
                )
            if not db.is_in_transaction():
                # SQLAlchemy begins a transaction when it first executes something itself. (It refuses to, when the
                # caller has ended the transaction of the context that it is still in.)
                await tx.sql.exec_driver_sql("select 1")
            if not db.is_in_transaction():
                raise EventStoreError("the connection is in autocommit; wanted a transaction, nothing was written")
            return await act(db)
        except InvalidRequestError as error:
            raise EventStoreError(f"this transaction has ended, nothing was written: {error}") from error
        except DRIVER_ERRORS as error:
            if kind(error) is Trouble.DATA:
                raise BadUnit(f"the database cannot hold a value of these units: {error}") from error
            raise translated(error, doing=doing) from error
        except asyncio.CancelledError:
            await tx.sql.invalidate()  # in the middle of a statement: the transaction is gone with its connection
            raise

    async def _commit_one_by_one(
        self, units: Sequence[Unit], watermarks: Sequence[Watermark], trouble: _DataTrouble
    ) -> Sequence[Outcome]:
        """The database refused a value somewhere in the call. Units of one stream or key stay in order; the bad one is
        named, the others are written. Watermarks are not: who does not know the outcomes must not move on."""
        if len(units) <= 1:
            raise BadUnit(f"the database cannot hold a value of this unit: {trouble.error}") from trouble.error
        self._metrics.count("foldbus_store_calls_split_total")
        bad: list[str] = []
        for nth, unit in enumerate(units):
            try:
                await self._commit_alone([unit], ())
            except BadUnit as error:
                log.warning("unit %d of a call of %d cannot be stored: %s", nth, len(units), error)
                bad.append(f"unit {nth} of {len(units)}: {error}")
        if not bad:  # then it was a watermark
            raise BadUnit(f"the database cannot hold a watermark: {trouble.error}") from trouble.error
        raise BadUnit("; ".join(bad) + "; the other units were committed alone") from trouble.error

    async def _undoably(
        self, work: Callable[[Driver], Awaitable[Outcome]], *, doing: str, tx: Tx | None = None
    ) -> Outcome:
        """See `eventstore/postgres/parking.py`."""

        async def apart() -> Outcome:
            async with self.connection() as db:
                try:
                    async with db.transaction():
                        return await work(db)
                except Lost as lost:
                    return lost.outcome

        async def within(db: Driver) -> Outcome:
            await db.execute("savepoint foldbus_undoably")
            try:
                outcome = await work(db)
                # For what the caller commits next in this transaction, a parked key is parked.
                await db.execute(f"select {self.schema}.let_pass('{{}}')")
            except Lost as lost:
                await db.execute("rollback to foldbus_undoably")
                outcome = lost.outcome
            await db.execute("release foldbus_undoably")
            return outcome

        if tx is not None:
            outcome = await self._within(tx, within, doing=doing)
            if isinstance(tx, PostgresTx):
                tx.wrote = True
            return outcome
        try:
            outcome = await self._retried(apart, doing=doing)
        except _DataTrouble as trouble:
            raise BadUnit(f"the database cannot hold a value of this unit: {trouble.error}") from trouble.error
        if outcome.verdict is Verdict.COMMITTED:
            self._wakeups.committed()
        return outcome

    async def _commit_unit(self, db: Driver, unit: Unit) -> Outcome:
        (outcome,) = await self._call(db, self._rows_of([unit], ()))
        return outcome

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[PostgresTx, None]:
        inside: BaseException | None = None
        try:
            async with self._pool.sql() as sql:
                async with sql.begin():
                    tx = PostgresTx(sql)
                    await sql.exec_driver_sql(
                        "select 1"
                    )  # now it has truly begun, also for the driver's own statements
                    try:
                        yield tx
                    except BaseException as error:
                        inside = error
                        raise
        except DRIVER_ERRORS as error:
            if error is inside:  # the caller's own statement
                raise
            raise translated(error, doing="begin or end a transaction") from error
        finally:
            self._wakeups.committed()

    @asynccontextmanager
    async def reading(self) -> AsyncGenerator[PostgresTx, None]:
        inside: BaseException | None = None
        try:
            async with self._pool.sql() as sql, sql.begin():
                await sql.exec_driver_sql("set transaction isolation level repeatable read, read only")
                try:
                    yield PostgresTx(sql)
                except BaseException as error:
                    inside = error
                    raise
        except DRIVER_ERRORS as error:
            passing = kind(error) in (Trouble.UNAVAILABLE, Trouble.RACE) and code_of(error) != READ_ONLY
            if error is inside and not passing:  # the statement itself, for example one that writes
                raise
            raise translated(error, doing="read in a transaction") from error

    # --- reading -----------------------------------------------------------------------------------------------------

    async def load(self, wanted: Sequence[Wanted]) -> Sequence[Slice]:
        arguments: list[Any] = [
            [one.stream.category for one in wanted],
            [one.stream.id for one in wanted],
            [one.after for one in wanted],
            [one.limit for one in wanted],
        ]
        if any(one.snapshot_schema is not None for one in wanted):
            arguments.append([one.snapshot_schema for one in wanted])
        # Id and time as they are on the wire: see `_LEAN` in reading.py. A snapshot's time is read as it is.
        found = await self._rows(
            f"""select ord, stream_version, uuid_send(id) as id, type, key, topic, timestamptz_send(made_at) as time,
                       case when id is null then made_at end as made_at, data, meta, version, pos
                  from {self.schema}.load({_places(len(arguments))})""",
            *arguments,
        )
        versions = [0] * len(wanted)
        records: list[list[Envelope]] = [[] for _ in wanted]
        snapshots: list[Snapshot | None] = [None] * len(wanted)
        for row in found:
            nth, stream_version, id, type, key, topic, time, made_at, data, meta, version, position = row
            place: int = nth - 1
            versions[place] = stream_version
            if id is not None:
                stream = wanted[place].stream
                records[place].append(
                    rows.lean_envelope(id, type, key, topic, data, time, meta, stream, version, position)
                )
            elif version is not None:
                one = wanted[place]
                snapshots[place] = Snapshot(one.stream, version, str(one.snapshot_schema), data, made_at)
        for one, version in zip(wanted, versions, strict=True):
            selecting.check_version(one.stream, version)
        return [
            whole(one, Slice(one.stream, version, events, snapshot))
            for one, version, events, snapshot in zip(wanted, versions, records, snapshots, strict=True)
        ]

    async def read_bodies(self, stream: StreamId, *, after: Version, upto: Version) -> Bodies:
        return await self._reading.read_bodies(stream, after=after, upto=upto)

    async def examine(self, consumer: str, ids: Sequence[tuple[UUID, str | None]]) -> Sequence[Standing]:
        async def ask() -> Sequence[Standing]:
            async with self.connection() as db:
                return await self._examine(db, consumer, ids)

        return await self._retried(ask, doing="examine")

    async def _examine(self, db: Driver, consumer: str, ids: Sequence[tuple[UUID, str | None]]) -> list[Standing]:
        """Without a key it is not asked whether that is parked."""
        asked = ([id for id, _ in ids], [key for _, key in ids])
        sql = f"select * from {self.schema}.examine($1, $2, $3)"
        standings: list[Standing] = []
        for _, state, document, data, last_event, last_public, started in await db.fetch(
            sql, consumer, *asked, timeout=self._timeout_s
        ):
            reply = None
            if document is not None:
                reply = with_token(rows.from_document(document, data), last_event, last_public)
            standings.append(Standing(STATES[state], reply, started))
        return standings

    async def read_stream(
        self,
        stream: StreamId,
        *,
        after: Version = 0,
        upto: Version | None = None,
        backward: bool = False,
        limit: int | None = None,
    ) -> Slice:
        return await self._reading.read_stream(stream, after=after, upto=upto, backward=backward, limit=limit)

    async def streams(
        self, *, category: str | None = None, after: StreamId | None = None, limit: int = 1000
    ) -> Sequence[StreamInfo]:
        return await self._reading.streams(category=category, after=after, limit=limit)

    async def read_all(
        self, *, after: Position, limit: int, outgoing: bool = False, where: Where | None = None
    ) -> Page:
        return await self._reading.read_all(after=after, limit=limit, outgoing=outgoing, where=where)

    async def head(self) -> Position:
        return await self._watermark.fresh()

    async def wait_past(self, position: Position, *, timeout_s: float) -> None:
        await feed.wait_past(self._watermark, self._wakeups, position, timeout_s=timeout_s)

    async def watermarks(self, group: str) -> Mapping[tuple[str, int], Offset]:
        sql = f'select topic, partition, "offset" from {self.schema}.watermarks where "group" = $1'
        return {(topic, partition): offset for topic, partition, offset in await self._rows(sql, group)}

    async def forget_outgoing(self, *, upto: Position) -> int:
        # Only below the watermark: the relay never got further, whatever it says.
        head = await self._watermark.fresh()
        sql = f"""with gone as (delete from {self.schema}.outgoing where position <= $1 returning 1)
                  select count(*) from gone"""
        return int((await self._row(sql, min(upto, head)))[0])

    async def dead_letters(
        self, *, after: tuple[datetime, UUID] | None = None, limit: int = 100
    ) -> Sequence[DeadLetter]:
        later, arguments = ("where (failed_at, id) > ($2, $3)", after) if after is not None else ("", ())
        sql = f"""select consumer, id, key, value, failed_at, document from {self.schema}.dead_letters {later}
                   order by failed_at, id, consumer limit $1"""
        return [rows.dead_letter(*row) for row in await self._rows(sql, limit, *arguments)]

    # --- asking ------------------------------------------------------------------------------------------------------

    async def _query_watermark(self) -> tuple[Position, Position, object]:
        async def ask() -> tuple[Position, Position, object]:
            async with self.connection() as db:
                sql = f"select safe, drawn from {self.schema}.watermark()"
                row = cast("asyncpg.Record", await db.fetchrow(sql, timeout=self._timeout_s))
                return row["safe"], row["drawn"], db

        return await self._retried(ask, doing="ask for the watermark")

    async def _rows(self, sql: str, *arguments: Any) -> Sequence[asyncpg.Record]:
        async def ask() -> Sequence[asyncpg.Record]:
            async with self.connection() as db:
                return await db.fetch(sql, *arguments, timeout=self._timeout_s)

        return await self._retried(ask, doing="ask the database")

    async def _rows_below(self, sql: str, after: Position, limit: int) -> Sequence[asyncpg.Record]:
        """See `PostgresReading`. What was safe once is so until the server crashes, and so for a connection that has
        lived since: when it answers, there was no crash."""

        async def ask() -> Sequence[asyncpg.Record]:
            async with self.connection() as db:
                known = self._watermark.vouched(db)
                if known is None or known - after < limit:
                    return ()
                return await db.fetch(sql, after, known, limit, timeout=self._timeout_s)

        return await self._retried(ask, doing="ask the database")

    async def _row(self, sql: str, *arguments: Any) -> Any:
        found = await self._rows(sql, *arguments)
        return found[0] if found else None

    async def _retried(self, act: Callable[[], Awaitable[T]], *, doing: str) -> T:
        """Once more, with jitter, after a deadlock or serialization failure: nothing was written then."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await act()
            except DRIVER_ERRORS as error:
                trouble = kind(error)
                if trouble is Trouble.DATA:
                    raise _DataTrouble(error) from error
                self._metrics.count("foldbus_store_errors_total", trouble=trouble.value)
                if trouble is not Trouble.RACE or attempt == _ATTEMPTS:
                    raise translated(error, doing=doing) from error
                self._metrics.count("foldbus_store_retries_total")
                log.info("%s lost a race (attempt %d of %d): %s", doing, attempt, _ATTEMPTS, error)
                await asyncio.sleep(_BACKOFF_S * 2**attempt * self._jitter.random())
        raise StoreUnavailable(f"{doing}: gave up")


def _places(count: int) -> str:
    return ", ".join(f"${n}" for n in range(1, count + 1))


class _DataTrouble(EventStoreError):
    def __init__(self, error: BaseException) -> None:
        super().__init__(f"the database cannot hold a value: {error}")
        self.error = error
