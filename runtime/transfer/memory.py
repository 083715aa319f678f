"""An actor's own tensors, addressed by boxes of logical tensors."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from copy import copy

import torch

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Computed, FixedShards, Shard
from wavecast.runtime.layout.sharing import find_sharing
from wavecast.runtime.naming import Renames
from wavecast.runtime.transfer.mapped import Mapped
from wavecast.runtime.transfer.program import Cut
from wavecast.runtime.transfer.segments import Strided
from wavecast.runtime.transfer.snapshot import Snapshot

__all__ = ("Memory", "Watch", "as_bits", "dtype_of", "count_nan", "strided")

#: To look at all of a large model's tensors takes milliseconds: the processor waits for each.
_SAMPLE = 16
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Memory:
    """
    The shards of one run, found by name.

    :param shards: as the actor's hook returned them, in order; of fixed ones a few are looked at where others all are
    :ivar sharing: which of them share memory
    :ivar signature: equal ones mean that the layout is what it was
    :ivar mapped: the allocations that others have mapped
    :raises LayoutError: for views without plain memory of their own, and when they are on several devices
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self._fixed = shards if isinstance(shards, FixedShards) else None
        self.device = _common_device(self.shards)
        for shard in self.shards:
            _require_plain(shard)

        self.sharing = find_sharing(
            shard.view if isinstance(shard.view, torch.Tensor) else None for shard in self.shards
        )
        self.signature = self.sharing, _signature(self.shards)
        self.mapped = Mapped()
        # What was received: a cut may be passed on, and another shard of the same name may not have been written.
        self._written: dict[Cut, torch.Tensor] = {}
        self._held = [shard for shard in self.shards if isinstance(shard.view, torch.Tensor)]
        self._snapshot = Snapshot([shard.view for shard in self._held if isinstance(shard.view, torch.Tensor)])
        self._sample = self._snapshot.part(range(0, len(self._held), max(len(self._held) // _SAMPLE, 1)))
        self._watched = self._snapshot if self._fixed is None else self._sample
        self._by_name = _by_name(self.shards, {})
        self._under: tuple[Renames, Memory] | None = None
        self._numbers: dict[int, int] = {}

    def under(self, renames: Renames) -> Memory:
        """Return the same memory, found by other names: those of a program's cuts. For the same object the same."""
        if not renames:
            return self

        if self._under is None or self._under[0] is not renames:
            other = copy(self)
            other._by_name = _by_name(self.shards, dict(renames))
            self._under = (renames, other)

        return self._under[1]

    def addresses(self) -> list[int]:
        """Return the address of each shard's first element, 0 where it has none."""
        return [shard.view.data_ptr() if isinstance(shard.view, torch.Tensor) else 0 for shard in self.shards]

    def holds_still(self, shards: Sequence[Shard]) -> bool:
        """
        Tell whether ``shards`` are the very objects this was made of, what and where they were, and in the very memory
        that others have mapped: nothing is to be redone.
        """
        if not (self._is_of(shards) and self._watched.is_still()):
            return False

        return self._fixed is not None or not self.mapped.changed()

    def seems_still(self, shards: Sequence[Shard]) -> bool:
        """
        Tell whether ``shards`` are the very objects this was made of and a few of them, which alone are looked at, are
        what and where they were. Tensors that move do so together.
        """
        return self._is_of(shards) and self._sample.is_still()

    def _is_of(self, shards: Sequence[Shard]) -> bool:
        if self._fixed is not None or isinstance(shards, FixedShards):
            return shards is self._fixed

        return len(shards) == len(self.shards) and all(map(operator.is_, shards, self.shards))

    def watch(self, cuts: Iterable[Cut], seen: set[int] | None = None) -> Watch:
        """
        Return what tells whether all tensors that hold one of ``cuts`` are what and where they were.

        :param seen: those that need not be looked at again; the others are added
        """
        return Watch(self, self._snapshot.part(self._chosen(cuts, seen)))

    def watch_lent(self, cuts: Iterable[Cut], seen: set[int]) -> Watch:
        """Return what tells the same of tensors that others have mapped, and of the allocations they are in."""
        numbers = self._chosen(cuts, seen)
        addresses = [self._snapshot.before[number].address for number in numbers if self._fixed is None]
        return Watch(self, self._snapshot.part(numbers), self.mapped.holding(addresses))

    def _chosen(self, cuts: Iterable[Cut], seen: set[int] | None) -> list[int]:
        """Return the numbers of the tensors to look at for ``cuts``; of fixed ones a single one."""
        if not self._numbers:
            self._numbers = {id(view): number for number, view in enumerate(self._snapshot.views)}

        held = (shard.view for cut in cuts for shard in self._holders(cut))
        found = dict.fromkeys(self._numbers[id(view)] for view in held if isinstance(view, torch.Tensor))
        numbers = [number for number in found if seen is None or number not in seen]
        if seen is not None:
            seen.update(numbers)

        return numbers if self._fixed is None else numbers[:1]

    def require_still(self) -> None:
        """
        Make sure that the shards are what and where they were when this was made.

        :raises LayoutError: naming one that is not
        """
        if not self._watched.is_still():
            self.refuse_changed()

    def refuse_changed(self) -> None:
        """
        Look at all of the shards.

        :raises LayoutError: naming one that is not what and where it was
        """
        for number, before, now in self._snapshot.differing():
            name = self._held[number].name
            raise LayoutError(
                f"{name!r} was changed during the sync: it was {before.dtype} of shape {tuple(before.shape)} "
                f"at {before.address:#x}, it is {now.dtype} of shape {tuple(now.shape)} at {now.address:#x}",
                tensor=name,
            )

        remade = self.mapped.changed() or range(0)
        for number, before in enumerate(self._snapshot.before):
            if before.address in remade:
                name = self._held[number].name
                raise LayoutError(
                    f"the memory of {name!r} at {before.address:#x} was freed and allocated anew: "
                    "others have mapped what it was before",
                    tensor=name,
                )

    def require_in_place(self) -> None:
        """
        Make sure that the shards are where they were: a quarter of :meth:`require_still`.

        :raises LayoutError: naming one that is not
        """
        if not self._watched.is_in_place():
            self.require_still()

    def source(self, cut: Cut) -> torch.Tensor:
        """
        Return what holds ``cut``: the view it was received into last, if it was.

        Otherwise of the first shard that has all of it, those in the cut's dtype before wider ones and those before
        others; a computed one works it out now.
        """
        written = self._written.get(cut)
        if written is not None:
            return written

        shard = self._holders(cut)[0]
        if isinstance(shard.view, Computed):
            start = tuple(a - b for a, b in zip(cut.offset, shard.offset, strict=True))
            return _require_promised(shard.view.read(Box(start, cut.extent)), shard.view, cut)

        return _narrow(shard.view, shard.offset, cut)

    def holds_as_is(self, cut: Cut) -> bool:
        """Tell whether what :meth:`source` returns has the bytes that travel: no cast, nothing to work out."""
        if cut in self._written:
            return True

        view = self._holders(cut)[0].view
        return isinstance(view, torch.Tensor) and view.dtype == dtype_of(cut.dtype)

    def targets(self, cut: Cut) -> list[torch.Tensor]:
        """Return every view that holds ``cut``: a tied weight may be held twice."""
        wanted = dtype_of(cut.dtype)
        views = [
            _narrow(shard.view, shard.offset, cut)
            for shard in self._holders(cut)
            if isinstance(shard.view, torch.Tensor) and shard.view.dtype == wanted
        ]
        if not views:
            raise LayoutError(f"no shard of {cut.tensor!r} can take dtype {cut.dtype}", tensor=cut.tensor)

        self._written[cut] = views[-1]
        return views

    def _holders(self, cut: Cut) -> list[Shard]:
        box = cut.box
        shards = [shard for held, shard in self._by_name.get(cut.tensor, ()) if held.contains(box)]
        if not shards:
            raise LayoutError(
                f"no shard holds {cut.tensor!r} at offset {cut.offset} with extent {cut.extent}: "
                "the actor's layout is not the one that was planned",
                tensor=cut.tensor,
            )

        if len(shards) > 1:
            # As the plan chose among actors: the dtype that travels, else the widest.
            wanted = dtype_of(cut.dtype)
            shards.sort(key=lambda shard: _preference(shard.view.dtype, wanted), reverse=True)

        return shards


class Watch:
    """
    Some of a memory's tensors as they were when that was made.

    :param snapshot: of the tensors
    :param mapped: the allocations they are in, where others have mapped those
    """

    def __init__(self, memory: Memory, snapshot: Snapshot, mapped: Sequence[int] = ()) -> None:
        self._memory = memory
        self._snapshot = snapshot
        self._mapped = mapped

    def require_still(self) -> None:
        """
        Make sure that the tensors are what and where they were.

        :raises LayoutError: naming one that is not
        """
        if not self._snapshot.is_still() or self._memory.mapped.changed(self._mapped):
            self._memory.refuse_changed()

    def require_in_place(self) -> None:
        """Make sure that they are where they were, for what has just been looked at as a whole."""
        if not self._snapshot.is_in_place():
            self._memory.refuse_changed()


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """
    View ``tensor`` as integers of the same size, strides kept.

    Copies of floating point values may rewrite NaN payloads (``torch._foreach_copy_`` on bfloat16 does); copies of
    integers never change a bit.
    """
    bits = _BITS.get(tensor.element_size())
    return tensor if bits is None or tensor.dtype == bits else tensor.view(bits)


def strided(view: torch.Tensor) -> Strided:
    """Return where the elements of ``view`` lie."""
    size = view.element_size()
    return Strided(view.data_ptr(), tuple(stride * size for stride in view.stride()))


def dtype_of(name: str) -> torch.dtype:
    """Return the torch dtype called ``name``."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise LayoutError(f"torch has no dtype called {name!r}")

    return dtype


def count_nan(shards: Sequence[Shard]) -> tuple[tuple[str, int], ...]:
    """Return the names of the tensors that hold NaN elements, and how many."""
    found: dict[str, int] = {}
    for shard in shards:
        if shard.view.dtype.is_floating_point or shard.view.dtype.is_complex:
            whole = Box((0,) * len(shard.offset), tuple(shard.view.shape))
            held = shard.view.read(whole) if isinstance(shard.view, Computed) else shard.view
            # float8 has no comparison of its own.
            view = held.float() if held.element_size() == 1 else held
            count = int(view.isnan().sum())
            if count:
                found[shard.name] = found.get(shard.name, 0) + count

    return tuple(found.items())


def _by_name(shards: Sequence[Shard], names: Mapping[str, tuple[str, ...]]) -> dict[str, list[tuple[Box, Shard]]]:
    found: dict[str, list[tuple[Box, Shard]]] = {}
    for shard in shards:
        box = shard.box
        for name in names.get(shard.name, (shard.name,)):
            found.setdefault(name, []).append((box, shard))

    return found


def _require_promised(found: object, computed: Computed, cut: Cut) -> torch.Tensor:
    """Refuse what a user's ``read`` returned if it is not what its shard has said: a cast would hide it."""
    if not isinstance(found, torch.Tensor):
        given = type(found).__name__
    elif tuple(found.shape) != cut.extent or found.dtype != computed.dtype:
        given = f"{tuple(found.shape)} in {found.dtype}"
    else:
        return found

    raise LayoutError(
        f"the computed shard of {cut.tensor!r} returned {given} where {cut.extent} in {computed.dtype} was asked for",
        tensor=cut.tensor,
    )


def _preference(dtype: torch.dtype, wanted: torch.dtype) -> tuple[bool, int, str]:
    return dtype == wanted, dtype.itemsize, str(dtype)


def _narrow(view: torch.Tensor, offset: tuple[int, ...], cut: Cut) -> torch.Tensor:
    if view.shape == cut.extent:
        return view

    for dim, (start, length) in enumerate(zip(cut.offset, cut.extent, strict=True)):
        if length != view.shape[dim]:
            view = view.narrow(dim, start - offset[dim], length)

    return view


def _require_plain(shard: Shard) -> None:
    """Refuse a view of which not every element is memory of its own, as it looks."""
    view = shard.view
    if isinstance(view, Computed):
        return

    why = ""
    if not isinstance(view, torch.Tensor):
        why = f"is of type {type(view).__name__}, not a torch.Tensor"
    elif type(view).__name__ == "DTensor":
        why = "is a DTensor, whose local part alone is memory: use the dtensor adapter"
    elif type(view).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        why = f"is a {type(view).__name__}, which wraps other tensors: give those as shards, or what it stands for"
    elif view.layout != torch.strided:
        why = f"is of layout {view.layout}, not strided"
    elif view.is_meta:
        why = "is on the meta device, without memory"
    elif view.is_conj() or view.is_neg():
        why = "is conjugated or negated as it is read: resolve it first"
    elif 0 in view.stride() and any(n > 1 and not step for n, step in zip(view.shape, view.stride(), strict=True)):
        why = "is expanded: several of its elements are one in memory"

    if why:
        raise LayoutError(f"the view of {shard.name!r} {why}", tensor=shard.name)


def _common_device(shards: Sequence[Shard]) -> torch.device:
    devices = sorted({str(shard.view.device) for shard in shards})
    if len(devices) > 1:
        raise LayoutError(f"an actor's shards must be on one device, these are on {', '.join(devices)}")

    return shards[0].view.device if shards else torch.device("cpu")


def _signature(shards: Sequence[Shard]) -> tuple[object, ...]:
    """Sum up what the shards are."""
    return tuple(
        (
            shard.name,
            shard.offset,
            shard.view.shape,
            shard.view.dtype,
            shard.global_shape,
            shard.trainable,
            isinstance(shard.view, Computed),
        )
        for shard in shards
    )
