"""The circuit breaker alone: every turn of it, on a clock that only the test moves."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta

import pytest

from bus.breaker import BadBreaker, Breaker, Call, Circuit, Circuits, State, begin_all, free_of, wait_of
from bus.metrics import MemoryMetrics

BANK = Breaker("bank", counts=(ConnectionError,), failures=3, rate=0.5, window_s=30, open_s=10, open_max_s=35)
DOWN = ConnectionError("refused")


class HandClock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return datetime(2024, 5, 1, tzinfo=UTC) + timedelta(seconds=self.seconds)


class World:
    def __init__(self, breaker: Breaker = BANK) -> None:
        self.clock, self.metrics = HandClock(), MemoryMetrics()
        self.circuit = Circuit(breaker, clock=self.clock, metrics=self.metrics)

    def begin(self) -> Call:
        call = self.circuit.begin()
        assert call is not None
        return call

    def fail(self, times: int = 1, error: Exception = DOWN) -> None:
        for _ in range(times):
            self.begin().failed(error)

    def answer(self, times: int = 1) -> None:
        for _ in range(times):
            self.begin().answered()

    def opened(self) -> World:
        self.fail(BANK.failures)
        assert self.circuit.state is State.OPEN
        return self

    def half_open(self) -> World:
        self.opened().clock.seconds += BANK.open_s
        assert self.circuit.state is State.HALF_OPEN
        return self


class TestClosed:
    def test_lets_everything_through(self) -> None:
        world = World()
        world.fail(2)
        assert (world.circuit.state, world.circuit.free, world.circuit.wait_s) == (State.CLOSED, None, 0.0)

    def test_opens_at_so_many_failures(self) -> None:
        world = World()
        world.fail(2)
        world.fail()
        assert (world.circuit.state, world.circuit.free, world.circuit.wait_s) == (State.OPEN, 0, 10.0)

    def test_stays_closed_while_failures_are_a_small_share(self) -> None:
        world = World()
        world.answer(7)
        world.fail(6)
        assert world.circuit.state is State.CLOSED
        world.fail()
        assert world.circuit.state is State.OPEN

    def test_forgets_failures_that_are_older_than_the_window(self) -> None:
        world = World()
        world.fail(2)
        world.clock.seconds += 30
        world.fail(2)
        assert world.circuit.state is State.CLOSED
        world.clock.seconds += 29
        world.fail()
        assert world.circuit.state is State.OPEN

    def test_takes_an_error_that_is_not_counted_for_an_answer(self) -> None:
        world = World()
        world.fail(100, ValueError("no such card"))
        assert world.circuit.state is State.CLOSED

    def test_counts_subclasses(self) -> None:
        world = World()
        world.fail(3, ConnectionRefusedError())
        assert world.circuit.state is State.OPEN

    def test_learns_nothing_from_calls_that_were_cut_short(self) -> None:
        world = World()
        for _ in range(10):
            world.begin().abandoned()
        assert world.circuit.state is State.CLOSED

    def test_keeps_a_bounded_record_of_any_number_of_calls(self) -> None:
        world = World(Breaker("bank", counts=(ConnectionError,), failures=10**9))
        for _ in range(2000):
            world.clock.seconds += 0.1
            world.fail()
        assert len(world.circuit._window._slices) <= 11


class TestOpen:
    def test_lets_nothing_through_until_its_time_is_over(self) -> None:
        world = World().opened()
        world.clock.seconds += 9.5
        assert world.circuit.begin() is None
        assert world.circuit.wait_s == pytest.approx(0.5)
        world.clock.seconds += 0.5
        assert world.circuit.state is State.HALF_OPEN

    def test_is_not_moved_by_calls_that_were_begun_before(self) -> None:
        """They were in flight when it opened: neither their failures nor their answers say how things are now."""
        world = World()
        flying = [world.begin() for _ in range(3)]
        world.opened().clock.seconds += 4
        flying[0].failed(DOWN)
        flying[1].answered()
        assert (world.circuit.state, world.circuit.wait_s) == (State.OPEN, 6.0)
        world.clock.seconds += 6
        assert world.circuit.state is State.HALF_OPEN
        flying[2].answered()
        assert world.circuit.state is State.HALF_OPEN, "an old answer is no probe's"

    def test_says_so(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            world = World().half_open()
            world.answer()
        assert [record.message for record in caplog.records] == [
            "breaker bank is open for 10.0 s: 3 of 3 calls failed within 30 s, the last one with ConnectionError: "
            "refused",
            "breaker bank is half-open: the next call is a probe",
            "breaker bank is closed: its probe was answered",
        ]
        assert world.metrics.total("foldbus_breaker_opened_total", breaker="bank") == 1
        assert world.metrics.total("foldbus_breaker_closed_total", breaker="bank") == 1
        assert world.metrics.gauges["foldbus_breaker_open", (("breaker", "bank"),)] == 0.0


class TestHalfOpen:
    def test_lets_one_call_through(self) -> None:
        world = World().half_open()
        assert world.circuit.free == 1
        probe = world.begin()
        assert (world.circuit.free, world.circuit.begin()) == (0, None)
        assert 0 < world.circuit.wait_s < 1
        probe.answered()
        assert (world.circuit.state, world.circuit.free) == (State.CLOSED, None)

    def test_closes_with_a_clean_slate(self) -> None:
        world = World().half_open()
        world.fail()
        world.clock.seconds += 20
        world.answer()
        world.fail(2)
        assert world.circuit.state is State.CLOSED
        world.fail()
        assert world.circuit.wait_s == 10.0, "and the first time it opens again is as short as ever"

    def test_opens_again_twice_as_long_for_each_probe_that_fails_up_to_a_bound(self) -> None:
        world = World().half_open()
        waits: list[float] = []
        for _ in range(3):
            world.fail()
            waits.append(world.circuit.wait_s)
            world.clock.seconds += waits[-1]
        assert waits == [20.0, 35.0, 35.0]

    def test_gives_the_turn_away_when_its_probe_is_cut_short(self) -> None:
        world = World().half_open()
        world.begin().abandoned()
        assert (world.circuit.state, world.circuit.free) == (State.HALF_OPEN, 1)

    def test_closes_on_an_error_that_is_not_counted(self) -> None:
        world = World().half_open()
        world.fail(1, ValueError("no such card"))
        assert world.circuit.state is State.CLOSED

    def test_hears_of_a_call_once(self) -> None:
        world = World().half_open()
        probe = world.begin()
        probe.failed(DOWN)
        world.clock.seconds += 20
        assert world.circuit.state is State.HALF_OPEN
        probe.answered()
        assert world.circuit.state is State.HALF_OPEN


class TestSeveral:
    def test_a_message_that_needs_two_goes_when_both_let_it_and_begins_both_or_none(self) -> None:
        clock, metrics = HandClock(), MemoryMetrics()
        circuits = Circuits(clock=clock, metrics=metrics)
        mail = Breaker("mail", counts=(OSError,), failures=1, open_s=3)
        both = circuits.all_of([BANK, mail])
        assert circuits.of(Breaker(**{name: getattr(BANK, name) for name in BANK.__slots__})) is both[0]
        begun = begin_all(both)
        assert begun is not None
        begun[1].failed(OSError())
        assert (free_of(both), wait_of(both), begin_all(both)) == (0, 3.0, None)
        clock.seconds += 3
        assert free_of(both) == 1
        assert free_of(both[:1]) is None

    def test_of_one_name_are_refused(self) -> None:
        circuits = Circuits(clock=HandClock(), metrics=MemoryMetrics())
        circuits.of(BANK)
        with pytest.raises(BadBreaker, match="two breakers are called 'bank'"):
            circuits.of(Breaker("bank", counts=(OSError,)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"name": "The Bank"}, "no name for a breaker"),
        ({"counts": ()}, "wanted classes of exceptions, at least one"),
        ({"counts": (BaseException,)}, "wanted classes of exceptions"),
        ({"counts": ("ConnectionError",)}, "wanted classes of exceptions"),
        ({"failures": 0}, "wanted failures of 1 or more"),
        ({"rate": 0.0}, "a rate above 0"),
        ({"rate": 1.5}, "a rate above 0"),
        ({"window_s": 0.0}, "times above 0"),
        ({"open_s": 0.0}, "times above 0"),
        ({"open_s": 20.0, "open_max_s": 10.0}, "open_s at most open_max_s"),
    ],
)
def test_a_breaker_that_could_only_misbehave_is_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(BadBreaker, match=told):
        Breaker(**({"name": "bank", "counts": (OSError,)} | options))  # type: ignore[arg-type]
