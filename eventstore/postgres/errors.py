"""The database's errors as the store's, told apart by SQLSTATE and class, never by text."""

from __future__ import annotations

from enum import Enum

import asyncpg
from sqlalchemy import exc
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi

from eventstore.errors import EventStoreError, SchemaMismatch, StoreUnavailable


class Trouble(Enum):
    RACE = "race"
    """A serialization failure or a deadlock: rolled back for sure, the same call may be made again."""
    DATA = "data"
    """A value that the database cannot hold."""
    SCHEMA = "schema"
    """A table or function is not there."""
    UNAVAILABLE = "unavailable"
    OTHER = "other"


DRIVER_ERRORS = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    exc.DBAPIError,
    exc.TimeoutError,
    AsyncAdapt_asyncpg_dbapi.Error,  # what the pool raises when it cannot connect
    OSError,
    TimeoutError,
)

_RACES = {"40001", "40P01"}
_SCHEMA = {"42P01", "42883", "42703", "3F000", "42501"}
_DATA_CLASSES = {"22", "23", "54"}
# Connection, resources, operator intervention (shutdown, cancelled query), system errors.
_UNAVAILABLE_CLASSES = {"08", "53", "57", "58", "XX"}
READ_ONLY = "25006"
_UNAVAILABLE = {READ_ONLY, "25P03", "28000", "28P01", "3D000", "55P03"}
"""Read only (a standby, a failed-over primary), idle timeout, no login, no such database, lock timeout."""


def original(error: BaseException) -> BaseException:
    """What the driver raised, under SQLAlchemy's wrapping."""
    if isinstance(error, exc.DBAPIError) and error.orig is not None:
        error = error.orig
    if isinstance(error, AsyncAdapt_asyncpg_dbapi.Error):
        return error.__cause__ or error
    return error


def code_of(error: BaseException) -> str | None:
    """The SQLSTATE, where the database gave one."""
    code = getattr(original(error), "sqlstate", None)
    return code if isinstance(code, str) else None


def kind(error: BaseException) -> Trouble:
    found = original(error)
    if isinstance(found, asyncpg.DataError):  # also what asyncpg raises before sending: it has no SQLSTATE then
        return Trouble.DATA
    code = getattr(found, "sqlstate", None)
    if isinstance(code, str):
        if code in _RACES:
            return Trouble.RACE
        if code in _SCHEMA:
            return Trouble.SCHEMA
        if code in _UNAVAILABLE or code[:2] in _UNAVAILABLE_CLASSES:
            return Trouble.UNAVAILABLE
        return Trouble.DATA if code[:2] in _DATA_CLASSES else Trouble.OTHER
    if isinstance(found, (ValueError, OverflowError)) and not isinstance(found, OSError):
        return Trouble.DATA
    return Trouble.UNAVAILABLE  # no answer: the connection broke, timed out or could not be made


def translated(error: BaseException, *, doing: str) -> EventStoreError:
    """The error to raise `from` this one."""
    found = original(error)
    what = f"{type(found).__name__}: {found}" if str(found) else type(found).__name__
    code = getattr(found, "sqlstate", None)
    at = f" (SQLSTATE {code})" if code else ""
    match kind(error):
        case Trouble.SCHEMA:
            return SchemaMismatch(f"{doing}: the schema lacks something, or the right to use it: {what}{at}")
        case Trouble.UNAVAILABLE:
            return StoreUnavailable(f"{doing}: the database did not do it; whether it will is unknown: {what}{at}")
        case Trouble.RACE:
            return StoreUnavailable(f"{doing}: lost races again and again, nothing was written: {what}{at}")
        case Trouble.DATA | Trouble.OTHER:
            return EventStoreError(f"{doing}: {what}{at}")
