"""The services and the commands of docs/topics.md, run in its order."""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bus.metrics import MemoryMetrics
from bus.seams import SystemClock
from bus.transport import TopicSpec
from foldbus.backends import open_transport
from tests.docs.blocks import ROOT, write_files
from tests.foldbus.desk import Cli, cli

_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's files, in the working directory."""
    files = write_files("docs/topics.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in files:
        sys.modules.pop(name.removesuffix(".py"), None)


async def make(directory: Path, *specs: TopicSpec) -> None:
    """Somebody else's topics."""
    async with open_transport(f"embedded:{directory}", clock=SystemClock(), metrics=MemoryMetrics()) as transport:
        await transport.admin.create(specs)


def run(block: str) -> list[Cli]:
    """Line by line; in this process, since starting one takes longer than all that they do."""
    said = [cli(*shlex.split(line)[1:]) for line in block.splitlines()]
    assert [one.err for one in said if one.code] == []
    return said


def test_the_commands_do_what_the_page_says(here: Path) -> None:
    topics, pause, place = _BLOCK.findall((ROOT / "docs" / "topics.md").read_text())
    asyncio.run(make(here / ".foldbus", TopicSpec("legacy.customers", 3, compact=True)))

    planned, _, validated = run(topics)
    assert re.search(r"^crm\.events +6 +2592000\.0 ", planned.out, re.MULTILINE)
    assert "all topics are as declared" in validated.err

    run("foldbus db upgrade crm:app\n" + pause)
    _, told, done, _, log = run(place)
    assert "nothing was changed; --yes to do it" in told.err
    assert done.err == ""
    assert "placed legacy.customers[0] at 0" in log.out
    assert "retention passed it" in log.out
    assert "the mail server moves" in log.out


def test_the_service_that_forgets_can_start_where_its_topics_do(here: Path) -> None:
    run("foldbus topics apply short:app\nfoldbus topics validate short:app")
    asyncio.run(make(here / "other", TopicSpec("short.commands")))
    refused = cli("topics", "plan", "short:app", "--bus", "embedded:other")
    assert refused.code == 1
    assert "keeps messages for ever" in refused.out
