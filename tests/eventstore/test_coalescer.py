"""Calls of several callers in one flush: each is answered as if it had come alone, in the order of arrival.

Nothing here is left to luck: `gathering` holds every flusher at a lock of another process, so that whatever is asked
meanwhile queues and is flushed together when the block ends.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from bus.metrics import MemoryMetrics
from eventstore.errors import BadUnit, EventStoreError, StoreUnavailable
from eventstore.port import ANY, Outcome, Unit, Verdict, Watermark
from eventstore.sqlite import SqliteStore
from tests.eventstore.comparing import by_rank, random_units, ranks
from tests.eventstore.locks import blocked
from tests.eventstore.stores import (
    IDS,
    SERVICE,
    Backend,
    append,
    claim,
    commit,
    event,
    message,
    one,
    postgres_backend,
    reply,
    stream,
    verdicts,
    version,
    wanted,
    whole_log,
)

Ask = Callable[..., asyncio.Task[Sequence[Outcome]]]


@dataclass
class Subject:
    """A store that can be held up from outside."""

    backend: Backend
    store: Any
    twin: Any
    metrics: MemoryMetrics

    @property
    def flushers(self) -> int:
        return 2 if self.backend.name == "postgres" else 1

    @asynccontextmanager
    async def gathering(self) -> AsyncIterator[Ask]:
        """Gives a function that begins a call, which queues. When the block ends, the queue is flushed."""
        async with self.twin.transaction() as tx:
            names = [f"held-{IDS.new()}" for _ in range(self.flushers)]
            await self.twin.commit([Unit(appends=(append(name, 0),)) for name in names], tx=tx)
            holding = [asyncio.create_task(commit(self.store, Unit(appends=(append(name, ANY),)))) for name in names]
            await self.held()

            def ask(units: Sequence[Unit], **options: Any) -> asyncio.Task[Sequence[Outcome]]:
                return asyncio.create_task(self.store.commit(units, **options))

            yield ask
            await asyncio.sleep(0)  # every call begun by now has queued
        assert await asyncio.gather(*holding) == [["ok"]] * self.flushers

    async def held(self) -> None:
        if self.backend.name == "postgres":
            await blocked(self.backend.where, self.flushers)
        else:
            before = self.metrics.total("foldbus_store_busy_retries_total")
            async with asyncio.timeout(30):
                while self.metrics.total("foldbus_store_busy_retries_total") <= before:  # noqa: ASYNC110 - polled
                    await asyncio.sleep(0.001)

    def lose_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on the database does what it is asked, and the connection breaks before it can say so."""
        if self.backend.name == "postgres":
            call = self.store._call

            async def lost(*arguments: Any) -> Any:
                await call(*arguments)
                raise ConnectionResetError("reset by peer")

            monkeypatch.setattr(self.store, "_call", lost)
        else:
            transact = self.store.database._transact

            def lost_in_the_thread(works: Any) -> Any:
                answers = transact(works)
                if len(works) == 1:  # the one that holds the queue up
                    return answers
                raise StoreUnavailable("a fault of the disk")

            monkeypatch.setattr(self.store.database, "_transact", lost_in_the_thread)

    @property
    def together(self) -> int:
        """Calls that shared a flush so far."""
        return self.metrics.total("foldbus_store_batched_calls_total")


@pytest_asyncio.fixture
async def subject(backend: Backend) -> AsyncIterator[Subject]:
    metrics = MemoryMetrics()
    # A flusher that waits does not lend its place: what queues stays in the queue.
    async with backend.open(metrics=metrics, **few(backend)) as store, backend.open() as twin:
        yield Subject(backend, store, twin, metrics)


def few(backend: Backend) -> dict[str, Any]:
    return {"patience_s": 60} if backend.name == "postgres" else {}


def created(name: str, **options: Any) -> Unit:
    return Unit(claim=claim(key=name, **options), appends=(append(name, 0),))


# --- each as if alone ------------------------------------------------------------------------------------------------


async def test_calls_made_during_a_flush_share_the_next_one_and_each_gets_its_own_answer(subject: Subject) -> None:
    async with subject.gathering() as ask:
        calls = [ask([created(f"s-{n}-{i}") for i in range(1 + n % 3)]) for n in range(10)]
    answers = await asyncio.gather(*calls)
    assert subject.together == 10
    positions = [outcome.position for outcomes in answers for outcome in outcomes]
    assert positions == sorted(positions), "in the order of arrival"
    for n, outcomes in enumerate(answers):
        assert [dict(outcome.versions) for outcome in outcomes] == [{stream(f"s-{n}-{i}"): 1} for i in range(1 + n % 3)]
    log = {record.position: record.stream for record in await whole_log(subject.store)}
    assert all(log[outcome.position] in outcome.versions for outcomes in answers for outcome in outcomes)


async def test_callers_after_one_another_share_nothing(subject: Subject) -> None:
    for n in range(5):
        assert await commit(subject.store, created(f"s-{n}")) == ["ok"]
    assert subject.metrics.total("foldbus_store_batches_total") == 0


async def test_versions_chain_from_one_caller_to_the_next_in_a_flush(subject: Subject) -> None:
    async with subject.gathering() as ask:
        calls = [ask([Unit(appends=(append("a", n, 2),))]) for n in (0, 2, 4)]
    answers = await asyncio.gather(*calls)
    assert subject.together == 3
    assert [dict(outcome.versions) for (outcome,) in answers] == [{stream("a"): n} for n in (2, 4, 6)]
    assert await version(subject.store, "a") == 6


async def test_of_many_callers_that_create_one_stream_in_a_flush_the_first_wins(subject: Subject) -> None:
    async with subject.gathering() as ask:
        calls = [ask([Unit(appends=(append("a", 0, 3),))]) for _ in range(8)]
        bystander = ask([created("b")])
        too_high = ask([Unit(appends=(append("c", 7, 2),))])
    answers = [outcome for (outcome,) in await asyncio.gather(*calls)]
    assert subject.together == 10
    assert verdicts(answers) == ["ok"] + ["conflict"] * 7
    assert {(lost.stream, lost.expected, lost.actual) for lost in answers[1:]} == {(stream("a"), 0, 3)}
    assert verdicts(await bystander) == ["ok"]
    ((high,),) = [await too_high]
    assert (high.verdict, high.expected, high.actual) == (Verdict.CONFLICT, 7, 0)
    names = [record.stream.id for record in await whole_log(subject.store) if record.stream is not None]
    assert [name for name in names if not name.startswith("held")] == ["a", "a", "a", "b"], "a loser stores nothing"


async def test_one_message_handled_by_two_callers_in_a_flush_has_one_effect_and_one_reply(subject: Subject) -> None:
    unit = Unit(claim=claim(reply=reply()), appends=(append("a", ANY),), outgoing=(message(),))
    async with subject.gathering() as ask:
        first, second = ask([unit]), ask([unit])
    assert verdicts([*await first, *await second]) == ["ok", "duplicate"]
    ((stored,),) = [await second]
    assert stored.reply is not None
    assert stored.reply.token is not None
    assert stored.reply.token.position == (await first)[0].position
    assert await version(subject.store, "a") == 1


async def test_an_append_repeated_by_a_second_caller_in_a_flush_answers_the_first_result(subject: Subject) -> None:
    unit = Unit(appends=(append("a", 0, 2), append("b", 0)))
    async with subject.gathering() as ask:
        first, second = ask([unit]), ask([unit])
    assert await first == await second
    assert subject.together == 2
    assert await version(subject.store, "a") == 2
    assert await version(subject.store, "bad") == 0


async def test_a_loser_takes_along_followers_in_its_own_call_and_nobody_elses(subject: Subject) -> None:
    """Callers share streams and a key: a unit that is dragged would lose without any version being wrong."""
    await commit(subject.store, Unit(appends=(append("a", 0),)))
    key = "k-1"
    async with subject.gathering() as ask:
        loses = ask(
            [
                Unit(claim=claim(key=key), appends=(append("a", 0),)),
                Unit(claim=claim(key="other"), appends=(append("a", ANY), append("b", ANY))),
                Unit(claim=claim(key=key), outgoing=(message(),)),
            ]
        )
        same_stream = ask([Unit(claim=claim(key="mine"), appends=(append("a", 1),))])
        dragged_stream = ask([Unit(claim=claim(key="too"), appends=(append("b", 0),))])
        same_key = ask([Unit(claim=claim(key=key), outgoing=(message(),))])
    assert verdicts(await loses) == ["conflict"] * 3
    assert verdicts([*await same_stream, *await dragged_stream, *await same_key]) == ["ok"] * 3
    assert subject.together == 4


async def test_watermarks_of_all_callers_in_a_flush_are_stored_whatever_their_units_came_to(subject: Subject) -> None:
    def mark(partition: int, offset: int) -> dict[str, Any]:
        return {"watermarks": [Watermark("g", "t", partition, offset)]}

    async with subject.gathering() as ask:
        calls = [
            ask([created("a")], **mark(0, 7)),
            ask([created("a")], **mark(1, 5)),  # it conflicts
            ask([], **mark(0, 9)),
            ask([created("c")], **mark(0, 8)),
        ]
    assert [verdicts(answer) for answer in await asyncio.gather(*calls)] == [["ok"], ["conflict"], [], ["ok"]]
    assert subject.together == 4
    assert await subject.store.watermarks("g") == {("t", 0): 9, ("t", 1): 5}


@pytest.mark.parametrize("seed", range(3))
async def test_random_calls_in_one_flush_are_answered_as_one_after_the_other(
    subject: Subject, tmp_path: Any, seed: int
) -> None:
    """The reference gets them one by one. Claims, fences, chains, repeats, stale and any versions, across callers."""
    rnd = random.Random(seed)
    await SqliteStore.migrate(tmp_path / "reference.sqlite", service=SERVICE)
    async with SqliteStore.open(tmp_path / "reference.sqlite", service=SERVICE) as reference:
        versions = {f"s-{n}": 0 for n in range(5)}
        ids: list[Any] = []
        earlier: list[Unit] = []
        for _ in range(12):
            at = dict(versions)
            asked = [random_units(rnd, at, ids, earlier) for _ in range(rnd.randrange(2, 7))]
            earlier += [unit for units in asked for unit in units]
            expected = [await reference.commit(units) for units in asked]
            async with subject.gathering() as ask:
                calls = [ask(units) for units in asked]
            found = await asyncio.gather(*calls)
            theirs = await whole_log(reference)
            ours = [r for r in await whole_log(subject.store) if r.stream is None or r.stream.id in versions]
            assert [(a.id, a.version) for a in theirs] == [(a.id, a.version) for a in ours]
            rank, our_rank = ranks(theirs), ranks(ours)
            for a, b in zip(expected, found, strict=True):
                assert [by_rank(one_, rank) for one_ in a] == [by_rank(one_, our_rank) for one_ in b]
                for outcome in a:
                    for name, made in outcome.versions.items():
                        versions[name.id] = max(versions[name.id], made)
    assert subject.together > 24


# --- somebody else's trouble -----------------------------------------------------------------------------------------


async def test_a_value_that_cannot_be_stored_hurts_only_its_own_caller(subject: Subject) -> None:
    """Nothing shows before the driver looks at it; the flush fails, and each call is tried alone."""
    no_bytes = event("bad", data=["no bytes"])  # type: ignore[arg-type]
    async with subject.gathering() as ask:
        before, bad, after = (
            ask([created("a", reply=reply())]),
            ask([Unit(claim=claim(key="bad"), appends=(append("bad", 0, no_bytes),))]),
            ask([created("b"), Unit(appends=(append("a", 1),))]),
        )
    assert verdicts([*await before, *await after]) == ["ok"] * 3
    with pytest.raises(BadUnit):
        await bad
    assert await version(subject.store, "a") == 2


async def test_a_bad_value_in_a_flush_makes_nobody_wait_for_a_lock_that_only_another_caller_wants(
    request: pytest.FixtureRequest,
) -> None:
    """On PostgreSQL, where locks are waited for. Whoever holds it may be waiting for one of the others."""
    backend = postgres_backend(request)
    await backend.migrate()
    metrics = MemoryMetrics()
    async with backend.open(metrics=metrics) as store, backend.open() as twin:
        async with twin.transaction() as tx:
            await twin.commit([Unit(appends=(append(name, 0),)) for name in ("held", "flusher-1", "flusher-2")], tx=tx)
            waiting = [
                asyncio.create_task(commit(store, Unit(appends=(append(name, ANY),))))
                for name in ("flusher-1", "flusher-2", "held")
            ]
            no_bytes = event("bad", data=["no bytes"])  # type: ignore[arg-type]
            bad = asyncio.create_task(store.commit([Unit(appends=(append("bad", 0, no_bytes),))]))
            free = asyncio.create_task(commit(store, Unit(appends=(append("free", 0),))))
            async with asyncio.timeout(30):
                assert await free == ["ok"]
                with pytest.raises(BadUnit):
                    await bad
            assert metrics.total("foldbus_store_batches_split_total") == 1
            assert not any(task.done() for task in waiting)
        assert await asyncio.gather(*waiting) == [["ok"]] * 3


async def test_a_caller_cancelled_while_it_queues_has_written_nothing_and_the_others_do_not_notice(
    subject: Subject,
) -> None:
    async with subject.gathering() as ask:
        calls = [ask([created(name)]) for name in "abcd"]
        await asyncio.sleep(0)
        calls[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await calls[1]
    assert [verdicts(await calls[n]) for n in (0, 2, 3)] == [["ok"]] * 3
    assert await version(subject.store, "b") == 0
    assert subject.together == 3


async def test_callers_whose_answer_is_lost_are_all_told_so_and_may_ask_again(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed = Unit(claim=claim(reply=reply()), appends=(append("a", 0),), outgoing=(message(),))
    plain = Unit(appends=(append("b", 0, 2),))
    with monkeypatch.context() as during:
        async with subject.gathering() as ask:
            calls = [ask([claimed]), ask([plain])]
            subject.lose_answers(during)
        for call in calls:
            with pytest.raises(StoreUnavailable):
                await call
    log = await whole_log(subject.store)
    again, same = await one(subject.store, claimed), await one(subject.store, plain)
    assert again.verdict is Verdict.DUPLICATE
    assert again.reply is not None
    assert (same.verdict, dict(same.versions)) == (Verdict.COMMITTED, {stream("b"): 2})
    assert same.position == max(r.position or 0 for r in log if r.stream == stream("b"))
    assert await whole_log(subject.store) == log


async def test_processes_whose_callers_share_streams_in_opposite_order_never_deadlock(subject: Subject) -> None:
    """Each unit touches several of a few hot streams; who loses loads and tries again."""
    names = [f"h-{n}" for n in range(6)]
    done = 0

    async def work(store: Any, seed: int) -> None:
        nonlocal done
        rnd = random.Random(seed)
        for _ in range(4):
            picked = rnd.sample(names, 3)
            message_claim = claim(key=picked[0])
            while True:
                slices = await store.load([wanted(name) for name in picked])
                appends = tuple(append(name, found.version) for name, found in zip(picked, slices, strict=True))
                outcome = await one(store, Unit(claim=message_claim, appends=appends))
                if outcome.verdict is Verdict.COMMITTED:
                    done += 1
                    break
                assert outcome.verdict is Verdict.CONFLICT

    async with asyncio.TaskGroup() as tasks:
        for seed in range(8):
            tasks.create_task(work(subject.store, seed))
            tasks.create_task(work(subject.twin, 100 + seed))
    assert done == 64
    assert subject.together > 0
    assert subject.metrics.total("foldbus_store_errors_total") == 0
    assert sum([await version(subject.store, name) for name in names]) == 3 * done


# --- fairness and bounds ---------------------------------------------------------------------------------------------


async def test_sixty_four_writers_of_one_stream_all_get_there_and_lose_only_to_one_another(subject: Subject) -> None:
    """A conflict is always somebody else's commit since one loaded: with 63 others that can happen 63 times."""

    async def write() -> int:
        for attempt in range(1, 1000):
            at = await version(subject.store, "hot")
            if (await one(subject.store, Unit(appends=(append("hot", at),)))).verdict is Verdict.COMMITTED:
                return attempt
        raise AssertionError("starved")

    attempts = await asyncio.gather(*(write() for _ in range(64)))
    assert max(attempts) <= 64
    assert await version(subject.store, "hot") == 64


async def test_more_calls_than_one_flush_takes_are_flushed_in_the_order_of_arrival(subject: Subject) -> None:
    async with subject.gathering() as ask:
        calls = [ask([Unit(appends=(append(f"s-{n}", 0),))]) for n in range(600)]
    answers = [outcome.position for (outcome,) in await asyncio.gather(*calls)]
    batches = subject.metrics.total("foldbus_store_batches_total")
    assert batches >= 3, "256 units at most"
    assert subject.together <= batches * 256
    # Flushers side by side may overtake each other by a flush, and no further.
    assert all(earlier < later for earlier, later in zip(answers, answers[2 * 256 :], strict=False))
    assert answers[:256] == sorted(answers[:256])


# --- the end ---------------------------------------------------------------------------------------------------------


async def test_closing_the_store_answers_whoever_was_waiting_and_refuses_whoever_comes_later(
    backend: Backend, subject: Subject
) -> None:
    opened = backend.open(metrics=subject.metrics, **few(backend))
    ending = Subject(backend, await opened.__aenter__(), subject.twin, subject.metrics)
    async with ending.gathering() as ask:
        calls = [ask([created(f"s-{n}")]) for n in range(5)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(opened.__aexit__(None, None, None))
        await asyncio.sleep(0)
        with pytest.raises(EventStoreError, match="closed"):
            await ask([created("late")])
    await closing
    assert [verdicts(outcomes) for outcomes in await asyncio.gather(*calls)] == [["ok"]] * 5
    assert [await version(subject.twin, f"s-{n}") for n in range(5)] == [1] * 5
    assert await version(subject.twin, "late") == 0
