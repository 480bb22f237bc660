"""`backend`: an empty, migrated database of each adapter in turn. `store`: an open store on it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.eventstore.stores import STORES, Backend


@pytest.fixture(params=list(STORES))
def unmigrated(request: pytest.FixtureRequest) -> Backend:
    return STORES[request.param](request)


@pytest.fixture(params=list(STORES))
def backend(request: pytest.FixtureRequest) -> Backend:
    return STORES[request.param](request, migrated=True)


@pytest_asyncio.fixture
async def store(backend: Backend) -> AsyncIterator[Any]:
    async with backend.open() as opened:
        yield opened


@pytest_asyncio.fixture
async def twin(backend: Backend, store: Any) -> AsyncIterator[Any]:
    """A second store on the database of `store`, as another process would have it."""
    async with backend.open() as opened:
        yield opened
