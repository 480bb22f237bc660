"""The command `foldbus`. Data goes to standard output, everything else to standard error.

Exit codes: 0 done, 1 the command found that something is wrong, 2 wrong usage or surroundings.
"""

from __future__ import annotations

import sys

import typer

from bus.errors import FoldbusError
from foldbus.cli import demo, run

app = typer.Typer(name="foldbus", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
run.add_to(app)
demo.add_to(app)


def main() -> None:
    """Entry point: errors of ours are one line, not a stack."""
    try:
        app()
    except FoldbusError as error:
        print(f"foldbus: {error}", file=sys.stderr)
        raise SystemExit(2) from None


__all__ = ["app", "main"]
