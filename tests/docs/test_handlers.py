"""What the page on handlers shows runs, and does what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.blocks import write_files
from tests.docs.test_documents import run

pytestmark = pytest.mark.timeout(300)  # whole programs


def test_the_page_on_handlers_does_what_it_says(tmp_path: Path) -> None:
    files = write_files("docs/handlers.md", tmp_path)
    said = run(files["try_it.py"], cwd=tmp_path).splitlines()
    assert said[:3] == [
        "order_id='o-1' cents=500",
        "declined: {'cents': 50000}",
        "paid: 33",
    ]
    handled = [f"{what} {cents}" for what in ("counted", "indexed") for cents in (*range(3, 9), 500)]
    assert said[3] == str(sorted([*handled, "refused: payments.card-declined", "closed"]))
    assert said[4] == "7 charges, closed"
