"""What travels: one box of a logical tensor, from one actor to others."""

from __future__ import annotations

from dataclasses import dataclass

from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.dtypes import itemsize

__all__ = ("Route", "is_castable")


@dataclass(frozen=True, slots=True)
class Route:
    """
    A box of a logical tensor that ``sender`` brings to every actor of ``receivers``.

    :ivar sender: the source actor that holds all of the box
    :ivar receivers: the destination actors that want it, ascending, each once
    :ivar tensor: the logical tensor's name
    :ivar offset: the box's first element, one number a dim of the logical tensor
    :ivar extent: the box's size, one number a dim
    :ivar dtype: of the bytes that travel: the destination's; the sender casts
    :ivar nbytes: elements times the dtype's size: what leaves the sender once and reaches each receiver
    """

    sender: int
    receivers: tuple[int, ...]
    tensor: str
    offset: tuple[int, ...]
    extent: tuple[int, ...]
    dtype: str
    nbytes: int

    @property
    def box(self) -> Box:
        """The elements that travel."""
        return Box(self.offset, self.extent)

    def cut(self, box: Box) -> Route:
        """Return the route of ``box``, a part of this one's, between the same actors."""
        nbytes = box.numel * itemsize(self.dtype)
        return Route(self.sender, self.receivers, self.tensor, box.offset, box.extent, self.dtype, nbytes)


def is_castable(source: str, destination: str) -> bool:
    """
    Tell whether a sender may cast elements of dtype ``source`` to ``destination``.

    Only within a kind (floating point, integer, complex, bool): across kinds a cast changes what a number means. Nor
    between float8 and anything else, one way or the other: such a weight means something only with its scales, which a
    cast knows nothing of, and scales in float8_e8m0fnu are powers of two, to which no other scale can be rounded.
    """
    if source != destination and (source.startswith("float8") or destination.startswith("float8")):
        return False

    return _kind(source) == _kind(destination)


def _kind(dtype: str) -> str:
    for kind, prefixes in _KINDS:
        if dtype.startswith(prefixes):
            return kind

    return dtype


_KINDS = (("float", ("float", "bfloat")), ("integer", ("int", "uint")), ("complex", ("complex",)))
