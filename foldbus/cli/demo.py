"""`foldbus demo`: the shop example, from anywhere."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from foldbus.cli.loading import BusOption, CannotLoad, JsonOption, StoreOption, settings
from foldbus.cli.logs import log_to_stderr
from foldbus.process import tune
from foldbus.progress import Progress


def add_to(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    everything: Annotated[bool, typer.Option("--all", help="All 69,659 purchases, not the first 1,000")] = False,
    purchases: Annotated[Path | None, typer.Option(help="Another CSV file of the same shape")] = None,
    limit: Annotated[int, typer.Option(help="How many purchases", min=1)] = 1000,
    crash: Annotated[bool, typer.Option("--crash", help="Workers as processes, killed again and again")] = False,
    seed: Annotated[int | None, typer.Option(help="Which moments to kill at")] = None,
    store: StoreOption = None,
    bus: BusOption = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            help="Where embedded backends live, whatever the environment says (.foldbus/demo); "
            "what an earlier demo left there is removed"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """A shop takes real purchases: commands, events, a saga that undoes itself, a read model, its rebuild."""
    log_to_stderr(quiet=True)
    tune()
    shop = _shop()
    options: dict[str, Any] = {"purchases": purchases} if purchases else {}
    said = settings(store, bus)
    if directory is not None:
        options["directory"] = directory
    else:
        store = said.store if "store" in said.model_fields_set else None
        bus = said.bus if "bus" in said.model_fields_set else None
    report = asyncio.run(
        shop.run(
            shop.Options(
                limit=None if everything else limit, store=store, bus=bus, crash=crash, seed=seed, **options
            ),
            Progress(),
        )
    )  # fmt: skip
    if as_json:
        shown = dataclasses.asdict(report) | {"ok": report.ok, "per_second": report.per_second}
        print(json.dumps(shown, default=str))
    else:
        _show(report)
    if not report.ok:
        raise SystemExit(1)


def _shop() -> Any:
    """The example lies in the source tree's `examples`, or inside this package when it was installed."""
    package = Path(__file__).resolve().parent.parent
    for home in (package / "_examples", package.parent / "examples"):
        if (home / "shop" / "demo.py").exists():
            if str(home) not in sys.path:
                sys.path.insert(0, str(home))
            return importlib.import_module("shop.demo")
    raise CannotLoad("the shop example is not in this installation")


def _show(report: Any) -> None:
    console = Console()
    table = Table(
        title=f"{report.expected.placed} purchases in {report.seconds:.1f} s ({report.per_second:.0f}/s)\n"
        f"on {report.store} and {report.bus}"
    )
    table.add_column("")
    table.add_column("the shop", justify="right")
    table.add_column("a plain pass over the file", justify="right")
    table.add_column("")
    for field in dataclasses.fields(report.expected):
        found, wanted = getattr(report.shop, field.name), getattr(report.expected, field.name)
        mark = "[green]✓[/]" if found == wanted else "[red]✗[/]"
        table.add_row(field.name.replace("_", " "), f"{found:,}", f"{wanted:,}", mark)
    console.print(table)
    if report.kills:
        console.print(f"workers were killed {report.kills} times (seed {report.seed})")
    for row in report.bad_rows[:20]:
        console.print(f"line {row.line}: {row.reason}; skipped", markup=False)
    if report.bad_rows:
        console.print(f"{len(report.bad_rows)} bad rows skipped")
    if report.undone:
        console.print("\nOne order that was undone:")
        for line in report.undone:
            console.print("  " + line, markup=False, highlight=False)
    for title, differing in (("insights", report.differing), ("rebuilt insights", report.differing_rebuilt)):
        console.print(f"\n{title}: " + ("equal the plain pass, row by row" if not differing else "DIFFER"))
        for line in differing[:10]:
            console.print("  " + line, markup=False, highlight=False)
