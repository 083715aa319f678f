"""Run a schedule: every await of a run is here, every decision in :mod:`~wavecast.scheduler.release`."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine

import anyio
from anyio.lowlevel import checkpoint

from wavecast.scheduler.errors import RunTimeout, ScheduleError, TaskFailed, TaskTimeout
from wavecast.scheduler.pacing import TimeSlice
from wavecast.scheduler.receipt import RunReport, TaskReceipt, WaveReceipt
from wavecast.scheduler.release import ReleaseState
from wavecast.scheduler.schedule import Schedule
from wavecast.scheduler.task import Task

__all__ = ("run",)

logger = logging.getLogger(__name__)

# A task that awaits its dispatch also takes on the next one; after so many it lets others run, had nothing suspended
# it.
_CHAIN = 16
# Batches up to this size are dispatched without a pause.
_BATCH = 4


async def run(
    schedule: Schedule,
    dispatch: Callable[[Task], Awaitable[object]],
    *,
    lookahead: int | None = None,
    deadline: float | None = None,
    abort: Callable[[tuple[Task, ...]], Awaitable[object]] | None = None,
    in_flight: int = 1,
    abort_seconds: float = 0.8,
    on_receipt: Callable[[TaskReceipt], object] | None = None,
    task_seconds: Callable[[Task], float] | None = None,
) -> RunReport:
    """
    Dispatch every task of ``schedule`` and await them all.

    ``dispatch`` is called once a task, from the event loop, and for each actor in wave order. Calls are made ahead of
    the barrier between waves: a task goes as soon as its own members are free and the tasks it comes after have
    finished.

    When a task fails, the deadline passes or the caller is cancelled, all dispatches in flight are cancelled and
    ``abort`` is called once, shielded from cancellation, while they wind down. Nothing is left running when this
    function is left: hence a dispatch that resists its cancellation, or blocks the event loop, holds it up for as long
    as it pleases, past any deadline.

    On asyncio the abort is shielded from anyio's cancellations, and from one call of :meth:`asyncio.Task.cancel`, the
    one that ended the run. A second such call while it is under way cuts it short: nothing can shield from those.

    With ``in_flight`` above 1 an actor's tasks must be handed to it in the order of the calls of ``dispatch``. A plain
    function that submits them and returns what to await does so. The body of an ``async def`` begins later: on asyncio
    in the order of the calls, as it starts tasks first in, first out; on trio in no order.

    :param dispatch: start a task and return what to await; must be open to cancellation. Best a plain function
    :param lookahead: how many waves past the oldest unfinished one may start: ``None`` for any, 0 for a strict barrier
    :param deadline: seconds for the whole run
    :param abort: gets the tasks in flight, a failed one first
    :param in_flight: unfinished tasks an actor (in the full port model, each of its ports) may have; with more than
        one, an actor must work its tasks off in the order of the calls
    :param abort_seconds: after so many seconds ``abort`` is cancelled
    :param on_receipt: called as each task finishes; what it raises fails the task
    :param task_seconds: seconds to allow for a task, from its dispatch
    :return: receipts by wave, in task order
    :raises TaskFailed: when a dispatch failed; the failure is its cause, and later ones are kept beside it
    :raises TaskTimeout: when a task took longer than ``task_seconds``
    :raises RunTimeout: when the deadline passed
    :raises ScheduleError: when a task of ``schedule`` has no sender or receiver, or comes after one that is in no
        earlier wave
    :raises ValueError: for a negative ``lookahead``, an ``in_flight`` below 1, and for a ``deadline`` or
        ``abort_seconds`` that is no number
    """
    for name, seconds in (("deadline", deadline), ("abort_seconds", abort_seconds)):
        if seconds is not None and not (isinstance(seconds, (int, float)) and seconds == seconds):
            raise ValueError(f"{name} is {seconds!r}: it must be a number of seconds")

    state = ReleaseState(schedule.order, lookahead=lookahead, in_flight=in_flight)
    if not schedule.tasks:
        return RunReport(0.0, tuple(WaveReceipt(index, ()) for index in range(len(schedule.waves))))

    execution = _Execution(schedule, state, dispatch, in_flight, on_receipt, task_seconds)
    return await execution.run(deadline, abort, abort_seconds)


class _Execution:
    """
    One run. Its mutable state is the release state, the tasks in flight, and what came of the others.
    """

    def __init__(
        self,
        schedule: Schedule,
        state: ReleaseState,
        dispatch: Callable[[Task], Awaitable[object]],
        in_flight: int,
        on_receipt: Callable[[TaskReceipt], object] | None,
        task_seconds: Callable[[Task], float] | None,
    ) -> None:
        self._schedule = schedule
        self._tasks = schedule.tasks
        self._waves = schedule.order.waves
        self._state = state
        self._dispatch = dispatch
        self._in_flight = in_flight
        self._on_receipt = on_receipt
        self._task_seconds = task_seconds
        self._receipts: list[TaskReceipt | None] = [None] * len(self._tasks)
        self._failures: list[tuple[int, BaseException]] = []
        self._failed: int | None = None  # position of the task that ended the run, if one did
        self._active: dict[int, float] = {}  # position of each task in flight, and when it was dispatched
        self._ready: deque[int] = deque()  # released, not dispatched yet
        self._unawaited: dict[int, Awaitable[object]] = {}  # dispatched, and nobody awaits it yet
        self._dispatching = False
        self._stopped = False  # winding down: nothing is dispatched nor counted as finished any more
        self._slice = TimeSlice()
        self._over = anyio.Event()  # all finished, or one failed
        self._group = anyio.create_task_group()
        self._epoch = anyio.current_time()

    async def run(
        self,
        deadline: float | None,
        abort: Callable[[tuple[Task, ...]], Awaitable[object]] | None,
        abort_seconds: float,
    ) -> RunReport:
        abort_error: Exception | None = None
        try:
            async with self._group:
                try:
                    with anyio.move_on_after(deadline):
                        self._ready.extend(self._state.start())
                        await self._dispatch_ready(keep=False)
                        await self._over.wait()
                finally:
                    # Three ways lead here with tasks unfinished: a failure, the deadline, a cancelled caller.
                    if self._state.unfinished:
                        self._stopped = True
                        self._failed = self._failures[0][0] if self._failures else None
                        aborted = self._tasks_in_flight()
                        self._group.cancel_scope.cancel()
                        if abort is not None and aborted:
                            abort_error = await _call_abort(abort, aborted, abort_seconds)
        finally:
            self._discard_unawaited()

        if self._state.unfinished:
            raise self._error(deadline, abort_error)

        return self._report()

    async def _dispatch_ready(self, *, keep: bool) -> int | None:
        """
        Dispatch what is ready, unless that is being done already.

        :param keep: whether the caller will follow a task
        :return: a dispatched task left to the caller to follow
        """
        if self._dispatching or not self._ready:
            return None

        # Going on with one of them in the same asyncio task saves starting one. Not so in a long batch, which may pause
        # and would leave it alone; nor when it might overtake tasks of its actors, dispatched earlier but not begun.
        kept: int | None = None
        keeping = keep and len(self._ready) <= _BATCH and (self._in_flight == 1 or not self._unawaited)
        keeping = not self._slice.is_over() and keeping
        self._dispatching = True
        try:
            while self._ready and not self._failures and not self._stopped:
                if not keeping and self._slice.is_over():
                    await checkpoint()
                    self._slice.paused()
                    continue

                position = self._ready.popleft()
                if not self._start(position):
                    break

                if keeping and kept is None:
                    kept = position
                else:
                    self._group.start_soon(self._follow, position)

                self._slice.worked()
        finally:
            self._dispatching = False

        return kept

    def _start(self, position: int) -> bool:
        self._active[position] = anyio.current_time()
        try:
            self._unawaited[position] = self._dispatch(self._tasks[position])
        except (Exception, anyio.get_cancelled_exc_class()) as exc:
            # A plain call awaits nothing: a cancellation out of it is not ours nor the caller's, but its own failure.
            self._fail(position, exc)
            return False

        return True

    async def _follow(self, position: int | None) -> None:
        """Await a dispatched task, dispatch what it set free, and go on with one of those."""
        followed = 0
        while position is not None:
            if self._stopped:
                # Handed over before, and not begun: a coroutine's calls must not come after those of the abort.
                return

            try:
                if self._task_seconds is None:
                    value = await self._unawaited.pop(position)
                else:
                    value = await self._await_within(position, self._task_seconds(self._tasks[position]))

                self._finish(position, value)
            except Exception as exc:
                self._fail(position, exc)
                return
            except anyio.get_cancelled_exc_class() as exc:
                # Not our doing nor the caller's: somebody cancelled what was awaited. Left alone, nobody would notice.
                if anyio.current_effective_deadline() == float("-inf"):
                    raise

                self._fail(position, exc)
                return

            followed += 1
            if followed % _CHAIN == 0:
                await checkpoint()

            position = await self._dispatch_ready(keep=True)

    async def _await_within(self, position: int, seconds: float) -> object:
        with anyio.move_on_after(seconds):
            return await self._unawaited.pop(position)

        raise _Overdue(seconds)

    def _finish(self, position: int, value: object) -> None:
        if self._stopped:
            return

        started = self._active[position]
        receipt = TaskReceipt(
            self._tasks[position].id,
            self._waves[position],
            self._tasks[position].nbytes,
            started - self._epoch,
            anyio.current_time() - self._epoch,
            value,
        )
        if self._on_receipt is not None:
            self._on_receipt(receipt)

        del self._active[position]
        self._receipts[position] = receipt
        self._ready.extend(self._state.finish(position))
        if not self._state.unfinished:
            self._over.set()

    def _fail(self, position: int, exc: BaseException) -> None:
        self._failures.append((position, exc))
        self._over.set()

    def _tasks_in_flight(self) -> tuple[Task, ...]:
        positions = list(self._active)
        if self._failed is not None:
            positions.remove(self._failed)
            positions.insert(0, self._failed)

        return tuple(self._tasks[position] for position in positions)

    def _discard_unawaited(self) -> None:
        for awaitable in self._unawaited.values():
            if isinstance(awaitable, Coroutine):
                awaitable.close()
            elif callable(cancel := getattr(awaitable, "cancel", None)):
                cancel()

        self._unawaited.clear()

    def _error(self, deadline: float | None, abort_error: Exception | None) -> Exception:
        receipts = tuple(receipt for receipt in self._receipts if receipt is not None)
        if self._failed is None:
            if deadline is None:
                # Nothing failed and nothing was due: what is left waits for itself.
                return ScheduleError(f"{self._state.unfinished} of {len(self._tasks)} tasks were never set free")

            unfinished = tuple(t for t, r in zip(self._tasks, self._receipts, strict=True) if r is None)
            return RunTimeout(
                f"{len(unfinished)} of {len(self._tasks)} tasks were not finished after {deadline:g} s",
                deadline=deadline,
                unfinished=unfinished,
                receipts=receipts,
                others=tuple(exc for _, exc in self._failures),
                abort_error=abort_error,
            )

        (position, cause), *others = self._failures
        task = self._tasks[position]
        wave = self._waves[position]
        where = f"task {task.id} of wave {wave} ({task.senders} -> {task.receivers}, {task.nbytes} bytes)"
        kind, what = TaskFailed, f"failed: {cause!r}"
        if isinstance(cause, _Overdue):
            kind, what = TaskTimeout, f"was not finished after {cause.seconds:g} s"

        error = kind(
            f"{where} {what}",
            task=task,
            receipts=receipts,
            others=tuple(exc for _, exc in others),
            abort_error=abort_error,
        )
        error.__cause__ = cause
        return error

    def _report(self) -> RunReport:
        receipts = iter(receipt for receipt in self._receipts if receipt is not None)
        waves = tuple(
            WaveReceipt(index, tuple(next(receipts) for _ in wave.tasks))
            for index, wave in enumerate(self._schedule.waves)
        )
        return RunReport(max(wave.finished for wave in waves), waves)


class _Overdue(TimeoutError):
    """Raised inside a run when a task took longer than it was given."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"not finished after {seconds:g} s")
        self.seconds = seconds


async def _call_abort(
    abort: Callable[[tuple[Task, ...]], Awaitable[object]], tasks: tuple[Task, ...], seconds: float
) -> Exception | None:
    """Call ``abort``, shielded and bounded, and return what went wrong with it."""
    error: Exception | None = None
    with anyio.move_on_after(seconds, shield=True) as scope:
        try:
            await abort(tasks)
        except Exception as exc:
            error = exc

    if scope.cancelled_caught:
        error = TimeoutError(f"the abort did not return within {seconds:g} s")

    if error is not None:
        logger.warning("aborting %d tasks failed: %r", len(tasks), error)

    return error
