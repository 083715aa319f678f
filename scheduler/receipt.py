"""What really happened: one receipt a task, one a wave, one report a run."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ("TaskReceipt", "WaveReceipt", "RunReport")


@dataclass(frozen=True, slots=True)
class TaskReceipt:
    """
    One finished task.

    :ivar task: the task's id
    :ivar wave: index of its wave
    :ivar nbytes: the task's bytes
    :ivar started: seconds from the start of the run to its dispatch
    :ivar finished: seconds from the start of the run to its end
    :ivar value: what its dispatch returned
    """

    task: int
    wave: int
    nbytes: int
    started: float
    finished: float
    value: object = None

    @property
    def seconds(self) -> float:
        """How long it was in flight."""
        return self.finished - self.started


@dataclass(frozen=True, slots=True)
class WaveReceipt:
    """
    One finished wave.

    :ivar wave: the wave's index
    :ivar receipts: in task order, not in order of completion
    """

    wave: int
    receipts: tuple[TaskReceipt, ...]

    @property
    def nbytes(self) -> int:
        """Sum of its tasks' bytes."""
        return sum(receipt.nbytes for receipt in self.receipts)

    @property
    def started(self) -> float:
        """Seconds from the start of the run to its first dispatch."""
        return min((receipt.started for receipt in self.receipts), default=0.0)

    @property
    def finished(self) -> float:
        """Seconds from the start of the run to the end of its last task."""
        return max((receipt.finished for receipt in self.receipts), default=0.0)

    @property
    def seconds(self) -> float:
        """From its first dispatch to its last end; waves overlap when the run looked ahead."""
        return self.finished - self.started


@dataclass(frozen=True, slots=True)
class RunReport:
    """
    A run that finished every task.

    :ivar seconds: from the call to the end of the last task
    :ivar waves: one receipt a wave, in wave order
    """

    seconds: float
    waves: tuple[WaveReceipt, ...]

    @property
    def receipts(self) -> tuple[TaskReceipt, ...]:
        """All task receipts, in schedule order."""
        return tuple(receipt for wave in self.waves for receipt in wave.receipts)

    @property
    def nbytes(self) -> int:
        """Sum of all tasks' bytes."""
        return sum(wave.nbytes for wave in self.waves)
