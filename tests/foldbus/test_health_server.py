"""`/live`, `/ready` and `/metrics`: what probes get, also from a worker whose loop a handler blocks."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import foldbus.health_server
from bus.metrics import MemoryMetrics
from foldbus import Command, Context, Key, Service
from foldbus.health import HealthSettings
from foldbus.health_server import CALLERS_MAX, REQUEST_BYTES_MAX, CannotListen, HealthServer
from foldbus.watchdog import WatchdogSettings
from foldbus.worker import WorkerSettings
from tests.bus.transports import eventually
from tests.foldbus.desk import SOURCE, until

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = HealthSettings(broker_s=30.0, probe_s=30.0)
IMPATIENT = HealthSettings(broker_s=2.0, probe_s=0.5, watchdog=WatchdogSettings(threshold_s=0.1, alert_s=60.0))
"""A loop that stands is not alive after six seconds; who asks it is told so after a second and a half."""


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No caller is cut off because this machine is slow."""
    monkeypatch.setattr(foldbus.health_server, "REQUEST_S", 40.0)


def get(port: int, path: str) -> tuple[int, Any]:
    """Status and JSON; blocks."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=50) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, json.loads(refused.read())


async def is_ready(port: int) -> bool:
    return (await asyncio.to_thread(get, port, "/ready"))[0] == 200


async def raw(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        await writer.drain()
        async with asyncio.timeout(20):
            return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


def server(metrics: MemoryMetrics | None = None, settings: HealthSettings = SETTINGS) -> HealthServer:
    return HealthServer("till", host="127.0.0.1", port=0, metrics=metrics or MemoryMetrics(), settings=settings)


class Ring(Command[None], type="till.ring.v1"):
    till: Key[str]


@asynccontextmanager
async def worker_beside(server: HealthServer, directory: Path, handler: Callable[..., Any]) -> AsyncIterator[Any]:
    service = Service("till", handlers=[handler])
    async with service.connect(
        store=f"sqlite:{directory}", bus=f"embedded:{directory}", worker=True,
        settings=WorkerSettings(health=server._settings),
    ) as connection:  # fmt: skip
        server.worker = connection.worker
        yield connection


async def test_before_there_is_a_worker_the_process_is_alive_and_not_ready(tmp_path: Path) -> None:
    async def ring(command: Ring, ctx: Context) -> None:
        return

    with server() as health:
        assert await asyncio.to_thread(get, health.port, "/live") == (
            200,
            {"service": "till", "ok": True, "reasons": []},
        )
        status, said = await asyncio.to_thread(get, health.port, "/ready?verbose")
        assert (status, said["ok"], said["reasons"]) == (503, False, ["not connected yet"])
        async with worker_beside(health, tmp_path, ring):
            await until(lambda: is_ready(health.port))
            assert (await asyncio.to_thread(get, health.port, "/live"))[0] == 200
        assert await asyncio.to_thread(get, health.port, "/ready") == (
            503,
            {"service": "till", "ok": False, "reasons": ["the worker is not running, or drains"]},
        )
    with pytest.raises(urllib.error.URLError):
        await asyncio.to_thread(get, health.port, "/live")


async def test_while_a_handler_blocks_the_loop_ready_names_it_and_live_stays_for_as_long_as_a_poll_may(
    tmp_path: Path,
) -> None:
    """The prober is a thread: nothing else of this process runs meanwhile. It lets the handler go when it has seen
    enough."""
    inside, enough = threading.Event(), threading.Event()
    seen: list[tuple[int, Any]] = []

    async def careless_ring(command: Ring, ctx: Context) -> None:
        inside.set()
        enough.wait(40)  # a blocking call in a coroutine

    def probe(port: int) -> None:
        try:
            inside.wait(40)
            until = time.monotonic() + 30
            while time.monotonic() < until:
                seen.append(get(port, "/ready"))
                if "careless_ring" in str(seen[-1]):
                    break
            seen.append(get(port, "/live"))
            while time.monotonic() < until:
                seen.append(get(port, "/live"))
                if seen[-1][0] == 503:
                    break
        finally:
            enough.set()

    with server(settings=IMPATIENT) as health:
        async with worker_beside(health, tmp_path, careless_ring) as connection:
            prober = threading.Thread(target=probe, args=(health.port,))
            prober.start()
            await connection.request(Ring(till="t"), timeout_s=50)
            await asyncio.to_thread(prober.join)
            await until(lambda: is_ready(health.port))
            assert (await asyncio.to_thread(get, health.port, "/live"))[0] == 200
    named = next(place for place, (_, said) in enumerate(seen) if "careless_ring" in str(said))
    status, said = seen[named]
    assert status == 503
    assert "the event loop has been blocked for" in said["reasons"][0]
    assert seen[named + 1] == (200, {"service": "till", "ok": True, "reasons": []})
    status, said = seen[-1]
    assert status == 503
    assert "careless_ring" in said["reasons"][0]


async def test_a_loop_that_does_not_answer_and_is_not_named_yet_is_not_ready() -> None:
    """Before there is a worker, and so a watchdog: an application that imports slowly, for one."""
    answers: list[tuple[int, Any]] = []

    def probe(port: int) -> None:
        answers.extend(get(port, path) for path in ("/live", "/ready"))
        until = time.monotonic() + 30
        while time.monotonic() < until:
            answers.append(get(port, "/live"))
            if answers[-1][0] != 200:
                break

    with server(settings=IMPATIENT) as health:
        prober = threading.Thread(target=probe, args=(health.port,))
        prober.start()
        prober.join()  # blocks this loop until the prober has its answers
    silent = (503, {"ok": False, "reasons": ["the event loop does not answer"]})
    alive = (200, {"service": "till", "ok": True, "reasons": []})
    assert answers == [alive, silent, *[alive] * (len(answers) - 3), silent]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /live HTTP/1.1\r\nX: " + b"x" * (2 * REQUEST_BYTES_MAX) + b"\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET /live SPDY/3\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ],
    ids=["too long", "no http", "another protocol", "tls"],
)
async def test_what_is_no_request_gets_no_answer_and_harms_nobody(request_bytes: bytes) -> None:
    with server() as health:
        try:
            assert await raw(health.port, request_bytes) == b""
        except ConnectionError:
            pass  # it closed with bytes of ours unread
        assert (await asyncio.to_thread(get, health.port, "/live"))[0] == 200


async def test_other_paths_and_methods_are_told_what_is_wanted() -> None:
    with server() as health:
        assert b"404 Not Found" in await raw(health.port, b"GET / HTTP/1.1\r\n\r\n")
        assert b"405 Method Not Allowed" in await raw(health.port, b"POST /live HTTP/1.1\r\n\r\n")
        head = await raw(health.port, b"HEAD /live HTTP/1.1\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert head.endswith(b"\r\n\r\n")


async def test_callers_that_say_nothing_are_cut_off_and_too_many_are_turned_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with server() as health:

        async def say_nothing() -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
            return [await asyncio.open_connection("127.0.0.1", health.port) for _ in range(CALLERS_MAX)]

        async def close(callers: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
            for _, writer in callers:
                writer.close()
                await writer.wait_closed()
            await eventually(lambda: not health._calls, what="nobody is listened to")

        silent = await say_nothing()
        await eventually(lambda: len(health._calls) == CALLERS_MAX, what="all of them are listened to")
        async with asyncio.timeout(20):
            try:
                assert await raw(health.port, b"GET /live HTTP/1.1\r\n\r\n") == b""
            except ConnectionError:
                pass
        await close(silent)
        monkeypatch.setattr(foldbus.health_server, "REQUEST_S", 1.0)
        silent = await say_nothing()
        async with asyncio.timeout(30):
            for reader, _ in silent:
                assert await reader.read() == b""
        await close(silent)
        monkeypatch.setattr(foldbus.health_server, "REQUEST_S", 40.0)
        assert (await asyncio.to_thread(get, health.port, "/live"))[0] == 200


async def test_a_server_that_ends_cuts_off_who_is_being_answered(caplog: pytest.LogCaptureFixture) -> None:
    """One says nothing, one is asked about a loop that is blocked: by the end of the server, as it happens."""
    with server() as health:
        _, silent = await asyncio.open_connection("127.0.0.1", health.port)
        _, asking = await asyncio.open_connection("127.0.0.1", health.port)
        await eventually(lambda: len(health._calls) == 2, what="both are listened to")
        asking.write(b"GET /ready HTTP/1.1\r\n\r\n")  # on its way at once; from here on this loop does nothing but end
    thread = health._thread
    assert thread is not None
    await asyncio.to_thread(thread.join, 30)  # the context itself waits for a moment only
    assert not thread.is_alive()
    for one in (silent, asking):
        one.close()
        with suppress(ConnectionError):
            await one.wait_closed()
    assert caplog.messages == []


async def test_a_port_that_is_taken_is_refused_by_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen, match=f"nothing listens on 127.0.0.1:{port} for health"):
            with HealthServer("till", host="127.0.0.1", port=port, metrics=MemoryMetrics()):
                pass


async def test_metrics_are_exposed_also_when_series_of_a_name_have_other_labels() -> None:
    metrics = MemoryMetrics()
    metrics.count("foldbus_fenced_total", 2, who="relay")
    metrics.count("foldbus_fenced_total", 3, group="till", topic='a"b\nc')
    metrics.gauge("foldbus_lag", 7.5, group="till")
    with server(metrics) as health:
        head, _, body = (await raw(health.port, b"GET /metrics HTTP/1.1\r\n\r\n")).decode().partition("\r\n\r\n")
    assert "200 OK" in head
    assert "text/plain; version=0.0.4" in head
    lines = body.splitlines()
    assert 'foldbus_fenced_total{group="",topic="",who="relay"} 2.0' in lines
    assert 'foldbus_fenced_total{group="till",topic="a\\"b\\nc",who=""} 3.0' in lines
    assert 'foldbus_lag{group="till"} 7.5' in lines
    assert "# TYPE foldbus_fenced_total counter" in lines
    assert [line for line in lines if line.startswith("process_cpu_seconds_total")]


async def test_without_prometheus_client_metrics_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with server() as health:
        answer = await raw(health.port, b"GET /metrics HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 501 ")
    assert b"pip install 'foldbus[prometheus]'" in answer


def test_foldbus_run_answers_probes_from_its_start_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "health_desk.py").write_text(SOURCE.replace("NAME", "health-desk"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOLDBUS_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "foldbus", "run", "health_desk:app", "--health-port", "0"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        port = 0
        for line in process.stderr:
            said = json.loads(line)["message"]
            if said.startswith("health of health-desk: http://127.0.0.1:"):
                port = int(said.rpartition(":")[2].partition("/")[0])
            if said.startswith("ready:"):
                break
        until = time.monotonic() + 40
        while get(port, "/ready")[0] != 200:
            assert time.monotonic() < until, get(port, "/ready")
            time.sleep(0.05)
        assert get(port, "/live")[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        process.stderr.read()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stderr is not None:
            process.stderr.close()
