"""`store`: an open, empty store of each adapter in turn; `transport`: each transport in turn."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from bus.embedded import EmbeddedTransport
from bus.transport import Transport
from tests.bus.transports import TRANSPORTS
from tests.eventstore.stores import STORES, Backend


@pytest.fixture(params=list(STORES))
def backend(request: pytest.FixtureRequest) -> Backend:
    return STORES[request.param](request, migrated=True)


@pytest.fixture
async def store(backend: Backend) -> AsyncIterator[Any]:
    async with backend.open() as opened:
        yield opened


@pytest.fixture
async def twin(backend: Backend, store: Any) -> AsyncIterator[Any]:
    """A second store on the same database, as another process would have it."""
    async with backend.open() as opened:
        yield opened


@pytest.fixture
async def sqlite_store(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    async with STORES["sqlite"](request, migrated=True).open() as opened:
        yield opened


@pytest.fixture(params=list(TRANSPORTS))
async def transport(request: pytest.FixtureRequest) -> AsyncIterator[Transport]:
    async with TRANSPORTS[request.param](request).open() as opened:
        yield opened


@pytest.fixture
async def embedded(tmp_path: Path) -> AsyncIterator[Transport]:
    async with EmbeddedTransport.open(tmp_path / "bus-of-projections.db") as opened:
        yield opened
