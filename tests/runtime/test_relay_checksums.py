"""What is passed on is compared with what had come, beside both ends of every hop."""

from __future__ import annotations

import pytest

from wavecast.runtime import errors
from wavecast.runtime.carriers import Carriers
from wavecast.runtime.integrity import compare_checksums
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Layout, Piece
from wavecast.runtime.options import SyncOptions
from wavecast.runtime.preparation import Preparation, prepare
from wavecast.runtime.transfer.messages import Finished


def relay() -> Preparation:
    """One trainer, two engines in a chain, two chunks: four hops."""
    held = Layout((Piece("w", Box((0,), (64,)), (64,), "float32"),))
    return prepare([held], [held, held], SyncOptions(chunk_bytes=128, fan_out="chain"), None, Carriers("gloo"))


def sums(ready: Preparation, **wrong: int) -> dict[int, Finished]:
    """Return the sums of a good run, where the step ``a<actor>t<task>`` of an actor may be wrong."""
    origin: dict[int, int] = {}
    for task in ready.schedule.tasks:
        origin[task.id] = origin[task.after[0]] if task.after else task.id

    return {
        program.actor: Finished(
            tuple(wrong.get(f"a{program.actor}t{step.task}", 100 + origin[step.task]) for step in program.steps), 0
        )
        for program in ready.programs
    }


def test_equal_sums_pass() -> None:
    ready = relay()
    assert len(ready.schedule.tasks) == 4
    compare_checksums(sums(ready), ready)


def test_an_actor_without_its_sums_is_named() -> None:
    ready = relay()
    found = sums(ready)
    count = len(found[1].checksums)
    found[1] = Finished((), 0)
    with pytest.raises(errors.ActorFailed, match=f"the actor has 0 sums of its {count} steps") as caught:
        compare_checksums(found, ready)

    assert caught.value.actors == (1,)
    del found[1]
    with pytest.raises(errors.ActorFailed, match=f"the actor has 0 sums of its {count} steps"):
        compare_checksums(found, ready)


def test_what_a_hop_wrote_wrongly_is_told_with_both_ends() -> None:
    ready = relay()
    hop = next(task for task in ready.schedule.tasks if task.senders == (0,))
    with pytest.raises(errors.ChecksumMismatch, match="what was sent sums up to") as caught:
        compare_checksums(sums(ready, **{f"a1t{hop.id}": 5}), ready)

    assert (caught.value.actors, caught.value.task, caught.value.tensor) == ((0, 1), hop.id, "w")


def test_what_changed_between_its_arrival_and_its_being_passed_on_is_told() -> None:
    """Both ends of the second hop agree on the wrong bytes."""
    ready = relay()
    hop = next(task for task in ready.schedule.tasks if task.senders == (1,))
    with pytest.raises(errors.ChecksumMismatch, match="what was passed on sums up to 0x5, what had come to") as caught:
        compare_checksums(sums(ready, **{f"a1t{hop.id}": 5, f"a2t{hop.id}": 5}), ready)

    assert (caught.value.actors, caught.value.task) == ((1,), hop.id)
