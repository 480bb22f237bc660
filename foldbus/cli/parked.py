"""`foldbus parked list|show|retry|discard`: keys that wait in the database, and what to do about them. Opens the store
alone."""

from __future__ import annotations

import asyncio
import getpass
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from bus.metrics import MemoryMetrics
from bus.seams import SystemClock, Uuid7Ids
from eventstore.parking import Parked, ParkedKey
from eventstore.port import Store
from foldbus.cli.letters import BadFilter, bytes_as_text, edit_of
from foldbus.cli.loading import AppArgument, JsonOption, StoreOption, UnusedBus, YesOption, load_service, settings
from foldbus.cli.running import WRONG, finish, store_of
from foldbus.cli.showing import print_columns, print_json, say
from foldbus.parked import ParkedBecame, ParkedKeys, ParkedResult, ParkedWhere
from foldbus.redriving import Edit, Pace
from foldbus.service import Service
from foldbus.settings import Settings

parked = typer.Typer(no_args_is_help=True, help="Parked keys.")

KeysArgument = Annotated[list[str] | None, typer.Argument(metavar="[KEY...]", help="As `parked list` shows them")]
Consumer = Annotated[str | None, typer.Option(help="Only keys of this consumer")]
Type = Annotated[str | None, typer.Option(help="Only where the head is of this type; ends in * for all that begin so")]
Error = Annotated[str | None, typer.Option(help="Only where the head failed with this class of error; may end in *")]
Held = Annotated[bool, typer.Option("--held", help="Only those that wait for somebody to decide")]
Everything = Annotated[bool, typer.Option("--everything", help="All of them: instead of keys and filters")]
Limit = Annotated[int, typer.Option(min=1, help="At most so many")]
PerSecond = Annotated[float | None, typer.Option(min=0.001, help="At most so many a second")]


def add_to(app: typer.Typer) -> None:
    app.add_typer(parked, name="parked")


@parked.command("list")
def list_(
    service: AppArgument,
    consumer: Consumer = None,
    type: Type = None,
    error: Error = None,
    held: Held = False,
    limit: Limit = 100,
    store: StoreOption = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """The parked keys of a service, with what is at their heads."""
    where = ParkedWhere(consumer, None, type, error, held)
    chosen = settings(store)

    async def run() -> list[ParkedKey]:
        async with _keys(load_service(service), chosen) as (_, keys):
            return [one async for one in keys.chosen(where, limit=limit + 1)]

    found = finish(run())
    shown, more = found[:limit], len(found) > limit
    if as_json:
        print_json({"parked": [_document(one) for one in shown], "more": more})
        return
    print_columns(
        ("since", "consumer", "key", "waiting", "next try", "type", "attempts", "error"),
        [_line(one) for one in shown],
    )
    if more:
        say(f"there are more than these {limit}; see --limit")


@parked.command()
def show(
    service: AppArgument,
    key: Annotated[str, typer.Argument(metavar="KEY", help="As `parked list` shows it")],
    consumer: Consumer = None,
    limit: Annotated[int, typer.Option(min=1, help="So many messages of the queue, from its head")] = 20,
    store: StoreOption = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """Everything about one key: its head, why it failed, and who waits behind it. Exits 1 when it is not parked."""
    where = ParkedWhere(consumer, frozenset([key]))
    chosen = settings(store)

    async def run() -> list[tuple[ParkedKey, Sequence[Parked]]]:
        async with _keys(load_service(service), chosen) as (opened, keys):
            found = [one async for one in keys.chosen(where, limit=50)]
            return [(one, await opened.parking.queue(one.consumer, one.key, limit=limit)) for one in found]

    found = finish(run())
    if as_json:
        print_json({"keys": [{**_document(one), "queue": list(map(_message, queue))} for one, queue in found]})
    elif not found:
        say(f"key {key!r} is not parked")
    for nth, (one, queue) in enumerate(() if as_json else found):
        if nth:
            print()
        facts = _document(one)
        head = facts.pop("head")
        stack = head.pop("stack")
        for name, value in (*facts.items(), *((f"head {name}", value) for name, value in head.items())):
            if value is not None:
                print(f"{name}: {json.dumps(value, default=str) if isinstance(value, dict | list) else value}")
        print(stack.rstrip() if stack else "no stack")
        for message in queue[1:]:
            print(f"behind it: {message.message.envelope.type} {message.message.envelope.id}")
    if not found:
        raise SystemExit(WRONG)


@parked.command()
def retry(
    service: AppArgument,
    keys: KeysArgument = None,
    consumer: Consumer = None,
    type: Type = None,
    error: Error = None,
    held: Held = False,
    everything: Everything = False,
    limit: Limit = 1000,
    per_second: PerSecond = None,
    yes: YesOption = False,
    store: StoreOption = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """Has the heads tried now, held or not. Without --yes it only tells which."""
    where = _where(keys, consumer, type, error, held, everything)
    lines, more = finish(
        _each(
            load_service(service), settings(store), where, limit, per_second, ParkedKeys.retry,
            None if yes else _would("retry"),
        ),
        hint="what was woken is; run it again for the rest",
    )  # fmt: skip
    _tell(lines, more, limit, as_json, dry=not yes, what="retry", wanted=where)


@parked.command()
def discard(
    service: AppArgument,
    reason: Annotated[str, typer.Option(help="Why nobody will handle it; kept with the dead letter")],
    keys: KeysArgument = None,
    consumer: Consumer = None,
    type: Type = None,
    error: Error = None,
    held: Held = False,
    everything: Everything = False,
    limit: Limit = 1000,
    per_second: PerSecond = None,
    edit: Annotated[Path | None, typer.Option(help="Another payload in its place, from this file of JSON")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Another value; repeat")
    ] = None,
    as_type: Annotated[str | None, typer.Option(help="With --edit: of this type")] = None,
    sagas_too: Annotated[bool, typer.Option("--sagas-too", help="Replace also commands of sagas")] = False,
    yes: YesOption = False,
    store: StoreOption = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """Makes dead letters of the heads, or replaces one by another message. Without --yes it only tells which."""
    where = _where(keys, consumer, type, error, held, everything)
    if not reason.strip():
        raise BadFilter("--reason is empty; wanted why nobody will handle it")
    changed = edit_of(edit, set_ or [], as_type)

    async def discard(parked: ParkedKeys, one: ParkedKey) -> ParkedResult:
        return await parked.discard(one, reason, changed, sagas_too=sagas_too)

    def would(parked: ParkedKeys, one: ParkedKey) -> tuple[str, str]:
        why = parked.refused(one, changed, sagas_too=sagas_too)
        return ("would refuse", why) if why else ("would discard" if changed is None else "would replace", "")

    lines, more = finish(
        _each(
            load_service(service), settings(store), where, limit, per_second, discard, None if yes else would,
            edit=changed,
        ),
        hint="what was discarded is; run it again for the rest",
    )  # fmt: skip
    _tell(lines, more, limit, as_json, dry=not yes, what="discard", wanted=where)


# --- doing ------------------------------------------------------------------------------------------------------------

_Line = tuple[ParkedKey, str, str]
"""The key as it was seen, what happens, and why."""
_Would = Callable[[ParkedKeys, ParkedKey], tuple[str, str]]


async def _each(
    service: Service,
    chosen: Settings,
    where: ParkedWhere,
    limit: int,
    per_second: float | None,
    do: Callable[[ParkedKeys, ParkedKey], Coroutine[Any, Any, ParkedResult]],
    would: _Would | None,
    *,
    edit: Edit | None = None,
) -> tuple[list[_Line], bool]:
    async with _keys(service, chosen) as (_, keys):
        found = [one async for one in keys.chosen(where, limit=limit + 1)]
        if edit is not None and len(found) != 1:
            raise BadFilter(f"another payload is for one message; found {len(found)}")
        lines: list[_Line] = []
        pace = Pace(per_second, clock=SystemClock(), sleep=asyncio.sleep)
        for one in found[:limit]:
            if would is not None:
                lines.append((one, *would(keys, one)))
                continue
            await pace.turn()
            result = await do(keys, one)
            lines.append((one, result.became.value, result.why))
        return lines, len(found) > limit


def _would(what: str) -> _Would:
    return lambda keys, one: (f"would {what}", "")


@asynccontextmanager
async def _keys(service: Service, chosen: Settings) -> AsyncGenerator[tuple[Store, ParkedKeys]]:
    async with store_of(service, chosen) as store:
        yield (
            store,
            ParkedKeys(
                service, store, clock=SystemClock(), ids=Uuid7Ids(), metrics=MemoryMetrics(), by=getpass.getuser()
            ),
        )


def _where(
    keys: list[str] | None, consumer: str | None, type: str | None, error: str | None, held: bool, everything: bool
) -> ParkedWhere:
    where = ParkedWhere(consumer, frozenset(keys) if keys else None, type, error, held)
    given = where != ParkedWhere()
    if given is everything:
        raise BadFilter("wanted keys or filters, or --everything" + ("; found both" if given else ""))
    return where


# --- showing ----------------------------------------------------------------------------------------------------------


def _line(one: ParkedKey) -> tuple[object, ...]:
    head, failure = one.head.message.envelope, one.head.failure
    return (
        one.since, one.consumer, one.key, one.waiting, "held" if one.due_at is None else one.due_at, head.type,
        0 if failure is None else failure.attempts,
        "" if failure is None else f"{failure.error}: {failure.message}"[:200],
    )  # fmt: skip


def _document(one: ParkedKey) -> dict[str, Any]:
    return {
        "consumer": one.consumer,
        "key": one.key,
        "since": one.since.isoformat(),
        "held": one.due_at is None,
        "due_at": None if one.due_at is None else one.due_at.isoformat(),
        "waiting": one.waiting,
        "head": _message(one.head),
    }


def _message(one: Parked) -> dict[str, Any]:
    envelope, delivery, failure = one.message.envelope, one.message.delivery, one.failure
    return {
        "number": one.number,
        "id": str(envelope.id),
        "type": envelope.type,
        "parked_at": one.parked_at.isoformat(),
        "topic": None if delivery is None else delivery.topic,
        "partition": None if delivery is None else delivery.partition,
        "offset": None if delivery is None else delivery.offset,
        **bytes_as_text("value", envelope.data),
        "headers": [
            {"name": name, **bytes_as_text("value", value)} for name, value in (delivery.headers if delivery else ())
        ],
        "error": failure and failure.error,
        "message": failure and failure.message,
        "attempts": failure.attempts if failure else 0,
        "first_failed_at": failure and failure.first_failed_at.isoformat(),
        "failed_at": failure and failure.failed_at.isoformat(),
        "code_version": failure and failure.code_version,
        "stack": failure and failure.stack,
    }


def _tell(
    lines: Sequence[_Line], more: bool, limit: int, as_json: bool, *, dry: bool, what: str, wanted: ParkedWhere
) -> None:
    missing = sorted((wanted.keys or frozenset[str]()) - {one.key for one, _, _ in lines})
    if as_json:
        facts: list[tuple[object, ...]] = [
            (one.consumer, one.key, one.head.message.envelope.id, became, why or None) for one, became, why in lines
        ]
        facts += [(wanted.consumer, key, None, ParkedBecame.GONE.value, "it is not parked") for key in missing]
        names = ("consumer", "key", "id", "what", "why")
        print_json({"dry_run": dry, "keys": [dict(zip(names, one, strict=True)) for one in facts], "more": more})
    else:
        print_columns(
            ("what", "consumer", "key", "head", "type", "why"),
            [
                (became, one.consumer, one.key, one.head.message.envelope.id, one.head.message.envelope.type, why)
                for one, became, why in lines
            ],
        )
        for key in missing:
            say(f"key {key!r} is not parked")
        if dry and lines:
            say(f"nothing was changed; --yes to {what}")
        if more:
            say(f"there are more than these {limit}; see --limit")
    if missing or any(became in (ParkedBecame.REFUSED, ParkedBecame.GONE, "would refuse") for _, became, _ in lines):
        raise SystemExit(WRONG)
