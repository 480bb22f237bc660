"""Stores to export from and to import into: one of each adapter, of one service."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import UUID

from eventstore.export import Header, export_to, import_lines
from eventstore.parking import Waiting
from eventstore.port import (
    ANY,
    ClaimState,
    Fence,
    LetterWhere,
    Settled,
    Settlement,
    Settling,
    Snapshot,
    Unit,
    Watermark,
)
from eventstore.postgres import PostgresStore
from eventstore.postgres import moving as postgres_moving
from eventstore.sqlite import SqliteStore
from eventstore.sqlite import moving as sqlite_moving
from tests.eventstore.parked import failed, waiting
from tests.eventstore.stores import (
    CONSUMER,
    IDS,
    NOON,
    SERVICE,
    append,
    claim,
    dead_letter,
    event,
    failure,
    message,
    reply,
    stream,
    timer,
    undo,
)

Open = Callable[..., AbstractAsyncContextManager[Any]]


@dataclass(frozen=True)
class Place:
    """Where one service's store is, or will be."""

    name: str
    where: str
    store: Open
    source: Open
    target: Open
    migrate: Callable[[], Any]

    async def export(self) -> bytes:
        out = BytesIO()
        async with self.source() as source:
            await export_to(source, out)
        return out.getvalue()

    async def fill(self, exported: bytes) -> Header:
        async with self.target() as target:
            return await import_lines(lines(exported), target, service=SERVICE)


def sqlite_place(path: Path, service: str = SERVICE) -> Place:
    return Place(
        "sqlite",
        str(path),
        partial(SqliteStore.open, path, service=service),
        partial(sqlite_moving.open_source, path, service=service),
        partial(sqlite_moving.open_target, path, service=service),
        partial(SqliteStore.migrate, path, service=service),
    )


def postgres_place(dsn: str, service: str = SERVICE) -> Place:
    return Place(
        "postgres",
        dsn,
        partial(PostgresStore.open, dsn, service=service),
        partial(postgres_moving.open_source, dsn, service=service),
        partial(postgres_moving.open_target, dsn, service=service),
        partial(PostgresStore.migrate, dsn, service=service),
    )


def lines(exported: bytes) -> Iterator[bytes]:
    return iter(exported.splitlines(keepends=True)) if b"\r" not in exported else iter(BytesIO(exported).readline, b"")


def signed(body: Sequence[bytes]) -> bytes:
    """Lines with an end that fits them, however wrong they are."""
    found = b"".join(body)
    digest = hashlib.sha256(found).hexdigest()
    return found + b'{"is":"end","lines":%d,"sha256":"%s"}\n' % (len(body), digest.encode())


async def live(store: Any, *, streams: int = 3) -> None:
    """Something of everything that a store holds."""
    long_past = NOON - timedelta(days=2)
    for nth in range(streams):
        name = f"o-{nth}"
        took = claim(key=name, reply=reply())
        await store.commit([Unit(claim=took, appends=(append(name, 0, 3),), outgoing=(message(name),))])
        await store.commit([Unit(claim=took, appends=(append(name, 3),))])  # again: answered, not written
    await store.commit(
        [Unit(appends=(append("private", ANY, 2, public=False), append(stream("ö\u2028\x7f", "saga"), 0)))]
    )
    refused, undone = IDS.new(), IDS.new()
    await store.commit(
        [
            Unit(claim=claim(refused, "o-1", reply=reply(topic=None))),
            Unit(claim=claim(key="o-1")),
            Unit(claim=undo(undone, Fence.CANCEL, reply=reply(undone))),
            Unit(claim=claim(key="o-2", state=ClaimState.DEAD), dead_letter=dead_letter()),
            Unit(claim=claim(key="o-3", state=ClaimState.DEAD), dead_letter=dead_letter(UUID(int=7), at=long_past)),
        ],
        watermarks=[Watermark("shop", "shop.commands", part, 10 + part) for part in range(12)],
    )
    await store.commit([Unit(timers=(timer(long_past), timer(NOON + timedelta(days=9000))))])
    (due,) = await store.timers.due(limit=1)
    assert due.due_at == long_past
    async with store.leases.lead("relay") as leading:
        await store.leases.mark(leading.lease, old=0, new=4)
    await store.forget_outgoing(upto=4)
    await store.snapshots.save([Snapshot(stream("o-1"), 2, "order/1", b"\x00\xff{}", NOON)])
    await settle_one_of_each(store)
    await park_some(store)
    await store.flow.pause("shop", by="ann", reason="stock-taking \u2028")
    await store.flow.pause("shop.handler.mail", by="")


async def park_some(store: Any) -> None:
    """Keys that are due, held and in somebody's hands; effects that are under way, parked, and given up."""
    long = "k" * 3000
    begun, parked, dead = (waiting(key) for key in ("begun", long, "dead"))
    tokens = {}
    for one in (begun, parked, dead):
        found = await store.effects.begin(CONSUMER, one.envelope.id, one.envelope.key, lease_s=0)
        tokens[one.envelope.id] = found.token
    unit = Unit(claim=claim(dead.envelope.id, "dead", state=ClaimState.DEAD))
    await store.effects.commit(tokens[dead.envelope.id], unit)
    await store.parking.park(CONSUMER, parked, failed(3), due_at=NOON)
    await store.parking.follow(
        CONSUMER, [waiting(long), Waiting(replace(message(), key=long, data=b"\xff", position=7))]
    )
    assert await store.parking.due(consumers=[CONSUMER], limit=1, lease_s=600)
    held = waiting("held")
    assert held.delivery is not None
    odd = replace(held.delivery, key=None, value=b"\x00\xff", headers=(("\udcff", b"\xfe"),))
    held = replace(held, delivery=odd)
    await store.parking.park("else", held, replace(failed(1), message="half a pair: \ud800\x00"), due_at=None)
    gone = waiting("gone")
    await store.parking.park(CONSUMER, gone, failed(1), due_at=NOON - timedelta(days=3))
    (turn,) = await store.parking.due(consumers=[CONSUMER], limit=1, lease_s=600)
    await store.parking.commit(turn, Unit(claim=claim(gone.envelope.id, "gone")))


async def settle_one_of_each(store: Any) -> None:
    """Dead letters that somebody dealt with, in every way; one of them died again and is settled twice."""
    again, handled = IDS.new(), IDS.new()
    for nth, how in enumerate((*Settled, Settled.DISCARDED)):
        id = again if how is Settled.REDRIVEN or nth == len(Settled) else IDS.new()
        letter = dead_letter(handled if how is Settled.HANDLED else id, at=NOON + timedelta(seconds=nth))
        if nth % 2:
            letter = replace(letter, key=None, value=b'{"text": "\xc3\xb6"}')
        state = ClaimState.DONE if how is Settled.HANDLED else ClaimState.DEAD
        await store.commit([Unit(claim=claim(letter.id, state=state), dead_letter=letter)])
        asked = Settled.REDRIVEN if how is Settled.HANDLED else how
        settlement = Settlement(asked, NOON + timedelta(hours=nth, microseconds=1), "ann", f"because \u2028 {nth}")
        unit = Unit(timers=(timer(NOON),)) if how is Settled.REDRIVEN else None
        answer = await store.letters.settle(letter, settlement, unit=unit)
        assert answer is (Settling.HANDLED if how is Settled.HANDLED else Settling.SETTLED)
    found = await store.letters.page(LetterWhere(), settled=True)
    assert [one.settled.how for one in found] == [*Settled, Settled.DISCARDED]


__all__ = ["CONSUMER", "Place", "event", "failure", "lines", "live", "postgres_place", "signed", "sqlite_place"]
