"""Alembic's entry. The caller gives the connection, inside its own transaction, and the names: see `schema.py`."""

from __future__ import annotations

from alembic import context

_given = context.config.attributes

context.configure(
    connection=_given["connection"],
    version_table="alembic_version",
    version_table_schema=_given["schema"],
)
context.run_migrations()
