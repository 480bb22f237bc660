"""Parking with real workers, on both pairs: order through everything, nobody waits for somebody else's poison, nothing
is lost wherever a worker dies. Ledgers tell, per name, what was done in which order."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import replace

import pytest

from bus.errors import Died
from bus.transport import PollSettings
from eventstore.port import ClaimState, LetterWhere
from foldbus import Connection
from foldbus.redriving import Became, Redriver
from foldbus.timing import DueParked
from sagas import TIMEOUT_TYPE, SagaBehaviour
from tests.eventstore.stores import NOON
from tests.foldbus.parking_world import (
    BRIEF,
    LIMITED,
    PATIENT,
    AheadClock,
    World,
    committed,
    decided,
    ids,
    ledger,
    letters,
    metrics_of,
    parked,
    running,
    send,
    told,
    tried,
    waiting,
    world,
)
from tests.stories.pairs import Pair, eventually


async def booked_all(connection: Connection, wanted: dict[str, list[int]], *, timeout_s: float = 60.0) -> None:
    """Waits for that many, then compares: no double, no inversion."""
    many = sum(map(len, wanted.values()))

    async def look() -> int:
        return sum(map(len, (await ledger(connection)).values()))

    await eventually(look, lambda found: found >= many, timeout_s=timeout_s)
    assert await ledger(connection) == wanted


class TestAFailingKey:
    async def test_waits_in_the_database_and_the_others_go_on(self, pair: Pair) -> None:
        its = world()
        its.faults.book = lambda name, n: name == "k7"
        names = [f"k{n}" for n in range(20)]
        async with running(pair, its) as desk:
            await told(desk, its, [(name, n) for n in range(3) for name in names])
            await booked_all(desk, {name: [0, 1, 2] for name in names if name != "k7"})
            (key,) = await waiting(desk.store, 3)
            assert (key.consumer, key.key, key.waiting) == (its.booker, "k7", 3)
            assert key.head.failure is not None
            assert key.head.failure.error == "RuntimeError"
            await committed(desk)  # nobody's offset waits for it
            assert await letters(desk.store, 0) == []
            its.faults.clear()
            await booked_all(desk, {name: [0, 1, 2] for name in names})
            await parked(desk.store, 0)
            metrics = metrics_of(desk)
            # What is committed is seen a moment before it is counted.
            await eventually(lambda: _count(metrics, "foldbus_unparked_total", how="handled"), lambda n: n >= 3)
            assert metrics.total("foldbus_unparked_total", consumer=its.booker, how="handled") == 3
            assert metrics.total("foldbus_parked_total", consumer=its.booker) == 1
            assert metrics.total("foldbus_followed_total", consumer=its.booker) == 2
            await eventually(lambda: _count(metrics, "foldbus_keys_freed_total"), lambda n: n == 1)

    async def test_among_a_thousand_is_the_only_one_that_waits(self, pair: Pair) -> None:
        its = world(booking=False)
        its.faults.decide = lambda name, n: name == "k7"
        names = [f"k{n}" for n in range(1000)]
        async with running(pair, its) as desk:
            await send(desk, its, [(name, n) for n in range(2) for name in names])
            await waiting(desk.store, 2)
            others = {name: [0, 1] for name in names if name != "k7"}
            await eventually(lambda: decided(desk, its), lambda found: sum(map(len, found.values())) == 1998)
            assert await decided(desk, its) == others
            await eventually(lambda: _count(metrics_of(desk), "foldbus_followed_total"), bool)
            assert metrics_of(desk).total("foldbus_followed_total") == 1
            its.faults.clear()
            await parked(desk.store, 0)
            assert await decided(desk, its) == {**others, "k7": [0, 1]}

    async def test_of_commands_is_decided_in_order_in_the_end(self, pair: Pair) -> None:
        its = world()
        its.faults.decide = lambda name, n: name == "a" and n == 1
        async with running(pair, its) as desk:
            await send(desk, its, [(name, n) for n in range(6) for name in "abc"])
            await waiting(desk.store, 5)
            others = {"a": [0], "b": list(range(6)), "c": list(range(6))}
            await eventually(lambda: decided(desk, its), lambda found: found == others)
            its.faults.clear()
            await parked(desk.store, 0)
            assert await decided(desk, its) == {name: list(range(6)) for name in "abc"}

    async def test_keeps_its_order_through_restarts_and_rebalances(self, pair: Pair) -> None:
        """Failing and recovering, while workers come and go."""
        its = world()
        its.faults.book = lambda name, n: name in "ab" and n % 3 == 1
        its.faults.decide = lambda name, n: name == "c" and n == 2
        names = "abcde"
        async with running(pair, its) as first:
            await send(first, its, [(name, n) for n in range(4) for name in names])
            await parked(first.store, 3)
            async with running(pair, its) as second:
                await send(first, its, [(name, n) for n in range(4, 8) for name in names])
                await eventually(lambda: decided(second, its), lambda found: len(found.get("e", ())) == 8)
                its.faults.decide = lambda name, n: name == "d" and n == 9
                await send(second, its, [(name, n) for n in range(8, 12) for name in names])
                await eventually(lambda: decided(second, its), lambda found: len(found.get("c", ())) == 12)
            its.faults.book = lambda name, n: name == "a" and n % 3 == 1
            await eventually(lambda: ledger(first), lambda found: len(found.get("b", ())) == 12)
        its.faults.clear()
        async with running(pair, its) as last:
            await booked_all(last, {name: list(range(12)) for name in names})
            assert await decided(last, its) == {name: list(range(12)) for name in names}
            await parked(last.store, 0)

    async def test_is_tried_on_by_another_worker_when_its_own_is_gone(self, pair: Pair) -> None:
        its = world()
        its.faults.book = lambda name, n: True
        async with running(pair, its) as desk:
            await told(desk, its, [("a", 0), ("a", 1)])
            await waiting(desk.store, 2)
        its.faults.clear()
        async with running(pair, its) as other:
            await booked_all(other, {"a": [0, 1]})

    async def test_burns_no_attempt_of_its_followers(self, pair: Pair) -> None:
        its = world()
        its.faults.book = lambda name, n: n == 0
        async with running(pair, its) as desk:
            await told(desk, its, [("a", n) for n in range(50)])
            (key,) = await waiting(desk.store, 50)
            queue = await desk.store.parking.queue(key.consumer, "a", limit=100)
            assert [one.failure is None for one in queue] == [False] + [True] * 49
            await eventually(lambda: _tries(its, 0), lambda n: n > 4)
            # The first follower may have been tried before its key was looked at; the others never were.
            assert await _tries(its, 2) == 0


async def _tries(its: World, n: int) -> int:
    return its.faults.tried.count(("a", n))


async def _count(metrics: object, name: str, **labels: str) -> int:
    return metrics.total(name, **labels)  # type: ignore[attr-defined, no-any-return]


class TestWhatHasHadItsTime:
    async def test_is_a_dead_letter_and_the_next_of_its_key_goes_on(self, pair: Pair) -> None:
        its, clock = world(), AheadClock()
        its.faults.decide = lambda name, n: n == 1
        async with running(pair, its, LIMITED, clock=clock) as desk:
            await send(desk, its, [("a", 0)])
            id = ids.new()
            asking = asyncio.create_task(desk.request(its.Note(name="a", n=1), id=id, timeout_s=50))
            await tried(desk.store, 5)
            clock.ahead_s = LIMITED.parking.total_s
            with pytest.raises(Died, match="cannot note a 1"):
                await asking
            await send(desk, its, [("a", 2)])
            await eventually(lambda: decided(desk, its), lambda found: found == {"a": [0, 2]})
            (letter,) = await letters(desk.store, 1)
            assert (letter.id, letter.topic) == (id, f"{its.service.name}.commands")
            assert letter.failure.attempts > 4  # three in place, then at least two from its queue
            spent = letter.failure.failed_at - letter.failure.first_failed_at
            assert spent.total_seconds() >= LIMITED.parking.total_s
            assert (await desk.status(id)).state is ClaimState.DEAD
            await parked(desk.store, 0)

    async def test_is_told_as_parked_before(self, pair: Pair) -> None:
        its = world()
        its.faults.decide = lambda name, n: True
        async with running(pair, its) as desk:
            first, second = ids.new(), ids.new()
            await desk.send(its.Note(name="a", n=1), id=first)
            await parked(desk.store, 1)
            await desk.send(its.Note(name="a", n=2), id=second)
            await waiting(desk.store, 2)
            assert [(await desk.status(id)).state for id in (first, second)] == [ClaimState.PARKED] * 2

    async def test_may_be_read_no_better_and_dies_behind_its_predecessors(self, pair: Pair) -> None:
        """Bad input of a parked key keeps its place; alone it dies at once."""
        its = world()
        its.faults.book = lambda name, n: name == "a" and n == 0
        async with running(pair, its) as desk:
            await told(desk, its, [("a", 0)])
            await parked(desk.store, 1)
            for name in "ab":
                bad = replace(desk.envelope(its.Noted(name=name, n=9), topic=f"{its.service.name}.events"), data=b"{}")
                await desk.publisher.publish(bad)
            await told(desk, its, [("a", 1)])
            (alone,) = await letters(desk.store, 1)
            assert (alone.key, alone.failure.attempts) == (b"b", 1)
            (key,) = await waiting(desk.store, 3)
            its.faults.clear()
            await booked_all(desk, {"a": [0, 1]})
            await parked(desk.store, 0)
            both = await letters(desk.store, 2)
            assert [one.key for one in both] == [b"b", b"a"]
            assert key.key == "a"

    async def test_is_parked_by_no_one_who_gives_it_no_time(self, pair: Pair) -> None:
        its = world()
        its.faults.book = lambda name, n: n == 0
        async with running(pair, its, replace(BRIEF, parking=replace(BRIEF.parking, total_s=0.0))) as desk:
            await told(desk, its, [("a", 0), ("a", 1)])
            (letter,) = await letters(desk.store, 1)
            assert letter.failure.attempts == 3
            await booked_all(desk, {"a": [1]})
            assert metrics_of(desk).total("foldbus_parked_total") == 0


class TestHold:
    async def test_keeps_the_key_until_it_is_woken_and_loses_no_order(
        self, pair: Pair, caplog: pytest.LogCaptureFixture
    ) -> None:
        its, clock = world(hold=["book"]), AheadClock()
        its.faults.book = lambda name, n: name == "a" and n == 1
        caplog.set_level(logging.ERROR, "foldbus.parking")
        async with running(pair, its, LIMITED, clock=clock) as desk:
            await told(desk, its, [(name, n) for n in range(4) for name in "ab"])
            await waiting(desk.store, 3)
            await tried(desk.store, 4)
            clock.ahead_s = LIMITED.parking.total_s

            async def held() -> bool:
                return (await desk.store.parking.keys())[0].due_at is None

            await eventually(held, bool)
            (key,) = await parked(desk.store, 1)
            failure = key.head.failure
            assert failure is not None
            assert (failure.message, failure.attempts > 3) == ("cannot book a 1", True)
            await booked_all(desk, {"a": [0], "b": [0, 1, 2, 3]})

            assert await desk.store.parking.wake(its.booker, "a")  # not mended yet: tried once, and held again
            await eventually(
                lambda: parked(desk.store, 1),
                lambda found: found[0].due_at is None and found[0].head.failure.attempts == failure.attempts + 1,  # type: ignore[union-attr]
            )
            assert "key 'a' is held" in caplog.text
            its.faults.clear()
            assert await desk.store.parking.wake(its.booker, "a")
            await booked_all(desk, {"a": [0, 1, 2, 3], "b": [0, 1, 2, 3]})
            assert metrics_of(desk).total("foldbus_held_total") == 2
            assert await letters(desk.store, 0) == []

    async def test_holds_what_cannot_be_read_at_once(self, pair: Pair) -> None:
        its = world(hold=["commands"])
        async with running(pair, its) as desk:
            bad = replace(desk.envelope(its.Note(name="a", n=1), topic=f"{its.service.name}.commands"), data=b"{}")
            await desk.publisher.publish(bad)
            (key,) = await parked(desk.store, 1)
            assert (key.due_at, key.head.failure and key.head.failure.attempts) == (None, 1)
            await send(desk, its, [("a", 2), ("b", 1)])
            await waiting(desk.store, 2)
            await eventually(lambda: decided(desk, its), lambda found: found == {"b": [1]})


class Killed(BaseException):
    """As a SIGKILL, but for the process: no `except Exception` sees it."""


class Kill:
    """At the first hit of this name."""

    def __init__(self, name: str) -> None:
        self.name, self.done = name, False

    def hit(self, name: str) -> None:
        if name == self.name and not self.done:
            self.done = True
            raise Killed(name)


STEPS = ("park", "follow", "turn", "postpone")
POLL = PollSettings(session_timeout_s=6.0, heartbeat_s=1.0, rebalance_timeout_s=10.0)
"""A member that died without leaving holds its group up for no longer."""


class TestAWorkerThatDies:
    @pytest.mark.timeout(150)
    @pytest.mark.parametrize("when", [f"{when}-{step}" for step in STEPS for when in ("before", "after")])
    async def test_leaves_every_message_in_its_place(
        self, pair: Pair, when: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        its = world(book_s=10.0)
        its.faults.book = lambda name, n: name == "a" and n == 1 and its.faults.tried.count(("a", 1)) < 7
        quick = replace(PATIENT, parking=replace(PATIENT.parking, lease_s=0.3))

        async def nothing(due: DueParked) -> None:
            """A dead worker puts nothing back: its turns end with their leases."""

        names = "abc"
        async with running(pair, its, worker=False) as client:
            await told(client, its, [(name, n) for n in range(5) for name in names])
            kill = Kill(when)
            monkeypatch.setattr(DueParked, "put_back", nothing)
            with suppress(Killed):
                async with running(pair, its, quick, failpoint=kill, poll=POLL) as desk:
                    assert desk.worker is not None
                    await asyncio.wait_for(asyncio.shield(desk.worker.ended), 60)
            assert kill.done
            monkeypatch.undo()
            async with running(pair, its, quick, poll=POLL):
                # A turn of the dead one ends with its lease, which is the handler's time and ten seconds.
                await booked_all(client, {name: list(range(5)) for name in names}, timeout_s=110)
                await parked(client.store, 0)


class TestARedrive:
    def redriver(self, desk: Connection) -> Redriver:
        return Redriver(desk.service, desk.store, clock=desk.clock, ids=ids, metrics=desk.metrics, by="ann")

    async def test_of_a_parked_key_joins_its_queue(self, pair: Pair) -> None:
        its = world()
        its.faults.book = lambda name, n: n < 2
        async with running(pair, its, replace(BRIEF, parking=replace(BRIEF.parking, total_s=0.0))) as desk:
            await told(desk, its, [("a", 0)])
            (letter,) = await letters(desk.store, 1)
        async with running(pair, its) as desk:
            await told(desk, its, [("a", 1), ("a", 2)])
            await waiting(desk.store, 2)
            redriver = self.redriver(desk)
            assert (await redriver.redrive(redriver.plan(letter))).became is Became.REDRIVEN
            await waiting(desk.store, 3)
            assert await letters(desk.store, 0) == []
            its.faults.clear()
            await booked_all(desk, {"a": [1, 2, 0]})
            await parked(desk.store, 0)
            await eventually(desk.store.timers.next_due, lambda due: due is None)

    async def test_of_one_whose_original_comes_again_has_one_effect(self, pair: Pair) -> None:
        """Its record is delivered once more while the redriven message waits in the queue."""
        its = world()
        its.faults.book = lambda name, n: n < 2
        async with running(pair, its, replace(BRIEF, parking=replace(BRIEF.parking, total_s=0.0))) as desk:
            event = desk.envelope(its.Noted(name="a", n=0), topic=f"{its.service.name}.events")
            await desk.publisher.publish(event)
            (letter,) = await letters(desk.store, 1)
        async with running(pair, its) as desk:
            await told(desk, its, [("a", 1)])
            await parked(desk.store, 1)
            redriver = self.redriver(desk)
            await redriver.redrive(redriver.plan(letter))
            await waiting(desk.store, 2)
            await desk.publisher.publish(event)
            await told(desk, its, [("a", 2)])
            await waiting(desk.store, 3)
            its.faults.clear()
            await booked_all(desk, {"a": [1, 0, 2]})
            await parked(desk.store, 0)


class TestASagasTimeout:
    async def test_that_fails_is_parked_and_goes_on_in_the_end(
        self, pair: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        its = world(sagas=True)
        broken = True
        decide = SagaBehaviour.decide

        def fails(behaviour: SagaBehaviour, state: object, envelope: object) -> object:
            if broken and envelope.type == TIMEOUT_TYPE:  # type: ignore[attr-defined]
                raise RuntimeError("the saga's code cannot be loaded")
            return decide(behaviour, state, envelope)  # type: ignore[arg-type]

        monkeypatch.setattr(SagaBehaviour, "decide", fails)
        async with running(pair, its) as desk:
            await told(desk, its, [("a", -1)])
            (key,) = await parked(desk.store, 1)
            assert (key.consumer, key.head.message.delivery) == (f"{its.service.name}.replies", None)
            # The queue has it now: no timer comes up for it any more.
            await eventually(desk.store.timers.next_due, lambda due: due is None)
            broken = False
            await parked(desk.store, 0)
            assert await letters(desk.store, 0) == []
            handled = {"how": "handled"}
            await eventually(lambda: _count(metrics_of(desk), "foldbus_unparked_total", **handled), bool)
            assert metrics_of(desk).total("foldbus_unparked_total", **handled) == 1


async def test_a_letter_of_a_parked_message_is_as_of_any_other(pair: Pair) -> None:
    """Its bytes, its place, its headers; and it can be redriven."""
    its = world()
    its.faults.book = lambda name, n: True
    async with running(pair, its, BRIEF) as desk:
        await told(desk, its, [("a", 5)])
        (letter,) = await letters(desk.store, 1)
        assert (letter.topic, letter.key, letter.type) == (
            f"{its.service.name}.events",
            b"a",
            str(its.Noted.type_name),
        )
        assert letter.partition >= 0
        assert letter.offset >= 0
        assert dict(letter.headers)["ce_type"] == str(its.Noted.type_name).encode()
        its.faults.clear()
        redriver = Redriver(desk.service, desk.store, clock=desk.clock, ids=ids, metrics=desk.metrics)
        assert (await redriver.redrive(redriver.plan(letter))).became is Became.REDRIVEN
        await booked_all(desk, {"a": [5]})
        assert not await desk.store.letters.page(LetterWhere(until=NOON))
