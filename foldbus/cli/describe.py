"""`foldbus describe`: what a service is made of, from its table alone; no database, no broker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from bus.messages import Command
from foldbus.cli.loading import AppArgument, JsonOption, UnusedBus, UnusedStore, load_service
from foldbus.cli.showing import print_columns, print_json
from foldbus.service import Service
from foldbus.views import all_projections
from sagas import saga_group


def add_to(app: typer.Typer) -> None:
    app.command("describe")(describe)


def describe(
    service: AppArgument, store: UnusedStore = None, bus: UnusedBus = None, as_json: JsonOption = False
) -> None:
    """Topics, groups, deciders, sagas and projections of a service. Works without database and broker; the JSON is
    made to be kept and compared."""
    found = document(load_service(service))
    if as_json:
        print_json(found)
    else:
        _show(found)


def document(service: Service) -> dict[str, Any]:
    """The service as JSON, in a stable order."""
    return {
        "service": service.name,
        "topics": [
            {
                "name": spec.name, "partitions": spec.partitions, "retention_s": spec.retention_s,
                "max_bytes": spec.max_bytes,
            }
            for spec in service.topics
        ],
        "foreign_topics": list(service.foreign_topics),
        "groups": [
            {"name": name, "topics": list(topics), "policy": service.policy(name)}
            for name, topics in service.groups.items()
        ],
        "deciders": [
            {
                "category": one.category,
                "commands": _commands(one.commands),
                "events": [
                    {"type": str(event.type_name), "key": event.key_field, "public": event.public}
                    for event in one.events
                ],
            }
            for one in service.deciders
        ],
        "handlers": [
            {
                "name": one.name,
                "effect": one.effect,
                "delivery": str(one.delivery),
                "commands": _commands(one.commands),
                "events": [
                    {"type": str(event.type_name), "key": event.key_field, "topic": service.topic_of(event)}
                    for event in one.events
                ],
            }
            for one in service.handlers
        ],
        "sagas": [
            {
                "name": one.name, "version": one.version, "starts_on": str(one.start.type_name),
                "group": saga_group(service.name, one.name),
            }
            for one in service.sagas
        ],
        "projections": [
            {
                "name": one.name,
                "version": one.version,
                "view": one.view,
                "columns": list(one.row.model_fields),
                "sources": {
                    source: sorted(str(event.type_name) for event in events)
                    for source, events in sorted(one.sources(service.name).items())
                },
            }
            for one in all_projections(service)
        ],
        "upcasters": [
            {"type": source, "read_as": list(targets)}
            for source, targets in service.registry.upcasting.table.items()
        ],
    }  # fmt: skip


def _commands(taken: Sequence[type[Command[Any]]]) -> list[dict[str, Any]]:
    return [
        {"type": str(command.type_name), "key": command.key_field, "reply": _name(command.reply_type())}
        for command in taken
    ]


def _name(reply: Any) -> str | None:
    if reply is None:
        return None
    return str(reply.type_name) if hasattr(reply, "type_name") else str(getattr(reply, "__name__", reply))


def _show(found: dict[str, Any]) -> None:
    print(f"service {found['service']}\n")
    print_columns(("topic", "partitions", "retention_s", "max_bytes"), [tuple(one.values()) for one in found["topics"]])
    print()
    print_columns(
        ("group", "reads", "policy"), [(one["name"], one["topics"], one["policy"]) for one in found["groups"]]
    )
    for decider in found["deciders"]:
        print(f"\ndecider {decider['category']}")
        _show_commands(decider["commands"])
        for event in decider["events"]:
            print(f"  {'publishes' if event['public'] else 'keeps'} {event['type']}")
    for one in found["handlers"]:
        print(f"\nhandler {one['name']}, {'an effect' if one['effect'] else one['delivery']}")
        _show_commands(one["commands"])
        for event in one["events"]:
            print(f"  reads {event['topic']}: {event['type']}")
    for saga in found["sagas"]:
        print(f"\nsaga {saga['name']} v{saga['version']}\n  starts on {saga['starts_on']}")
    for one in found["projections"]:
        print(f"\nprojection {one['name']} v{one['version']}, view {one['view']} ({', '.join(one['columns'])})")
        for source, types in one["sources"].items():
            print(f"  reads {'the own log' if source == 'log' else source}: {', '.join(types)}")
    for one in found["upcasters"]:
        print(f"\nreads {one['type']} as {', '.join(one['read_as']) or 'nothing'}")
    if found["foreign_topics"]:
        print(f"\nneeds from others: {', '.join(found['foreign_topics'])}")


def _show_commands(commands: Sequence[dict[str, Any]]) -> None:
    for command in commands:
        print(f"  takes {command['type']}, answers {command['reply'] or 'nothing'}")
