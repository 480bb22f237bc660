"""A group member as a program: `python -m tests.bus.member KIND ADDRESS SETTINGS GROUP TOPIC`.

Tells on stdout, one JSON object a line, what it is assigned, what it reads, and when a commit is fenced. It commits
what it read after every poll, under the assignment it read it under, also when that is no longer its own.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Mapping, Sequence

from bus.errors import BusError, Fenced
from bus.transport import Assignment, PollSettings
from tests.bus.transports import open_transport

_numbers = itertools.count()


def tell(event: str, **facts: object) -> None:
    print(json.dumps({"event": event, "n": next(_numbers), **facts}), flush=True)


class Listener:
    async def assigned(
        self, parts: Sequence[Assignment], committed: Mapping[Assignment, int | None]
    ) -> Mapping[Assignment, int]:
        tell("assigned", partitions=[part.partition for part in parts], epochs=[part.epoch for part in parts])
        return {}

    async def revoked(self, parts: Sequence[Assignment], *, lost: bool) -> None:
        tell("revoked", partitions=[part.partition for part in parts], lost=lost)


async def main(kind: str, address: str, settings: str, group: str, topic: str) -> None:
    async with (
        open_transport(kind, address, PollSettings(**json.loads(settings))) as transport,
        transport.consume(group, [topic], listener=Listener()) as consumer,
    ):
        read: dict[Assignment, int] = {}
        while True:
            try:
                for record in await consumer.poll(max_records=100, timeout_s=0.05):
                    read[record.assignment] = record.offset + 1
                    tell("record", partition=record.partition, offset=record.offset, epoch=record.assignment.epoch)
            except BusError as error:
                tell("poll failed", error=repr(error))
            try:
                if read:
                    await consumer.commit(read)
                    tell("committed")
            except Fenced:
                tell("fenced")
                read.clear()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
