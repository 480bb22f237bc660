"""Sagas for the handler runtime: envelopes in, one `Decision` out, committed as one unit.

A saga's id is uuid5 of (definition, id of the event that started it), a command's uuid5 of (saga id, path): whoever
decides the same history sends the same commands with the same ids, and the store keeps one of them.

Races end here or on the stream's version, which the runtime asserts with every decision. Of a reply and a timeout the
first wins and the second decides nothing; whoever decided on an old version is told, reloads and decides again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID, uuid5

from bus.codec import Codec, died_error, reply_type_name
from bus.envelope import Envelope, Kind, ReplyOutcome, StreamId
from bus.errors import BadInput, Undecodable, UnknownType
from bus.messages import Command, Message, Refused
from bus.metrics import MemoryMetrics, Metrics
from bus.seams import Clock, Ids
from bus.summing import Summed
from eventstore.behaviour import Decision
from eventstore.port import CancelTimer
from sagas.definition import SagaDefinition, saga_id, saga_stream
from sagas.errors import BadSaga, told
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
    StoredMessage,
)
from sagas.instance import Status
from sagas.operator import (
    CANCEL_TYPE,
    RETRY_TYPE,
    TIMEOUT_TYPE,
    CancelSaga,
    RetrySaga,
    SagaNotParked,
    SagaNotRunning,
    Timeout,
    parse,
)
from sagas.state import Replayer, SagaState
from sagas.turn import Place, Turn

log = logging.getLogger("foldbus.sagas")

_WHY_LENGTH_MAX = 500


def commands_topic_of(command: type[Message]) -> str:
    """Where the service that owns a command listens."""
    return f"{command.type_name.service}.commands"


class SagaBehaviour:
    """Implements `eventstore.behaviour.Behaviour[SagaState]` for all of a service's sagas.

    One behaviour with `starts=<definition>` per saga takes the events that start it; one without takes replies,
    timeouts and operators' commands for all of them. `definitions` may hold several versions of a saga: a new instance
    begins on the newest that starts on the event's type, a running one stays on its own.

    Raises BadSaga when two definitions share name and version, or `starts` names none of them.
    """

    def __init__(
        self,
        definitions: Sequence[SagaDefinition[Any]],
        *,
        service: str,
        codec: Codec,
        ids: Ids,
        clock: Clock,
        starts: str | None = None,
        replies_topic: str | None = None,
        replies_consumer: str | None = None,
        commands_topic: Callable[[type[Message]], str] = commands_topic_of,
        metrics: Metrics | None = None,
    ) -> None:
        self._definitions: dict[tuple[str, int], SagaDefinition[Any]] = {}
        for definition in definitions:
            if self._definitions.setdefault((definition.name, definition.version), definition) is not definition:
                raise BadSaga(f"two sagas are called {definition.name!r} and have version {definition.version}")
        if starts is not None and all(name != starts for name, _ in self._definitions):
            raise BadSaga(f"no saga {starts!r} among {sorted({name for name, _ in self._definitions})}")
        self._starts, self._codec = starts, codec
        self._metrics: Metrics = metrics or MemoryMetrics()
        self._lates = Summed(clock)  # after a restart there may be hundreds
        self._replayer = Replayer(self._definitions, codec)
        self._place = Place(
            service=service,
            codec=codec,
            ids=ids,
            clock=clock,
            replayer=self._replayer,
            replies_topic=replies_topic or f"{service}.replies",
            replies_consumer=replies_consumer or f"{service}.replies",
            commands_topic=commands_topic,
        )

    # --- the protocol -----------------------------------------------------------------------------------------------

    def stream_of(self, envelope: Envelope) -> StreamId:
        if envelope.type == RETRY_TYPE:
            return saga_stream(parse(RetrySaga, envelope).definition, _saga_key(envelope))
        if envelope.type == CANCEL_TYPE:
            return saga_stream(parse(CancelSaga, envelope).definition, _saga_key(envelope))
        if envelope.kind is Kind.REPLY or envelope.type == TIMEOUT_TYPE:
            if envelope.reply_to is None or not envelope.reply_to.instance:
                raise Undecodable(f"{envelope.type} {envelope.id} names no saga; wanted one in reply_to.instance")
            return saga_stream(envelope.reply_to.instance, _saga_key(envelope))
        name = self._starting(envelope).name
        return saga_stream(name, saga_id(name, envelope.id))

    def initial(self, stream: StreamId) -> SagaState:
        return SagaState(stream)

    def fold(self, state: SagaState, records: Sequence[Envelope]) -> SagaState:
        if records:
            state.fold(records)
        return state

    def decide(self, state: SagaState, envelope: Envelope) -> Decision[SagaState]:
        """Empty for what changes nothing any more: a second start, a late reply or timeout, an unknown saga."""
        turn = Turn(self._place, state, envelope)
        try:
            if envelope.type == RETRY_TYPE:
                self._retry(turn, parse(RetrySaga, envelope))
            elif envelope.type == CANCEL_TYPE:
                self._cancel(turn, parse(CancelSaga, envelope))
            elif envelope.kind is Kind.REPLY:
                self._reply(turn)
            elif envelope.type == TIMEOUT_TYPE:
                self._timeout(turn)
            else:
                self._start(turn)
            decision = turn.decision()
        except BaseException:
            state.drop()  # it may have been fed what will not be committed
            raise
        self._report(turn)
        for kind, n in self._lates.due().items():
            log.info("late: %s, %d times; they change nothing", kind, n)
        return decision

    # --- what may come ----------------------------------------------------------------------------------------------

    def _start(self, turn: Turn) -> None:
        definition = self._starting(turn.envelope)
        if turn.state.status is not None:
            return self._late(turn, "start")
        self._codec.decode(turn.envelope)  # unreadable: a dead letter, not a saga
        started = SagaStarted(
            at=turn.at, definition=definition.name, version=definition.version, start=StoredMessage.of(turn.envelope)
        )
        turn.happened(started)
        turn.go_on(lambda: self._replayer.replay(turn.state.id, [started], accepts_new=True))
        return None

    def _reply(self, turn: Turn) -> None:
        reply = turn.envelope
        step = turn.state.under_way.get(reply.causation_id) if reply.causation_id else None
        if step is None:
            return self._late(turn, "reply")
        if reply.outcome is None or reply.type != reply_type_name(step.type):
            raise Undecodable(
                f"reply {reply.id} to step {step.path} of saga {_named(turn.state.stream)} is a {reply.type} "
                f"with outcome {reply.outcome}; wanted {reply_type_name(step.type)} with an outcome"
            )
        turn.happened(
            StepReplied(
                at=turn.at,
                path=step.path,
                attempt=step.attempt,
                outcome=reply.outcome,
                data=reply.data,
                why=self._why(reply),
            )
        )
        if step.timeout_s is not None:
            turn.cancel_timer(step)
        turn.feed()
        return None

    def _timeout(self, turn: Turn) -> None:
        turn.timers.append(CancelTimer(self._place.replies_consumer, turn.envelope.id))
        step = turn.state.under_way.get(uuid5(turn.state.id, parse(Timeout, turn.envelope).path))
        if step is None:
            return self._late(turn, "timeout")
        turn.happened(StepExpired(at=turn.at, path=step.path, timeout_s=step.timeout_s))
        turn.feed()
        return None

    def _retry(self, turn: Turn, command: RetrySaga) -> None:
        state = turn.state
        if state.status is not Status.PARKED:
            turn.answer(SagaNotParked(f"the saga is {state.status or 'unknown'}, nothing to retry"))
            return
        retried = SagaRetried(at=turn.at, by=command.by)
        turn.happened(retried)
        turn.answer(None)
        turn.go_on(lambda: self._replayer.replay(state.id, [*state.history, retried], accepts_new=True))

    def _cancel(self, turn: Turn, command: CancelSaga) -> None:
        state = turn.state
        if state.status is not Status.RUNNING:
            turn.answer(SagaNotRunning(f"the saga is {state.status or 'unknown'}, nothing to cancel"))
            return
        for step in state.under_way.values():
            if step.timeout_s is not None:
                turn.cancel_timer(step)
        turn.happened(SagaCancelled(at=turn.at, by=command.by))
        turn.answer(None)
        turn.feed()

    def _late(self, turn: Turn, what: str) -> None:
        """Ordinary, and harmless; but a flood of it means that timeouts are too short."""
        state = turn.state
        name = state.stream.category.removeprefix("saga.")
        if state.status is None:
            log.warning("a %s for saga %s, which has no history", what, _named(state.stream))
            self._metrics.count("foldbus_saga_unknown_total", saga=name, what=what)
        else:
            self._metrics.count("foldbus_saga_late_total", saga=name, what=what)
            self._lates.add(f"{what} for a saga {name} that is {state.status}")
            log.debug("a late %s for saga %s (%s): it changes nothing", what, _named(state.stream), state.status)

    def _starting(self, envelope: Envelope) -> SagaDefinition[Any]:
        fitting = [
            definition
            for (name, _), definition in self._definitions.items()
            if name == self._starts and str(definition.start.type_name) == envelope.type
        ]
        if not fitting:
            raise UnknownType(f"{envelope.type} starts no saga here; wanted an event that starts {self._starts!r}")
        return max(fitting, key=lambda definition: definition.version)

    def _why(self, reply: Envelope) -> str | None:
        """A line for people; the answer itself is in the bytes."""
        try:
            if reply.outcome in (ReplyOutcome.DIED, ReplyOutcome.UNKNOWN):
                return died_error(reply)[:_WHY_LENGTH_MAX]
            if reply.outcome is ReplyOutcome.REFUSED:
                refusal = self._codec.decode_reply(reply, Command[None])
                if isinstance(refusal, Refused):
                    return told(refusal)[:_WHY_LENGTH_MAX]
        except BadInput as error:
            return f"unreadable: {error}"[:_WHY_LENGTH_MAX]
        return None

    def _report(self, turn: Turn) -> None:
        """One metric and one log line for each turning point."""
        name = turn.state.stream.category.removeprefix("saga.")
        for event in turn.events:
            match event:
                case SagaStarted():
                    self._metrics.count("foldbus_saga_started_total", saga=name)
                case StepExpired(path=path):
                    self._metrics.count("foldbus_saga_step_timed_out_total", saga=name)
                    log.warning("saga %s: step %s timed out, its outcome is unknown", _named(turn.state.stream), path)
                case SagaCompensating(why=why):
                    self._metrics.count("foldbus_saga_compensating_total", saga=name)
                    log.info("saga %s compensates: %s", _named(turn.state.stream), why)
                case SagaParked(reason=reason):
                    self._metrics.count("foldbus_saga_parked_total", saga=name)
                    stack = turn.stack and f"\n{turn.stack}"
                    log.error("saga %s is parked: %s%s", _named(turn.state.stream), reason, stack)
                case SagaRetried() | SagaCancelled():
                    self._metrics.count(f"foldbus_{_short(event)}_total", saga=name)
                    log.info("%s %s by %s", _short(event), _named(turn.state.stream), event.by or "somebody")
                case SagaCompleted() | SagaCompensated():
                    self._metrics.count(f"foldbus_{_short(event)}_total", saga=name)
                case _:
                    pass


def _saga_key(envelope: Envelope) -> UUID:
    try:
        return UUID(envelope.key)
    except ValueError as error:
        raise Undecodable(
            f"{envelope.type} {envelope.id} has the key {envelope.key[:80]!r}; wanted a saga id"
        ) from error


def _named(stream: StreamId) -> str:
    """`fulfil-order 01a1…`: its name and its id, as commands take them."""
    return f"{stream.category.removeprefix('saga.')} {stream.id}"


def _short(event: SagaEvent) -> str:
    """`foldbus.saga-retried.v1` as `saga_retried`."""
    return event.type_name.split(".")[1].replace("-", "_")
