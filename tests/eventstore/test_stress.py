"""Sixteen writers in four processes, killed again and again, and once the database with them.

`benchmarks/store_soak.py` for a minute; `make soak` runs it for ten, with a million rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sqlite3
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.store_soak import Options, Seen, Soak, place_of, soak
from eventstore.sqlite import SqliteStore
from tests.eventstore.stores import append, event


async def account_of(store: str, directory: Path, seconds: float) -> dict[str, Any]:
    manager = place_of(store, directory)
    where, server = await asyncio.to_thread(manager.__enter__)
    try:
        return await soak(where, server, directory, Options(seconds=seconds, seed=f"stress-{store}", kill_every_s=3.0))
    finally:
        await asyncio.to_thread(manager.__exit__, None, None, None)


@pytest.mark.timeout(480)
async def test_on_postgresql_what_is_committed_is_delivered_once_in_order_through_kills_and_a_restart(
    tmp_path: Path,
) -> None:
    """The naive reader beside them must lose events, or the account says that the run proves nothing."""
    account = await account_of("postgres", tmp_path, 60)
    assert account["differences"] == [], account
    assert account["ok"], account
    assert account["kills"] > 0
    assert account["restarts"] == 1
    assert account["naive_missed"] > 0


@pytest.mark.timeout(300)
async def test_on_sqlite_what_is_committed_is_delivered_once_in_order_through_kills_and_the_account_bites(
    tmp_path: Path,
) -> None:
    """Then its evidence is damaged in every way that it must notice: an account that never finds anything is none."""
    where = tmp_path / "soak.sqlite"
    await SqliteStore.migrate(where, service="soak")
    run = Soak(str(where), None, tmp_path, Options(seconds=20, seed="sqlite", kill_every_s=3.0), lambda _: None)
    account = await run.run()
    assert account["differences"] == [], account
    assert account["ok"], account
    assert account["kills"] > 0

    seen, apart, naively = run.evidence
    less = replace(seen, positions=array("q", seen.positions[:-1]), digest=hashlib.sha256(b"less"))
    assert "the reader in this process: 1 missed" in await faults(run, less, apart, naively)
    assert "the reader in another process" in await faults(run, seen, apart | {"digest": "another"}, naively)
    assert "that fault" in await faults(run, seen, apart | {"faults": ["that fault"]}, naively)

    journal = tmp_path / "writer-5.jsonl"
    lines = journal.read_bytes()
    journal.write_bytes(lines.rpartition(b'["answer"')[0])
    assert "was never answered" in await faults(run, seen, apart, naively)
    journal.write_bytes(lines.replace(b'["answer", "ok"]', b'["answer", "rolled-back"]', 1))
    assert "was answered rolled-back" in await faults(run, seen, apart, naively)
    journal.write_bytes(lines)

    with contextlib.closing(sqlite3.connect(where, isolation_level=None)) as db:
        db.execute("delete from foldbus_events where position = (select min(position) from foldbus_events)")
    assert "was answered ok" in await faults(run, seen, apart, naively)


async def faults(run: Soak, *evidence: Any) -> str:
    account = await run.account(*evidence)
    assert not account["ok"]
    return "; ".join(account["differences"])


def test_a_reader_that_is_given_something_twice_or_out_of_order_is_caught() -> None:
    made = append("a", 0, *(event("a") for _ in range(3)))
    records = [replace(one, stream=made.stream, version=n, position=10 * n) for n, one in enumerate(made.envelopes, 1)]
    for given, wrong in (
        ([records[0], records[0]], "position 10 after 10"),
        ([records[1], records[0]], "position 10 after 20"),
        ([records[0], records[2]], "version 3 after 1"),
    ):
        seen = Seen()
        for one in given:
            seen.take(one)
        assert any(wrong in fault for fault in seen.faults), (wrong, seen.faults)
