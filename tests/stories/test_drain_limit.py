"""A handler that outlasts the drain of a rebalance: others do its messages, and its late end changes nothing."""

# Without `from __future__ import annotations`: the services are made per test, of classes that only exist in there.
import asyncio
from dataclasses import replace

import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table, func, insert, select

from bus.engine.settings import EngineSettings
from bus.metrics import MemoryMetrics
from bus.transport import PollSettings
from foldbus import Command, Context, Key, Service
from tests.stories.pairs import QUICK, Pair, eventually, unique

POLL = PollSettings(session_timeout_s=20.0, heartbeat_s=0.3, rebalance_timeout_s=40.0, request_timeout_s=20.0)
# A lane per message in hand: a batch is at work for as long as the slowest in it.
IMPATIENT = replace(QUICK, engine=EngineSettings(commit_interval_s=0.2, drain_timeout_s=0.4, lanes=8, batch_size_max=1))
KEYS = [f"k{n}" for n in (0, 1, 3, 4, 8, 10, 14, 18)]
"""Two in each of four partitions: whatever moves, something moves along."""

tables = MetaData()
rows = Table("drained", tables, Column("key", String), Column("n", Integer))  # nothing in it is unique


@pytest.mark.timeout(240)
async def test_handlers_that_outlast_the_drain_are_left_behind_and_their_late_end_changes_nothing(pair: Pair) -> None:
    name = unique("drain")
    slow = asyncio.Event()
    begun: list[str] = []

    class Do(Command[None], type=f"{name}.do.v1"):
        account: Key[str]
        n: int

    async def do(command: Do, ctx: Context) -> None:
        if command.n == 0 and command.account not in begun:
            begun.append(command.account)
            await slow.wait()
        sql = await ctx.sql()
        await sql.execute(insert(rows).values(key=command.account, n=command.n))

    def service() -> Service:
        return Service(name, handlers=[do], partitions=4)

    metrics = MemoryMetrics()
    async with pair.connect(service(), settings=IMPATIENT, poll=POLL, metrics=metrics) as first:
        async with first.store.transaction() as tx:
            await tx.sql.run_sync(tables.create_all)

        async def done() -> dict[str, list[int]]:
            async with first.store.transaction() as tx:
                found = await tx.sql.execute(select(rows.c.key, rows.c.n))
                by_key: dict[str, list[int]] = {}
                for key, n in found:
                    by_key.setdefault(key, []).append(n)
                return by_key

        for n in range(3):
            for key in KEYS:
                await first.send(Do(account=key, n=n))

        async def all_begun() -> bool:
            return len(begun) == len(KEYS)

        await eventually(all_begun, bool)
        async with pair.connect(service(), settings=IMPATIENT, poll=POLL) as second:
            # Those of the partitions that moved are done by the second one, while the first is still at them.
            moved = await eventually(done, bool, timeout_s=40)
            assert metrics.total("foldbus_drain_timeouts_total") >= 1
            assert all(ns == list(range(len(ns))) for ns in moved.values())
            slow.set()
            await eventually(done, lambda found: found == {key: [0, 1, 2] for key in KEYS}, timeout_s=40)
            for connection in (first, second):
                assert connection.worker is not None

                async def idle(connection: object = connection) -> bool:
                    return all([await engine.caught_up() for engine in connection.worker.engines])  # type: ignore[attr-defined]

                await eventually(idle, bool)
        async with first.store.transaction() as tx:
            count = (await tx.sql.execute(select(func.count()).select_from(rows))).scalar_one()
        assert count == 3 * len(KEYS)
