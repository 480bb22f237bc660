"""`foldbus projection list|rebuild|swap-back|verify`: read models and their generations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Annotated, Any

import typer

from bus.errors import FoldbusError
from foldbus.cli.loading import AppArgument, BusOption, JsonOption, StoreOption, YesOption, load_service, settings
from foldbus.cli.running import WRONG, attached, finish
from foldbus.cli.showing import confirm, print_columns, print_json, say
from foldbus.connection import Connection
from foldbus.progress import Progress
from foldbus.service import Service
from foldbus.settings import Settings
from foldbus.views import View, all_projections, workshop
from projections import Difference, Doing, Generation, Projection, RebuildStopped, Status, Verified, what_to_do

projection = typer.Typer(no_args_is_help=True, help="Read models and their generations.")

_SHOWN = 10

Name = Annotated[str, typer.Argument(metavar="NAME", help="The projection's name")]


class UnknownProjection(FoldbusError):
    """The service lists no projection of that name."""


@dataclass(frozen=True, slots=True)
class GenerationLine:
    """`code_version` is the version that this code has; `rows` None unless it serves. `differs` says how what serves is
    not what this code makes, and what comes of that."""

    projection: str
    code_version: int
    generation: int
    version: int
    status: str
    created_at: datetime | None
    swapped_at: datetime | None
    rows: int | None
    differs: str | None = None


def add_to(app: typer.Typer) -> None:
    app.add_typer(projection, name="projection")


@projection.command("list")
def list_(service: AppArgument, store: StoreOption = None, bus: BusOption = None, as_json: JsonOption = False) -> None:
    """All generations that there are. `generation` 0: no worker has run this projection yet."""
    found = finish(_list(load_service(service), settings(store, bus)))
    if as_json:
        print_json({"generations": [asdict(one) for one in found]})
    else:
        print_columns(
            ("projection", "code version", "generation", "version", "status", "created", "swapped", "rows"),
            [tuple(asdict(one).values())[:-1] for one in found],
        )
        for one in found:
            if one.differs is not None:
                say(f"{one.projection}: generation {one.generation} serves, and {one.differs}")


@projection.command()
def rebuild(
    service: AppArgument,
    name: Name,
    skip_failures: Annotated[
        bool, typer.Option("--skip-failures", help="An event that cannot be folded becomes a dead letter")
    ] = False,
    store: StoreOption = None,
    bus: BusOption = None,
    as_json: JsonOption = False,
) -> None:
    """Builds the next generation beside the one that serves, then swaps. Interrupted, it goes on when called again.
    Exits 1 when an event could not be folded."""
    made = finish(
        rebuilt(load_service(service), settings(store, bus), name, skip_failures=skip_failures),
        hint="what is built stays; run it again to go on",
    )
    show_rebuilt(name, made, as_json)


@projection.command("swap-back")
def swap_back(
    service: AppArgument,
    name: Name,
    store: StoreOption = None,
    bus: BusOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Undoes the last swap. The generation that comes back stands where it stood, and is caught up by its worker."""
    loaded = load_service(service)
    find(loaded, name)
    confirm(f"serve the generation of {name} that was retired", yes=yes)

    async def run() -> int:
        async with attached(loaded, settings(store, bus)) as connection:
            return (await _view(connection, name).swap_back()).number

    number = finish(run())
    if as_json:
        print_json({"projection": name, "generation": number})
    else:
        say(f"{name}: generation {number} serves")


@projection.command()
def verify(
    service: AppArgument, name: Name, store: StoreOption = None, bus: BusOption = None, as_json: JsonOption = False
) -> None:
    """Compares every row with a fold from scratch; the service may go on running. Exits 1 when they differ."""

    async def run() -> Verified[Any]:
        async with attached(load_service(service), settings(store, bus)) as connection:
            return await _view(connection, name).verify()

    found = finish(run())
    if as_json:
        differences = [
            {
                "key": one.key,
                "stored": None if one.stored is None else one.stored.model_dump(mode="json"),
                "folded": None if one.folded is None else one.folded.model_dump(mode="json"),
            }
            for one in found.differences
        ]
        print_json(
            {
                "projection": name, "generation": found.generation, "rows": found.rows, "events": found.events,
                "failures": found.failures, "different": found.different, "differences": differences,
            }
        )  # fmt: skip
    else:
        shown = found.differences[:_SHOWN]
        print_columns(("key", "column", "stored", "folded"), [line for one in shown for line in _difference(one)])
        if found.different > len(shown):
            say(f"{found.different - len(shown)} rows more are different; --json has the first hundred")
        say(f"{name}: {found.rows} rows of {found.events} events, {found.different} different")
    if not found.ok:
        raise SystemExit(WRONG)


def _difference(one: Difference[Any]) -> list[tuple[object, ...]]:
    """A line for each column that differs, or one for a row that only one side has."""
    if one.stored is None or one.folded is None:
        return [
            (one.key, "(row)", "none" if one.stored is None else "there", "none" if one.folded is None else "there")
        ]
    stored, folded = one.stored.model_dump(mode="json"), one.folded.model_dump(mode="json")
    return [(one.key, name, stored[name], folded[name]) for name in stored if stored[name] != folded[name]]


async def rebuilt(service: Service, chosen: Settings, name: str, *, skip_failures: bool = False) -> int | None:
    """The generation that was built and serves now; None when an event could not be folded (it is told)."""
    find(service, name)
    progress, number = Progress(), 0
    async with attached(service, chosen) as connection:
        with progress.task(f"rebuild {name}", 0):
            try:
                async for step in _view(connection, name).rebuild(skip_failures=skip_failures):
                    progress.at(step.done, total=step.total, generation=step.generation)
                    number = step.generation
            except RebuildStopped as error:
                say(f"foldbus: {error}")
                return None
    return number


def show_rebuilt(name: str, generation: int | None, as_json: bool) -> None:
    """Exits 1 when there is none."""
    if as_json:
        print_json({"projection": name, "generation": generation, "swapped": generation is not None})
    elif generation is not None:
        say(f"{name}: generation {generation} serves")
    if generation is None:
        raise SystemExit(WRONG)


def find(service: Service, name: str) -> Projection[Any]:
    """Raises UnknownProjection, naming those that there are."""
    known = {one.name: one for one in all_projections(service)}
    if name not in known:
        raise UnknownProjection(
            f"service {service.name!r} has no projection {name!r}; wanted one of {', '.join(known) or '(it has none)'}"
        )
    return known[name]


def _view(connection: Connection, name: str) -> View[Any]:
    return connection.view(find(connection.service, name))


async def _list(service: Service, chosen: Settings) -> list[GenerationLine]:
    lines: list[GenerationLine] = []
    async with attached(service, chosen) as connection:
        for one in all_projections(service):
            rows = workshop(connection, one).rows
            found = await rows.generations()
            if not found:
                lines.append(GenerationLine(one.name, one.version, 0, 0, "not started", None, None, None))
            for made in found:
                count, differs = None, None
                if made.status is Status.SERVING:
                    count = await rows.count()
                    differs = _how_it_differs(one, made, found)
                lines.append(
                    GenerationLine(
                        one.name, one.version, made.number, made.version, made.status.value, made.created_at,
                        made.swapped_at, count, differs,
                    )
                )  # fmt: skip
    return lines


def _how_it_differs(projection: Projection[Any], serving: Generation, found: Sequence[Generation]) -> str | None:
    doing = what_to_do(projection, serving, found)
    if doing is Doing.FOLLOWING:
        return None
    same = serving.version == projection.version
    what = "this code has other columns" if same else f"this code is version {projection.version}"
    if doing is Doing.STANDING_BY:
        return f"{what}: a worker of it stands by"
    return f"{what}: the next worker that starts builds another one"
