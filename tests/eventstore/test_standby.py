"""A hot standby has the rows but not the locks: a reader there would lose what is on its way."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from eventstore.errors import SchemaMismatch
from eventstore.port import Unit
from eventstore.postgres import PostgresStore
from tests.eventstore.stores import SERVICE, append, whole_log
from tests.servers import MissingServer
from tests.servers.missing import Unavailable
from tests.servers.postgres import INSTALL, _from_binaries, _from_wheel
from tests.servers.program import Program, free_ports, listens


def own_server() -> Any:
    """A server of this machine's own programs, also where Docker answers: to be copied, or stopped in parts. The caller
    closes it."""
    tried: list[str] = []
    for way in (_from_binaries, _from_wheel):
        try:
            return way()
        except Unavailable as closed:
            tried.append(str(closed))
    raise MissingServer("PostgreSQL's own programs", tried, install=INSTALL[:2])


@contextmanager
def primary_and_standby() -> Iterator[tuple[str, str]]:
    primary = own_server()
    try:
        with standby_of(primary) as standby:
            yield primary.dsn, standby
    finally:
        primary.close()


@contextmanager
def standby_of(primary: Any) -> Iterator[str]:
    """A streaming copy, made by pg_basebackup; its DSN."""
    binaries, home, user, group = Path(primary._command[0]).parent, primary._home, primary._user, primary._group
    (port,) = free_ports(1)
    data = home / "standby"
    as_user: dict[str, Any] = {"user": user, "group": group, "extra_groups": None if user is None else []}
    environment = {**os.environ, "HOME": str(home), "LC_ALL": "C", "LANG": "C"}
    copied = subprocess.run(
        [str(binaries / "pg_basebackup"), "-d", primary.dsn, "-D", str(data), "-R", "-c", "fast", "--no-sync"],
        capture_output=True, text=True, check=False, cwd=home, env=environment, **as_user,
    )  # fmt: skip
    assert copied.returncode == 0, copied.stderr
    standby = Program(
        [
            str(binaries / "postgres"), "-D", str(data), "-c", f"port={port}", "-c", "listen_addresses=127.0.0.1",
            "-c", f"unix_socket_directories={home / 'socket'}", "-c", "max_connections=200",
            "-c", "max_prepared_transactions=10", "-c", "hot_standby=on",
        ],
        directory=home, log=home / "standby.log",
        ready=lambda said: "ready to accept read-only connections" in said and listens(port),
        user=user, group=group, environment={"HOME": str(home), "LC_ALL": "C", "LANG": "C"},
        stop_signal=signal.SIGINT,
    )  # fmt: skip
    standby.start()
    try:
        yield urlunsplit(urlsplit(primary.dsn)._replace(netloc=f"postgres@127.0.0.1:{port}"))
    finally:
        standby.stop()
        shutil.rmtree(data, ignore_errors=True)


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[str, str]]:
    with primary_and_standby() as dsns:
        yield dsns


@pytest.mark.timeout(300)
async def test_a_reader_on_a_standby_would_lose_what_is_on_its_way_so_it_is_refused(servers: tuple[str, str]) -> None:
    """First the proof that the refusal is needed: on the standby, the watermark passes an open appender."""
    main, dsn = servers
    await PostgresStore.migrate(main, service=SERVICE)
    async with PostgresStore.open(main, service=SERVICE) as primary:
        async with primary.transaction() as tx:
            await primary.commit([Unit(appends=(append("a", 0),))], tx=tx)
            await primary.commit([Unit(appends=(append("b", 0),))])
            await replayed(main, dsn)
            assert await primary.head() == 0
            there = await asyncpg.connect(dsn)
            try:
                safe = await there.fetchval("select safe from foldbus_shop.watermark()")
                visible = await there.fetchval("select min(position) from foldbus_shop.events")
            finally:
                await there.close()
            assert safe >= visible == 2, "position 1 is not there yet, and would never be read"
            with pytest.raises(SchemaMismatch, match="standby"):
                async with PostgresStore.open(dsn, service=SERVICE):
                    pass
        assert [one.position for one in await whole_log(primary)] == [1, 2]


async def replayed(primary: str, standby: str) -> None:
    """Waits until the standby shows what the primary has now."""
    here, there = await asyncpg.connect(primary), await asyncpg.connect(standby)
    try:
        upto = await here.fetchval("select pg_current_wal_insert_lsn()")
        async with asyncio.timeout(30):
            while not await there.fetchval("select pg_last_wal_replay_lsn() >= $1", upto):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    finally:
        here.terminate()
        there.terminate()
