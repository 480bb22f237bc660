"""The log as something to iterate over: in order, at the reader's pace, woken by whoever appends."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bus.envelope import Envelope
from eventstore.following import follow, read_log
from eventstore.port import Page, Store, Unit, Where
from tests.eventstore.stores import Backend, append, event, message, one, stream

RARE = Where(types=frozenset(["rare.v1"]))


def rare() -> Envelope:
    return replace(event(), type="rare.v1")


async def take(records: AsyncIterator[Envelope], n: int) -> list[Envelope]:
    async with asyncio.timeout(20):
        return [await anext(records) for _ in range(n)]


def versions(records: list[Envelope]) -> list[int]:
    return [record.version or 0 for record in records]


class Counting:
    """A store that says how often its log was read."""

    def __init__(self, store: Any) -> None:
        self._store, self.pages, self.waited = store, list[tuple[int, int]](), 0

    async def read_all(self, *, after: int, limit: int, where: Where | None = None) -> Page:
        self.pages.append((after, limit))
        page: Page = await self._store.read_all(after=after, limit=limit, where=where)
        return page

    async def wait_past(self, position: int, *, timeout_s: float) -> None:
        self.waited += 1
        await self._store.wait_past(position, timeout_s=timeout_s)


class Failing(Counting):
    """One of its pages fails, once."""

    def __init__(self, store: Any, *, at: int) -> None:
        super().__init__(store)
        self._at, self.failed = at, 0

    async def read_all(self, *, after: int, limit: int, where: Where | None = None) -> Page:
        page = await super().read_all(after=after, limit=limit, where=where)
        if len(self.pages) == self._at:
            self.failed += 1
            raise ConnectionResetError
        return page


class Stuck(Counting):
    """One of its pages never comes."""

    def __init__(self, store: Any, *, at: int) -> None:
        super().__init__(store)
        self._at, self.reading, self.ended = at, asyncio.Event(), False

    async def read_all(self, *, after: int, limit: int, where: Where | None = None) -> Page:
        if len(self.pages) + 1 == self._at:
            self.pages.append((after, limit))
            self.reading.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.ended = True
        return await super().read_all(after=after, limit=limit, where=where)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_a_follower_gets_what_is_there_and_then_what_comes(store: Store, twin: Store) -> None:
    await one(store, Unit(appends=(append("a", 0, 5),), outgoing=(message(),)))
    following = follow(store, page=2)
    assert versions(await take(following, 5)) == [1, 2, 3, 4, 5]
    for n, writer in ((5, store), (6, twin), (7, store)):
        waiting = asyncio.create_task(take(following, 1))
        await asyncio.wait({waiting}, timeout=0.05)
        assert not waiting.done()
        await one(writer, Unit(outgoing=(message(),)))
        await one(writer, Unit(appends=(append("a", n, 1),)))
        assert versions(await waiting) == [n + 1]


async def test_a_page_is_read_when_the_consumer_asks_and_not_before(store: Store) -> None:
    """Back-pressure: a slow consumer has the rest of its page waiting for it, however much is appended."""
    await one(store, Unit(appends=(append("a", 0, 10),)))
    counting = Counting(store)
    following = follow(counting, page=4)
    assert counting.pages == []
    first = await take(following, 1)
    await one(store, Unit(appends=(append("a", 10, 10),)))
    await take(following, 3)
    assert len(counting.pages) == 1
    fifth = await take(following, 1)
    assert counting.pages[1] == (fifth[0].position - 1 if fifth[0].position else 0, 4)
    assert versions(first + fifth) == [1, 5]
    assert counting.waited == 0


async def test_who_has_asked_for_a_second_page_has_one_more_read_ahead_and_no_more_than_that(store: Store) -> None:
    await one(store, Unit(appends=(append("a", 0, 30),)))
    counting = Counting(store)
    following = follow(counting, page=4)
    for page in range(2, 8):
        await take(following, 4)
        assert len(counting.pages) <= max(1, page)
        await until(lambda wanted=page: len(counting.pages) == (1 if wanted == 2 else wanted))
    assert versions(await take(following, 6)) == list(range(25, 31))
    assert counting.pages[-1] == (following.position - 2, 4)  # the end was in it: nothing is read beyond
    assert counting.waited == 0


async def test_an_error_of_the_page_read_ahead_is_raised_after_the_events_before_it(store: Store) -> None:
    await one(store, Unit(appends=(append("a", 0, 12),)))
    failing = Failing(store, at=3)
    following = follow(failing, page=4)
    assert versions(await take(following, 4)) == [1, 2, 3, 4]
    fifth = await take(following, 1)
    await until(lambda: failing.failed == 1)
    assert versions(fifth + await take(following, 3)) == [5, 6, 7, 8]
    checkpoint = following.position
    with pytest.raises(ConnectionResetError):
        await take(following, 1)
    assert following.position == checkpoint
    assert versions(await take(following, 4)) == [9, 10, 11, 12]
    assert failing.failed == 1


@pytest.mark.parametrize("how", ["dropped", "closed", "cancelled"])
async def test_a_follower_that_is_left_leaves_no_task_and_no_connection_behind(store: Any, how: str) -> None:
    """In the middle of a page, while the next one is being read."""
    await one(store, Unit(appends=(append("a", 0, 12),)))
    before = asyncio.all_tasks()
    stuck = Stuck(store, at=3)
    following = follow(stuck, page=4)
    await take(following, 5)
    await asyncio.wait_for(stuck.reading.wait(), 10)
    assert len(asyncio.all_tasks() - before) == 1
    if how == "cancelled":
        await take(following, 3)
        waiting = asyncio.create_task(anext(following))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    elif how == "closed":
        await following.aclose()
        assert stuck.ended
        assert versions(await take(following, 3)) == [6, 7, 8]
    if how != "closed":
        del following
    await until(lambda: stuck.ended and asyncio.all_tasks() == before)


async def test_leaving_in_the_middle_of_the_databases_answer_costs_no_later_call(store: Any) -> None:
    await one(store, Unit(appends=(append("a", 0, 300),)))
    before = asyncio.all_tasks()
    for _ in range(30):  # more often than there are connections
        async for record in follow(store, page=5):
            if record.version == 7:
                break
    async with asyncio.timeout(20):
        assert len((await store.read_all(after=0, limit=500)).records) == 300
    await until(lambda: asyncio.all_tasks() == before)


async def test_the_position_is_a_checkpoint_for_what_was_given(store: Store) -> None:
    await one(store, Unit(appends=(append("a", 0, 6),)))
    following = follow(store, page=4)
    for n in range(1, 7):
        (record,) = await take(following, 1)
        assert following.position == record.position
        again = follow(store, after=following.position, page=2)
        if n < 6:
            assert versions(await take(again, 1)) == [n + 1]


async def test_the_position_moves_on_through_what_is_not_wanted(store: Store) -> None:
    """Otherwise who wants little reads the same long stretch after every restart."""
    await one(store, Unit(appends=(append("a", 0, event(), rare(), event(), event()),)))
    following = follow(store, where=RARE, page=10)
    await take(following, 1)
    waiting = asyncio.create_task(take(following, 1))
    head = await store.head()
    async with asyncio.timeout(20):
        while following.position < head:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting


async def test_a_follower_that_was_cancelled_goes_on_where_it_was(store: Store) -> None:
    await one(store, Unit(appends=(append("a", 0, 3),)))
    following = follow(store, page=2)
    await take(following, 3)
    for _ in range(5):
        waiting = asyncio.create_task(take(following, 1))
        await asyncio.wait({waiting}, timeout=0.01)
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
    await one(store, Unit(appends=(append("a", 3, 2),)))
    assert versions(await take(following, 2)) == [4, 5]


@pytest.mark.parametrize("page", [1, 3, 100])
async def test_a_bounded_reading_ends_where_it_was_told_to(store: Store, page: int) -> None:
    outcome = await one(store, Unit(appends=(append("a", 0, 7),)))
    await one(store, Unit(appends=(append("a", 7, 7),)))
    reading = read_log(store, upto=outcome.position, page=page)
    async with asyncio.timeout(20):
        assert versions([record async for record in reading]) == [1, 2, 3, 4, 5, 6, 7]
    assert [record async for record in reading] == []
    assert [record async for record in read_log(store, upto=0)] == []


async def test_a_page_of_nothing_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="page is 0"):
        follow(store, page=0)


_APPENDING = """
import asyncio, sys
from tests.eventstore.stores import append, one
from eventstore.port import Unit

async def main(name, where):
    if name == "sqlite":
        from eventstore.sqlite import SqliteStore
        opening = SqliteStore.open(where, service="shop")
    else:
        from eventstore.postgres import PostgresStore
        opening = PostgresStore.open(where, service="shop")
    async with opening as store:
        while line := await asyncio.to_thread(sys.stdin.readline):  # the notification is sent aside
            await one(store, Unit(appends=(append("a", int(line), 1),)))
            print("appended", flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.timeout(90)
async def test_another_processes_commits_wake_a_follower_without_its_poll(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The poll that would find them is an hour away. (On one file, looking whether it changed is what wakes.)"""
    from eventstore.postgres import feed

    monkeypatch.setattr(feed, "_POLL_S", 3600.0)
    monkeypatch.setattr(feed, "_POLL_LISTENING_S", 3600.0)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _APPENDING, backend.name, backend.where),
        cwd=Path(__file__).parents[2],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with backend.open() as store:
            following = follow(store, page=10)
            for n in range(3):
                waiting = asyncio.create_task(take(following, 1))
                await asyncio.wait({waiting}, timeout=0.3)
                assert not waiting.done()
                process.stdin.write(f"{n}\n".encode())
                await process.stdin.drain()
                assert versions(await waiting) == [n + 1]
    finally:
        process.stdin.close()
        await asyncio.wait_for(process.wait(), 20)


async def test_two_followers_get_the_same(store: Store, twin: Store) -> None:
    await one(store, Unit(appends=(append("a", 0, 3),)))
    here, there = follow(store, page=2), follow(twin, where=Where(stream=stream("a")), page=1)
    assert await take(here, 3) == await take(there, 3)
