"""`EmbeddedTransport`: the transport port over one SQLite file, shared by all processes of one machine.

What it promises beyond the port: an acknowledged record survives the death of the process and of the machine
(`synchronous=FULL`); publishes that are under way at once share a transaction. What it does not: several machines, and
freedom from a process that is *stopped* (not killed) in the middle of a write, which holds up every other writer.
"""

from __future__ import annotations

import itertools
import logging
import random
import sqlite3
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from bus.embedded import groups, log
from bus.embedded.consumer import Member, Tail
from bus.embedded.hub import Hub
from bus.embedded.topics import Topics
from bus.embedded.writer import WAL_PAGES, Writer
from bus.envelope import Offset
from bus.errors import BusError, MessageTooLarge, TransportUnavailable
from bus.metrics import MemoryMetrics, Metrics
from bus.partitioner import partition_of
from bus.seams import Clock, SystemClock
from bus.transport import (
    Ack,
    Assignments,
    Consumer,
    Failed,
    Headers,
    Outgoing,
    PollSettings,
    Published,
    Unknown,
)

logger = logging.getLogger("foldbus.bus")

EMBEDDED_SETTINGS = PollSettings(session_timeout_s=3.0, heartbeat_s=0.5, rebalance_timeout_s=20.0)
SCHEMA_VERSION = 1


class EmbeddedTransport:
    """Opened by `open`, used on the event loop that opened it."""

    max_bytes: int = 1_000_000

    def __init__(self, path: Path, settings: PollSettings, clock: Clock, metrics: Metrics, trim_every_s: float) -> None:
        self._path, self._settings, self._clock, self._metrics = path, settings, clock, metrics
        rng = random.Random()
        self._hub: Hub | None = None
        self._writer = Writer(
            path,
            prepare=_prepare,
            tick=self._tick,
            ticked=self._ticked,
            tick_every_s=settings.heartbeat_s,
            deadline_s=settings.publish_deadline_s,
            committed=self._refresh,
            clock=clock,
            rng=rng,
        )
        self._rng = rng
        self._members: set[Member] = set()
        self._keyless = itertools.count()
        self._trim_every_s = trim_every_s
        self._trim_at = clock.monotonic() + trim_every_s * rng.random()
        self.admin = Topics(lambda: self._reads, self._writer, clock, lingers_s=trim_every_s + settings.heartbeat_s * 2)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        path: str | Path,
        *,
        settings: PollSettings = EMBEDDED_SETTINGS,
        clock: Clock | None = None,
        metrics: Metrics | None = None,
        trim_every_s: float = 30.0,
    ) -> AsyncGenerator[EmbeddedTransport]:
        """Opens the file, making it if need be. Retention and compaction are applied every `trim_every_s`.

        Raises TransportUnavailable when the file cannot be used. Leave consumers and tails before it is closed.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        this = cls(path, settings, clock or SystemClock(), metrics or MemoryMetrics(), trim_every_s)
        await this._writer.start()
        try:
            this._hub = Hub(path, clock=this._clock, rng=this._rng, deadline_s=settings.publish_deadline_s)
            this._refresh()
            yield this
        finally:
            await this._writer.close()
            if this._hub is not None:
                this._hub.close()
                this._hub = None

    # --- publish ---------------------------------------------------------------------------------------------------

    async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Published]:
        answers: list[Published | None] = [None] * len(batch)
        lanes: list[int] = []
        rows: list[log.Row] = []
        sent: list[tuple[int, int]] = []
        for n, record in enumerate(batch):
            try:
                topic = self.admin.known(record.topic) or await self.admin.get(record.topic)
                partition = self._partition(record, topic)
                headers = tuple(record.headers)
                self._check_size(record, headers, topic)
            except TransportUnavailable as error:
                answers[n] = Unknown(error)
            except BusError as error:
                self._metrics.count("foldbus_publish_failed_total", topic=record.topic)
                logger.warning("not published to %s: %s", record.topic, error)
                answers[n] = Failed(error)
            else:
                sent.append((n, partition))
                lanes.append(topic.lanes[partition])
                rows.append((record.key, record.value, log.pack_headers(headers)))
        if rows:
            time_us = int(self._clock.now().timestamp() * 1_000_000)
            try:
                offsets = await self._writer.run(
                    lambda conn: log.append(conn, lanes, rows, time_us=time_us), durable=True, rows=len(rows)
                )
            except TransportUnavailable as error:
                self._metrics.count("foldbus_publish_unknown_total", len(rows))
                logger.warning("%d records may not be published: %s", len(rows), error)
                for n, _ in sent:
                    answers[n] = Unknown(error)
            else:
                for (n, partition), offset in zip(sent, offsets, strict=True):
                    answers[n] = Ack(partition, offset)
        return [answer for answer in answers if answer is not None]

    def _partition(self, record: Outgoing, topic: log.Topic) -> int:
        count = len(topic.lanes)
        if record.partition is not None:
            if not 0 <= record.partition < count:
                raise BusError(f"{topic.name} has {count} partitions, no number {record.partition}; nothing was sent")
            return record.partition
        return next(self._keyless) % count if record.key is None else partition_of(record.key, count)

    def _check_size(self, record: Outgoing, headers: Headers, topic: log.Topic) -> None:
        size = len(record.key or b"") + len(record.value or b"")
        for name, value in headers:
            size += len(name) + len(value)
        if size > topic.max_bytes:
            raise MessageTooLarge(f"a record for {topic.name}", size=size, limit=topic.max_bytes)

    # --- consume ---------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def consume(self, group: str, topics: Sequence[str], *, listener: Assignments) -> AsyncGenerator[Consumer]:
        member = Member(
            self._reads,
            self._writer,
            group,
            await self.admin.all(topics),
            listener=listener,
            settings=self._settings,
            clock=self._clock,
            metrics=self._metrics,
        )
        self._members = self._members | {member}  # replaced, not changed: the writer thread walks it
        try:
            await member.join()
            yield member
        finally:
            try:
                await member.leave()
            finally:
                self._members = self._members - {member}

    @asynccontextmanager
    async def tail(
        self, topic: str, *, start: Mapping[int, Offset] | Literal["begin", "end"]
    ) -> AsyncGenerator[Consumer]:
        known = await self.admin.get(topic)
        hub = self._reads
        bounds = await hub.read(lambda conn: log.bounds(conn, known.lanes))
        positions: list[Offset] = []
        for partition, lane in enumerate(known.lanes):
            first, end = bounds[lane]
            positions.append(end if start == "end" else first if start == "begin" else start.get(partition, first))
        hub.refresh()  # it must not know less than the positions do, or they would look out of range
        yield Tail(hub, self._clock, known, positions)

    async def forget_before(self, topic: str, partition: int, offset: Offset) -> None:
        """Drops a partition's records below `offset`, as retention would. Raises MissingTopics."""
        known = await self.admin.get(topic)
        await self._writer.run(lambda conn: log.forget_before(conn, known.lanes[partition], offset))

    # --- inside ----------------------------------------------------------------------------------------------------

    @property
    def _reads(self) -> Hub:
        if self._hub is None:
            raise TransportUnavailable(f"{self._path} is closed")
        return self._hub

    def _refresh(self) -> None:
        if self._hub is not None:
            self._hub.refresh()

    def _tick(self, conn: sqlite3.Connection) -> _Ticked:
        """In the writer thread: leases, and now and then retention."""
        now = self._clock.monotonic()
        alive = [number for member in self._members if (number := member.beats(now)) is not None]
        expelled, overdue = groups.beat(conn, alive, now=now)
        trimmed = 0
        if now >= self._trim_at:
            trimmed = log.trim(conn, now_us=int(self._clock.now().timestamp() * 1_000_000))
            if trimmed < log.TRIMMED_AT_ONCE:  # else there is more: at the next tick
                self._trim_at = now + self._trim_every_s
        return _Ticked(expelled, overdue, trimmed)

    def _ticked(self, what: _Ticked) -> None:
        if what.expelled:
            logger.warning("%s: expelled %d members that missed their time", self._path.name, what.expelled)
            self._metrics.count("foldbus_members_expelled_total", what.expelled)
        if what.overdue:
            logger.warning("%s: took %d partitions that were not let go in time", self._path.name, what.overdue)
            self._metrics.count("foldbus_partitions_overdue_total", what.overdue)
        if what.trimmed:
            self._metrics.count("foldbus_records_trimmed_total", what.trimmed)


@dataclass(frozen=True, slots=True)
class _Ticked:
    expelled: int
    overdue: int
    trimmed: int


def _prepare(conn: sqlite3.Connection) -> None:
    """Makes the file ready; run again as a whole when somebody else was doing so. Raises TransportUnavailable when the
    file was made by a newer version."""
    if conn.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
        raise TransportUnavailable("the embedded bus needs a file system that can share memory (WAL); this one cannot")
    conn.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
    conn.execute("BEGIN IMMEDIATE")
    version = conn.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, SCHEMA_VERSION):
        conn.execute("ROLLBACK")
        raise TransportUnavailable(f"the bus file has schema {version}, this version of Foldbus knows {SCHEMA_VERSION}")
    if version == 0:
        for statement in _statements((resources.files("bus.embedded") / "schema.sql").read_text("utf-8")):
            conn.execute(statement)
        conn.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    conn.execute("COMMIT")


def _statements(script: str) -> Sequence[str]:
    """One by one: `executescript` would commit in between."""
    found: list[str] = []
    pending = ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            found.append(pending)
            pending = ""
    return found
