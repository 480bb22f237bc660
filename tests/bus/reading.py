"""Reads a topic to its end in a process of its own: `python -m tests.bus.reading BOOTSTRAP TOPIC SETTINGS`.

Prints what it read, and the most memory that it ever had (VmHWM, kB), as one JSON line.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from bus.kafka import KafkaTransport
from bus.metrics import MemoryMetrics
from bus.transport import PollSettings


async def main(bootstrap: str, topic: str, extra: str) -> None:
    found: list[tuple[int, int, int, str]] = []
    settings = PollSettings(extra=json.loads(extra))
    metrics = MemoryMetrics()
    async with KafkaTransport.open(bootstrap, settings=settings, metrics=metrics) as transport:
        async with transport.tail(topic, start="begin") as consumer:
            left = {part: end for part, end in (await consumer.end_offsets()).items() if end}
            before = most_kb()
            while left:
                for one in await consumer.poll(max_records=1000, timeout_s=0.5):
                    found.append((one.partition, one.offset, len(one.value or b""), one.flaw))
                    if one.offset + 1 >= left.get(one.assignment, 2**62):
                        del left[one.assignment]
    print(json.dumps({"found": found, "before_kb": before, "most_kb": most_kb()}))


def most_kb() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
