"""Snapshots: what one holds, when one is made, and the check that finds one that lies.

A snapshot is a shortcut, never the truth: it is made of committed events alone, tied to the code that folded it (the
decider's `version` and the shape of its state), and ignored by any other.
"""

from __future__ import annotations

from collections.abc import Sequence

from bus.envelope import StreamId
from eventstore.errors import EventStoreError
from eventstore.port import Snapshot


class BadSnapshot(EventStoreError):
    """A snapshot that no store takes: of no version, without a time zone, or two of one stream in a call. Nothing was
    stored."""


def check_snapshots(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """Asked by both adapters first. Answers them in the order of (category, id), in which all lock. Raises
    BadSnapshot."""
    seen: set[StreamId] = set()
    for one in snapshots:
        fault = None
        if one.version < 1:
            fault = f"version {one.version}; wanted 1 or above"
        elif one.made_at.tzinfo is None:
            fault = f"made at {one.made_at}; wanted a time zone"
        elif not one.schema or "\x00" in one.schema:
            fault = f"schema {one.schema!r}; wanted a name of some kind"
        elif one.stream in seen:
            fault = "it comes twice; wanted at most one per stream in a call"
        if fault is not None:
            raise BadSnapshot(f"snapshot of {one.stream}: {fault}; nothing was stored")
        seen.add(one.stream)
    return sorted(snapshots, key=lambda one: one.stream)


__all__ = ["BadSnapshot", "check_snapshots"]
