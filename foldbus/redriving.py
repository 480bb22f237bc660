"""Dealing with dead letters: handling a message after all, or saying that nobody will.

A redriven message comes back as a timer that is due at once, for the consumer that gave it up and nobody else; the
worker hands it to that consumer's engine, where it waits in its key's queue like any message. The relay's letters go
out again, as outgoing messages. What a projection could not fold is folded by a rebuild, not here.

Each letter is one transaction (`Letters.settle`): stopped anywhere, the same call goes on with what is still open.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any
from uuid import UUID

from pydantic import ValidationError

from bus.codec import explain, kind_of, to_bytes
from bus.envelope import Envelope, Kind
from bus.errors import BadInput, FoldbusError, UnknownType
from bus.metrics import Metrics
from bus.records import RecordReader
from bus.seams import Clock, Failpoint, Ids, NoFailpoints
from bus.topics import DEAD_LETTER_ROOM_BYTES
from bus.transport import Assignment, Delivery, TopicSpec
from eventstore.port import (
    ClaimState,
    DeadLetter,
    Letter,
    LetterWhere,
    Settled,
    Settlement,
    Settling,
    Store,
    Timer,
    Unit,
)
from foldbus.service import Service

log = logging.getLogger("foldbus.redrive")

RELAY = "relay"
_PAGE = 100
_OF_SAGAS = ".replies"
"""What the topics end in that answer sagas; see `service_topics`."""


class CannotEdit(FoldbusError):
    """The edited payload is none that could be sent."""


class Became(StrEnum):
    """Of one letter, when something was done about it."""

    REDRIVEN = "redriven"
    DISCARDED = "discarded"
    HANDLED = "handled"
    GONE = "gone"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Edit:
    """Another payload: `data` in place of the old one, or `fields` set in it. `type` where the old cannot be read."""

    data: bytes | None = None
    fields: Mapping[str, Any] | None = None
    type: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a redrive of this letter does: `refused` says why it cannot, `note` what to think of before."""

    letter: DeadLetter
    message: Envelope | None = None
    unit: Unit | None = None
    refused: str = ""
    note: str = ""
    edited: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    letter: DeadLetter
    became: Became
    why: str = ""


class Redriver:
    """Of one service's store. `by` is who asks, for the record."""

    def __init__(
        self,
        service: Service,
        store: Store,
        *,
        clock: Clock,
        ids: Ids,
        metrics: Metrics,
        failpoint: Failpoint | None = None,
        by: str = "",
        max_bytes: int = TopicSpec("").max_bytes,
    ) -> None:
        self._service, self._store = service, store
        self._clock, self._ids, self._metrics = clock, ids, metrics
        self._failpoint, self._by, self._max_bytes = failpoint or NoFailpoints(), by, max_bytes

    async def chosen(self, where: LetterWhere, *, limit: int) -> AsyncGenerator[Letter]:
        """Open letters, oldest failure first, each at most once: also when what is redriven meanwhile dies again."""
        seen: set[tuple[str, UUID]] = set()
        after: Letter | None = None
        while len(seen) < limit:
            page = await self._store.letters.page(where, after=after, limit=min(_PAGE, limit - len(seen)))
            for one in page:
                name = (one.letter.consumer, one.letter.id)
                if name not in seen:
                    seen.add(name)
                    yield one
            if not page:
                return
            after = page[-1]

    # --- redrive -----------------------------------------------------------------------------------------------------

    def plan(self, letter: DeadLetter, edit: Edit | None = None, *, sagas_too: bool = False) -> Plan:
        """Looks at the letter alone and writes nothing. A saga's commands are refused unless `sagas_too`: it was told
        that they died and goes on without them. Raises CannotEdit."""
        service = self._service
        if letter.consumer.startswith(f"{service.name}.projection."):
            name = letter.consumer.removeprefix(f"{service.name}.projection.")
            return Plan(
                letter,
                refused=f"a read model folds in order: mend the code, then `foldbus projection rebuild … {name}` folds "
                "it and settles this letter",
            )
        if letter.consumer != RELAY and letter.consumer not in service.groups:
            known = ", ".join(service.groups) or "none"
            return Plan(letter, refused=f"nobody here is consumer {letter.consumer!r}; found {known}")
        try:
            message = self._read(letter)
        except BadInput as error:
            if edit is None:
                return Plan(letter, refused=f"it cannot be read: {error}; give it another payload")
            message = None
        if edit is not None:
            message = self.edited(letter, message, edit)
        assert message is not None
        if len(message.data) > self._max_bytes:
            return Plan(letter, refused=f"{len(message.data)} bytes of payload; wanted at most {self._max_bytes}")
        if letter.consumer == RELAY:
            return Plan(letter, message, Unit(outgoing=(message,)), edited=edit is not None)
        if not sagas_too and (why := of_a_saga(message)) is not None:
            return Plan(letter, refused=why)
        if (fault := self._fault(message)) is not None:
            return Plan(letter, refused=f"it cannot be read: {fault}; give it another payload, or mend the code")
        # An id of its own: the worker takes it away by that once it is handled, and never a later redrive's.
        timer = Timer(letter.consumer, self._ids.new(), message.key, letter.failure.failed_at, message)
        return Plan(letter, message, Unit(timers=(timer,)), note=_note(message), edited=edit is not None)

    async def redrive(self, plan: Plan) -> Result:
        """Handles it after all, or says why not. A second call answers GONE."""
        letter = plan.letter
        if plan.unit is None or plan.message is None:
            return self._refused(letter, plan.refused)
        self._failpoint.hit("before-redrive")
        reason = f"with another payload, as {plan.message.id}" if plan.edited else ""
        how = Settled.REPLACED if plan.edited else Settled.REDRIVEN
        settlement = Settlement(how, self._clock.now(), self._by, reason)
        settling = await self._store.letters.settle(letter, settlement, unit=plan.unit)
        self._failpoint.hit("after-redrive")
        match settling:
            case Settling.SETTLED:
                self._metrics.count("foldbus_redriven_total", consumer=letter.consumer)
                log.info("%s: %s is redriven by %s %s", letter.consumer, letter.id, self._by or "-", reason)
                return Result(letter, Became.REDRIVEN, reason)
            case Settling.HANDLED:
                self._metrics.count("foldbus_letters_handled_total", consumer=letter.consumer)
                log.info("%s: %s was handled meanwhile, its letter is settled", letter.consumer, letter.id)
                return Result(letter, Became.HANDLED, "it was handled meanwhile")
            case Settling.CANCELLED:
                return self._refused(letter, _CANCELLED)
            case Settling.GONE:
                return Result(letter, Became.GONE, _GONE)

    async def discard(self, letter: DeadLetter, reason: str) -> Result:
        """Nobody will handle it; its claim stays dead. Raises ValueError without a reason."""
        if not reason.strip():
            raise ValueError("a letter is discarded for a reason; found none")
        settlement = Settlement(Settled.DISCARDED, self._clock.now(), self._by, reason)
        if await self._store.letters.settle(letter, settlement) is not Settling.SETTLED:
            return Result(letter, Became.GONE, _GONE)
        self._metrics.count("foldbus_discarded_total", consumer=letter.consumer)
        log.warning("%s: %s is discarded by %s: %s", letter.consumer, letter.id, self._by or "-", reason)
        return Result(letter, Became.DISCARDED, reason)

    async def why_not(self, id: UUID) -> str:
        """Of an id without an open letter: what is known of it."""
        settled = await self._store.letters.page(LetterWhere(ids=frozenset([id])), settled=True)
        if settled and (last := settled[-1].settled) is not None:
            return f"settled as {last.how} at {last.at.isoformat(timespec='seconds')} by {last.by or '-'}"
        for consumer in self._service.groups:
            (standing,) = await self._store.examine(consumer, [(id, "")])
            if standing.state is ClaimState.CANCELLED:
                return _CANCELLED
            if standing.state is not ClaimState.NEW:
                return f"no letter of {consumer}: its message is {standing.state}"
        return "no dead letter has this id"

    # --- reading a letter --------------------------------------------------------------------------------------------

    def _read(self, letter: DeadLetter) -> Envelope:
        """The message as it came. Raises BadInput."""
        topic = letter.topic or "-"
        part = Assignment(topic, letter.partition)
        delivery = Delivery(part, letter.offset, letter.key, letter.value, letter.headers, letter.failure.failed_at)
        if delivery.size > self._max_bytes + len(letter.key or b"") + 64 * 1024:
            raise UnknownType(f"a record of {delivery.size} bytes; wanted at most {self._max_bytes}")
        envelope = RecordReader(self._max_bytes + DEAD_LETTER_ROOM_BYTES, self._service.rules)(delivery)
        return replace(envelope, topic=letter.topic or None)

    def _fault(self, message: Envelope) -> str | None:
        """Would whoever gets it be unable to read it? Older types are left to those that upcast them."""
        if message.kind not in (Kind.COMMAND, Kind.EVENT) or message.type.startswith("foldbus."):
            return None
        registry = self._service.registry
        if message.type in registry.upcasting:
            return None
        try:
            self._service.codec.decode(replace(message, stream=None))
        except BadInput as error:
            return str(error)
        return None

    def edited(self, letter: DeadLetter, message: Envelope | None, edit: Edit) -> Envelope:
        """With an id of its own, caused by the dead one."""
        name = edit.type or (message.type if message is not None else letter.type)
        try:
            found = self._service.registry.find(name)
            made = found.model_validate_json(self._payload(letter, edit))
            data = to_bytes(made)
        except ValidationError as error:
            raise CannotEdit(f"the edited payload is no {name}: {explain(error)}; nothing was changed") from error
        except BadInput as error:
            raise CannotEdit(f"{error}; say which type it is of (--type); nothing was changed") from error
        now, id = self._clock.now(), self._ids.new()
        if message is None:
            return Envelope(
                id=id, kind=kind_of(made), type=name, source=self._service.name, key=made.key, data=data, time=now,
                correlation_id=letter.id, causation_id=letter.id, topic=letter.topic or None,
            )  # fmt: skip
        headers = {name: value for name, value in message.headers.items() if name not in ("ce_id", "content-type")}
        return replace(
            message, id=id, type=name, key=made.key, data=data, time=now, causation_id=letter.id, headers=headers
        )

    def _payload(self, letter: DeadLetter, edit: Edit) -> bytes:
        if edit.data is not None:
            return edit.data
        try:
            found = json.loads(letter.value or b"")
            if not isinstance(found, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            raise CannotEdit(f"no field can be set in a payload that is {error}; give it whole") from error
        return json.dumps({**found, **(edit.fields or {})}).encode()

    def _refused(self, letter: DeadLetter, why: str) -> Result:
        self._metrics.count("foldbus_redrive_refused_total", consumer=letter.consumer)
        log.warning("%s: %s is not redriven: %s", letter.consumer, letter.id, why)
        return Result(letter, Became.REFUSED, why)


class Pace:
    """At most so many a second, evenly."""

    def __init__(self, per_second: float | None, *, clock: Clock, sleep: Callable[[float], Awaitable[object]]) -> None:
        self._between_s = 1 / per_second if per_second else 0.0
        self._clock, self._sleep = clock, sleep
        self._next = 0.0

    async def turn(self) -> None:
        """Returns when the next one may go."""
        now = self._clock.monotonic()
        if now < self._next:
            await self._sleep(self._next - now)
        self._next = max(now, self._next) + self._between_s


_CANCELLED = "its undo came first: it is cancelled, and the fence keeps it so"
_GONE = "this letter is not open any more: somebody else settled it, or it died again"


def of_a_saga(message: Envelope) -> str | None:
    """Why a saga's command is left alone. Its timeouts are no commands: only it waits for them."""
    to = message.reply_to
    if message.kind is not Kind.COMMAND or to is None or not to.topic.endswith(_OF_SAGAS):
        return None
    saga = f"saga {to.instance} {to.key}" if to.instance else f"a saga ({to.topic})"
    if message.undoes is not None:
        why = (
            f"it undoes a step of {saga}, which was told that it died: `foldbus saga retry` sends another in its place"
        )
    else:
        why = f"it is a step of {saga}, which was told that it died and went on: done now, no saga undoes it"
    return f"{why}; --sagas-too does it all the same"


def _note(message: Envelope) -> str:
    if message.reply_to is None:
        return ""
    return f"{message.reply_to.topic} was answered 'died' and may have acted on it; it will be answered again"
