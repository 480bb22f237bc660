"""`docs/event-store-tests.md` maps what has cost other stores their events to tests that exist, and leaves none out."""

from __future__ import annotations

import re

from tests.docs.blocks import ROOT
from tests.docs.test_guarantees import functions_of

PAGE = ROOT / "docs" / "event-store-tests.md"
_NAMED = re.compile(r"`([a-z_/]+\.py)::(test_[a-z0-9_]+)`")


def rows() -> list[list[str]]:
    """The cells of every row of the page's tables, headings left out."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if set(row[0]) != {"-"} and "tests" not in row]


def test_every_test_that_the_list_names_exists() -> None:
    named = _NAMED.findall(PAGE.read_text())
    assert len(named) > 60
    assert [f"{path}::{name}" for path, name in named if name not in functions_of(path)] == []


def test_each_of_the_nineteen_has_a_test_and_says_what_turned_it_red() -> None:
    numbered = [row for row in rows() if row[0].isdigit()]
    assert [int(row[0]) for row in numbered] == list(range(1, 20))
    for row in rows():
        assert len(row) == (4 if row[0].isdigit() else 3), row
        assert _NAMED.search(row[-2]), row
        assert row[-1], row


def test_every_test_of_faults_and_limits_is_on_the_list() -> None:
    named = {name for _, name in _NAMED.findall(PAGE.read_text())}
    for path in ("eventstore/test_failover.py", "eventstore/test_gaps.py", "eventstore/test_standby.py"):
        assert [name for name in functions_of(path) if name.startswith("test_") and name not in named] == []
