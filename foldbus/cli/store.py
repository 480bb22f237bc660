"""`foldbus store …`: what is done to a store with its workers stopped, or beside them."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from eventstore.export import Header
from foldbus.cli.loading import JsonOption, StoreOption, UnusedBus, load_service, settings
from foldbus.cli.running import WRONG, finish
from foldbus.cli.showing import print_columns, print_json, say
from foldbus.moving import export_store, import_store
from foldbus.progress import Progress
from foldbus.verifying import Verified, verify_store

store = typer.Typer(no_args_is_help=True, help="Care of a service's store.")

ServiceArgument = Annotated[
    str, typer.Argument(metavar="SERVICE", help="A service's name, or MODULE:NAME as in other commands")
]
FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="JSON lines; - is standard input or output")]
_AGAIN = "run it again with the same file: it goes on where it was"


def add_to(app: typer.Typer) -> None:
    app.add_typer(store, name="store")


def name_of(service: str) -> str:
    """The name of a service that is given by its name or as MODULE:NAME."""
    return load_service(service).name if ":" in service else service


@store.command("export")
def export(
    service: ServiceArgument,
    file: FileArgument,
    online: Annotated[bool, typer.Option("--online", help="Also while workers run: a copy, not a move")] = False,
    store: StoreOption = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """Everything that a store holds, as JSON lines, with positions and epoch: to move it to another database.

    Stop the service's workers first. A command that was broken off goes on in the same FILE. Read models are not in it:
    they are rebuilt where the store is opened next."""
    url, name = settings(store).store, name_of(service)
    progress = Progress()
    to: Path | BinaryIO = sys.stdout.buffer if file == "-" else Path(file)

    async def run() -> Header:
        with progress.task(f"export {name}", 0):
            return await export_store(
                url, name, to, online=online, told=lambda done, total: progress.at(done, total=total)
            )

    _show(finish(run(), hint=_AGAIN if file != "-" else ""), as_json and file != "-", "exported")


@store.command("import")
def import_(
    service: ServiceArgument,
    file: FileArgument,
    store: StoreOption = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """Creates a store and fills it with what `export` wrote; it can be opened when this is done, not before.

    A command that was broken off goes on with the same FILE. The store must be empty otherwise. Do not run workers on
    the old store any more: both would publish what is not published yet."""
    url, name = settings(store).store, name_of(service)
    progress = Progress()
    given: Path | BinaryIO = sys.stdin.buffer if file == "-" else Path(file)

    async def run() -> Header:
        with progress.task(f"import {name}", 0):
            return await import_store(url, name, given, told=lambda done, total: progress.at(done, total=total))

    _show(finish(run(), hint=_AGAIN), as_json, "imported")


@store.command("verify")
def verify(
    service: ServiceArgument,
    full: Annotated[
        bool, typer.Option("--full/--sample", help="Read every document and compare every snapshot, or some")
    ] = False,
    store: StoreOption = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """Whether a store is in one piece; also while workers run. Exits 1 when it is not, and names each damage.

    With MODULE:NAME snapshots are compared with full folds of their streams, and projections with their log."""
    url = settings(store).store
    known = load_service(service) if ":" in service else None
    name = service if known is None else known.name
    progress = Progress()

    async def run() -> Verified:
        with progress.task(f"verify {name}", 0):
            return await verify_store(
                url, name, service=known, full=full, told=lambda done, total: progress.at(done, total=total)
            )

    found = finish(run())
    if as_json:
        print_json(asdict(found) | {"ok": not found.damages})
    else:
        print_columns(("check", "damages"), [(check, _count(found, check)) for check in found.checks])
        for damage in found.damages:
            for what in damage.found:
                print(f"{damage.check}: {what}")
            if damage.count > len(damage.found):
                print(f"{damage.check}: and {damage.count - len(damage.found)} more")
        if known is not None:
            say(f"compared {found.compared} of {found.snapshots} snapshots with full folds")
    if found.damages:
        raise SystemExit(WRONG)


def _count(found: Verified, check: str) -> int:
    return sum(damage.count for damage in found.damages if damage.check == check)


def _show(header: Header, as_json: bool, what: str) -> None:
    found: dict[str, Any] = {"service": header.service, "epoch": header.epoch, "head": header.head}
    if as_json:
        print_json(found | {"counts": dict(header.counts)})
    else:
        counts = ", ".join(f"{count} {name}" for name, count in header.counts.items() if count)
        say(f"{what} {header.service}, epoch {header.epoch}, position {header.head}: {counts or 'nothing'}")
