"""Publishes without end to an embedded bus: `python -m tests.bus.publisher PATH TOPIC NAME`.

Tells on stdout, a line per acknowledged record: partition, offset, value.
"""

from __future__ import annotations

import asyncio
import itertools
import sys

from bus.embedded import EmbeddedTransport
from bus.transport import Ack, Outgoing


async def main(path: str, topic: str, name: str) -> None:
    async with EmbeddedTransport.open(path) as transport:
        for call in itertools.count():
            batch = [Outgoing(topic, f"{name}-{n}".encode(), f"{name}.{call}.{n}".encode()) for n in range(20)]
            answers = await transport.publish(batch)
            for record, answer in zip(batch, answers, strict=True):
                assert isinstance(answer, Ack), answer
                assert record.value is not None
                print(answer.partition, answer.offset, record.value.decode())
            sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
