"""`foldbus dlq list|show|redrive|discard`: what was given up, and what to do about it. Opens the store alone."""

from __future__ import annotations

import asyncio
import getpass
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from bus.metrics import MemoryMetrics
from bus.seams import SystemClock, Uuid7Ids
from eventstore.port import DeadLetter, Letter, LetterWhere, Store
from foldbus.cli.letters import (
    SAME_MAX,
    BadFilter,
    Consumer,
    Error,
    Key,
    Since,
    Topic,
    Type,
    UnknownLetter,
    Until,
    check_chosen,
    document,
    edit_of,
    is_id,
    letters_of,
    line_of,
    settled_text,
    where_of,
)
from foldbus.cli.loading import AppArgument, JsonOption, StoreOption, UnusedBus, YesOption, load_service, settings
from foldbus.cli.running import WRONG, finish, store_of
from foldbus.cli.showing import print_columns, print_json, say
from foldbus.redriving import Became, Edit, Pace, Redriver, Result
from foldbus.service import Service
from foldbus.settings import Settings

dlq = typer.Typer(no_args_is_help=True, help="Dead letters.")

IdsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[ID...]", help="As `dlq list` shows them, or beginnings")
]
Everything = Annotated[bool, typer.Option("--everything", help="All open ones: instead of ids and filters")]
Limit = Annotated[int, typer.Option(min=1, help="At most so many, oldest first")]


def add_to(app: typer.Typer) -> None:
    app.add_typer(dlq, name="dlq")


@dlq.command("list")
def list_(
    service: AppArgument,
    consumer: Consumer = None,
    type: Type = None,
    error: Error = None,
    topic: Topic = None,
    key: Key = None,
    since: Since = None,
    until: Until = None,
    all_: Annotated[bool, typer.Option("--all", help="Settled ones as well, before the open ones")] = False,
    limit: Limit = 100,
    store: StoreOption = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """The open dead letters of a service, oldest failure first."""
    where = where_of(consumer, type, error, topic, key, since, until)

    async def run() -> list[Letter]:
        async with store_of(load_service(service), settings(store)) as opened:
            found: list[Letter] = []
            if all_:
                found += await opened.letters.page(where, settled=True, limit=limit + 1)
            return [*found, *await opened.letters.page(where, limit=limit + 1)]

    found = finish(run())
    letters, more = found[:limit], len(found) > limit
    if as_json:
        print_json({"dead_letters": [document(one) for one in letters], "more": more})
        return
    print_columns(
        ("failed at", "consumer", "id", "type", "from", "attempts", "error", *(["settled"] if all_ else [])),
        [(*line_of(one.letter), *([settled_text(one)] if all_ else [])) for one in letters],
    )
    if more:
        say(f"there are more than these {limit}; see --limit")


@dlq.command()
def show(
    service: AppArgument,
    id: Annotated[str, typer.Argument(metavar="ID", help="As `dlq list` shows it, or its beginning")],
    consumer: Consumer = None,
    store: StoreOption = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """Everything about one dead letter, what became of it before included."""

    async def run() -> list[Letter]:
        async with store_of(load_service(service), settings(store)) as opened:
            return await letters_of(opened, id, consumer)

    found = finish(run())
    if as_json:
        print_json({"letters": [document(one) for one in found]})
        return
    for nth, one in enumerate(found):
        if nth:
            print()
        facts = document(one)
        stack, headers = facts.pop("stack"), facts.pop("headers")
        for name, value in facts.items():
            if value is not None:
                print(f"{name}: {json.dumps(value, default=str) if isinstance(value, dict) else value}")
        for header in headers:
            text = header["value"] if header["value"] is not None else f"base64 {header['value_base64']}"
            print(f"header {header['name']}: {text}")
        print(stack.rstrip() if stack else "no stack")


@dlq.command()
def redrive(
    service: AppArgument,
    ids: IdsArgument = None,
    consumer: Consumer = None,
    type: Type = None,
    error: Error = None,
    topic: Topic = None,
    key: Key = None,
    since: Since = None,
    until: Until = None,
    everything: Everything = False,
    limit: Limit = 1000,
    per_second: Annotated[float | None, typer.Option(min=0.001, help="At most so many a second")] = None,
    edit: Annotated[Path | None, typer.Option(help="Another payload, from this file of JSON; for one letter")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Another value; repeat")
    ] = None,
    as_type: Annotated[str | None, typer.Option(help="With --edit: of this type, where the old one is unknown")] = None,
    sagas_too: Annotated[bool, typer.Option("--sagas-too", help="Also commands of sagas, which nobody undoes")] = False,
    yes: YesOption = False,
    store: StoreOption = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """Handles messages after all. Without --yes it only tells what it would do. Exits 1 when it refuses one."""
    where = where_of(consumer, type, error, topic, key, since, until)
    check_chosen(ids, where, everything)
    changed = edit_of(edit, set_ or [], as_type)
    lines, more = finish(
        _redrive(
            load_service(service), settings(store), ids, where, limit, per_second, changed, sagas_too, dry=not yes
        ),
        hint="what was redriven is; run it again for the rest",
    )
    _tell(lines, more, limit, as_json, dry=not yes, what="redrive")


@dlq.command()
def discard(
    service: AppArgument,
    reason: Annotated[str, typer.Option(help="Why nobody will handle it; kept with the letter")],
    ids: IdsArgument = None,
    consumer: Consumer = None,
    type: Type = None,
    error: Error = None,
    topic: Topic = None,
    key: Key = None,
    since: Since = None,
    until: Until = None,
    everything: Everything = False,
    limit: Limit = 1000,
    yes: YesOption = False,
    store: StoreOption = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """Settles letters without handling them. Without --yes it only tells which."""
    where = where_of(consumer, type, error, topic, key, since, until)
    check_chosen(ids, where, everything)
    if not reason.strip():
        raise BadFilter("--reason is empty; wanted why nobody will handle it")
    lines, more = finish(
        _discard(load_service(service), settings(store), ids, where, limit, reason, dry=not yes),
        hint="what was discarded is; run it again for the rest",
    )
    _tell(lines, more, limit, as_json, dry=not yes, what="discard")


# --- doing ------------------------------------------------------------------------------------------------------------

_Line = tuple[DeadLetter | None, str, str, str]
"""Letter (None: nothing is open of that id), id, what happens, and why."""


async def _redrive(
    service: Service,
    chosen: Settings,
    ids: list[str] | None,
    where: LetterWhere,
    limit: int,
    per_second: float | None,
    edit: Edit | None,
    sagas_too: bool,
    *,
    dry: bool,
) -> tuple[list[_Line], bool]:
    async with _redriver(service, chosen) as (store, redriver):
        lines, letters, more = await _choose(store, redriver, ids, where, limit)
        if edit is not None and len(letters) != 1:
            raise BadFilter(f"another payload is for one letter; found {len(letters)}")
        pace = Pace(per_second, clock=SystemClock(), sleep=asyncio.sleep)
        for letter in letters:
            plan = redriver.plan(letter, edit, sagas_too=sagas_too)
            if dry:
                lines.append(
                    (
                        letter,
                        str(letter.id),
                        "would refuse" if plan.refused else "would redrive",
                        plan.refused or plan.note,
                    )
                )
            else:
                await pace.turn()
                lines.append(_done(await redriver.redrive(plan)))
        return lines, more


async def _discard(
    service: Service,
    chosen: Settings,
    ids: list[str] | None,
    where: LetterWhere,
    limit: int,
    reason: str,
    *,
    dry: bool,
) -> tuple[list[_Line], bool]:
    async with _redriver(service, chosen) as (store, redriver):
        lines, letters, more = await _choose(store, redriver, ids, where, limit)
        for letter in letters:
            if dry:
                lines.append((letter, str(letter.id), "would discard", ""))
            else:
                lines.append(_done(await redriver.discard(letter, reason)))
        return lines, more


@asynccontextmanager
async def _redriver(service: Service, chosen: Settings) -> AsyncGenerator[tuple[Store, Redriver]]:
    async with store_of(service, chosen) as store:
        yield (
            store,
            Redriver(
                service, store, clock=SystemClock(), ids=Uuid7Ids(), metrics=MemoryMetrics(), by=getpass.getuser()
            ),
        )


async def _choose(
    store: Store, redriver: Redriver, ids: list[str] | None, where: LetterWhere, limit: int
) -> tuple[list[_Line], list[DeadLetter], bool]:
    """What is wrong with which id, the open letters, and whether there are more of them."""
    if ids:
        wanted: set[UUID] = set()
        for text in ids:
            try:
                meant = (await letters_of(store, text, where.consumer))[0].letter.id
            except UnknownLetter:
                if not is_id(text):
                    raise
                meant = UUID(text)
            wanted.add(meant)
        where = replace(where, ids=frozenset(wanted))
        limit = max(limit, len(ids) * SAME_MAX)
    found = [one.letter async for one in redriver.chosen(where, limit=limit + 1)]
    missing = sorted((where.ids or frozenset[UUID]()) - {one.id for one in found})
    lines: list[_Line] = [(None, str(id), Became.REFUSED.value, await redriver.why_not(id)) for id in missing]
    return lines, found[:limit], len(found) > limit


def _done(result: Result) -> _Line:
    return result.letter, str(result.letter.id), result.became.value, result.why


def _tell(lines: Sequence[_Line], more: bool, limit: int, as_json: bool, *, dry: bool, what: str) -> None:
    if as_json:
        print_json(
            {
                "dry_run": dry,
                "letters": [
                    {
                        "id": id,
                        "consumer": letter and letter.consumer,
                        "type": (letter and letter.type) or None,
                        "what": became,
                        "why": why or None,
                    }
                    for letter, id, became, why in lines
                ],
                "more": more,
            }
        )
    else:
        print_columns(
            ("what", "id", "consumer", "type", "error", "why"),
            [
                (became, id, letter and letter.consumer, letter and letter.type, letter and letter.failure.error, why)
                for letter, id, became, why in lines
            ],
        )
        if not lines:
            say("no open dead letter matches; nothing was changed")
        if dry and lines:
            say(f"nothing was changed; --yes to {what}")
        if more:
            say(f"there are more than these {limit}; see --limit")
    if any(became in (Became.REFUSED, Became.GONE, "would refuse") for _, _, became, _ in lines):
        raise SystemExit(WRONG)
