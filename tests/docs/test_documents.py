"""What the documents show runs, and does what they say."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, write_files

pytestmark = pytest.mark.timeout(300)  # whole programs


def run(*args: str | Path, cwd: Path) -> str:
    """Runs Python there; answers what it printed. Fails with its standard error."""
    ran = subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=200, env=environment(cwd)
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def environment(cwd: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FOLDBUS_")}
    return kept | {"PYTHONPATH": f"{cwd}:{ROOT}"}


def test_the_readmes_sample_prints_what_the_readme_says(tmp_path: Path) -> None:
    files = write_files("README.md", tmp_path)
    said = (ROOT / "README.md").read_text()
    first = run(files["bank.py"], cwd=tmp_path).splitlines()
    assert first == ["account_id='anna' cents=300 movements=2", "refused: {'wanted': 100000, 'there': 300}"]
    assert all(f"`{line}`" in said for line in first)
    assert run(files["bank.py"], cwd=tmp_path).splitlines()[0] == "account_id='anna' cents=600 movements=4"


def test_the_tutorials_tests_pass(tmp_path: Path) -> None:
    write_files("docs/tutorial.md", tmp_path)
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_reviews.py", "-c", "/dev/null", cwd=tmp_path)


async def test_the_tutorials_service_runs_on_what_the_demo_left(tmp_path: Path) -> None:
    files = write_files("docs/tutorial.md", tmp_path)
    demo = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "foldbus", "demo", "--limit", "60", "--directory", "demo"),
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await demo.communicate()
    assert demo.returncode == 0, said.decode()[-3000:]
    log = tmp_path / "worker.log"
    with log.open("wb") as said_there:
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "foldbus", "run", "reviews:app"),
            *("--store", "sqlite:demo", "--bus", "embedded:demo"),
            cwd=tmp_path,
            env=environment(tmp_path),
            stderr=said_there,
        )
    try:
        async with asyncio.timeout(120):  # the page's program waits for an answer, not for a worker to start
            while b"ready:" not in log.read_bytes():
                assert worker.returncode is None, log.read_text()
                await asyncio.sleep(0.05)
        printed = await asyncio.to_thread(run, files["ask.py"], "demo", cwd=tmp_path)
        assert printed.startswith("customer_id='00042'"), printed
        assert " asked=" in printed
    finally:
        worker.send_signal(signal.SIGTERM)
        assert await worker.wait() == 0


def test_the_page_on_aggregates_does_what_it_says(tmp_path: Path) -> None:
    files = write_files("docs/aggregates.md", tmp_path)
    assert run(files["accounts.py"], cwd=tmp_path).splitlines() == [
        "refused: {'there': 500}",
        "account-berta: expected 0, found 2",
        "3 Account(owner='Anna', cents=0)",
        "Account(owner='Anna', cents=0)",
        "0",
        "1 bank.opened.v1 0",
        "2 bank.moved.v1 500",
        "3 bank.moved.v1 0",
        "last: 3",
    ]
