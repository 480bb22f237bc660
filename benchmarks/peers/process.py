"""A peer as seen by the benchmark: a process that takes one order at a time. pgbench is none: it is run each time."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.peers.install import NODE, PYTHON, REFERENCE, missing
from tests.servers.postgres import DEBIAN

ROOT = Path(__file__).parents[2]


class PeerFailed(Exception):
    """A peer could not do what it was told, or died. `str` is what it said."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How a peer is started; `missing` says why it cannot be."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    missing: str | None = None


def kinds() -> list[Kind]:
    """All of them, the reference first, whether they are installed or not."""
    here = [sys.executable, "-m"]
    orjson = missing(REFERENCE) is None
    reference = {"PYTHONPATH": str(REFERENCE)} if orjson else {}
    decoder = "orjson" if orjson else "json (orjson: run `make bench-peers`)"
    peers = str(PYTHON / "bin" / "python")
    return [
        Kind(f"asyncpg + {decoder}", [*here, "benchmarks.peers.run_asyncpg"], reference),
        Kind("Foldbus", [*here, "benchmarks.peers.run_foldbus"]),
        Kind("eventsourcing 9.5.6", [peers, "-m", "benchmarks.peers.run_eventsourcing"], missing=missing(PYTHON)),
        Kind("eventsource-py 0.15.1", [peers, "-m", "benchmarks.peers.run_eventsource_py"], missing=missing(PYTHON)),
        Kind("Emmett 0.42.0", [shutil.which("node") or "node", str(NODE / "emmett.mjs")], missing=missing(NODE)),
    ]


def copying(reference: Kind) -> Kind:
    """The reference with COPY in place of `unnest`."""
    return Kind("asyncpg, COPY", reference.command, {**reference.environment, "FOLDBUS_BENCH_COPY": "1"})


class Peer:
    def __init__(self, name: str, process: asyncio.subprocess.Process, errors: Path) -> None:
        self.name, self._process, self._errors = name, process, errors

    async def order(self, op: str, **details: Any) -> float:
        """Obeyed; the answer is its figure. Raises PeerFailed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"op": op, **details}).encode() + b"\n")
        await self._process.stdin.drain()
        line = await self._process.stdout.readline()
        if not line:
            said = self._errors.read_text(errors="replace").strip().splitlines()
            raise PeerFailed(f"{self.name} ended at {op!r}: {' / '.join(said[-2:])[:300]}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerFailed(f"{self.name} could not {op}: {answer['error']}")
        return float(answer["value"])


@asynccontextmanager
async def started(kind: Kind, dsn: str, errors: Path) -> AsyncIterator[Peer]:
    """`errors` is a file of its own for what the peer says besides its answers. Raises PeerFailed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with errors.open("wb") as said:
        process = await asyncio.create_subprocess_exec(
            *kind.command,
            cwd=ROOT,
            env={**environment, **kind.environment, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=said,
        )
    try:
        peer = Peer(kind.name, process, errors)
        await peer.order("open", dsn=dsn)
        yield peer
    finally:
        if process.stdin is not None:
            process.stdin.close()  # its orders have ended
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            process.kill()
            await process.wait()


def find_pgbench() -> str | None:
    """In PATH, else the newest of Debian's."""
    found = sorted(DEBIAN.glob("*/bin/pgbench"), key=lambda path: float(path.parts[-3]))
    return shutil.which("pgbench") or (str(found[-1]) if found else None)


PGBENCH_TABLE = """create table pgbench_raw (
    position bigint generated always as identity primary key, stream text not null, version bigint not null,
    data bytea not null, unique (stream, version))"""
PGBENCH_SCRIPT = (
    'insert into pgbench_raw (stream, version, data) values (gen_random_uuid()::text, 1, \'{"text":"'
    + "x" * 180
    + "\"}'::bytea);\n"
)


async def pgbench(program: str, dsn: str, script: Path, *, clients: int, seconds: float) -> float:
    """One-row inserts per second. Below a second, a fixed small number of them. Raises PeerFailed."""
    # At least three seconds: the time in which its clients connect is part of them, and not of the figure.
    how = ["-T", str(max(3, round(seconds)))] if seconds >= 1 else ["-t", "10"]
    parts = urlsplit(dsn)
    process = await asyncio.create_subprocess_exec(
        *(program, "-n", "-M", "prepared", "-f", str(script), "-c", str(clients), "-j", "1", *how),
        *("-h", parts.hostname or "", "-p", str(parts.port or 5432), "-U", parts.username or "postgres"),
        parts.path.lstrip("/"),
        env={**os.environ, "PGPASSWORD": parts.password or ""},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    found = re.search(rb"tps = ([0-9.]+) \(without", said)
    if process.returncode != 0 or found is None:
        raise PeerFailed(f"pgbench: {said.decode(errors='replace').strip()[-300:]}")
    return float(found[1])
