"""Dead letters that are dealt with, on both pairs: redriven to the one who gave them up, or discarded."""

# Without `from __future__ import annotations`: services are made per test, of classes that only exist in there.
import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel
from sqlalchemy import Column, Integer, MetaData, String, Table, select, text

from bus.cloudevents import to_record
from bus.metrics import MemoryMetrics
from bus.seams import Failpoint, SystemClock, Uuid7Ids
from bus.transport import Ack, Outgoing
from eventstore.letters import DeadLetters
from eventstore.port import ClaimState, DeadLetter, LetterWhere, Settled, Timer, Unit, Wanted
from foldbus import (
    Command,
    Connection,
    Context,
    Decider,
    Died,
    Event,
    Key,
    SagaRun,
    Service,
    projection,
    saga,
)
from foldbus.redriving import Became, CannotEdit, Edit, Pace, Redriver
from foldbus.timing import DueTimers
from sagas import Status, describe, saga_stream
from tests.eventstore.stores import failure, whole_log
from tests.stories.pairs import QUICK, Pair, eventually, unique

ids = Uuid7Ids()
tables = MetaData()
mails = Table("mails", tables, Column("who", String, primary_key=True), Column("n", Integer, nullable=False))
COUNT = text("insert into mails values (:who, 1) on conflict (who) do update set n = mails.n + 1")


@dataclass
class Faults:
    """Keys at which a part has its bug."""

    decide: set[str] = field(default_factory=set[str])
    mail: set[str] = field(default_factory=set[str])
    mailed: list[str] = field(default_factory=list[str])
    cents: list[int] = field(default_factory=list[int])


@dataclass
class World:
    shop: Service
    faults: Faults
    classes: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.classes[name]


def world(faults: Faults | None = None) -> World:
    name = unique("shop")
    its = faults or Faults()

    class Placed(Event, type=f"{name}.placed.v1"):
        order_id: Key[str]
        cents: int

    class Packed(Event, type=f"{name}.packed.v1"):
        order_id: Key[str]

    class Unpacked(Event, type=f"{name}.unpacked.v1"):
        order_id: Key[str]

    class Place(Command[Placed], type=f"{name}.place.v1"):
        order_id: Key[str]
        cents: int

    class Pack(Command[Packed], type=f"{name}.pack.v1"):
        order_id: Key[str]

    class Unpack(Command[None], type=f"{name}.unpack.v1"):
        order_id: Key[str]

    class Elsewhere(Command[None], type=f"{name}-other.do.v1"):
        order_id: Key[str]

    class Order(BaseModel, frozen=True):
        placed: int = 0

    def evolve(order: Order, event: Placed | Packed | Unpacked) -> Order:
        return Order(placed=order.placed + isinstance(event, Placed))

    def decide(order: Order, command: Place | Pack | Unpack) -> list[Placed | Packed | Unpacked]:
        if command.order_id in its.decide:
            raise RuntimeError("a bug in decide")
        match command:
            case Place():
                return [Placed(order_id=command.order_id, cents=command.cents)]
            case Pack():
                return [Packed(order_id=command.order_id)]
            case Unpack():
                return [Unpacked(order_id=command.order_id)]

    async def mail(event: Placed, ctx: Context) -> None:
        if event.order_id in its.mail:
            raise RuntimeError("a bug in mail")
        its.mailed.append(event.order_id)
        its.cents.append(event.cents)
        await (await ctx.sql()).execute(COUNT, {"who": event.order_id})

    @saga("ship", version=1)
    async def ship(run: SagaRun, placed: Placed) -> None:
        if placed.cents < 0:
            await run.step(Elsewhere(order_id=placed.order_id), timeout_s=0.2)
        if placed.cents > 100:
            await run.step(Pack(order_id=placed.order_id), undo=Unpack(order_id=placed.order_id))

    @projection("takings", version=1)
    def takings(row: Order | None, event: Placed) -> Order:
        return Order(placed=(row or Order()).placed + 1)

    shop = Service(
        name,
        deciders=[Decider("order", initial=Order(), evolve=evolve, decide=decide)],
        handlers=[mail],
        sagas=[ship],
        projections=[takings],
        partitions=2,
    )
    classes = {one.__name__: one for one in (Placed, Packed, Unpacked, Place, Pack, Unpack)}
    return World(shop, its, classes)


@asynccontextmanager
async def running(pair: Pair, its: World, **options: Any) -> AsyncGenerator[Connection]:
    async with pair.connect(its.shop, **options) as shop:
        async with shop.store.transaction() as tx:
            await tx.sql.run_sync(tables.create_all)
        yield shop


async def mailed(shop: Connection) -> dict[str, int]:
    """How often a mail to each had its effect."""
    async with shop.store.transaction() as tx:
        return {row[0]: row[1] for row in await tx.sql.execute(select(mails))}


def redriver(
    connection: Connection, *, metrics: MemoryMetrics | None = None, failpoint: Failpoint | None = None
) -> Redriver:
    return Redriver(
        connection.service,
        connection.store,
        clock=SystemClock(),
        ids=ids,
        by="ann",
        metrics=metrics or MemoryMetrics(),
        failpoint=failpoint,
    )


async def letters(connection: Connection, n: int, **where: Any) -> list[DeadLetter]:
    """Once there are `n` open ones."""

    async def look() -> list[DeadLetter]:
        return [one.letter for one in await connection.store.letters.page(LetterWhere(**where))]

    return await eventually(look, lambda found: len(found) == n)


async def redrive(connection: Connection, found: Sequence[DeadLetter], edit: Edit | None = None) -> list[Became]:
    its = redriver(connection)
    return [(await its.redrive(its.plan(one, edit))).became for one in found]


async def quiet(connection: Connection) -> None:
    """No timer is left, nothing is in hand."""

    async def look() -> Any:
        return await connection.store.timers.next_due()

    await eventually(look, lambda due: due is None)


def first_look(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set when the workers that start from here on have looked for due timers once."""
    looked, fire = asyncio.Event(), DueTimers._fire

    async def look(due: DueTimers) -> float:
        wait_s = await fire(due)
        looked.set()
        return wait_s

    monkeypatch.setattr(DueTimers, "_fire", look)
    return looked


async def types(connection: Connection, key: str) -> list[str]:
    """Of the events of this key, the sagas' own left out."""
    log = await whole_log(connection.store, outgoing=False)
    return [one.type.split(".")[1] for one in log if one.key == key and one.stream and one.stream.category != "saga"]


class TestARedrivenMessage:
    async def test_of_a_command_is_handled_once_in_the_end_and_answered_again(self, pair: Pair) -> None:
        its = world(Faults(decide={"a"}))
        async with running(pair, its) as shop:
            id = ids.new()
            with pytest.raises(Died):
                await shop.request(its.Place(order_id="a", cents=1), id=id, timeout_s=30)
            (letter,) = await letters(shop, 1)
            assert await redrive(shop, [letter]) == [Became.REDRIVEN]
            (again,) = await letters(shop, 1)  # the bug is still there: it dies again
            assert again.failure.failed_at > letter.failure.failed_at
            assert (again.id, again.topic, again.value, again.key) == (id, letter.topic, letter.value, letter.key)

            its.faults.decide.clear()
            assert await redrive(shop, [again]) == [Became.REDRIVEN]
            # Somebody else asks: the second 'died' may still be on its way to the one who asked first.
            async with pair.connect(its.shop, worker=False) as front:
                placed = await front.request(its.Place(order_id="a", cents=1), id=id, timeout_s=30)
            assert placed.order_id == "a"
            await quiet(shop)
            assert (await types(shop, "a")).count("placed") == 1
            assert await redrive(shop, [again, letter]) == [Became.GONE, Became.GONE]
            history = await shop.store.letters.page(LetterWhere(ids=frozenset([id])), settled=True)
            assert [one.letter.failure.failed_at for one in history] == [
                letter.failure.failed_at,
                again.failure.failed_at,
            ]

    async def test_of_a_subscription_reaches_that_consumer_alone(self, pair: Pair) -> None:
        """A saga and a handler read the same topic; only one of them gave the event up."""
        its = world(Faults(mail={"a"}))
        async with running(pair, its) as shop:
            await shop.request(its.Place(order_id="a", cents=500), timeout_s=30)
            (letter,) = await letters(shop, 1)
            await eventually(lambda: types(shop, "a"), lambda found: "packed" in found)
            its.faults.mail.clear()
            assert await redrive(shop, [letter]) == [Became.REDRIVEN]
            await eventually(lambda: mailed(shop), lambda found: found == {"a": 1})
            await quiet(shop)
            assert its.faults.mailed == ["a"]
            assert sorted(await types(shop, "a")) == ["packed", "placed"]

    async def test_of_one_key_goes_in_the_order_in_which_they_failed(self, pair: Pair) -> None:
        its = world(Faults(mail={"a"}))
        async with running(pair, its) as shop:
            for n in range(12):
                await shop.execute(its.Place(order_id="a", cents=n))
            found = await letters(shop, 12)
            its.faults.mail.clear()
            assert set(await redrive(shop, found)) == {Became.REDRIVEN}
            await eventually(lambda: mailed(shop), lambda counted: counted == {"a": 12})
            await quiet(shop)
            assert its.faults.cents == list(range(12))

    async def test_of_which_the_worker_died_before_it_took_the_timer_away_has_one_effect(self, pair: Pair) -> None:
        """Handled, not put away: the next worker finds it handled."""
        its = world(Faults(mail={"a"}))
        async with running(pair, its) as shop:
            await shop.execute(its.Place(order_id="a", cents=1))
            (letter,) = await letters(shop, 1)
        its.faults.mail.clear()
        async with running(pair, its, worker=False) as shop:
            plan = redriver(shop).plan(letter)
            assert plan.unit is not None
            (timer,) = plan.unit.timers
            assert (await redriver(shop).redrive(plan)).became is Became.REDRIVEN
        async with running(pair, its) as shop:
            await eventually(lambda: mailed(shop), lambda found: found == {"a": 1})
            await quiet(shop)
        async with running(pair, its, worker=False) as shop:
            await shop.store.commit([Unit(timers=(timer,))])  # as it stood when that worker died
        async with running(pair, its) as shop:
            await quiet(shop)
            assert await mailed(shop) == {"a": 1}

    async def test_of_a_consumer_that_nobody_is_here_waits_and_holds_up_nobody(self, pair: Pair) -> None:
        its = world(Faults(mail={"a"}))
        metrics = MemoryMetrics()
        async with running(pair, its, metrics=metrics) as shop:
            await shop.execute(its.Place(order_id="a", cents=1))
            (letter,) = await letters(shop, 1)
            its.faults.mail.clear()
            plan = redriver(shop).plan(letter)
            assert plan.unit is not None
            (timer,) = plan.unit.timers
            assert isinstance(timer, Timer)
            homeless = replace(timer, consumer=f"{its.shop.name}.handler.gone", id=ids.new())
            await shop.store.commit([Unit(timers=(homeless,))])
            await eventually(lambda: _total(metrics, "foldbus_timers_homeless_total"), lambda total: total > 0)
            assert await redrive(shop, [letter]) == [Became.REDRIVEN]
            await eventually(lambda: mailed(shop), lambda found: found == {"a": 1})
            assert await shop.store.timers.next_due() is not None


async def _total(metrics: MemoryMetrics, name: str) -> float:
    return metrics.total(name)


class TestAgainstItsUndo:
    """A step died; its undo and an operator's redrive come in either order."""

    async def staged(self, shop: Connection, its: World) -> tuple[UUID, DeadLetter]:
        id = ids.new()
        with pytest.raises(Died):
            await shop.request(its.Pack(order_id="a"), id=id, timeout_s=30)
        (letter,) = await letters(shop, 1)
        its.faults.decide.clear()
        return id, letter

    async def undo(self, shop: Connection, its: World, step: UUID) -> None:
        undo = shop.envelope(its.Unpack(order_id="a"), topic=f"{its.shop.name}.commands")
        await shop.store.commit([Unit(outgoing=(replace(undo, undoes=step),))])

        async def handled() -> ClaimState:
            (standing,) = await shop.store.examine(its.shop.name, [(undo.id, "a")])
            return standing.state

        await eventually(handled, lambda state: state is ClaimState.DONE)

    async def test_the_undo_first_keeps_the_step_out_and_the_redrive_is_told(self, pair: Pair) -> None:
        its = world(Faults(decide={"a"}))
        async with running(pair, its) as shop:
            id, letter = await self.staged(shop, its)
            await self.undo(shop, its, id)
            found = await redriver(shop).redrive(redriver(shop).plan(letter))
            assert found.became is Became.REFUSED
            assert "undo" in found.why
            assert "undo" in await redriver(shop).why_not(id)
            await quiet(shop)
            assert await types(shop, "a") == []

    async def test_the_redrive_first_is_handled_and_then_undone(self, pair: Pair) -> None:
        its = world(Faults(decide={"a"}))
        async with running(pair, its) as shop:
            id, letter = await self.staged(shop, its)
            assert await redrive(shop, [letter]) == [Became.REDRIVEN]
            await eventually(lambda: types(shop, "a"), lambda found: found == ["packed"])
            await self.undo(shop, its, id)
            await quiet(shop)
            assert await types(shop, "a") == ["packed", "unpacked"]

    async def test_the_undo_between_redrive_and_handling_keeps_the_step_out(
        self, pair: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        its = world(Faults(decide={"a"}))
        async with running(pair, its) as shop:
            id, letter = await self.staged(shop, its)
        slow = replace(QUICK, timer_poll_s=3600.0)  # no timer is looked at but at the start
        looked = first_look(monkeypatch)
        async with running(pair, its, settings=slow) as shop:
            await looked.wait()
            assert await redrive(shop, [letter]) == [Became.REDRIVEN]
            await self.undo(shop, its, id)
        async with running(pair, its) as shop:
            await quiet(shop)
            assert await types(shop, "a") == []
            (standing,) = await shop.store.examine(its.shop.name, [(id, "a")])
            assert standing.state is ClaimState.CANCELLED


class TestAStepOfASaga:
    async def test_that_died_and_is_redriven_answers_a_saga_that_moved_on_which_does_no_harm(self, pair: Pair) -> None:
        its = world()
        async with running(pair, its) as shop:
            its.faults.decide.add("a")
            placed = shop.envelope(its.Placed(order_id="a", cents=500), topic=f"{its.shop.name}.events")
            await shop.store.commit([Unit(outgoing=(placed,))])
            (letter,) = await letters(shop, 1, consumer=its.shop.name)
            its.faults.decide.clear()
            plan = redriver(shop).plan(letter, sagas_too=True)
            assert "died" in plan.note
            assert (await redriver(shop).redrive(plan)).became is Became.REDRIVEN
            await eventually(lambda: types(shop, "a"), lambda found: "packed" in found)
            await quiet(shop)
            worker = shop.worker
            assert worker is not None

            async def idle() -> bool:
                return all([await engine.caught_up() for engine in worker.engines])

            await eventually(idle, bool)
            assert await letters(shop, 0) == []

    async def test_that_died_is_left_alone_unless_sagas_commands_are_asked_for(self, pair: Pair) -> None:
        """It would be an orphan: the saga has ended without it, and nobody would undo it."""
        its = world(Faults(decide={"a"}))
        metrics = MemoryMetrics()
        async with running(pair, its) as shop:
            placed = shop.envelope(its.Placed(order_id="a", cents=500), topic=f"{its.shop.name}.events")
            await shop.store.commit([Unit(outgoing=(placed,))])
            (letter,) = await letters(shop, 1, consumer=its.shop.name)
            its.faults.decide.clear()
            by = redriver(shop, metrics=metrics)
            for edit in (None, Edit(fields={"order_id": "b"})):
                found = await by.redrive(by.plan(letter, edit))
                assert found.became is Became.REFUSED
                assert "a step of saga ship" in found.why
                assert "--sagas-too" in found.why
            assert metrics.total("foldbus_redrive_refused_total") == 2
            assert await letters(shop, 1) == [letter]
            assert await shop.store.timers.next_due() is None
            undo = replace(letter, headers=(*letter.headers, ("ce_undoes", str(ids.new()).encode())))
            assert "foldbus saga retry" in by.plan(undo).refused
            assert by.plan(undo, sagas_too=True).unit is not None
            assert (await by.redrive(by.plan(letter, sagas_too=True))).became is Became.REDRIVEN
            await eventually(lambda: types(shop, "a"), lambda found: found == ["packed"])

    async def test_whose_timeout_died_ends_once_that_is_redriven(
        self, pair: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        its = world()
        blind = replace(QUICK, timer_poll_s=3600.0)  # looks at timers when it starts, and then no more
        looked = first_look(monkeypatch)
        async with running(pair, its, settings=blind) as shop:
            await looked.wait()
            placed = shop.envelope(its.Placed(order_id="a", cents=-1), topic=f"{its.shop.name}.events")
            await shop.store.commit([Unit(outgoing=(placed,))])
            due = await eventually(lambda: shop.store.timers.due(limit=10), lambda found: len(found) == 1)
            consumer = f"{its.shop.name}.replies"
            dead = DeadLetters(
                its.shop.name, consumer, clock=SystemClock(), metrics=MemoryMetrics(), max_bytes=1_000_000
            )
            await shop.store.commit([dead.of_message(due[0].envelope, failure())])
            assert await shop.store.timers.next_due() is None
        async with running(pair, its) as shop:
            (letter,) = await letters(shop, 1, consumer=consumer)
            assert await redrive(shop, [letter]) == [Became.REDRIVEN]
            await quiet(shop)

            async def status() -> list[Status]:
                (part,) = await shop.store.load([Wanted(saga_stream("ship", UUID(due[0].key)))])
                return [describe(part.records).status]

            await eventually(status, lambda found: found[0].ended)
            assert await letters(shop, 0) == []

    async def test_whose_start_cannot_be_read_begins_with_another_payload(self, pair: Pair) -> None:
        its = world()
        async with running(pair, its) as shop:
            bad = shop.envelope(its.Placed(order_id="a", cents=500), topic=f"{its.shop.name}.events")
            async with pair.transport() as stranger:
                (answer,) = await stranger.publish([to_record(replace(bad, data=b'{"order_id":"a"}'))])
                assert isinstance(answer, Ack)
            (letter,) = await letters(shop, 1, consumer=f"{its.shop.name}.saga.ship")
            plain = redriver(shop).plan(letter)
            assert "cents" in plain.refused
            assert await redrive(shop, [letter], Edit(fields={"cents": 500})) == [Became.REDRIVEN]
            await eventually(lambda: types(shop, "a"), lambda found: found == ["packed"])


class TestEdited:
    async def test_is_another_message_and_the_dead_one_stays_dead(self, pair: Pair) -> None:
        its = world(Faults(decide={"a"}))
        async with running(pair, its) as shop:
            id = ids.new()
            with pytest.raises(Died):
                await shop.request(its.Place(order_id="a", cents=1), id=id, timeout_s=30)
            (letter,) = await letters(shop, 1)
            plan = redriver(shop).plan(letter, Edit(fields={"order_id": "b", "cents": 2}))
            assert plan.message is not None
            assert (plan.message.causation_id, plan.message.key) == (id, "b")
            assert plan.message.id != id
            assert (await redriver(shop).redrive(plan)).became is Became.REDRIVEN
            await eventually(lambda: types(shop, "b"), lambda found: found == ["placed"])
            (standing,) = await shop.store.examine(its.shop.name, [(id, "a")])
            assert standing.state is ClaimState.DEAD
            (kept,) = await shop.store.letters.page(LetterWhere(ids=frozenset([id])), settled=True)
            assert kept.settled is not None
            assert kept.settled.how is Settled.REPLACED
            assert str(plan.message.id) in kept.settled.reason

    async def test_bytes_that_never_were_a_message_go_with_a_payload_and_a_type(self, pair: Pair) -> None:
        its = world()
        async with running(pair, its) as shop:
            raw = Outgoing(f"{its.shop.name}.commands", b"k", b"\xff\x00", (("x", b"\xfe"),))
            async with pair.transport() as stranger:
                assert isinstance((await stranger.publish([raw]))[0], Ack)
            (letter,) = await letters(shop, 1)
            refused = await redriver(shop).redrive(redriver(shop).plan(letter))
            assert refused.became is Became.REFUSED
            assert "cannot be read" in refused.why
            assert await letters(shop, 1) == [letter]
            with pytest.raises(CannotEdit, match="type"):
                redriver(shop).plan(letter, Edit(data=b'{"order_id":"c","cents":3}'))
            with pytest.raises(CannotEdit, match="cents"):
                redriver(shop).plan(letter, Edit(data=b'{"order_id":"c"}', type=f"{its.shop.name}.place.v1"))
            edit = Edit(data=b'{"order_id":"c","cents":3}', type=f"{its.shop.name}.place.v1")
            assert await redrive(shop, [letter], edit) == [Became.REDRIVEN]
            await eventually(lambda: types(shop, "c"), lambda found: found[:1] == ["placed"])


class TestDiscarded:
    async def test_is_settled_with_its_reason_counted_and_never_handled(self, pair: Pair) -> None:
        its = world(Faults(decide={"a"}))
        metrics = MemoryMetrics()
        async with running(pair, its) as shop:
            with pytest.raises(Died):
                await shop.request(its.Place(order_id="a", cents=1), timeout_s=30)
            (letter,) = await letters(shop, 1)
            by = redriver(shop, metrics=metrics)
            with pytest.raises(ValueError, match="reason"):
                await by.discard(letter, " ")
            assert (await by.discard(letter, "a test order")).became is Became.DISCARDED
            assert (await by.discard(letter, "a test order")).became is Became.GONE
            assert metrics.total("foldbus_discarded_total") == 1
            assert (await by.redrive(by.plan(letter))).became is Became.GONE
            assert "discarded" in await by.why_not(letter.id)


async def test_a_redrive_killed_before_or_after_its_transaction_is_simply_repeated(pair: Pair) -> None:
    class Killed(Exception): ...

    class Point:
        def __init__(self, name: str) -> None:
            self.name = name

        def hit(self, name: str) -> None:
            if name == self.name:
                raise Killed

    its = world(Faults(mail={"a", "b"}))
    async with running(pair, its) as shop:
        for key in ("a", "b"):
            await shop.execute(its.Place(order_id=key, cents=1))
        found = await letters(shop, 2)
        its.faults.mail.clear()
        for letter, point in zip(found, ("before-redrive", "after-redrive"), strict=True):
            by = redriver(shop, failpoint=Point(point))
            with pytest.raises(Killed):
                await by.redrive(by.plan(letter))
        assert await redrive(shop, found) == [Became.REDRIVEN, Became.GONE]
        await eventually(lambda: mailed(shop), lambda found: found == {"a": 1, "b": 1})
        await quiet(shop)
        assert await mailed(shop) == {"a": 1, "b": 1}


async def test_choosing_gives_each_letter_once_also_when_it_dies_again_meanwhile(pair: Pair) -> None:
    its = world(Faults(mail={f"n{n}" for n in range(5)}))
    async with running(pair, its) as shop:
        for n in range(5):
            await shop.execute(its.Place(order_id=f"n{n}", cents=1))
        await letters(shop, 5)
        by = redriver(shop)
        seen: list[UUID] = []
        async for one in by.chosen(LetterWhere(), limit=100):
            seen.append(one.letter.id)
            assert (await by.redrive(by.plan(one.letter))).became is Became.REDRIVEN
            await letters(shop, 5)  # it is back, with a later failure
        assert len(seen) == len(set(seen)) == 5


class TestThePace:
    async def test_lets_so_many_go_a_second_and_waits_for_the_rest(self) -> None:
        class Still(SystemClock):
            at = 100.0

            def monotonic(self) -> float:
                return self.at

        clock, waited = Still(), list[float]()

        async def sleep(seconds: float) -> None:
            waited.append(seconds)
            clock.at += seconds

        pace = Pace(4, clock=clock, sleep=sleep)
        for _ in range(5):
            await pace.turn()
        assert waited == [0.25] * 4
        clock.at += 10
        await pace.turn()
        assert len(waited) == 4  # nothing is saved up either
        await pace.turn()
        assert len(waited) == 5
        unbounded = Pace(None, clock=clock, sleep=sleep)
        for _ in range(5):
            await unbounded.turn()
        assert len(waited) == 5
