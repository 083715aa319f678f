"""A byte budget is a promise: what is really allocated for staging, actor by actor, stays within it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.runtime.local_actors import Holder, LocalActor, Stage, local
from tests.runtime.transfer.test_staging import allocated
from wavecast.runtime import Shard

__all__ = ("local",)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("local")]

#: The least there is.
BUDGET = 1 << 16
COLUMNS = BUDGET // 4


class Large(Holder):
    """Holds rows that are each as large as the budget."""

    def __init__(self, first: int, rows: int, of: int, value: float) -> None:
        super().__init__(first, rows, of, value)
        self.matrix = torch.full((rows, COLUMNS), value)

    def transfer_shards(self) -> Sequence[Shard]:
        return [Shard("matrix", self.matrix, (self.first, 0), (self.of, COLUMNS)), Shard("scale", self.scale, (), ())]


def staged(actor: LocalActor) -> int:
    """The bytes that an actor's session has really allocated for staging."""
    (session,) = actor.agent._runs._sessions.values()
    assert session.equipment.staging is not None
    return allocated(session.equipment.staging)


async def test_no_actor_allocates_more_than_its_budget_and_the_report_says_how_much() -> None:
    stage = Stage(kind=Large)
    async with stage.group(transport="gloo", budget_bytes=BUDGET) as group:
        for value in (2.0, 3.0):
            stage.fill(value)
            report = await group.sync()
            assert stage.values(0) == stage.values(1) == {value}
            # There is more than enough to send: both buckets are as large as they may be.
            assert [staged(actor) for actor in stage.actors] == [BUDGET] * 6
            assert report.staging_bytes == BUDGET
