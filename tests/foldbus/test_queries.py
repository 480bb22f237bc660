"""Queries: over real buses and in process, beside the commands of their key, late ones, and those that fail."""

# Without `from __future__ import annotations`: services are made per test, of classes that only exist in there.
import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import text

from bus.cloudevents import to_record
from bus.codec import kind_of
from bus.envelope import Kind, ReplyTo
from bus.seams import SystemClock
from bus.transport import Outgoing
from foldbus import (
    BadMessageClass,
    Command,
    Connection,
    Context,
    Decider,
    Event,
    Key,
    MemoryMetrics,
    MissingTopics,
    NoAnswer,
    NobodyDecides,
    Query,
    QueryFailed,
    Refused,
    Service,
    projection,
)
from foldbus.querying import AT_ONCE, QueryContext, QueryHandler
from tests.stories.pairs import Pair, eventually, unique


class Seat(BaseModel, frozen=True):
    seat: str
    taken: int = 0


class ShiftedClock(SystemClock):
    """The system's, so many seconds ahead."""

    def __init__(self, ahead_s: float = 0.0) -> None:
        self.ahead_s = ahead_s

    def now(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self.ahead_s)


class Theatre:
    """A service with an aggregate, a read model and query functions; and one that asks it."""

    def __init__(self) -> None:
        house, asker = unique("theatre"), unique("agency")
        self.asked: list[str] = []
        self.left_s: list[float] = []
        self.gate = asyncio.Event()
        self.at_work = asyncio.Event()
        its = self

        class Taken(Event, type=f"{house}.taken.v1"):
            seat: Key[str]

        class Take(Command[Taken], type=f"{house}.take.v1"):
            seat: Key[str]

        class Clean(Command[None], type=f"{house}.clean.v1"):
            seat: Key[str]

        class FindSeat(Query[Seat | None], type=f"{house}.find-seat.v1"):
            seat: Key[str]

        class CountTaken(Query[Seat], type=f"{house}.count-taken.v1"):
            seat: Key[str]

        class ListSeats(Query[list[Seat]], type=f"{house}.list-seats.v1"):
            row: Key[str]
            n: int = 3

        class Probe(Query[int], type=f"{house}.probe.v1"):
            what: Key[str]

        class Unlisted(Query[int], type=f"{house}.unlisted.v1"):
            what: Key[str]

        class Closed(Refused, code=f"{house}.closed"): ...

        def evolve(seat: Seat, event: Taken) -> Seat:
            return Seat(seat=event.seat, taken=seat.taken + 1)

        def decide(seat: Seat, command: Take) -> list[Taken]:
            return [Taken(seat=command.seat)]

        seats = Decider("seat", initial=Seat(seat=""), evolve=evolve, decide=decide)

        @projection("seats", version=1)
        def by_seat(row: Seat | None, event: Taken) -> Seat | None:
            return Seat(seat=event.seat, taken=(row.taken if row else 0) + 1)

        async def clean(command: Clean, ctx: Context) -> None:
            its.at_work.set()
            await its.gate.wait()

        async def find_seat(query: FindSeat, ctx: QueryContext) -> Seat | None:
            return await ctx.view(by_seat).get(query.seat)

        async def count_taken(query: CountTaken, ctx: QueryContext) -> Seat:
            return (await ctx.load(seats, query.seat)).state

        async def list_seats(query: ListSeats, ctx: QueryContext) -> list[Seat]:
            return [Seat(seat=f"{query.row}{n}") for n in range(query.n)]

        async def probe(query: Probe, ctx: QueryContext) -> Any:
            its.asked.append(query.what)
            its.left_s.append((ctx.deadline - ctx.now).total_seconds())
            match query.what.partition(":")[0]:
                case "refuse":
                    raise Closed(until="noon")
                case "fail":
                    raise RuntimeError("a bug at probe")
                case "wait":
                    its.at_work.set()
                    await its.gate.wait()
                case "wrong":
                    return "three"
                case "write":
                    sql = await ctx.sql()
                    await sql.execute(text("create table scribble (n int)"))
                case "sql":
                    sql = await ctx.sql()
                    return (await sql.execute(text("select 40 + 2"))).scalar_one()
                case _:
                    pass
            return len(its.asked)

        self.house = Service(
            house,
            deciders=[seats],
            handlers=[clean],
            projections=[by_seat],
            queries=[find_seat, count_taken, list_seats, QueryHandler(probe, timeout_s=20)],
            messages=[Unlisted],
            partitions=2,
        )
        every = (Taken, Take, Clean, FindSeat, CountTaken, ListSeats, Probe, Unlisted)
        self.agency = Service(asker, messages=every, refusals=[Closed], partitions=2)
        self.ask = SimpleNamespace(**{one.__name__: one for one in (*every, Closed)})

    @asynccontextmanager
    async def open(self, pair: Pair, **options: Any) -> AsyncGenerator[tuple[Connection, Connection]]:
        """The house, run by a worker, and the agency that asks it."""
        async with pair.connect(self.house, **options) as house, pair.connect(self.agency, worker=False) as agency:
            yield house, agency


async def test_another_service_is_asked_over_the_bus_and_answers_typed(pair: Pair) -> None:
    its = Theatre()
    ask = its.ask
    async with its.open(pair) as (house, agency):
        taken = await house.request(ask.Take(seat="a1"), timeout_s=30)
        assert await house.view(its.house.projections[0]).get("a1", after=taken) == Seat(seat="a1", taken=1)
        head = await house.store.head()

        assert await agency.ask(ask.FindSeat(seat="a1"), timeout_s=30) == Seat(seat="a1", taken=1)
        assert await agency.ask(ask.FindSeat(seat="none"), timeout_s=30) is None
        assert await agency.request(ask.CountTaken(seat="a1"), timeout_s=30) == Seat(seat="a1", taken=1)
        rows = await agency.ask(ask.ListSeats(row="b"), timeout_s=30)
        assert rows == [Seat(seat="b0"), Seat(seat="b1"), Seat(seat="b2")]
        with pytest.raises(ask.Closed) as closed:
            await agency.ask(ask.Probe(what="refuse"), timeout_s=30)
        assert closed.value.attributes == {"until": "noon"}
        assert await agency.ask(ask.Probe(what="sql"), timeout_s=30) == 42

        assert await house.store.head() == head
        assert await house.store.watermarks(f"{its.house.name}.queries") == {}


async def test_what_cannot_be_answered_says_why_and_leaves_no_dead_letter(pair: Pair) -> None:
    its = Theatre()
    ask = its.ask
    async with its.open(pair) as (house, agency):
        for query, why in (
            (ask.Probe(what="fail"), "RuntimeError: a bug at probe"),
            (ask.Probe(what="wrong"), "answered Probe wrongly"),
            (ask.Unlisted(what="x"), "is no query that .* answers"),
            (ask.ListSeats(row="x" * 500, n=3000), "takes .* bytes on the wire"),
        ):
            with pytest.raises(QueryFailed, match=why):
                await agency.ask(query, timeout_s=30)
        assert list(await house.store.dead_letters()) == []
        # A command in the wrong topic is told so; it must not be handled from there.
        with pytest.raises(Exception, match="a command arrived on"):
            await agency.request(ask.Take(seat="a1"), topic=f"{its.house.name}.queries", timeout_s=30)
        assert (await house.load(its.house.deciders[0], "a1")).version == 0


async def test_the_owner_answers_itself_without_a_worker_and_without_the_bus(pair: Pair) -> None:
    its = Theatre()
    ask = its.ask
    async with pair.connect(its.house, worker=False) as house:
        house.transport.publish = None  # type: ignore[method-assign, assignment]
        await house.execute(ask.Take(seat="a1"))
        assert await house.ask(ask.CountTaken(seat="a1")) == Seat(seat="a1", taken=1)
        assert await house.request(ask.ListSeats(row="b", n=1)) == [Seat(seat="b0")]
        assert await house.ask(ask.Probe(what="sql")) == 42
        with pytest.raises(ask.Closed):
            await house.ask(ask.Probe(what="refuse"))
        with pytest.raises(RuntimeError, match="a bug at probe"):
            await house.ask(ask.Probe(what="fail"))
        with pytest.raises(NobodyDecides, match="no query function of it takes it"):
            await house.ask(ask.Unlisted(what="x"))
        with pytest.raises(NoAnswer, match=r"took longer than it may \(0\.05 s\)"):
            await house.ask(ask.Probe(what="wait"), timeout_s=0.05)
        wrong: Any = ask.Take(seat="a1")
        with pytest.raises(BadMessageClass, match="Take is no Query"):
            await house.ask(wrong)


async def test_a_query_only_reads(pair: Pair) -> None:
    its = Theatre()
    async with pair.connect(its.house, worker=False) as house:
        with pytest.raises(Exception, match=r"read-?only"):
            await house.ask(its.ask.Probe(what="write"))
        async with house.store.reading() as tx:
            assert (await tx.sql.execute(text("select 1"))).scalar_one() == 1
            # It holds up no writer.
            async with asyncio.timeout(40):
                await house.execute(its.ask.Take(seat="a1"))


async def test_a_query_waits_neither_for_a_command_nor_for_a_query_of_its_key(pair: Pair) -> None:
    its = Theatre()
    ask = its.ask
    async with its.open(pair) as (house, agency):
        async with asyncio.TaskGroup() as group:
            await agency.send(ask.Clean(seat="a1"))
            async with asyncio.timeout(30):
                await its.at_work.wait()
            assert await agency.ask(ask.CountTaken(seat="a1"), timeout_s=30) == Seat(seat="")
            its.at_work.clear()
            slow = group.create_task(agency.ask(ask.Probe(what="wait"), timeout_s=60))
            async with asyncio.timeout(30):
                await its.at_work.wait()
            assert await agency.ask(ask.Probe(what="not"), timeout_s=30) == 2
            assert not slow.done()
            its.gate.set()
        assert slow.result() == 2
        del house


async def test_more_queries_than_there_is_room_for_are_all_answered(pair: Pair) -> None:
    its = Theatre()
    n = AT_ONCE + 20
    async with its.open(pair) as (_, agency):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(agency.ask(its.ask.Probe(what="wait"), timeout_s=60)) for _ in range(n)]

            async def at_work() -> int:
                return len(its.asked)

            await eventually(at_work, lambda found: found == AT_ONCE)
            await asyncio.sleep(0.3)
            assert len(its.asked) == AT_ONCE
            its.gate.set()
        assert len(tasks) == n
        assert len(its.asked) == n


async def test_a_worker_that_stops_answers_what_it_has_in_hand(pair: Pair) -> None:
    its = Theatre()
    async with pair.connect(its.agency, worker=False) as agency:
        async with asyncio.TaskGroup() as group:
            async with pair.connect(its.house):
                answer = group.create_task(agency.ask(its.ask.Probe(what="wait"), timeout_s=60))
                async with asyncio.timeout(30):
                    await its.at_work.wait()
                asyncio.get_running_loop().call_later(0.3, its.gate.set)
        assert answer.result() == 1


async def test_a_worker_that_starts_again_answers_no_query_twice(pair: Pair) -> None:
    its = Theatre()
    for n in (1, 2):
        async with its.open(pair) as (_, agency):
            assert await agency.ask(its.ask.Probe(what=f"round {n}"), timeout_s=60) == n
    assert its.asked == ["round 1", "round 2"]


async def test_a_query_that_expired_is_skipped_and_counted(pair: Pair) -> None:
    its = Theatre()
    metrics, clock = MemoryMetrics(), ShiftedClock()
    async with pair.connect(its.agency, worker=False) as agency, pair.connect(its.house, worker=False):
        await agency.inbox.ready()
        with pytest.raises(NoAnswer, match="no answer within"):
            await agency.ask(its.ask.Probe(what="early"), timeout_s=2.0)
        clock.ahead_s = 60.0
        async with pair.connect(its.house, metrics=metrics, clock=clock):

            async def skipped() -> int:
                return metrics.total("foldbus_expired_requests_total", consumer=f"{its.house.name}.queries")

            await eventually(skipped, lambda found: found == 1)
            # Whoever still waits hears of it at once: these clocks are a minute apart.
            with pytest.raises(NoAnswer, match=r"had expired [345]\d\.\d+ s before, by the clock there"):
                await agency.ask(its.ask.Probe(what="skewed"), timeout_s=30)
            assert await agency.ask(its.ask.Probe(what="patient"), timeout_s=90) == 1
    assert its.asked == ["patient"]


async def test_a_query_may_take_as_long_as_somebody_waits(pair: Pair) -> None:
    its = Theatre()
    metrics = MemoryMetrics()
    from foldbus import WorkerSettings

    settings = WorkerSettings(clock_tolerance_s=0.2)
    async with its.open(pair, metrics=metrics, settings=settings) as (_, agency):
        await agency.ask(its.ask.Probe(what="warm"), timeout_s=30)
        with pytest.raises(NoAnswer):
            await agency.ask(its.ask.Probe(what="wait"), timeout_s=3.0)

        async def cut_short() -> int:
            return metrics.total("foldbus_queries_total", outcome="timeout")

        await eventually(cut_short, lambda found: found == 1)
        assert its.left_s[1] <= 3.0 + 0.2  # and the tolerance
        assert 3.0 + 0.2 < its.left_s[0] <= 20


async def test_a_record_that_is_no_query_is_kept_and_stops_nothing(pair: Pair) -> None:
    its = Theatre()
    async with its.open(pair) as (house, agency):
        topic = f"{its.house.name}.queries"
        await agency.transport.publish([Outgoing(topic, b"a", b"\xff", (("ce_id", b"\xff"),))])
        assert await agency.ask(its.ask.Probe(what="a"), timeout_s=30) == 1
        (letter,) = await eventually(house.store.dead_letters, lambda found: len(found) == 1)
        assert (letter.consumer, letter.value) == (topic, b"\xff")


async def test_a_query_that_wants_no_answer_is_dropped(pair: Pair) -> None:
    its = Theatre()
    async with its.open(pair) as (_, agency):
        query = its.ask.Probe(what="nobody")
        envelope = agency.envelope(query, topic=f"{its.house.name}.queries")
        assert kind_of(query) is Kind.QUERY
        await agency.transport.publish([to_record(envelope)])
        lost = ReplyTo("no-such-service.inbox", "i", "i")
        from dataclasses import replace

        await agency.transport.publish([to_record(replace(envelope, id=agency.ids.new(), reply_to=lost))])

        async def asked() -> int:
            return len(its.asked)

        await eventually(asked, lambda found: found == 2)  # those of another key may be in another partition
        assert await agency.ask(its.ask.Probe(what="somebody"), timeout_s=60) == 3


async def test_a_query_function_has_what_the_lifespan_gives_here_and_over_the_bus(pair: Pair) -> None:
    bank, asker = unique("bank"), unique("asker")
    opened: list[str] = []

    class Ask(Query[int], type=f"{bank}.ask.v1"):
        key_: Key[str]

    async def rate(query: Ask, ctx: QueryContext) -> int:
        assert (ctx.envelope is None) is (query.key_ == "here")
        return int(ctx.deps)

    @asynccontextmanager
    async def rates(connection: Connection) -> AsyncGenerator[int]:
        opened.append(connection.service.name)
        yield 42

    service = Service(bank, queries=[rate], lifespan=rates)
    async with pair.connect(service, worker=False) as here:
        assert [await here.ask(Ask(key_="here")) for _ in range(3)] == [42] * 3
        assert len(opened) == 1
    async with pair.connect(service), pair.connect(Service(asker, messages=[Ask]), worker=False) as agency:
        assert await agency.ask(Ask(key_="there"), timeout_s=30) == 42


async def test_a_service_that_answers_no_queries_has_no_topic_for_them(pair: Pair) -> None:
    mute, asker = unique("mute"), unique("asker")

    class Ask(Query[int], type=f"{mute}.ask.v1"):
        key_: Key[str]

    silent = Service(mute, messages=[Ask])
    assert [spec.name for spec in silent.topics if spec.name.endswith(".queries")] == []
    async with pair.connect(silent), pair.connect(Service(asker, messages=[Ask]), worker=False) as agency:
        with pytest.raises(MissingTopics, match=rf"{mute}\.queries"):
            await agency.ask(Ask(key_="a"), timeout_s=20)
