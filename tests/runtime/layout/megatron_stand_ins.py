"""Modules in the place of those that a machine without a GPU lacks, with the same parameters and names."""

from __future__ import annotations

import warnings

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what is not installed, and what is deprecated
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

__all__ = ("CoreAttention", "Duplicated", "GroupedColumn", "GroupedRow", "Norm", "NormedColumnParallel")


class Norm(torch.nn.Module):
    """An RMS norm that does not mind sequence parallelism."""

    def __init__(self, config: object, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(hidden_size))
        self.eps = eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(states.float(), states.shape[-1:], self.weight.float(), self.eps).to(states)


class CoreAttention(torch.nn.Module):
    """Causal attention in plain torch, with keys and values of different widths: Megatron's own allows none."""

    def __init__(self, *, softmax_scale: float | None = None, **_: object) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object):
        """Take and return (sequence, batch, heads, width), the last two joined in what is returned."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
        )
        return mixed.permute(2, 0, 1, 3).flatten(2)


class NormedColumnParallel(ColumnParallelLinear):
    """Stands for Transformer Engine's linear module with a norm in front: the same parameters and names."""

    def __init__(self, input_size: int, output_size: int, **options: object) -> None:
        super().__init__(input_size, output_size, **options)
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size))


class Duplicated(torch.nn.Module):
    """Stands for Transformer Engine's linear module that is whole on every rank."""

    def __init__(self, input_size: int, output_size: int, **_: object) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size))

    def sharded_state_dict(self, prefix: str, sharded_offsets: tuple = (), metadata: object = None) -> dict:
        """Return the whole tensor, as Megatron's module does."""
        return make_sharded_tensors_for_checkpoint({"weight": self.weight}, prefix, {}, sharded_offsets)


class Grouped(torch.nn.Module):
    """Stands for Transformer Engine's grouped linear module: a parameter for each expert, numbered."""

    dim = 0

    def __init__(self, num_gemms: int, input_size: int, output_size: int, *, pg_collection, **options: object) -> None:
        super().__init__()
        self.groups = pg_collection
        shape = [output_size, input_size]
        shape[self.dim] //= pg_collection.expt_tp.size()
        for index in range(num_gemms):
            self.register_parameter(f"weight{index}", torch.nn.Parameter(torch.empty(shape)))

        self.count = num_gemms

    def sharded_state_dict(self, prefix: str, sharded_offsets: tuple = (), metadata: object = None) -> dict:
        """Return one whole tensor for all experts, as Megatron's module does."""
        ep = self.groups.ep
        found = {}
        for index in range(self.count):
            expert = (len(sharded_offsets), ep.rank() * self.count + index, ep.size() * self.count)
            offsets = (*sharded_offsets, expert)
            own = {"weight": getattr(self, f"weight{index}")}
            made = make_sharded_tensors_for_checkpoint(
                own,
                prefix,
                {"weight": self.dim},
                offsets,
                tp_group=self.groups.expt_tp,
                dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            )
            found[f"{prefix}weight{index}"] = made[f"{prefix}weight"]

        return found


class GroupedColumn(Grouped):
    """Splits rows."""


class GroupedRow(Grouped):
    """Splits columns."""

    dim = 1
