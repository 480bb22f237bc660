"""Topics, offsets and groups on Kafka. aiokafka returns errors per topic instead of raising them: each is looked at."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    KafkaError,
    NotCoordinatorForGroupError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
    for_code,
)

from bus.envelope import Offset
from bus.errors import BusError, MissingTopics, TransportUnavailable
from bus.kafka import internals
from bus.transport import PollSettings, TopicSpec, TopicState

log = logging.getLogger("foldbus.bus")

RECORD_OVERHEAD_BYTES = 2048
"""`max.message.bytes` bounds a batch of one record: its header, the record's own lengths and those of its headers."""
_RETRY_S = 0.05
_NO_ERROR = 0


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
            response = await client.create_topics(new)
            for name, code, *message in response.topic_errors:
                error = for_code(code)
                if code != _NO_ERROR and error is not TopicAlreadyExistsError:
                    raise _failed(
                        f"topic {name!r} was not created: {error.__name__} {message[0] if message else ''}", error
                    )
            await self._until_usable(client, wanted)

    async def offsets(self, topic: str) -> Mapping[int, tuple[Offset, Offset]]:
        state = (await self.describe([topic])).get(topic)
        if state is None:
            raise MissingTopics([topic])
        parts = [TopicPartition(topic, partition) for partition in range(state.partitions)]
        async with self._bounded(f"reading the offsets of {topic}"):
            # Without a topic and a group this is a client that asks the partitions' leaders, no more.
            raw: Any = AIOKafkaConsumer(**self._options, group_id=None, enable_auto_commit=False)
            try:
                await raw.start()
                raw.assign(parts)
                first = await raw.beginning_offsets(parts)
                end = await raw.end_offsets(parts)
            finally:
                await raw.stop()
        return {part.partition: (first[part], end[part]) for part in parts}

    async def committed(self, group: str, topics: Sequence[str]) -> Mapping[tuple[str, int], Offset]:
        states = await self.describe(topics)
        parts = [TopicPartition(name, number) for name, state in states.items() for number in range(state.partitions)]
        if not parts:
            return {}
        async with self._bounded(f"reading the offsets of group {group}"):
            client = await self._started()
            found: dict[Any, Any] | None = None
            while found is None:
                try:
                    found = await client.list_consumer_group_offsets(group, partitions=parts)
                except (GroupCoordinatorNotAvailableError, GroupLoadInProgressError, NotCoordinatorForGroupError):
                    await asyncio.sleep(_RETRY_S)  # the broker makes its offsets topic, or a coordinator moves
        return {(part.topic, part.partition): at.offset for part, at in found.items() if at.offset >= 0}

    async def _configs(self, client: Any, names: Collection[str]) -> dict[str, dict[str, str]]:
        wanted = {"retention.ms": "", "cleanup.policy": "", "max.message.bytes": ""}
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
    return TopicState(
        name,
        len(topic["partitions"]),
        retention_s=None if retention_ms < 0 else retention_ms / 1000,
        compact="compact" in config["cleanup.policy"],
        max_bytes=max(0, int(config["max.message.bytes"]) - RECORD_OVERHEAD_BYTES),
    )


def _config(spec: TopicSpec) -> dict[str, str]:
    retention_ms = -1 if spec.retention_s is None else round(spec.retention_s * 1000)
    return {
        "retention.ms": str(retention_ms),
        "cleanup.policy": _policy(spec),
        "max.message.bytes": str(spec.max_bytes + RECORD_OVERHEAD_BYTES),
    }


def _policy(spec: TopicSpec) -> str:
    if not spec.compact:
        return "delete"
    return "compact" if spec.retention_s is None else "compact,delete"
