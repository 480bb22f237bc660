"""The store on SQLite: one file per service, no server. The reference adapter."""

from eventstore.sqlite.database import InlineExecutor, SqliteDatabase
from eventstore.sqlite.store import SqliteStore, SqliteTx

__all__ = ["InlineExecutor", "SqliteDatabase", "SqliteStore", "SqliteTx"]
