"""Every test that takes `rig` runs once per transport."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from bus.transport import Transport
from tests.bus.transports import TRANSPORTS, Rig


@pytest.fixture(params=TRANSPORTS)
def rig(request: pytest.FixtureRequest) -> Rig:
    return TRANSPORTS[request.param](request)


@pytest.fixture
def mortal(rig: Rig) -> Rig:
    """The same bus, with sessions so short that a test can wait for the end of one."""
    return rig.mortal()


@pytest.fixture
async def transport(rig: Rig) -> AsyncIterator[Transport]:
    async with rig.open() as transport:
        yield transport
