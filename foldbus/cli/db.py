"""`foldbus db upgrade|check|restored`: the services' schemas."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import typer

from bus.metrics import MemoryMetrics
from bus.seams import SystemClock, Uuid7Ids
from eventstore.errors import SchemaMismatch
from foldbus.backends import migrate_store, open_store, raise_epoch
from foldbus.cli.loading import AppsArgument, JsonOption, StoreOption, UnusedBus, YesOption, load_service, settings
from foldbus.cli.running import WRONG, finish
from foldbus.cli.showing import confirm, print_columns, print_json

db = typer.Typer(no_args_is_help=True, help="The services' databases.")


@dataclass(frozen=True, slots=True)
class Standing:
    """`epoch` None and `problem`: what keeps this code from working on the store."""

    service: str
    epoch: int | None
    problem: str | None = None


def add_to(app: typer.Typer) -> None:
    app.add_typer(db, name="db")


@db.command()
def upgrade(
    services: AppsArgument, store: StoreOption = None, bus: UnusedBus = None, as_json: JsonOption = False
) -> None:
    """Creates or upgrades the stores of these services; a second call changes nothing."""
    url, names = settings(store).store, _names(services)

    async def run() -> list[Standing]:
        for name in names:
            await migrate_store(url, name)
        return [await _look(url, name) for name in names]

    _show(finish(run(), hint="what is upgraded stays; run it again for the rest"), as_json)


@db.command()
def check(
    services: AppsArgument, store: StoreOption = None, bus: UnusedBus = None, as_json: JsonOption = False
) -> None:
    """Changes nothing. Exits 1 when a store is missing, needs an upgrade or is of newer code."""
    url, names = settings(store).store, _names(services)

    async def run() -> list[Standing]:
        return [await _look(url, name) for name in names]

    _show(finish(run()), as_json)


@db.command()
def restored(
    services: AppsArgument,
    store: StoreOption = None,
    bus: UnusedBus = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Once after a database came back from a backup, with all workers stopped: its log begins a new epoch, so that
    readers elsewhere see that positions are drawn anew."""
    url, names = settings(store).store, _names(services)
    confirm(f"raise the epoch of {', '.join(names)}", yes=yes)

    async def run() -> list[Standing]:
        return [Standing(name, await raise_epoch(url, name)) for name in names]

    _show(finish(run()), as_json)


def _names(services: list[str]) -> list[str]:
    return [load_service(name).name for name in services]


async def _look(url: str, service: str) -> Standing:
    try:
        async with open_store(
            url, service, clock=SystemClock(), ids=Uuid7Ids(), metrics=MemoryMetrics(), migrate=False
        ) as store:
            return Standing(service, store.epoch)
    except SchemaMismatch as error:
        return Standing(service, None, str(error))


def _show(found: list[Standing], as_json: bool) -> None:
    if as_json:
        print_json({"stores": [asdict(one) for one in found]})
    else:
        print_columns(("service", "epoch", "problem"), [(one.service, one.epoch, one.problem) for one in found])
    if any(one.problem for one in found):
        raise SystemExit(WRONG)
