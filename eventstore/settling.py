"""Choosing and settling dead letters: what both adapters decide in the same way.

Open letters are rows of one table, settled ones of another: a message that dies again makes a new open letter, and the
settled ones are its history. See `Letters` in the port.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from eventstore import rows
from eventstore.checks import check_units
from eventstore.errors import BadUnit
from eventstore.port import ClaimState, Letter, LetterWhere, Settled, Settlement, Settling, Unit

AT_ONCE = 100
"""So many are read together: each with its bytes."""
IDS_MAX = 500
GOES_ON = frozenset((Settled.REDRIVEN, Settled.REPLACED))
"""Settled so, a message is handled after all."""

Conditions = tuple[str, list[Any]]
"""SQL with `{}` for each value, and the values."""


def conditions(where: LetterWhere, *, settled: bool, after: Letter | None) -> Conditions:
    """What the database compares; the rest is `matches`, for an error's text may hold what JSON in SQL refuses."""
    found: list[str] = []
    values: list[Any] = []

    def add(sql: str, *given: Any) -> None:
        found.append(sql)
        values.extend(given)

    if where.consumer is not None:
        add("consumer = {}", where.consumer)
    if where.key is not None:
        add("key = {}", where.key.encode(errors="surrogateescape"))
    if where.since is not None:
        add("failed_at >= {}", where.since)
    if where.until is not None:
        add("failed_at < {}", where.until)
    if where.prefix is not None:
        low, high = _bounds(where.prefix)
        add("id >= {} and id <= {}", low, high)
    if where.ids is not None:
        add(f"id in ({', '.join(['{}'] * len(where.ids))})" if where.ids else "1 = 0", *sorted(where.ids))
    if after is not None and settled:
        add("number > {}", after.number)
    elif after is not None:
        one = after.letter
        add("(failed_at, id, consumer) > ({}, {}, {})", one.failure.failed_at, one.id, one.consumer)
    return (f"where {' and '.join(found)}" if found else "", values)


def check(where: LetterWhere, limit: int) -> None:
    """Raises ValueError."""
    if limit < 1:
        raise ValueError(f"limit is {limit}; wanted 1 or more")
    if where.ids is not None and len(where.ids) > IDS_MAX:
        raise ValueError(f"{len(where.ids)} ids; wanted at most {IDS_MAX}")
    if where.prefix is not None:
        _bounds(where.prefix)
    for name, at in (("since", where.since), ("until", where.until)):
        if at is not None and at.tzinfo is None:
            raise ValueError(f"{name} is {at}, without a time zone")


def matches(where: LetterWhere, letter: Letter) -> bool:
    one = letter.letter
    return (
        _like(where.type, one.type)
        and _like(where.error, one.failure.error)
        and (where.topic is None or where.topic == one.topic)
    )


async def chosen(
    read: Callable[[Letter | None, int], Awaitable[Sequence[Letter]]],
    where: LetterWhere,
    *,
    after: Letter | None,
    limit: int,
) -> list[Letter]:
    """Page after page of `read(after, limit)`, until `limit` match or there are no more."""
    found: list[Letter] = []
    while len(found) < limit:
        page = await read(after, AT_ONCE)
        found += [one for one in page if matches(where, one)]
        if len(page) < AT_ONCE:
            break
        after = page[-1]
    return found[:limit]


def check_unit(settlement: Settlement, unit: Unit | None) -> None:
    """Raises BadUnit."""
    if unit is None:
        return
    if settlement.how not in GOES_ON:
        raise BadUnit(f"a letter settled as {settlement.how} comes with a unit; nothing was written")
    if unit.claim is not None or unit.appends or unit.asserts or unit.dead_letter is not None:
        raise BadUnit("what redrives a letter is timers and outgoing messages alone; nothing was written")
    check_units([unit], ())


def judged(settlement: Settlement, claim: ClaimState) -> Settling:
    """Of a letter that is open, by its claim. One that is parked or begun is in somebody's hands already."""
    if settlement.how not in GOES_ON or claim in (ClaimState.NEW, ClaimState.DEAD):
        return Settling.SETTLED
    return Settling.CANCELLED if claim is ClaimState.CANCELLED else Settling.HANDLED


def letter_of(row: Sequence[Any], instant: Callable[[Any], datetime], id: Callable[[Any], UUID]) -> Letter:
    """From the columns of either table; a settled one has five more."""
    consumer, message_id, failed_at, key, value, document, *more = row
    letter = rows.dead_letter(consumer, id(message_id), key, value, instant(failed_at), document)
    if not more:
        return Letter(letter)
    number, at, how, by, reason = more
    return Letter(letter, Settlement(Settled(how), instant(at), by, reason), number)


def _like(wanted: str | None, found: str) -> bool:
    if wanted is None or wanted == found:
        return True
    return wanted.endswith("*") and found.startswith(wanted[:-1])


def _bounds(prefix: str) -> tuple[UUID, UUID]:
    text = prefix.replace("-", "").lower()
    if not text or len(text) > 32 or any(one not in "0123456789abcdef" for one in text):
        raise ValueError(f"{prefix!r} is no beginning of an id")
    return UUID(text.ljust(32, "0")), UUID(text.ljust(32, "f"))
