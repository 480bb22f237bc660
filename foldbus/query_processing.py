"""Queries behind the consumer engine: taken up as they come, answered side by side, straight to the asker's inbox."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from pydantic import BaseModel

from bus.codec import check_size, died_reply, expired_reply
from bus.envelope import Envelope, Failure, Kind, Offset, Origin
from bus.errors import BadInput, BusError, FoldbusError, MessageTooLarge
from bus.messages import Message, Query, Refused
from bus.processing import Done, Item, Result, Watermarks
from bus.transport import Delivery
from foldbus.claims import Claims
from foldbus.expiry import how_late
from foldbus.querying import AT_ONCE, TookTooLong

if TYPE_CHECKING:
    from foldbus.connection import Connection

log = logging.getLogger("foldbus.queries")


class QueryProcessor:
    """Implements `bus.processing.Processor` for the queries of one service.

    A query counts as done when it was taken up: its offset may be committed before it is answered. Nothing is stored,
    also no watermark: the group's offset alone says where to go on, so a restored database changes nothing here.
    """

    def __init__(self, connection: Connection, *, tolerance_s: float) -> None:
        service = connection.service.name
        self.group = f"{service}.queries"
        self._connection, self._tolerance_s = connection, tolerance_s
        self._claims = Claims(
            consumer=self.group,
            service=service,
            store=connection.store,
            ids=connection.ids,
            clock=connection.clock,
            metrics=connection.metrics,
            max_bytes=connection.transport.max_bytes,
        )
        self._room = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    def wants(self, type_name: str) -> bool:
        return True  # what nobody here knows is answered, too

    async def process(self, batch: Sequence[Item], watermarks: Watermarks) -> Sequence[Result]:
        """Returns when the last one has found room."""
        for item in batch:
            await self._room.acquire()
            task = asyncio.create_task(self._serve(item.envelope), name="query")
            self._tasks.add(task)
            task.add_done_callback(self._served)
        return [Done() for _ in batch]

    def _served(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._connection.metrics.count("foldbus_query_bugs_total")
            log.error("a query was not answered", exc_info=error)

    async def close(self, *, timeout_s: float) -> None:
        """Waits for those that are being answered; cuts short what takes longer."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    # --- one query --------------------------------------------------------------------------------------------------

    async def _serve(self, envelope: Envelope) -> None:
        reply, outcome = await self._reply(envelope)
        known = envelope.type in self._connection.service.registry.types
        self._connection.metrics.count(
            "foldbus_queries_total", query=envelope.type if known else "unknown", outcome=outcome
        )
        if reply is not None and reply.topic is not None:
            await self._send(envelope, reply)

    async def _reply(self, envelope: Envelope) -> tuple[Envelope | None, str]:
        """The reply, if there is one, and how it went."""
        connection = self._connection
        codec, origin = connection.service.codec, self._claims.origin(envelope)
        late_s = how_late(envelope, connection.clock.now(), tolerance_s=self._tolerance_s)
        if late_s is not None:
            return self._expired(envelope, late_s, origin), "expired"
        left_s = math.inf
        if envelope.deadline is not None:
            left_s = (envelope.deadline - connection.clock.now()).total_seconds() + self._tolerance_s
        try:
            query = self._decoded(envelope)
            handler = connection.queries.handler_of(type(query))
            if handler is None:
                raise QueryUnknown(f"{envelope.type} is no query that {connection.service.name!r} answers")
            answer: BaseModel | Refused = await connection.queries.answer(
                handler, query, within_s=left_s, envelope=envelope
            )
        except Refused as refusal:
            answer = refusal
        except TookTooLong as late:
            log.warning("query %s %s: %s", envelope.type, envelope.id, late)
            return died_reply(envelope, str(late), origin), "timeout"
        except Exception as error:
            log.warning("query %s %s failed: %s: %s", envelope.type, envelope.id, type(error).__name__, error)
            return died_reply(envelope, f"{type(error).__name__}: {error}", origin), "failed"
        try:
            reply = codec.encode_reply(envelope, answer, origin)
            check_size(reply, connection.transport.max_bytes)
        except (MessageTooLarge, BadInput) as error:
            log.warning("query %s %s: its answer cannot be sent: %s", envelope.type, envelope.id, error)
            return died_reply(envelope, f"{type(error).__name__}: {error}", origin), "failed"
        return reply, "refused" if isinstance(answer, Refused) else "ok"

    def _decoded(self, envelope: Envelope) -> Query[Any]:
        if envelope.kind is not Kind.QUERY:
            raise QueryUnknown(f"a {envelope.kind} arrived on {self.group}; wanted queries")
        found = self._connection.service.codec.decode(envelope)
        if not _is_query(found):
            raise QueryUnknown(f"{envelope.type} is no query")
        return found

    def _expired(self, envelope: Envelope, late_s: float, origin: Origin) -> Envelope | None:
        connection = self._connection
        connection.metrics.count("foldbus_expired_requests_total", consumer=self.group)
        log.info("%s: %s %s is skipped, it expired %.3f s ago", self.group, envelope.type, envelope.id, late_s)
        why = f"{connection.service.name!r} skipped it: it had expired {late_s:.3f} s before, by the clock there"
        return expired_reply(envelope, why, origin) if envelope.reply_to is not None else None

    async def _send(self, envelope: Envelope, reply: Envelope) -> None:
        try:
            await self._connection.publisher.publish(reply)
        except BusError as error:
            self._connection.metrics.count("foldbus_query_replies_lost_total")
            log.warning("the answer to %s %s is not sent: %s", envelope.type, envelope.id, error)

    # --- the rest of a processor ------------------------------------------------------------------------------------

    async def give_up(self, item: Item, failure: Failure) -> Result:
        del item, failure  # nothing fails here: what cannot be answered is answered with that
        return Done()

    async def give_up_raw(self, delivery: Delivery, failure: Failure) -> None:
        """Nobody could be told: its bytes are kept, as everywhere."""
        await self._claims.give_up_raw(delivery, failure)

    async def stored_watermarks(self) -> Watermarks:
        return _AheadOfAll()

    async def store_watermarks(self, watermarks: Watermarks) -> None:
        return None

    def forget(self, topics: Collection[tuple[str, int]]) -> None:
        return None


class QueryUnknown(FoldbusError):
    """Something arrived where queries are answered that is none, or none of this service's."""


class _AheadOfAll(Mapping[tuple[str, int], Offset]):
    """Says of every partition that all of it is stored: then the group's offset, the lower of the two, alone counts."""

    def __getitem__(self, key: tuple[str, int]) -> Offset:
        return 2**62

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _is_query(message: Message) -> TypeGuard[Query[Any]]:
    return isinstance(message, Query)


__all__ = ["QueryProcessor"]
