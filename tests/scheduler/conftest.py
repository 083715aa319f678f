"""The scheduler runs on both event loops, so its tests do."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Each test marked ``anyio`` runs once on every backend."""
    return str(request.param)
