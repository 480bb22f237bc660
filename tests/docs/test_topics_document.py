"""The services and the commands of docs/topics.md, run in its order."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

from bus.metrics import MemoryMetrics
from bus.seams import SystemClock
from bus.transport import TopicSpec
from foldbus.backends import open_transport
from tests.docs.blocks import ROOT, write_files

_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


async def make(directory: Path, *specs: TopicSpec) -> None:
    """Somebody else's topics."""
    async with open_transport(f"embedded:{directory}", clock=SystemClock(), metrics=MemoryMetrics()) as transport:
        await transport.admin.create(specs)


def run(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FOLDBUS_")}
    bin = Path(sys.executable).parent
    environment = kept | {"PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}{os.pathsep}{cwd}"}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=cwd, env=environment, capture_output=True, text=True, timeout=50
    )


def test_the_commands_do_what_the_page_says(tmp_path: Path) -> None:
    write_files("docs/topics.md", tmp_path)
    topics, pause, place = _BLOCK.findall((ROOT / "docs" / "topics.md").read_text())
    asyncio.run(make(tmp_path / ".foldbus", TopicSpec("legacy.customers", 3, compact=True)))

    ran = run(topics, tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "crm.events    6           2592000.0" in ran.stdout
    assert "all topics are as declared" in ran.stderr

    ran = run(f"foldbus db upgrade crm:app\n{pause}", tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "crm.handler.greet  paused" in ran.stdout

    ran = run(place, tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "nothing was changed; --yes to do it" in ran.stderr
    assert "placed legacy.customers[0] at 0" in ran.stdout
    assert "retention passed it" in ran.stdout


def test_the_service_that_forgets_can_start_where_its_topics_do(tmp_path: Path) -> None:
    write_files("docs/topics.md", tmp_path)
    assert run("foldbus topics apply short:app && foldbus topics validate short:app", tmp_path).returncode == 0
    asyncio.run(make(tmp_path / "other", TopicSpec("short.commands")))
    ran = run("foldbus topics plan short:app --bus embedded:other", tmp_path)
    assert ran.returncode == 1
    assert "keeps messages for ever" in ran.stdout
