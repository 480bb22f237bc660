"""The event store beside its peers, all in one run: appends, loads, and the whole log, on PostgreSQL with fsync on.

Every peer is a process of its own (`benchmarks/peers`) with a database of its own in the same server; they take turns,
round by round. The reference of each case is hand-written asyncpg (SQLite's case is in `appends`). The appends are made
once more with a flush of 1 ms emulated (`commit_delay`), since a real disk's is slower than the one at hand may be. A
peer that is not installed, or fails, has a row that says why.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from benchmarks.harness import Row, Setting, Variant, compare
from benchmarks.peers.process import (
    PGBENCH_SCRIPT,
    PGBENCH_TABLE,
    Kind,
    Peer,
    PeerFailed,
    copying,
    find_pgbench,
    kinds,
    pgbench,
    started,
)

SLOW_FLUSH = ("commit_delay = 1000", "commit_siblings = 0")
PGBENCH = "pgbench, INSERT of one row"


async def run(setting: Setting) -> list[Row]:
    rows = await _appends(setting, ())
    rows += await _reads(setting)
    return rows + await _appends(setting, SLOW_FLUSH)


@dataclass(frozen=True, slots=True)
class _Started:
    peers: Mapping[str, Peer]
    absent: Mapping[str, str]
    """Why they are."""
    reference: str


@asynccontextmanager
async def _all_started(
    setting: Setting, chosen: Sequence[Kind], settings: Sequence[str] = ()
) -> AsyncIterator[_Started]:
    """Each in a database of its own; the first is the reference, and must run."""
    peers: dict[str, Peer] = {}
    absent: dict[str, str] = {}
    directory = setting.fresh()
    async with AsyncExitStack() as stack:
        for number, kind in enumerate(chosen):
            if kind.missing is not None:
                absent[kind.name] = f"not installed: {kind.missing}"
                continue
            dsn = await stack.enter_async_context(setting.database())
            await _set(dsn, settings)
            try:
                peers[kind.name] = await stack.enter_async_context(started(kind, dsn, directory / f"{number}.log"))
            except PeerFailed as failure:
                absent[kind.name] = str(failure)
        if chosen[0].name not in peers:
            raise PeerFailed(f"without the reference nothing can be said: {absent[chosen[0].name]}")
        yield _Started(peers, absent, chosen[0].name)


async def _set(dsn: str, settings: Sequence[str]) -> None:
    """For all connections to this database from now on."""
    db = await asyncpg.connect(dsn)
    try:
        name = await db.fetchval("select quote_ident(current_database())")
        for one in settings:
            await db.execute(f"alter database {name} set {one}")
    finally:
        await db.close()


Measure = Callable[[Peer, int], Awaitable[float]]
Figures = Callable[[int], Awaitable[float]]


async def _compared(
    setting: Setting, case: str, running: _Started, measure: Measure, more: Mapping[str, Figures] | None = None
) -> list[Row]:
    """All that run, in turns. Whoever fails has no figures, but a note; the reference must not."""
    absent = dict(running.absent)

    def kept(name: str, figures: Figures) -> Variant:
        async def measured(number: int) -> Mapping[str, float]:
            if name not in absent:
                try:
                    return {"events/s": await figures(number)}
                except PeerFailed as failure:
                    if name == running.reference:
                        raise
                    absent[name] = str(failure)
            return {"events/s": math.nan}

        return measured

    def of(peer: Peer) -> Figures:
        return lambda number: measure(peer, number)

    figures = {name: of(peer) for name, peer in running.peers.items()} | dict(more or {})
    variants = {name: kept(name, one) for name, one in figures.items()}
    rows = await compare(case, variants, floor=running.reference, rounds=setting.rounds, warm_up=True)
    rows = [row for row in rows if row.variant not in absent]
    return rows + [Row(case, name, "events/s", (), note=why) for name, why in absent.items()]


async def _appends(setting: Setting, settings: Sequence[str]) -> list[Row]:
    seconds = setting.pick(1.0, 0.05)
    many = setting.count(1000, 20)
    where = "PostgreSQL, a flush of 1 ms emulated" if settings else "PostgreSQL"
    rows: list[Row] = []
    chosen = kinds()
    async with _all_started(setting, [*chosen, copying(chosen[0])], settings) as running:
        copy = copying(chosen[0]).name
        one = _Started(
            {name: peer for name, peer in running.peers.items() if name != copy}, running.absent, running.reference
        )
        async with _pgbench(setting, settings) as bench:
            for callers in (1, 64):

                async def append(peer: Peer, _: int, callers: int = callers) -> float:
                    return await peer.order("append", callers=callers, seconds=seconds)

                case = f"append one event, {callers} caller{'s' * (callers > 1)}, {where}"
                more, why = await bench(callers, seconds)
                rows += await _compared(setting, case, one, append, more)
                if why:
                    rows.append(Row(case, PGBENCH, "events/s", (), note=why))

        async def bulk(peer: Peer, _: int) -> float:
            return await peer.order("bulk", many=many, seconds=seconds)

        rows += await _compared(setting, f"append {many} events at once, {where}", running, bulk)
    return rows


@asynccontextmanager
async def _pgbench(
    setting: Setting, settings: Sequence[str]
) -> AsyncIterator[Callable[[int, float], Awaitable[tuple[Mapping[str, Figures], str]]]]:
    """What to compare for so many callers, or why there is nothing."""
    program = find_pgbench()
    async with setting.database() as dsn:
        await _set(dsn, settings)
        db = await asyncpg.connect(dsn)
        await db.execute(PGBENCH_TABLE)
        await db.close()
        script: Path = setting.fresh() / "insert.sql"
        script.write_text(PGBENCH_SCRIPT)

        async def variants(callers: int, seconds: float) -> tuple[Mapping[str, Figures], str]:
            if program is None:
                return {}, "not installed: pgbench is neither in PATH nor where Debian puts it"

            async def measured(_: int) -> float:
                return await pgbench(program, dsn, script, clients=callers, seconds=seconds)

            return {PGBENCH: measured}, ""

        yield variants


async def _reads(setting: Setting) -> list[Row]:
    """A stream loaded into typed state, and the whole log. Each peer has the same streams."""
    streams, each = setting.count(20, 2), setting.count(10_000, 30)
    async with _all_started(setting, kinds()) as running:
        filled: dict[str, Peer] = {}
        absent = dict(running.absent)
        for name, peer in running.peers.items():
            try:
                await peer.order("fill", streams=streams, each=each)
                filled[name] = peer
            except PeerFailed as failure:
                absent[name] = str(failure)
        running = _Started(filled, absent, running.reference)

        async def load(peer: Peer, _: int) -> float:
            return await peer.order("load", streams=streams, each=each, seconds=setting.pick(0.5, 0.0))

        async def log(peer: Peer, _: int) -> float:
            return await peer.order("log", events=streams * each)

        rows = await _compared(setting, f"load a stream of {each:,} events into typed state", running, load)
        return rows + await _compared(setting, f"read the whole log of {streams * each:,}, decoded", running, log)
