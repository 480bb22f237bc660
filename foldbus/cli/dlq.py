"""`foldbus dlq list`: what was given up, with its bytes and its history."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from eventstore.port import DeadLetter
from foldbus.cli.loading import AppArgument, JsonOption, StoreOption, UnusedBus, load_service, settings
from foldbus.cli.running import finish, store_of
from foldbus.cli.showing import print_columns, print_json, say

dlq = typer.Typer(no_args_is_help=True, help="Dead letters.")


def add_to(app: typer.Typer) -> None:
    app.add_typer(dlq, name="dlq")
    dlq.callback()(_group)


def _group() -> None:
    """Dead letters."""


@dlq.command("list")
def list_(
    service: AppArgument,
    limit: Annotated[int, typer.Option(min=1, help="How many, oldest first")] = 100,
    store: StoreOption = None,
    bus: UnusedBus = None,
    as_json: JsonOption = False,
) -> None:
    """The dead letters of a service, oldest first. Reads the store alone."""

    async def run() -> Sequence[DeadLetter]:
        async with store_of(load_service(service), settings(store)) as opened:
            return await opened.dead_letters(limit=limit + 1)

    found = finish(run())
    letters, more = found[:limit], len(found) > limit
    if as_json:
        print_json({"dead_letters": [_document(one) for one in letters], "more": more})
        return
    print_columns(
        ("failed at", "consumer", "id", "type", "from", "attempts", "error"),
        [
            (
                one.failure.failed_at, one.consumer, one.id, one.type, f"{one.topic}[{one.partition}]@{one.offset}",
                one.failure.attempts, f"{one.failure.error}: {one.failure.message}"[:200],
            )
            for one in letters
        ],
    )  # fmt: skip
    if more:
        say(f"there are more than these {limit}; see --limit")


def _document(one: DeadLetter) -> dict[str, Any]:
    failure = one.failure
    return {
        "id": one.id,
        "consumer": one.consumer,
        "type": one.type or None,
        "topic": one.topic,
        "partition": one.partition,
        "offset": one.offset,
        **_bytes("key", one.key),
        **_bytes("value", one.value),
        "headers": [{"name": name, **_bytes("value", value)} for name, value in one.headers],
        "error": failure.error,
        "message": failure.message,
        "stack": failure.stack,
        "attempts": failure.attempts,
        "first_failed_at": failure.first_failed_at.isoformat(),
        "failed_at": failure.failed_at.isoformat(),
        "code_version": failure.code_version,
    }


def _bytes(name: str, found: bytes | None) -> dict[str, str | None]:
    """As text where it is text; the other of the two fields is None."""
    if found is None:
        return {name: None, f"{name}_base64": None}
    try:
        return {name: found.decode(), f"{name}_base64": None}
    except UnicodeDecodeError:
        return {name: None, f"{name}_base64": base64.b64encode(found).decode()}
