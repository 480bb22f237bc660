"""What is said when `MODULE:NAME` names no service."""

from __future__ import annotations

from pathlib import Path

import pytest

from foldbus import Service
from foldbus.cli.loading import CannotLoad, load_service


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("faithful.py").write_text("from foldbus import Service\napp = Service('faithful')\n")
    Path("needy.py").write_text("import no_such_library\n")
    Path("needier.py").write_text("from foldbus import NoSuchName\n")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("faithful:ap", "module faithful has no 'ap'; its services: app"),
        ("faithful:Service", "wanted a foldbus.Service"),
        ("needy:app", "an import inside that module fails: No module named 'no_such_library'"),
        ("needier:app", "an import inside that module fails: cannot import name 'NoSuchName'"),
        ("no_such_module:app", "No module named 'no_such_module'; looked in the working directory"),
        ("no_such.module:app", "No module named 'no_such'; looked in the working directory"),
        ("faithful.py:app", "most likely faithful:app"),
        ("mine/faithful:app", "most likely mine.faithful:app"),
        ("./mine/faithful.py:app", "most likely mine.faithful:app"),
    ],
)
def test_a_path_that_names_no_service_says_what_was_meant(path: str, said: str) -> None:
    with pytest.raises(CannotLoad) as caught:
        load_service(path)
    assert said in str(caught.value)


def test_a_path_that_names_one_is_that_service() -> None:
    assert isinstance(load_service("faithful:app"), Service)
