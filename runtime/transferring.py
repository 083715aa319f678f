"""The transfer of a sync: its schedule's tasks dispatched, and what their members answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from wavecast.runtime.cluster import RayActors
from wavecast.runtime.notices import Notices, listening
from wavecast.runtime.options import SyncOptions
from wavecast.runtime.plan.tasks import task_ends
from wavecast.runtime.preparation import Preparation
from wavecast.runtime.request import Progress
from wavecast.runtime.transfer.comm import Deadline
from wavecast.runtime.transfer.messages import Finished, RunId, RunStep, StepDone
from wavecast.scheduler import RunReport, Task, run

__all__ = ("TransferPhase",)


@dataclass(slots=True)
class TransferPhase:
    """
    Asks the members of tasks for their steps.

    What an actor answers is noted as it comes: what one member of a task has done stands, whatever becomes of the
    others.

    :ivar name: of the run
    :ivar touched: is given the destination actors that tasks are dispatched to
    :ivar finished: what each actor said with its last step
    :ivar closed: the actors on which the run is over
    """

    actors: RayActors
    name: RunId
    options: SyncOptions
    deadline: Deadline
    touched: set[int]
    finished: dict[int, Finished] = field(default_factory=dict)
    closed: set[int] = field(default_factory=set)

    async def go_through(
        self,
        preparation: Preparation,
        abort: Callable[[tuple[Task, ...]], Awaitable[None]],
        *,
        abort_seconds: float,
        progress: Progress | None,
    ) -> RunReport:
        """
        Run the whole schedule.

        :param abort: is called with what was under way when the run fails; has ``abort_seconds``
        :raises RunError: when a task failed or was late, or the deadline has passed
        """
        options, allowed = self.options, None
        if options.task_allowance is not None:
            # A task may have to wait at an actor for those it was given before.
            allowed = options.link.allow(factor=options.task_allowance * preparation.in_flight)

        with listening() as notices:
            return await run(
                preparation.driven,
                lambda task: self._dispatch(task, preparation, notices),
                lookahead=options.lookahead,
                deadline=self.deadline.left,
                abort=abort,
                in_flight=preparation.in_flight,
                abort_seconds=abort_seconds,
                on_receipt=progress,
                task_seconds=allowed,
            )

    def _dispatch(self, task: Task, preparation: Preparation, notices: Notices | None) -> Awaitable[list[StepDone]]:
        """Ask all members. At once: calls must reach each actor in the order of the dispatches."""
        self.touched.update(task_ends(task)[1])
        refs = [
            self.actors.start(
                member,
                RunStep(self.name, preparation.step_of[member][task.id], preparation.digest, self.deadline.left),
                notices=notices,
            )
            for member in task.members
        ]
        return self.actors.hear(refs, StepDone, lambda place, reply: self._note(task.members[place], reply))

    def _note(self, actor: int, reply: StepDone) -> None:
        if reply.finished is not None:
            self.finished[actor] = reply.finished

        if reply.closed:
            self.closed.add(actor)
