"""What is asked of stored documents (see `rows.py`) without making envelopes of them."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json, to_json

from bus.envelope import Position, ReplyOutcome

_POSITION, _PUBLIC = 3, 4
"""Where a token's positions stand."""


def outcome_in(document: str | None) -> ReplyOutcome | None:
    """A reply's outcome; None where there is no reply, or it has none."""
    found = None if document is None else from_json(document).get("outcome")
    return None if found is None else ReplyOutcome(found)


def positions_in(document: str) -> tuple[Position, Position]:
    """Where the token says that its unit's last event is, and its last public one; 0 without a token."""
    token: list[Any] | None = from_json(document).get("token")
    return (0, 0) if token is None else (token[_POSITION], token[_PUBLIC])


def with_positions(document: str, last_event: Position, last_public: Position) -> str:
    """The document with these in its token. One without a token, or with them already, stays to the byte, and so does
    what is no document at all: it is not for an export to judge."""
    try:
        found = from_json(document)
        token: list[Any] | None = found.get("token")
    except (ValueError, AttributeError):
        return document
    if token is None or (token[_POSITION], token[_PUBLIC]) == (last_event, last_public):
        return document
    token[_POSITION], token[_PUBLIC] = last_event, last_public
    return to_json(found).decode()
