"""`foldbus dlq list|show|redrive|discard`: what was given up, and what to do about it. Opens the store alone."""

from __future__ import annotations

import asyncio
import base64
import getpass
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer

from bus.errors import FoldbusError
from bus.metrics import MemoryMetrics
from bus.seams import SystemClock, Uuid7Ids
from eventstore.port import DeadLetter, Letter, LetterWhere, Store
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
Consumer = Annotated[str | None, typer.Option(help="Only those that this consumer gave up")]
Type = Annotated[str | None, typer.Option(help="Only this type; ends in * for all that begin so")]
Error = Annotated[str | None, typer.Option(help="Only this class of error; ends in * for all that begin so")]
Topic = Annotated[str | None, typer.Option(help="Only those that came from this topic")]
Key = Annotated[str | None, typer.Option(help="Only this key")]
Since = Annotated[str | None, typer.Option(help="Only those that failed at this time or later (ISO 8601, UTC)")]
Until = Annotated[str | None, typer.Option(help="Only those that failed before this time")]
Everything = Annotated[bool, typer.Option("--everything", help="All open ones: instead of ids and filters")]
Limit = Annotated[int, typer.Option(min=1, help="At most so many, oldest first")]

_SAME_MAX = 50
"""Letters of one id: one for each consumer that gave it up."""


class UnknownLetter(FoldbusError):
    """No dead letter has that id, or several may be meant."""


class BadFilter(FoldbusError):
    """Nothing can be chosen by this."""


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
    where = _where(consumer, type, error, topic, key, since, until)

    async def run() -> list[Letter]:
        async with store_of(load_service(service), settings(store)) as opened:
            found: list[Letter] = []
            if all_:
                found += await opened.letters.page(where, settled=True, limit=limit + 1)
            return [*found, *await opened.letters.page(where, limit=limit + 1)]

    found = finish(run())
    letters, more = found[:limit], len(found) > limit
    if as_json:
        print_json({"dead_letters": [_document(one) for one in letters], "more": more})
        return
    print_columns(
        ("failed at", "consumer", "id", "type", "from", "attempts", "error", *(["settled"] if all_ else [])),
        [(*_line(one.letter), *([_settled(one)] if all_ else [])) for one in letters],
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
            return await _of(opened, id, consumer)

    found = finish(run())
    if as_json:
        print_json({"letters": [_document(one) for one in found]})
        return
    for nth, one in enumerate(found):
        if nth:
            print()
        document = _document(one)
        stack, headers = document.pop("stack"), document.pop("headers")
        for name, value in document.items():
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
    yes: YesOption = False,
    store: StoreOption = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """Handles messages after all. Without --yes it only tells what it would do. Exits 1 when it refuses one."""
    where = _where(consumer, type, error, topic, key, since, until)
    _check_chosen(ids, where, everything)
    changed = _edit(edit, set_ or [], as_type)
    lines, more = finish(
        _redrive(load_service(service), settings(store), ids, where, limit, per_second, changed, dry=not yes),
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
    where = _where(consumer, type, error, topic, key, since, until)
    _check_chosen(ids, where, everything)
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
    *,
    dry: bool,
) -> tuple[list[_Line], bool]:
    async with _redriver(service, chosen) as (store, redriver):
        lines, letters, more = await _choose(store, redriver, ids, where, limit)
        if edit is not None and len(letters) != 1:
            raise BadFilter(f"another payload is for one letter; found {len(letters)}")
        pace = Pace(per_second, clock=SystemClock(), sleep=asyncio.sleep)
        for letter in letters:
            plan = redriver.plan(letter, edit)
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
                meant = (await _of(store, text, where.consumer))[0].letter.id
            except UnknownLetter:
                if not _is_id(text):
                    raise
                meant = UUID(text)
            wanted.add(meant)
        where = replace(where, ids=frozenset(wanted))
        limit = max(limit, len(ids) * _SAME_MAX)
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
        if dry and lines:
            say(f"nothing was changed; --yes to {what}")
        if more:
            say(f"there are more than these {limit}; see --limit")
    if any(became in (Became.REFUSED, Became.GONE, "would refuse") for _, _, became, _ in lines):
        raise SystemExit(WRONG)


# --- choosing ---------------------------------------------------------------------------------------------------------


async def _of(store: Store, text: str, consumer: str | None) -> list[Letter]:
    """All letters of the one id that is meant, settled ones first. Raises UnknownLetter."""
    where = LetterWhere(consumer=consumer, prefix=text)
    try:
        found = [
            *await store.letters.page(where, settled=True, limit=_SAME_MAX),
            *await store.letters.page(where, limit=_SAME_MAX),
        ]
    except ValueError as error:
        raise BadFilter(str(error)) from error
    ids = sorted({one.letter.id for one in found})
    if len(ids) > 1:
        lines = "\n".join(f"  {one}" for one in ids[:10])
        raise UnknownLetter(f"{text!r} may be any of these dead letters:\n{lines}")
    if not ids:
        raise UnknownLetter(f"no dead letter has an id that is or begins with {text!r}")
    return found


def _where(
    consumer: str | None,
    type: str | None,
    error: str | None,
    topic: str | None,
    key: str | None,
    since: str | None,
    until: str | None,
) -> LetterWhere:
    return LetterWhere(consumer, type, error, topic, key, _time(since), _time(until))


def _check_chosen(ids: list[str] | None, where: LetterWhere, everything: bool) -> None:
    given = bool(ids) or where != LetterWhere()
    if given is everything:
        raise BadFilter("wanted ids or filters, or --everything" + ("; found both" if given else ""))


def _edit(file: Path | None, fields: list[str], type: str | None) -> Edit | None:
    if file is not None and fields:
        raise BadFilter("wanted --edit or --set; found both")
    if file is not None:
        try:
            return Edit(data=file.read_bytes(), type=type)
        except OSError as error:
            raise BadFilter(f"{file}: {error.strerror}") from error
    found: dict[str, Any] = {}
    for text in fields:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise BadFilter(f"--set {text!r}; wanted FIELD=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return Edit(fields=found, type=type) if found else None


def _time(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise BadFilter(f"{text!r} is no time; wanted ISO 8601, for example 2026-11-01T12:00:00") from error
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _is_id(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True


# --- showing ----------------------------------------------------------------------------------------------------------


def _line(one: DeadLetter) -> tuple[object, ...]:
    failure = one.failure
    return (
        failure.failed_at, one.consumer, one.id, one.type, f"{one.topic}[{one.partition}]@{one.offset}",
        failure.attempts, f"{failure.error}: {failure.message}"[:200],
    )  # fmt: skip


def _settled(found: Letter) -> str:
    one = found.settled
    if one is None:
        return ""
    return f"{one.how} {one.at.isoformat(timespec='seconds')} by {one.by or '-'}" + (
        f": {one.reason}" if one.reason else ""
    )


def _document(found: Letter) -> dict[str, Any]:
    one, settled = found.letter, found.settled
    failure = one.failure
    return {
        "id": one.id,
        "consumer": one.consumer,
        "type": one.type or None,
        "topic": one.topic,
        "partition": one.partition,
        "offset": one.offset,
        **_bytes("key", one.key),
        **_bytes("value", one.value),
        "headers": [{"name": name, **_bytes("value", value)} for name, value in one.headers],
        "error": failure.error,
        "message": failure.message,
        "stack": failure.stack,
        "attempts": failure.attempts,
        "first_failed_at": failure.first_failed_at.isoformat(),
        "failed_at": failure.failed_at.isoformat(),
        "code_version": failure.code_version,
        "settled": settled
        and {
            "how": settled.how.value,
            "at": settled.at.isoformat(),
            "by": settled.by,
            "reason": settled.reason,
        },
    }


def _bytes(name: str, found: bytes | None) -> dict[str, str | None]:
    """As text where it is text; the other of the two fields is None."""
    if found is None:
        return {name: None, f"{name}_base64": None}
    try:
        return {name: found.decode(), f"{name}_base64": None}
    except UnicodeDecodeError:
        return {name: None, f"{name}_base64": base64.b64encode(found).decode()}
