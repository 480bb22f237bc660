"""Topics as a service declares them: which it has, what is missing at the broker, what is there otherwise.

The partition count decides where keys go, so one that differs from the declaration is refused, never changed. Nothing
that exists is altered from here: retention, compaction and limits of an existing topic belong to whoever runs the
broker, and a difference is said, with what was found and what to do.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from bus.errors import MissingTopics, TopicMismatch
from bus.transport import TopicAdmin, TopicSpec, TopicState

log = logging.getLogger("foldbus.bus")

DEAD_LETTER_ROOM_BYTES = 64 * 1024
"""How much more a record of a `.dlq` may take: a dead letter is the record as it was, and its history."""
INBOX_PARTITIONS = 3
INBOX_RETENTION_S = 15 * 60.0
"""Replies to whoever is waiting right now; a later one finds nobody."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What `apply` would do: create these, and refuse because of those (each told in one line)."""

    create: tuple[TopicSpec, ...] = ()
    mismatches: tuple[str, ...] = ()


def plan(specs: Iterable[TopicSpec], existing: Mapping[str, TopicState]) -> Plan:
    """Compares the declaration with what the broker has. Pure; topics that nobody declares are left out.

    Raises TopicMismatch when the declaration contradicts itself (one name declared in two ways).
    """
    wanted: dict[str, TopicSpec] = {}
    for spec in specs:
        known = wanted.setdefault(spec.name, spec)
        if known != spec:
            raise TopicMismatch(f"topic {spec.name!r} is declared twice and differently: {known} and {spec}")
    create: list[TopicSpec] = []
    mismatches: list[str] = []
    for spec in wanted.values():
        state = existing.get(spec.name)
        if state is None:
            create.append(spec)
        else:
            mismatches += differences(spec, state)
    return Plan(tuple(create), tuple(mismatches))


def differences(spec: TopicSpec, state: TopicState) -> list[str]:
    """Where a topic is not as declared, a line each. More room, or keeping longer, than declared is no difference."""
    found: list[str] = []
    if state.partitions != spec.partitions:
        found.append(
            f"topic {spec.name!r} has {state.partitions} partitions, declared are {spec.partitions}; keys would move, "
            f"so nothing was changed: declare partitions={state.partitions}, or take a new topic name"
        )
    if state.compact and not spec.compact:
        found.append(
            f"topic {spec.name!r} is compacted, which drops all but the last message of a key; "
            "declared is one that keeps them: set cleanup.policy=delete"
        )
    if state.retention_s is not None and (spec.retention_s is None or state.retention_s < spec.retention_s):
        wanted = "for ever" if spec.retention_s is None else f"{spec.retention_s:g} s"
        found.append(
            f"topic {spec.name!r} keeps messages for {state.retention_s:g} s, declared is {wanted}: raise retention.ms"
        )
    if state.max_bytes < spec.max_bytes:
        found.append(
            f"topic {spec.name!r} takes records of up to {state.max_bytes} bytes, declared are {spec.max_bytes}: "
            "raise max.message.bytes"
        )
    return found


async def apply(admin: TopicAdmin, specs: Sequence[TopicSpec]) -> Plan:
    """Creates what is missing; a second call does nothing. Raises TopicMismatch, before creating anything, when
    something is there otherwise than declared; TransportUnavailable."""
    made = plan(specs, await admin.describe([spec.name for spec in specs]))
    _refuse(made.mismatches)
    if made.create:
        await admin.create(made.create)
        log.info("created topics %s", ", ".join(spec.name for spec in made.create))
        # Somebody else may have been first, with another declaration.
        after = await admin.describe([spec.name for spec in made.create])
        _refuse(plan(made.create, after).mismatches)
    return made


async def validate(admin: TopicAdmin, specs: Sequence[TopicSpec]) -> None:
    """Changes nothing. Raises MissingTopics, or TopicMismatch saying what was found, what is wanted and what to do;
    both are refusals to start."""
    made = plan(specs, await admin.describe([spec.name for spec in specs]))
    _refuse(made.mismatches)
    if made.create:
        raise MissingTopics([spec.name for spec in made.create])


def _refuse(mismatches: Collection[str]) -> None:
    if mismatches:
        raise TopicMismatch("; ".join(mismatches))


def service_topics(
    service: str, *, partitions: int = TopicSpec("").partitions, max_bytes: int = TopicSpec("").max_bytes
) -> tuple[TopicSpec, ...]:
    """The topics of one service. All keep what they hold but `.inbox`, where only whoever waits right now listens;
    `.dlq` has room for a whole record and its history."""
    return (
        TopicSpec(f"{service}.commands", partitions, max_bytes=max_bytes),
        TopicSpec(f"{service}.events", partitions, max_bytes=max_bytes),
        TopicSpec(f"{service}.replies", partitions, max_bytes=max_bytes),
        TopicSpec(
            f"{service}.inbox", min(partitions, INBOX_PARTITIONS), retention_s=INBOX_RETENTION_S, max_bytes=max_bytes
        ),
        TopicSpec(f"{service}.dlq", partitions, max_bytes=max_bytes + DEAD_LETTER_ROOM_BYTES),
    )
