"""What all tests share."""

from __future__ import annotations

import pytest
from hypothesis import settings

# Wall-clock limits per example say more about the machine than about the code.
settings.register_profile("wavecast", deadline=None)
settings.load_profile("wavecast")


@pytest.fixture
def anyio_backend() -> str:
    """The event loop of tests marked ``anyio``. Ray knows asyncio only."""
    return "asyncio"
