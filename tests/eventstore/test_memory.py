"""A long log, and an aggregate with a long history, are read in pages: what a process needs does not grow with them."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from tests.eventstore.stores import Backend

FEW, MANY = 20_000, 60_000
LIMIT_MIB = 200
GROWTH_MIB = 30
"""Caches of the drivers and of the database's pages fill up until then; 40,000 events held at once are 60 MiB."""


@pytest.mark.timeout(480)
async def test_reading_a_log_and_rebuilding_an_aggregate_needs_no_more_memory_for_more_events(
    unmigrated: Backend, tmp_path: Path
) -> None:
    """In a process of its own, whose highest resident size tells what it ever held. A million: benchmarks/memory.py."""
    store = f"sqlite:{tmp_path}" if unmigrated.name == "sqlite" else unmigrated.where
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.memory", "--store", store, "--events", str(FEW), str(MANY)),
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await process.communicate()
    assert process.returncode == 0
    few, many = (json.loads(line) for line in said.splitlines())
    assert (few["events"], many["events"]) == (FEW, MANY)
    assert many["aggregate_mib"] < LIMIT_MIB
    assert many["aggregate_mib"] - few["aggregate_mib"] < GROWTH_MIB, (few, many)
