"""The commands and the code of docs/operations.md run, in its order, on the stores that a demo left."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from foldbus.archive import seen_by_all
from shop import orders
from tests.docs.blocks import ROOT, write_files
from tests.stories.pairs import eventually

pytestmark = pytest.mark.timeout(300)  # whole programs

PAGE = (ROOT / "docs" / "operations.md").read_text()
_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(section: str) -> str:
    """The shell of one section."""
    _, _, rest = PAGE.partition(f"\n## {section}\n")
    found = _BLOCK.findall(rest.partition("\n## ")[0])
    assert found, f"no commands under {section!r}"
    return "".join(found)


def shell(script: str, cwd: Path, database: str) -> str:
    bin = Path(sys.executable).parent
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FOLDBUS_")}
    environment = kept | {
        "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}",
        "DATABASE": database,
    }
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


async def read_to_the_end(database: str, bus: str) -> None:
    """A worker reads the log to its end: the read models are there again."""
    async with orders.app.connect(store=database, bus=bus, worker=True) as connection:

        async def left() -> int:
            seen = await seen_by_all(connection.store, orders.app, clock=connection.clock)
            return await connection.store.head() - seen

        await eventually(left, lambda found: found == 0)


@pytest.mark.timeout(600)
def test_the_commands_do_what_the_page_says(tmp_path: Path, database: str) -> None:
    shell("foldbus demo --limit 30 --directory .foldbus", tmp_path, database)
    with closing(sqlite3.connect(tmp_path / ".foldbus" / "orders.db")) as store:
        some: Any = store.execute(
            "SELECT id FROM foldbus_streams WHERE category='order' ORDER BY id LIMIT 1"
        ).fetchone()
    shell(blocks("Move to PostgreSQL"), tmp_path, database)
    shell(blocks("Upgrade"), tmp_path, database)
    assert "1" in shell(blocks("Restore a backup"), tmp_path, database)
    asyncio.run(read_to_the_end(database, f"embedded:{tmp_path}/.foldbus"))
    assert "is not parked" in shell(blocks("Parked keys"), tmp_path, database)
    archived = shell(blocks("Archive and truncate").replace("o-1", some[0]), tmp_path, database)
    assert f"archived order/{some[0]}" in archived
    assert f"restored order/{some[0]}" in archived


def test_the_code_does_what_the_page_says(tmp_path: Path) -> None:
    files = write_files("docs/operations.md", tmp_path)
    live = sqlite3.connect(tmp_path / "live.db")
    live.execute("PRAGMA journal_mode=WAL")
    live.execute("CREATE TABLE t AS SELECT 1 AS n")
    subprocess.run([sys.executable, files["backup.py"], "live.db", "copy.db"], cwd=tmp_path, check=True)
    live.close()
    shutil.copy(tmp_path / "copy.db", tmp_path / "again.db")
    again = sqlite3.connect(tmp_path / "again.db")
    assert again.execute("SELECT n FROM t").fetchall() == [(1,)]
    again.close()
    names: dict[str, Any] = {}
    exec(files["include_name.py"].read_text(), names)
    asked = ("foldbus", "foldbus_orders", "public", None, "foldbusiness")
    assert [names["include_name"](name, "schema", {}) for name in asked] == [False, False, True, True, True]
    assert names["include_name"]("foldbus_events", "table", {})
