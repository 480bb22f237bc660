"""Export and import: the same file from both databases, to the byte, whatever is broken off on the way."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bus.envelope import ReplyOutcome, ReplyTo
from eventstore.errors import SchemaMismatch
from eventstore.export import (
    SECTIONS,
    BadExport,
    Filled,
    Header,
    NotEmpty,
    StoreInUse,
    check_file,
    decode,
    encode,
    export_file,
    export_to,
    import_lines,
)
from eventstore.port import (
    ANY,
    Append,
    Fence,
    Letter,
    LetterWhere,
    Settled,
    Settlement,
    Settling,
    Unit,
    Verdict,
    Wanted,
)
from tests.eventstore.moving import Place, lines, live, postgres_place, signed, sqlite_place
from tests.eventstore.stores import IDS, NOON, SERVICE, append, claim, event, reply, stream, undo, verdicts, whole_log


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "sqlite":
        return sqlite_place(tmp_path / "one.db")
    return postgres_place(request.getfixturevalue("database"))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Place:
    return sqlite_place(tmp_path / "elsewhere.db")


async def filled(place: Place, **options: Any) -> Place:
    await place.migrate()
    async with place.store() as store:
        await live(store, **options)
    return place


async def test_a_store_goes_from_sqlite_to_postgresql_and_back_to_the_byte(tmp_path: Path, database: str) -> None:
    first = await filled(sqlite_place(tmp_path / "first.db"))
    exported = await first.export()
    there, back = postgres_place(database), sqlite_place(tmp_path / "back.db")
    await there.fill(exported)
    assert await there.export() == exported
    await back.fill(await there.export())
    assert await back.export() == exported
    counts = json.loads(exported.splitlines()[0])
    assert all(counts[section.name] for section in SECTIONS if section.name != "archived")


async def test_a_store_goes_from_postgresql_to_sqlite_and_back_to_the_byte(tmp_path: Path, database: str) -> None:
    first = await filled(postgres_place(database))
    asked = claim(key="o-1", reply=reply())
    async with first.store() as store:
        (before,) = await store.commit([Unit(claim=asked, appends=(append("o-1", ANY),))])
        log = await whole_log(store)
    exported = await first.export()
    there = sqlite_place(tmp_path / "there.db")
    await there.fill(exported)
    assert await there.export() == exported
    async with there.store() as store:
        (standing,) = await store.examine(asked.consumer, [(asked.message_id, "o-1")])
        assert standing.reply.token.position == before.position > 0  # the database kept that beside the reply
        assert await whole_log(store) == log
    connection = await asyncpg.connect(database)
    await connection.execute("drop schema foldbus_shop cascade")
    await connection.close()
    again = postgres_place(database)
    await again.fill(await there.export())
    assert await again.export() == exported


async def test_what_was_moved_answers_and_goes_on_as_the_old_store_would_have(tmp_path: Path, database: str) -> None:
    first = await filled(sqlite_place(tmp_path / "first.db"))
    asked = claim(key="o-1", reply=reply())
    async with first.store() as store:
        (before,) = await store.commit([Unit(claim=asked, appends=(append("o-1", ANY),))])
    there = postgres_place(database)
    await there.fill(await first.export())
    async with first.store() as old, there.store() as new:
        assert await whole_log(new) == await whole_log(old)
        assert new.epoch == old.epoch
        assert await new.head() == await old.head()
        assert await new.dead_letters() == await old.dead_letters()
        assert await new.watermarks("shop") == await old.watermarks("shop")
        assert await new.leases.position("relay") == 4
        assert await new.flow.paused() == await old.flow.paused()
        (again,) = await new.commit([Unit(claim=asked, appends=(append("o-1", ANY),))])
        (standing,) = await old.examine(asked.consumer, [(asked.message_id, "o-1")])
        assert (again.verdict, again.reply) == (Verdict.DUPLICATE, standing.reply)
        assert again.reply.token.position == before.position
        (grown,) = await new.commit([Unit(appends=(append("o-1", before.versions[stream("o-1")]),))])
        assert grown.verdict is Verdict.COMMITTED
        assert grown.position == await old.head() + 1
        async with new.leases.lead("relay") as leading:  # at once: nobody holds it
            assert leading.lease.token == 2


async def test_settled_letters_are_moved_and_what_is_settled_afterwards_comes_behind_them(
    place: Place, tmp_path: Path
) -> None:
    first = await filled(sqlite_place(tmp_path / "first.db"))
    await place.fill(await first.export())
    async with first.store() as old, place.store() as new:
        moved = await new.letters.page(LetterWhere(), settled=True)
        assert moved == await old.letters.page(LetterWhere(), settled=True)
        letter = (await new.letters.page(LetterWhere()))[0].letter
        settlement = Settlement(Settled.DISCARDED, NOON, "ann", "a test order")
        assert await new.letters.settle(letter, settlement) is Settling.SETTLED
        *kept, last = await new.letters.page(LetterWhere(), settled=True)
        assert kept == moved
        assert last == Letter(letter, settlement, moved[-1].number + 1)


async def test_an_export_from_before_there_were_queues_and_pauses_is_still_imported(
    place: Place, elsewhere: Place
) -> None:
    """Such a file says nothing of these sections, neither in its header nor in a line."""
    await place.migrate()
    async with place.store() as store:
        await store.commit([Unit(claim=claim(key="o-1", reply=reply()), appends=(append("o-1", 0, 3),))])
        log = await whole_log(store)
    header, *body = (await place.export()).splitlines(keepends=True)[:-1]
    later = {section.name for section in SECTIONS if section.later}
    assert not [line for line in body if json.loads(line)["is"] in later]
    said = {name: value for name, value in json.loads(header).items() if name not in {*later, "number"}}
    await elsewhere.fill(signed([json.dumps(said, separators=(",", ":")).encode() + b"\n", *body]))
    async with elsewhere.store() as store:
        assert await whole_log(store) == log
        assert await store.flow.paused() == {}


async def test_an_undo_after_the_move_finds_its_step_done(tmp_path: Path, database: str) -> None:
    first = sqlite_place(tmp_path / "first.db")
    await first.migrate()
    done, refused = IDS.new(), IDS.new()
    async with first.store() as store:
        await store.commit(
            [
                Unit(claim=claim(done, reply=reply())),
                Unit(claim=claim(refused, reply=reply(outcome=ReplyOutcome.REFUSED))),
            ]
        )
    there = postgres_place(database)
    await there.fill(await first.export())
    async with there.store() as store:
        found = await store.commit([Unit(claim=undo(done, Fence.EXPECT_DONE)), Unit(claim=undo(refused, Fence.CANCEL))])
        assert verdicts(found) == ["ok", "ok"]
        assert verdicts(await store.commit([Unit(claim=undo(done, Fence.CANCEL, key="other"))])) == ["conflict"]


# --- broken off ------------------------------------------------------------------------------------------------------


async def test_an_export_goes_on_behind_the_last_whole_line(place: Place, tmp_path: Path) -> None:
    await filled(place)
    whole = await place.export()
    file = tmp_path / "export.jsonl"
    rows: list[int] = []
    for cut in [0, 1, 100, *range(200, len(whole), 977), len(whole) - 1, len(whole)]:
        file.write_bytes(whole[:cut])
        async with place.source() as source:
            rows.append(0)
            plain = source.rows

            async def counted(section: Any, *, after: Any, plain: Any = plain) -> Any:
                async for batch in plain(section, after=after):
                    rows[-1] += len(batch)
                    yield batch

            source.rows = counted
            await export_file(source, file)
        assert file.read_bytes() == whole, f"cut at {cut}"
    assert rows[0] == rows[1] == len(whole.splitlines()) - 2
    counts = Header.parse(whole.splitlines()[0]).counts
    changing = sum(counts[section.name] for section in SECTIONS if not section.grows)
    assert rows[-1] == changing < rows[0] / 2, "what only grows was read again although it stands in the file"


async def test_an_export_is_not_gone_on_with_when_the_store_moved_on(place: Place, tmp_path: Path) -> None:
    await filled(place)
    file = tmp_path / "export.jsonl"
    file.write_bytes((await place.export())[:3000])
    async with place.store() as store:
        await store.commit([Unit(appends=(append("o-1", ANY),))])
    async with place.source() as source:
        with pytest.raises(BadExport, match="remove the file"):
            await export_file(source, file)
    assert file.stat().st_size == 3000
    (tmp_path / "letter.txt").write_text("Dear sir,\n")
    async with place.source() as source:
        with pytest.raises(BadExport, match="Dear sir"):
            await export_file(source, tmp_path / "letter.txt")
    assert (tmp_path / "letter.txt").read_text() == "Dear sir,\n"


async def test_an_import_goes_on_where_it_was_broken_off(place: Place, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("eventstore.export.BATCH_ROWS", 4)
    exported = await (await filled(sqlite_place(tmp_path / "first.db"))).export()
    tries = 0

    class Killed(Exception):
        pass

    while True:
        tries += 1
        async with place.target() as target:
            plain, written = target.write, 0

            async def write(*args: Any, plain: Any = plain) -> None:
                nonlocal written
                if written == 3:
                    raise Killed
                await plain(*args)
                written += 1

            target.write = write
            with suppress(Killed):
                await import_lines(lines(exported), target, service=SERVICE)
                break
        with pytest.raises(SchemaMismatch, match="not finished"):
            async with place.store():
                pass
    assert tries > 3
    assert await place.export() == exported


async def test_an_import_cancelled_in_the_middle_of_writing_goes_on(
    place: Place, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("eventstore.export.BATCH_ROWS", 2)
    exported = await (await filled(sqlite_place(tmp_path / "first.db"))).export()
    for steps in (1, 5, 20, 60):
        async with place.target() as target:
            running = asyncio.ensure_future(import_lines(lines(exported), target, service=SERVICE))
            for _ in range(steps):
                await asyncio.sleep(0.001)
            running.cancel()
            with suppress(asyncio.CancelledError, NotEmpty):
                await running
    with suppress(NotEmpty):  # the last one may have come to its end
        await place.fill(exported)
    assert await place.export() == exported


async def test_an_import_waits_for_the_last_commit_of_one_that_was_killed(tmp_path: Path, database: str) -> None:
    """Its server process may still be at it when the next import asks how far the first one came."""
    exported = await (await filled(sqlite_place(tmp_path / "first.db"))).export()
    header, done = Header.parse(exported.splitlines()[0]), decode(exported.splitlines()[1], 2)
    place = postgres_place(database)
    async with place.target() as killed, place.target() as again:
        assert await killed.begin(header, Filled(1, "first")) == Filled(1, "first")
        transaction = killed._db.transaction()  # around that of the rows: what is left of it is its commit
        await transaction.start()
        await killed.write(done[0], [done[1]], Filled(2, "second"))
        asked = asyncio.create_task(again.begin(header, Filled(1, "first")))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(asked), 0.3)
        await transaction.commit()
        assert await asked == Filled(2, "second")


async def test_a_broken_off_import_takes_no_other_file(place: Place, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("eventstore.export.BATCH_ROWS", 4)
    exported = await (await filled(sqlite_place(tmp_path / "first.db"))).export()
    with pytest.raises(BadExport, match="broken off"):
        await place.fill(exported[: len(exported) // 2])
    other = exported.replace(b"shop.order-placed.v1", b"shop.order-Placed.v1", 1)
    with pytest.raises(BadExport, match="not the file"):
        await place.fill(other)
    await place.fill(exported)
    assert await place.export() == exported


# --- what is refused -------------------------------------------------------------------------------------------------


async def test_a_store_that_holds_something_is_not_filled(place: Place, tmp_path: Path) -> None:
    exported = await (await filled(sqlite_place(tmp_path / "first.db"))).export()
    await place.migrate()
    async with place.store() as store:
        await store.commit([Unit(claim=claim())])
    with pytest.raises(NotEmpty, match="'claim': 1"):
        await place.fill(exported)
    async with place.store() as store:
        assert await store.head() == 0


async def test_damaged_files_are_named_for_what_they_are(elsewhere: Place, tmp_path: Path) -> None:
    exported = await (await filled(sqlite_place(tmp_path / "first.db"))).export()
    body = exported.splitlines(keepends=True)[:-1]
    file = tmp_path / "export.jsonl"
    for damaged, said in (
        (exported[:-1], "broken off"),
        (exported[:-100], "broken off"),
        (b"", "broken off"),
        (exported.replace(b"order-placed", b"order-placeD", 1), "was changed"),
        (b"".join([*body[:5], *body[6:], exported.splitlines(keepends=True)[-1]]), "was changed"),
        (exported + b"{}\n", "after the last line"),
        (b'{"foldbus":2}\n', "format 2"),
        (b"[]\n", "wanted an object"),
        (b"PGDMP\x01\n", "no JSON"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(BadExport, match=said):
            check_file(file)
    for damaged, said in (
        (signed([*body, b'{"is":"ghost"}\n']), "ghost"),
        (signed(body[:-1]), "somebody else wrote"),
        (signed([body[0].replace(b'"shop"', b'"other"'), *body[1:]]), "service 'other'"),
    ):
        Path(elsewhere.where).unlink(missing_ok=True)
        for extra in ("-wal", "-shm"):
            Path(elsewhere.where + extra).unlink(missing_ok=True)
        with pytest.raises(BadExport, match=said):
            await elsewhere.fill(damaged)


async def test_a_store_whose_worker_leads_is_not_exported_but_for_a_copy(place: Place, elsewhere: Place) -> None:
    await filled(place)
    async with place.store() as store:
        async with store.leases.lead("relay", ttl_s=30):
            with pytest.raises(StoreInUse, match="relay"):
                await place.export()
            out = BytesIO()
            async with place.source(online=True) as source:
                await export_to(source, out)
    assert out.getvalue().replace(b'"token":2', b'"token":1') == (await place.export()).replace(
        b'"token":2', b'"token":1'
    )


async def test_a_transaction_that_writes_keeps_a_postgresql_store_from_being_exported(database: str) -> None:
    place = await filled(postgres_place(database))
    async with place.store() as store:
        async with store.transaction() as tx:
            await store.commit([Unit(appends=(append("late", 0),))], tx=tx)
            with pytest.raises(StoreInUse, match="a transaction that writes"):
                await place.export()
        assert b'"late"' in await place.export()


async def test_an_export_is_of_one_moment_while_writers_go_on(place: Place, elsewhere: Place) -> None:
    await filled(place)
    out = BytesIO()
    async with place.store() as store, place.source(online=True) as source:
        header = await source.header()
        plain = source.rows

        async def meanwhile(section: Any, *, after: Any) -> Any:
            await store.commit([Unit(claim=claim(), appends=(append("o-1", ANY), append(f"new-{section.name}", 0)))])
            async for batch in plain(section, after=after):
                yield batch

        source.rows = meanwhile
        await export_to(source, out)
        assert await store.head() >= header.head + 2 * len(SECTIONS)
    await elsewhere.fill(out.getvalue())
    async with elsewhere.store() as store:
        assert [one.version for one in (await store.load([Wanted(stream("o-1")), Wanted(stream("new-event"))]))] == [
            3,
            0,
        ]


# --- any value -------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=20)
NAME = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=20)
DATA = st.one_of(
    st.binary(max_size=60), st.sampled_from([b"\x00", b'"\\', b"\xed\xa0\x80", b"x" * 300_000, "\ufeff€".encode()])
)


@given(st.lists(st.tuples(NAME, TEXT, DATA, TEXT, st.dictionaries(TEXT, TEXT, max_size=3)), min_size=1, max_size=30))
@settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.generate],  # each example migrates two stores: too slow to be made small
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_every_value_comes_through_both_databases(
    tmp_path_factory: pytest.TempPathFactory, postgres_dsn: str, found: list[Any]
) -> None:
    async def there_and_back() -> None:
        directory = tmp_path_factory.mktemp("values")
        service = f"s{IDS.new().hex}"
        first, there = sqlite_place(directory / "first.db", service), postgres_place(postgres_dsn, service)
        await first.migrate()
        async with first.store() as store:
            for name, key, data, text, headers in found:
                made = replace(event(key, data=data), tenant=text, headers=headers, reply_to=ReplyTo("t", text, key))
                answer = replace(reply(), data=data, key=text)
                (outcome,) = await store.commit(
                    [Unit(claim=claim(key=key, reply=answer), appends=(Append(stream(name), ANY, (made,)),))]
                )
                assert outcome.verdict is Verdict.COMMITTED
        exported = await first.export()
        async with there.target() as target:
            await import_lines(lines(exported), target, service=service)
        assert await there.export() == exported

    asyncio.run(there_and_back())


@pytest.fixture
def postgres_dsn(database: str) -> str:
    return database


@given(st.sampled_from(SECTIONS), st.data())
def test_a_line_reads_as_the_row_it_was_made_of(section: Any, data: st.DataObject) -> None:
    value = st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), TEXT)
    row = tuple(
        data.draw(st.one_of(st.none(), st.binary()) if name in section.blobs else value) for name in section.columns
    )
    line = encode(section, row)
    assert b"\n" not in line
    assert decode(line, 1) == (section, row)
