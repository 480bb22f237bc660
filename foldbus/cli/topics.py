"""`foldbus topics plan|apply|validate`: what services declare against what the broker has."""

from __future__ import annotations

from dataclasses import asdict

import typer

from bus.errors import MissingTopics, TopicMismatch
from bus.topics import Plan, apply, plan
from bus.transport import TopicSpec
from foldbus.cli.loading import AppsArgument, BusOption, JsonOption, UnusedStore, load_service, settings
from foldbus.cli.logs import log_to_stderr
from foldbus.cli.running import WRONG, finish, transport_of
from foldbus.cli.showing import print_columns, print_json, say
from foldbus.settings import Settings

topics = typer.Typer(no_args_is_help=True, help="The topics that services declare.")


def add_to(app: typer.Typer) -> None:
    app.add_typer(topics, name="topics")


@topics.command("plan")
def plan_(
    services: AppsArgument, bus: BusOption = None, store: UnusedStore = None, as_json: JsonOption = False
) -> None:
    """Shows what `apply` would create. Exits 1 when a topic is there otherwise than declared."""
    made = finish(_plan(_declared(services), settings(bus=bus)))
    _show(made, as_json)
    raise SystemExit(WRONG if made.mismatches else 0)


@topics.command("validate")
def validate_(
    services: AppsArgument, bus: BusOption = None, store: UnusedStore = None, as_json: JsonOption = False
) -> None:
    """Exits 1 when a topic is missing or there otherwise than declared."""
    made = finish(_plan(_declared(services), settings(bus=bus)))
    _show(made, as_json)
    if made.create and not as_json:
        say(f"foldbus: {MissingTopics([spec.name for spec in made.create])}")
    raise SystemExit(WRONG if made.mismatches or made.create else 0)


@topics.command("apply")
def apply_(
    services: AppsArgument, bus: BusOption = None, store: UnusedStore = None, as_json: JsonOption = False
) -> None:
    """Creates what is missing, changes nothing that exists. Exits 1, creating nothing, on any difference."""
    log_to_stderr(quiet=True)
    specs = _declared(services)

    async def run() -> Plan:
        async with transport_of(settings(bus=bus)) as transport:
            return await apply(transport.admin, specs)

    try:
        made = finish(run())
    except TopicMismatch as error:
        say(f"foldbus: {error}")
        raise SystemExit(WRONG) from None
    _show(made, as_json)


async def _plan(specs: list[TopicSpec], chosen: Settings) -> Plan:
    async with transport_of(chosen) as transport:
        return plan(specs, await transport.admin.describe([spec.name for spec in specs]))


def _declared(services: list[str]) -> list[TopicSpec]:
    return [spec for name in services for spec in load_service(name).topics]


def _show(made: Plan, as_json: bool) -> None:
    if as_json:
        print_json({"create": [asdict(spec) for spec in made.create], "mismatches": list(made.mismatches)})
        return
    print_columns(
        ("create", "partitions", "retention_s", "max_bytes"),
        [(spec.name, spec.partitions, spec.retention_s, spec.max_bytes) for spec in made.create],
    )
    for line in made.mismatches:
        print(f"differs: {line}")
    if not made.create and not made.mismatches:
        say("all topics are as declared")
