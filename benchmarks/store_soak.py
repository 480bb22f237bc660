"""python -m benchmarks.store_soak [--seconds S] [--events N] [--store sqlite|postgres] [--seed N] [--restarts N]

Sixteen writers in four processes on one store, with everything that has ever cost a store its events: several events
per append, hot and cold streams, several streams in a unit, transactions that stay open, that hold a transaction id
before they append, that roll back; writer processes killed with SIGKILL in the middle; and the database killed and
started again. Two readers follow the log meanwhile, one in this process and one in another. On PostgreSQL a naive
reader, which takes the highest position for the end, must lose events: a run that it survives has proved nothing.

Every writer keeps a journal, a line before each call and one with its answer. A call without an answer (killed, or the
store unavailable) is made again with the same units until it has one. At the end the account: what was acknowledged is
there, what was refused or rolled back is not, nothing else is; both readers were given exactly what was committed, in
order of position, once, each stream's versions without a hole. A JSON line per second, the account last. Ends with 1 at
a difference.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import signal
import sys
import tempfile
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
from sqlalchemy.exc import SQLAlchemyError

from bus.envelope import Envelope, Kind, StreamId
from eventstore.errors import StoreUnavailable
from eventstore.port import ANY, Append, Claim, Outcome, Store, Unit, Verdict, Wanted
from eventstore.postgres import PostgresStore
from eventstore.sqlite import SqliteStore
from tests.servers import MissingServer, Postgres, start_postgres

SERVICE = "soak"
WRITERS = 4
"""Per process."""
HOT = [StreamId("hot", str(n)) for n in range(6)]
NOON = datetime(2024, 2, 29, 12, tzinfo=UTC)
_NUMBER_BITS = 24
_KIND_EVENT, _KIND_SENT, _KIND_CLAIM = 1, 2, 3


def open_store(where: str) -> AbstractAsyncContextManager[Any]:
    if where.startswith("postgresql:"):
        return PostgresStore.open(where, service=SERVICE, pool_size=6, timeout_s=10)
    return SqliteStore.open(where, service=SERVICE, busy_s=30)


# --- calls: made from a few numbers, so that a journal's line is enough to make the same one again -------------------


@dataclass(frozen=True)
class Spec:
    """One call. `parts`, an append each: stream, expected version (-1: any), events, messages; `units` says how many of
    them each unit has. `fate`: how its transaction is meant to end ("plain": it has none of its own)."""

    number: int
    claimed: bool
    parts: list[tuple[str, str, int, int, int]]
    units: list[int]
    fate: str = "plain"

    @property
    def rows(self) -> int:
        return sum(events + messages for _, _, _, events, messages in self.parts)


def id_of(kind: int, writer: int, number: int, place: int) -> UUID:
    return UUID(int=(kind << 120) | (writer << 64) | (number << 32) | place)


def call_of(id: UUID) -> tuple[int, int]:
    """Writer and number of the call that this row is of."""
    return (id.int >> 64) & 0xFFFF, (id.int >> 32) & 0xFFFFFFFF


def units_of(spec: Spec, writer: int) -> list[Unit]:
    units: list[Unit] = []
    place, at = 0, 0
    for count in spec.units:
        appends: list[Append] = []
        sent: list[Envelope] = []
        for category, name, expected, events, messages in spec.parts[at : at + count]:
            made: list[Envelope] = []
            for _ in range(events):
                place += 1
                made.append(envelope(id_of(_KIND_EVENT, writer, spec.number, place), name, Kind.EVENT, "soak.events"))
            for _ in range(messages):
                place += 1
                sent.append(
                    envelope(id_of(_KIND_SENT, writer, spec.number, place), name, Kind.COMMAND, "soak.commands")
                )
            appends.append(Append(StreamId(category, name), ANY if expected < 0 else expected, tuple(made)))
        claim = None
        if spec.claimed:
            claim = Claim("soak", id_of(_KIND_CLAIM, writer, spec.number, at), f"{writer}-{spec.number}")
        units.append(Unit(claim, tuple(appends), outgoing=tuple(sent)))
        at += count
    return units


def envelope(id: UUID, key: str, kind: Kind, topic: str) -> Envelope:
    return Envelope(id, kind, "soak.happened.v1", SERVICE, key, b'{"n":1}', NOON, id, topic=topic)


# --- writers ---------------------------------------------------------------------------------------------------------


class Writer:
    """One of sixteen. Its own cold streams it knows by heart, hot ones it reads first."""

    def __init__(self, number: int, store: Any, journal: Path, seed: str, large: bool) -> None:
        self.number, self.store, self.large = number, store, large
        self.random = random.Random(f"{seed}-{number}-{journal.stat().st_size if journal.exists() else 0}")
        self.at = 0
        self.cold: dict[str, int] = {}
        self.pending: Spec | None = None
        for kind, line in read_journal(journal):
            if kind == "call":
                self.pending = spec = Spec(**line)
                self.at = spec.number
            else:
                self._learn(self.pending, line)
                self.pending = None
        self._journal = journal.open("ab", buffering=0)  # a line is one write: a killed process leaves it whole

    def _learn(self, spec: Spec | None, answer: str) -> None:
        assert spec is not None
        if answer == "ok":
            for category, name, expected, events, _ in spec.parts:
                if category == "cold":
                    self.cold[name] = expected + events

    def note(self, kind: str, what: Any) -> None:
        self._journal.write(json.dumps([kind, what]).encode() + b"\n")

    async def run(self, until: float) -> None:
        with self._journal:
            if self.pending is not None:
                await self.act(self.pending, again=True)
            while time.time() < until:
                spec = await self.made_up()
                self.note("call", spec.__dict__)
                self.pending = spec
                await self.act(spec, again=False)

    async def made_up(self) -> Spec:
        rnd = self.random
        self.at += 1
        shape = rnd.random()
        most = 120 if self.large else 12
        if shape < 0.25:  # hot, at a version that was read a moment ago: often lost
            (stream,) = rnd.sample(HOT, 1)
            found = await patiently(lambda: self.store.load([Wanted(stream, limit=0)]))
            parts = [("hot", stream.id, found[0].version, rnd.choice((1, 2, 5)), 0)]
            return Spec(self.at, rnd.random() < 0.5, parts, [1], rnd.choice(("plain", "plain", "commit", "rollback")))
        if shape < 0.4:  # hot, at any version
            parts = [("hot", one.id, -1, rnd.choice((1, 3)), 0) for one in rnd.sample(HOT, rnd.choice((1, 2)))]
            return Spec(self.at, True, parts, [len(parts)], rnd.choice(("plain", "plain", "commit")))
        names = rnd.sample([f"{self.number}-{n}" for n in range(12)], rnd.choice((1, 1, 2, 3)))
        parts = [
            ("cold", name, self.cold.get(name, 0), rnd.choice((1, 3, 10, most)), rnd.choice((0, 0, 1, 3)))
            for name in names
        ]
        units = [len(parts)] if rnd.random() < 0.5 else [1] * len(parts)
        fate = rnd.choice(("plain",) * 6 + ("commit", "commit", "earlier", "rollback"))
        return Spec(self.at, rnd.random() < 0.6, parts, units, fate)

    async def act(self, spec: Spec, *, again: bool) -> None:
        """Until there is an answer. What may have been written already is only ever committed, never rolled back."""
        units = units_of(spec, self.number)
        while True:
            try:
                if again or spec.fate == "plain":
                    if again and spec.fate == "rollback":
                        answer = "rolled-back"  # whatever was under way, its end was never asked for
                    else:
                        answer = judged(await self.store.commit(units))
                else:
                    answer = await self.within(spec, units)
                break
            except (StoreUnavailable, SQLAlchemyError):  # the latter from a statement of the writer's own
                again = True
                await asyncio.sleep(0.05 + self.random.random() / 5)
        self.note("answer", answer)
        self.pending = None
        self._learn(spec, answer)

    async def within(self, spec: Spec, units: Sequence[Unit]) -> str:
        rnd = self.random
        hold = rnd.random() * 0.02 if rnd.random() < 0.5 else 0.0
        async with self.store.transaction() as tx:
            if spec.fate == "earlier" and isinstance(self.store, PostgresStore):
                await tx.sql.exec_driver_sql("select pg_current_xact_id()")
            answer = judged(await self.store.commit(units, tx=tx))
            await asyncio.sleep(hold)
            if spec.fate == "rollback" or answer != "ok":
                await tx.sql.rollback()
                return "rolled-back" if answer == "ok" else answer
        return answer


def judged(outcomes: Sequence[Outcome]) -> str:
    """Units of one call stand or fall together here: their streams are one writer's, or there is one unit."""
    found = {outcome.verdict for outcome in outcomes}
    if found <= {Verdict.COMMITTED, Verdict.DUPLICATE}:
        return "ok"
    assert found == {Verdict.CONFLICT}, found
    return "conflict"


async def patiently(ask: Callable[[], Awaitable[Any]]) -> Any:
    while True:
        try:
            return await ask()
        except StoreUnavailable:
            await asyncio.sleep(0.1)


def read_journal(journal: Path) -> Iterator[tuple[str, Any]]:
    if journal.exists():
        for line in journal.read_bytes().splitlines():
            kind, what = json.loads(line)
            if kind == "call":
                what["parts"] = [tuple(part) for part in what["parts"]]
            yield kind, what


async def write(where: str, directory: Path, process: int, seed: str, until: float, large: bool) -> None:
    async with opened(where) as store, asyncio.TaskGroup() as tasks:
        for nth in range(WRITERS):
            number = process * WRITERS + nth
            writer = Writer(number, store, directory / f"writer-{number}.jsonl", seed, large)
            tasks.create_task(writer.run(until))


@asynccontextmanager
async def opened(where: str) -> AsyncIterator[Any]:
    """Also while the database is down: a process that was killed may come back before it."""
    while True:
        async with contextlib.AsyncExitStack() as stack:
            try:
                store = await stack.enter_async_context(open_store(where))
            except StoreUnavailable:
                await asyncio.sleep(0.2)
                continue
            yield store
            return


# --- readers ---------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What a reader was given, in a few bytes per row: positions, and a digest over ids, streams and versions."""

    positions: array[int] = field(default_factory=lambda: array("q"))
    digest: Any = field(default_factory=hashlib.sha256)
    versions: dict[StreamId, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def take(self, record: Envelope) -> None:
        position = record.position or 0
        if self.positions and position <= self.positions[-1]:
            self.fault(f"position {position} after {self.positions[-1]}")
        self.positions.append(position)
        stream, version = record.stream, record.version or 0
        self.digest.update(f"{position} {record.id.hex} {stream} {version}\n".encode())
        if stream is not None:
            if version != self.versions.get(stream, 0) + 1:
                self.fault(f"{stream}: version {version} after {self.versions.get(stream, 0)}")
            self.versions[stream] = version

    def fault(self, what: str) -> None:
        if len(self.faults) < 20:
            self.faults.append(what)

    def summary(self) -> dict[str, Any]:
        return {"rows": len(self.positions), "digest": self.digest.hexdigest(), "faults": self.faults}


async def follow(store: Store, seen: Seen, end: Callable[[], int | None]) -> None:
    """Tails the log until it has passed `end()`. Goes on from the last record, as who keeps no checkpoint has to: a
    position that nobody committed is not sure to stay drawn when a database dies."""
    after = 0
    while (last := end()) is None or after < last:
        try:
            page = await store.read_all(after=after, limit=1000, outgoing=True)
            for record in page.records:
                seen.take(record)
            after = page.upto
            if not page.records:
                await store.wait_past(after, timeout_s=0.2)
        except StoreUnavailable:
            after = seen.positions[-1] if seen.positions else 0
            await asyncio.sleep(0.1)


async def read_apart(where: str, directory: Path) -> None:
    """The reader in another process: a line on its input says where the log ends."""
    ends: list[int] = []
    loop = asyncio.get_running_loop()
    loop.run_in_executor(None, lambda: ends.append(int(sys.stdin.readline() or 0)))
    seen = Seen()
    async with opened(where) as store:
        await follow(store, seen, lambda: ends[0] if ends else None)
    (directory / "positions").write_bytes(seen.positions.tobytes())
    print(json.dumps(seen.summary()), flush=True)


async def read_naively(dsn: str, found: array[int], ended: asyncio.Event) -> None:
    """What everybody writes first: what is above the highest position seen."""
    while True:
        last_round = ended.is_set()
        try:
            db = await asyncpg.connect(dsn, timeout=10)
            try:
                while True:
                    last_round = ended.is_set()
                    sql = f"select position from foldbus_{SERVICE}.events where position > $1 order by 1 limit 5000"
                    rows = await db.fetch(sql, found[-1] if found else 0)
                    found.extend(row[0] for row in rows)
                    if not rows:
                        if last_round:
                            return
                        await asyncio.sleep(0.002)
            finally:
                db.terminate()
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
            await asyncio.sleep(0.1)


# --- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    seconds: float = 60.0
    events: int = 0
    """Goes on until there are so many rows, however long it takes; 0: only the time counts."""
    seed: str = "1"
    processes: int = 4
    kill_every_s: float = 4.0
    restarts: int = 1
    large: bool = False
    """Appends of up to 120 events, for many rows in little time."""


async def child(*arguments: object) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.store_soak", *map(str, arguments),
        cwd=Path(__file__).parents[1], stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip


class Soak:
    """`server` is the PostgreSQL that may be killed; None where `where` is a file."""

    def __init__(
        self, where: str, server: Postgres | None, directory: Path, options: Options, tell: Callable[[Any], None]
    ) -> None:
        self.where, self.server, self.directory, self.options, self.tell = where, server, directory, options, tell
        self.random = random.Random(f"faults-{options.seed}")
        self.facts: dict[str, Any] = {
            "store": "sqlite" if server is None else "postgres", "seed": options.seed, "kills": 0, "restarts": 0,
        }  # fmt: skip
        self.writers: dict[int, asyncio.subprocess.Process] = {}
        self.written: dict[int, int] = {}
        self.until = 0.0
        self.evidence: tuple[Seen, dict[str, Any], array[int]] = (Seen(), {}, array("q"))
        """What the three readers were given."""

    async def run(self) -> dict[str, Any]:
        options = self.options
        began = time.monotonic()
        self.until = time.time() + options.seconds
        seen, naively, ended = Seen(), array("q"), asyncio.Event()
        end: list[int] = []
        apart = await child("read", self.where, self.directory)
        try:
            async with opened(self.where) as store, asyncio.TaskGroup() as tasks:
                tasks.create_task(follow(store, seen, lambda: end[0] if end else None))
                naive = None
                if self.server is not None:
                    naive = tasks.create_task(read_naively(self.where, naively, ended))
                for process in range(options.processes):
                    await self.start_writer(process)
                await self.torment(seen, began)
                for process in list(self.writers.values()):
                    await process.wait()
                await self.settle()
                end.append(await patiently(store.head))
                assert apart.stdin is not None
                apart.stdin.write(f"{end[0]}\n".encode())
                await apart.stdin.drain()
                ended.set()
                if naive is not None:
                    await naive
            said, _ = await asyncio.wait_for(apart.communicate(), 120)
        finally:
            for process in (apart, *self.writers.values()):
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        self.facts["seconds"] = round(time.monotonic() - began, 1)
        self.evidence = (seen, json.loads(said), naively)
        return await self.account(*self.evidence)

    async def start_writer(self, process: int) -> None:
        large = "large" if self.options.large else "small"
        self.written[process] = self.journaled(process)
        self.writers[process] = await child(
            "write", self.where, self.directory, process, self.options.seed, self.until, large
        )

    def journaled(self, process: int) -> int:
        """Bytes that the writers of this process have noted down so far."""
        journals = (self.directory / f"writer-{process * WRITERS + one}.jsonl" for one in range(WRITERS))
        return sum(journal.stat().st_size for journal in journals if journal.exists())

    async def torment(self, seen: Seen, began: float) -> None:
        """Kills a writer process every so often, and the database in between."""
        options, rnd = self.options, self.random
        restarts = [options.seconds * (n + 1) / (options.restarts + 1) for n in range(options.restarts)]
        next_kill, next_line = options.kill_every_s, 1.0
        while time.time() < self.until:
            await asyncio.sleep(0.05)
            now = time.monotonic() - began
            if now >= next_line:
                next_line = now + 1.0
                self.tell({"at": round(now, 1), "read": len(seen.positions), **self.facts})
            for number, process in self.writers.items():
                if process.returncode not in (None, 0, -signal.SIGKILL):
                    raise RuntimeError(f"writer process {number} ended with {process.returncode}")
            number = rnd.randrange(options.processes)
            # Not before it is at work: on a busy machine all would be killed while they start, for ever.
            if now >= next_kill and self.journaled(number) > self.written[number]:
                next_kill = now + options.kill_every_s * (0.5 + rnd.random())
                if self.writers[number].returncode is None:
                    self.writers[number].kill()
                await self.writers[number].wait()
                self.facts["kills"] += 1
                await self.start_writer(number)
            if self.server is not None and restarts and now >= restarts[0]:
                del restarts[0]
                await asyncio.to_thread(self.server.kill)
                await asyncio.sleep(rnd.random())
                await asyncio.to_thread(self.server.start)
                self.facts["restarts"] += 1
            if options.events and len(seen.positions) < options.events and self.until - time.time() < 20:
                self.until += 20  # of writers started from now on; those that end are started again
            for number, process in self.writers.items():
                if process.returncode == 0 and time.time() < self.until - 2:
                    await self.start_writer(number)

    async def settle(self) -> None:
        """A writer that was killed last may have left a call without an answer: it is made again here."""
        async with opened(self.where) as store:
            for number in range(self.options.processes * WRITERS):
                journal = self.directory / f"writer-{number}.jsonl"
                await Writer(number, store, journal, self.options.seed, self.options.large).run(0)

    async def account(self, seen: Seen, apart: dict[str, Any], naively: array[int]) -> dict[str, Any]:
        """What is stored, against the journals and against what was read."""
        found: list[str] = []
        stored, rows = Seen(), {}
        async with opened(self.where) as store:
            after = 0
            while True:
                page = await store.read_all(after=after, limit=5000, outgoing=True)
                for record in page.records:
                    stored.take(record)
                    call = call_of(record.id)
                    rows[call] = rows.get(call, 0) + 1
                if page.upto <= after or page.upto >= page.head:
                    break
                after = page.upto
            count = await self.counted()
        found += [f"the log: {fault}" for fault in stored.faults]
        if count != len(stored.positions):
            found.append(f"{count} rows are in the tables, {len(stored.positions)} in the log")
        answers: dict[str, int] = {}
        for number in range(self.options.processes * WRITERS):
            spec: Spec | None = None
            for kind, what in read_journal(self.directory / f"writer-{number}.jsonl"):
                if kind == "call":
                    spec = Spec(**what)
                    continue
                assert spec is not None
                answers[what] = answers.get(what, 0) + 1
                there = rows.pop((number, spec.number), 0)
                if there != (spec.rows if what == "ok" else 0) and len(found) < 20:
                    found.append(
                        f"call {number}/{spec.number} was answered {what}; {there} of {spec.rows} rows are there"
                    )
                spec = None
            if spec is not None:
                found.append(f"writer {number}: call {spec.number} was never answered")
        found += [f"rows of call {call}, which nobody made" for call in list(rows)[:5]]
        found += [f"the reader in this process: {fault}" for fault in seen.faults]
        found += [f"the reader in another process: {fault}" for fault in apart["faults"]]
        if seen.digest.hexdigest() != stored.digest.hexdigest():
            found.append("the reader in this process: " + differing(seen.positions, stored.positions))
        if apart["digest"] != stored.digest.hexdigest():
            other = array("q")
            other.frombytes((self.directory / "positions").read_bytes())
            found.append("the reader in another process: " + differing(other, stored.positions))
        if self.server is not None:
            missed = len(await self.events() - set(naively))
            self.facts["naive_missed"] = missed
            if not missed:
                found.append("the naive reader lost nothing: this run proves nothing")
        if not {"ok", "conflict", "rolled-back"} <= answers.keys():
            found.append(f"answers were {answers}: this run proves little")
        return self.facts | {"rows": len(stored.positions), "answers": answers, "ok": not found, "differences": found}

    async def counted(self) -> int:
        """Past the store, by hand."""
        if self.server is None:
            import sqlite3

            with contextlib.closing(sqlite3.connect(self.where)) as db:
                sql = "select (select count(*) from foldbus_events) + (select count(*) from foldbus_outgoing)"
                return int(db.execute(sql).fetchone()[0])
        schema = f"foldbus_{SERVICE}"
        sql = f"select (select count(*) from {schema}.events) + (select count(*) from {schema}.outgoing)"
        return int((await self.asked(sql))[0][0])

    async def events(self) -> set[int]:
        return {row[0] for row in await self.asked(f"select position from foldbus_{SERVICE}.events")}

    async def asked(self, sql: str) -> Any:
        db = await asyncpg.connect(self.where)
        try:
            return await db.fetch(sql)
        finally:
            await db.close()


def differing(read: Sequence[int], stored: Sequence[int]) -> str:
    missed, more = sorted(set(stored) - set(read)), sorted(set(read) - set(stored))
    twice = len(read) - len(set(read))
    return f"{len(missed)} missed {missed[:5]}, {len(more)} that are not there {more[:5]}, {twice} twice"


@contextmanager
def place_of(store: str, directory: Path) -> Iterator[tuple[str, Postgres | None]]:
    if store == "sqlite":
        yield str(directory / "soak.sqlite"), None
    else:
        with start_postgres(own=True) as server:
            yield server.dsn, server


async def soak(
    where: str, server: Postgres | None, directory: Path, options: Options, tell: Callable[[Any], None] = lambda _: None
) -> dict[str, Any]:
    """The account of one run on an empty place."""
    store: Any = SqliteStore if server is None else PostgresStore
    await store.migrate(where, service=SERVICE)
    return await Soak(where, server, directory, options, tell).run()


def main() -> int:
    if sys.argv[1:2] == ["write"]:
        where, directory, process, seed, until, large = sys.argv[2:]
        asyncio.run(write(where, Path(directory), int(process), seed, float(until), large == "large"))
        return 0
    if sys.argv[1:2] == ["read"]:
        asyncio.run(read_apart(sys.argv[2], Path(sys.argv[3])))
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store_soak", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--events", type=int, default=0, help="go on until there are so many rows")
    parser.add_argument("--store", choices=["sqlite", "postgres"], help="on this one only")
    parser.add_argument("--seed", default=str(random.SystemRandom().randrange(2**32)))
    parser.add_argument("--restarts", type=int, default=1)
    chosen = parser.parse_args()
    options = Options(chosen.seconds, chosen.events, chosen.seed, restarts=chosen.restarts, large=True)
    for name in (chosen.store,) if chosen.store else ("postgres", "sqlite"):
        try:
            with tempfile.TemporaryDirectory(prefix="foldbus-soak-") as directory:
                with place_of(name, Path(directory)) as (where, server):
                    account = asyncio.run(
                        soak(where, server, Path(directory), options, lambda line: print(json.dumps(line), flush=True))
                    )
        except MissingServer as missing:
            print(missing, file=sys.stderr)
            return 1
        print(json.dumps(account), flush=True)
        if not account["ok"]:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
