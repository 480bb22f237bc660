"""Progress of long work: a rich bar on a terminal, one JSON line a second otherwise. Always on standard error, so that
what a command prints can be piped."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """One task at a time: `task`, then `at` as often as you like; drawing is throttled. `note` prints a line."""

    def __init__(self, *, stream: TextIO | None = None, interactive: bool | None = None) -> None:
        self._stream = stream or sys.stderr
        self._interactive = self._stream.isatty() if interactive is None else interactive
        self._console = Console(file=self._stream)
        self._bar: RichProgress | None = None
        self._title, self._total, self._done = "", 0, 0
        self._started = self._last = 0.0
        self._extra: dict[str, float | int | str] = {}

    @contextmanager
    def task(self, title: str, total: int) -> Generator[Progress]:
        """Shows `title` with `total` steps while the context lasts."""
        self._title, self._total, self._done, self._extra = title, total, 0, {}
        self._started, self._last = time.monotonic(), 0.0
        if self._interactive:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[extra]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                refresh_per_second=5,
            )
            with self._bar:
                self._bar.add_task(title, total=total, extra="")
                yield self
                self._draw()
            self._bar = None
        else:
            yield self
            self._draw()

    def at(self, done: int, *, total: int | None = None, **extra: float | int | str) -> None:
        """`done` of the total so far."""
        self._done, self._extra = done, extra
        if total is not None:
            self._total = total
        now = time.monotonic()
        if now - self._last >= (0.2 if self._interactive else 1.0):
            self._last = now
            self._draw()

    def note(self, text: str) -> None:
        """A line for people, between the others."""
        if self._interactive:
            self._console.print(text, highlight=False, markup=False)
        else:
            print(json.dumps({"note": text}), file=self._stream, flush=True)

    def _draw(self) -> None:
        seconds = time.monotonic() - self._started
        rate = self._done / seconds if seconds > 0 else 0.0
        if self._bar is not None:
            shown = "  ".join(f"{name} {value}" for name, value in self._extra.items())
            self._bar.update(self._bar.task_ids[0], completed=self._done, total=self._total, extra=shown)
            return
        left = round((self._total - self._done) / rate, 1) if rate else None
        line = {
            "task": self._title,
            "done": self._done,
            "total": self._total,
            "per_second": round(rate, 1),
            "seconds": round(seconds, 1),
            "eta_s": left,
            **self._extra,
        }
        print(json.dumps(line), file=self._stream, flush=True)
