"""The table of element sizes, held against torch's own."""

from __future__ import annotations

import pytest
import torch

from wavecast.runtime.errors import ConfigError
from wavecast.runtime.layout.dtypes import ITEMSIZE, itemsize


@pytest.mark.parametrize("name", ITEMSIZE)
def test_a_dtypes_size_is_torchs(name):
    if not hasattr(torch, name):
        pytest.skip("this torch is older than the dtype")

    dtype = getattr(torch, name)
    assert str(dtype) == f"torch.{name}"
    assert itemsize(name) == dtype.itemsize


@pytest.mark.parametrize("name", ["bf16", "torch.bfloat16", "", "half"])
def test_an_unknown_dtype_is_named(name):
    with pytest.raises(ConfigError, match=f"unknown dtype '{name}'; known: .*bfloat16"):
        itemsize(name)
