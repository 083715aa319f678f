"""The shared pool of real actors, for the cells that need processes."""

from __future__ import annotations

import pytest

from tests.integration.conftest import all_actors, cluster, make_sides, pool

__all__ = ("all_actors", "cluster", "make_sides", "pool")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked ``matrix``, unless it is asked for: it takes many minutes."""
    if "matrix" in config.getoption("markexpr"):
        return

    dropped = [item for item in items if "matrix" in item.keywords and item.get_closest_marker("matrix")]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]
