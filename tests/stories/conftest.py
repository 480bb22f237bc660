"""`pair`: the backends of a story, one pair after the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stories.pairs import Pair


def embedded(request: pytest.FixtureRequest) -> Pair:
    directory: Path = request.getfixturevalue("tmp_path")
    return Pair("embedded", f"sqlite:{directory}", f"embedded:{directory}")


def servers(request: pytest.FixtureRequest) -> Pair:
    database: str = request.getfixturevalue("database")
    kafka: str = request.getfixturevalue("kafka")
    return Pair("servers", database, f"kafka://{kafka}")


PAIRS = {"embedded": embedded, "servers": servers}


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return PAIRS[request.param](request)
