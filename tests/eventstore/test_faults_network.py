"""The connection breaks at the worst moment: the outcome is unknown, and the same call again finds out.

A proxy stands between store and server. It lets a statement through and cuts when the server has answered (it is done,
and nobody was told), or cuts before the server has seen it (it never happened). A caller cannot tell the two apart.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit

import pytest
import pytest_asyncio
from sqlalchemy import text

from bus.metrics import MemoryMetrics
from eventstore.errors import StoreUnavailable
from eventstore.port import ANY, Unit, Verdict, Watermark
from eventstore.postgres import PostgresStore
from tests.eventstore.stores import (
    SERVICE,
    append,
    claim,
    commit,
    event,
    message,
    one,
    reply,
    stream,
    version,
    whole_log,
)


@dataclass
class Proxy:
    """`cut` names where the next statement that contains `on` breaks off: "before" or "after" the server's work."""

    host: str
    port: int
    cut: str | None = None
    on: bytes = b""
    cuts: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def handle(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection(self.host, self.port)
        state = {"armed": False}

        async def up() -> None:
            while data := await client.read(65536):
                if self.cut is not None and self.on in data:
                    if self.cut == "before":
                        self._hit()
                        return
                    state["armed"] = True
                to_server.write(data)
                await to_server.drain()

        async def down() -> None:
            while data := await server.read(65536):
                # ReadyForQuery ends an answer: with it, the statement is over and, in autocommit, committed.
                if state["armed"] and data[-6:-2] == b"Z\x00\x00\x00":
                    self._hit()
                    return
                if state["armed"]:
                    continue
                to_client.write(data)
                await to_client.drain()

        both = [asyncio.create_task(up()), asyncio.create_task(down())]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            for writer in (to_client, to_server):
                writer.transport.abort()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    def _hit(self) -> None:
        self.cut = None
        self.cuts += 1

    def accept(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self.handle(client, to_client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def proxied(dsn: str) -> AsyncIterator[tuple[Proxy, str]]:
    where = urlsplit(dsn)
    proxy = Proxy(where.hostname or "127.0.0.1", where.port or 5432)
    server = await asyncio.start_server(proxy.accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    credentials = where.netloc.rpartition("@")[0]
    netloc = f"{credentials}@127.0.0.1:{port}" if credentials else f"127.0.0.1:{port}"
    try:
        yield proxy, urlunsplit(where._replace(netloc=netloc))
    finally:
        server.close()
        await proxy.close()
        await server.wait_closed()


@pytest_asyncio.fixture
async def proxy_and_store(database: str) -> AsyncIterator[tuple[Proxy, PostgresStore]]:
    await PostgresStore.migrate(database, service=SERVICE)
    async with proxied(database) as (proxy, dsn):
        async with PostgresStore.open(dsn, service=SERVICE, metrics=MemoryMetrics(), pool_size=3) as store:
            await commit(store, Unit(appends=(append("warm", 0),)))  # statements are prepared: one round trip from now
            await commit(store, *(Unit(appends=(append(f"warm-{n}", 0),)) for n in range(2)))
            yield proxy, store


UNITS = {
    "one of its own": lambda: [Unit(claim(reply=reply()), appends=(append("a", 0),), outgoing=(message(),))],
    "several": lambda: [Unit(claim(key=k, reply=reply()), appends=(append(k, 0, 3),)) for k in "ab"],
    "any version": lambda: [Unit(claim(reply=reply()), appends=(append("a", ANY, 2),))],
}


@pytest.mark.parametrize("what", list(UNITS))
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_connection_that_breaks_at_commit_leaves_the_outcome_unknown_and_the_same_units_again_tell(
    proxy_and_store: tuple[Proxy, PostgresStore], when: str, what: str
) -> None:
    proxy, store = proxy_and_store
    units = UNITS[what]()
    before = len(await whole_log(store))
    proxy.on, proxy.cut = units[0].appends[0].envelopes[0].id.bytes, when
    with pytest.raises(StoreUnavailable):
        await asyncio.wait_for(store.commit(units), 20)
    assert proxy.cuts == 1
    written = len(await whole_log(store)) - before
    again = await store.commit(units)
    if when == "before":
        assert written == 0
        assert {outcome.verdict for outcome in again} == {Verdict.COMMITTED}
    else:
        assert written > 0
        assert {outcome.verdict for outcome in again} == {Verdict.DUPLICATE}
        for outcome in again:
            assert outcome.reply is not None
            assert outcome.reply.token is not None
            assert outcome.reply.token.position > before
    expected = sum(len(unit.outgoing) + 1 + sum(len(each.envelopes) for each in unit.appends) for unit in units)
    assert len(await whole_log(store)) - before == expected, "whole, and once"


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_an_append_without_a_claim_is_answered_with_its_first_result_when_it_is_repeated(
    proxy_and_store: tuple[Proxy, PostgresStore], when: str, count: int
) -> None:
    proxy, store = proxy_and_store
    unit = Unit(appends=(append("a", 0, *(event("a") for _ in range(count))),))
    proxy.on, proxy.cut = unit.appends[0].envelopes[0].id.bytes, when
    with pytest.raises(StoreUnavailable):
        await asyncio.wait_for(store.commit([unit]), 20)
    outcome = await one(store, unit)
    assert (outcome.verdict, outcome.versions) == (Verdict.COMMITTED, {stream("a"): count})
    log = await whole_log(store)
    assert outcome.position == log[-1].position
    assert await version(store, "a") == count


async def test_a_watermark_whose_commit_broke_off_may_be_stored_again(
    proxy_and_store: tuple[Proxy, PostgresStore],
) -> None:
    proxy, store = proxy_and_store
    mark = Watermark("group-of-the-cut", "t", 0, 7)
    proxy.on, proxy.cut = b"group-of-the-cut", "after"
    with pytest.raises(StoreUnavailable):
        await asyncio.wait_for(store.commit([], watermarks=[mark]), 20)
    await store.commit([], watermarks=[mark])
    assert await store.watermarks("group-of-the-cut") == {("t", 0): 7}


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_users_transaction_whose_commit_breaks_off_is_unknown_too(
    proxy_and_store: tuple[Proxy, PostgresStore], when: str
) -> None:
    proxy, store = proxy_and_store
    unit = Unit(claim(reply=reply()), appends=(append("a", 0),))
    async with store.transaction() as tx:
        await tx.sql.execute(text("create table mine (n int)"))

    async def work() -> None:
        async with store.transaction() as tx:
            await tx.sql.execute(text("insert into mine values (1)"))
            await store.commit([unit], tx=tx)
            proxy.on, proxy.cut = b"COMMIT", when

    with pytest.raises(StoreUnavailable):
        await asyncio.wait_for(work(), 20)
    async with store.transaction() as tx:
        mine = (await tx.sql.execute(text("select count(*) from mine"))).scalar_one()
    there = await version(store, "a")
    assert (mine, there) == ((0, 0) if when == "before" else (1, 1)), "the rows and the unit share their fate"
    assert await commit(store, unit) == (["ok"] if when == "before" else ["duplicate"])


async def test_a_reader_whose_connection_breaks_is_told_and_reads_on(
    proxy_and_store: tuple[Proxy, PostgresStore],
) -> None:
    proxy, store = proxy_and_store
    first = await store.read_all(after=0, limit=2)
    proxy.on, proxy.cut = b"", "after"
    with pytest.raises(StoreUnavailable):
        await asyncio.wait_for(store.read_all(after=first.upto, limit=2), 20)
    assert proxy.cuts == 1
    later = await store.read_all(after=first.upto, limit=10)
    assert len(first.records) + len(later.records) == 3
