"""One saga at work: a coroutine that is fed with its own history. Pure: no event loop, no clock, no bytes.

`.send()` and `.throw()` only. Replay feeds all of the history, living on feeds one more answer; both take the same way
through the code. Answers are fed in recorded order and each resumes only the branch that waits for it, so branches that
share state see it the same in every replay.

Whatever is not a StepFailed is a bug: the instance parks where it is, and what the event would have scheduled is
dropped, so that a replay on fixed code goes on from there as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from contextvars import Context
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from types import TracebackType
from typing import Any
from uuid import UUID

from bus.errors import BadInput
from bus.messages import Command, Event
from sagas.definition import SagaDefinition
from sagas.errors import StepAbandoned, StepFailed
from sagas.run import All, Branch, Cursor, SagaRun, Step, Want

log = logging.getLogger("foldbus.sagas")

UNDO = "undo:"
"""An undo's path is this and the path of its step."""


class Status(StrEnum):
    RUNNING = "running"
    COMPENSATING = "compensating"
    PARKED = "parked"
    COMPLETED = "completed"
    COMPENSATED = "compensated"

    @property
    def ended(self) -> bool:
        return self in (Status.COMPLETED, Status.COMPENSATED)


@dataclass(frozen=True, slots=True)
class Plan:
    """A command to be sent. `attempt` counts an undo that was retried by an operator."""

    path: str
    command: Command[Any]
    undo: Command[Any] | None = None
    timeout_s: float | None = None
    attempt: int = 1

    @property
    def label(self) -> str:
        return label(self.path, self.attempt)


@dataclass(frozen=True, slots=True)
class Known:
    """A step that history has: what it asked for, of whom."""

    type: str
    key: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a step. `read` is given its command, and returns what the saga gets or raises the StepFailed that
    it gets; a BadInput says that the answer cannot be read, and parks."""

    path: str
    at: datetime
    read: Callable[[Command[Any]], Any]
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class Park:
    """Why an instance stands still, and at which step (None: not at one)."""

    reason: str
    path: str | None = None
    stack: str = ""


def label(path: str, attempt: int) -> str:
    """A step's name within its saga: command ids are made of it."""
    return path if attempt == 1 else f"{path}#{attempt}"


class Instance:
    """`begin` once, then `feed` answer after answer; both give the commands to send now.

    With `known` steps from history, `begin` and `feed` replay: a step that history has is compared with it (type and
    key) and not sent again; `end_replay` closes the replay. Unless `accepts_new`, a step that history lacks is a
    mismatch until then. An undo is compared by path alone: nothing depends on its answer, and so an undo that was wrong
    can be mended and sent again.
    """

    def __init__(
        self,
        definition: SagaDefinition[Any],
        saga_id: UUID,
        *,
        known: Mapping[str, Known] | None = None,
        accepts_new: bool = True,
    ) -> None:
        self.definition, self.id = definition, saga_id
        self.status = Status.RUNNING
        self.parked: Park | None = None
        self.failure: StepFailed | None = None
        """What left the saga's body and is being compensated."""
        self._known = dict(known or {})
        self._accepts_new = accepts_new
        self._context = Context()  # nothing leaks in from the worker, nothing out
        self._cursor: Cursor | None = None
        self._ready: deque[tuple[Branch, Any, StepFailed | None]] = deque()
        self._waiting: dict[str, Branch] = {}
        self._steps: dict[str, Step[Any]] = {}  # in the order of scheduling
        self._answers: dict[str, Answer] = {}  # by label, also those that nobody waits for yet
        self._failures: dict[str, StepFailed | None] = {}  # what each answered step ended with
        self._plans: list[Plan] = []
        self._undos: deque[Step[Any]] = deque()  # the first one is under way
        self._attempt = 1
        self._undo_failed = False  # parked, but `retry` may send it again

    # --- what history and the world tell it -------------------------------------------------------------------------

    def begin(self, start: Event, *, at: datetime) -> list[Plan]:
        cursor = self._cursor = Cursor(at)
        self._ready.append((Branch(self.definition.body(SagaRun(self.id, cursor), start)), None, None))
        return self._advance(at)

    def feed(self, answer: Answer) -> list[Plan]:
        """The first answer for a step counts; a later one changes nothing."""
        name = label(answer.path, answer.attempt)
        if name in self._answers:
            return []
        self._answers[name] = answer
        if self.status is not Status.PARKED:
            self._hear(answer)
        return self._advance(answer.at)

    def cancel(self, *, at: datetime) -> list[Plan]:
        """Every step under way fails as abandoned, its outcome unknown. Never interrupts an undo."""
        if self.status is Status.RUNNING:
            for path in list(self._waiting):
                self._answers[path] = Answer(path, at, _abandon(path))
                self._hear(self._answers[path])
        return self._advance(at)

    def retry(self, *, at: datetime) -> list[Plan]:
        """Sends an undo that failed once more. A bug is not mended by this but by replaying on other code."""
        if self._undo_failed:
            self.status, self.parked, self._undo_failed = Status.COMPENSATING, None, False
            self._attempt += 1
            self._undo()
        return self._advance(at)

    def end_replay(self) -> list[Plan]:
        """Everything in history was fed. A step of history that the code did not reach is a mismatch."""
        self._accepts_new = True
        if self.status is not Status.PARKED and self._known:
            name, known = next(iter(self._known.items()))
            self._mismatch(name, f"history has {known.type} for {known.key!r}, the code never gets there")
        return self._take_plans()

    # --- what it tells ----------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> tuple[str, ...]:
        """The steps that it waits for."""
        if self.status is Status.COMPENSATING:
            return (self._undo_label(self._undos[0]),)
        return tuple(self._waiting)

    def park(self, reason: str, *, path: str | None = None, stack: str = "") -> None:
        """Stands still from here on, with nothing scheduled by the event in hand."""
        self.status, self.parked = Status.PARKED, Park(reason, path, stack)
        self._plans.clear()

    # --- the mechanism ----------------------------------------------------------------------------------------------

    def _advance(self, at: datetime) -> list[Plan]:
        cursor = self._cursor
        assert cursor is not None, "begin comes first"
        cursor.now = max(cursor.now, at)
        if self._ready and self.status is Status.RUNNING:
            # While saga code runs there is no event loop in this thread: with one, `asyncio.timeout` or a TaskGroup
            # inside a saga would take the worker's own task for theirs and cancel it, and the loop would finalise a
            # saga's async generators on its own time.
            loop, hooks = asyncio._get_running_loop(), sys.get_asyncgen_hooks()
            if loop is not None:
                asyncio._set_running_loop(None)
            sys.set_asyncgen_hooks(None, None)
            try:
                self._context.run(self._drain, cursor)
            finally:
                sys.set_asyncgen_hooks(*hooks)
                if loop is not None:
                    asyncio._set_running_loop(loop)
        return self._take_plans()

    def _take_plans(self) -> list[Plan]:
        plans, self._plans = self._plans, []
        return plans

    def _drain(self, cursor: Cursor) -> None:
        """Resumes ready branches until every one waits, has ended, or the saga is parked."""
        while self._ready and self.status is Status.RUNNING:
            branch, value, failure = self._ready.popleft()
            cursor.branch = branch
            wanted: Want[Any] | None
            try:
                wanted = branch.body.send(value) if failure is None else branch.body.throw(failure)
            except StopIteration as stop:
                self._settle(branch, stop.value, None)
            except StepFailed as failed:
                self._settle(branch, None, failed)
            except (Exception, asyncio.CancelledError, SystemExit, GeneratorExit) as bug:
                # Nobody can cancel code that runs without an event loop: if it raises that, it is its own doing.
                self._bug(bug)
            else:
                self._want(branch, wanted)
            finally:
                cursor.branch = None
            if self.parked is not None:
                self._ready.append((branch, None, None))  # it will not go on: so that `close` finds it

    def _want(self, branch: Branch, wanted: Want[Any] | None) -> None:  # None: whatever else was yielded
        if isinstance(wanted, Want):
            wanted.cursor.unawaited.pop(wanted.path, None)
        match wanted:
            case Want(cursor=cursor) if cursor is not self._cursor:
                self.park("a saga awaited a step of another saga")
            case Step() if wanted.path in self._steps:
                self.park(f"step {wanted.path} is awaited twice; wanted once, keep its result", path=wanted.path)
            case Step():
                self._steps[wanted.path] = wanted
                self._plan(Plan(wanted.path, wanted.command, wanted.undo, wanted.timeout_s))
                self._waiting[wanted.path] = branch
                early = self._answers.get(wanted.path)
                if early is not None:  # other code than the one that lived it asks later than that one did
                    self._hear(early)
            case All(parts=()):
                self._ready.append((branch, (), None))
            case All(parts=parts, path=path):
                branch.results, branch.left = [None] * len(parts), len(parts)
                for slot, part in enumerate(parts):
                    body: Any = part.__await__() if isinstance(part, Want) else part
                    self._ready.append((Branch(body, f"{path}.{slot + 1}.", branch, slot), None, None))
            case _:
                self.park(
                    f"a saga may await only what `run` makes (run.step, run.all), but it awaited {wanted!r}; "
                    "asyncio and other libraries have no event loop in here"
                )

    def _plan(self, plan: Plan) -> None:
        kind, key = str(plan.command.type_name), plan.command.key
        known = self._known.pop(plan.label, None)
        if known is None:
            if not self._accepts_new:
                self._mismatch(plan.label, f"history has nothing there, the code schedules {kind} for {key!r}")
                return
            self._plans.append(plan)
        elif (known.type, known.key) != (kind, key) and not plan.path.startswith(UNDO):
            self._mismatch(
                plan.path, f"history has {known.type} for {known.key!r}, the code schedules {kind} for {key!r}"
            )

    def _mismatch(self, path: str, what: str) -> None:
        version = f"{self.definition.name} v{self.definition.version}"
        self.park(f"the history does not fit the code of {version}: step {path}: {what}", path=path)

    def _bug(self, bug: BaseException) -> None:
        frames = traceback.walk_tb(bug.__traceback__)
        uses_asyncio = any(frame.f_globals.get("__name__", "").startswith("asyncio") for frame, _ in frames)
        hint = "; a saga may await only what `run` makes, asyncio has no event loop in here" if uses_asyncio else ""
        lines = traceback.format_exception(type(bug), bug, _below(bug.__traceback__))
        self.park(f"{type(bug).__name__}: {bug}{hint}", stack="".join(lines))

    def _settle(self, branch: Branch, value: Any, failure: StepFailed | None) -> None:
        parent = branch.parent
        if parent is None:
            self._end_body(failure)
            return
        parent.results[branch.slot] = (value, failure)
        parent.left -= 1
        if parent.left == 0:
            first = next((failed for _, failed in parent.results if failed is not None), None)
            values = None if first else tuple(value for value, _ in parent.results)
            parent.results = []
            self._ready.append((parent, values, first))

    def _hear(self, answer: Answer) -> None:
        """Resumes who waits for it: a branch, or the compensation."""
        undoing = self._undos[0] if self._undos else None
        command: Command[Any] | None = None
        if answer.path in self._waiting:
            command = self._steps[answer.path].command
        elif undoing is not None and label(answer.path, answer.attempt) == self._undo_label(undoing):
            command = undoing.undo
        if command is None:
            return  # nobody waits for it (yet)
        value: Any = None
        failure: StepFailed | None = None
        try:
            value = answer.read(command)
        except StepFailed as failed:
            failure = failed.with_traceback(None)
        except BadInput as error:
            self.park(f"the answer to step {answer.path} cannot be read: {error}", path=answer.path)
            return
        if answer.path in self._waiting:
            self._failures[answer.path] = failure
            self._ready.append((self._waiting.pop(answer.path), value, failure))
        elif failure is not None:
            self.park(f"an undo failed: {failure}", path=answer.path)
            self._undo_failed = True
        else:
            self._undos.popleft()
            self._attempt = 1
            self._undo()

    # --- compensation -----------------------------------------------------------------------------------------------

    def _end_body(self, failure: StepFailed | None) -> None:
        cursor = self._cursor
        assert cursor is not None
        if failure is None and cursor.unawaited:
            path, want = next(iter(cursor.unawaited.items()))
            what = f"step {path} ({want.command.type_name})" if isinstance(want, Step) else f"run.all {path}"
            self.park(f"{what} was made but never awaited: it did not happen", path=path)
            return
        self.failure = failure
        for step in reversed(self._steps.values()):
            failed = self._failures[step.path]
            unknown = failed is not None and failed.unknown
            if step.undo is not None and (unknown or (failure is not None and failed is None)):
                self._undos.append(step)
        self.status = Status.COMPENSATING
        self._undo()

    def _undo(self) -> None:
        """Schedules the first undo that is left; without one the saga has ended."""
        if not self._undos:
            self.status = Status.COMPLETED if self.failure is None else Status.COMPENSATED
            return
        step = self._undos[0]
        assert step.undo is not None, "only steps with an undo are queued"
        plan = Plan(UNDO + step.path, step.undo, attempt=self._attempt)
        self._plan(plan)
        early = self._answers.get(plan.label)
        if early is not None and self.status is Status.COMPENSATING:
            self._hear(early)

    def _undo_label(self, step: Step[Any]) -> str:
        return label(UNDO + step.path, self._attempt)

    # --- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Drops a saga that is only suspended. Python runs its `finally` blocks; whatever they await is not there."""
        branches = [*self._waiting.values(), *(branch for branch, _, _ in self._ready)]
        self._waiting.clear()
        self._ready.clear()
        for branch in branches:
            line: Branch | None = branch
            while line is not None:
                try:
                    self._context.run(line.body.close)
                except Exception:
                    log.debug("saga %s: a `finally` raised while its copy was dropped", self.id, exc_info=True)
                line = line.parent

    def __del__(self) -> None:
        self.close()


def _abandon(path: str) -> Callable[[Command[Any]], Any]:
    def read(command: Command[Any]) -> Any:
        raise StepAbandoned("the saga was cancelled", path=path, command_type=str(command.type_name))

    return read


def _below(trace: TracebackType | None) -> TracebackType | None:
    return trace.tb_next if trace is not None else None
