"""FastStream as seen by the benchmark: a process of its own per figure (`run_faststream.py`)."""

from __future__ import annotations

import asyncio
import json
import os

from benchmarks.harness import Setting
from benchmarks.peers.install import BUS
from benchmarks.peers.process import ROOT, PeerFailed


async def faststream_rate(
    setting: Setting, topic: str, group: str, *, total: int, workers: int, dsn: str | None = None, first: bool = False
) -> float:
    """Messages per second. With `dsn` each has its effect in a session of its own; `first` commits the offset before
    the handler is called. Raises PeerFailed."""
    order = {
        "kafka": setting.kafka, "topic": topic, "group": group, "total": total, "workers": workers,
        "dsn": dsn or "postgresql://nowhere", "sql": dsn is not None, "ack": "first" if first else "after",
        "timeout_s": 120,
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        *(str(BUS / "bin" / "python"), "-m", "benchmarks.peers.run_faststream", json.dumps(order)),
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, said = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise PeerFailed(f"FastStream: {said.decode(errors='replace').strip()[-500:]}")
    return float(json.loads(out)["value"])
