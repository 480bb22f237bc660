"""Topics, offsets and groups on Kafka. aiokafka returns errors per topic instead of raising them: each is looked at."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, TypeVar

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    IllegalGenerationError,
    InvalidReplicationFactorError,
    KafkaError,
    NotCoordinatorForGroupError,
    RebalanceInProgressError,
    TopicAlreadyExistsError,
    UnknownMemberIdError,
    UnknownTopicOrPartitionError,
    for_code,
)

from bus.envelope import Offset
from bus.errors import BusError, GroupInUse, MissingTopics, TransportUnavailable
from bus.kafka import internals
from bus.transport import PollSettings, TopicSpec, TopicState

log = logging.getLogger("foldbus.bus")

RECORD_OVERHEAD_BYTES = 2048
"""`max.message.bytes` bounds a batch of one record: its header, the record's own lengths and those of its headers."""
SEGMENT_MAX_S = 7 * 86_400.0
SEGMENT_MIN_S = 60.0
SEGMENTS = 4
"""Old messages go a segment at a time, once the youngest in it is old enough: so many of them make up a topic's
retention, lest some stay twice as long (Kafka's own segments last a week)."""
CHECK_S = 300.0
"""How often a broker looks for what is old enough, unless it is told otherwise (`log.retention.check.interval.ms`)."""
_RETRY_S = 0.05
_NO_BROKERS_S = 5.0
"""A cluster whose brokers are just back has none to put a replica on, and says that the replication is wrong. So long
it is asked again; then it is wrong."""
_NO_ERROR = 0
_MOVING = (GroupCoordinatorNotAvailableError, GroupLoadInProgressError, NotCoordinatorForGroupError)
"""The broker makes its offsets topic, or a coordinator moves: ask again."""
_OCCUPIED = (UnknownMemberIdError, IllegalGenerationError, RebalanceInProgressError)
"""What a broker answers to offsets from somebody who is no member of a group that has some."""

T = TypeVar("T")


class KafkaAdmin:
    """A `TopicAdmin`. Every call is bounded by the request timeout and raises TransportUnavailable when it is over."""

    def __init__(self, options: dict[str, Any], settings: PollSettings) -> None:
        self._options, self._timeout_s = options, settings.request_timeout_s
        self._client: Any = None
        self._starting = asyncio.Lock()

    async def start(self) -> None:
        async with self._bounded("reaching the broker"):
            await self._started()

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def describe(self, names: Collection[str]) -> Mapping[str, TopicState]:
        if not names:
            return {}
        async with self._bounded("describing topics"):
            client = await self._started()
            topics = await internals.topics_metadata(client, sorted(names))
            while any(for_code(topic["error_code"]).retriable and _known(topic["error_code"], "") for topic in topics):
                await asyncio.sleep(_RETRY_S)  # being created, or a leader is being elected
                topics = await internals.topics_metadata(client, sorted(names))
            found = {topic["topic"]: topic for topic in topics if _known(topic["error_code"], topic["topic"])}
            configs = await self._configs(client, found) if found else {}
        return {name: _state(name, topic, configs[name]) for name, topic in found.items() if name in configs}

    async def create(self, specs: Sequence[TopicSpec]) -> None:
        if not specs:
            return
        wanted = {spec.name: spec for spec in specs}
        new = [
            # -1: as many replicas as the broker makes by default. The empty assignment is how aiokafka takes that.
            NewTopic(spec.name, spec.partitions, -1, {}, _config(spec))
            for spec in wanted.values()
        ]
        async with self._bounded("creating topics"):
            client = await self._started()
            give_up_at = asyncio.get_running_loop().time() + min(_NO_BROKERS_S, self._timeout_s / 2)
            while new:
                response = await client.create_topics(new)
                again: set[str] = set()
                for name, code, *message in response.topic_errors:
                    error = for_code(code)
                    if code == _NO_ERROR or error is TopicAlreadyExistsError:
                        continue
                    if error is not InvalidReplicationFactorError or asyncio.get_running_loop().time() >= give_up_at:
                        raise _failed(
                            f"topic {name!r} was not created: {error.__name__} {message[0] if message else ''}", error
                        )
                    again.add(name)
                new = [topic for topic in new if topic.name in again]
                if new:
                    await asyncio.sleep(_RETRY_S)
            await self._until_usable(client, wanted)

    async def offsets(self, topic: str) -> Mapping[int, tuple[Offset, Offset]]:
        async with self._reader(topic, "reading the offsets") as (raw, parts):
            first = await raw.beginning_offsets(parts)
            end = await raw.end_offsets(parts)
        return {part.partition: (first[part], end[part]) for part in parts}

    async def offsets_at(self, topic: str, time: datetime) -> Mapping[int, Offset]:
        milliseconds = max(0, int(time.timestamp() * 1000))
        async with self._reader(topic, "reading the offsets by time") as (raw, parts):
            found = await raw.offsets_for_times(dict.fromkeys(parts, milliseconds))
            end = await raw.end_offsets(parts)
        return {part.partition: end[part] if found.get(part) is None else found[part].offset for part in parts}

    async def committed(self, group: str, topics: Sequence[str]) -> Mapping[tuple[str, int], Offset]:
        states = await self.describe(topics)
        parts = [TopicPartition(name, number) for name, state in states.items() for number in range(state.partitions)]
        if not parts:
            return {}
        async with self._bounded(f"reading the offsets of group {group}"):
            client = await self._started()
            found: dict[Any, Any] = await _coordinated(
                lambda: client.list_consumer_group_offsets(group, partitions=parts)
            )
        return {(part.topic, part.partition): at.offset for part, at in found.items() if at.offset >= 0}

    async def members(self, group: str) -> int:
        async with self._bounded(f"looking at group {group}"):
            client = await self._started()
            while True:
                (response,) = await _coordinated(lambda: client.describe_consumer_groups([group]))
                ((code, *facts),) = response.groups
                error = for_code(code)
                if code == _NO_ERROR:
                    return len(facts[4])
                if not issubclass(error, _MOVING):
                    raise _failed(f"group {group} cannot be described: {error.__name__}", error)
                await asyncio.sleep(_RETRY_S)

    async def place(self, group: str, offsets: Mapping[tuple[str, int], Offset]) -> None:
        if not offsets:
            return
        names = sorted({topic for topic, _ in offsets})
        states = await self.describe(names)
        if missing := [name for name in names if name not in states]:
            raise MissingTopics(missing)
        for name, partition in offsets:
            if not 0 <= partition < states[name].partitions:
                raise BusError(
                    f"{name} has {states[name].partitions} partitions, no number {partition}; nothing was set"
                )
        async with self._bounded(f"placing group {group}"):
            client = await self._started()
            while True:
                codes = await _coordinated(lambda: internals.commit_offsets(client, group, offsets))
                errors = [for_code(code) for code in codes if code != _NO_ERROR]
                if not errors:
                    return
                if any(issubclass(error, _OCCUPIED) for error in errors):
                    raise GroupInUse(f"group {group} has members ({errors[0].__name__}); no offset was set")
                for error in errors:
                    if not issubclass(error, _MOVING):
                        raise _failed(f"offsets of group {group} were not set: {error.__name__}", error)
                await asyncio.sleep(_RETRY_S)

    @asynccontextmanager
    async def _reader(self, topic: str, what: str) -> AsyncGenerator[tuple[Any, list[TopicPartition]]]:
        """A client that asks the leaders of a topic's partitions, no more. Raises MissingTopics."""
        state = (await self.describe([topic])).get(topic)
        if state is None:
            raise MissingTopics([topic])
        parts = [TopicPartition(topic, partition) for partition in range(state.partitions)]
        async with self._bounded(f"{what} of {topic}"):
            raw: Any = AIOKafkaConsumer(**self._options, group_id=None, enable_auto_commit=False)
            try:
                await raw.start()
                raw.assign(parts)
                yield raw, parts
            finally:
                await raw.stop()

    async def _configs(self, client: Any, names: Collection[str]) -> dict[str, dict[str, str]]:
        wanted = dict.fromkeys(("retention.ms", "cleanup.policy", "max.message.bytes", "segment.ms"), "")
        resources = [ConfigResource(ConfigResourceType.TOPIC, name, configs=wanted) for name in names]
        found: dict[str, dict[str, str]] = {}
        for response in await client.describe_configs(resources):
            for code, _, _, name, entries in response.resources:
                if _known(code, name):
                    found[name] = {entry[0]: entry[1] for entry in entries}
        return found

    async def _until_usable(self, client: Any, wanted: Collection[str]) -> None:
        """Every partition of every topic has a leader."""
        while True:
            topics = await internals.topics_metadata(client, sorted(wanted))
            if len(topics) == len(wanted) and all(
                topic["error_code"] == _NO_ERROR
                and topic["partitions"]
                and all(part["error_code"] == _NO_ERROR and part["leader"] >= 0 for part in topic["partitions"])
                for topic in topics
            ):
                return
            await asyncio.sleep(_RETRY_S)

    async def _started(self) -> Any:
        if self._client is None:
            async with self._starting:
                if self._client is None:
                    client: Any = AIOKafkaAdminClient(**self._options)
                    await client.start()
                    self._client = client
        return self._client

    @asynccontextmanager
    async def _bounded(self, what: str) -> AsyncGenerator[None]:
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except TimeoutError as error:
            raise TransportUnavailable(f"{what}: no answer from the broker within {self._timeout_s:g} s") from error
        except (KafkaError, OSError) as error:
            raise _failed(f"{what}: {error!r}", type(error)) from error


async def _coordinated(ask: Callable[[], Awaitable[T]]) -> T:
    while True:
        try:
            return await ask()
        except _MOVING:
            await asyncio.sleep(_RETRY_S)


def _failed(what: str, error: type[BaseException]) -> BusError:
    return TransportUnavailable(what) if getattr(error, "retriable", True) else BusError(what)


def _known(code: int, name: str) -> bool:
    """Whether a topic is there. Raises for errors that say something else."""
    error = for_code(code)
    if error is UnknownTopicOrPartitionError:
        return False
    if code != _NO_ERROR and not error.retriable:
        raise error(f"topic {name!r}")
    return True


def _state(name: str, topic: Mapping[str, Any], config: Mapping[str, str]) -> TopicState:
    retention_ms = int(config["retention.ms"])
    policies = config["cleanup.policy"].replace(" ", "").split(",")
    return TopicState(
        name,
        len(topic["partitions"]),
        # A topic that is only compacted has a retention, too, which nobody applies.
        retention_s=None if retention_ms < 0 or "delete" not in policies else retention_ms / 1000,
        compact="compact" in policies,
        max_bytes=max(0, int(config["max.message.bytes"]) - RECORD_OVERHEAD_BYTES),
        lingers_s=int(config["segment.ms"]) / 1000 + CHECK_S,
    )


def _config(spec: TopicSpec) -> dict[str, str]:
    retention_ms = -1 if spec.retention_s is None else round(spec.retention_s * 1000)
    config = {
        "retention.ms": str(retention_ms),
        "cleanup.policy": _policy(spec),
        "max.message.bytes": str(spec.max_bytes + RECORD_OVERHEAD_BYTES),
    }
    if spec.retention_s is not None:
        segment_s = min(SEGMENT_MAX_S, max(SEGMENT_MIN_S, spec.retention_s / SEGMENTS))
        config["segment.ms"] = str(round(segment_s * 1000))
    return config


def _policy(spec: TopicSpec) -> str:
    if not spec.compact:
        return "delete"
    return "compact" if spec.retention_s is None else "compact,delete"
