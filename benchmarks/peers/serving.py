"""What a peer in Python is told and what it answers. The standard library only: this runs in the peers' environment.

Orders, one JSON object per line: `open` (dsn), `append` (callers, seconds), `bulk` (many, seconds), `fill` (streams,
each), `load` (streams, each, seconds), `log` (events). The answer is `{"value": events per second}`; a peer that cannot
do something says `{"error": …}`. Payload of an event: `note_id` (the stream's key), `n`, and `text`, 200 bytes as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack
from typing import Any, Protocol
from uuid import NAMESPACE_OID, UUID, uuid4, uuid5

TEXT = "x" * 140
PAGE = 1000
"""Events per call, when a stream is filled and when the log is read."""
POOL = 16
"""Connections of every peer that has a pool, raw asyncpg and Foldbus included."""


def stream_key(number: int) -> UUID:
    return uuid5(NAMESPACE_OID, f"stream {number}")


class Peer(Protocol):
    """What every store can do. Each call waits until its events are durable."""

    async def append(self, key: UUID) -> None:
        """One event on a new stream."""
        ...

    async def append_many(self, key: UUID, after: int, count: int) -> None:
        """So many events at once on a stream that has `after`."""
        ...

    async def load(self, key: UUID) -> int:
        """The stream, folded into typed state, which has counted the events."""
        ...

    async def read_all(self) -> int:
        """The whole log in its order, every event decoded; answers how many."""
        ...


class ThreadedPeer(Protocol):
    """The same of a store without asyncio: its callers are threads."""

    def append(self, key: UUID) -> None: ...
    def append_many(self, key: UUID, after: int, count: int) -> None: ...
    def load(self, key: UUID) -> int: ...
    def read_all(self) -> int: ...


def expect(found: int, wanted: int) -> None:
    if found != wanted:
        raise RuntimeError(f"found {found} events, wanted {wanted}")


def serve(opening: Callable[[str], AbstractAsyncContextManager[Peer]]) -> None:
    """Obeys until standard input ends."""

    async def main() -> None:
        async with AsyncExitStack() as stack:
            peer: Peer | None = None
            while order := await _next_order():
                if order["op"] == "open":
                    peer = await stack.enter_async_context(opening(order["dsn"]))
                    _answer(value=1.0)
                elif peer is not None:
                    await _answered(_obey(peer, order))

    asyncio.run(main())


async def _next_order() -> dict[str, Any] | None:
    line = await asyncio.to_thread(sys.stdin.readline)
    order: dict[str, Any] | None = json.loads(line) if line else None
    return order


def _answer(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


async def _answered(work: Coroutine[Any, Any, float]) -> None:
    try:
        _answer(value=await work)
    except Exception as error:
        traceback.print_exc()
        _answer(error=f"{type(error).__name__}: {error}"[:300])


async def _obey(peer: Peer, order: dict[str, Any]) -> float:
    began, done = time.perf_counter(), 0
    end = began + order.get("seconds", 0.0)
    match order["op"]:
        case "append":

            async def caller() -> None:
                nonlocal done
                while time.perf_counter() < end:
                    await peer.append(uuid4())
                    done += 1

            await asyncio.gather(*(caller() for _ in range(order["callers"])))
        case "bulk":
            while time.perf_counter() < end:
                await peer.append_many(uuid4(), 0, order["many"])
                done += order["many"]
        case "fill":
            for number in range(order["streams"]):
                for after in range(0, order["each"], PAGE):
                    count = min(PAGE, order["each"] - after)
                    await peer.append_many(stream_key(number), after, count)
                    done += count
        case "load":
            for number in range(10**9):
                expect(await peer.load(stream_key(number % order["streams"])), order["each"])
                done += order["each"]
                if time.perf_counter() >= end:
                    break
        case "log":
            expect(await peer.read_all(), order["events"])
            done = order["events"]
        case unknown:
            raise ValueError(f"no such order: {unknown}")
    return done / (time.perf_counter() - began)


def serve_threads(opening: Callable[[str], AbstractContextManager[ThreadedPeer]]) -> None:
    """`serve` for a store without asyncio. One caller calls from the main thread."""
    peer: ThreadedPeer | None = None
    opened: AbstractContextManager[ThreadedPeer] | None = None
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        if order["op"] == "open":
            opened = opening(order["dsn"])
            peer = opened.__enter__()
            _answer(value=1.0)
        elif peer is not None:
            try:
                _answer(value=_obey_in_threads(peer, order))
            except Exception as error:
                traceback.print_exc()
                _answer(error=f"{type(error).__name__}: {error}"[:300])
    if opened is not None:
        opened.__exit__(None, None, None)


def _obey_in_threads(peer: ThreadedPeer, order: dict[str, Any]) -> float:
    if order["op"] == "append" and order["callers"] > 1:
        began = time.perf_counter()
        end = began + order["seconds"]
        done = [0] * order["callers"]
        failed: list[BaseException] = []

        def caller(number: int) -> None:
            try:
                while time.perf_counter() < end:
                    peer.append(uuid4())
                    done[number] += 1
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=caller, args=(number,)) for number in range(order["callers"])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(threads)} callers failed") from failed[0]
        return sum(done) / (time.perf_counter() - began)
    return asyncio.run(_obey(_InPlace(peer), order))


class _InPlace:
    """A threaded peer for one caller: there is nobody whom a blocking call would hold up."""

    def __init__(self, peer: ThreadedPeer) -> None:
        self._peer = peer

    async def append(self, key: UUID) -> None:
        self._peer.append(key)

    async def append_many(self, key: UUID, after: int, count: int) -> None:
        self._peer.append_many(key, after, count)

    async def load(self, key: UUID) -> int:
        return self._peer.load(key)

    async def read_all(self) -> int:
        return self._peer.read_all()
