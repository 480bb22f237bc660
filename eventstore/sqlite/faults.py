"""What SQLite's errors mean to a caller, by their code."""

from __future__ import annotations

import sqlite3

from eventstore.errors import EventStoreError, StoreUnavailable

_PRIMARY = 0xFF  # an extended code carries its primary one in the low byte

BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_UNAVAILABLE = {
    sqlite3.SQLITE_BUSY: "another process holds the file's lock",
    sqlite3.SQLITE_LOCKED: "another connection holds the file's lock",
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_READONLY: "the file cannot be written to",
    sqlite3.SQLITE_IOERR: "the file system answered with an error",
    sqlite3.SQLITE_CANTOPEN: "the file cannot be opened",
    sqlite3.SQLITE_PROTOCOL: "the file's locks cannot be taken",
    sqlite3.SQLITE_NOMEM: "there is no memory left",
    sqlite3.SQLITE_PERM: "the file may not be opened",
}
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


def code(error: sqlite3.Error) -> int:
    """The primary result code; 0 for an error that SQLite itself did not raise."""
    return int(getattr(error, "sqlite_errorcode", 0) or 0) & _PRIMARY


def is_busy(error: BaseException) -> bool:
    return isinstance(error, sqlite3.Error) and code(error) in BUSY


def translated(error: BaseException, path: str) -> BaseException:
    """The store's own error for a fault of file, disk or lock; anything else (a mistake in SQL) as it is."""
    if not isinstance(error, sqlite3.Error):
        return error
    found = code(error)
    if found in _UNAVAILABLE:
        return StoreUnavailable(f"{path}: {_UNAVAILABLE[found]} ({error}); the same call may be made again")
    if found in _DAMAGED:
        return EventStoreError(f"{path} is damaged or no SQLite database ({error}); restore it from a backup")
    return error
