"""Logical tensors whose every bit follows from the name and the index alone: the same on any machine and version."""

from __future__ import annotations

import hashlib
import math

import torch

from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.hf import logical_tensors

__all__ = ("known_checkpoint", "known_tensor", "quantised_checkpoint", "sha256_of")

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: By element size: bits that may be random; without the exponent's highest there is no NaN and no infinity.
_RANDOM = {1: 0xBF, 2: 0xBFFF, 4: 0xBFFFFFFF}


def known_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor called ``name``: a multiplicative hash of each flat index, seeded by the name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    mixed = (torch.arange(math.prod(shape), dtype=torch.int64) + seed) * 0x1E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 31)) * 0x3F58476D1CE4E5B9
    bits = (mixed >> 24) & _RANDOM[dtype.itemsize]
    return bits.to(_BITS[dtype.itemsize]).view(dtype).reshape(shape)


def known_checkpoint(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Return all logical tensors of a model; those with a dtype of their own keep it."""
    return {
        tensor.name: known_tensor(
            tensor.name, tensor.shape, getattr(torch, tensor.dtype) if tensor.dtype is not None else dtype
        )
        for tensor in logical_tensors(config)
    }


def quantised_checkpoint(config: ModelConfig, block: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return the checkpoint with float8 linear layers and experts, each with its scales, one a block."""
    tensors = known_checkpoint(config)
    for name, tensor in list(tensors.items()):
        if name.endswith(".weight") and ("_proj" in name or ".experts." in name):
            shape = tuple(-(-size // unit) for size, unit in zip(tensor.shape, block, strict=True))
            tensors[name] = known_tensor(name, tuple(tensor.shape), torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = known_tensor(f"{name}_scale_inv", shape, torch.float32)

    return tensors


def sha256_of(tensor: torch.Tensor) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a tensor's bytes, row-major."""
    data = tensor.detach().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()[:16]
