"""`foldbus flow list|pause|resume|seek|log`: groups that stand still, and where they read on. Needs no worker."""

from __future__ import annotations

import getpass
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from eventstore.flow import Act
from eventstore.port import Store
from foldbus.cli.loading import (
    AppArgument,
    BusOption,
    JsonOption,
    StoreOption,
    UnusedBus,
    YesOption,
    load_service,
    settings,
)
from foldbus.cli.running import WRONG, attached, finish, store_of
from foldbus.cli.showing import print_columns, print_json, say
from foldbus.flow import (
    BadPlace,
    GroupFlow,
    Move,
    NotPaused,
    groups_of,
    known_group,
    place,
    place_projection,
    plan_moves,
    plan_projection,
)
from foldbus.service import Service
from foldbus.settings import Settings

flow = typer.Typer(no_args_is_help=True, help="Pausing consumer groups, and where they read on.")

_PROJECTION = "projection:"

GroupArgument = Annotated[str, typer.Argument(metavar="GROUP", help="As `flow list` shows it")]
GroupsArgument = Annotated[list[str] | None, typer.Argument(metavar="[GROUP]...", help="As `flow list` shows them")]
AllOption = Annotated[bool, typer.Option("--all", help="Every group of the service")]
ReasonOption = Annotated[str, typer.Option(help="Why; kept, and shown to whoever asks")]


def add_to(app: typer.Typer) -> None:
    app.add_typer(flow, name="flow")


@flow.command("list")
def list_(
    service: AppArgument,
    group: Annotated[str | None, typer.Argument(metavar="[GROUP]")] = None,
    store: StoreOption = None,
    bus: BusOption = None,
    as_json: JsonOption = False,
) -> None:
    """The consumer groups of a service: who reads, and which are paused."""
    loaded = load_service(service)
    if group is not None:
        known_group(loaded, group)

    async def run(chosen: Settings) -> Sequence[GroupFlow]:
        async with attached(loaded, chosen) as connection:
            return [one for one in await groups_of(connection) if group in (None, one.group)]

    found = finish(run(settings(store, bus)))
    if as_json:
        print_json({"groups": [asdict(one) | {"state": _state(one)} for one in found]})
        return
    print_columns(
        ("group", "state", "members", "topics", "paused at", "by", "reason"),
        [(one.group, _state(one), one.members, one.topics, one.pause and one.pause.at, *_who(one)) for one in found],
    )


@flow.command()
def pause(
    service: AppArgument,
    groups: GroupsArgument = None,
    all_: AllOption = False,
    reason: ReasonOption = "",
    store: StoreOption = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """Workers finish what they have of these groups and leave them until `resume`, also after a restart. They notice
    within a second. Exits 0 also when it was so already."""
    _switch(
        service, groups, all_, store, as_json, "paused", lambda to, one: to.flow.pause(one, by=_by(), reason=reason)
    )


@flow.command()
def resume(
    service: AppArgument,
    groups: GroupsArgument = None,
    all_: AllOption = False,
    reason: ReasonOption = "",
    store: StoreOption = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """Workers take these groups up again where they stood."""
    _switch(
        service, groups, all_, store, as_json, "running", lambda to, one: to.flow.resume(one, by=_by(), reason=reason)
    )


@flow.command()
def seek(
    service: AppArgument,
    group: Annotated[str, typer.Argument(metavar="GROUP", help="A group, or projection:NAME")],
    to: Annotated[str, typer.Option(help="An offset, beginning, end, or a time as 2026-05-01T12:00:00Z")],
    topic: Annotated[str | None, typer.Option(help="May be left out where the group reads one topic")] = None,
    partition: Annotated[list[int] | None, typer.Option(help="Repeat for several; none: all of the topic")] = None,
    reason: ReasonOption = "",
    yes: YesOption = False,
    store: StoreOption = None,
    bus: BusOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sets where a group reads on. Without --yes it only tells what would be skipped and read again. Exits 1 when it
    refuses: while the group has members and is not paused, or for a place that the topic does not have."""
    loaded = load_service(service)
    name = group.removeprefix(_PROJECTION) if group.startswith(_PROJECTION) else None

    async def run(chosen: Settings) -> tuple[Sequence[Move], str]:
        async with attached(loaded, chosen) as connection:
            try:
                if name is not None:
                    moves = await plan_projection(connection, name, topic, partition, to)
                    if yes:
                        await place_projection(connection, name, moves)
                    return moves, ""
                moves = await plan_moves(connection, group, topic, partition, to)
            except BadPlace as error:
                return (), str(error)
            try:
                if yes:
                    await place(connection, group, moves, by=_by(), reason=reason)
                elif (
                    await connection.transport.admin.members(group)
                    and group not in await connection.store.flow.paused()
                ):
                    say(f"foldbus: group {group} has members and is not paused: --yes would be refused")
            except (NotPaused, BadPlace) as error:
                return moves, str(error)
            return moves, ""

    moves, refused = finish(run(settings(store, bus)))
    _show_moves(moves, as_json, done=yes and not refused, refused=refused)
    if refused:
        raise SystemExit(WRONG)


@flow.command("log")
def log_(
    service: AppArgument,
    limit: Annotated[int, typer.Option(min=1)] = 50,
    store: StoreOption = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """What was done to groups, the youngest first."""

    async def run() -> Sequence[Act]:
        async with store_of(load_service(service), settings(store)) as opened:
            return await opened.flow.acts(limit=limit)

    found = finish(run())
    if as_json:
        print_json({"acts": [asdict(one) for one in found]})
        return
    print_columns(
        ("at", "group", "what", "by", "reason"), [(one.at, one.group, one.what, one.by, one.reason) for one in found]
    )


# --- doing ------------------------------------------------------------------------------------------------------------


class NoGroups(BadPlace):
    """Neither groups nor --all were named."""


def _switch(
    service: str,
    groups: list[str] | None,
    everything: bool,
    store: str | None,
    as_json: bool,
    state: str,
    verb: Callable[[Store, str], Awaitable[bool]],
) -> None:
    loaded = load_service(service)
    if bool(groups) is everything:
        raise NoGroups(f"wanted groups or --all; {loaded.name} has {', '.join(loaded.groups) or 'none'}")
    chosen = list(dict.fromkeys(groups or loaded.groups))
    for group in chosen:
        known_group(loaded, group)

    async def run(loaded: Service, given: Settings) -> dict[str, bool]:
        async with store_of(loaded, given) as opened:
            return {group: await verb(opened, group) for group in chosen}

    changed = finish(run(loaded, settings(store)), hint="those named first may have been changed")
    if as_json:
        print_json({"groups": [{"group": group, "state": state, "changed": new} for group, new in changed.items()]})
        return
    print_columns(
        ("group", "state", ""), [(group, state, "" if new else "as before") for group, new in changed.items()]
    )


def _show_moves(moves: Sequence[Move], as_json: bool, *, done: bool, refused: str) -> None:
    if as_json:
        document = [asdict(one) | {"lost": one.lost, "skipped": one.skipped, "again": one.again} for one in moves]
        print_json({"moves": document, "done": done, "refused": refused or None})
        return
    print_columns(
        ("topic", "partition", "at", "held", "to", "lost", "skipped", "read again"),
        [
            (one.topic, one.partition, one.at, f"{one.first} to {one.end}", one.to, one.lost, one.skipped, one.again)
            for one in moves
        ],
    )
    if refused:
        say(f"foldbus: {refused}")
    elif not done:
        say("nothing was changed; --yes to do it")


def _state(one: GroupFlow) -> str:
    if one.pause is None:
        return "running" if one.members else "no members"
    return "pausing" if one.members else "paused"


def _who(one: GroupFlow) -> tuple[str, str]:
    return ("", "") if one.pause is None else (one.pause.by, one.pause.reason)


def _by() -> str:
    return getpass.getuser()
