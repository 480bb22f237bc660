"""How often a handler may be called for one message, chosen per handler.

| mode | its offset is committed | what is stored | a failure |
| --- | --- | --- | --- |
| `AT_MOST_ONCE` | before the handler runs | nothing | is counted and logged; the message is gone |
| `AT_LEAST_ONCE` | when all before it is handled | what the handler writes | is retried, then a dead letter |
| `EXACTLY_ONCE` | when all before it is handled | the claim and all that it changes | is retried, then parked |

A worker that dies loses, of an AT_MOST_ONCE subscription, at most the batch in its hands, and repeats nothing. Of an
AT_LEAST_ONCE subscription it repeats, of each key, a last stretch of what it had handled, in order; without claims
nothing keeps successors back either, so a message of it that fails for good is not parked. EXACTLY_ONCE means the
effect: handled again, a message finds its claim and changes nothing.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class DeliveryMode(StrEnum):
    AT_MOST_ONCE = "at-most-once"
    AT_LEAST_ONCE = "at-least-once"
    EXACTLY_ONCE = "exactly-once"


AT_MOST_ONCE: Final = DeliveryMode.AT_MOST_ONCE
AT_LEAST_ONCE: Final = DeliveryMode.AT_LEAST_ONCE
EXACTLY_ONCE: Final = DeliveryMode.EXACTLY_ONCE

__all__ = ["AT_LEAST_ONCE", "AT_MOST_ONCE", "EXACTLY_ONCE", "DeliveryMode"]
