"""What commands log to standard error, and what of it other libraries say."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

DRIVERS = "aiokafka"
"""Its own errors come by the hundred a second while a broker is away."""


def keep_libraries_quiet() -> None:
    """For every command: what went wrong is said by the command itself."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger(DRIVERS).setLevel(logging.CRITICAL)


def log_to_stderr(*, quiet: bool = False) -> None:
    """Warnings and worse when quiet, else everything from INFO; one JSON line each when nobody watches."""
    keep_libraries_quiet()
    handler = logging.StreamHandler(sys.stderr)
    if not sys.stderr.isatty():
        handler.setFormatter(_JsonLines())
    handler.addFilter(Thinned(DRIVERS))
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, handlers=[handler])


def hear_drivers() -> None:
    """Once all is connected, the broker's client is heard when something is wrong, in one line per ten seconds."""
    logging.getLogger(DRIVERS).setLevel(logging.WARNING)


class Thinned(logging.Filter):
    """Of the loggers below `family` one line per `every_s` passes; it tells how many did not since the one before."""

    def __init__(self, family: str, *, every_s: float = 10.0, monotonic: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._family, self._every_s, self._monotonic = family, every_s, monotonic
        self._passed_at = float("-inf")
        self._held = 0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] != self._family:
            return True
        now = self._monotonic()
        if now - self._passed_at < self._every_s:
            self._held += 1
            return False
        if self._held:
            record.msg, record.args = f"{record.getMessage()} (and {self._held} lines more of {self._family})", None
        self._passed_at, self._held = now, 0
        return True


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return json.dumps(line)
