"""The engine's bounds and delays, and what is written down about a failure."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from datetime import datetime
from random import Random

from bus.envelope import Failure

MESSAGE_BYTES_MAX = 4 * 1024
STACK_BYTES_MAX = 16 * 1024


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Bounds of one engine; every one of them is a multiple of what a healthy service needs.

    `in_flight_max` and `in_flight_bytes_max` bound what was taken from the transport and is not done: reading pauses
    there and resumes at half (bytes may be passed by one poll). `per_key_max` queued messages of one key, or
    `spread_max` received ones above the watermark, pause their partition alone, until half of it is left.
    `offers_max` bounds timers' messages in hand, apart from the others, so that a full engine cannot starve them.
    Of `lanes` batches that are at work side by side, all but one are begun only while a full one waits: while little
    happens, what comes together is written together.
    `early_batch_max` is what a crash may cost a subscription that is handled at most once.
    """

    batch_size_max: int = 500
    early_batch_max: int = 2000
    poll_records_max: int = 1000
    in_flight_max: int = 5000
    in_flight_bytes_max: int = 64 * 1024 * 1024
    per_key_max: int = 1000
    spread_max: int = 50_000
    offers_max: int = 500
    lanes: int = 2
    poll_timeout_s: float = 1.0
    attempts_max: int = 5
    retry_base_s: float = 0.05
    retry_max_s: float = 5.0
    retry_total_s: float = 10.0
    commit_interval_s: float = 1.0
    commit_timeout_s: float = 10.0
    drain_timeout_s: float = 20.0
    hold_s: float = 30.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}, wanted a number above 0")

    def backoff_s(self, failures: int, rng: Random) -> float:
        """Full step after the first failure, doubled with each further one, bounded, with jitter downwards: those
        that failed together do not come back together."""
        step = self.retry_base_s * 2.0 ** min(max(failures - 1, 0), 30)
        return min(step, self.retry_max_s) * rng.uniform(0.5, 1.0)


def failure_of(
    error: Exception, *, attempts: int, first_failed_at: datetime, failed_at: datetime, code_version: str
) -> Failure:
    """What a dead letter says about an error: bounded, and free of what a text column refuses."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    try:
        message = str(error)
        stack = "".join(traceback.format_exception(error))
    except Exception as broken:  # an error whose own __str__ raises must still get its dead letter
        message, stack = f"(the error's text cannot be made: {type(broken).__name__})", ""
    return Failure(
        error=name,
        message=_storable(message, MESSAGE_BYTES_MAX, keep_end=False),
        stack=_storable(stack, STACK_BYTES_MAX, keep_end=True),
        attempts=attempts,
        first_failed_at=first_failed_at,
        failed_at=failed_at,
        code_version=code_version,
    )


def _storable(text: str, bytes_max: int, *, keep_end: bool) -> str:
    # PostgreSQL's text takes neither NUL nor lone surrogates: a dead letter that cannot be written holds its record
    # in the topic for ever. The end of a stack names the error, the beginning of a message says what it is about.
    data = text.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace")
    if len(data) > bytes_max:
        data = data[-bytes_max:] if keep_end else data[:bytes_max]
    return data.decode("utf-8", "ignore")
