"""The schemas of services' stores, wherever they are: looking, upgrading, and the SQL of an upgrade."""

from __future__ import annotations

import asyncio

from eventstore.upgrading import Look, State
from foldbus.backends import StoreUrl, without_password
from foldbus.unreachable import naming_store


async def look_at_schema(url: str, service: str) -> Look:
    """Changes nothing. Raises SchemaMismatch when there is no file."""
    parsed = StoreUrl.parse(url)
    if parsed.embedded:
        from eventstore.sqlite import migrations

        return await asyncio.to_thread(migrations.look, parsed.file(service))
    from eventstore.postgres import schema

    with naming_store(parsed.text, without_password(url)):
        return await schema.look(parsed.text, service=service)


async def upgrade_schema(url: str, service: str, *, contract: bool = False) -> None:
    """Creates or upgrades a store; two at once do no harm. `contract` also takes away what older code uses."""
    parsed = StoreUrl.parse(url)
    if parsed.embedded:
        from eventstore.sqlite import migrations

        await asyncio.to_thread(migrations.migrate, parsed.file(service), service=service, contract=contract)
    else:
        from eventstore.postgres import schema

        with naming_store(parsed.text, without_password(url)):
            await schema.migrate(parsed.text, service=service, contract=contract)


async def schema_sql(url: str, service: str, *, contract: bool = False) -> str:
    """What `upgrade_schema` would run, in one transaction, for psql or sqlite3; "" when there is nothing to do."""
    parsed = StoreUrl.parse(url)
    if parsed.embedded:
        from eventstore.sqlite import migrations

        return await asyncio.to_thread(migrations.sql, parsed.file(service), service=service, contract=contract)
    from eventstore.postgres import schema

    with naming_store(parsed.text, without_password(url)):
        return await schema.sql(parsed.text, service=service, contract=contract)


__all__ = ["Look", "State", "look_at_schema", "schema_sql", "upgrade_schema"]
