"""What is answered on a session's own thread: its connection, program and memory are in use there."""

from __future__ import annotations

from wavecast.runtime.collector import collector_paused
from wavecast.runtime.transfer.compare import compare_step, read_step
from wavecast.runtime.transfer.messages import (
    Addresses,
    Attach,
    Compare,
    Disconnect,
    Done,
    Excerpt,
    Export,
    Exported,
    Failure,
    Load,
    Probe,
    Reply,
)
from wavecast.runtime.transfer.session import Session
from wavecast.runtime.transfer.weights import Weights

__all__ = ("answer_on_lane",)


def answer_on_lane(
    request: Load | Export | Attach | Disconnect | Probe | Compare,
    session: Session,
    weights: Weights,
    attachments: tuple[object, ...],
) -> Reply:
    """
    Answer ``request``.

    :param weights: are told what a program writes
    :param attachments: what other actors answered before
    """
    match request:
        case Load():
            return _load(request, session, weights)
        case Export():
            return Exported(session.export(request.run))
        case Attach():
            return _attach(request, session, attachments)
        case Disconnect():
            return _disconnect(request, session)
        case Probe():
            return _probe(request, session)
        case Compare():
            return _compare(request, session, attachments)


def _load(request: Load, session: Session, weights: Weights) -> Done:
    run = session.current(request.run)
    with collector_paused():
        program = request.program.unpack()

    weights.note_received(request.run.group, program)
    session.equipment.load(program, run.memory.device)
    return Done()


def _attach(request: Attach, session: Session, attachments: tuple[object, ...]) -> Reply:
    found: dict[int, Addresses] = {}
    for sender, attachment in zip(request.senders, attachments, strict=True):
        if isinstance(attachment, Failure):
            return attachment

        if not isinstance(attachment, Exported):
            raise TypeError(f"expected a sender's addresses, got {type(attachment).__name__}")

        found[sender] = attachment.addresses

    session.equipment.attach(session.current(request.run), found)
    return Done()


def _disconnect(request: Disconnect, session: Session) -> Done:
    run = session.current(request.run)
    if request.communicators:
        session.equipment.drop_connection(abort=False)

    if request.memory:
        session.equipment.detach()
        session.forget_steps()
        run.releases_memory = True

    return Done()


def _probe(request: Probe, session: Session) -> Excerpt:
    run, equipment = session.current(request.run), session.equipment
    return Excerpt(read_step(equipment.buckets_of(request.step), equipment.memory_of(run)))


def _compare(request: Compare, session: Session, attachments: tuple[object, ...]) -> Reply:
    run, equipment = session.current(request.run), session.equipment
    (attachment,) = attachments
    if isinstance(attachment, Failure):
        return attachment

    if not isinstance(attachment, Excerpt):
        raise TypeError(f"expected the sender's excerpt, got {type(attachment).__name__}")

    return Done(compare_step(equipment.buckets_of(request.step), equipment.memory_of(run), attachment.data))
