"""Reading: the part that group members and tails share, and the two of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from bus.embedded import groups, log
from bus.embedded.hub import Hub
from bus.embedded.writer import Writer
from bus.envelope import Offset
from bus.errors import BusError, Fenced, OffsetOutOfRange
from bus.metrics import Metrics
from bus.seams import Clock
from bus.transport import Assignment, Assignments, Delivery, PollSettings

logger = logging.getLogger("foldbus.bus")

POLL_BYTES = 16 * 1024 * 1024
"""One poll stops short of more than this, after at least one record."""


@dataclass(slots=True, eq=False)
class _Part:
    """A partition in hand and the next offset to read."""

    assignment: Assignment
    position: Offset
    paused: bool = False


class Reader:
    """Reads the lanes in hand, fairly: those with little to read give what they have, the rest share what is left."""

    def __init__(self, hub: Hub, clock: Clock) -> None:
        self._hub, self._clock = hub, clock
        self._parts: dict[int, _Part] = {}
        self._turn = 0
        self._told = False

    def wake(self) -> None:
        self._told = True
        self._hub.wake(self)

    def _was_told(self) -> bool:
        """To return from its poll; asked once."""
        told, self._told = self._told, False
        return told

    def concerns(self, lanes: set[int], groups: set[int]) -> bool:
        return not lanes.isdisjoint(self._parts)

    def pause(self, parts: Collection[Assignment]) -> None:
        for part in self._parts.values():
            if part.assignment in parts:
                part.paused = True

    def resume(self, parts: Collection[Assignment]) -> None:
        for part in self._parts.values():
            if part.assignment in parts:
                part.paused = False
        self._hub.wake(self)

    async def end_offsets(self) -> Mapping[Assignment, Offset]:
        in_hand = dict(self._parts)
        bounds = await self._hub.read(lambda conn: log.bounds(conn, list(in_hand)))
        return {part.assignment: bounds[lane][1] for lane, part in in_hand.items()}

    async def _read(self, max_records: int) -> Sequence[Delivery]:
        ends = self._hub.ends
        behind: list[tuple[int, int, int]] = []
        for lane, part in self._parts.items():
            if not part.paused and (available := ends.get(lane, 0) - part.position) != 0:
                behind.append((available, lane, ends.get(lane, 0)))
        if not behind:
            return ()
        self._turn += 1
        first = self._turn % len(behind)  # where there are more lanes than records asked for, all have their turn
        behind = sorted(behind[first:] + behind[:first], key=lambda one: one[0] > max_records // len(behind))
        deliveries: list[Delivery] = []
        positions: dict[int, Offset] = {}
        bytes_left = POLL_BYTES
        for n, (_, lane, end) in enumerate(behind):
            wanted = max_records - len(deliveries)
            if wanted <= 0 or bytes_left <= 0:
                break
            fair = max(1, wanted // (len(behind) - n))
            came, positions[lane], size = await self._read_lane(lane, end, limit=fair, max_bytes=bytes_left)
            deliveries += came
            bytes_left -= size
        for lane, position in positions.items():
            self._parts[lane].position = position
        return deliveries

    async def _read_lane(
        self, lane: int, end: Offset, *, limit: int, max_bytes: int
    ) -> tuple[Sequence[Delivery], Offset, int]:
        """Records, the position behind them, and their bytes."""
        part = self._parts[lane]
        rows, size = (
            await self._hub.read(
                lambda conn: log.read(conn, lane, start=part.position, end=end, limit=limit, max_bytes=max_bytes)
            )
            if part.position < end
            else ([], 0)
        )
        base = lane << log.LANE_BITS
        if not rows or rows[0][0] - base != part.position:
            # A gap: compaction makes some, which are nothing; or the position is out of what the topic holds.
            first, last = (await self._hub.read(lambda conn: log.bounds(conn, [lane])))[lane]
            if not first <= part.position <= last:
                raise OffsetOutOfRange(part.assignment, wanted=part.position, first=first, end=last)
        deliveries: list[Delivery] = []
        assignment = part.assignment
        at_us, at = -1, datetime.min.replace(tzinfo=UTC)
        for number, time_us, key, value, headers in rows:
            if time_us != at_us:  # records of one call share their time
                at_us, at = time_us, datetime.fromtimestamp(time_us / 1_000_000, UTC)
            deliveries.append(Delivery(assignment, number - base, key, value, log.unpack_headers(headers), at))
        exhausted = len(rows) < limit and size <= max_bytes
        return deliveries, max(end, part.position) if exhausted else rows[-1][0] - base + 1, size


class Tail(Reader):
    """All partitions of a topic, no group. Positions are fixed before it is handed out."""

    def __init__(self, hub: Hub, clock: Clock, topic: log.Topic, positions: Sequence[Offset]) -> None:
        super().__init__(hub, clock)
        for partition, (lane, position) in enumerate(zip(topic.lanes, positions, strict=True)):
            self._parts[lane] = _Part(Assignment(topic.name, partition), position)

    async def poll(self, *, max_records: int, timeout_s: float) -> Sequence[Delivery]:
        until = self._clock.monotonic() + timeout_s
        while True:
            if records := await self._read(max_records):
                return records
            left_s = until - self._clock.monotonic()
            if left_s <= 0 or self._was_told():
                return ()
            await self._hub.wait(self, timeout_s=left_s)

    async def commit(self, offsets: Mapping[Assignment, Offset]) -> None:
        raise BusError("a tail has no group and so nothing to commit to; nothing was stored")


class Member(Reader):
    """One member of one group. Rebalances happen in `poll` only; the heartbeat is the writer thread's."""

    def __init__(
        self,
        hub: Hub,
        writer: Writer,
        group: str,
        topics: Sequence[log.Topic],
        *,
        listener: Assignments,
        settings: PollSettings,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        super().__init__(hub, clock)
        self._writer, self._group, self._listener, self._settings = writer, group, listener, settings
        self._metrics = metrics
        self._topic_ids = [topic.id for topic in topics]
        self._places = {lane: (t.name, partition) for t in topics for partition, lane in enumerate(t.lanes)}
        self._lanes = {place: lane for lane, place in self._places.items()}
        self._member: groups.Membership | None = None
        self._understood = -1
        """The group's change number up to which this member's parts are what the file says."""
        self._idle_told = False
        """Does the listener know that the group has nothing for this member?"""
        self._polling = asyncio.Lock()
        self._closing = False
        self._idle_since: float | None = clock.monotonic()
        self._warned = False

    def concerns(self, lanes: set[int], groups: set[int]) -> bool:
        return super().concerns(lanes, groups) or (self._member is not None and self._member.group_id in groups)

    def beats(self, now: float) -> int | None:
        """Called by the writer thread: the member id that is alive, None when nobody has polled for so long that this
        member must be taken for dead."""
        idle_since, member = self._idle_since, self._member
        if member is None:
            return None
        if idle_since is not None and now - idle_since > self._settings.rebalance_timeout_s:
            if not self._warned:
                logger.warning("%s: not polled for %.1f s, the member's lease runs out", self._group, now - idle_since)
            self._warned = True
            return None
        return member.member_id

    async def join(self) -> None:
        self._understood, self._warned = -1, False
        self._member = await self._writer.run(
            lambda conn: groups.join(
                conn, self._group, self._topic_ids, now=self._clock.monotonic(), settings=self._settings
            )
        )

    async def poll(self, *, max_records: int, timeout_s: float) -> Sequence[Delivery]:
        async with self._polling:
            self._idle_since = None
            try:
                until = self._clock.monotonic() + timeout_s
                while not self._closing:
                    await self._settle()
                    if records := await self._read(max_records):
                        return records
                    left_s = until - self._clock.monotonic()
                    if left_s <= 0 or self._was_told():
                        break
                    await self._hub.wait(self, timeout_s=left_s)
                return ()
            finally:
                self._idle_since = self._clock.monotonic()

    async def commit(self, offsets: Mapping[Assignment, Offset]) -> None:
        if not offsets:
            return
        member = self._member
        wanted: dict[int, tuple[int, Offset]] = {}
        for part, offset in offsets.items():
            lane = self._lanes.get((part.topic, part.partition))
            if lane is None or member is None or wanted.get(lane, (part.epoch,))[0] != part.epoch:
                raise self._fenced(f"{part} is not in the hands of this member of {self._group}; nothing was stored")
            wanted[lane] = (part.epoch, offset)
        assert member is not None
        try:
            await self._writer.run(
                lambda conn: groups.commit(conn, member, wanted, now=self._clock.monotonic()), durable=True
            )
        except Fenced as error:
            raise self._fenced(f"group {self._group}: {error}") from error

    async def leave(self) -> None:
        """Waits for a poll under way, revokes what is in hand and leaves the group."""
        self._closing = True
        self._hub.wake(self)
        async with self._polling:
            member = self._member
            if member is None:
                return
            self._idle_since = None
            try:
                await self._drop_lost(await self._shares(member))
                await self._revoke(list(self._parts), lost=False)
            finally:
                self._member = None
                try:
                    await self._writer.run(lambda conn: groups.leave(conn, member, now=self._clock.monotonic()))
                except BusError as error:
                    logger.warning("%s: could not leave the group, the lease has to run out: %s", self._group, error)

    # --- rebalance -------------------------------------------------------------------------------------------------

    async def _settle(self) -> None:
        """Until this member's parts are what the file says: lose, let go, take, in this order."""
        while True:
            member = self._member
            assert member is not None
            change = self._hub.groups.get(member.group_id, 0)
            if change == self._understood:
                return
            shares = await self._shares(member)
            await self._drop_lost(shares)
            if shares is None:
                await self.join()
                continue
            await self._let_go(member, [share.lane for share in shares if share.held and not share.meant])
            await self._take(
                member, [s.lane for s in shares if s.meant and (s.free or s.held) and s.lane not in self._parts]
            )
            self._understood = change
            if not self._idle_told and not any(share.meant for share in shares):
                self._idle_told = True
                await self._listener.assigned([], {})

    async def _let_go(self, member: groups.Membership, lanes: Sequence[int]) -> None:
        if lanes:
            await self._revoke([lane for lane in lanes if lane in self._parts], lost=False)
            await self._writer.run(lambda conn: groups.release(conn, member, lanes))

    async def _shares(self, member: groups.Membership) -> Sequence[groups.Share] | None:
        return await self._hub.read(lambda conn: groups.shares(conn, member))

    async def _drop_lost(self, shares: Sequence[groups.Share] | None) -> None:
        held = {share.lane: share.epoch for share in shares or () if share.held}
        lost = [lane for lane, part in self._parts.items() if held.get(lane) != part.assignment.epoch]
        if lost:
            logger.warning("%s: lost %d partitions without being asked: this member was away", self._group, len(lost))
            self._metrics.count("foldbus_partitions_lost_total", len(lost), group=self._group)
            await self._revoke(lost, lost=True)

    async def _revoke(self, lanes: Sequence[int], *, lost: bool) -> None:
        if not lanes:
            return
        parts = [self._parts.pop(lane).assignment for lane in lanes]  # from now on nothing is read from them
        self._idle_told = False
        self._metrics.count("foldbus_partitions_revoked_total", len(parts), group=self._group)
        await self._listener.revoked(parts, lost=lost)

    async def _take(self, member: groups.Membership, lanes: Sequence[int]) -> None:
        """When the listener raises, nothing is in hand: the next poll takes the lanes again, at a higher epoch."""
        if not lanes:
            return
        taken = await self._writer.run(lambda conn: groups.take(conn, member, lanes))
        if not taken:  # meanwhile meant for somebody else
            return
        parts = {Assignment(*self._places[one.lane], one.epoch): one for one in taken}
        self._metrics.count("foldbus_partitions_assigned_total", len(parts), group=self._group)
        starts = await self._listener.assigned(list(parts), {part: one.committed for part, one in parts.items()})
        for part, one in parts.items():
            start = starts.get(part, one.committed)
            self._parts[one.lane] = _Part(part, one.first if start is None else start)

    def _fenced(self, why: str) -> Fenced:
        self._metrics.count("foldbus_commits_fenced_total", group=self._group)
        logger.warning("commit fenced: %s", why)
        return Fenced(why)
