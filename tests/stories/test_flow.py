"""Pausing groups, placing their offsets, retention that passed them, and deletes of compacted topics: on real buses."""

# Without `from __future__ import annotations`: services are made per test, of classes that only exist in there.
import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest
from pydantic import BaseModel

from bus.errors import TopicMismatch
from bus.metrics import MemoryMetrics
from bus.transport import Ack, Outgoing, PollSettings, TopicSpec, Transport
from foldbus import AT_MOST_ONCE, BareContext, Connection, Context, Event, Handler, Key, Service, projection
from foldbus.flow import BadPlace, NotPaused, UnknownGroup, place, place_projection, plan_moves, plan_projection
from foldbus.retention import ClaimsTooShort
from tests.bus.transports import FORGET, Rig
from tests.stories.pairs import Pair, eventually, unique


@dataclass
class Crm:
    """A service that hears of customers from a topic of others, with one partition; `seen` is what its handler took."""

    name: str
    topic: str
    service: Service
    customers: Any
    seen: list[str] = field(default_factory=list[str])
    holding: asyncio.Event = field(default_factory=asyncio.Event)
    """Set: the handler goes on at once."""
    entered: int = 0

    @property
    def group(self) -> str:
        return f"{self.name}.handler.note"

    async def tell(self, transport: Transport, *numbers: int, delete: str | None = None) -> None:
        """Changes of customer `c`, or its delete."""
        records = [
            Outgoing(
                self.topic,
                b"c",
                b'{"customer_id": "c", "n": %d}' % n,
                tuple(
                    (name, value.encode())
                    for name, value in (
                        ("ce_specversion", "1.0"), ("ce_id", str(uuid4())), ("ce_source", "/legacy"),
                        ("ce_type", f"{self.name}-legacy.changed.v1"),
                    )
                ),
                0,
            )
            for n in numbers
        ]  # fmt: skip
        if delete is not None:
            # A type of the producer's own: what a record without a value says of itself counts for nothing.
            headers = (*records[0].headers[:3], ("ce_type", b"legacy.erased.v1")) if records else ()
            records.append(Outgoing(self.topic, delete.encode(), None, headers, 0))
        answers = await transport.publish(records)
        assert [one for one in answers if not isinstance(one, Ack)] == []


def crm(*, compact: bool = False, with_projection: bool = False, **options: Any) -> Crm:
    name, topic = unique("crm"), f"legacy.{unique('customers')}"
    seen: list[str] = []

    class Changed(Event, type=f"{name}-legacy.changed.v1", topic=topic):
        customer_id: Key[str]
        n: int

    class Deleted(Event, type=f"{name}-legacy.deleted.v1", topic=topic, deletes=True):
        customer_id: Key[str]

    class Customer(BaseModel, frozen=True):
        customer_id: str
        n: int

    @projection("customers", version=1)
    def customers(row: Customer | None, event: Changed | Deleted) -> Customer | None:
        if isinstance(event, Deleted):
            return None
        return Customer(customer_id=event.customer_id, n=(row.n if row else 0) + event.n)

    @projection("changes", version=1)
    def changes(row: Customer | None, event: Changed) -> Customer | None:
        return Customer(customer_id=event.customer_id, n=(row.n if row else 0) + event.n)

    async def note(event: Changed | Deleted, ctx: Context) -> None:
        its.entered += 1
        await its.holding.wait()
        await ctx.sql()  # a message that was handled before ends here
        its.seen.append(f"{event.n}" if isinstance(event, Changed) else f"{event.customer_id} deleted")

    async def note_changes(event: Changed, ctx: Context) -> None:
        its.entered += 1
        await its.holding.wait()
        await ctx.sql()  # a message that was handled before ends here
        its.seen.append(f"{event.n}")

    note_changes.__name__ = "note"
    declared = [TopicSpec(topic, 1, compact=True)] if compact else []
    chosen = customers if compact else changes
    service = Service(
        name,
        handlers=[note if compact else note_changes],
        projections=[chosen] if with_projection else [],
        partitions=1,
        topics=[*declared, *options.pop("topics", [])],
        **options,
    )
    its = Crm(name, topic, service, chosen, seen)
    its.holding.set()
    return its


@asynccontextmanager
async def with_topic(pair: Pair, its: Crm, *, compact: bool = False) -> AsyncGenerator[Transport]:
    async with pair.transport() as transport:
        await transport.admin.create([TopicSpec(its.topic, 1, compact=compact)])
        yield transport


async def forget(pair: Pair, transport: Transport, topic: str, offset: int) -> None:
    """As retention would."""
    kind = "kafka" if pair.bus.startswith("kafka:") else "embedded"
    rig = Rig(kind, pair.bus.removeprefix("kafka://"), PollSettings())
    await FORGET[kind](rig, transport, topic, 0, offset)


async def members(connection: Connection, its: Crm) -> int:
    return await connection.transport.admin.members(its.group)


async def paused(connection: Connection, its: Crm) -> None:
    """Pauses and waits until nobody is in the group."""
    await connection.store.flow.pause(its.group, by="ann", reason="a test")

    async def left() -> int:
        return await members(connection, its)

    await eventually(left, lambda found: found == 0)


async def noticed(connection: Connection, its: Crm) -> None:
    """Waits until the worker knows of the pause."""
    worker = connection.worker
    assert worker is not None

    async def known() -> set[str]:
        return set(worker.gate.paused)

    await eventually(known, lambda found: found == {its.group})


async def sums_up_to(connection: Connection, its: Crm, wanted: int) -> None:
    """Waits until the read model of customer `c` has seen numbers of that sum."""

    async def total() -> int | None:
        row = await connection.view(its.customers).get("c")
        return None if row is None else row.n

    await eventually(total, lambda found: found == wanted)


async def saw(its: Crm, *wanted: str) -> None:
    async def seen() -> list[str]:
        return list(its.seen)

    assert await eventually(seen, lambda found: len(found) >= len(wanted)) == list(wanted)


# --- pause and resume ------------------------------------------------------------------------------------------------


async def test_a_paused_group_finishes_what_it_has_and_leaves_and_stays_out_until_resumed(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    its = crm()
    async with with_topic(pair, its) as transport:
        async with pair.connect(its.service) as connection:
            its.holding.clear()
            await its.tell(transport, 1)
            await eventually(lambda: asyncio.sleep(0, its.entered), lambda found: found == 1)
            await connection.store.flow.pause(its.group, by="ann", reason="a test")
            await noticed(connection, its)
            assert await members(connection, its) == 1, "it has a message in hand and must finish it first"
            its.holding.set()
            await eventually(lambda: members(connection, its), lambda found: found == 0)
            assert its.seen == ["1"]
            assert await transport.admin.committed(its.group, [its.topic]) == {(its.topic, 0): 1}
            await its.tell(transport, 2)

        async with pair.connect(its.service) as connection:  # a restart changes nothing
            await noticed(connection, its)
            assert await members(connection, its) == 0
            assert its.seen == ["1"]
            worker = connection.worker
            assert worker is not None
            assert (await worker.alive()).ok
            assert any("paused by ann" in reason for reason in (await worker.ready()).reasons)
            assert await connection.store.flow.resume(its.group, by="ann")
            await saw(its, "1", "2")
    assert "did not drain" not in caplog.text


async def test_a_pause_of_one_group_leaves_the_others_running(pair: Pair) -> None:
    its = crm(with_projection=True)
    async with with_topic(pair, its) as transport, pair.connect(its.service) as connection:
        await its.tell(transport, 1)
        await saw(its, "1")
        await paused(connection, its)
        await its.tell(transport, 4)
        await sums_up_to(connection, its, 5)
        assert its.seen == ["1"]


# --- seek ------------------------------------------------------------------------------------------------------------


async def test_retention_that_passed_a_group_stands_still_until_somebody_chooses(pair: Pair) -> None:
    its, metrics = crm(), MemoryMetrics()
    async with with_topic(pair, its) as transport, pair.connect(its.service, metrics=metrics) as connection:
        await its.tell(transport, 0)
        await saw(its, "0")
        await paused(connection, its)
        await its.tell(transport, 1, 2, 3, 4, 5)
        await forget(pair, transport, its.topic, 4)
        await connection.store.flow.resume(its.group, by="ann")

        async def held() -> int:
            return metrics.total("foldbus_offset_out_of_range_total")

        await eventually(held, lambda found: found > 0)
        assert its.seen == ["0"], "a silent jump"

        await paused(connection, its)
        (move,) = await plan_moves(connection, its.group, None, None, "beginning")
        assert (move.at, move.first, move.end, move.to) == (1, 4, 6, 4)
        assert (move.lost, move.skipped, move.again) == (3, 0, 0)
        await place(connection, its.group, [move], by="ann", reason="they are in the backup")
        await connection.store.flow.resume(its.group, by="ann")
        await saw(its, "0", "4", "5")
        acts = [(act.what, act.by, act.reason) for act in await connection.store.flow.acts(limit=2)]
        assert acts[1] == (f"placed {its.topic}[0] at 4", "ann", "they are in the backup")


async def test_a_step_forward_skips_only_what_it_says_and_moves_both_places(pair: Pair) -> None:
    its = crm()
    async with with_topic(pair, its) as transport, pair.connect(its.service) as connection:
        await its.tell(transport, 0)
        await saw(its, "0")
        await paused(connection, its)
        await its.tell(transport, 1, 2, 3)
        (move,) = await plan_moves(connection, its.group, its.topic, [0], "3")
        assert (move.lost, move.skipped, move.again) == (0, 2, 0)
        await place(connection, its.group, [move], by="ann")
        assert (await transport.admin.committed(its.group, [its.topic]))[its.topic, 0] == 3
        assert (await connection.store.watermarks(its.group))[its.topic, 0] == 3
        await connection.store.flow.resume(its.group, by="ann")
        await saw(its, "0", "3")


async def test_a_step_back_reads_again_and_what_was_handled_has_no_second_effect(pair: Pair) -> None:
    its, metrics = crm(), MemoryMetrics()
    async with with_topic(pair, its) as transport, pair.connect(its.service, metrics=metrics) as connection:
        await its.tell(transport, 0, 1)
        await saw(its, "0", "1")
        await paused(connection, its)
        (move,) = await plan_moves(connection, its.group, None, [0], "beginning")
        assert (move.lost, move.skipped, move.again) == (0, 0, 2)
        await place(connection, its.group, [move], by="ann")
        await its.tell(transport, 2)
        await connection.store.flow.resume(its.group, by="ann")
        await saw(its, "0", "1", "2")

        async def duplicates() -> int:
            return metrics.total("foldbus_duplicates_total")

        await eventually(duplicates, lambda found: found == 2)


async def test_a_group_that_is_read_at_most_once_is_paused_and_placed_by_its_offsets_alone(pair: Pair) -> None:
    name = unique("dice")
    seen: list[str] = []

    class Thrown(Event, type=f"{name}.thrown.v1"):
        table: Key[str] = "t"
        n: int

    async def watch(event: Thrown, ctx: BareContext) -> None:
        seen.append(str(event.n))

    service = Service(name, handlers=[Handler(watch, delivery=AT_MOST_ONCE)], partitions=1)
    group, topic = f"{name}.handler.watch", f"{name}.events"
    its = Crm(name, topic, service, None, seen)

    async def throw(connection: Connection, *numbers: int) -> None:
        async with connection.unit() as unit:
            for n in numbers:
                unit.publish(Thrown(n=n))

    async def standing() -> int:
        return await connection.transport.admin.members(group)

    async with pair.connect(service) as connection:
        await throw(connection, 0, 1)
        await saw(its, "0", "1")
        await connection.store.flow.pause(group, by="ann")
        await eventually(standing, lambda found: found == 0)
        (move,) = await plan_moves(connection, group, None, None, "1")
        assert (move.at, move.again) == (2, 1)
        await place(connection, group, [move], by="ann")
        await connection.store.flow.resume(group, by="ann")
        await saw(its, "0", "1", "1")  # again: there are no claims


async def test_a_group_that_runs_is_not_placed(pair: Pair) -> None:
    its = crm()
    async with with_topic(pair, its) as transport, pair.connect(its.service) as connection:
        await its.tell(transport, 0)
        await saw(its, "0")
        moves = await plan_moves(connection, its.group, None, None, "end")
        with pytest.raises(NotPaused, match="has 1 members and is not paused"):
            await place(connection, its.group, moves, by="ann", wait_s=0.0)
        its.holding.clear()
        await its.tell(transport, 1)
        await eventually(lambda: asyncio.sleep(0, its.entered), lambda found: found == 2)
        await connection.store.flow.pause(its.group, by="ann")
        with pytest.raises(NotPaused, match="is paused and still has 1 members"):
            await place(connection, its.group, moves, by="ann", wait_s=0.5)
        assert await connection.store.flow.acts(limit=1) != []
        assert [act.what for act in await connection.store.flow.acts()] == ["paused"]
        its.holding.set()
        await place(connection, its.group, await plan_moves(connection, its.group, None, None, "end"), by="ann")


async def test_a_place_that_the_topic_does_not_have_is_refused(pair: Pair) -> None:
    its = crm()
    async with with_topic(pair, its) as transport, pair.connect(its.service, worker=False) as connection:
        await its.tell(transport, 0, 1)
        with pytest.raises(BadPlace, match=r"holds offsets 0 to 2; wanted one of these, not 3"):
            await plan_moves(connection, its.group, None, None, "3")
        with pytest.raises(BadPlace, match="'soon' is no place"):
            await plan_moves(connection, its.group, None, None, "soon")
        with pytest.raises(BadPlace, match="1 partitions, no number 7"):
            await plan_moves(connection, its.group, None, [7], "end")
        with pytest.raises(BadPlace, match=r"not 'orders\.events'"):
            await plan_moves(connection, its.group, "orders.events", None, "end")
        with pytest.raises(UnknownGroup, match=its.group):
            await plan_moves(connection, "nobody", None, None, "end")
        (move,) = await plan_moves(connection, its.group, None, None, "2020-01-01T00:00:00Z")
        assert (move.at, move.to) == (None, 0)
        (move,) = await plan_moves(connection, its.group, None, None, "2199-01-01T00:00:00+01:00")
        assert (move.to, move.skipped, move.lost) == (2, 2, 0)


async def test_a_projections_place_moves_forward_under_a_running_worker_and_never_back(pair: Pair) -> None:
    its = crm(with_projection=True)
    async with with_topic(pair, its) as transport:
        async with pair.connect(its.service) as connection:
            await its.tell(transport, 1)
            await sums_up_to(connection, its, 1)
        await its.tell(transport, 10, 100, 1000)
        await forget(pair, transport, its.topic, 3)
        async with pair.connect(its.service) as connection:
            worker = connection.worker
            assert worker is not None

            async def errors() -> str:
                return worker.runners[0].state.error

            await eventually(errors, lambda found: "OffsetOutOfRange" in found)
            (move,) = await plan_projection(connection, "changes", None, None, "beginning")
            assert (move.at, move.to, move.lost) == (1, 3, 2)
            await place_projection(connection, "changes", [move])
            await sums_up_to(connection, its, 1001)
            with pytest.raises(BadPlace, match="folded twice"):
                await plan_projection(connection, "changes", None, None, "3")
            with pytest.raises(UnknownGroup, match="it has changes"):
                await plan_projection(connection, "nothing", None, None, "3")


# --- deletes ---------------------------------------------------------------------------------------------------------


async def test_a_delete_of_a_compacted_topic_reaches_handlers_and_read_models(pair: Pair) -> None:
    its = crm(compact=True, with_projection=True)
    async with with_topic(pair, its, compact=True) as transport, pair.connect(its.service) as connection:
        await its.tell(transport, 7)
        await sums_up_to(connection, its, 7)
        await its.tell(transport, delete="c")
        await saw(its, "7", "c deleted")
        await eventually(lambda: connection.view(its.customers).get("c"), lambda row: row is None)
        await its.tell(transport, 1, delete="c")
        await saw(its, "7", "c deleted", "1", "c deleted")
        await its.tell(transport, 2)
        await sums_up_to(connection, its, 2)
        assert await connection.store.dead_letters() == []


async def test_a_delete_where_nothing_is_declared_compacted_is_a_clear_dead_letter_and_all_goes_on(pair: Pair) -> None:
    its = crm(with_projection=True)
    async with with_topic(pair, its) as transport, pair.connect(its.service) as connection:
        await its.tell(transport, 7, delete="c")
        await its.tell(transport, 8)
        await saw(its, "7", "8")
        await sums_up_to(connection, its, 15)
        # The handler's is written beside what follows in its partition.
        letters = await eventually(connection.store.dead_letters, lambda found: len(found) >= 2)
        assert sorted(letter.consumer for letter in letters) == sorted([its.group, f"{its.name}.projection.changes"])
        for letter in letters:
            assert (letter.key, letter.value, letter.offset) == (b"c", None, 1)
            assert "is not declared compacted" in letter.failure.message


# --- refusals to start -----------------------------------------------------------------------------------------------

DAY = 86_400.0


@pytest.mark.parametrize("applied", [True, False])
async def test_a_foreign_topic_that_is_not_as_declared_refuses_to_start(pair: Pair, applied: bool) -> None:
    its = crm(compact=True)
    async with with_topic(pair, its) as transport:
        await transport.admin.create(its.service.topics)
        with pytest.raises(TopicMismatch, match="is not compacted, declared is one that is"):
            async with pair.connect(its.service, apply_topics=applied):
                pass


async def test_claims_that_are_kept_for_less_than_their_messages_refuse_to_start(pair: Pair) -> None:
    its = crm(keep_claims_s=DAY)
    async with with_topic(pair, its):
        with pytest.raises(ClaimsTooShort, match="keeps messages for ever"):
            async with pair.connect(its.service):
                pass
        async with pair.connect(its.service, worker=False):
            pass  # a client handles nothing


@pytest.mark.parametrize("days", [1.0, 30.0])
async def test_a_worker_starts_where_claims_outlive_their_messages(pair: Pair, days: float) -> None:
    name = unique("short")

    class Done(Event, type=f"{name}.done.v1"):
        thing: Key[str]

    async def note(event: Done, ctx: Context) -> None: ...

    service = Service(
        name, handlers=[note], partitions=1, keep_claims_s=days * DAY,
        topics=[TopicSpec(f"{name}.events", 1, retention_s=7 * DAY)],
    )  # fmt: skip
    if days > 7:
        async with pair.connect(service) as connection:
            assert connection.worker is not None
            assert connection.worker.forgetting is not None
            assert await connection.worker.forgetting.once() == 0
    else:
        with pytest.raises(ClaimsTooShort, match=r"keeps messages for 604800 s .*wanted keep_claims_s of at least"):
            async with pair.connect(service):
                pass
