"""`foldbus schema write|check`: the messages of services in a file of the repository, and what a change breaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from foldbus.cli.loading import AppsArgument, JsonOption, UnusedBus, UnusedStore, load_service
from foldbus.cli.running import WRONG
from foldbus.cli.showing import print_json, say
from foldbus.schema import FILE, BadSchema, Change, Document, compare, document, load, save

schema = typer.Typer(no_args_is_help=True, help="What messages look like, and what a change of them breaks.")

FileOption = Annotated[
    Path, typer.Option("--file", metavar="PATH", help="The schema file, committed in the repository")
]
AcceptOption = Annotated[
    bool, typer.Option("--accept-breaking", help="Write breaking changes, too: nothing stored or sent is of that form")
]


def add_to(app: typer.Typer) -> None:
    app.add_typer(schema, name="schema")


@schema.command("check")
def check_(
    services: AppsArgument,
    file: FileOption = Path(FILE),
    store: UnusedStore = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """Compares the code with the file. Exits 1 on a breaking change, and says whom it breaks and the way out. Other
    changes are told; `foldbus schema write` records them."""
    kept = load(file)
    found: dict[str, list[Change]] = {}
    stale: list[str] = []
    for name, now in _documents(services).items():
        if name not in kept:
            raise BadSchema(f"{file} says nothing of service {name!r}; `foldbus schema write` adds it")
        found[name] = compare(kept[name], now, service=name)
        if now != kept[name]:
            stale.append(name)
    _show(found, as_json)
    if not as_json and stale and not _breaking(found):
        say(f"nothing breaks; record it with `foldbus schema write {' '.join(services)} --file {file}`")
    elif not as_json and not stale:
        say(f"{file} is as the code is")
    raise SystemExit(WRONG if _breaking(found) else 0)


@schema.command("write")
def write_(
    services: AppsArgument,
    file: FileOption = Path(FILE),
    accept_breaking: AcceptOption = False,
    store: UnusedStore = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """Records the code's messages; services that are not named stay as they are in the file. Exits 1, writing nothing,
    on a breaking change, unless it is accepted."""
    kept: dict[str, Document] = load(file) if file.exists() else {}
    made = _documents(services)
    found = {name: compare(kept[name], now, service=name) for name, now in made.items() if name in kept}
    _show(found, as_json)
    if _breaking(found) and not accept_breaking:
        say(f"{file} stays as it is; --accept-breaking writes it all the same")
        raise SystemExit(WRONG)
    save(file, {**kept, **made})
    say(f"{file} holds {', '.join(made)}")


def _documents(services: Sequence[str]) -> dict[str, dict[str, Any]]:
    loaded = [load_service(name) for name in services]
    return {service.name: document(service) for service in loaded}


def _breaking(found: Mapping[str, Sequence[Change]]) -> bool:
    return any(change.level == "breaking" for changes in found.values() for change in changes)


def _show(found: Mapping[str, Sequence[Change]], as_json: bool) -> None:
    if as_json:
        told = [{"service": name, **asdict(change)} for name, each in found.items() for change in each]
        print_json({"breaking": _breaking(found), "changes": told})
        return
    for changes in found.values():
        for change in changes:
            field = f" {change.field}" if change.field else ""
            print(f"{change.level}: {change.type}{field}: was {change.was}, is {change.now}")
            print(f"  why: {change.why}")
            if change.way_out:
                print(f"  way out: {change.way_out}")
