"""Topics by name: looked up once, since they never change; and the admin side of the embedded bus."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Mapping, Sequence

from bus.embedded import groups, log
from bus.embedded.hub import Hub
from bus.embedded.writer import Writer
from bus.envelope import Offset
from bus.errors import MissingTopics
from bus.transport import TopicSpec, TopicState


class Topics:
    """A `TopicAdmin`."""

    def __init__(self, hub: Callable[[], Hub], writer: Writer) -> None:
        self._hub, self._writer = hub, writer
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
        return {name: topic.state() for name, topic in (await self._find(names)).items()}

    async def create(self, specs: Sequence[TopicSpec]) -> None:
        await self._writer.run(lambda conn: log.create(conn, specs), durable=True)

    async def offsets(self, topic: str) -> Mapping[int, tuple[Offset, Offset]]:
        lanes = (await self.get(topic)).lanes
        bounds = await self._hub().read(lambda conn: log.bounds(conn, lanes))
        return {partition: bounds[lane] for partition, lane in enumerate(lanes)}

    async def committed(self, group: str, topics: Sequence[str]) -> Mapping[tuple[str, int], Offset]:
        known = await self._find(topics)
        places = {
            lane: (topic.name, partition) for topic in known.values() for partition, lane in enumerate(topic.lanes)
        }
        rows = await self._hub().read(lambda conn: groups.committed(conn, group))
        return {places[lane]: offset for lane, offset in rows.items() if lane in places}
