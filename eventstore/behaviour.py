"""A fold followed by a decision, in envelopes: what aggregates and sagas have in common.

The handler runtime loads a stream, folds it into a state, lets the behaviour decide, and commits the decision as a
unit. It knows nothing else about deciders or sagas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

from bus.envelope import Envelope, StreamId
from bus.quick import quick
from eventstore.port import Bodies, CancelTimer, Timer

S = TypeVar("S")


@quick
@dataclass(frozen=True, slots=True)
class Decision(Generic[S]):
    """What a message changes: events for its stream, messages to send, timers, an answer, and the state after it.

    An empty decision still claims the message and asserts the version it was made at.
    """

    state: S
    events: tuple[Envelope, ...] = ()
    outgoing: tuple[Envelope, ...] = ()
    timers: tuple[Timer | CancelTimer, ...] = ()
    reply: Envelope | None = None
    forget: bool = False
    """The stream has ended: its state need not be kept at hand. Loading it once more is all that it costs."""


class Behaviour(Protocol[S]):
    def stream_of(self, envelope: Envelope) -> StreamId:
        """Which stream decides about this message. Raises BadInput when none can."""
        ...

    def initial(self, stream: StreamId) -> S:
        """The state of a stream at version 0."""
        ...

    def fold(self, state: S, records: Sequence[Envelope]) -> S:
        """The state after these stored events. May change `state` in place: the caller uses only what is returned,
        and forgets all of it when the commit that follows is lost."""
        ...

    def decide(self, state: S, envelope: Envelope) -> Decision[S]:
        """Raises BadInput (dead letter at once) or whatever the user's code raises (retried, then dead letter).
        A `Refused` is not raised but answered. Pure but for ids and the clock it was given."""
        ...


@runtime_checkable
class FoldsBodies(Protocol[S]):
    """A behaviour that folds most events from less than an envelope."""

    def fold_bodies(self, state: S, bodies: Bodies) -> S | None:
        """As `fold`. None: it takes the envelopes of these; `state` is as it was."""
        ...
