"""Who meets whom at a parked key: each interleaving is forced. One of the two has done its part and holds it open, in a
transaction, until the other one waits for it; then it ends. (On SQLite the file's one writer is what they wait for.)"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from bus.metrics import MemoryMetrics
from eventstore import queued
from eventstore.parking import Waiting
from eventstore.port import ANY, ClaimState, Fence, Outcome, Standing, Store, Unit, Verdict
from tests.eventstore.locks import blocked
from tests.eventstore.parked import WHY, effect_of, head, ids, queue_of, states, unit_of, waiting
from tests.eventstore.stores import (
    CONSUMER,
    NOON,
    Backend,
    append,
    claim,
    commit,
    event,
    postgres_backend,
    reply,
    undo,
    verdicts,
    version,
    wanted,
)

PARKED = Standing(ClaimState.PARKED)
ENDS = pytest.mark.parametrize("ends", ["commit", "rollback"])


@dataclass
class Pair:
    """Two stores on one database: whoever is first holds it open, the other one comes."""

    backend: Backend
    first: Any
    second: Any
    metrics: MemoryMetrics

    async def comes(self, call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Begins `call`, and returns when it waits for the first."""
        retries = "foldbus_store_busy_retries_total"
        before = self.metrics.total(retries)
        task = asyncio.create_task(call)
        if self.backend.name == "postgres":
            await blocked(self.backend.where)
        else:
            async with asyncio.timeout(30):
                while self.metrics.total(retries) == before:  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.001)
        assert not task.done()
        return task

    @asynccontextmanager
    async def held(self, ends: str = "commit") -> AsyncGenerator[Any]:
        async with self.first.transaction() as tx:
            yield tx
            if ends == "rollback":
                await tx.sql.rollback()


async def paired(backend: Backend) -> AsyncIterator[Pair]:
    metrics = MemoryMetrics()
    async with backend.open() as first, backend.open(metrics=metrics) as second:
        yield Pair(backend, first, second, metrics)


@pytest_asyncio.fixture
async def pair(backend: Backend) -> AsyncIterator[Pair]:
    async for made in paired(backend):
        yield made


@pytest_asyncio.fixture
async def racing(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    """Where the first one's call takes no transaction, and only PostgreSQL lets others in meanwhile."""
    async for made in paired(postgres_backend(request, migrated=True)):
        yield made


class TestAMessageThatComesAsTheQueueEmpties:
    @ENDS
    async def test_finds_its_key_free_or_joins(self, pair: Pair, ends: str) -> None:
        await queue_of(pair.first, behind=0)
        parked, late = await head(pair.first), waiting()
        async with pair.held(ends) as tx:
            await pair.first.parking.commit(parked, effect_of(parked), tx=tx)
            following = await pair.comes(pair.second.parking.follow(CONSUMER, [late]))
        if ends == "commit":
            assert await following == [Standing(ClaimState.NEW)]
            assert await pair.second.parking.keys() == []
            assert await commit(pair.second, effect_of(late, 1)) == ["ok"]
        else:
            assert await following == [PARKED]
            assert await ids(pair.second) == [parked.message.envelope.id, late.envelope.id]

    @ENDS
    async def test_and_fails_parks_its_key_anew_or_joins(self, pair: Pair, ends: str) -> None:
        await queue_of(pair.first, behind=0)
        parked, late = await head(pair.first), waiting()
        async with pair.held(ends) as tx:
            await pair.first.parking.commit(parked, unit_of(parked), tx=tx)
            parking = await pair.comes(pair.second.parking.park(CONSUMER, late, WHY, due_at=None))
        assert await parking == PARKED
        (key,) = await pair.second.parking.keys()
        assert (key.waiting, key.due_at) == ((1, None) if ends == "commit" else (2, NOON))
        assert await commit(pair.second, Unit(claim())) == ["parked"]

    @pytest.mark.parametrize("fails", [False, True], ids=["follows", "fails"])
    async def test_joins_first_and_is_next(self, racing: Pair, fails: bool) -> None:
        await queue_of(racing.first, behind=0)
        parked, late = await head(racing.first), waiting()
        async with racing.first.connection() as db, db.transaction():
            if fails:
                await parks(racing.first, db, late)
            else:
                columns = [[value] for value in queued.columns(late)]
                joins = (CONSUMER, [late.envelope.id], ["o-1"], [False], *columns)
                await db.fetch(racing.first.parking._follow, *joins)
            emptying = await racing.comes(racing.second.parking.commit(parked, effect_of(parked)))
        assert (await emptying).verdict is Verdict.COMMITTED
        assert await ids(racing.first) == [late.envelope.id]
        assert await commit(racing.first, Unit(claim())) == ["parked"]
        assert (await head(racing.first)).message == late

    async def test_is_parked_until_the_last_one_is_truly_gone(self, racing: Pair) -> None:
        """A commit waits for nobody's queue: it says what is so for the moment."""
        await queue_of(racing.first, behind=0)
        parked, late = await head(racing.first), waiting()
        async with racing.held() as tx:
            await racing.first.parking.commit(parked, effect_of(parked), tx=tx)
            assert await commit(racing.second, unit_of(late)) == ["parked"]
            assert await commit(racing.second, unit_of(late), Unit(claim(key="x"))) == ["parked", "ok"]
        assert await commit(racing.second, unit_of(late)) == ["ok"]

    async def test_of_a_transaction_that_emptied_the_queue_itself_is_handled_there(self, pair: Pair) -> None:
        """And where one is left, its key is parked again for what else that transaction commits."""
        await queue_of(pair.first, behind=1)
        first = await head(pair.first)
        async with pair.first.transaction() as tx:
            assert (await pair.first.parking.commit(first, unit_of(first), tx=tx)).verdict is Verdict.COMMITTED
            assert verdicts(await pair.first.commit([Unit(claim())], tx=tx)) == ["parked"]
        second = await head(pair.first)
        async with pair.first.transaction() as tx:
            assert (await pair.first.parking.commit(second, unit_of(second), tx=tx)).verdict is Verdict.COMMITTED
            assert verdicts(await pair.first.commit([Unit(claim())], tx=tx)) == ["ok"]


class TestAMessageThatTwoOwnersHave:
    @ENDS
    async def test_is_parked_by_one_only_if_the_other_did_not_commit_it(self, pair: Pair, ends: str) -> None:
        given = waiting()
        async with pair.held(ends) as tx:
            assert verdicts(await pair.first.commit([unit_of(given, reply=reply())], tx=tx)) == ["ok"]
            parking = await pair.comes(pair.second.parking.park(CONSUMER, given, WHY, due_at=NOON))
        standing = await parking
        if ends == "commit":
            assert standing.state is ClaimState.DONE
            assert standing.reply is not None
            assert await pair.second.parking.keys() == []
            assert await commit(pair.second, Unit(claim())) == ["ok"]
        else:
            assert standing == PARKED
            assert await ids(pair.second) == [given.envelope.id]

    @pytest.mark.parametrize("lean", [True, False], ids=["alone", "with its follower"])
    async def test_is_parked_for_the_one_who_waited_for_the_others_parking_and_so_is_its_key(
        self, racing: Pair, lean: bool
    ) -> None:
        """The key is looked for after the claims were taken: before, its row could not be seen."""
        given, behind = waiting(), waiting()
        units = [effect_of(given)] if lean else [effect_of(given), unit_of(behind), Unit(claim(key="x"))]
        async with racing.first.connection() as db, db.transaction():
            await parks(racing.first, db, given)
            coming = await racing.comes(commit(racing.second, *units))
        assert await coming == (["parked"] if lean else ["parked", "parked", "ok"])
        assert await version(racing.first, "s") == 0
        assert await states(racing.first, given, behind) == ["parked", "key-parked"]

    async def test_is_begun_by_one_only(self, pair: Pair) -> None:
        for _ in range(5):
            given = waiting()
            begun = await asyncio.gather(
                *(at.effects.begin(CONSUMER, given.envelope.id, "o-1", lease_s=600) for at in (pair.first, pair.second))
            )
            assert sorted(str(one.state) for one in begun) == ["new", "started"]

    @ENDS
    async def test_is_begun_by_the_second_if_the_first_did_not(self, racing: Pair, ends: str) -> None:
        given = waiting()
        call = (CONSUMER, given.envelope.id, "o-1", 600.0, None, None)
        async with racing.first.connection() as db:
            transaction = db.transaction()
            await transaction.start()
            await db.fetch(racing.first.effects._begin, *call)
            begins = racing.second.effects.begin(CONSUMER, given.envelope.id, "o-1", lease_s=600)
            second = await racing.comes(begins)
            await (transaction.commit() if ends == "commit" else transaction.rollback())
        standing = await second
        if ends == "commit":
            assert standing == Standing(ClaimState.STARTED, started=True)
        else:
            assert (standing.state, standing.started) == (ClaimState.NEW, False)

    async def test_is_not_begun_by_the_one_who_waited_for_the_others_parking(self, racing: Pair) -> None:
        given = waiting()
        async with racing.first.connection() as db, db.transaction():
            await parks(racing.first, db, given)
            begins = racing.second.effects.begin(CONSUMER, given.envelope.id, "o-1", lease_s=600)
            begun = await racing.comes(begins)
        assert await begun == PARKED

    async def test_is_not_written_by_the_first_while_the_second_begins_it(self, racing: Pair) -> None:
        """Its lease was over; it comes a moment too late."""
        given = waiting()
        late = await racing.first.effects.begin(CONSUMER, given.envelope.id, "o-1", lease_s=0)
        async with racing.second.connection() as db, db.transaction():
            call = (CONSUMER, given.envelope.id, "o-1", 600.0, None, None)
            ((state, started, token),) = await db.fetch(racing.second.effects._begin, *call)
            assert (state, started) == (0, True)
            writing = await racing.comes(racing.first.effects.commit(late.token, effect_of(given)))
        assert await writing == Outcome(Verdict.STARTED)
        assert (await racing.second.effects.commit(token, effect_of(given))).verdict is Verdict.COMMITTED
        assert await version(racing.first, "s") == 1


class TestAHeadThatTwoWorkersHave:
    @ENDS
    async def test_is_handled_by_whose_turn_it_is(self, pair: Pair, ends: str) -> None:
        await queue_of(pair.first, behind=1)
        slow = await head(pair.second, lease_s=0)
        quick = await head(pair.first)
        async with pair.held(ends) as tx:
            assert (await pair.first.parking.commit(quick, effect_of(quick), tx=tx)).verdict is Verdict.COMMITTED
            late = await pair.comes(pair.second.parking.commit(slow, effect_of(slow)))
        assert (await late).verdict is (Verdict.DUPLICATE if ends == "commit" else Verdict.PARKED)
        assert await version(pair.first, "s") == (1 if ends == "commit" else 0)

    async def test_is_the_next_one_for_whoever_seizes_while_it_is_handled(self, pair: Pair) -> None:
        _, behind = await queue_of(pair.first, behind=1)
        parked = await head(pair.first)
        async with pair.held() as tx:
            await pair.first.parking.commit(parked, unit_of(parked), tx=tx)
            seizing = await pair.comes(pair.second.parking.seize(CONSUMER, "o-1", lease_s=600))
        seized = await seizing
        assert seized.message == behind
        assert (await pair.second.parking.commit(seized, unit_of(seized))).verdict is Verdict.COMMITTED

    async def test_is_given_to_nobody_while_it_is_being_handled(self, racing: Pair) -> None:
        """Who asks for heads waits for none of them."""
        _, behind = await queue_of(racing.first, behind=1)
        parked = await head(racing.first, lease_s=0)
        other = waiting("other")
        await racing.first.parking.park(CONSUMER, other, WHY, due_at=NOON)
        async with racing.held() as tx:
            await racing.first.parking.commit(parked, unit_of(parked), tx=tx)
            assert (await head(racing.second)).message == other
        assert (await head(racing.second)).message == behind

    @ENDS
    async def test_is_postponed_only_if_the_other_did_not_handle_it(self, pair: Pair, ends: str) -> None:
        await queue_of(pair.first, behind=1)
        parked = await head(pair.first)
        async with pair.held(ends) as tx:
            await pair.first.parking.commit(parked, unit_of(parked), tx=tx)
            postponing = await pair.comes(pair.second.parking.postpone(parked, WHY, due_at=None))
        assert await postponing is (ends == "rollback")
        (key,) = await pair.first.parking.keys()
        assert (key.due_at is None) is (ends == "rollback")


class TestAStepAndItsUndo:
    @ENDS
    async def test_the_undo_comes_while_the_step_is_handled(self, pair: Pair, ends: str) -> None:
        (step,) = await queue_of(pair.first, behind=0)
        parked = await head(pair.first)
        undoing = Unit(undo(step.envelope.id, Fence.CANCEL, key="u"), appends=(append("undone", 0),))
        async with pair.held(ends) as tx:
            await pair.first.parking.commit(parked, effect_of(parked), tx=tx)
            cancelling = await pair.comes(pair.second.parking.cancel(CONSUMER, step.envelope.id, undoing))
        outcome = await cancelling
        if ends == "commit":
            assert outcome == Outcome(Verdict.CONFLICT)
            assert await states(pair.first, step) == ["done"]
            assert (await version(pair.first, "s"), await version(pair.first, "undone")) == (1, 0)
        else:
            assert outcome.verdict is Verdict.COMMITTED
            assert await states(pair.first, step) == ["cancelled"]
            assert (await version(pair.first, "s"), await version(pair.first, "undone")) == (0, 1)

    @ENDS
    async def test_the_step_is_handled_while_its_undo_comes(self, pair: Pair, ends: str) -> None:
        step, _ = await queue_of(pair.first, behind=1)
        parked = await head(pair.first)
        undoing = Unit(undo(step.envelope.id, Fence.CANCEL, key="u"), appends=(append("undone", 0),))
        async with pair.held(ends) as tx:
            outcome = await pair.first.parking.cancel(CONSUMER, step.envelope.id, undoing, tx=tx)
            assert outcome.verdict is Verdict.COMMITTED
            handling = await pair.comes(pair.second.parking.commit(parked, effect_of(parked)))
        outcome = await handling
        if ends == "commit":
            assert outcome == Outcome(Verdict.CANCELLED)
            assert (await version(pair.first, "s"), await version(pair.first, "undone")) == (0, 1)
        else:
            assert outcome.verdict is Verdict.COMMITTED
            assert (await version(pair.first, "s"), await version(pair.first, "undone")) == (1, 0)
        assert len(await ids(pair.first)) == 1

    async def test_two_undoes_of_one_parked_step_and_one_takes_it_out(self, pair: Pair) -> None:
        (step,) = await queue_of(pair.first, behind=0)
        undoes = [Unit(undo(step.envelope.id, Fence.CANCEL, key=key)) for key in "uv"]
        async with pair.held() as tx:
            outcome = await pair.first.parking.cancel(CONSUMER, step.envelope.id, undoes[0], tx=tx)
            assert outcome.verdict is Verdict.COMMITTED
            second = await pair.comes(pair.second.parking.cancel(CONSUMER, step.envelope.id, undoes[1]))
        assert await second == Outcome(Verdict.CONFLICT)
        assert await commit(pair.second, undoes[1]) == ["ok"]  # as it is asked to try again: the step is cancelled


async def parks(store: Any, db: Any, given: Waiting) -> None:
    """`Parking.park` within the transaction of `db`."""
    columns, why = queued.columns(given), queued.failure_document(WHY)
    await db.fetch(store.parking._park, CONSUMER, given.envelope.id, given.envelope.key, NOON, False, *columns, why)


# --- all at once -----------------------------------------------------------------------------------------------------

KEYS, MESSAGES = "abc", 12


@dataclass
class Owner:
    """Takes each key's messages in order, as whoever owns the partition does. Some fail, and are parked."""

    store: Store
    rnd: random.Random

    async def run(self, key: str, messages: list[Waiting]) -> None:
        for given in messages:
            if self.rnd.random() < 0.3:
                standing = await self.store.parking.park(CONSUMER, given, WHY, due_at=NOON)
                assert standing.state in (ClaimState.PARKED, ClaimState.DONE)
                continue
            while not await self._handled(given):
                pass

    async def _handled(self, given: Waiting) -> bool:
        outcome = (await self.store.commit([told(given)]))[0]
        if outcome.verdict is not Verdict.PARKED:
            assert outcome.verdict in (Verdict.COMMITTED, Verdict.DUPLICATE)
            return True
        (standing,) = await self.store.parking.follow(CONSUMER, [given])
        assert standing.state in (ClaimState.PARKED, ClaimState.NEW, ClaimState.DONE)
        return standing.state is not ClaimState.NEW


def told(given: Waiting) -> Unit:
    """Writes down that it was handled."""
    of = given.envelope
    return Unit(claim(of.id, of.key), appends=(append(of.key, ANY, event(of.key, data=of.id.bytes)),))


async def drain(store: Store, rnd: random.Random, ended: asyncio.Event) -> None:
    while True:
        last = ended.is_set()
        turns = await store.parking.due(consumers=[CONSUMER], limit=2, lease_s=rnd.choice([0, 0, 60]))
        for turn in turns:
            if rnd.random() < 0.2:
                await store.parking.postpone(turn, WHY, due_at=NOON)
                continue
            outcome = await store.parking.commit(turn, told(turn.message))
            assert outcome.verdict in (Verdict.COMMITTED, Verdict.DUPLICATE, Verdict.PARKED)
        if last and not turns and await store.parking.keys() == []:
            return
        if last and not turns:
            for key in await store.parking.keys():  # in the hands of nobody who is left
                await store.parking.wake(CONSUMER, key.key)
        await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(3))
async def test_each_is_handled_once_and_in_order_whoever_parks_and_drains(store: Store, twin: Store, seed: int) -> None:
    """Two owners of the same messages, as around a rebalance, and two workers at the queues."""
    messages = {key: [waiting(key, offset=nth) for nth in range(MESSAGES)] for key in KEYS}
    ended = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        drains = [
            group.create_task(drain(at, random.Random(seed * 7 + n), ended)) for n, at in enumerate((store, twin))
        ]
        owners: list[Awaitable[None]] = [
            Owner(at, random.Random(seed * 100 + n)).run(key, messages[key])
            for n, (at, key) in enumerate((at, key) for at in (store, twin) for key in KEYS)
        ]
        await asyncio.gather(*owners)
        ended.set()
        await asyncio.gather(*drains)
    for key in KEYS:
        (found,) = await store.load([wanted(key)])
        assert [record.data for record in found.records] == [one.envelope.id.bytes for one in messages[key]]
    assert await states(store, *(one for of in messages.values() for one in of)) == ["done"] * MESSAGES * len(KEYS)
