"""`SagaState`: a saga's history folded, and its live instance, rebuilt from that history whenever it is needed.

Folding runs no user code. The instance is made when there is something to feed, kept while the saga runs, and thrown
away whenever there is doubt: the history is the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

from bus.codec import Codec, died_error, reply_type_name
from bus.envelope import Envelope, Kind, ReplyOutcome, StreamId
from bus.errors import BadInput
from bus.messages import Command, Event, Message, Refused
from sagas import events
from sagas.definition import SagaDefinition
from sagas.errors import CannotRun, StepCancelled, StepDied, StepRefused, StepTimedOut, StepUnknown
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
from sagas.instance import UNDO, Answer, Instance, Known, Plan, Status

Definitions = Mapping[tuple[str, int], SagaDefinition[Any]]
"""What this process can run, by name and version."""


class SagaState:
    """What the behaviour decides on. `apply` keeps the books; `instance` is at the end of `history` or None."""

    def __init__(self, stream: StreamId) -> None:
        self.stream = stream
        self.id = UUID(stream.id)
        self.status: Status | None = None
        """None: nothing has started it."""
        self.history: list[SagaEvent] = []
        self.under_way: dict[UUID, StepScheduled] = {}
        """Steps without an outcome, by command id."""
        self.instance: Instance | None = None
        self.unreadable: str | None = None
        """Why the history cannot be replayed here, when an event in it is not known to this program."""

    @property
    def started(self) -> SagaStarted:
        first = self.history[0]
        assert isinstance(first, SagaStarted), "a saga's history begins with its start"
        return first

    def fold(self, records: Sequence[Envelope]) -> None:
        self.drop()
        for record in records:
            try:
                self.apply(events.read(record))
            except BadInput as error:
                self.unreadable = self.unreadable or str(error)

    def apply(self, event: SagaEvent) -> None:
        self.history.append(event)
        match event:
            case SagaStarted():
                self.status = Status.RUNNING
            case StepScheduled(path=path):
                self.under_way[event.id] = event
                self.status = Status.COMPENSATING if path.startswith(UNDO) else Status.RUNNING
            case StepReplied(path=path, attempt=attempt):
                self._settle(path, attempt)
            case StepExpired(path=path):
                self._settle(path, 1)
            case SagaCancelled():
                self.under_way.clear()
            case SagaCompensating():
                self.status = Status.COMPENSATING
            case SagaParked():
                self.status = Status.PARKED
            case SagaRetried():
                self.status = Status.RUNNING  # what follows it says otherwise
            case SagaCompleted():
                self.status = Status.COMPLETED
            case SagaCompensated():
                self.status = Status.COMPENSATED
            case _:
                pass

    def drop(self) -> None:
        """Forgets the live instance; the next event to feed rebuilds it."""
        if self.instance is not None:
            self.instance.close()
            self.instance = None

    def _settle(self, path: str, attempt: int) -> None:
        found = next((s.id for s in self.under_way.values() if (s.path, s.attempt) == (path, attempt)), None)
        if found is not None:
            del self.under_way[found]


class Replayer:
    """Feeds history to instances: turns stored events into what an instance understands."""

    def __init__(self, definitions: Definitions, codec: Codec) -> None:
        self.definitions, self.codec = definitions, codec

    def replay(
        self, saga_id: UUID, history: Sequence[SagaEvent], *, accepts_new: bool = False
    ) -> tuple[Instance, list[Plan]]:
        """An instance that has lived through `history`, and the plans that history lacks (none unless `accepts_new`).

        Where code and history part, the instance comes back parked and says at which step. Raises CannotRun when there
        is no instance to be had at all.
        """
        started = history[0]
        assert isinstance(started, SagaStarted)
        definition = self._definition(started)
        try:
            start = self._start(started.start.envelope(), str(definition.start.type_name))
        except BadInput as error:
            raise CannotRun(f"the event that started the saga cannot be read: {error}") from error
        if not (isinstance(start, definition.start) and isinstance(start, Event)):
            raise CannotRun(f"the saga started on {started.start.type}; {definition!r} cannot take it")
        known = {e.label: Known(e.type, e.key) for e in history if isinstance(e, StepScheduled)}
        instance = Instance(definition, saga_id, known=known, accepts_new=accepts_new)
        plans = instance.begin(start, at=started.at)
        for event in history[1:]:
            plans += self.feed(instance, event)
        plans += instance.end_replay()
        return instance, plans if instance.status is not Status.PARKED else []

    def feed(self, instance: Instance, event: SagaEvent) -> list[Plan]:
        """One event of history, recorded just now or long ago. Gives the commands that history lacks."""
        match event:
            case StepReplied():
                return instance.feed(Answer(event.path, event.at, self._answer(event, instance.id), event.attempt))
            case StepExpired():
                return instance.feed(Answer(event.path, event.at, _expiry(event)))
            case SagaCancelled():
                return instance.cancel(at=event.at)
            case SagaRetried():
                return instance.retry(at=event.at)
            case _:
                return []  # what the saga did itself, or what is for people

    def _start(self, stored: Envelope, wanted: str) -> Message:
        """As the definition names it now; of an event that was split since, the first part that it can start on."""
        if stored.type == wanted:
            return self.codec.decode(stored)
        parts = self.codec.upcast(stored, (wanted,))
        return self.codec.decode(next((part for part in parts if part.type == wanted), stored))

    def _answer(self, event: StepReplied, saga_id: UUID) -> Callable[[Command[Any]], Any]:
        def read(command: Command[Any]) -> Any:
            if event.outcome is ReplyOutcome.OK and event.path.startswith(UNDO):
                return None  # nobody looks at it, so it need not be readable
            kind = str(command.type_name)
            reply = Envelope(
                id=saga_id,
                kind=Kind.REPLY,
                type=reply_type_name(kind),
                source=command.type_name.service,
                key=str(saga_id),
                data=event.data,
                time=event.at,
                correlation_id=saga_id,
                outcome=event.outcome,
            )
            if event.outcome is ReplyOutcome.DIED:
                raise StepDied(died_error(reply), path=event.path, command_type=kind)
            if event.outcome is ReplyOutcome.UNKNOWN:
                raise StepUnknown(died_error(reply), path=event.path, command_type=kind)
            if event.outcome is ReplyOutcome.CANCELLED:
                raise StepCancelled("arrived after its own undo", path=event.path, command_type=kind)
            answer = self.codec.decode_reply(reply, type(command))
            if isinstance(answer, Refused):
                raise StepRefused(answer, path=event.path, command_type=kind)
            return answer

        return read

    def _definition(self, started: SagaStarted) -> SagaDefinition[Any]:
        found = self.definitions.get((started.definition, started.version))
        if found is None:
            here = [f"v{version}" for name, version in sorted(self.definitions) if name == started.definition]
            raise CannotRun(
                f"the saga began on {started.definition} v{started.version}, which is not deployed here "
                f"(deployed: {', '.join(here) or 'no version of it'}); list that version beside the others"
            )
        return found


def _expiry(event: StepExpired) -> Callable[[Command[Any]], Any]:
    def read(command: Command[Any]) -> Any:
        raise StepTimedOut(event.timeout_s, path=event.path, command_type=str(command.type_name))

    return read
