"""Workers as processes that are stopped, killed and frozen, and the account of what they did."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import asyncpg

from bus.cloudevents import to_record
from bus.transport import Ack, Outgoing, PollSettings
from foldbus import Connection
from tests.docs.blocks import ROOT
from tests.stories.pairs import eventually

MODULE = "tests.stories.ledger"


def ledger_named(name: str, *, partitions: int = 6) -> ModuleType:
    """The module, made anew for a service of that name."""
    chosen = {"LEDGER_NAME": name, "LEDGER_PARTITIONS": str(partitions)}
    before = {one: os.environ.get(one) for one in chosen}
    os.environ.update(chosen)
    sys.modules.pop(MODULE, None)
    try:
        return importlib.import_module(MODULE)
    finally:
        for one, value in before.items():
            if value is None:
                del os.environ[one]
            else:
                os.environ[one] = value


class Life:
    """One worker process. What it prints and logs is kept."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self._readers = [
            asyncio.create_task(self._read(process.stdout, self.said)),
            asyncio.create_task(self._read(process.stderr, self.logged)),
        ]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def runs(self) -> bool:
        return self.process.returncode is None

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def messages(self) -> list[str]:
        """What it logged."""
        return [str(line["message"]) for line in self.logged]

    def heard(self, words: str) -> bool:
        """Has it logged that?"""
        return any(words in message for message in self.messages())

    def tail(self, lines: int) -> list[str]:
        """The last of what it said and logged, for whoever has to find out."""
        heard = sorted([*self.said, *self.logged], key=lambda line: float(line["heard_at"]))[-lines:]
        return [f"{line['heard_at'] % 1000:.2f} {line.get('message') or line}"[:300] for line in heard]

    def says(self, event: str, account: str) -> list[dict[str, Any]]:
        return [line for line in self.said if (line["event"], line["account"]) == (event, account)]

    async def ended(self) -> int:
        code = await self.process.wait()
        await asyncio.gather(*self._readers)
        return code

    async def _read(self, stream: asyncio.StreamReader | None, into: list[dict[str, Any]]) -> None:
        assert stream is not None
        async for line in stream:
            try:
                found = json.loads(line)
            except ValueError:
                found = {"message": line.decode(errors="replace").rstrip(), "level": "?"}
            into.append(found | {"heard_at": time.time()})


class Lives:
    """Workers of the ledger of one test, on a broker and a database that exist."""

    def __init__(self, module: ModuleType, client: Connection, sql: Any, environment: Mapping[str, str]) -> None:
        self.module, self.client, self.sql, self._environment = module, client, sql, environment
        self._go_on = Path(environment["LEDGER_MARKS"]) / "go on"
        self.all: list[Life] = []
        self._sent: dict[str, int] = defaultdict(int)

    async def start(self) -> Life:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "foldbus", "run", f"{MODULE}:app"),
            cwd=ROOT,
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("FOLDBUS_")},
                **self._environment,
            },
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=1024 * 1024,
        )
        life = Life(process)
        self.all.append(life)
        return life

    async def working(self, n: int) -> list[Life]:
        """So many workers, each with partitions in hand."""
        lives = [await self.start() for _ in range(n)]
        for life in lives:
            await until(lambda life=life: any("took over" in one for one in life.messages()), what="partitions")
        return lives

    def go_on(self) -> None:
        """No handler stays any longer, from now on."""
        self._go_on.touch()

    async def enter(self, account: str, count: int = 1, **options: Any) -> None:
        """The account's next entries, in its topic when it returns."""
        await self.enter_all([account] * count, **options)

    async def enter_all(self, accounts: Sequence[str], **options: Any) -> None:
        """The next entry of each, in order, in one batch; sent again until all are acknowledged."""
        topic = f"{self.module.NAME}.commands"
        due: list[Outgoing] = []
        for account in accounts:
            n, self._sent[account] = self._sent[account], self._sent[account] + 1
            command = self.module.Enter(account=account, n=n, **options)
            due.append(to_record(self.client.envelope(command, topic=topic, id=self.module.id_of(account, n))))
        while due:
            answers = await self.client.transport.publish(due)
            due = due[next((at for at, one in enumerate(answers) if not isinstance(one, Ack)), len(due)) :]

    async def rows(self) -> dict[str, list[int]]:
        """Per account what was done, in the order in which it was done."""
        found: dict[str, list[int]] = {}
        for account, n in await self.sql.fetch("select account, n from ledger order by seq"):
            found.setdefault(account, []).append(n)
        return found

    async def account(self, *, timeout_s: float = 60) -> dict[str, list[int]]:
        """Waits until nothing is missing; then nothing may be there twice or out of order."""
        wanted = self.wanted()

        def complete(found: dict[str, list[int]]) -> bool:
            return all(set(ns) <= set(found.get(account, ())) for account, ns in wanted.items())

        found = await eventually(self.rows, complete, timeout_s=timeout_s)
        assert found == wanted
        return found

    def wanted(self) -> dict[str, list[int]]:
        return {account: list(range(n)) for account, n in self._sent.items()}

    async def committed(self) -> set[tuple[str, int]]:
        """The entries that the group's offsets have passed."""
        transport, topic = self.client.transport, f"{self.module.NAME}.commands"
        ends = await transport.admin.committed(self.module.NAME, [topic])
        found: set[tuple[str, int]] = set()
        async with transport.tail(topic, start="begin") as tail:
            async with asyncio.timeout(40):
                missing = sum(ends.values())
                while missing:
                    for one in await tail.poll(max_records=1000, timeout_s=0.2):
                        if one.offset < ends.get((topic, one.partition), 0):
                            missing -= 1
                            entry = json.loads(one.value or b"")
                            found.add((entry["account"], entry["n"]))
        return found


@asynccontextmanager
async def lives_of(
    name: str, *, store: str, bus: str, marks: Path, partitions: int = 6, session_s: float = 3.0, **environment: str
) -> AsyncIterator[Lives]:
    """A ledger, prepared, with a client beside its workers; they are killed at the end."""
    module = ledger_named(name, partitions=partitions)
    environment = {
        "FOLDBUS_STORE": store,
        "FOLDBUS_BUS": bus,
        "FOLDBUS_SESSION_TIMEOUT_S": f"{session_s:g}",
        "LEDGER_NAME": name,
        "LEDGER_PARTITIONS": str(partitions),
        "LEDGER_MARKS": str(marks),
        **environment,
    }
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(
            module.app.connect(
                store=store,
                bus=bus,
                migrate=True,
                apply_topics=True,
                poll=PollSettings(request_timeout_s=20.0, publish_deadline_s=3.0),
            )
        )
        sql = await asyncpg.connect(store)
        stack.push_async_callback(sql.close)
        await sql.execute(module.TABLE)
        lives = Lives(module, client, sql, environment)
        try:
            yield lives
        finally:
            for life in lives.all:
                if life.runs:
                    life.signal(signal.SIGCONT)
                    life.process.kill()
                await life.ended()


async def until(condition: Any, *, what: str, timeout_s: float = 40) -> None:
    async def look() -> bool:
        return bool(condition())

    await eventually(look, lambda there: there, timeout_s=timeout_s)
