"""From a URL to a store or a transport: the only place that knows which adapters there are. An adapter is imported when
it is opened: a process does not pay for the drivers of the others.

| URL | is |
| --- | --- |
| `sqlite:DIR` | one SQLite file per service in that directory |
| `postgresql://user@host/database` | one schema per service in that database |
| `embedded:DIR` | topics in one SQLite file in that directory, one machine |
| `kafka://host:port,host:port` | a Kafka cluster |
| `kafka://user:password@host:port?ssl_cafile=ca.pem` | the same by TLS and SCRAM; all names in `bus/kafka/options.py` |

`DIR` is a path as the shell writes it: `sqlite:/var/lib/shop` or `sqlite:data`. `sqlite:///DIR` is refused, because
some tools read it as `/DIR` and others as `DIR`; `sqlite:////DIR` is `/DIR` to all of them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from bus.errors import FoldbusError
from bus.metrics import Metrics
from bus.seams import Clock, Ids
from bus.transport import PollSettings, Transport
from eventstore.port import Store
from foldbus.plaintext import of_bus, of_store, refuse, say
from foldbus.unreachable import naming_bus, naming_store

DEFAULT_STORE = "sqlite:.foldbus"
DEFAULT_BUS = "embedded:.foldbus"


_POSTGRESQL = "postgresql://user@host/database"
_KAFKA = "kafka://host:port"


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
            rest = url.partition(":")[2]
            if not rest.startswith("//"):
                raise BadUrl(f"store URL {without_password(url)!r} has no // after {scheme}:; wanted {_POSTGRESQL}")
            _check_host("store", f"postgresql:{rest}", wanted=_POSTGRESQL)
            return cls("postgresql", f"postgresql:{rest}")
        raise BadUrl(f"store URL starts with {scheme!r}; wanted sqlite:DIRECTORY or {_POSTGRESQL}")

    @property
    def embedded(self) -> bool:
        return self.scheme == "sqlite"

    def file(self, service: str) -> Path:
        return Path(self.text) / f"{service}.db"


@dataclass(frozen=True, slots=True)
class BusUrl:
    """A parsed bus URL: the directory of an embedded one, the brokers of Kafka and how they are reached (which may hold
    a password and is never logged)."""

    scheme: str
    text: str
    extra: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)

    @classmethod
    def parse(cls, url: str) -> BusUrl:
        scheme, _, rest = url.partition(":")
        if scheme == "embedded":
            return cls("embedded", str(directory_of(url)))
        if scheme == "kafka":
            where, _, query = rest.removeprefix("//").partition("?")
            login, _, brokers = where.rstrip("/").rpartition("@")
            for broker in brokers.split(","):
                _check_host("bus", f"kafka://{broker}", wanted=_KAFKA)
            return cls("kafka", brokers, _extra(query, login))
        raise BadUrl(f"bus URL starts with {scheme!r}; wanted embedded:DIRECTORY or {_KAFKA}")

    @property
    def embedded(self) -> bool:
        """Does it live in a file of this machine?"""
        return self.scheme == "embedded"

    @property
    def shown(self) -> str:
        """As it may be said to anybody: without a password, and not as seen from somebody's working directory."""
        return f"embedded:{self.directory.absolute()}" if self.embedded else f"kafka://{self.text}"

    @property
    def directory(self) -> Path:
        """Of an embedded one."""
        return Path(self.text)


def refuse_plaintext(store: StoreUrl, bus: BusUrl, extra: Mapping[str, str]) -> None:
    """Raises PlaintextLink when one of the two links may be read on its way. `extra`: as of `PollSettings`."""
    refuse(
        (
            None if store.embedded else of_store(store.text),
            None if bus.embedded else of_bus(bus.text, {**extra, **bus.extra}),
        )
    )


async def migrate_store(url: str, service: str) -> None:
    """Creates or upgrades one service's store; a second call, or two at once, do no harm."""
    parsed = StoreUrl.parse(url)
    if parsed.embedded:
        parsed.file(service).parent.mkdir(parents=True, exist_ok=True)
        from eventstore.sqlite import SqliteStore

        await SqliteStore.migrate(parsed.file(service), service=service)
    else:
        from eventstore.postgres import PostgresStore

        with naming_store(parsed.text, without_password(url)):
            await PostgresStore.migrate(parsed.text, service=service)


async def raise_epoch(url: str, service: str) -> int:
    """Once after one service's store came back from a backup: its log begins a new epoch. Answers it."""
    parsed = StoreUrl.parse(url)
    if parsed.embedded:
        from eventstore.sqlite import SqliteStore

        return await SqliteStore.restored(parsed.file(service), service=service)
    from eventstore.postgres import PostgresStore

    with naming_store(parsed.text, without_password(url)):
        return await PostgresStore.raise_epoch(parsed.text, service=service)


@asynccontextmanager
async def open_store(
    url: str, service: str, *, clock: Clock, ids: Ids, metrics: Metrics, migrate: bool | None = None
) -> AsyncGenerator[Store]:
    """`migrate` None: an embedded store is upgraded as it is opened, a PostgreSQL one refuses an old schema."""
    parsed = StoreUrl.parse(url)
    if not parsed.embedded:
        say(of_store(parsed.text), metrics)
    if migrate or (migrate is None and parsed.embedded):
        await migrate_store(url, service)
    if parsed.embedded:
        from eventstore.sqlite import SqliteStore

        async with SqliteStore.open(parsed.file(service), service=service, clock=clock, metrics=metrics) as store:
            yield store
    else:
        from eventstore.postgres import PostgresStore

        async with AsyncExitStack() as stack:
            with naming_store(parsed.text, without_password(url)):
                opened = await stack.enter_async_context(
                    PostgresStore.open(parsed.text, service=service, clock=clock, metrics=metrics)
                )
            yield opened


@asynccontextmanager
async def open_transport(
    url: str, *, clock: Clock, metrics: Metrics, settings: PollSettings | None = None, client_id: str = "foldbus"
) -> AsyncGenerator[Transport]:
    """Opens the transport that `url` names; `settings` None takes what fits it. What the URL says of the link goes
    before `settings.extra`."""
    parsed = BusUrl.parse(url)
    if parsed.embedded:
        from bus.embedded import EmbeddedTransport

        directory = parsed.directory
        directory.mkdir(parents=True, exist_ok=True)
        timings = settings or PollSettings(session_timeout_s=3.0, heartbeat_s=0.5, rebalance_timeout_s=20.0)
        async with EmbeddedTransport.open(
            directory / "bus.db", settings=timings, clock=clock, metrics=metrics
        ) as transport:
            yield transport
    else:
        from bus.kafka import KafkaTransport

        settings = settings or PollSettings()
        settings = replace(settings, extra={**settings.extra, **parsed.extra})
        say(of_bus(parsed.text, settings.extra), metrics)
        async with AsyncExitStack() as stack:
            with naming_bus(without_password(url)):
                kafka = await stack.enter_async_context(
                    KafkaTransport.open(
                        parsed.text,
                        settings=settings,
                        client_id=client_id,
                        clock=clock,
                        metrics=metrics,
                    )
                )
            yield kafka


def without_password(url: str) -> str:
    """A store or bus URL as it may be shown, also one that cannot be parsed: of user and password, only the user."""
    scheme, _, rest = url.partition(":")
    if scheme in ("sqlite", "embedded"):
        return url
    slashes = "//" if rest.startswith("//") else ""
    where = rest.removeprefix("//").partition("?")[0]
    user, at, hosts = where.rpartition("@")
    return f"{scheme}:{slashes}{user.partition(':')[0]}{at}{hosts}"


def directory_of(url: str) -> Path:
    """Where `sqlite:DIR` or `embedded:DIR` is. Raises BadUrl for what may be meant otherwise than it would be read:
    files in the wrong place are noticed late."""
    scheme, _, rest = url.partition(":")
    if rest.startswith("////"):
        rest = "/" + rest.lstrip("/")
    elif rest.startswith("///"):
        path = rest.lstrip("/")
        raise BadUrl(
            f"{url!r} is /{path} to some and {path} in the working directory to others; "
            f"wanted {scheme}:/{path} or {scheme}:{path}"
        )
    elif rest.startswith("//"):
        path = rest.lstrip("/")
        raise BadUrl(
            f"{url!r} would name a host; wanted a directory: {scheme}:{path or '.foldbus'} in the working directory, "
            f"or {scheme}:/{path}"
        )
    elif rest.startswith("~"):
        raise BadUrl(f"{url!r}: nothing puts your home directory in for ~ here; write it out, or $HOME")
    if not rest:
        raise BadUrl(f"{url!r} names no directory; wanted for example {scheme}:.foldbus")
    return Path(rest)


def _extra(query: str, login: str) -> dict[str, str]:
    """Of a Kafka URL; the names themselves are checked where they are used."""
    try:
        found = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        raise BadUrl(f"bus URL has something behind its ? that is no name=value&name=value; wanted {_KAFKA}") from None
    user, colon, password = login.partition(":")
    if user:
        found["sasl_plain_username"] = unquote(user)
    if colon:
        found["sasl_plain_password"] = unquote(password)
    return found


def _check_host(what: str, url: str, *, wanted: str) -> None:
    """Raises BadUrl where no host, or no port, can be read. What urllib says of it may hold the password."""
    try:
        where = urlsplit(url)
        host, _ = where.hostname, where.port
    except ValueError:
        raise BadUrl(
            f"{what} URL {without_password(url)!r} has no readable host and port; wanted {wanted}, "
            "in user and password %40 for @, %2F for / and so on"
        ) from None
    if not host and what == "bus":
        raise BadUrl(f"{what} URL {without_password(url)!r} names no host; wanted {wanted}")
