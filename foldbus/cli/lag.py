"""`foldbus lag`: how far a service is behind, and how much it gave up."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from foldbus.cli.loading import AppArgument, BusOption, JsonOption, StoreOption, load_service, settings
from foldbus.cli.running import attached, finish
from foldbus.cli.showing import print_columns, print_json, say
from foldbus.lag import Lag, measure
from foldbus.service import Service
from foldbus.settings import Settings


def add_to(app: typer.Typer) -> None:
    app.command("lag")(lag)


def lag(
    service: AppArgument,
    store: StoreOption = None,
    bus: BusOption = None,
    everything: Annotated[bool, typer.Option("--all", help="Also partitions that are not behind")] = False,
    as_json: JsonOption = False,
) -> None:
    """Whether a worker runs; groups, relay, read models, sagas, timers and dead letters. Needs none to run."""
    found = finish(_measure(load_service(service), settings(store, bus)))
    if as_json:
        print_json(asdict(found))
    else:
        _show(found, everything)


async def _measure(service: Service, chosen: Settings) -> Lag:
    async with attached(service, chosen) as connection:
        return await measure(connection)


def _show(found: Lag, everything: bool) -> None:
    for topic in found.missing_topics:
        say(f"foldbus: topic {topic} does not exist")
    print_columns(
        ("group", "topic", "partition", "committed", "end", "behind"),
        [
            (one.group, one.topic, one.partition, one.committed, one.end, one.behind)
            for one in found.groups
            if everything or one.behind
        ],
    )
    relay, timers = found.relay, found.timers
    oldest = "" if relay.oldest_s is None else f", the oldest {relay.oldest_s:.1f} s"
    late = f"next due {timers.next_due.isoformat()}" if timers.next_due else "none"
    if timers.overdue_s:
        late += f", overdue by {timers.overdue_s:.1f} s"
    lines: list[tuple[object, ...]] = [
        ("worker", "one leads" if found.worker else "none leads: is one running (foldbus run)?"),
        ("groups", f"{sum(one.behind for one in found.groups)} behind"),
        *((f"group {group}", f"waits for topic {', '.join(topics)}") for group, topics in found.waiting_groups.items()),
        *((f"group {one.group}", f"paused by {one.by} since {one.at.isoformat()}") for one in found.paused.values()),
        ("relay", f"{_count(relay.waiting, relay.waiting_more)} not published{oldest}"),
    ]
    for one in found.projections:
        where = f"generation {one.generation} v{one.version}" if one.generation else "not started"
        building = ", the next one is being built" if one.building else ""
        waits = f"; waits for topic {', '.join(one.missing_topics)}" if one.missing_topics else ""
        lines.append((f"projection {one.name}", f"{one.behind} behind, {where}{building}{waits}"))
    if found.sagas is not None:
        lines.append(("sagas", f"{found.sagas.parked} parked, {found.sagas.undoing} undoing"))
    for consumer, its in found.parked.items():
        oldest = "" if its.oldest_s is None else f", the oldest for {its.oldest_s:.1f} s"
        keys = _count(its.keys, its.more)
        lines.append((f"parked {consumer}", f"{keys} keys, {its.held} held; {its.messages} messages wait{oldest}"))
    lines += [("timers", late), ("dead letters", _count(found.dead_letters, found.dead_letters_more))]
    print_columns(("", "state"), lines)


def _count(n: int, more: bool) -> str:
    return f"{n} or more" if more else str(n)
