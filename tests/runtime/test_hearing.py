"""Several answers heard at once, by way of Ray or ahead of it, without a task for any of them."""

from __future__ import annotations

import asyncio
import gc
import itertools
import weakref
from collections.abc import Callable
from concurrent.futures import Future

import pytest
from ray.exceptions import ActorDiedError

from wavecast.runtime.cluster import RayActors
from wavecast.runtime.errors import ActorDied, ActorFailed, LayoutError, SyncError
from wavecast.runtime.notices import Told
from wavecast.runtime.transfer.messages import Done, Failure, StepDone, encode
from wavecast.runtime.transfer.slip import Slip

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Reference:
    """What Ray's is, as far as it is looked at."""

    def __init__(self) -> None:
        self.found: Future[bytes] = Future()

    def future(self) -> Future[bytes]:
        return self.found

    def say(self, reply: object) -> None:
        self.found.set_result(encode(reply))


class Handle:
    def __init__(self) -> None:
        self.asked: list[Reference] = []

    @property
    def wavecast_request(self) -> Handle:
        return self

    def options(self, *, max_task_retries: int) -> Handle:
        return self

    def remote(self, call: bytes, *attachments: object) -> Reference:
        self.asked.append(Reference())
        return self.asked[-1]


class Slips:
    """Stands for the notices: keeps what it issues."""

    def __init__(self) -> None:
        self.told: list[Told] = []

    def issue(self) -> tuple[Slip, Told]:
        self.told.append(Told())
        return Slip(b"", bytes(16)), self.told[-1]


class Hearing:
    """
    Three calls that are waited for.

    :ivar noted: place and answer of each, as they were noted
    """

    def __init__(self, *, ahead: bool = True) -> None:
        handles = [Handle() for _ in range(3)]
        self.actors = RayActors(handles)
        slips = Slips()
        request = Done()
        refs = [
            self.actors.start(actor, request, notices=slips if ahead else None)  # type: ignore[arg-type]
            for actor in range(3)
        ]
        self.noted: list[tuple[int, object]] = []
        self.on_note: Callable[[], object] = lambda: None
        self.future = self.actors.hear(refs, StepDone, self.note)
        self.refs = [handle.asked[0] for handle in handles]
        self.told = slips.told

    def note(self, place: int, reply: StepDone) -> None:
        self.noted.append((place, reply))
        self.on_note()

    async def soon(self) -> None:
        """Let what threads have said arrive."""
        for _ in range(3):
            await asyncio.sleep(0)


async def test_answers_come_in_the_order_of_the_calls_however_they_arrive() -> None:
    hearing = Hearing()
    first, second, third = StepDone(), StepDone(closed=True), StepDone()
    hearing.told[2].tell(third)
    hearing.refs[0].say(first)
    await hearing.soon()
    assert [place for place, _ in hearing.noted] == [2, 0]
    assert not hearing.future.done()
    assert hearing.actors.waiting_for() == (1,)
    hearing.told[1].tell(second)
    # At once: nobody has to be woken up in between.
    assert hearing.future.done()
    assert await hearing.future == [first, second, third]
    assert hearing.actors.waiting_for() == ()


@pytest.mark.parametrize("ahead", [False, True])
async def test_what_comes_twice_is_noted_once(ahead: bool) -> None:
    hearing = Hearing(ahead=ahead)
    for told in hearing.told:
        told.tell(StepDone())

    for reference in hearing.refs:
        reference.say(StepDone(closed=True))

    await hearing.soon()
    assert await hearing.future == [StepDone(closed=not ahead)] * 3
    assert len(hearing.noted) == 3


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda reference: reference.found.set_exception(ActorDiedError()), ActorDied),
        (lambda reference: reference.say(Failure("LayoutError", "not as planned")), LayoutError),
        (lambda reference: reference.say(Done()), ActorFailed),
    ],
)
async def test_the_first_failure_ends_the_wait_and_nothing_is_noted_after_it(
    spoil: Callable[[Reference], object], kind: type[SyncError]
) -> None:
    hearing = Hearing()
    spoil(hearing.refs[1])
    await hearing.soon()
    with pytest.raises(kind) as caught:
        await hearing.future

    assert caught.value.actors == (1,)
    hearing.told[0].tell(StepDone(closed=True))
    hearing.refs[2].say(StepDone())
    await hearing.soon()
    assert hearing.noted == []
    assert hearing.actors.waiting_for() == (0, 2)


async def test_what_a_cancelled_wait_is_told_goes_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    hearing = Hearing()
    hearing.future.cancel()
    hearing.told[0].tell(StepDone(closed=True))
    hearing.refs[1].found.set_exception(ActorDiedError())
    await hearing.soon()
    assert hearing.noted == []
    # Left on the list, for an abort to end.
    assert hearing.actors.waiting_for() == (0, 1, 2)
    assert caplog.records == []


async def test_answers_after_an_abort_took_the_calls_off_the_list_still_count() -> None:
    hearing = Hearing()
    hearing.actors._running.clear()
    for told in hearing.told:
        told.tell(StepDone())

    assert await hearing.future == [StepDone()] * 3


async def test_what_a_note_raises_is_raised_to_whoever_waits() -> None:
    hearing = Hearing()

    def fail() -> None:
        raise KeyError("lost")

    hearing.on_note = fail
    hearing.told[0].tell(StepDone())
    with pytest.raises(KeyError, match="lost"):
        await hearing.future


async def test_a_failure_that_nobody_waits_for_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    hearing = Hearing()
    hearing.refs[0].found.set_exception(ActorDiedError())
    await hearing.soon()
    del hearing
    gc.collect()
    await asyncio.sleep(0)
    assert caplog.records == []


def test_an_answer_after_the_loop_has_gone_is_left_alone() -> None:
    async def leave() -> Hearing:
        return Hearing()

    hearing = asyncio.run(leave())
    hearing.refs[0].say(StepDone())
    assert hearing.noted == []


async def test_what_ray_says_of_a_dead_actor_is_kept_as_the_cause() -> None:
    hearing = Hearing()
    said = ActorDiedError()
    hearing.refs[2].found.set_exception(said)
    with pytest.raises(ActorDied) as caught:
        await hearing.future

    assert caught.value.__cause__ is said


@pytest.mark.parametrize("ahead", [False, True])
async def test_answers_are_let_go_of_without_the_garbage_collector(ahead: bool) -> None:
    hearing = Hearing(ahead=ahead)
    for told, reference in itertools.zip_longest(hearing.told, hearing.refs):
        if told is not None:
            told.tell(StepDone())

        reference.say(StepDone())

    await hearing.soon()
    assert await hearing.future == [StepDone()] * 3
    kept = [weakref.ref(reference.found) for reference in hearing.refs]
    gc.disable()
    try:
        del hearing, told, reference
        await asyncio.sleep(0)
        assert [found() for found in kept] == [None] * 3
    finally:
        gc.enable()


async def test_of_no_calls_there_is_nothing_to_wait_for() -> None:
    actors = RayActors([Handle()])
    assert await asyncio.wait_for(actors.hear([], Done), 1) == []
    assert await asyncio.wait_for(actors.answers([], Done), 1) == []
