"""`Repository` on every store: loading, the past, appending, executing, and snapshots that must not lie."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bus.codec import JsonCodec
from bus.envelope import StreamId
from bus.errors import Cancelled
from bus.messages import Command, Event, Key, Refused
from bus.metrics import MemoryMetrics
from bus.registry import Registry
from bus.seams import Uuid7Ids
from eventstore.decider import BadDecision, Decider
from eventstore.errors import NoSuchVersion, StreamTruncated, TooManyConflicts, WrongExpectedVersion
from eventstore.port import ANY, Append, Claim, Fence, Slice, Snapshot, Unit, Wanted
from eventstore.repository import Loaded, Repository, compare_snapshot
from eventstore.snapshots import Snapshots
from tests.eventstore.stores import NOON

ids = Uuid7Ids()


class Opened(Event, type="shop.opened.v1"):
    id: Key[str]


class Paid(Event, type="shop.paid.v1", public=False):
    id: Key[str]
    cents: int


class Open(Command[Opened], type="shop.open.v1"):
    id: Key[str]


class Pay(Command[None], type="shop.pay.v1"):
    id: Key[str]
    cents: int


class NotOpen(Refused, code="shop.not-open"):
    """Open it first."""


@dataclass(frozen=True)
class Account:
    open: bool = False
    cents: int = 0
    log: tuple[int, ...] = ()


def evolve(account: Account, event: Opened | Paid) -> Account:
    match event:
        case Opened():
            return replace(account, open=True)
        case Paid(cents=cents):
            return replace(account, cents=account.cents + cents, log=(*account.log, cents)[-5:])


def decide(account: Account, command: Open | Pay) -> list[Opened | Paid]:
    match command:
        case Open():
            return [Opened(id=command.id)]
        case Pay() if not account.open:
            raise NotOpen(id=command.id)
        case Pay(cents=cents):
            return [] if cents == 0 else [Paid(id=command.id, cents=cents)]


accounts = Decider("account", initial=Account(), evolve=evolve, decide=decide, snapshots=Snapshots(every=3))


class Ticking:
    """A clock that a test sets."""

    def __init__(self, at: datetime = NOON) -> None:
        self.at = at

    def now(self) -> datetime:
        return self.at

    def monotonic(self) -> float:
        return 0.0


def repository(store: Any, **options: Any) -> Repository[Account, Any, Any]:
    return Repository(accounts, store=store, refusals=[NotOpen], **options)


def paid(*cents: int, key: str = "a") -> list[Paid]:
    return [Paid(id=key, cents=one) for one in cents]


async def snapshot_at(store: Any, version: int, state: Account, *, key: str = "a") -> Snapshot:
    codec = accounts.state_codec()
    made = Snapshot(accounts.stream(key), version, codec.schema, codec.dump(state), NOON)
    assert await store.snapshots.save([made]) == 1
    return made


# --- appending -------------------------------------------------------------------------------------------------------


async def test_a_stream_that_must_not_exist_is_made_once(store: Any, twin: Any) -> None:
    first = await repository(store).append("a", *paid(1, 2), expected=0)

    assert first.version == 2
    with pytest.raises(WrongExpectedVersion) as caught:
        await repository(twin).append("a", *paid(3), expected=0)
    found = caught.value
    assert (found.stream, found.expected, found.actual) == (StreamId("account", "a"), 0, 2)
    assert (await repository(twin).append("a", *paid(3), expected=ANY)).version == 3
    assert (await repository(store).load("a")).state == Account(cents=6, log=(1, 2, 3))


async def test_the_same_append_again_gives_the_first_result(store: Any, twin: Any) -> None:
    id = ids.new()
    first = await repository(store).append("a", *paid(1, 2), expected=0, id=id)
    await repository(store).append("a", *paid(3), expected=2)

    assert await repository(twin).append("a", *paid(1, 2), expected=0, id=id) == first
    with pytest.raises(WrongExpectedVersion):
        await repository(twin).append("a", *paid(1, 2), expected=0, id=ids.new())
    assert (await repository(store).load("a")).version == 3


async def test_events_of_another_key_or_decider_are_refused(store: Any) -> None:
    with pytest.raises(BadDecision, match="with key 'b' was appended to account-a"):
        await repository(store).append("a", *paid(1), *paid(2, key="b"), expected=0)
    assert (await repository(store).load("a")).version == 0


# --- executing -------------------------------------------------------------------------------------------------------


async def test_a_command_is_decided_answered_and_refused(store: Any) -> None:
    ours = repository(store)
    with pytest.raises(NotOpen):
        await ours.execute(Pay(id="a", cents=5))

    assert await ours.execute(Open(id="a")) == Opened(id="a")
    await ours.execute(Pay(id="a", cents=5))
    await ours.execute(Pay(id="a", cents=0))

    assert await ours.load("a") == Loaded(StreamId("account", "a"), 2, Account(open=True, cents=5, log=(5,)))


async def test_the_same_command_again_has_no_second_effect_and_brings_the_first_answer(store: Any, twin: Any) -> None:
    opened, payment, refused = ids.new(), ids.new(), ids.new()
    with pytest.raises(NotOpen):
        await repository(store).execute(Pay(id="a", cents=5), id=refused)
    await repository(store).execute(Open(id="a"), id=opened)
    for one in (store, twin):
        await repository(one).execute(Pay(id="a", cents=5), id=payment)

    assert await repository(twin).execute(Open(id="a"), id=opened) == Opened(id="a")
    with pytest.raises(NotOpen):
        await repository(twin).execute(Pay(id="a", cents=5), id=refused)
    assert (await repository(store).load("a")).state.cents == 5


async def test_a_command_that_was_cancelled_by_its_undo_is_not_executed(store: Any) -> None:
    id = ids.new()
    undo = Claim("shop", ids.new(), "a", fences=id, fence=Fence.CANCEL)
    await store.commit([Unit(undo)])

    with pytest.raises(Cancelled):
        await repository(store).execute(Open(id="a"), id=id)


class Busy:
    """A store on which somebody else appends before each of the first `times` commits."""

    def __init__(self, inner: Any, times: int) -> None:
        self._inner, self._left = inner, times

    async def commit(self, units: Sequence[Unit]) -> Any:
        if self._left:
            self._left -= 1
            await repository(self._inner).append("a", *paid(1), expected=ANY)
        return await self._inner.commit(units)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


async def test_a_command_is_decided_again_on_the_state_that_others_left(store: Any) -> None:
    metrics = MemoryMetrics()
    await repository(store).execute(Open(id="a"))

    await repository(Busy(store, 5), metrics=metrics).execute(Pay(id="a", cents=100))

    assert (await repository(store).load("a")).state == Account(open=True, cents=105, log=(1, 1, 1, 1, 100))
    assert metrics.total("foldbus_executions_repeated_total") == 5


async def test_a_command_that_loses_every_race_gives_up_with_a_clear_error(store: Any) -> None:
    metrics, id = MemoryMetrics(), ids.new()
    await repository(store).execute(Open(id="a"))

    with pytest.raises(
        TooManyConflicts, match=r"shop.pay.v1 for account-a: somebody else was quicker 1 times"
    ) as caught:
        await repository(Busy(store, 9), metrics=metrics).execute(Pay(id="a", cents=100), id=id, timeout_s=0)

    assert caught.value.attempts == 1
    assert metrics.total("foldbus_executions_given_up_total") == 1
    assert (await repository(store).load("a")).state.cents == 1
    await repository(store).execute(Pay(id="a", cents=100), id=id)
    assert (await repository(store).load("a")).state.cents == 101


async def test_racing_commands_on_one_stream_all_take_effect(store: Any, twin: Any) -> None:
    await repository(store).execute(Open(id="a"))
    both = [repository(store), repository(twin)]

    await asyncio.gather(*(both[n % 2].execute(Pay(id="a", cents=1)) for n in range(12)))

    assert (await repository(store).load("a")).state.cents == 12


# --- the past --------------------------------------------------------------------------------------------------------


async def test_a_version_that_is_not_there_yet_is_a_clear_error(store: Any) -> None:
    await repository(store).append("a", *paid(1, 2), expected=0)

    for key, actual in (("a", 2), ("nobody", 0)):
        with pytest.raises(NoSuchVersion, match=f"is at version {actual}, there is no version 3 of it"):
            await repository(store).load(key, at_version=3)
    assert (await repository(store).load("nobody", at_version=0)).state == Account()
    assert (await repository(store).load("nobody", at=NOON)).version == 0


@pytest.mark.parametrize(
    "options", [{"at_version": -1}, {"at": NOON.replace(tzinfo=None)}, {"at": NOON, "at_version": 1}], ids=str
)
async def test_a_past_that_makes_no_sense_is_refused(store: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        await repository(store).load("a", **options)


async def test_a_time_is_the_longest_run_of_events_that_are_not_later(store: Any) -> None:
    """Clocks of writers differ: the third event looks older than the second."""
    clock = Ticking()
    ours = repository(store, clock=clock)
    for nth, seconds in enumerate((0, 10, 5, 20)):
        clock.at = NOON + timedelta(seconds=seconds)
        await ours.append("a", *paid(10**nth), expected=nth)

    async def cents(seconds: float) -> tuple[int, int]:
        found = await ours.load("a", at=NOON + timedelta(seconds=seconds))
        return found.version, found.state.cents

    assert await cents(-1) == (0, 0)
    assert await cents(0) == (1, 1)
    assert await cents(7) == (1, 1)  # the one of second 5 counts with the one of second 10 before it
    assert await cents(10) == (3, 111)
    assert await cents(19.999999) == (3, 111)
    assert await cents(20) == (4, 1111)


async def test_history_tells_each_event_with_the_state_after_it(store: Any) -> None:
    ours = repository(store)
    id = ids.new()
    await ours.execute(Open(id="a"), id=id)
    await ours.append("a", *paid(1, 2, 3), expected=1)

    steps = [step async for step in ours.history("a")]

    assert [(step.version, step.type, step.state.cents) for step in steps] == [
        (1, "shop.opened.v1", 0), (2, "shop.paid.v1", 1), (3, "shop.paid.v1", 3), (4, "shop.paid.v1", 6),
    ]  # fmt: skip
    assert (steps[0].events, steps[0].causation_id, steps[0].correlation_id) == ((Opened(id="a"),), id, id)
    assert [step async for step in ours.history("a", after_version=2)] == steps[2:]
    assert [step async for step in ours.history("a", after_version=1, limit=2)] == steps[1:3]
    assert [step async for step in ours.history("a", limit=3, backward=True)] == steps[:0:-1]
    assert [step async for step in ours.history("a", after_version=3, limit=3, backward=True)] == steps[3:]
    assert [step async for step in ours.history("a", after_version=9)] == []
    assert [step async for step in ours.history("a", after_version=4, limit=2, backward=True)] == []
    assert [step async for step in ours.history("nobody", limit=2, backward=True)] == []
    wrong: list[dict[str, Any]] = [{"limit": 0}, {"backward": True}, {"backward": True, "limit": 10_001}]
    for options in wrong:
        with pytest.raises(ValueError, match="wanted"):
            [step async for step in ours.history("a", **options)]


async def test_history_gives_a_state_of_its_own_to_each_step_also_when_evolve_changes_it_in_place(store: Any) -> None:
    def add_in_place(counts: list[int], event: Paid) -> list[int]:
        counts.append(event.cents)
        return counts

    def nothing(counts: list[int], command: Pay) -> list[Paid]:
        return []

    lists = Decider("account", initial=list[int](), evolve=add_in_place, decide=nothing)
    ours = Repository(lists, store=store)
    await ours.append("a", *paid(1, 2, 3), expected=0)

    assert [step.state async for step in ours.history("a")] == [[1], [1, 2], [1, 2, 3]]
    assert lists.initial == []


async def test_a_long_history_is_read_page_by_page(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eventstore.repository.PAGE", 3)
    ours = repository(store)
    await ours.append("a", *paid(*range(1, 9)), expected=0)

    steps = [step.version async for step in ours.history("a")]

    assert steps == list(range(1, 9))
    assert (await ours.load("a", at=NOON + timedelta(days=9999))).version == 8


# --- snapshots -------------------------------------------------------------------------------------------------------


@dataclass
class Watched:
    inner: Any
    slices: list[Slice]

    async def load(self, wanted: Sequence[Wanted]) -> Sequence[Slice]:
        found: Sequence[Slice] = await self.inner.load(wanted)
        self.slices += found
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


async def test_a_past_version_is_loaded_from_a_snapshot_below_it(store: Any) -> None:
    await repository(store).append("a", *paid(1, 2, 3, 4, 5), expected=0)
    await snapshot_at(store, 3, Account(cents=1000))  # a lie, to be told from the events
    watched = Watched(store, [])

    async def cents(**options: Any) -> int:
        return (await repository(watched).load("a", **options)).state.cents

    assert await cents() == 1009
    assert await cents(at_version=3) == 1000
    assert await cents(at_version=4) == 1004
    assert await cents(at_version=2) == 3
    assert await cents(at=NOON + timedelta(days=9999)) == 15  # which events it stands for by time, it does not know


async def test_where_events_are_gone_the_past_says_so(store: Any) -> None:
    """As a truncation up to version 2 leaves it, with its snapshot at version 3."""
    await repository(store).append("a", *paid(1, 2, 3, 4), expected=0)
    await snapshot_at(store, 3, Account(cents=6, log=(1, 2, 3)))

    class Truncated(Watched):
        async def load(self, wanted: Sequence[Wanted]) -> Sequence[Slice]:
            found = await super().load(wanted)
            return [replace(one, records=[r for r in one.records if (r.version or 0) > 2]) for one in found]

    gone: Any = Truncated(store, [])
    ours = repository(gone)
    assert (await ours.load("a")).state.cents == 10
    assert (await ours.load("a", at_version=3)).state.cents == 6
    assert [step.version async for step in ours.history("a", after_version=3)] == [4]
    with pytest.raises(StreamTruncated, match="the next one stored is 3"):
        await ours.load("a", at=NOON + timedelta(days=9999))
    with pytest.raises(StreamTruncated):
        await ours.load("a", at_version=2)
    with pytest.raises(StreamTruncated):
        [step async for step in ours.history("a")]
    older = Decider("account", initial=Account(), evolve=evolve, decide=decide, version=2)
    with pytest.raises(StreamTruncated):
        await Repository(older, store=gone).load("a")


async def test_a_snapshot_that_lies_is_found_by_a_full_fold(store: Any) -> None:
    await repository(store).append("a", *paid(1, 2, 3), expected=0)
    codec = JsonCodec(Registry([*accounts.commands, *accounts.events]))
    honest = await snapshot_at(store, 2, Account(cents=3, log=(1, 2)))
    assert await compare_snapshot(store, accounts, codec, honest) is None

    lie = await snapshot_at(store, 3, Account(cents=7, log=(1, 2, 4)))
    found = await compare_snapshot(store, accounts, codec, lie)
    assert found is not None
    assert (found.version, found.stored.cents, found.folded.cents) == (3, 7, 6)

    rubbish = replace(lie, state=b"[1,")
    found = await compare_snapshot(store, accounts, codec, rubbish)
    assert found is not None
    assert found.stored is None
    assert "cannot be read" in found.why
    assert await compare_snapshot(store, accounts, codec, replace(lie, schema="of another code")) is None
    with pytest.raises(NoSuchVersion):
        await compare_snapshot(store, accounts, codec, replace(lie, version=4))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    amounts=st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 3)), max_size=9),
    places=st.lists(st.integers(1, 9), max_size=3),
)
async def test_whatever_snapshots_there_are_every_version_and_time_is_what_its_events_fold_to(
    store: Any, amounts: list[tuple[int, int]], places: list[int]
) -> None:
    key, clock = ids.new().hex, Ticking()
    ours = repository(store, clock=clock)
    states, times = [Account()], list[datetime]()
    for nth, (cents, seconds) in enumerate(amounts):
        clock.at = NOON + timedelta(seconds=seconds)
        times.append(clock.at)
        await ours.append(key, *paid(cents, key=key), expected=nth)
        states.append(evolve(states[-1], Paid(id=key, cents=cents)))

    for place in [None, *(place for place in places if place <= len(amounts))]:
        if place is not None:
            codec = accounts.state_codec()
            made = Snapshot(accounts.stream(key), place, codec.schema, codec.dump(states[place]), NOON)
            await store.snapshots.save([made])
        assert await ours.load(key) == Loaded(accounts.stream(key), len(amounts), states[-1])
        for version, state in enumerate(states):
            assert (await ours.load(key, at_version=version)).state == state
        for seconds in range(-1, 5):
            at = NOON + timedelta(seconds=seconds)
            version = next((nth for nth, time in enumerate(times) if time > at), len(times))
            assert await ours.load(key, at=at) == Loaded(accounts.stream(key), version, states[version])
        assert [step.state async for step in ours.history(key)] == states[1:]


def test_an_id_is_given_to_each_event_of_an_append() -> None:
    """Else the second event of a repeated append could not be told from the first."""
    appended: list[UUID] = []

    class Remembering:
        service = "shop"

        async def commit(self, units: Sequence[Unit]) -> Any:
            (unit,) = units
            (one,) = unit.appends
            assert isinstance(one, Append)
            appended.extend(envelope.id for envelope in one.envelopes)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(repository(Remembering()).append("a", *paid(1, 1), expected=0, id=UUID(int=7)))
    assert len(set(appended)) == 2
