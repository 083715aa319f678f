"""One decoder layer: norms, attention, dense MLP or experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.config import MlaConfig, ModelConfig, MoeConfig
from wavecast.runtime.layout.megatron.modules import (
    Ranks,
    children,
    expert_ranks,
    find,
    part,
    setting,
    tensor_ranks,
)
from wavecast.runtime.layout.megatron.names import Catalogue, LayerNames, MlpNames
from wavecast.runtime.layout.megatron.parameters import Held, Parameters
from wavecast.runtime.layout.megatron.runs import Run, gated, query_groups

__all__ = ("LayerReader",)


class LayerReader:
    """
    Adds what one ``TransformerLayer`` holds to the shards of its model.

    :param parameters: the model's
    :param config: the checkpoint's configuration
    :param known: its logical tensors
    :param layer: the module
    :param buffers: add the bias on the router's scores too, which is no parameter
    """

    def __init__(
        self, parameters: Parameters, config: ModelConfig, known: Catalogue, layer: torch.nn.Module, *, buffers: bool
    ) -> None:
        self._parameters = parameters
        self._config = config
        self._known = known
        self._layer = layer
        self._buffers = buffers
        self._number = int(cast("int", layer.layer_number)) - 1
        self._names = LayerNames(config.family, self._number)
        self._one_less = bool(setting(layer, "layernorm_zero_centered_gamma"))

    def read(self) -> None:
        """
        Add everything.

        :raises LayoutError: when the layer is not as the configuration says
        """
        if not 0 <= self._number < self._config.num_layers:
            raise LayoutError(
                f"the model holds layer {self._number}, counted from 0, the configuration has {self._config.num_layers}"
            )

        self._attention(part(self._layer, "self_attention"))
        mlp = part(self._layer, "mlp")
        inward = find(mlp, "linear_fc1")
        self._norm(self._names.mlp_norm, (find(self._layer, "pre_mlp_layernorm"), "weight"), (inward, _FUSED))
        if find(mlp, "router") is None:
            self._mlp(mlp, self._names.mlp, self._config.intermediate_size, tensor_ranks(mlp))
        else:
            self._experts(mlp)

        self._parameters.check_held(self._known.of_layer[self._number])

    def _attention(self, attention: torch.nn.Module) -> None:
        if setting(attention, "attention_output_gate"):
            raise LayoutError("linear_qkv holds gates too (attention_output_gate): no known family has such")

        if setting(attention, "rotary_interleaved") and self._config.mla is None:
            raise LayoutError(
                "rotary positions turn neighbouring elements of a head (rotary_interleaved): in checkpoints the two of "
                "a pair lie half a head apart"
            )

        prefix, ranks = self._names.attention, tensor_ranks(attention)
        first = find(attention, "linear_qkv") or find(attention, "linear_qkv_down_proj")
        self._norm(self._names.input_norm, (find(self._layer, "input_layernorm"), "weight"), (first, _FUSED))
        if self._config.mla is not None:
            self._latent_attention(attention, self._config.mla, prefix, ranks)
        else:
            self._grouped_attention(attention, prefix, ranks)

        columns = Run(f"{prefix}o_proj", 0, self._config.num_heads * self._config.head_dim)
        self._row_parallel(part(attention, "linear_proj"), columns, ranks)

    def _grouped_attention(self, attention: torch.nn.Module, prefix: str, ranks: Ranks) -> None:
        rows = query_groups(
            f"{prefix}q_proj",
            f"{prefix}k_proj",
            f"{prefix}v_proj",
            heads=self._config.num_heads,
            groups=self._config.num_kv_heads,
            head_dim=self._config.head_dim,
        )
        self._column_parallel(part(attention, "linear_qkv"), rows, ranks)
        self._norm(f"{prefix}q_norm", (find(attention, "q_layernorm"), "weight"))
        self._norm(f"{prefix}k_norm", (find(attention, "k_layernorm"), "weight"))

    def _latent_attention(self, attention: torch.nn.Module, mla: MlaConfig, prefix: str, ranks: Ranks) -> None:
        heads = self._config.num_heads
        queries = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        keys_values = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        kv_down = Run(f"{prefix}kv_a_proj_with_mqa", 0, mla.kv_lora_rank + mla.qk_rope_head_dim)
        if mla.q_lora_rank is None:
            self._column_parallel(part(attention, "linear_q_proj"), [Run(f"{prefix}q_proj", 0, queries)], ranks)
            self._column_parallel(part(attention, "linear_kv_down_proj"), [kv_down], ranks)
        else:
            q_down = Run(f"{prefix}q_a_proj", 0, mla.q_lora_rank)
            both = find(attention, "linear_qkv_down_proj")
            if both is not None:
                self._column_parallel(both, [q_down, kv_down], ranks)
            else:
                self._column_parallel(part(attention, "linear_q_down_proj"), [q_down], ranks)
                self._column_parallel(part(attention, "linear_kv_down_proj"), [kv_down], ranks)

            q_up = part(attention, "linear_q_up_proj")
            self._norm(f"{prefix}q_a_layernorm", (find(attention, "q_layernorm"), "weight"), (q_up, _FUSED))
            self._column_parallel(q_up, [Run(f"{prefix}q_b_proj", 0, queries)], ranks)

        kv_up = part(attention, "linear_kv_up_proj")
        self._norm(f"{prefix}kv_a_layernorm", (find(attention, "kv_layernorm"), "weight"), (kv_up, _FUSED))
        self._column_parallel(kv_up, [Run(f"{prefix}kv_b_proj", 0, keys_values)], ranks)

    def _experts(self, moe: torch.nn.Module) -> None:
        known, names = self._config.moe, self._names
        router, experts, shared = part(moe, "router"), part(moe, "experts"), find(moe, "shared_experts")
        count = setting(moe, "num_moe_experts")
        if known is None or count != known.num_experts:
            raise LayoutError(
                f"the model has {count} experts, the configuration {known.num_experts if known is not None else 0}"
            )

        self._parameters.add_whole(self._parameters.need(router, "weight"), f"{names.router}.weight")
        bias = self._parameters.claim(router, "expert_bias")
        if bias is not None and self._buffers:
            # Megatron updates it by the experts' loads, without a gradient.
            trainable = setting(router, "moe_router_bias_update_rate") != 0
            self._parameters.add_whole(replace(bias, trainable=trainable), names.score_bias)
        elif bias is not None:
            self._parameters.leave_out(names.score_bias)

        held = [int(index) for index in cast("Sequence[int]", moe.local_expert_indices)]
        self._routed(experts, [names.expert(index) for index in held], known)
        if shared is not None:
            block = _block(shared, "moe_shared_expert_glu_interleave_size")
            width = known.shared_intermediate_size
            self._mlp(shared, names.shared, width, tensor_ranks(shared), block=block)
            gate = self._parameters.claim(shared, "gate_weight")
            if gate is not None:
                self._parameters.add_whole(gate, f"{names.shared_gate}.weight")

    def _routed(self, experts: torch.nn.Module, names: Sequence[MlpNames], known: MoeConfig) -> None:
        """Add this rank's experts, kept in one of the three ways there are."""
        ranks, width = expert_ranks(experts), known.intermediate_size
        if find(experts, "local_experts") is not None:  # SequentialMLP
            for name, expert in zip(names, children(experts, "local_experts"), strict=True):
                self._mlp(expert, name, width, ranks)

            return

        weight = self._parameters.claim(experts, "weight1")
        if weight is not None:  # GroupedMLP: two parameters for all, every matrix transposed
            hidden = self._config.hidden_size
            inward = weight.reshaped(len(names), hidden, -1)
            outward = self._parameters.need(experts, "weight2").reshaped(len(names), -1, hidden)
            for position, name in enumerate(names):
                self._gated(inward.at(position).transposed(), name, width, ranks)
                self._columns(outward.at(position).transposed(), Run(name.down, 0, width), ranks)

            return

        # TEGroupedMLP: parameters numbered by expert in one module for all
        block = _block(experts, "moe_mlp_glu_interleave_size")
        inwards = self._numbered(part(experts, "linear_fc1"), len(names))
        outwards = self._numbered(part(experts, "linear_fc2"), len(names))
        for name, inward, outward in zip(names, inwards, outwards, strict=True):
            self._gated(inward, name, width, ranks, block=block)
            self._columns(outward, Run(name.down, 0, width), ranks)

    def _numbered(self, module: torch.nn.Module, count: int) -> list[Held]:
        """Return the matrices of a grouped linear module, whether each or all together are a parameter."""
        stacked = self._parameters.claim(module, "weight")
        if stacked is not None:
            return [stacked.reshaped(count, -1, stacked.shape[-1]).at(position) for position in range(count)]

        return [self._parameters.need(module, f"weight{position}") for position in range(count)]

    def _mlp(
        self, mlp: torch.nn.Module, names: MlpNames, width: int, ranks: Ranks, *, block: int | None = None
    ) -> None:
        inward = part(mlp, "linear_fc1")
        self._gated(self._parameters.need(inward, "weight"), names, width, ranks, block=block)
        bias = self._parameters.claim(inward, "bias")
        if bias is not None:
            self._gated(bias, names, width, ranks, suffix=".bias", block=block)

        self._row_parallel(part(mlp, "linear_fc2"), Run(names.down, 0, width), ranks)

    def _gated(
        self,
        held: Held,
        names: MlpNames,
        width: int,
        ranks: Ranks,
        *,
        suffix: str = ".weight",
        block: int | None = None,
    ) -> None:
        """Add a ``linear_fc1``: the same rows of gate and up."""
        start, stop = held.span(2 * width, ranks)
        start, length = start // 2, (stop - start) // 2
        if block is not None and length % block:
            raise LayoutError(f"{held.path} has {length} rows of gate, which are no blocks of {block}")

        runs = gated(names.gate, names.up, start=start, length=length, block=block)
        self._parameters.add(held, runs, suffix=suffix)

    def _column_parallel(self, module: torch.nn.Module, rows: Sequence[Run], ranks: Ranks) -> None:
        """Add a linear module, weight and bias, whose rows tensor parallelism cuts, or leaves whole."""
        weight, bias = self._parameters.need(module, "weight"), self._parameters.claim(module, "bias")
        self._parameters.add_part(weight, rows, ranks)
        if bias is not None:
            self._parameters.add_part(bias, rows, ranks, suffix=".bias")

    def _row_parallel(self, module: torch.nn.Module, columns: Run, ranks: Ranks) -> None:
        """Add a linear module whose columns are cut; its bias is added once, after the sum, and so is whole."""
        self._columns(self._parameters.need(module, "weight"), columns, ranks)
        bias = self._parameters.claim(module, "bias")
        if bias is not None:
            self._parameters.add_whole(bias, f"{columns.name}.bias")

    def _columns(self, held: Held, columns: Run, ranks: Ranks) -> None:
        self._parameters.add_part(held, [columns], ranks, dim=1)

    def _norm(self, name: str, *places: tuple[torch.nn.Module | None, str]) -> None:
        """Add a norm's weight, which is in a module of its own or fused with the linear module behind it."""
        found = [self._parameters.claim(module, key) for module, key in places if module is not None]
        weights = [weight for weight in found if weight is not None]
        if len(weights) > 1:
            raise LayoutError(f"{weights[0].path} and {weights[1].path} both are {name}.weight")

        for weight in weights:
            self._parameters.add_whole(weight, f"{name}.weight", one_less=self._one_less)


#: Transformer Engine's name for a norm's weight in the linear module that applies it.
_FUSED = "layer_norm_weight"


def _block(module: torch.nn.Module, name: str) -> int | None:
    """Return in blocks of how many rows gate and up alternate, ``None`` where all of gate comes first."""
    size = setting(module, name)
    return size if isinstance(size, int) else None
