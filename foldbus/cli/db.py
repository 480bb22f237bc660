"""`foldbus db upgrade|check|sql|restored`: the services' schemas."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated

import typer

from bus.metrics import MemoryMetrics
from bus.seams import SystemClock, Uuid7Ids
from eventstore.errors import SchemaMismatch
from foldbus.backends import open_store, raise_epoch
from foldbus.cli.loading import (
    AppArgument,
    AppsArgument,
    JsonOption,
    StoreOption,
    UnusedBus,
    YesOption,
    load_service,
    settings,
)
from foldbus.cli.running import WRONG, finish
from foldbus.cli.showing import confirm, print_columns, print_json, say
from foldbus.schemas import State, look_at_schema, schema_sql, upgrade_schema

db = typer.Typer(no_args_is_help=True, help="The services' databases.")


ContractOption = Annotated[
    bool, typer.Option("--contract", help="Also take away what only older code uses: end its processes first")
]


@dataclass(frozen=True, slots=True)
class Standing:
    """`epoch` None and `problem`: what keeps this code from working on the store. `schema` is what was found, `wanted`
    what this code brings; `contractions` are upgrades that wait for `--contract`."""

    service: str
    epoch: int | None
    problem: str | None = None
    state: str | None = None
    schema: int | None = None
    wanted: int | None = None
    contractions: tuple[str, ...] = ()


def add_to(app: typer.Typer) -> None:
    app.add_typer(db, name="db")


@db.command()
def upgrade(
    services: AppsArgument,
    contract: ContractOption = False,
    store: StoreOption = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """Creates or upgrades the stores of these services; a second call changes nothing. Workers of the code before this
    one work on meanwhile, but for `--contract`."""
    url, names = settings(store).store, _names(services)

    async def run() -> list[Standing]:
        for name in names:
            await upgrade_schema(url, name, contract=contract)
        return [await _look(url, name) for name in names]

    _show(finish(run(), hint="what is upgraded stays; run it again for the rest"), as_json)


@db.command()
def check(
    services: AppsArgument, store: StoreOption = None, bus: UnusedBus = None, as_json: JsonOption = False
) -> None:
    """Changes nothing. Exits 1 when this code cannot work on a store: it is missing, behind, or of newer code that has
    left this one behind."""
    url, names = settings(store).store, _names(services)

    async def run() -> list[Standing]:
        return [await _look(url, name) for name in names]

    _show(finish(run()), as_json)


@db.command()
def sql(
    service: AppArgument, contract: ContractOption = False, store: StoreOption = None, bus: UnusedBus = None
) -> None:
    """Prints what `upgrade` would run, one transaction for `psql -v ON_ERROR_STOP=1` (or `sqlite3 -bail`); nothing when
    there is nothing to do."""
    url, name = settings(store).store, load_service(service).name
    print(finish(schema_sql(url, name, contract=contract)), end="")


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

    async def run() -> list[tuple[str, int]]:
        return [(name, await raise_epoch(url, name)) for name in names]

    found = finish(run())
    if as_json:
        print_json({"stores": [{"service": name, "epoch": epoch, "problem": None} for name, epoch in found]})
    else:
        print_columns(("service", "epoch"), found)


def _names(services: list[str]) -> list[str]:
    return [load_service(name).name for name in services]


async def _look(url: str, service: str) -> Standing:
    try:
        seen = await look_at_schema(url, service)
    except SchemaMismatch as error:
        return Standing(service, None, str(error), State.ABSENT)
    found = Standing(service, None, None, seen.state, seen.found, seen.wanted, seen.contractions)
    try:
        async with open_store(
            url, service, clock=SystemClock(), ids=Uuid7Ids(), metrics=MemoryMetrics(), migrate=False
        ) as store:
            return replace(found, epoch=store.epoch)
    except SchemaMismatch as error:
        return replace(found, problem=str(error))


def _show(found: list[Standing], as_json: bool) -> None:
    if as_json:
        print_json({"stores": [asdict(one) for one in found]})
    else:
        print_columns(
            ("service", "epoch", "state", "schema", "problem"),
            [(one.service, one.epoch, one.state, one.schema, one.problem) for one in found],
        )
        for one in found:
            if one.contractions:
                say(f"{one.service}: {', '.join(one.contractions)} waits for --contract, once no older code runs")
    if any(one.problem for one in found):
        raise SystemExit(WRONG)
