"""The store on one SQLite file: the port, made of the parts beside this file.

Positions follow the order of commits, since there is one writer at a time; a reader needs no gap logic.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from bus.envelope import Offset, Position, StreamId, Version
from bus.metrics import MemoryMetrics, Metrics
from bus.seams import Clock, SystemClock
from eventstore import rows
from eventstore.checks import check_units
from eventstore.errors import CheckpointAhead, EventStoreError
from eventstore.flow import Flow, Inbox
from eventstore.parking import Effects, Parking
from eventstore.port import (
    Archive,
    Bodies,
    DeadLetter,
    Leases,
    Letters,
    Outcome,
    Page,
    Slice,
    Snapshots,
    Standing,
    StreamInfo,
    Timers,
    Tx,
    Unit,
    Verdict,
    Wanted,
    Watermark,
    Where,
)
from eventstore.queued import Lost
from eventstore.selecting import check_where
from eventstore.sqlite import choosing, migrations, reading
from eventstore.sqlite.archive import SqliteArchive
from eventstore.sqlite.database import Mergeable, SqliteDatabase
from eventstore.sqlite.effects import SqliteEffects
from eventstore.sqlite.flow import SqliteFlow, SqliteInbox
from eventstore.sqlite.leases import SqliteLeases
from eventstore.sqlite.letters import SqliteLetters
from eventstore.sqlite.parking import SqliteParking
from eventstore.sqlite.relaying import SqliteRecords
from eventstore.sqlite.session import DriverSession, Session, SqlalchemySession
from eventstore.sqlite.snapshots import SqliteSnapshots
from eventstore.sqlite.timers import SqliteTimers
from eventstore.sqlite.transactions import SqliteTransactions, SqliteTx, fault_of
from eventstore.sqlite.units import Call, ParkedKey, Written, commit_calls
from eventstore.sqlite.watch import Watch

log = logging.getLogger("foldbus.eventstore")

T = TypeVar("T")

_FORGET_AT_ONCE = 5_000


class SqliteStore:
    """Made by `open`, for one event loop; any number of tasks may use it at once."""

    def __init__(self, database: SqliteDatabase, *, service: str, epoch: int, clock: Clock, metrics: Metrics) -> None:
        self.service, self.epoch = service, epoch
        self.epoch_since: datetime | None = None
        self.database = database
        """For row tables beside the store's own: `write` and `read` with plain sqlite3."""
        self._clock, self._metrics = clock, metrics
        self._watch = Watch(database.connect(query_only=True), clock)
        self._leases = SqliteLeases(database, clock, metrics)
        self._timers = SqliteTimers(database, clock)
        self._snapshots = SqliteSnapshots(database)
        self._archive = SqliteArchive(database, clock)
        self._flow = SqliteFlow(database, clock)
        self._inbox = SqliteInbox(database, clock)
        self._letters = SqliteLetters(
            database,
            lambda connection, unit: self.commit_calls(DriverSession(connection), [Call([unit], ())]),
            self._watch.look,
        )
        self._parking = SqliteParking(database, clock, self._commit_unit, self._undoably)
        self._effects = SqliteEffects(database, clock, self._commit_unit, self._undoably)
        self.records = SqliteRecords(database, self._watch.saw)
        self._transactions = SqliteTransactions(database, clock, metrics)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        path: str | PathLike[str],
        *,
        service: str,
        clock: Clock | None = None,
        metrics: Metrics | None = None,
        executor: Executor | None = None,
        busy_s: float = 10.0,
    ) -> AsyncGenerator[SqliteStore]:
        """Opens what `migrate` made; applies nothing. Raises SchemaMismatch.

        `executor` runs the statements (`InlineExecutor` for simulations; by default a writer thread and two readers),
        `busy_s` bounds how long a file locked by another process is tried for.
        """
        clock, metrics = clock or SystemClock(), metrics or MemoryMetrics()
        async with SqliteDatabase.open(
            Path(path), clock=clock, metrics=metrics, executor=executor, busy_s=busy_s
        ) as database:
            epoch = await database.read(lambda connection: migrations.check(connection, database.path, service=service))
            self = cls(database, service=service, epoch=epoch, clock=clock, metrics=metrics)
            since = await database.read(migrations.epoch_since)
            self.epoch_since = None if since is None else rows.instant(since)
            try:
                yield self
            finally:
                self._watch.close()
                await self._transactions.dispose()

    @classmethod
    async def migrate(cls, path: str | PathLike[str], *, service: str) -> None:
        """Creates the file if need be and brings its schema up to date; a second call, or two at once, do no harm.

        Raises SchemaMismatch when the file is another service's or of newer code.
        """
        await asyncio.to_thread(migrations.migrate, Path(path), service=service)

    @classmethod
    async def restored(cls, path: str | PathLike[str], *, service: str) -> int:
        """To be called once after the file came back from a backup: raises the log's epoch and answers it."""
        return await asyncio.to_thread(migrations.raise_epoch, Path(path), service=service)

    # --- units -------------------------------------------------------------------------------------------------------

    async def commit(
        self, units: Sequence[Unit], *, watermarks: Sequence[Watermark] = (), tx: Tx | None = None
    ) -> Sequence[Outcome]:
        check_units(units, watermarks)
        if not units and not watermarks:
            return []
        call = Call(units, watermarks)
        if tx is not None:
            (written,) = await self._within(tx, lambda session: self.commit_calls(session, [call]))
        else:
            written = await self.database.write(_CommitWork(self, call), together=True)
            self._watch.saw(written.head)
        self._tell(written.outcomes)
        return written.outcomes

    def commit_calls(
        self, session: Session, calls: Sequence[Call], *, passing: Collection[ParkedKey] = ()
    ) -> list[Written]:
        """Within a transaction, in whichever thread holds it."""
        now = rows.micros(self._clock.now())
        return commit_calls(session, calls, service=self.service, epoch=self.epoch, now=now, passing=passing)

    def _commit_unit(self, session: Session, unit: Unit, *, passing: Collection[ParkedKey]) -> Written:
        (written,) = self.commit_calls(session, [Call([unit], ())], passing=passing)
        return written

    async def _undoably(self, work: Callable[[Session], Written], *, tx: Tx | None = None) -> Outcome:
        """See `eventstore/sqlite/parking.py`."""
        try:
            if tx is not None:
                written = await self._within(tx, work)
            else:
                written = await self.database.write(lambda connection: work(DriverSession(connection)), together=True)
                self._watch.saw(written.head)
            outcomes = written.outcomes
        except Lost as lost:
            outcomes = [lost.outcome]
        self._tell(outcomes)
        return outcomes[0]

    def _tell(self, outcomes: Sequence[Outcome]) -> None:
        if len(outcomes) == 1 and outcomes[0].verdict is Verdict.COMMITTED:  # nearly always
            self._metrics.count("foldbus_units_total", store="sqlite", verdict="committed")
            return
        for verdict in {outcome.verdict for outcome in outcomes}:
            n = sum(outcome.verdict is verdict for outcome in outcomes)
            self._metrics.count("foldbus_units_total", n, store="sqlite", verdict=str(verdict))
            if verdict is not Verdict.COMMITTED:
                log.debug("%d of %d units: %s", n, len(outcomes), verdict)

    async def read_bodies(self, stream: StreamId, *, after: Version, upto: Version) -> Bodies:
        return await self.database.read(lambda connection: choosing.bodies(connection, stream, after, upto))

    async def examine(self, consumer: str, ids: Sequence[tuple[UUID, str]]) -> Sequence[Standing]:
        return await self.database.read(lambda connection: reading.examine(DriverSession(connection), consumer, ids))

    # --- reading -----------------------------------------------------------------------------------------------------

    async def load(self, wanted: Sequence[Wanted]) -> Sequence[Slice]:
        return await self.database.read(lambda connection: reading.load(connection, wanted))

    async def read_stream(
        self,
        stream: StreamId,
        *,
        after: Version = 0,
        upto: Version | None = None,
        backward: bool = False,
        limit: int | None = None,
    ) -> Slice:
        def find(connection: sqlite3.Connection) -> Slice:
            return choosing.read_stream(connection, stream, after=after, upto=upto, backward=backward, limit=limit)

        return await self.database.read(find)

    async def streams(
        self, *, category: str | None = None, after: StreamId | None = None, limit: int = 1000
    ) -> Sequence[StreamInfo]:
        return await self.database.read(
            lambda connection: choosing.streams(connection, category=category, after=after, limit=limit)
        )

    async def read_all(
        self, *, after: Position, limit: int, outgoing: bool = False, where: Where | None = None
    ) -> Page:
        if limit < 1:
            raise ValueError(f"limit is {limit}; wanted at least 1")
        if where is not None:
            check_where(where, outgoing=outgoing)

        def find(connection: sqlite3.Connection) -> Page:
            if where is not None:
                return choosing.page(connection, where, after=after, limit=limit)
            return reading.page(connection, after=after, limit=limit, outgoing=outgoing)

        page = await self.database.read(find)
        self._watch.saw(page.head)
        if after > page.head:
            raise CheckpointAhead(after, drawn=page.head)
        return page

    async def head(self) -> Position:
        head = await self.database.read(reading.head)
        self._watch.saw(head)
        return head

    async def wait_past(self, position: Position, *, timeout_s: float) -> None:
        await self._watch.past(position, timeout_s=timeout_s)

    async def watermarks(self, group: str) -> Mapping[tuple[str, int], Offset]:
        return await self.database.read(lambda connection: reading.watermarks(connection, group))

    async def forget_outgoing(self, *, upto: Position) -> int:
        def forget(connection: sqlite3.Connection) -> int:
            return connection.execute(
                "DELETE FROM foldbus_outgoing WHERE position IN "
                "(SELECT position FROM foldbus_outgoing WHERE position<=? ORDER BY position LIMIT ?)",
                (upto, _FORGET_AT_ONCE),
            ).rowcount

        forgotten = 0
        while True:  # in pieces: a long deletion would hold up every commit
            piece = await self.database.write(forget, together=True)
            forgotten += piece
            if piece < _FORGET_AT_ONCE:
                return forgotten

    async def dead_letters(
        self, *, after: tuple[datetime, UUID] | None = None, limit: int = 100
    ) -> Sequence[DeadLetter]:
        return await self.database.read(lambda connection: reading.dead_letters(connection, after=after, limit=limit))

    @property
    def leases(self) -> Leases:
        return self._leases

    @property
    def timers(self) -> Timers:
        return self._timers

    @property
    def snapshots(self) -> Snapshots:
        return self._snapshots

    @property
    def archive(self) -> Archive:
        return self._archive

    @property
    def letters(self) -> Letters:
        return self._letters

    @property
    def parking(self) -> Parking:
        return self._parking

    @property
    def effects(self) -> Effects:
        return self._effects

    @property
    def flow(self) -> Flow:
        return self._flow

    @property
    def inbox(self) -> Inbox:
        return self._inbox

    # --- transactions ------------------------------------------------------------------------------------------------

    def transaction(self) -> AbstractAsyncContextManager[Tx]:
        """Holds the file's write lock until it ends: be quick, and commit units with `tx=`; a `commit` without it would
        wait for this very transaction, and raise StoreUnavailable in the end."""
        return self._transaction()

    @asynccontextmanager
    async def _transaction(self) -> AsyncGenerator[Tx]:
        async with self._transactions.begin() as tx:
            yield tx
        self._watch.look()

    def reading(self) -> AbstractAsyncContextManager[Tx]:
        return self._transactions.reading()

    async def take(self, tx: Tx, consumer: str, message_id: UUID, *, key: str | None = None) -> Standing:
        """The file's write lock is all the waiting that there is."""
        try:
            await self._make_sure_it_is_open(tx.sql, own=isinstance(tx, SqliteTx))
            (standing,) = await tx.sql.run_sync(
                lambda connection: reading.examine(SqlalchemySession(connection), consumer, [(message_id, key)])
            )
        except DBAPIError as error:
            raise fault_of(error, self.database.path) from error
        return standing

    def committed(self) -> None:
        self._watch.look()

    async def _within(self, tx: Tx, work: Callable[[Session], T]) -> T:
        """In a user's transaction, of which an exception leaves what was there before."""
        connection = tx.sql
        try:
            await self._make_sure_it_is_open(connection, own=isinstance(tx, SqliteTx))
            await connection.exec_driver_sql("SAVEPOINT foldbus_commit")
            try:
                result = await connection.run_sync(lambda connection: work(SqlalchemySession(connection)))
            except BaseException:
                # A full disk has undone all of it already; so has a cancellation, which takes the connection along.
                with contextlib.suppress(SQLAlchemyError):
                    await connection.exec_driver_sql("ROLLBACK TO foldbus_commit")
                    await connection.exec_driver_sql("RELEASE foldbus_commit")
                raise
            await connection.exec_driver_sql("RELEASE foldbus_commit")
        except DBAPIError as error:
            raise fault_of(error, self.database.path) from error
        return result

    async def _make_sure_it_is_open(self, connection: AsyncConnection, *, own: bool) -> None:
        """A transaction that is not there would make every statement a commit of its own."""
        # SQLAlchemy begins when it executes something, and the driver may put that off until the first write.
        files: list[Any] = list((await connection.exec_driver_sql("PRAGMA database_list")).fetchall())
        driver: Any = (await connection.get_raw_connection()).driver_connection
        if not driver.in_transaction:
            await connection.exec_driver_sql("BEGIN IMMEDIATE")
        if not (driver.in_transaction and connection.in_transaction()):
            raise EventStoreError(f"{self.database.path}: tx is in no transaction; nothing was written")
        if not own:
            main = next((str(file) for _, name, file in files if name == "main"), "")
            if not main or os.path.realpath(main) != os.path.realpath(self.database.path):  # noqa: ASYNC240
                raise EventStoreError(
                    f"tx is a transaction on {main or 'a database in memory'}, wanted one on {self.database.path}; "
                    "nothing was written"
                )


class _CommitWork(Mergeable):
    """One call of `commit`. Those that wait for the writer together are judged and written together."""

    __slots__ = ("_call", "_store")

    def __init__(self, store: SqliteStore, call: Call) -> None:
        self._store, self._call = store, call

    def __call__(self, connection: sqlite3.Connection) -> Written:
        (written,) = self._store.commit_calls(DriverSession(connection), [self._call])
        return written

    @staticmethod
    def merged(works: Sequence[_CommitWork], connection: sqlite3.Connection) -> Sequence[Written]:
        return works[0]._store.commit_calls(DriverSession(connection), [work._call for work in works])


__all__ = ["SqliteStore", "SqliteTx"]
