"""Handlers behind real buses: commands asked for by others, subscriptions to events, older types among them."""

# Without `from __future__ import annotations`: services are made per test, of classes that only exist in there.
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table, func, insert, select, text

from bus.cloudevents import to_record
from bus.codec import JsonCodec
from bus.envelope import Origin
from bus.registry import Registry
from bus.seams import Uuid7Ids
from bus.transport import Ack
from eventstore.port import Store
from foldbus import Command, Context, Died, Event, Key, Refused, Service, ThreadContext, upcast
from tests.eventstore.stores import NOON
from tests.stories.pairs import Pair, eventually, unique

ids = Uuid7Ids()
tables = MetaData()
visits = Table("visits", tables, Column("who", String, primary_key=True), Column("n", Integer, nullable=False))
COUNT = text("insert into visits values (:who, :n) on conflict (who) do update set n = visits.n + :n")


@dataclass
class Town:
    """A service that asks and tells, and one that handles."""

    shop: Any
    guide: Any
    classes: dict[str, Any]


def town() -> Town:
    mine, theirs = unique("guide"), unique("shop")

    class Opened(Event, type=f"{theirs}.opened.v2"):
        name: Key[str]
        chairs: int

    class OldOpened(Event, type=f"{theirs}.opened.v1"):
        name: Key[str]

    class Listed(Event, type=f"{mine}.listed.v1"):
        name: Key[str]
        n: int

    class List(Command[Listed], type=f"{mine}.list.v2"):
        name: Key[str]
        n: int

    class OldList(Command[Listed], type=f"{mine}.list.v1"):
        name: Key[str]

    class Full(Refused, code=f"{mine}.full"): ...

    async def note_opened(event: Opened, ctx: Context) -> None:
        sql = await ctx.sql()
        await sql.execute(COUNT, {"who": event.name, "n": event.chairs})
        if event.name == "bad":
            raise RuntimeError("a bug at bad")
        ctx.publish(Listed(name=event.name, n=event.chairs))

    def list_it(command: List, ctx: ThreadContext) -> Listed:
        if command.n == 13:
            raise RuntimeError("a bug at thirteen")
        if ctx.execute(select(func.count()).select_from(visits)).scalar_one() > 5:
            raise Full(n=5)
        ctx.execute(insert(visits).values(who=command.name, n=command.n))
        return Listed(name=command.name, n=command.n)

    guide = Service(
        mine,
        handlers=[note_opened, list_it],
        refusals=[Full],
        partitions=2,
        upcasters=[
            upcast(f"{theirs}.opened.v1", to=f"{theirs}.opened.v2", by=lambda data: {**data, "chairs": 4}),
            upcast(f"{mine}.list.v1", to=f"{mine}.list.v2", by=lambda data: {**data, "n": 1}),
        ],
    )
    shop = Service(theirs, messages=[Opened, OldOpened, List, OldList], refusals=[Full], partitions=2)
    return Town(shop, guide, {one.__name__: one for one in (Opened, OldOpened, Listed, List, OldList, Full)})


async def seen(store: Store) -> dict[str, int]:
    async with store.transaction() as tx:
        found = await tx.sql.execute(select(visits))
        return {row[0]: row[1] for row in found}


async def test_a_subscription_handles_events_of_others_once_each_old_ones_too(pair: Pair) -> None:
    its = town()
    opened, old = its.classes["Opened"], its.classes["OldOpened"]
    async with pair.connect(its.shop) as shop, pair.connect(its.guide) as guide:
        async with guide.store.transaction() as tx:
            await tx.sql.run_sync(tables.create_all)
        async with shop.unit() as unit:
            for event in (opened(name="a", chairs=2), old(name="b"), opened(name="bad", chairs=1)):
                unit.publish(event)
        await eventually(lambda: seen(guide.store), lambda found: set(found) == {"a", "b"})

        # The same event once more, as a relay that died between publishing and marking sends it.
        origin = Origin(its.shop.name, ids.new(), NOON, ids.new())
        event = JsonCodec(Registry([opened])).encode(
            opened(name="c", chairs=5), origin, topic=f"{its.shop.name}.events"
        )
        async with pair.transport() as transport:
            assert all(isinstance(answer, Ack) for answer in await transport.publish([to_record(event)] * 3))
        async with shop.unit() as unit:
            unit.publish(opened(name="c", chairs=100))
        await eventually(lambda: seen(guide.store), lambda found: found.get("c", 0) >= 105)
        assert await seen(guide.store) == {"a": 2, "b": 4, "c": 105}
        (letter,) = await eventually(lambda: guide.store.dead_letters(), lambda letters: len(letters) == 1)
        assert (letter.consumer, letter.key) == (f"{its.guide.name}.handler.note-opened", b"bad")


async def test_a_handler_in_a_thread_answers_refuses_and_dies_as_a_decider_does(pair: Pair) -> None:
    its = town()
    List, OldList, Full = (its.classes[name] for name in ("List", "OldList", "Full"))
    async with pair.connect(its.guide) as guide, pair.connect(its.shop, worker=False) as shop:
        async with guide.store.transaction() as tx:
            await tx.sql.run_sync(tables.create_all)
        id = ids.new()
        for _ in range(2):
            listed = await shop.request(List(name="a", n=3), id=id, timeout_s=30)
            assert (listed.name, listed.n) == ("a", 3)
        assert (await shop.request(OldList(name="b"), timeout_s=30)).n == 1
        with pytest.raises(Died, match="a bug at thirteen"):
            await shop.request(List(name="x", n=13), timeout_s=30)
        for n in range(4):
            await guide.execute(List(name=f"c{n}", n=n))
        with pytest.raises(Full) as full:
            await shop.request(List(name="y", n=1), timeout_s=30)
        assert full.value.attributes == {"n": 5}
        assert await seen(guide.store) == {"a": 3, "b": 1, "c0": 0, "c1": 1, "c2": 2, "c3": 3}
