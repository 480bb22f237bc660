"""Fixtures that every room shares: the real servers, and a database of one's own.

Both servers are started side by side, once, before the first test, when any selected test asks for them by name;
otherwise when the first one does. One that is missing fails each test that wants it, with what to install.
"""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, settings

from eventstore.postgres import PostgresStore
from tests.servers import Kafka, MissingServer, Postgres, start_kafka, start_postgres
from tests.servers.postgres import new_database

# A machine that stands still for a second says nothing about an example: a test's own timeout is what bounds it.
settings.register_profile("any machine", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


class Servers:
    """The run's own two servers. Each starts once; what kept it from starting is told to everybody who asks."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._started: dict[str, Kafka | Postgres | MissingServer] = {}

    def start(self, names: set[str]) -> None:
        """Start these, side by side; return when each serves or is known to be missing."""
        ways: dict[str, AbstractContextManager[Kafka | Postgres]] = {
            "kafka": start_kafka(),
            "postgres": start_postgres(),
        }
        new = sorted(names - self._started.keys())
        with ThreadPoolExecutor(2) as side_by_side:
            for name, server in zip(new, side_by_side.map(lambda name: _enter(ways[name]), new), strict=True):
                self._started[name] = server
                if not isinstance(server, MissingServer):
                    self._stack.push(ways[name].__exit__)

    def kafka(self) -> Kafka:
        return self._get("kafka")  # type: ignore[return-value]

    def postgres(self) -> Postgres:
        return self._get("postgres")  # type: ignore[return-value]

    def close(self) -> None:
        self._stack.close()
        self._started.clear()

    def _get(self, name: str) -> Kafka | Postgres:
        self.start({name})
        server = self._started[name]
        if isinstance(server, MissingServer):
            pytest.fail(str(server), pytrace=False)
        return server


def _enter(way: AbstractContextManager[Kafka | Postgres]) -> Kafka | Postgres | MissingServer:
    try:
        return way.__enter__()
    except MissingServer as missing:
        return missing


servers = Servers()


def pytest_runtestloop(session: pytest.Session) -> None:
    # Here rather than inside the first test: its timeout is not for a server's start or a first download.
    if not session.config.option.collectonly:
        asked = {name for item in session.items for name in getattr(item, "fixturenames", ())}
        servers.start(asked & {"kafka", "postgres"})


def pytest_sessionfinish() -> None:
    servers.close()


@pytest.fixture(scope="session")
def kafka() -> str:
    """host:port of the run's broker, shared by all tests: make topic and group names unique."""
    return servers.kafka().bootstrap


@pytest.fixture(scope="session")
def postgres() -> str:
    """The superuser's DSN on the run's server, shared by all tests: most want `database`."""
    return servers.postgres().dsn


@pytest.fixture
def database(postgres: str) -> Iterator[str]:
    """The DSN of an empty database of this test's own, dropped after it with whoever is still connected."""
    with new_database(postgres) as dsn:
        yield dsn


@pytest.fixture(scope="session")
def migrated(postgres: str) -> Iterator[str]:
    """The name of a database with the store of service `shop`, to be copied: a copy takes a tenth of the time that the
    migrations take."""
    with new_database(postgres) as dsn:
        with ThreadPoolExecutor() as thread:  # whatever loop this thread may have is left alone
            thread.submit(asyncio.run, PostgresStore.migrate(dsn, service="shop")).result()
        yield urlsplit(dsn).path.strip("/")


@pytest.fixture
def shop_database(postgres: str, migrated: str) -> Iterator[str]:
    """The DSN of a database of this test's own with the empty store of service `shop`."""
    with new_database(postgres, like=migrated) as dsn:
        yield dsn


@pytest.fixture
def fresh_kafka() -> Iterator[Kafka]:
    """A broker of this test's own, to be killed, frozen and restarted; its verbs block, so `asyncio.to_thread`."""
    with start_kafka(own=True) as server:
        yield server


@pytest.fixture
def fresh_postgres() -> Iterator[Postgres]:
    """A server of this test's own, to be killed, frozen and restarted; its verbs block, so `asyncio.to_thread`."""
    with start_postgres(own=True) as server:
        yield server
