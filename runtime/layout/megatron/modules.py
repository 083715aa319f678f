"""What is asked of Megatron's modules: their parts, and the ranks along which they are split."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Protocol, cast

import torch

from wavecast.runtime.errors import LayoutError

__all__ = ("Ranks", "children", "expert_ranks", "find", "part", "setting", "tensor_ranks")

#: Where an adapter's module keeps the layer it sits around: Megatron Bridge's name for it, and PEFT's.
_BASE = ("to_wrap", "base_layer")

#: This rank's index along a parallel axis, and the axis's size.
Ranks = tuple[int, int]


class _Group(Protocol):
    """What is asked of a ``torch.distributed.ProcessGroup``."""

    def rank(self) -> int: ...

    def size(self) -> int: ...


def find(owner: torch.nn.Module, name: str) -> torch.nn.Module | None:
    """Return the submodule ``name`` of ``owner``, the base layer where an adapter sits around it, or ``None``."""
    module: object = getattr(owner, name, None)
    if not isinstance(module, torch.nn.Module):
        return None

    for base in _BASE:
        inner: object = getattr(module, base, None)
        if isinstance(inner, torch.nn.Module):
            return inner

    return module


def part(owner: torch.nn.Module, name: str) -> torch.nn.Module:
    """
    Return the submodule ``name`` of ``owner``.

    :raises LayoutError: when there is none
    """
    module = find(owner, name)
    if module is None:
        raise LayoutError(f"{type(owner).__name__} has no {name}: its layout is not known")

    return module


def children(owner: torch.nn.Module, name: str) -> Iterator[torch.nn.Module]:
    """Yield the modules of the list ``name`` of ``owner``, the base layers where adapters sit around them."""
    modules = part(owner, name)
    for key, _ in modules.named_children():
        yield part(modules, key)


def setting(module: torch.nn.Module, name: str) -> object:
    """Return a setting of the module's own Megatron configuration, ``None`` where its version has no such."""
    return getattr(module.config, name, None)


def tensor_ranks(module: torch.nn.Module) -> Ranks:
    """
    Return the tensor parallelism of ``module`` (of an expert's, the expert tensor parallelism), from its own group.

    :raises LayoutError: when neither the module nor Megatron's global state says it
    """
    return _ranks(module, attribute="tp", state="tensor_model")


def expert_ranks(module: torch.nn.Module) -> Ranks:
    """
    Return the tensor parallelism of a module that holds the routed experts.

    :raises LayoutError: as :func:`tensor_ranks`
    """
    return _ranks(module, attribute="expt_tp", state="expert_tensor")


def _ranks(module: torch.nn.Module, *, attribute: str, state: str) -> Ranks:
    collection: object = getattr(module, "pg_collection", None)
    # Transformer Engine may have been told of no group, or of another: Megatron keeps its own besides.
    for owner, name in ((module, "_tp_group"), (module, "tp_group"), (collection, attribute)):
        group: _Group | None = getattr(owner, name, None)
        if group is not None:
            return group.rank(), group.size()

    # Releases before the modules carried their groups.
    parallel = sys.modules.get("megatron.core.parallel_state")
    if parallel is None or not parallel.model_parallel_is_initialized():
        raise LayoutError(f"{type(module).__name__} does not say along which ranks it is split")

    rank, size = (getattr(parallel, f"get_{state}_parallel_{what}") for what in ("rank", "world_size"))
    return cast("int", rank()), cast("int", size())
