"""`docs/guarantees.md` names tests; each of them exists, so that a renamed test cannot orphan a promise."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.docs.blocks import ROOT

_NAMED = re.compile(r"`([a-z_/]+\.py)::(test_[a-z0-9_]+)`")


@cache
def functions_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("document", ["docs/guarantees.md"])
def test_every_test_that_a_promise_names_exists(document: str) -> None:
    named = _NAMED.findall((ROOT / document).read_text())
    assert named or document != "docs/guarantees.md"
    missing = [f"{path}::{name}" for path, name in named if name not in functions_of(path)]
    assert missing == []


def test_every_promise_of_the_design_has_its_section_with_a_named_test() -> None:
    text = (ROOT / "docs/guarantees.md").read_text()
    sections = dict(re.findall(r"^## (P\d)\. .*?\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL))
    assert sorted(sections) == [f"P{n}" for n in range(1, 9)]
    assert [name for name, body in sections.items() if name != "P8" and not _NAMED.search(body)] == []
