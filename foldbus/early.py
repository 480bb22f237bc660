"""Handlers that are called at most once per message, behind `bus/engine/early.py`: offsets first, then the call.

Nothing is stored, so nothing is retried and nothing becomes a dead letter: what fails is counted
(`foldbus_lost_total`), logged, and gone. Per message there is no task, no timer and no lock: records are dealt out by
key to `at_once` lanes, each of which calls the handler for one after the other. So a key's order is kept, and a slow
one holds up those that share its lane, within a batch.

Of a record in the usual form only type, key and data are read; the rest is read when the handler asks for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from bus.breaker import free_of
from bus.cloudevents import HEADERS_MAX
from bus.codec import JsonCodec
from bus.envelope import Envelope
from bus.errors import BadInput
from bus.messages import Message
from bus.transport import Delivery
from bus.unmet import Unmet
from foldbus.calling import Caller
from foldbus.contexts import BareContext, BreakerOpen, Calls
from foldbus.handlers import Handler
from foldbus.service import handler_group

if TYPE_CHECKING:
    from foldbus.connection import Connection

log = logging.getLogger("foldbus.runtime")

_JSON = b"application/json"
YIELD_EVERY = 64
"""So many calls after each other, at most, before the rest of the worker has its turn: a handler may never wait."""


class AtMostOnce:
    """Implements `bus.engine.early.EarlyProcessor` for one handler of events."""

    def __init__(
        self, connection: Connection, handler: Handler, parse: Callable[[Delivery], Envelope], *, max_bytes: int
    ) -> None:
        service = connection.service
        self.group = handler_group(service.name, handler)
        self._connection, self._handler, self._parse, self._max_bytes = connection, handler, parse, max_bytes
        self._codec, self._metrics, self._clock = service.codec, connection.metrics, connection.clock
        self._names = frozenset(str(event.type_name) for event in handler.events)
        self._topics = frozenset(service.topic_of(event) for event in handler.events)
        self._unmet = Unmet(self.group, log)
        self._older = service.registry.upcasting.older(self._names)
        self._caller = Caller.of(connection)
        self._circuits = self._caller.circuits(handler)
        # Another codec may want the whole envelope, to decrypt it for one.
        plain = type(service.codec) is JsonCodec
        self._classes = {str(event.type_name).encode(): event for event in handler.events} if plain else {}

    def free(self) -> int | None:
        """Where it names breakers, no more than it is at side by side: what is committed when one opens is lost."""
        if not self._circuits:
            return None
        free = free_of(self._circuits)
        return self._handler.at_once if free is None else free

    async def handle(self, records: Sequence[Delivery]) -> None:
        lanes = [_Lane() for _ in range(self._handler.at_once)]
        self._deal(records, lanes)
        busy = [lane for lane in lanes if lane.work]
        if not busy:
            return
        watch = _Watch(busy, self._handler.timeout_s)
        try:
            async with asyncio.TaskGroup() as group:
                for lane in busy:
                    lane.task = group.create_task(self._run(lane))
        finally:
            watch.end()
            handled = sum(lane.handled for lane in busy)
            if handled:
                self._metrics.count("foldbus_handled_total", handled, consumer=self.group)

    # --- reading ----------------------------------------------------------------------------------------------------

    def _deal(self, records: Sequence[Delivery], lanes: Sequence[_Lane]) -> None:
        classes, max_bytes, count = self._classes, self._max_bytes, len(lanes)
        skipped: Counter[tuple[str, str]] = Counter()
        for record in records:
            headers, key, value = dict(record.headers), record.key, record.value
            known = classes.get(headers.get("ce_type", b""))
            if (
                known is not None
                and key
                and value is not None
                and not record.flaw
                and len(value) <= max_bytes
                and headers.get("content-type", _JSON) == _JSON
                and headers.get("ce_subject", key) == key
                and len(record.headers) == len(headers) <= HEADERS_MAX
            ):
                lanes[hash(key) % count].work.append((known, record))
            else:
                self._deal_slowly(record, lanes, skipped)
        for (_, name), n in skipped.items():
            self._metrics.count("foldbus_skipped_total", n, group=self.group, type=name)
            log.debug("%s: skipped %d of %s, which nobody here handles", self.group, n, name)
        if self._unmet.watches(self._topics):
            self._unmet.took(records, skipped)

    def _deal_slowly(self, record: Delivery, lanes: Sequence[_Lane], skipped: Counter[tuple[str, str]]) -> None:
        """Foreign forms, older types, what is for others, and what cannot be read."""
        try:
            envelope = self._parse(record)
            parts = (envelope,) if envelope.type in self._names else self._upcast(envelope)
        except Exception as error:  # of a parser's or an upcaster's bug as well: the others go on
            self._lost(_place(record), error)
            return
        if not parts:
            skipped[record.assignment.topic, envelope.type] += 1
        for part in parts:
            lanes[hash(part.key.encode()) % len(lanes)].work.append((None, part))

    def _upcast(self, envelope: Envelope) -> Sequence[Envelope]:
        if envelope.type not in self._older:
            return ()
        return [part for part in self._codec.upcast(envelope, self._names) if part.type in self._names]

    def _read(self, known: type[Message] | None, found: Any) -> Message:
        if known is None:
            return self._codec.decode(found)
        try:
            message: Message = known.__pydantic_validator__.validate_json(found.value)
            if message.key.encode() == found.key:
                return message
        except ValueError:
            pass
        return self._codec.decode(self._parse(found))  # which says what is wrong with it

    # --- calling ----------------------------------------------------------------------------------------------------

    async def _run(self, lane: _Lane) -> None:
        handler, read, parse, clock = self._handler, self._read, self._parse, self._clock
        deps, loop = self._connection.resources.deps, asyncio.get_running_loop()
        call, calls, breakers = self._call(), Calls({}), bool(handler.breakers)
        for known, found in lane.work:
            lane.number += 1
            try:
                if lane.number % YIELD_EVERY == 0:
                    await asyncio.sleep(0)
                if breakers:
                    calls = self._begin()
                envelope = partial(parse, found) if known is not None else partial(_itself, found)
                await call(read(known, found), BareContext(envelope, deps, clock, calls, loop))
            except asyncio.CancelledError:
                if not lane.was_cut():
                    raise
                self._fell(found, TimeoutError(f"{handler!r} took longer than {handler.timeout_s:g} s"), calls)
            except Exception as error:
                self._fell(found, error, calls)
            else:
                lane.handled += 1
                if breakers:
                    calls.end(None)

    def _call(self) -> Callable[[Message, BareContext[Any]], Any]:
        """The function itself where nothing is around it."""
        if self._connection.service.middleware or self._handler.in_thread:
            return partial(self._caller.plain, self._handler)
        return self._handler.function

    def _begin(self) -> Calls:
        calls = self._caller.begin(self._handler)
        if calls is None:
            names = ", ".join(one.name for one in self._handler.breakers)
            raise BreakerOpen(names, wait_s=self._caller.wait_s(self._handler))
        return calls

    def _fell(self, found: Envelope | Delivery, error: Exception, calls: Calls) -> None:
        calls.end(error)
        self._lost(_place(found) if isinstance(found, Delivery) else f"{found.type} {found.id}", error)

    def _lost(self, what: str, error: Exception) -> None:
        self._metrics.count("foldbus_lost_total", consumer=self.group, error=type(error).__name__)
        bug = not isinstance(error, (BadInput, BreakerOpen, TimeoutError))
        log.warning(
            "%s: %s failed and is gone, it is handled at most once: %s: %s",
            self.group, what, type(error).__name__, error, exc_info=error if bug else None,
        )  # fmt: skip


class _Lane:
    """What one task calls the handler for, one after the other. `number` is the call that is under way."""

    __slots__ = ("cut", "handled", "number", "since", "task", "watched", "work")

    def __init__(self) -> None:
        self.work: list[tuple[type[Message] | None, Any]] = []
        """A class and a record of it, or None and an envelope."""
        self.number = self.watched = self.cut = self.handled = 0
        self.since = 0.0
        self.task: asyncio.Task[None] | None = None

    def was_cut(self) -> bool:
        """Was it the watch that cancelled this very call? Then the lane goes on with the next."""
        if self.cut != self.number or self.task is None:
            return False
        return self.task.uncancel() == 0


class _Watch:
    """One timer for a whole batch, in place of one per message: a call that is still the same after `timeout_s` is
    cancelled, half of that late at most."""

    def __init__(self, lanes: Sequence[_Lane], timeout_s: float) -> None:
        self._lanes, self._timeout_s = lanes, timeout_s
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(timeout_s / 4, self._look)

    def end(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        for lane in self._lanes:
            if lane.number != lane.watched:
                lane.watched, lane.since = lane.number, now
            elif now - lane.since >= self._timeout_s and lane.cut != lane.number and lane.task is not None:
                lane.cut = lane.number
                lane.task.cancel()
        self._timer = self._loop.call_later(self._timeout_s / 4, self._look)


def _place(record: Delivery) -> str:
    return f"{record.topic}[{record.partition}] at {record.offset}"


def _itself(envelope: Envelope) -> Envelope:
    return envelope


__all__ = ["AtMostOnce"]
