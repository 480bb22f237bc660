"""`foldbus demo`: what it may remove, and where it sells."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from foldbus.backends import without_password
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


def test_a_demo_sells_where_the_environment_says_and_names_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    env = {"FOLDBUS_STORE": "sqlite:s", "FOLDBUS_BUS": "embedded:b"}
    said = demo(env=env)
    assert said.code == 0
    assert "sqlite:s and embedded:b" in " ".join(said.out.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "s"]
    assert demo("--store", "sqlite:t", "--bus", "embedded:c", "--json", env=env).data["store"] == "sqlite:t"
    again = demo(env=env)
    assert again.code == 2
    assert "holds records already" in again.err


def test_a_demo_without_anything_said_has_a_directory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("FOLDBUS_STORE", "FOLDBUS_BUS"):
        monkeypatch.delenv(name, raising=False)
    assert demo().code == 0
    assert (tmp_path / ".foldbus" / "demo" / "orders.db").exists()
    # The tutorial's shell: its services share the demo's directory, and a demo there begins anew all the same.
    env = {"FOLDBUS_STORE": f"sqlite:{tmp_path}/.foldbus/demo", "FOLDBUS_BUS": "embedded:.foldbus/demo"}
    assert demo(env=env).code == 0
    assert demo("--directory", "own", "--json", env=env).data["store"] == f"sqlite:{tmp_path}/own"


def test_what_is_shown_of_a_url_holds_no_password() -> None:
    shown = without_password("postgresql://user:se%40cret@host:5432/shop?password=secret")
    assert shown == "postgresql://user@host:5432/shop"
    assert without_password("kafka://a:1,b:2") == "kafka://a:1,b:2"
    assert without_password("sqlite:/a/b") == "sqlite:/a/b"
