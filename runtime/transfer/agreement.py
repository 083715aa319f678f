"""How receivers that share memory end a run among themselves: all of them take on the version, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wavecast.runtime.transfer.board import AGREED, SUMMED, Boards
from wavecast.runtime.transfer.comm import Deadline
from wavecast.runtime.transfer.program import Program

__all__ = ("Ending", "agree")


@dataclass(frozen=True, slots=True)
class Ending:
    """
    The end of one run on one actor.

    :ivar serial: of the run
    :ivar actor: this actor's number
    :ivar peers: the other receivers
    :ivar deadline: for what the others have to say
    :ivar check: raises once the run was given up
    :ivar say: posts a word and a serial on this actor's board, after its sums; raises once the run was given up, so
        that nobody hears of one that is over here
    """

    serial: int
    actor: int
    peers: tuple[int, ...]
    deadline: Deadline
    check: Callable[[], None]
    say: Callable[[int, int], None]


def agree(ending: Ending, program: Program, sums: Sequence[int], boards: Boards) -> bool:
    """
    Tell whether the run went well for all, once that is certain.

    A sender says that its sums are there, and is done; or, at its begin, that the run must not end so. A receiver
    compares them with its own, says that its weights are in place, and waits for every other receiver to say the same.
    One that finds a difference says so instead: then none ends the run, and the driver finds the difference in the sums
    that all of them answer. All steps of all programs must have been asked for when this is called, or actors might
    wait for each other.

    :param sums: of this actor's steps, in program order; empty when checksums are off
    :raises MoveTimeout: when somebody had not said anything by the deadline
    :raises SyncAborted: when the run was given up on this actor, or what it reads of another
    """
    ending.say(SUMMED, ending.serial)
    received = [step for step in program.steps if step.sender != ending.actor]
    if not received:
        return True

    own: dict[int, dict[int, int]] = {step.sender: {} for step in received}
    for step, total in zip(program.steps, sums, strict=program.checksum):
        if step.sender != ending.actor:
            own[step.sender][step.task] = total

    in_place = all(_same(ending, boards, sender, totals) for sender, totals in own.items())
    ending.say(AGREED, ending.serial if in_place else -ending.serial)
    return in_place and all(
        boards.wait(peer, AGREED, ending.serial, ending.deadline, ending.check) for peer in ending.peers
    )


def _same(ending: Ending, boards: Boards, sender: int, totals: dict[int, int]) -> bool:
    if not boards.wait(sender, SUMMED, ending.serial, ending.deadline, ending.check):
        return False

    return boards.sums(sender, totals, ending.serial) == totals
