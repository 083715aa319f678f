"""Modules in the place of those that a machine without a GPU lacks, with the same parameters and names."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what is not installed, and what is deprecated
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.experts import TEGroupedMLP
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

__all__ = ("CoreAttention", "Duplicated", "GroupedExperts", "GroupedLinear")


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


class Duplicated(torch.nn.Module):
    """Stands for Transformer Engine's linear module that is whole on every rank."""

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size))

    def sharded_state_dict(self, prefix: str, sharded_offsets: tuple = (), metadata: object = None) -> dict:
        """Return the whole tensor, as Megatron's module does."""
        return make_sharded_tensors_for_checkpoint({"weight": self.weight}, prefix, {}, sharded_offsets)


class GroupedLinear(torch.nn.Module):
    """
    Stands for Transformer Engine's grouped linear module: a parameter for each expert, numbered.

    :param linears: each expert's own
    :param dim: the dim that expert tensor parallelism splits
    """

    def __init__(self, linears: Sequence[torch.nn.Module], dim: int, ep_group, tp_group) -> None:
        super().__init__()
        for index, linear in enumerate(linears):
            self.register_parameter(f"weight{index}", linear.weight)

        self.count, self.dim = len(linears), dim
        self.ep_group, self.tp_group = ep_group, tp_group

    def sharded_state_dict(self, prefix: str, sharded_offsets: tuple = (), metadata: object = None) -> dict:
        """Return one whole tensor for all experts, as Megatron's module does."""
        found = {}
        for index in range(self.count):
            number = self.ep_group.rank() * self.count + index
            made = make_sharded_tensors_for_checkpoint(
                {"weight": getattr(self, f"weight{index}")},
                prefix,
                {"weight": self.dim},
                (*sharded_offsets, (len(sharded_offsets), number, self.ep_group.size() * self.count)),
                tp_group=self.tp_group,
                dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            )
            found[f"{prefix}weight{index}"] = made[f"{prefix}weight"]

        return found


class GroupedExperts(torch.nn.Module):
    """Stands for ``TEGroupedMLP``, made from a ``SequentialMLP``."""

    def __init__(self, experts: torch.nn.Module) -> None:
        super().__init__()
        self.config, self.num_local_experts = experts.config, experts.num_local_experts
        self.ep_group, self.tp_group = experts.ep_group, experts.tp_group
        inward, outward = zip(*((mlp.linear_fc1, mlp.linear_fc2) for mlp in experts.local_experts), strict=True)
        self.linear_fc1 = GroupedLinear(inward, 0, self.ep_group, self.tp_group)
        self.linear_fc2 = GroupedLinear(outward, 1, self.ep_group, self.tp_group)

    sharded_state_dict = TEGroupedMLP.sharded_state_dict
