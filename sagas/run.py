"""`SagaRun`: what a saga calls. Everything here is decided by history alone, so a replay sees the same.

A saga awaits *wants*, made by `run.step` and `run.all`, and nothing else. A want's path is its place in the story: a
counter per branch, `3.1.2` is the second want of the first branch of the `all` at 3.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Coroutine, Generator
from datetime import datetime
from typing import Any, Generic, TypeAlias, TypeVar, cast, overload
from uuid import UUID, uuid5

from bus.messages import Command
from sagas.errors import BadStep

R = TypeVar("R")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")


class Branch:
    """One line of the story: the saga's body, or a part of an `all`. `count` numbers its wants."""

    __slots__ = ("body", "count", "left", "parent", "prefix", "results", "slot")

    def __init__(self, body: Any, prefix: str = "", parent: Branch | None = None, slot: int = 0) -> None:
        self.body, self.prefix, self.parent, self.slot = body, prefix, parent, slot
        self.count = 0
        self.results: list[Any] = []  # of the `all` it waits for, by position
        self.left = 0


class Cursor:
    """What a run shares with its instance: which branch is being resumed, on which event's time.

    `branch` is None whenever no event is being fed. Saga code that runs then is a `finally` of a suspended saga that is
    being dropped. There is no reference back to the instance: it must be freed, and close its coroutines, before they
    are.
    """

    __slots__ = ("branch", "now", "unawaited")

    def __init__(self, now: datetime) -> None:
        self.branch: Branch | None = None
        self.now = now
        self.unawaited: dict[str, Want[Any]] = {}

    def path(self) -> str:
        if self.branch is None:
            return ""
        self.branch.count += 1
        return f"{self.branch.prefix}{self.branch.count}"


class Want(Generic[R]):
    """Something to wait for in a saga; await it once."""

    __slots__ = ("cursor", "path")

    def __init__(self, cursor: Cursor, path: str) -> None:
        self.cursor, self.path = cursor, path

    def __await__(self) -> Generator[Want[Any], R, R]:
        if self.cursor.branch is None:
            raise GeneratorExit  # the saga is only suspended, and this copy of it is being dropped: nothing may happen
        return (yield self)


class Step(Want[R]):
    """A command under way; awaiting it gives the reply."""

    __slots__ = ("command", "timeout_s", "undo")

    def __init__(
        self, cursor: Cursor, path: str, command: Command[R], undo: Command[Any] | None, timeout_s: float | None
    ) -> None:
        super().__init__(cursor, path)
        self.command, self.undo, self.timeout_s = command, undo, timeout_s


class All(Want[R]):
    """Branches under way; awaiting it gives their results, in order."""

    __slots__ = ("parts",)

    def __init__(self, cursor: Cursor, path: str, parts: tuple[Part[Any], ...]) -> None:
        super().__init__(cursor, path)
        self.parts = parts


Part: TypeAlias = Coroutine[Any, Any, R] | Want[R]


class SagaRun:
    """One instance's hands. Given to the saga; of no use outside of it."""

    __slots__ = ("_cursor", "_id")

    def __init__(self, saga_id: UUID, cursor: Cursor) -> None:
        self._id, self._cursor = saga_id, cursor

    @property
    def id(self) -> UUID:
        """The instance's id: the same for every delivery of the event that started it."""
        return self._id

    def now(self) -> datetime:
        """The recorded time of the event that the saga is just going on with, in UTC: the same in every replay, and
        never earlier than before. The wall clock is not for sagas."""
        return self._cursor.now

    def uuid(self) -> UUID:
        """A new id, the same in every replay. Takes a place in the story, as a step does."""
        return uuid5(self._id, self._cursor.path())

    def step(self, command: Command[R], *, undo: Command[Any] | None = None, timeout_s: float | None = None) -> Step[R]:
        """Sends `command` and, awaited, gives its reply; raises a StepFailed when it was refused, died, was cancelled
        or did not answer within `timeout_s` (None: waits for ever).

        `undo` compensates it: sent when the saga fails later, or when nobody knows whether the step happened. It goes
        to the same service under the same key, where it is seen to that undoing what never happened does nothing and
        that a late command stays out. Undos run one after another, in the reverse order of their steps, without a
        timeout. Raises BadStep, which parks the saga, for an undo of another service or key.
        """
        if not isinstance(cast(object, command), Command):
            raise BadStep(f"run.step was given {command!r}; wanted a Command")
        if undo is not None:
            if not isinstance(cast(object, undo), Command):
                raise BadStep(f"run.step({command.type_name}) was given undo={undo!r}; wanted a Command")
            if undo.type_name.service != command.type_name.service:
                raise BadStep(
                    f"{command.type_name} and its undo {undo.type_name} belong to different services; wanted the same "
                    "one, only it can tell whether there is anything to undo"
                )
            if undo.key != command.key:
                raise BadStep(
                    f"{command.type_name} has key {command.key!r} and its undo {undo.type_name} has key {undo.key!r}; "
                    "wanted the same one: under another key nothing is found that could be undone"
                )
        if timeout_s is not None and not (timeout_s > 0 and math.isfinite(timeout_s)):
            raise BadStep(f"run.step({command.type_name}) was given timeout_s={timeout_s!r}; wanted seconds above 0")
        step = Step(self._cursor, self._cursor.path(), command, undo, timeout_s)
        self._cursor.unawaited[step.path] = step
        return step

    @overload
    def all(self, a: Part[A], b: Part[B], /) -> All[tuple[A, B]]: ...
    @overload
    def all(self, a: Part[A], b: Part[B], c: Part[C], /) -> All[tuple[A, B, C]]: ...
    @overload
    def all(self, a: Part[A], b: Part[B], c: Part[C], d: Part[D], /) -> All[tuple[A, B, C, D]]: ...
    @overload
    def all(self, *parts: Part[A]) -> All[tuple[A, ...]]: ...
    def all(self, *parts: Part[Any]) -> All[Any]:
        """Steps, other `all`s and coroutines side by side; awaited, gives their results in order.

        Waits until every branch has settled, then raises the first StepFailed by position. Any other exception that
        leaves a branch is a bug and parks the saga at once.
        """
        wrong = [part for part in parts if not (isinstance(part, Want) or inspect.iscoroutine(part))]
        if wrong or self._cursor.branch is None:  # nothing will ever await the others: Python would warn of them
            for part in parts:
                if inspect.iscoroutine(part):
                    part.close()
        if wrong:
            raise BadStep(f"run.all was given {wrong[0]!r}; wanted steps and coroutines of this saga")
        branches: All[Any] = All(self._cursor, self._cursor.path(), parts)
        self._cursor.unawaited[branches.path] = branches
        return branches
