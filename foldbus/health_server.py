"""`/live`, `/ready` and `/metrics` over HTTP, for whoever runs the process.

The server has a thread and a loop of its own and asks the worker's loop for the verdict. So it also answers while a
handler blocks that loop, and says which one: a probe that merely times out tells nobody anything.

It understands GET and HEAD, reads at most 8 KiB within five seconds, and serves a bounded number of callers at a time.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from http import HTTPStatus
from types import TracebackType
from typing import TYPE_CHECKING, Any

from bus.errors import FoldbusError
from bus.metrics import MemoryMetrics
from foldbus.health import Health, HealthSettings
from foldbus.prometheus import CONTENT_TYPE, MissingPrometheus, render

if TYPE_CHECKING:
    from foldbus.worker import Worker

REQUEST_BYTES_MAX = 8 * 1024
REQUEST_S = 5.0
CALLERS_MAX = 32
STOP_S = 2.0

_JSON = "application/json"
_TEXT = "text/plain; charset=utf-8"

Answer = tuple[HTTPStatus, str, bytes]


class CannotListen(FoldbusError):
    """The health port is taken, or not ours to take. Nothing was started."""


class HealthServer:
    """A context in the worker's loop. `worker` is set once there is one: until then it is alive and not ready."""

    def __init__(
        self, name: str, *, host: str, port: int, metrics: MemoryMetrics, settings: HealthSettings | None = None
    ) -> None:
        self.worker: Worker | None = None
        self.port = port
        """The port it listens on, also where 0 asked for any that is free."""
        self._name, self._host, self._metrics = name, host, metrics
        self._settings = settings or HealthSettings()
        self._calls: set[asyncio.Task[None] | None] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._silent_since: float | None = None
        self._asked: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Future[None] | None = None
        self._own: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> HealthServer:
        """Raises CannotListen."""
        self._asked = asyncio.get_running_loop()
        listening: Future[int] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(listening)), name=f"health of {self._name}", daemon=True
        )
        self._thread.start()
        try:
            self.port = listening.result(timeout=REQUEST_S)
        except OSError as error:
            raise CannotListen(f"nothing listens on {self._host}:{self.port} for health: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        if self._own is not None and self._end is not None:
            self._own.call_soon_threadsafe(self._end.set_result, None)
        if self._thread is not None:
            self._thread.join(timeout=STOP_S)

    # --- in its own thread ------------------------------------------------------------------------------------------

    async def _serve(self, listening: Future[int]) -> None:
        self._own = asyncio.get_running_loop()
        self._end = self._own.create_future()
        try:
            server = await asyncio.start_server(self._call, self._host, self.port, limit=REQUEST_BYTES_MAX)
        except OSError as error:
            self._own = None
            listening.set_exception(error)
            return
        listening.set_result(server.sockets[0].getsockname()[1])
        await self._end
        self._own = None
        server.close()  # who is being answered is cut off: the process ends
        for writer in self._writers:
            writer.transport.abort()
        calls = {call for call in self._calls if call is not None}
        if calls:
            await asyncio.wait(calls, timeout=STOP_S)

    async def _call(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        call = asyncio.current_task()
        self._calls.add(call)
        self._writers.add(writer)
        try:
            if len(self._calls) <= CALLERS_MAX:
                async with asyncio.timeout(REQUEST_S):
                    method, path = await _request(reader)
                    writer.write(_response(method, await self._answer(method, path)))
                    await writer.drain()
        except (TimeoutError, ValueError, OSError, EOFError):
            pass  # slow, too long, no HTTP, or gone: it gets no answer
        finally:
            self._calls.discard(call)
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, method: str, path: str) -> Answer:
        if method not in ("GET", "HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, _TEXT, b"wanted GET or HEAD\n"
        match path.partition("?")[0]:
            case "/live":
                return await self._verdict("live")
            case "/ready":
                return await self._verdict("ready")
            case "/metrics":
                return await self._of_the_worker(self._exposed()) or _not_answered("the event loop does not answer")
            case _:
                return HTTPStatus.NOT_FOUND, _TEXT, b"wanted /live, /ready or /metrics\n"

    async def _verdict(self, what: str) -> Answer:
        worker = self.worker
        blocked = worker.watchdog.blocked if worker is not None else None
        if worker is not None and blocked is not None:
            silent_s = worker.connection.clock.monotonic() - blocked.since
            reason = f"the event loop has been blocked for {silent_s:.1f} s by {blocked.by}"
            patient = what == "live" and silent_s <= 3 * self._settings.broker_s
            return _judged(self._name, Health() if patient else Health((reason,)))
        answer = await self._of_the_worker(self._asked_there(what))
        if answer is None and what == "live" and self._silent_s() <= 3 * self._settings.broker_s:
            return _judged(self._name, Health())
        return answer or _not_answered("the event loop does not answer")

    def _silent_s(self) -> float:
        """For how long the worker's loop has answered no probe."""
        return 0.0 if self._silent_since is None else asyncio.get_running_loop().time() - self._silent_since

    async def _of_the_worker(self, question: Coroutine[Any, Any, Answer]) -> Answer | None:
        """None when the worker's loop does not answer in time."""
        assert self._asked is not None
        assert self._end is not None
        try:
            answer = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(question, self._asked))
        except RuntimeError:  # it is closed
            question.close()
            return None
        began = asyncio.get_running_loop().time()
        patience_s = min(self._settings.probe_s + 1.0, REQUEST_S - 1.0)
        events: list[asyncio.Future[Any]] = [answer, self._end]
        await asyncio.wait(events, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            answer.cancel()
            self._silent_since = self._silent_since or began
            return None
        self._silent_since = None
        return answer.result()

    # --- in the worker's loop ----------------------------------------------------------------------------------------

    async def _asked_there(self, what: str) -> Answer:
        worker = self.worker
        if worker is None:
            return _judged(self._name, Health() if what == "live" else Health(("not connected yet",)))
        return _judged(self._name, await (worker.alive() if what == "live" else worker.ready()))

    async def _exposed(self) -> Answer:
        try:
            return HTTPStatus.OK, CONTENT_TYPE, render(self._metrics)
        except MissingPrometheus as error:
            return HTTPStatus.NOT_IMPLEMENTED, _TEXT, f"{error}\n".encode()


async def _request(reader: asyncio.StreamReader) -> tuple[str, str]:
    """Method and target; the headers are read and left. Raises ValueError for what is no HTTP or too long."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    method, target, version = head.partition("\r\n")[0].split(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError(version)
    return method, target


def _judged(name: str, health: Health) -> Answer:
    status = HTTPStatus.OK if health.ok else HTTPStatus.SERVICE_UNAVAILABLE
    return status, _JSON, json.dumps({"service": name, **health.as_json()}).encode()


def _not_answered(reason: str) -> Answer:
    return HTTPStatus.SERVICE_UNAVAILABLE, _JSON, json.dumps(Health((reason,)).as_json()).encode()


def _response(method: str, answer: Answer) -> bytes:
    status, kind, body = answer
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if method == "HEAD" else body)
