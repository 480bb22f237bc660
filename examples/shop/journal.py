"""What a buyer knows, on disk before it is believed: one JSON line per fact, synced.

*intent* before an order is sent, then *ack* (it is in the topic: it will be handled) or *unknown* (it may be). What was
only intended or is unknown counts none or one time, never two; what was acknowledged counts once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from uuid import UUID

What = Literal["intent", "ack", "unknown"]


class Journal:
    """Appends to `path`. A fact is on the disk when `write` returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, what: What, id: UUID, key: str) -> None:
        self._file.write(json.dumps({"what": what, "id": str(id), "key": key}).encode() + b"\n")
        self._file.flush()
        os.fdatasync(self._file.fileno())


def read_journal(path: Path) -> Iterator[tuple[What, UUID, str]]:
    """All facts. A last line that was being written when the buyer died is none."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                fact = json.loads(line)
                yield fact["what"], UUID(fact["id"]), fact["key"]
