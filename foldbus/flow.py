"""Pausing groups and placing their offsets: what an operator asks for, and how workers follow.

A pause is a row in the service's store. Every worker looks at those rows with its timers, a few times a second
(`gate.py`); the engine of a paused group finishes what it has in hand, commits, and leaves its group until somebody
resumes it. So a paused group has no members at the broker, however often workers start anew, and its offsets can be
placed.

Placing moves two things together: the group's offset at the broker and the watermark in the store, since reading starts
at the lower of the two. The broker refuses while the group has members.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from bus.envelope import Offset
from bus.errors import Fenced, FoldbusError, GroupInUse
from eventstore.flow import Pause
from eventstore.port import Watermark
from foldbus.delivery import AT_MOST_ONCE
from foldbus.service import handler_group
from foldbus.views import workshop
from projections import LOG, Place, Projection

if TYPE_CHECKING:
    from foldbus.connection import Connection
    from foldbus.service import Service

log = logging.getLogger("foldbus.flow")

LEAVING_S = 30.0
"""How long placing waits for the members of a paused group: they finish what they have in hand."""


class UnknownGroup(FoldbusError):
    """The service has no consumer group of that name."""


class BadPlace(FoldbusError):
    """An offset was asked for that the topic does not have; nothing was changed."""


class NotPaused(FoldbusError):
    """A group with members is placed only while it is paused; nothing was changed."""


@dataclass(frozen=True, slots=True)
class GroupFlow:
    """`members` 0 and `pause`: it stands still. Members and `pause`: some are still finishing what they have."""

    group: str
    topics: tuple[str, ...]
    members: int
    pause: Pause | None


async def groups_of(connection: Connection) -> Sequence[GroupFlow]:
    paused, admin = await connection.store.flow.paused(), connection.transport.admin
    return [
        GroupFlow(group, topics, await admin.members(group), paused.get(group))
        for group, topics in connection.service.groups.items()
    ]


@dataclass(frozen=True, slots=True)
class Move:
    """One partition of a group: where it reads on now (None: nothing is known, so from the beginning), what the topic
    holds (`first` to before `end`), and where it shall."""

    topic: str
    partition: int
    at: Offset | None
    first: Offset
    end: Offset
    to: Offset

    @property
    def lost(self) -> int:
        """Messages that retention took before they were handled."""
        return max(0, self.first - self.at) if self.at is not None else 0

    @property
    def skipped(self) -> int:
        """Messages that the topic holds and that will not be handled."""
        return max(0, self.to - max(self.at or 0, self.first))

    @property
    def again(self) -> int:
        """Messages that will be read again: nothing happens to those whose claims are there."""
        return max(0, min(self.at if self.at is not None else self.first, self.end) - self.to)


def known_group(service: Service, group: str) -> Sequence[str]:
    """The topics that it reads. Raises UnknownGroup."""
    topics = service.groups.get(group)
    if topics is None:
        raise UnknownGroup(
            f"service {service.name!r} has no consumer group {group!r}; it has {', '.join(service.groups) or 'none'}"
        )
    return topics


async def plan_moves(
    connection: Connection, group: str, topic: str | None, partitions: Collection[int] | None, to: str
) -> Sequence[Move]:
    """What placing would do; changes nothing. `to` is an offset, `beginning`, `end`, or an ISO 8601 time: then the
    first record that is not older. Raises UnknownGroup, BadPlace, MissingTopics."""
    topic = _one_of(topic, known_group(connection.service, group), f"group {group}")
    admin = connection.transport.admin
    held = await admin.offsets(topic)
    chosen = _chosen(topic, held, partitions)
    committed = await admin.committed(group, [topic])
    alone = _offsets_alone(connection.service, group)
    stored: Mapping[tuple[str, int], Offset] = {} if alone else await connection.store.watermarks(group)
    wanted = await _wanted(connection, topic, chosen, held, to)
    moves: list[Move] = []
    for partition in chosen:
        first, end = held[partition]
        known = [where[topic, partition] for where in (committed, stored) if (topic, partition) in where]
        if len(known) == 1 and not alone:  # as an engine does that knows one of the two: from the beginning, at most
            known.append(first)
        at = min(known, default=None)
        moves.append(Move(topic, partition, at, first, end, wanted[partition]))
    return moves


def _offsets_alone(service: Service, group: str) -> bool:
    """Does this group read on where the broker says, whatever the store does? Its messages leave nothing there."""
    early = {handler_group(service.name, one) for one in service.subscriptions if one.delivery is AT_MOST_ONCE}
    return group in early or group == f"{service.name}.queries"


def _one_of(topic: str | None, topics: Sequence[str], reader: str) -> str:
    topic = topic or (topics[0] if len(topics) == 1 else "")
    if topic not in topics:
        raise BadPlace(f"{reader} reads {', '.join(topics) or 'no topic'}; wanted one of them, not {topic!r}")
    return topic


def _chosen(topic: str, held: Collection[int], partitions: Collection[int] | None) -> Sequence[int]:
    chosen = sorted(held if partitions is None else partitions)
    if unknown := [partition for partition in chosen if partition not in held]:
        raise BadPlace(f"{topic} has {len(held)} partitions, no number {', '.join(map(str, unknown))}")
    return chosen


async def _wanted(
    connection: Connection,
    topic: str,
    partitions: Sequence[int],
    held: Mapping[int, tuple[Offset, Offset]],
    to: str,
) -> Mapping[int, Offset]:
    if to == "beginning":
        return {partition: held[partition][0] for partition in partitions}
    if to == "end":
        return {partition: held[partition][1] for partition in partitions}
    if to.isdecimal():
        offset = int(to)
        for partition in partitions:
            first, end = held[partition]
            if not first <= offset <= end:
                raise BadPlace(
                    f"{topic}[{partition}] holds offsets {first} to {end}; wanted one of these, not {offset}, "
                    "so nothing was changed"
                )
        return dict.fromkeys(partitions, offset)
    try:
        time = datetime.fromisoformat(to)
    except ValueError:
        raise BadPlace(
            f"{to!r} is no place; wanted an offset, beginning, end, or a time as 2026-05-01T12:00:00Z"
        ) from None
    time = time if time.tzinfo is not None else time.replace(tzinfo=UTC)
    return await connection.transport.admin.offsets_at(topic, time)


async def place(
    connection: Connection, group: str, moves: Sequence[Move], *, by: str, reason: str = "", wait_s: float = LEAVING_S
) -> None:
    """Sets the group's offsets and the stored watermarks; a second call changes nothing more. What is read from then on
    starts there, in every worker.

    Raises NotPaused while the group has members and is not paused; of a paused one it waits for the members to leave.
    The offsets are set first: should this be cut off before the watermarks are, a move forward has not happened yet,
    and doing it again completes it."""
    await _without_members(connection, group, wait_s)
    admin, store = connection.transport.admin, connection.store
    try:
        await admin.place(group, {(move.topic, move.partition): move.to for move in moves})
    except GroupInUse as error:
        raise NotPaused(f"{error}: somebody joined it just now; pause it first") from error
    marks = [Watermark(group, move.topic, move.partition, move.to) for move in moves]
    await store.flow.place(marks, by=by, reason=reason)
    connection.metrics.count("foldbus_placed_total", len(moves), group=group)
    for move in moves:
        log.warning(
            "%s: %s[%d] was placed at %d by %s (it was at %s; %d skipped, %d read again): %s",
            group, move.topic, move.partition, move.to, by, move.at, move.skipped, move.again, reason or "-",
        )  # fmt: skip


# --- read models over topics of others --------------------------------------------------------------------------------


async def plan_projection(
    connection: Connection, name: str, topic: str | None, partitions: Collection[int] | None, to: str
) -> Sequence[Move]:
    """The same for the serving generation of a projection. Raises BadPlace for a step back: what was folded would be
    folded again; rebuild it instead."""
    projection = _projection(connection, name)
    topics = sorted(projection.sources(connection.service.name).keys() - {LOG})
    topic = _one_of(topic, topics, f"projection {name}")
    held = await connection.transport.admin.offsets(topic)
    chosen = _chosen(topic, held, partitions)
    rows = workshop(connection, projection).rows
    places = (await rows.checkpoint((await rows.serving()).number)).places
    wanted = await _wanted(connection, topic, chosen, held, to)
    moves: list[Move] = []
    for partition in chosen:
        first, end = held[partition]
        at = places.get((topic, partition), Place(first)).offset
        if wanted[partition] < at:
            raise BadPlace(
                f"projection {name} is at {at} of {topic}[{partition}], wanted was {wanted[partition]}: events would "
                "be folded twice, so nothing was changed; rebuild it (`foldbus projection rebuild`)"
            )
        moves.append(Move(topic, partition, at, first, end, wanted[partition]))
    return moves


async def place_projection(connection: Connection, name: str, moves: Sequence[Move]) -> None:
    """Moves the checkpoint forward, by compare-and-set, also under a worker that is running: it reads on from there.
    Raises BadPlace when it has got further meanwhile."""
    rows = workshop(connection, _projection(connection, name)).rows
    while True:
        number = (await rows.serving()).number
        old = await rows.checkpoint(number)
        places = dict(old.places)
        for move in moves:
            place = places.get((move.topic, move.partition), Place())
            if place.offset > move.to:
                raise BadPlace(f"projection {name} has got to {place.offset} meanwhile; nothing was changed")
            places[move.topic, move.partition] = replace(place, offset=move.to)
        try:
            await rows.save(number, {}, old=old, new=replace(old, places=places))
            break
        except Fenced:  # its worker saved meanwhile, or another generation serves
            await asyncio.sleep(0.05)
    connection.metrics.count("foldbus_placed_total", len(moves), group=f"projection {name}")
    for move in moves:
        log.warning("projection %s: %s[%d] was placed at %d", name, move.topic, move.partition, move.to)


def _projection(connection: Connection, name: str) -> Projection[Any]:
    for one in connection.service.projections:
        if one.name == name:
            return one
    known = ", ".join(one.name for one in connection.service.projections) or "none"
    raise UnknownGroup(f"service {connection.service.name!r} has no projection {name!r}; it has {known}")


async def _without_members(connection: Connection, group: str, wait_s: float) -> None:
    admin, clock = connection.transport.admin, connection.clock
    until = clock.monotonic() + wait_s
    while members := await admin.members(group):
        if group not in await connection.store.flow.paused():
            raise NotPaused(
                f"group {group} has {members} members and is not paused; nothing was changed: "
                f"`foldbus flow pause` it, or stop its workers"
            )
        if clock.monotonic() >= until:
            raise NotPaused(
                f"group {group} is paused and still has {members} members after {wait_s:g} s; nothing was changed: "
                "a worker is not finished yet, or was killed and its session has not ended; try again"
            )
        await asyncio.sleep(0.2)


__all__ = [
    "BadPlace", "GroupFlow", "Move", "NotPaused", "UnknownGroup", "groups_of", "known_group", "place",
    "place_projection", "plan_moves", "plan_projection",
]  # fmt: skip
