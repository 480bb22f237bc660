"""Damage of every kind is planted by SQL, and `verify` must name it; a healthy store has none, whoever writes to it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from typing import Any

import asyncpg
import pytest

from eventstore.port import ANY, Unit
from eventstore.verify import CHECKS, DOCUMENTS, Damage, verify
from tests.eventstore.moving import Place, live
from tests.eventstore.stores import append, claim, reply
from tests.eventstore.test_export import filled, place

__all__ = ["place"]


async def examine(place: Place, *, documents: bool = True) -> list[Damage]:
    async with place.source(online=True) as source:
        return await verify(source, documents=documents)


async def plant(place: Place, statements: Sequence[str]) -> None:
    """Written for PostgreSQL's names; SQLite's have a prefix, and an event's stream there is a number."""
    if place.name == "sqlite":
        connection = sqlite3.connect(place.where)
        connection.executescript(";".join(statements))
        connection.close()
    else:
        db: Any = await asyncpg.connect(place.where)
        await db.execute("set search_path to foldbus_shop")
        for statement in statements:
            await db.execute(statement)
        await db.close()


STREAM = {
    "sqlite": "stream=(SELECT number FROM foldbus_streams WHERE category='order' AND id='o-1')",
    "postgres": "category='order' and stream='o-1'",
}
COPY = {
    "sqlite": "INSERT INTO foldbus_archived SELECT position+{by}, stream, version, id, type, key, topic, data, time, "
    "meta FROM foldbus_events WHERE {which}",
    "postgres": "insert into archived select position+{by}, category, stream, version, id, type, key, topic, made_at, "
    "data, meta from events where {which}",
}

DAMAGES: dict[str, dict[str, Any]] = {
    "a lost event": {
        "check": "versions have no holes",
        "both": ["delete from {p}events where {o1} and version=2"],
    },
    "a lost first event": {
        "check": "versions begin where they should",
        "both": ["delete from {p}events where {o1} and version=1"],
    },
    "a lost last event": {
        "check": "a stream's row has its highest version",
        "both": ["delete from {p}events where {o1} and version=3"],
    },
    "a row that ran ahead": {
        "check": "a stream's row has its highest version",
        "both": ["update {p}streams set version=9 where category='order' and id='o-1'"],
    },
    "a stream of no events": {
        "check": "a stream's row has its highest version",
        "sqlite": ["INSERT INTO foldbus_streams (number, category, id, version) VALUES (-9, 'order', 'ghost', 2)"],
        "postgres": ["insert into streams (category, id, version, previous) values ('order', 'ghost', 2, 2)"],
    },
    "a lost row": {
        "check": "every event's stream has a row",
        "both": ["delete from {p}streams where category='order' and id='o-1'"],
    },
    "half an archived stream": {
        "check": "archived streams are archived whole",
        "both": [
            "update {p}streams set version=-3, archived_at={now} where category='order' and id='o-1'",
            "{copy:0:version<3}",
            "delete from {p}events where {o1} and version<3",
        ],
    },
    "an archived row without its time": {
        "check": "archived streams are archived whole",
        "both": ["update {p}streams set version=-3 where category='order' and id='o-1'"],
    },
    "an event that is archived and in the log": {
        "check": "positions are unique",
        "both": ["{copy:0:version=1}"],
    },
    "a position from nowhere": {
        "check": "positions are below the head",
        "both": ["update {p}events set position=position+1000 where {o1} and version=3"],
    },
    "a stream turned round": {
        "check": "positions rise with versions",
        "both": [
            "update {p}events set version=99 where {o1} and version=1",
            "update {p}events set version=1 where {o1} and version=3",
            "update {p}events set version=3 where {o1} and version=99",
        ],
    },
    "a snapshot ahead of its stream": {
        "check": "snapshots are of what is there",
        "both": ["update {p}snapshots set version=77"],
    },
    "a snapshot below what was truncated": {
        "check": "snapshots are of what is there",
        "both": ["update {p}snapshots set truncated_upto=3"],
    },
    "a reply without its claim": {
        "check": "replies are consistent",
        "postgres": ["delete from claims where message_id in (select message_id from replies limit 1)"],
    },
    "half a reply": {
        "check": "claims are consistent",
        "sqlite": ["UPDATE foldbus_claims SET reply_data=NULL WHERE reply IS NOT NULL"],
    },
    "a claim in no state": {
        "check": "claims are consistent",
        "sqlite": ["UPDATE foldbus_claims SET state='half'"],
        "postgres": ["update claims set state=9"],
    },
    "a claim with an effect that it had not": {
        "check": "claims are consistent",
        "sqlite": ["UPDATE foldbus_claims SET outcome='refused' WHERE outcome='ok'"],
        "postgres": ["update claims set effect=false where state=1"],
    },
    "a reply from the future": {
        "check": "replies are consistent",
        "sqlite": ["UPDATE foldbus_claims SET reply=json_set(reply, '$.token[3]', 5000) WHERE reply IS NOT NULL"],
        "postgres": ["update replies set last_event=5000"],
    },
    "a letter that is open although it was settled": {
        "check": "dead letters are open or settled",
        "both": [
            "insert into {p}dead_letters (consumer, id, failed_at, key, value, {details}) "
            "select consumer, id, failed_at, key, value, {details} from {p}settled_letters where number=2"
        ],
    },
    "a letter settled in no way": {
        "check": "dead letters are open or settled",
        "both": ["update {p}settled_letters set settled_as='half' where number=2"],
    },
    "a settled letter's document that is none": {
        "check": DOCUMENTS,
        "both": ["update {p}settled_letters set {details}='{{'"],
    },
    "a parked message whose claim was done": {
        "check": "parked messages and their claims belong together",
        "sqlite": ["UPDATE foldbus_claims SET state='done' WHERE state='parked'"],
        "postgres": ["update claims set state=1, effect=true where state=4"],
    },
    "a parked message without a claim": {
        "check": "parked messages and their claims belong together",
        "sqlite": ["DELETE FROM foldbus_claims WHERE state='parked'"],
        "postgres": ["delete from claims where state=4"],
    },
    "a parked claim in no queue": {
        "check": "parked messages and their claims belong together",
        "both": ["delete from {p}parked where number=3"],
    },
    "a queue without its key": {
        "check": "parked keys and their queues belong together",
        "both": ["delete from {p}parked_keys where key='held'"],
    },
    "a key without its queue": {
        "check": "parked keys and their queues belong together",
        "both": ["delete from {p}parked where consumer='else'"],
    },
    "a key that never comes up": {
        "check": "parked keys and their queues belong together",
        "sqlite": ["UPDATE foldbus_parked_keys SET shown_at=NULL"],
        "postgres": ["update parked_keys set show_at=null"],
    },
    "an effect that nobody began": {
        "check": "effects and their claims belong together",
        "both": ["delete from {p}effects"],
    },
    "an effect of what is done": {
        "check": "effects and their claims belong together",
        "sqlite": [
            "INSERT INTO foldbus_effects SELECT consumer, message_id, 1, 0 FROM foldbus_claims WHERE state='done'"
        ],
        "postgres": ["insert into effects select consumer, message_id, 1, now() from claims where state=1 limit 1"],
    },
    "a parked message that is none": {
        "check": DOCUMENTS,
        "sqlite": ["UPDATE foldbus_parked SET envelope='{' WHERE number=1"],
        "postgres": ["update parked set document='{' where number=1"],
    },
    "a relay ahead of the log": {
        "check": "checkpoints are not ahead",
        "both": ["update {p}leases set position=5000"],
    },
    "an offset below nothing": {
        "check": "watermarks are offsets",
        "sqlite": ["UPDATE foldbus_watermarks SET next_offset=-3"],
        "postgres": ['update watermarks set "offset"=-3'],
    },
    "an epoch below the first": {
        "check": "the epoch is sane",
        "both": ["update {p}log set epoch=-1"],
    },
    "an event of an epoch to come": {
        "check": DOCUMENTS,
        "sqlite": ["UPDATE foldbus_events SET meta=json_set(meta, '$.epoch', 7) WHERE position=1"],
        "postgres": ["""update events set meta=replace(meta, '"source"', '"epoch":7,"source"') where position=1"""],
    },
    "a reply that is none": {
        "check": DOCUMENTS,
        "sqlite": ["UPDATE foldbus_claims SET reply='{', outcome=NULL WHERE reply IS NOT NULL"],
        "postgres": ["update replies set document='{'"],
    },
    "a document that is none": {
        "check": DOCUMENTS,
        "both": ["update {p}dead_letters set {details}='{{'"],
    },
}


def statements(damage: dict[str, Any], name: str) -> list[str]:
    found: list[str] = []
    for text in damage.get(name) or damage["both"]:
        if text.startswith("{copy:"):
            _, by, which = text.strip("{}").split(":")
            found.append(COPY[name].format(by=by, which=f"{STREAM[name]} AND {which}"))
            continue
        found.append(
            text.format(
                p="foldbus_" if name == "sqlite" else "",
                o1=STREAM[name],
                now="1" if name == "sqlite" else "now()",
                details="details" if name == "sqlite" else "document",
            )
            if damage.get("both")
            else text
        )
    return found


@pytest.mark.parametrize("what", DAMAGES)
async def test_damage_is_found_and_named(place: Place, what: str) -> None:
    damage = DAMAGES[what]
    await filled(place)
    assert await examine(place) == []
    if place.name not in damage and "both" not in damage:
        return  # this database cannot hold it: a reply is part of its claim's row, or the other way round
    await plant(place, statements(damage, place.name))
    found = await examine(place)
    named = {one.check: one for one in found}
    assert damage["check"] in named, found
    assert named[damage["check"]].count >= 1
    assert all(named[damage["check"]].found)


def test_every_check_has_a_damage_that_it_finds() -> None:
    assert {damage["check"] for damage in DAMAGES.values()} == {*CHECKS, DOCUMENTS}


async def test_documents_are_read_only_when_asked_for(place: Place) -> None:
    await filled(place)
    await plant(place, statements(DAMAGES["a document that is none"], place.name))
    assert await examine(place, documents=False) == []


async def test_a_healthy_store_gives_no_alarm_while_writers_are_at_work(place: Place) -> None:
    await filled(place)
    ended = asyncio.Event()

    async def write(nth: int) -> int:
        written = 0
        async with place.store() as store:
            while not ended.is_set():
                name = f"w-{nth}-{written % 7}"
                await store.commit([Unit(claim=claim(key=name, reply=reply()), appends=(append(name, ANY, 3),))])
                written += 1
                if written % 5 == 0:
                    async with store.leases.lead(f"relay-{nth}") as leading:
                        head = await store.head()
                        await store.leases.mark(leading.lease, old=leading.lease.position, new=head)
        return written

    writers = [asyncio.create_task(write(nth)) for nth in range(3)]
    alarms = [await examine(place) for _ in range(8)]
    ended.set()
    written = await asyncio.gather(*writers)
    assert alarms == [[]] * 8
    assert min(written) > 0


async def test_no_more_than_a_handful_of_damages_is_described_and_all_are_counted(place: Place) -> None:
    await place.migrate()
    async with place.store() as store:
        await live(store, streams=60)
    await plant(place, ["update {p}streams set version=99".format(p="foldbus_" if place.name == "sqlite" else "")])
    (found,) = [one for one in await examine(place) if one.check == "a stream's row has its highest version"]
    assert (found.count, len(found.found)) == (62, 20)
