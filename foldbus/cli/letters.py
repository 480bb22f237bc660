"""Dead letters on the command line: choosing them by options, and how they look."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer

from bus.errors import FoldbusError
from eventstore.port import DeadLetter, Letter, LetterWhere, Store
from foldbus.redriving import Edit

Consumer = Annotated[str | None, typer.Option(help="Only those that this consumer gave up")]
Type = Annotated[str | None, typer.Option(help="Only this type; ends in * for all that begin so")]
Error = Annotated[str | None, typer.Option(help="Only this class of error; ends in * for all that begin so")]
Topic = Annotated[str | None, typer.Option(help="Only those that came from this topic")]
Key = Annotated[str | None, typer.Option(help="Only this key")]
Since = Annotated[str | None, typer.Option(help="Only those that failed at this time or later (ISO 8601, UTC)")]
Until = Annotated[str | None, typer.Option(help="Only those that failed before this time")]

SAME_MAX = 50
"""Letters of one id: one for each consumer that gave it up."""


class UnknownLetter(FoldbusError):
    """No dead letter has that id, or several may be meant."""


class BadFilter(FoldbusError):
    """Nothing can be chosen by this."""


async def letters_of(store: Store, text: str, consumer: str | None) -> list[Letter]:
    """All letters of the one id that is meant, settled ones first. Raises UnknownLetter."""
    where = LetterWhere(consumer=consumer, prefix=text)
    try:
        found = [
            *await store.letters.page(where, settled=True, limit=SAME_MAX),
            *await store.letters.page(where, limit=SAME_MAX),
        ]
    except ValueError as error:
        raise BadFilter(str(error)) from error
    ids = sorted({one.letter.id for one in found})
    if len(ids) > 1:
        lines = "\n".join(f"  {one}" for one in ids[:10])
        raise UnknownLetter(f"{text!r} may be any of these dead letters:\n{lines}")
    if not ids:
        raise UnknownLetter(f"no dead letter has an id that is or begins with {text!r}")
    return found


def where_of(
    consumer: str | None,
    type: str | None,
    error: str | None,
    topic: str | None,
    key: str | None,
    since: str | None,
    until: str | None,
) -> LetterWhere:
    return LetterWhere(consumer, type, error, topic, key, _time(since), _time(until))


def check_chosen(ids: list[str] | None, where: LetterWhere, everything: bool) -> None:
    given = bool(ids) or where != LetterWhere()
    if given is everything:
        raise BadFilter("wanted ids or filters, or --everything" + ("; found both" if given else ""))


def edit_of(file: Path | None, fields: list[str], type: str | None) -> Edit | None:
    if file is not None and fields:
        raise BadFilter("wanted --edit or --set; found both")
    if file is not None:
        try:
            return Edit(data=file.read_bytes(), type=type)
        except OSError as error:
            raise BadFilter(f"{file}: {error.strerror}") from error
    found: dict[str, Any] = {}
    for text in fields:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise BadFilter(f"--set {text!r}; wanted FIELD=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return Edit(fields=found, type=type) if found else None


def _time(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise BadFilter(f"{text!r} is no time; wanted ISO 8601, for example 2026-11-01T12:00:00") from error
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def is_id(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True


# --- showing ----------------------------------------------------------------------------------------------------------


def line_of(one: DeadLetter) -> tuple[object, ...]:
    failure = one.failure
    return (
        failure.failed_at, one.consumer, one.id, one.type, f"{one.topic}[{one.partition}]@{one.offset}",
        failure.attempts, f"{failure.error}: {failure.message}"[:200],
    )  # fmt: skip


def settled_text(found: Letter) -> str:
    one = found.settled
    if one is None:
        return ""
    return f"{one.how} {one.at.isoformat(timespec='seconds')} by {one.by or '-'}" + (
        f": {one.reason}" if one.reason else ""
    )


def document(found: Letter) -> dict[str, Any]:
    one, settled = found.letter, found.settled
    failure = one.failure
    return {
        "id": one.id,
        "consumer": one.consumer,
        "type": one.type or None,
        "topic": one.topic,
        "partition": one.partition,
        "offset": one.offset,
        **bytes_as_text("key", one.key),
        **bytes_as_text("value", one.value),
        "headers": [{"name": name, **bytes_as_text("value", value)} for name, value in one.headers],
        "error": failure.error,
        "message": failure.message,
        "stack": failure.stack,
        "attempts": failure.attempts,
        "first_failed_at": failure.first_failed_at.isoformat(),
        "failed_at": failure.failed_at.isoformat(),
        "code_version": failure.code_version,
        "settled": settled
        and {
            "how": settled.how.value,
            "at": settled.at.isoformat(),
            "by": settled.by,
            "reason": settled.reason,
        },
    }


def bytes_as_text(name: str, found: bytes | None) -> dict[str, str | None]:
    """As text where it is text; the other of the two fields is None."""
    if found is None:
        return {name: None, f"{name}_base64": None}
    try:
        return {name: found.decode(), f"{name}_base64": None}
    except UnicodeDecodeError:
        return {name: None, f"{name}_base64": base64.b64encode(found).decode()}
