"""What can go wrong on the bus, one class per condition that a caller would treat differently."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING
from uuid import UUID

if TYPE_CHECKING:
    from bus.transport import Assignment


class FoldbusError(Exception):
    """Root of everything that Foldbus raises."""


class BusError(FoldbusError):
    """Root of the bus's errors."""


class BadMessageClass(BusError):
    """A message class is declared wrongly: its type name, its keys, or a name that two classes claim."""


class BadInput(BusError):
    """Bytes or a message from outside that can never be handled: dead-lettered at once, not retried."""


class Undecodable(BadInput):
    """The bytes, a header or a field are not what the type demands."""


class UnknownType(BadInput):
    """Nobody here names this type."""


class UnknownVersion(BadInput):
    """The type is known, this version of it is not."""


class UpcastFailed(Undecodable):
    """An old message could not be brought up to date: its upcaster raised, or gave what is no message's JSON."""


class BadUpcaster(BusError):
    """The table of upcasters cannot work: found at start-up, nothing was read."""


class MessageTooLarge(BusError):
    """A message is over the transport's limit; found when it is staged, nothing was committed or sent."""

    def __init__(self, type_name: str, *, size: int, limit: int) -> None:
        super().__init__(
            f"{type_name} takes {size} bytes on the wire, the limit is {limit}; nothing was staged or sent"
        )
        self.type_name, self.size, self.limit = type_name, size, limit


class TransportUnavailable(BusError):
    """The broker could not be reached; whether anything was done is unknown, so ask or send again."""


class Fenced(BusError):
    """The caller is no longer the owner (of a partition, a lease, a checkpoint): stop, discard, change nothing."""


class GroupInUse(BusError):
    """A group has members, so nobody else may place its offsets; nothing was set."""


class MissingTopics(BusError):
    """Topics that must exist do not."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(
            f"missing topics: {', '.join(sorted(names))}; the service that owns them makes them "
            "(`foldbus topics apply` for it)"
        )
        self.names = tuple(sorted(names))


class TopicMismatch(BusError):
    """A topic exists otherwise than declared (a partition count decides where keys go): refused to start."""


class OutcomeUnknown(BusError):
    """No answer within the deadline. The command may have been done: repeat it with `id=error.id`, which is safe."""

    def __init__(self, message_id: UUID, *, why: str) -> None:
        super().__init__(f"outcome of {message_id} is unknown: {why}; sending it again with the same id is safe")
        self.id, self.why = message_id, why


class NoAnswer(BusError):
    """A query got no answer within its deadline. Asking changes nothing: ask again."""

    def __init__(self, type_name: str, *, why: str) -> None:
        super().__init__(f"{type_name} has no answer: {why}")


class QueryFailed(BusError):
    """Whoever answers the query could not: its function raised, or the service has none for it."""

    def __init__(self, type_name: str, *, error: str) -> None:
        super().__init__(f"{type_name} was not answered: {error}")
        self.error = error


class NobodyDecides(BusError):
    """The message belongs to this service, and no decider, handler or query function of it takes it: nothing was
    sent."""


class Died(BusError):
    """The command was given up and is in the dead letters: certainly not done."""

    def __init__(self, message_id: UUID, *, error: str) -> None:
        super().__init__(f"{message_id} was not done, it is in the dead letters: {error}")
        self.id, self.error = message_id, error


class Cancelled(BusError):
    """The command arrived after its own undo and was dropped: certainly not done."""

    def __init__(self, message_id: UUID) -> None:
        super().__init__(f"{message_id} was cancelled before it was handled; it was not done")
        self.id = message_id


class OffsetOutOfRange(BusError):
    """The position asked for is no longer (or not yet) in the topic: never skipped silently."""

    def __init__(self, assignment: Assignment, *, wanted: int, first: int, end: int) -> None:
        super().__init__(
            f"{assignment.topic}[{assignment.partition}] holds offsets {first} to {end}, "
            f"wanted {wanted}; nothing was read"
        )
        self.assignment, self.wanted, self.first, self.end = assignment, wanted, first, end
