"""Topics of which a reader skips everything: most often a type's name is misspelt, and nothing else would say so.

Skipping what nobody names is every reader's daily work, so it is counted and not logged. But a topic of which the first
`ENOUGH` records are all skipped is worth one line. Once a record of it was wanted it is not looked at again. Who goes
on where it was, beyond a partition's first record, is not judged at all: what it wants may have been before.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from bus.transport import Delivery

ENOUGH = 100
_SHOWN = 5


class Unmet:
    """Of one reader, for as long as it is open."""

    __slots__ = ("_begun", "_log", "_reader", "_settled", "_skipped")

    def __init__(self, reader: str, log: logging.Logger) -> None:
        self._reader, self._log = reader, log
        self._begun: set[tuple[str, int]] = set()
        self._skipped: dict[str, Counter[str]] = {}
        self._settled: set[str] = set()

    def watches(self, topics: Iterable[str]) -> bool:
        """Is there one among them of which nothing is known yet?"""
        return not self._settled.issuperset(topics)

    def took(self, deliveries: Sequence[Delivery], skipped: Mapping[tuple[str, str], int]) -> None:
        """Of these records so many were skipped, by topic and type."""
        for topic, came in Counter(map(self._begins, deliveries)).items():
            types = {name: n for (where, name), n in skipped.items() if where == topic}
            self.read(topic, wanted=came > sum(types.values()), skipped=types)

    def _begins(self, delivery: Delivery) -> str:
        """The record's topic, which is settled when this is the first one of its partition and not at its beginning."""
        topic, place = delivery.topic, (delivery.topic, delivery.partition)
        if place not in self._begun:
            self._begun.add(place)
            if delivery.offset > 0:
                self._settled.add(topic)
        return topic

    def read(self, topic: str, *, wanted: bool, skipped: Mapping[str, int]) -> None:
        """Was any record of this topic wanted, and which were skipped, by type?"""
        if topic in self._settled:
            return
        found = self._skipped.setdefault(topic, Counter())
        found.update(skipped)
        if not wanted and found.total() < ENOUGH:
            return
        self._settled.add(topic)
        del self._skipped[topic]
        if wanted:
            return
        names = ", ".join(f"{name} ({n})" for name, n in found.most_common(_SHOWN))
        more = ", …" if len(found) > _SHOWN else ""
        self._log.warning(
            "%s: the first %d records of %s are all of types that it does not name: %s%s; is a name misspelt? "
            "(foldbus describe shows what it names)",
            self._reader, found.total(), topic, names, more,
        )  # fmt: skip


__all__ = ["ENOUGH", "Unmet"]
