"""Two workers over one stored history, driven by hand: for races that must happen, not may."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

from bus.codec import JsonCodec, died_reply, reply_envelope
from bus.envelope import Envelope, Origin, ReplyOutcome, StreamId
from bus.messages import Command, Event, Message, Refused
from bus.metrics import MemoryMetrics
from bus.registry import Registry
from eventstore.behaviour import Decision
from eventstore.port import CancelTimer, Timer
from sagas import RetrySaga, SagaBehaviour, SagaDefinition, SagaState
from sagas.operator import CancelSaga
from sagas.testing import Cancelled, CountedIds, Died, VirtualClock
from tests.sagas import stories

MESSAGES = [
    found
    for found in vars(stories).values()
    if isinstance(found, type) and issubclass(found, Message) and hasattr(found, "type_name")
]


class World:
    """The stored streams, what was sent and the timers; `worker` makes a process that knows nothing yet."""

    def __init__(self, *definitions: SagaDefinition[Any]) -> None:
        self.definitions: Sequence[SagaDefinition[Any]] = definitions
        self.clock, self.metrics = VirtualClock(), MemoryMetrics()
        self.codec = JsonCodec(Registry(MESSAGES, [stories.CardDeclined]))
        self.streams: dict[StreamId, list[Envelope]] = {}
        self.sent: list[Envelope] = []
        self.timers: dict[UUID, Timer] = {}
        self.starter = self.worker(starts=definitions[0].name)
        self.replier = self.worker()

    def worker(self, *definitions: SagaDefinition[Any], starts: str | None = None) -> Worker:
        return Worker(self, definitions or tuple(self.definitions), starts)

    def deploy(self, *definitions: SagaDefinition[Any]) -> None:
        """All processes are replaced by ones that run these."""
        self.definitions = definitions
        self.starter, self.replier = self.worker(starts=definitions[0].name), self.worker()

    @property
    def history(self) -> list[Envelope]:
        (only,) = self.streams.values()
        return only

    @property
    def saga_id(self) -> str:
        (only,) = self.streams
        return only.id

    def start_of(self, event: Event, **headers: str) -> Envelope:
        first = uuid4()
        origin = Origin("orders", first, self.clock.now(), first, tenant="acme", actor="ann", headers=headers)
        return self.codec.encode(event, origin, topic="orders.events")

    def start(self, event: Event) -> Decision[SagaState]:
        return self.starter.handle(self.start_of(event))

    def commands(self) -> list[Command[Any]]:
        found = [self.codec.decode(envelope) for envelope in self.sent]
        return [command for command in found if isinstance(command, Command)]

    def names(self) -> list[str]:
        return stories.names(self.commands())

    def types(self) -> list[str]:
        return [record.type.removeprefix("foldbus.").removesuffix(".v1") for record in self.history]

    def reply(self, answer: Any, to: Envelope | None = None) -> Envelope:
        """An answer to the command that was sent last, or to `to`."""
        command = to or self.sent[-1]
        origin = Origin(command.type.split(".")[0], uuid4(), self.clock.now(), command.correlation_id)
        match answer:
            case Died(error=error):
                return died_reply(command, error, origin)
            case Cancelled():
                return reply_envelope(command, ReplyOutcome.CANCELLED, b"null", origin)
            case _:
                return self.codec.encode_reply(command, answer, origin)

    def answer(self, answer: Any, to: Envelope | None = None) -> Decision[SagaState]:
        return self.replier.handle(self.reply(answer, to))

    def verb(self, verb: type[RetrySaga] | type[CancelSaga]) -> Envelope:
        stream = next(iter(self.streams))
        message = verb(saga_id=UUID(stream.id), definition=stream.category.removeprefix("saga."), by="ann")
        origin = Origin("cli", uuid4(), self.clock.now(), uuid4())
        return self.codec.encode(message, origin, topic="orders.replies")

    def retry(self) -> Decision[SagaState]:
        return self.replier.handle(self.verb(RetrySaga))


class Worker:
    def __init__(self, world: World, definitions: Sequence[SagaDefinition[Any]], starts: str | None) -> None:
        self.world = world
        self.behaviour = SagaBehaviour(
            definitions,
            service="orders",
            codec=world.codec,
            ids=CountedIds(str(uuid4())),
            clock=world.clock,
            starts=starts,
            metrics=world.metrics,
        )
        self.states: dict[StreamId, tuple[int, SagaState]] = {}

    def state(self, stream: StreamId) -> SagaState:
        """The cached state when it is at the stream's version, else one folded anew."""
        records = self.world.streams.get(stream, [])
        version, state = self.states.get(stream, (-1, None))
        if state is None or version != len(records):
            state = self.behaviour.fold(self.behaviour.initial(stream), records)
        return state

    def decide(self, envelope: Envelope) -> tuple[StreamId, int, Decision[SagaState]]:
        """Decides without storing: with the version that it decided on."""
        stream = self.behaviour.stream_of(envelope)
        version = len(self.world.streams.get(stream, []))
        return stream, version, self.behaviour.decide(self.state(stream), envelope)

    def commit(self, decided: tuple[StreamId, int, Decision[SagaState]]) -> bool:
        """False: somebody was faster, nothing is stored."""
        stream, version, decision = decided
        records = self.world.streams.get(stream, [])
        if version != len(records):
            self.states.pop(stream, None)
            return False
        stored = [
            replace(event, stream=stream, version=version + number)
            for number, event in enumerate(decision.events, start=1)
        ]
        if stored:
            self.world.streams[stream] = [*records, *stored]
        self.states[stream] = (version + len(stored), decision.state)
        self.world.sent += decision.outgoing
        for timer in decision.timers:
            match timer:
                case Timer():
                    self.world.timers.setdefault(timer.id, timer)
                case CancelTimer():
                    self.world.timers.pop(timer.id, None)
        return True

    def handle(self, envelope: Envelope) -> Decision[SagaState]:
        decided = self.decide(envelope)
        assert self.commit(decided)
        return decided[2]


__all__ = ["CardDeclined", "Refused", "Worker", "World"]
CardDeclined = stories.CardDeclined
