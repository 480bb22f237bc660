"""`docs/kafka-traps.md` has a line for every trap and every interleaving, and every test that it names exists."""

from __future__ import annotations

import re

from tests.docs.blocks import ROOT
from tests.docs.test_guarantees import functions_of

PAGE = ROOT / "docs" / "kafka-traps.md"
_NAMED = re.compile(r"`([a-z_/]+\.py)::(test_[a-z0-9_]+)`")


def rows() -> dict[str, list[str]]:
    """Number of a trap or interleaving → its cells."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    numbered = [row for row in cells if re.fullmatch(r"T?\d+", row[0])]
    assert len({row[0] for row in numbered}) == len(numbered)
    return {row[0]: row for row in numbered}


def test_every_test_that_the_list_names_exists() -> None:
    named = _NAMED.findall(PAGE.read_text())
    assert len(named) > 50
    assert [f"{path}::{name}" for path, name in named if name not in functions_of(path)] == []
    assert len(re.findall(r"::test_", PAGE.read_text())) == len(named), "a name that is not read as one"


def test_every_trap_and_every_interleaving_has_its_line_with_a_test_or_a_reason() -> None:
    found = rows()
    assert sorted(found) == sorted([*(f"T{n}" for n in range(1, 17)), *(str(n) for n in range(1, 22))])
    for number, row in found.items():
        assert len(row) == 4, row
        assert all(row), row
        assert _NAMED.search(row[2]) or row[2].startswith("Cannot happen:"), number


def test_the_interleaving_that_asks_for_regression_tests_of_traps_gets_them() -> None:
    """(21): T1–T6, T10–T12 and T14 have a test each, not only a reason."""
    found = rows()
    wanted = ["T1", "T2", "T3", "T4", "T5", "T6", "T10", "T11", "T12", "T14"]
    assert [number for number in wanted if not _NAMED.search(found[number][2])] == []


def test_every_test_of_the_traps_file_is_on_the_list() -> None:
    named = {name for _, name in _NAMED.findall(PAGE.read_text())}
    for path in ("bus/test_kafka_traps.py", "stories/test_group_life.py", "stories/test_drain_limit.py"):
        assert [name for name in functions_of(path) if name.startswith("test_") and name not in named] == []
