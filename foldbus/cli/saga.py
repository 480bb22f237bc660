"""`foldbus saga list|show|retry|cancel`: what an operator sees of sagas, and the two things to tell one."""

from __future__ import annotations

import asyncio
import getpass
import heapq
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Annotated
from uuid import UUID

import typer

from bus.envelope import Envelope, Token
from bus.errors import FoldbusError
from bus.messages import Command, Refused
from eventstore.port import Wanted
from foldbus.cli.loading import AppArgument, BusOption, JsonOption, StoreOption, YesOption, load_service, settings
from foldbus.cli.running import WRONG, attached, finish
from foldbus.cli.showing import confirm, print_columns, print_json, say
from foldbus.connection import Connection
from foldbus.saga_list import SagaRow, saga_list
from foldbus.service import Service
from foldbus.settings import Settings
from foldbus.views import projection_runner
from projections import NotThere
from sagas import CancelSaga, RetrySaga, Status, StepView, describe, saga_stream, timeline
from sagas.instance import label

saga = typer.Typer(no_args_is_help=True, help="Sagas: what they are at, and what to tell them.")

SagaId = Annotated[
    str, typer.Argument(metavar="ID", help="As `saga list` shows it, its beginning, or the key of the start event")
]
Patience = Annotated[float, typer.Option("--timeout", min=0, help="Seconds to wait for an answer")]


_CANDIDATES = 10
_LIST_S = 5.0
"""How long to wait for the list to be up to date where it only helps to find a saga."""
_HEX = frozenset("0123456789abcdef-")


class UnknownSaga(FoldbusError):
    """No saga of this service has that id."""


class AmbiguousSaga(FoldbusError):
    """Several sagas may be meant."""

    def __init__(self, text: str, rows: Sequence[SagaRow]) -> None:
        lines = [f"  {row.saga_id}  {row.definition} v{row.version}  {row.status}  {row.start_key}" for row in rows]
        more = ["  …"] if len(lines) > _CANDIDATES else []
        super().__init__("\n".join([f"{text!r} may be any of these sagas:", *lines[:_CANDIDATES], *more]))


def add_to(app: typer.Typer) -> None:
    app.add_typer(saga, name="saga")


@saga.command("list")
def list_(
    service: AppArgument,
    status: Annotated[Status | None, typer.Option(help="Only these")] = None,
    definition: Annotated[str | None, typer.Option(help="Only sagas of this name")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, the latest first")] = 100,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for the list to be up to date")] = 10.0,
    store: StoreOption = None,
    bus: BusOption = None,
    as_json: JsonOption = False,
) -> None:
    """The sagas of a service, those that began last first. Exits 1 when the list could not be brought up to date."""
    found, late = finish(
        _list(load_service(service), settings(store, bus), status, definition, limit, timeout),
        hint="run it again to go on",
    )
    if as_json:
        print_json(
            {
                "up_to_date": late is None,
                "sagas": [
                    one.model_dump(mode="json")
                    | {"error": one.error, "waiting": [label(step.path, step.attempt) for step in under_way]}
                    for one, under_way in found
                ],
            }
        )
    else:
        print_columns(
            ("id", "saga", "status", "started", "start key", "waiting for", "error"),
            [
                (one.saga_id, f"{one.definition} v{one.version}", one.status, one.started_at, one.start_key,
                 tuple(f"{step.name} ({step.command_type})" for step in under_way), one.error)
                for one, under_way in found
            ],
        )  # fmt: skip
    if late is not None:
        say(f"foldbus: the list is not up to date: {late}")
        raise SystemExit(WRONG)


@saga.command()
def show(
    service: AppArgument, id: SagaId, store: StoreOption = None, bus: BusOption = None, as_json: JsonOption = False
) -> None:
    """One saga's whole story, from its stored history."""
    view = describe(finish(_history(load_service(service), settings(store, bus), id)), now=None)
    if as_json:
        print_json(asdict(view) | {"age": view.age.total_seconds()})
    else:
        for line in timeline(view):
            print(line)


@saga.command()
def retry(
    service: AppArgument,
    id: SagaId,
    timeout: Patience = 10.0,
    store: StoreOption = None,
    bus: BusOption = None,
    as_json: JsonOption = False,
) -> None:
    """Lets a parked saga go on, on the code that its worker runs. Exits 1 when it is not parked."""
    _tell(service, settings(store, bus), id, timeout, as_json, cancel=False)


@saga.command()
def cancel(
    service: AppArgument,
    id: SagaId,
    timeout: Patience = 10.0,
    store: StoreOption = None,
    bus: BusOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Makes a running saga undo what it did. Exits 1 when it is not running."""
    confirm(f"cancel saga {id}", yes=yes)
    _tell(service, settings(store, bus), id, timeout, as_json, cancel=True)


def _tell(path: str, chosen: Settings, id: str, timeout: float, as_json: bool, *, cancel: bool) -> None:
    service = load_service(path)
    saga_id, refused = finish(
        _send(service, chosen, id, timeout, cancel=cancel), hint="it may have been told all the same, see `saga show`"
    )
    if as_json:
        print_json(
            {"saga": str(saga_id), "done": refused is None, "refused": None if refused is None else refused.message}
        )
    elif refused is None:
        say(f"saga {saga_id} was {'cancelled' if cancel else 'retried'}")
    if refused is not None:
        say(f"foldbus: {refused.message}")
        raise SystemExit(WRONG)


async def _send(
    service: Service, chosen: Settings, text: str, timeout: float, *, cancel: bool
) -> tuple[UUID, Refused | None]:
    async with attached(service, chosen) as connection:
        found = describe(await _load(connection, text))
        id, definition = UUID(found.id), found.definition
        if found.status.ended:  # for good: no worker need be asked
            return id, Refused(f"the saga is {found.status}, nothing to {'cancel' if cancel else 'retry'}")
        by = getpass.getuser()
        command: Command[None] = (
            CancelSaga(saga_id=id, definition=definition, by=by)
            if cancel
            else RetrySaga(saga_id=id, definition=definition, by=by)
        )
        try:
            await connection.request(command, timeout_s=timeout, topic=f"{service.name}.replies")
        except Refused as refused:
            return id, refused
    return id, None


async def _history(service: Service, chosen: Settings, text: str) -> list[Envelope]:
    async with attached(service, chosen) as connection:
        return await _load(connection, text)


async def _load(connection: Connection, text: str) -> list[Envelope]:
    """The stream of the one saga that is meant: by its id, by the beginning of it, or by the key that started it."""
    try:
        found = await _stream(connection, UUID(text))
    except ValueError:
        found = []
    if not found:
        found = await _stream(connection, await _meant(connection, text))
    return found


async def _meant(connection: Connection, text: str) -> UUID:
    """From the list, brought up to date as far as that is quick. Raises UnknownSaga and AmbiguousSaga."""
    service = connection.service
    candidates: dict[UUID, SagaRow] = {}
    late = None
    if service.sagas:
        late = await _catch_up(connection, _LIST_S)
        begins = text.lower() if text and _HEX.issuperset(text.lower()) else None
        async for key, row in connection.view(saga_list).rows():
            if row.start_key == text or (begins is not None and key.startswith(begins)):
                candidates[row.saga_id] = row
                if len(candidates) > _CANDIDATES:
                    break
    if len(candidates) == 1:
        return next(iter(candidates))
    if candidates:
        raise AmbiguousSaga(text, list(candidates.values()))
    names = ", ".join(sorted({one.name for one in service.sagas})) or "none"
    raise UnknownSaga(
        f"service {service.name!r} has no saga {text}, by id, beginning of an id or key of a start event; looked among "
        f"{names}" + (f"; the list is not up to date: {late}" if late else "")
    )


async def _stream(connection: Connection, id: UUID) -> list[Envelope]:
    """Whichever of the service's sagas it is of; the list knows those of code that is gone. Empty: there is none."""
    names = {one.name for one in connection.service.sagas}
    found = await connection.store.load([Wanted(saga_stream(name, id)) for name in sorted(names)])
    for part in found:
        if part.records:
            return list(part.records)
    row = await connection.view(saga_list).get(id)
    if row is not None and row.definition not in names:
        (part,) = await connection.store.load([Wanted(saga_stream(row.definition, id))])
        if part.records:
            return list(part.records)
    return []


async def _list(
    service: Service, chosen: Settings, status: Status | None, definition: str | None, limit: int, timeout: float
) -> tuple[list[tuple[SagaRow, tuple[StepView, ...]]], str | None]:
    """The rows with the steps that each waits for; and what kept the list from being up to date."""
    if not service.sagas:
        raise UnknownSaga(f"service {service.name!r} lists no sagas")
    async with attached(service, chosen) as connection:
        late = await _catch_up(connection, timeout)
        # Of all rows only `limit` are held.
        latest: list[tuple[datetime, str, SagaRow]] = []
        async for key, row in connection.view(saga_list).rows():
            if (status is None or row.status == status.value) and definition in (None, row.definition):
                heapq.heappush(latest, (row.started_at, key, row))
                if len(latest) > limit:
                    heapq.heappop(latest)
        rows = [row for _, _, row in sorted(latest, key=lambda one: one[:2], reverse=True)]
        waiting = await _under_way(connection, [row for row in rows if row.ended_at is None])
        return [(row, waiting.get(row.saga_id, ())) for row in rows], late


async def _under_way(connection: Connection, rows: Sequence[SagaRow]) -> dict[UUID, tuple[StepView, ...]]:
    """From their streams: the list itself has no steps."""
    if not rows:
        return {}
    found = await connection.store.load([Wanted(saga_stream(row.definition, row.saga_id)) for row in rows])
    return {
        row.saga_id: tuple(step for step in describe(part.records).steps if step.outcome is None)
        for row, part in zip(rows, found, strict=True)
        if part.records
    }


async def _catch_up(connection: Connection, timeout: float) -> str | None:
    """Until the list has seen the log as it is now: a worker's doing, or, where none runs, this process's. Answers what
    is missing when that takes too long; what was folded stays."""
    now = Token(
        connection.service.name, connection.store.epoch, key="", position=await connection.store.head(), public=0
    )
    running = asyncio.create_task(projection_runner(connection, saga_list).run())
    try:
        await connection.view(saga_list).get("-", after=now, timeout_s=timeout)
    except NotThere as error:
        if running.done():
            running.result()  # it can never run, and says why
        return str(error)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return None
