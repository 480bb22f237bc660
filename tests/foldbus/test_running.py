"""How a worker ends: by its body, by a part that fails for good, by signals."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bus.errors import FoldbusError
from foldbus import Connection, Service
from foldbus.worker import PartEnded, Worker

ROOT = Path(__file__).resolve().parents[2]


class Broken(FoldbusError):
    """What a part of the worker dies of."""


@pytest.fixture
async def connection(tmp_path: Path) -> AsyncIterator[Connection]:
    async with Service("desk").connect(store=f"sqlite:{tmp_path}", bus=f"embedded:{tmp_path}") as connection:
        yield connection


def doomed(connection: Connection) -> tuple[Worker, asyncio.Event]:
    """A worker whose relay fails for good once the event is set."""
    worker, end = Worker(connection), asyncio.Event()

    async def run() -> None:
        await end.wait()
        raise Broken("for good")

    worker.relay.run = run  # type: ignore[method-assign]
    return worker, end


async def body(worker: Worker, end: asyncio.Event, *, turns: int | None = None, last: Exception | None = None) -> None:
    """Sets `end` and stays, for so many turns of the loop, or for ever."""
    async with worker.running():
        end.set()
        try:
            if turns is None:
                await asyncio.Event().wait()
            for _ in range(turns or 0):
                await asyncio.sleep(0)
        finally:
            if last is not None:
                raise last


async def test_a_part_that_fails_for_good_cancels_the_body_and_its_error_comes_out(connection: Connection) -> None:
    worker, end = doomed(connection)
    async with asyncio.timeout(45):
        with pytest.raises(Broken, match="for good") as raised:
            await body(worker, end)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert worker.ended.exception() is raised.value
    await asyncio.sleep(0)  # nothing of it is left over


@pytest.mark.parametrize("how", ["returns", "is cancelled"])
async def test_a_part_that_ends_though_nobody_asked_it_to_is_no_silent_loss(connection: Connection, how: str) -> None:
    worker, end = Worker(connection), asyncio.Event()

    async def run() -> None:
        await end.wait()
        if how == "is cancelled":
            raise asyncio.CancelledError

    worker.relay.run = run  # type: ignore[method-assign]
    with pytest.raises(PartEnded, match="relay ended while the worker runs"):
        async with asyncio.timeout(45):
            await body(worker, end)


async def test_the_error_comes_out_also_when_the_body_ended_before_it_heard(connection: Connection) -> None:
    for turns in range(1, 4):  # the part fails in the first turn of the loop, its error is told in the next
        worker, end = doomed(connection)
        with pytest.raises(Broken):
            await body(worker, end, turns=turns)
        await asyncio.sleep(0)  # nothing of it is left over
        with pytest.raises(Broken):
            worker.check()


async def test_what_the_body_raises_by_itself_comes_out_as_it_is(connection: Connection) -> None:
    worker, end = doomed(connection)
    with pytest.raises(KeyError):
        await body(worker, end, last=KeyError())
    await asyncio.sleep(0)
    with pytest.raises(LookupError):
        await body(Worker(connection), end, turns=0, last=LookupError())


async def test_who_is_cancelled_from_outside_stays_cancelled(connection: Connection) -> None:
    worker, end = doomed(connection)
    task = asyncio.create_task(body(worker, end))
    worker.ended.add_done_callback(lambda _: task.cancel())  # in the same turn as the part's end
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


class TestASecondSignal:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_ends_a_worker_at_once_that_still_drains(self, tmp_path: Path, number: signal.Signals) -> None:
        """A handler of it waits for something that does not come, so that what it has in hand cannot be finished."""
        (tmp_path / "stuck_service.py").write_text(_STUCK)
        subprocess.run([sys.executable, "stuck_service.py"], cwd=tmp_path, env=_env(), check=True, timeout=60)
        with subprocess.Popen(
            [sys.executable, "-m", "foldbus", "run", "stuck_service:app"],
            cwd=tmp_path, env=_env(), stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            try:
                assert process.stderr is not None
                assert any("it waits" in line for line in process.stderr)
                process.send_signal(number)
                assert any("stopping" in line for line in process.stderr)
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
                process.send_signal(number)
                _, said = process.communicate(timeout=45)
            finally:
                process.kill()
        assert process.returncode == -number, said
        assert "handled after the next start" in said


_STUCK = """
import asyncio
import sys

from foldbus import Command, EffectContext, Key, Service, handler


class Wait(Command[None], type="stuck.wait.v1"):
    id: Key[str]


@handler(effect=True)
async def wait(command: Wait, ctx: EffectContext) -> None:
    print("it waits", file=sys.stderr, flush=True)
    await asyncio.Event().wait()


app = Service("stuck", handlers=[wait])


async def main() -> None:
    async with app.connect() as connection:
        await connection.send(Wait(id="1"))


if __name__ == "__main__":
    asyncio.run(main())
"""


def _env() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOLDBUS_")}
    return {**environment, "PYTHONPATH": str(ROOT)}
