"""One message on its way to a decision: what happened, what the saga makes of it, what is to be sent.

Nothing touches the saga's state before `decision`: when anything raises on the way, the history is as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID, uuid5

from bus.codec import Codec
from bus.envelope import NO_HEADERS, Envelope, Kind, Origin, ReplyTo
from bus.messages import Message, Refused
from bus.seams import Clock, Ids
from eventstore.behaviour import Decision
from eventstore.port import CancelTimer, Timer
from sagas import events
from sagas.errors import CannotRun
from sagas.events import (
    SagaCompensated,
    SagaCompensating,
    SagaCompleted,
    SagaEvent,
    SagaParked,
    SagaStarted,
    StepScheduled,
    StoredMessage,
)
from sagas.instance import UNDO, Instance, Park, Plan, Status
from sagas.operator import TIMEOUT_TYPE, Timeout
from sagas.state import Replayer, SagaState

_TRACE = ("traceparent", "tracestate")


@dataclass(frozen=True, slots=True)
class Place:
    """What every turn of a behaviour works with."""

    service: str
    codec: Codec
    ids: Ids
    clock: Clock
    replayer: Replayer
    replies_topic: str
    replies_consumer: str
    commands_topic: Callable[[type[Message]], str]


class Turn:
    """One message on its way to a decision. Nothing touches the state before `decision`."""

    def __init__(self, place: Place, state: SagaState, envelope: Envelope) -> None:
        self.place, self.state, self.envelope = place, state, envelope
        self.at = place.clock.now()
        self._trace = {name: value for name, value in envelope.headers.items() if name in _TRACE} or NO_HEADERS
        self.events: list[SagaEvent] = []
        self.outgoing: list[Envelope] = []
        self.timers: list[Timer | CancelTimer] = []
        self.reply: Envelope | None = None
        self.instance: Instance | None = state.instance
        self.stack = ""

    def happened(self, event: SagaEvent) -> None:
        self.events.append(event)

    def answer(self, answer: Refused | None) -> None:
        if self.envelope.reply_to is not None:
            origin = self._origin(self.place.ids.new(), self.envelope)
            self.reply = self.place.codec.encode_reply(self.envelope, answer, origin)

    def cancel_timer(self, step: StepScheduled) -> None:
        self.timers.append(CancelTimer(self.place.replies_consumer, timer_id(self.state.id, step.path)))

    def feed(self) -> None:
        """Lets the saga go on with the event that just happened. A parked one keeps it for its retry."""
        if self.state.status is not Status.PARKED:
            self.go_on(self._fed)

    def go_on(self, advance: Callable[[], tuple[Instance, list[Plan]]]) -> None:
        """Runs the saga's code and stages what comes of it."""
        try:
            if self.state.unreadable is not None:
                raise CannotRun(self.state.unreadable)
            self.instance, plans = advance()
        except CannotRun as error:
            return self._park(Park(str(error)))
        instance = self.instance
        if instance.parked is not None:
            return self._park(instance.parked)
        if instance.failure is not None and not self._told_of_failure():
            self.happened(SagaCompensating(at=self.at, why=str(instance.failure)))
        scheduled: list[SagaEvent] = []
        for plan in plans:
            try:
                scheduled.append(self._send(plan))
            except Exception as error:  # the saga made a command that cannot be sent: a bug of the saga's
                self.outgoing.clear()
                self.timers = [timer for timer in self.timers if isinstance(timer, CancelTimer)]
                return self._park(Park(f"step {plan.path} cannot be sent: {type(error).__name__}: {error}", plan.path))
        self.events += scheduled
        if instance.status is Status.COMPLETED:
            self.happened(SagaCompleted(at=self.at))
        elif instance.status is Status.COMPENSATED:
            self.happened(SagaCompensated(at=self.at, why=str(instance.failure)))
        return None

    def decision(self) -> Decision[SagaState]:
        records = self._records()
        for event in self.events:
            self.state.apply(event)
        if self.instance is not self.state.instance:
            self.state.drop()
            self.state.instance = self.instance
        resting = self.state.status is Status.PARKED or (self.state.status is not None and self.state.status.ended)
        if resting:
            self.state.drop()
        return Decision(self.state, records, tuple(self.outgoing), tuple(self.timers), self.reply, forget=resting)

    def _fed(self) -> tuple[Instance, list[Plan]]:
        state, replayer = self.state, self.place.replayer
        instance = state.instance or replayer.replay(state.id, state.history)[0]
        return instance, replayer.feed(instance, self.events[-1])

    def _park(self, park: Park) -> None:
        self.stack = park.stack
        self.happened(SagaParked(at=self.at, reason=park.reason, path=park.path))

    def _told_of_failure(self) -> bool:
        return any(isinstance(event, SagaCompensating) for event in self.state.history)

    def _send(self, plan: Plan) -> StepScheduled:
        """Stages the command, and its timer; gives the event that records it."""
        place, saga = self.place, self.state.id
        undoes = uuid5(saga, plan.path.removeprefix(UNDO)) if plan.path.startswith(UNDO) else None
        to = ReplyTo(place.replies_topic, str(saga), self._started.definition)
        command = place.codec.encode(
            plan.command,
            self._origin(uuid5(saga, plan.label), self._started.start),
            topic=place.commands_topic(type(plan.command)),
            reply_to=to,
            undoes=undoes,
        )
        self.outgoing.append(command)
        if plan.timeout_s is not None:
            self.timers.append(self._timer(plan.path, plan.timeout_s, command.id, to))
        return StepScheduled(
            at=self.at,
            path=plan.path,
            id=command.id,
            type=command.type,
            key=command.key,
            attempt=plan.attempt,
            undo_type=str(plan.undo.type_name) if plan.undo is not None else None,
            timeout_s=plan.timeout_s,
        )

    def _timer(self, path: str, timeout_s: float, command_id: UUID, to: ReplyTo) -> Timer:
        id_, start = timer_id(self.state.id, path), self._started.start
        envelope = Envelope(
            id=id_,
            kind=Kind.EVENT,
            type=TIMEOUT_TYPE,
            source=self.place.service,
            key=to.key,
            data=Timeout(path=path).model_dump_json().encode(),
            time=self.at,
            correlation_id=start.correlation_id,
            causation_id=command_id,
            reply_to=to,
            tenant=start.tenant,
            actor=start.actor,
            headers=self._trace,
        )
        due_at = self.at + timedelta(seconds=timeout_s)
        return Timer(self.place.replies_consumer, id_, to.key, due_at, envelope)

    @property
    def _started(self) -> SagaStarted:
        if self.state.history:
            return self.state.started
        first = self.events[0]
        assert isinstance(first, SagaStarted)
        return first

    def _records(self) -> tuple[Envelope, ...]:
        if not self.events:
            return ()
        start, cause, place, key = self._started.start, self.envelope.id, self.place, self.state.stream.id
        return tuple(
            events.stored(event, place.ids.new(), key=key, source=place.service, start=start, cause=cause)
            for event in self.events
        )

    def _origin(self, message_id: UUID, story: StoredMessage | Envelope) -> Origin:
        """Of the story's correlation, tenant and actor; caused by the message in hand, within its trace."""
        return Origin(
            source=self.place.service,
            id=message_id,
            time=self.at,
            correlation_id=story.correlation_id,
            causation_id=self.envelope.id,
            tenant=story.tenant,
            actor=story.actor,
            headers=self._trace,
        )


def timer_id(saga: UUID, path: str) -> UUID:
    return uuid5(saga, f"timeout:{path}")
