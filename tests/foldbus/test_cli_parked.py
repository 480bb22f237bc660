"""`foldbus parked list|show|retry|discard` as it is typed, on the embedded pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from bus.envelope import ReplyOutcome, ReplyTo
from eventstore.parking import Parked, ParkedKey
from foldbus import Connection, WorkerSettings
from foldbus.parking import ParkSettings
from tests.eventstore.stores import whole_log
from tests.foldbus.desk import Desk, until
from tests.stories.pairs import QUICK

PATIENT = replace(QUICK, parking=ParkSettings(base_s=600.0, max_s=600.0, total_s=3600.0))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    return Desk("desk", f"sqlite:{tmp_path}/store", f"embedded:{tmp_path}/bus")


def do(desk: Desk, work: Any, settings: WorkerSettings = PATIENT) -> Any:
    import asyncio

    async def run() -> Any:
        async with desk.service.connect(store=desk.store, bus=desk.bus, worker=True, settings=settings) as connection:
            return await work(connection)

    return asyncio.run(run())


async def waiting(connection: Connection, n: int) -> Sequence[ParkedKey]:
    async def there() -> bool:
        return sum(one.waiting for one in await connection.store.parking.keys()) == n

    await until(there)
    return await connection.store.parking.keys()


def poison(desk: Desk, *names: str, behind: int = 1) -> dict[str, list[str]]:
    """Keys whose heads cannot be handled, each with messages behind it; answers the ids of each queue."""

    async def bad(connection: Connection) -> dict[str, list[str]]:
        to = ReplyTo("front.inbox", "front-1", "i-7")
        for name in names:
            for number in (666, *range(behind)):
                command = desk.module.Open(ticket_id=name, number=number)
                envelope = replace(connection.envelope(command, topic="desk.commands"), reply_to=to)
                await connection.publisher.publish(envelope)
        found = await waiting(connection, len(names) * (1 + behind))
        return {
            one.key: [str(each.message.envelope.id) for each in await connection.store.parking.queue("desk", one.key)]
            for one in found
        }

    found: dict[str, list[str]] = do(desk, bad)
    return found


def opened(desk: Desk) -> list[tuple[str, int]]:
    """Tickets that were opened, with their numbers, in the order of the log."""

    async def read(connection: Connection) -> list[tuple[str, int]]:
        log = await whole_log(connection.store, outgoing=False)
        events = [connection.service.codec.decode(one) for one in log if one.type == "desk.opened.v1"]
        return [(event.key, event.number) for event in events]  # type: ignore[attr-defined]

    return desk.do(read, worker=False)


def until_free(desk: Desk) -> None:
    async def wait(connection: Connection) -> None:
        await waiting(connection, 0)

    desk.do(wait)


def listed(desk: Desk, *args: str) -> list[Any]:
    found: list[Any] = desk.cli("parked list", "--json", *args).data["parked"]
    return found


class TestList:
    def test_shows_each_key_with_its_head_and_who_waits(self, desk: Desk) -> None:
        ids = poison(desk, "a", "b")
        found = desk.cli("parked list", "--json")
        assert (found.code, found.data["more"]) == (0, False)
        assert [(one["consumer"], one["key"], one["waiting"], one["held"]) for one in found.data["parked"]] == [
            ("desk", "a", 2, False),
            ("desk", "b", 2, False),
        ]
        head = found.data["parked"][0]["head"]
        assert (head["id"], head["type"], head["error"], head["attempts"]) == (
            ids["a"][0],
            "desk.open.v1",
            "ValueError",
            3,
        )
        assert "beast" in desk.cli("parked list").out
        assert listed(desk, "--error", "Key*") == listed(desk, "--type", "desk.close.*") == listed(desk, "--held") == []
        assert len(listed(desk, "--error", "Value*", "--consumer", "desk")) == 2
        more = desk.cli("parked list", "--limit", "1", "--json").data
        assert (len(more["parked"]), more["more"]) == (1, True)
        assert desk.cli("lag", "--json").data["parked"]["desk"]["keys"] == 2
        assert "2 keys, 0 held; 4 messages wait" in desk.cli("lag").out

    def test_of_nothing_is_nothing(self, desk: Desk) -> None:
        desk.open(1)
        found = desk.cli("parked list")
        assert (found.code, found.out) == (0, "")


class TestShow:
    def test_tells_why_and_who_waits_behind_it(self, desk: Desk) -> None:
        ids = poison(desk, "a", behind=2)
        shown = desk.cli("parked show", "a")
        assert shown.code == 0
        assert "the number of the beast" in shown.out
        assert "Traceback" in shown.out
        assert [line.split()[-1] for line in shown.out.splitlines() if line.startswith("behind it")] == ids["a"][1:]
        (key,) = desk.cli("parked show", "a", "--json").data["keys"]
        assert [one["id"] for one in key["queue"]] == ids["a"]
        assert key["queue"][0]["topic"] == "desk.commands"
        assert key["queue"][0]["value"] == '{"ticket_id":"a","number":666}'

    def test_of_a_key_that_is_not_parked_says_so(self, desk: Desk) -> None:
        desk.open(1)
        shown = desk.cli("parked show", "a")
        assert (shown.code, "not parked" in shown.err) == (1, True)


class TestRetry:
    def test_without_yes_tells_which_and_changes_nothing(self, desk: Desk) -> None:
        poison(desk, "a")
        before = listed(desk)
        told = desk.cli("parked retry", "a")
        assert (told.code, "would retry" in told.out, "--yes" in told.err) == (0, True, True)
        assert listed(desk) == before

    def test_with_yes_is_tried_by_the_next_worker(self, desk: Desk) -> None:
        poison(desk, "a", "b")
        done = desk.cli("parked retry", "a", "--yes", "--json")
        assert (done.code, [one["what"] for one in done.data["keys"]]) == (0, ["woken"])

        async def tried(connection: Connection) -> None:
            async def there() -> bool:
                keys = await connection.store.parking.keys()
                return [one.head.failure and one.head.failure.attempts for one in keys] == [4, 3]

            await until(there)

        do(desk, tried)

    def test_wants_keys_or_filters_or_everything(self, desk: Desk) -> None:
        poison(desk, "a", "b")
        for args in ((), ("a", "--everything")):
            refused = desk.cli("parked retry", *args, "--yes")
            assert (refused.code, "--everything" in refused.err) == (2, True)
        done = desk.cli("parked retry", "--everything", "--yes", "--per-second", "1000", "--json")
        assert [one["key"] for one in done.data["keys"]] == ["a", "b"]
        gone = desk.cli("parked retry", "a", "nobody", "--yes", "--json")
        assert gone.code == 1
        assert [(one["key"], one["what"]) for one in gone.data["keys"]] == [("a", "woken"), ("nobody", "gone")]


class TestDiscard:
    def test_makes_a_dead_letter_answers_died_and_the_next_one_goes_on(self, desk: Desk) -> None:
        ids = poison(desk, "a")
        dry = desk.cli("parked discard", "a", "--reason", "a test")
        assert (dry.code, "would discard" in dry.out) == (0, True)
        done = desk.cli("parked discard", "a", "--reason", "a test", "--yes", "--json")
        assert (done.code, done.data["keys"][0]["what"]) == (0, "discarded")
        (letter,) = desk.cli("dlq list", "--json").data["dead_letters"]
        assert (letter["id"], letter["error"], letter["topic"]) == (ids["a"][0], "ValueError", "desk.commands")
        assert "the number of the beast; discarded by" in letter["message"]
        assert letter["message"].endswith("a test")
        until_free(desk)
        assert opened(desk) == [("a", 0)]

        async def replies(connection: Connection) -> list[tuple[str, ReplyOutcome | None]]:
            log = await whole_log(connection.store)
            asked = [one for one in log if one.topic == "front.inbox"]  # the saga's own are not
            return [(str(one.causation_id), one.outcome) for one in asked]

        assert desk.do(replies, worker=False) == [(ids["a"][0], ReplyOutcome.DIED), (ids["a"][1], ReplyOutcome.OK)]

    def test_with_another_value_replaces_it_in_its_place(self, desk: Desk) -> None:
        ids = poison(desk, "a", behind=2)
        dry = desk.cli("parked discard", "a", "--reason", "mended", "--set", "number=7", "--json")
        assert dry.data["keys"][0]["what"] == "would replace"
        done = desk.cli("parked discard", "a", "--reason", "mended", "--set", "number=5", "--yes", "--json")
        assert (done.code, done.data["keys"][0]["what"]) == (0, "replaced")
        (key,) = desk.cli("parked show", "a", "--json").data["keys"]
        new = key["queue"][0]
        assert [one["id"] for one in key["queue"]] == [new["id"], *ids["a"][1:]]
        assert (new["id"] in ids["a"], new["attempts"], new["value"]) == (False, 0, '{"ticket_id":"a","number":5}')
        headers = {one["name"]: one["value"] for one in new["headers"]}
        assert (headers["ce_id"], headers["ce_causationid"]) == (new["id"], ids["a"][0])
        until_free(desk)
        assert opened(desk) == [("a", 5), ("a", 0), ("a", 1)]
        (letter,) = desk.cli("dlq list", "--all", "--json").data["dead_letters"]
        assert (letter["id"], letter["settled"]["how"]) == (ids["a"][0], "replaced")
        assert new["id"] in letter["settled"]["reason"]

    def test_by_a_payload_that_cannot_be_changes_nothing(self, desk: Desk) -> None:
        poison(desk, "a", "b")
        before = listed(desk)
        for args, why in (
            (("a", "--set", "number=many"), "is no desk.open.v1"),
            (("a", "--set", "ticket_id=z", "--set", "number=1"), "of key 'z'"),
            (("--everything", "--set", "number=1"), "found 2"),
            (("a", "--reason", " "), "--reason is empty"),
        ):
            reason = () if "--reason" in args else ("--reason", "x")
            refused = desk.cli("parked discard", *args, *reason, "--yes")
            assert (refused.code, why in refused.err) == (2, True), refused
        assert listed(desk) == before

    def test_of_a_sagas_step_is_answered_died_but_not_replaced_unless_asked(self, desk: Desk) -> None:
        async def bad(connection: Connection) -> None:
            step = connection.envelope(desk.module.Open(ticket_id="a", number=666), topic="desk.commands")
            to = ReplyTo("desk.replies", str(UUID(int=7)), "tidy")
            await connection.publisher.publish(replace(step, reply_to=to))
            await waiting(connection, 1)

        do(desk, bad)
        edit = ("--set", "number=1", "--reason", "mended")
        dry = desk.cli("parked discard", "a", *edit, "--json")
        assert (dry.code, dry.data["keys"][0]["what"]) == (1, "would refuse")
        refused = desk.cli("parked discard", "a", *edit, "--yes", "--json")
        assert (refused.code, refused.data["keys"][0]["what"]) == (1, "refused")
        assert "a step of saga tidy" in refused.data["keys"][0]["why"]
        done = desk.cli("parked discard", "a", *edit, "--sagas-too", "--yes", "--json")
        assert (done.code, done.data["keys"][0]["what"]) == (0, "replaced")

    def test_of_another_head_than_the_one_seen_does_nothing(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        from bus.seams import SystemClock, Uuid7Ids
        from foldbus.parked import ParkedBecame, ParkedKeys

        ids = poison(desk, "a", behind=2)

        async def late(connection: Connection) -> Sequence[ParkedBecame]:
            keys = ParkedKeys(
                desk.service, connection.store, clock=SystemClock(), ids=Uuid7Ids(), metrics=connection.metrics
            )
            (seen,) = await connection.store.parking.keys()
            results = [await keys.discard(seen, "x"), await keys.discard(seen, "x")]
            (other,) = await connection.store.parking.due(consumers=["desk"], limit=10, lease_s=0.0)
            assert other.number > seen.head.number  # nobody took its turn

            async def stale(*_: Any, **options: Any) -> Sequence[Parked]:
                return [seen.head]

            monkeypatch.setattr(connection.store.parking, "queue", stale)  # it left between the look and the grip
            return [one.became for one in (*results, await keys.discard(seen, "x"))]

        assert desk.do(late, worker=False) == [ParkedBecame.DISCARDED, ParkedBecame.GONE, ParkedBecame.GONE]
        assert [one["id"] for one in desk.cli("dlq list", "--json").data["dead_letters"]] == ids["a"][:1]
