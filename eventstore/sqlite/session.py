"""A connection as the store's statements need it: the driver's own, or a user's SQLAlchemy transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import sqlalchemy

_SIZES = (1, 8, 64, 512)


class Session(Protocol):
    """An open transaction."""

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]: ...

    def run(self, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """One statement that answers nothing, for each of `rows`."""
        ...


class DriverSession:
    """In the writer's or a reader's thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        return self._connection.execute(sql, parameters).fetchall()

    def run(self, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        self._connection.executemany(sql, rows)


class SqlalchemySession:
    """Within `run_sync` of a user's transaction. Through SQLAlchemy, never past it: it begins a transaction only when
    it executes something itself, and what went past it survived the rollback."""

    def __init__(self, connection: sqlalchemy.Connection) -> None:
        self._connection = connection

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        return [tuple(row) for row in self._connection.exec_driver_sql(sql, tuple(parameters)).fetchall()]

    def run(self, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        self._connection.exec_driver_sql(sql, list(rows))


def chunks(values: Sequence[Any]) -> Iterator[tuple[str, Sequence[Any]]]:
    """For `IN (…)`: question marks and values, in a few fixed sizes (the last value fills up), so that a statement is
    compiled once per size and not once per call."""
    at = 0
    while at < len(values):
        left = len(values) - at
        size = next((size for size in _SIZES if size >= left), _SIZES[-1])
        part = list(values[at : at + size])
        at += len(part)
        part += part[-1:] * (size - len(part))
        yield ",".join("?" * size), part
