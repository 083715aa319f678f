"""Which version an actor's weights are of, whether they are whole, and what a run writes to."""

from __future__ import annotations

from wavecast.runtime.transfer.memory import Memory
from wavecast.runtime.transfer.messages import Begin, Standing
from wavecast.runtime.transfer.program import Program
from wavecast.runtime.transfer.run import Run
from wavecast.runtime.transfer.shadow import Shadow

__all__ = ("Weights",)


class Weights:
    """
    What becomes of an actor's weights, run by run.

    A run writes to the weights themselves, which are torn from its first byte until its commit, or to a second copy,
    which its commit copies over them.

    :ivar version: last committed version, ``None`` before the first
    """

    def __init__(self) -> None:
        self._written_by: Run | None = None
        self._writing: int | None = None
        self._was_torn = False
        self._shadow: Shadow | None = None
        self._shadow_of: Memory | None = None
        self._in_shadow = False
        self._live: Memory | None = None
        self._received: dict[str, frozenset[str]] = {}
        self.version: int | None = None

    @property
    def torn(self) -> bool:
        """Whether a run has begun to write and was not committed. One that writes to a shadow tears nothing."""
        if self._in_shadow or self._written_by is None:
            return self._was_torn

        return self._written_by.wrote

    @property
    def standing(self) -> Standing:
        """Version and torn, as they are told to drivers."""
        return Standing(self.version, self.torn, self._writing if self.torn else None)

    @property
    def copy_bytes(self) -> int:
        """What the second copy takes, if there is one."""
        return self._shadow.nbytes if self._shadow is not None else 0

    def begin(self, request: Begin, live: Memory, before: Standing) -> Run:
        """
        Return the run that ``request`` begins.

        :param live: the weights themselves
        :param before: what was told of them as it came
        """
        memory = self._second_copy(live).memory if request.shadow else live
        run = Run(request.run, request.actor, memory)
        self._was_torn = before.torn
        self._in_shadow = request.shadow
        self._live = live if request.shadow else None
        run.wrote = before.torn and not request.shadow
        self._written_by = run
        if request.version is not None:
            self._writing = request.version

        return run

    def note_received(self, group: str, program: Program) -> None:
        """Note what the runs of ``group`` write from now on."""
        self._received[group] = _received(program)

    def require_committable(self) -> None:
        """Refuse a commit that could not be made whole: its flip would write to what is no longer there."""
        if self._in_shadow and self._live is not None:
            self._live.require_still()

    def commit(self, run: Run, version: int | None) -> float:
        """
        Let what ``run`` wrote stand; return the seconds that took.

        :param version: of the weights from now on; ``None``: they stay what they were
        """
        seconds = self._flip(run)
        if version is not None:
            self.version = version
            self._was_torn = False

        run.wrote = self._was_torn
        return seconds

    def forget(self, group: str) -> None:
        """Forget what the runs of ``group`` write."""
        self._received.pop(group, None)

    def drop_copy(self) -> None:
        """Give the second copy back."""
        self._shadow = None

    def let_go(self) -> None:
        """Keep no reference to the weights themselves between runs."""
        self._was_torn = self.torn
        self._shadow_of, self._written_by, self._live = None, None, None

    def _second_copy(self, live: Memory) -> Shadow:
        """Return what a run writes to in place of ``live``: allocated once a layout."""
        shadow, of = self._shadow, self._shadow_of
        if shadow is None or (live is not of and not shadow.fits(live.shards)):
            # The old one goes first: there may be no room for both.
            del shadow
            self._shadow = None
            shadow = self._shadow = Shadow(live.shards)

        self._shadow_of = live
        return shadow

    def _flip(self, run: Run) -> float:
        """Copy what a run wrote to the shadow over the weights. On the actor's own thread: its methods wait for it."""
        if not self._in_shadow or self._shadow is None or self._live is None or not run.wrote:
            return 0.0

        self._live.require_still()

        was_torn, self._was_torn = self._was_torn, True
        seconds = self._shadow.flip(self._live.shards, self._received.get(run.name.group, frozenset()))
        self._was_torn, self._live = was_torn, None
        return seconds


def _received(program: Program) -> frozenset[str]:
    """Return the actor's own names of the tensors that a program writes."""
    steps = (step for step in program.steps if program.actor in step.receivers)
    written = {cut.tensor for step in steps for cut in step.cuts}
    renamed = dict(program.renames)
    own = {name for name, logical in renamed.items() if not written.isdisjoint(logical)}
    return frozenset(own | (written - renamed.keys()))
