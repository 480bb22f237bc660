"""A service whose every effect is a row that is only ever added: what was lost, done twice or out of order shows.

`foldbus run tests.stories.ledger:app`. A command may ask its handler to begin, say so on standard output, and go on
only after a while: the moment at which somebody stops or kills the process. In the environment: `LEDGER_NAME`, the
service's name; `LEDGER_PARTITIONS`; `LEDGER_MARKS`, a directory in which the first handler of a message leaves a mark,
so that the next one does not stay, and in which `go on` ends every stay; `LEDGER_FAILING`, the share of messages that
fail for as long as `rain` is in that directory.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from uuid import UUID, uuid5
from zlib import crc32

from sqlalchemy import BigInteger, Column, DateTime, Integer, MetaData, Table, Text, func, insert

from foldbus import Command, Context, Key, Service

NAME = os.environ.get("LEDGER_NAME", "ledger")
PARTITIONS = int(os.environ.get("LEDGER_PARTITIONS", "6"))
MARKS = Path(os.environ.get("LEDGER_MARKS", "."))
HOLDS = os.environ.get("LEDGER_POLICY") == "hold"
FAILING = float(os.environ.get("LEDGER_FAILING", "0"))
_IDS = UUID("8a0c3f0e-5c0b-4f7e-9d7a-0d1c2b3a4f5e")

TABLE = """
create table ledger (
    seq bigint generated always as identity,
    account text not null,
    n integer not null,
    worker integer not null,
    at timestamptz not null default clock_timestamp()
)
"""
"""Nothing in it is unique: a second effect is a second row."""

ledger = Table(
    "ledger",
    MetaData(),
    Column("seq", BigInteger),
    Column("account", Text),
    Column("n", Integer),
    Column("worker", Integer),
    Column("at", DateTime(timezone=True), server_default=func.clock_timestamp()),
)


class Enter(Command[None], type=f"{NAME}.enter.v1"):
    """`where` the handler stays for `for_s`: before its transaction, inside it, or with the event loop in its hands."""

    account: Key[str]
    n: int
    where: Literal["", "before", "inside", "blocking"] = ""
    for_s: float = 0.0


async def enter(command: Enter, ctx: Context) -> None:
    if FAILING and is_failing(command.account, command.n, FAILING) and (MARKS / "rain").exists():
        raise RuntimeError("it rains")
    if command.where == "before":
        await stay(command)
    if command.where == "blocking":
        say("began", command)
        if is_first(command):
            for moment_s in moments(command):
                time.sleep(moment_s)
    sql = await ctx.sql()
    if command.where == "inside":
        await stay(command)
    await sql.execute(insert(ledger).values(account=command.account, n=command.n, worker=os.getpid()))


async def stay(command: Enter) -> None:
    say("began", command)
    if is_first(command):
        for moment_s in moments(command):
            await asyncio.sleep(moment_s)
    say("goes on", command)


def moments(command: Enter) -> Iterator[float]:
    """What it stays for, bit by bit, until it may go on."""
    until = time.monotonic() + command.for_s
    while (left_s := until - time.monotonic()) > 0 and not (MARKS / "go on").exists():
        yield min(left_s, 0.02)


def is_first(command: Enter) -> bool:
    """Whoever is given the message later simply does it."""
    try:
        (MARKS / f"{command.account}.{command.n}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def is_failing(account: str, n: int, share: float) -> bool:
    """The same messages in every process."""
    return crc32(f"{account}/{n}".encode()) % 100_000 < share * 100_000


def say(what: str, command: Enter) -> None:
    print(json.dumps({"event": what, "account": command.account, "n": command.n, "pid": os.getpid()}), flush=True)


def id_of(account: str, n: int) -> UUID:
    """The same entry has the same id, however often it is sent."""
    return uuid5(_IDS, f"{account}/{n}")


app = Service(NAME, handlers=[enter], partitions=PARTITIONS, hold=["commands"] if HOLDS else [])
