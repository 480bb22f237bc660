"""Everything that this adapter uses of aiokafka beyond its public interface, in one place.

Each function says what the public interface lacks. `tests/bus/test_kafka.py` fails when a new aiokafka no longer has
what is used here. aiokafka has no types; what it hands out is `Any` and is narrowed by whoever asks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine, Mapping, Sequence
from typing import Any

from aiokafka.protocol.commit import OffsetCommitRequest
from aiokafka.protocol.metadata import MetadataRequest

ABANDON_TIMEOUT_S = 5.0


async def topics_metadata(admin: Any, names: Sequence[str]) -> list[Any]:
    """Metadata of these topics. The public `describe_topics` lets the broker create what it is asked about."""
    response = await admin._send_request(MetadataRequest(list(names), allow_auto_topic_creation=False))
    return list(response.to_object()["topics"])


async def commit_offsets(admin: Any, group: str, offsets: Mapping[tuple[str, int], int]) -> list[int]:
    """Sets a group's offsets as somebody who is no member of it; answers the error codes. The public admin client can
    only read them; a consumer that is no member could commit, and would begin to fetch."""
    topics: dict[str, list[tuple[int, int, str]]] = {}
    for (topic, partition), offset in sorted(offsets.items()):
        topics.setdefault(topic, []).append((partition, offset, ""))
    request = OffsetCommitRequest(
        group, OffsetCommitRequest.DEFAULT_GENERATION_ID, "", OffsetCommitRequest.DEFAULT_RETENTION_TIME,
        list(topics.items()),
    )  # fmt: skip
    response = await admin._send_request(request, await admin.find_coordinator(group))
    return [code for _, partitions in response.topics for _, code in partitions]


def membership_lost(raw: Any) -> bool:
    """Has the group given this member up? There is no `on_partitions_lost` (T7); a fenced member forgets its
    generation before it is told that its partitions are revoked."""
    return generation(raw) < 0


def generation(raw: Any) -> int:
    """The group's generation, which counts its rebalances; negative when this member has none."""
    return int(raw._coordinator.generation)


async def committed_offsets(raw: Any, partitions: Sequence[Any]) -> dict[Any, int]:
    """A group's committed offsets in one request; the public `committed` asks for one partition at a time."""
    found = await raw._coordinator.fetch_committed_offsets(list(partitions))
    return {partition: at.offset for partition, at in found.items() if at.offset >= 0}


def check_membership(raw: Any) -> None:
    """Raises what ended the coordination, which otherwise only a fetch would."""
    raw._coordinator.check_errors()


def failed_partition(raw: Any) -> Any:
    """The partition at which `getmany` failed on damaged records (T10), whose error does not name it. It drains what
    was fetched partition by partition, in order, so it is the first that is left. None when nothing is."""
    return next(iter(raw._fetcher._records), None)


def mend_fetch_count(raw: Any) -> None:
    """An error inside `getmany` leaks its count (T6): idle time would stay at 0 and a dead engine keep its partitions.
    To be called while no fetch is running."""
    raw._subscription._fetch_count = 0


async def abandon_producer(producer: Any) -> None:
    """Ends a producer now, without flushing: `stop()` waits for ever for what a dead broker does not acknowledge (T4),
    and what was given up must not be sent any more."""
    producer._closed = True
    sender = producer._sender.sender_task
    if sender is not None:
        sender.cancel()
    await _bounded(producer.client.close())
    if sender is not None:
        await _bounded(_ended([sender]))
    accumulator = producer._message_accumulator
    batches = [batch for waiting in accumulator._batches.values() for batch in waiting]
    # A batch that goes back to be sent once more is taken off those under way, and again when it ends: an error in the
    # loop for each batch of an outage, unless it is put back before.
    accumulator._pending_batches.update([batch for batch in batches if batch.retry_count > 0])
    batches += accumulator._pending_batches
    accumulator.fail_all(TimeoutError())  # whoever still waits for a flush may go
    for batch in batches:
        for future in (batch.future, batch._drain_waiter):
            if future.done() and not future.cancelled():
                future.exception()  # seen: nobody else may be waiting for it


async def close_connection(connection: Any) -> None:
    """Closes an `AIOKafkaConnection` and waits until its socket is closed. Its own `close` only begins to: over TLS it
    is the other side that ends it. Nothing public tells whether there is anything to wait for."""
    stood = connection._protocol is not None
    ended: asyncio.Future[None] = connection.close()
    if stood:
        await asyncio.wait({ended}, timeout=ABANDON_TIMEOUT_S)


async def abandon_consumer(raw: Any) -> None:
    """Ends a consumer whose `stop()` did not return."""
    coordinator = raw._coordinator
    tasks: list[asyncio.Task[Any]] = []
    for name in ("_coordination_task", "_heartbeat_task", "_commit_refresh_task"):
        task = getattr(coordinator, name, None)
        if task is not None:
            task.cancel()
            tasks.append(task)
    await _bounded(raw._client.close())
    await _bounded(_ended(tasks))
    if raw._fetcher is not None:
        await _bounded(raw._fetcher.close())


async def _ended(tasks: Collection[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


async def _bounded(work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.ensure_future(work)
    await asyncio.wait({task}, timeout=ABANDON_TIMEOUT_S)
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    elif not task.cancelled():
        task.exception()
