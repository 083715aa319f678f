"""What the driver asks of the actors so that a plan can run, and what it need not ask again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest

from wavecast.runtime.carriers import Carriers
from wavecast.runtime.cluster import RayActors
from wavecast.runtime.connection import Connection
from wavecast.runtime.errors import ActorFailed, TransportUnavailable
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Layout, Piece
from wavecast.runtime.options import SyncOptions
from wavecast.runtime.preparation import Preparation, prepare
from wavecast.runtime.transfer.messages import (
    Attach,
    Connect,
    Connected,
    Done,
    Export,
    Exported,
    HostStore,
    Load,
    Request,
    RunId,
    StoreAddress,
)

pytestmark = pytest.mark.anyio

RUN = RunId("group", 1)


@dataclass(frozen=True)
class Ref:
    """Stands for an answer on its way."""

    actor: int
    request: Request
    attachments: tuple[Ref, ...] = ()


class Actors:
    """Writes down what is asked, and answers as actors do."""

    def __init__(self, count: int) -> None:
        self.asked: list[Ref] = []
        self.awaited: list[Ref] = []
        self.failing: Callable[[Ref], Exception | None] = lambda ref: None
        self._count = count

    def __len__(self) -> int:
        return self._count

    def start(self, actor: int, request: Request, *attachments: Ref) -> Ref:
        ref = Ref(actor, request, attachments)
        self.asked.append(ref)
        return ref

    async def answers(self, refs: Sequence[Ref], expected: type) -> list[object]:
        return [await self.answer(ref, expected) for ref in refs]

    async def answer(self, ref: Ref, expected: type) -> object:
        error = self.failing(ref)
        if error is not None:
            raise error

        self.awaited.append(ref)
        answer: Any = object()
        match ref.request:
            case HostStore():
                answer = StoreAddress("10.0.0.1", 29500)
            case Connect():
                answer = Connected(0.5, 100 + ref.actor)
            case Export():
                answer = Exported(cast("Any", None))
            case _:
                answer = Done()

        assert isinstance(answer, expected)
        return answer

    async def ask(self, actor: int, request: Request, expected: type) -> object:
        return await self.answer(self.start(actor, request), expected)

    async def ask_all(self, requests: Mapping[int, Request], expected: type) -> dict[int, object]:
        refs = {actor: self.start(actor, request) for actor, request in requests.items()}
        return {actor: await self.answer(ref, expected) for actor, ref in refs.items()}

    def take(self) -> list[tuple[int, str]]:
        """Return who was asked what since the last time."""
        asked, self.asked = self.asked, []
        return [(ref.actor, type(ref.request).__name__) for ref in asked]


def rows(size: int, parts: int, part: int) -> Piece:
    low, high = size * part // parts, size * (part + 1) // parts
    return Piece("w", Box((low, 0), (high - low, 64)), (size, 64), "float32")


def side(parts: int) -> list[Layout]:
    return [Layout((rows(12, parts, part),)) for part in range(parts)]


ALL_PAIRS = frozenset((sender, receiver) for sender in range(3) for receiver in (3, 4))


def prepared(*pairs: tuple[int, int], chunk_bytes: int = 1 << 20, moved: str = "nccl") -> Preparation:
    """Three sources to two destinations; (0, 3), (1, 3), (1, 4) and (2, 4) have something to say to each other."""
    carriers = Carriers(moved, frozenset(pairs), True)
    return prepare(side(3), side(2), SyncOptions(chunk_bytes=chunk_bytes), None, carriers)


class Driver:
    def __init__(self) -> None:
        self.actors = Actors(5)
        self.connection = Connection(cast("RayActors", self.actors))

    async def ensure(self, preparation: Preparation, addresses: Sequence[int] = (1, 1, 1, 1, 1)) -> bool:
        return await self.connection.ensure(preparation, addresses, run=RUN, seconds=lambda: 7.0)

    def attachments(self) -> dict[int, tuple[int, ...]]:
        """Return, for each receiver that was told to attach, the senders whose answers it was given."""
        found = {}
        for ref in self.actors.asked:
            if isinstance(ref.request, Attach):
                assert ref.request.senders == tuple(each.actor for each in ref.attachments)
                assert all(isinstance(each.request, Export) for each in ref.attachments)
                found[ref.actor] = ref.request.senders

        return found


async def test_where_all_is_pulled_no_communicators_are_made() -> None:
    driver = Driver()
    assert await driver.ensure(prepared(*ALL_PAIRS)) is False
    assert driver.connection.transport == ""
    assert driver.attachments() == {3: (0, 1), 4: (1, 2)}
    assert driver.actors.take() == [
        *((actor, "Load") for actor in range(5)),
        *((actor, "Export") for actor in range(3)),
        (3, "Attach"),
        (4, "Attach"),
    ]


async def test_every_answer_that_was_asked_for_is_awaited() -> None:
    """What is not stays on the list of those that owe one."""
    driver = Driver()
    await driver.ensure(prepared(*ALL_PAIRS))
    assert sorted(map(id, driver.actors.awaited)) == sorted(map(id, driver.actors.asked))


async def test_where_nothing_is_pulled_communicators_are_made_and_nothing_is_exported() -> None:
    driver, preparation = Driver(), prepared()
    assert await driver.ensure(preparation) is True
    assert driver.connection.transport == "nccl"
    assert driver.connection.communicator_bytes == 104
    connects = [ref.request for ref in driver.actors.asked if isinstance(ref.request, Connect)]
    assert {(each.host, each.port, each.transport, each.size, each.seconds) for each in connects} == {
        ("10.0.0.1", 29500, "nccl", 5, 7.0)
    }
    assert [each.rank for each in connects] == [0, 1, 2, 3, 4]
    assert {each.edges for each in connects} == {preparation.edges}
    assert len({each.connection for each in connects}) == 1
    assert driver.actors.take() == [
        (0, "HostStore"),
        *((actor, "Connect") for actor in range(5)),
        *((actor, "Load") for actor in range(5)),
    ]


async def test_what_is_moved_beside_what_is_pulled_gets_its_edges_alone() -> None:
    driver = Driver()
    assert await driver.ensure(prepared((0, 3), (2, 4))) is True
    (edges,) = {ref.request.edges for ref in driver.actors.asked if isinstance(ref.request, Connect)}
    assert sorted(edges) == [(1, 3), (1, 4)]
    assert driver.attachments() == {3: (0,), 4: (2,)}


async def test_a_warm_sync_asks_for_nothing() -> None:
    driver = Driver()
    for preparation in (prepared(*ALL_PAIRS), prepared((0, 3)), prepared()):
        await driver.ensure(preparation)
        driver.actors.take()
        assert await driver.ensure(preparation) is False
        assert driver.actors.take() == []


async def test_only_senders_that_moved_are_asked_again_and_only_by_those_that_pull_from_them() -> None:
    driver, preparation = Driver(), prepared(*ALL_PAIRS)
    await driver.ensure(preparation)
    driver.actors.take()
    await driver.ensure(preparation, (1, 1, 2, 1, 1))
    assert driver.attachments() == {4: (2,)}
    assert driver.actors.take() == [(2, "Export"), (4, "Attach")]
    await driver.ensure(preparation, (1, 5, 2, 1, 1))
    assert driver.attachments() == {3: (1,), 4: (1,)}
    assert driver.actors.take() == [(1, "Export"), (3, "Attach"), (4, "Attach")]
    # A receiver that moved has to be told nothing.
    await driver.ensure(preparation, (1, 5, 2, 9, 9))
    assert driver.actors.take() == []


async def test_another_plan_is_loaded_and_attached_anew() -> None:
    """Addresses are of cuts, which another plan makes elsewhere."""
    driver = Driver()
    await driver.ensure(prepared(*ALL_PAIRS))
    driver.actors.take()
    await driver.ensure(prepared(*ALL_PAIRS, chunk_bytes=256))
    assert driver.attachments() == {3: (0, 1), 4: (1, 2)}
    assert len([kind for _, kind in driver.actors.take() if kind == "Load"]) == 5


async def test_what_was_lost_is_made_anew() -> None:
    driver, preparation = Driver(), prepared((0, 3))
    await driver.ensure(preparation)
    first = driver.actors.take()
    driver.connection.forget()
    assert await driver.ensure(preparation) is True
    assert driver.actors.take() == first


async def test_communicators_are_given_back_and_pulls_outlive_them() -> None:
    driver, preparation = Driver(), prepared((0, 3))
    await driver.ensure(preparation)
    driver.actors.take()
    await driver.connection.release(RUN, communicators=True, memory=False)
    assert driver.actors.take() == [(actor, "Disconnect") for actor in range(5)]
    assert driver.connection.transport == ""
    assert await driver.ensure(preparation) is True
    assert driver.actors.take() == [(0, "HostStore"), *((actor, "Connect") for actor in range(5))]


async def test_communicators_that_serve_more_than_is_wanted_are_kept() -> None:
    driver = Driver()
    assert await driver.ensure(prepared()) is True
    assert await driver.ensure(prepared((0, 3))) is False
    # Those of another transport are not.
    assert await driver.ensure(prepared(moved="gloo")) is True


async def test_it_serves_a_plan_once_all_is_attached_and_knows_where_the_senders_are() -> None:
    driver, preparation = Driver(), prepared(*ALL_PAIRS)
    assert not driver.connection.serves(preparation)
    await driver.ensure(preparation, (1, 2, 3, 4, 5))
    assert driver.connection.serves(preparation)
    assert not driver.connection.serves(prepared(*ALL_PAIRS, chunk_bytes=256))
    assert driver.connection.knows(preparation, (1, 2, 3, 0, 0))
    assert not driver.connection.knows(preparation, (1, 3, 3, 4, 5))
    driver.connection.forget()
    assert not driver.connection.serves(preparation)


async def test_a_mapping_that_failed_is_tried_again() -> None:
    driver, preparation = Driver(), prepared(*ALL_PAIRS)
    driver.actors.failing = lambda ref: (
        TransportUnavailable("cannot be mapped", actors=(4,)) if (ref.actor, type(ref.request)) == (4, Attach) else None
    )
    with pytest.raises(TransportUnavailable, match="cannot be mapped"):
        await driver.ensure(preparation)

    assert not driver.connection.serves(preparation)
    driver.actors.failing = lambda ref: None
    driver.actors.take()
    await driver.ensure(preparation)
    assert driver.attachments() == {3: (0, 1), 4: (1, 2)}
    assert driver.connection.serves(preparation)


async def test_a_sender_that_moved_and_could_not_be_mapped_is_asked_again() -> None:
    driver, preparation = Driver(), prepared(*ALL_PAIRS)
    await driver.ensure(preparation)
    driver.actors.failing = lambda ref: ActorFailed("no", actors=(4,)) if isinstance(ref.request, Attach) else None
    with pytest.raises(ActorFailed):
        await driver.ensure(preparation, (1, 1, 2, 1, 1))

    assert not driver.connection.knows(preparation, (1, 1, 2, 1, 1))
    driver.actors.failing = lambda ref: None
    driver.actors.take()
    await driver.ensure(preparation, (1, 1, 2, 1, 1))
    assert driver.actors.take() == [(2, "Export"), (4, "Attach")]


async def test_programs_are_loaded_anew_when_a_pair_was_refused() -> None:
    """The retry of a sync whose receiver could not map a sender: that pair's steps go over NCCL now."""
    driver = Driver()
    await driver.ensure(prepared(*ALL_PAIRS))
    driver.actors.take()
    again = prepared(*(ALL_PAIRS - {(1, 4)}))
    await driver.ensure(again)
    loads = [ref for ref in driver.actors.asked if isinstance(ref.request, Load)]
    assert [ref.actor for ref in loads] == [0, 1, 2, 3, 4]
