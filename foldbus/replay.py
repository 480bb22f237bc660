"""Replaying a service's log: chosen events, in position order, once more into a file or a topic.

A replay ends: what is committed after it began is not part of it. Replayed records carry their first ids, positions
and epoch, so that whoever has handled them recognises them, and the header `foldbus-replayed`, the same id on all
records of one replay. An interrupted replay goes on from its state file. Into a file each event goes once, whatever
happens; into a topic, what was under way when it was interrupted goes a second time.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Protocol
from uuid import UUID

from pydantic import BaseModel, ConfigDict, ValidationError

from bus.cloudevents import to_record
from bus.codec import explain
from bus.envelope import Envelope, Position, StreamId
from bus.errors import FoldbusError, MissingTopics, TransportUnavailable
from bus.seams import Clock
from bus.transport import Ack, Failed, Outgoing, Transport
from eventstore.port import Store, Where

REPLAYED = "foldbus-replayed"
"""The header of every record that a replay published."""

_PAGE = 1000
_BATCH = 500
_ATTEMPTS = 10
_NOT_FOR_EVENTS = (".commands", ".replies", ".inbox", ".dlq")


class BadReplay(FoldbusError):
    """A replay that cannot be: its destination, its bounds, or a state that does not fit it. Nothing was written."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which events. Positions: above `after`, up to `until` (None: as far as the log goes when the replay begins).
    Times, of when an event was made: from `since`, before `before`. No `types`: all."""

    stream: StreamId | None = None
    types: frozenset[str] = frozenset()
    after: Position = 0
    until: Position | None = None
    since: datetime | None = None
    before: datetime | None = None

    def where(self) -> Where:
        """What is asked of the database; positions are the caller's."""
        return Where(types=self.types or None, stream=self.stream, since=self.since, until=self.before)

    def text(self) -> dict[str, Any]:
        """As it is kept in a state file, to be compared."""
        return {
            "stream": str(self.stream) if self.stream else None,
            "types": sorted(self.types),
            "after": self.after,
            "until": self.until,
            "since": self.since.isoformat() if self.since else None,
            "before": self.before.isoformat() if self.before else None,
        }


class State(BaseModel):
    """How far a replay is. It is there from a replay's beginning until it is done."""

    model_config = ConfigDict(extra="forbid")

    replay: UUID
    service: str
    epoch: int
    to: str
    selection: dict[str, Any]
    until: Position
    position: Position
    events: int = 0

    @classmethod
    def load(cls, path: Path) -> State:
        """Raises BadReplay."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise BadReplay(f"there is no interrupted replay: looked for {path}") from None
        except (ValidationError, ValueError) as error:
            why = explain(error) if isinstance(error, ValidationError) else str(error)
            raise BadReplay(f"{path} is no replay's state: {why}") from error

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(path.name + ".new")
        with new.open("w") as file:
            file.write(self.model_dump_json())
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)


@dataclass(slots=True)
class Replayed:
    """What went, or would go. `events` counts the earlier runs of a resumed replay as well, `by_type` this run alone;
    `private` were chosen, but never go into a topic."""

    after: Position
    until: Position
    events: int = 0
    private: int = 0
    by_type: Counter[str] = field(default_factory=Counter[str])


Told = Callable[[Position, int], None]
"""Told of every page: how far it is, how many events went."""


class Sink(Protocol):
    async def write(self, records: Sequence[Envelope]) -> None:
        """All of them, in order; once it returned they stay."""
        ...


async def count(store: Store, selection: Selection, *, public: bool = False, told: Told | None = None) -> Replayed:
    """The dry run: what would go. `public` for a topic."""
    until = await _end(store, selection)
    found = Replayed(selection.after, until)
    async for records, upto in pages(store, selection, after=selection.after, until=until):
        _chosen(found, records, public)
        found.events = found.by_type.total()
        if told is not None:
            told(upto, found.events)
    return found


async def begin(store: Store, selection: Selection, *, to: str, id: UUID) -> State:
    """The state of a replay that has not done anything yet."""
    return State(
        replay=id,
        service=store.service,
        epoch=store.epoch,
        to=to,
        selection=selection.text(),
        until=await _end(store, selection),
        position=selection.after,
    )


def check_same(state: State, store: Store, selection: Selection, *, to: str) -> None:
    """Raises BadReplay unless `state` is of this very replay."""
    for what, found, wanted in (
        ("service", state.service, store.service),
        ("epoch", state.epoch, store.epoch),
        ("destination", state.to, to),
        ("selection", state.selection, selection.text()),
    ):
        if found != wanted:
            raise BadReplay(f"the interrupted replay is another one: its {what} is {found}, wanted {wanted}")


async def run(
    store: Store,
    selection: Selection,
    sink: Sink,
    state: State,
    path: Path,
    *,
    clock: Clock,
    public: bool = False,
    told: Told | None = None,
) -> Replayed:
    """Replays what is left of `state`, keeps it in `path`, and removes that when everything went. However it ends,
    `path` says from where to go on."""
    done = Replayed(state.position, state.until, events=state.events)
    state.save(path)
    saved = clock.monotonic()
    try:
        async for records, upto in pages(store, selection, after=state.position, until=state.until):
            chosen = _chosen(done, records, public)
            for start in range(0, len(chosen), _BATCH):
                batch = chosen[start : start + _BATCH]
                await sink.write(batch)
                state.position, state.events = batch[-1].position or state.position, state.events + len(batch)
                if clock.monotonic() - saved >= 1.0:
                    state.save(path)
                    saved = clock.monotonic()
            state.position, done.events = upto, state.events
            if told is not None:
                told(upto, state.events)
    except BaseException:
        state.save(path)
        raise
    path.unlink()  # noqa: ASYNC240 (as small as a save)
    return done


async def pages(
    store: Store, selection: Selection, *, after: Position, until: Position
) -> AsyncGenerator[tuple[list[Envelope], Position]]:
    """The chosen events above `after`, up to `until`, in pages; with each, up to where everything has been looked at.
    Bounded: what is committed meanwhile is above `until`."""
    at, where = after, selection.where()
    while at < until:
        page = await store.read_all(after=at, limit=_PAGE, where=where)
        if page.upto <= at:
            return
        at = min(page.upto, until)
        yield [one for one in page.records if (one.position or 0) <= until], at


def _chosen(done: Replayed, records: Sequence[Envelope], public: bool) -> Sequence[Envelope]:
    chosen = [one for one in records if one.topic is not None] if public else records
    done.private += len(records) - len(chosen)
    done.by_type.update(one.type for one in chosen)
    return chosen


async def _end(store: Store, selection: Selection) -> Position:
    head = await store.head()
    until = head if selection.until is None else min(head, selection.until)
    return max(until, selection.after)


# --- a file ----------------------------------------------------------------------------------------------------------


class FileSink:
    """JSON lines, one event each, on the disk when `write` returns. `resume` cuts off a line that was torn."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    @classmethod
    def create(cls, path: Path) -> FileSink:
        """Empties what is there."""
        return cls(path.open("wb"))

    @classmethod
    def resume(cls, path: Path, state: State) -> FileSink:
        """Goes on behind the last whole line, from which `state` is brought up to date: lines written after the state
        was saved are not written again. Raises BadReplay when the file is not what the state was about."""
        try:
            file = path.open("r+b")
        except FileNotFoundError:
            raise BadReplay(f"{path} is gone, so its replay cannot go on: start it anew") from None
        lines, whole, last = 0, 0, b""
        for line in file:
            if line.endswith(b"\n"):
                lines, whole, last = lines + 1, whole + len(line), line
        file.seek(whole)
        file.truncate()
        if lines < state.events:
            file.close()
            raise BadReplay(f"{path} has {lines} lines, the interrupted replay wrote {state.events}: start it anew")
        if lines > state.events:
            state.position = max(state.position, int(json.loads(last)["position"]))
            state.events = lines
        return cls(file)

    async def write(self, records: Sequence[Envelope]) -> None:
        self._file.write(b"".join([line_of(record) for record in records]))
        self._file.flush()
        os.fsync(self._file.fileno())
        await asyncio.sleep(0)

    def close(self) -> None:
        self._file.close()


def line_of(record: Envelope) -> bytes:
    """One stored event as a line. `data` are its very bytes where those are JSON on one line, else `data_base64`."""
    stream = record.stream
    document: dict[str, Any] = {
        "position": record.position,
        "id": str(record.id),
        "type": record.type,
        "source": record.source,
        "epoch": record.epoch,
        "key": record.key,
        "category": stream.category if stream else None,
        "stream_id": stream.id if stream else None,
        "version": record.version,
        "time": record.time.isoformat(),
        "correlation_id": str(record.correlation_id),
        "causation_id": str(record.causation_id) if record.causation_id else None,
        "tenant": record.tenant,
        "actor": record.actor,
        "topic": record.topic,
        "headers": dict(record.headers),
    }
    if not _is_json_line(record.data):
        document["data_base64"] = base64.b64encode(record.data).decode()
        return json.dumps(document, ensure_ascii=False).encode() + b"\n"
    head = json.dumps(document, ensure_ascii=False).encode()
    return head[:-1] + b', "data": ' + record.data + b"}\n"


def _is_json_line(data: bytes) -> bool:
    if b"\n" in data or b"\r" in data:
        return False
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


# --- a topic ---------------------------------------------------------------------------------------------------------


class TopicSink:
    """Publishes with the records' first ids, at most `rate` per second (None: as fast as it goes)."""

    def __init__(
        self,
        transport: Transport,
        topic: str,
        replay: UUID,
        *,
        clock: Clock,
        rate: float | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._transport, self._topic, self._replay = transport, topic, replay
        self._clock, self._rate, self._rng = clock, rate, rng or random.Random()
        self._next = 0.0

    async def check(self) -> None:
        """Raises BadReplay for a topic where events are not read, MissingTopics."""
        if self._topic.endswith(_NOT_FOR_EVENTS):
            raise BadReplay(f"topic {self._topic!r} is not for events; wanted an .events topic or one of your own")
        if not await self._transport.admin.describe([self._topic]):
            raise MissingTopics([self._topic])

    async def write(self, records: Sequence[Envelope]) -> None:
        """Raises what the broker refused a record for, TransportUnavailable when it does not answer."""
        size = _BATCH if self._rate is None else max(1, min(_BATCH, int(self._rate / 10)))
        for start in range(0, len(records), size):
            batch = records[start : start + size]
            await self._wait_for_turn(len(batch))
            await self._publish([self._record(one) for one in batch])

    def _record(self, envelope: Envelope) -> Outgoing:
        headers = {**envelope.headers, REPLAYED: str(self._replay)}
        return to_record(replace(envelope, topic=self._topic, headers=headers))

    async def _wait_for_turn(self, n: int) -> None:
        if self._rate is not None:
            now = self._clock.monotonic()
            if self._next > now:
                await asyncio.sleep(self._next - now)
            self._next = max(now, self._next) + n / self._rate

    async def _publish(self, due: Sequence[Outgoing]) -> None:
        why: Exception | None = None
        for attempt in range(1, _ATTEMPTS + 1):
            results = await self._transport.publish(due)
            for result in results:
                if isinstance(result, Failed):
                    raise result.error
            why = next((result.error for result in results if not isinstance(result, Ack)), None)
            if why is None:
                return
            # From the first of a partition that is not acknowledged on, all of its records are sent again, in order.
            due = [record for record, result in zip(due, results, strict=True) if not isinstance(result, Ack)]
            await asyncio.sleep(min(5.0, 0.05 * 2**attempt) * self._rng.uniform(0.5, 1.0))
        raise TransportUnavailable(f"{len(due)} records to {self._topic} were not acknowledged: {why}") from why
