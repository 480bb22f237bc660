"""`foldbus replay`: chosen events of a service's log, once more, into a file, a topic or a read model."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from bus.envelope import Position, StreamId
from bus.seams import SystemClock, Uuid7Ids
from eventstore.port import Store
from foldbus.cli import projection
from foldbus.cli.loading import AppArgument, BusOption, JsonOption, StoreOption, YesOption, load_service, settings
from foldbus.cli.running import finish, store_of, transport_of
from foldbus.cli.showing import confirm, print_columns, print_json, say
from foldbus.progress import Progress
from foldbus.replay import (
    BadReplay,
    FileSink,
    Replayed,
    Selection,
    Sink,
    State,
    TopicSink,
    begin,
    check_same,
    count,
    run,
)
from foldbus.service import Service
from foldbus.settings import Settings
from projections import LOG


def add_to(app: typer.Typer) -> None:
    app.command("replay")(replay)


@dataclass(frozen=True, slots=True)
class Destination:
    """`file:PATH`, `topic:NAME` or `projection:NAME`."""

    kind: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Destination:
        kind, _, name = text.partition(":")
        if kind not in ("file", "topic", "projection") or not name:
            raise BadReplay(f"--to {text!r} names no destination; wanted file:PATH, topic:NAME or projection:NAME")
        return cls(kind, os.path.abspath(name) if kind == "file" else name)

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"

    def state(self, service: Service) -> Path:
        """Where an interrupted replay is remembered: beside the file, or under the working directory."""
        if self.kind == "file":
            return Path(f"{self.name}.replay-state")
        return Path(".foldbus/replay") / f"{service.name}-to-{self.name}.json"


def replay(
    service: AppArgument,
    to: Annotated[str, typer.Option("--to", help="file:PATH (JSON lines), topic:NAME or projection:NAME (a rebuild)")],
    from_stream: Annotated[str | None, typer.Option(metavar="CATEGORY/ID", help="Events of one stream")] = None,
    type: Annotated[list[str] | None, typer.Option("--type", help="Events of this type; may be repeated")] = None,
    after_position: Annotated[int, typer.Option(min=0, help="Events above this position")] = 0,
    until_position: Annotated[int | None, typer.Option(min=0, help="Events up to this position")] = None,
    since: Annotated[str | None, typer.Option(help="Events made at this time or later (ISO 8601, UTC)")] = None,
    until: Annotated[str | None, typer.Option(help="Events made before this time (ISO 8601, UTC)")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count what would go, by type; write nothing")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted replay stopped")] = False,
    rate: Annotated[float | None, typer.Option(min=0.1, help="Records per second, into a topic")] = None,
    store: StoreOption = None,
    bus: BusOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Replays events in the order of the log, up to what it holds now. A topic gets public events with their first ids,
    and the header foldbus-replayed. Interrupted, the same command with --resume goes on."""
    loaded, chosen, where = load_service(service), settings(store, bus), Destination.parse(to)
    selection = Selection(
        stream=_stream(from_stream),
        types=frozenset(type or ()),
        after=after_position,
        until=until_position,
        since=_time(since),
        before=_time(until),
    )
    if where.kind == "projection":
        if selection != Selection() or resume or rate is not None:
            raise BadReplay(
                "a rebuild reads everything and goes on by itself: give it no selection, --resume or --rate"
            )
        _into_projection(loaded, chosen, where, dry_run, as_json)
        return
    if rate is not None and where.kind != "topic":
        raise BadReplay("--rate is for topics")
    if dry_run:
        _show(finish(_count(loaded, chosen, selection, where)), where, as_json, dry_run=True, resumed=False)
        return
    if where.kind == "file" and not resume and Path(where.name).exists():
        confirm(f"overwrite {where.name}", yes=yes)
    elif where.kind == "topic":
        confirm(f"publish events of {loaded.name} to topic {where.name} once more", yes=yes)
    done = finish(
        _replay(loaded, chosen, selection, where, resume, rate),
        hint=f"go on with --resume; how far it came is in {where.state(loaded)}",
    )
    _show(done, where, as_json, dry_run=False, resumed=resume)


async def _replay(
    service: Service, chosen: Settings, selection: Selection, where: Destination, resume: bool, rate: float | None
) -> Replayed:
    path, progress = where.state(service), Progress()
    async with store_of(service, chosen) as store:
        if resume:
            state = State.load(path)
            check_same(state, store, selection, to=str(where))
        else:
            state = await begin(store, selection, to=str(where), id=Uuid7Ids().new())
        async with _sink(where, chosen, state, resume, rate) as sink:
            if where.kind == "topic":
                say(f"how far it came is kept in {path}")
            from_ = selection.after
            with progress.task(f"replay to {where}", max(0, state.until - from_)):
                return await run(
                    store, selection, sink, state, path, clock=SystemClock(), public=where.kind == "topic",
                    told=lambda position, events: progress.at(position - from_, events=events),
                )  # fmt: skip


@asynccontextmanager
async def _sink(
    where: Destination, chosen: Settings, state: State, resume: bool, rate: float | None
) -> AsyncGenerator[Sink]:
    if where.kind == "file":
        file = _open(Path(where.name), state, resume)
        try:
            yield file
        finally:
            file.close()
        return
    async with transport_of(chosen) as transport:
        topic = TopicSink(transport, where.name, state.replay, clock=SystemClock(), rate=rate)
        await topic.check()
        yield topic


def _open(path: Path, state: State, resume: bool) -> FileSink:
    try:
        return FileSink.resume(path, state) if resume else FileSink.create(path)
    except OSError as error:
        raise BadReplay(f"cannot write {path}: {error.strerror}") from error


async def _count(service: Service, chosen: Settings, selection: Selection, where: Destination) -> Replayed:
    progress = Progress()
    async with store_of(service, chosen) as store:
        with progress.task("dry run", await _length(store, selection)):
            return await count(
                store, selection, public=where.kind == "topic",
                told=lambda position, events: progress.at(position - selection.after, events=events),
            )  # fmt: skip


async def _length(store: Store, selection: Selection) -> Position:
    head = await store.head()
    return max(0, (head if selection.until is None else min(head, selection.until)) - selection.after)


def _into_projection(service: Service, chosen: Settings, where: Destination, dry_run: bool, as_json: bool) -> None:
    found = projection.find(service, where.name)
    if not dry_run:
        made = finish(
            projection.rebuilt(service, chosen, where.name), hint="what is built stays; run it again to go on"
        )
        projection.show_rebuilt(where.name, made, as_json)
        return
    sources = found.sources(service.name)
    for source in sorted(sources):
        if source != LOG:
            say(f"not counted: what {where.name} reads of topic {source}")
    own = frozenset(str(event.type_name) for event in sources.get(LOG, ()))
    own |= service.registry.upcasting.older(own)
    counted = finish(_count(service, chosen, Selection(types=own), where)) if own else Replayed(0, 0)
    _show(counted, where, as_json, dry_run=True, resumed=False)


def _show(done: Replayed, where: Destination, as_json: bool, *, dry_run: bool, resumed: bool) -> None:
    if as_json:
        shown: dict[str, Any] = {
            "to": str(where),
            "dry_run": dry_run,
            "resumed": resumed,
            "after_position": done.after,
            "until_position": done.until,
            "events": done.events,
            "by_type": dict(sorted(done.by_type.items())),
            "private_left_out": done.private,
        }
        print_json(shown)
        return
    print_columns(("type", "events"), sorted(done.by_type.items()))
    if done.private:
        say(f"{done.private} private events were chosen, and left out: they never go into a topic")
    say(f"{done.events} events {'would go' if dry_run else 'went'} to {where}, up to position {done.until}")


def _stream(text: str | None) -> StreamId | None:
    if text is None:
        return None
    category, slash, id = text.partition("/")
    if not category or not slash or not id:
        raise BadReplay(f"--from-stream {text!r} names no stream; wanted CATEGORY/ID, as order/o-17")
    return StreamId(category, id)


def _time(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise BadReplay(f"{text!r} is no time; wanted ISO 8601, as 2026-11-21T08:30 or 2026-11-21") from None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found
