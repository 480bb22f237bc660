"""mypy and pyright see the replies of a saga's steps, and its planted bugs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TYPED = Path("tests/sagas/typed.py")
WRONG = {n for n, line in enumerate((ROOT / TYPED).read_text().splitlines(), start=1) if "# WRONG" in line}


@pytest.mark.timeout(300)
def test_mypy_sees_what_a_step_replies() -> None:
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(TYPED)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = {
        int(line.split(":")[1])
        for line in done.stdout.splitlines()
        if line.startswith(f"{TYPED}:") and " error: " in line
    }
    assert found == WRONG, done.stdout + done.stderr


@pytest.mark.timeout(300)
def test_pyright_sees_what_a_step_replies() -> None:
    command = [sys.executable, "-m", "pyright", "--outputjson", "--level", "error", str(TYPED)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    found = {
        one["range"]["start"]["line"] + 1
        for one in report["generalDiagnostics"]
        if one["severity"] == "error" and one.get("rule") != "reportUnusedExpression"
    }
    assert found == WRONG, done.stdout
