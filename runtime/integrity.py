"""Whether what arrived is what was sent: by the checksums of both ends, or element by element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import anyio

from wavecast.runtime import errors
from wavecast.runtime.cluster import RayActors
from wavecast.runtime.plan.tasks import task_ends
from wavecast.runtime.preparation import Preparation
from wavecast.runtime.transfer.messages import Compare, Done, Excerpt, Finished, Probe, RunId
from wavecast.scheduler import Task, TaskReceipt

__all__ = ("ValidationReceipt", "compare_checksums", "own_code_failed", "validate")


@dataclass(frozen=True, slots=True)
class ValidationReceipt(TaskReceipt):
    """
    One task whose bytes were compared at all its receivers.

    Seconds count from the start of the validation, to when the comparison began and ended.
    """


async def validate(
    actors: RayActors, run: RunId, preparation: Preparation, progress: Callable[[TaskReceipt], object] | None = None
) -> None:
    """
    Compare, task by task, what receivers hold with what the sender holds, over Ray's object store.

    :param progress: called with a :class:`ValidationReceipt` as each task has been compared
    :raises ValidationError: naming the first tensor that differs, and task and actors
    """
    epoch = anyio.current_time()
    for number, wave in enumerate(preparation.schedule.waves):
        for task in wave.tasks:
            (sender, receivers), started = task_ends(task), anyio.current_time() - epoch
            excerpt = actors.start(sender, Probe(run, preparation.step_of[sender][task.id]))
            # The sender first: its failure should be told as its own. And a call that waits for its attachment has not
            # been delivered: to cancel it would leave a gap in its actor's calls, for which all later ones would wait.
            await actors.answer(excerpt, Excerpt)
            refs = [
                actors.start(receiver, Compare(run, preparation.step_of[receiver][task.id]), excerpt)
                for receiver in receivers
            ]
            replies = await actors.answers(refs, Done)
            for receiver, reply in zip(receivers, replies, strict=True):
                if reply.differing:
                    raise errors.ValidationError(
                        f"a destination differs from its source in {reply.differing[0]}",
                        actors=(sender, receiver),
                        task=task.id,
                    )

            if progress is not None:
                ended = anyio.current_time() - epoch
                _call(progress, ValidationReceipt(task.id, number, task.nbytes, started, ended))


def own_code_failed(task: int, cause: BaseException | None) -> errors.SyncError:
    """Return the error of a sync that something on the driver ended, a user's callable for one."""
    return errors.SyncError(f"the driver's own code failed beside task {task}: {cause!r}")


def _call(progress: Callable[[TaskReceipt], object], receipt: TaskReceipt) -> None:
    try:
        progress(receipt)
    except Exception as error:
        raise own_code_failed(receipt.task, error) from error


def compare_checksums(finished: dict[int, Finished], preparation: Preparation) -> None:
    """
    Compare what each receiver found in its memory with what the sender sent, and what is passed on with what came.

    :raises ChecksumMismatch: naming task, tensor and actors
    :raises ActorFailed: for an actor that has not summed up what its program says
    """
    step_of = preparation.step_of
    for actor, program in enumerate(preparation.programs):
        count = len(finished[actor].checksums) if actor in finished else 0
        if count != len(program.steps):
            raise errors.ActorFailed(f"the actor has {count} sums of its {len(program.steps)} steps", actors=(actor,))

    for wave in preparation.schedule.waves:
        for task in wave.tasks:
            sender, receivers = task_ends(task)
            sent = finished[sender].checksums[step_of[sender][task.id]]
            _require_passed_on(task, sent, finished, preparation)
            for receiver in receivers:
                index = step_of[receiver][task.id]
                found = finished[receiver].checksums[index]
                if found != sent:
                    cuts = preparation.programs[receiver].steps[index].cuts
                    raise errors.ChecksumMismatch(
                        f"what was sent sums up to {sent:#x}, what was written to {found:#x}: "
                        f"{len(cuts)} cuts from {cuts[0].tensor!r} on",
                        tensor=cuts[0].tensor,
                        actors=(sender, receiver),
                        task=task.id,
                    )


def _require_passed_on(task: Task, sent: int, finished: dict[int, Finished], preparation: Preparation) -> None:
    sender = task.senders[0]
    for before in task.after:
        # A hop comes after the one that brought its bytes, and after nothing else at its sender.
        index = preparation.step_of[sender][before]
        got = finished[sender].checksums[index]
        if got != sent:
            cuts = preparation.programs[sender].steps[index].cuts
            raise errors.ChecksumMismatch(
                f"what was passed on sums up to {sent:#x}, what had come to {got:#x}: "
                f"{len(cuts)} cuts from {cuts[0].tensor!r} on",
                tensor=cuts[0].tensor,
                actors=(sender,),
                task=task.id,
            )
