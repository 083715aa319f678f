from __future__ import annotations

import importlib
import pkgutil

import pytest

import wavecast.scheduler

MODULES = [f"wavecast.scheduler.{module.name}" for module in pkgutil.iter_modules(wavecast.scheduler.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_modules_say_what_is_public(name: str) -> None:
    module = importlib.import_module(name)

    assert isinstance(module.__all__, tuple)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert hasattr(module, public)


def test_the_room_exports_what_it_says_and_documents_it() -> None:
    for public in wavecast.scheduler.__all__:
        thing = getattr(wavecast.scheduler, public)
        assert thing is not None
        if callable(thing) and getattr(thing, "__module__", "").startswith("wavecast."):
            assert (thing.__doc__ or "").strip(), public
