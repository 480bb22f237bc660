"""What an operator sees of a saga: made from its stored history alone, without running any of its code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from bus.envelope import Envelope
from bus.errors import BadInput
from sagas import events
from sagas.errors import SagaError
from sagas.events import (
    SagaCancelled,
    SagaCompensated,
    SagaCompensating,
    SagaCompleted,
    SagaEvent,
    SagaParked,
    SagaRetried,
    SagaStarted,
    StepExpired,
    StepReplied,
    StepScheduled,
)
from sagas.instance import UNDO, Status
from sagas.state import SagaState

_OLD_FAILURE = re.compile(r"step ([0-9.]+) \([a-z0-9.-]+\): ")


@dataclass(frozen=True, slots=True)
class StepView:
    """A step or an undo. `outcome` is a ReplyOutcome's value, `timed-out`, `abandoned`, or None while it waits.

    `path` is its place in the stored history, where `run.uuid()` and `run.all()` take places too; `name` is what people
    see: `step 2`, `undo of step 2`.
    """

    path: str
    attempt: int
    command_type: str
    key: str
    command_id: str
    scheduled_at: datetime
    timeout_s: float | None = None
    outcome: str | None = None
    ended_at: datetime | None = None
    why: str | None = None
    name: str = ""

    @property
    def took(self) -> timedelta | None:
        return self.ended_at - self.scheduled_at if self.ended_at is not None else None


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the timeline."""

    at: datetime
    what: str


@dataclass(frozen=True, slots=True)
class SagaView:
    """`waiting` are the paths of the steps without an outcome, `error` why it is parked or compensating."""

    id: str
    definition: str
    version: int
    status: Status
    started_at: datetime
    started_by: str
    ended_at: datetime | None
    age: timedelta
    waiting: tuple[str, ...]
    error: str | None
    steps: tuple[StepView, ...]
    timeline: tuple[Entry, ...]


def describe(records: Sequence[Envelope], *, now: datetime | None = None) -> SagaView:
    """`records` are the whole stream. `age` is up to its end, else up to `now`, else up to its last event.

    Raises SagaError when they are not a saga's history from its start. Events of a newer program are named, not read.
    """
    if not records or records[0].type != SagaStarted.type_name or records[0].stream is None:
        found = records[0].type if records else "nothing"
        raise SagaError(f"no saga's history: it begins with {found}, wanted {SagaStarted.type_name} from a stream")
    state = SagaState(records[0].stream)
    state.fold(records)
    started, status = state.started, state.status
    assert status is not None
    last = max(record.time for record in records)
    names = step_names(state.history)
    ended_at = last if status.ended else None
    return SagaView(
        id=state.stream.id,
        definition=started.definition,
        version=started.version,
        status=status,
        started_at=started.at,
        started_by=f"{started.start.type} {started.start.id}",
        ended_at=ended_at,
        age=(ended_at or now or last) - started.at,
        waiting=tuple(step.label for step in state.under_way.values()),
        error=_error(state, names),
        steps=_steps(state.history, names),
        timeline=tuple(_entry(record, names) for record in records),
    )


def step_names(history: Iterable[SagaEvent]) -> Mapping[str, str]:
    """For each path of a history its name for people: steps count from 1 in the order in which they were begun, however
    many places of the story something else took. A branch of an `all` counts its own: `step 2.1.1`."""
    names: dict[str, str] = {}
    numbers: dict[str, str] = {}  # also of an `all` that holds steps
    counted: Counter[str] = Counter()

    def number(path: str) -> str:
        if path not in numbers:
            place, _, branch = path.rpartition(".")[0].rpartition(".")
            within = f"{number(place)}.{branch}." if place else ""
            counted[within] += 1
            numbers[path] = f"{within}{counted[within]}"
        return numbers[path]

    for event in history:
        if isinstance(event, StepScheduled):
            step = f"step {number(event.path.removeprefix(UNDO))}"
            names[event.path] = f"undo of {step}" if event.path.startswith(UNDO) else step
    return names


def timeline(view: SagaView) -> list[str]:
    """The story as plain text: a heading, then one line per event with the seconds since the start."""
    lines = [f"{view.definition} v{view.version}  {view.id}  {view.status}  age {_short(view.age)}"]
    if view.error is not None:
        lines.append(f"  {view.error}")
    return lines + [f"  {_short(entry.at - view.started_at):>9}  {entry.what}" for entry in view.timeline]


def _error(state: SagaState, names: Mapping[str, str]) -> str | None:
    if state.status not in (Status.PARKED, Status.COMPENSATING, Status.COMPENSATED):
        return None
    for event in reversed(state.history):
        match event:
            case SagaParked(reason=reason) if state.status is Status.PARKED:
                return _renamed(reason, event.path, names)
            case SagaCompensating(why=why) | SagaCompensated(why=why) if state.status is not Status.PARKED:
                return _renamed(why, None, names)
            case _:
                pass
    return None


def _renamed(text: str, path: str | None, names: Mapping[str, str]) -> str:
    """A stored reason names its step by its path: by `path`, or as earlier versions named a failed one."""
    if path is not None and path in names:
        return text.replace(f"step {path}", names[path], 1)
    old = _OLD_FAILURE.match(text)
    if old is not None and old[1] in names:
        return names[old[1]] + text[old.end(1) :]
    return text


def _steps(history: Sequence[SagaEvent], names: Mapping[str, str]) -> tuple[StepView, ...]:
    steps: dict[tuple[str, int], StepView] = {}

    def settle(path: str, attempt: int, outcome: str, at: datetime, why: str | None = None) -> None:
        found = steps.get((path, attempt))
        if found is not None:
            steps[path, attempt] = replace(found, outcome=outcome, ended_at=at, why=why)

    for event in history:
        match event:
            case StepScheduled():
                steps[event.path, event.attempt] = StepView(
                    event.path, event.attempt, event.type, event.key, str(event.id), event.at, event.timeout_s,
                    name=_name(event.path, event.attempt, names),
                )  # fmt: skip
            case StepReplied():
                settle(event.path, event.attempt, event.outcome.value, event.at, event.why)
            case StepExpired():
                settle(event.path, 1, "timed-out", event.at)
            case SagaCancelled():
                for step in list(steps.values()):
                    if step.outcome is None:
                        settle(step.path, step.attempt, "abandoned", event.at)
            case _:
                pass
    return tuple(steps.values())


def _name(path: str, attempt: int, names: Mapping[str, str]) -> str:
    return names.get(path, f"step {path}") + (f" (attempt {attempt})" if attempt > 1 else "")


def _entry(record: Envelope, names: Mapping[str, str]) -> Entry:
    try:
        event = events.read(record)
    except BadInput as error:
        return Entry(record.time, f"unreadable: {error}")
    match event:
        case SagaStarted():
            what = f"started by {event.start.type} {event.start.key!r}"
        case StepScheduled():
            limit = f", within {event.timeout_s:g} s" if event.timeout_s is not None else ""
            what = f"{_name(event.path, event.attempt, names)}: {event.type} for {event.key!r}{limit}"
        case StepReplied():
            name = _name(event.path, event.attempt, names)
            what = f"{name}: {event.outcome.value}{f' ({event.why})' if event.why else ''}"
        case StepExpired():
            what = f"{_name(event.path, 1, names)}: no answer in time, its outcome is unknown"
        case SagaCompensating():
            what = f"compensating: {_renamed(event.why, None, names)}"
        case SagaParked():
            what = f"parked: {_renamed(event.reason, event.path, names)}"
        case SagaRetried():
            what = f"retried{f' by {event.by}' if event.by else ''}"
        case SagaCancelled():
            what = f"cancelled{f' by {event.by}' if event.by else ''}"
        case SagaCompleted():
            what = "completed"
        case SagaCompensated():
            what = "compensated"
        case _:
            what = event.type_name
    return Entry(event.at, what)


def _short(span: timedelta) -> str:
    seconds = span.total_seconds()
    if seconds < 60:
        return f"{seconds:.3f}s"
    if seconds < 3600:
        return f"{seconds / 60:.1f}m"
    if seconds < 86400:
        return f"{seconds / 3600:.1f}h"
    return f"{seconds / 86400:.1f}d"
