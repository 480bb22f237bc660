"""The adapters that the conformance suite runs on, and what its tests build units from.

`STORES` is the whole table: an adapter plugs in with one entry. A `Backend` is one empty, migrated database; every
`open` of it is as good as another process: nothing is shared but the database.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from bus.envelope import Envelope, Failure, Kind, ReplyOutcome, ReplyTo, StreamId
from bus.seams import SystemClock, Uuid7Ids
from eventstore.port import (
    Append,
    Claim,
    ClaimState,
    DeadLetter,
    ExpectedVersion,
    Fence,
    Outcome,
    Store,
    Timer,
    Unit,
    Verdict,
    Wanted,
)

SERVICE = "shop"
CONSUMER = "shop.commands"
IDS = Uuid7Ids()
NOON = datetime(2024, 2, 29, 12, 0, 0, 123456, tzinfo=UTC)

Open = Callable[..., AbstractAsyncContextManager[Any]]


@dataclass(frozen=True)
class Backend:
    """One database. `open(metrics=...)` gives a store on it; several may be open at once."""

    name: str
    where: str
    migrate: Callable[[], Any]
    open: Open


def sqlite_backend(request: pytest.FixtureRequest, *, migrated: bool = False) -> Backend:
    from eventstore.sqlite import SqliteStore, migrations

    path: Path = request.getfixturevalue("tmp_path") / "store.sqlite"
    if migrated:
        migrations.migrate(path, service=SERVICE)

    def open_(**options: Any) -> AbstractAsyncContextManager[Any]:
        return SqliteStore.open(path, service=SERVICE, **options)

    return Backend("sqlite", str(path), lambda: SqliteStore.migrate(path, service=SERVICE), open_)


def postgres_backend(request: pytest.FixtureRequest, *, migrated: bool = False) -> Backend:
    from eventstore.postgres import PostgresStore

    dsn: str = request.getfixturevalue("shop_database" if migrated else "database")

    def open_(**options: Any) -> AbstractAsyncContextManager[Any]:
        return PostgresStore.open(dsn, service=SERVICE, clock=SystemClock(), ids=Uuid7Ids(), **options)

    return Backend("postgres", dsn, lambda: PostgresStore.migrate(dsn, service=SERVICE), open_)


STORES: dict[str, Callable[..., Backend]] = {
    "sqlite": sqlite_backend,
    "postgres": postgres_backend,
}


# --- envelopes and units ---------------------------------------------------------------------------------------------


def stream(name: str = "o-1", category: str = "order") -> StreamId:
    return StreamId(category, name)


def event(
    key: str = "o-1", *, public: bool = True, data: bytes = b'{"order_id":"o-1"}', id: UUID | None = None
) -> Envelope:
    return Envelope(
        id=id or IDS.new(),
        kind=Kind.EVENT,
        type="shop.order-placed.v1",
        source=SERVICE,
        key=key,
        data=data,
        time=NOON,
        correlation_id=IDS.new(),
        topic="shop.events" if public else None,
    )


def message(key: str = "o-1", *, topic: str | None = "stock.commands") -> Envelope:
    return replace(event(key), kind=Kind.COMMAND, type="stock.reserve.v1", topic=topic)


def reply(
    to: UUID | None = None, *, outcome: ReplyOutcome = ReplyOutcome.OK, topic: str | None = "front.inbox"
) -> Envelope:
    return replace(
        event("front-1"),
        kind=Kind.REPLY,
        type="shop.place-order.reply.v1",
        data=b'{"ok":true}',
        causation_id=to or IDS.new(),
        reply_to=ReplyTo("front.inbox", "front-1", "i-7"),
        outcome=outcome,
        topic=topic,
    )


def append(to: StreamId | str, expected: ExpectedVersion, *events: Envelope | int, public: bool = True) -> Append:
    """`append("o-1", 0)` is one event, `append("o-1", 0, 3)` three, or pass the envelopes."""
    target = stream(to) if isinstance(to, str) else to
    envelopes: list[Envelope] = []
    for one in events or (1,):
        if isinstance(one, int):
            envelopes += [event(target.id, public=public) for _ in range(one)]
        else:
            envelopes.append(one)
    return Append(target, expected, tuple(envelopes))


def claim(
    id: UUID | None = None,
    key: str = "o-1",
    *,
    reply: Envelope | None = None,
    consumer: str = CONSUMER,
    state: ClaimState = ClaimState.DONE,
) -> Claim:
    return Claim(consumer, id or IDS.new(), key, reply=reply, state=state)


def undo(of: UUID, fence: Fence, id: UUID | None = None, *, key: str = "o-1", reply: Envelope | None = None) -> Claim:
    return Claim(CONSUMER, id or IDS.new(), key, reply=reply, fences=of, fence=fence)


def failure(*, at: datetime = NOON) -> Failure:
    return Failure("ValueError", "no such sku \u2014 42", "Traceback…", 3, at - timedelta(seconds=5), at, "1.2.3")


def dead_letter(id: UUID | None = None, *, at: datetime = NOON, consumer: str = CONSUMER) -> DeadLetter:
    return DeadLetter(
        consumer=consumer,
        id=id or IDS.new(),
        topic="shop.commands",
        partition=3,
        offset=17,
        key=b"o-1\x00\xff",
        value=b"\x00not json\xff",
        headers=(("ce_id", b"\xfe"), ("ce_id", b"again")),
        failure=failure(at=at),
        type="shop.place-order.v1",
    )


def timer(due_at: datetime, id: UUID | None = None, *, consumer: str = CONSUMER, key: str = "o-1") -> Timer:
    return Timer(consumer, id or IDS.new(), key, due_at, message(key, topic=None))


def verdicts(outcomes: Sequence[Outcome]) -> list[str]:
    """In short: `ok`, or the verdict's name."""
    return ["ok" if one.verdict is Verdict.COMMITTED else str(one.verdict) for one in outcomes]


async def commit(store: Store, *units: Unit) -> list[str]:
    return verdicts(await store.commit(units))


async def one(store: Store, unit: Unit) -> Outcome:
    (outcome,) = await store.commit([unit])
    return outcome


async def version(store: Store, of: StreamId | str = "o-1") -> int:
    (found,) = await store.load([wanted(of)])
    return found.version


def wanted(of: StreamId | str, after: int = 0, limit: int | None = None) -> Wanted:
    return Wanted(stream(of) if isinstance(of, str) else of, after, limit)


async def whole_log(store: Store, *, outgoing: bool = True, limit: int = 1000) -> list[Envelope]:
    """Everything, page by page."""
    found: list[Envelope] = []
    after = 0
    while True:
        page = await store.read_all(after=after, limit=limit, outgoing=outgoing)
        found += page.records
        if page.upto <= after or page.upto >= page.head:
            return found
        after = page.upto
