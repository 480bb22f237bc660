"""A member of a group, and a tail. Partitions come and go inside `poll`, as the port wants it.

aiokafka rebalances in a task of its own. `_Callbacks` notes what happens there and, for a revocation, waits until
`poll` has let the listener drain and commit; heartbeats go on meanwhile. If nobody polls for as long as a rebalance may
take, the group is not held up any longer, and the listener later hears that the partitions were lost.

Every rebalance takes all partitions and gives them anew (aiokafka's assignors are eager); each is then placed
explicitly, so nothing that was fetched before the placing is ever delivered. The epoch is the group's generation, which
rises with each rebalance, whoever is a member.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from aiokafka import ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError

from bus.envelope import Offset
from bus.errors import BusError, Fenced, TransportUnavailable
from bus.kafka import internals
from bus.kafka.reader import Reader, partitions_of
from bus.metrics import Metrics
from bus.transport import Assignment, Assignments, Delivery

log = logging.getLogger("foldbus.bus")


class KafkaMember:
    """A `Consumer` that belongs to a group. `join` once, `leave` once."""

    def __init__(
        self,
        reader: Reader,
        group: str,
        topics: Sequence[str],
        listener: Assignments,
        *,
        rebalance_timeout_s: float,
        metrics: Metrics,
    ) -> None:
        self._reader, self._group, self._topics, self._listener = reader, group, tuple(topics), listener
        self._rebalance_timeout_s, self._metrics = rebalance_timeout_s, metrics
        self._epoch = self._generation = 0
        self._parts: tuple[Assignment, ...] = ()
        self._lost = False
        self._revocation: asyncio.Future[None] | None = None
        self._given: frozenset[TopicPartition] | None = None
        self._leaving = self._told = False

    def join(self) -> None:
        self._reader.raw.subscribe(list(self._topics), listener=_Callbacks(self))

    async def poll(self, *, max_records: int, timeout_s: float) -> Sequence[Delivery]:
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        while True:
            await self._rebalance()
            left = until - loop.time()
            if self._reader.open:
                records = await self._reader.take(max_records=max_records, timeout_s=left)
                if records:
                    return records
            else:
                self._check()
                await self._reader.wait(left)
            if (loop.time() >= until or self._told) and self._revocation is None:
                self._told = False
                return ()

    def wake(self) -> None:
        self._told = True
        self._reader.wake()

    def pause(self, parts: Collection[Assignment]) -> None:
        self._reader.pause(parts)

    def resume(self, parts: Collection[Assignment]) -> None:
        self._reader.resume(parts)

    async def end_offsets(self) -> Mapping[Assignment, Offset]:
        return await self._reader.end_offsets()

    async def commit(self, offsets: Mapping[Assignment, Offset]) -> None:
        if not offsets:
            return
        gone = offsets.keys() - set(self._parts)
        if gone or self._lost:
            raise self._fenced(gone or offsets.keys())
        epoch = self._epoch
        wanted = dict(zip(partitions_of(list(offsets)), offsets.values(), strict=True))
        try:
            await self._reader.ask(self._commit(wanted), f"committing offsets of group {self._group}")
        except Fenced:
            if epoch == self._epoch:  # of the group as it is: the revocation is on its way, nothing more is delivered
                self._lost = True
                self._reader.open = False
            raise
        except TransportUnavailable:
            self._metrics.count("foldbus_offset_commit_failures_total", group=self._group)
            raise

    async def leave(self) -> None:
        """Revokes, then leaves the group; bounded but for what the listener takes."""
        self._leaving = True
        self._reader.open = False
        try:
            await self._revoke()
        finally:
            await self._reader.close()

    # --- inside poll -------------------------------------------------------------------------------------------------

    async def _rebalance(self) -> None:
        if self._revocation is not None:
            await self._revoke()
        if self._given is not None:
            await self._assign(self._given)

    async def _revoke(self) -> None:
        parts, lost = self._parts, self._lost or internals.membership_lost(self._reader.raw)
        try:
            if parts:
                self._lost = lost
                await self._listener.revoked(parts, lost=lost)
        finally:
            self._parts, self._lost = (), False
            self._reader.held = {}
            waiting, self._revocation = self._revocation, None
            if waiting is not None and not waiting.done():
                waiting.set_result(None)

    async def _assign(self, given: frozenset[TopicPartition]) -> None:
        """Where to start is asked before anything is read. What fails is tried again by the next poll; what is taken
        back meanwhile was never read from."""
        reader = self._reader
        await reader.settle()
        committed = await reader.ask(
            internals.committed_offsets(reader.raw, list(given)), f"reading the offsets of group {self._group}"
        )
        begins = await reader.ask(
            reader.raw.beginning_offsets([tp for tp in given if tp not in committed]), "beginning"
        )
        if given is not self._given:
            return
        self._epoch = max(self._generation, self._epoch + 1)
        parts = tuple(sorted(Assignment(tp.topic, tp.partition, self._epoch) for tp in given))
        stored = {part: committed.get(tp) for part, tp in zip(parts, partitions_of(parts), strict=True)}
        self._parts = parts
        try:
            answer: Mapping[Assignment, Offset] = await self._listener.assigned(parts, stored)
        except BaseException:
            if given is self._given:
                self._parts = ()
            raise
        if given is not self._given or self._revocation is not None:
            return  # taken back while the listener was asked: it is revoked next
        starts: dict[Assignment, Offset] = {}
        for part, tp in zip(parts, partitions_of(parts), strict=True):
            starts[part] = answer[part] if part in answer else committed[tp] if tp in committed else begins[tp]
        try:
            reader.hold(parts, starts)
        except IllegalStateError:
            return
        self._given = None
        self._metrics.count("foldbus_rebalances_total", group=self._group)
        log.debug("group %s: this member now has %s partitions, epoch %s", self._group, len(parts), self._epoch)

    def _check(self) -> None:
        try:
            internals.check_membership(self._reader.raw)
        except KafkaError as error:
            self._metrics.count("foldbus_poll_failures_total", why=type(error).__name__)
            raise TransportUnavailable(f"group {self._group}: {error!r}") from error

    async def _commit(self, wanted: Mapping[TopicPartition, Offset]) -> None:
        try:
            await self._reader.raw.commit(dict(wanted))
        except (CommitFailedError, IllegalStateError) as error:
            raise self._fenced(wanted) from error

    def _fenced(self, parts: Collection[Any]) -> Fenced:
        self._metrics.count("foldbus_fenced_total", what="offset commit")
        named = ", ".join(f"{part.topic}[{part.partition}]" for part in sorted(parts))
        log.warning(
            "group %s: offsets of %s are not committed, they are not this member's any more", self._group, named
        )
        return Fenced(f"group {self._group}: {named} is no longer this member's at that epoch; no offset was committed")

    # --- in aiokafka's task ------------------------------------------------------------------------------------------

    async def on_revoked(self) -> None:
        self._reader.open = False
        self._given = None
        if not self._parts:
            return
        if self._revocation is None:
            self._revocation = asyncio.get_running_loop().create_future()
        self._lost = self._lost or internals.membership_lost(self._reader.raw)
        self._reader.wake()
        drained, _ = await asyncio.wait({self._revocation}, timeout=self._rebalance_timeout_s)
        if not drained:
            self._lost = True
            self._metrics.count("foldbus_rebalance_timeouts_total", group=self._group)
            log.error(
                "group %s: nobody polled for %g s while the group rebalances; its partitions go to others",
                self._group,
                self._rebalance_timeout_s,
            )

    def on_assigned(self, given: frozenset[TopicPartition]) -> None:
        if not self._leaving:
            self._given, self._generation = given, internals.generation(self._reader.raw)
            self._reader.wake()


class _Callbacks(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no types
    def __init__(self, member: KafkaMember) -> None:
        self._member = member

    def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> Any:
        return self._member.on_revoked()  # a coroutine, which aiokafka awaits

    def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        # Not awaited until it is placed: no heartbeat is sent while this callback runs.
        self._member.on_assigned(frozenset(assigned))


class KafkaTail:
    """A `Consumer` of all partitions, without a group."""

    def __init__(self, reader: Reader) -> None:
        self._reader, self._told = reader, False

    async def poll(self, *, max_records: int, timeout_s: float) -> Sequence[Delivery]:
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        while True:
            records = await self._reader.take(max_records=max_records, timeout_s=until - loop.time())
            if records or self._told or loop.time() >= until:
                self._told = False
                return records

    def wake(self) -> None:
        self._told = True
        self._reader.wake()

    def pause(self, parts: Collection[Assignment]) -> None:
        self._reader.pause(parts)

    def resume(self, parts: Collection[Assignment]) -> None:
        self._reader.resume(parts)

    async def end_offsets(self) -> Mapping[Assignment, Offset]:
        return await self._reader.end_offsets()

    async def commit(self, offsets: Mapping[Assignment, Offset]) -> None:
        raise BusError("a tail belongs to no group; its offsets are whoever reads it to keep")
