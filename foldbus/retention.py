"""For how long a service remembers what it has handled, and forgetting the rest.

The claims of handled messages are the inbox: a message that comes again finds its claim, and nothing happens twice.
They are kept for ever unless the service says otherwise, since a claim that goes too early is a second effect. Where it
does (`Service(keep_claims_s=…)`), three things hold (docs/decisions/0011):

- A worker does not start while a topic that feeds the group may hold a message for longer than its claim is kept.
- It asks again before every pass: retention that somebody raised meanwhile stops the forgetting, loudly.
- Claims of sagas' steps and the fences of their undos are kept, unless `keep_steps_s` says for how long: an undo asks
  for its step's claim, however late.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from bus.errors import FoldbusError, TransportUnavailable
from bus.metrics import Metrics
from bus.seams import Clock
from bus.transport import TopicAdmin, TopicSpec, TopicState
from eventstore.errors import StoreUnavailable
from eventstore.port import Leadership, Store

if TYPE_CHECKING:
    from foldbus.service import Service

log = logging.getLogger("foldbus.retention")

LEASE = "inbox"


class ClaimsTooShort(FoldbusError):
    """Claims would be forgotten while their messages may still come again: refused to start."""


@dataclass(frozen=True, slots=True)
class Keep:
    """`groups` says for how many seconds the claims of a consumer group are kept; those of others are kept for ever.
    `steps_s` is for claims that an undo may ask for; None keeps them for ever."""

    groups: Mapping[str, float]
    steps_s: float | None = None


@dataclass(frozen=True, slots=True)
class RetentionSettings:
    """`every_s` between two passes; a pass looks at `batch` claims at a time and rests `pause_s` in between. The first
    one begins `settle_s` after the start: a broker that was down has messages to drop itself."""

    every_s: float = 3600.0
    settle_s: float = 60.0
    batch: int = 2000
    pause_s: float = 0.05
    lease_ttl_s: float = 10.0


def keep_of(
    keep: float | Mapping[str, float] | None, steps_s: float | None, groups: Sequence[str], service: str
) -> Keep:
    """`groups` are those that make claims. Raises ClaimsTooShort for what can never be meant."""
    wanted = dict(keep) if isinstance(keep, Mapping) else {} if keep is None else dict.fromkeys(groups, keep)
    if unknown := sorted(wanted.keys() - set(groups)):
        raise ClaimsTooShort(
            f"service {service!r} keeps claims of {', '.join(unknown)}; its consumer groups that make any are "
            f"{', '.join(groups) or 'none'}"
        )
    for name, seconds in (*wanted.items(), ("keep_steps_s", steps_s)):
        if seconds is not None and not seconds > 0:
            raise ClaimsTooShort(f"service {service!r}: {name} is kept for {seconds!r} s; wanted a number above 0")
    if steps_s is not None and not wanted:
        raise ClaimsTooShort(f"service {service!r} has keep_steps_s, which says nothing without keep_claims_s")
    return Keep(wanted, steps_s)


def refusals(
    keep: Keep, read: Mapping[str, Sequence[str]], found: Mapping[str, TopicState | TopicSpec]
) -> Sequence[str]:
    """Where claims are kept for a shorter time than their messages may come again, a line each. `read` are the topics
    of each group; of topics that are not `found` nothing can come yet."""
    lines: list[str] = []
    for group, seconds in keep.groups.items():
        for topic in read.get(group, ()):
            state = found.get(topic)
            if state is None:
                continue
            lingers_s = state.lingers_s if isinstance(state, TopicState) else 0.0
            if state.retention_s is None:
                lines.append(
                    f"group {group!r} forgets claims after {seconds:g} s, but topic {topic!r} keeps messages for ever: "
                    "one that is read again later would be handled twice; give the topic a retention, or leave the "
                    "group out of keep_claims_s"
                )
            elif state.retention_s + lingers_s > seconds:
                longer = f" and up to {lingers_s:g} s longer" if lingers_s else ""
                lines.append(
                    f"group {group!r} forgets claims after {seconds:g} s, but topic {topic!r} keeps messages for "
                    f"{state.retention_s:g} s{longer}: wanted keep_claims_s of at least "
                    f"{state.retention_s + lingers_s:g}, or a shorter retention of the topic"
                )
    return lines


async def check(service: Service, admin: TopicAdmin) -> None:
    """Raises ClaimsTooShort, which refuses to start; TransportUnavailable."""
    if lines := await look(service.keep, service.groups, admin):
        raise ClaimsTooShort("; ".join(lines))


async def look(keep: Keep, groups: Mapping[str, Sequence[str]], admin: TopicAdmin) -> Sequence[str]:
    """`refusals`, by what the broker has now."""
    topics = {topic for group in keep.groups for topic in groups.get(group, ())}
    return refusals(keep, groups, await admin.describe(sorted(topics))) if topics else ()


class Forgetting:
    """Forgets claims that are old enough, in one worker at a time, by a lease; `run` until cancelled."""

    def __init__(
        self,
        store: Store,
        admin: TopicAdmin,
        keep: Keep,
        groups: Mapping[str, Sequence[str]],
        *,
        clock: Clock,
        metrics: Metrics,
        settings: RetentionSettings | None = None,
    ) -> None:
        self._store, self._admin, self._keep, self._groups = store, admin, keep, groups
        self._clock, self._metrics, self._settings = clock, metrics, settings or RetentionSettings()

    async def run(self) -> None:
        await asyncio.sleep(self._settings.settle_s)
        while True:
            try:
                async with self._store.leases.lead(LEASE, ttl_s=self._settings.lease_ttl_s) as leadership:
                    while not leadership.lost:
                        await self.once(leadership)
                        await self._rest(leadership)
            except (StoreUnavailable, TransportUnavailable) as error:
                log.warning("claims are not forgotten for the moment: %s", error)
                await asyncio.sleep(min(60.0, self._settings.every_s))

    async def once(self, leadership: Leadership | None = None) -> int:
        """One pass; answers how many claims went. Groups whose topics keep messages too long now are left alone."""
        gone = 0
        for group, seconds in self._keep.groups.items():
            only = Keep({group: seconds}, self._keep.steps_s)
            if lines := await look(only, self._groups, self._admin):
                self._metrics.count("foldbus_claims_kept_total", consumer=group)
                log.error("claims of %s are not forgotten: %s", group, "; ".join(lines))
                continue
            forgotten = await self._group(group, seconds, leadership)
            gone += forgotten
            if forgotten:
                log.info("forgot %d claims of %s that were older than %g s", forgotten, group, seconds)
        return gone

    async def _group(self, group: str, seconds: float, leadership: Leadership | None) -> int:
        gone = 0
        after: UUID | None = None
        while leadership is None or not leadership.lost:
            piece = await self._store.inbox.forget(
                group,
                older_than_s=seconds,
                steps_older_than_s=self._keep.steps_s,
                after=after,
                limit=self._settings.batch,
            )
            gone += piece.gone
            self._metrics.count("foldbus_claims_forgotten_total", piece.gone, consumer=group)
            if piece.after is None:
                break
            after = piece.after
            await asyncio.sleep(self._settings.pause_s)
        return gone

    async def _rest(self, leadership: Leadership) -> None:
        until = self._clock.monotonic() + self._settings.every_s
        while not leadership.lost and (left := until - self._clock.monotonic()) > 0:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(min(left, self._settings.lease_ttl_s))


__all__ = [
    "LEASE", "ClaimsTooShort", "Forgetting", "Keep", "RetentionSettings", "check", "keep_of", "look", "refusals",
]  # fmt: skip
