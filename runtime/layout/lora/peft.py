"""Adapters of a live PEFT model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeGuard

import torch

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.dtensor import clean_name
from wavecast.runtime.layout.lora.adapter import Adapter, adapter
from wavecast.runtime.layout.lora.attach import attached
from wavecast.runtime.layout.shard import Shard
from wavecast.runtime.layout.views import NameMap, map_name

__all__ = ("peft_adapters", "peft_names")

_PREFIX = "base_model.model."
#: Modules and parameters that hold an adapter's own tensors.
_OWN = re.compile(r"\.lora_\w+(\.|$)")
_SAVED = re.compile(r"\.modules_to_save\.([^.]+)")


class _LoraLayer(Protocol):
    """What is asked of ``peft.tuners.lora.LoraLayer``."""

    lora_A: torch.nn.ModuleDict
    lora_B: torch.nn.ModuleDict
    lora_embedding_A: Mapping[str, torch.Tensor]
    lora_embedding_B: Mapping[str, torch.Tensor]
    scaling: Mapping[str, float]
    active_adapters: Sequence[str]
    merged_adapters: Sequence[str]

    def get_base_layer(self) -> torch.nn.Module: ...


#: Shards with their views, by the address of their storage.
_ByStorage = Mapping[int, Sequence[tuple[Shard, torch.Tensor]]]


def peft_names(name: str, *, adapter: str = "default") -> str | None:
    """
    Map a PEFT model's parameter name to that of the model without PEFT: a name map for the base's shards.

    The adapters' own parameters are left out, and so are modules that were copied to be trained (``modules_to_save``)
    in favour of their copies.

    :param adapter: whose copies of such modules are meant
    """
    if _OWN.search(name) or ".original_module." in name:
        return None

    saved = _SAVED.search(name)
    if saved is not None:
        if saved.group(1) != adapter:
            return None

        name = name[: saved.start()] + name[saved.end() :]

    return _plain(name)


def peft_adapters(
    module: torch.nn.Module,
    base: Iterable[Shard],
    *,
    adapters: Sequence[str] | None = None,
    names: NameMap | None = None,
) -> list[Adapter]:
    """
    Return the LoRA adapters of a PEFT model, on linear layers, embeddings and stacked parameters.

    A, B and the base may be plain tensors or DTensors; see :func:`gathered` for FSDP, which cuts A by its rank.

    :param base: the base's shards, as :func:`wavecast.runtime.layout.dtensor.shards` gives them with
        :func:`peft_names`. Those of a stacked parameter (experts) may have been taken apart to any logical matrices
    :param adapters: names of the adapters to take; each layer's active ones by default
    :param names: from the names of the model without PEFT to logical ones
    :raises LayoutError: for an adapter that is merged into its base already, that is more than ``scale * B @ A``
        (DoRA and its like, biases), or that is on a module of another kind; for adapters of PEFT's other tuners (IA3,
        LoHa, VeRA, OFT, single tokens), which would be left out of the sum; and for layers whose adapters are disabled,
        unless ``adapters`` says which are meant
    """
    by_storage: dict[int, list[tuple[Shard, torch.Tensor]]] = {}
    for shard in base:
        if isinstance(shard.view, torch.Tensor):
            by_storage.setdefault(shard.view.untyped_storage().data_ptr(), []).append((shard, shard.view))

    found: list[Adapter] = []
    for path, layer in module.named_modules():
        name = _plain(clean_name(path))
        if not _is_lora(layer):
            _check_no_other_tuner(layer, name)
        else:
            if adapters is None and getattr(layer, "disable_adapters", False):
                raise LayoutError(
                    f"the adapters on {name!r} are disabled: enable them, name those to take by adapters=, or sync "
                    "the base alone",
                    tensor=name,
                )

            for chosen in layer.active_adapters if adapters is None else adapters:
                found.extend(_layer_adapters(layer, name, chosen, by_storage, names))

    return found


def _plain(name: str) -> str:
    """Return what a module or parameter is called without PEFT; a wrapper may be in another."""
    return ".".join(part for part in name.removeprefix(_PREFIX).split(".") if part != "base_layer")


def _is_lora(module: object) -> TypeGuard[_LoraLayer]:
    return all(hasattr(module, name) for name in ("lora_A", "lora_B", "lora_embedding_A", "scaling", "get_base_layer"))


def _check_no_other_tuner(module: torch.nn.Module, path: str) -> None:
    """Refuse a layer of PEFT's that does something else to its base than LoRA; whole copies are told by their names."""
    own = getattr(module, "adapter_layer_names", None)
    if own is None or hasattr(module, "modules_to_save"):
        return

    if hasattr(module, "token_adapter") or hasattr(module, "trainable_tokens_delta"):
        raise LayoutError(
            f"{path!r} trains single tokens (trainable_token_indices): that is not scale * B @ A; train a copy of the "
            "whole module by modules_to_save",
            tensor=path,
        )

    raise LayoutError(
        f"the adapter on {path!r} is a {type(module).__module__}.{type(module).__qualname__} with {', '.join(own)}: it "
        "is no LoRA, and would be left out",
        tensor=path,
    )


def _layer_adapters(
    layer: _LoraLayer, path: str, chosen: str, by_storage: _ByStorage, names: NameMap | None
) -> Iterator[Adapter]:
    embedded = chosen in layer.lora_embedding_A
    if not embedded and chosen not in layer.lora_A:
        return

    _check_plain(layer, path, chosen)
    scale = float(layer.scaling[chosen])
    if embedded:
        a, b = layer.lora_embedding_A[chosen], layer.lora_embedding_B[chosen]
    else:
        a, b = (_weight(factors[chosen], path) for factors in (layer.lora_A, layer.lora_B))

    parameter = getattr(layer, "parameter_name", None)
    if isinstance(parameter, str):
        yield from _on_parameter(layer, f"{path}.{parameter}", by_storage, (a, b, scale))
        return

    transposed = embedded or bool(getattr(layer, "fan_in_fan_out", False))
    for name in map_name(names, f"{path}.weight"):
        yield adapter(name, a, b, scale=scale, transposed=transposed)


def _check_plain(layer: _LoraLayer, path: str, chosen: str) -> None:
    if chosen in layer.merged_adapters:
        raise LayoutError(f"adapter {chosen!r} is merged into {path!r} already: unmerge it first", tensor=path)

    extras = {
        "a variant": getattr(layer, "lora_variant", {}),
        "a magnitude": getattr(layer, "lora_magnitude_vector", {}),
    }
    for extra, held in extras.items():
        if chosen in held:
            raise LayoutError(f"adapter {chosen!r} on {path!r} has {extra}: it is not scale * B @ A", tensor=path)

    if getattr(layer, "lora_bias", {}).get(chosen):
        raise LayoutError(f"adapter {chosen!r} on {path!r} has a bias: it is not scale * B @ A", tensor=path)


def _weight(module: torch.nn.Module, path: str) -> torch.Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        raise LayoutError(f"the adapter on {path!r} is a {type(module).__name__}, not a matrix", tensor=path)

    return weight


def _on_parameter(
    layer: _LoraLayer, path: str, by_storage: _ByStorage, factors: tuple[torch.Tensor, torch.Tensor, float]
) -> Iterator[Adapter]:
    """Yield the adapters on a parameter that is a matrix or a stack of them, as views of the base tell them apart."""
    a, b, scale = factors
    inner: object = layer.get_base_layer()
    while _is_lora(inner):
        inner = inner.get_base_layer()

    weight = getattr(inner, path.rpartition(".")[2], None)
    if not isinstance(weight, torch.Tensor) or hasattr(weight, "placements") or hasattr(a, "placements"):
        raise LayoutError(f"the adapter on {path!r} is on a parameter that is not whole on this actor", tensor=path)

    stack = weight.detach() if weight.dim() == 3 else weight.detach().unsqueeze(0)
    # PEFT lays the experts' ranks end to end in A, and side by side, rank by rank, in B.
    each_a = a.detach().unflatten(0, (stack.shape[0], -1))
    each_b = b.detach().unflatten(1, (-1, stack.shape[0]))
    rows_are_outputs = weight.dim() == 2 or bool(getattr(layer, "_did_swap_in_out_features", False))
    for index, shards in _by_matrix(stack, by_storage).items():
        inward, outward = each_a[index], each_b[:, :, index]
        if rows_are_outputs:
            yield from attached(shards, stack[index], inward, outward, scale=scale)
        else:
            yield from attached(shards, stack[index], outward.t(), inward.t(), scale=scale)


def _by_matrix(stack: torch.Tensor, by_storage: _ByStorage) -> dict[int, list[Shard]]:
    """Return the shards that are views of each matrix of a stack."""
    found: dict[int, list[Shard]] = {}
    each = stack.stride(0) * stack.element_size()
    for shard, view in by_storage.get(stack.untyped_storage().data_ptr(), ()):
        index = (view.data_ptr() - stack.data_ptr()) // each
        if 0 <= index < stack.shape[0]:
            found.setdefault(index, []).append(shard)

    return found
