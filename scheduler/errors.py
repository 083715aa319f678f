"""Every error a caller of the scheduler can act on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wavecast.scheduler.receipt import TaskReceipt
    from wavecast.scheduler.task import Task

__all__ = ("SchedulerError", "ScheduleError", "RunError", "TaskFailed", "TaskTimeout", "RunTimeout")


class SchedulerError(Exception):
    """Base of the scheduler's own errors."""


class ScheduleError(SchedulerError):
    """
    Raised for tasks that cannot be scheduled, and for a schedule that does not do what its tasks ask.

    :ivar tasks: ids of the tasks concerned
    """

    def __init__(self, message: str, *, tasks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.tasks = tasks


class RunError(SchedulerError):
    """
    Raised when a run did not finish every task. Base of every failure of a run.

    :ivar receipts: of the tasks that did finish, in schedule order
    :ivar others: failures that came after the first one, while the run was winding down
    :ivar abort_error: what the abort itself raised, or the :exc:`TimeoutError` of an abort that overran
    """

    def __init__(
        self,
        message: str,
        *,
        receipts: tuple[TaskReceipt, ...] = (),
        others: tuple[BaseException, ...] = (),
        abort_error: Exception | None = None,
    ) -> None:
        if abort_error is not None:
            message = f"{message}; the abort failed too: {abort_error!r}"

        super().__init__(message)
        self.receipts = receipts
        self.others = others
        self.abort_error = abort_error

    def __reduce__(self) -> tuple[object, ...]:
        # Constructors take more than the message, so the default way back from a pickle would not fit them.
        return _restore, (type(self), self.args), self.__dict__


class TaskFailed(RunError):
    """
    Raised when a task's dispatch failed; the first failure of the run is its ``__cause__``.

    :ivar task: the task that failed first
    """

    def __init__(
        self,
        message: str,
        *,
        task: Task,
        receipts: tuple[TaskReceipt, ...] = (),
        others: tuple[BaseException, ...] = (),
        abort_error: Exception | None = None,
    ) -> None:
        super().__init__(message, receipts=receipts, others=others, abort_error=abort_error)
        self.task = task


class TaskTimeout(TaskFailed):
    """Raised when one task took longer than the seconds it was given."""


class RunTimeout(RunError):
    """
    Raised when a run was not over by its deadline.

    :ivar deadline: the seconds it was given
    :ivar unfinished: tasks without a receipt, in schedule order, in flight or not yet dispatched
    """

    def __init__(
        self,
        message: str,
        *,
        deadline: float,
        unfinished: tuple[Task, ...],
        receipts: tuple[TaskReceipt, ...] = (),
        others: tuple[BaseException, ...] = (),
        abort_error: Exception | None = None,
    ) -> None:
        super().__init__(message, receipts=receipts, others=others, abort_error=abort_error)
        self.deadline = deadline
        self.unfinished = unfinished


def _restore(cls: type[RunError], args: tuple[object, ...]) -> RunError:
    error = cls.__new__(cls)
    error.args = args
    return error
