"""Is what a store holds in one piece? Asked of one state of it, so that writers at work give no false alarm.

Each check is a query that is the same for both databases, over the few relations that `RELATIONS` names and each
adapter defines. The database streams; nothing here grows with the store. Only `documents` reads every stored document,
and is asked for.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic_core import from_json

from eventstore.export import SECTIONS, Header, Row, Section

SHOWN_MAX = 20
"""So many damages of a kind are named, the others counted."""

RELATIONS: Mapping[str, str] = {
    "ev": "category, id, version, position",  # events in the log; null names where the stream's row is missing
    "ar": "category, id, version, position",  # archived ones
    "st": "category, id, version, archived",  # version as stored: negative while archived; archived: 1 or 0
    "sn": "category, id, version, truncated",
    "ou": "position",
    "le": "name, token, position",
    "cl": "consumer, message, state, effect, reply",  # state as text; effect and reply: 1, 0 (effect null: not stored)
    "re": "consumer, message, claimed, last_event, last_public",  # replies; claimed: is there a claim, 1 or 0
    "dl": "consumer, id, failed_at",  # dead letters that are open
    "se": "number, consumer, id, failed_at, settled_as",
    "wm": "of_group, topic, part, next",
    "lg": "epoch, head",
    "pk": "consumer, key, token, held, hidden",  # parked keys; hidden: it does not come up by itself, 1 or 0
    "pa": "number, consumer, key, message",
    "ef": "consumer, message, token",
}

_ALL = "(select * from ev union all select * from ar)"
_STREAMS = f"""(select category, id, min(version) as low, max(version) as high, count(*) as many
                  from {_ALL} e group by category, id)"""


def _named(of: str) -> str:
    return f"coalesce({of}.category, 'a stream without a row') || ' ' || coalesce({of}.id, '')"


CHECKS: Mapping[str, str] = {
    "versions have no holes": f"""
        select {_named("s")} || ': versions ' || s.low || ' to ' || s.high || ' are ' || s.many || ' events'
          from {_STREAMS} s where s.many <> s.high - s.low + 1""",
    "versions begin where they should": f"""
        select {_named("s")} || ': the first event has version ' || s.low || ', wanted '
               || (coalesce(n.truncated, 0) + 1)
          from {_STREAMS} s left join sn n on n.category = s.category and n.id = s.id
         where s.low <> coalesce(n.truncated, 0) + 1""",
    "a stream's row has its highest version": f"""
        select {_named("t")} || ': the row says ' || abs(t.version) || ', its last event has version '
               || coalesce(s.high, n.truncated, 0)
          from st t left join {_STREAMS} s on s.category = t.category and s.id = t.id
                    left join sn n on n.category = t.category and n.id = t.id
         where abs(t.version) <> coalesce(s.high, n.truncated, 0) or t.version = 0""",
    "every event's stream has a row": f"""
        select {_named("s")} || ': ' || s.many || ' events, but no row of the stream'
          from {_STREAMS} s left join st t on t.category = s.category and t.id = s.id where t.id is null""",
    "archived streams are archived whole": f"""
        select {_named("t")} || ': archived, but version ' || min(e.version) || ' is in the log'
          from st t join ev e on e.category = t.category and e.id = t.id where t.version < 0
         group by t.category, t.id
        union all
        select {_named("t")} || ': not archived, but version ' || min(e.version) || ' is set aside'
          from st t join ar e on e.category = t.category and e.id = t.id where t.version >= 0
         group by t.category, t.id
        union all
        select {_named("t")} || ': its version is ' || t.version || ', its time of archiving '
               || case when t.archived = 1 then 'is' else 'is not' end || ' there'
          from st t where (t.version < 0) <> (t.archived = 1)""",
    "positions are unique": """
        select 'position ' || position || ' is taken ' || count(*) || ' times'
          from (select position from ev union all select position from ar union all select position from ou) p
         group by position having count(*) > 1""",
    "positions are below the head": """
        select 'position ' || max(p.position) || ' was never drawn: the log ends at ' || max(lg.head) || ', '
               || count(*) || ' records are above that'
          from (select position from ev union all select position from ar union all select position from ou) p, lg
         where p.position > lg.head or p.position < 1 having count(*) > 0""",
    "positions rise with versions": f"""
        select {_named("w")} || ': version ' || w.version || ' at position ' || w.position || ' follows '
               || w.before
          from (select category, id, version, position,
                       lag(position) over (partition by category, id order by version) as before from {_ALL} e) w
         where w.before >= w.position""",
    "snapshots are of what is there": f"""
        select {_named("n")} || ': a snapshot of version ' || n.version || ', the stream is at '
               || coalesce(abs(t.version), 0)
          from sn n left join st t on t.category = n.category and t.id = n.id
         where n.version > coalesce(abs(t.version), 0) or n.version < 1
        union all
        select {_named("n")} || ': truncated up to ' || n.truncated || ', its snapshot is of version ' || n.version
          from sn n where n.truncated > n.version""",
    "claims are consistent": """
        select c.consumer || ' ' || c.message || ': ' || c.state
               || case when c.reply = 1 then ' with a reply' else ' without a reply' end
               || case when c.effect = 1 then ', with effect' when c.effect = 0 then ', without effect' else '' end
          from cl c
         where c.state not in ('done', 'dead', 'cancelled', 'parked', 'started')
            or (c.state in ('cancelled', 'parked', 'started') and c.reply = 1)
            or (c.effect = 1 and c.state <> 'done') or (c.effect = 0 and c.state = 'done' and c.reply = 0)""",
    "replies are consistent": """
        select r.consumer || ' ' || r.message || ': a reply without a claim' from re r where r.claimed = 0
        union all
        select r.consumer || ' ' || r.message || ': its reply says position ' || r.last_event || ' (public '
               || r.last_public || '), the log ends at ' || lg.head
          from re r, lg where r.last_event > lg.head or r.last_public > r.last_event or r.last_public < 0""",
    "dead letters are open or settled": """
        select s.consumer || ' ' || s.id || ': open, and settled as ' || s.settled_as || ' (number ' || s.number || ')'
          from dl d join se s on s.consumer = d.consumer and s.id = d.id and s.failed_at = d.failed_at
        union all
        select s.consumer || ' ' || s.id || ': settled as ' || s.settled_as || ' (number ' || s.number || ')'
          from se s where s.number < 1
            or s.settled_as not in ('redriven', 'replaced', 'discarded', 'handled', 'folded')""",
    "parked messages and their claims belong together": """
        select p.consumer || ' ' || p.message || ': in the queue of ' || p.key || ', its claim is '
               || coalesce(c.state, 'not there')
          from pa p left join cl c on c.consumer = p.consumer and c.message = p.message
         where c.state is null or c.state <> 'parked'
        union all
        select c.consumer || ' ' || c.message || ': its claim is parked, it is in no queue'
          from cl c left join pa p on p.consumer = c.consumer and p.message = c.message
         where c.state = 'parked' and p.number is null""",
    "parked keys and their queues belong together": """
        select p.consumer || ' ' || p.message || ': in the queue of ' || p.key || ', which is not parked'
          from pa p left join pk k on k.consumer = p.consumer and k.key = p.key where k.token is null
        union all
        select k.consumer || ' ' || k.key || ': parked, its queue is empty'
          from pk k where not exists (select 1 from pa p where p.consumer = k.consumer and p.key = k.key)
        union all
        select k.consumer || ' ' || k.key || ': token ' || k.token
               || case when k.held = 1 then ', held' else ', due' end
               || case when k.hidden = 1 then ', does not come up' else ', comes up' end
          from pk k where k.token < 0 or k.held <> k.hidden""",
    "effects and their claims belong together": """
        select c.consumer || ' ' || c.message || ': begun, and nobody knows by whom'
          from cl c left join ef e on e.consumer = c.consumer and e.message = c.message
         where c.state = 'started' and e.token is null
        union all
        select e.consumer || ' ' || e.message || ': token ' || e.token || ', its claim is '
               || coalesce(c.state, 'not there')
          from ef e left join cl c on c.consumer = e.consumer and c.message = e.message
         where e.token < 1 or c.state = 'done'""",
    "checkpoints are not ahead": """
        select l.name || ': at ' || l.position || ' with token ' || l.token || ', the log ends at ' || lg.head
          from le l, lg where l.position > lg.head or l.position < 0 or l.token < 1""",
    "watermarks are offsets": """
        select w.of_group || ': ' || w.next || ' in ' || w.topic || '[' || w.part || ']'
          from wm w where w.next < 0 or w.part < -1""",
    "the epoch is sane": "select 'epoch ' || lg.epoch from lg where lg.epoch < 0",
}
DOCUMENTS = "documents can be read"


@dataclass(frozen=True, slots=True)
class Damage:
    """`count` of this kind were found, the first of them described."""

    check: str
    count: int
    found: tuple[str, ...]


class Examined(Protocol):
    """One state of a store: an export's source that can also be asked."""

    async def header(self) -> Header: ...

    def rows(self, section: Section, *, after: Row | None) -> AsyncIterator[Sequence[Row]]: ...

    async def ask(self, sql: str, *, limit: int) -> tuple[int, Sequence[str]]:
        """How many rows of one text it gives, and the first `limit` of them. The names of `RELATIONS` may be used."""
        ...


async def verify(
    examined: Examined, *, documents: bool = False, told: Callable[[int, int], None] | None = None
) -> list[Damage]:
    """Empty: nothing wrong was found. `documents` also reads every message."""
    damages: list[Damage] = []
    steps = len(CHECKS) + documents
    for nth, (check, sql) in enumerate(CHECKS.items()):
        count, found = await examined.ask(sql, limit=SHOWN_MAX)
        if count:
            damages.append(Damage(check, count, tuple(found)))
        if told is not None:
            told(nth + 1, steps)
    if documents and (damage := await _documents(examined)) is not None:
        damages.append(damage)
    return damages


async def _documents(examined: Examined) -> Damage | None:
    header = await examined.header()
    count = 0
    shown: list[str] = []
    for section in SECTIONS:
        document = next((n for n, name in enumerate(section.columns) if name in _DOCUMENTS), None)
        if document is None:
            continue
        async for rows in examined.rows(section, after=None):
            for row in rows:
                fault = None if row[document] is None else _fault(section, row[document], header)
                if fault is not None:
                    count += 1
                    if len(shown) < SHOWN_MAX:
                        shown.append(f"{section.name} {' '.join(map(str, row[: section.key]))}: {fault}")
    return Damage(DOCUMENTS, count, tuple(shown)) if count else None


_DOCUMENTS = frozenset({"meta", "reply", "envelope", "details"})


def _fault(section: Section, document: str, header: Header) -> str | None:
    try:
        found: dict[str, Any] = from_json(document)
        own = section.name == "event" and found["source"] == header.service
        epoch: int = found.get("epoch", 0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return f"its document is none: {error!r}"
    if own and epoch > header.epoch:
        return f"it is of epoch {epoch}, the log of {header.epoch}"
    return None


__all__ = ["CHECKS", "DOCUMENTS", "RELATIONS", "Damage", "Examined", "verify"]
