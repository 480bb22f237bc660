"""The least that a service can do: a command becomes an event, a row counts the events of its key.

Each world has a name of its own, and with it topics and a schema of its own: no benchmark meets what another left.
(Not `from __future__ import annotations`: the classes are made inside a function, and are looked up by what they are.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from pydantic import BaseModel

from bus.envelope import Envelope, Origin, StreamId
from bus.seams import SystemClock, Uuid7Ids
from eventstore.port import Append, Claim, Unit
from foldbus import Command, Decider, Event, Key, Projection, Service, projection

TEXT = "x" * 140
"""Fills a message up to 200 bytes of JSON."""


class Notes(BaseModel, frozen=True):
    count: int = 0


class Shown(BaseModel, frozen=True):
    note_id: str
    count: int = 0


@dataclass
class World:
    """`desk` decides notes and has a read model of them (`desk_without_rows` has none); `board` has the same one, of
    the desk's topic."""

    name: str
    desk: Service
    board: Service
    desk_without_rows: Service
    note: type[Any]
    noted: type[Any]
    folded: dict[str, list[str]] = field(default_factory=lambda: {"desk": [], "board": []})
    """Keys in the order in which a read model has folded them; whoever wants to know takes them out."""
    ids: Uuid7Ids = field(default_factory=Uuid7Ids)

    def command(self, key: str, n: int = 0) -> Any:
        return self.note(note_id=key, n=n, text=TEXT)

    def _origin(self) -> Origin:
        id = self.ids.new()
        return Origin(self.name, id, SystemClock().now(), id)

    def command_envelope(self, key: str, n: int = 0) -> Envelope:
        return self.desk.codec.encode(self.command(key, n), self._origin(), topic=f"{self.name}.commands")

    def event(self, key: str, *, topic: str | None) -> Envelope:
        return self.desk.codec.encode(self.noted(note_id=key, n=0, text=TEXT), self._origin(), topic=topic)

    def stream(self, key: str) -> StreamId:
        return StreamId("note", key)

    def append(self) -> Unit:
        """One event on a new stream."""
        key = str(self.ids.new())
        return Unit(appends=(Append(self.stream(key), 0, (self.event(key, topic=f"{self.name}.events"),)),))

    def handled(self) -> Unit:
        """What a handled message leaves behind: its claim, an event on a new stream, an outgoing message."""
        key = str(self.ids.new())
        return Unit(
            claim=Claim(self.name, self.ids.new(), key),
            appends=(Append(self.stream(key), 0, (self.event(key, topic=f"{self.name}.events"),)),),
            outgoing=(self.command_envelope(key),),
        )


def world(name: str | None = None) -> World:
    """`name` of one that was made before, for processes that share it."""
    name = name or f"bench-{uuid4().hex[:10]}"
    folded: dict[str, list[str]] = {"desk": [], "board": []}

    class Noted(Event, type=f"{name}.noted.v1"):
        note_id: Key[str]
        n: int
        text: str

    class Note(Command[Noted], type=f"{name}.note.v1"):
        note_id: Key[str]
        n: int
        text: str

    def evolve(notes: Notes, event: Noted) -> Notes:
        return Notes(count=notes.count + 1)

    def decide(notes: Notes, command: Note) -> Sequence[Noted]:
        return [Noted(note_id=command.note_id, n=command.n, text=command.text)]

    def shown(where: str) -> Projection[Shown]:
        keys = folded[where]

        def fold(row: Shown | None, event: Noted) -> Shown:
            keys.append(event.note_id)
            return Shown(note_id=event.note_id, count=row.count + 1 if row else 1)

        return projection("shown", version=1)(fold)

    decider = Decider("note", initial=Notes(), evolve=evolve, decide=decide)
    desk = Service(name, deciders=[decider], projections=[shown("desk")])
    board = Service(f"{name}-board", projections=[shown("board")])
    return World(name, desk, board, Service(name, deciders=[decider]), Note, Noted, folded)
