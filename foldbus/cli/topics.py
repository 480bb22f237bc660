"""`foldbus topics plan|apply|validate`: what services declare against what the broker has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import typer

from bus.errors import MissingTopics, TopicMismatch
from bus.topics import Plan, apply, plan
from bus.transport import TopicAdmin, TopicSpec, TopicState
from foldbus.cli.loading import AppsArgument, BusOption, JsonOption, UnusedStore, load_service, settings
from foldbus.cli.logs import log_to_stderr
from foldbus.cli.running import WRONG, finish, transport_of
from foldbus.cli.showing import print_columns, print_json, say
from foldbus.retention import refusals
from foldbus.service import Service
from foldbus.settings import Settings

topics = typer.Typer(no_args_is_help=True, help="The topics that services declare.")


def add_to(app: typer.Typer) -> None:
    app.add_typer(topics, name="topics")


@topics.command("plan")
def plan_(
    services: AppsArgument, bus: BusOption = None, store: UnusedStore = None, as_json: JsonOption = False
) -> None:
    """Shows what `apply` would create. Exits 0 when nothing would be refused; 1 when a topic is there otherwise than
    declared, or keeps messages for longer than claims are kept."""
    made = finish(_plan(_loaded(services), settings(bus=bus)))
    _show(made, as_json)
    raise SystemExit(WRONG if made.mismatches else 0)


@topics.command("validate")
def validate_(
    services: AppsArgument, bus: BusOption = None, store: UnusedStore = None, as_json: JsonOption = False
) -> None:
    """Exits 0 when there is nothing to do; 1 when a topic is missing or `plan` names a refusal. A topic of others that
    is missing is waited for, not refused."""
    made = finish(_plan(_loaded(services), settings(bus=bus)))
    _show(made, as_json)
    if made.create and not as_json:
        say(f"foldbus: {MissingTopics([spec.name for spec in made.create])}")
    raise SystemExit(WRONG if made.mismatches or made.create else 0)


@topics.command("apply")
def apply_(
    services: AppsArgument, bus: BusOption = None, store: UnusedStore = None, as_json: JsonOption = False
) -> None:
    """Creates what is missing, changes nothing that exists. Exits 0 when all is there; 1, creating nothing, on any
    refusal that `plan` names."""
    log_to_stderr(quiet=True)
    found, chosen = _loaded(services), settings(bus=bus)

    async def run() -> Plan:
        async with transport_of(chosen) as transport:
            made = await _look(found, transport.admin)
            return made if made.mismatches else await apply(transport.admin, *_declared(found))

    made = finish(run())
    if made.mismatches:
        say(f"foldbus: {TopicMismatch('; '.join(made.mismatches))}")
        raise SystemExit(WRONG)
    _show(made, as_json)


async def _plan(services: Sequence[Service], chosen: Settings) -> Plan:
    async with transport_of(chosen) as transport:
        return await _look(services, transport.admin)


async def _look(services: Sequence[Service], admin: TopicAdmin) -> Plan:
    """What is there beside what is declared; and, of topics that are there or would be made, whether claims outlive
    their messages."""
    specs, foreign = _declared(services)
    existing = await admin.describe([spec.name for spec in (*specs, *foreign)])
    made = plan(specs, existing, foreign=foreign)
    short: list[str] = []
    for service in services:
        found: dict[str, TopicState | TopicSpec] = {spec.name: spec for spec in made.create}
        found.update(existing)
        more = {topic for group in service.keep.groups for topic in service.groups[group]} - found.keys()
        found.update(await admin.describe(sorted(more)))
        short += refusals(service.keep, service.groups, found)
    return replace(made, mismatches=(*made.mismatches, *short))


def _loaded(services: list[str]) -> Sequence[Service]:
    return [load_service(name) for name in services]


def _declared(services: Sequence[Service]) -> tuple[Sequence[TopicSpec], Sequence[TopicSpec]]:
    """Their own topics, and what they expect of others'."""
    own = [spec for service in services for spec in service.topics]
    return own, [spec for service in services for spec in service.expected_topics]


def _show(made: Plan, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "create": [asdict(spec) for spec in made.create],
                "mismatches": list(made.mismatches),
                "absent": list(made.absent),
            }
        )
        return
    print_columns(
        ("create", "partitions", "retention_s", "compact", "max_bytes"),
        [(spec.name, spec.partitions, spec.retention_s, spec.compact, spec.max_bytes) for spec in made.create],
    )
    for line in made.mismatches:
        print(f"differs: {line}")
    for name in made.absent:
        print(f"absent: {name}; its owner makes it, until then it is waited for")
    if not (made.create or made.mismatches or made.absent):
        say("all topics are as declared")
