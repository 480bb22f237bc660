"""`foldbus store …`: what is done to a store with its workers stopped, or beside them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from bus.envelope import StreamId
from bus.errors import FoldbusError
from bus.metrics import MemoryMetrics
from bus.seams import SystemClock, Uuid7Ids
from eventstore.export import Header
from eventstore.port import Store, StreamInfo
from foldbus.archive import archive_stream, seen_by_all, truncate_stream
from foldbus.backends import open_store
from foldbus.cli.loading import AppArgument, JsonOption, StoreOption, UnusedBus, YesOption, load_service, settings
from foldbus.cli.running import WRONG, finish
from foldbus.cli.showing import confirm, print_columns, print_json, say
from foldbus.moving import export_store, import_store
from foldbus.progress import Progress
from foldbus.service import Service
from foldbus.verifying import Verified, verify_store

store = typer.Typer(no_args_is_help=True, help="Care of a service's store.")

ServiceArgument = Annotated[
    str, typer.Argument(metavar="SERVICE", help="A service's name, or MODULE:NAME as in other commands")
]
FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="JSON lines; - is standard input or output")]
CategoryArgument = Annotated[str, typer.Argument(metavar="CATEGORY", help="The stream's category")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The stream's id")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done")]
_AGAIN = "run it again with the same file: it goes on where it was"


class BadStream(FoldbusError):
    """Something that names no stream."""


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


@store.command("streams")
def streams(
    service: ServiceArgument,
    category: Annotated[str | None, typer.Option("--category", help="Only these")] = None,
    after: Annotated[str | None, typer.Option("--after", help="CATEGORY/ID: begin behind this one")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000)] = 100,
    store: StoreOption = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """The streams of a store, by category and id, with their versions; archived ones included."""
    url, name = settings(store).store, name_of(service)
    begin = StreamId(*after.split("/", 1)) if after is not None and "/" in after else None
    if after is not None and begin is None:
        raise BadStream(f"--after {after!r} names no stream; wanted CATEGORY/ID")

    async def run() -> Sequence[StreamInfo]:
        async with _opened(url, name) as opened:
            return await opened.streams(category=category, after=begin, limit=limit)

    found = finish(run())
    if as_json:
        print_json({"streams": [_info(one) for one in found], "more": len(found) == limit})
    else:
        print_columns(
            ("category", "id", "version", "kept from", "archived"),
            [(one.stream.category, one.stream.id, one.version, one.kept_from, one.archived_at) for one in found],
        )
        if len(found) == limit:
            say(f"there may be more: --after {found[-1].stream.category}/{found[-1].stream.id}")


@store.command("archive")
def archive(
    service: AppArgument,
    category: CategoryArgument,
    id: IdArgument,
    dry_run: DryRunOption = False,
    store: StoreOption = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """Closes a stream and takes its events out of the log; `restore-stream` brings them back. Refused while the relay
    or a projection has not read all of them."""
    known, url, stream = load_service(service), settings(store).store, StreamId(category, id)

    async def run() -> dict[str, Any]:
        async with _opened(url, known.name) as opened:
            if dry_run:
                return await _dry(opened, known, stream, None)
            return _info(await archive_stream(opened, known, stream, clock=SystemClock()))

    _tell(finish(run()), as_json, "would archive" if dry_run else "archived")


@store.command("restore-stream")
def restore_stream(
    service: ServiceArgument,
    category: CategoryArgument,
    id: IdArgument,
    dry_run: DryRunOption = False,
    store: StoreOption = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """Brings an archived stream back, its events where they were: whoever has passed them does not see them again."""
    url, name, stream = settings(store).store, name_of(service), StreamId(category, id)

    async def run() -> dict[str, Any]:
        async with _opened(url, name) as opened:
            if dry_run:
                found = await opened.archive.read(stream, limit=1)
                return {"category": category, "id": id, "version": found.version, "archived": bool(found.records)}
            return _info(await opened.archive.restore(stream))

    _tell(finish(run()), as_json, "would restore" if dry_run else "restored")


@store.command("truncate")
def truncate(
    service: AppArgument,
    category: CategoryArgument,
    id: IdArgument,
    upto: Annotated[int, typer.Option("--upto", min=1, help="The last version to delete")],
    dry_run: DryRunOption = False,
    store: StoreOption = None,
    bus: UnusedBus = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Deletes the first events of a stream, for good, behind a snapshot that today's code reads. From then on the
    stream loads with code of that snapshot's schema only: another `Decider(version=)`, or another state, cannot."""
    known, url, stream = load_service(service), settings(store).store, StreamId(category, id)
    if not dry_run:
        confirm(f"delete versions 1 to {upto} of {category}/{id}, for good", yes=yes)

    async def run() -> dict[str, Any]:
        async with _opened(url, known.name) as opened:
            if dry_run:
                return await _dry(opened, known, stream, upto)
            return _info(await truncate_stream(opened, known, stream, upto=upto, clock=SystemClock()))

    _tell(finish(run()), as_json, "would truncate" if dry_run else "truncated")


async def _dry(opened: Store, service: Service, stream: StreamId, upto: int | None) -> dict[str, Any]:
    """What would go, and whether it may already."""
    part = await opened.read_stream(stream, upto=upto, backward=True, limit=1)
    last = part.records[0].position if part.records else None
    seen = await seen_by_all(opened, service, clock=SystemClock())
    return {
        "category": stream.category,
        "id": stream.id,
        "version": part.version,
        "upto": part.version if upto is None else upto,
        "last_position": last,
        "seen_by_all": seen,
        "allowed": last is not None and last <= seen,
    }


def _opened(url: str, name: str) -> AbstractAsyncContextManager[Store]:
    return open_store(url, name, clock=SystemClock(), ids=Uuid7Ids(), metrics=MemoryMetrics(), migrate=False)


def _info(found: StreamInfo) -> dict[str, Any]:
    return {
        "category": found.stream.category,
        "id": found.stream.id,
        "version": found.version,
        "kept_from": found.kept_from,
        "archived_at": found.archived_at,
    }


def _tell(found: dict[str, Any], as_json: bool, what: str) -> None:
    if as_json:
        print_json(found)
    else:
        say(f"{what} {found['category']}/{found['id']}")
        print_columns(("", "value"), [(name.replace("_", " "), value) for name, value in found.items()])


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
