"""The command `foldbus`. Data goes to standard output, everything else to standard error.

Exit codes: 0 done, 1 the command found that something is wrong or was interrupted, 2 wrong usage or surroundings.
"""

from __future__ import annotations

import typer

from foldbus.cli import (
    db,
    demo,
    describe,
    dlq,
    flow,
    history,
    lag,
    parked,
    projection,
    replay,
    run,
    saga,
    schema,
    store,
    topics,
)
from foldbus.cli.running import Commands

app = typer.Typer(
    name="foldbus", cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
_LOOKING = (describe, history, lag)
_ACTING = (saga, projection, replay, dlq, parked)
for _part in (run, demo, *_LOOKING, *_ACTING, topics, flow, schema, db, store):
    _part.add_to(app)


def main() -> None:
    """Entry point."""
    app()


__all__ = ["app", "main"]
