"""What can go wrong with projections, one class per condition that a caller would treat differently."""

from __future__ import annotations

from bus.errors import FoldbusError


class ProjectionError(FoldbusError):
    """Root of the projections' errors."""


class BadProjection(ProjectionError):
    """A projection is declared wrongly: its name, its annotations, its row model or its sources."""


class NameTaken(ProjectionError):
    """The view's name belongs to another table or view of the database; nothing was changed."""

    def __init__(self, name: str, *, found: str) -> None:
        super().__init__(
            f"projection {name!r} wants a view named {found!r}, but the database has another relation of that name; "
            "nothing was changed: name the projection otherwise"
        )
        self.name, self.found = name, found


class BadRow(ProjectionError):
    """A fold returned a row that its columns cannot hold or that could not be read back; it was not stored."""


class RowUnreadable(ProjectionError):
    """A stored row does not fit the row model: somebody else wrote to the table, or the serving generation has the rows
    of another version."""

    def __init__(self, projection: str, key: str, why: str) -> None:
        super().__init__(f"projection {projection!r}: the stored row {key[:80]!r} does not fit its model: {why}")
        self.projection, self.key = projection, key


class RebuildStopped(ProjectionError):
    """An event could not be folded during a rebuild. What is built so far stays, the old generation serves on: correct
    the fold (raise `version` if it means something else now) and start the rebuild again, or let it skip failures."""

    def __init__(self, projection: str, generation: int, event: str, why: str) -> None:
        super().__init__(
            f"projection {projection!r}, generation {generation}: {event} could not be folded: {why}; the rebuild "
            "stopped before it, the generation before serves on"
        )
        self.projection, self.generation = projection, generation


class NotCaughtUp(ProjectionError):
    """The generation to swap in is behind the one that serves; nothing was changed."""


class SwapBlocked(ProjectionError):
    """Readers held the view for longer than the swap may wait; nothing was changed, try again."""


class NothingToSwapBack(ProjectionError):
    """There is no retired generation."""


class NotThere(ProjectionError):
    """The read model has not seen the token's event within the time given; reading without `after` still works."""


class TokenElsewhere(ProjectionError):
    """The token is from a service whose events this projection does not read: waiting would never end."""
