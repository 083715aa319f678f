"""Block-scaled FP8: weights quantised as they are sent, for destinations that hold pairs of weight and scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from wavecast.runtime.errors import ConfigError, LayoutError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Computed, Shard
from wavecast.runtime.layout.views import assembled, missing

__all__ = ("BLOCK", "SCALE", "quantised", "paired", "scale_shape", "is_linear_weight")

#: Rows and columns of a block, as DeepSeek-V3 has them.
BLOCK = (128, 128)

#: What the scale's name adds to the weight's, in checkpoints of DeepSeek-V3 and those like it.
SCALE = "_scale_inv"

_DTYPE = torch.float8_e4m3fn
_LARGEST = torch.finfo(_DTYPE).max
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny

#: Elements worked out at a time, whole rows of blocks at least: bounds the temporary memory to a few times 16 MiB.
_BAND = 1 << 22

_LINEAR = frozenset({"w1", "w2", "w3", "kv_a_proj_with_mqa"})


def is_linear_weight(name: str) -> bool:
    """Tell whether ``name`` is the weight of a projection: not of an embedding, a head, a norm or a router's gate."""
    *_, module, parameter = ("", *name.split("."))
    return parameter == "weight" and (module.endswith("_proj") or module in _LINEAR)


def scale_shape(shape: Sequence[int], *, block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """Return the shape of the scales of a matrix: one element a block, the last row and column of blocks cut short."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def quantised(
    shards: Iterable[Shard],
    *,
    names: Callable[[str], bool] = is_linear_weight,
    block: tuple[int, int] = BLOCK,
    power_of_two: bool = False,
) -> list[Shard]:
    """
    Return ``shards`` with those of the tensors that ``names`` picks quantised as they are sent.

    In the place of each such shard of ``X.weight`` come two: of ``X.weight`` in float8_e4m3fn and of
    ``X.weight_scale_inv`` in float32, one element a block, the two multiplied being the weight again. The original
    dtype is no longer offered, so that no route can be a plain cast. A block's scale is the largest magnitude in it
    over 448, 1 where all is zero, in float32; its elements are divided by it and rounded to the nearest, ties to even.

    Blocks are those of the logical tensor. A shard that begins or ends inside a block needs the rest of the block to
    be on this actor too, in other shards of the tensor; then the result is that of the whole tensor, bit for bit.

    :param block: rows and columns of a block
    :param power_of_two: round each scale up to a power of two before dividing by it (still in float32), for kernels
        that keep nothing of a scale but its exponent
    :raises ConfigError: for a block that is not two positive integers
    :raises LayoutError: when part of a block is on other actors only, or for a picked tensor that is no matrix of
        wider floating point elements, or that this actor holds in several dtypes
    """
    _check_block(block)
    held = list(shards)
    by_name: dict[str, list[Shard]] = {}
    for shard in held:
        if names(shard.name):
            by_name.setdefault(shard.name, []).append(shard)

    blocks = {name: _Blocks(name, tuple(own), block, power_of_two) for name, own in by_name.items()}
    found: list[Shard] = []
    for shard in held:
        if shard.name in blocks:
            found.extend(blocks[shard.name].pair(shard))
        else:
            found.append(shard)

    return found


def paired(shard: Shard, scale: torch.Tensor, *, block: tuple[int, int] = BLOCK) -> list[Shard]:
    """
    Return a destination's pair of shards: a quantised weight's and its scales'.

    :param scale: this actor's scales, one for each block that the shard reaches into, in float32: no scale is ever
        rounded to another dtype
    :raises ConfigError: for a block that is not two positive integers
    :raises LayoutError: when the shard is not in float8_e4m3fn or ``scale`` not in float32, when the shard begins or
        ends inside a block, or ``scale`` is not of the shape this makes
    """
    _check_block(block)
    if shard.view.dtype != _DTYPE or scale.dtype != torch.float32:
        raise LayoutError(
            f"{shard.name!r} is {shard.view.dtype} and its scales are {scale.dtype}: a pair is {_DTYPE} and "
            f"{torch.float32}",
            tensor=shard.name,
        )

    box, shape = shard.box, shard.global_shape
    grid = _grid(box, block) if len(shape) == 2 else box
    if len(shape) != 2 or _elements_of(grid, shape, block) != box or tuple(scale.shape) != grid.extent:
        raise LayoutError(
            f"shard of {shard.name!r} at offset {shard.offset} with extent {box.extent} and scales of "
            f"{tuple(scale.shape)} is no run of whole blocks of {block}",
            tensor=shard.name,
        )

    scales = Shard(shard.name + SCALE, scale, grid.offset, scale_shape(shape, block=block), trainable=shard.trainable)
    return [shard, scales]


@dataclass(frozen=True, slots=True, eq=False)
class _Blocks:
    """
    What an actor holds of one matrix that is quantised.

    :ivar shards: all of the actor's shards of the matrix
    :ivar block: rows and columns of a block
    :ivar power_of_two: scales are rounded up to powers of two
    """

    name: str
    shards: tuple[Shard, ...]
    block: tuple[int, int]
    power_of_two: bool

    def pair(self, shard: Shard) -> list[Shard]:
        """Return the two shards that stand for ``shard``."""
        view, shape = shard.view, shard.global_shape
        if len(shape) != 2 or not view.dtype.is_floating_point or view.dtype.itemsize == 1:
            raise LayoutError(
                f"{self.name!r} of shape {shape} and dtype {view.dtype} is not a matrix to quantise", tensor=self.name
            )

        other = next((each.view.dtype for each in self.shards if each.view.dtype != view.dtype), None)
        if other is not None:
            raise LayoutError(
                f"this actor holds {self.name!r} both in {view.dtype} and {other}: which to quantise cannot be known",
                tensor=self.name,
            )

        grid = _grid(shard.box, self.block)
        self._check_whole_blocks(shard, grid)
        weight = Computed(tuple(view.shape), _DTYPE, view.device, lambda box: self._weight(_shifted(box, shard.box)))
        scale = Computed(grid.extent, torch.float32, view.device, lambda box: self._scale(_shifted(box, grid)))
        return [
            replace(shard, view=weight),
            Shard(
                self.name + SCALE,
                scale,
                grid.offset,
                scale_shape(shape, block=self.block),
                trainable=shard.trainable,
            ),
        ]

    def _check_whole_blocks(self, shard: Shard, grid: Box) -> None:
        lacking = missing(self.shards, _elements_of(grid, shard.global_shape, self.block))
        if lacking:
            first = min(lacking)
            raise LayoutError(
                f"shard of {self.name!r} at offset {shard.offset} with extent {shard.box.extent} is cut off the grid "
                f"of {self.block[0]} x {self.block[1]} blocks, and this actor lacks the rest of its blocks: first at "
                f"offset {first.offset} with extent {first.extent}",
                tensor=self.name,
            )

    def _weight(self, box: Box) -> torch.Tensor:
        """Return the quantised elements of ``box`` of the logical matrix."""
        result = torch.empty(box.extent, dtype=_DTYPE, device=self.shards[0].view.device)
        for band in self._bands(_grid(box, self.block)):
            values, scale = self._band(band)
            values.div_(scale[:, None, :, None]).clamp_(-_LARGEST, _LARGEST)
            top, left = (index * size for index, size in zip(band.offset, self.block, strict=True))
            start = max(top, box.offset[0])
            stop = min(top + band.extent[0] * self.block[0], box.offset[0] + box.extent[0])
            rows = slice(start - top, stop - top)
            columns = slice(box.offset[1] - left, box.offset[1] - left + box.extent[1])
            whole = values.view(values.shape[0] * values.shape[1], values.shape[2] * values.shape[3])
            result[start - box.offset[0] : stop - box.offset[0]].copy_(whole[rows, columns])

        return result

    def _scale(self, grid: Box) -> torch.Tensor:
        """Return the scales of the blocks in ``grid``."""
        return torch.cat([self._band(band)[1] for band in self._bands(grid)])

    def _band(self, grid: Box) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return the elements and the scales of the blocks in ``grid``, in float32.

        The elements are fresh memory of four dims: row of blocks, row in the block, column of blocks, column in it.
        Where the matrix ends inside a block, zeros fill the block.
        """
        region = _elements_of(grid, self.shards[0].global_shape, self.block)
        (rows, columns), (height, width) = grid.extent, self.block
        values = torch.zeros(rows * height, columns * width, device=self.shards[0].view.device)
        values[: region.extent[0], : region.extent[1]].copy_(assembled(self.name, self.shards, region))
        values = values.view(rows, height, columns, width)
        largest = torch.maximum(values.amax(dim=(1, 3)), -values.amin(dim=(1, 3)))
        # By a tensor: on CUDA a division by a number becomes a product with its inverse, one bit off at times.
        scale = (largest / torch.full_like(largest, _LARGEST)).clamp_min(_SMALLEST_SCALE)
        if self.power_of_two:
            mantissa, exponent = torch.frexp(scale)
            # Of a power of two the mantissa is a half.
            scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))

        return values, torch.where(largest == 0, torch.ones_like(scale), scale)

    def _bands(self, grid: Box) -> Iterator[Box]:
        """Cut ``grid`` into rows of blocks that have at most ``_BAND`` elements, of one row at least."""
        each = max(_BAND // (self.block[0] * self.block[1] * max(grid.extent[1], 1)), 1)
        for start in range(0, grid.extent[0], each):
            yield grid.rows(start, min(start + each, grid.extent[0]))


def _check_block(block: tuple[int, int]) -> None:
    if not isinstance(block, Sequence) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise ConfigError(f"block={block!r} must be two positive integers, rows and columns")


def _grid(box: Box, block: tuple[int, int]) -> Box:
    """Return the blocks that ``box`` reaches into, counted in blocks."""
    first = tuple(start // size for start, size in zip(box.offset, block, strict=True))
    stop = tuple(-(-(start + n) // size) for start, n, size in zip(box.offset, box.extent, block, strict=True))
    return Box(first, tuple(b - a for a, b in zip(first, stop, strict=True)))


def _elements_of(grid: Box, shape: tuple[int, ...], block: tuple[int, int]) -> Box:
    """Return all elements of the blocks in ``grid``, of a matrix of ``shape``."""
    first = tuple(index * size for index, size in zip(grid.offset, block, strict=True))
    stop = tuple(
        min((index + n) * size, end) for index, n, size, end in zip(grid.offset, grid.extent, block, shape, strict=True)
    )
    return Box(first, tuple(b - a for a, b in zip(first, stop, strict=True)))


def _shifted(box: Box, outer: Box) -> Box:
    """Return a box counted from the first element of ``outer`` in the logical tensor's own numbers."""
    return Box(tuple(a + b for a, b in zip(box.offset, outer.offset, strict=True)), box.extent)
