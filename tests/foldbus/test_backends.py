"""What a store or bus URL means, and what is said of one that may mean two things."""

from __future__ import annotations

from pathlib import Path

import pytest

from foldbus import Service
from foldbus.backends import BadUrl, BusUrl, StoreUrl, without_password
from tests.foldbus.desk import Desk


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (".foldbus", ".foldbus"),
        ("data/shop", "data/shop"),
        ("/var/lib/shop", "/var/lib/shop"),
        ("////var/lib/shop", "/var/lib/shop"),
    ],
)
def test_a_directory_is_written_as_in_the_shell(written: str, meant: str) -> None:
    assert StoreUrl.parse(f"sqlite:{written}").file("shop") == Path(meant) / "shop.db"
    assert BusUrl.parse(f"embedded:{written}").text == meant


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("///tmp/x", r"is /tmp/x to some and tmp/x in the working directory to others; wanted {}:/tmp/x or {}:tmp/x"),
        ("//tmp/x", r"would name a host; wanted a directory: {}:tmp/x in the working directory, or {}:/tmp/x"),
        ("~/x", r"write it out, or \$HOME"),
        ("", r"names no directory; wanted for example {}:\.foldbus"),
    ],
)
def test_a_directory_that_may_be_read_in_two_ways_is_refused_naming_both(written: str, said: str) -> None:
    with pytest.raises(BadUrl, match=said.replace("{}", "sqlite")):
        StoreUrl.parse(f"sqlite:{written}")
    with pytest.raises(BadUrl, match=said.replace("{}", "embedded")):
        BusUrl.parse(f"embedded:{written}")


@pytest.mark.parametrize("url", ["kafka://", "kafka:", "kafka://a:1,", "kafka://a:port", "amqp://a:1", "embedded"])
def test_a_bus_without_a_broker_is_refused(url: str) -> None:
    with pytest.raises(BadUrl, match=r"wanted .*kafka://host:port|names no directory"):
        BusUrl.parse(url)


def test_a_refused_store_url_tells_no_password() -> None:
    for url in ("postgresql://me:se/cret@host/shop", "postgresql:me:secret@host/shop", "postgresql://me:secret@h:x/y"):
        with pytest.raises(BadUrl, match=r"wanted postgresql://user@host/database") as refused:
            StoreUrl.parse(url)
        assert "cret" not in str(refused.value)
    assert without_password("postgresql://me:se/cret@host/shop?password=secret") == "postgresql://me@host/shop"


async def test_a_bad_url_of_either_kind_makes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for store, bus in (("sqlite:///x", "embedded:data"), ("mysql://a/b", "embedded:data"), ("sqlite:data", "amqp:x")):
        with pytest.raises(BadUrl):
            async with Service("empty").connect(store=store, bus=bus):
                raise AssertionError("it connected")
    assert not list(tmp_path.iterdir())


def test_a_command_with_a_bad_url_makes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    desk = Desk("desk", "sqlite:data", "embedded:///data")
    for command in ("lag", "saga list", "topics apply", "run"):
        said = desk.cli(command)
        assert said.code == 2, command
        assert "embedded:/data or embedded:data" in said.err
    assert not list(tmp_path.iterdir())
