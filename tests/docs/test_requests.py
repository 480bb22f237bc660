"""What docs/requests.md shows runs, and its numbers are those of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from foldbus import WorkerSettings, command_status
from foldbus.querying import AT_ONCE, RETENTION_S
from tests.docs.blocks import ROOT, write_files
from tests.docs.test_documents import run

pytestmark = pytest.mark.timeout(300)  # whole programs


def test_the_page_on_requests_does_what_it_says(tmp_path: Path) -> None:
    files = write_files("docs/requests.md", tmp_path)
    assert run(files["desk.py"], cwd=tmp_path).splitlines() == [
        "book_id='b-1' reader='Ann'",
        "refused: {'reader': 'Ann'}",
        "book_id='b-1' reader='Ann'",
        "None",
        "1",
        "done book_id='b-3' reader='Cem'",
        "cancelled: True",
    ]


def test_the_page_says_the_numbers_of_the_code() -> None:
    said = " ".join((ROOT / "docs/requests.md").read_text().split())

    assert f"`WorkerSettings.clock_tolerance_s` ({WorkerSettings().clock_tolerance_s:g} s)" in said
    assert f"A worker answers {AT_ONCE} at a time" in said
    assert f"keeps {RETENTION_S / 60:g} minutes" in said
    assert f"timeout_s=2)` ({command_status.timeout_s:g} s)" in said
