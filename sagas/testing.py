"""A test kit for sagas: no broker, no database, no event loop, and thirty days in milliseconds.

```python
played = drive(fulfil_order, OrderPlaced(...), {
    ReserveStock: StockReserved(...),            # the reply
    TakePayment: CardDeclined("no funds"),       # a refusal
    ShipOrder: NO_ANSWER,                        # its timeout_s decides
})
assert played.status == "compensated"
assert played.sent == [ReserveStock(...), TakePayment(...), ReleaseStock(...)]
```

Everything goes through the behaviour that runs in a service, as bytes. Before every event the saga is also rebuilt from
its stored history, as after a crash, and must decide the same: a saga that asks the clock, a random number or the
order of a set is caught here.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias, cast
from uuid import UUID, uuid5

from pydantic import BaseModel

from bus.codec import JsonCodec, died_reply, reply_envelope, unknown_reply
from bus.envelope import Envelope, Origin, ReplyOutcome
from bus.messages import Command, Event, Message, Refused
from bus.registry import Registry
from eventstore.behaviour import Decision
from eventstore.port import Timer
from sagas.behaviour import SagaBehaviour
from sagas.definition import SagaDefinition
from sagas.errors import NotDeterministic, SagaError
from sagas.instance import Status
from sagas.state import SagaState
from sagas.view import SagaView, describe, timeline

START = datetime(2026, 1, 1, 12, tzinfo=UTC)
_SERVICE = "saga-test"
_IDS = UUID("0b5e3f0e-5a0f-5a55-8d0c-6f6f1d1f6f11")


@dataclass(frozen=True, slots=True)
class Died:
    """The service gave the command up."""

    error: str = "scripted"


@dataclass(frozen=True, slots=True)
class Unknown:
    """The service gave the command up after its handler had begun to call the outside world."""

    error: str = "scripted"


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The service dropped the command because its undo had come first."""


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """No answer ever comes: the step's timeout decides."""


@dataclass(frozen=True, slots=True)
class After:
    """`answer` comes after so many seconds of virtual time; as a late reply, if the timeout was earlier."""

    seconds: float
    answer: BaseModel | Refused | Died | Unknown | Cancelled | NoAnswer | None = None


NO_ANSWER = NoAnswer()

Answer: TypeAlias = BaseModel | Refused | Died | Unknown | Cancelled | NoAnswer | After | None
Answers: TypeAlias = Mapping[type[Command[Any]], Answer | Sequence[Answer]] | Callable[[Command[Any]], Answer]
"""By the type of command, a sequence answering one after another; or a function. A type that is left out answers with
None, which only fits `Command[None]` and undos."""


@dataclass(frozen=True, slots=True)
class Played:
    """How it went. `sent` are all commands in order, undos among them; `reason` says why it is parked or compensated;
    `took_s` is virtual time."""

    status: Status
    sent: list[Command[Any]]
    reason: str | None
    took_s: float
    view: SagaView
    history: list[Envelope]

    @property
    def lines(self) -> list[str]:
        """The timeline as text, for a look at what happened."""
        return timeline(self.view)


def drive(
    definition: SagaDefinition[Any], start: Event, answers: Answers, *, seed: int = 0, messages_max: int = 10_000
) -> Played:
    """Plays a saga until nothing is under way. Answers take no time and, where several are under way, come in an order
    that `seed` decides.

    Raises NotDeterministic when the saga decides otherwise after a rebuild, SagaError when a step without a timeout has
    no answer or the saga does not end within `messages_max` messages.
    """
    return _Play(definition, answers, seed).run(start, messages_max)


class VirtualClock:
    def __init__(self, now: datetime = START) -> None:
        self.time = now

    def now(self) -> datetime:
        return self.time

    def monotonic(self) -> float:
        return (self.time - START).total_seconds()


class CountedIds:
    """Ids that are the same in every run."""

    def __init__(self, name: str = "") -> None:
        self.name, self.count = name, 0

    def new(self) -> UUID:
        self.count += 1
        return uuid5(_IDS, f"{self.name}{self.count}")


class _LearningCodec(JsonCodec):
    """Comes to know what it encodes, so that everything can be read back from its bytes."""

    def __init__(self, start: type[Event]) -> None:
        self._learned = _LearnedRefusals([start])
        super().__init__(self._learned)

    def encode(self, message: Message, origin: Origin, **options: Any) -> Envelope:
        self.registry.add(type(message))
        return super().encode(message, origin, **options)

    def encode_reply(self, command: Envelope, answer: BaseModel | Refused | None, origin: Origin) -> Envelope:
        if isinstance(answer, Refused):
            self._learned.refusals_seen[answer.code] = type(answer)
        return super().encode_reply(command, answer, origin)


class _LearnedRefusals(Registry):
    def __init__(self, messages: Sequence[type[Message]]) -> None:
        super().__init__(messages)
        self.refusals_seen: dict[str, type[Refused]] = {}

    def refusal(self, code: str) -> type[Refused] | None:
        return self.refusals_seen.get(code)


@dataclass(order=True, slots=True)
class _Due:
    at: datetime
    tie: float
    envelope: Envelope = field(compare=False)


class _Play:
    """The world around one saga: answers its commands, rings its timers, stores its history."""

    def __init__(self, definition: SagaDefinition[Any], answers: Answers, seed: int) -> None:
        self.answers = answers
        self.random = random.Random(seed)
        self.clock, self.ids = VirtualClock(), CountedIds()
        self.codec = _LearningCodec(definition.start)
        self.behaviour = SagaBehaviour(
            [definition],
            service=_SERVICE,
            codec=self.codec,
            ids=self.ids,
            clock=self.clock,
            starts=definition.name,
        )
        self.due: list[_Due] = []
        self.cancelled: set[UUID] = set()
        self.asked: dict[type[Command[Any]], int] = {}
        self.sent: list[Command[Any]] = []
        self.records: list[Envelope] = []

    def run(self, start: Event, messages_max: int) -> Played:
        start_id = self.ids.new()
        first = self.codec.encode(start, Origin(start.type_name.service, start_id, START, start_id))
        stream = self.behaviour.stream_of(first)
        state = self.behaviour.initial(stream)
        self._post(first, 0)
        for _ in range(messages_max):
            if not self.due:
                break
            due = heapq.heappop(self.due)
            if due.envelope.id in self.cancelled:
                continue
            self.clock.time = due.at
            state = self._handle(state, due.envelope)
        assert state.status is not None
        view = describe(self.records, now=self.clock.time)
        if not state.status.ended and state.status is not Status.PARKED:
            why = "the saga does not come to an end" if self.due else "there is neither an answer nor a timeout"
            raise SagaError("\n".join([f"{why}: it waits for step {', '.join(view.waiting)}", *timeline(view)]))
        state.drop()
        took_s = view.age.total_seconds()
        return Played(state.status, self.sent, view.error, took_s, view, self.records)

    def _handle(self, lived: SagaState, envelope: Envelope) -> SagaState:
        """Decides twice, as the one that lived on and as one rebuilt from what is stored, and goes on with either."""
        rebuilt = self.behaviour.fold(self.behaviour.initial(lived.stream), self.records)
        decision, again = self.behaviour.decide(lived, envelope), self.behaviour.decide(rebuilt, envelope)
        if _content(decision) != _content(again):
            raise NotDeterministic(
                f"at {envelope.type} the saga, rebuilt from its history, decides otherwise than the one that lived it; "
                "a saga must depend on nothing but its event, its answers and `run`\n"
                f"lived:   {_shown(decision)}\nrebuilt: {_shown(again)}"
            )
        on, off = (decision, again) if self.random.random() < 0.5 else (again, decision)
        off.state.drop()
        version = len(self.records)
        self.records += [
            replace(event, stream=lived.stream, version=version + number)
            for number, event in enumerate(on.events, start=1)
        ]
        for timer in on.timers:
            if isinstance(timer, Timer):
                heapq.heappush(self.due, _Due(timer.due_at, self.random.random(), timer.envelope))
            else:
                self.cancelled.add(timer.id)
        for command in on.outgoing:
            self._answer(command)
        return on.state

    def _answer(self, envelope: Envelope) -> None:
        command = cast(Command[Any], self.codec.decode(envelope))
        self.sent.append(command)
        scripted = self._scripted(command, undo=envelope.undoes is not None)
        after = scripted if isinstance(scripted, After) else After(0.0, scripted)
        answer, delay_s = after.answer, after.seconds
        at = self.clock.time + timedelta(seconds=delay_s)
        origin = Origin(command.type_name.service, self.ids.new(), at, envelope.correlation_id, envelope.id)
        match answer:
            case NoAnswer():
                pass
            case Died(error=error):
                self._post(died_reply(envelope, error, origin), delay_s)
            case Unknown(error=error):
                self._post(unknown_reply(envelope, error, origin), delay_s)
            case Cancelled():
                self._post(reply_envelope(envelope, ReplyOutcome.CANCELLED, b"null", origin), delay_s)
            case _:
                self._post(self.codec.encode_reply(envelope, answer, origin), delay_s)

    def _scripted(self, command: Command[Any], *, undo: bool) -> Answer:
        kind = type(command)
        wanted = kind.reply_type()
        answer: Answer = None
        if callable(self.answers):
            answer = self.answers(command)
        else:
            found = self.answers.get(kind)
            if isinstance(found, Sequence):
                nth = self.asked[kind] = self.asked.get(kind, 0) + 1
                if nth > len(found):
                    raise SagaError(f"{kind.__name__} is sent {nth} times, {len(found)} answers are scripted")
                answer = found[nth - 1]
            else:
                answer = found
        if answer is None and wanted is not None and not undo:
            raise SagaError(f"no answer is scripted for {kind.__name__}; wanted a {wanted.__name__} or a failure")
        value = answer.answer if isinstance(answer, After) else answer
        if isinstance(value, BaseModel) and not (wanted is not None and isinstance(value, wanted)):
            raise SagaError(f"{kind.__name__} is answered with {value!r}; wanted {wanted.__name__ if wanted else None}")
        return answer

    def _post(self, envelope: Envelope, delay_s: float) -> None:
        at = self.clock.time + timedelta(seconds=delay_s)
        heapq.heappush(self.due, _Due(at, self.random.random(), envelope))


def _content(decision: Decision[SagaState]) -> object:
    """All but the ids and places of stored events, which are drawn anew."""
    return [(e.type, e.data) for e in decision.events], decision.outgoing, decision.timers


def _shown(decision: Decision[SagaState]) -> str:
    return "; ".join(f"{e.type} {e.data.decode(errors='replace')}" for e in (*decision.events, *decision.outgoing))
