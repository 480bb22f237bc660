"""Reading streams and the log, waiting for it, and the user's own transactions."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from typing import Any

import pytest
from sqlalchemy import text

from bus.envelope import Envelope
from eventstore.errors import BadUnit, CheckpointAhead, EventStoreError
from eventstore.port import Store, Unit, Verdict
from tests.eventstore.stores import (
    Backend,
    append,
    claim,
    commit,
    event,
    message,
    one,
    reply,
    stream,
    verdicts,
    version,
    wanted,
    whole_log,
)

# --- streams ---------------------------------------------------------------------------------------------------------


async def test_load_answers_in_the_order_asked_whatever_exists(store: Store) -> None:
    await store.commit([Unit(appends=(append("a", 0, 3), append("b", 0, 1)))])
    slices = await store.load([wanted("b"), wanted("no"), wanted("a"), wanted("b", after=1), wanted("a", after=7)])
    assert [(slice.stream.id, slice.version, len(slice.records)) for slice in slices] == [
        ("b", 1, 1),
        ("no", 0, 0),
        ("a", 3, 3),
        ("b", 1, 0),
        ("a", 3, 0),
    ]
    assert list(await store.load([])) == []


async def test_load_reads_on_after_a_version_up_to_a_limit_and_names_the_streams_own_version(store: Store) -> None:
    await store.commit([Unit(appends=(append("a", 0, 5),))])
    middle, none = await store.load([wanted("a", after=1, limit=2), wanted("a", limit=0)])
    assert [record.version for record in middle.records] == [2, 3]
    assert (middle.version, none.version, list(none.records)) == (5, 5, [])


async def test_load_of_many_streams_at_once(store: Store) -> None:
    await store.commit([Unit(appends=(append(f"s-{n}", 0, 1 + n % 3),)) for n in range(700)])
    slices = await store.load([wanted(f"s-{n}") for n in reversed(range(700))])
    assert [(slice.version, len(slice.records)) for slice in slices] == [(1 + n % 3,) * 2 for n in reversed(range(700))]


async def test_a_slice_is_a_consistent_prefix_while_somebody_appends(store: Store, twin: Store) -> None:
    """Never a version beyond the records that came with it."""
    stop = asyncio.Event()

    async def appending() -> None:
        for n in range(40):
            await one(twin, Unit(appends=(append("a", 2 * n, 2),)))
        stop.set()

    task = asyncio.create_task(appending())
    seen = 0
    while not stop.is_set():
        (slice,) = await store.load([wanted("a")])
        assert [record.version for record in slice.records] == list(range(1, slice.version + 1))
        assert slice.version % 2 == 0
        assert slice.version >= seen
        seen = slice.version
    await task


# --- the log ---------------------------------------------------------------------------------------------------------


async def test_an_empty_log_is_at_zero(store: Store) -> None:
    page = await store.read_all(after=0, limit=10, outgoing=True)
    assert (list(page.records), page.upto, page.head, await store.head()) == ([], 0, 0, 0)


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
@pytest.mark.parametrize("outgoing", [False, True])
async def test_pages_of_any_size_show_everything_once_in_position_order(
    store: Store, limit: int, outgoing: bool
) -> None:
    for n in range(5):
        await store.commit(
            [Unit(claim(key=str(n), reply=reply()), appends=(append(f"s-{n}", 0, 2),), outgoing=(message(),))]
        )
    everything = await whole_log(store, outgoing=True)
    assert len(everything) == 20
    expected = [record for record in everything if outgoing or record.stream is not None]
    found: list[Envelope] = []
    after = 0
    for _ in range(30):
        page = await store.read_all(after=after, limit=limit, outgoing=outgoing)
        assert len(page.records) <= limit
        assert page.upto >= max([after, *(record.position or 0 for record in page.records)])
        assert page.upto <= page.head
        found += page.records
        if page.upto == page.head:
            break
        after = page.upto
    assert found == expected
    assert page.upto == await store.head()


async def test_upto_passes_positions_that_a_reader_of_events_does_not_see(store: Store) -> None:
    await store.commit([Unit(appends=(append("a", 0),)), Unit(outgoing=(message(), message()))])
    page = await store.read_all(after=0, limit=10)
    assert len(page.records) == 1
    assert page.upto == page.head == await store.head()
    assert page.upto > (page.records[0].position or 0)
    assert list((await store.read_all(after=page.upto, limit=10, outgoing=True)).records) == []


async def test_a_full_page_ends_at_its_last_record(store: Store) -> None:
    await store.commit([Unit(appends=(append("a", 0, 3),))])
    page = await store.read_all(after=0, limit=2)
    assert page.upto == page.records[-1].position
    assert page.upto < page.head


async def test_a_checkpoint_beyond_what_the_log_has_drawn_is_refused(store: Store) -> None:
    """After a restore, or on another database: who waited there would skip what is written up to it."""
    await store.commit([Unit(appends=(append("a", 0),))])
    head = await store.head()
    assert list((await store.read_all(after=head, limit=10, outgoing=True)).records) == []
    with pytest.raises(CheckpointAhead) as refused:
        await store.read_all(after=head + 1, limit=10, outgoing=True)
    assert (refused.value.after, refused.value.drawn) == (head + 1, head)


async def test_a_reader_beside_many_writers_misses_nothing_repeats_nothing_and_inverts_nothing(
    store: Store, twin: Store
) -> None:
    async def writer(where: Store, n: int) -> None:
        for k in range(25):
            lost = Unit(appends=(append(f"s-{n}", 99),))
            await where.commit([Unit(appends=(append(f"s-{n}", 2 * k, 2),), outgoing=(message(),)), lost])

    writing = asyncio.gather(*(writer(where, n) for n, where in enumerate((store, twin) * 4)))
    found: list[Envelope] = []
    after = 0
    while True:
        finished = writing.done()
        page = await twin.read_all(after=after, limit=7, outgoing=True)
        found += page.records
        after = page.upto
        if finished and not page.records and page.upto == page.head:
            break
        if not page.records:
            await asyncio.sleep(0)
    await writing
    positions = [record.position or 0 for record in found]
    assert positions == sorted(set(positions))
    assert len(found) == 8 * 25 * 3
    versions: dict[Any, list[int]] = defaultdict(list)
    for record in found:
        if record.stream is not None:
            versions[record.stream].append(record.version or 0)
    assert all(seen == list(range(1, 51)) for seen in versions.values())


async def test_published_messages_are_forgotten_events_stay(store: Store) -> None:
    made = claim(reply=reply())
    await store.commit([Unit(made, appends=(append("a", 0),), outgoing=(message(), message()))])
    first, second, third, fourth = await whole_log(store)
    assert await store.forget_outgoing(upto=second.position or 0) == 1
    assert await whole_log(store) == [first, third, fourth]
    assert await store.forget_outgoing(upto=fourth.position or 0) == 2
    assert await store.forget_outgoing(upto=fourth.position or 0) == 0
    assert await whole_log(store) == [first]
    assert await store.head() >= (fourth.position or 0)
    assert await commit(store, Unit(made)) == ["duplicate"]


async def test_positions_of_forgotten_messages_are_not_drawn_again_not_even_by_another_store(
    backend: Backend,
) -> None:
    async with backend.open() as store:
        await store.commit([Unit(outgoing=(message(), message()))])
        last = (await whole_log(store))[-1].position or 0
        await store.forget_outgoing(upto=last)
    async with backend.open() as store:
        assert await store.head() >= last
        outcome = await one(store, Unit(appends=(append("a", 0),)))
        assert outcome.position > last


async def test_a_page_of_nothing_is_not_a_page(store: Store) -> None:
    with pytest.raises(ValueError, match="limit"):
        await store.read_all(after=0, limit=0)


# --- waiting ---------------------------------------------------------------------------------------------------------


async def test_waiting_ends_at_once_when_the_log_is_already_past(store: Store) -> None:
    outcome = await one(store, Unit(appends=(append("a", 0),)))
    await asyncio.wait_for(store.wait_past(outcome.position - 1, timeout_s=60), 30)


@pytest.mark.parametrize("who", ["the same store", "another store"])
@pytest.mark.parametrize("what", ["event", "outgoing"])
async def test_waiting_is_ended_by_a_commit(store: Store, twin: Store, who: str, what: str) -> None:
    head = await store.head()
    waiting = [asyncio.create_task(store.wait_past(head, timeout_s=60)) for _ in range(3)]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in waiting)
    unit = Unit(appends=(append("a", 0),)) if what == "event" else Unit(outgoing=(message(),))
    await (store if who == "the same store" else twin).commit([unit])
    await asyncio.wait_for(asyncio.gather(*waiting), 30)
    assert (await store.read_all(after=head, limit=10, outgoing=True)).records


async def test_waiting_ends_after_its_time(store: Store) -> None:
    before = time.monotonic()
    await asyncio.wait_for(store.wait_past(await store.head(), timeout_s=0.15), 30)
    assert time.monotonic() - before >= 0.14


# --- transactions ----------------------------------------------------------------------------------------------------


async def _table(store: Store) -> None:
    async with store.transaction() as tx:
        await tx.sql.execute(text("CREATE TABLE customers (id varchar(40) PRIMARY KEY)"))


async def _customers(store: Store) -> list[str]:
    async with store.transaction() as tx:
        return list((await tx.sql.execute(text("SELECT id FROM customers ORDER BY id"))).scalars())


async def test_a_users_rows_and_a_unit_are_committed_together(store: Store) -> None:
    await _table(store)
    made = claim(reply=reply())
    async with store.transaction() as tx:
        await tx.sql.execute(text("INSERT INTO customers VALUES ('anna')"))
        (outcome,) = await store.commit([Unit(made, appends=(append("a", 0),), outgoing=(message(),))], tx=tx)
        assert outcome.verdict is Verdict.COMMITTED
        assert outcome.versions == {stream("a"): 1}
    assert await _customers(store) == ["anna"]
    event_, *_ = await whole_log(store)
    assert event_.position == outcome.position
    assert await commit(store, Unit(made)) == ["duplicate"]


@pytest.mark.parametrize("first", ["unit", "row"])
async def test_a_transaction_that_fails_takes_the_unit_back_also_as_its_first_statement(
    store: Store, first: str
) -> None:
    """SQLAlchemy begins lazily: a claim that went past it survived the rollback."""
    await _table(store)
    made = claim(reply=reply())
    with pytest.raises(RuntimeError, match="on purpose"):  # noqa: PT012
        async with store.transaction() as tx:
            if first == "row":
                await tx.sql.execute(text("INSERT INTO customers VALUES ('anna')"))
            await store.commit([Unit(made, appends=(append("a", 0),))], tx=tx)
            if first == "unit":
                await tx.sql.execute(text("INSERT INTO customers VALUES ('anna')"))
            raise RuntimeError("on purpose")
    assert await _customers(store) == []
    assert await whole_log(store) == []
    assert await commit(store, Unit(made, appends=(append("a", 0),))) == ["ok"]


async def test_a_unit_that_loses_in_a_transaction_is_told_and_the_rest_stands(store: Store) -> None:
    await _table(store)
    async with store.transaction() as tx:
        outcomes = await store.commit(
            [Unit(claim(key="a"), appends=(append("a", 4),)), Unit(claim(key="b"), appends=(append("b", 0),))], tx=tx
        )
        more = await store.commit([Unit(claim(key="b"), appends=(append("b", 1),))], tx=tx)
        await tx.sql.execute(text("INSERT INTO customers VALUES ('anna')"))
    assert verdicts([*outcomes, *more]) == ["conflict", "ok", "ok"]
    assert await version(store, "b") == 2
    assert await _customers(store) == ["anna"]


async def test_a_malformed_unit_in_a_transaction_is_refused_and_the_transaction_goes_on(store: Store) -> None:
    await _table(store)
    async with store.transaction() as tx:
        await tx.sql.execute(text("INSERT INTO customers VALUES ('anna')"))
        with pytest.raises(BadUnit):
            await store.commit([Unit(appends=(append("a", -2),))], tx=tx)
        assert verdicts(await store.commit([Unit(appends=(append("a", 0, event()),))], tx=tx)) == ["ok"]
    assert await _customers(store) == ["anna"]
    assert await version(store, "a") == 1


async def test_a_reader_does_not_see_a_transaction_before_it_ends_and_wakes_when_it_does(
    store: Store, twin: Store
) -> None:
    head = await twin.head()
    waiting = asyncio.create_task(twin.wait_past(head, timeout_s=60))
    async with store.transaction() as tx:
        await store.commit([Unit(appends=(append("a", 0),))], tx=tx)
        assert list((await twin.read_all(after=0, limit=10)).records) == []
        assert list((await store.load([wanted("a")]))[0].records) == []
    await asyncio.wait_for(waiting, 5)
    assert len((await twin.read_all(after=0, limit=10)).records) == 1


async def test_a_transaction_that_the_user_ended_is_not_written_past(store: Store) -> None:
    """Either it is refused, or it goes into a new transaction that the context ends: never a statement on its own."""
    made = claim()
    with pytest.raises((RuntimeError, EventStoreError)):  # noqa: PT012
        async with store.transaction() as tx:
            await tx.sql.rollback()
            await store.commit([Unit(made, appends=(append("a", 0),))], tx=tx)
            raise RuntimeError("on purpose")
    assert await whole_log(store) == []
    assert await commit(store, Unit(made)) == ["ok"]
