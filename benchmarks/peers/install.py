"""python -m benchmarks.peers.install: the peers, each into an environment of its own below `.cache/peers`.

Does nothing for what is installed in the wanted versions. What cannot be installed is said, with what was tried, and
leaves a note that the benchmark prints in that peer's rows; the exit code is 0 all the same: others can be measured.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "peers"
PYTHON = CACHE / "python"
NODE = CACHE / "node"
REFERENCE = CACHE / "reference"
BUS = CACHE / "bus"

_WANTED = (3, 13)
"""What eventsourcing 9.5 and eventsource-py ask for."""


class CannotInstall(Exception):
    """Says what was tried."""


def main() -> int:
    for directory, wanted, make in (
        (REFERENCE, (HERE / "requirements-reference.txt",), _make_reference),
        (BUS, (HERE / "requirements-bus.txt",), _make_bus),
        (PYTHON, (HERE / "requirements.txt",), _make_python),
        (NODE, (HERE / "package.json", HERE / "emmett.mjs"), _make_node),
    ):
        stamp, note = directory / "installed", directory.with_suffix(".missing")
        content = hashlib.sha256(b"".join(path.read_bytes() for path in wanted)).hexdigest()
        if stamp.is_file() and stamp.read_text() == content:
            continue
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        print(f"Installing {', '.join(path.name for path in wanted)} into {directory.name}", flush=True)
        try:
            make(directory)
        except CannotInstall as error:
            shutil.rmtree(directory, ignore_errors=True)
            note.write_text(str(error))
            print(f"Not installed: {error}", file=sys.stderr)
            continue
        stamp.write_text(content)  # last: an install that broke off is done again
        note.unlink(missing_ok=True)
    return 0


def missing(directory: Path) -> str | None:
    """Why the peers of an environment cannot run; None when they can."""
    if (directory / "installed").is_file():
        return None
    note = directory.with_suffix(".missing")
    return note.read_text() if note.is_file() else "run `make bench-peers`"


def _make_reference(directory: Path) -> None:
    _run(
        sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check",
        "--target", str(directory), "-r", str(HERE / "requirements-reference.txt"),
    )  # fmt: skip


def _make_bus(directory: Path) -> None:
    """Any Python that runs us will do."""
    _run(sys.executable, "-m", "venv", str(directory))
    _run(
        str(directory / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check",
        "-r", str(HERE / "requirements-bus.txt"),
    )  # fmt: skip


def _make_python(directory: Path) -> None:
    tried: list[str] = []
    for candidate in _pythons():
        found = subprocess.run(
            [candidate, "-c", "import sys, venv, ensurepip; print(*sys.version_info[:2])"],
            check=False,
            capture_output=True,
            text=True,
        )
        version = tuple(int(part) for part in found.stdout.split()) if found.returncode == 0 else ()
        tried.append(f"{candidate} ({'.'.join(map(str, version)) or 'does not run'})")
        if version >= _WANTED:
            _run(candidate, "-m", "venv", str(directory))
            _run(
                str(directory / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check",
                "-r", str(HERE / "requirements.txt"),
            )  # fmt: skip
            return
    raise CannotInstall(f"no Python {_WANTED[0]}.{_WANTED[1]} or newer with venv; tried {', '.join(tried)}")


def _pythons() -> Iterator[str]:
    yield sys.executable
    for name in ("python3.13", "python3.14", "python3"):
        if path := shutil.which(name):
            yield path
    # Version managers keep several, and put a launcher into PATH that refuses all but the chosen one.
    if pyenv := shutil.which("pyenv"):
        root = subprocess.run([pyenv, "root"], check=False, capture_output=True, text=True).stdout.strip()
        yield from sorted(str(path) for path in Path(root, "versions").glob("3.1[3-9]*/bin/python"))
    if uv := shutil.which("uv"):
        found = subprocess.run([uv, "python", "find", ">=3.13"], check=False, capture_output=True, text=True)
        if found.returncode == 0:
            yield found.stdout.strip()


def _make_node(directory: Path) -> None:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise CannotInstall(
            "neither node nor npm is in PATH" if not node and not npm else "node and npm are not both in PATH"
        )
    shutil.copy(HERE / "package.json", directory)
    shutil.copy(HERE / "emmett.mjs", directory)  # beside its modules: where Node looks for them
    _run(npm, "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error", at=directory)


def _run(*command: str, at: Path | None = None) -> None:
    done = subprocess.run(command, check=False, cwd=at, capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise CannotInstall(
            f"`{Path(command[0]).name} {' '.join(command[1:4])} …` failed: {' / '.join(said[-2:])[:300]}"
        )


if __name__ == "__main__":
    sys.exit(main())
