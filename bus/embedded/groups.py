"""Who holds which lane. Plain functions over a connection, each run whole inside one write transaction.

Sharing out is cooperative and in two steps. `_share_out` only says who *ought to* hold a lane (`target`). The member
that holds it (`owner`) sees that in its next poll, drains, commits and lets go (`release`); only then does the target
take it (`take`), with the epoch raised by one. A member that stops beating loses its lanes when its lease runs out, one
that does not let go within its rebalance timeout loses that lane: both find their commits fenced, since those are
checked against owner, epoch and lease in the transaction that stores them.

Times are on the machine's monotonic clock, which its processes share: a wall clock that jumps expels nobody.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from bus.embedded.log import tick_clock
from bus.envelope import Offset
from bus.errors import Fenced, GroupInUse
from bus.transport import PollSettings


@dataclass(frozen=True, slots=True)
class Membership:
    group_id: int
    member_id: int


@dataclass(frozen=True, slots=True)
class Taken:
    """A lane that came into hand; `first` is the first offset that it still holds."""

    lane: int
    epoch: int
    committed: Offset | None
    first: Offset


@dataclass(frozen=True, slots=True)
class Share:
    """A lane as a member sees it: held by it, meant for it, or both. `free`: nobody holds it."""

    lane: int
    epoch: int
    held: bool
    meant: bool
    free: bool


def join(
    conn: sqlite3.Connection, group: str, topic_ids: Collection[int], *, now: float, settings: PollSettings
) -> Membership:
    conn.execute("INSERT INTO consumer_groups (name) VALUES (?) ON CONFLICT (name) DO NOTHING", (group,))
    ((group_id,),) = conn.execute("SELECT id FROM consumer_groups WHERE name = ?", (group,)).fetchall()
    ((member_id,),) = conn.execute(
        "INSERT INTO members (group_id, topics, alive_until, session_s, rebalance_s)"
        " VALUES (?, ?, ?, ?, ?) RETURNING id",
        (
            group_id,
            json.dumps(sorted(topic_ids)),
            now + settings.session_timeout_s,
            settings.session_timeout_s,
            settings.rebalance_timeout_s,
        ),
    ).fetchall()
    _share_out(conn, group_id, now=now)
    return Membership(group_id, member_id)


def leave(conn: sqlite3.Connection, member: Membership, *, now: float) -> None:
    if conn.execute("DELETE FROM members WHERE id = ?", (member.member_id,)).rowcount:
        _share_out(conn, member.group_id, now=now)


def shares(conn: sqlite3.Connection, member: Membership) -> Sequence[Share] | None:
    """What concerns this member; None when it was expelled. A read."""
    if not conn.execute("SELECT 1 FROM members WHERE id = ?", (member.member_id,)).fetchall():
        return None
    me = member.member_id
    rows = conn.execute(
        "SELECT lane, epoch, owner, target FROM shares WHERE group_id = ?1 AND (owner = ?2 OR target = ?2)",
        (member.group_id, me),
    )
    return [
        Share(lane, epoch, owner == me, target == me, owner is None) for lane, epoch, owner, target in rows.fetchall()
    ]


def take(conn: sqlite3.Connection, member: Membership, lanes: Collection[int]) -> Sequence[Taken]:
    """Takes those of `lanes` that are meant for this member and held by nobody (or by itself: it forgot)."""
    taken = conn.execute(
        "UPDATE shares SET owner = ?1, epoch = epoch + 1, asked_at = NULL WHERE group_id = ?2 AND target = ?1"
        " AND (owner IS NULL OR owner = ?1) AND lane IN (SELECT value FROM json_each(?3))"
        " AND EXISTS (SELECT 1 FROM members WHERE id = ?1) RETURNING lane, epoch, committed",
        (member.member_id, member.group_id, json.dumps(sorted(lanes))),
    ).fetchall()
    first = dict(
        conn.execute(
            "SELECT id, first_offset FROM lanes WHERE id IN (SELECT value FROM json_each(?))",
            (json.dumps([lane for lane, _, _ in taken]),),
        ).fetchall()
    )
    return [Taken(lane, epoch, committed, first[lane]) for lane, epoch, committed in sorted(taken)]


def release(conn: sqlite3.Connection, member: Membership, lanes: Collection[int]) -> None:
    """Lets go of lanes that this member holds and is not meant to."""
    freed = conn.execute(
        "UPDATE shares SET owner = NULL, asked_at = NULL WHERE group_id = ?1 AND owner = ?2 AND target IS NOT ?2"
        " AND lane IN (SELECT value FROM json_each(?3))",
        (member.group_id, member.member_id, json.dumps(sorted(lanes))),
    ).rowcount
    if freed:
        _touch(conn, member.group_id)


def commit(
    conn: sqlite3.Connection, member: Membership, offsets: Mapping[int, tuple[int, Offset]], *, now: float
) -> None:
    """Stores lane → (epoch, offset), all or none. Raises Fenced when one lane is not this member's at that epoch, or
    its lease has run out (somebody else may take over at any moment, also if nobody has yet)."""
    if not conn.execute(
        "SELECT 1 FROM members WHERE id = ? AND alive_until >= ? AND alive_until <= ? + session_s",
        (member.member_id, now, now),
    ).fetchall():
        raise Fenced(f"member {member.member_id} was away for longer than its session; its commit stored nothing")
    for lane, (epoch, _) in offsets.items():
        rows = conn.execute(
            "SELECT owner, epoch FROM shares WHERE group_id = ? AND lane = ?", (member.group_id, lane)
        ).fetchall()
        owner, current = rows[0] if rows else (None, None)
        if (owner, current) != (member.member_id, epoch):
            raise Fenced(
                f"lane {lane} is with member {owner} at epoch {current}, "
                f"not with {member.member_id} at epoch {epoch}; its commit stored nothing"
            )
    conn.executemany(
        "UPDATE shares SET committed = ? WHERE group_id = ? AND lane = ?",
        [(offset, member.group_id, lane) for lane, (_, offset) in offsets.items()],
    )


def committed(conn: sqlite3.Connection, group: str) -> Mapping[int, Offset]:
    """Lane → the group's committed offset. A read."""
    rows = conn.execute(
        "SELECT s.lane, s.committed FROM shares s JOIN consumer_groups g ON g.id = s.group_id"
        " WHERE g.name = ? AND s.committed IS NOT NULL",
        (group,),
    )
    return dict(rows.fetchall())


def living(conn: sqlite3.Connection, group: str, *, now: float) -> int:
    """How many members of the group have not missed their time. A read."""
    ((count,),) = conn.execute(
        "SELECT count(*) FROM members m JOIN consumer_groups g ON g.id = m.group_id WHERE g.name = ?1"
        " AND m.alive_until >= ?2 AND m.alive_until <= ?2 + m.session_s",
        (group, now),
    ).fetchall()
    return int(count)


def place(conn: sqlite3.Connection, group: str, offsets: Mapping[int, Offset], *, now: float) -> None:
    """Sets the group's offsets by lane. Raises GroupInUse while it has living members."""
    members = living(conn, group, now=now)
    if members:
        raise GroupInUse(f"group {group} has {members} members; no offset was set")
    conn.execute("INSERT INTO consumer_groups (name) VALUES (?) ON CONFLICT (name) DO NOTHING", (group,))
    ((group_id,),) = conn.execute("SELECT id FROM consumer_groups WHERE name = ?", (group,)).fetchall()
    conn.executemany(
        "INSERT INTO shares (group_id, lane, committed) VALUES (?1, ?2, ?3)"
        " ON CONFLICT (group_id, lane) DO UPDATE SET committed = excluded.committed",
        [(group_id, lane, offset) for lane, offset in offsets.items()],
    )


def beat(conn: sqlite3.Connection, member_ids: Collection[int], *, now: float) -> tuple[int, int]:
    """Expels whoever missed its time, takes lanes from whoever did not let go in time, then prolongs these members'
    leases; answers how many members and how many lanes. Expelling comes first: who was away for too long does not
    prolong its own lease afterwards."""
    expelled = conn.execute(
        "DELETE FROM members WHERE alive_until < ?1 OR alive_until > ?1 + session_s RETURNING group_id", (now,)
    ).fetchall()
    for group_id in {group_id for (group_id,) in expelled}:
        _share_out(conn, group_id, now=now)
    overdue = conn.execute(
        "UPDATE shares SET owner = NULL, asked_at = NULL WHERE owner IS NOT NULL AND target IS NOT owner"
        " AND asked_at + (SELECT rebalance_s FROM members WHERE members.id = shares.owner) < ? RETURNING group_id",
        (now,),
    ).fetchall()
    for group_id in {group_id for (group_id,) in overdue}:
        _touch(conn, group_id)
    conn.execute(
        "UPDATE members SET alive_until = ? + session_s WHERE id IN (SELECT value FROM json_each(?))",
        (now, json.dumps(sorted(member_ids))),
    )
    return len(expelled), len(overdue)


def _touch(conn: sqlite3.Connection, group_id: int) -> None:
    conn.execute("UPDATE consumer_groups SET touched = ? WHERE id = ?", (tick_clock(conn), group_id))


def _share_out(conn: sqlite3.Connection, group_id: int, *, now: float) -> None:
    """Says anew who ought to hold what, after a member came or went."""
    subscriptions = {
        member_id: set[int](json.loads(topics))
        for member_id, topics in conn.execute(
            "SELECT id, topics FROM members WHERE group_id = ? ORDER BY id", (group_id,)
        ).fetchall()
    }
    lanes: dict[int, list[int]] = {}
    for topic_id, lane in conn.execute(
        "SELECT topic_id, id FROM lanes WHERE topic_id IN (SELECT value FROM json_each(?))"
        " ORDER BY topic_id, partition",
        (json.dumps(sorted(set[int]().union(*subscriptions.values()))),),
    ).fetchall():
        lanes.setdefault(topic_id, []).append(lane)
    before: dict[int, int] = dict(
        conn.execute(
            "SELECT lane, target FROM shares WHERE group_id = ? AND target IS NOT NULL", (group_id,)
        ).fetchall()
    )
    # Whoever is gone holds nothing; its epoch stays, so that the next one is higher.
    conn.execute(
        "UPDATE shares SET owner = NULL, asked_at = NULL WHERE group_id = ?1 AND owner IS NOT NULL"
        " AND owner NOT IN (SELECT id FROM members WHERE group_id = ?1)",
        (group_id,),
    )
    conn.execute("UPDATE shares SET target = NULL WHERE group_id = ?", (group_id,))
    conn.executemany(
        "INSERT INTO shares (group_id, lane, target) VALUES (?1, ?2, ?3)"
        " ON CONFLICT (group_id, lane) DO UPDATE SET target = excluded.target",
        [(group_id, lane, target) for lane, target in plan(lanes, subscriptions, before).items()],
    )
    conn.execute(
        "UPDATE shares SET asked_at = CASE WHEN owner IS NULL OR owner IS target THEN NULL"
        " ELSE coalesce(asked_at, ?) END WHERE group_id = ?",
        (now, group_id),
    )
    _touch(conn, group_id)


def plan(
    lanes: Mapping[int, Sequence[int]], subscriptions: Mapping[int, Collection[int]], before: Mapping[int, int]
) -> Mapping[int, int]:
    """Lane → member. Each topic's lanes are shared out evenly among those who subscribe to it, what is left over goes
    to whoever has least in all, and a lane stays where it was (`before`) as long as that is even. Pure."""
    totals = dict.fromkeys(subscriptions, 0)
    planned: dict[int, int] = {}
    for topic_id in sorted(lanes):
        members = [member for member, topics in subscriptions.items() if topic_id in topics]
        if not members:
            continue
        kept: dict[int, list[int]] = {member: [] for member in members}
        for lane in lanes[topic_id]:
            if before.get(lane) in kept:
                kept[before[lane]].append(lane)
        each, more = divmod(len(lanes[topic_id]), len(members))
        ranked = sorted(members, key=lambda m: (totals[m], -len(kept[m]), m))
        quotas = {member: each + (rank < more) for rank, member in enumerate(ranked)}
        mine = {member: kept[member][: quotas[member]] for member in members}
        settled = {lane for of_one in mine.values() for lane in of_one}
        free = iter([lane for lane in lanes[topic_id] if lane not in settled])
        for member in members:
            while len(mine[member]) < quotas[member]:
                mine[member].append(next(free))
            totals[member] += quotas[member]
            planned.update(dict.fromkeys(mine[member], member))
    return planned
