"""Topics as a service declares them: which it has, what is missing at the broker, what is there otherwise.

The partition count decides where keys go, so one that differs from the declaration is refused, never changed. Nothing
that exists is altered from here: retention, compaction and limits of an existing topic belong to whoever runs the
broker, and a difference is said, with what was found and what to do. Topics of others are compared where a service
declares what it expects of them, and never created.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

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
    """What `apply` would do: create these, and refuse because of those (each told in one line). `absent` are declared
    topics of others that are not there (yet): they are waited for."""

    create: tuple[TopicSpec, ...] = ()
    mismatches: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()


def plan(specs: Iterable[TopicSpec], existing: Mapping[str, TopicState], *, foreign: Iterable[TopicSpec] = ()) -> Plan:
    """Compares the declaration with what the broker has. Pure; topics that nobody declares are left out. `foreign` are
    declared by those who read them; what their owner declares (`specs`) decides whether they are created.

    Raises TopicMismatch when the declaration contradicts itself (one name declared in two ways).
    """
    own = list(specs)
    wanted: dict[str, TopicSpec] = {}
    for spec in (*own, *foreign):
        known = wanted.setdefault(spec.name, spec)
        if known != spec and replace(known, keyed=spec.keyed) != spec:  # how it is read is each reader's own affair
            raise TopicMismatch(f"topic {spec.name!r} is declared twice and differently: {known} and {spec}")
    owned = {spec.name for spec in own}
    create: list[TopicSpec] = []
    absent: list[str] = []
    mismatches: list[str] = []
    for spec in wanted.values():
        state = existing.get(spec.name)
        if state is not None:
            mismatches += differences(spec, state)
        elif spec.name in owned:
            create.append(spec)
        else:
            absent.append(spec.name)
    return Plan(tuple(create), tuple(mismatches), tuple(absent))


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
    if spec.compact and not state.compact:
        found.append(
            f"topic {spec.name!r} is not compacted, declared is one that is: set cleanup.policy={_policy(spec)}, "
            "or declare compact=False"
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


async def look(admin: TopicAdmin, specs: Sequence[TopicSpec], foreign: Sequence[TopicSpec] = ()) -> Plan:
    """The plan of what the broker has now. Raises TopicMismatch (see `plan`), TransportUnavailable."""
    existing = await admin.describe([spec.name for spec in (*specs, *foreign)])
    return plan(specs, existing, foreign=foreign)


async def apply(admin: TopicAdmin, specs: Sequence[TopicSpec], foreign: Sequence[TopicSpec] = ()) -> Plan:
    """Creates what is missing; a second call does nothing. Raises TopicMismatch, before creating anything, when
    something is there otherwise than declared; TransportUnavailable."""
    made = await look(admin, specs, foreign)
    _refuse(made.mismatches)
    if made.create:
        await admin.create(made.create)
        log.info("created topics %s", ", ".join(spec.name for spec in made.create))
        # Somebody else may have been first, with another declaration.
        _refuse((await look(admin, made.create)).mismatches)
    return made


async def validate(admin: TopicAdmin, specs: Sequence[TopicSpec], foreign: Sequence[TopicSpec] = ()) -> None:
    """Changes nothing. Raises MissingTopics, or TopicMismatch saying what was found, what is wanted and what to do;
    both are refusals to start. A topic of others that is missing is none."""
    made = await look(admin, specs, foreign)
    _refuse(made.mismatches)
    if made.create:
        raise MissingTopics([spec.name for spec in made.create])


def _refuse(mismatches: Collection[str]) -> None:
    if mismatches:
        raise TopicMismatch("; ".join(mismatches))


def _policy(spec: TopicSpec) -> str:
    return "compact" if spec.retention_s is None else "compact,delete"


def service_topics(
    service: str,
    *,
    partitions: int = TopicSpec("").partitions,
    max_bytes: int = TopicSpec("").max_bytes,
    instead: Iterable[TopicSpec] = (),
) -> tuple[TopicSpec, ...]:
    """The topics of one service. All keep what they hold but `.inbox`, where only whoever waits right now listens;
    `.dlq` has room for a whole record and its history. A spec in `instead` stands for that of its name, or is one
    more."""
    specs = (
        TopicSpec(f"{service}.commands", partitions, max_bytes=max_bytes),
        TopicSpec(f"{service}.events", partitions, max_bytes=max_bytes),
        TopicSpec(f"{service}.replies", partitions, max_bytes=max_bytes),
        TopicSpec(
            f"{service}.inbox", min(partitions, INBOX_PARTITIONS), retention_s=INBOX_RETENTION_S, max_bytes=max_bytes
        ),
        TopicSpec(f"{service}.dlq", partitions, max_bytes=max_bytes + DEAD_LETTER_ROOM_BYTES),
    )
    found = {spec.name: spec for spec in specs}
    found.update((spec.name, spec) for spec in instead)
    return tuple(found.values())
