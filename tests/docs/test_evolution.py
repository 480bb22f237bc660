"""`docs/evolution.md`: its programs run one after the other on one directory, and the check says what the page says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, write_files
from tests.docs.test_documents import environment, run

pytestmark = pytest.mark.timeout(300)  # whole programs

PAGE = "docs/evolution.md"


def test_what_the_old_program_stored_is_read_by_the_new_one(tmp_path: Path) -> None:
    files = write_files(PAGE, tmp_path)
    run(files["before.py"], cwd=tmp_path)
    assert run(files["look.py"], cwd=tmp_path) == "order_id='o-1' price='19.99 EUR' done=('paid', 'shipped')\n"
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_upcasters.py", "-c", "/dev/null", cwd=tmp_path)


def test_the_check_says_what_the_page_says(tmp_path: Path) -> None:
    files = write_files(PAGE, tmp_path)
    run("-m", "foldbus", "schema", "write", "orders:app", cwd=tmp_path)
    run("-m", "foldbus", "schema", "check", "orders:app", cwd=tmp_path)
    source = files["orders.py"].read_text()
    files["orders.py"].write_text(source.replace("    currency: str\n", "    currency: str\n    note: str\n", 1))
    checked = subprocess.run(
        [sys.executable, "-m", "foldbus", "schema", "check", "orders:app"],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, env=environment(tmp_path),
    )  # fmt: skip
    (shown,) = re.findall(r"```text\n(.*?)```", (ROOT / PAGE).read_text(), re.DOTALL)
    assert (checked.returncode, checked.stdout) == (1, shown)


def test_from_the_page_s_first_program_to_its_second_nothing_stored_or_sent_breaks(tmp_path: Path) -> None:
    """But for the two commands that the page's second program does not take any more, which are named."""
    files = write_files(PAGE, tmp_path)
    today = files["orders.py"].read_text()
    files["orders.py"].write_text(files["before.py"].read_text())
    run("-m", "foldbus", "schema", "write", "orders:app", cwd=tmp_path)
    files["orders.py"].write_text(today)
    checked = subprocess.run(
        [sys.executable, "-m", "foldbus", "schema", "check", "orders:app"],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, env=environment(tmp_path),
    )  # fmt: skip
    breaking = re.findall(r"^breaking: (\S+):", checked.stdout, re.MULTILINE)
    assert breaking == ["orders.close-order.v1", "orders.look-at-order.v1"]
