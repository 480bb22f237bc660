"""Which migrations to run, and which code may use a schema, decided for both databases in one place.

Schemas change in pairs. *Expand* adds (a table, a nullable column, a function): the code before it works on. *Contract*
takes away what no code uses any more: its file's name ends in `_contract`, and it is run when asked for, once the last
process of the older code has ended. The log's row says which code is the oldest that still works: a contraction moves
that on, an expansion leaves it. So a rolling deployment is: upgrade the schema, replace the processes one by one, and
contract at leisure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from eventstore.errors import SchemaMismatch

_CONTRACT = "_contract"


@dataclass(frozen=True, slots=True, order=True)
class Migration:
    number: int
    name: str

    @property
    def contract(self) -> bool:
        return self.name.rpartition(".")[0].endswith(_CONTRACT)


class State(StrEnum):
    UP_TO_DATE = "up to date"
    BEHIND = "behind"
    NEWER = "newer"
    """And this code works with it."""
    TOO_NEW = "too new"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Look:
    """A store's schema beside this code. `found` 0: there is none. `contractions` are known and were not asked for."""

    found: int
    wanted: int
    oldest: int
    contractions: tuple[str, ...] = ()
    needed: int = 0
    """The last expansion that this code knows: it works from here on."""

    @property
    def state(self) -> State:
        if not self.found:
            return State.ABSENT
        if self.found > self.wanted:
            return State.NEWER if self.oldest <= self.wanted else State.TOO_NEW
        return State.UP_TO_DATE if self.found >= self.needed else State.BEHIND


def look(known: Iterable[Migration], *, found: int, oldest: int) -> Look:
    ordered = sorted(known)
    return Look(
        found=found,
        wanted=ordered[-1].number,
        oldest=oldest,
        contractions=tuple(one.name for one in ordered if one.contract and found and one.number > found),
        needed=max((one.number for one in ordered if not one.contract), default=0),
    )


def check(seen: Look, *, where: str) -> None:
    """Raises SchemaMismatch unless this code works on it."""
    match seen.state:
        case State.UP_TO_DATE | State.NEWER:
            return
        case State.ABSENT:
            raise SchemaMismatch(f"{where}: found no schema, wanted {seen.wanted:04}; run `foldbus db upgrade`")
        case State.BEHIND:
            raise SchemaMismatch(
                f"{where}: found schema {seen.found:04}, wanted {seen.needed:04}; run `foldbus db upgrade`"
            )
        case State.TOO_NEW:
            raise SchemaMismatch(
                f"{where}: found schema {seen.found:04}, which works with code from {seen.oldest:04} on; this code "
                f"knows up to {seen.wanted:04}: run newer code"
            )


def plan(known: Iterable[Migration], *, found: int, contract: bool) -> Sequence[Migration]:
    """What to run, in order: everything on an empty database, up to the next contraction otherwise, unless asked for.

    Raises SchemaMismatch when an expansion stands behind a contraction that was not asked for."""
    pending = sorted(one for one in known if one.number > found)
    if contract or not found:
        return pending
    stop = next((nth for nth, one in enumerate(pending) if one.contract), len(pending))
    behind = [one.name for one in pending[stop:] if not one.contract]
    if behind:
        raise SchemaMismatch(
            f"{behind[0]} comes after {pending[stop].name}, which takes away what older code uses: end that, and run "
            "`foldbus db upgrade --contract`; nothing was changed"
        )
    return pending[:stop]


def oldest_after(ran: Sequence[Migration]) -> int | None:
    """The oldest code that works after these: None, it stays as it was."""
    return max((one.number for one in ran if one.contract), default=None)
