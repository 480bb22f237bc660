"""Export and import of one service's store, wherever it is. The format is `eventstore.export`'s."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

from eventstore.export import (
    Header,
    StoreInUse,
    Target,
    Told,
    check_file,
    export_file,
    export_to,
    import_lines,
)
from eventstore.verify import Examined
from foldbus.backends import StoreUrl


async def export_store(
    url: str, service: str, to: Path | BinaryIO, *, online: bool = False, told: Told | None = None
) -> Header:
    """One state of the store. To a path: goes on where an earlier call was broken off.

    Raises StoreInUse while a worker leads (`online` takes a copy all the same), BadExport when the file is of something
    else, SchemaMismatch.
    """
    async with open_source(url, service, online=online) as source:
        if isinstance(to, Path):
            return await export_file(source, to, told=told)
        return await export_to(source, to, told=told)


async def import_store(url: str, service: str, given: Path | BinaryIO, *, told: Told | None = None) -> Header:
    """Creates the store and fills it; goes on where an earlier call was broken off. A file is read twice: nothing is
    written of one that is not whole.

    Raises NotEmpty, BadExport, SchemaMismatch.
    """
    if isinstance(given, Path):
        check_file(given)
        with given.open("rb") as file:
            return await import_store(url, service, file, told=told)
    async with _target(url, service) as target:
        return await import_lines(iter(given.readline, b""), target, service=service, told=told)


@asynccontextmanager
async def open_source(url: str, service: str, *, online: bool) -> AsyncGenerator[Examined]:
    """One state of the store. Raises StoreInUse, unless `online`, and SchemaMismatch."""
    parsed = StoreUrl.parse(url)
    if parsed.embedded:
        from eventstore.sqlite import moving as sqlite

        async with sqlite.open_source(parsed.file(service), service=service, online=online) as source:
            yield source
    else:
        from eventstore.postgres import moving as postgres

        async with postgres.open_source(parsed.text, service=service, online=online) as opened:
            yield opened


@asynccontextmanager
async def _target(url: str, service: str) -> AsyncGenerator[Target]:
    parsed = StoreUrl.parse(url)
    if parsed.embedded:
        from eventstore.sqlite import moving as sqlite

        async with sqlite.open_target(parsed.file(service), service=service) as target:
            yield target
    else:
        from eventstore.postgres import moving as postgres

        async with postgres.open_target(parsed.text, service=service) as opened:
            yield opened


__all__ = ["StoreInUse", "export_store", "import_store", "open_source"]
