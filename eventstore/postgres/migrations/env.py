"""Alembic's entry. The caller gives the names and the connection, inside its own transaction; or where to write the SQL
that it shall run itself: see `schema.py`."""

from __future__ import annotations

from alembic import context

_given = context.config.attributes
_TABLE = "alembic_version"

if context.is_offline_mode():
    context.configure(
        dialect_name="postgresql",
        version_table=_TABLE,
        version_table_schema=_given["schema"],
        output_buffer=_given["out"],
        transactional_ddl=False,  # the caller writes `begin` and `commit`, around all of it
    )
else:
    context.configure(
        connection=_given["connection"],
        version_table=_TABLE,
        version_table_schema=_given["schema"],
    )
context.run_migrations()
