"""The rooms and the doors between them: each imports alone, and imports point one way."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# room: the rooms that it may bring along
ROOMS = {
    "bus": {"bus"},
    "eventstore": {"bus", "eventstore"},
    "sagas": {"bus", "eventstore", "sagas"},
    "projections": {"bus", "eventstore", "projections"},
    "foldbus": {"bus", "eventstore", "sagas", "projections", "foldbus"},
}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_alone(room: str) -> None:
    """Goal: nothing that a room needs comes from a room it must not know, however late it is imported.

    Method: a fresh interpreter imports the room and every module in it, then says which rooms it holds.
    """
    program = f"""
import importlib, pkgutil, sys, {room}
for module in pkgutil.walk_packages({room}.__path__, "{room}."):
    if not module.name.endswith("__main__") and "._examples" not in module.name:
        importlib.import_module(module.name)
print(*sorted({set(ROOMS)!r} & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= ROOMS[room]


def test_imports_between_rooms_point_one_way() -> None:
    """import-linter's contracts, which stand in pyproject.toml."""
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--cache-dir", ".cache/import-linter"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
