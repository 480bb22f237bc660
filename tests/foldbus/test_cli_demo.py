"""`foldbus demo`: what it may remove, and where it sells."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.foldbus.desk import Cli, cli


@pytest.fixture(autouse=True)
def quiet_logging() -> Iterator[None]:
    """The command configures the root logger; a test's end takes that back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def demo(*args: str, env: dict[str, str] | None = None) -> Cli:
    return cli("demo", "--limit", "3", *args, env=env)


def test_a_second_demo_removes_what_the_first_made_and_nothing_else(tmp_path: Path) -> None:
    assert demo("--directory", str(tmp_path)).code == 0
    (tmp_path / "notes.txt").write_text("mine")
    assert demo("--directory", str(tmp_path)).code == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_demo_leaves_the_database_of_another_service_alone_and_names_it(tmp_path: Path) -> None:
    assert demo("--directory", str(tmp_path)).code == 0
    (tmp_path / "loyalty.db").write_text("mine")
    before = sorted(path.name for path in tmp_path.iterdir())
    said = demo("--directory", str(tmp_path))
    assert said.code == 2
    assert "loyalty.db" in said.err
    assert "--directory" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "loyalty.db").read_text() == "mine"


def test_a_demo_refuses_a_directory_that_no_demo_made(tmp_path: Path) -> None:
    (tmp_path / "orders.db").write_text("mine")
    said = demo("--directory", str(tmp_path))
    assert said.code == 2
    assert "no demo made" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["orders.db"]
