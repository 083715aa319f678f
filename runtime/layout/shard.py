"""What an actor says of its memory: shards with it, pieces and layouts without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.sharing import NOT_SHARED, Sharing, find_sharing

if TYPE_CHECKING:
    import torch

__all__ = ("Shard", "FixedShards", "Computed", "Piece", "Place", "Layout", "describe")


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """
    Stands in for a source's view whose elements are worked out as they are sent: a merged adapter, a quantised weight.

    :ivar shape: of the view
    :ivar dtype: of its elements
    :ivar device: where :attr:`read` returns them
    :ivar read: returns the elements of a box, offsets counted from the view's own first element, as a tensor of that
        shape, dtype and device, which is checked; called on the transfer's thread, with the transfer's stream current
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    read: Callable[[Box], torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """
    A strided view of local memory that sits at ``offset`` of a logical tensor.

    :ivar name: the logical tensor's name in a Hugging Face checkpoint
    :ivar view: local elements, of any strides and device; its shape is the shard's extent. A source may give a
        :class:`Computed` in its place
    :ivar offset: where the view's first element sits in the logical tensor, one number a dim
    :ivar global_shape: the logical tensor's shape
    :ivar trainable: at a source, training may change these elements: ``group.sync(only="trainable")`` passes over
        tensors that are not
    :raises LayoutError: when the view does not fit in the logical tensor, or name, view or offset are of another type
    """

    name: str
    view: torch.Tensor | Computed
    offset: tuple[int, ...]
    global_shape: tuple[int, ...]
    trainable: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        _check_types(self.name, self.view, self.offset)
        object.__setattr__(self, "offset", tuple(self.offset))
        object.__setattr__(self, "global_shape", tuple(self.global_shape))
        _check_fit(self.name, self.offset, tuple(self.view.shape), self.global_shape)

    @property
    def box(self) -> Box:
        """The box of the logical tensor that the view holds."""
        return Box(self.offset, tuple(self.view.shape))


class FixedShards(tuple[Shard, ...]):
    """
    Shards of which the caller promises that their tensors stay what and where they are.

    What an actor's hook returns is looked at tensor by tensor in every sync, for one may have moved: with many
    thousands of small ones that is most of what a sync costs its host. A hook that returns the very same object of this
    class again says that none has moved, been freed, resized or given another dtype or shape since it did so first:
    engines whose CUDA graphs have recorded the addresses can say so. A few tensors are looked at all the same, and an
    object made anew is looked at as a whole.

    If the promise is broken, bytes are read from, and written to, where the tensors have been.
    """

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """
    A shard without its memory: what the planner sees.

    :ivar tensor: the logical tensor's name
    :ivar box: the elements held
    :ivar global_shape: the logical tensor's shape
    :ivar dtype: the name of the elements' dtype, such as ``"bfloat16"``
    """

    tensor: str
    box: Box
    global_shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Place:
    """
    Where an actor's memory is; equal places make neighbours.

    :ivar node: the node's id
    :ivar device: the device's own id (a GPU's UUID), or ``"cpu"``
    """

    node: str
    device: str


@dataclass(frozen=True, slots=True)
class Layout:
    """
    All that one actor holds.

    :ivar pieces: in the order the actor gave its shards
    :ivar place: where, if known: the planner prefers near senders
    :ivar frozen: names of the tensors held of which no shard is trainable, in the order of the pieces
    :ivar computed: names of the tensors held of which some shard is worked out as it is sent
    :ivar sharing: which pieces lie on the same memory, by their position in :attr:`pieces`
    """

    pieces: tuple[Piece, ...]
    place: Place | None = None
    frozen: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()
    sharing: Sharing = NOT_SHARED


def describe(shards: Iterable[Shard], *, place: Place | None = None, sharing: Sharing | None = None) -> Layout:
    """
    Return the layout of ``shards``: names, boxes, dtypes, what is frozen, computed or shared, but no memory.

    :param sharing: what is shared, for whoever has found it already
    :raises LayoutError: for what is no list of shards
    """
    shards = _require_shards(shards)
    pieces: list[Piece] = []
    frozen: dict[str, None] = {}
    computed: dict[str, None] = {}
    trained: set[str] = set()
    for shard in shards:
        pieces.append(Piece(shard.name, shard.box, shard.global_shape, str(shard.view.dtype).removeprefix("torch.")))
        if shard.trainable:
            trained.add(shard.name)
        else:
            frozen[shard.name] = None

        if isinstance(shard.view, Computed):
            computed[shard.name] = None

    if sharing is None:
        sharing = find_sharing(None if isinstance(shard.view, Computed) else shard.view for shard in shards)

    return Layout(tuple(pieces), place, tuple(name for name in frozen if name not in trained), tuple(computed), sharing)


def _require_shards(shards: object) -> list[Shard]:
    """
    Return ``shards`` as a list.

    :raises LayoutError: naming what is no list, or no shard
    """
    if not isinstance(shards, Iterable):
        raise LayoutError(f"a {type(shards).__name__} is no list of shards")

    found = list(shards)
    for index, shard in enumerate(found):
        if not isinstance(shard, Shard):
            raise LayoutError(f"number {index} of the shards is a {type(shard).__name__}")

    return found


def _check_types(name: object, view: object, offset: object) -> None:
    if not isinstance(name, str):
        raise LayoutError(f"a shard's name is {name!r}, it must be a string")

    if not (hasattr(view, "shape") and hasattr(view, "dtype")):
        raise LayoutError(f"the view of {name!r} is of type {type(view).__name__}, not a tensor", tensor=name)

    if not isinstance(offset, Sequence) or not all(isinstance(start, int) for start in offset):
        raise LayoutError(f"the offset of {name!r} is {offset!r}, it must be integers, one a dim", tensor=name)


def _check_fit(name: str, offset: tuple[int, ...], extent: tuple[int, ...], shape: tuple[int, ...]) -> None:
    fits = len(offset) == len(extent) == len(shape) and all(
        0 <= a and a + n <= size for a, n, size in zip(offset, extent, shape, strict=False)
    )
    if not fits:
        raise LayoutError(
            f"shard of {name!r} at offset {offset} with extent {extent} does not fit in global shape {shape}",
            tensor=name,
        )
