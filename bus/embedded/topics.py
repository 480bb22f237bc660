"""Topics by name: looked up once, since they never change; and the admin side of the embedded bus."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime

from bus.embedded import groups, log
from bus.embedded.hub import Hub
from bus.embedded.writer import Writer
from bus.envelope import Offset
from bus.errors import BusError, MissingTopics
from bus.seams import Clock
from bus.transport import TopicSpec, TopicState


class Topics:
    """A `TopicAdmin`. `lingers_s`: how late what retention allows to go may be, at most, while anybody has it open."""

    def __init__(self, hub: Callable[[], Hub], writer: Writer, clock: Clock, *, lingers_s: float) -> None:
        self._hub, self._writer, self._clock, self._lingers_s = hub, writer, clock, lingers_s
        self._known: dict[str, log.Topic] = {}

    def known(self, name: str) -> log.Topic | None:
        """None when it is not known yet: then ask `get`."""
        return self._known.get(name)

    async def get(self, name: str) -> log.Topic:
        """Raises MissingTopics."""
        return self._known.get(name) or (await self.all([name]))[0]

    async def all(self, names: Collection[str]) -> Sequence[log.Topic]:
        """Each once, in the order of `names`. Raises MissingTopics, which names all that are missing."""
        found = await self._find(names)
        missing = [name for name in names if name not in found]
        if missing:
            raise MissingTopics(missing)
        return list(found.values())

    async def _find(self, names: Collection[str]) -> Mapping[str, log.Topic]:
        found: dict[str, log.Topic] = {}

        def look(conn: sqlite3.Connection) -> None:
            for name in names:
                topic = self._known.get(name) or log.find_topic(conn, name)
                if topic is not None:
                    found[name] = self._known[name] = topic

        await self._hub().read(look)
        return found

    async def describe(self, names: Collection[str]) -> Mapping[str, TopicState]:
        found = await self._find(names)
        return {name: topic.state(lingers_s=self._lingers_s) for name, topic in found.items()}

    async def create(self, specs: Sequence[TopicSpec]) -> None:
        await self._writer.run(lambda conn: log.create(conn, specs), durable=True)

    async def offsets(self, topic: str) -> Mapping[int, tuple[Offset, Offset]]:
        lanes = (await self.get(topic)).lanes
        bounds = await self._hub().read(lambda conn: log.bounds(conn, lanes))
        return {partition: bounds[lane] for partition, lane in enumerate(lanes)}

    async def offsets_at(self, topic: str, time: datetime) -> Mapping[int, Offset]:
        lanes = (await self.get(topic)).lanes
        time_us = int(time.timestamp() * 1_000_000)
        found = await self._hub().read(lambda conn: log.first_at(conn, lanes, time_us))
        return {partition: found[lane] for partition, lane in enumerate(lanes)}

    async def committed(self, group: str, topics: Sequence[str]) -> Mapping[tuple[str, int], Offset]:
        known = await self._find(topics)
        places = {
            lane: (topic.name, partition) for topic in known.values() for partition, lane in enumerate(topic.lanes)
        }
        rows = await self._hub().read(lambda conn: groups.committed(conn, group))
        return {places[lane]: offset for lane, offset in rows.items() if lane in places}

    async def members(self, group: str) -> int:
        return await self._hub().read(lambda conn: groups.living(conn, group, now=self._clock.monotonic()))

    async def place(self, group: str, offsets: Mapping[tuple[str, int], Offset]) -> None:
        topics = {topic.name: topic for topic in await self.all(sorted({name for name, _ in offsets}))}
        wanted: dict[int, Offset] = {}
        for (name, partition), offset in offsets.items():
            lanes = topics[name].lanes
            if not 0 <= partition < len(lanes):
                raise BusError(f"{name} has {len(lanes)} partitions, no number {partition}; nothing was set")
            wanted[lanes[partition]] = offset
        await self._writer.run(
            lambda conn: groups.place(conn, group, wanted, now=self._clock.monotonic()), durable=True
        )
