"""What and where tensors were, and whether they still are: without a line of Python for each."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

__all__ = ("Likeness", "Snapshot")

_DTYPE = operator.attrgetter("dtype")


class Likeness(NamedTuple):
    """What and where one tensor is."""

    address: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, view: torch.Tensor) -> Likeness:
        """Return that of ``view`` now."""
        return cls(view.data_ptr(), view.size(), view.stride(), view.dtype)


class Snapshot:
    """
    Tensors as they were.

    A storage may move under a tensor (offloaded and reloaded, freed and unsharded), and a tensor may be given another
    shape, other strides, another dtype: all of it shows. For many thousands of tensors to look at them is most of what
    a warm sync costs an actor's host.

    :param views: the tensors
    :param before: what and where each of them was; ``None``: as they are now
    """

    def __init__(self, views: Sequence[torch.Tensor], before: Sequence[Likeness] | None = None) -> None:
        self.views = list(views)
        self.before = [Likeness.of(view) for view in views] if before is None else list(before)
        self._addresses = [each.address for each in self.before]
        self._shapes = [each.shape for each in self.before]
        self._dtypes = [each.dtype for each in self.before]
        # A contiguous tensor of the same shape has the same strides, but for dims of one element, where they are none.
        dense = [view.is_contiguous() for view in self.views]
        others = [not each for each in dense]
        self._dense = list(itertools.compress(self.views, dense))
        self._strided = list(itertools.compress(self.views, others))
        self._strides = [each.stride for each in itertools.compress(self.before, others)]

    def part(self, numbers: Iterable[int]) -> Snapshot:
        """Return that of some of the tensors, as they were when this was made."""
        chosen = list(numbers)
        return Snapshot([self.views[number] for number in chosen], [self.before[number] for number in chosen])

    def is_still(self) -> bool:
        """Tell whether all tensors are what and where they were."""
        return (
            self.is_in_place()
            and all(map(operator.eq, map(torch.Tensor.size, self.views), self._shapes))
            and all(map(torch.Tensor.is_contiguous, self._dense))
            and all(map(operator.eq, map(torch.Tensor.stride, self._strided), self._strides))
            and all(map(operator.is_, map(_DTYPE, self.views), self._dtypes))
        )

    def is_in_place(self) -> bool:
        """Tell whether all tensors are where they were: a quarter of :meth:`is_still`."""
        return all(map(operator.eq, map(torch.Tensor.data_ptr, self.views), self._addresses))

    def differing(self) -> Iterator[tuple[int, Likeness, Likeness]]:
        """Yield the number of each tensor that has changed, with what it was and what it is."""
        for number, (view, before) in enumerate(zip(self.views, self.before, strict=True)):
            now = Likeness.of(view)
            if now != before:
                yield number, before, now
