"""What a service declares of topics, put together and checked: its own, and what it expects of those of others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bus.errors import FoldbusError
from bus.messages import Event
from bus.records import TopicRule, rules_of
from bus.topics import DEAD_LETTER_ROOM_BYTES, service_topics
from bus.transport import TopicSpec


class BadTopics(FoldbusError):
    """Topics are declared so that they cannot work; found at start-up, nothing was opened."""


@dataclass(frozen=True, slots=True)
class Topics:
    """`own` are this service's, all of them; `foreign` others' that it says something of; `rules` how records are read
    where that is not as usual."""

    own: tuple[TopicSpec, ...]
    foreign: tuple[TopicSpec, ...]
    rules: Mapping[str, TopicRule]


def put_together(
    service: str, given: Sequence[TopicSpec], *, partitions: int, read: Mapping[str, Iterable[type[Event]]]
) -> Topics:
    """`read` are the events that the service reads, by topic. Raises BadTopics."""
    prefix = f"{service}."
    instead = [spec for spec in given if spec.name.startswith(prefix)]
    foreign = tuple(spec for spec in given if not spec.name.startswith(prefix))
    own = service_topics(service, partitions=partitions, instead=instead)
    standard = {spec.name for spec in service_topics(service)}
    names = [spec.name for spec in given]
    for spec in given:
        said = f"service {service!r} declares topic {spec.name!r}"
        if names.count(spec.name) > 1:
            raise BadTopics(f"{said} twice; wanted each once")
        if spec.partitions < 1 or spec.max_bytes < 1 or not (spec.retention_s is None or spec.retention_s > 0):
            raise BadTopics(
                f"{said} with partitions={spec.partitions}, max_bytes={spec.max_bytes}, "
                f"retention_s={spec.retention_s}; wanted numbers above 0 (retention_s=None keeps for ever)"
            )
        if spec.name in standard and spec.compact:
            raise BadTopics(f"{said} compacted, which drops all but the last message of a key; wanted compact=False")
        if spec.name in standard and not spec.keyed:
            raise BadTopics(f"{said} without keys, but every message there has one; wanted keyed=True")
    for spec in foreign:
        if spec.name not in read:
            raise BadTopics(
                f"service {service!r} declares topic {spec.name!r}, which nothing here reads; wanted one of "
                f"{', '.join(sorted(set(read) - standard)) or 'none'}, or one of its own ({prefix}…)"
            )
    _check_dead_letters(service, {spec.name: spec for spec in own})
    declared = {spec.name: spec for spec in (*own, *foreign)}
    for topic, events in read.items():
        _check_deletes(topic, list(events), declared.get(topic))
    return Topics(own, foreign, rules_of(declared.values(), read))


def _check_dead_letters(service: str, own: Mapping[str, TopicSpec]) -> None:
    room = own[f"{service}.dlq"].max_bytes
    most = max(spec.max_bytes for name, spec in own.items() if name != f"{service}.dlq")
    if room < most + DEAD_LETTER_ROOM_BYTES:
        raise BadTopics(
            f"topic {service}.dlq takes records of up to {room} bytes, a dead letter may be a whole record and its "
            f"history: wanted max_bytes={most + DEAD_LETTER_ROOM_BYTES} or more"
        )


def _check_deletes(topic: str, events: Sequence[type[Event]], spec: TopicSpec | None) -> None:
    deletes = sorted({str(event.type_name) for event in events if event.deletes})
    if len(deletes) > 1:
        raise BadTopics(f"{', '.join(deletes)} all stand for the deletes of topic {topic!r}; wanted one")
    if deletes and (spec is None or not spec.compact):
        raise BadTopics(
            f"{deletes[0]} stands for the deletes of topic {topic!r}, which is not declared compacted: wanted "
            f"topics=[TopicSpec({topic!r}, compact=True, …)] in the Service"
        )


__all__ = ["BadTopics", "Topics", "put_together"]
