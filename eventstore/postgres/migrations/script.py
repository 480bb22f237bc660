"""Runs a migration's `.sql` file: many statements in one round trip, in the transaction that Alembic was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic import context, op
from sqlalchemy.util import await_only


def run(name: str) -> None:
    """`{schema}`, `{log}` and `{service}` are replaced; other braces are the script's own."""
    script = Path(__file__).with_name("sql").joinpath(name).read_text(encoding="utf-8")
    names: dict[str, str] = context.config.attributes["names"]
    for key, value in names.items():
        script = script.replace("{" + key + "}", value)
    if context.is_offline_mode():
        context.get_context().impl.static_output(script)
        return
    # A prepared statement takes one command only, hence the driver's own `execute`.
    driver: Any = op.get_bind().connection.driver_connection
    if not driver.is_in_transaction():
        raise RuntimeError(f"migration {name} would run outside of a transaction")
    await_only(driver.execute(script))
