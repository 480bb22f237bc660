"""From a URL to a store or a transport: the only place that knows which adapters there are. An adapter is imported when
it is opened: a process does not pay for the drivers of the others.

| URL | is |
| --- | --- |
| `sqlite:DIR` | one SQLite file per service in that directory |
| `postgresql://user@host/database` | one schema per service in that database |
| `embedded:DIR` | topics in one SQLite file in that directory, one machine |
| `kafka://host:port,host:port` | a Kafka cluster |
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bus.errors import FoldbusError
from bus.metrics import Metrics
from bus.seams import Clock, Ids
from bus.transport import PollSettings, Transport
from eventstore.port import Store

DEFAULT_STORE = "sqlite:.foldbus"
DEFAULT_BUS = "embedded:.foldbus"


class BadUrl(FoldbusError):
    """A store or bus URL that names no backend."""


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """A parsed store URL; `text` may hold a password and is never logged."""

    scheme: str
    text: str

    @classmethod
    def parse(cls, url: str) -> StoreUrl:
        scheme = url.partition(":")[0]
        if scheme == "sqlite":
            return cls("sqlite", str(directory_of(url)))
        if scheme in ("postgresql", "postgres", "postgresql+asyncpg"):
            return cls("postgresql", "postgresql:" + url.partition(":")[2])
        raise BadUrl(f"store URL starts with {scheme!r}; wanted sqlite:DIRECTORY or postgresql://user@host/database")

    @property
    def embedded(self) -> bool:
        return self.scheme == "sqlite"

    def file(self, service: str) -> Path:
        return Path(self.text) / f"{service}.db"


def is_embedded_bus(url: str) -> bool:
    """Does this bus live in a file of this machine?"""
    return url.partition(":")[0] == "embedded"


async def migrate_store(url: str, service: str) -> None:
    """Creates or upgrades one service's store; a second call, or two at once, do no harm."""
    parsed = StoreUrl.parse(url)
    if parsed.embedded:
        parsed.file(service).parent.mkdir(parents=True, exist_ok=True)
        from eventstore.sqlite import SqliteStore

        await SqliteStore.migrate(parsed.file(service), service=service)
    else:
        from eventstore.postgres import PostgresStore

        await PostgresStore.migrate(parsed.text, service=service)


async def raise_epoch(url: str, service: str) -> int:
    """Once after one service's store came back from a backup: its log begins a new epoch. Answers it."""
    parsed = StoreUrl.parse(url)
    if parsed.embedded:
        from eventstore.sqlite import SqliteStore

        return await SqliteStore.restored(parsed.file(service), service=service)
    from eventstore.postgres import PostgresStore

    return await PostgresStore.raise_epoch(parsed.text, service=service)


@asynccontextmanager
async def open_store(
    url: str, service: str, *, clock: Clock, ids: Ids, metrics: Metrics, migrate: bool | None = None
) -> AsyncGenerator[Store]:
    """`migrate` None: an embedded store is upgraded as it is opened, a PostgreSQL one refuses an old schema."""
    parsed = StoreUrl.parse(url)
    if migrate or (migrate is None and parsed.embedded):
        await migrate_store(url, service)
    if parsed.embedded:
        from eventstore.sqlite import SqliteStore

        async with SqliteStore.open(parsed.file(service), service=service, clock=clock, metrics=metrics) as store:
            yield store
    else:
        from eventstore.postgres import PostgresStore

        async with PostgresStore.open(parsed.text, service=service, clock=clock, metrics=metrics) as store:
            yield store


@asynccontextmanager
async def open_transport(
    url: str, *, clock: Clock, metrics: Metrics, settings: PollSettings | None = None, client_id: str = "foldbus"
) -> AsyncGenerator[Transport]:
    """Opens the transport that `url` names; `settings` None takes what fits it."""
    scheme, _, rest = url.partition(":")
    if scheme == "embedded":
        from bus.embedded import EmbeddedTransport

        directory = directory_of(url)
        directory.mkdir(parents=True, exist_ok=True)
        timings = settings or PollSettings(session_timeout_s=3.0, heartbeat_s=0.5, rebalance_timeout_s=20.0)
        async with EmbeddedTransport.open(
            directory / "bus.db", settings=timings, clock=clock, metrics=metrics
        ) as transport:
            yield transport
    elif scheme == "kafka":
        from bus.kafka import KafkaTransport

        bootstrap = rest.removeprefix("//").rstrip("/")
        async with KafkaTransport.open(
            bootstrap, settings=settings or PollSettings(), client_id=client_id, clock=clock, metrics=metrics
        ) as kafka:
            yield kafka
    else:
        raise BadUrl(f"bus URL starts with {scheme!r}; wanted embedded:DIRECTORY or kafka://host:port")


def without_password(url: str) -> str:
    """A store or bus URL as it may be shown."""
    scheme, _, rest = url.partition(":")
    if scheme in ("sqlite", "embedded") or not rest.startswith("//"):
        return url
    where = urlsplit(url)
    user, at, hosts = where.netloc.rpartition("@")
    return f"{scheme}://{user.partition(':')[0]}{at}{hosts}{where.path}"


def directory_of(url: str) -> Path:
    """`sqlite:DIR`, `sqlite:///relative/DIR` and `sqlite:////absolute/DIR` alike."""
    rest = url.partition(":")[2]
    if rest.startswith("///"):
        rest = rest[3:]
    elif rest.startswith("//"):
        raise BadUrl(f"{url!r} names a host; wanted a directory, as in sqlite:.foldbus")
    if not rest:
        raise BadUrl(f"{url!r} names no directory; wanted for example sqlite:.foldbus")
    return Path(rest)
