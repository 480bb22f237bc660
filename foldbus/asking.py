"""Asking over the bus and awaiting the answer: the client's half of request and reply.

A request names where its answer goes (this process, on the inbox of its service) and until when somebody waits for it.
What comes back is an envelope; `Connection` makes a typed answer, a refusal or an error of it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Generic, TypeVar, cast

from bus.codec import died_error
from bus.envelope import Envelope, ReplyOutcome, ReplyTo, Token
from bus.errors import OutcomeUnknown, TransportUnavailable
from bus.messages import Refused
from bus.metrics import Metrics
from bus.seams import Clock
from eventstore.port import ClaimState
from foldbus.outbox import Inbox, Publisher

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Receipt(Generic[R]):
    """An answer with the place in the log where it was decided, for `after=`."""

    value: R
    token: Token | None


@dataclass(frozen=True, slots=True)
class Status:
    """What became of a command, as its owner knows it.

    NEW: nothing is known of it (yet; an expired request leaves no trace either). STARTED: a handler that calls the
    outside world is at it, or was. PARKED: it failed, or waits behind one of its key that did. DONE: `answer` is what
    was replied, a Refused included. DEAD: given up, `error` says why;
    certainly not done, unless its reply's outcome is UNKNOWN. CANCELLED: its undo came first.
    `reply` is the stored answer as it is; None also where another service was asked."""

    state: ClaimState
    reply: Envelope | None = None
    answer: Any = None
    error: str | None = None


TOKEN = "_foldbus_token"


def token_of(answer: object) -> Token | None:
    """The token that travelled with an answer; None for None answers, and for models made by hand."""
    if isinstance(answer, Token):
        return answer
    if isinstance(answer, Receipt):
        return answer.token
    return cast("Token | None", getattr(answer, "__dict__", {}).get(TOKEN))


class Unanswered(Exception):
    """No answer, and why; inside `foldbus` only. Callers hear OutcomeUnknown or NoAnswer."""


class Requests:
    """Of one process. Any number at once."""

    def __init__(self, publisher: Publisher, inbox: Inbox, *, clock: Clock, metrics: Metrics, bus: str) -> None:
        self._publisher, self._inbox, self._clock, self._metrics = publisher, inbox, clock, metrics
        self._bus = bus

    async def exchange(self, envelope: Envelope, *, timeout_s: float) -> Envelope:
        """Sends it and waits for its answer, of any outcome but `expired`. Sent once more when the answer may have come
        while nobody read the inbox: it has the same id, and so no second effect.

        Raises Unanswered, MessageTooLarge or MissingTopics (it was not sent)."""
        inbox = self._inbox
        to = ReplyTo(inbox.topic, inbox.instance, inbox.instance)
        deadline = self._clock.now() + timedelta(seconds=timeout_s)
        envelope = replace(envelope, reply_to=to, deadline=deadline)
        waiting = inbox.expect(envelope.id, deadline)
        begun = False
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    await inbox.ready()
                    answer, begun = waiting.answer, True  # what is missed from here on is told to this answer
                    await self._publisher.publish(envelope)
                    if answer.done() and answer.result() is None:
                        continue
                    reply = await waiting.next()
                    if reply is not None:
                        break
                    self._metrics.count("foldbus_requests_repeated_total")
        except TimeoutError:
            raise Unanswered(self._silence(envelope, timeout_s, begun=begun)) from None
        except TransportUnavailable as error:
            raise Unanswered(f"the broker does not answer: {error}") from error
        except OutcomeUnknown as error:  # of the sending itself
            raise Unanswered(error.why) from error
        finally:
            inbox.forget(envelope.id)
        if reply.outcome is ReplyOutcome.EXPIRED:
            raise Unanswered(died_error(reply))
        return reply

    def _silence(self, envelope: Envelope, timeout_s: float, *, begun: bool) -> str:
        owner = (envelope.topic or "").rpartition(".")[0]
        if not begun:
            return f"the inbox {self._inbox.topic} could not be opened within {timeout_s} s, nothing was sent"
        silent = f"no answer within {timeout_s} s on {self._bus}"
        return f"{silent}; is a worker of {owner!r} running there (foldbus run, or connect(worker=True))?"


def raised(value: Any) -> Any:
    """An answer, or the refusal raised."""
    if isinstance(value, Refused):
        raise value
    return value


__all__ = ["TOKEN", "Receipt", "Requests", "Status", "Unanswered", "raised", "token_of"]
