"""Where rows are kept: `SqliteRows` in the service's file, `PostgresRows` in its schema, `rows_for` to choose."""

from projections.rows.choose import rows_for
from projections.rows.columns import Columns
from projections.rows.postgres import PostgresHost, PostgresRows
from projections.rows.sqlite import SqliteHost, SqliteRows

__all__ = ["Columns", "PostgresHost", "PostgresRows", "SqliteHost", "SqliteRows", "rows_for"]
