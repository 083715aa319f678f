"""How many actors a model is spread over, along which axes, and which actor sits where."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wavecast.runtime.errors import ConfigError

__all__ = ("MeshSpec", "Coordinates", "split_even")

_AXES = ("tp", "pp", "dp", "ep", "etp")


@dataclass(frozen=True, slots=True)
class Coordinates:
    """
    Where one rank sits.

    The dense axes and the expert axes number the same actors of a stage twice:
    ``tp + tp_size * dp == etp + etp_size * (ep + ep_size * edp)``.

    :ivar tp: index along tensor parallelism
    :ivar dp: index along data parallelism (ranks that differ only here hold the same dense tensors)
    :ivar pp: pipeline stage
    :ivar etp: index along the split of one expert's matrices
    :ivar ep: index along the split of the experts
    :ivar edp: index along expert data parallelism (ranks that differ only here hold the same experts)
    """

    tp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int


@dataclass(frozen=True, slots=True)
class MeshSpec:
    """
    Sizes of the parallel axes of one model, folded the way Megatron folds them.

    A pipeline stage has ``tp * dp`` actors. Its dense tensors are split over ``tp`` and repeated ``dp`` times; its
    experts are split over ``ep`` of the same actors, each expert's matrices over ``etp``, and the whole repeated
    ``tp * dp / (ep * etp)`` times.

    :ivar tp: tensor parallelism
    :ivar pp: pipeline stages
    :ivar dp: copies of the dense tensors
    :ivar ep: parts of the set of experts
    :ivar etp: parts of each expert's matrices; left at 0 it becomes the largest divisor of ``tp`` for which
        ``ep * etp`` divides ``tp * dp``: ``tp`` itself wherever that is possible
    :raises ConfigError: for a size that is not a positive integer, or when ``ep * etp`` does not divide ``tp * dp``
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 0

    def __post_init__(self) -> None:
        if self.etp == 0:
            object.__setattr__(self, "etp", self._default_etp())

        for axis in _AXES:
            size: object = getattr(self, axis)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ConfigError(f"mesh axis {axis}={size!r} is not a positive integer")

        if self.stage_size % (self.ep * self.etp):
            raise ConfigError(
                f"ep={self.ep} times etp={self.etp} does not divide the "
                f"tp={self.tp} times dp={self.dp} actors of a pipeline stage"
            )

    @classmethod
    def parse(cls, text: str) -> MeshSpec:
        """
        Read ``"tp=2,pp=2,dp=2,ep=4,etp=1"``; axes left out are 1 (``etp``: see above), the empty string is one actor.

        ``str()`` of the result reads back as the same mesh.

        :raises ConfigError: naming the axis and its value
        """
        sizes: dict[str, int] = {}
        for item in text.split(",") if text.strip() else ():
            axis, equals, value = (part.strip() for part in item.partition("="))
            if axis not in _AXES or not equals:
                raise ConfigError(
                    f"mesh {text!r}: {item.strip()!r} is not AXIS=SIZE with an axis of {', '.join(_AXES)}"
                )

            if axis in sizes:
                raise ConfigError(f"mesh {text!r}: {axis} is given twice, as {sizes[axis]} and as {value}")

            # Nine digits are more actors than there are; more would only feed int() without end.
            if not (value.isascii() and value.isdecimal() and len(value) <= 9 and int(value) > 0):
                raise ConfigError(f"mesh {text!r}: {axis}={value!r} is not a positive integer")

            sizes[axis] = int(value)

        return cls(**sizes)

    def __str__(self) -> str:
        shown = {axis: int(getattr(self, axis)) for axis in _AXES[:-1] if getattr(self, axis) != 1}
        if self.etp != MeshSpec(self.tp, self.pp, self.dp, self.ep).etp:
            shown["etp"] = self.etp

        return ",".join(f"{axis}={size}" for axis, size in shown.items()) or "tp=1"

    @property
    def world_size(self) -> int:
        """How many actors there are."""
        return self.tp * self.pp * self.dp

    @property
    def stage_size(self) -> int:
        """How many actors a pipeline stage has."""
        return self.tp * self.dp

    def coordinates(self, rank: int) -> Coordinates:
        """
        Return where ``rank`` sits.

        In Megatron's order the dense axes are numbered with tp fastest, then dp, then pp:
        ``rank = tp + tp_size * (dp + dp_size * pp)``; within a stage the expert axes with etp fastest, then ep, then
        edp.

        :raises ValueError: when ``rank`` is not in ``range(world_size)``
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in a world of {self.world_size}")

        pp, local = divmod(rank, self.stage_size)
        dp, tp = divmod(local, self.tp)
        rest, etp = divmod(local, self.etp)
        edp, ep = divmod(rest, self.ep)
        return Coordinates(tp=tp, dp=dp, pp=pp, etp=etp, ep=ep, edp=edp)

    def _default_etp(self) -> int:
        try:
            return math.gcd(self.tp, self.stage_size // self.ep) or 1
        except (TypeError, ZeroDivisionError):
            return 1  # an axis is no positive integer: the check that follows names it


def split_even(n: int, parts: int, index: int) -> tuple[int, int]:
    """
    Return ``(start, stop)`` of part ``index`` when ``n`` things go to ``parts`` as evenly as possible.

    The first ``n % parts`` parts get one more than the others: ``numpy.array_split``'s rule.

    :raises ValueError: when ``index`` is not in ``range(parts)``
    """
    if not 0 <= index < parts:
        raise ValueError(f"part {index} is not among {parts} parts")

    size, extra = divmod(n, parts)
    start = index * size + min(index, extra)
    return start, start + size + (index < extra)
