"""A Megatron model's parameters on their way to shards: each is taken once, and none is forgotten."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.megatron.modules import Ranks
from wavecast.runtime.layout.megatron.runs import Run, window
from wavecast.runtime.layout.shard import Computed, Shard
from wavecast.runtime.layout.views import elements

__all__ = ("Held", "Parameters")

#: Parts of the names of parameters that are none of the checkpoint's: further heads, and adapters around a base layer.
_OTHERS = frozenset({"mtp", "adapter", "lora_A", "lora_B"})


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """
    A parameter's memory, or a part of it.

    :ivar path: the parameter's name in the model, for messages
    :ivar view: without a gradient
    :ivar trainable: the parameter is trained
    """

    path: str
    view: torch.Tensor
    trainable: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The view's shape."""
        return tuple(self.view.shape)

    def span(self, size: int, ranks: Ranks, *, dim: int = 0) -> tuple[int, int]:
        """
        Return ``(start, stop)`` of what this rank holds of a dim of ``size``: all of it, or its equal part.

        :raises LayoutError: when the memory has neither size
        """
        index, count = ranks
        length = self.shape[dim]
        if length == size:
            return 0, size

        if length * count != size:
            raise LayoutError(
                f"{self.path} has the shape {self.shape}: dim {dim} is neither {size} nor one of {count} parts of it"
            )

        return index * length, (index + 1) * length

    def reshaped(self, *shape: int) -> Held:
        """
        Return the same memory in another shape.

        :raises LayoutError: when the elements do not fit
        """
        try:
            return replace(self, view=self.view.view(*shape))
        except RuntimeError as error:
            raise LayoutError(f"{self.path} of shape {self.shape} cannot be viewed as {shape}") from error

    def at(self, index: int) -> Held:
        """Return one index of the first dim."""
        return replace(self, view=self.view[index])

    def transposed(self) -> Held:
        """Return the transposed matrix."""
        return replace(self, view=self.view.t())

    def rows(self, count: int) -> Held:
        """Return the first ``count`` rows."""
        return replace(self, view=self.view.narrow(0, 0, count))


class Parameters:
    """
    Turns parameters into shards and keeps count of them.

    :param model: whose parameters there are
    :param shapes: of all logical tensors, by name
    :ivar shards: of what was added so far
    :ivar trainable: the names of what was added and is trained
    """

    def __init__(self, model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shards: list[Shard] = []
        self.trainable: set[str] = set()
        self._shapes = shapes
        self._left = {id(parameter): path for path, parameter in model.named_parameters()}
        self._names: set[str] = set()

    def claim(self, module: torch.nn.Module, name: str) -> Held | None:
        """
        Take the parameter or buffer ``name`` of ``module``; ``None`` where it has none, or one without elements.

        :raises LayoutError: when its memory does not hold the elements as they are
        """
        tensor: object = getattr(module, name, None)
        if not isinstance(tensor, torch.Tensor) or not tensor.numel():
            return None  # Transformer Engine keeps an empty tensor in the place of a bias

        path = self._left.pop(id(tensor), None) or f"{type(module).__name__}.{name}"
        data = tensor.detach()
        # A quantised or distributed tensor shows a shape and dtype that its memory does not have.
        if type(data) is not torch.Tensor:
            raise LayoutError(f"{path} is a {type(data).__name__}, not a plain tensor of the weights")

        if not data.untyped_storage().nbytes():
            raise LayoutError(f"{path} has no memory: it is offloaded, or was released")

        return Held(path, data, tensor.requires_grad)

    def need(self, module: torch.nn.Module, name: str) -> Held:
        """
        Take the parameter or buffer ``name`` of ``module``.

        :raises LayoutError: when there is none, or as :meth:`claim`
        """
        held = self.claim(module, name)
        if held is None:
            raise LayoutError(f"{type(module).__name__} has no {name}: its layout is not known")

        return held

    def add(self, held: Held, runs: Sequence[Run], *, suffix: str = ".weight", dim: int = 0) -> None:
        """
        Add one shard for each of ``runs``, which follow each other along ``dim`` of ``held``.

        :raises LayoutError: when a run's tensor is not in the checkpoint, or its other dims are of other sizes
        """
        extent, at = held.shape, 0
        before, after = (0,) * dim, (0,) * (len(extent) - dim - 1)
        for run in runs:
            name = run.name + suffix
            shape = self._shape(name, held)
            if (*extent[:dim], *extent[dim + 1 :]) != (*shape[:dim], *shape[dim + 1 :]):
                raise LayoutError(
                    f"{held.path} has the shape {extent}, which holds no part of {name!r} of shape {shape}",
                    tensor=name,
                )

            view = held.view if run.length == extent[dim] else held.view.narrow(dim, at, run.length)
            self.shards.append(Shard(name, view, (*before, run.start, *after), shape, trainable=held.trainable))
            self._note(name, held)
            at += run.length

    def add_part(self, held: Held, runs: Sequence[Run], ranks: Ranks, *, suffix: str = ".weight", dim: int = 0) -> None:
        """
        Add this rank's part of what, on all ranks together, are ``runs`` along ``dim``.

        :raises LayoutError: when ``held`` is neither all of them nor an equal part, or as :meth:`add`
        """
        self._names.update(run.name + suffix for run in runs)
        self.add(
            held, window(runs, *held.span(sum(run.length for run in runs), ranks, dim=dim)), suffix=suffix, dim=dim
        )

    def add_whole(self, held: Held, name: str, *, one_less: bool = False) -> None:
        """
        Add a tensor that is whole on this rank.

        :param one_less: the parameter is the tensor less one, which only a source can make good
        :raises LayoutError: when the tensor is not in the checkpoint, or of another shape
        """
        shape = self._shape(name, held)
        if held.shape != shape:
            raise LayoutError(f"{held.path} has the shape {held.shape}, {name!r} has {shape}", tensor=name)

        view = _plus_one(held.view) if one_less else held.view
        self.shards.append(Shard(name, view, (0,) * len(shape), shape, trainable=held.trainable))
        self._note(name, held)

    def leave_out(self, name: str) -> None:
        """Note that the model has the tensor ``name`` and that it is not wanted."""
        self._names.add(name)

    def check_held(self, wanted: Collection[str]) -> None:
        """
        Check that nothing of ``wanted`` is missing.

        :raises LayoutError: naming the first tensor that no parameter holds
        """
        missing = sorted(name for name in wanted if name not in self._names)
        if missing:
            raise LayoutError(f"the model holds nothing of {missing[0]!r}", tensor=missing[0])

    def check_all_claimed(self) -> None:
        """
        Check that every parameter was taken but those of adapters and of multi-token-prediction layers.

        :raises LayoutError: naming the first that was not
        """
        for path in self._left.values():
            if _OTHERS.isdisjoint(path.split(".")):
                raise LayoutError(f"the checkpoint has no tensor for {path}, or its layout is not known")

    def _note(self, name: str, held: Held) -> None:
        self._names.add(name)
        if held.trainable:
            self.trainable.add(name)

    def _shape(self, name: str, held: Held) -> tuple[int, ...]:
        shape = self._shapes.get(name)
        if shape is None:
            raise LayoutError(f"{held.path} is {name!r}, which the configuration has not", tensor=name)

        return shape


def _plus_one(view: torch.Tensor) -> Computed:
    return Computed(
        tuple(view.shape), view.dtype, view.device, lambda box: (elements(view, box).float() + 1).to(view.dtype)
    )
