"""What a sync hands to the scheduler's run as its dispatch, and what is left of it afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Awaitable, Callable

import pytest
import torch

from tests.runtime.local_actors import LocalActor, local
from tests.runtime.local_groups import held, sync
from wavecast.runtime import SyncOptions, SyncReport, transferring
from wavecast.runtime.sync_run import SyncRun
from wavecast.runtime.transfer.messages import RunStep
from wavecast.scheduler import RunReport, Schedule, Task, run

__all__ = ("local",)


@pytest.mark.usefixtures("local")
def test_the_steps_of_a_task_are_asked_for_in_the_call_of_its_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    in_call: dict[int, int] = {}
    members: dict[int, int] = {}
    remote = LocalActor.remote

    def note(actor: LocalActor, call: bytes, *attachments: object) -> object:
        answer = remote(actor, call, *attachments)  # type: ignore[arg-type]
        asked.extend(1 for request in actor.asked[-1:] if isinstance(request, RunStep))
        return answer

    async def watched(
        schedule: Schedule, dispatch: Callable[[Task], Awaitable[object]], **options: object
    ) -> RunReport:
        def call(task: Task) -> Awaitable[object]:
            before = len(asked)
            awaitable = dispatch(task)
            in_call[task.id] = len(asked) - before
            members[task.id] = len(task.members)
            return awaitable

        return await run(schedule, call, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalActor, "remote", note)
    monkeypatch.setattr(transferring, "run", watched)
    sent, kept = torch.arange(256.0), torch.zeros(256)

    sync(
        [[held("w", sent)]],
        [[held("w", kept)]],
        options=SyncOptions(deadline_seconds=15, chunk_bytes=256, in_flight=4, retries=0),
    )

    assert torch.equal(sent, kept)
    assert len(in_call) == 4
    assert in_call == members


@pytest.mark.usefixtures("local")
def test_a_sync_is_forgotten_without_the_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows the user's callable, the plan and what the actors said."""
    runs: list[weakref.ref[SyncRun]] = []
    begin = SyncRun.run

    async def noted(run: SyncRun) -> SyncReport:
        runs.append(weakref.ref(run))
        return await begin(run)

    monkeypatch.setattr(SyncRun, "run", noted)
    gc.collect()
    gc.disable()
    try:
        sync([[held("w", torch.arange(4.0))]], [[held("w", torch.zeros(4))]])
        assert [run() for run in runs] == [None]
    finally:
        gc.enable()
