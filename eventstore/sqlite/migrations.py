"""Bringing a file's schema up to date: numbered SQL files, applied in order in one transaction, never edited."""

from __future__ import annotations

import random
import re
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator
from importlib import resources
from pathlib import Path
from typing import TypeVar

from eventstore import upgrading
from eventstore.errors import SchemaMismatch
from eventstore.sqlite.database import connect
from eventstore.sqlite.faults import is_busy, translated
from eventstore.upgrading import Look, Migration, State

T = TypeVar("T")

FIRST_EPOCH = 0
OLDEST_SINCE = 3
"""The first schema that says which code still works with it."""
IMPORT = "foldbus_import"
"""A store that is being filled has this table: see `moving.py`."""
_NAME = re.compile(r"(?P<number>\d{4})_[a-z0-9_]+\.sql")
_CREATE = (
    "CREATE TABLE IF NOT EXISTS foldbus_schema "
    "(number INTEGER PRIMARY KEY, name TEXT NOT NULL, applied_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP)"
)


def migrations() -> list[tuple[int, str, str]]:
    """Number, name and SQL of each, in order."""
    found: list[tuple[int, str, str]] = []
    for file in resources.files("eventstore.sqlite").joinpath("migrations").iterdir():
        named = _NAME.fullmatch(file.name)
        if named is not None:
            found.append((int(named["number"]), file.name, file.read_text(encoding="utf-8")))
    return sorted(found)


def known() -> list[Migration]:
    return [Migration(number, name) for number, name, _ in migrations()]


def sql(path: Path, *, service: str, contract: bool = False) -> str:
    """What `migrate` would run, for `sqlite3 FILE`. Changes nothing."""
    found = look(path).found if path.exists() else 0
    chosen = {one.number for one in upgrading.plan(known(), found=found, contract=contract)}
    parts = [] if found else ["PRAGMA journal_mode=WAL;\n"]
    parts.append(f"BEGIN IMMEDIATE;\n{_CREATE};\n")
    for number, name, script in migrations():
        if number in chosen:
            parts.append(f"{script.rstrip()}\nINSERT INTO foldbus_schema (number, name) VALUES ({number}, '{name}');\n")
    parts += [f"{statement};\n" for statement in _closing(service, chosen)]
    return "".join([*parts, "COMMIT;\n"]) if chosen else ""


def look(path: Path) -> Look:
    """Raises SchemaMismatch when there is no file."""
    connection = connect(path)
    try:
        return _look(connection)
    finally:
        connection.close()


def _look(connection: sqlite3.Connection) -> Look:
    found = oldest = 0
    if has_table(connection, "foldbus_schema"):
        found = connection.execute("SELECT coalesce(max(number), 0) FROM foldbus_schema").fetchone()[0]
    if found >= OLDEST_SINCE:
        (oldest,) = connection.execute("SELECT oldest FROM foldbus_log").fetchone()
    return upgrading.look(known(), found=found, oldest=oldest)


def _closing(service: str, ran: Collection[int]) -> list[str]:
    """After the migrations: the log's row, and the oldest code that works from now on."""
    quoted = service.replace("'", "''")
    closing = [
        f"INSERT OR IGNORE INTO foldbus_log (one, service, epoch, head) VALUES (1, '{quoted}', {FIRST_EPOCH}, 0)"
    ]
    oldest = upgrading.oldest_after([one for one in known() if one.number in ran])
    if oldest is not None:
        closing.append(f"UPDATE foldbus_log SET oldest=max(oldest, {oldest})")
    return closing


def migrate(path: Path, *, service: str, busy_s: float = 10.0, contract: bool = False) -> None:
    """Creates the file if need be and applies what is missing. Two at once do no harm: the second finds it done.
    Newer code's schema that this code works with is left alone. `contract`: see `eventstore/upgrading.py`.

    Raises SchemaMismatch when the file belongs to another service or to newer code, StoreUnavailable when it stays
    locked. Blocks: call it in a thread.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = connect(path, create=True)
    try:
        # The journal's mode lasts; changing it needs the file to itself for a moment.
        patiently(lambda: connection.execute("PRAGMA journal_mode=WAL").fetchall(), path, busy_s)
        patiently(lambda: connection.execute("BEGIN IMMEDIATE"), path, busy_s)
        try:
            _apply(connection, path, service, contract=contract)
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
    finally:
        connection.close()


def _apply(connection: sqlite3.Connection, path: Path, service: str, *, contract: bool) -> None:
    connection.execute(_CREATE)
    seen = _look(connection)
    if seen.state is State.TOO_NEW:
        upgrading.check(seen, where=str(path))
    if seen.state is not State.NEWER:
        chosen = {one.number for one in upgrading.plan(known(), found=seen.found, contract=contract)}
        for number, name, script in migrations():
            if number in chosen:
                for statement in _statements(script):
                    connection.execute(statement)
                connection.execute("INSERT INTO foldbus_schema (number, name) VALUES (?, ?)", (number, name))
        for statement in _closing(service, chosen):
            connection.execute(statement)
    _check_service(connection, path, service)


def check(connection: sqlite3.Connection, path: Path, *, service: str) -> int:
    """The log's epoch. Raises SchemaMismatch unless this code works on the file's schema, and it is this service's."""
    upgrading.check(_look(connection), where=str(path))
    _check_service(connection, path, service)
    if has_table(connection, IMPORT):
        raise SchemaMismatch(
            f"an import into {path} was begun and is not finished: run `foldbus store import` with the same file "
            "again, or remove this one"
        )
    (epoch,) = connection.execute("SELECT epoch FROM foldbus_log").fetchone()
    return int(epoch)


def epoch_since(connection: sqlite3.Connection) -> int | None:
    """When the log's epoch began, in microseconds; None for the first one."""
    found: int | None = connection.execute("SELECT epoch_since FROM foldbus_log").fetchone()[0]
    return found


def has_table(connection: sqlite3.Connection, name: str) -> bool:
    found = connection.execute("SELECT 1 FROM sqlite_master WHERE type='table' AND name=?", (name,)).fetchone()
    return found is not None


# The next whole second: a time that is too early would be a promise less.
_RAISE_EPOCH = "UPDATE foldbus_log SET epoch = epoch + 1, epoch_since = (strftime('%s', 'now') + 1) * 1000000"


def raise_epoch(path: Path, *, service: str, busy_s: float = 10.0) -> int:
    """After a restore from a backup: positions drawn since are drawn again, so the log gets a new epoch, the answer."""
    connection = connect(path)
    try:
        check(connection, path, service=service)
        patiently(lambda: connection.execute(_RAISE_EPOCH), path, busy_s)
        return check(connection, path, service=service)
    finally:
        connection.close()


def _check_service(connection: sqlite3.Connection, path: Path, service: str) -> None:
    (owner,) = connection.execute("SELECT service FROM foldbus_log").fetchone()
    if owner != service:
        raise SchemaMismatch(f"{path} is the store of service {owner!r}, not of {service!r}; nothing was changed")


def _statements(sql: str) -> Iterator[str]:
    """One by one: `executescript` would commit first."""
    part = ""
    for line in sql.splitlines(keepends=True):
        part += line
        if sqlite3.complete_statement(part):
            yield part
            part = ""


def patiently(step: Callable[[], T], path: Path, busy_s: float = 10.0) -> T:
    """Again and again while another process has the file locked. Raises StoreUnavailable after `busy_s`. Blocks."""
    give_up_at = time.monotonic() + busy_s
    while True:
        try:
            return step()
        except sqlite3.Error as error:
            if not is_busy(error) or time.monotonic() >= give_up_at:
                clean = translated(error, str(path))
                if clean is error:
                    raise
                raise clean from error
            time.sleep(random.uniform(0.0005, 0.0015))
