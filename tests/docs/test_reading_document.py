"""What docs/reading.md shows runs, and says what the page says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, write_files
from tests.docs.test_documents import run

pytestmark = pytest.mark.timeout(300)  # whole programs


def test_the_page_on_reading_reads_what_it_says(tmp_path: Path) -> None:
    files = write_files("docs/reading.md", tmp_path)
    assert run(files["streams.py"], cwd=tmp_path).splitlines() == [
        "2 meter_id='m-1' kwh=25",
        "3 meter_id='m-1' kwh=40",
        "4 meter_id='m-1'",
        "newest: 4 MeterReplaced",
    ]
    assert run(files["report.py"], cwd=tmp_path).splitlines() == [
        "4 readings",
        "the first command led to 1 event",
        "5 events of meters since then",
    ]
    assert run(files["alarm.py"], cwd=tmp_path).startswith("alarm at position ")


def test_the_page_names_the_span_that_one_call_looks_through() -> None:
    from eventstore.selecting import SPAN

    assert f"at most {SPAN:,} positions" in " ".join((ROOT / "docs/reading.md").read_text().split())
