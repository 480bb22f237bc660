"""One key of a thousand fails, and goes on failing: what the others notice of it.

Open loop as in `latency.py`. The failing key gets one message of a hundred; its latency does not count. It is tried,
parked, tried again from its queue, and its successors join that queue, all with the settings that a worker has anyway.
(Not `from __future__ import annotations`: the classes are made inside a function, and are looked up by what they are.)
"""

from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from pydantic import BaseModel
from sqlalchemy import text

from benchmarks.harness import Row, Setting, compare
from benchmarks.latency import Stamps, all_there, figures, open_loop
from foldbus import Command, Context, Decider, Event, Handler, Key, Service, projection

KEYS = 1000
RATE, SQL_RATE = 200, 100
"""Commands a second. With a transaction for each, 200 are all that one process of a slow machine can do: what came
together while it joined its group would not go away."""
BAD = "k0"


class Broken(Exception):
    """What the failing key fails with."""


class Count(BaseModel, frozen=True):
    n: int = 0


class Last(BaseModel, frozen=True):
    account: str
    n: int


def key_of(n: int) -> str:
    return BAD if n % 100 == 0 else f"k{1 + n % (KEYS - 1)}"


def services_of(*, with_sql: bool, folded: list[str]) -> tuple[Service, Service, type[Any]]:
    """One that handles, one with a read model of what came of it, and the command."""
    name = f"bench-{uuid4().hex[:10]}"

    class Done(Event, type=f"{name}.done.v1"):
        account: Key[str]
        n: int

    class Do(Command[None], type=f"{name}.do.v1"):
        account: Key[str]
        n: int
        fails: bool = False

    def evolve(count: Count, event: Done) -> Count:
        return Count(n=count.n + 1)

    def decide(count: Count, command: Do) -> list[Done]:
        if command.fails:
            raise Broken
        return [Done(account=command.account, n=command.n)]

    async def handle(command: Do, ctx: Context) -> None:
        await (await ctx.sql()).execute(text("select 1"))
        if command.fails:
            raise Broken
        ctx.publish(Done(account=command.account, n=command.n))

    @projection("last", version=1)
    def last(row: Last | None, event: Done) -> Last:
        folded.append(f"note-{event.n}")
        return Last(account=event.account, n=event.n)

    board = Service(f"{name}-board", projections=[last])
    if with_sql:
        return Service(name, handlers=[Handler(handle)], messages=[Done]), board, Do
    return Service(name, deciders=[Decider("count", initial=Count(), evolve=evolve, decide=decide)]), board, Do


async def run(setting: Setting) -> list[Row]:
    rows: list[Row] = []
    for with_sql in (False, True):
        rows += await _with(setting, with_sql)
    return rows


async def _with(setting: Setting, with_sql: bool) -> list[Row]:
    async def servers(fails: bool) -> Mapping[str, float]:
        async with setting.database() as dsn:
            return await _measured(setting, dsn, setting.bus, with_sql=with_sql, fails=fails)

    async def embedded(fails: bool) -> Mapping[str, float]:
        directory = setting.fresh()
        where = f"sqlite:{directory}", f"embedded:{directory}"
        return await _measured(setting, *where, with_sql=with_sql, fails=fails)

    rows: list[Row] = []
    rate = SQL_RATE if with_sql else RATE
    pairs = [("PostgreSQL + Kafka", servers), ("SQLite + embedded bus", embedded)]
    for name, measured in pairs[: 1 if with_sql else 2]:  # so many transactions a second are too many for a file
        rows += await compare(
            f"the other {KEYS - 1} keys, {'handler with SQL' if with_sql else 'decider'}, {rate} commands/s, {name}",
            {
                "no key fails": lambda _, measured=measured: measured(False),  # type: ignore[misc]
                "one key fails": lambda _, measured=measured: measured(True),  # type: ignore[misc]
            },
            floor="no key fails",
            rounds=setting.fewer(5),
        )
    return rows


async def _measured(setting: Setting, store: str, bus: str, *, with_sql: bool, fails: bool) -> Mapping[str, float]:
    folded: list[str] = []
    saved: dict[str, float] = {}
    desk, board, do = services_of(with_sql=with_sql, folded=folded)
    async with (
        desk.connect(store=store, bus=bus, worker=True, migrate=True, apply_topics=True) as connection,
        board.connect(
            store=store, bus=bus, worker=True, migrate=True, apply_topics=True, failpoint=Stamps(folded, saved)
        ),
    ):

        async def send(n: int) -> object:
            key = key_of(n)
            return await connection.send(do(account=key, n=n, fails=fails and key == BAD))

        due = await open_loop(setting, SQL_RATE if with_sql else RATE, send)
        due = {name: at for name, at in due.items() if key_of(int(name.removeprefix("note-"))) != BAD}
        await all_there(due, saved)
    return figures("other service's row", due, saved)
