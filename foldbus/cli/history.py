"""`foldbus history`: what happened to one aggregate, event by event, with what each one changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, cast

import typer
from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from bus.errors import FoldbusError
from eventstore.decider import Decider
from eventstore.repository import BACKWARD_MAX, Loaded, Repository, Step
from foldbus.cli.loading import AppArgument, BusOption, JsonOption, StoreOption, load_service, settings
from foldbus.cli.running import WRONG, finish, store_of
from foldbus.cli.showing import print_json, say
from foldbus.service import Service
from foldbus.settings import Settings


class UnknownCategory(FoldbusError):
    """No decider of this service has streams of that category."""


def add_to(app: typer.Typer) -> None:
    app.command("history")(history)


def history(
    service: AppArgument,
    category: Annotated[str, typer.Argument(metavar="CATEGORY", help="The decider's, for example order")],
    id: Annotated[str, typer.Argument(metavar="ID", help="The aggregate's key")],
    at_version: Annotated[int | None, typer.Option(min=0, help="Only the state after so many events")] = None,
    at: Annotated[str | None, typer.Option(help="Only the state at a time, as 2026-02-28T12:00:00Z")] = None,
    after: Annotated[int, typer.Option(min=0, help="Only events after this version")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="So many events, at most")] = None,
    backward: Annotated[bool, typer.Option("--backward", help="The last ones first (100 unless --limit)")] = False,
    store: StoreOption = None,
    bus: BusOption = None,
    as_json: JsonOption = False,
) -> None:
    """The events of one aggregate, and what each one changed in its state. With --json one document per event, with the
    whole state after it. Exits 1 when there is no such aggregate."""
    del bus
    when = None if at is None else _instant(at)
    if when is not None and at_version is not None:
        raise typer.BadParameter("--at and --at-version were both given; wanted one of them")
    found = load_service(service)
    decider = _decider(found, category)
    chosen = settings(store, None)
    if when is not None or at_version is not None:
        _show_state(finish(_state(found, chosen, decider, id, at_version, when)), as_json)
        return
    if backward:
        limit = 100 if limit is None else limit
        if limit > BACKWARD_MAX:
            raise typer.BadParameter(f"--limit {limit} with --backward; wanted at most {BACKWARD_MAX}")
    if not finish(_events(found, chosen, decider, id, after, limit, backward, as_json)):
        say(f"foldbus: {decider.stream(id)} has no events{f' after version {after}' if after else ''}")
        raise SystemExit(WRONG)


async def _state(
    service: Service,
    chosen: Settings,
    decider: Decider[Any, Any, Any],
    id: str,
    at_version: int | None,
    at: datetime | None,
) -> Loaded[Any]:
    async with store_of(service, chosen) as store:
        repository = Repository(decider, store=store, codec=service.codec)
        return await repository.load(id, at_version=at_version, at=at)


async def _events(
    service: Service,
    chosen: Settings,
    decider: Decider[Any, Any, Any],
    id: str,
    after: int,
    limit: int | None,
    backward: bool,
    as_json: bool,
) -> int:
    """Printed as they are read; how many."""
    shown = 0
    async with store_of(service, chosen) as store:
        repository = Repository(decider, store=store, codec=service.codec)
        if backward and limit is not None:
            after = max(after, (await repository.load(id)).version - limit)
        held: list[tuple[Step[Any], Any]] = []
        before: Any = None
        async for step in repository.history(id, after_version=after, limit=limit):
            if not shown:
                before = (await repository.load(id, at_version=after)).state
            shown += 1
            if backward:  # what a step changed is told by the state before it, so they are read forward all the same
                held.append((step, before))
            else:
                _show(step, before, as_json)
            before = step.state
        for step, earlier in reversed(held):
            _show(step, earlier, as_json)
    return shown


def _show_state(found: Loaded[Any], as_json: bool) -> None:
    state = plain(found.state)
    if as_json:
        print_json({"stream": str(found.stream), "version": found.version, "state": state})
        return
    print(f"{found.stream} at version {found.version}")
    for line in changes(None, state):
        print(f"  {line}")


def _show(step: Step[Any], before: Any, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "version": step.version,
                "time": step.time,
                "type": step.type,
                "events": [plain(event) for event in step.events],
                "state": plain(step.state),
                "id": step.id,
                "correlation_id": step.correlation_id,
                "causation_id": step.causation_id,
                "actor": step.actor,
            }
        )
        return
    by = f"  by {step.actor}" if step.actor else ""
    print(f"{step.version:>5}  {step.time.isoformat(timespec='milliseconds')}  {step.type}{by}")
    for event in step.events:
        print(f"       {json.dumps(plain(event), ensure_ascii=False)}")
    if not step.events:
        print("       (dropped by an upcaster)")
    for line in changes(plain(before), plain(step.state)):
        print(f"       {line}")


def plain(value: Any) -> Any:
    """A state or an event as JSON has it; what JSON does not have, as its text."""
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(value.__class__)
        return adapter.dump_python(value, mode="json", warnings="none")
    except Exception:  # any class may be a state: showing it must not fail
        return to_jsonable_python(value, fallback=repr)


def changes(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """One line per field that differs: `balance_cents: 0 → 500`."""
    if before == after:
        return
    if isinstance(after, dict) and (before is None or isinstance(before, dict)):
        old, new = cast("dict[str, Any]", before or {}), cast("dict[str, Any]", after)
        for name in [*new, *(name for name in old if name not in new)]:
            path = f"{where}.{name}" if where else str(name)
            if name not in new:
                yield f"{path}: {_short(old[name])} → gone"
            elif name not in old:
                yield f"{path}: {_short(new[name])}"
            else:
                yield from changes(old[name], new[name], path)
        return
    yield f"{where or 'state'}: {_short(before)} → {_short(after)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"


def _decider(service: Service, category: str) -> Decider[Any, Any, Any]:
    for decider in service.deciders:
        if decider.category == category:
            return decider
    known = ", ".join(decider.category for decider in service.deciders) or "none"
    raise UnknownCategory(f"service {service.name!r} has no decider of category {category!r}; it has {known}")


def _instant(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise typer.BadParameter(f"--at {text!r}: {error}") from None
    if found.tzinfo is None:
        raise typer.BadParameter(f"--at {text!r} has no time zone; wanted one, for example {text}Z")
    return found
