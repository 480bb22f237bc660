"""What commands print: one JSON document or plain columns on standard output, anything else on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime

import typer

from bus.errors import FoldbusError


class NotConfirmed(FoldbusError):
    """Something that changes things was asked for without a terminal to ask back at, and without --yes."""


def print_json(document: object) -> None:
    """One document on one line; times as ISO 8601, ids as text."""
    print(json.dumps(document, default=_plain, ensure_ascii=False))


def print_columns(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned, never cut: a line can be searched for. Nothing at all when there are no rows."""
    if not rows:
        return
    lines = [[_text(cell) for cell in line] for line in (head, *rows)]
    widths = [max(len(line[nth]) for line in lines) for nth in range(len(head))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def say(text: str) -> None:
    """A line for people."""
    print(text, file=sys.stderr, flush=True)


def confirm(what: str, *, yes: bool) -> None:
    """Returns when it may be done. Asks on a terminal; raises NotConfirmed where nobody can answer."""
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise NotConfirmed(f"{what}: there is no terminal to ask at; say --yes")
    typer.confirm(f"{what}?", abort=True, err=True)


def _plain(found: object) -> str:
    return found.isoformat() if isinstance(found, datetime) else str(found)


def _text(cell: object) -> str:
    match cell:
        case None:
            return "-"
        case datetime():
            return cell.isoformat(timespec="milliseconds")
        case bool():
            return "yes" if cell else "no"
        case tuple() | list():
            return ", ".join(map(str, cell)) or "-"  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        case _:
            return " ".join(str(cell).split()) or "-"
