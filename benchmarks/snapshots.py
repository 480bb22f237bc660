"""Loading an aggregate: folded from its first event, and from a snapshot with the events after it.

The floor is the fold without a snapshot, of the same stream in the same round. 100 events come after the snapshot, as
many as there are on average where one is made every 200. State and events are small; a large state gains less.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from benchmarks.harness import Row, Setting, compare
from bus.messages import Command, Event, Key
from eventstore.decider import Decider
from eventstore.port import Snapshot
from eventstore.postgres import PostgresStore
from eventstore.repository import Repository
from eventstore.sqlite import SqliteStore

LENGTHS = (10, 100, 1_000, 10_000)
TAIL = 100


class Moved(Event, type="bench.moved.v1"):
    account_id: Key[str]
    cents: int
    currency: str = "EUR"
    reference: str = "an order of some kind"


class Move(Command[None], type="bench.move.v1"):
    account_id: Key[str]


@dataclass(frozen=True)
class Account:
    cents: int = 0
    movements: int = 0
    last: str = ""


def evolve(account: Account, event: Moved) -> Account:
    return replace(account, cents=account.cents + event.cents, movements=account.movements + 1, last=event.reference)


def decide(account: Account, command: Move) -> list[Moved]:
    return [Moved(account_id=command.account_id, cents=1)]


with_snapshots = Decider("account", initial=Account(), evolve=evolve, decide=decide)
without = Decider("account", initial=Account(), evolve=evolve, decide=decide, snapshots=None)


async def run(setting: Setting) -> list[Row]:
    rows: list[Row] = []
    async with AsyncExitStack() as stack:
        dsn = await stack.enter_async_context(setting.database())
        await PostgresStore.migrate(dsn, service="bench")
        path = setting.fresh() / "store.sqlite"
        await SqliteStore.migrate(path, service="bench")
        stores: Mapping[str, Any] = {
            "PostgreSQL": await stack.enter_async_context(PostgresStore.open(dsn, service="bench")),
            "SQLite": await stack.enter_async_context(SqliteStore.open(path, service="bench")),
        }
        lengths = LENGTHS[: setting.count(len(LENGTHS), 2)]
        for name, store in stores.items():
            for length in lengths:
                await _fill(store, length)
                key = str(length)
                rows += await compare(
                    f"load a stream of {length} events, {name}",
                    {
                        "folded": partial(_load, Repository(without, store=store), key, setting),
                        "snapshot and tail": partial(_load, Repository(with_snapshots, store=store), key, setting),
                    },
                    rounds=setting.rounds,
                    floor="folded",
                    warm_up=True,
                )
    return rows


async def _fill(store: Any, length: int) -> None:
    """A stream named after its length, with a snapshot `TAIL` events before its end (at its end, if it is short)."""
    key, repository = str(length), Repository(without, store=store)
    for at in range(0, length, 1_000):
        events = [Moved(account_id=key, cents=n) for n in range(at, min(length, at + 1_000))]
        await repository.append(key, *events, expected=at)
    version = length - TAIL if length > TAIL else length
    state = (await repository.load(key, at_version=version)).state
    codec = with_snapshots.state_codec()
    await store.snapshots.save(
        [Snapshot(with_snapshots.stream(key), version, codec.schema, codec.dump(state), datetime.now(UTC))]
    )


async def _load(repository: Repository[Any, Any, Any], key: str, setting: Setting, number: int) -> dict[str, float]:
    """Milliseconds per load, one after the other."""
    load: Callable[[str], Awaitable[Any]] = repository.load
    loads, seconds = 0, setting.pick(0.5, 0.05)
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds or not loads:
        await load(key)
        loads += 1
    return {"ms": spent * 1000 / loads}
