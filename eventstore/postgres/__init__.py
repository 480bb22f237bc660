"""The store on PostgreSQL: SQLAlchemy for engine, pool and schema, the hot path in asyncpg through that pool."""

from eventstore.postgres.store import PostgresStore, PostgresTx

__all__ = ["PostgresStore", "PostgresTx"]
