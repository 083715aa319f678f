"""
One rank of a world of real process groups: cuts a model in many ways and moves weights from each cut to another.

Run as ``python fsdp_ranks.py RANK WORLD STORE OUT``: STORE is a file that the ranks meet at; what a rank saw goes to
OUT as one JSON object. What must be is what torch itself makes of the known weights in the destination's cut.
"""

from __future__ import annotations

import json
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import Shard as Cut
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout import dtensor, flat, lora
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Layout, Shard, describe
from wavecast.runtime.layout.views import elements, unstacked
from wavecast.runtime.plan.reshard import ReshardPlan, plan_reshard

HIDDEN, INNER, VOCABULARY, EXPERTS = 10, 14, 11, 6


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Parameter(torch.empty(EXPERTS, 3, HIDDEN))


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = torch.nn.Linear(HIDDEN, INNER)
        self.down_proj = torch.nn.Linear(INNER, HIDDEN, bias=False)
        self.norm = torch.nn.LayerNorm(HIDDEN, bias=False)
        self.gate = torch.nn.Linear(HIDDEN, 3, bias=False)
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down_proj(self.up_proj(self.norm(x))) + self.gate(x).sum() + self.experts.up.sum()


class Model(torch.nn.Module):
    """Odd sizes: few of them divide by two, three or four ranks, and some have fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = torch.nn.ModuleList([Layer(), Layer()])
        self.lm_head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)

        return self.lm_head(x)


def known(seed: int, dtype: torch.dtype = torch.float32) -> Model:
    """Return a whole model whose weights follow from their names and ``seed`` alone."""
    model = Model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            parameter.copy_(torch.randn(parameter.shape, generator=generator))

    return model.to(dtype)


# Ways to cut a model. Each returns the module, or None on a rank that has no part in it.


def mesh(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    size = int(torch.tensor(shape).prod())
    return DeviceMesh("cpu", torch.arange(size).reshape(shape), mesh_dim_names=names)


def whole(model: Model) -> Model | None:
    return model if dist.get_rank() == 0 else None


def tensor_parallel(model: Model, over: DeviceMesh) -> Model:
    plan = {"embed_tokens": RowwiseParallel(), "lm_head": ColwiseParallel()}
    for index in range(len(model.layers)):
        plan[f"layers.{index}.up_proj"] = ColwiseParallel()
        plan[f"layers.{index}.down_proj"] = RowwiseParallel()

    parallelize_module(model, over, plan)
    return model


def expert_parallel(model: Model, over: DeviceMesh) -> Model:
    for layer in model.layers:
        layer.experts.up = torch.nn.Parameter(distribute_tensor(layer.experts.up, over, [Cut(0)]))

    return model


def sharded(model: Model, over: DeviceMesh, *, reshard_after_forward: bool = True) -> Model:
    for layer in model.layers:
        fully_shard(layer, mesh=over, reshard_after_forward=reshard_after_forward)

    fully_shard(model, mesh=over, reshard_after_forward=reshard_after_forward)
    return model


def tp(parts: int) -> Callable[[Model], Model | None]:
    def cut(model: Model) -> Model | None:
        over = mesh(parts)
        return tensor_parallel(model, over) if dist.get_rank() < parts else None

    return cut


def fsdp(parts: int) -> Callable[[Model], Model | None]:
    def cut(model: Model) -> Model | None:
        over = mesh(parts)
        return sharded(model, over) if dist.get_rank() < parts else None

    return cut


def fsdp_tp(data: int, tensor: int) -> Callable[[Model], Model | None]:
    def cut(model: Model) -> Model | None:
        over = mesh(data, tensor, names=("dp", "tp"))
        return sharded(tensor_parallel(model, over["tp"]), over["dp"])

    return cut


def fsdp_ep(data: int, experts: int) -> Callable[[Model], Model | None]:
    """Experts by expert and then by FSDP over one axis, all else by FSDP over both: the parts are read one by one."""

    def cut(model: Model) -> Model | None:
        over = mesh(data, experts, names=("dp", "ep"))
        expert_parallel(model, over["ep"])
        for layer in model.layers:
            fully_shard(layer.experts, mesh=over["dp"])

        return sharded(model, mesh(data * experts))

    return cut


def hsdp(replicas: int, parts: int) -> Callable[[Model], Model | None]:
    def cut(model: Model) -> Model | None:
        return sharded(model, mesh(replicas, parts, names=("replicate", "shard")))

    return cut


def fsdp1(*, original: bool, strategy: ShardingStrategy) -> Callable[[Model], FullyShardedDataParallel | None]:
    def cut(model: Model) -> FullyShardedDataParallel | None:
        def wrap(module: torch.nn.Module) -> FullyShardedDataParallel:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return FullyShardedDataParallel(
                    module, device_id=torch.device("cpu"), use_orig_params=original, sharding_strategy=strategy
                )

        model.layers = torch.nn.ModuleList([wrap(layer) for layer in model.layers])
        return wrap(model)

    return cut


@dataclass(frozen=True)
class Case:
    """
    A move from one cut to another.

    :ivar read: how the source's shards are found
    :ivar experts: take the stacked experts apart on both sides: one logical tensor each
    :ivar dtype: the destination's
    """

    source: Callable[[Model], torch.nn.Module | None]
    destination: Callable[[Model], Model | None]
    read: Callable[[torch.nn.Module], list[Shard]] = dtensor.shards
    experts: bool = False
    dtype: torch.dtype = torch.float32


FULL, HYBRID, NONE = ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD

CASES = {
    "fsdp4 to whole": Case(fsdp(4), whole),
    "fsdp4 to tp2": Case(fsdp(4), tp(2)),
    "fsdp4 to tp3 in bfloat16": Case(fsdp(4), tp(3), dtype=torch.bfloat16),
    "fsdp2 x tp2 to tp3": Case(fsdp_tp(2, 2), tp(3)),
    "fsdp2 x tp2 to tp4": Case(fsdp_tp(2, 2), tp(4)),
    "hsdp 2 x 2 to tp3": Case(hsdp(2, 2), tp(3)),
    "fsdp2 x ep2 to fsdp3": Case(fsdp_ep(2, 2), fsdp(3), experts=True),
    "tp3 to fsdp2 x tp2": Case(tp(3), fsdp_tp(2, 2)),
    "tp4 to fsdp3": Case(tp(4), fsdp(3)),
    "tp2 to hsdp 2 x 2": Case(tp(2), hsdp(2, 2)),
    "whole to fsdp4": Case(whole, fsdp(4)),
    "fsdp1 flat to tp3": Case(fsdp1(original=False, strategy=FULL), tp(3), read=flat.fsdp1_shards),
    "fsdp1 original to fsdp2 x tp2": Case(fsdp1(original=True, strategy=HYBRID), fsdp_tp(2, 2), read=flat.fsdp1_shards),
    "fsdp1 unsharded to tp2": Case(fsdp1(original=False, strategy=NONE), tp(2), read=flat.fsdp1_shards),
}


def logical(shards: list[Shard], *, experts: bool) -> list[Shard]:
    """Take stacked experts apart, if asked to."""
    if not experts:
        return shards

    found: list[Shard] = []
    for shard in shards:
        if shard.name.endswith("experts.up"):
            found.extend(unstacked(shard, lambda index, name=shard.name: f"{name}.{index}.weight"))
        else:
            found.append(shard)

    return found


def plan_over_ranks(sources: list[Shard], destinations: list[Shard]) -> ReshardPlan:
    """Tell all ranks what each holds, and plan: every rank is one source and one destination."""
    gathered: list[tuple[Layout, Layout]] = [(Layout(()), Layout(()))] * dist.get_world_size()
    dist.all_gather_object(gathered, (describe(sources), describe(destinations)))
    return plan_reshard([source for source, _ in gathered], [destination for _, destination in gathered])


def window(shards: list[Shard], route) -> list[torch.Tensor]:
    """Return the elements of the route's box from each of ``shards`` that holds it, views where they are no results."""
    found = []
    for shard in shards:
        if shard.name == route.tensor and shard.box.contains(route.box):
            start = tuple(a - b for a, b in zip(route.offset, shard.offset, strict=True))
            found.append(elements(shard.view, Box(start, route.extent)))

    return found


def carry_out(plan: ReshardPlan, sources: list[Shard], destinations: list[Shard]) -> None:
    """Send every route's bytes from its sender's rank to its receivers' ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for route in plan.routes:
        dtype = getattr(torch, route.dtype)
        data = torch.empty(route.extent, dtype=dtype)
        if rank == route.sender:
            data.copy_(window(sources, route)[0])

        for receiver in route.receivers:
            if receiver - world == rank != route.sender:
                dist.recv(data.view(-1).view(torch.uint8), src=route.sender)
            elif rank == route.sender != receiver - world:
                dist.send(data.view(-1).view(torch.uint8), dst=receiver - world)

        if rank + world in route.receivers:
            for view in window(destinations, route):
                view.copy_(data)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def differing(held: torch.nn.Module | None, wanted: torch.nn.Module | None) -> list[str]:
    """Return the names of the parameters whose local memory is not bit for bit what it must be."""
    if held is None or wanted is None:
        return []

    pairs = zip(held.named_parameters(), wanted.named_parameters(), strict=True)
    bits = {2: torch.int16, 4: torch.int32}
    return [
        name
        for (name, a), (_, b) in pairs
        if not torch.equal(local(a).view(bits[a.element_size()]), local(b).view(bits[b.element_size()]))
    ]


def run_case(case: Case) -> dict[str, object]:
    source = case.source(known(1))
    destination = case.destination(known(2, case.dtype))
    wanted = case.destination(known(1).to(case.dtype))
    spoiled = differing(destination, wanted)
    sources = logical(case.read(source), experts=case.experts) if source is not None else []
    destinations = logical(dtensor.shards(destination), experts=case.experts) if destination is not None else []
    plan = plan_over_ranks(sources, destinations)
    carry_out(plan, sources, destinations)
    return {
        "digest": plan.digest,
        "nbytes": plan.nbytes,
        "shards": len(sources),
        "tensors": len({route.tensor for route in plan.routes}),
        "differed_before": len(spoiled),
        "differing": differing(destination, wanted),
    }


def after_a_forward_pass() -> dict[str, object]:
    """The module is left gathered, with weights older than the optimizer's step: what is read must be the new ones."""
    model = sharded(known(1), mesh(dist.get_world_size()), reshard_after_forward=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.arange(4)
    model(ids).square().mean().backward()
    with torch.no_grad():
        model(ids)

    held = list(optimizer.param_groups[0]["params"])
    gathered = sum(not hasattr(parameter, "to_local") for parameter in model.parameters())
    before = [local(parameter).clone() for parameter in held]
    optimizer.step()
    new = [local(parameter) for parameter in held]
    found = [shard.view for shard in dtensor.shards(model)]
    new_in_use = [part for part in new if part.numel()]
    return {
        "gathered": gathered,
        "changed": sum(not torch.equal(a, b) for a, b in zip(before, new, strict=True)),
        "equal": all(torch.equal(a, b) for a, b in zip(found, new_in_use, strict=True)),
        "shared": all(a.data_ptr() == b.data_ptr() for a, b in zip(found, new_in_use, strict=True)),
    }


def with_adapters(seed: int, *, merged: bool) -> Model:
    """Return a model with an adapter in each layer, whole numbers throughout, or one with the adapters merged."""
    model = known(seed)
    for layer in model.layers:
        generator = torch.Generator().manual_seed(seed)
        inward, outward = torch.nn.Linear(HIDDEN, 3, bias=False), torch.nn.Linear(3, INNER, bias=False)
        with torch.no_grad():
            for parameter in (inward.weight, outward.weight):
                parameter.copy_(torch.randint(-4, 5, parameter.shape, generator=generator))

            layer.up_proj.weight.copy_((layer.up_proj.weight * 4).round())
            if merged:
                layer.up_proj.weight += 0.5 * (outward.weight @ inward.weight)

        if not merged:
            layer.lora = torch.nn.ModuleDict({"a": inward, "b": outward})

    return model


def adapters_under_fsdp() -> dict[str, object]:
    """FSDP cuts A by its rank, so that no actor can merge alone: the adapters are gathered, the base is not."""
    source = sharded(with_adapters(1, merged=False), mesh(dist.get_world_size()))
    destination, wanted = tp(3)(known(2)), tp(3)(with_adapters(1, merged=True))
    base = dtensor.shards(source, names=lambda name: None if ".lora." in name else name)
    adapters = [
        lora.adapter(f"layers.{index}.up_proj.weight", layer.lora["a"].weight, layer.lora["b"].weight, scale=0.5)
        for index, layer in enumerate(source.layers)
    ]
    refused = ""
    try:
        lora.merged(base, adapters)
    except LayoutError as error:
        refused = str(error)

    sources = lora.merged(base, lora.gathered(adapters))
    destinations = dtensor.shards(destination) if destination is not None else []
    plan = plan_over_ranks(sources, destinations)
    carry_out(plan, sources, destinations)
    return {"refused": refused, "differing": differing(destination, wanted)}


def main(rank: int, world: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=50)
    )
    seen: dict[str, object] = {}
    for name, case in CASES.items():
        seen[name] = run_case(case)

    seen["after a forward pass"] = after_a_forward_pass()
    seen["adapters under fsdp"] = adapters_under_fsdp()
    Path(out).write_text(json.dumps(seen), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
